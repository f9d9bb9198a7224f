// One source for the GPU and for the host. A kernel is an object: its members are the parameters, and
//
//     static constexpr int kThreads;   threads of a block
//     struct Shared, struct State;     what a block shares; what one thread keeps from phase to phase (its registers)
//     template <class Block> void operator()(Block& block, i64 index, Shared& shared) const;
//
// is the work of block `index`: phases, each `block.each([&](int thread, State& state) {...})`, with a barrier after every
// one of them. On a GPU a phase is run by all threads at once and the barrier is __syncthreads(). On the host the threads of a
// phase run one after another. That would hide a race, so they can run in other orders, and with garbage where the GPU has
// whatever was there before: a kernel without races gives the same bits in every order.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "../epilogue.h"
#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include <memory>
#include <utility>
#include <vector>
#endif

#if defined(__CUDA_ARCH__)
#define FR_PRAGMA_UNROLL _Pragma("unroll")
#define FR_PRAGMA_NO_UNROLL _Pragma("unroll 1")
#else
#define FR_PRAGMA_UNROLL
#define FR_PRAGMA_NO_UNROLL
#endif

namespace fused_resnet::cuda {

// A few values side by side, moved by one instruction where they are 16 bytes or less.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T value[kCount];
};

// `from` is aligned as P is. On the GPU an access through P's type: nvcc 13.0 fails on memcpy with __builtin_assume_aligned.
template <class P, class T>
FR_HOST_DEVICE P load_pack(const T* from) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const P*>(from);
#else
  P pack;
  std::memcpy(&pack, __builtin_assume_aligned(from, alignof(P)), sizeof pack);
  return pack;
#endif
}
template <class P, class T>
FR_HOST_DEVICE void store_pack(T* to, const P& pack) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<P*>(to) = pack;
#else
  std::memcpy(__builtin_assume_aligned(to, alignof(P)), &pack, sizeof pack);
#endif
}

// The type in which values of T are summed.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <class T>
FR_HOST_DEVICE T smaller_of(T a, T b) {
  return a < b ? a : b;
}

#if defined(__CUDACC__)

template <class State>
struct DeviceBlock {
  State state;

  template <class Phase>
  FR_HOST_DEVICE void each(const Phase& phase) {
#if defined(__CUDA_ARCH__)
    phase(int(threadIdx.x), state);
    __syncthreads();
#else
    (void)phase;
#endif
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksOnSM)
    run_blocks(const __grid_constant__ Kernel kernel, i64 blocks) {
  __shared__ typename Kernel::Shared shared;
  DeviceBlock<typename Kernel::State> block;
  for (i64 index = blockIdx.x; index < blocks; index += gridDim.x) kernel(block, index, shared);
}

// Every kernel that `launch` is compiled for is known to `load` (device.h) once the module is there.
void register_kernel(const void* kernel);
template <class Kernel>
struct RegisterKernel {
  RegisterKernel() { register_kernel(reinterpret_cast<const void*>(&run_blocks<Kernel>)); }
  static const RegisterKernel once;
};
template <class Kernel>
const RegisterKernel<Kernel> RegisterKernel<Kernel>::once;

template <class Kernel>
void launch(const Kernel& kernel, i64 blocks, const char* name, Stream stream) {
  (void)&RegisterKernel<Kernel>::once;
  if (blocks <= 0) return;
  constexpr i64 kMostBlocks = 2147483647;  // of a grid's first dimension; the rest is a second turn of the same blocks
  run_blocks<<<unsigned(blocks < kMostBlocks ? blocks : kMostBlocks), Kernel::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      kernel, blocks);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": the launch failed: " + cudaGetErrorString(error));
}

#else

// How the host runs blocks: for tests, set before a call.
struct HostOptions {
  enum Order { forward = 0, reverse = 1, shuffled = 2 };
  Order order = forward;
  int poison = -1;  // 0..255: the byte that fills shared memory and states before each block; 255: floats are NaN
};
inline HostOptions host_options;

template <class State>
class HostBlock {
 public:
  explicit HostBlock(int threads) : states_(new State[std::size_t(threads)]), order_(std::size_t(threads)) {
    std::uint64_t random = 88172645463325252u;
    for (int i = 0; i < threads; ++i) order_[std::size_t(i)] = host_options.order == HostOptions::reverse ? threads - 1 - i : i;
    if (host_options.order == HostOptions::shuffled) {
      for (int i = threads - 1; i > 0; --i) {  // xorshift, Fisher and Yates
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::swap(order_[std::size_t(i)], order_[std::size_t(random % std::uint64_t(i + 1))]);
      }
    }
  }

  template <class Phase>
  void each(const Phase& phase) {
    for (const int thread : order_) phase(thread, states_[std::size_t(thread)]);
  }

  void poison(int byte) { std::memset(static_cast<void*>(states_.get()), byte, order_.size() * sizeof(State)); }

 private:
  std::unique_ptr<State[]> states_;
  std::vector<int> order_;
};

template <class Kernel>
void launch(const Kernel& kernel, i64 blocks, const char*, Stream) {
  const auto shared = std::make_unique<typename Kernel::Shared>();
  HostBlock<typename Kernel::State> block(Kernel::kThreads);
  for (i64 index = 0; index < blocks; ++index) {
    if (host_options.poison >= 0) {
      std::memset(static_cast<void*>(shared.get()), host_options.poison, sizeof *shared);
      block.poison(host_options.poison);
    }
    kernel(block, index, *shared);
  }
}

#endif

}  // namespace fused_resnet::cuda
