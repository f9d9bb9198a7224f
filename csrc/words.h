// What the Python files call dtypes and algorithms.
#pragma once

#include <stdexcept>
#include <string>

#include "cpu/algorithm.h"

namespace fused_resnet {

inline DType dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "bfloat16") return DType::bfloat16;
  throw std::invalid_argument("dtype must be float32, float64 or bfloat16, got '" + name + "'");
}

inline Request request(const std::string& algorithm, bool strict) {
  Request r;
  r.strict = strict;
  r.automatic = algorithm == "auto";
  if (algorithm == "direct" || r.automatic) {
    r.algorithm = Algorithm::direct;
  } else if (algorithm == "winograd2") {
    r.algorithm = Algorithm::winograd2;
  } else if (algorithm == "winograd4") {
    r.algorithm = Algorithm::winograd4;
  } else {
    throw std::invalid_argument("algorithm must be auto, direct, winograd2 or winograd4, got '" + algorithm + "'");
  }
  return r;
}

inline const char* word(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::winograd2: return "winograd2";
    case Algorithm::winograd4: return "winograd4";
    default: return "direct";
  }
}

}  // namespace fused_resnet
