// Hopper: persistent, warp-specialized kernels with TMA and wgmma, built from CUTLASS 3's collectives.
//
// A convolution over NHWC is a matrix product: [pixels, R * S * C] x [R * S * C, K]. A 1x1 convolution with stride 1 reads its
// left operand as the matrix that it is; any other one through TMA's im2col mode, which fetches a tile of pixels under one tap
// of the kernel and writes zeros where the tap is in the padding. The end is the same: bias of the column, shortcut, ReLU, one
// rounding, one store.
//
// CUTLASS 3 has im2col main loops for Hopper only in a kernel that is not persistent, whose epilogue waits for its main loop.
// `ImageMainloop` gives such a main loop the interface of a matrix product's, so that the persistent kernels, which overlap the
// two, can use it; input and output pixels are the rows of matrices then, with plain TMA for shortcut and output.
#pragma once

#include "sm90_common.cuh"

#include <cutlass/gemm/device/gemm_universal_adapter.h>

namespace fused_resnet::cuda::sm90 {

template <class Schedule>
struct EpilogueFor;
template <>
struct EpilogueFor<cutlass::gemm::KernelTmaWarpSpecializedPingpong> {
  using Type = cutlass::epilogue::TmaWarpSpecialized;
};
template <>
struct EpilogueFor<cutlass::gemm::KernelTmaWarpSpecializedCooperative> {
  using Type = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

// The im2col main loop of a forward convolution behind the interface of a matrix product's.
template <class Element, class TileShape, class ClusterShape, int Stages, class Schedule>
struct ImageLoop {
  using Built = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop,
      Element, cutlass::layout::TensorNHWC, 16 / sizeof(Element), Element, cutlass::layout::TensorNHWC, 16 / sizeof(Element), float,
      TileShape, ClusterShape, cutlass::conv::collective::StageCount<Stages>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  // The same with the kernel's own arrangement of warp groups: two side by side where they cooperate on a tile.
  using Operand = cute::conditional_t<cute::is_same_v<Element, float>, cutlass::tfloat32_t, Element>;
  using Groups = cute::conditional_t<cute::is_same_v<Schedule, cutlass::gemm::KernelTmaWarpSpecializedCooperative>,
                                     Layout<Shape<_2, _1, _1>>, Layout<Shape<_1, _1, _1>>>;
  using TiledMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Operand, Operand, float, TileShape, cute::GMMA::Major::K, cute::GMMA::Major::K>(), Groups{}));
  using Policy = cutlass::conv::MainloopSm90TmaGmmaWarpSpecializedImplicitGemm<cutlass::conv::Operator::kFprop, Stages, 2,
                                                                               ClusterShape, Schedule>;
  using Type = cutlass::conv::collective::CollectiveConv<
      Policy, TileShape, Element, Element, TiledMma,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<typename Built::GmemTiledCopyA, typename Built::SmemLayoutA>,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<typename Built::GmemTiledCopyB, typename Built::SmemLayoutB>>;
};

template <class Loop>
struct ImageMainloop : Loop {
  using Image = typename Loop::ProblemShape;
  using StrideA = Stride<int64_t, Int<1>, int64_t>;  // what the kernel asks of a matrix; nothing reads through it
  using StrideB = Stride<int64_t, Int<1>, int64_t>;
  static constexpr int NumProducerThreadEvents = 1;  // one thread issues the loads

  struct Arguments {
    Image image;
    typename Loop::Arguments operands;
  };
  struct Params : Loop::Params {
    int c, s, r;
  };

  template <class Matrix>
  static Params to_underlying_arguments(const Matrix&, const Arguments& a, void* workspace) {
    return Params{Loop::to_underlying_arguments(a.image, a.operands, workspace), a.image.shape_B[3], a.image.shape_B[2],
                  a.image.shape_B[1]};
  }
  template <class Matrix>
  static bool can_implement(const Matrix&, const Arguments& a) {
    return Loop::can_implement(a.image, a.operands);
  }

  // The reduction is (C, S, R), the innermost first; a mode of size 1 in the place of a matrix product's batch.
  template <class Matrix>
  CUTLASS_DEVICE auto load_init(const Matrix& matrix, const Params& params) {
    auto shape = make_shape(get<0>(matrix), get<1>(matrix), make_shape(params.c, params.s, params.r), _1{});
    auto [a, b] = Loop::load_init(shape, params);
    return cute::make_tuple(with_batch(a), with_batch(b));
  }
  template <class A, class B, class Iterator, class Coordinates>
  CUTLASS_DEVICE void load(const Params& params, typename Loop::MainloopPipeline pipeline, typename Loop::PipelineState state,
                           const cute::tuple<A, B>& inputs, const Coordinates& block, Iterator k, int count, int thread,
                           uint32_t rank, typename Loop::TensorStorage& shared) {
    Loop::load(params, pipeline, state, cute::make_tuple(without_batch(get<0>(inputs)), without_batch(get<1>(inputs))), block, k,
               count, thread, rank, shared);
  }

