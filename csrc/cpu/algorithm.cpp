#include "algorithm.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace fused_resnet {
namespace {

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Of the L2 cache, for what a task of a Winograd convolution reads again and again.
constexpr double kWinogradShare = 0.6;
// Of the L1 cache, for the weights of one position and one panel.
constexpr double kPositionShare = 0.67;
// So much longer than the arithmetic of a thread may its weights take before they are shared out.
constexpr double kShareWeights = 1.2;
// Winograd's transforms of one tile and one vector of channels, input or output, in FMA slots for each position: about twice
// the instructions, for they load and store as much as they calculate.
constexpr double kTransformSlots = 8;
// Slots that it takes to transform a register of weights, for each position; and to pack one as it is. Measured on one core of a Zen 5:
// 130 ns for 36 positions, 2.4 ns.
constexpr double kWeightSlots = 30, kPackSlots = 20;
// So many tasks at most transform the same weights: the way of the transformed ones through memory and between two cores' caches takes about
// as long as the transform.
constexpr i64 kMostTransforms = 2;
// Of the L2 cache, for the products of a task that transforms its weights, and these.
constexpr double kFreshShare = 0.75;
// Bytes that come from the L3 cache and from memory while one FMA issues. Measured on one core: with registers of 64 bytes on AMD
// Zen 5 (97 and 41 GB/s, 8.3e9 FMAs a second); with those of 32 between AMD Zen 3 (43 and 19.5 GB/s, 6.5e9) and Zen 1 (50 and 13.5
// GB/s, 2.5e9). On an Intel Xeon of 2023 (L2 cache of 2 MiB, 5.6e9) what these kernels get is 16 and 10.7 GB/s, for a prefetch waits
// in one of the 16 fill buffers of the L1 cache; one figure between them, for what was used long ago is not in its L3 cache.
struct Bandwidth {
  double l3, memory;
};
Bandwidth bandwidth(const DTypeKernels& kernels, const CacheSizes& caches) {
  if (caches.intel && kernels.vector * kernels.accumulator_bytes >= 64) return Bandwidth{2.5, 2.5};
  return kernels.vector * kernels.accumulator_bytes >= 64 ? Bandwidth{11.6, 5} : Bandwidth{12, 4.5};
}
// What one process can hope to find in the L3 cache, whatever the system says of its size: it is shared.
constexpr i64 kUsableL3 = 32 << 20;
constexpr double kWorthWhile = 0.95;  // an estimate closer to direct than this is no reason to change
// Pixels of a task: enough that a panel of weights, which comes from the L2 or L3 cache, is used many times.
constexpr i64 kTargetPixels = 168;
// Weights of one chunk of a panel: small enough that two of them and the input of a task share the L2 cache.
constexpr i64 kChunkBytes = 128 << 10;
// A multiple of this between pixels puts a tile's pixels into so few sets of the L1 cache that they evict each other.
constexpr i64 kBadPitch = 2048;

// FMA instructions for which a second thread is worth its while: some 45 microseconds of one core.
constexpr double kSerialSlots = 2.5e5;

// Some 60 microseconds of one core from memory.
constexpr double kStreamedBytes = 1 << 20;

}  // namespace

bool streams_weights(const ConvShape& s, const DTypeKernels& kernels) {
  return double(s.k) * double(s.reduction()) * double(kernels.storage_bytes) >= kStreamedBytes;
}

double serial_macs(const DTypeKernels& kernels) { return kSerialSlots * kernels.vector * kernels.group; }

const WinogradKernels* winograd_kernels(const ConvShape& s, Algorithm algorithm, const DTypeKernels& kernels) {
  if (s.r != 3 || s.s != 3 || s.dilation_h != 1 || s.dilation_w != 1 || s.stride_h != s.stride_w || s.joined.c) return nullptr;
  if (s.stride_h == 1) {
    return algorithm == Algorithm::winograd4 ? &kernels.winograd4 : algorithm == Algorithm::winograd2 ? &kernels.winograd2 : nullptr;
  }
  return s.stride_h == 2 && algorithm == Algorithm::winograd2 ? &kernels.winograd2_stride2 : nullptr;
}

Panels cut_panels(i64 k, const DTypeKernels& kernels, int most) {
  Panels cut;
  cut.k = k;
  cut.vector = kernels.vector;
  const i64 vectors = std::max<i64>(ceil_div(k, kernels.vector), 1), panels = ceil_div(vectors, most);
  cut.channels = ceil_div(vectors, panels) * kernels.vector;
  return cut;
}

