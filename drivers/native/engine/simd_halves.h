// Whole numbers of 15 bits for processors that multiply bytes: in two halves. Included behind vf_store_int8,
// q8_start and what they need.
#pragma once
#include <string.h>

// Dot products with whole numbers of 15 bits. These lie by fours in 8 bytes, `stride` bytes apart: 128 * high + low,
// four high bytes, then four low ones.
struct v15 { vi high, low; };
static inline void vf_store_15(int8_t *to, size_t stride, vf v) {
    vf top = vf_round(vf_mul(v, vf_set(1.f / 128.f)));
    int8_t high[16], low[16];
    vf_store_int8(high, top);
    vf_store_int8(low, vf_fma(top, vf_set(-128.f), v));
    for (int i = 0; i < 4; i++) {
        memcpy(to + i * stride, high + 4 * i, 4);
        memcpy(to + i * stride + 4, low + 4 * i, 4);
    }
}
static inline v15 v15_zero() { return {vi_zero(), vi_zero()}; }
static inline v15 v15_start_q8(int32_t minus) { return {vi_zero(), q8_start(minus)}; }
