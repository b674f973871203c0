// Sixteen lanes as four vectors of NEON with dot products, and with I8MM's mixed ones where the compiler is told of it.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "simd_four.h"

#ifdef __ARM_FEATURE_MATMUL_INT8
#define LLK_ISA_NAME "neon-i8mm"
#else
#define LLK_ISA_NAME "neon"
#endif
// Of the 32 registers a row takes four for its sum, and eight more while its group is summed.
static constexpr int TILE_ROWS = 4;  // rows of activations that share one pass over a block of weights
static constexpr int ABREAST = 1;    // … of which so many are computed side by side

typedef Four<float32x4_t> vf;  // 16 floats
typedef Four<int32x4_t> vi;    // 16 int32
typedef Four<uint8x16_t> vb;   // 64 bytes: 4 a lane

static inline vf vf_load(const float *p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
static inline void vf_store(float *p, vf v) {
    vst1q_f32(p, v.a), vst1q_f32(p + 4, v.b), vst1q_f32(p + 8, v.c), vst1q_f32(p + 12, v.d);
}
static inline vf vf_set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
static inline vf vf_zero() { return vf_set(0); }
#define EACH_OF_2(name, type, operation) \
    static inline type name(type a, type b) { return {operation(a.a, b.a), operation(a.b, b.b), operation(a.c, b.c), operation(a.d, b.d)}; }
EACH_OF_2(vf_add, vf, vaddq_f32)
EACH_OF_2(vf_sub, vf, vsubq_f32)
EACH_OF_2(vf_mul, vf, vmulq_f32)
EACH_OF_2(vf_div, vf, vdivq_f32)
EACH_OF_2(vf_max, vf, vmaxq_f32)
EACH_OF_2(vf_min, vf, vminq_f32)
EACH_OF_2(vi_add, vi, vaddq_s32)
#undef EACH_OF_2
static inline vf vf_abs(vf v) { return each([](float32x4_t x) { return vabsq_f32(x); }, v); }
static inline vf vf_fma(vf a, vf b, vf c) {
    return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b), vfmaq_f32(c.c, a.c, b.c), vfmaq_f32(c.d, a.d, b.d)};
}
static inline vf vf_round(vf v) { return each([](float32x4_t x) { return vrndnq_f32(x); }, v); }
// a * 2**n, n whole and of -126 … 127.
static inline vf vf_scale2(vf a, vf n) {
    return each([](float32x4_t x, float32x4_t y) {
        return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(y), vdupq_n_s32(127)), 23)));
    }, a, n);
}
static inline float vf_sum(vf v) { return vaddvq_f32(vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d))); }
static inline float vf_highest(vf v) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.a, v.b), vmaxq_f32(v.c, v.d))); }
static inline vi lanes() {
    const int32x4_t first = {0, 1, 2, 3}, four = vdupq_n_s32(4);
    const int32x4_t second = vaddq_s32(first, four), third = vaddq_s32(second, four);
    return {first, second, third, vaddq_s32(third, four)};
}
// Lanes first <= i < end from a, the others from b.
static inline vf vf_between(int first, int end, vf a, vf b) {
    const int32x4_t f = vdupq_n_s32(first), e = vdupq_n_s32(end);
    return each([=](int32x4_t i, float32x4_t x, float32x4_t y) {
        return vbslq_f32(vandq_u32(vcgeq_s32(i, f), vcltq_s32(i, e)), x, y);
    }, lanes(), a, b);
}
static inline uint32_t vf_not_below(vf a, vf b) {  // a >= b
    const auto bits = each([](int32x4_t i, float32x4_t x, float32x4_t y) {
        return vandq_u32(vcgeq_f32(x, y), vshlq_u32(vdupq_n_u32(1), i));
    }, lanes(), a, b);
    return vaddvq_u32(vorrq_u32(vorrq_u32(bits.a, bits.b), vorrq_u32(bits.c, bits.d)));
}
static inline vf vf_load_f16(const uint16_t *p) {
    const auto four = [](const uint16_t *from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); };
    return {four(p), four(p + 4), four(p + 8), four(p + 12)};
}
static inline vf vf_load_bf16(const uint16_t *p) {
    const auto four = [](const uint16_t *from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); };
    return {four(p), four(p + 4), four(p + 8), four(p + 12)};
}
static inline vf vf_load_int8(const int8_t *p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    const auto four = [](int16x4_t v) { return vcvtq_f32_s32(vmovl_s16(v)); };
    return {four(vget_low_s16(low)), four(vget_high_s16(low)), four(vget_low_s16(high)), four(vget_high_s16(high))};
}
static inline uint16x4_t round_bf16(float32x4_t v) {  // to nearest even; a NaN stays one
    const uint32x4_t u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
}
static inline void vf_store_bf16(uint16_t *p, vf v) {
    vst1_u16(p, round_bf16(v.a)), vst1_u16(p + 4, round_bf16(v.b));
    vst1_u16(p + 8, round_bf16(v.c)), vst1_u16(p + 12, round_bf16(v.d));
}
// Rounded to the nearest and saturated to -128 … 127.
static inline void vf_store_int8(int8_t *p, vf v) {
    const auto four = [](float32x4_t x) { return vqmovn_s32(vcvtnq_s32_f32(x)); };
    vst1_s8(p, vqmovn_s16(vcombine_s16(four(v.a), four(v.b))));
    vst1_s8(p + 8, vqmovn_s16(vcombine_s16(four(v.c), four(v.d))));
}