namespace {

// What limits a convolution, counted in FMA instructions that one thread could have issued meanwhile.
struct Cost {
  double arithmetic = 0;  // FMAs and what waits for them
  double weights = 0;     // the packed weights on their way to the L2 cache, while the FMAs run
  double packing = 0;     // of fresh ones
  double total() const { return std::max(arithmetic, weights) + packing; }
};

// FMA slots of one step of a register tile: its FMAs; or its loads, two at a time as the FMAs; or the latency of an FMA.
double tile_slots(double rows, double vectors) { return std::max({rows * vectors, rows + vectors, 8.0}); }

// Elements of A that hold so many channels.
double elements(i64 channels, const DTypeKernels& kernels) { return std::ceil(double(channels) / kernels.group); }

// Slots for `rows` rows (pixels or tiles) times all output channels times `steps` elements of the reduction.
double product_slots(double rows, const Panels& cut, const DTypeKernels& kernels, double steps) {
  if (rows <= 0) return 0;
  const auto panel = [&](i64 width) {
    const i64 vectors = width / kernels.vector;
    const double groups = std::ceil(rows / kernels.rows[vectors - 1]);
    return groups * tile_slots(rows / groups, double(vectors));
  };
  const i64 last = cut.count() - 1;
  return steps * (double(last) * panel(cut.channels) + panel(cut.width(last)));
}

// Weights that are read so many times: at first from afar, for in a network the other layers have driven them out of the L2 cache.
double weight_slots(double bytes, double passes, const DTypeKernels& kernels, const CacheSizes& caches) {
  if (bytes < 0.5 * double(caches.l2)) passes = 1;
  const Bandwidth b = bandwidth(kernels, caches);
  return passes * bytes / (bytes < 0.5 * double(std::min(caches.l3, kUsableL3)) ? b.l3 : b.memory);
}

Cost direct_cost(const ConvShape& s, const DTypeKernels& kernels, const CacheSizes& caches, bool fresh) {
  const double pixels = double(s.n) * double(s.p) * double(s.q);
  const double reduction = elements(s.c, kernels) * double(s.r) * double(s.s) + elements(s.joined.c, kernels);
  const double vectors = std::ceil(double(s.k) / kernels.vector) * kernels.vector;
  Cost cost;
  cost.arithmetic = product_slots(pixels, cut_panels(s.k, kernels, kernels.vectors), kernels, reduction);
  cost.weights = weight_slots(vectors * reduction * kernels.accumulator_bytes, 1, kernels, caches);
  if (fresh) cost.packing = vectors / kernels.vector * reduction * kPackSlots;
  return cost;
}

// With the weights read so many times.
Cost winograd_cost(const ConvShape& s, const WinogradBlocking& b, double passes, const DTypeKernels& kernels, const CacheSizes& caches) {
  const double tiles = double(s.n) * double(b.rows) * double(b.cols), positions = double(b.positions());
  const double in = std::ceil(double(s.c) / kernels.vector), out = std::ceil(double(s.k) / kernels.vector);
  const double transforms = tiles * (in + out) * positions * kTransformSlots;
  Cost cost;
  cost.arithmetic = positions * product_slots(tiles, b.cut, kernels, elements(s.c, kernels)) + transforms;
  cost.weights =
      weight_slots(positions * out * kernels.vector * elements(s.c, kernels) * kernels.accumulator_bytes, passes, kernels, caches);
  return cost;
}

Cost winograd_cost(const ConvShape& s, Algorithm algorithm, const DTypeKernels& kernels, const CacheSizes& caches, bool fresh) {
  const WinogradBlocking b = choose_winograd_blocking(s, algorithm, kernels, caches, 1, fresh);
  Cost cost = winograd_cost(s, b, double(b.tile_parts), kernels, caches);
  if (!fresh) return cost;
  cost.packing = std::ceil(double(s.k) / kernels.vector) * double(s.c) * double(b.positions()) * kWeightSlots;
  if (b.chunk) {
    cost.packing *= double(b.tile_parts);
    cost.weights = 0;
  }
  return cost;
}

std::string two_digits(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  return text;
}

}  // namespace

