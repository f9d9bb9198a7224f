// Direct convolution on one block: output pixels times a range of output channels, templates over a vector type V (vec_*.h)
// and a storage type S. Included once by each isa_*.cpp; everything has internal linkage.
//
// A tile of M pixels and NV registers of output channels lives in M * NV accumulators. For each element of the reduction
// (tap, channel) it loads NV registers of packed weights, broadcasts M input values and does M * NV FMAs, in the same order
// whatever the tile: every output is one chain of FMAs over (r, s, c), so blocking and threads cannot change a bit of it.
// Bias, shortcut and ReLU are applied to the accumulators before the only store.
#pragma once

#include "kernels.h"
#include "registers.h"

namespace fused_resnet {
namespace {

inline bool consecutive(const i64* offset, i64 count) {
  for (i64 i = 1; i < count; ++i) {
    if (offset[i] != offset[0] + i) return false;
  }
  return true;
}

// Channels side by side in memory (channels_last): straight from the accumulators. Full: no tail, so no masks, which would
// make every store slower.
template <class V, class S, int M, int NV, bool Full>
FR_INLINE void finish_channels(const BlockArgs& a, const typename V::reg (&acc)[M][NV], i64 pixel, i64 channel) {
  FR_UNROLL
  for (int v = 0; v < NV; ++v) {
    const i64 k = channel + v * V::width;
    const i64 count = Full ? V::width : smaller(a.panels.k - k, V::width);
    if (!Full && count <= 0) break;
    typename V::reg bias = V::zero();
    if (a.bias) bias = Full ? V::load_all(static_cast<const S*>(a.bias) + k) : V::load_n(static_cast<const S*>(a.bias) + k, count);
    const auto put = [&](int m, auto has_shortcut) FR_INLINE_LAMBDA {
      typename V::reg value = V::add(acc[m][v], bias);
      if (has_shortcut.value) {
        const S* shortcut = static_cast<const S*>(a.shortcut) + a.shortcut_offset[pixel + m] + k;
        value = with_shortcut<V>(value, Full ? V::load_all(shortcut) : V::load_n(shortcut, count), a.masked);
      }
      if (a.relu) value = V::relu(value);
      S* y = static_cast<S*>(a.y) + a.y_offset[pixel + m] + k;
      if (Full) {
        V::store_all(y, value);
      } else {
        V::store_n(y, value, count);
      }
    };
    if (a.shortcut) {
      FR_UNROLL
      for (int m = 0; m < M; ++m) put(m, Flag<true>());
    } else {
      FR_UNROLL
      for (int m = 0; m < M; ++m) put(m, Flag<false>());
    }
  }
}

// Any strides; fast where the tile's pixels are side by side in memory (contiguous). The tile is turned in the L1 cache, so
// that one register holds the pixels of one channel.
template <class V, class S, int M, int NV>
__attribute__((noinline)) void finish_pixels(const BlockArgs& a, const typename V::type* tile, i64 pixel, i64 channel) {
  constexpr int W = V::width;
  for (i64 first = 0; first < M; first += W) {
    const i64 pixels = smaller(M - first, W);
    const i64* y_offset = a.y_offset + pixel + first;
    const i64* shortcut_offset = a.shortcut ? a.shortcut_offset + pixel + first : nullptr;
    const bool y_run = consecutive(y_offset, pixels);
    const bool shortcut_run = a.shortcut && consecutive(shortcut_offset, pixels);
    for (int v = 0; v < NV; ++v) {
      const i64 k = channel + v * W;
      const i64 channels = smaller(a.panels.k - k, W);
      if (channels <= 0) break;
      typename V::reg rows[W];
      FR_UNROLL
      for (int i = 0; i < W; ++i) rows[i] = V::load(tile + ((first + i) * NV + v) * W);
      transpose<V>(rows);
      alignas(64) typename V::type turned[W][W];
      FR_UNROLL
      for (int i = 0; i < W; ++i) V::store(turned[i], rows[i]);
      for (i64 j = 0; j < channels; ++j) {
        typename V::reg value = V::load(turned[j]);
        if (a.bias) value = V::add(value, V::set1(widen(static_cast<const S*>(a.bias)[k + j])));
        if (a.shortcut) {
          const S* shortcut = static_cast<const S*>(a.shortcut) + (k + j) * a.shortcut_stride_k;
          S gathered[W];
          if (shortcut_run) {
            shortcut += shortcut_offset[0];
          } else {
            for (i64 i = 0; i < pixels; ++i) gathered[i] = shortcut[shortcut_offset[i]];
            shortcut = gathered;
          }
          value = with_shortcut<V>(value, V::load_n(shortcut, pixels), a.masked);
        }
        if (a.relu) value = V::relu(value);
        S* y = static_cast<S*>(a.y) + (k + j) * a.y_stride_k;
        if (y_run) {
          V::store_n(y + y_offset[0], value, pixels);
        } else {
          S scattered[W];
          V::store_n(scattered, value, pixels);
          for (i64 i = 0; i < pixels; ++i) y[y_offset[i]] = scattered[i];
        }
      }
    }
  }
}

// What changes from tile to tile.
template <class V>
struct TileArgs {
  const BlockArgs* block;
  const Chunk* chunk;
  const typename V::type* weight;    // of this panel and chunk
  i64 pixel, channel;                // the first of each
  typename V::type* partial;         // [M][NV][width]
  bool first, last;                  // chunk of the reduction
  Fetch fetch;                       // this tile's share of what comes next, a step for each element of the reduction
};

template <class V, class S, int M, int NV>
__attribute__((noinline)) void tile(const TileArgs<V>& t) {
  using T = typename V::type;
  const BlockArgs& a = *t.block;
  typename V::reg acc[M][NV];
  if (t.first) {
    FR_UNROLL
    for (int m = 0; m < M; ++m) {
      FR_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = V::zero();
    }
  } else {
    FR_UNROLL
    for (int m = 0; m < M; ++m) {
      FR_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = V::load(t.partial + (m * NV + v) * V::width);
    }
  }
  if (t.last && a.shortcut && a.shortcut_stride_k == 1) {
    // On its way while the FMAs run: no hardware prefetcher sees this pattern, and waiting for it here would double the time
    // of a short reduction.
    const S* shortcut = static_cast<const S*>(a.shortcut) + t.channel;
    FR_UNROLL
    for (int m = 0; m < M; ++m) {
      FR_UNROLL
      for (int v = 0; v < NV; ++v) __builtin_prefetch(shortcut + a.shortcut_offset[t.pixel + m] + v * V::width);
    }
  }
  asm volatile("" : : : "memory");  // as below
  const T* base[M];
  FR_UNROLL
  for (int m = 0; m < M; ++m) base[m] = static_cast<const T*>(a.base[t.pixel + m]);
  const T* weight = t.weight;
  Fetch fetch = t.fetch;
  for (i64 tap = 0; tap < t.chunk->count; ++tap) {
    if (t.chunk->taps[tap].source) {
      FR_UNROLL
      for (int m = 0; m < M; ++m) base[m] = static_cast<const T*>(a.joined[t.pixel + m]);
    }
    const i64 begin = t.chunk->taps[tap].offset, end = begin + t.chunk->taps[tap].length;
    const auto step = [&](i64 i) FR_INLINE_LAMBDA {
      typename V::reg w[NV];
      FR_UNROLL
      for (int v = 0; v < NV; ++v) w[v] = V::load(weight + v * V::width);
      weight += NV * V::width;
      FR_UNROLL
      for (int m = 0; m < M; ++m) {
        T x_value;  // a pair of bfloat16 may lie anywhere
        __builtin_memcpy(&x_value, base[m] + i, sizeof(T));
        const typename V::reg x = V::set1(x_value);
        FR_UNROLL
        for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(x, w[v], acc[m][v]);
      }
    };
    i64 i = begin;
    for (; i + Fetch::kEvery <= end; i += Fetch::kEvery) {
      fetch.some();
      FR_UNROLL
      for (int u = 0; u < Fetch::kEvery; ++u) step(i + u);
    }
    for (; i < end; ++i) step(i);
  }
  // Read again from memory: otherwise the compiler computes these addresses before the loop, and keeps them where the loop
  // has its own registers.
  const TileArgs<V>* late = &t;
  asm volatile("" : "+r"(late) : : "memory");
  const BlockArgs& b = *late->block;
  if (!late->last) {
    FR_UNROLL
    for (int m = 0; m < M; ++m) {
      FR_UNROLL
      for (int v = 0; v < NV; ++v) V::store(late->partial + (m * NV + v) * V::width, acc[m][v]);
    }
  } else if (b.y_stride_k == 1 && (!b.shortcut || b.shortcut_stride_k == 1)) {
    if (late->channel + NV * V::width <= b.panels.k) {
      finish_channels<V, S, M, NV, true>(b, acc, late->pixel, late->channel);
    } else {
      finish_channels<V, S, M, NV, false>(b, acc, late->pixel, late->channel);
    }
  } else {
    constexpr int rows = (M + V::width - 1) / V::width * V::width;
    alignas(64) T turned[rows * NV * V::width];
    FR_UNROLL
    for (int m = 0; m < rows; ++m) {
      FR_UNROLL
      for (int v = 0; v < NV; ++v) V::store(turned + (m * NV + v) * V::width, m < M ? acc[m < M ? m : 0][v] : V::zero());
    }
    finish_pixels<V, S, M, NV>(b, turned, late->pixel, late->channel);
  }
}

template <class V>
using TileFunction = void (*)(const TileArgs<V>&);

// tile<V, S, 1 .. M, NV> as an array: entry m - 1 does m pixels.
template <class V, class S, int NV, int M, int... Rest>
struct TileTable : TileTable<V, S, NV, M - 1, M, Rest...> {};
template <class V, class S, int NV, int... Rest>
struct TileTable<V, S, NV, 0, Rest...> {
  static constexpr TileFunction<V> function[sizeof...(Rest)] = {tile<V, S, Rest, NV>...};
};

// Those of a panel of `vectors` registers, of at most NV.
template <class V, class S, int NV>
const TileFunction<V>* tile_functions(i64 vectors) {
  if constexpr (NV > 1) {
    if (vectors < NV) return tile_functions<V, S, NV - 1>(vectors);
  }
  return TileTable<V, S, NV, V::rows[NV - 1]>::function;
}

// All tiles of a block, in one of two orders.
template <class V, class S>
struct Block {
  using T = typename V::type;

