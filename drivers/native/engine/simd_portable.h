// Sixteen lanes in portable C++, four vectors of 16 bytes that gcc and clang turn into what the processor has: for
// those without a header of their own. Products of bytes are made in 16 bits, which every processor has.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif
#include "simd_four.h"

#define LLK_ISA_NAME "portable"
static constexpr int TILE_ROWS = 4;  // rows of activations that share one pass over a block of weights
static constexpr int ABREAST = 1;    // … of which so many are computed side by side

typedef float floats __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));
typedef int16_t shorts __attribute__((vector_size(16)));
typedef uint16_t four_halves __attribute__((vector_size(8)));

typedef Four<floats> vf;  // 16 floats
typedef Four<ints> vi;    // 16 int32
typedef Four<words> vb;   // 64 bytes: 4 a lane

template <typename T> static inline T load(const void *p) { T v; memcpy(&v, p, sizeof v); return v; }
template <typename T> static inline Four<T> load_four(const void *p) {
    const char *from = (const char *)p;
    const size_t n = sizeof(T);
    return {load<T>(from), load<T>(from + n), load<T>(from + 2 * n), load<T>(from + 3 * n)};
}
static inline floats all(float x) { return floats{x, x, x, x}; }
static inline ints all(int32_t x) { return ints{x, x, x, x}; }
static inline words all(uint32_t x) { return words{x, x, x, x}; }
static inline floats choose(ints mask, floats yes, floats no) { return (floats)(((ints)yes & mask) | ((ints)no & ~mask)); }
static inline floats greater(floats a, floats b) { return choose(a > b, a, b); }
static inline floats smaller(floats a, floats b) { return choose(a < b, a, b); }

static inline vf vf_load(const float *p) { return load_four<floats>(p); }
static inline void vf_store(float *p, vf v) { memcpy(p, &v, 64); }
static inline vf vf_set(float x) { return {all(x), all(x), all(x), all(x)}; }
static inline vf vf_zero() { return vf_set(0); }
static inline vf vf_add(vf a, vf b) { return each([](floats x, floats y) { return x + y; }, a, b); }
static inline vf vf_sub(vf a, vf b) { return each([](floats x, floats y) { return x - y; }, a, b); }
static inline vf vf_mul(vf a, vf b) { return each([](floats x, floats y) { return x * y; }, a, b); }
static inline vf vf_div(vf a, vf b) { return each([](floats x, floats y) { return x / y; }, a, b); }
static inline vf vf_max(vf a, vf b) { return each(greater, a, b); }
static inline vf vf_min(vf a, vf b) { return each(smaller, a, b); }
static inline vf vf_abs(vf a) { return each([](floats x) { return (floats)((words)x & all(0x7fffffffu)); }, a); }
static inline vf vf_fma(vf a, vf b, vf c) { return each([](floats x, floats y, floats z) { return x * y + z; }, a, b, c); }
// Below 2**22 a sum with this has no place for a fraction, and its low bits are the whole number.
static constexpr float WHOLE = 0x1.8p23f;
static inline ints to_ints(floats x) { return (ints)(x + all(WHOLE)) - (ints)all(WHOLE); }
static inline vf vf_round(vf a) { return each([](floats x) { return (x + all(WHOLE)) - all(WHOLE); }, a); }
// a * 2**n, n whole and of -126 … 127.
static inline vf vf_scale2(vf a, vf n) { return each([](floats x, floats y) { return x * (floats)((to_ints(y) + 127) << 23); }, a, n); }
static inline float vf_sum(vf v) {
    floats s = (v.a + v.c) + (v.b + v.d);
    return (s[0] + s[2]) + (s[1] + s[3]);
}
static inline float vf_highest(vf v) {
    floats s = greater(greater(v.a, v.b), greater(v.c, v.d));
    float x = s[0] > s[1] ? s[0] : s[1], y = s[2] > s[3] ? s[2] : s[3];
    return x > y ? x : y;
}
static inline Four<ints> lanes() { return {ints{0, 1, 2, 3}, ints{4, 5, 6, 7}, ints{8, 9, 10, 11}, ints{12, 13, 14, 15}}; }
static inline vf vf_between(int first, int end, vf a, vf b) {
    return each([=](ints i, floats x, floats y) { return choose((i >= all(first)) & (i < all(end)), x, y); }, lanes(), a, b);
}
static inline uint32_t vf_not_below(vf a, vf b) {
    Four<ints> bits = each([](ints i, floats x, floats y) { return (x >= y) & (all(1) << i); }, lanes(), a, b);
    ints m = bits.a | bits.b | bits.c | bits.d;
    return (uint32_t)(m[0] | m[1] | m[2] | m[3]);
}
static inline vf vf_load_f16(const uint16_t *p) {
    return each([](four_halves h) {
        words u = __builtin_convertvector(h, words), place = (u & 0x7fff) << 13;
        // The exponent is too small by 112. One of 0 stands for a subnormal: it gets a leading one that is taken away.
        floats normal = (floats)(place + (112u << 23)), small = (floats)(place + (113u << 23)) - all(0x1p-14f);
        words finite = (words)choose((ints)((u & 0x7c00) == 0), small, normal);
        words special = (words)((u & 0x7c00) == 0x7c00) & 0x7f800000;
        return (floats)(finite | special | (u & 0x8000) << 16);
    }, load_four<four_halves>(p));
}
static inline vf vf_load_bf16(const uint16_t *p) {
    return each([](four_halves h) { return (floats)(__builtin_convertvector(h, words) << 16); }, load_four<four_halves>(p));
}
static inline vf vf_load_int8(const int8_t *p) {
    typedef int8_t four_bytes __attribute__((vector_size(4)));
    return each([](four_bytes v) { return __builtin_convertvector(v, floats); }, load_four<four_bytes>(p));
}
static inline void vf_store_bf16(uint16_t *p, vf v) {
    const auto narrow = each([](floats x) {  // a NaN stays one
        words u = (words)x, nan = (words)(x != x), r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        return __builtin_convertvector((r & ~nan) | (nan & 0x7fc0), four_halves);
    }, v);
    memcpy(p, &narrow, 32);
}
static inline void vf_store_int8(int8_t *p, vf v) {
    int32_t n[16];
    const auto r = each([](floats x) { return to_ints(smaller(greater(x, all(-128.f)), all(127.f))); }, v);
    memcpy(n, &r, 64);
    for (int i = 0; i < 16; i++) p[i] = (int8_t)n[i];
}

