// Residual blocks of small integers, and what they must give.
#pragma once

#include <random>
#include <vector>

#include "../../../csrc/cpu/program.h"
#include "reference.h"

namespace memory {

using fused_resnet::Layer;
using fused_resnet::Network;
using fused_resnet::Program;
using fused_resnet::Strides;

enum class Shortcut { none, identity, external, projection };

struct BlockShape {
  i64 n = 0, c = 0, h = 0, w = 0;  // input
  Strides x, y, shortcut;          // shortcut: of an external one
  std::vector<Layer> main;
  Layer projection;
  Shortcut kind = Shortcut::none;

  // The number of a convolution of the main path in the program; the projection's is 0.
  std::size_t number(std::size_t layer) const { return layer + (kind == Shortcut::projection); }
  std::size_t convolutions() const { return number(main.size()); }
};

// Adds a block of the value `in` to a network; `external`: the value that it adds, if it adds one. Returns its output.
int add_block(Network& network, const BlockShape& block, int in, int external);
// The block by itself: its input is the first, an external shortcut the second.
Network network_of(const BlockShape& block);
// Whether the projection is a part of the last convolution.
bool is_joined(const BlockShape& block, const Program& program);

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
  std::vector<Values> weight, bias;  // in the order of the program's convolutions
};

// `number`: which layers have a bias, and whether the block ends with a ReLU.
BlockProblem block_problem(const Geometry& geometry, Kind kind, int number);

// The output, every intermediate rounded to the dtype; and how far from it the block may be: 0 where everything is exact.
struct Expected {
  Values y;
  double bound = 0;
};
Expected expected(const BlockProblem& problem, const Program& program, DType dtype);

}  // namespace memory
