// The end of every operation, on one value of the accumulator's type: one definition for CPU and CUDA. The vector types in
// cpu/vec_*.h have the same functions on registers, and the tests hold the two together.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FR_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fused_resnet {

// bfloat16 in memory: the upper half of a float32.
struct bf16 {
  std::uint16_t bits;
};

FR_HOST_DEVICE float widen(bf16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
FR_HOST_DEVICE float widen(float value) { return value; }
FR_HOST_DEVICE double widen(double value) { return value; }

// Round to nearest, ties to even; a NaN stays a quiet NaN.
FR_HOST_DEVICE void narrow(float value, bf16* out) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = std::uint16_t((bits >> 16) | 0x40u);
  } else {
    out->bits = std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
FR_HOST_DEVICE void narrow(float value, float* out) { *out = value; }
FR_HOST_DEVICE void narrow(double value, double* out) { *out = value; }

// relu(nan) = nan, as PyTorch has it: a compare, since max instructions lose the NaN.
template <class T>
FR_HOST_DEVICE T relu(T value) {
  return value <= T(0) ? T(0) : value;
}

// The gradient through the ReLU, given its (rounded) output: passes where not (output <= 0), so also at NaN.
template <class T>
FR_HOST_DEVICE T relu_gradient(T grad, T output) {
  return output <= T(0) ? T(0) : grad;
}

}  // namespace fused_resnet
