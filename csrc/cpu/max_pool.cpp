#include "max_pool.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "../conv_shape.h"
#include "team.h"

namespace fused_resnet {
namespace {

constexpr i64 kSerialElements = 32768;  // of the output; below this waking threads costs more than it saves

// The part of a window that lies in the input: elements [first, last) of a line of `size`.
struct Span {
  i64 first, last;
};

Span span(i64 index, i64 stride, i64 pad, i64 kernel, i64 size) {
  const i64 begin = index * stride - pad;
  return {std::max<i64>(begin, 0), std::min(begin + kernel, size)};
}

// Minus infinity, `count` times, in the accumulator's type.
void fill_with_least(char* out, i64 count, i64 bytes) {
  if (bytes == i64(sizeof(float))) {
    std::fill_n(reinterpret_cast<float*>(out), count, -std::numeric_limits<float>::infinity());
  } else {
    std::fill_n(reinterpret_cast<double*>(out), count, -std::numeric_limits<double>::infinity());
  }
}

// Whether each window of a line has an element of it.
bool covers(i64 windows, i64 stride, i64 pad, i64 kernel, i64 size) {
  return pad < kernel && checked_product(windows - 1, stride) - pad < size;
}

void check(const PoolShape& s) {
  const i64 sizes[] = {s.c, s.h, s.w, s.p, s.q, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w};
  if (s.n < 0 || s.pad_top < 0 || s.pad_left < 0 || *std::min_element(std::begin(sizes), std::end(sizes)) < 1) {
    throw std::invalid_argument("a pooling needs sizes of at least 1 (the batch and the padding may be 0)");
  }
  if (!covers(s.p, s.stride_h, s.pad_top, s.kernel_h, s.h) || !covers(s.q, s.stride_w, s.pad_left, s.kernel_w, s.w)) {
    throw std::invalid_argument("a window of the pooling has no element of the input");
  }
  if (s.channels ? s.x.c != 1 || s.y.c != 1 : s.x.w != 1 || s.y.w != 1) {
    throw std::invalid_argument("the elements of a pooling's rows must lie side by side");
  }
  if (checked_product(s.kernel_h, s.kernel_w) > MaxPool::kMostTaps) {
    throw std::invalid_argument("a window of the pooling must have at most " + std::to_string(MaxPool::kMostTaps) + " elements");
  }
  checked_product(checked_product(s.n, s.c), checked_product(s.h, s.w));
}

}  // namespace

MaxPool::MaxPool(const PoolShape& s, DType dtype, int threads)
    : shape_(s), kernels_(&current_table().dtype[int(dtype)]), threads_(std::max(threads, 1)) {
  check(s);
  if (checked_product(checked_product(s.n, s.c), checked_product(s.p, s.q)) < kSerialElements) threads_ = 1;
}

i64 MaxPool::tasks(int) const { return shape_.channels ? shape_.n * shape_.p : shape_.n * shape_.c * shape_.p; }

// A line of the input under a row of windows, with the padding beside it, and slack for the second register of
// `load_every`.
i64 MaxPool::line_elements() const {
  const i64 last = (shape_.q - 1) * shape_.stride_w + shape_.kernel_w;
  return std::max(last, shape_.pad_left + shape_.w) + 2 * kernels_->vector;
}

i64 MaxPool::thread_bytes() const {
  return shape_.channels ? 0 : (line_elements() * kernels_->accumulator_bytes + 63) / 64 * 64;
}

bool MaxPool::run_task(int, i64 index, const Operands& operands, char*, char* mine) const noexcept {
  const i64 p = index % shape_.p, outer = index / shape_.p;
  const char* const x = static_cast<const char*>(operands.x);
  char* const y = static_cast<char*>(operands.y);
  if (shape_.channels) {
    channels_row(outer, p, x, y);
  } else {
    pixels_row(outer / shape_.c, outer % shape_.c, p, x, y, mine);
  }
  return true;
}

bool MaxPool::run(const Operands& operands) const { return run_phases(*this, operands, threads_, helpers_as_before(threads_)); }

std::string MaxPool::describe() const {
  return "max pooling " + std::to_string(shape_.kernel_h) + "x" + std::to_string(shape_.kernel_w);
}

void MaxPool::channels_row(i64 n, i64 p, const char* x, char* y) const {
  const PoolShape& s = shape_;
  const i64 bytes = kernels_->storage_bytes;
  const Span rows = span(p, s.stride_h, s.pad_top, s.kernel_h, s.h);
  const void* taps[kMostTaps];
  for (i64 q = 0; q < s.q; ++q) {
    const Span columns = span(q, s.stride_w, s.pad_left, s.kernel_w, s.w);
    LargestRowArgs a;
    a.rows = taps;
    a.y = y + (n * s.y.n + p * s.y.h + q * s.y.w) * bytes;
    a.length = s.c;
    for (i64 h = rows.first; h < rows.last; ++h) {
      for (i64 w = columns.first; w < columns.last; ++w) {
        taps[a.count++] = x + (n * s.x.n + h * s.x.h + w * s.x.w) * bytes;
      }
    }
    kernels_->largest_row(a);
  }
}

void MaxPool::pixels_row(i64 n, i64 c, i64 p, const char* x, char* y, char* line) const {
  const PoolShape& s = shape_;
  const i64 bytes = kernels_->storage_bytes, wide = kernels_->accumulator_bytes;
  const Span rows = span(p, s.stride_h, s.pad_top, s.kernel_h, s.h);
  const char* const plane = x + (n * s.x.n + c * s.x.c) * bytes;
  const void* taps[kMostTaps];
  LargestRowArgs a;
  a.rows = taps;
  for (i64 h = rows.first; h < rows.last; ++h) taps[a.count++] = plane + h * s.x.h * bytes;
  fill_with_least(line, s.pad_left, wide);
  fill_with_least(line + (s.pad_left + s.w) * wide, line_elements() - s.pad_left - s.w, wide);
  a.y = line + s.pad_left * wide;
  a.length = s.w;
  a.wide_output = true;
  kernels_->largest_row(a);
  LargestWindowsArgs b;
  b.x = line;
  b.size = s.kernel_w;
  b.stride = s.stride_w;
  b.windows = s.q;
  b.y = y + (n * s.y.n + c * s.y.c + p * s.y.h) * bytes;
  kernels_->largest_windows(b);
}

MaxPoolGradient::MaxPoolGradient(const PoolShape& s, DType dtype, bool masked, int threads)
    : shape_(s), kernels_(&current_table().dtype[int(dtype)]), masked_(masked), threads_(std::max(threads, 1)) {
  check(s);
  if (!s.channels || kernels_->storage_bytes != kernels_->accumulator_bytes) {
    throw std::invalid_argument("the gradient of a pooling is of float32 or float64, channels side by side");
  }
  if (checked_product(checked_product(s.n, s.c), checked_product(s.p, s.q)) < kSerialElements) threads_ = 1;
  if (s.n > 0) parts_ = std::min((threads_ + s.n - 1) / s.n, (s.c + kernels_->vector - 1) / kernels_->vector);
}

bool MaxPoolGradient::run_task(int, i64 index, const Operands& operands, char*, char*) const noexcept {
  const PoolShape& s = shape_;
  const i64 bytes = kernels_->storage_bytes, n = index / parts_, part = index % parts_, vector = kernels_->vector;
  const i64 vectors = (s.c + vector - 1) / vector, first = vectors * part / parts_ * vector;
  const i64 channels = std::min(vectors * (part + 1) / parts_ * vector, s.c) - first;
  const char* const x = static_cast<const char*>(operands.weight) + (n * s.x.n + first) * bytes;
  const char* const dy = static_cast<const char*>(operands.x) + (n * s.y.n + first) * bytes;
  char* const dx = static_cast<char*>(operands.y) + (n * s.x.n + first) * bytes;
  const void* rows[MaxPool::kMostTaps];
  void* results[MaxPool::kMostTaps];
  LargestGradArgs a;
  a.rows = rows;
  a.results = results;
  a.length = channels;
  a.masked = masked_;
  i64 zeroed = 0;  // rows of dx
  const auto zero = [&](i64 end) {
    for (; zeroed < end; ++zeroed) {
      if (s.x.w == channels) {
        std::memset(dx + zeroed * s.x.h * bytes, 0, std::size_t(s.w * channels * bytes));
        continue;
      }
      for (i64 w = 0; w < s.w; ++w) std::memset(dx + (zeroed * s.x.h + w * s.x.w) * bytes, 0, std::size_t(channels * bytes));
    }
  };
  for (i64 p = 0; p < s.p; ++p) {
    const Span lines = span(p, s.stride_h, s.pad_top, s.kernel_h, s.h);
    zero(lines.last);
    for (i64 q = 0; q < s.q; ++q) {
      const Span columns = span(q, s.stride_w, s.pad_left, s.kernel_w, s.w);
      a.count = 0;
      for (i64 h = lines.first; h < lines.last; ++h) {
        for (i64 w = columns.first; w < columns.last; ++w) {
          const i64 offset = (h * s.x.h + w * s.x.w) * bytes;
          rows[a.count] = x + offset;
          results[a.count++] = dx + offset;
        }
      }
      a.grad = dy + (p * s.y.h + q * s.y.w) * bytes;
      kernels_->largest_grad(a);
    }
  }
  zero(s.h);
  return true;
}

bool MaxPoolGradient::run(const Operands& operands) const { return run_phases(*this, operands, threads_, helpers_as_before(threads_)); }

std::string MaxPoolGradient::describe() const {
  return "gradient of max pooling " + std::to_string(shape_.kernel_h) + "x" + std::to_string(shape_.kernel_w);
}

}  // namespace fused_resnet
