// Which kernel computes a convolution on a GPU, and with which tile: pure functions of shape, dtype and device, which run (and are
// tested) without one.
#pragma once

#include <string>
#include <vector>

#include "../conv_shape.h"

namespace fused_resnet::cuda {

// What a choice depends on.
struct Device {
  int index = 0;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 1;
  double bandwidth = 0;  // of the memory, in theory, bytes a microsecond; 0: not known

  int capability() const { return 10 * major + minor; }
};

// How a tensor-core kernel reads its input: as the matrix [N * H * W, C] (1x1, stride 1); by image coordinates, one tap of the
// kernel at a time; or, of kFew channels, several taps at a time (a network's stem, whose 3 channels are padded to that); or by
// image coordinates and then the joined convolution's input too (ConvShape::joined: a block's projection). `plain`: as image, by
// CUTLASS's own kernel and without our persistent loop: never chosen, but asked for by name where image is wrong.
enum class Form : int { matrix = 0, image = 1, few = 2, joined = 3, plain = 4 };
const char* name_of(Form form);
constexpr i64 kFew = 4;

// What a tensor-core kernel is made of: `sm90`: TMA and wgmma, Hopper alone; `sm80`: cp.async and mma.sync, Ampere, Ada and what comes
// after Hopper; `any`: as sm80, compiled for every GPU from Ampere on.
enum class Architecture : int { any = 0, sm80 = 1, sm90 = 2 };
const char* name_of(Architecture architecture);

// One compiled tensor-core kernel: `m` pixels x `n` output channels a tile.
struct Tile {
  Architecture architecture;
  DType dtype;
  Form form;
  int m, n;

  std::string name() const;  // "sm90 bfloat16 image 128x128"
};

// How Hopper's kernels of a size are made (the files in tiles/): two warp groups share a tile, and two thread blocks, one above the other,
// the weights that they read; else each warp group has tiles of its own and ends one while the other sums (ping-pong).
constexpr bool cooperates(int m, int n) { return m * n > 128 * 128; }

// Why the tensor cores cannot compute this convolution on this device: one sentence, or "" if they can. `tf32`: whether float32
// may be rounded to TF32 on the way in.
std::string why_not_tensor_cores(const ConvShape& shape, DType dtype, const Device& device, bool tf32);

// The strides of a joined convolution's input for a TMA descriptor. The stride of an axis of size 1 says nothing, and may be 0, which a
// descriptor refuses: it gets that of a tensor without gaps.
Strides joined_strides(const ConvShape& shape);

// The most images that one launch of a tile's kernel may get: the tensor-core kernels count in 32 bits. 0: not even one.
i64 images_a_launch(const ConvShape& shape, const Tile& tile);

struct Choice {
  int tile = -1;  // index into the tiles given; -1: the general kernel
  std::string reason;
};

// The kernel for a convolution, out of `tiles`. `wanted`: "auto", "general", or a tile's name (std::invalid_argument where that
// one is not there or cannot compute this).
Choice choose(const ConvShape& shape, DType dtype, const Device& device, bool tf32, const std::vector<Tile>& tiles,
              const std::string& wanted);

// Predicted microseconds of one tile's kernel, for the choice between tiles. Not a promise: see prediction.cpp.
double predicted_time(const ConvShape& shape, const Tile& tile, const Device& device);

const char* name_of(DType dtype);
constexpr i64 bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace fused_resnet::cuda