  const BlockArgs& a;
  const i64 reduction;

  static i64 total(const BlockArgs& a) {
    i64 sum = 0;
    for (i64 c = 0; c < a.chunk_count; ++c) sum += a.chunks[c].elements;
    return sum;
  }
  explicit Block(const BlockArgs& args) : a(args), reduction(total(args)) {}

  // The block's pixels in tiles of nearly equal size: the first ones have one more.
  struct Cut {
    i64 tiles, each, more;
    Cut(i64 pixels, i64 vectors) {
      const i64 most = V::rows[vectors - 1];
      tiles = (pixels + most - 1) / most;
      each = pixels / tiles;
      more = pixels % tiles;
    }
    i64 begin(i64 i) const { return i * each + smaller(i, more); }
    i64 size(i64 i) const { return each + (i < more); }
  };

  i64 vectors(i64 p) const { return a.panels.width(p) / V::width; }
  const T* weights(i64 p) const { return static_cast<const T*>(a.weight) + a.panels.begin(p) * reduction; }

  // Many weights: a chunk of one panel serves every pixel before the next is touched; meanwhile the next one is fetched into
  // the L2 cache, a share by each tile. Behind the last one comes the first, for the next block.
  void panels_outside() const {
    for (i64 p = a.panel_begin; p < a.panel_end; ++p) {
      const Cut cut(a.pixels, vectors(p));
      const TileFunction<V>* const functions = tile_functions<V, S, V::vectors>(vectors(p));
      const i64 width = a.panels.width(p);
      TileArgs<V> t;
      t.block = &a;
      t.weight = weights(p);
      t.channel = a.panels.begin(p);
      for (i64 c = 0; c < a.chunk_count; ++c) {
        t.chunk = &a.chunks[c];
        t.first = c == 0;
        t.last = c == a.chunk_count - 1;
        const i64 elements = t.chunk->elements, next_panel = !t.last ? p : p + 1 < a.panel_end ? p + 1 : a.panel_begin;
        const T* next = t.last ? weights(next_panel) : t.weight + width * elements;
        const i64 bytes = a.panels.width(next_panel) * a.chunks[t.last ? 0 : c + 1].elements * i64(sizeof(T));
        for (i64 i = 0; i < cut.tiles; ++i) {
          t.pixel = cut.begin(i);
          t.partial = static_cast<T*>(a.partial) + t.pixel * width;
          t.fetch = Fetch(next, bytes, i, cut.tiles, elements);
          functions[cut.size(i) - 1](t);
        }
        t.weight += width * elements;
      }
    }
  }

