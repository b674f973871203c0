// Sixteen lanes in plain C++, for processors without a header of their own; the compiler vectorises what it can.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LLK_ISA_NAME "portable"
static constexpr int TILE_ROWS = 4;

struct vf { float v[16]; };
struct vi { int32_t v[16]; };
struct vb { uint8_t v[64]; };

#define EACH for (int i = 0; i < 16; i++)
static inline vf vf_load(const float *p) { vf r; memcpy(r.v, p, 64); return r; }
static inline void vf_store(float *p, vf v) { memcpy(p, v.v, 64); }
static inline vf vf_set(float x) { vf r; EACH r.v[i] = x; return r; }
static inline vf vf_zero() { return vf_set(0); }
static inline vf vf_add(vf a, vf b) { EACH a.v[i] += b.v[i]; return a; }
static inline vf vf_sub(vf a, vf b) { EACH a.v[i] -= b.v[i]; return a; }
static inline vf vf_mul(vf a, vf b) { EACH a.v[i] *= b.v[i]; return a; }
static inline vf vf_div(vf a, vf b) { EACH a.v[i] /= b.v[i]; return a; }
static inline vf vf_max(vf a, vf b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline vf vf_min(vf a, vf b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline vf vf_abs(vf a) { EACH a.v[i] = fabsf(a.v[i]); return a; }
static inline vf vf_fma(vf a, vf b, vf c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }
static inline vf vf_round(vf a) { EACH a.v[i] = rintf(a.v[i]); return a; }
static inline vf vf_scale2(vf a, vf n) { EACH a.v[i] = ldexpf(a.v[i], (int)n.v[i]); return a; }
static inline float vf_sum(vf a) {
    for (int step = 8; step; step /= 2) for (int i = 0; i < step; i++) a.v[i] += a.v[i + step];
    return a.v[0];
}
static inline float vf_highest(vf a) {
    for (int i = 1; i < 16; i++) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
    return a.v[0];
}
static inline vf vf_between(int first, int end, vf a, vf b) {
    EACH if (i < first || i >= end) a.v[i] = b.v[i];
    return a;
}
static inline uint32_t vf_not_below(vf a, vf b) {
    uint32_t m = 0;
    EACH m |= (uint32_t)(a.v[i] >= b.v[i]) << i;
    return m;
}
static inline float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
    float small = (float)rest * 0x1p-24f;  // subnormal
    return sign ? -small : small;
}
static inline vf vf_load_f16(const uint16_t *p) { vf r; EACH r.v[i] = from_f16(p[i]); return r; }
static inline vf vf_load_bf16(const uint16_t *p) { vf r; EACH r.v[i] = from_bits((uint32_t)p[i] << 16); return r; }
static inline void vf_store_bf16(uint16_t *p, vf v) {
    EACH { uint32_t u; memcpy(&u, &v.v[i], 4); p[i] = (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16); }
}
static inline void vf_store_int8(int8_t *p, vf v) {
    EACH { float x = rintf(v.v[i]); p[i] = (int8_t)(x > 127 ? 127 : x < -128 ? -128 : x == x ? x : 0); }
}
static inline void vf_store_split(uint8_t *low, uint8_t *high, vf v) {
    EACH { int u = (int)rintf(v.v[i]); low[i] = u & 127; high[i] = (uint8_t)(u >> 7); }
}
static inline vi vi_zero() { vi r; EACH r.v[i] = 0; return r; }
static inline vi vi_add(vi a, vi b) { EACH a.v[i] += b.v[i]; return a; }
static inline vi vi_join(vi h, vi l) { EACH l.v[i] += 128 * h.v[i]; return l; }
static inline vf vi_float(vi a) { vf r; EACH r.v[i] = (float)a.v[i]; return r; }
static inline vb vb_load(const void *p) { vb r; memcpy(r.v, p, 64); return r; }
static inline vb vb_low(vb v) { for (int i = 0; i < 64; i++) v.v[i] &= 15; return v; }
static inline vb vb_high(vb v) { for (int i = 0; i < 64; i++) v.v[i] >>= 4; return v; }
static inline vb vb_load_q8(const void *p) { vb r = vb_load(p); for (int i = 0; i < 64; i++) r.v[i] ^= 0x80; return r; }
static inline vi q8_start(int32_t) { return vi_zero(); }
static inline vi dot_signed(vi acc, vb w, const void *x) {
    const int8_t *q = (const int8_t *)x;
    EACH for (int k = 0; k < 4; k++) acc.v[i] += (int8_t)w.v[4 * i + k] * q[k];
    return acc;
}
static inline vi dot_nibbles(vi acc, vb w, const void *x) { return dot_signed(acc, w, x); }
static inline vi dot_q8(vi acc, vb w, const void *x) { return dot_signed(acc, w, x); }
static inline vi dot_values(vi acc, vb v, const void *p) { return dot_signed(acc, v, p); }
static inline vf dot_bf16(vf acc, vb w, const void *x) {
    uint32_t pair;
    memcpy(&pair, x, 4);
    float even = from_bits(pair << 16), odd = from_bits(pair & 0xffff0000);
    EACH {
        uint32_t u;
        memcpy(&u, w.v + 4 * i, 4);
        acc.v[i] += from_bits(u << 16) * even;
        acc.v[i] += from_bits(u & 0xffff0000) * odd;
    }
    return acc;
}
static inline int32_t sum_int8(const int8_t *p) { int32_t s = 0; for (int i = 0; i < 32; i++) s += p[i]; return s; }
static inline void fetch(const void *p) { __builtin_prefetch(p); }
static inline void fetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }
static inline void relax() {}
#undef EACH
