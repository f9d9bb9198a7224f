#include "winograd_tiles.h"

#include <algorithm>

#include "../conv_shape.h"

namespace fused_resnet {
namespace {

// So many columns of a strip, transformed, stay in the L1 cache.
constexpr i64 kStripPixels = 56;

alignas(64) const char kZeros[64] = {};

}  // namespace

WinogradTiles::Strip WinogradTiles::strip(i64 tile, i64 end) const {
  const i64 per_image = rows * cols;
  Strip s;
  s.image = tile / per_image;
  s.row = tile % per_image / cols;
  s.col = tile % cols;
  s.tiles = std::min({end - tile, cols - s.col, std::max<i64>(kStripPixels / step, 1)});
  return s;
}

i64 WinogradTiles::columns(i64 tiles) const { return std::min({kStripPixels / step, tiles, cols}) * step + alpha; }

i64 WinogradTiles::scratch_bytes(i64 tiles) const {
  // Lines of a strip, transformed in one direction or before they are turned; and as many packed rows.
  return (2 * alpha * (columns(tiles) + kernels->vector) * kernels->vector * kernels->accumulator_bytes + 63) / 64 * 64;
}

void WinogradTiles::run(i64 begin, i64 end, i64 most, i64 index, const void* data, void* out, i64 position_stride, i64 tile_stride,
                        char* scratch) const {
  const i64 bytes = kernels->accumulator_bytes, vector = kernels->vector, channels = std::min(vector, c - index * vector);
  const bool in_place = stride.c == 1 || channels == 1;
  const auto element = [&](i64 offset) { return static_cast<const char*>(data) + offset * kernels->storage_bytes; };
  char* const packed = scratch + alpha * (columns(most) + vector) * vector * bytes;
  for (i64 tile = begin; tile < end;) {
    const Strip t = strip(tile, end);
    const i64 h0 = t.row * step - pad_top, w0 = t.col * step - pad_left;
    const i64 width = t.tiles * step + size - step;
    WinogradStripArgs a;
    a.left = std::clamp<i64>(-w0, 0, width);
    a.right = std::clamp<i64>(w - w0, a.left, width);
    a.tiles = t.tiles;
    a.channels = channels;
    a.scratch = scratch;
    a.position_stride = position_stride;
    a.tile_stride = tile_stride;
    a.out = static_cast<char*>(out) + (tile - begin) * tile_stride * bytes;
    for (i64 i = 0; i < size; ++i) {
      const i64 row = h0 + i;
      a.row[i] = kZeros;
      if (row < 0 || row >= h || a.left >= a.right) continue;
      const i64 offset = t.image * stride.n + index * vector * stride.c + row * stride.h + w0 * stride.w;
      a.row[i] = element(offset);
      a.step[i] = stride.w;
      if (!in_place) {
        PackRowArgs p;
        p.x = element(offset + a.left * stride.w);
        p.stride_c = stride.c;
        p.stride_w = stride.w;
        p.pixels = a.right - a.left;
        p.channels = channels;
        p.pitch = vector;
        char* const line = packed + i * width * vector * bytes;
        p.out = line + a.left * vector * bytes;
        kernels->widen_row(p);
        a.row[i] = line;
        a.step[i] = vector;
      }
    }
    (in_place ? transform : transform_packed)(a);
    tile += t.tiles;
  }
}

}  // namespace fused_resnet
