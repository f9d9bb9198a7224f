#include "passes.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "team.h"

namespace fused_resnet {
namespace {

constexpr i64 kSerialElements = 32768;  // below this waking threads costs more than it saves
constexpr i64 kFewChannels = 64;
constexpr i64 kMostPieces = 256;        // of a bias gradient in channels_last
constexpr i64 kRun = 8192;              // elements of a row that is neither of channels nor of pixels

// The tensor as rows of memory: runs of it where all operands lie alike and no channel is told from another; else of channels where they are
// side by side (channels_last), else of pixels of one channel.
struct Rows {
  bool whole;      // a row is a run of kRun elements, the last of what is left
  bool channels;   // a row runs over channels
  bool plane;      // a row of pixels is a whole plane (P * Q), not one line of it
  i64 count, length;
};

bool alike(const Strides& a, const Strides& b) { return a.n == b.n && a.c == b.c && a.h == b.h && a.w == b.w; }

bool flat(const Strides& s, const PassShape& shape) { return s.h == s.w * shape.q || shape.p == 1; }

// by_channel: something is of a channel.
Rows rows_of(const PassShape& s, bool has_second, bool by_channel) {
  Rows r;
  r.whole = !by_channel && alike(s.first, s.result) && (!has_second || alike(s.second, s.result));
  if (r.whole) {
    r.channels = true;
    r.plane = false;
    r.count = (s.n * s.k * s.p * s.q + kRun - 1) / kRun;
    r.length = kRun;
    return r;
  }
  r.channels = s.result.c == 1 && (s.k > 1 || s.p * s.q == 1);
  r.plane = flat(s.result, s) && flat(s.first, s) && (!has_second || flat(s.second, s));
  if (r.channels) {
    r.count = s.n * s.p * s.q;
    r.length = s.k;
  } else {
    r.count = s.n * s.k * (r.plane ? 1 : s.p);
    r.length = r.plane ? s.p * s.q : s.q;
  }
  return r;
}

// Offset of row i of an operand, in elements.
i64 offset(const PassShape& s, const Rows& r, const Strides& strides, i64 i) {
  if (r.whole) return i * kRun;
  if (r.channels) {
    const i64 q = i % s.q, np = i / s.q;
    return np / s.p * strides.n + np % s.p * strides.h + q * strides.w;
  }
  if (r.plane) return i / s.k * strides.n + i % s.k * strides.c;
  const i64 p = i % s.p, nk = i / s.p;
  return nk / s.k * strides.n + nk % s.k * strides.c + p * strides.h;
}

// From element to element of a row.
i64 step(const Rows& r, const Strides& strides) { return r.whole ? 1 : r.channels ? strides.c : strides.w; }

i64 channel(const PassShape& s, const Rows& r, i64 i) { return r.plane ? i % s.k : i / s.p % s.k; }

i64 length(const PassShape& s, const Rows& r, i64 i) { return r.whole ? std::min(kRun, s.n * s.k * s.p * s.q - i * kRun) : r.length; }

// Whether pixel follows pixel, all channels of each side by side.
bool dense_lines(const Strides& s, const PassShape& shape) { return s.c == 1 && s.w == shape.k; }

const char* at(const void* data, i64 elements, i64 bytes) { return static_cast<const char*>(data) + elements * bytes; }

}  // namespace

void bias_add_relu(const PassShape& s, const void* input, const void* bias, const void* shortcut, void* result,
                   int threads) {
  if (s.n == 0 || s.k == 0 || s.p == 0 || s.q == 0) return;
  const DTypeKernels& kernels = current_table().dtype[int(s.dtype)];
  const i64 bytes = kernels.storage_bytes, input_bytes = s.wide_input ? kernels.accumulator_bytes : bytes;
  if (bias && s.k > 1 && s.k < kFewChannels && s.q > 1 && dense_lines(s.result, s) && dense_lines(s.first, s) &&
      (!shortcut || dense_lines(s.second, s))) {
    // A line of pixels as one pixel of many channels: rows of a few channels would be most of the work.
    PassShape line = s;
    line.k = s.q * s.k;
    line.q = 1;
    std::vector<char> tiled(std::size_t(line.k * bytes));
    for (std::size_t i = 0; i < tiled.size(); i += std::size_t(s.k * bytes)) std::memcpy(&tiled[i], bias, std::size_t(s.k * bytes));
    return bias_add_relu(line, input, tiled.data(), shortcut, result, threads);
  }
  const Rows rows = rows_of(s, shortcut != nullptr, bias != nullptr);
  if (rows.count * rows.length <= kSerialElements) threads = 1;
  parallel_for(rows.count, threads, [&](i64 i) {
    PassRowArgs a;
    a.x = at(input, offset(s, rows, s.first, i), input_bytes);
    a.x_step = step(rows, s.first);
    if (bias) {
      a.bias = rows.channels ? bias : at(bias, channel(s, rows, i), bytes);
      a.bias_step = rows.channels ? 1 : 0;
    }
    if (shortcut) {
      a.shortcut = at(shortcut, offset(s, rows, s.second, i), bytes);
      a.shortcut_step = step(rows, s.second);
    }
    a.y = const_cast<char*>(at(result, offset(s, rows, s.result, i), bytes));
    a.length = length(s, rows, i);
    a.relu = s.relu;
    a.wide_input = s.wide_input;
    kernels.pass_row(a);
  });
}

void relu_backward(const PassShape& s, const void* grad, const void* output, void* result, void* bias_grad, int threads) {
  const DTypeKernels& kernels = current_table().dtype[int(s.dtype)];
  const i64 bytes = kernels.storage_bytes, wide = kernels.accumulator_bytes;
  const Rows rows = rows_of(s, output != nullptr, bias_grad != nullptr);
  // Pieces: runs of rows whose sums are kept apart, [pieces][K] in channels_last, [N][K] otherwise.
  const bool empty = rows.count == 0 || rows.length == 0;
  const i64 per_plane = rows.plane ? 1 : s.p;
  const i64 piece_rows = rows.whole ? 1 : rows.channels ? std::max<i64>(64, (rows.count + kMostPieces - 1) / kMostPieces) : per_plane;
  const i64 pieces = empty ? 0 : (rows.count + piece_rows - 1) / piece_rows;
  const i64 sums_per_piece = rows.channels ? s.k : 1;
  std::vector<char> sums(bias_grad ? std::size_t(pieces * sums_per_piece * wide) : 0, 0);

  if (rows.count * rows.length <= kSerialElements) threads = 1;
  parallel_for(pieces, threads, [&](i64 piece) {
    const i64 end = std::min(rows.count, (piece + 1) * piece_rows);
    for (i64 i = piece * piece_rows; i < end;) {
      MaskRowsArgs a;
      a.grad = at(grad, offset(s, rows, s.first, i), bytes);
      a.grad_step = step(rows, s.first);
      if (output) {
        a.output = at(output, offset(s, rows, s.second, i), bytes);
        a.output_step = step(rows, s.second);
        a.out = const_cast<char*>(at(result, offset(s, rows, s.result, i), bytes));
      }
      a.length = length(s, rows, i);
      if (rows.channels && !rows.whole) {  // the pixels of a line are as far from one another
        a.rows = std::min(end - i, s.q - i % s.q);
        a.grad_pitch = s.first.w, a.output_pitch = s.second.w, a.out_pitch = s.result.w;
      }
      i += a.rows;
      a.sum_step = rows.channels ? 1 : 0;
      if (bias_grad) a.sum = sums.data() + piece * sums_per_piece * wide;
      kernels.mask_rows(a);
    }
  });
  if (!bias_grad) return;
  std::vector<double> totals(std::size_t(s.k), 0.0);
  for (i64 piece = 0; piece < pieces; ++piece) {
    for (i64 j = 0; j < sums_per_piece; ++j) {
      const char* sum = sums.data() + (piece * sums_per_piece + j) * wide;
      const i64 k = rows.channels ? j : piece % s.k;
      if (wide == sizeof(float)) {
        float value;
        std::memcpy(&value, sum, sizeof value);
        totals[std::size_t(k)] += double(value);
      } else {
        double value;
        std::memcpy(&value, sum, sizeof value);
        totals[std::size_t(k)] += value;
      }
    }
  }
  kernels.store(bias_grad, totals.data(), s.k);
}

}  // namespace fused_resnet
