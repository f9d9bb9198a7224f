// The gradient of a convolution in its weight.
//
//     dw[k, c, r, s] = sum over n, p, q of dy[n, k, p, q] x[n, c, p * stride - pad + r * dilation, q * stride - pad + s * dilation]
//
// A product of two matrices whose reduction runs over pixels, [K x pixels] by [pixels x (R S C)]; or, of 3x3 kernels with stride 1, one at each
// of Winograd's positions over tiles (weight_products.h). The reduction is cut into chunks, whatever the number of threads, and their sums are
// added in one order, so that the result is the same on any number of threads.
#pragma once

#include <string>

#include "algorithm.h"
#include "step.h"
#include "winograd_tiles.h"

namespace fused_resnet {

class WeightGradient final : public Step {
 public:
  // `shape`: of the convolution itself, without bias, shortcut, ReLU and joined convolution; y: how dy lies. `weight`: how dw will. Throws as
  // Convolution::make.
  WeightGradient(const ConvShape& shape, const Strides& weight, DType dtype, int threads, const Request& request);

  // Operands: x: the input; weight: dy, as it is in memory; y: dw. Throws std::bad_alloc, before any work, where there is no memory for the
  // workspace. False: a sum is not finite. The definition's may be: Winograd's transforms overflow earlier, and an infinity in dy meets the
  // zeros around x here.
  bool run(const Operands& operands) const;

  int phases() const override { return chunks_ > 1 ? 2 : 1; }
  i64 tasks(int phase) const override { return phase == 0 ? chunks_ * row_parts_ : store_tasks(); }
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 shared_bytes() const override;
  i64 thread_bytes() const override { return layout_.end; }
  i64 workspace_bytes() const { return shared_bytes() + thread_bytes() * threads_; }
  int threads() const { return threads_; }
  std::string describe() const override;
  const std::string& reason() const { return reason_; }
  const char* isa() const { return isa_; }
  Algorithm algorithm() const { return algorithm_; }

 private:
  // What a thread works in.
  struct Memory {
    char *grad, *input, *product, *sums, *scratch;
  };
  // What is fetched into the L2 cache while products are made: pixels that are loaded next, all channels of the input and some of dy, where
  // pixels are side by side in memory.
  struct Next {
    const char *input = nullptr, *grad = nullptr;
    i64 pixels = 0, grad_bytes = 0;
  };
  struct Layout {
    i64 input = 0, product = 0, sums = 0, scratch = 0, end = 0;  // bytes before each
  };
  Layout layout() const;

  void cut();
  i64 positions() const { return gradient_ ? gradient_->alpha * gradient_->alpha : 1; }
  i64 grad_stride() const { return spread(steps_ * grad_pitch_); }    // from position to position, elements of the accumulator's type
  i64 input_stride() const { return spread(steps_ * columns_.channels); }
  i64 spread(i64 elements) const;
  i64 store_tasks() const { return (shape_.k + kernels_->vector - 1) / kernels_->vector; }
  i64 tap_stride() const { return gradient_ ? columns_.begin(columns_.count() - 1) + columns_.width(columns_.count() - 1) : shape_.c; }

  Next look_ahead(i64 begin, i64 end, i64 first, i64 last, const void* x, const void* dy) const;
  // What is loaded: where it begins, and elements of the accumulator's type from step to step.
  struct Loaded {
    const char* data;
    i64 pitch;
  };
  Loaded load_grad(i64 begin, i64 end, i64 first, i64 last, const void* dy, const Memory& memory) const;
  Loaded load_input(i64 begin, i64 end, i64 panel, const void* x, const Memory& memory) const;
  void multiply(const Loaded& grad, const Loaded& input, i64 steps, i64 rows, i64 panel, bool more, const Memory& memory, char* sums,
                const Next& next) const;
  bool store(i64 first, i64 last, const char* sums, i64 parts, void* dw) const;
  template <class F>
  void for_each_run(i64 begin, i64 end, const F& f) const;
  const void* element(const void* data, i64 offset) const { return static_cast<const char*>(data) + offset * kernels_->storage_bytes; }

  ConvShape shape_;   // with pixels in one direction where that is the same, and exchanged as said
  Strides weight_;
  bool exchanged_ = false;  // a product the other way round: dy is taken for the input, the input for dy, K for C
  const DTypeKernels* kernels_;
  const char* isa_;
  int threads_;
  Algorithm algorithm_ = Algorithm::direct;
  std::string reason_;
  const WinogradGradientKernels* gradient_ = nullptr;  // null: direct
  WinogradTiles input_tiles_, grad_tiles_;

  Panels columns_;       // of C; direct: of R S C
  i64 total_ = 0;        // steps of the reduction: pixels of dy, or tiles
  i64 chunks_ = 1;       // that it is cut into
  i64 steps_ = 1;        // that are loaded at a time, at most
  i64 rows_ = 1, row_parts_ = 1;  // output channels of a task, at most; tasks of a chunk
  i64 grad_pitch_ = 0;   // elements from step to step
  bool grad_in_place_ = false, input_in_place_ = false;  // read where they are
  i64 pitch_ = 0;        // elements of the sums of an output channel: [tap][c]
  Layout layout_;
};

}  // namespace fused_resnet
