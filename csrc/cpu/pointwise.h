// The passes without a convolution, row by row: bias + shortcut + ReLU forward, mask + bias gradient backward.
#pragma once

#include "kernels.h"
#include "registers.h"

namespace fused_resnet {
namespace {

template <class V, class S, class X>
void pass_row_from(const PassRowArgs& a) {
  constexpr int W = V::width;
  const X* x = static_cast<const X*>(a.x);
  const S* bias = static_cast<const S*>(a.bias);
  const S* shortcut = static_cast<const S*>(a.shortcut);
  S* y = static_cast<S*>(a.y);
  const typename V::reg of_row = bias && !a.bias_step ? V::set1(widen(*bias)) : V::zero();
  const auto put = [&](i64 i, auto load_x, auto load, auto store) FR_INLINE_LAMBDA {
    typename V::reg value = load_x(x + i * a.x_step);
    if (bias) value = V::add(value, a.bias_step ? load(bias + i, 1) : of_row);
    if (shortcut) value = V::add(value, load(shortcut + i * a.shortcut_step, a.shortcut_step));
    if (a.relu) value = V::relu(value);
    store(y + i, value);
  };
  i64 i = 0;
  if (a.x_step == 1 && (!shortcut || a.shortcut_step == 1)) {  // without masks
    for (; i + W <= a.length; i += W) {
      put(i, [](const X* p) { return V::load_all(p); }, [](const S* p, i64) { return V::load_all(p); }, [](S* p, typename V::reg r) { V::store_all(p, r); });
    }
  }
  for (; i < a.length; i += W) {
    const i64 count = smaller(a.length - i, W);
    put(i, [&](const X* p) { return load_steps<V>(p, a.x_step, count); }, [count](const S* p, i64 step) { return load_steps<V>(p, step, count); },
        [count](S* p, typename V::reg r) { V::store_n(p, r, count); });
  }
}

template <class V, class S>
void pass_row(const PassRowArgs& a) {
  if (a.wide_input) {
    pass_row_from<V, S, typename V::type>(a);
  } else {
    pass_row_from<V, S, S>(a);
  }
}

template <class V, class S>
void mask_rows(const MaskRowsArgs& a) {
  using T = typename V::type;
  using reg = typename V::reg;
  constexpr int W = V::width;
  const S* grad = static_cast<const S*>(a.grad);
  const S* output = static_cast<const S*>(a.output);
  S* out = static_cast<S*>(a.out);
  T* sum = static_cast<T*>(a.sum);
  const bool masks = output != nullptr;
  for (i64 row = 0; row < a.rows; ++row) {
    reg total = V::zero();
    i64 i = 0;
    if (a.grad_step == 1 && a.output_step == 1) {  // without masks
      for (; i + W <= a.length; i += W) {
        reg value = V::load_all(grad + i);
        if (masks) {
          value = V::relu_gradient(value, V::load_all(output + i));
          V::store_all(out + i, value);
        }
        if (sum && a.sum_step) V::store(sum + i, V::add(V::load(sum + i), value));
        total = V::add(total, value);
      }
    }
    for (; i < a.length; i += W) {
      const i64 count = smaller(a.length - i, W);
      reg value = load_steps<V>(grad + i * a.grad_step, a.grad_step, count);
      if (masks) {
        value = V::relu_gradient(value, load_steps<V>(output + i * a.output_step, a.output_step, count));
        V::store_n(out + i, value, count);
      }
      if (sum && a.sum_step) V::store_n(sum + i, V::add(V::load_n(sum + i, count), value), count);
      total = V::add(total, value);
    }
    if (sum && !a.sum_step) {  // all of the row belongs to one channel
      T lanes[V::width];
      V::store(lanes, total);
      for (int l = 0; l < W; ++l) *sum += lanes[l];
    }
    grad += a.grad_pitch;
    if (!masks) continue;
    output += a.output_pitch;
    out += a.out_pitch;
  }
}

template <class V, class S>
void store_values(void* out, const double* values, i64 count) {
  for (i64 i = 0; i < count; ++i) narrow(typename V::type(values[i]), static_cast<S*>(out) + i);
}

// Enough independent chains that latency does not limit, and no loads: what is left is the rate of the FMA units.
template <class V>
__attribute__((noinline)) double fma_peak(i64 iterations) {
  constexpr int chains = V::width > 1 ? (V::width == 16 ? 24 : 12) : 8;
  typename V::reg acc[chains];
  const typename V::reg x = V::set1(1.0f + 1e-7f), y = V::set1(1e-9f);
  FR_UNROLL
  for (int i = 0; i < chains; ++i) acc[i] = V::set1(float(i));
  for (i64 n = 0; n < iterations; ++n) {
    FR_UNROLL
    for (int i = 0; i < chains; ++i) acc[i] = V::fma(acc[i], x, y);
  }
  typename V::type total[V::width];
  typename V::reg sum = acc[0];
  FR_UNROLL
  for (int i = 1; i < chains; ++i) sum = V::add(sum, acc[i]);
  V::store(total, sum);
  // A result that is used: the compiler must keep the loop.
  return total[0] == 12345.0f ? 0.0 : double(iterations) * chains * V::width * 2.0;
}

}  // namespace
}  // namespace fused_resnet
