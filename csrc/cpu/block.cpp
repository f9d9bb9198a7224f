#include "block.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>

#include "workspace.h"

namespace fused_resnet {
namespace {

i64 align64(i64 bytes) { return (bytes + 63) / 64 * 64; }

// Depth first, a group has at least so many output pixels of its smallest map: then weights are used often enough.
constexpr i64 kGroupPixels = 196;

// The next layer reads a pixel's channels; a distance of a multiple of 1 KiB between pixels would put them into few sets of the
// L1 cache.
Strides between_strides(const Layer& layer, i64 bytes) {
  const i64 pitch = layer.k * bytes % 1024 == 0 ? layer.k + 64 / bytes : layer.k;
  return {layer.p * layer.q * pitch, 1, layer.q * pitch, pitch};
}

ConvShape shape_of(const Layer& layer, i64 n, i64 c, i64 h, i64 w) {
  ConvShape s;
  s.n = n, s.c = c, s.h = h, s.w = w;
  s.k = layer.k, s.r = layer.r, s.s = layer.s, s.p = layer.p, s.q = layer.q;
  s.stride_h = layer.stride_h, s.stride_w = layer.stride_w;
  s.pad_top = layer.pad_top, s.pad_left = layer.pad_left;
  s.dilation_h = layer.dilation_h, s.dilation_w = layer.dilation_w;
  s.has_bias = layer.has_bias, s.relu = layer.relu;
  return s;
}

// Of the main path.
double macs(const BlockShape& block) {
  double sum = 0;
  i64 c = block.c;
  for (const Layer& layer : block.main) {
    sum += shape_of(layer, block.n, c, 1, 1).macs();
    c = layer.k;
  }
  return sum;
}

}  // namespace

Block::Block(const BlockShape& shape, DType dtype, int threads, const Request& request)
    : shape_(shape), dtype_(dtype), threads_(std::max(threads, 1)) {
  if (shape.main.empty()) throw std::invalid_argument("a block needs at least one convolution");
  bytes_ = current_table().dtype[int(dtype)].storage_bytes;
  const Layer& last = shape_.main.back();
  joined_ = shape_.kind == Shortcut::projection &&
            can_join(shape_of(last, shape_.n, 1, 1, 1), shape_of(shape_.projection, shape_.n, shape_.c, shape_.h, shape_.w));
  if (macs(shape_) < double(shape_.main.size()) * serial_macs(current_table().dtype[int(dtype)])) threads_ = 1;
  i64 images = std::max<i64>(shape_.n, 1);
  if (shape_.n > 1) {
    i64 pixels = last.p * last.q;
    const i64 wanted = std::max<i64>((kGroupPixels + pixels - 1) / pixels, 1);
    const i64 most = std::max<i64>(shape_.n / threads_, 1);
    const i64 size = std::min(wanted, most), groups = (shape_.n + size - 1) / size;
    depth_first_ = threads_ == 1 || groups % threads_ == 0 || groups >= 4 * threads_;
    if (depth_first_) images = (shape_.n + groups - 1) / groups;
  }
  groups_.push_back(plan(images, depth_first_ ? 1 : threads_, request));
  stage_of_.resize(shape_.main.size() + (shape_.kind == Shortcut::projection && !joined_ ? 1 : 0));
  for (std::size_t i = 0; i < groups_[0].stages.size(); ++i) stage_of_[groups_[0].stages[i].layer] = i;
  if (shape_.n % images != 0) groups_.push_back(plan(shape_.n % images, 1, request));
}

Block::Group Block::plan(i64 images, int threads, const Request& request) const {
  Group g;
  g.images = images;
  i64 bytes = 0;  // of all intermediates
  const auto intermediate = [&](const Layer& layer) {
    g.slot.push_back(bytes);
    bytes += align64(checked_product(checked_product(images, between_strides(layer, bytes_).n), bytes_));
    return int(g.slot.size()) - 1;
  };
  const auto add = [&](const Layer& layer, std::size_t index, int in, i64 c, i64 h, i64 w, const Strides& x, int shortcut,
                       const Strides& shortcut_strides, int out, const Strides& y) {
    ConvShape s = shape_of(layer, images, c, h, w);
    s.x = x;
    s.y = y;
    s.has_shortcut = shortcut != kNone;
    s.shortcut = shortcut_strides;
    if (joined_ && index + 1 == shape_.main.size()) {
      s.joined = {shape_.c, shape_.projection.stride_h, shape_.projection.stride_w, shape_.x};
      s.has_bias = s.has_bias || shape_.projection.has_bias;
    }
    // Chosen for the whole batch: the result depends neither on the size of a group nor on what that depends on.
    ConvShape whole = s;
    whole.n = shape_.n;
    const Choice choice = choose_algorithm(whole, current_table().dtype[int(dtype_)], cache_sizes(), request);
    g.stages.push_back({Convolution::make(s, dtype_, threads, choice), index, in, shortcut, out});
    g.shared = std::max(g.shared, align64(g.stages.back().convolution->shared_bytes()));
    g.thread = std::max(g.thread, align64(g.stages.back().convolution->thread_bytes()));
  };

  int shortcut = kNone;
  Strides shortcut_strides;
  if (shape_.kind == Shortcut::identity) {
    shortcut = kX;
    shortcut_strides = shape_.x;
  } else if (shape_.kind == Shortcut::external) {
    shortcut = kExternal;
    shortcut_strides = shape_.shortcut;
  } else if (shape_.kind == Shortcut::projection && !joined_) {
    shortcut = intermediate(shape_.projection);
    shortcut_strides = between_strides(shape_.projection, bytes_);
    add(shape_.projection, shape_.main.size(), kX, shape_.c, shape_.h, shape_.w, shape_.x, kNone, {}, shortcut, shortcut_strides);
  }
  int in = kX;
  i64 c = shape_.c, h = shape_.h, w = shape_.w;
  Strides x = shape_.x;
  for (std::size_t i = 0; i < shape_.main.size(); ++i) {
    const Layer& layer = shape_.main[i];
    if (i + 1 == shape_.main.size()) {
      add(layer, i, in, c, h, w, x, shortcut, shortcut_strides, kY, shape_.y);
      break;
    }
    const int out = intermediate(layer);
    const Strides y = between_strides(layer, bytes_);
    add(layer, i, in, c, h, w, x, kNone, {}, out, y);
    in = out;
    c = layer.k, h = layer.p, w = layer.q, x = y;
  }
  g.slot.push_back(bytes);
  return g;
}

Operands Block::operands_of(const Stage& stage, const Group& group, const BlockOperands& block, i64 image, char* between) const {
  const auto at = [&](int slot) -> const char* {
    switch (slot) {
      case kX: return static_cast<const char*>(block.x) + image * shape_.x.n * bytes_;
      case kY: return static_cast<const char*>(block.y) + image * shape_.y.n * bytes_;
      case kExternal: return static_cast<const char*>(block.shortcut) + image * shape_.shortcut.n * bytes_;
      case kNone: return nullptr;
      default: return between + group.slot[std::size_t(slot)];
    }
  };
  Operands o;
  o.x = at(stage.in);
  o.weight = block.weight[stage.layer];
  o.bias = block.bias[stage.layer];
  o.shortcut = at(stage.shortcut);
  o.y = const_cast<char*>(at(stage.out));
  if (stage.convolution->shape().joined.c) o.joined = at(kX);
  return o;
}

const Block::Stage& Block::stage_at(int& phase) const {
  const std::vector<Stage>& stages = groups_.front().stages;
  std::size_t i = 0;
  for (; phase >= stages[i].convolution->phases(); ++i) phase -= stages[i].convolution->phases();
  return stages[i];
}

int Block::phases() const {
  if (depth_first_) return 1;
  int sum = 0;
  for (const Stage& stage : groups_.front().stages) sum += stage.convolution->phases();
  return sum;
}

i64 Block::tasks(int phase) const {
  if (shape_.n == 0) return 0;  // planned as for one image
  const i64 images = groups_.front().images;
  if (depth_first_) return (shape_.n + images - 1) / images;
  const Stage& stage = stage_at(phase);
  return stage.convolution->tasks(phase);
}

// Layer by layer, the threads share the intermediates and what a convolution shares; depth first, each thread has its own.
i64 Block::shared_bytes() const {
  const Group& g = groups_.front();
  return depth_first_ ? 0 : g.slot.back() + g.shared;
}

i64 Block::thread_bytes() const {
  if (!depth_first_) return groups_.front().thread;
  i64 most = 0;
  for (const Group& g : groups_) most = std::max(most, g.slot.back() + g.shared + g.thread);
  return most;
}

bool Block::run_task(int phase, i64 index, const BlockOperands& operands, char* shared, char* mine) const {
  const Group& first = groups_.front();
  if (!depth_first_) {
    const Stage& stage = stage_at(phase);
    const Operands o = operands_of(stage, first, operands, 0, shared);
    return stage.convolution->run_task(phase, index, o, shared + first.slot.back(), mine);
  }
  const i64 image = index * first.images;
  const Group& group = shape_.n - image < first.images ? groups_.back() : first;
  char* const scratch = mine + group.slot.back();
  bool finite = true;
  for (const Stage& stage : group.stages) {
    const Convolution& conv = *stage.convolution;
    const Operands o = operands_of(stage, group, operands, image, mine);
    for (int p = 0; p < conv.phases(); ++p) {
      for (i64 i = 0; i < conv.tasks(p); ++i) finite = conv.run_task(p, i, o, scratch, scratch + group.shared) && finite;
    }
  }
  return finite;
}

bool Block::run(const BlockOperands& operands) const {
  if (shape_.n == 0) return true;
  Workspace workspace(workspace_bytes());
  char* const shared = workspace.data();
  bool finite = true;
  if (threads_ == 1) {
    for (int phase = 0; phase < phases(); ++phase) {
      const i64 count = tasks(phase);
      for (i64 i = 0; i < count; ++i) finite = run_task(phase, i, operands, shared, shared + shared_bytes()) && finite;
    }
    return finite;
  }
#pragma omp parallel num_threads(threads_) reduction(&& : finite)
  {
    char* const mine = shared + shared_bytes() + omp_get_thread_num() * thread_bytes();
    for (int phase = 0; phase < phases(); ++phase) {
      const i64 count = tasks(phase);
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < count; ++i) finite = run_task(phase, i, operands, shared, mine) && finite;
    }
  }
  return finite;
}

std::string Block::describe() const {
  const Group& g = groups_.front();
  std::string text = depth_first_ ? "depth first, " + std::to_string(g.images) + " image(s) at a time" : "layer by layer";
  for (const Stage& stage : g.stages) text += "; " + stage.convolution->describe();
  if (joined_) text += ", with the projection";
  return text;
}

}  // namespace fused_resnet
