// Sizes and indices, without running a kernel.
#include <limits>
#include <memory>
#include <stdexcept>

#include "../../../csrc/cpu/convolution.h"
#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "reference.h"

using namespace fused_resnet;

namespace memory {
namespace {

// A packed weight serves inputs of every size, on any number of threads: its layout does not depend on them, whatever the caches.
void layouts() {
  for (const KernelTable* table : available_tables()) {
    for (int dtype = 0; dtype < kCpuDTypes; ++dtype) {
      const DTypeKernels& kernels = table->dtype[dtype];
      for (const i64 l1d : {16, 32, 48}) {
        for (const i64 l2 : {256, 512, 1024, 2048}) {
          CacheSizes caches;
          caches.l1d = l1d << 10, caches.l2 = l2 << 10;
          for (const i64 channels : {3, 40, 81, 100, 128, 200, 256, 512}) {
            for (const Algorithm algorithm : {Algorithm::direct, Algorithm::winograd2, Algorithm::winograd4}) {
              if (!take()) continue;
              describe("%s %s c=%ld, caches of %ld and %ld KiB", table->isa, name(DType(dtype)), long(channels), long(l1d), long(l2));
              i64 first = 0;
              for (const i64 n : {1, 3, 32}) {
                for (const i64 size : {1, 7, 13, 28, 56}) {
                  for (const int threads : {1, 2, 7}) {
                    ConvShape s;
                    s.n = n, s.c = channels, s.h = s.w = s.p = s.q = size, s.k = 200, s.r = s.s = 3, s.pad_top = s.pad_left = 1;
                    s.x = {size * size * channels, 1, size * channels, channels}, s.y = {size * size * 200, 1, size * 200, 200};
                    const i64 width = algorithm == Algorithm::direct
                                          ? choose_blocking(s, kernels, caches, threads).cut.channels
                                          : choose_winograd_blocking(s, algorithm, kernels, caches, threads).cut.channels;
                    if (first == 0) first = width;
                    expect(width == first, "the same panels for every size of the input");
                  }
                }
              }
            }
          }
        }
      }
    }
  }
}

// Sizes whose products leave 64 bits are refused by an exception, never computed.
void extremes() {
  describe("int64 extremes");
  const i64 big = i64(1) << 40;
  for (int which = 0; which < 6; ++which) {
    ConvShape s;
    s.n = s.c = s.h = s.w = s.k = s.r = s.s = s.p = s.q = 1;
    if (which == 0) s.n = s.c = big;
    if (which == 1) s.k = s.c = big;
    if (which == 2) s.p = s.stride_h = big;
    if (which == 3) s.s = s.dilation_w = big;
    if (which == 4) s.k = s.q = big;
    if (which == 5) s.pad_left = std::numeric_limits<i64>::max() - 1;
    bool refused = false;
    try {
      s.validate();
    } catch (const std::overflow_error&) {
      refused = true;
    }
    expect(refused, "an overflowing shape is refused");
  }
  // What validate() lets through and Winograd's own sizes do not: thrown, or computed without overflow (UBSan looks).
  for (const KernelTable* table : available_tables()) {
    set_isa(table->isa);
    for (const Algorithm algorithm : {Algorithm::winograd2, Algorithm::winograd4}) {
      for (int which = 0; which < 6; ++which) {
        ConvShape s;
        s.n = s.c = s.k = 1, s.h = s.w = s.r = s.s = 3, s.p = s.q = 1;
        s.x = s.y = {9, 9, 3, 1};
        if (which == 0) s.n = i64(1) << 59;
        if (which == 1) s.k = i64(1) << 59;
        if (which == 2) s.c = i64(1) << 59;
        if (which == 3) s.n = i64(1) << 29, s.c = i64(1) << 29;
        if (which == 4) s.k = i64(1) << 29, s.c = i64(1) << 30;
        if (which == 5) s.w = i64(1) << 59, s.q = s.w - 2;
        describe("int64 extreme %d of F(%d), %s", which, algorithm == Algorithm::winograd2 ? 2 : 4, table->isa);
        const auto size = [&](auto&& of) {
          try {
            const auto convolution = Convolution::make(s, DType::float32, 2, request(algorithm));
            return of(*convolution);
          } catch (const std::overflow_error&) {
            return std::numeric_limits<i64>::max();
          }
        };
        // At least the bytes of what they hold.
        expect(double(size([](const Convolution& c) { return c.packed_bytes(); })) >= 0.99 * 36.0 / 9 * double(s.k) * double(s.c),
               "the packed weight's size");
        expect(size([](const Convolution& c) { return c.workspace_bytes(); }) > 0, "the workspace's size");
      }
    }
  }
  // 2^33 elements in a row: planned (nothing is allocated), with 64-bit offsets, and in pieces that fit.
  ConvShape s;
  s.n = 1, s.c = 64, s.h = 3, s.w = i64(1) << 27, s.k = 64, s.r = s.s = 3, s.pad_top = s.pad_left = 1, s.p = 3, s.q = s.w;
  s.x = dense(true, s.c, s.h, s.w);
  s.y = dense(true, s.k, s.p, s.q);
  const auto convolution = Convolution::make(s, DType::float32, 2, request(Algorithm::direct));
  expect(convolution->workspace_bytes() < (i64(4) << 20), "the workspace stays bounded for a long row");
}

}  // namespace

void arithmetic() {
  layouts();
  extremes();
}

}  // namespace memory
