// Residual blocks of small integers, and what they must give.
#pragma once

#include <random>
#include <vector>

#include "../../../csrc/cpu/block.h"
#include "reference.h"

namespace memory {

using fused_resnet::Block;
using fused_resnet::BlockShape;
using fused_resnet::Layer;
using fused_resnet::Shortcut;

// The kinds of shortcut; a projection is a part of the last product, or a convolution of its own.
enum class Kind { none, identity, external, projection, joined };
constexpr Kind kKinds[] = {Kind::none, Kind::identity, Kind::external, Kind::projection, Kind::joined};
const char* name(Kind kind);

// Sizes of a block: k channels inside it; bottleneck: 1x1, 3x3, 1x1, otherwise two 3x3. A joined projection makes it a bottleneck, an
// identity makes its output as wide as its input and its stride 1.
struct Geometry {
  i64 n, c, h, w, k, out;
  bool bottleneck;
  i64 stride, dilation;
};

struct BlockProblem {
  BlockShape shape;  // without strides
  Values x, external;
  std::vector<Values> weight, bias;  // of the main path's layers, then the projection's
};

// `number`: which layers have a bias, and whether the block ends with a ReLU.
BlockProblem block_problem(const Geometry& geometry, Kind kind, int number);

// The output, every intermediate rounded to the dtype; and how far from it the block may be: 0 where everything is exact.
struct Expected {
  Values y;
  double bound = 0;
};
Expected expected(const BlockProblem& problem, const Block& block, DType dtype);

}  // namespace memory
