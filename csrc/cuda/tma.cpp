#include <stdexcept>

#include "descriptor.h"
#include "driver.h"

namespace fused_resnet::cuda {

// Declared in tma.h, which needs CUTLASS.
CUresult checked_cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                        const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                                        CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                        CUtensorMapFloatOOBfill fill) {
  const CUresult result = FR_DRIVER(cuTensorMapEncodeTiled, 12000)(map, type, rank, address, sizes, strides, box, steps, interleave, swizzle,
                                                                   promotion, fill);
  if (result == CUDA_SUCCESS) return result;
  throw std::runtime_error(
      refused_descriptor("a matrix", name_of(result), int(type), rank, address, sizes, strides, listed(box, rank), "", steps));
}

CUresult checked_cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                         const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                                         cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                         CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const CUresult result = FR_DRIVER(cuTensorMapEncodeIm2col, 12000)(map, type, rank, address, sizes, strides, lower, upper, channels, pixels,
                                                                    steps, interleave, swizzle, promotion, fill);
  if (result == CUDA_SUCCESS) return result;
  const cuuint32_t box[] = {channels, pixels};
  const std::string corners = listed(lower, rank - 2) + " to " + listed(upper, rank - 2);
  throw std::runtime_error(
      refused_descriptor("an image", name_of(result), int(type), rank, address, sizes, strides, listed(box, 2), corners, steps));
}

}  // namespace fused_resnet::cuda
