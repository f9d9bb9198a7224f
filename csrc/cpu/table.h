// One row of an instruction set's table: all kernels of a storage dtype S on registers V, with tiles of M pixels. D: how A and
// the packed weights are held and multiplied, V itself or pairs of bfloat16.
#pragma once

#include "direct.h"
#include "packing.h"
#include "pointwise.h"
#include "winograd.h"

namespace fused_resnet {
namespace {

template <class V, class S, int M, class D = V>
constexpr DTypeKernels dtype_kernels() {
  return DTypeKernels{int(sizeof(S)),
                      int(sizeof(typename V::type)),
                      M,
                      V::width,
                      2 * V::width,
                      D::group,
                      block<D, S, M>,
                      pack_row<D, S>,
                      pack_row<V, S>,
                      pack_weight<D, S>,
                      pass_row<V, S>,
                      mask_row<V, S>,
                      store_values<V, S>,
                      winograd_kernels<V, S, D, Winograd2<V>>(),
                      winograd_kernels<V, S, D, Winograd2Stride2<V>>(),
                      winograd_kernels<V, S, D, Winograd4<V>>(),
                      winograd_multiply<D, M>};
}

}  // namespace
}  // namespace fused_resnet
