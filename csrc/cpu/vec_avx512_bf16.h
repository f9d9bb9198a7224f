// Pairs of bfloat16 and the instruction that multiplies them (AVX512_BF16): sums in float32. Denormal operands count as zero.
#pragma once

#include "packing.h"
#include "vec_avx512.h"

namespace fused_resnet {
namespace {

// Registers of float32 as ever, but for the rounding to bfloat16, which is one instruction here.
struct Avx512Bf16Float : Avx512Float {
  using Avx512Float::store_all;
  using Avx512Float::store_n;
  static __m256i narrow16(reg v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
  static void store_all(bf16* p, reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16(v)); }
  static void store_n(bf16* p, reg v, i64 n) { _mm256_mask_storeu_epi16(p, mask(n), narrow16(v)); }
};

// Two rows of bfloat16 as one row of pairs.
inline __m512 pairs(__m256i low, __m256i high) {
  return _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
}

// An element of A or of the packed weights is a pair, in 32 bits that are loaded and broadcast as if they were a float.
struct Avx512Bf16Pair : Avx512Bf16Float {
  using part = bf16;
  static constexpr int group = 2;
  static reg fma(reg a, reg b, reg c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static void store_group(bf16* p, const reg (&v)[group]) {
    _mm512_storeu_ps(p, pairs(narrow16(v[0]), narrow16(v[1])));
  }
};

template <>
void pack_row<Avx512Bf16Pair, bf16>(const PackRowArgs& a) {
  const bf16* x = static_cast<const bf16*>(a.x);
  float* out = static_cast<float*>(a.out);
  if (a.stride_c == 1) {
    for (i64 w = 0; w < a.pixels; ++w, x += a.stride_w, out += a.pitch) {
      for (i64 c = 0; c < a.channels; c += 32) {
        const i64 left = a.channels - c;
        const __mmask32 some = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
        const __m512i both = _mm512_maskz_loadu_epi16(some, x + c);
        Avx512Float::store_n(out + c / 2, _mm512_castsi512_ps(both), (left + 1) / 2);
      }
    }
    return;
  }
  const i64 elements = (a.channels + 1) / 2;
  if (a.stride_w == 1) {
    for (i64 first = 0; first < elements; first += 16) {
      const i64 count = smaller(elements - first, 16);
      for (i64 w = 0; w < a.pixels; w += 16) {
        const i64 pixels = smaller(a.pixels - w, 16);
        const __mmask16 some = Avx512Float::mask(pixels);
        __m512 rows[16];
        for (i64 j = 0; j < 16; ++j) {
          const i64 c = (first + j) * 2;
          const __m256i low = c < a.channels ? _mm256_maskz_loadu_epi16(some, x + c * a.stride_c + w) : _mm256_setzero_si256();
          const __m256i high =
              c + 1 < a.channels ? _mm256_maskz_loadu_epi16(some, x + (c + 1) * a.stride_c + w) : _mm256_setzero_si256();
          rows[j] = pairs(low, high);
        }
        transpose<Avx512Float>(rows);
        alignas(64) float turned[16][16];
        FR_UNROLL
        for (int j = 0; j < 16; ++j) _mm512_store_ps(turned[j], rows[j]);
        for (i64 i = 0; i < pixels; ++i) {
          Avx512Float::store_n(out + (w + i) * a.pitch + first, _mm512_load_ps(turned[i]), count);
        }
      }
    }
    return;
  }
  for (i64 w = 0; w < a.pixels; ++w) {
    bf16* to = reinterpret_cast<bf16*>(out + w * a.pitch);
    for (i64 c = 0; c < 2 * elements; ++c) to[c] = c < a.channels ? x[w * a.stride_w + c * a.stride_c] : bf16{0};
  }
}

}  // namespace
}  // namespace fused_resnet
