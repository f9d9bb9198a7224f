// Winograd convolution F(m x m, 3x3) on one thread's tiles: the four steps, templates over a vector type V (vec_*.h), a
// storage type S and the transform F (Winograd2, Winograd4). Included once by each isa_*.cpp; everything has internal linkage.
//
//     Y = A' [ sum over c of (G g G') * (B' d B) ] A        Lavin and Gray 2015, arXiv:1509.09308, eq. 12
//
// An output tile of m x m pixels needs an input tile d of alpha x alpha, the next one `step` pixels on. Of each there are alpha * alpha "positions", and at each
// position a product of matrices: [tiles x C] by [C x K]. Every output is the same sequence of operations whatever the
// blocking, and whichever tiles share a call.
#pragma once

#include "kernels.h"
#include "registers.h"
#include "winograd_multiply.h"
#include "winograd_transforms.h"

namespace fused_resnet {
namespace {

// Step 0, once for each weight: U = G g G' of one panel, in double precision, rounded once. Returns false where a value is
// not finite; denormals become 0.
template <class V, class S, class D, class F>
bool winograd_weight(const WinogradWeightArgs& a) {
  using T = typename V::type;
  using E = typename D::part;  // of an element of the packed weight: D::group of them
  constexpr int A = F::alpha, W = V::width, G = D::group;
  const i64 elements = (a.c + G - 1) / G;
  constexpr double tiny = sizeof(T) == sizeof(float) ? 1.17549435e-38 : 2.2250738585072014e-308;
  constexpr double huge = sizeof(T) == sizeof(float) ? 3.40282347e+38 : 1.7976931348623157e+308;
  E* out = static_cast<E*>(a.out);
  bool finite = true;
  for (i64 j = 0; j < a.width; j += W) {
    const i64 lanes = smaller(a.k - a.k_begin - j, W);
    const S* first = static_cast<const S*>(a.weight) + (a.k_begin + j) * a.stride.n;
    for (i64 c = 0; c < elements * G; ++c) {
      double g[3][3][W] = {};
      for (i64 k = 0; k < lanes && c < a.c; ++k) {
        const S* from = first + k * a.stride.n + c * a.stride.c;
        for (int r = 0; r < 3; ++r) {
          for (int s = 0; s < 3; ++s) g[r][s][k] = widen(from[r * a.stride.h + s * a.stride.w]);
        }
      }
      double u[A][A][W];
      bool good = true;
      for (int k = 0; k < W; ++k) {
        double rows[3][A];
        FR_UNROLL
        for (int s = 0; s < 3; ++s) F::weight(g[0][s][k], g[1][s][k], g[2][s][k], rows[s]);
        FR_UNROLL
        for (int i = 0; i < A; ++i) {
          double line[A];
          F::weight(rows[0][i], rows[1][i], rows[2][i], line);
          FR_UNROLL
          for (int l = 0; l < A; ++l) {
            const double size = line[l] < 0 ? -line[l] : line[l];
            good = good & (size <= huge);
            u[i][l][k] = size < tiny ? 0.0 : line[l];
          }
        }
      }
      finite = finite && good;
      for (int i = 0; i < A * A; ++i) {
        E* to = out + ((i * elements + c / G) * a.width + j) * G + c % G;
        const double* from = &u[0][0][0] + i * W;
        for (int k = 0; k < W; ++k) narrow(T(from[k]), to + k * G);
      }
    }
  }
  return finite;
}

// Step 1: V = B' d B of one strip (tiles side by side in one row of tiles) and up to W channels. X is what the rows hold:
// the storage type, or the accumulator's where rows were packed.
template <class V, class X, class D, class F>
void winograd_input(const WinogradInputArgs& a) {
  using T = typename V::type;
  using reg = typename V::reg;
  constexpr int A = F::alpha, W = V::width;
  const i64 columns = a.tiles * F::step + F::alpha - F::step;
  T* const lines = static_cast<T*>(a.scratch);  // [A][columns][W]: every column transformed once, though tiles share them
  const i64 pitch = columns * W;
  const auto vertical = [&](i64 column, auto load) {
    reg d[A], t[A];
    FR_UNROLL
    for (int i = 0; i < A; ++i) d[i] = load(static_cast<const X*>(a.row[i]) + column * a.step[i]);
    F::input(d, t);
    FR_UNROLL
    for (int i = 0; i < A; ++i) V::store(lines + i * pitch + column * W, t[i]);
  };
  const auto outside = [&](i64 column) {
    FR_UNROLL
    for (int i = 0; i < A; ++i) V::store(lines + i * pitch + column * W, V::zero());
  };
  for (i64 column = 0; column < a.left; ++column) outside(column);
  if (a.channels == W) {
    for (i64 column = a.left; column < a.right; ++column) vertical(column, [](const X* p) { return V::load_n(p, W); });
  } else {
    const i64 n = a.channels;
    for (i64 column = a.left; column < a.right; ++column) vertical(column, [n](const X* p) { return V::load_n(p, n); });
  }
  for (i64 column = a.right; column < columns; ++column) outside(column);
  using E = typename D::part;
  E* out = static_cast<E*>(a.out);
  for (i64 tile = 0; tile < a.tiles; ++tile, out += W * D::group) {
    const T* from = lines + tile * F::step * W;
    FR_UNROLL
    for (int i = 0; i < A; ++i) {
      reg d[A], t[A];
      FR_UNROLL
      for (int l = 0; l < A; ++l) d[l] = V::load(from + i * pitch + l * W);
      F::input(d, t);
      FR_UNROLL
      for (int l = 0; l < A; ++l) V::store_all(out + (i * A + l) * a.position_stride * D::group, t[l]);
    }
  }
}

// Step 2 is in winograd_multiply.h.

// Y = A' M A of one tile and one vector of channels: `product` at a tile, positions `stride` apart. `odd` becomes NaN, and stays so,
// where a value of Y is not finite. Whatever is not finite in a transformed input or a product reaches a value of Y: each is a term of one,
// and an infinity or a NaN never sums to a finite number.
template <class V, class F>
FR_INLINE void inverse(const typename V::type* product, i64 stride, typename V::reg (&y)[F::m][F::m], typename V::reg& odd) {
  using reg = typename V::reg;
  constexpr int A = F::alpha;
  reg half[F::m][A];
  FR_UNROLL
  for (int l = 0; l < A; ++l) {
    reg p[A], t[F::m];
    FR_UNROLL
    for (int i = 0; i < A; ++i) p[i] = V::load(product + (i * A + l) * stride);
    F::output(p, t);
    FR_UNROLL
    for (int i = 0; i < F::m; ++i) half[i][l] = t[i];
  }
  FR_UNROLL
  for (int i = 0; i < F::m; ++i) {
    F::output(half[i], y[i]);
    FR_UNROLL
    for (int l = 0; l < F::m; ++l) odd = V::fma(y[i][l], V::zero(), odd);
  }
}

// Whether `odd` of ``inverse`` is still zero everywhere.
template <class V>
bool all_finite(typename V::reg odd) {
  alignas(64) typename V::type lanes[V::width];
  V::store(lanes, odd);
  int odd_lanes = 0;
  for (int i = 0; i < V::width; ++i) odd_lanes |= lanes[i] != 0;  // a NaN is not 0
  return odd_lanes == 0;
}

// Step 3 for channels side by side in memory: inverse transform, bias, shortcut, ReLU, store.
template <class V, class S, class F>
bool winograd_output_channels(const WinogradOutputArgs& a) {
  using T = typename V::type;
  using reg = typename V::reg;
  constexpr int W = V::width, m = F::m;
  reg odd = V::zero();
  for (i64 v = 0; v < a.width; v += W) {
    const i64 channel = a.channel + v, count = smaller(a.k - channel, W);
    if (count <= 0) break;
    const reg bias = a.bias ? V::load_n(static_cast<const S*>(a.bias) + channel, count) : V::zero();
    const T* product = static_cast<const T*>(a.product) + v;
    for (i64 tile = 0; tile < a.tiles; ++tile, product += a.width) {
      reg y[m][m];
      inverse<V, F>(product, a.position_stride, y, odd);
      const i64 columns = smaller(a.columns - tile * m, m);
      S* out = static_cast<S*>(a.y) + tile * m * a.y_stride.w + channel;
      const S* shortcut = a.shortcut ? static_cast<const S*>(a.shortcut) + tile * m * a.shortcut_stride.w + channel : nullptr;
      const auto put = [&](int i, int l, auto load, auto store) FR_INLINE_LAMBDA {
        reg value = V::add(y[i][l], bias);
        if (shortcut) value = V::add(value, load(shortcut + i * a.shortcut_stride.h + l * a.shortcut_stride.w));
        if (a.relu) value = V::relu(value);
        store(out + i * a.y_stride.h + l * a.y_stride.w, value);
      };
      if (columns == m && a.rows == m && count == W) {
        FR_UNROLL
        for (int i = 0; i < m; ++i) {
          FR_UNROLL
          for (int l = 0; l < m; ++l) {
            put(i, l, [](const S* p) { return V::load_n(p, W); }, [](S* p, reg r) { V::store_n(p, r, W); });
          }
        }
      } else {
        FR_UNROLL
        for (int i = 0; i < m; ++i) {
          FR_UNROLL
          for (int l = 0; l < m; ++l) {
            if (i < a.rows && l < columns) {
              put(i, l, [count](const S* p) { return V::load_n(p, count); },
                  [count](S* p, reg r) { V::store_n(p, r, count); });
            }
          }
        }
      }
    }
  }
  return all_finite<V>(odd);
}

// Step 3 for any strides: the strip's pixels are turned, so that one register holds the pixels of one channel.
template <class V, class S, class F>
bool winograd_output_pixels(const WinogradOutputArgs& a) {
  using T = typename V::type;
  using reg = typename V::reg;
  constexpr int W = V::width, m = F::m;
  T* const lines = static_cast<T*>(a.scratch);  // [m][columns rounded up to W][W]
  const i64 pitch = (a.tiles * m + W - 1) / W * W * W;
  reg odd = V::zero();
  for (i64 v = 0; v < a.width; v += W) {
    const i64 channel = a.channel + v, count = smaller(a.k - channel, W);
    if (count <= 0) break;
    const T* product = static_cast<const T*>(a.product) + v;
    for (i64 tile = 0; tile < a.tiles; ++tile, product += a.width) {
      reg y[m][m];
      inverse<V, F>(product, a.position_stride, y, odd);
      FR_UNROLL
      for (int i = 0; i < m; ++i) {
        FR_UNROLL
        for (int l = 0; l < m; ++l) V::store(lines + i * pitch + (tile * m + l) * W, y[i][l]);
      }
    }
    for (i64 i = 0; i < a.rows; ++i) {
      for (i64 first = 0; first < a.columns; first += W) {
        const i64 pixels = smaller(a.columns - first, W);
        reg rows[W];
        FR_UNROLL
        for (int p = 0; p < W; ++p) rows[p] = p < pixels ? V::load(lines + i * pitch + (first + p) * W) : V::zero();
        transpose<V>(rows);
        alignas(64) T turned[W][W];
        FR_UNROLL
        for (int c = 0; c < W; ++c) V::store(turned[c], rows[c]);
        for (i64 c = 0; c < count; ++c) {
          reg value = V::load(turned[c]);
          if (a.bias) value = V::add(value, V::set1(widen(static_cast<const S*>(a.bias)[channel + c])));
          if (a.shortcut) {
            const S* shortcut = static_cast<const S*>(a.shortcut) + (channel + c) * a.shortcut_stride.c +
                                i * a.shortcut_stride.h + first * a.shortcut_stride.w;
            value = V::add(value, load_steps<V>(shortcut, a.shortcut_stride.w, pixels));
          }
          if (a.relu) value = V::relu(value);
          S* y = static_cast<S*>(a.y) + (channel + c) * a.y_stride.c + i * a.y_stride.h + first * a.y_stride.w;
          if (a.y_stride.w == 1) {
            V::store_n(y, value, pixels);
          } else {
            S scattered[W];
            V::store_n(scattered, value, pixels);
            for (i64 p = 0; p < pixels; ++p) y[p * a.y_stride.w] = scattered[p];
          }
        }
      }
    }
  }
  return all_finite<V>(odd);
}

template <class V, class S, class F>
bool winograd_output(const WinogradOutputArgs& a) {
  if (a.y_stride.c == 1 && (!a.shortcut || a.shortcut_stride.c == 1)) {
    return winograd_output_channels<V, S, F>(a);
  }
  return winograd_output_pixels<V, S, F>(a);
}

template <class V, class S, class D, class F>
constexpr WinogradKernels winograd_kernels() {
  return WinogradKernels{F::m,
                         F::step,
                         F::alpha,
                         winograd_weight<V, S, D, F>,
                         winograd_input<V, S, D, F>,
                         winograd_input<V, typename V::type, D, F>,
                         winograd_output<V, S, F>};
}

}  // namespace
}  // namespace fused_resnet
