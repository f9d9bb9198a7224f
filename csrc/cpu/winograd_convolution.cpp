#include "winograd_convolution.h"

#include <algorithm>
#include <cstring>

#include "team.h"

namespace fused_resnet {
namespace {

i64 align64(i64 bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

WinogradConvolution::WinogradConvolution(const ConvShape& shape, DType dtype, int threads, const Choice& choice)
    : Convolution(shape, dtype, threads, choice) {
  winograd_ = winograd_kernels(shape_, choice.algorithm, *kernels_);
  blocking_ = choose_winograd_blocking(shape_, choice.algorithm, *kernels_, cache_sizes(), threads_, choice.fresh);
  threads_ = int(std::min<i64>(threads_, blocking_.tasks()));
  if (!blocking_.chunk) packed_ = blocking_.cut;
  WinogradTiles& t = tiles_;
  t.rows = blocking_.rows, t.cols = blocking_.cols, t.size = t.alpha = blocking_.alpha, t.step = blocking_.step;
  t.pad_top = shape.pad_top, t.pad_left = shape.pad_left, t.c = shape.c, t.h = shape.h, t.w = shape.w, t.stride = shape.x;
  t.kernels = kernels_, t.transform = winograd_->input, t.transform_packed = winograd_->input_packed;
  checked_product(thread_bytes(), threads_);
}

i64 WinogradConvolution::position_stride(i64 tiles) const {
  // Not a multiple of 4 KiB: the stores of one tile go to all positions, and would fall into one set of the L1 cache.
  const i64 elements = checked_product(checked_product(blocks(), tiles), kernels_->vector);
  return elements * kernels_->accumulator_bytes % 4096 == 0 ? elements + 64 / kernels_->accumulator_bytes : elements;
}

i64 WinogradConvolution::transformed_bytes(i64 tiles) const {
  return align64(checked_product(checked_product(position_stride(tiles), blocking_.positions()), kernels_->accumulator_bytes));
}

i64 WinogradConvolution::ahead_bytes() const {
  // Every tile may be a strip of its own: rows of shortcut and output, and of the input of as many other tiles.
  const i64 rows = 2 * blocking_.m + blocking_.step;
  return align64(checked_product(checked_product(blocking_.tiles, rows), sizeof(AheadRun)));
}

i64 WinogradConvolution::fresh_bytes() const {
  return align64(blocking_.positions() * blocking_.chunk * blocking_.cut.channels * kernels_->accumulator_bytes);
}

i64 WinogradConvolution::thread_bytes() const {
  const i64 bytes = kernels_->accumulator_bytes, strip = tiles_.scratch_bytes(strip_tiles());
  const i64 product = align64(checked_product(checked_product(blocking_.positions(), blocking_.tiles), blocking_.cut.channels * bytes));
  return strip + product + (blocking_.shared ? 0 : transformed_bytes(blocking_.tiles)) + fresh_bytes() + ahead_bytes();
}

i64 WinogradConvolution::packed_bytes() const {
  if (blocking_.chunk) return 0;
  const i64 vectors = (shape_.k + kernels_->vector - 1) / kernels_->vector * kernels_->vector;
  const i64 count = checked_product(checked_product(vectors, blocking_.positions()), elements());
  return checked_product(count, kernels_->accumulator_bytes);
}

std::string WinogradConvolution::packing() const {
  const std::string transform = "Winograd " + std::to_string(blocking_.m) + " of " + std::to_string(blocking_.alpha);
  return packing_of(transform + " step " + std::to_string(blocking_.step), blocking_.cut);
}

bool WinogradConvolution::write_packed(i64 panel, i64 begin, i64 end, const WeightView& weight, const WeightView&, void* out) const noexcept {
  PackWeightArgs a = pack_args(panel, begin, end, weight);
  a.out = static_cast<char*>(out) + a.k_begin * blocking_.positions() * elements() * kernels_->accumulator_bytes;
  return winograd_->weight(a);
}

// The transformed input of tiles [begin, end) and one vector of channels. `out` holds `tiles` tiles, tile `first` the first.
void WinogradConvolution::transform(i64 begin, i64 end, i64 index, const void* x, char* out, i64 first, i64 tiles,
                                    char* scratch) const {
  const i64 bytes = kernels_->accumulator_bytes, vector = kernels_->vector;
  const i64 block = index / kernels_->group, part = index % kernels_->group * vector * bytes / kernels_->group;
  tiles_.run(begin, end, strip_tiles(), index, x, out + (block * tiles + begin - first) * vector * bytes + part, position_stride(tiles),
             vector, scratch);
}

// From the products of tiles [begin, end) and one panel to the output. False: see Convolution::run.
bool WinogradConvolution::finish(i64 begin, i64 end, i64 panel, const Operands& operands, const char* product,
                                 char* scratch) const {
  const ConvShape& s = shape_;
  const i64 m = blocking_.m, bytes = kernels_->accumulator_bytes;
  WinogradOutputArgs a;
  a.k = s.k;
  a.channel = blocking_.cut.begin(panel);
  a.width = blocking_.cut.width(panel);
  a.position_stride = (end - begin) * a.width;
  a.bias = s.has_bias ? operands.bias : nullptr;
  a.shortcut_stride = s.shortcut;
  a.y_stride = s.y;
  a.masked = s.masked;
  a.relu = s.relu;
  a.scratch = scratch;
  bool finite = true;
  for (i64 tile = begin; tile < end;) {
    const Strip t = strip(tile, end);
    const i64 p = t.row * m, q = t.col * m;
    a.product = product + (tile - begin) * a.width * bytes;
    a.tiles = t.tiles;
    a.rows = std::min(m, s.p - p);
    a.columns = std::min(t.tiles * m, s.q - q);
    a.y = const_cast<void*>(element(operands.y, t.image * s.y.n + p * s.y.h + q * s.y.w));
    if (s.has_shortcut) {
      a.shortcut = element(operands.shortcut, t.image * s.shortcut.n + p * s.shortcut.h + q * s.shortcut.w);
    }
    if (!winograd_->output(a)) finite = false;
    tile += t.tiles;
  }
  return finite;
}

// What the epilogue of this panel will touch, and a share of the input of the tiles from `next` on.
i64 WinogradConvolution::look_ahead(i64 begin, i64 end, i64 next, i64 panel, const Operands& operands, AheadRun* runs) const {
  const ConvShape& s = shape_;
  const i64 m = blocking_.m, step = blocking_.step, size = kernels_->storage_bytes, first = blocking_.cut.begin(panel);
  const i64 lines = (std::min(blocking_.cut.channels, s.k - first) * size + 63) / 64;
  i64 count = 0;
  const auto add = [&](const void* data, const Strides& stride, const Strip& t, bool write) {
    const i64 columns = std::min(t.tiles * m, s.q - t.col * m);
    for (i64 p = t.row * m; p < std::min(t.row * m + m, s.p); ++p) {
      const i64 offset = t.image * stride.n + first * stride.c + p * stride.h + t.col * m * stride.w;
      runs[count++] = {static_cast<const char*>(element(data, offset)), stride.w * size, columns, lines, write};
    }
  };
  for (i64 tile = begin; tile < end;) {
    const Strip t = strip(tile, end);
    if (s.has_shortcut && s.shortcut.c == 1) add(operands.shortcut, s.shortcut, t, false);
    if (s.y.c == 1) add(operands.y, s.y, t, true);
    tile += t.tiles;
  }
  if (s.x.c != 1) return count;
  const i64 next_end = std::min(next + end - begin, all_tiles());
  i64 line = 0;
  for (i64 tile = next; tile < next_end;) {
    const Strip t = strip(tile, next_end);
    const i64 left = t.col * step - s.pad_left, w0 = std::max<i64>(left, 0), w1 = std::min(left + (t.tiles + 1) * step, s.w);
    for (i64 i = 0; i < step; ++i, ++line) {
      const i64 h = t.row * step - s.pad_top + i + 1;
      if (line % panels() != panel || h < 0 || h >= s.h || w0 >= w1) continue;
      const char* from = static_cast<const char*>(element(operands.x, t.image * s.x.n + h * s.x.h + w0 * s.x.w));
      runs[count++] = {from, s.x.w * size, w1 - w0, (s.c * size + 63) / 64, false};
    }
    tile += t.tiles;
  }
  return count;
}

i64 WinogradConvolution::tasks(int phase) const {
  if (shape_.empty()) return 0;
  return blocking_.shared && phase == 0 ? vectors() * shape_.n * blocking_.rows : blocking_.tasks();
}

bool WinogradConvolution::run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept {
  const WinogradBlocking& b = blocking_;
  const i64 bytes = kernels_->accumulator_bytes, vector = kernels_->vector;
  const i64 product_bytes = align64(b.positions() * b.tiles * b.cut.channels * bytes);
  char* const product = mine;
  char* const transformed = mine + product_bytes;
  char* const scratch = b.shared ? transformed : transformed + transformed_bytes(b.tiles);
  if (b.shared && phase == 0) {
    // One row of tiles, one vector of channels.
    const i64 begin = index / vectors() * b.cols;
    transform(begin, begin + b.cols, index % vectors(), operands.x, shared, 0, all_tiles(), scratch);
    return true;
  }
  const i64 part = index / b.panel_parts, panel_begin = index % b.panel_parts * b.panels;
  const i64 panel_end = std::min(panels(), panel_begin + b.panels);
  const i64 begin = part * b.tiles, end = std::min(begin + b.tiles, all_tiles());
  const char* input = shared + begin * vector * bytes;
  i64 held = all_tiles();
  if (!b.shared) {
    held = end - begin;
    for (i64 v = 0; v < vectors(); ++v) {
      transform(begin, end, v, operands.x, transformed, begin, held, scratch);
    }
    input = transformed;
  }
  AheadRun* const runs = reinterpret_cast<AheadRun*>(mine + thread_bytes() - ahead_bytes());
  const i64 next = b.shared ? all_tiles() : (part + threads_) * b.tiles;
  bool finite = true;
  if (b.chunk) return run_fresh(begin, end, panel_begin, operands, input, product, scratch);
  for (i64 panel = panel_begin; panel < panel_end; ++panel) {
    WinogradMultiplyArgs a;
    a.ahead = runs;
    a.ahead_runs = look_ahead(begin, end, next, panel, operands, runs);
    a.input = input;
    a.position_stride = position_stride(held);
    a.block_stride = held * vector;
    a.width = b.cut.width(panel);
    const auto weights = [&](i64 of) {
      return static_cast<const char*>(operands.weight) + b.cut.begin(of) * b.positions() * elements() * bytes;
    };
    a.weight = weights(panel);
    a.weight_stride = elements() * a.width;
    a.next = weights(panel + 1 < panel_end ? panel + 1 : panel_begin);
    a.product = product;
    a.tiles = end - begin;
    a.channels = elements();
    a.positions = int(b.positions());
    kernels_->winograd_multiply(a);
    if (!finish(begin, end, panel, operands, product, scratch)) finite = false;
  }
  return finite;
}

// Tiles [begin, end) of one panel: so many channels of its weights are transformed and multiplied at a time, both in the L2 cache.
bool WinogradConvolution::run_fresh(i64 begin, i64 end, i64 panel, const Operands& operands, const char* input, char* product,
                                    char* scratch) const {
  const WinogradBlocking& b = blocking_;
  const i64 bytes = kernels_->accumulator_bytes, group = kernels_->group, vector = kernels_->vector;
  char* const fresh = product + thread_bytes() - ahead_bytes() - fresh_bytes();  // product: where the thread's workspace begins
  AheadRun* const runs = reinterpret_cast<AheadRun*>(fresh + fresh_bytes());
  bool finite = true;
  WinogradMultiplyArgs a;
  a.block_stride = all_tiles() * vector;
  a.position_stride = position_stride(all_tiles());
  a.width = b.cut.width(panel);
  a.product = product;
  a.tiles = end - begin;
  a.positions = int(b.positions());
  a.weight = a.next = fresh;
  for (i64 first = 0; first < elements(); first += b.chunk) {
    a.channels = std::min(b.chunk, elements() - first);
    PackWeightArgs w;
    w.weight = element(operands.fresh.data, first * group * operands.fresh.stride.c);
    w.stride = operands.fresh.stride;
    w.k = shape_.k;
    w.c = w.c_end = std::min(a.channels * group, shape_.c - first * group);
    w.r = w.s = 3;
    w.k_begin = b.cut.begin(panel);
    w.width = a.width;
    w.out = fresh;
    if (!winograd_->weight(w)) finite = false;
    const bool last = first + b.chunk >= elements();
    a.ahead = runs;
    a.ahead_runs = last ? look_ahead(begin, end, all_tiles(), panel, operands, runs) : 0;
    a.input = input + first / vector * a.block_stride * bytes;
    a.weight_stride = a.channels * a.width;
    a.more = first > 0;
    kernels_->winograd_multiply(a);
  }
  return finish(begin, end, panel, operands, product, scratch) && finite;
}

}  // namespace fused_resnet
