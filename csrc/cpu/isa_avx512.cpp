// AVX-512: 32 registers hold a tile of 6 pixels x 4 vectors (9 x 3, 14 x 2), as many of weights as it has vectors and a broadcast.
#include "vec_avx512.h"
#include "table.h"

namespace fused_resnet {
const KernelTable kAvx512Table = {
    "avx512",
    {dtype_kernels<Avx512Float, float>(), dtype_kernels<Avx512Double, double>(),
     dtype_kernels<Avx512Float, bf16>()},
    fma_peak<Avx512Float>,
};
}  // namespace fused_resnet
