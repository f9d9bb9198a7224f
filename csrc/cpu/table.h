// One row of an instruction set's table: all kernels of a storage dtype S on registers V. D: how A and
// the packed weights are held and multiplied, V itself or pairs of bfloat16.
#pragma once

#include "direct.h"
#include "packing.h"
#include "pointwise.h"
#include "pooling.h"
#include "weight_products.h"
#include "winograd.h"

namespace fused_resnet {
namespace {

template <class V, class S, class D = V>
constexpr DTypeKernels dtype_kernels() {
  return DTypeKernels{int(sizeof(S)),
                      int(sizeof(typename V::type)),
                      V::width,
                      V::vectors,
                      {V::rows[0], V::rows[1], V::rows[2], V::rows[3]},
                      D::group,
                      block<D, S>,
                      pack_row<D, S>,
                      pack_row<V, S>,
                      pack_weight<V, S, D>,
                      pass_row<V, S>,
                      mask_rows<V, S>,
                      largest_row<V, S>,
                      largest_windows<V, S>,
                      largest_grad<V>,
                      mean_row<V, S>,
                      store_values<V, S>,
                      winograd_kernels<V, S, D, Winograd2<V>>(),
                      winograd_kernels<V, S, D, Winograd2Stride2<V>>(),
                      winograd_kernels<V, S, D, Winograd4<V>>(),
                      winograd_multiply<D>,
                      winograd_gradient_kernels<V, S, Winograd2<V>>(),
                      winograd_gradient_kernels<V, S, Winograd4<V>>(),
                      weight_products<V>,
                      store_weight<V, S>};
}

}  // namespace
}  // namespace fused_resnet
