// AVX2 + FMA: 16 registers hold a tile of 6 pixels x 2 vectors, 2 of weights and a broadcast.
#include "vec_avx2.h"
#include "table.h"

namespace fused_resnet {
const KernelTable kAvx2Table = {
    "avx2",
    {dtype_kernels<Avx2Float, float>(), dtype_kernels<Avx2Double, double>(), dtype_kernels<Avx2Float, bf16>()},
    fma_peak<Avx2Float>,
};
}  // namespace fused_resnet