static inline vi vi_zero() { return {all(0), all(0), all(0), all(0)}; }
static inline vi vi_add(vi a, vi b) { return each([](ints x, ints y) { return x + y; }, a, b); }
static inline vf vi_float(vi a) { return each([](ints x) { return __builtin_convertvector(x, floats); }, a); }

static inline vb vb_load(const void *p) { return load_four<words>(p); }
static inline vb vb_low(vb v) { return each([](words x) { return x & 0x0f0f0f0f; }, v); }
static inline vb vb_high(vb v) { return each([](words x) { return (x >> 4) & 0x0f0f0f0f; }, v); }
static inline vb vb_load_q8(const void *p) { return each([](words x) { return x ^ 0x80808080; }, vb_load(p)); }
static inline vi q8_start(int32_t) { return vi_zero(); }
// The sums of two neighbours' products, in 32 bits.
static inline ints pairs(shorts a, shorts b) {
#ifdef __SSE2__
    return (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return (((ints)a << 16) >> 16) * (((ints)b << 16) >> 16) + ((ints)a >> 16) * ((ints)b >> 16);
#endif
}
// The signed bytes at even and at odd places.
static inline shorts even(words v) { return ((shorts)v << 8) >> 8; }
static inline shorts odd(words v) { return (shorts)v >> 8; }
static inline vi dot_q8(vi acc, vb w, const void *x) {
    const words q = all(load<uint32_t>(x));
    const shorts near = even(q), far = odd(q);
    return each([=](ints sum, words v) { return sum + pairs(even(v), near) + pairs(odd(v), far); }, acc, w);
}
// Sums of products with nibbles stay in 16 bits for a group: 8 * 2 * 15 * 127 fits.
typedef Four<shorts> vn;
static inline vn vn_zero() { return {shorts{}, shorts{}, shorts{}, shorts{}}; }
static inline vi whole(vi v) { return v; }
static inline vi whole(vn v) {
    return each([](shorts s) { return (((ints)s << 16) >> 16) + ((ints)s >> 16); }, v);
}
static inline vn dot_nibbles(vn acc, vb w, const void *x) {
    const words q = all(load<uint32_t>(x));
    const shorts near = even(q), far = odd(q);
    return each([=](shorts sum, words v) {
        return (shorts)(sum + (shorts)(v & 0x00ff00ff) * near + (shorts)((v >> 8) & 0x00ff00ff) * far);
    }, acc, w);
}
// Dot products with whole numbers of 15 bits. These lie by fours in 8 bytes, `stride` bytes apart, as int16: first the
// two that meet the even bytes of the other side, then the two that meet the odd ones.
typedef vi v15;
static inline void vf_store_15(int8_t *to, size_t stride, vf v) {
    int32_t n[16];
    const auto r = each(to_ints, v);
    memcpy(n, &r, 64);
    for (int i = 0; i < 4; i++, to += stride) {
        const int16_t four[4] = {(int16_t)n[4 * i], (int16_t)n[4 * i + 2], (int16_t)n[4 * i + 1], (int16_t)n[4 * i + 3]};
        memcpy(to, four, 8);
    }
}
static inline v15 v15_zero() { return vi_zero(); }
static inline v15 v15_start_q8(int32_t minus) { return {all(minus), all(minus), all(minus), all(minus)}; }
// With bytes as they are stored, of which those of Q8 are value+128; with the signed bytes of V.
static inline v15 dot15_q8(v15 acc, vb w, const int8_t *x) {
    const shorts near = (shorts)all(load<uint32_t>(x)), far = (shorts)all(load<uint32_t>(x + 4));
    return each([=](ints sum, words v) {
        return sum + pairs((shorts)(v & 0x00ff00ff), near) + pairs((shorts)((v >> 8) & 0x00ff00ff), far);
    }, acc, w);
}
static inline v15 dot15_nibbles(v15 acc, vb w, const int8_t *x) { return dot15_q8(acc, w, x); }
static inline v15 dot15_values(v15 acc, vb v, const int8_t *x) {
    const shorts near = (shorts)all(load<uint32_t>(x)), far = (shorts)all(load<uint32_t>(x + 4));
    return each([=](ints sum, words b) { return sum + pairs(even(b), near) + pairs(odd(b), far); }, acc, v);
}
static inline vf dot_bf16(vf acc, vb w, const void *x) {
    const words pair = all(load<uint32_t>(x));
    const floats low = (floats)(pair << 16), high = (floats)(pair & 0xffff0000);
    return each([=](floats sum, words v) {
        sum = sum + (floats)(v << 16) * low;
        return sum + (floats)(v & 0xffff0000) * high;
    }, acc, w);
}
static inline void fetch(const void *p) { __builtin_prefetch(p); }
static inline void fetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }
static inline void relax() {}
