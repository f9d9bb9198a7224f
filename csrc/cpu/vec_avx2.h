// 256-bit registers: AVX2 and FMA. Loads and stores of n < width elements are masked, or go element by element for bfloat16:
// nothing beyond is touched.
#pragma once

#include <immintrin.h>

#include "../epilogue.h"
#include "../types.h"

namespace fused_resnet {
namespace {

struct Avx2Float {
  using type = float;
  using part = float;  // an element of A is `group` of these
  using reg = __m256;
  static constexpr int width = 8;
  static constexpr int group = 1;
  static constexpr int vectors = 2, rows[] = {6, 6, 0, 0};  // register tiles: see DTypeKernels
  static __m256i mask(i64 n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n >= width ? width : int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float v) { return _mm256_set1_ps(v); }
  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load_n(const float* p, i64 n) { return n >= width ? load(p) : _mm256_maskload_ps(p, mask(n)); }
  static reg load_n(const bf16* p, i64 n) {
    alignas(16) bf16 part[width] = {};
    if (n < width) {
      for (i64 i = 0; i < n; ++i) part[i] = p[i];
      p = part;
    }
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static reg load_all(const float* p) { return load(p); }
  static reg load_all(const bf16* p) { return load_n(p, width); }
  static void store_all(float* p, reg v) { store(p, v); }
  static void store_all(bf16* p, reg v) { store_n(p, v, width); }
  static void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static void store_group(float* p, const reg (&v)[1]) { store(p, v[0]); }
  static void store_n(float* p, reg v, i64 n) {
    if (n >= width) {
      store(p, v);
    } else {
      _mm256_maskstore_ps(p, mask(n), v);
    }
  }
  static void store_n(bf16* p, reg v, i64 n) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0xd8);
    if (n >= width) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    } else {
      alignas(16) bf16 part[width];
      _mm_store_si128(reinterpret_cast<__m128i*>(part), _mm256_castsi256_si128(packed));
      for (i64 i = 0; i < n; ++i) p[i] = part[i];
    }
  }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  // The second operand where one is NaN: the NaN stays.
  static reg relu(reg v) { return _mm256_max_ps(zero(), v); }
  static reg relu_gradient(reg g, reg y) { return _mm256_and_ps(_mm256_cmp_ps(y, zero(), _CMP_NLE_UQ), g); }
  static reg flushed(reg v) {
    const reg size = _mm256_andnot_ps(set1(float(-0.0)), v);
    return _mm256_and_ps(_mm256_cmp_ps(size, set1(kSmallestNormal<float>), _CMP_NLT_UQ), v);
  }
  static reg later(reg a, reg b) { return _mm256_or_ps(_mm256_cmp_ps(b, a, _CMP_GT_OQ), _mm256_cmp_ps(b, b, _CMP_UNORD_Q)); }
  static reg larger(reg a, reg b) { return _mm256_blendv_ps(a, b, later(a, b)); }
  static reg if_later(reg a, reg b, reg was, reg is) { return _mm256_blendv_ps(was, is, later(a, b)); }
  static reg if_equal(reg a, reg b, reg v) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ), v); }
  static reg evens(reg a, reg b) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
  }
  static reg interleave_low(reg a, reg b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static reg interleave_high(reg a, reg b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
};

struct Avx2Double {
  using type = double;
  using part = double;  // an element of A is `group` of these
  using reg = __m256d;
  static constexpr int width = 4;
  static constexpr int group = 1;
  static constexpr int vectors = 2, rows[] = {6, 6, 0, 0};  // register tiles: see DTypeKernels
  static __m256i mask(i64 n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n >= width ? width : n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static reg zero() { return _mm256_setzero_pd(); }
  static reg set1(double v) { return _mm256_set1_pd(v); }
  static reg load(const double* p) { return _mm256_loadu_pd(p); }
  static reg load_n(const double* p, i64 n) { return n >= width ? load(p) : _mm256_maskload_pd(p, mask(n)); }
  static reg load_all(const double* p) { return load(p); }
  static void store_all(double* p, reg v) { store(p, v); }
  static void store(double* p, reg v) { _mm256_storeu_pd(p, v); }
  static void store_group(double* p, const reg (&v)[1]) { store(p, v[0]); }
  static void store_n(double* p, reg v, i64 n) {
    if (n >= width) {
      store(p, v);
    } else {
      _mm256_maskstore_pd(p, mask(n), v);
    }
  }
  static reg add(reg a, reg b) { return _mm256_add_pd(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_pd(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_pd(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_pd(a, b, c); }
  // The second operand where one is NaN: the NaN stays.
  static reg relu(reg v) { return _mm256_max_pd(zero(), v); }
  static reg relu_gradient(reg g, reg y) { return _mm256_and_pd(_mm256_cmp_pd(y, zero(), _CMP_NLE_UQ), g); }
  static reg flushed(reg v) {
    const reg size = _mm256_andnot_pd(set1(double(-0.0)), v);
    return _mm256_and_pd(_mm256_cmp_pd(size, set1(kSmallestNormal<double>), _CMP_NLT_UQ), v);
  }
  static reg later(reg a, reg b) { return _mm256_or_pd(_mm256_cmp_pd(b, a, _CMP_GT_OQ), _mm256_cmp_pd(b, b, _CMP_UNORD_Q)); }
  static reg larger(reg a, reg b) { return _mm256_blendv_pd(a, b, later(a, b)); }
  static reg if_later(reg a, reg b, reg was, reg is) { return _mm256_blendv_pd(was, is, later(a, b)); }
  static reg if_equal(reg a, reg b, reg v) { return _mm256_and_pd(_mm256_cmp_pd(a, b, _CMP_EQ_OQ), v); }
  static reg evens(reg a, reg b) { return _mm256_permute4x64_pd(_mm256_unpacklo_pd(a, b), 0xd8); }
  static reg interleave_low(reg a, reg b) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x20);
  }
  static reg interleave_high(reg a, reg b) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x31);
  }
};

}  // namespace
}  // namespace fused_resnet
