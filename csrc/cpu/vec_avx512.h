// 512-bit registers: AVX-512 F, BW, DQ, VL. Loads and stores of n < width elements are masked: nothing beyond is touched.
//
// Register tiles of 6 x 4 need 10 loads for 24 FMAs, those of 14 x 2 16 for 28: that counts where a core has other work for its
// ports, above all its other hardware thread's.
#pragma once

#include <immintrin.h>

#include "../epilogue.h"
#include "../types.h"

namespace fused_resnet {
namespace {

struct Avx512Float {
  using type = float;
  using part = float;  // an element of A is `group` of these
  using reg = __m512;
  static constexpr int width = 16;
  static constexpr int group = 1;
  static constexpr int vectors = 4, rows[] = {14, 14, 9, 6};  // register tiles: see DTypeKernels
  static __mmask16 mask(i64 n) { return n >= width ? __mmask16(0xffff) : __mmask16((1u << n) - 1u); }
  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float v) { return _mm512_set1_ps(v); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load_n(const float* p, i64 n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static reg load_n(const bf16* p, i64 n) {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static reg load_all(const float* p) { return load(p); }
  static reg load_all(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store_all(float* p, reg v) { store(p, v); }
  static void store_all(bf16* p, reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16(v)); }
  static void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static void store_group(float* p, const reg (&v)[1]) { store(p, v[0]); }
  static void store_n(float* p, reg v, i64 n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static void store_n(bf16* p, reg v, i64 n) { _mm256_mask_storeu_epi16(p, mask(n), narrow16(v)); }
  static __m256i narrow16(reg v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
    return _mm512_cvtepi32_epi16(chosen);
  }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  // The second operand where one is NaN: the NaN stays.
  static reg relu(reg v) { return _mm512_max_ps(zero(), v); }
  static reg relu_gradient(reg g, reg y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_NLE_UQ), g); }
  static reg flushed(reg v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(v), set1(kSmallestNormal<float>), _CMP_NLT_UQ), v);
  }
  static __mmask16 later(reg a, reg b) { return _mm512_cmp_ps_mask(b, a, _CMP_GT_OQ) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q); }
  static reg larger(reg a, reg b) { return _mm512_mask_mov_ps(a, later(a, b), b); }
  static reg if_later(reg a, reg b, reg was, reg is) { return _mm512_mask_mov_ps(was, later(a, b), is); }
  static reg if_equal(reg a, reg b, reg v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), v); }
  static reg evens(reg a, reg b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
  }
  static reg interleave_low(reg a, reg b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
  }
  static reg interleave_high(reg a, reg b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
  }
};

struct Avx512Double {
  using type = double;
  using part = double;  // an element of A is `group` of these
  using reg = __m512d;
  static constexpr int width = 8;
  static constexpr int group = 1;
  static constexpr int vectors = 4, rows[] = {14, 14, 9, 6};  // register tiles: see DTypeKernels
  static __mmask8 mask(i64 n) { return n >= width ? __mmask8(0xff) : __mmask8((1u << n) - 1u); }
  static reg zero() { return _mm512_setzero_pd(); }
  static reg set1(double v) { return _mm512_set1_pd(v); }
  static reg load(const double* p) { return _mm512_loadu_pd(p); }
  static reg load_n(const double* p, i64 n) { return _mm512_maskz_loadu_pd(mask(n), p); }
  static reg load_all(const double* p) { return load(p); }
  static void store_all(double* p, reg v) { store(p, v); }
  static void store(double* p, reg v) { _mm512_storeu_pd(p, v); }
  static void store_group(double* p, const reg (&v)[1]) { store(p, v[0]); }
  static void store_n(double* p, reg v, i64 n) { _mm512_mask_storeu_pd(p, mask(n), v); }
  static reg add(reg a, reg b) { return _mm512_add_pd(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_pd(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_pd(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_pd(a, b, c); }
  // The second operand where one is NaN: the NaN stays.
  static reg relu(reg v) { return _mm512_max_pd(zero(), v); }
  static reg relu_gradient(reg g, reg y) { return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(y, zero(), _CMP_NLE_UQ), g); }
  static reg flushed(reg v) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(_mm512_abs_pd(v), set1(kSmallestNormal<double>), _CMP_NLT_UQ), v);
  }
  static __mmask8 later(reg a, reg b) { return _mm512_cmp_pd_mask(b, a, _CMP_GT_OQ) | _mm512_cmp_pd_mask(b, b, _CMP_UNORD_Q); }
  static reg larger(reg a, reg b) { return _mm512_mask_mov_pd(a, later(a, b), b); }
  static reg if_later(reg a, reg b, reg was, reg is) { return _mm512_mask_mov_pd(was, later(a, b), is); }
  static reg if_equal(reg a, reg b, reg v) { return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ), v); }
  static reg evens(reg a, reg b) { return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b); }
  static reg interleave_low(reg a, reg b) {
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
  }
  static reg interleave_high(reg a, reg b) {
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
  }
};

}  // namespace
}  // namespace fused_resnet
