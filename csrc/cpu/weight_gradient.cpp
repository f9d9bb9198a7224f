#include "weight_gradient.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "team.h"

namespace fused_resnet {
namespace {

// Steps whose products are summed in registers: the input's, a panel wide, stay in the L1 cache.
constexpr i64 kBlock = 96;
// Steps that are loaded at a time: tiles, pixels.
constexpr i64 kTilesAtOnce = 192, kPixelsAtOnce = 384;
// Steps of a chunk: so many that adding up what the chunks gave takes little beside them.
constexpr i64 kTilesOfChunk = 160, kPixelsOfChunk = 768;
constexpr i64 kMostChunks = 32;
constexpr i64 kChunkBytes = 16 << 20;  // of the sums of all chunks, at most
// Bytes from pixel to pixel of an input that is read where it is, at most: four lines of each of kBlock pixels then lie in half the sets of an L1
// cache of 64 sets, or more.
constexpr i64 kInPlacePitch = 512;
// From so many columns on, copying dy to where its pixels lie well takes little beside the products.
constexpr i64 kInPlaceColumns = 128;
// Output channels of a task: enough that what loading the input costs is little, and few enough for the workspace.
constexpr i64 kGoodRows = 96, kMostRows = 256;
// Output channels whose products at all positions stay in the L2 cache, a panel wide.
constexpr i64 kProductRows = 64;
// FMA slots: of Winograd's transforms, for each tile, vector and position; of a register of input or gradient on its way to its place. Measured
// on one core of a Zen 5.
constexpr double kTransformSlots = 6, kLoadSlots = 4;

i64 align64(i64 bytes) { return (bytes + 63) / 64 * 64; }
i64 ceil_div(i64 a, i64 b) { return a / b + (a % b != 0); }

// Where part `index` begins of `total`, cut into parts of which the first are one longer.
i64 begin_of(i64 index, i64 parts, i64 total) { return total / parts * index + std::min(index, total % parts); }

const WinogradGradientKernels* gradient_kernels(const ConvShape& s, Algorithm algorithm, const DTypeKernels& kernels) {
  if (s.r != 3 || s.s != 3 || s.dilation_h != 1 || s.dilation_w != 1 || s.stride_h != 1 || s.stride_w != 1) return nullptr;
  return algorithm == Algorithm::winograd4   ? &kernels.winograd_gradient4
         : algorithm == Algorithm::winograd2 ? &kernels.winograd_gradient2
                                             : nullptr;
}

// FMA slots, whatever the threads.
double cost(const ConvShape& s, Algorithm algorithm, const DTypeKernels& kernels) {
  const WinogradGradientKernels* const g = gradient_kernels(s, algorithm, kernels);
  const double rows = double(s.k), taps = double(s.r * s.s), in = std::ceil(double(s.c) / kernels.vector);
  if (!g) {
    const double pixels = double(s.n) * double(s.p) * double(s.q);
    return pixels * (rows * std::ceil(taps * double(s.c) / kernels.vector) + kLoadSlots * (in * taps + rows / kernels.vector));
  }
  const double tiles = double(s.n) * std::ceil(double(s.p) / g->m) * std::ceil(double(s.q) / g->m);
  const double out = std::ceil(double(s.k) / kernels.vector);
  return double(g->alpha * g->alpha) * (tiles * (rows * in + (in + out) * kTransformSlots) + rows * in * kTransformSlots);
}

// Whether each pixel of dy meets the same pixel of the input alone: with padding there would be more of dy.
bool is_plain(const ConvShape& s) {
  return s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 && s.h == s.p && s.w == s.q;
}

// Pixels in one direction where that is the same: the fewer runs, the better.
void merge(ConvShape& s) {
  if (!is_plain(s)) return;
  if (s.x.h != s.w * s.x.w || s.y.h != s.q * s.y.w) return;
  s.w = s.q = s.h * s.w;
  s.h = s.p = 1;
  if (s.x.n != s.w * s.x.w || s.y.n != s.q * s.y.w) return;
  s.w = s.q = s.n * s.w;
  s.n = 1;
}

}  // namespace

WeightGradient::WeightGradient(const ConvShape& shape, const Strides& weight, DType dtype, int threads, const Request& request)
    : shape_(shape), weight_(weight), kernels_(&current_table().dtype[int(dtype)]), isa_(current_table().isa) {
  shape.validate();
  threads_ = shape.macs() < serial_macs(*kernels_) ? 1 : std::max(threads, 1);
  const auto consider = [&](Algorithm algorithm, const char* reason) {
    const bool wanted = request.automatic ? cost(shape, algorithm, *kernels_) < cost(shape, algorithm_, *kernels_) : request.algorithm == algorithm;
    if (!wanted || !gradient_kernels(shape, algorithm, *kernels_)) return;
    algorithm_ = algorithm;
    reason_ = reason;
  };
  reason_ = "a product whose reduction runs over pixels";
  if (request.automatic && kernels_->accumulator_bytes > i64(sizeof(float))) {
    reason_ += ": float64 is for precision";
  } else {
    consider(Algorithm::winograd2, "F(3x3, 2x2) needs 2.25 times fewer multiplications than direct");
    if (!request.strict) consider(Algorithm::winograd4, "F(3x3, 4x4) needs 4 times fewer multiplications than direct");
  }
  gradient_ = gradient_kernels(shape, algorithm_, *kernels_);
  cut();
  layout_ = layout();
  checked_product(thread_bytes(), threads_);  // throws here rather than in run, as the next
  shared_bytes();
}

void WeightGradient::cut() {
  if (gradient_) {
    const ConvShape& s = shape_;
    const i64 m = gradient_->m, alpha = gradient_->alpha, rows = ceil_div(s.p, m), cols = ceil_div(s.q, m);
    WinogradTiles t;
    t.rows = rows, t.cols = cols, t.step = m, t.alpha = alpha, t.kernels = kernels_;
    input_tiles_ = grad_tiles_ = t;
    WinogradTiles &x = input_tiles_, &dy = grad_tiles_;
    x.size = alpha, x.pad_top = s.pad_top, x.pad_left = s.pad_left, x.c = s.c, x.h = s.h, x.w = s.w, x.stride = s.x;
    x.transform = gradient_->input, x.transform_packed = gradient_->input_packed;
    dy.size = m, dy.c = s.k, dy.h = s.p, dy.w = s.q, dy.stride = s.y;
    dy.transform = gradient_->grad, dy.transform_packed = gradient_->grad_packed;
    total_ = s.n * rows * cols;
  } else {
    // Which of two operands gives the columns, is free: that with fewer channels, for it is more often read where it is.
    if (is_plain(shape_) && shape_.k < shape_.c) {
      exchanged_ = true;
      std::swap(shape_.k, shape_.c);
      std::swap(shape_.x, shape_.y);
      std::swap(weight_.n, weight_.c);
    }
    merge(shape_);
    const bool in_place = is_plain(shape_) && shape_.n == 1 && shape_.p == 1 && kernels_->storage_bytes == kernels_->accumulator_bytes;
    grad_in_place_ = in_place && shape_.y.c == 1 && shape_.c <= kInPlaceColumns;
    input_in_place_ = in_place && shape_.x.c == 1 && shape_.c % kernels_->vector == 0 && shape_.x.w * kernels_->storage_bytes <= kInPlacePitch;
    total_ = shape_.n * shape_.p * shape_.q;
  }
  const i64 vector = kernels_->vector, bytes = kernels_->accumulator_bytes, taps = shape_.r * shape_.s;
  columns_ = cut_panels(gradient_ ? shape_.c : checked_product(taps, shape_.c), *kernels_, kernels_->vectors);
  const i64 last = columns_.count() - 1;
  pitch_ = checked_product(gradient_ ? taps : 1, columns_.begin(last) + columns_.width(last));
  if (pitch_ * bytes % 4096 == 0) pitch_ += 64 / bytes;  // rows in different sets of the L1 cache
  const i64 of_chunk = gradient_ ? kTilesOfChunk : kPixelsOfChunk, sums = checked_product(checked_product(shape_.k, pitch_), bytes);
  while (chunks_ < kMostChunks && 2 * chunks_ * of_chunk <= total_ && sums <= kChunkBytes / (2 * chunks_)) chunks_ *= 2;
  const i64 most = ceil_div(std::max<i64>(total_, 1), chunks_);  // of a chunk
  steps_ = ceil_div(most, ceil_div(most, gradient_ ? kTilesAtOnce : kPixelsAtOnce));

  // Enough tasks for all threads, each with the same number of them where that can be; of which each loads the whole input of its chunk.
  const i64 vectors = ceil_div(shape_.k, vector), wanted = ceil_div(threads_, chunks_);
  i64 parts = std::max(ceil_div(shape_.k, kMostRows), std::min(wanted, vectors));
  if (threads_ > 1 && parts * chunks_ < 2 * threads_ && shape_.k / (2 * parts) >= kGoodRows) parts *= 2;
  rows_ = ceil_div(vectors, parts) * vector;
  row_parts_ = ceil_div(shape_.k, rows_);
  grad_pitch_ = rows_ + (rows_ * bytes % 512 == 0 ? 64 / bytes : 0);  // as pitch_: steps in more than an eighth of the sets
  threads_ = int(std::min<i64>(threads_, tasks(0)));
}

i64 WeightGradient::spread(i64 elements) const {
  return elements * kernels_->accumulator_bytes % 4096 == 0 ? elements + 64 / kernels_->accumulator_bytes : elements;
}

i64 WeightGradient::shared_bytes() const {
  return chunks_ > 1 ? align64(checked_product(checked_product(checked_product(chunks_, shape_.k), pitch_), kernels_->accumulator_bytes)) : 0;
}

WeightGradient::Layout WeightGradient::layout() const {
  const i64 bytes = kernels_->accumulator_bytes;
  const auto size = [bytes](i64 count, i64 elements) { return align64(checked_product(checked_product(count, elements), bytes)); };
  Layout l;
  l.input = size(positions(), grad_stride());
  l.product = l.input + size(positions(), input_stride());
  l.sums = l.product + (gradient_ ? size(positions(), spread(kProductRows * columns_.channels)) : 0);
  l.scratch = l.sums + (chunks_ > 1 ? 0 : size(rows_, pitch_));
  l.end = l.scratch + (gradient_ ? input_tiles_.scratch_bytes(steps_) : 0);  // dy's tiles are as many, and smaller
  return l;
}

// Pixels [begin, end) of dy, in runs of one row each: f(image, row, column, count, pixels before it).
template <class F>
void WeightGradient::for_each_run(i64 begin, i64 end, const F& f) const {
  const i64 per_image = shape_.p * shape_.q;
  for (i64 i = begin; i < end;) {
    const i64 q = i % shape_.q, count = std::min(shape_.q - q, end - i);
    f(i / per_image, i % per_image / shape_.q, q, count, i - begin);
    i += count;
  }
}

// Output channels [first, last) of dy at steps [begin, end).
WeightGradient::Loaded WeightGradient::load_grad(i64 begin, i64 end, i64 first, i64 last, const void* dy, const Memory& memory) const {
  const i64 bytes = kernels_->accumulator_bytes, vector = kernels_->vector;
  if (gradient_) {
    for (i64 k = first; k < last; k += vector) {
      grad_tiles_.run(begin, end, steps_, k / vector, dy, memory.grad + (k - first) * bytes, grad_stride(), grad_pitch_, memory.scratch);
    }
    return {memory.grad, grad_pitch_};
  }
  if (grad_in_place_) return {static_cast<const char*>(element(dy, begin * shape_.y.w + first)), shape_.y.w};
  const Strides& stride = shape_.y;
  for_each_run(begin, end, [&](i64 n, i64 p, i64 q, i64 count, i64 at) {
    PackRowArgs a;
    a.x = element(dy, n * stride.n + first * stride.c + p * stride.h + q * stride.w);
    a.stride_c = stride.c;
    a.stride_w = stride.w;
    a.pixels = count;
    a.channels = last - first;
    a.out = memory.grad + at * grad_pitch_ * bytes;
    a.pitch = grad_pitch_;
    kernels_->widen_row(a);
  });
  return {memory.grad, grad_pitch_};
}

// A panel's columns of the input at steps [begin, end).
WeightGradient::Loaded WeightGradient::load_input(i64 begin, i64 end, i64 panel, const void* x, const Memory& memory) const {
  const i64 bytes = kernels_->accumulator_bytes, vector = kernels_->vector, width = columns_.width(panel), first = columns_.begin(panel);
  if (gradient_) {
    for (i64 v = 0; v < width; v += vector) {
      input_tiles_.run(begin, end, steps_, (first + v) / vector, x, memory.input + v * bytes, input_stride(), width, memory.scratch);
    }
    return {memory.input, width};
  }
  if (input_in_place_) return {static_cast<const char*>(element(x, begin * shape_.x.w + first)), shape_.x.w};
  const ConvShape& s = shape_;
  for (i64 e = first; e < first + width;) {
    const bool exists = e < columns_.k;
    const i64 tap = e / s.c, c = e % s.c, channels = std::min(exists ? s.c - c : width, first + width - e);
    char* const out = memory.input + (e - first) * bytes;
    const auto zeros = [&](i64 at, i64 count) {
      for (i64 i = at; i < at + count; ++i) std::memset(out + i * width * bytes, 0, std::size_t(channels * bytes));
    };
    for_each_run(begin, end, [&](i64 n, i64 p, i64 q, i64 count, i64 at) {
      const i64 h = p * s.stride_h - s.pad_top + tap / s.s * s.dilation_h, w = q * s.stride_w - s.pad_left + tap % s.s * s.dilation_w;
      if (!exists || h < 0 || h >= s.h) return zeros(at, count);
      const i64 left = std::clamp<i64>(ceil_div(std::max<i64>(-w, 0), s.stride_w), 0, count);
      const i64 right = std::clamp<i64>(w < s.w ? ceil_div(s.w - w, s.stride_w) : 0, left, count);
      zeros(at, left);
      zeros(at + right, count - right);
      PackRowArgs a;
      a.x = element(x, n * s.x.n + c * s.x.c + h * s.x.h + (w + left * s.stride_w) * s.x.w);
      a.stride_c = s.x.c;
      a.stride_w = s.x.w * s.stride_w;
      a.pixels = right - left;
      a.channels = channels;
      a.out = out + (at + left) * width * bytes;
      a.pitch = width;
      a.others_between = true;
      if (a.pixels > 0) kernels_->widen_row(a);
    });
    e += channels;
  }
  return {memory.input, width};
}

// Pixels [begin, end) and output channels [first, last). Nothing of Winograd's tiles, nor where a pixel of dy meets others of the input.
WeightGradient::Next WeightGradient::look_ahead(i64 begin, i64 end, i64 first, i64 last, const void* x, const void* dy) const {
  const ConvShape& s = shape_;
  Next next;
  if (gradient_ || begin >= end || !is_plain(s) || s.n > 1 || s.p > 1 || s.x.c != 1 || s.y.c != 1 || s.x.w != s.c) return next;
  next.input = static_cast<const char*>(element(x, begin * s.x.w));
  next.grad = static_cast<const char*>(element(dy, begin * s.y.w + first));
  next.pixels = end - begin;
  next.grad_bytes = (last - first) * kernels_->storage_bytes;
  return next;
}

// Adds the products of what is loaded to the sums of `rows` output channels.
void WeightGradient::multiply(const Loaded& grad, const Loaded& input, i64 steps, i64 rows, i64 panel, bool more, const Memory& memory,
                              char* sums, const Next& next) const {
  const i64 bytes = kernels_->accumulator_bytes, width = columns_.width(panel), blocks = ceil_div(steps, kBlock);
  const i64 row_blocks = gradient_ ? ceil_div(rows, kProductRows) : 1;
  char* const out = sums + columns_.begin(panel) * bytes;
  for (i64 part = 0; part < row_blocks; ++part) {
    const i64 first = begin_of(part, row_blocks, rows), last = begin_of(part + 1, row_blocks, rows);
    const i64 product_stride = spread((last - first) * width);
    for (i64 position = 0; position < positions(); ++position) {
      WeightProductsArgs a;
      a.grad_pitch = grad.pitch;
      a.input_pitch = input.pitch;
      a.width = width;
      a.rows = last - first;
      a.sums = gradient_ ? memory.product + position * product_stride * bytes : out;
      a.pitch = gradient_ ? width : pitch_;
      for (i64 block = 0; block < blocks; ++block) {
        const i64 begin = begin_of(block, blocks, steps);
        a.steps = begin_of(block + 1, blocks, steps) - begin;
        a.grad = grad.data + (position * grad_stride() + begin * grad.pitch + first) * bytes;
        a.input = input.data + (position * input_stride() + begin * input.pitch) * bytes;
        a.more = block > 0 || (more && !gradient_);
        // A share of what is next.
        const i64 calls = columns_.count() * blocks, call = panel * blocks + block, pixel = begin_of(call, calls, next.pixels);
        const i64 pixels = begin_of(call + 1, calls, next.pixels) - pixel;
        const i64 input_bytes = shape_.x.w * kernels_->storage_bytes, grad_bytes = shape_.y.w * kernels_->storage_bytes;  // of a pixel
        a.next = next.input + pixel * input_bytes;
        a.next_bytes = pixels * input_bytes;
        a.ahead = {next.grad + pixel * grad_bytes, grad_bytes, pixels, ceil_div(next.grad_bytes, 64), false};
        kernels_->weight_products(a);
      }
    }
    if (gradient_) {
      WinogradTapsArgs t;
      t.product = memory.product;
      t.position_stride = product_stride;
      t.rows = last - first;
      t.width = width;
      t.sums = out + first * pitch_ * bytes;
      t.pitch = pitch_;
      t.tap_stride = tap_stride();
      t.more = more;
      gradient_->taps(t);
    }
  }
}

// Output channels [first, last), whose sums are those of so many parts.
bool WeightGradient::store(i64 first, i64 last, const char* sums, i64 parts, void* dw) const {
  const i64 bytes = kernels_->accumulator_bytes;
  StoreWeightArgs a;
  a.parts = parts;
  a.part_stride = shape_.k * pitch_;
  a.tap_stride = tap_stride();
  a.c = shape_.c;
  a.r = shape_.r;
  a.s = shape_.s;
  a.stride = weight_;
  a.pitch = pitch_;
  bool finite = true;
  for (i64 k = first; k < last; k += kernels_->vector) {
    a.rows = std::min<i64>(kernels_->vector, last - k);
    a.sums = sums + (k - first) * pitch_ * bytes;
    a.out = const_cast<void*>(element(dw, k * weight_.n));
    finite = kernels_->store_weight(a) && finite;
  }
  return finite;
}

bool WeightGradient::run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept {
  const i64 bytes = kernels_->accumulator_bytes;
  if (phase == 1) {
    const i64 first = index * kernels_->vector;
    return store(first, std::min(first + kernels_->vector, shape_.k), shared + first * pitch_ * bytes, chunks_, operands.y);
  }
  const void *const x = exchanged_ ? operands.weight : operands.x, *const dy = exchanged_ ? operands.x : operands.weight;
  const Memory m{mine, mine + layout_.input, mine + layout_.product, mine + layout_.sums, mine + layout_.scratch};
  const i64 chunk = index / row_parts_, first = index % row_parts_ * rows_, last = std::min(first + rows_, shape_.k);
  const i64 begin = begin_of(chunk, chunks_, total_), end = begin_of(chunk + 1, chunks_, total_), loads = ceil_div(end - begin, steps_);
  char* const sums = chunks_ > 1 ? shared + (chunk * shape_.k + first) * pitch_ * bytes : m.sums;
  if (loads == 0) std::memset(sums, 0, std::size_t((last - first) * pitch_ * bytes));  // no images
  for (i64 load = 0; load < loads; ++load) {
    const i64 from = begin + begin_of(load, loads, end - begin), to = begin + begin_of(load + 1, loads, end - begin);
    const Loaded grad = load_grad(from, to, first, last, dy, m);
    const Next next = look_ahead(to, std::min(to + steps_, end), first, last, x, dy);
    for (i64 panel = 0; panel < columns_.count(); ++panel) {
      const Loaded input = load_input(from, to, panel, x, m);
      multiply(grad, input, to - from, last - first, panel, load > 0, m, sums, next);
    }
  }
  return chunks_ > 1 || store(first, last, sums, 1, operands.y);
}

bool WeightGradient::run(const Operands& operands) const { return run_phases(*this, operands, threads_, helpers_as_before(threads_)); }

std::string WeightGradient::describe() const {
  const auto n = [](i64 value) { return std::to_string(value); };
  const std::string what = gradient_ ? " tiles" : " pixels";
  return n(chunks_) + (chunks_ > 1 ? " chunks of " : " chunk of ") + n(ceil_div(total_, chunks_)) + what + ", " + n(steps_) + " at a time; " +
         n(std::min(rows_, shape_.k)) + " of " + n(shape_.k) + (exchanged_ ? " input" : " output") + " channels in a task, panels of " + n(columns_.channels) + " columns";
}

}  // namespace fused_resnet
