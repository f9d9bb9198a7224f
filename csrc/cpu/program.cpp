#include "program.h"

#include <algorithm>
#include <stdexcept>

namespace fused_resnet {
namespace {

i64 align64(i64 bytes) { return (bytes + 63) / 64 * 64; }

// Depth first, a group has at least so many output pixels of its smallest map: then weights are used often enough.
constexpr i64 kGroupPixels = 196;

// Depth first, threads share nothing but the weights and meet once: they are worth their while for this share of what a layer needs.
constexpr double kDepthFirstShare = 0.2;

// A value that lives from step `begin` to step `end`, both included.
struct Life {
  i64 bytes;
  std::size_t begin, end;
  i64 offset = 0;
};

// Gives each value its offset, the largest first, each as low as those that live with it let it; returns the bytes for all.
i64 place(std::vector<Life>& lives) {
  std::vector<std::size_t> order(lives.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return lives[a].bytes > lives[b].bytes; });
  i64 all = 0;
  std::vector<const Life*> placed;  // by offset
  for (const std::size_t i : order) {
    Life& life = lives[i];
    i64 offset = 0;
    for (const Life* other : placed) {
      if (other->end < life.begin || life.end < other->begin) continue;
      if (offset + life.bytes <= other->offset) break;
      offset = std::max(offset, other->offset + other->bytes);
    }
    life.offset = offset;
    all = std::max(all, offset + life.bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), &life, [](const Life* a, const Life* b) { return a->offset < b->offset; }),
                  &life);
  }
  return all;
}

}  // namespace

// A later step reads a pixel's channels; a distance of a multiple of 1 KiB between pixels would put them into few sets of the L1 cache.
Strides Program::strides_of(int value) const {
  const Network::Value& v = network_.value(value);
  if (v.input != Network::kNone) return v.strides;
  if (value == network_.nodes_.back().out) return y_;
  const i64 pitch = v.c * bytes_ % 1024 == 0 ? v.c + 64 / bytes_ : v.c;
  return {v.h * v.w * pitch, 1, v.w * pitch, pitch};
}

i64 Program::image_bytes(int value) const { return checked_product(strides_of(value).n, bytes_); }

Program::Program(Network network, const Strides& y, DType dtype, int threads, const Request& request)
    : network_(std::move(network)), y_(y), dtype_(dtype), threads_(std::max(threads, 1)) {
  if (network_.nodes_.empty()) throw std::invalid_argument("a program needs at least one node");
  bytes_ = current_table().dtype[int(dtype)].storage_bytes;
  network_.join_projections();
  convolution_.resize(network_.joined_to_.size(), nullptr);
  cut_sections();
  for (Section& section : sections_) choose_schedule(section);
  threads_ = 1;
  for (const Section& section : sections_) threads_ = std::max(threads_, section.threads);
  const std::vector<Use> uses = this->uses();
  place_values(uses);
  for (std::size_t i = 0; i < sections_.size(); ++i) {
    Section& section = sections_[i];
    const i64 rest = network_.images_ % section.images;
    section.plans.push_back(plan(section, section.images, uses, request));
    if (rest != 0) section.plans.push_back(plan(section, rest, uses, request));
    const Plan& first = section.plans.front();
    for (const Planned& planned : first.steps) {
      if (planned.weight != Network::kNone) convolution_[std::size_t(planned.weight)] = static_cast<Convolution*>(planned.step.get());
    }
    if (section.depth_first) {
      for (const Plan& p : section.plans) thread_ = std::max(thread_, p.values + p.shared + p.thread);
      phases_.push_back({i, 0, 0, (network_.images_ + section.images - 1) / section.images, section.threads == 1});
      continue;
    }
    shared_ = std::max(shared_, first.shared);
    thread_ = std::max(thread_, first.thread);
    for (std::size_t step = 0; step < first.steps.size(); ++step) {
      const Step& work = *first.steps[step].step;
      for (int phase = 0; phase < work.phases(); ++phase) phases_.push_back({i, step, phase, work.tasks(phase), section.threads == 1});
    }
  }
  if (network_.images_ == 0) phases_.clear();  // planned as for one image
  workspace_bytes();                           // throws here, not at a call
  name_stages();
}

void Program::name_stages() {
  for (std::size_t i = 0; i < phases_.size(); ++i) {
    const Phase& at = phases_[i];
    if (!stages_.empty() && phases_[i - 1].section == at.section && phases_[i - 1].step == at.step) {
      stages_.back().end = i + 1;
      continue;
    }
    const Section& section = sections_[at.section];
    const Plan& plan = section.plans.front();
    Stage stage{{}, "", i, i + 1};
    if (section.depth_first) stage.what = "depth first, " + std::to_string(plan.images) + " image(s) at a time";
    for (std::size_t step = 0; step < plan.steps.size(); ++step) {
      if (!section.depth_first && step != at.step) continue;
      const Network::Node& node = network_.nodes_[section.begin + step];
      if (node.joined_number != Network::kNone) stage.nodes.push_back(node.joined_number);
      stage.nodes.push_back(node.number);
      if (!stage.what.empty()) stage.what += "; ";
      stage.what += plan.steps[step].step->describe();
    }
    stages_.push_back(std::move(stage));
  }
}

