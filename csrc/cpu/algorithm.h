// From a shape to a blocking: a pure function, printable, testable without running a kernel. The blocking decides speed and
// workspace, never the result: each output is the same chain of FMAs in every blocking.
#pragma once

#include <string>

#include "../conv_shape.h"
#include "dispatch.h"

namespace fused_resnet {

// A convolution is cut into tasks: a group of whole images, or some rows and columns of one; times a range of output channels.
struct Blocking {
  bool packed = true;  // input rows are copied into the workspace (padded, widened); false: read where they are
  i64 images = 1, rows = 1, cols = 1;  // output rows and columns of one task; rows < P only where images == 1
  i64 panels = 1;                      // panels of output channels in one task
  i64 pitch = 0;                       // packed: elements between two pixels of a row
  i64 slots = 0, width = 0;            // packed: rows for each image, pixels in a row
  i64 chunk = 1;                       // elements of the reduction that a tile does at a time, at most
  bool tiles_outside = false;          // each tile does all panels, rather than each panel all tiles
  i64 image_groups = 1, row_parts = 1, col_parts = 1, panel_parts = 1;

  i64 pixels() const { return images * rows * cols; }
  i64 tasks() const { return image_groups * row_parts * col_parts * panel_parts; }
  i64 row_elements() const { return width * pitch; }
  std::string describe() const;
};

Blocking choose_blocking(const ConvShape& shape, const DTypeKernels& kernels, const CacheSizes& caches, int threads);

// Whether the kernels can read the input where it is: its type is the accumulator's, its channels are side by side, and no
// tap falls outside.
bool readable_in_place(const ConvShape& shape, const DTypeKernels& kernels);

}  // namespace fused_resnet
