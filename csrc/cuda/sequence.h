// Several planned convolutions as one call: their launches in a row on one stream, with what lies between them in one piece of memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "convolution.h"

namespace fused_resnet::cuda {

// A convolution with the strides of its weight, on its device.
struct Planned {
  Convolution convolution;
  Strides weight;
  int device;
  i64 joined;  // channels of the joined convolution's input
};

class Sequence {
 public:
  // Where a value lies: so many bytes behind the start of the arena; or, below 0, the caller's value -1 - place. kNone: there is none.
  static constexpr i64 kNone = INT64_MIN;
  struct Step {
    std::shared_ptr<const Planned> planned;
    i64 x = kNone, shortcut = kNone, y = kNone, joined = kNone;
  };
  // Of a step: null where there is none. The joined weight is [K, joined channels] without gaps.
  struct Weights {
    const void *weight, *bias, *joined;
  };

  // Throws std::invalid_argument for a step without an input or an output, and for steps on several devices.
  explicit Sequence(std::vector<Step> steps);

  // values: the caller's, by number; weights: one for each step. Throws std::invalid_argument for too few.
  void run(const std::vector<const void*>& values, void* arena, const std::vector<Weights>& weights, Stream stream) const;

  std::size_t size() const { return steps_.size(); }

 private:
  std::vector<Step> steps_;
  i64 most_ = 0;  // values that a caller must give
};

}  // namespace fused_resnet::cuda
