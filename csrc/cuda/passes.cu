// The passes' launches: from shapes and pointers to a kernel's parameters.
#include "mask_sums.cuh"
#include "passes.cuh"

namespace fused_resnet::cuda {
namespace {

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

template <class T, class X, Walk kWalk, bool kMask>
void run_pass(const PassShape& s, const void* first, const void* bias, const void* second, void* result, Stream stream) {
  Pass<T, X, kWalk, kMask> pass;
  pass.first = static_cast<const X*>(first);
  pass.second = static_cast<const T*>(second);
  pass.bias = static_cast<const T*>(bias);
  pass.result = static_cast<T*>(result);
  pass.extent = extent_of(s);
  pass.first_strides = s.first;
  pass.second_strides = s.second;
  pass.result_strides = s.result;
  pass.elements = elements(s);
  pass.plane = runs_over_channels(s) ? 1 : s.p * s.q;
  pass.relu = s.relu;
  launch(pass, ceil_div(pass.elements, pass.kTile), kMask ? "relu_backward" : "bias_add_relu", stream);
}

template <class T, class X, bool kMask>
void choose_pass(const PassShape& s, const void* first, const void* bias, const void* second, void* result, Stream stream) {
  const bool vectors = dense(s, s.first) && (!second || dense(s, s.second)) && aligned16(first) && aligned16(second) &&
                       aligned16(result);
  if (!vectors) return run_pass<T, X, Walk::strided, kMask>(s, first, bias, second, result, stream);
  if constexpr (!kMask) {
    if (bias && runs_over_channels(s) && s.k % kVector<T> == 0 && aligned16(bias)) {
      return run_pass<T, X, Walk::dense_groups, kMask>(s, first, bias, second, result, stream);
    }
  }
  run_pass<T, X, Walk::dense, kMask>(s, first, bias, second, result, stream);
}

template <class T, int kCount, bool kChannels>
void run_sums(const PassShape& s, const void* grad, const void* output, void* result, void* workspace, Stream stream) {
  using Kernel = MaskSums<T, kCount, kChannels>;
  Kernel sums;
  sums.grad = static_cast<const T*>(grad);
  sums.output = static_cast<const T*>(output);
  sums.result = static_cast<T*>(result);
  sums.sums = static_cast<typename Kernel::Acc*>(workspace);
  sums.extent = extent_of(s);
  sums.grad_strides = s.first;
  sums.output_strides = s.second;
  sums.result_strides = s.result;
  sums.pieces = pieces_of(s);
  sums.pixels = s.n * s.p * s.q;
  sums.threads_across = 1;
  if (kChannels) {
    while (sums.threads_across * kCount < s.k && sums.threads_across * kCount < Kernel::kThreads) sums.threads_across *= 2;
  }
  sums.beside = kChannels ? ceil_div(s.k, sums.threads_across * kCount) : s.k;
  launch(sums, checked_product(sums.pieces.count, sums.beside), "relu_backward", stream);
}

template <class T>
void backward(const PassShape& s, const void* grad, const void* output, void* result, void* bias_grad, void* workspace,
              Stream stream) {
  const bool any = elements(s) > 0;
  if (!bias_grad) {
    if (any) choose_pass<T, T, true>(s, grad, nullptr, output, result, stream);
    return;
  }
  if (any) {
    const bool channels = runs_over_channels(s);
    const bool vectors = dense(s, s.first) && dense(s, s.second) && aligned16(grad) && aligned16(output) && aligned16(result) &&
                         (channels ? s.k : s.p * s.q) % kVector<T> == 0;
    if (vectors) {
      channels ? run_sums<T, kVector<T>, true>(s, grad, output, result, workspace, stream)
               : run_sums<T, kVector<T>, false>(s, grad, output, result, workspace, stream);
    } else {
      channels ? run_sums<T, 1, true>(s, grad, output, result, workspace, stream)
               : run_sums<T, 1, false>(s, grad, output, result, workspace, stream);
    }
  }
  SumPieces<T> sum;
  sum.sums = static_cast<const typename Accumulator<T>::type*>(workspace);
  sum.out = static_cast<T*>(bias_grad);
  sum.pieces = pieces_of(s).count;  // none: the sums are 0
  sum.k = s.k;
  launch(sum, ceil_div(s.k, sum.kChannels), "relu_backward", stream);
}

template <class T>
void forward(const PassShape& s, const void* input, const void* bias, const void* shortcut, void* result, Stream stream) {
  using Acc = typename Accumulator<T>::type;
  if (s.wide_input && sizeof(Acc) != sizeof(T)) return choose_pass<T, Acc, false>(s, input, bias, shortcut, result, stream);
  choose_pass<T, T, false>(s, input, bias, shortcut, result, stream);
}

}  // namespace

void bias_add_relu(const PassShape& s, const void* input, const void* bias, const void* shortcut, void* result, Stream stream) {
  if (elements(s) == 0) return;
  switch (s.dtype) {
    case DType::float32: return forward<float>(s, input, bias, shortcut, result, stream);
    case DType::float64: return forward<double>(s, input, bias, shortcut, result, stream);
    case DType::bfloat16: return forward<bf16>(s, input, bias, shortcut, result, stream);
    case DType::float16: return forward<fp16>(s, input, bias, shortcut, result, stream);
  }
}

void relu_backward(const PassShape& s, const void* grad, const void* output, void* result, void* bias_grad, void* workspace,
                   Stream stream) {
  switch (s.dtype) {
    case DType::float32: return backward<float>(s, grad, output, result, bias_grad, workspace, stream);
    case DType::float64: return backward<double>(s, grad, output, result, bias_grad, workspace, stream);
    case DType::bfloat16: return backward<bf16>(s, grad, output, result, bias_grad, workspace, stream);
    case DType::float16: return backward<fp16>(s, grad, output, result, bias_grad, workspace, stream);
  }
}

std::size_t relu_backward_workspace(const PassShape& s) {
  return std::size_t(checked_product(pieces_of(s).count, s.k)) * (s.dtype == DType::float64 ? sizeof(double) : sizeof(float));
}

}  // namespace fused_resnet::cuda
