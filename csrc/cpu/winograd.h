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
#include "packing.h"
#include "registers.h"
#include "winograd_multiply.h"
#include "winograd_transforms.h"

namespace fused_resnet {
namespace {

// W doubles that fill one register.
template <int W>
struct Doubles {
  typedef double reg __attribute__((vector_size(W * sizeof(double))));
  template <class T>
  static FR_INLINE void widen_to(const T* from, reg& to) {
    typedef T narrow __attribute__((vector_size(W * sizeof(T))));
    narrow values;
    __builtin_memcpy(&values, from, sizeof values);
    to = __builtin_convertvector(values, reg);
  }
  template <class T>
  static FR_INLINE void round_to(const reg& from, T* to) {
    typedef T narrow __attribute__((vector_size(W * sizeof(T))));
    const narrow values = __builtin_convertvector(from, narrow);
    __builtin_memcpy(to, &values, sizeof values);
  }
};
template <>
struct Doubles<1> {
  using reg = double;
  template <class T>
  static FR_INLINE void widen_to(const T* from, reg& to) { to = *from; }
  template <class T>
  static FR_INLINE void round_to(const reg& from, T* to) { *to = T(from); }
};

// Step 0, when a weight is packed or wanted: U = G g G' of a part of one panel, in double precision, rounded to the accumulator's type (and, for
// products of bfloat16, to that). Returns false where a value is not finite; denormals become 0.
template <class V, class S, class D, class F>
bool winograd_weight(const PackWeightArgs& a) {
  using T = typename V::type;
  using E = typename D::part;  // of an element of the packed weight: D::group of them
  constexpr int A = F::alpha, W = V::width, G = D::group;
  constexpr int L = sizeof(T) == sizeof(double) || W == 1 ? W : W / 2;  // lanes at a time
  using Wide = Doubles<L>;
  using wide = typename Wide::reg;
  const i64 elements = (a.c + G - 1) / G;
  E* const out = static_cast<E*>(a.out);
  typename V::reg odd = V::zero();  // NaN where a value was not finite
  WeightBlock<V> block;
  block.taps = 9;
  constexpr i64 most = WeightBlock<V>::kRows / 9 / G * G;
  for (i64 j = 0; j < a.width; j += W) {
    const i64 lanes = clamped(a.k - a.k_begin - j, W);
    for (i64 first = a.c_begin; first < a.c_end; first += most) {
      const i64 channels = smaller(a.c_end - first, most);
      load_weights<V, S>(a, a.k_begin + j, lanes, first, channels, 0, 9, [&](i64 i, i64 tap) { return block.row(i, tap); }, odd);
      for (i64 c = 0; c < channels; c += G) {
        alignas(64) T u[G][A * A][W];
        for (int g = 0; g < smaller(G, channels - c); ++g) {
          for (int lane = 0; lane < W; lane += L) {
            wide rows[3][A];
            FR_UNROLL
            for (int s = 0; s < 3; ++s) {
              wide taps[3];
              FR_UNROLL
              for (int r = 0; r < 3; ++r) Wide::widen_to(block.row(c + g, r * 3 + s) + lane, taps[r]);
              F::weight(taps[0], taps[1], taps[2], rows[s]);
            }
            FR_UNROLL
            for (int i = 0; i < A; ++i) {
              wide line[A];
              F::weight(rows[0][i], rows[1][i], rows[2][i], line);
              FR_UNROLL
              for (int l = 0; l < A; ++l) Wide::round_to(line[l], u[g][i * A + l] + lane);
            }
          }
        }
        E* const to = out + ((first + c) / G * a.width + j) * G;
        for (int i = 0; i < A * A; ++i) {
          typename V::reg group[G];
          FR_UNROLL
          for (int g = 0; g < G; ++g) {
            group[g] = c + g < channels ? V::flushed(V::load(u[g][i])) : V::zero();  // the last pair may have one channel
            note_odd<V>(group[g], odd);
          }
          D::store_group(to + i * elements * a.width * G, group);
        }
      }
    }
  }
  return all_finite<V>(odd);
}

// What a strip is transformed by: `size` pixels of a tile to `alpha` numbers, in each direction; tiles `step` pixels apart.
template <class V, class F>
struct InputTransform {
  using reg = typename V::reg;
  static constexpr int size = F::alpha, step = F::step, alpha = F::alpha;
  static FR_INLINE void apply(const reg (&d)[size], reg (&t)[alpha]) { F::input(d, t); }
};
template <class V, class F>
struct GradTransform {
  using reg = typename V::reg;
  static constexpr int size = F::m, step = F::m, alpha = F::alpha;
  static FR_INLINE void apply(const reg (&d)[size], reg (&t)[alpha]) { F::output_transposed(d, t); }
};

// Step 1: V = B' d B of one strip (tiles side by side in one row of tiles) and up to W channels; or another transform P. X is what the rows
// hold: the storage type, or the accumulator's where rows were packed.
template <class V, class X, class D, class P>
void winograd_strip(const WinogradStripArgs& a) {
  using T = typename V::type;
  using reg = typename V::reg;
  constexpr int I = P::size, A = P::alpha, W = V::width;
  const i64 columns = a.tiles * P::step + I - P::step;
  T* const lines = static_cast<T*>(a.scratch);  // [A][columns][W]: every column transformed once, though tiles share them
  const i64 pitch = columns * W;
  const auto vertical = [&](i64 column, auto load) {
    reg d[I], t[A];
    FR_UNROLL
    for (int i = 0; i < I; ++i) d[i] = load(static_cast<const X*>(a.row[i]) + column * a.step[i]);
    P::apply(d, t);
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
  for (i64 tile = 0; tile < a.tiles; ++tile, out += a.tile_stride * D::group) {
    const T* from = lines + tile * P::step * W;
    FR_UNROLL
    for (int i = 0; i < A; ++i) {
      reg d[I], t[A];
      FR_UNROLL
      for (int l = 0; l < I; ++l) d[l] = V::load(from + i * pitch + l * W);
      P::apply(d, t);
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
    for (int l = 0; l < F::m; ++l) note_odd<V>(y[i][l], odd);
  }
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
        if (shortcut) value = with_shortcut<V>(value, load(shortcut + i * a.shortcut_stride.h + l * a.shortcut_stride.w), a.masked);
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
            value = with_shortcut<V>(value, load_steps<V>(shortcut, a.shortcut_stride.w, pixels), a.masked);
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
                         winograd_strip<V, S, D, InputTransform<V, F>>,
                         winograd_strip<V, typename V::type, D, InputTransform<V, F>>,
                         winograd_output<V, S, F>};
}

}  // namespace
}  // namespace fused_resnet
