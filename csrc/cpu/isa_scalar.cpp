// The floor: plain C++ for any machine. A tile of 4 pixels and 2 channels.
#include "vec_scalar.h"
#include "table.h"

namespace fused_resnet {
const KernelTable kScalarTable = {
    "scalar",
    {dtype_kernels<ScalarVec<float>, float, 4>(), dtype_kernels<ScalarVec<double>, double, 4>(),
     dtype_kernels<ScalarVec<float>, bf16, 4>()},
    fma_peak<ScalarVec<float>>,
};
}  // namespace fused_resnet