 private:
  template <class T>
  CUTLASS_DEVICE static auto with_batch(const T& t) {
    return make_tensor(t.data(), append<5>(t.layout(), make_layout(_1{}, _0{})));
  }
  template <class T>
  CUTLASS_DEVICE static auto without_batch(const T& t) {
    return t(_, _, _, _, _0{});
  }
};

// The sums of two convolutions, one after the other: those of the image, and those of a 1x1 convolution of another image.
template <class Loop>
struct JoinedMainloop : ImageMainloop<Loop> {
  using Base = ImageMainloop<Loop>;

  struct Arguments {
    typename Base::Arguments first, second;
  };
  struct Params : Base::Params {
    typename Base::Params second;
  };

  template <class Matrix>
  static Params to_underlying_arguments(const Matrix& matrix, const Arguments& a, void* workspace) {
    return Params{Base::to_underlying_arguments(matrix, a.first, workspace), Base::to_underlying_arguments(matrix, a.second, workspace)};
  }
  template <class Matrix>
  static bool can_implement(const Matrix& matrix, const Arguments& a) {
    return Base::can_implement(matrix, a.first) && Base::can_implement(matrix, a.second);
  }
  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    Base::prefetch_tma_descriptors(params);
    Base::prefetch_tma_descriptors(params.second);
  }

  // In front of the operands two tensors that are never read: the kernel takes the numbers of tiles and steps from their shapes.
  template <class Matrix>
  CUTLASS_DEVICE auto load_init(const Matrix& matrix, const Params& params) {
    auto [a1, b1] = Base::load_init(matrix, params);
    auto [a2, b2] = Base::load_init(matrix, params.second);
    const int steps = int(size<3>(a1)) + int(size<3>(a2));
    auto rows = make_identity_tensor(make_shape(_1{}, _1{}, int(size<2>(a1)), steps, _1{}));
    auto columns = make_identity_tensor(make_shape(_1{}, _1{}, int(size<2>(b1)), steps, _1{}));
    return cute::make_tuple(rows, columns, a1, b1, a2, b2);
  }
  template <class Inputs, class Coordinates, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, typename Loop::MainloopPipeline pipeline, typename Loop::PipelineState state,
                           const Inputs& inputs, const Coordinates& block, Iterator, int, int thread, uint32_t rank,
                           typename Loop::TensorStorage& shared) {
    const auto& a1 = get<2>(inputs);
    const auto& a2 = get<4>(inputs);
    const int first = int(size<3>(a1)), second = int(size<3>(a2));
    Base::load(params, pipeline, state, cute::make_tuple(a1, get<3>(inputs)), block, cute::make_coord_iterator(shape<3>(a1)), first,
               thread, rank, shared);
    state.advance(first);
    Base::load(params.second, pipeline, state, cute::make_tuple(a2, get<5>(inputs)), block, cute::make_coord_iterator(shape<3>(a2)),
               second, thread, rank, shared);
  }
};

// Relu(input x weight + bias + shortcut) with tiles of M pixels x N channels.
template <class Element, Form form, int M, int N, int Cluster, class Schedule>
struct Kernel {
  using Depth = Int<kDepth / int(sizeof(Element))>;
  using TileShape = cute::conditional_t<form == Form::matrix, Shape<Int<M>, Int<N>, Depth>, Shape<Int<M>, Int<N>, Shape<Depth>>>;
  using ClusterShape = Shape<Int<Cluster>, _1, _1>;
  static constexpr int kAlignment = 16 / sizeof(Element);

  using End = cutlass::epilogue::fusion::LinCombPerColBiasEltAct<OptionalReLU, Element, float, Element, Element, float>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Shape<Int<M>, Int<N>, Depth>, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::RowMajor, kAlignment, typename EpilogueFor<Schedule>::Type, End>::CollectiveOp;

  // As many stages as fit beside the epilogue's buffers.
  static constexpr int kStageBytes = (M + N) * kDepth + int(sizeof(typename cutlass::PipelineTmaAsync<1>::SharedStorage));
  static constexpr int kStages = (cutlass::gemm::collective::detail::sm90_smem_capacity_bytes -
                                  int(sizeof(typename Epilogue::SharedStorage)) - 1024) / kStageBytes;
  static constexpr int kUsedStages = kStages > 8 ? 8 : kStages;

