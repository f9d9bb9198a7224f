// One kernel of a program, planned once and run many times: a convolution, a pooling.
#pragma once

#include <string>

#include "../types.h"

namespace fused_resnet {

// A weight as it is in memory; stride: n of K, c of C, h of R, w of S.
struct WeightView {
  const void* data = nullptr;
  Strides stride;
};

// Pointers to the first element of each operand; null where the step has none.
struct Operands {
  const void* x = nullptr;
  const void* weight = nullptr;  // packed
  const void* bias = nullptr;
  const void* shortcut = nullptr;
  void* y = nullptr;
  const void* joined = nullptr;  // the input of the joined convolution
  WeightView fresh;              // of a convolution that wants it as it is in memory, in place of `weight`
};

// A step is a few phases, one after the other; a phase is many tasks, in any order and on any thread. A phase begins when all
// tasks of the one before are done.
class Step {
 public:
  Step() = default;
  virtual ~Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  virtual int phases() const = 0;
  virtual i64 tasks(int phase) const = 0;
  bool alone(int) const { return false; }  // whether one thread does the phase, whatever the team
  // False: a value on the way was not finite, so that the output is not to be used: direct convolution may give a finite one, and what
  // the definition says in any case. `shared`: shared_bytes() for all threads together, `mine`: thread_bytes() for each; both 64-byte
  // aligned.
  virtual bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept = 0;
  virtual i64 shared_bytes() const { return 0; }
  virtual i64 thread_bytes() const = 0;
  virtual std::string describe() const = 0;
};

}  // namespace fused_resnet
