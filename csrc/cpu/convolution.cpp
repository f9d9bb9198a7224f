#include "convolution.h"

#include <algorithm>
#include <atomic>

#include "team.h"
#include "direct_convolution.h"
#include "huge_pages.h"
#include "winograd_convolution.h"

namespace fused_resnet {
namespace {

constexpr i64 kPackChannels = 16;      // input channels of a task of packing: a multiple of any group
constexpr i64 kSerialWeights = 65536;  // below this many weights waking threads costs more than it saves

}  // namespace

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
  std::atomic<bool> finite{true};
  parallel_for(pack_tasks(), shape_.k * shape_.reduction() > kSerialWeights ? threads_ : 1, [&](i64 i) {
    if (!pack_task(i, weight, joined, out)) finite = false;
  });
  return finite || choice_.algorithm == Algorithm::direct;
}

i64 Convolution::pack_parts() const { return (shape_.c + kPackChannels - 1) / kPackChannels; }

bool Convolution::pack_task(i64 index, const WeightView& weight, const WeightView& joined, void* out) const noexcept {
  const i64 begin = index % pack_parts() * kPackChannels;
  return write_packed(index / pack_parts(), begin, std::min(begin + kPackChannels, shape_.c), weight, joined, out);
}

PackWeightArgs Convolution::pack_args(i64 panel, i64 begin, i64 end, const WeightView& weight) const {
  PackWeightArgs a;
  a.weight = weight.data;
  a.stride = weight.stride;
  a.k = shape_.k;
  a.c = shape_.c;
  a.r = shape_.r;
  a.s = shape_.s;
  a.k_begin = packed_.begin(panel);
  a.width = packed_.width(panel);
  a.c_begin = begin;
  a.c_end = end;
  return a;
}

std::string Convolution::packing_of(const std::string& algorithm, const Panels& cut) const {
  const auto n = [](i64 value) { return std::to_string(value); };
  return algorithm + ", " + isa_ + ", weight " + n(shape_.k) + "x" + n(shape_.c) + "x" + n(shape_.r) + "x" + n(shape_.s) + ", from " +
         n(kernels_->storage_bytes) + " to " + n(kernels_->accumulator_bytes) + " bytes, groups of " + n(kernels_->group) +
         ", vectors of " + n(cut.vector) + ", panels of " + n(cut.channels);
}

bool Convolution::run(const Operands& operands) const { return shape_.empty() || run_phases(*this, operands, threads_, helpers_as_before(threads_)); }

}  // namespace fused_resnet
