// Sixteen lanes as two vectors of AVX2 with FMA and F16C, and AVX-VNNI where the compiler is told of it.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVXVNNI__
#define LLK_ISA_NAME "avx2-vnni"
#else
#define LLK_ISA_NAME "avx2"
#endif
static constexpr int TILE_ROWS = 4;  // rows of activations that share one pass over a block of weights
static constexpr int ABREAST = 4;    // … of which so many are computed side by side

struct vf { __m256 a, b; };   // 16 floats
struct vi { __m256i a, b; };  // 16 int32
struct vb { __m256i a, b; };  // 64 bytes: 4 a lane

static inline vf vf_load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
static inline vf vf_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf vf_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline vf vf_add(vf a, vf b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
static inline vf vf_sub(vf a, vf b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
static inline vf vf_mul(vf a, vf b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
static inline vf vf_div(vf a, vf b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
static inline vf vf_max(vf a, vf b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
static inline vf vf_min(vf a, vf b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
static inline vf vf_abs(vf v) {
    __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b)};
}
static inline vf vf_fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
static inline vf vf_round(vf v) { return {_mm256_round_ps(v.a, 8), _mm256_round_ps(v.b, 8)}; }
static inline __m256 power_of_2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// a * 2**n, n whole and of -126 … 127.
static inline vf vf_scale2(vf a, vf n) { return vf_mul(a, {power_of_2(n.a), power_of_2(n.b)}); }
static inline float vf_sum(vf v) {
    __m256 s = _mm256_add_ps(v.a, v.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
static inline float vf_highest(vf v) {
    __m256 s = _mm256_max_ps(v.a, v.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
// Lanes first <= i < end from a, the others from b.
static inline vf vf_between(int first, int end, vf a, vf b) {
    const __m256i f = _mm256_set1_epi32(first), e = _mm256_set1_epi32(end);
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i m = _mm256_andnot_si256(_mm256_cmpgt_epi32(f, low), _mm256_cmpgt_epi32(e, low));
    const __m256i n = _mm256_andnot_si256(_mm256_cmpgt_epi32(f, high), _mm256_cmpgt_epi32(e, high));
    return {_mm256_blendv_ps(b.a, a.a, _mm256_castsi256_ps(m)), _mm256_blendv_ps(b.b, a.b, _mm256_castsi256_ps(n))};
}
static inline uint32_t vf_not_below(vf a, vf b) {  // a >= b
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.a, b.a, _CMP_GE_OQ)) |
           (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.b, b.b, _CMP_GE_OQ)) << 8;
}
static inline vf vf_load_f16(const uint16_t *p) {
    const __m128i *from = (const __m128i *)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
}
static inline __m256 widen_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline vf vf_load_bf16(const uint16_t *p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
static inline __m256 widen_int8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vf vf_load_int8(const int8_t *p) { return {widen_int8(p), widen_int8(p + 8)}; }
static inline __m256i round_bf16(__m256 v) {  // to nearest even; a NaN stays one
    __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd)), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
}
// The low halves of 16 int32 in order.
static inline __m256i halves(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }
static inline void vf_store_bf16(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, halves(round_bf16(v.a), round_bf16(v.b)));
}
// Rounded to the nearest and saturated to -128 … 127.
static inline void vf_store_int8(int8_t *p, vf v) {
    __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}

static inline vi vi_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline vi vi_add(vi a, vi b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
static inline vi whole(vi v) { return v; }
static inline vf vi_float(vi v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }

static inline vb vb_load(const void *p) {
    const __m256i *from = (const __m256i *)p;
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
static inline __m256i four_bits(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
static inline vb vb_low(vb v) { return {four_bits(v.a), four_bits(v.b)}; }
static inline vb vb_high(vb v) { return {four_bits(_mm256_srli_epi16(v.a, 4)), four_bits(_mm256_srli_epi16(v.b, 4))}; }
static inline __m256i four_bytes(const void *x) {
    int32_t u;
    memcpy(&u, x, 4);
    return _mm256_set1_epi32(u);
}
#ifdef __AVXVNNI__
// Stored value+128. Dot products with them start from `q8_start`, given -128 times the sum of the other side.
static inline vb vb_load_q8(const void *p) { return vb_load(p); }
static inline vi q8_start(int32_t minus) { return {_mm256_set1_epi32(minus), _mm256_set1_epi32(minus)}; }
// acc + the dot product of 4 unsigned with 4 signed bytes a lane.
static inline vi dot_bytes(vi acc, vb u, vb s) {
    return {_mm256_dpbusd_avx_epi32(acc.a, u.a, s.a), _mm256_dpbusd_avx_epi32(acc.b, u.b, s.b)};
}
static inline vi dot_q8(vi acc, vb w, const void *x) { return dot_bytes(acc, w, {four_bytes(x), four_bytes(x)}); }
typedef vi vn;  // sums of products with nibbles
static inline vn vn_zero() { return vi_zero(); }
static inline vn dot_nibbles(vn acc, vb w, const void *x) { return dot_q8(acc, w, x); }
#else
// maddubs adds two products in 16 bits: 2 * 128 * 127 fits, 2 * 255 * 127 does not. So bytes stay signed, and
// the sign of the weights goes to the other side.
static inline vb vb_load_q8(const void *p) {
    vb v = vb_load(p);
    __m256i bias = _mm256_set1_epi8((char)0x80);
    return {_mm256_xor_si256(v.a, bias), _mm256_xor_si256(v.b, bias)};
}
static inline vi q8_start(int32_t) { return vi_zero(); }
static inline __m256i add_pairs(__m256i acc, __m256i pairs) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// Else gcc makes a tree of a group's sums, with so many products at once that they go through memory.
#define IN_ORDER(sum) __asm__("" : "+x"(sum.a), "+x"(sum.b))
static inline vi dot_bytes(vi acc, vb u, vb s) {
    acc = {add_pairs(acc.a, _mm256_maddubs_epi16(u.a, s.a)), add_pairs(acc.b, _mm256_maddubs_epi16(u.b, s.b))};
    IN_ORDER(acc);
    return acc;
}
static inline vi dot_q8(vi acc, vb w, const void *x) {
    const __m256i q = four_bytes(x);
    return dot_bytes(acc, {_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)}, {_mm256_sign_epi8(q, w.a), _mm256_sign_epi8(q, w.b)});
}
// Sums of products with nibbles stay in 16 bits for a group: 8 * 2 * 15 * 127 fits.
struct vn { __m256i a, b; };
static inline vn vn_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline vi whole(vn v) { return {add_pairs(_mm256_setzero_si256(), v.a), add_pairs(_mm256_setzero_si256(), v.b)}; }
static inline vn dot_nibbles(vn acc, vb w, const void *x) {
    const __m256i q = four_bytes(x);
    acc = {_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, q)), _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, q))};
    IN_ORDER(acc);
    return acc;
}
#endif
// acc + the dot product of 2 bfloat16 a lane with the 2 at x.
static inline __m256 even_bf16(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
static inline __m256 odd_bf16(__m256i v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int32_t)0xffff0000)));
}
static inline vf dot_bf16(vf acc, vb w, const void *x) {
    const __m256i pair = four_bytes(x);
    const __m256 even = even_bf16(pair), odd = odd_bf16(pair);
    acc = {_mm256_fmadd_ps(even_bf16(w.a), even, acc.a), _mm256_fmadd_ps(even_bf16(w.b), even, acc.b)};
    return {_mm256_fmadd_ps(odd_bf16(w.a), odd, acc.a), _mm256_fmadd_ps(odd_bf16(w.b), odd, acc.b)};
}
// Dot products with whole numbers of 15 bits. These lie by fours in 8 bytes, `stride` bytes apart, as int16: first the
// two that meet the even bytes of the other side, then the two that meet the odd ones.
typedef vi v15;
static inline void vf_store_15(int8_t *to, size_t stride, vf v) {
    __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)), 0xd8);
    int64_t fours[4];
    _mm256_storeu_si256((__m256i *)fours, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(h, 0xd8), 0xd8));
    for (int i = 0; i < 4; i++) memcpy(to + i * stride, fours + i, 8);
}
static inline v15 v15_zero() { return vi_zero(); }
static inline v15 v15_start_q8(int32_t minus) { return {_mm256_set1_epi32(minus), _mm256_set1_epi32(minus)}; }
static inline vi dot_shorts(vi acc, vb w, __m256i x) {
#ifdef __AVXVNNI__
    return {_mm256_dpwssd_avx_epi32(acc.a, w.a, x), _mm256_dpwssd_avx_epi32(acc.b, w.b, x)};
#else
    acc = vi_add(acc, {_mm256_madd_epi16(w.a, x), _mm256_madd_epi16(w.b, x)});
    IN_ORDER(acc);
    return acc;
#endif
}
// With bytes as they are stored, of which those of Q8 are value+128; with the signed bytes of V.
static inline v15 dot15_q8(v15 acc, vb w, const int8_t *x) {
    const __m256i even = _mm256_set1_epi16(255);
    acc = dot_shorts(acc, {_mm256_and_si256(w.a, even), _mm256_and_si256(w.b, even)}, four_bytes(x));
    return dot_shorts(acc, {_mm256_srli_epi16(w.a, 8), _mm256_srli_epi16(w.b, 8)}, four_bytes(x + 4));
}
static inline v15 dot15_nibbles(v15 acc, vb w, const int8_t *x) { return dot15_q8(acc, w, x); }
static inline __m256i signed_even(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
static inline v15 dot15_values(v15 acc, vb v, const int8_t *x) {
    acc = dot_shorts(acc, {signed_even(v.a), signed_even(v.b)}, four_bytes(x));
    return dot_shorts(acc, {_mm256_srai_epi16(v.a, 8), _mm256_srai_epi16(v.b, 8)}, four_bytes(x + 4));
}
static inline void fetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
static inline void fetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
static inline void relax() { _mm_pause(); }