static inline vi vi_zero() { return {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline vf vi_float(vi v) { return each([](int32x4_t x) { return vcvtq_f32_s32(x); }, v); }

static inline vb vb_load(const void *p) {
    const uint8_t *from = (const uint8_t *)p;
    return {vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)};
}
static inline vb vb_low(vb v) { return each([](uint8x16_t x) { return vandq_u8(x, vdupq_n_u8(15)); }, v); }
static inline vb vb_high(vb v) { return each([](uint8x16_t x) { return vshrq_n_u8(x, 4); }, v); }
static inline uint32x4_t four_bytes(const void *x) {
    uint32_t u;
    memcpy(&u, x, 4);
    return vdupq_n_u32(u);
}
// acc + the dot product of 4 signed bytes a lane with the 4 int8 at x.
static inline vi dot_signed(vi acc, vb w, const void *x) {
    const int8x16_t q = vreinterpretq_s8_u32(four_bytes(x));
    return each([=](int32x4_t sum, uint8x16_t v) { return vdotq_s32(sum, vreinterpretq_s8_u8(v), q); }, acc, w);
}
#ifdef __ARM_FEATURE_MATMUL_INT8
// Stored value+128. Dot products with them start from `q8_start`, given -128 times the sum of the other side.
static inline vb vb_q8(vb stored) { return stored; }
static inline vi q8_start(int32_t minus) { return {vdupq_n_s32(minus), vdupq_n_s32(minus), vdupq_n_s32(minus), vdupq_n_s32(minus)}; }
static inline vi dot_q8(vi acc, vb w, const void *x) {
    const int8x16_t q = vreinterpretq_s8_u32(four_bytes(x));
    return each([=](int32x4_t sum, uint8x16_t v) { return vusdotq_s32(sum, v, q); }, acc, w);
}
#else
static inline vb vb_q8(vb stored) { return each([](uint8x16_t x) { return veorq_u8(x, vdupq_n_u8(0x80)); }, stored); }
static inline vi q8_start(int32_t) { return vi_zero(); }
static inline vi dot_q8(vi acc, vb w, const void *x) { return dot_signed(acc, w, x); }
#endif
static inline vb vb_load_q8(const void *p) { return vb_q8(vb_load(p)); }
typedef vi vn;  // sums of products with nibbles
static inline vn vn_zero() { return vi_zero(); }
static inline vi whole(vn v) { return v; }
static inline vi dot_nibbles(vi acc, vb w, const void *x) { return dot_signed(acc, w, x); }
// acc + the dot product of 2 bfloat16 a lane with the 2 at x.
static inline float32x4_t even_bf16(uint32x4_t v) { return vreinterpretq_f32_u32(vshlq_n_u32(v, 16)); }
static inline float32x4_t odd_bf16(uint32x4_t v) { return vreinterpretq_f32_u32(vandq_u32(v, vdupq_n_u32(0xffff0000))); }
static inline vf dot_bf16(vf acc, vb w, const void *x) {
    const uint32x4_t pair = four_bytes(x);
    const float32x4_t even = even_bf16(pair), odd = odd_bf16(pair);
    return each([=](float32x4_t sum, uint8x16_t v) {
        const uint32x4_t u = vreinterpretq_u32_u8(v);
        return vfmaq_f32(vfmaq_f32(sum, even_bf16(u), even), odd_bf16(u), odd);
    }, acc, w);
}
#include "simd_halves.h"
static inline vi whole(v15 v) {
    return each([](int32x4_t high, int32x4_t low) { return vaddq_s32(vshlq_n_s32(high, 7), low); }, v.high, v.low);
}
// With bytes as they are stored, of which those of Q8 are value+128; with the signed bytes of V.
static inline v15 dot15_q8(v15 acc, vb w, const int8_t *x) {
    w = vb_q8(w);
    return {dot_q8(acc.high, w, x), dot_q8(acc.low, w, x + 4)};
}
static inline v15 dot15_nibbles(v15 acc, vb w, const int8_t *x) {
    return {dot_signed(acc.high, w, x), dot_signed(acc.low, w, x + 4)};
}
static inline v15 dot15_values(v15 acc, vb v, const int8_t *x) { return dot15_nibbles(acc, v, x); }
static inline void fetch(const void *p) { __builtin_prefetch(p); }
static inline void fetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }
static inline void relax() { __asm__ volatile("yield"); }
