// Sixteen lanes on AVX-512 with VNNI, and BF16 where the compiler is told of it.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#if defined(__AMX_INT8__)
#define LLK_ISA_NAME "avx512-amx"
#elif defined(__AVX512BF16__)
#define LLK_ISA_NAME "avx512-bf16"
#else
#define LLK_ISA_NAME "avx512"
#endif
static constexpr int TILE_ROWS = 16;  // rows of activations that share one pass over a block of weights
static constexpr int ABREAST = 1;    // … of which so many are computed side by side

typedef __m512 vf;    // 16 floats
typedef __m512i vi;   // 16 int32
typedef __m512i vb;   // 64 bytes: 4 a lane

static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline vf vf_set(float x) { return _mm512_set1_ps(x); }
static inline vf vf_zero() { return _mm512_setzero_ps(); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
static inline vf vf_round(vf a) { return _mm512_roundscale_ps(a, 8); }          // to nearest even
static inline vf vf_scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }       // a * 2**n, n whole
static inline float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float vf_highest(vf a) { return _mm512_reduce_max_ps(a); }
// Lanes first <= i < end from a, the others from b.
static inline vf vf_between(int first, int end, vf a, vf b) {
    uint32_t e = end >= 16 ? 0xffffu : end <= 0 ? 0 : (1u << end) - 1;
    uint32_t f = first >= 16 ? 0xffffu : first <= 0 ? 0 : (1u << first) - 1;
    return _mm512_mask_blend_ps((__mmask16)(e & ~f), b, a);
}
static inline uint32_t vf_not_below(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }  // a >= b
static inline vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline vf vf_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline vf vf_load_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void vf_store_bf16(uint16_t *p, vf v) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
    __m512i u = _mm512_castps_si512(v);
    u = _mm512_add_epi32(u, _mm512_add_epi32(_mm512_set1_epi32(0x7fff),
                                             _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1))));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16)));
#endif
}
// Rounded to the nearest and saturated to -128 … 127.
static inline void vf_store_int8(int8_t *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

static inline vi vi_zero() { return _mm512_setzero_si512(); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vf vi_float(vi a) { return _mm512_cvtepi32_ps(a); }

static inline vb vb_load(const void *p) { return _mm512_loadu_si512(p); }
static inline vb vb_low(vb v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
static inline vb vb_high(vb v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
// Stored value+128. Dot products with them start from `q8_start`, given -128 times the sum of the other side.
static inline vb vb_load_q8(const void *p) { return _mm512_loadu_si512(p); }
static inline vi q8_start(int32_t minus) { return _mm512_set1_epi32(minus); }
// acc + the dot product of 4 bytes a lane with the 4 int8 at x: nibbles, and bytes from vb_load_q8. In assembly, for
// gcc 12 keeps the sums of its intrinsic in memory as soon as there are a dozen (attention took half as long again).
static inline vi dot_q8(vi acc, vb w, const void *x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(_mm512_set1_epi32(*(const int32_t *)x)));
    return acc;
}
typedef vi vn;  // sums of products with nibbles
static inline vn vn_zero() { return vi_zero(); }
static inline vi whole(vn v) { return v; }
static inline vn dot_nibbles(vn acc, vb w, const void *x) { return dot_q8(acc, w, x); }
// Dot products with whole numbers of 15 bits. These lie by fours in 8 bytes, `stride` bytes apart, as int16: first the
// two that meet the even bytes of the other side, then the two that meet the odd ones.
typedef vi v15;
static inline void vf_store_15(int8_t *to, size_t stride, vf v) {
    __m256i h = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v));
    h = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(h, 0xd8), 0xd8);
    if (stride == 8) return _mm256_storeu_si256((__m256i *)to, h);
    int64_t fours[4];
    _mm256_storeu_si256((__m256i *)fours, h);
    for (int i = 0; i < 4; i++) *(int64_t *)(to + i * stride) = fours[i];
}
static inline v15 v15_zero() { return vi_zero(); }
static inline v15 v15_start_q8(int32_t minus) { return _mm512_set1_epi32(minus); }
static inline vi dot_shorts(vi acc, vb w, const void *x) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(_mm512_set1_epi32(*(const int32_t *)x)));
    return acc;
}
// With bytes as they are stored, of which those of Q8 are value+128; with the signed bytes of V.
static inline v15 dot15_q8(v15 acc, vb w, const int8_t *x) {
    acc = dot_shorts(acc, _mm512_and_si512(w, _mm512_set1_epi16(255)), x);
    return dot_shorts(acc, _mm512_srli_epi16(w, 8), x + 4);
}
static inline v15 dot15_nibbles(v15 acc, vb w, const int8_t *x) { return dot15_q8(acc, w, x); }
static inline v15 dot15_values(v15 acc, vb v, const int8_t *x) {
    acc = dot_shorts(acc, _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), x);
    return dot_shorts(acc, _mm512_srai_epi16(v, 8), x + 4);
}
// acc + the dot product of 2 bfloat16 a lane with the 2 at x.
static inline vf dot_bf16(vf acc, vb w, const void *x) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(*(const int32_t *)x));
#else
    uint32_t pair = *(const uint32_t *)x;
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
                          _mm512_castsi512_ps(_mm512_set1_epi32((int32_t)(pair << 16))), acc);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int32_t)0xffff0000))),
                           _mm512_castsi512_ps(_mm512_set1_epi32((int32_t)(pair & 0xffff0000))), acc);
#endif
}
static inline void fetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
static inline void fetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
static inline void relax() { _mm_pause(); }
