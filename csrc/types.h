// The few types that everything shares. No standard library beyond <cstdint>: the instruction-set files include this.
#pragma once

#include <cstdint>

namespace fused_resnet {

using i64 = std::int64_t;

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };  // float16: on CUDA only
constexpr int kCpuDTypes = 3;

// Below this a float or a double is denormal.
template <class T>
constexpr T kSmallestNormal = T(sizeof(T) == sizeof(float) ? 1.17549435e-38 : 2.2250738585072014e-308);

// Strides of a [N, C, H, W] tensor, in elements.
struct Strides {
  i64 n = 0, c = 0, h = 0, w = 0;
};

}  // namespace fused_resnet
