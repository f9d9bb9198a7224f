// What an instruction set provides: one table of function pointers for each storage dtype. Nothing here depends on the
// instruction set, and the files that fill the tables (isa_*.cpp) use nothing of the standard library: an inline function
// compiled there with AVX-512 flags could be the copy that the linker keeps for everybody.
#pragma once

#include "../types.h"

namespace fused_resnet {

// A run of consecutive elements of A, the input operand (an element: one channel or a pair, see DTypeKernels): one tap of the kernel, a row of taps, or a part of one.
struct Tap {
  i64 offset, length;
  int source;  // 0: BlockArgs::base, 1: BlockArgs::joined
};

// A part of the reduction whose weights (of one panel) stay in the L2 cache while every pixel of a block uses them.
struct Chunk {
  const Tap* taps;
  i64 count;     // taps
  i64 elements;  // the sum of their lengths
};

// Output channels are cut into panels of a few registers each; the last one may have fewer.
struct Panels {
  i64 k = 0, vector = 1;  // output channels in all; channels in a register
  i64 channels = 1;       // of a full panel, a multiple of `vector`

  i64 count() const { return (k + channels - 1) / channels; }
  i64 begin(i64 p) const { return p * channels; }
  i64 width(i64 p) const {  // of panel p: whole registers
    const i64 left = k - begin(p);
    return left >= channels ? channels : (left + vector - 1) / vector * vector;
  }
};

// One block of output pixels times a range of output channels. Element i of a tap of pixel m is base[m][tap.offset + i].
struct BlockArgs {
  const void* const* base = nullptr;    // [pixels]
  const void* const* joined = nullptr;  // [pixels]; only where a tap says so
  i64 pixels = 0;
  const Chunk* chunks = nullptr;
  i64 chunk_count = 0;
  void* partial = nullptr;       // [pixels][channels of a panel] accumulators; only where there are several chunks
  const void* weight = nullptr;  // all panels; each [element of the reduction][channels of the panel]
  Panels panels;
  i64 panel_begin = 0, panel_end = 0;
  const void* bias = nullptr;  // storage dtype; null: none
  const void* shortcut = nullptr;
  const i64* shortcut_offset = nullptr;  // [pixels]
  i64 shortcut_stride_k = 0;
  void* y = nullptr;
  const i64* y_offset = nullptr;  // [pixels]
  i64 y_stride_k = 0;
  bool masked = false;  // by the shortcut, which is not added: as ConvShape says
  bool relu = true;
  bool tiles_outside = false;  // the order of the loops; needs one chunk
  bool input_run = false;      // A's pixels follow each other in memory, without gaps
};

// Part of one row of the input: `pixels` pixels from x + w * stride_w, `channels` channels each, written to
// out[pixel * pitch + channel] in the accumulator's type.
struct PackRowArgs {
  const void* x = nullptr;
  i64 stride_c = 0, stride_w = 0, pixels = 0, channels = 0;
  void* out = nullptr;
  i64 pitch = 0;  // elements
  bool others_between = false;  // between two pixels lies what is to stay
};

// Input channels [c_begin, c_end) of one panel of the weight [K, C, R, S] with any strides: out[(r * S + s) * elements + c][width], zeros
// beyond K and C. c counts elements of A (see DTypeKernels::group), c_begin and c_end channels, c_begin a multiple of the group.
struct PackWeightArgs {
  const void* weight = nullptr;
  Strides stride;  // n: of K, c: of C, h: of R, w: of S
  i64 k = 0, c = 0, r = 0, s = 0;
  i64 k_begin = 0, width = 0;
  i64 c_begin = 0, c_end = 0;
  void* out = nullptr;
};

// One row of a pointwise pass: y[i] = relu(x[i] + bias + shortcut[i]). `bias_step` is 1 where the row runs over channels, 0
// where it runs over pixels of one channel.
struct PassRowArgs {
  const void* x = nullptr;  // storage dtype, or float where wide_input
  const void* bias = nullptr;
  const void* shortcut = nullptr;
  void* y = nullptr;
  i64 x_step = 1, bias_step = 0, shortcut_step = 1, length = 0;
  bool relu = true, wide_input = false;
};

// Rows of the way back: out[i] = output[i] <= 0 ? 0 : grad[i], operands `step` apart, and `pitch` from row to row. `sum` (accumulator type, may
// be null) gains out[i] at [i * sum_step], of each row. Without output and out it gains grad[i].
struct MaskRowsArgs {
  const void* grad = nullptr;
  const void* output = nullptr;
  void* out = nullptr;
  void* sum = nullptr;
  i64 grad_step = 1, output_step = 1, sum_step = 1, length = 0;
  i64 rows = 1, grad_pitch = 0, output_pitch = 0, out_pitch = 0;
};

// The largest of several rows, element by element: y[i] = max over row of rows[row][i]. NaN where one is NaN; of equal ones the first.
struct LargestRowArgs {
  const void* const* rows = nullptr;  // storage dtype
  i64 count = 0, length = 0;          // rows; elements of each
  void* y = nullptr;                  // storage dtype, or the accumulator's type where wide_output
  bool wide_output = false;
};

// The gradient of LargestRowArgs, added to those of the rows: results[row][i] gains grad[i] where rows[row][i] was the largest. All in the
// accumulator's type. masked: the rows are a ReLU's output, and what is added goes through that ReLU's gradient.
struct LargestGradArgs {
  const void* const* rows = nullptr;
  void* const* results = nullptr;
  const void* grad = nullptr;
  i64 count = 0, length = 0;
  bool masked = false;
};

// The largest of each window of one row: y[i] = max over j < size of x[i * stride + j], as above. Up to two registers are read behind the
// last window. Both together: of equal zeros of both signs, either may be a window's largest.
struct LargestWindowsArgs {
  const void* x = nullptr;  // the accumulator's type
  i64 size = 1, stride = 1, windows = 0;
  void* y = nullptr;  // storage dtype
};

// The mean of several rows, element by element: y[i] = sum over row of x[row * stride + i] / rows, added up in the accumulator's type.
struct MeanRowArgs {
  const void* x = nullptr;  // storage dtype
  i64 stride = 0, rows = 0, length = 0;
  void* y = nullptr;  // storage dtype
};

// Memory that will be wanted soon: `count` pieces of `lines` cache lines, `stride` bytes apart.
struct AheadRun {
  const char* first;
  i64 stride, count, lines;
  bool write;
};

// The transform of a strip, tiles side by side in one row of tiles, and `channels` channels (a vector at most).
// Columns run from 0 to those of the last tile; those outside [left, right) are zeros.
struct WinogradStripArgs {
  const void* row[6] = {};  // column 0 of each of a tile's rows; only columns [left, right) are read
  i64 step[6] = {};         // elements from column to column
  i64 left = 0, right = 0;
  i64 tiles = 0, channels = 0;
  void* scratch = nullptr;  // [alpha][columns][vector]
  void* out = nullptr;      // position 0 of the first tile, first of these channels
  i64 position_stride = 0, tile_stride = 0;  // elements of A
};

// The products at all positions, of one panel of output channels.
struct WinogradMultiplyArgs {
  const void* input = nullptr;  // [position][block of channels][tile][vector]
  i64 position_stride = 0, block_stride = 0;
  const void* weight = nullptr;  // [position][channel][width]
  i64 weight_stride = 0;         // elements between positions
  const void* next = nullptr;    // weights wanted after these, at least as many as of one position
  void* product = nullptr;       // [position][tile][width]
  bool more = false;             // the product has the sums of channels before these
  i64 tiles = 0, channels = 0, width = 0;
  int positions = 0;
  const AheadRun* ahead = nullptr;  // fetched into the L2 cache meanwhile
  i64 ahead_runs = 0;
};

// The output transform of a strip and one panel, and what follows it.
struct WinogradOutputArgs {
  const void* product = nullptr;  // position 0 of the first tile
  i64 position_stride = 0;
  i64 tiles = 0, width = 0;
  i64 rows = 0, columns = 0;   // pixels of the strip that exist: rows <= m, columns <= tiles * m
  i64 k = 0, channel = 0;      // output channels in all; the panel's first
  const void* bias = nullptr;  // of channel 0; null: none
  const void* shortcut = nullptr;  // the strip's first pixel, channel 0
  Strides shortcut_stride;
  void* y = nullptr;
  Strides y_stride;
  bool masked = false;  // as BlockArgs'
  bool relu = true;
  void* scratch = nullptr;  // [m][tiles * m rounded up to a vector][vector]; only where channels are not side by side
};

// F(m x m, 3x3): output tiles of m x m pixels from input tiles of alpha x alpha, `step` apart.
struct WinogradKernels {
  int m, step, alpha;
  bool (*weight)(const PackWeightArgs&);  // to out[position][element][width]; false: a transformed weight is not finite
  void (*input)(const WinogradStripArgs&);    // rows in the storage dtype, channels side by side
  void (*input_packed)(const WinogradStripArgs&);  // rows in the accumulator's type
  bool (*output)(const WinogradOutputArgs&);  // false: a sum is not finite, on the way or in the end
};

// Products for the gradient of a weight, of some steps of its reduction (pixels or tiles): sums[row * pitch + column] is the sum over step of
// grad[step * grad_pitch + row] * input[step * input_pitch + column], each from the first step to the last. All in the accumulator's type.
struct WeightProductsArgs {
  const void* grad = nullptr;
  const void* input = nullptr;
  i64 grad_pitch = 0, input_pitch = 0;
  i64 width = 0;  // columns: whole registers, at most DTypeKernels::vectors
  i64 steps = 0, rows = 0;
  void* sums = nullptr;
  i64 pitch = 0;
  bool more = false;  // added to what is there
  const void* next = nullptr;       // fetched into the L2 cache meanwhile
  i64 next_bytes = 0;
  AheadRun ahead = {};              // this too
};

// From the products at all positions to nine taps, each row and column for itself.
struct WinogradTapsArgs {
  const void* product = nullptr;  // [position][row][width]
  i64 position_stride = 0;
  i64 rows = 0, width = 0;
  void* sums = nullptr;  // [row][tap][column]
  i64 pitch = 0, tap_stride = 0;
  bool more = false;  // added to what is there
};

// Some output channels of the gradient of a weight [K, C, R, S] with any strides: the sums of `parts` parts, one after the other, rounded to the
// storage dtype.
struct StoreWeightArgs {
  const void* sums = nullptr;  // accumulator's type: [part][output channel][tap][c]
  i64 parts = 1, part_stride = 0, pitch = 0, tap_stride = 0;
  i64 rows = 0;  // output channels, at most a register of them
  i64 c = 0, r = 0, s = 0;
  void* out = nullptr;
  Strides stride;  // n: of K, c: of C, h: of R, w: of S
};

// F(3x3, m x m), the gradient of a 3x3 weight: the transforms of F(m x m, 3x3), each the other way round.
struct WinogradGradientKernels {
  int m, alpha;
  void (*input)(const WinogradStripArgs&);         // as WinogradKernels'; to the accumulator's type
  void (*input_packed)(const WinogradStripArgs&);
  void (*grad)(const WinogradStripArgs&);          // of tiles of m x m pixels, m apart
  void (*grad_packed)(const WinogradStripArgs&);
  void (*taps)(const WinogradTapsArgs&);
};

struct DTypeKernels {
  int storage_bytes, accumulator_bytes;
  int vector;        // elements of the accumulator's type in a register
  int vectors;       // registers of output channels in a panel, at most
  int rows[4];       // pixels that share the accumulators, at most, with a panel of 1, 2, ... registers
  int group;         // input channels in one element of A, which has the accumulator's size: 1, or a pair of bfloat16
  void (*block)(const BlockArgs&);
  void (*pack_row)(const PackRowArgs&);   // to elements of A
  void (*widen_row)(const PackRowArgs&);  // to the accumulator's type
  bool (*pack_weight)(const PackWeightArgs&);  // false: a weight is not finite
  void (*pass_row)(const PassRowArgs&);
  void (*mask_rows)(const MaskRowsArgs&);
  void (*largest_row)(const LargestRowArgs&);
  void (*largest_windows)(const LargestWindowsArgs&);
  void (*largest_grad)(const LargestGradArgs&);
  void (*mean_row)(const MeanRowArgs&);
  void (*store)(void* out, const double* values, i64 count);  // to the storage dtype, rounded once
  WinogradKernels winograd2, winograd2_stride2, winograd4;
  void (*winograd_multiply)(const WinogradMultiplyArgs&);
  WinogradGradientKernels winograd_gradient2, winograd_gradient4;
  void (*weight_products)(const WeightProductsArgs&);
  bool (*store_weight)(const StoreWeightArgs&);  // false: a sum is not finite
};

struct KernelTable {
  const char* isa;
  DTypeKernels dtype[kCpuDTypes];  // indexed by DType
  double (*fma_peak)(i64 iterations);  // runs float32 FMAs; returns how many flops it did
};

extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const DTypeKernels kAvx512Bf16Kernels;  // of bfloat16, with the instructions of AVX512_BF16
#endif

}  // namespace fused_resnet
