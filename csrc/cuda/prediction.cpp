// How long a tile's kernel takes, from what bounds it: arithmetic, the L2 cache, the end of the operation, memory. The constants are
// estimates, of a model that no GPU has been asked yet; `bench/gpu_report.py tiles` measures every tile beside what is said of it here.
#include <algorithm>

#include "config.h"

namespace fused_resnet::cuda {
namespace {

constexpr double kCache = 42;        // bytes a cycle that the L2 cache gives each multiprocessor
constexpr double kEnd = 350;         // cycles for the end of 64 pixels x 32 channels; as many again where a shortcut is read
constexpr double kStart = 1.0;       // microseconds until the first loads of a tile are there
constexpr double kLaunch = 2.5;      // microseconds
constexpr double kReached = 0.8;     // the share of the memory's bandwidth that copies reach
constexpr double kHidden = 0.95;     // what bounds a kernel hides so much of the rest; tiles that one bound makes equal differ by this

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// The share of the tensor cores' rate that a tile of this size can get: what shared memory delivers for it. A wgmma of 64 pixels
// reads (64 + n) x 32 bytes at 128 a cycle and computes for n / 2 cycles.
double efficiency(const Tile& t) {
  if (t.form == Form::few) return 0.3;  // 8 bytes a load
  if (t.architecture == Architecture::sm80) return t.m * t.n >= 128 * 128 ? 0.8 : t.m * t.n >= 128 * 64 ? 0.65 : 0.5;
  if (t.n >= 256) return 0.85;
  if (t.n >= 128) return t.m >= 128 ? 0.8 : 0.7;
  return t.m >= 128 ? 0.55 : 0.5;
}

// Steps of the reduction: each tap's channels are cut on their own, but for `few`, which packs taps.
i64 steps_of(const ConvShape& s, const Tile& t) {
  const i64 step = 128 / bytes_of(t.dtype);
  if (t.form == Form::few) return ceil_div(s.r * s.s * s.c, step);
  return s.r * s.s * ceil_div(s.c, step) + ceil_div(s.joined.c, step);
}

}  // namespace

double predicted_time(const ConvShape& s, const Tile& t, const Device& device) {
  const bool hopper = device.major == 9, shares = t.architecture == Architecture::sm90 && cooperates(t.m, t.n);
  const double clock = hopper ? 1.7e3 : 1.4e3;  // cycles a microsecond
  const double bandwidth = kReached * (device.bandwidth > 0 ? device.bandwidth : hopper ? 3.35e6 : 1.55e6);  // an H100's, an A100's
  // Per multiprocessor and cycle: 4096 bfloat16 operations on Hopper, half of it before; TF32 runs at half the rate.
  const double rate = (t.architecture == Architecture::sm90 ? 4096.0 : 2048.0) * (t.dtype == DType::float32 ? 0.5 : 1.0) * efficiency(t);
  const i64 rows = s.n * s.p * s.q, tiles = ceil_div(rows, t.m) * ceil_div(s.k, t.n);
  const double waves = double(ceil_div(tiles, device.multiprocessors)), depth = 128.0 / double(bytes_of(t.dtype));

  const double arithmetic = 2.0 * t.m * t.n * depth / rate;
  const double fetched = (t.m + t.n / (shares ? 2.0 : 1.0)) * 128 / kCache;
  const double sums = waves * double(steps_of(s, t)) * std::max(arithmetic, fetched) / clock;

  const double pieces = double(ceil_div(t.m, 64) * ceil_div(t.n, 32)) / (shares ? 2 : 1);
  const double one_end = pieces * kEnd * (s.has_shortcut ? 2 : 1) / clock, ends = waves * one_end;
  // Where warp groups cooperate nothing is summed meanwhile; else that holds for a multiprocessor's last tile.
  const double computed = shares ? sums + ends : std::max(sums + one_end, ends);

  const double moved = double(bytes_of(t.dtype)) * (double(s.n * s.h * s.w * s.c) + double(rows * s.k) * (s.has_shortcut ? 2 : 1) +
                                                    double(s.k * s.r * s.s * s.c) + double((rows + s.k) * s.joined.c));
  const double memory = moved / bandwidth, bound = std::max(computed, memory);
  return bound + (1 - kHidden) * (sums + ends + memory - bound) + kStart + kLaunch;
}

}  // namespace fused_resnet::cuda
