// "Registers" of one element, in plain C++: the floor that runs on any machine.
#pragma once

#include "../epilogue.h"
#include "../types.h"

namespace fused_resnet {
namespace {

template <class T>
struct ScalarVec {
  using type = T;
  using part = T;  // an element of A is `group` of these
  using reg = T;
  static constexpr int width = 1;
  static constexpr int group = 1;
  static constexpr int vectors = 2, rows[] = {4, 4, 0, 0};  // register tiles: see DTypeKernels
  static reg zero() { return T(0); }
  static reg set1(T v) { return v; }
  static reg load(const T* p) { return *p; }
  template <class S>
  static reg load_n(const S* p, i64) {
    return widen(*p);
  }
  template <class S>
  static reg load_all(const S* p) {
    return widen(*p);
  }
  template <class S>
  static void store_all(S* p, reg v) {
    narrow(v, p);
  }
  static void store(T* p, reg v) { *p = v; }
  static void store_group(T* p, const reg (&v)[1]) { *p = v[0]; }
  template <class S>
  static void store_n(S* p, reg v, i64) {
    narrow(v, p);
  }
  static reg add(reg a, reg b) { return a + b; }
  static reg sub(reg a, reg b) { return a - b; }
  static reg mul(reg a, reg b) { return a * b; }
  static reg fma(reg a, reg b, reg c) { return a * b + c; }
  static reg relu(reg v) { return fused_resnet::relu(v); }
  static reg relu_gradient(reg g, reg y) { return fused_resnet::relu_gradient(g, y); }
  static reg flushed(reg v) { return (v < 0 ? -v : v) < kSmallestNormal<T> ? T(0) : v; }
  static reg larger(reg a, reg b) { return b > a || b != b ? b : a; }
  // `is` where b would be the larger of a and b, else `was`.
  static reg if_later(reg a, reg b, reg was, reg is) { return b > a || b != b ? is : was; }
  // v where a and b are equal, else 0.
  static reg if_equal(reg a, reg b, reg v) { return a == b ? v : T(0); }
  static reg evens(reg a, reg) { return a; }
  static reg interleave_low(reg a, reg) { return a; }
  static reg interleave_high(reg, reg b) { return b; }
};

}  // namespace
}  // namespace fused_resnet
