#include "tensor.h"

#include <algorithm>
#include <string>

namespace fused_resnet::cuda {
namespace {

std::vector<TensorKernel>& registry() {
  static std::vector<TensorKernel> kernels;
  return kernels;
}

}  // namespace

RegisterTensorKernel::RegisterTensorKernel(const Tile& tile, TensorPrepare prepare, TensorLaunch launch) {
  registry().push_back({tile, prepare, launch});
}

const std::vector<TensorKernel>& tensor_kernels() {
  // Files register in the linker's order: sort once, when all have.
  static const bool sorted = [] {
    std::sort(registry().begin(), registry().end(),
              [](const TensorKernel& a, const TensorKernel& b) { return a.tile.name() < b.tile.name(); });
    return true;
  }();
  (void)sorted;
  return registry();
}

}  // namespace fused_resnet::cuda
