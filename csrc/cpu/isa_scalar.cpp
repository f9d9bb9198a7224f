// The floor: plain C++ for any machine. A tile of 4 pixels and 2 channels.
#include "vec_scalar.h"
#include "table.h"

namespace fused_resnet {
const KernelTable kScalarTable = {
    "scalar",
    {dtype_kernels<ScalarVec<float>, float>(), dtype_kernels<ScalarVec<double>, double>(),
     dtype_kernels<ScalarVec<float>, bf16>()},
    fma_peak<ScalarVec<float>>,
};
}  // namespace fused_resnet
