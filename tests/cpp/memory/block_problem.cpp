#include "block_problem.h"

using namespace fused_resnet;

namespace memory {
namespace {

// Of an output channel's weights so many are not 0, but 1 or -1: then the sums stay small integers through all layers.
constexpr int kWeights = 8;

Values weights(i64 k, i64 c, i64 r, i64 s, std::mt19937& random) {
  Values values(std::size_t(k * c * r * s), 0.0);
  const i64 each = c * r * s;
  for (i64 i = 0; i < k * kWeights; ++i) {
    values[std::size_t(i / kWeights * each + i64(random()) % each)] = random() % 2 ? 1 : -1;
  }
  return values;
}

Layer layer(i64 k, i64 size, i64 h, i64 w, i64 stride, i64 dilation) {
  Layer l;
  l.k = k, l.r = l.s = size, l.stride_h = l.stride_w = stride, l.dilation_h = l.dilation_w = dilation;
  l.pad_top = l.pad_left = size / 2 * dilation;
  l.p = (h + 2 * l.pad_top - dilation * (size - 1) - 1) / stride + 1;
  l.q = (w + 2 * l.pad_left - dilation * (size - 1) - 1) / stride + 1;
  l.relu = true;
  return l;
}

ConvShape conv_shape(const Layer& l, i64 n, i64 c, i64 h, i64 w) {
  ConvShape s;
  s.n = n, s.c = c, s.h = h, s.w = w, s.k = l.k, s.r = l.r, s.s = l.s, s.p = l.p, s.q = l.q;
  s.stride_h = l.stride_h, s.stride_w = l.stride_w, s.pad_top = l.pad_top, s.pad_left = l.pad_left;
  s.dilation_h = l.dilation_h, s.dilation_w = l.dilation_w;
  return s;
}

// An intermediate: its values and how far from them the block's own may be.
struct Intermediate {
  Values values;
  double error = 0;
};

double largest_of(const Values& values) {
  double largest = 0;
  for (const double v : values) largest = std::max(largest, std::fabs(v));
  return largest;
}

// Largest sum of the magnitudes of one output channel's weights: what an error of the input is multiplied by, at most.
double gain(const Values& weight, i64 k) {
  double largest = 0;
  const std::size_t each = weight.size() / std::size_t(k);
  for (std::size_t i = 0; i < std::size_t(k); ++i) {
    double sum = 0;
    for (std::size_t j = 0; j < each; ++j) sum += std::fabs(weight[i * each + j]);
    largest = std::max(largest, sum);
  }
  return largest;
}

}  // namespace

const char* name(Kind kind) {
  switch (kind) {
    case Kind::none: return "no shortcut";
    case Kind::identity: return "identity";
    case Kind::external: return "external";
    case Kind::projection: return "projection";
    default: return "joined";
  }
}

int add_block(Network& network, const BlockShape& block, int in, int external) {
  int shortcut = external;
  if (block.kind == Shortcut::identity) shortcut = in;
  if (block.kind == Shortcut::projection) shortcut = network.convolution(in, block.projection);
  int value = in;
  for (std::size_t i = 0; i < block.main.size(); ++i) {
    value = network.convolution(value, block.main[i], i + 1 == block.main.size() ? shortcut : Network::kNone);
  }
  return value;
}

Network network_of(const BlockShape& block) {
  const Layer& last = block.main.back();
  Network network(block.n);
  const int x = network.input(block.c, block.h, block.w, block.x);
  const bool external = block.kind == Shortcut::external;
  add_block(network, block, x, external ? network.input(last.k, last.p, last.q, block.shortcut) : Network::kNone);
  return network;
}

bool is_joined(const BlockShape& block, const Program& program) {
  return block.kind == Shortcut::projection && program.joined_to(0) == int(block.number(block.main.size() - 1));
}

BlockProblem block_problem(const Geometry& g, Kind kind, int number) {
  std::mt19937 random(unsigned(number + 1));
  const i64 stride = kind == Kind::identity ? 1 : g.stride, out = kind == Kind::identity ? g.c : g.out;
  BlockProblem b;
  BlockShape& s = b.shape;
  s.n = g.n, s.c = g.c, s.h = g.h, s.w = g.w;
  if (g.bottleneck || kind == Kind::joined) {
    s.main.push_back(layer(g.k, 1, g.h, g.w, 1, 1));
    s.main.push_back(layer(g.k, 3, g.h, g.w, stride, g.dilation));
    s.main.push_back(layer(out, 1, s.main[1].p, s.main[1].q, 1, 1));
  } else {
    s.main.push_back(layer(g.k, 3, g.h, g.w, stride, g.dilation));
    s.main.push_back(layer(out, 3, s.main[0].p, s.main[0].q, 1, 1));
  }
  for (std::size_t i = 0; i < s.main.size(); ++i) s.main[i].has_bias = (number + int(i)) % 4 != 0;
  Layer& last = s.main.back();
  last.relu = number % 3 != 0;
  if (kind == Kind::identity) s.kind = Shortcut::identity;
  if (kind == Kind::external) s.kind = Shortcut::external;
  if (kind == Kind::projection || kind == Kind::joined) {
    s.kind = Shortcut::projection;
    // A bottleneck's projection of 1x1 would be joined.
    s.projection = layer(out, kind == Kind::projection && g.bottleneck ? 3 : 1, g.h, g.w, stride, 1);
    s.projection.has_bias = number % 5 != 0;
    s.projection.relu = false;
  }
  b.x = integers(s.n * s.c * s.h * s.w, 2, random);
  b.external = integers(s.n * last.k * last.p * last.q, 2, random);
  i64 c = s.c;
  const auto add = [&](const Layer& l, i64 channels) {
    b.weight.push_back(weights(l.k, channels, l.r, l.s, random));
    b.bias.push_back(l.has_bias ? integers(l.k, 2, random) : Values(std::size_t(l.k), 0.0));
  };
  if (s.kind == Shortcut::projection) add(s.projection, s.c);
  for (const Layer& l : s.main) add(l, c), c = l.k;
  return b;
}

Expected expected(const BlockProblem& b, const Program& program, DType dtype) {
  const BlockShape& s = b.shape;
  const std::size_t first = s.number(0);  // convolution of the main path
  const bool is_joined = memory::is_joined(s, program);
  const bool pairs = current_table().dtype[int(dtype)].group > 1;
  // Convolution `index` of `in`, plus bias, plus `shortcut` (may be null); where `joined`, plus the projection.
  const auto apply = [&](std::size_t index, const Intermediate& in, i64 c, i64 h, i64 w, const Intermediate* shortcut, bool joined) {
    const Layer& l = index < first ? s.projection : s.main[index - first];
    const ConvShape shape = conv_shape(l, s.n, c, h, w);
    Values sum(std::size_t(s.n * l.k * l.p * l.q), 0.0), squares = sum;
    convolve(shape, in.values, b.weight[index], sum, squares);
    i64 terms = shape.reduction() + 2;
    if (joined) {
      convolve(conv_shape(s.projection, s.n, s.c, s.h, s.w), b.x, b.weight.front(), sum, squares);
      terms += s.c;
    }
    for (std::size_t i = 0; i < sum.size(); ++i) {
      const std::size_t k = i / std::size_t(l.p * l.q) % std::size_t(l.k);
      const double bias = b.bias[index][k] + (joined ? b.bias.front()[k] : 0), more = shortcut ? shortcut->values[i] : 0;
      sum[i] += bias + more;
      squares[i] += bias * bias + more * more;
    }
    // F(2x2, 3x3) is exact where its transformed input is: sums of four integers, which as bfloat16 hold 256. Elsewhere everything
    // rounds, and the errors of the operands come on top.
    const Algorithm algorithm = program.convolution(index)->choice().algorithm;
    double error = in.error * gain(b.weight[index], l.k) + (shortcut ? shortcut->error : 0);
    const bool exact = error == 0 && (algorithm == Algorithm::direct || (algorithm == Algorithm::winograd2 &&
                                                                         (!pairs || 4 * largest_of(in.values) <= 256)));
    if (!exact) error += rounding_bound(dtype, terms, largest_of(squares), pairs && algorithm != Algorithm::direct);
    Intermediate result;
    for (const double v : sum) result.values.push_back(rounded(dtype, l.relu && v <= 0 ? 0 : v));
    // Both are rounded to the dtype.
    if (error > 0) result.error = error + 2 * storage_unit(dtype) * (largest_of(result.values) + error);
    return result;
  };
  Intermediate in{b.x, 0}, shortcut;
  if (s.kind == Shortcut::identity) shortcut = in;
  if (s.kind == Shortcut::external) shortcut.values = b.external;
  if (s.kind == Shortcut::projection && !is_joined) shortcut = apply(0, in, s.c, s.h, s.w, nullptr, false);
  i64 c = s.c, h = s.h, w = s.w;
  for (std::size_t i = 0; i < s.main.size(); ++i) {
    const bool last = i + 1 == s.main.size();
    in = apply(first + i, in, c, h, w, last && !shortcut.values.empty() ? &shortcut : nullptr, last && is_joined);
    c = s.main[i].k, h = s.main[i].p, w = s.main[i].q;
  }
  return {in.values, in.error};
}

}  // namespace memory
