#include <algorithm>
#include <stdexcept>
#include <utility>

#include "program.h"

namespace fused_resnet {

const Network::Value& Network::value(int number) const {
  if (number < 0 || std::size_t(number) >= values_.size()) throw std::invalid_argument("a step reads a value that is not there");
  return values_[std::size_t(number)];
}

int Network::input(i64 channels, i64 h, i64 w, const Strides& strides) {
  values_.push_back({channels, h, w, inputs_++, strides});
  return int(values_.size()) - 1;
}

int Network::add(Node node, i64 c, i64 h, i64 w) {
  values_.push_back({c, h, w, kNone, {}});
  node.out = int(values_.size()) - 1;
  node.number = added_++;
  node.begins_section = next_section_;
  next_section_ = false;
  nodes_.push_back(std::move(node));
  return node.out;
}

int Network::convolution(int in, const Layer& layer, int shortcut) {
  value(in);
  if (shortcut != kNone) {
    const Value& added = value(shortcut);
    if (added.c != layer.k || added.h != layer.p || added.w != layer.q) throw std::invalid_argument("a shortcut has another shape");
  }
  Node node;
  node.layer = layer;
  node.in = in;
  node.shortcut = shortcut;
  node.index = int(joined_to_.size());
  joined_to_.push_back(kNone);
  return add(std::move(node), layer.k, layer.p, layer.q);
}

int Network::max_pool(int in, const PoolShape& window) {
  Node node;
  node.window = window;
  node.kind = Node::max_pool;
  node.in = in;
  return add(std::move(node), value(in).c, window.p, window.q);
}

int Network::mean_pool(int in) {
  Node node;
  node.kind = Node::mean_pool;
  node.in = in;
  return add(std::move(node), value(in).c, 1, 1);
}

int Network::zero_pad(int in, i64 channels, i64 before, i64 stride_h, i64 stride_w) {
  const Value& x = value(in);
  if (stride_h < 1 || stride_w < 1) throw std::invalid_argument("a zero-padded shortcut needs a stride of at least 1");
  Node node;
  node.kind = Node::zero_pad;
  node.zeros.c = x.c, node.zeros.k = channels, node.zeros.before = before;
  node.zeros.p = (x.h + stride_h - 1) / stride_h, node.zeros.q = (x.w + stride_w - 1) / stride_w;
  node.zeros.stride_h = stride_h, node.zeros.stride_w = stride_w;
  node.in = in;
  const i64 p = node.zeros.p, q = node.zeros.q;
  return add(std::move(node), channels, p, q);
}

ConvShape Network::shape_of(const Node& node, i64 images) const {
  const Layer& layer = node.layer;
  const Value& in = value(node.in);
  ConvShape s;
  s.n = images, s.c = in.c, s.h = in.h, s.w = in.w;
  s.k = layer.k, s.r = layer.r, s.s = layer.s, s.p = layer.p, s.q = layer.q;
  s.stride_h = layer.stride_h, s.stride_w = layer.stride_w;
  s.pad_top = layer.pad_top, s.pad_left = layer.pad_left;
  s.dilation_h = layer.dilation_h, s.dilation_w = layer.dilation_w;
  s.has_bias = layer.has_bias, s.relu = layer.relu, s.has_shortcut = node.shortcut != kNone;
  return s;
}

bool Network::joins(const Node& last, const Node& projection) const {
  return last.kind == Node::convolution && projection.kind == Node::convolution && last.shortcut == projection.out && last.in != projection.out &&
         projection.shortcut == kNone && !projection.layer.relu && !last.begins_section &&
         can_join(shape_of(last, images_), shape_of(projection, images_));
}

void Network::join_projections() {
  for (std::size_t i = 0; i < nodes_.size();) {
    const Node projection = nodes_[i];
    int readers = 0;
    for (const Node& other : nodes_) readers += (other.in == projection.out) + (other.shortcut == projection.out);
    const auto last = std::find_if(nodes_.begin() + std::ptrdiff_t(i) + 1, nodes_.end(), [&](const Node& s) { return joins(s, projection); });
    if (readers != 1 || last == nodes_.end()) {
      ++i;
      continue;
    }
    last->joined = projection.in;
    last->joined_number = projection.number;
    last->joined_stride_h = projection.layer.stride_h, last->joined_stride_w = projection.layer.stride_w;
    last->layer.has_bias = last->layer.has_bias || projection.layer.has_bias;
    last->shortcut = kNone;
    joined_to_[std::size_t(projection.index)] = last->index;
    if (projection.begins_section) nodes_[i + 1].begins_section = true;
    nodes_.erase(nodes_.begin() + std::ptrdiff_t(i));
  }
}

}  // namespace fused_resnet
