// The transforms of Winograd convolution: of Y = A' [(G g G') * (B' d B)] A (winograd.h) the matrices A, G and B, as functions.
#pragma once

#include "kernels.h"
#include "registers.h"

namespace fused_resnet {
namespace {

// One-dimensional transforms, on registers `stride` apart in an array.

// F(2, 3): points 0, 1, -1 and infinity. Additions only; as exact as direct convolution.
template <class V>
struct Winograd2 {
  using reg = typename V::reg;
  static constexpr int m = 2, step = 2, alpha = 4;

  static FR_INLINE void input(const reg (&d)[alpha], reg (&t)[alpha]) {
    t[0] = V::sub(d[0], d[2]);
    t[1] = V::add(d[1], d[2]);
    t[2] = V::sub(d[2], d[1]);
    t[3] = V::sub(d[1], d[3]);
  }
  static FR_INLINE void output(const reg (&p)[alpha], reg (&y)[m]) {
    y[0] = V::add(V::add(p[0], p[1]), p[2]);
    y[1] = V::sub(V::sub(p[1], p[2]), p[3]);
  }
  static FR_INLINE void output_transposed(const reg (&y)[m], reg (&p)[alpha]) {
    p[0] = y[0];
    p[1] = V::add(y[0], y[1]);
    p[2] = V::sub(y[0], y[1]);
    p[3] = V::sub(V::zero(), y[1]);
  }
  static FR_INLINE void weight_transposed(const reg (&u)[alpha], reg (&g)[3]) {
    const reg half = V::set1(typename V::type(0.5)), even = V::mul(V::add(u[1], u[2]), half);
    g[0] = V::add(u[0], even);
    g[1] = V::mul(V::sub(u[1], u[2]), half);
    g[2] = V::add(u[3], even);
  }
  template <class T>
  static FR_INLINE void weight(const T& g0, const T& g1, const T& g2, T (&u)[alpha]) {
    const T even = (g0 + g2) * 0.5, odd = g1 * 0.5;
    u[0] = g0;
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g2;
  }
};

// F(4, 3): points 0, +-5/8, +-3/2 and infinity, which lose about half as much as 0, +-1, +-2 and infinity: the powers of the
// points and of their inverses stay near 1.
template <class V>
struct Winograd4 {
  using reg = typename V::reg;
  using type = typename V::type;
  static constexpr int m = 4, step = 4, alpha = 6;
  static constexpr double a = 0.625, b = 1.5, a2 = a * a, b2 = b * b;
  static constexpr double na = 1 / (2 * a2 * (a2 - b2)), nb = 1 / (2 * b2 * (b2 - a2));

  static FR_INLINE reg c(double value) { return V::set1(type(value)); }

  // Rows of B': the products of (x - point) over all finite points but one, and over all of them.
  static FR_INLINE void input(const reg (&d)[alpha], reg (&t)[alpha]) {
    t[0] = V::fma(d[0], c(a2 * b2), V::fma(d[2], c(-a2 - b2), d[4]));
    const reg even_a = V::fma(d[2], c(-b2), d[4]), odd_a = V::fma(d[1], c(-b2), d[3]);
    t[1] = V::fma(odd_a, c(a), even_a);
    t[2] = V::fma(odd_a, c(-a), even_a);
    const reg even_b = V::fma(d[2], c(-a2), d[4]), odd_b = V::fma(d[1], c(-a2), d[3]);
    t[3] = V::fma(odd_b, c(b), even_b);
    t[4] = V::fma(odd_b, c(-b), even_b);
    t[5] = V::fma(d[1], c(a2 * b2), V::fma(d[3], c(-a2 - b2), d[5]));
  }
  // Rows of A': the powers 0 to 3 of the points.
  static FR_INLINE void output(const reg (&p)[alpha], reg (&y)[m]) {
    const reg even_a = V::add(p[1], p[2]), odd_a = V::sub(p[1], p[2]);
    const reg even_b = V::add(p[3], p[4]), odd_b = V::sub(p[3], p[4]);
    y[0] = V::add(V::add(p[0], even_a), even_b);
    y[1] = V::fma(odd_b, c(b), V::mul(odd_a, c(a)));
    y[2] = V::fma(even_b, c(b2), V::mul(even_a, c(a2)));
    y[3] = V::fma(odd_b, c(b2 * b), V::fma(odd_a, c(a2 * a), p[5]));
  }
  static FR_INLINE void output_transposed(const reg (&y)[m], reg (&p)[alpha]) {
    p[0] = y[0];
    const reg even_a = V::fma(y[2], c(a2), y[0]), odd_a = V::fma(y[3], c(a2), y[1]);
    p[1] = V::fma(odd_a, c(a), even_a);
    p[2] = V::fma(odd_a, c(-a), even_a);
    const reg even_b = V::fma(y[2], c(b2), y[0]), odd_b = V::fma(y[3], c(b2), y[1]);
    p[3] = V::fma(odd_b, c(b), even_b);
    p[4] = V::fma(odd_b, c(-b), even_b);
    p[5] = y[3];
  }
  static FR_INLINE void weight_transposed(const reg (&u)[alpha], reg (&g)[3]) {
    const reg even_a = V::mul(V::add(u[1], u[2]), c(na)), odd_a = V::mul(V::sub(u[1], u[2]), c(a * na));
    const reg even_b = V::mul(V::add(u[3], u[4]), c(nb)), odd_b = V::mul(V::sub(u[3], u[4]), c(b * nb));
    g[0] = V::fma(u[0], c(1 / (a2 * b2)), V::add(even_a, even_b));
    g[1] = V::add(odd_a, odd_b);
    g[2] = V::fma(even_a, c(a2), V::fma(even_b, c(b2), u[5]));
  }
  // Rows of G: the powers 0 to 2 of a point over the product of its differences from the other finite points.
  template <class T>
  static FR_INLINE void weight(const T& g0, const T& g1, const T& g2, T (&u)[alpha]) {
    const T even_a = (g0 + g2 * a2) * na, odd_a = g1 * (a * na);
    const T even_b = (g0 + g2 * b2) * nb, odd_b = g1 * (b * nb);
    u[0] = g0 * (1 / (a2 * b2));
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g2;
  }
};

// F(2, 3) with stride 2: the even pixels under the outer taps are F(2, 2) with points 0, 1 (of opposite sign) and infinity,
// the odd ones under the middle tap a product each. 25 products instead of 36, and no constants at all.
template <class V>
struct Winograd2Stride2 {
  using reg = typename V::reg;
  static constexpr int m = 2, step = 4, alpha = 5;

  static FR_INLINE void input(const reg (&d)[alpha], reg (&t)[alpha]) {
    t[0] = V::sub(d[0], d[2]);
    t[1] = d[2];
    t[2] = V::sub(d[4], d[2]);
    t[3] = d[1];
    t[4] = d[3];
  }
  static FR_INLINE void output(const reg (&p)[alpha], reg (&y)[m]) {
    y[0] = V::add(V::add(p[0], p[1]), p[3]);
    y[1] = V::add(V::add(p[1], p[2]), p[4]);
  }
  template <class T>
  static FR_INLINE void weight(const T& g0, const T& g1, const T& g2, T (&u)[alpha]) {
    u[0] = g0;
    u[1] = g0 + g2;
    u[2] = g2;
    u[3] = g1;
    u[4] = g1;
  }
};

}  // namespace
}  // namespace fused_resnet
