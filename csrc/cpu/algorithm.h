// From a shape to an algorithm and its blocking: pure functions, printable, testable without running a kernel. The blocking
// decides speed and workspace, never the result: each output is the same operations in the same order in every blocking.
#pragma once

#include <string>

#include "../conv_shape.h"
#include "dispatch.h"

namespace fused_resnet {

enum class Algorithm { direct, winograd2, winograd4 };

// What the caller wants. `automatic`: the fastest that is allowed; otherwise `algorithm`, wherever it can compute the shape.
struct Request {
  bool automatic = true;
  Algorithm algorithm = Algorithm::direct;
  bool strict = false;  // no F(4x4, 3x3)
  bool fresh = false;   // the weight is used once: what packing it costs counts, and tasks may transform it as they go
};

struct Choice {
  Algorithm algorithm = Algorithm::direct;
  std::string reason;  // a sentence
  bool fresh = false;  // as requested
};

// Whatever the number of threads, so that the result does not depend on it.
Choice choose_algorithm(const ConvShape& shape, const DTypeKernels& kernels, const CacheSizes& caches, const Request& request);

// Below this many multiply-adds a convolution is done before other threads have woken up and fetched their share of the data from
// this one's caches.
double serial_macs(const DTypeKernels& kernels);

// Whether there is so much of the weight that reading it alone is worth two threads, which read at twice the rate, however few
// multiply-adds there are.
bool streams_weights(const ConvShape& shape, const DTypeKernels& kernels);

// Panels of nearly equal width, of at most so many registers.
Panels cut_panels(i64 k, const DTypeKernels& kernels, int most);

// Winograd: runs of tiles, times ranges of panels of output channels. Either one phase, whose tasks each transform the input of
// their tiles for themselves; or two, the first of which transforms the whole input for the tasks of the second. A fresh weight is
// transformed by each task as it goes where so few tasks want the same panel that this costs less than its way through memory.
struct WinogradBlocking {
  int m = 4, step = 4, alpha = 6;
  i64 rows = 0, cols = 0;    // tiles of one image
  Panels cut;                // of the output channels; the packed weight's layout, so never a matter of N, H, W or threads
  i64 tiles = 1;             // of one task
  i64 panels = 1;            // of one task
  bool shared = false;       // two phases
  i64 chunk = 0;             // not 0: a task transforms its panels' weights itself, so many channels at a time
  i64 tile_parts = 1, panel_parts = 1;

  i64 positions() const { return alpha * alpha; }
  i64 tasks() const { return tile_parts * panel_parts; }
  std::string describe() const;
};

WinogradBlocking choose_winograd_blocking(const ConvShape& shape, Algorithm algorithm, const DTypeKernels& kernels,
                                          const CacheSizes& caches, int threads, bool fresh = false);

// The kernels that compute the shape with this algorithm; null where there are none.
const WinogradKernels* winograd_kernels(const ConvShape& shape, Algorithm algorithm, const DTypeKernels& kernels);

// Direct: a convolution is cut into tasks: a group of whole images, or some rows and columns of one; times a range of output channels.
struct Blocking {
  bool packed = true;  // input rows are copied into the workspace (padded, widened); false: read where they are
  i64 images = 1, rows = 1, cols = 1;  // output rows and columns of one task; rows < P only where images == 1
  Panels cut;                          // of the output channels; the packed weight's layout, so a matter of K alone
  i64 panels = 1;                      // of one task
  i64 channels = 0, joined = 0;        // elements of A for each pixel (see DTypeKernels::group)
  i64 pitch = 0;                       // packed: elements between two pixels of a row
  i64 joined_pitch = 0;                // elements between two pixels of the joined input, which is always copied
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

// Whether a block's projection can be further terms of the sums of its last convolution.
bool can_join(const ConvShape& last, const ConvShape& projection);

// Whether the kernels can read the input where it is: its type is the accumulator's, its channels are side by side, and no
// tap falls outside.
bool readable_in_place(const ConvShape& shape, const DTypeKernels& kernels);

}  // namespace fused_resnet
