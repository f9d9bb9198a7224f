// The gradient of a convolution in its input.
//
//     dx[h] = sum of dy[p] w[r] over all p, r with p * stride - pad + r * dilation = h
//
// For the pixels h of one residue modulo the stride that is a convolution of dy with stride 1: its kernel is some of w's taps, from the
// last to the first, with input and output channels exchanged. So it is made of the forward kernels, a convolution for each pair of
// residues of row and column, each by Winograd where that is faster; with stride 1 it is one.
#pragma once

#include <memory>
#include <vector>

#include "fresh_convolution.h"

namespace fused_resnet {

class InputGradient final : public Step {
 public:
  // `shape`: of the convolution itself, without bias, ReLU and joined convolution; x: how dx lies, y: how dy does. shortcut: what is added to
  // dx or, `masked`, the output of the ReLU that gave the input: dx is then the gradient in front of it. Throws as Convolution::make.
  InputGradient(const ConvShape& shape, const Strides& weight, DType dtype, int threads, const Request& request);

  // Operands: x: dy; weight: as it is in memory; shortcut; y: dx. Throws std::bad_alloc, before any work, where there is no memory for the workspace.
  // False: as of Step::run_task; or a weight is not finite, which would make NaN of the zeros around dy, where it belongs to no sum.
  bool run(const Operands& operands) const;

  int phases() const override { return phases_; }
  i64 tasks(int phase) const override;
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 shared_bytes() const override { return shared_bytes_; }
  i64 thread_bytes() const override { return thread_bytes_; }
  i64 workspace_bytes() const { return shared_bytes_ + thread_bytes_ * threads_; }
  int threads() const { return threads_; }
  std::string describe() const override;
  std::string reason() const;

  const char* isa() const { return isa_; }
  // Of the first part.
  Algorithm algorithm() const { return parts_.empty() ? Algorithm::direct : parts_[0].step->convolution().choice().algorithm; }

 private:
  // The pixels of one residue of row and column.
  struct Part {
    std::unique_ptr<FreshConvolution> step;
    i64 x = 0, weight = 0, shortcut = 0, y = 0;  // its first element of each operand
    i64 shared_at = 0;             // bytes of the shared workspace before its own
  };

  // The residue `first` of one axis.
  struct Axis {
    i64 pixels = 0;                // of dx
    i64 taps = 0, first_tap = 0;   // the first that is read is the last of the kernel: taps go down
    i64 dilation = 1, pad = 0, skip = 0, size = 0;  // of dy: `size` pixels behind `skip`
    bool empty() const { return taps == 0 || size < 1; }
  };
  static Axis axis(i64 first, i64 size, i64 outputs, i64 kernel, i64 stride, i64 pad, i64 dilation);

  static i64 tasks_of(const Part& part, int phase) { return phase < part.step->phases() ? part.step->tasks(phase) : 0; }
  void rest(i64 index, const Operands& operands) const;
  const void* element(const void* data, i64 offset) const { return static_cast<const char*>(data) + offset * bytes_; }

  ConvShape shape_;
  const char* isa_;
  i64 bytes_;  // of an element
  int threads_, phases_ = 1;
  std::vector<Part> parts_;  // none: no window touches a pixel
  i64 rest_rows_ = 0;  // of dx in a task that writes what no window touches; 0: all of its pixels are somebody's
  i64 shared_bytes_ = 0, thread_bytes_ = 0;
};

}  // namespace fused_resnet
