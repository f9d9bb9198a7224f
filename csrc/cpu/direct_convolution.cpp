#include "direct_convolution.h"

#include <algorithm>
#include <cstring>

#include "team.h"

namespace fused_resnet {
namespace {

i64 align64(i64 bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

struct DirectConvolution::Task {
  i64 image, images;   // first image and how many
  i64 row, rows;       // output rows of each image
  i64 col, cols;       // output columns of each row
  i64 panel, panels_end;
};

DirectConvolution::DirectConvolution(const ConvShape& shape, DType dtype, int threads, const Choice& choice)
    : Convolution(shape, dtype, threads, choice) {
  blocking_ = choose_blocking(shape_, *kernels_, cache_sizes(), threads_);
  packed_ = blocking_.cut;
  packed_bytes();  // throws, before the reduction is cut into pieces, where it could never be held
  if (shape_.empty()) return;
  threads_ = int(std::min<i64>(threads_, blocking_.tasks()));

  const ConvShape& s = shape_;
  const bool packed = blocking_.packed;
  const i64 tap_h = s.dilation_h * (packed ? blocking_.row_elements() : s.x.h / kernels_->group);
  const i64 tap_w = s.dilation_w * (packed ? blocking_.pitch : s.x.w / kernels_->group);
  const i64 channels = blocking_.channels;
  // Where a row of taps is one run of memory, it is one tap. A run longer than a chunk is cut.
  const bool merged = s.s == 1 || (tap_w == channels && s.dilation_w == 1);
  const i64 run = merged ? s.s * channels : channels;
  const i64 most = blocking_.chunk;
  const i64 pieces = (run + most - 1) / most;
  for (i64 r = 0; r < s.r; ++r) {
    for (i64 t = 0; t < (merged ? 1 : s.s); ++t) {
      for (i64 i = 0; i < pieces; ++i) {
        const i64 begin = run * i / pieces, end = run * (i + 1) / pieces;
        taps_.push_back({r * tap_h + t * tap_w + begin, end - begin, 0});
      }
    }
  }
  const i64 joined_pieces = (blocking_.joined + most - 1) / most;
  for (i64 i = 0; i < joined_pieces; ++i) {
    const i64 begin = blocking_.joined * i / joined_pieces, end = blocking_.joined * (i + 1) / joined_pieces;
    taps_.push_back({begin, end - begin, 1});
  }
  for (std::size_t i = 0; i < taps_.size(); ++i) {
    if (chunks_.empty() || chunks_.back().elements + taps_[i].length > most) chunks_.push_back({&taps_[i], 0, 0});
    ++chunks_.back().count;
    chunks_.back().elements += taps_[i].length;
  }
  if (packed) {
    const i64 row_bytes =
        checked_product(checked_product(blocking_.width, blocking_.pitch), kernels_->accumulator_bytes);
    scratch_ = align64(checked_product(checked_product(blocking_.images, blocking_.slots), row_bytes));
  }
  joined_at_ = scratch_;
  scratch_ += align64(checked_product(blocking_.pixels(), checked_product(blocking_.joined_pitch, kernels_->accumulator_bytes)));
  const i64 per_pixel = checked_product(blocking_.pixels(), 4 * sizeof(i64));
  if (chunks_.size() > 1) {
    partial_ = checked_product(blocking_.pixels(), blocking_.cut.channels * kernels_->accumulator_bytes);
  }
  workspace_ = align64(scratch_ + partial_ + per_pixel);
  checked_product(workspace_, threads_);
}

i64 DirectConvolution::packed_bytes() const {
  const i64 vectors = (shape_.k + kernels_->vector - 1) / kernels_->vector;
  const i64 reduction = blocking_.channels * shape_.r * shape_.s + blocking_.joined;
  return checked_product(checked_product(vectors * kernels_->vector, reduction), kernels_->accumulator_bytes);
}

std::string DirectConvolution::packing() const {
  return packing_of("direct", blocking_.cut) + ", joined " + std::to_string(shape_.joined.c);
}

bool DirectConvolution::write_packed(i64 panel, i64 begin, i64 end, const WeightView& weight, const WeightView& joined,
                                     void* out) const noexcept {
  const i64 main = blocking_.channels * shape_.r * shape_.s, bytes = kernels_->accumulator_bytes;
  PackWeightArgs a = pack_args(panel, begin, end, weight);
  a.out = static_cast<char*>(out) + a.k_begin * (main + blocking_.joined) * bytes;
  const bool finite = kernels_->pack_weight(a);
  if (shape_.joined.c == 0 || end != shape_.c) return finite;
  a.out = static_cast<char*>(a.out) + main * a.width * bytes;
  a.weight = joined.data;
  a.stride = joined.stride;
  a.c = a.c_end = shape_.joined.c;
  a.c_begin = 0;
  a.r = a.s = 1;
  return kernels_->pack_weight(a) && finite;
}

DirectConvolution::Task DirectConvolution::task(i64 index) const {
  const Blocking& b = blocking_;
  const i64 panels = b.cut.count();
  Task t;
  t.panel = index % b.panel_parts * b.panels;
  index /= b.panel_parts;
  t.col = index % b.col_parts * b.cols;
  index /= b.col_parts;
  t.row = index % b.row_parts * b.rows;
  index /= b.row_parts;
  t.image = index * b.images;
  t.panels_end = std::min(panels, t.panel + b.panels);
  t.cols = std::min(b.cols, shape_.q - t.col);
  t.rows = std::min(b.rows, shape_.p - t.row);
  t.images = std::min(b.images, shape_.n - t.image);
  return t;
}

// The input rows that a task needs, with zeros where they fall outside: [images][slots][width][pitch]. A kernel of height
// (width) 1 takes only the rows (columns) that it reads.
void DirectConvolution::pack_input(const Task& t, const void* x, char* out) const {
  const ConvShape& s = shape_;
  const Blocking& b = blocking_;
  const i64 bytes = kernels_->accumulator_bytes;
  const i64 step_h = s.r == 1 ? s.stride_h : 1, step_w = s.s == 1 ? s.stride_w : 1;
  const i64 slots = s.r == 1 ? t.rows : (t.rows - 1) * s.stride_h + (s.r - 1) * s.dilation_h + 1;
  const i64 width = s.s == 1 ? t.cols : (t.cols - 1) * s.stride_w + (s.s - 1) * s.dilation_w + 1;
  const i64 h0 = t.row * s.stride_h - s.pad_top, w0 = t.col * s.stride_w - s.pad_left;
  // Pixels [left, right) of a row lie inside the input.
  const i64 left = std::clamp<i64>((-w0 + step_w - 1) / step_w, 0, width);
  const i64 right = w0 >= s.w ? left : std::clamp<i64>((s.w - 1 - w0) / step_w + 1, left, width);
  for (i64 image = 0; image < t.images; ++image) {
    for (i64 slot = 0; slot < slots; ++slot) {
      char* row = out + (image * b.slots + slot) * b.row_elements() * bytes;
      const i64 h = h0 + slot * step_h;
      if (h < 0 || h >= s.h || left >= right) {
        std::memset(row, 0, std::size_t(width * b.pitch * bytes));
        continue;
      }
      std::memset(row, 0, std::size_t(left * b.pitch * bytes));
      std::memset(row + right * b.pitch * bytes, 0, std::size_t((width - right) * b.pitch * bytes));
      PackRowArgs a;
      const i64 offset = (t.image + image) * s.x.n + h * s.x.h + (w0 + left * step_w) * s.x.w;
      a.x = static_cast<const char*>(x) + offset * kernels_->storage_bytes;
      a.stride_c = s.x.c;
      a.stride_w = s.x.w * step_w;
      a.pixels = right - left;
      a.channels = s.c;
      a.out = row + left * b.pitch * bytes;
      a.pitch = b.pitch;
      kernels_->pack_row(a);
    }
  }
}

// The pixels of the joined input that a task needs, one after the other.
void DirectConvolution::pack_joined(const Task& t, const void* x, char* out) const {
  const Joined& j = shape_.joined;
  const i64 pitch = blocking_.joined_pitch;
  for (i64 image = t.image; image < t.image + t.images; ++image) {
    for (i64 row = t.row; row < t.row + t.rows; ++row) {
      PackRowArgs a;
      a.x = element(x, image * j.x.n + row * j.stride_h * j.x.h + t.col * j.stride_w * j.x.w);
      a.stride_c = j.x.c;
      a.stride_w = j.stride_w * j.x.w;
      a.pixels = t.cols;
      a.channels = j.c;
      a.out = out;
      a.pitch = pitch;
      kernels_->pack_row(a);
      out += t.cols * pitch * kernels_->accumulator_bytes;
    }
  }
}

bool DirectConvolution::run_task(int, i64 index, const Operands& operands, char*, char* workspace) const noexcept {
  const Task t = task(index);
  const ConvShape& s = shape_;
  const Blocking& b = blocking_;
  const char* a_data = static_cast<const char*>(operands.x);
  i64 a_image, a_row, a_col;  // elements of A between images, rows and columns of the output
  if (b.packed) {
    pack_input(t, operands.x, workspace);
    a_data = workspace;
    a_image = b.slots * b.row_elements();
    a_row = (s.r == 1 ? 1 : s.stride_h) * b.row_elements();
    a_col = (s.s == 1 ? 1 : s.stride_w) * b.pitch;
  } else {
    a_image = s.x.n / kernels_->group;
    a_row = s.stride_h * s.x.h / kernels_->group;
    a_col = s.stride_w * s.x.w / kernels_->group;
    a_data += (t.image * a_image + t.row * a_row + t.col * a_col) * kernels_->accumulator_bytes;
  }
  const i64 pixels = t.images * t.rows * t.cols;
  const void** base = reinterpret_cast<const void**>(workspace + scratch_ + partial_);
  i64* y_offset = reinterpret_cast<i64*>(base + pixels);
  i64* shortcut_offset = y_offset + pixels;
  const void** joined = reinterpret_cast<const void**>(shortcut_offset + pixels);
  i64 m = 0;
  for (i64 image = 0; image < t.images; ++image) {
    for (i64 row = 0; row < t.rows; ++row) {
      const char* a = a_data + (image * a_image + row * a_row) * kernels_->accumulator_bytes;
      const i64 y0 = (t.image + image) * s.y.n + (t.row + row) * s.y.h + t.col * s.y.w;
      const i64 shortcut0 = (t.image + image) * s.shortcut.n + (t.row + row) * s.shortcut.h + t.col * s.shortcut.w;
      const i64 step = a_col * kernels_->accumulator_bytes;
      for (i64 col = 0; col < t.cols; ++col) base[m + col] = a + col * step;
      for (i64 col = 0; col < t.cols; ++col) y_offset[m + col] = y0 + col * s.y.w;
      if (s.has_shortcut) {
        for (i64 col = 0; col < t.cols; ++col) shortcut_offset[m + col] = shortcut0 + col * s.shortcut.w;
      }
      m += t.cols;
    }
  }
  if (s.joined.c) {
    const i64 step = b.joined_pitch * kernels_->accumulator_bytes;
    for (i64 i = 0; i < pixels; ++i) joined[i] = workspace + joined_at_ + i * step;
  }
  if (s.joined.c) pack_joined(t, operands.joined, workspace + joined_at_);
  BlockArgs args;
  args.base = base;
  args.joined = joined;
  args.pixels = pixels;
  args.chunks = chunks_.data();
  args.chunk_count = i64(chunks_.size());
  args.partial = workspace + scratch_;
  args.weight = operands.weight;
  args.panels = b.cut;
  args.panel_begin = t.panel;
  args.panel_end = t.panels_end;
  args.bias = s.has_bias ? operands.bias : nullptr;
  args.shortcut = s.has_shortcut ? operands.shortcut : nullptr;
  args.shortcut_offset = shortcut_offset;
  args.shortcut_stride_k = s.shortcut.c;
  args.y = operands.y;
  args.y_offset = y_offset;
  args.y_stride_k = s.y.c;
  args.masked = s.masked;
  args.relu = s.relu;
  args.tiles_outside = b.tiles_outside;
  args.input_run = !b.packed && s.r == 1 && s.s == 1 && a_col == b.channels;
  kernels_->block(args);
  return true;
}

}  // namespace fused_resnet