Choice choose_algorithm(const ConvShape& s, const DTypeKernels& kernels, const CacheSizes& caches, const Request& request) {
  Choice choice;
  choice.fresh = request.fresh;
  if (s.empty()) {
    choice.reason = "the output is empty";
    return choice;
  }
  const bool two_fits = winograd_kernels(s, Algorithm::winograd2, kernels) != nullptr;
  const bool four_fits = winograd_kernels(s, Algorithm::winograd4, kernels) != nullptr;
  if (!two_fits) {
    choice.reason = "direct: Winograd is for 3x3 kernels with stride 1 or 2 and dilation 1";
    return choice;
  }
  if (!request.automatic) {
    if (winograd_kernels(s, request.algorithm, kernels)) choice.algorithm = request.algorithm;
    choice.reason = "as requested";
    return choice;
  }
  if (kernels.accumulator_bytes != sizeof(float)) {
    choice.reason = "direct: float64 is for precision";
    return choice;
  }
  const double direct = direct_cost(s, kernels, caches, request.fresh).total();
  const double two = winograd_cost(s, Algorithm::winograd2, kernels, caches, request.fresh).total() / direct;
  choice.reason = "estimated time over direct: F(2x2, 3x3) " + two_digits(two);
  double four = 1;
  if (kernels.group > 1) {
    // Products of bfloat16: the transformed operands are rounded, which costs F(2x2, 3x3) as much as rounding the sum before
    // the shortcut is added does, and F(4x4, 3x3) three times that.
    choice.reason += "; F(4x4, 3x3) loses too much in products of bfloat16";
    if (request.strict) choice.reason += ", and with strict numerics any rounding before the end is too much";
    if (!request.strict && two < kWorthWhile) choice.algorithm = Algorithm::winograd2;
    return choice;
  }
  if (four_fits) {
    four = winograd_cost(s, Algorithm::winograd4, kernels, caches, request.fresh).total() / direct;
    choice.reason += ", F(4x4, 3x3) " + two_digits(four);
    if (request.strict) choice.reason += " (not with strict numerics)";
  }
  if (!request.strict && four < two && four < kWorthWhile) {
    choice.algorithm = Algorithm::winograd4;
  } else if (two < kWorthWhile) {
    choice.algorithm = Algorithm::winograd2;
  }
  return choice;
}

namespace {

// A task is one panel of output channels, whose weights it transforms, and as many tiles as it has products of in the L2 cache. False: too many
// tasks would transform the same, or there is one panel, whose tiles the threads share.
bool choose_fresh_blocking(WinogradBlocking& b, const ConvShape& s, i64 all, const DTypeKernels& kernels, const CacheSizes& caches,
                           int threads) {
  const Panels cut = cut_panels(s.k, kernels, std::min(kernels.vectors, 2));
  if (cut.count() < 2) return false;
  const double per_element = double(b.positions()) * double(cut.channels) * double(kernels.accumulator_bytes);  // of a tile, or of a channel
  const i64 fit = i64(kFreshShare * double(caches.l2) / per_element), block = kernels.vector;
  const i64 parts = std::max(ceil_div(all, std::max<i64>(fit - 2 * block, 1)), ceil_div(threads, cut.count()));
  if (parts > kMostTransforms) return false;
  b.cut = cut;
  b.shared = true;
  b.tiles = ceil_div(all, parts);
  b.tile_parts = ceil_div(all, b.tiles);
  b.panels = 1;
  b.panel_parts = cut.count();
  // Elements of A: whole blocks, two at least, for the products come from memory and go back with each chunk.
  b.chunk = std::clamp<i64>((fit - b.tiles) / block, 2, 8) * block;
  return true;
}

}  // namespace

