// How a pass walks over memory: pure functions of the shape and of the pointers' alignment.
#pragma once

#include "launch.h"

namespace fused_resnet::cuda {

// Whether the result's memory runs over the channels (channels_last), else over the pixels of one channel.
inline bool runs_over_channels(const PassShape& s) { return s.result.c == 1 && (s.k > 1 || s.p * s.q == 1); }

inline i64 elements(const PassShape& s) { return checked_product(checked_product(s.n, s.k), checked_product(s.p, s.q)); }

// Whether an operand is dense in the result's order: its offsets are then the result's.
inline bool dense(const PassShape& s, const Strides& t) {
  const bool c = runs_over_channels(s);
  const i64 along_c = c ? 1 : s.p * s.q, along_w = c ? s.k : 1;
  return (s.k == 1 || t.c == along_c) && (s.q == 1 || t.w == along_w) && (s.p == 1 || t.h == along_w * s.q) &&
         (s.n == 1 || t.n == s.k * s.p * s.q);
}

inline bool aligned16(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

// A bias gradient is made of pieces whose sums are kept apart: `length` pixels of all channels each where the result runs over
// channels, else `length` pixels (over all images) of one channel. They depend on the shape alone.
struct Pieces {
  i64 count = 0, length = 0;
};

inline Pieces pieces_of(const PassShape& s) {
  constexpr i64 kElements = 8192;   // of a block at least: 32 for each thread
  constexpr i64 kBlocks = 1056;     // about so many fill a GPU: 8 for each of 132 multiprocessors
  constexpr i64 kTileChannels = 256;
  constexpr i64 kGranule = 16;      // a multiple of every vector
  const i64 pixels = s.n * s.p * s.q;
  if (elements(s) == 0) return {};
  const bool over_channels = runs_over_channels(s);
  const i64 beside = over_channels ? (s.k + kTileChannels - 1) / kTileChannels : s.k;  // blocks of each piece
  const i64 work = over_channels ? elements(s) / beside / kElements : pixels / kElements;
  const i64 most = (kBlocks + beside - 1) / beside;
  const i64 wanted = work < 1 ? 1 : work > most ? most : work;
  Pieces pieces;
  pieces.length = (pixels + wanted - 1) / wanted;
  if (!over_channels) pieces.length = (pieces.length + kGranule - 1) / kGranule * kGranule;
  pieces.count = (pixels + pieces.length - 1) / pieces.length;
  return pieces;
}

}  // namespace fused_resnet::cuda
