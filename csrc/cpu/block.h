// A whole residual block as one call: two or three convolutions, the projection if there is one, the addition and the ReLU, in
// one parallel region, with what lies between them in a workspace.
#pragma once

#include <memory>
#include <vector>

#include "convolution.h"

namespace fused_resnet {

// One convolution of a block: its shape but for the input, which is the layer's before.
struct Layer {
  i64 k = 0, r = 0, s = 0, p = 0, q = 0;
  i64 stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dilation_h = 1, dilation_w = 1;
  bool has_bias = false, relu = false;
};

enum class Shortcut { none, identity, external, projection };

struct BlockShape {
  i64 n = 0, c = 0, h = 0, w = 0;  // input
  Strides x, y, shortcut;          // shortcut: of an external one
  std::vector<Layer> main;
  Layer projection;
  Shortcut kind = Shortcut::none;
};

// weight and bias: of the main path's layers in order, then the projection's. Where the projection is a part of the last
// product (see `joined`), the last layer's packed weight is both, its bias the sum, and the projection's are not read.
struct BlockOperands {
  const void* x = nullptr;
  std::vector<const void*> weight, bias;
  const void* shortcut = nullptr;  // external
  void* y = nullptr;
};

class Block {
 public:
  // Throws as Convolution::make.
  Block(const BlockShape& shape, DType dtype, int threads, const Request& request);

  // As Convolution::run; false: to be computed by a block of direct convolutions.
  bool run(const BlockOperands& operands) const;

  // Main path in order, then the projection; for packing and for what they say. Null: joined.
  const Convolution* convolution(std::size_t i) const { return groups_.front().stages[stage_of_.at(i)].convolution.get(); }
  std::size_t convolutions() const { return stage_of_.size(); }
  bool joined() const { return joined_; }
  std::string describe() const;

  // As Convolution's, for whoever runs the tasks on threads of its own; `run` is these in one parallel region. Layer by layer, the
  // phases are those of one convolution after the other; depth first, there is one phase, whose tasks are groups of images.
  int phases() const;
  i64 tasks(int phase) const;
  bool run_task(int phase, i64 index, const BlockOperands& operands, char* shared, char* mine) const;
  i64 shared_bytes() const;
  i64 thread_bytes() const;
  int threads() const { return threads_; }
  i64 workspace_bytes() const { return shared_bytes() + checked_product(thread_bytes(), threads_); }

 private:
  struct Stage {
    std::unique_ptr<Convolution> convolution;
    std::size_t layer;     // index of its weight
    int in, shortcut, out;  // slots: see below
  };
  // The stages for so many images at a time.
  struct Group {
    i64 images = 0;
    std::vector<Stage> stages;
    std::vector<i64> slot;  // offset of each intermediate in the memory they share; then its size
    i64 shared = 0, thread = 0;
  };
  // Slots: an operand of the block, or an intermediate from 0 on.
  static constexpr int kX = -1, kY = -2, kExternal = -3, kNone = -4;

  const Stage& stage_at(int& phase) const;  // layer by layer; makes `phase` the stage's own
  Group plan(i64 images, int threads, const Request& request) const;
  Operands operands_of(const Stage& stage, const Group& group, const BlockOperands& block, i64 image, char* between) const;

  BlockShape shape_;
  DType dtype_;
  int threads_;
  i64 bytes_;  // of an element
  bool joined_ = false, depth_first_ = false;
  std::vector<std::size_t> stage_of_;
  std::vector<Group> groups_;  // one; or, depth first, for full groups and for the last one
};

}  // namespace fused_resnet