void Program::cut_sections() {
  for (std::size_t i = 0; i < network_.nodes_.size(); ++i) {
    if (network_.nodes_[i].begins_section) {
      sections_.emplace_back();
      sections_.back().begin = i;
    }
    sections_.back().end = i + 1;
  }
}

void Program::choose_schedule(Section& section) const {
  double macs = 0;
  int convolutions = 0;
  bool streams = false;
  for (std::size_t i = section.begin; i < section.end; ++i) {
    const Network::Node& node = network_.nodes_[i];
    if (node.kind != Network::Node::convolution) continue;
    ++convolutions;
    const ConvShape shape = network_.shape_of(node, network_.images_);
    macs += shape.macs();
    streams = streams || streams_weights(shape, current_table().dtype[int(dtype_)]);
  }
  const double few = convolutions * serial_macs(current_table().dtype[int(dtype_)]);
  section.threads = convolutions > 0 && macs < few && !streams ? 1 : threads_;
  const i64 all = network_.images_;
  section.images = std::max<i64>(all, 1);
  if (all < 2 || section.end - section.begin < 2) return;
  const Network::Value& last = network_.value(network_.nodes_[section.end - 1].out);
  const i64 pixels = last.h * last.w, wanted = std::max<i64>((kGroupPixels + pixels - 1) / pixels, 1);
  const auto groups_for = [&](int threads) {
    const i64 size = std::min(wanted, std::max<i64>(all / threads, 1));
    return (all + size - 1) / size;
  };
  const auto deals_evenly = [&](int threads) { return groups_for(threads) % threads == 0 || groups_for(threads) >= 4 * threads; };
  if (section.threads == 1 && macs >= few * kDepthFirstShare && deals_evenly(threads_)) section.threads = threads_;
  section.depth_first = deals_evenly(section.threads);
  if (section.depth_first) section.images = (all + groups_for(section.threads) - 1) / groups_for(section.threads);
}

std::vector<Program::Use> Program::uses() const {
  std::vector<Use> uses(network_.values_.size());
  for (std::size_t s = 0; s < sections_.size(); ++s) {
    for (std::size_t i = sections_[s].begin; i < sections_[s].end; ++i) {
      const Network::Node& node = network_.nodes_[i];
      for (const int read : {node.in, node.shortcut, node.joined}) {
        if (read == Network::kNone) continue;
        Use& use = uses[std::size_t(read)];
        // A section that goes depth first is one moment: all that it reads and makes for others lives in all of it.
        const bool inside = use.is_made && use.section == s;
        use.read = sections_[s].depth_first && !inside ? sections_[s].end - 1 : i;
        if (use.is_made && !inside && network_.nodes_[sections_[use.section].end - 1].out != read) {
          throw std::invalid_argument("a section is read in its last value alone");
        }
      }
      const bool whole = sections_[s].depth_first && i + 1 == sections_[s].end;
      uses[std::size_t(node.out)] = {whole ? sections_[s].begin : i, i, s, true};
    }
  }
  return uses;
}

// Whether the value is in each thread's own memory.
bool Program::is_own(const Use& use, int value) const {
  const Section& section = sections_[use.section];
  return use.is_made && section.depth_first && network_.nodes_[section.end - 1].out != value;
}

// The value whose memory `node` may write its output into: its shortcut, each element of which it reads before it writes the same one, where
// nothing else reads that any more. kNone: there is none.
int Program::overwritten(const Network::Node& node, std::size_t index, const std::vector<Use>& uses) const {
  const int shortcut = node.shortcut;
  if (shortcut == Network::kNone || node.in == shortcut || node.joined == shortcut || node.out == network_.nodes_.back().out) {
    return Network::kNone;
  }
  const Use &there = uses[std::size_t(shortcut)], &out = uses[std::size_t(node.out)];
  return there.is_made && there.read == index && is_own(there, shortcut) == is_own(out, node.out) ? shortcut : Network::kNone;
}

