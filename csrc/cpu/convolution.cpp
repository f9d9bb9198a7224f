#include "convolution.h"

#include <algorithm>

#include "team.h"
#include "direct_convolution.h"
#include "huge_pages.h"
#include "winograd_convolution.h"

namespace fused_resnet {

Convolution::Convolution(const ConvShape& shape, DType dtype, int threads, const Choice& choice)
    : shape_(shape),
      kernels_(&current_table().dtype[int(dtype)]),
      isa_(current_table().isa),
      threads_(threads),
      choice_(choice) {}

std::unique_ptr<Convolution> Convolution::make(const ConvShape& shape, DType dtype, int threads, const Request& request) {
  shape.validate();
  return make(shape, dtype, threads, choose_algorithm(shape, current_table().dtype[int(dtype)], cache_sizes(), request));
}

std::unique_ptr<Convolution> Convolution::make(const ConvShape& shape, DType dtype, int threads, const Choice& choice) {
  shape.validate();
  const DTypeKernels& kernels = current_table().dtype[int(dtype)];
  threads = shape.macs() < serial_macs(kernels) && !streams_weights(shape, kernels) ? 1 : std::max(threads, 1);
  if (choice.algorithm == Algorithm::direct) return std::make_unique<DirectConvolution>(shape, dtype, threads, choice);
  return std::make_unique<WinogradConvolution>(shape, dtype, threads, choice);
}

bool Convolution::pack(const WeightView& weight, const WeightView& joined, void* out) const {
  prefer_huge_pages(out, packed_bytes());
  return write_packed(weight, joined, out);
}

std::string Convolution::packing_of(const std::string& algorithm, const Panels& cut) const {
  const auto n = [](i64 value) { return std::to_string(value); };
  return algorithm + ", " + isa_ + ", weight " + n(shape_.k) + "x" + n(shape_.c) + "x" + n(shape_.r) + "x" + n(shape_.s) + ", from " +
         n(kernels_->storage_bytes) + " to " + n(kernels_->accumulator_bytes) + " bytes, groups of " + n(kernels_->group) +
         ", vectors of " + n(cut.vector) + ", panels of " + n(cut.channels);
}

bool Convolution::run(const Operands& operands) const { return shape_.empty() || run_phases(*this, operands, threads_, helpers_as_before(threads_)); }

}  // namespace fused_resnet
