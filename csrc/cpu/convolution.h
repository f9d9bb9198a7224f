// One convolution with its epilogue, planned once and run many times: what every algorithm offers. A convolution is a few
// phases, one after the other; a phase is many tasks, in any order and on any thread.
#pragma once

#include <memory>
#include <string>

#include "algorithm.h"

namespace fused_resnet {

// Pointers to the first element of each operand; bias and shortcut may be null where the shape has none.
struct Operands {
  const void* x = nullptr;
  const void* weight = nullptr;  // packed
  const void* bias = nullptr;
  const void* shortcut = nullptr;
  void* y = nullptr;
  const void* joined = nullptr;  // the input of the joined convolution
};

// A weight as it is in memory; stride: n of K, c of C, h of R, w of S.
struct WeightView {
  const void* data = nullptr;
  Strides stride;
};

class Convolution {
 public:
  // Throws std::invalid_argument or std::overflow_error for a shape that cannot be computed.
  static std::unique_ptr<Convolution> make(const ConvShape& shape, DType dtype, int threads, const Request& request = {});
  // By a choice that was made for the shape, or for one that differs in its batch alone.
  static std::unique_ptr<Convolution> make(const ConvShape& shape, DType dtype, int threads, const Choice& choice);
  virtual ~Convolution() = default;
  Convolution(const Convolution&) = delete;
  Convolution& operator=(const Convolution&) = delete;

  // Throws std::bad_alloc, before any work, where there is no memory for the workspace. False: a value on the way was not finite, so
  // that the output is not to be used: direct convolution may give a finite one, and what the definition says in any case.
  bool run(const Operands& operands) const;

  // Writes the packed weight, packed_bytes() bytes. False: it is of no use, because a value that this algorithm derives from
  // the weight is not finite; only direct convolution gives then what the definition says. `joined`: of a joined convolution.
  bool pack(const WeightView& weight, const WeightView& joined, void* out) const;
  virtual i64 packed_bytes() const = 0;
  // Everything that the packed weight depends on besides the weight's values: two convolutions whose texts are equal read the same bytes.
  virtual std::string packing() const = 0;
  virtual std::string describe() const = 0;

  // For whoever runs several convolutions in one parallel region. `shared`: shared_bytes() for all threads together, `mine`:
  // thread_bytes() for each; both 64-byte aligned. Between two phases all threads must meet. run_task: false as of run.
  virtual int phases() const = 0;
  virtual i64 tasks(int phase) const = 0;
  virtual bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const = 0;
  virtual i64 shared_bytes() const { return 0; }
  virtual i64 thread_bytes() const = 0;

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

  virtual bool write_packed(const WeightView& weight, const WeightView& joined, void* out) const = 0;

  ConvShape shape_;
  const DTypeKernels* kernels_;
  const char* isa_;
  int threads_;
  Choice choice_;
};

}  // namespace fused_resnet
