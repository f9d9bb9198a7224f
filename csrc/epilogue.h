// The end of every operation, on one value of the accumulator's type: one definition for CPU and CUDA. The vector types in
// cpu/vec_*.h have the same functions on registers, and the tests hold the two together.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define FR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FR_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fused_resnet {

// bfloat16 in memory: the upper half of a float32.
struct bf16 {
  std::uint16_t bits;
};

// float16 in memory: IEEE 754 binary16.
struct fp16 {
  std::uint16_t bits;
};

FR_HOST_DEVICE float widen(bf16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
FR_HOST_DEVICE float widen(fp16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  std::uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // denormal or zero: magnitude * 2^-24, exactly
    const float scaled = float(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &scaled, sizeof bits);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
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
FR_HOST_DEVICE void narrow(float value, fp16* out) {
#if defined(__CUDA_ARCH__)
  out->bits = __half_as_ushort(__float2half_rn(value));
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = std::uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // 65520: what rounds beyond the largest value
    out->bits = std::uint16_t(sign | 0x7c00u);
  } else if (magnitude >= 0x38800000u) {  // 2^-14: normal
    const std::uint32_t rebased = magnitude - (112u << 23);
    out->bits = std::uint16_t(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  } else {  // denormal: adding 0.5 puts the value's units of 2^-24 into the last bits, rounded to nearest even
    float small;
    std::memcpy(&small, &magnitude, sizeof small);
    const float shifted = small + 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    out->bits = std::uint16_t(sign | (bits - 0x3f000000u));
  }
#endif
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
