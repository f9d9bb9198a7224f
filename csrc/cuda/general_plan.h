// The general convolution's tile and index type: pure functions of the shape.
#pragma once

#include "launch.h"

namespace fused_resnet::cuda {

// Output pixels x output channels of a thread block of 256 threads.
enum class GeneralTile {
  large,   // 128 x 64: 8 x 4 outputs a thread, 32 multiply-adds for 12 values read from shared memory (float64: 64 x 64)
  medium,  // 64 x 32: for problems too small to fill a GPU with large ones
  narrow,  // 128 x 8: for few channels in a group
};

struct GeneralPlan {
  GeneralTile tile;
  bool wide;          // offsets need 64 bits
  bool vector_store;  // the end reads and writes 4 (float64: 2) values at once
};

// `bytes`: of a stored value. Pointers matter for vector_store alone.
GeneralPlan general_plan(const ConvShape& shape, const Strides& weight, const ConvOperands& operands, i64 bytes);

// T: float, double, bf16 or fp16. Defined in general_launch.cuh, one instance in each general_*.cu.
template <class T>
void general_convolution_of(const GeneralPlan& plan, const ConvShape& shape, const Strides& weight,
                            const ConvOperands& operands, Stream stream);

}  // namespace fused_resnet::cuda
