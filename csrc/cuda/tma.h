// TMA descriptors. CUTLASS asks the driver for its function at every descriptor, and where that refuses one it asserts, which -DNDEBUG
// removes: the kernel would run with a descriptor that nobody wrote. The calls below ask once, and throw with the descriptor's numbers.
//
// To be included before any other header of CUTLASS or CuTe.
#pragma once

#include <cutlass/cutlass.h>

#include <cutlass/cuda_host_adapter.hpp>

#include "driver.h"

namespace fused_resnet::cuda {

// cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col, whose arguments these are. Throw std::runtime_error.
CUresult checked_cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                        const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                                        CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                        CUtensorMapFloatOOBfill fill);
CUresult checked_cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                         const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                                         cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                         CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

}  // namespace fused_resnet::cuda

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) ::fused_resnet::cuda::checked_##function