WinogradBlocking choose_winograd_blocking(const ConvShape& s, Algorithm algorithm, const DTypeKernels& kernels,
                                          const CacheSizes& caches, int threads, bool fresh) {
  const WinogradKernels& winograd = *winograd_kernels(s, algorithm, kernels);
  WinogradBlocking b;
  b.m = winograd.m;
  b.step = winograd.step;
  b.alpha = winograd.alpha;
  b.rows = ceil_div(s.p, b.m);
  b.cols = ceil_div(s.q, b.m);
  const i64 all = s.n * b.rows * b.cols, bytes = kernels.accumulator_bytes;
  const i64 channels = ceil_div(s.c, kernels.vector * kernels.group) * kernels.vector;
  // A task's transformed input and one panel of products stay in the L2 cache, beside the weights that stream through it.
  const auto fits = [&](const Panels& cut) {
    const double per_tile = double(b.positions()) * double(channels + cut.channels) * double(bytes);
    return std::max<i64>(i64(kWinogradShare * double(caches.l2) / per_tile), 1);
  };
  if (fresh && all > 0 && choose_fresh_blocking(b, s, all, kernels, caches, threads)) return b;
  const i64 few = 2 * kernels.rows[1];
  // Wide panels need fewer loads for a product, but their tiles have fewer rows, so that a position's weights are read more often:
  // from the L1 cache, or not at all. And narrow ones leave room for more tiles. Whatever the number of tiles: a packed weight serves
  // inputs of every size.
  b.cut = cut_panels(s.k, kernels, kernels.vectors);
  const double position = double(ceil_div(s.c, kernels.group)) * double(b.cut.channels) * double(bytes);
  if (position > kPositionShare * double(caches.l1d) || fits(b.cut) < few) b.cut = cut_panels(s.k, kernels, 2);
  const i64 most = fits(b.cut), panels = b.cut.count();
  b.shared = most < few && most < all;
  if (threads > 1 && !b.shared && all < 2 * few * threads) {
    // Few tiles for each thread. Either each takes some of them, and reads all weights; or some panels of all tiles, whose input is
    // then transformed by one thread for another, and goes through the cache that they share.
    const Cost cost = winograd_cost(s, b, 1, kernels, caches);
    b.shared = all < few || cost.weights > kShareWeights * cost.arithmetic / threads;
  }
  b.tiles = std::clamp<i64>(b.shared ? few : most, 1, std::max<i64>(all, 1));
  b.tile_parts = ceil_div(all, b.tiles);
  b.panel_parts = 1;
  if (threads > 1 && b.tile_parts < 8 * threads && b.tile_parts % threads != 0) {
    if (b.shared) {
      b.panel_parts = std::min<i64>(panels, 4 * threads);
    } else {
      b.tile_parts = ceil_div(b.tile_parts, threads) * threads;
    }
  }
  b.tiles = ceil_div(all, b.tile_parts);
  b.tile_parts = ceil_div(all, b.tiles);
  b.panels = ceil_div(panels, b.panel_parts);
  b.panel_parts = ceil_div(panels, b.panels);
  return b;
}

std::string WinogradBlocking::describe() const {
  const auto n = [](i64 value) { return std::to_string(value); };
  return "Winograd F(" + n(m) + "x" + n(m) + ", 3x3)" + (step > m ? " with stride 2" : "") + ": tasks of " + n(tiles) + " tile(s) x " + n(panels) + " panel(s), " +
         n(tasks()) + " task(s)" + (shared ? ", the input transformed first" : "") +
         (chunk ? ", the weights as they are wanted" : "");
}

bool readable_in_place(const ConvShape& s, const DTypeKernels& kernels) {
  const i64 g = kernels.group;
  return kernels.storage_bytes * g == kernels.accumulator_bytes && (s.x.c == 1 || s.c == 1) && s.c % g == 0 &&
         s.x.n % g == 0 && s.x.h % g == 0 && s.x.w % g == 0 && s.pad_top == 0 &&
         s.pad_left == 0 && (s.p - 1) * s.stride_h + (s.r - 1) * s.dilation_h < s.h &&
         (s.q - 1) * s.stride_w + (s.s - 1) * s.dilation_w < s.w;
}

