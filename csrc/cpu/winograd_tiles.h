// The tiles of a tensor's maps, as Winograd convolution cuts them (winograd.h), and their transform.
#pragma once

#include "dispatch.h"

namespace fused_resnet {

struct WinogradTiles {
  i64 rows = 0, cols = 0;          // tiles of an image, which are counted row by row, image by image
  i64 size = 0, step = 0, alpha = 0;  // pixels of a tile, in each direction; from tile to tile; numbers that they become
  i64 pad_top = 0, pad_left = 0;   // pixels before the map where the first tile begins
  i64 c = 0, h = 0, w = 0;         // channels and pixels of a map; what is outside counts as zeros
  Strides stride;
  const DTypeKernels* kernels = nullptr;
  void (*transform)(const WinogradStripArgs&) = nullptr;         // of rows whose channels are side by side
  void (*transform_packed)(const WinogradStripArgs&) = nullptr;  // of rows in the accumulator's type

  // Tiles side by side in one row of tiles.
  struct Strip {
    i64 image, row, col, tiles;
  };
  Strip strip(i64 tile, i64 end) const;  // the first tiles of [tile, end)

  // For runs of at most so many tiles, or of whole rows of tiles.
  i64 scratch_bytes(i64 tiles) const;

  // Tiles [begin, end) and one vector of channels; `most`: the tiles that scratch is for. `out`: where the first one goes, as of WinogradStripArgs.
  void run(i64 begin, i64 end, i64 most, i64 index, const void* data, void* out, i64 position_stride, i64 tile_stride, char* scratch) const;

 private:
  i64 columns(i64 tiles) const;  // the most that a strip reads
};

}  // namespace fused_resnet