void Program::place_values(const std::vector<Use>& uses) {
  std::vector<Life> lives;
  std::vector<std::size_t> life_of(uses.size(), 0);
  places_.resize(uses.size());
  for (std::size_t v = 0; v < uses.size(); ++v) {
    const int number = int(v), input = network_.values_[v].input;
    const i64 image = image_bytes(number);
    if (input != Network::kNone) places_[v] = {Place::input, input, 0, image};
  }
  for (std::size_t i = 0; i < network_.nodes_.size(); ++i) {
    const Network::Node& node = network_.nodes_[i];
    const std::size_t v = std::size_t(node.out);
    const i64 image = image_bytes(node.out);
    if (node.out == network_.nodes_.back().out) {
      places_[v] = {Place::output, 0, 0, image};
    } else if (!is_own(uses[v], node.out)) {
      places_[v] = {Place::arena, 0, 0, image};
      const int before = overwritten(node, i, uses);
      life_of[v] = before == Network::kNone ? lives.size() : life_of[std::size_t(before)];
      if (before == Network::kNone) {
        lives.push_back({align64(checked_product(std::max<i64>(network_.images_, 1), image)), uses[v].made, uses[v].read});
      } else {
        lives[life_of[v]].end = uses[v].read;
      }
    }
  }
  arena_ = place(lives);
  for (std::size_t v = 0; v < uses.size(); ++v) {
    if (places_[v].kind == Place::arena) places_[v].offset = lives[life_of[v]].offset;
  }
}

Program::Plan Program::plan(const Section& section, i64 images, const std::vector<Use>& uses, const Request& request) const {
  Plan p;
  p.images = images;
  std::vector<Place> places = places_;
  std::vector<Life> lives;
  std::vector<std::size_t> numbers;
  for (std::size_t i = section.begin; i < section.end; ++i) {
    const int out = network_.nodes_[i].out;
    const Use& use = uses[std::size_t(out)];
    if (!is_own(use, out)) continue;
    lives.push_back({align64(checked_product(images, image_bytes(out))), use.made, use.read});
    numbers.push_back(std::size_t(out));
  }
  p.values = place(lives);
  for (std::size_t i = 0; i < numbers.size(); ++i) places[numbers[i]] = {Place::own, 0, lives[i].offset, image_bytes(int(numbers[i]))};
  const auto at = [&](int value) { return value == Network::kNone ? Place{} : places[std::size_t(value)]; };
  for (std::size_t i = section.begin; i < section.end; ++i) {
    const Network::Node& node = network_.nodes_[i];
    p.steps.push_back({make(node, images, section.depth_first ? 1 : section.threads, request), node.index, at(node.in), at(node.shortcut),
                       at(node.joined), at(node.out)});
    p.shared = std::max(p.shared, align64(p.steps.back().step->shared_bytes()));
    p.thread = std::max(p.thread, align64(p.steps.back().step->thread_bytes()));
  }
  return p;
}

std::unique_ptr<Step> Program::make(const Network::Node& node, i64 images, int threads, const Request& request) const {
  if (node.kind == Network::Node::zero_pad) {
    ZeroPadShape s = node.zeros;
    s.n = images, s.x = strides_of(node.in), s.y = strides_of(node.out);
    return std::make_unique<ZeroPad>(s, bytes_);
  }
  if (node.kind == Network::Node::mean_pool) {
    const Network::Value& in = network_.value(node.in);
    return std::make_unique<MeanPool>(MeanPoolShape{images, in.c, in.h, in.w, strides_of(node.in), strides_of(node.out)}, dtype_);
  }
  if (node.kind == Network::Node::max_pool) {
    const Network::Value& in = network_.value(node.in);
    PoolShape s = node.window;
    s.n = images, s.c = in.c, s.h = in.h, s.w = in.w;
    s.x = strides_of(node.in), s.y = strides_of(node.out);
    s.channels = s.x.c == 1 && s.y.c == 1;
    return std::make_unique<MaxPool>(s, dtype_, threads);
  }
  ConvShape s = network_.shape_of(node, images);
  s.x = strides_of(node.in), s.y = strides_of(node.out);
  if (node.shortcut != Network::kNone) s.shortcut = strides_of(node.shortcut);
  if (node.joined != Network::kNone) {
    s.joined = {network_.value(node.joined).c, node.joined_stride_h, node.joined_stride_w, strides_of(node.joined)};
  }
  // Chosen for the whole batch: the result depends neither on the size of a group nor on what that depends on.
  ConvShape whole = s;
  whole.n = network_.images_;
  const Choice choice = choose_algorithm(whole, current_table().dtype[int(dtype_)], cache_sizes(), request);
  return Convolution::make(s, dtype_, threads, choice);
}

std::string Program::describe() const {
  std::string text;
  for (const Section& section : sections_) {
    const Plan& plan = section.plans.front();
    if (!text.empty()) text += "; ";
    text += section.depth_first ? "depth first, " + std::to_string(plan.images) + " image(s) at a time" : "layer by layer";
    for (const Planned& planned : plan.steps) text += "; " + planned.step->describe();
  }
  return text;
}

}  // namespace fused_resnet
