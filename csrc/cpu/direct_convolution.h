// Direct convolution: any kernel size, stride, padding and dilation.
#pragma once

#include <vector>

#include "convolution.h"

namespace fused_resnet {

class DirectConvolution final : public Convolution {
 public:
  DirectConvolution(const ConvShape& shape, DType dtype, int threads, const Choice& choice);

  i64 packed_bytes() const override;
  std::string packing() const override;
  std::string describe() const override { return blocking_.describe(); }

  int phases() const override { return 1; }
  i64 tasks(int) const override { return shape_.empty() ? 0 : blocking_.tasks(); }
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 thread_bytes() const override { return workspace_; }

 private:
  bool write_packed(i64 panel, i64 begin, i64 end, const WeightView& weight, const WeightView& joined, void* out) const noexcept override;

  struct Task;
  Task task(i64 index) const;
  void pack_input(const Task& task, const void* x, char* out) const;
  void pack_joined(const Task& task, const void* x, char* out) const;

  Blocking blocking_;
  std::vector<Tap> taps_;
  std::vector<Chunk> chunks_;  // these point into taps_
  i64 scratch_ = 0;    // bytes of packed rows in one thread's workspace
  i64 joined_at_ = 0;  // ... before the joined input, which is a part of them
  i64 partial_ = 0;    // ... of accumulators
  i64 workspace_ = 0;  // ... of all of it
};

}  // namespace fused_resnet
