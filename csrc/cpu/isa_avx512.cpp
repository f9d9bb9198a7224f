// AVX-512: 32 registers hold a tile of 14 pixels x 2 vectors, 2 of weights and a broadcast.
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
