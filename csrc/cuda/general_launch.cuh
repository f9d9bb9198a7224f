// From a shape to the general convolution's parameters, and its launch.
#pragma once

#include "general.cuh"

namespace fused_resnet::cuda {

template <class T, class Index, class TileOf>
GeneralConvolution<T, Index, TileOf> general_kernel(const GeneralPlan& plan, const ConvShape& s, const Strides& weight,
                                                    const ConvOperands& operands) {
  using Kernel = GeneralConvolution<T, Index, TileOf>;
  Kernel k;
  const auto ceil_div = [](i64 a, i64 b) { return (a + b - 1) / b; };
  k.x = static_cast<const T*>(operands.x);
  k.joined = static_cast<const T*>(operands.joined);
  k.weight = static_cast<const T*>(operands.weight);
  k.joined_weight = static_cast<const T*>(operands.joined_weight);
  k.bias = s.has_bias ? static_cast<const T*>(operands.bias) : nullptr;
  k.shortcut = s.has_shortcut ? static_cast<const T*>(operands.shortcut) : nullptr;
  k.y = static_cast<T*>(operands.y);
  k.pixels = Index(s.n * s.p * s.q);
  k.p = Index(s.p), k.q = Index(s.q), k.h = Index(s.h), k.w = Index(s.w);
  k.channels = Index(s.c / s.groups), k.outputs = Index(s.k / s.groups), k.taps_w = Index(s.s);
  k.stride_h = Index(s.stride_h), k.stride_w = Index(s.stride_w);
  k.pad_top = Index(s.pad_top), k.pad_left = Index(s.pad_left);
  k.dilation_h = Index(s.dilation_h), k.dilation_w = Index(s.dilation_w);
  k.joined_stride_h = Index(s.joined.stride_h), k.joined_stride_w = Index(s.joined.stride_w);
  k.terms = Index(s.reduction() - s.joined.c), k.joined_terms = Index(s.joined.c);
  k.joined_from = Index(ceil_div(k.terms, Kernel::kDepth));
  k.stages = Index(k.joined_from + ceil_div(k.joined_terms, Kernel::kDepth));
  k.group_tiles = Index(ceil_div(k.outputs, Kernel::kChannels));
  k.channel_tiles = i64(k.group_tiles) * s.groups;
  k.tiles_of_pixels = ceil_div(k.pixels, Kernel::kPixels);
  k.x_n = Index(s.x.n), k.x_c = Index(s.x.c), k.x_h = Index(s.x.h), k.x_w = Index(s.x.w);
  k.y_n = Index(s.y.n), k.y_c = Index(s.y.c), k.y_h = Index(s.y.h), k.y_w = Index(s.y.w);
  k.s_n = Index(s.shortcut.n), k.s_c = Index(s.shortcut.c), k.s_h = Index(s.shortcut.h), k.s_w = Index(s.shortcut.w);
  k.j_n = Index(s.joined.x.n), k.j_c = Index(s.joined.x.c), k.j_h = Index(s.joined.x.h), k.j_w = Index(s.joined.x.w);
  k.w_k = Index(weight.n), k.w_c = Index(weight.c), k.w_h = Index(weight.h), k.w_w = Index(weight.w);
  k.jw_k = Index(operands.joined_weight_strides.n), k.jw_c = Index(operands.joined_weight_strides.c);
  k.relu = s.relu;
  k.vector_store = plan.vector_store;
  k.x_terms_fast = s.x.c < s.x.w;
  k.w_terms_fast = weight.c <= weight.n;
  k.y_pixels_fast = s.y.w < s.y.c;
  return k;
}

template <class T, class Index, class TileOf>
void launch_general(const GeneralPlan& plan, const ConvShape& s, const Strides& weight, const ConvOperands& operands,
                    Stream stream) {
  const auto kernel = general_kernel<T, Index, TileOf>(plan, s, weight, operands);
  launch(kernel, checked_product(kernel.tiles_of_pixels, kernel.channel_tiles), "general_convolution", stream);
}

template <class T>
void general_convolution_of(const GeneralPlan& plan, const ConvShape& s, const Strides& weight, const ConvOperands& operands,
                            Stream stream) {
  using LargeTile = typename LargeTileOf<T>::type;
  if (plan.wide) {
    if (plan.tile == GeneralTile::narrow) return launch_general<T, i64, NarrowTile>(plan, s, weight, operands, stream);
    return launch_general<T, i64, LargeTile>(plan, s, weight, operands, stream);
  }
  switch (plan.tile) {
    case GeneralTile::narrow: return launch_general<T, int, NarrowTile>(plan, s, weight, operands, stream);
    case GeneralTile::medium: return launch_general<T, int, MediumTile>(plan, s, weight, operands, stream);
    case GeneralTile::large: return launch_general<T, int, LargeTile>(plan, s, weight, operands, stream);
  }
}

}  // namespace fused_resnet::cuda
