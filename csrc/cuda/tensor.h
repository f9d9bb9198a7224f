// The compiled tensor-core kernels: every file in tiles/ registers its own, so that any subset can be built.
#pragma once

#include <vector>

#include "config.h"
#include "launch.h"

namespace fused_resnet::cuda {

// x, y, shortcut: channels_last without gaps; weight: [K, R, S, C]; all and the bias 16-byte aligned. dependent: the kernel may start
// while the one before it on the stream ends, and waits for it before it reads or writes memory (programmatic dependent launch); where it
// has no such wait, that says nothing.
using TensorLaunch = void (*)(const ConvShape& shape, const ConvOperands& operands, const Device& device, Stream stream, bool dependent);

// Loads the kernel onto the current device and tells CUDA how much shared memory it takes: once before its first launch there.
using TensorPrepare = void (*)();

struct TensorKernel {
  Tile tile;
  TensorPrepare prepare;
  TensorLaunch launch;
};

// Sorted by name.
const std::vector<TensorKernel>& tensor_kernels();

struct RegisterTensorKernel {
  RegisterTensorKernel(const Tile& tile, TensorPrepare prepare, TensorLaunch launch);
};

}  // namespace fused_resnet::cuda
