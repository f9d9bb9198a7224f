// AVX512_BF16: products of pairs of bfloat16, at twice the rate of float32. Everything else is as in isa_avx512.cpp.
#include "vec_avx512_bf16.h"
#include "table.h"

namespace fused_resnet {
const DTypeKernels kAvx512Bf16Kernels = dtype_kernels<Avx512Bf16Float, bf16, 14, Avx512Bf16Pair>();
}  // namespace fused_resnet