Blocking choose_blocking(const ConvShape& s, const DTypeKernels& kernels, const CacheSizes& caches, int threads) {
  Blocking b;
  b.cut = cut_panels(s.k, kernels, kernels.vectors);
  const i64 panels = b.cut.count();
  const i64 bytes = kernels.accumulator_bytes;
  // Copying costs a load and a store for each input vector. With eight registers of output channels or more to share it that is
  // nothing beside the FMAs, and it cures a bad pitch.
  const bool bad_pitch = (s.x.w * s.stride_w * kernels.storage_bytes) % kBadPitch == 0 && s.k >= 8 * kernels.vector;
  const bool gaps = s.stride_w > 1;  // pixels that are skipped: copying fetches ahead what is needed, and no more
  b.packed = !readable_in_place(s, kernels) || bad_pitch || gaps;
  const auto pitch = [bytes](i64 channels) { return (channels * bytes) % 1024 == 0 ? channels + 64 / bytes : channels; };
  b.channels = ceil_div(s.c, kernels.group);
  b.joined = ceil_div(s.joined.c, kernels.group);
  b.pitch = pitch(b.channels);
  b.joined_pitch = b.joined ? pitch(b.joined) : 0;

  const i64 reduction = b.channels * s.r * s.s + b.joined;
  const double weight_bytes = double(panels) * double(b.cut.channels) * double(reduction) * double(bytes);
  b.tiles_outside = weight_bytes <= double(caches.l2) / 4;
  b.chunk = b.tiles_outside ? reduction : std::max<i64>(kChunkBytes / (b.cut.channels * bytes), 1);

  // The slots that r rows of output need, and the width for q columns.
  const auto slots_for = [&](i64 rows) { return s.r == 1 ? rows : (rows - 1) * s.stride_h + (s.r - 1) * s.dilation_h + 1; };
  const auto width_for = [&](i64 cols) { return s.s == 1 ? cols : (cols - 1) * s.stride_w + (s.s - 1) * s.dilation_w + 1; };
  const auto scratch = [&](i64 images, i64 rows, i64 cols) {
    const double row = double(images) * double(bytes);
    const double main = b.packed ? row * double(slots_for(rows)) * double(width_for(cols)) * double(b.pitch) : 0;
    return main + row * double(rows) * double(cols) * double(b.joined_pitch);
  };
  const double budget = double(caches.l2) / 2;
  b.rows = s.p;
  b.cols = s.q;
  if (s.p * s.q <= kTargetPixels) {
    b.images = std::clamp<i64>(kTargetPixels / (s.p * s.q), 1, std::max<i64>(s.n, 1));
    while (b.images > 1 && scratch(b.images, b.rows, b.cols) > budget) --b.images;
  } else {
    if (s.q > 2 * kTargetPixels) b.cols = ceil_div(s.q, ceil_div(s.q, kTargetPixels));
    b.rows = std::clamp<i64>(kTargetPixels / b.cols, 1, s.p);
    while (b.rows > 1 && scratch(1, b.rows, b.cols) > budget) --b.rows;
  }
  b.image_groups = ceil_div(s.n, b.images);
  b.row_parts = ceil_div(s.p, b.rows);
  b.col_parts = ceil_div(s.q, b.cols);

  // Few tasks: make them a multiple of the threads, by rows, by images or by output channels.
  const auto spatial = [&] { return b.image_groups * b.row_parts * b.col_parts; };
  if (threads > 1 && spatial() < 8 * threads && spatial() % threads != 0) {
    if (b.row_parts > 1 && b.image_groups * b.col_parts % threads != 0) {
      b.row_parts = std::min(s.p, ceil_div(b.row_parts, threads) * threads);
    } else if (b.images > 1) {
      b.image_groups = std::min(s.n, ceil_div(b.image_groups, threads) * threads);
    }
  }
  b.rows = ceil_div(s.p, b.row_parts);
  b.row_parts = ceil_div(s.p, b.rows);
  b.images = ceil_div(std::max<i64>(s.n, 1), std::max<i64>(b.image_groups, 1));
  b.image_groups = ceil_div(s.n, b.images);
  b.panel_parts = 1;
  if (threads > 1 && spatial() < 4 * threads && spatial() % threads != 0) b.panel_parts = std::min<i64>(panels, threads);
  b.panels = ceil_div(panels, b.panel_parts);
  b.panel_parts = ceil_div(panels, b.panels);
  b.slots = slots_for(b.rows);
  b.width = width_for(b.cols);
  return b;
}

bool can_join(const ConvShape& last, const ConvShape& projection) {
  return last.r == 1 && last.s == 1 && projection.r == 1 && projection.s == 1 && projection.pad_top == 0 &&
         projection.pad_left == 0 && projection.p == last.p && projection.q == last.q && projection.k == last.k &&
         (projection.p - 1) * projection.stride_h < projection.h && (projection.q - 1) * projection.stride_w < projection.w;
}

std::string Blocking::describe() const {
  const auto n = [](i64 value) { return std::to_string(value); };
  return std::string(packed ? "direct, input rows packed" : "direct, input read in place") + ": tasks of " + n(images) +
         " image(s) x " + n(rows) + " row(s) x " + n(cols) + " column(s) x " + n(panels) + " panel(s), " + n(tasks()) +
         " task(s), " + (tiles_outside ? "each tile does all panels" : "each panel does all tiles") +
         (joined_pitch ? ", with the projection as further terms" : "");
}

}  // namespace fused_resnet
