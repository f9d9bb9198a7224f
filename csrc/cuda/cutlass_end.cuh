// What the CUTLASS kernels share: the element types, the end of the operation, errors.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include <cutlass/array.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include "../epilogue.h"
#include "../types.h"

namespace fused_resnet::cuda {

// How a dtype's elements are called in CUTLASS. float is multiplied as TF32.
template <DType dtype>
struct ElementOf;
template <>
struct ElementOf<DType::bfloat16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<DType::float16> {
  using Type = cutlass::half_t;
};
template <>
struct ElementOf<DType::float32> {
  using Type = float;
};

// The ReLU of epilogue.h, if there is one, in the form of CUTLASS's activations.
template <class T>
struct OptionalReLU {
  static constexpr bool kIsHeavy = false;
  struct Arguments {
    bool relu = true;
  };
  CUTLASS_HOST_DEVICE T operator()(T value, const Arguments& arguments) const {
    return arguments.relu ? relu(value) : value;
  }
};
template <class T, int N>
struct OptionalReLU<cutlass::Array<T, N>> {
  static constexpr bool kIsHeavy = false;
  using Arguments = typename OptionalReLU<T>::Arguments;
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(const cutlass::Array<T, N>& values, const Arguments& arguments) const {
    cutlass::Array<T, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = OptionalReLU<T>()(values[i], arguments);
    return result;
  }
};

inline void check(cutlass::Status status, const char* what) {
  if (status == cutlass::Status::kSuccess) return;
  const cudaError_t error = cudaGetLastError();
  throw std::runtime_error(std::string("a convolution kernel ") + what + ": " +
                           (error == cudaSuccess ? cutlassGetStatusString(status) : cudaGetErrorString(error)));
}
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not for the next call to find
  throw std::runtime_error(std::string("a convolution kernel ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace fused_resnet::cuda