  using MatrixLoop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, Shape<Int<M>, Int<N>, Depth>, ClusterShape,
      cutlass::gemm::collective::StageCount<kUsedStages>, Schedule>::CollectiveOp;
  template <Form f, class Dummy = void>
  struct MainloopOf {
    using Type = MatrixLoop;
  };
  using Loop = ImageLoop<Element, TileShape, ClusterShape, kUsedStages, Schedule>;
  template <class Dummy>
  struct MainloopOf<Form::image, Dummy> {
    using Type = ImageMainloop<typename Loop::Type>;
  };
  template <class Dummy>
  struct MainloopOf<Form::joined, Dummy> {
    using Type = JoinedMainloop<typename Loop::Type>;
  };
  using Mainloop = typename MainloopOf<form>::Type;

  static_assert(cooperates(M, N) == cute::is_same_v<Schedule, cutlass::gemm::KernelTmaWarpSpecializedCooperative> &&
                cooperates(M, N) == (Cluster == 2), "the prediction takes it for another kernel");
  using Operation = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;

  // The joined convolution's image ends with the last pixel that is read.
  static Image joined_image(const ConvShape& s) {
    const Joined& j = s.joined;
    const Strides t = joined_strides(s);
    return Image(cutlass::conv::Mode::kCrossCorrelation,
                 {int(s.n), int((s.p - 1) * j.stride_h + 1), int((s.q - 1) * j.stride_w + 1), int(j.c)}, {t.n, t.h, t.w, 1},
                 {int(s.k), 1, 1, int(j.c)}, {j.c, j.c, j.c, 1}, {0, 0}, {0, 0}, {int(j.stride_h), int(j.stride_w)}, {1, 1}, 1);
  }

  static_assert(Operation::SharedStorageSize <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes, "too many stages");

  static typename Mainloop::Arguments mainloop(const ConvShape& s, const ConvOperands& o) {
    const auto* x = static_cast<const Element*>(o.x);
    const auto* weight = static_cast<const Element*>(o.weight);
    if constexpr (form == Form::matrix) {
      return {x, {s.c, _1{}, 0}, weight, {s.c, _1{}, 0}};
    } else if constexpr (form == Form::image) {
      return {image(s), {x, weight}};
    } else {
      return {{image(s), {x, weight}},
              {joined_image(s), {static_cast<const Element*>(o.joined), static_cast<const Element*>(o.joined_weight)}}};
    }
  }

  static void launch(const ConvShape& s, const ConvOperands& o, const Device& device, Stream stream, bool dependent) {
    const int rows = int(s.n * s.p * s.q), columns = int(s.k);
    // The kernels count steps of the reduction by this: each tap's channels are cut on their own, so each is rounded up.
    const int step = kDepth / int(sizeof(Element));
    const auto rounded = [step](i64 c) { return int((c + step - 1) / step * step); };
    const int depth = form == Form::matrix ? int(s.c) : int(s.r * s.s) * rounded(s.c) + rounded(s.joined.c);
    const auto strides = cute::make_stride(int64_t(s.k), _1{}, int64_t(0));
    typename Operation::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm, {rows, columns, depth, 1}, mainloop(s, o),
                                            end_of<typename Epilogue::Arguments, Element>(s, o, strides)};
    launch_kernel<cutlass::gemm::device::GemmUniversalAdapter<Operation>, Operation>(arguments, device, stream, dependent);
  }

  static void prepare() { prepare_kernel<Operation>(); }
};

}  // namespace fused_resnet::cuda::sm90

// The kernels of one tile size: two forms of each dtype.
#define FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, DTYPE, FORM)                                                                     \
  using Kernel_##DTYPE##_##FORM =                                                                                                \
      sm90::Kernel<ElementOf<DType::DTYPE>::Type, Form::FORM, M, N, CLUSTER, cutlass::gemm::KernelTmaWarpSpecialized##SCHEDULE>; \
  static const RegisterTensorKernel DTYPE##_##FORM({Architecture::sm90, DType::DTYPE, Form::FORM, M, N},                         \
                                                   &Kernel_##DTYPE##_##FORM::prepare, &Kernel_##DTYPE##_##FORM::launch);
#define FR_SM90_TILE(M, N, CLUSTER, SCHEDULE)                         \
  namespace fused_resnet::cuda {                                      \
  FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, bfloat16, matrix)           \
  FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, bfloat16, image)            \
  FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, float16, matrix)            \
  FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, float16, image)             \
  FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, float32, matrix)            \
  FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, float32, image)             \
  }
// The same with a joined convolution, for the dtypes that projections are worth it in.
#define FR_SM90_JOINED_TILE(M, N, CLUSTER, SCHEDULE)                  \
  namespace fused_resnet::cuda {                                      \
  FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, bfloat16, joined)           \
  FR_SM90_KERNEL(M, N, CLUSTER, SCHEDULE, float16, joined)            \
  }
