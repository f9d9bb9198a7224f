// AVX512_BF16: products of pairs of bfloat16, at twice the rate of float32. Everything else is as in isa_avx512.cpp.
#include "vec_avx512_bf16.h"
#include "table.h"

namespace fused_resnet {
namespace {
constexpr DTypeKernels bf16_kernels() {
  DTypeKernels k = dtype_kernels<Avx512Bf16Float, bf16, Avx512Bf16Pair>();
  // Without a product of pairs there is no reason to lose a denormal.
  k.pass_row = pass_row<Avx512Float, bf16>;
  k.mask_rows = mask_rows<Avx512Float, bf16>;
  k.largest_row = largest_row<Avx512Float, bf16>;
  k.largest_windows = largest_windows<Avx512Float, bf16>;
  k.store_weight = store_weight<Avx512Float, bf16>;
  return k;
}
}  // namespace
const DTypeKernels kAvx512Bf16Kernels = bf16_kernels();
}  // namespace fused_resnet
