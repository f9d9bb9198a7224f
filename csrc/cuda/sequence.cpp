#include "sequence.h"

#include <algorithm>
#include <stdexcept>

#include "device.h"

namespace fused_resnet::cuda {

Sequence::Sequence(std::vector<Step> steps) : steps_(std::move(steps)) {
  if (steps_.empty()) throw std::invalid_argument("a sequence needs a step");
  for (const Step& step : steps_) {
    if (!step.planned || step.x == kNone || step.y == kNone) throw std::invalid_argument("a step needs a convolution, an input and an output");
    if (step.planned->device != steps_.front().planned->device) throw std::invalid_argument("a sequence runs on one device");
    for (const i64 place : {step.x, step.shortcut, step.y, step.joined}) {
      if (place < 0 && place != kNone) most_ = std::max(most_, -place);
    }
  }
}

void Sequence::run(const std::vector<const void*>& values, void* arena, const std::vector<Weights>& weights, Stream stream) const {
  if (i64(values.size()) < most_ || weights.size() != steps_.size()) throw std::invalid_argument("a sequence got too few values or weights");
  const auto at = [&](i64 place) -> const void* {
    if (place == kNone) return nullptr;
    return place < 0 ? values[std::size_t(-1 - place)] : static_cast<const char*>(arena) + place;
  };
  const DeviceGuard guard(steps_.front().planned->device);
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    const Planned& p = *step.planned;
    p.convolution.run({at(step.x), weights[i].weight, weights[i].bias, at(step.shortcut), const_cast<void*>(at(step.y)), at(step.joined),
                       weights[i].joined, {p.joined, 1, 1, 1}},
                      p.weight, stream);
  }
}

}  // namespace fused_resnet::cuda