  // Few weights, all of them in the L2 cache: each tile does every panel, so that input, shortcut and output each pass through
  // memory once and in order.
  void tiles_outside() const {
    TileArgs<V> t;
    t.block = &a;
    t.chunk = &a.chunks[0];
    t.first = t.last = true;
    t.partial = nullptr;
    // What to fetch ahead is the input of the next tile, where that is one run of memory; a share by each panel.
    const i64 panels = a.panel_end - a.panel_begin;
    const Cut cut(a.pixels, vectors(a.panel_begin));
    for (i64 i = 0; i < cut.tiles; ++i) {
      t.pixel = cut.begin(i);
      const void* const* next = a.base + (i + 1 < cut.tiles ? cut.begin(i + 1) : t.pixel);
      const void* const* last = a.base + (i + 1 < cut.tiles ? cut.begin(i + 1) + cut.size(i + 1) - 1 : t.pixel);
      const i64 bytes = a.input_run ? static_cast<const char*>(*last) - static_cast<const char*>(*next) : 0;
      for (i64 p = a.panel_begin; p < a.panel_end; ++p) {
        t.weight = weights(p);
        t.fetch = Fetch(*next, bytes, p - a.panel_begin, panels, reduction);
        t.channel = a.panels.begin(p);
        tile_functions<V, S, V::vectors>(vectors(p))[cut.size(i) - 1](t);
      }
    }
  }
};

template <class V, class S>
void block(const BlockArgs& a) {
  const Block<V, S> all(a);
  if (a.tiles_outside) {
    all.tiles_outside();
  } else {
    all.panels_outside();
  }
}

}  // namespace
}  // namespace fused_resnet
