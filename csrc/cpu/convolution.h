// One convolution with its epilogue: what every algorithm offers.
#pragma once

#include <memory>
#include <string>

#include "algorithm.h"
#include "step.h"

namespace fused_resnet {

class Convolution : public Step {
 public:
  // Throws std::invalid_argument or std::overflow_error for a shape that cannot be computed.
  static std::unique_ptr<Convolution> make(const ConvShape& shape, DType dtype, int threads, const Request& request = {});
  // By a choice that was made for the shape, or for one that differs in its batch alone.
  static std::unique_ptr<Convolution> make(const ConvShape& shape, DType dtype, int threads, const Choice& choice);

  // Throws std::bad_alloc, before any work, where there is no memory for the workspace. False: as of run_task.
  bool run(const Operands& operands) const;

  // Writes the packed weight, packed_bytes() bytes. False: it is of no use, because a value that this algorithm derives from
  // the weight is not finite; only direct convolution gives then what the definition says. `joined`: of a joined convolution.
  bool pack(const WeightView& weight, const WeightView& joined, void* out) const;
  // The same as tasks, in any order and on any thread. None: nothing is to be packed, Operands::fresh is read. False: also where a weight of
  // a direct convolution is not finite.
  i64 pack_tasks() const { return packed_.count() * pack_parts(); }
  bool pack_task(i64 index, const WeightView& weight, const WeightView& joined, void* out) const noexcept;
  virtual i64 packed_bytes() const = 0;
  // Everything that the packed weight depends on besides the weight's values: two convolutions whose texts are equal read the same bytes.
  virtual std::string packing() const = 0;

  i64 workspace_bytes() const { return shared_bytes() + thread_bytes() * threads_; }
  int threads() const { return threads_; }
  const ConvShape& shape() const { return shape_; }
  const Choice& choice() const { return choice_; }
  const char* isa() const { return isa_; }

 protected:
  Convolution(const ConvShape& shape, DType dtype, int threads, const Choice& choice);

  const void* element(const void* data, i64 offset) const {
    return static_cast<const char*>(data) + offset * kernels_->storage_bytes;
  }

  // The part of packing() that all algorithms share.
  std::string packing_of(const std::string& algorithm, const Panels& cut) const;

  // Input channels [begin, end) of one panel. `joined`: of the joined convolution, as above, where `end` is the last of the others.
  virtual bool write_packed(i64 panel, i64 begin, i64 end, const WeightView& weight, const WeightView& joined, void* out) const noexcept = 0;
  // The arguments of that, but for `out`.
  PackWeightArgs pack_args(i64 panel, i64 begin, i64 end, const WeightView& weight) const;

  ConvShape shape_;
  const DTypeKernels* kernels_;
  const char* isa_;
  int threads_;
  Choice choice_;
  Panels packed_;  // of the packed weight

 private:
  i64 pack_parts() const;  // of each panel
};

}  // namespace fused_resnet
