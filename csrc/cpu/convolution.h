// One convolution with its epilogue, planned once and run many times.
#pragma once

#include <string>
#include <vector>

#include "algorithm.h"

namespace fused_resnet {

class Convolution {
 public:
  // Throws std::invalid_argument or std::overflow_error for a shape that cannot be computed.
  Convolution(const ConvShape& shape, DType dtype, int threads);
  Convolution(const Convolution&) = delete;  // chunks_ points into taps_
  Convolution& operator=(const Convolution&) = delete;

  // Pointers to the first element of each operand; bias and shortcut may be null where the shape has none. Throws
  // std::bad_alloc, before any work, where there is no memory for the workspace.
  void run(const void* x, const void* packed_weight, const void* bias, const void* shortcut, void* y) const;

  // Writes the packed weight, packed_bytes() bytes.
  void pack(const void* weight, const Strides& stride, void* out) const;

  i64 packed_bytes() const;
  i64 workspace_bytes() const { return workspace_ * threads_; }
  const Blocking& blocking() const { return blocking_; }
  const char* isa() const { return isa_; }

 private:
  struct Task;
  Task task(i64 index) const;
  void run_task(const Task& task, const void* x, const void* weight, const void* bias, const void* shortcut, void* y,
                char* workspace) const;
  void pack_input(const Task& task, const void* x, char* out) const;

  ConvShape shape_;
  const DTypeKernels* kernels_;
  const char* isa_;
  Blocking blocking_;
  int threads_;
  std::vector<Tap> taps_;
  std::vector<Chunk> chunks_;
  i64 scratch_ = 0;    // bytes of packed rows in one thread's workspace
  i64 partial_ = 0;    // ... of accumulators
  i64 workspace_ = 0;  // ... of all of it
};

}  // namespace fused_resnet
