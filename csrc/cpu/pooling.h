// The kernels of pooling: the largest of several rows and its gradient, the largest in each window of one row, the mean of several rows.
#pragma once

#include "kernels.h"
#include "registers.h"

namespace fused_resnet {
namespace {

template <class V, class S, class Y>
void largest_row_to(const LargestRowArgs& a) {
  const S* const* rows = reinterpret_cast<const S* const*>(a.rows);
  Y* y = static_cast<Y*>(a.y);
  for (i64 i = 0; i < a.length; i += V::width) {
    const i64 count = smaller(a.length - i, V::width);
    typename V::reg value = V::load_n(rows[0] + i, count);
    for (i64 row = 1; row < a.count; ++row) value = V::larger(value, V::load_n(rows[row] + i, count));
    V::store_n(y + i, value, count);
  }
}

template <class V, class S>
void largest_row(const LargestRowArgs& a) {
  if (a.wide_output) {
    largest_row_to<V, S, typename V::type>(a);
  } else {
    largest_row_to<V, S, S>(a);
  }
}

// Elements x, x + step, x + 2 * step, ... as a register.
template <class V>
typename V::reg load_every(const typename V::type* x, i64 step, i64 count) {
  if (step == 2) return V::evens(V::load(x), V::load(x + V::width));
  return load_steps<V>(x, step, count);
}

template <class V, class S>
void largest_windows(const LargestWindowsArgs& a) {
  const typename V::type* x = static_cast<const typename V::type*>(a.x);
  S* y = static_cast<S*>(a.y);
  for (i64 i = 0; i < a.windows; i += V::width) {
    const i64 count = smaller(a.windows - i, V::width);
    typename V::reg value = load_every<V>(x + i * a.stride, a.stride, count);
    for (i64 j = 1; j < a.size; ++j) value = V::larger(value, load_every<V>(x + i * a.stride + j, a.stride, count));
    V::store_n(y + i, value, count);
  }
}

template <class V>
void largest_grad(const LargestGradArgs& a) {
  using T = typename V::type;
  using reg = typename V::reg;
  const T* const* rows = reinterpret_cast<const T* const*>(a.rows);
  T* const* results = reinterpret_cast<T* const*>(a.results);
  for (i64 i = 0; i < a.length; i += V::width) {
    const i64 count = smaller(a.length - i, V::width);
    reg largest = V::load_n(rows[0] + i, count), at = V::zero();
    for (i64 row = 1; row < a.count; ++row) {
      const reg value = V::load_n(rows[row] + i, count);
      at = V::if_later(largest, value, at, V::set1(T(row)));
      largest = V::larger(largest, value);
    }
    reg grad = V::load_n(static_cast<const T*>(a.grad) + i, count);
    if (a.masked) grad = V::relu_gradient(grad, largest);
    for (i64 row = 0; row < a.count; ++row) {
      T* const result = results[row] + i;
      V::store_n(result, V::add(V::load_n(result, count), V::if_equal(at, V::set1(T(row)), grad)), count);
    }
  }
}

template <class V, class S>
void mean_row(const MeanRowArgs& a) {
  const S* x = static_cast<const S*>(a.x);
  S* y = static_cast<S*>(a.y);
  const typename V::reg share = V::set1(typename V::type(1) / typename V::type(a.rows));
  for (i64 i = 0; i < a.length; i += V::width) {
    const i64 count = smaller(a.length - i, V::width);
    typename V::reg sum = V::zero();
    for (i64 row = 0; row < a.rows; ++row) sum = V::add(sum, V::load_n(x + row * a.stride + i, count));
    V::store_n(y + i, V::mul(sum, share), count);
  }
}

}  // namespace
}  // namespace fused_resnet
