// Winograd convolution F(2x2, 3x3) and F(4x4, 3x3): 3x3 kernels with dilation 1 and stride 1 or, F(2x2) only, 2.
#pragma once

#include "convolution.h"
#include "winograd_tiles.h"

namespace fused_resnet {

class WinogradConvolution final : public Convolution {
 public:
  WinogradConvolution(const ConvShape& shape, DType dtype, int threads, const Choice& choice);

  i64 packed_bytes() const override;
  std::string packing() const override;
  std::string describe() const override { return blocking_.describe(); }

  int phases() const override { return blocking_.shared ? 2 : 1; }
  i64 tasks(int phase) const override;
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 shared_bytes() const override { return blocking_.shared ? transformed_bytes(all_tiles()) : 0; }
  i64 thread_bytes() const override;

 private:
  bool write_packed(i64 panel, i64 begin, i64 end, const WeightView& weight, const WeightView& joined, void* out) const noexcept override;

  using Strip = WinogradTiles::Strip;
  Strip strip(i64 tile, i64 end) const { return tiles_.strip(tile, end); }
  i64 all_tiles() const { return shape_.n * blocking_.rows * blocking_.cols; }
  i64 vectors() const { return (shape_.c + kernels_->vector - 1) / kernels_->vector; }  // of input channels
  i64 blocks() const { return (vectors() + kernels_->group - 1) / kernels_->group; }    // of elements, a vector each
  i64 elements() const { return (shape_.c + kernels_->group - 1) / kernels_->group; }   // of the reduction
  i64 panels() const { return blocking_.cut.count(); }
  i64 position_stride(i64 tiles) const;  // of the transformed input of so many tiles: elements
  i64 transformed_bytes(i64 tiles) const;
  i64 fresh_bytes() const;               // of the weights that a task transforms at a time
  i64 ahead_bytes() const;               // of the runs of memory to fetch ahead
  // Tiles of a strip, at most: the first of two phases takes whole rows of tiles, whatever a task of the second takes.
  i64 strip_tiles() const { return blocking_.shared ? blocking_.cols : blocking_.tiles; }

  void transform(i64 begin, i64 end, i64 index, const void* x, char* out, i64 first, i64 tiles, char* scratch) const;
  bool run_fresh(i64 begin, i64 end, i64 panel, const Operands& operands, const char* input, char* product, char* scratch) const;
  bool finish(i64 begin, i64 end, i64 panel, const Operands& operands, const char* product, char* scratch) const;

  i64 look_ahead(i64 begin, i64 end, i64 next, i64 panel, const Operands& operands, AheadRun* runs) const;  // how many

  WinogradBlocking blocking_;
  const WinogradKernels* winograd_;
  WinogradTiles tiles_;  // of the input
};

}  // namespace fused_resnet
