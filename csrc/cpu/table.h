// One row of an instruction set's table: all kernels of a storage dtype S on registers V, with tiles of M pixels.
#pragma once

#include "direct.h"
#include "pointwise.h"
#include "winograd.h"

namespace fused_resnet {
namespace {

template <class V, class S, int M>
constexpr DTypeKernels dtype_kernels() {
  return DTypeKernels{int(sizeof(S)),
                      int(sizeof(typename V::type)),
                      M,
                      V::width,
                      2 * V::width,
                      block<V, S, M>,
                      pack_row<V, S>,
                      pack_weight<V, S>,
                      pass_row<V, S>,
                      mask_row<V, S>,
                      store_values<V, S>,
                      winograd_kernels<V, S, Winograd2<V>>(),
                      winograd_kernels<V, S, Winograd2Stride2<V>>(),
                      winograd_kernels<V, S, Winograd4<V>>(),
                      winograd_multiply<V, M>};
}

}  // namespace
}  // namespace fused_resnet
