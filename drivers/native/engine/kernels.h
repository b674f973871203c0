// The inner loops of a step, written once over the sixteen lanes of simd_*.h: products of a few rows with a
// block of packed weights, attention of a few queries over a stretch of the KV cache, norms, activations.
//
// What a row gets never depends on how many rows are computed with it: sums run in the same order for every
// template width (integer sums may be split, they are exact).
#pragma once
#include <math.h>
#include <string.h>

#include <type_traits>

#include "engine.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

#define UNROLL _Pragma("GCC unroll 16")
// Nothing behind it is loaded before it. gcc would load what all rows need first, and keep sums in memory for that.
#define LOAD_LATE() __asm__ volatile("" ::: "memory")

static constexpr int GROUP = 32;         // columns that share a scale
static constexpr int BLOCK_TOKENS = 16;  // positions of a KV block
static constexpr int CHUNK = 128;        // positions whose softmax is taken at once
static constexpr float HIDDEN_SCORE = -1e30f;
static constexpr float FINE_RANGE = 127.f * 128.f;  // of whole numbers of 15 bits, with a sign, that two bytes hold

#ifdef __AMX_INT8__
static constexpr bool HAS_TILES = true;
#else
static constexpr bool HAS_TILES = false;
#endif
// Whether products with a matrix are made by amx.h.
static inline bool is_tiled(const llk_matrix &matrix) { return HAS_TILES && matrix.unit; }

static inline int imin(int a, int b) { return a < b ? a : b; }
static inline int imax(int a, int b) { return a > b ? a : b; }

// exp by range reduction to [-ln2/2, ln2/2] and a polynomial (Cephes' expf); relative error below 2e-7.
static inline vf vf_exp(vf x) {
    x = vf_max(vf_min(x, vf_set(88.f)), vf_set(-87.f));
    vf n = vf_round(vf_mul(x, vf_set(1.44269504f)));
    vf r = vf_fma(n, vf_set(-0.693359375f), x);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.9875691e-4f);
    p = vf_fma(p, r, vf_set(1.3981999e-3f));
    p = vf_fma(p, r, vf_set(8.3334519e-3f));
    p = vf_fma(p, r, vf_set(4.1665795e-2f));
    p = vf_fma(p, r, vf_set(1.6666665e-1f));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set(1.f)));
    return vf_scale2(p, n);
}

// exp to 3e-6, enough where the result is rounded to bfloat16 or 15 bits: a power of two times a polynomial that is
// fitted to 2**r on [-1/2, 1/2].
static inline vf vf_exp_coarse(vf x) {
    vf t = vf_max(vf_mul(x, vf_set(1.44269504f)), vf_set(-126.f)), n = vf_round(t), r = vf_sub(t, n);
    vf p = vf_set(9.6004e-3f);
    p = vf_fma(p, r, vf_set(5.591689e-2f));
    p = vf_fma(p, r, vf_set(2.4023718e-1f));
    p = vf_fma(p, r, vf_set(6.9312199e-1f));
    p = vf_fma(p, r, vf_set(1.f));
    return vf_scale2(p, n);
}

// Out of line: sixteen calls would cost the products around them their registers.
__attribute__((noinline)) static vf gelu(vf x) {
    float lanes[16];
    vf_store(lanes, x);
    for (float &v : lanes) v = 0.5f * v * (1.f + erff(v * 0.70710678f));
    return vf_load(lanes);
}

static inline vf activate(int kind, vf x) {
    switch (kind) {
    case LLK_SILU:
        return vf_div(x, vf_add(vf_set(1.f), vf_exp(vf_sub(vf_zero(), x))));
    case LLK_GELU_TANH: {  // x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3)) is 0.5 x (1 + tanh(…))
        vf cube = vf_mul(vf_mul(x, x), x);
        vf inner = vf_mul(vf_set(1.5957691216f), vf_fma(vf_set(0.044715f), cube, x));
        return vf_div(x, vf_add(vf_set(1.f), vf_exp(vf_sub(vf_zero(), inner))));
    }
    case LLK_GELU:
        return gelu(x);
    default:
        return vf_max(x, vf_zero());
    }
}

// ------------------------------------------------------------------------------------------ activations

// Calls f with the greatest width of the list that is at most n, as a constant, and returns that width.
template <typename F> static inline int with_width(int n, F &&f) {
#define WIDTH(k)                                                    \
    if (k <= TILE_ROWS && n >= k) {                                 \
        f(std::integral_constant<int, (k <= TILE_ROWS ? k : 1)>()); \
        return k;                                                   \
    }
    WIDTH(16) WIDTH(12) WIDTH(8) WIDTH(6) WIDTH(4) WIDTH(3) WIDTH(2) WIDTH(1)
#undef WIDTH
    return n;
}

// The tile that row `row` of `rows` falls into when they are cut by with_width: its first row and its width.
struct Tile {
    int first, width;
};
static inline Tile tile_of(int row, int rows) {
    Tile tile = {row / TILE_ROWS * TILE_ROWS, TILE_ROWS};
    while (true) {
        tile.width = with_width(rows - tile.first, [](auto) {});
        if (row < tile.first + tile.width) return tile;
        tile.first += tile.width;
    }
}

// Rows prepared for a product with `cols` columns, in the form that the weights' format wants. The rows of a
// tile lie interleaved, so that what a step of the inner loop reads is side by side:
//   q      [cols / 4][width][4] int8; fine: [cols / 4][width] fours of 15 bits, 8 bytes each, see vf_store_15
//   scale  [cols / 32][width] what one of them is worth
//   sum    [cols / 32][width] scale * sum of the group
//   minus  [cols / 32][width] -128 * sum of the group
//   half   [cols / 2][width][2] bfloat16
//   full   [cols][width]
// The tile of first row f begins at f * (its size for one row).
struct Rows {
    int cols;
    int8_t *q;
    float *scale, *sum;
    int32_t *minus;
    uint16_t *half;
    float *full;
};

// What a norm does to a row: (x - mean) * factor * weight + bias, weight and bias [padded] or NULL.
struct Norm {
    const float *weight, *bias;
};
struct RowNorm {
    float mean, factor;
};

static inline RowNorm norm_of(int kind, const float *x, int size, int padded, float epsilon) {
    RowNorm norm = {0, 1};
    if (kind == LLK_LAYER_NORM) {  // behind `size` x is zero
        vf s = vf_zero();
        for (int i = 0; i < padded; i += 16) s = vf_add(s, vf_load(x + i));
        norm.mean = vf_sum(s) / (float)size;
    }
    vf square = vf_zero(), shift = vf_set(norm.mean);
    for (int i = 0; i < padded; i += 16) {
        vf d = vf_between(0, size - i, vf_sub(vf_load(x + i), shift), vf_zero());
        square = vf_fma(d, d, square);
    }
    norm.factor = 1.f / sqrtf(vf_sum(square) / (float)size + epsilon);
    return norm;
}

static inline vf normed(const float *x, const Norm &by, const RowNorm &norm, int i) {
    vf d = vf_mul(vf_sub(vf_load(x + i), vf_set(norm.mean)), vf_set(norm.factor));
    return by.bias ? vf_fma(d, vf_load(by.weight + i), vf_load(by.bias + i)) : vf_mul(d, vf_load(by.weight + i));
}

// Calls f with the format of a matrix and whether it is fine, as constants.
template <typename F> static inline void with_format(const llk_matrix &matrix, F &&f) {
    using std::bool_constant, std::integral_constant;
    switch (matrix.format * 2 + (matrix.format >= LLK_Q8 && matrix.fine)) {
    case LLK_F32 * 2: return f(integral_constant<int, LLK_F32>(), bool_constant<false>());
    case LLK_BF16 * 2: return f(integral_constant<int, LLK_BF16>(), bool_constant<false>());
    case LLK_Q8 * 2: return f(integral_constant<int, LLK_Q8>(), bool_constant<false>());
    case LLK_Q8 * 2 + 1: return f(integral_constant<int, LLK_Q8>(), bool_constant<true>());
    case LLK_Q4 * 2: return f(integral_constant<int, LLK_Q4>(), bool_constant<false>());
    default: return f(integral_constant<int, LLK_Q4>(), bool_constant<true>());
    }
}

// Prepares columns 32 g … 32 g + 31 of one row of a tile, behind its norm if `by` has a weight.
template <int FORMAT, bool FINE>
__attribute__((always_inline)) static inline void prepare_group(const float *x, const Norm &by, const RowNorm &norm, const Rows &to, const Tile &tile,
                                 int lane, int g) {
    const int width = tile.width, begin = g * GROUP, groups = to.cols / GROUP;
    vf a = by.weight ? normed(x, by, norm, begin) : vf_load(x + begin);
    vf b = by.weight ? normed(x, by, norm, begin + 16) : vf_load(x + begin + 16);
    if (FORMAT == LLK_F32) {
        float values[GROUP], *out = to.full + (size_t)tile.first * to.cols + (size_t)begin * width + lane;
        vf_store(values, a);
        vf_store(values + 16, b);
        for (int k = 0; k < GROUP; k++) out[k * width] = values[k];
        return;
    }
    if (FORMAT == LLK_BF16) {
        uint16_t values[GROUP], *out = to.half + (size_t)tile.first * to.cols + (size_t)begin * width + lane * 2;
        vf_store_bf16(values, a);
        vf_store_bf16(values + 16, b);
        for (int k = 0; k < GROUP; k += 2) memcpy(out + k * width, values + k, 4);
        return;
    }
    float most = vf_highest(vf_max(vf_abs(a), vf_abs(b)));
    most = most > 1e-20f ? most : 1e-20f;
    const float range = FINE ? FINE_RANGE : 127.f, scale = most / range;
    vf inverse = vf_set(range / most);
    const vf whole_a = vf_round(vf_mul(a, inverse)), whole_b = vf_round(vf_mul(b, inverse));
    int8_t *out = to.q + (FINE ? 2 : 1) * ((size_t)tile.first * to.cols + (size_t)begin * width + lane * 4);
    if (FINE) {
        vf_store_15(out, 8 * (size_t)width, whole_a);
        vf_store_15(out + 32 * (size_t)width, 8 * (size_t)width, whole_b);
    } else {
        int8_t q[GROUP];
        vf_store_int8(q, whole_a);
        vf_store_int8(q + 16, whole_b);
        for (int k = 0; k < GROUP; k += 4) memcpy(out + k * width, q + k, 4);
    }
    const float total = vf_sum(vf_add(whole_a, whole_b));  // of so few whole numbers it is exact; a NaN stays one
    const size_t place = (size_t)tile.first * groups + (size_t)g * width + lane;
    to.scale[place] = scale;
    to.sum[place] = scale * total;
    to.minus[place] = total == total ? -128 * (int32_t)total : 0;
}

// --------------------------------------------------------------------------------------------- products

static inline size_t block_bytes(int format, int cols) {
    switch (format) {
    case LLK_F32: return (size_t)cols * 64;
    case LLK_BF16: return (size_t)cols * 32;
    case LLK_Q8: return (size_t)(cols / GROUP) * 544;
    default: return (size_t)(cols / GROUP) * 320;
    }
}

// Sums of products of weights with whole numbers of 8 bits or, when they are fine, of 15.
template <int FORMAT, bool FINE> static inline auto no_products() {
    if constexpr (FINE) return v15_zero();
    else if constexpr (FORMAT == LLK_Q4) return vn_zero();
    else return vi_zero();
}
template <int FORMAT, bool FINE> static inline auto start_products(int32_t minus) {
    if constexpr (FORMAT == LLK_Q4) return no_products<FORMAT, FINE>();
    else if constexpr (FINE) return v15_start_q8(minus);
    else return q8_start(minus);
}
template <int FORMAT, bool FINE, typename Sum> static inline Sum add_products(Sum sum, vb weight, const int8_t *x) {
    if constexpr (FINE) return FORMAT == LLK_Q4 ? dot15_nibbles(sum, weight, x) : dot15_q8(sum, weight, x);
    else if constexpr (FORMAT == LLK_Q4) return dot_nibbles(sum, weight, x);
    else return dot_q8(sum, weight, x);
}

// out[m] = the 16 outputs of a block of weights for row first + m of a tile of M rows.
template <int FORMAT, bool FINE, int M>
static __attribute__((noinline)) void product(const uint8_t *w, const Rows &x, int first, vf *out) {
    const int cols = x.cols, groups = cols / GROUP;
    vf acc[M];
    const auto done = [&] { UNROLL for (int m = 0; m < M; m++) out[m] = acc[m]; };
    UNROLL for (int m = 0; m < M; m++) acc[m] = vf_zero();
    if (FORMAT == LLK_F32) {
        const float *rows = x.full + (size_t)first * cols;
        for (int k = 0; k < cols; k++, rows += M) {
            vf weight = vf_load((const float *)w + k * 16);
            UNROLL for (int m = 0; m < M; m++) acc[m] = vf_fma(weight, vf_set(rows[m]), acc[m]);
        }
        return done();
    }
    if (FORMAT == LLK_BF16) {
        const uint16_t *rows = x.half + (size_t)first * cols;
        for (int k = 0; k < cols; k += 2, rows += 2 * M) {
            vb weight = vb_load(w + k * 32);
            fetch(w + k * 32 + 2048);
            UNROLL for (int m = 0; m < M; m++) acc[m] = dot_bf16(acc[m], weight, rows + 2 * m);
        }
        return done();
    }
    constexpr int FOUR = FINE ? 8 : 4;  // bytes of four columns of a row
    const int8_t *q = x.q + FOUR / 4 * (size_t)first * cols;
    const float *scale = x.scale + (size_t)first * groups, *sum = x.sum + (size_t)first * groups;
    const int32_t *minus = x.minus + (size_t)first * groups;
    for (int g = 0; g < groups; g++, q += FOUR / 4 * GROUP * M, scale += M, sum += M, minus += M) {
        vb weight[8];
        vf d, least;
        if (FORMAT == LLK_Q4) {
            UNROLL for (int j = 0; j < 4; j++) {
                vb both = vb_load(w + j * 64);
                weight[j] = vb_low(both);
                weight[4 + j] = vb_high(both);
            }
            d = vf_load_f16((const uint16_t *)(w + 256));
            least = vf_load_f16((const uint16_t *)(w + 288));
            UNROLL for (int j = 0; j < 5; j++) fetch(w + 320 * 8 + 64 * j);
            w += 320;
        } else {
            UNROLL for (int j = 0; j < 8; j++) weight[j] = FINE ? vb_load(w + j * 64) : vb_load_q8(w + j * 64);
            d = vf_load_f16((const uint16_t *)(w + 512));
            UNROLL for (int j = 0; j < 9; j++) fetch(w + 544 * 6 + 64 * j);
            w += 544;
        }
        // Rows abreast share what is read of the weights. Few rows of 8 bits take two sums each, side by side, which hides
        // the latency; of whole numbers the sum is the same.
        constexpr int A = M % ABREAST ? 1 : ABREAST;
        constexpr bool two = !FINE && M < 4 && A == 1;
        UNROLL for (int m = 0; m < M; m += A) {
            auto other = no_products<FORMAT, FINE>();
            decltype(other) dots[A];
            UNROLL for (int a = 0; a < A; a++) dots[a] = start_products<FORMAT, FINE>(minus[m + a]);
            UNROLL for (int j = 0; j < 8; j++) UNROLL for (int a = 0; a < A; a++) {
                auto &dot = two && j >= 4 ? other : dots[a];
                dot = add_products<FORMAT, FINE>(dot, weight[j], q + (j * M + m + a) * FOUR);
            }
            UNROLL for (int a = 0; a < A; a++) {
                vi dot = whole(dots[a]);
                if (two) dot = vi_add(dot, whole(other));
                acc[m + a] = vf_fma(vf_mul(vi_float(dot), vf_set(scale[m + a])), d, acc[m + a]);
                if (FORMAT == LLK_Q4) acc[m + a] = vf_fma(least, vf_set(sum[m + a]), acc[m + a]);
            }
        }
    }
    done();
}

// The same for two blocks, w0 and w1, and M rows from `lane` of a tile of WIDTH rows: what is read of the rows
// serves both blocks.
template <int FORMAT, bool FINE, int M, int WIDTH>
static inline void product_pair(const uint8_t *w0, const uint8_t *w1, const Rows &x, int first, int lane, vf *acc0, vf *acc1) {
    const int cols = x.cols, groups = cols / GROUP;
    constexpr int PLANES = FINE ? 2 : 1, BYTES = FORMAT == LLK_Q4 ? 320 : 544;
    const size_t next = 2 * (size_t)groups * BYTES;
    const int8_t *q = x.q + PLANES * ((size_t)first * cols + 4 * lane);
    const size_t place = (size_t)first * groups + lane;
    const float *scale = x.scale + place, *sum = x.sum + place;
    const int32_t *minus = x.minus + place;
    UNROLL for (int m = 0; m < M; m++) acc0[m] = acc1[m] = vf_zero();
    for (int g = 0; g < groups; g++, q += PLANES * GROUP * WIDTH, scale += WIDTH, sum += WIDTH, minus += WIDTH, w0 += BYTES, w1 += BYTES) {
        vi dot0[M], dot1[M];
        v15 fine0[M], fine1[M];
        UNROLL for (int m = 0; m < M; m++) {
            if (FINE) fine0[m] = fine1[m] = FORMAT == LLK_Q4 ? v15_zero() : v15_start_q8(minus[m]);
            else dot0[m] = dot1[m] = FORMAT == LLK_Q4 ? vi_zero() : q8_start(minus[m]);
        }
        const auto both = [&](vb weight0, vb weight1, int j) {
            UNROLL for (int m = 0; m < M; m++) {
                const int8_t *at = q + PLANES * (j * WIDTH + m) * 4;
                if (FINE) {
                    fine0[m] = FORMAT == LLK_Q4 ? dot15_nibbles(fine0[m], weight0, at) : dot15_q8(fine0[m], weight0, at);
                    fine1[m] = FORMAT == LLK_Q4 ? dot15_nibbles(fine1[m], weight1, at) : dot15_q8(fine1[m], weight1, at);
                } else {
                    dot0[m] = FORMAT == LLK_Q4 ? dot_nibbles(dot0[m], weight0, at) : dot_q8(dot0[m], weight0, at);
                    dot1[m] = FORMAT == LLK_Q4 ? dot_nibbles(dot1[m], weight1, at) : dot_q8(dot1[m], weight1, at);
                }
            }
        };
        const auto bytes = [](const uint8_t *at) { return FINE ? vb_load(at) : vb_load_q8(at); };
        if (FORMAT == LLK_Q4) {
            UNROLL for (int j = 0; j < 4; j++) {
                vb b0 = vb_load(w0 + j * 64), b1 = vb_load(w1 + j * 64);
                both(vb_low(b0), vb_low(b1), j);
                both(vb_high(b0), vb_high(b1), 4 + j);
            }
        } else {
            UNROLL for (int j = 0; j < 8; j++) both(bytes(w0 + j * 64), bytes(w1 + j * 64), j);
        }
        if (first + lane == 0)  // the next pair of blocks, while this one is used for the first time
            UNROLL for (int j = 0; j < (BYTES + 63) / 64; j++) {
                fetch(w0 + next + 64 * j);
                fetch(w1 + next + 64 * j);
            }
        constexpr int SCALES = FORMAT == LLK_Q4 ? 256 : 512;
        vf d0 = vf_load_f16((const uint16_t *)(w0 + SCALES)), d1 = vf_load_f16((const uint16_t *)(w1 + SCALES)), least0, least1;
        if (FORMAT == LLK_Q4) {
            least0 = vf_load_f16((const uint16_t *)(w0 + 288));
            least1 = vf_load_f16((const uint16_t *)(w1 + 288));
        }
        UNROLL for (int m = 0; m < M; m++) {
            if (FINE) dot0[m] = whole(fine0[m]), dot1[m] = whole(fine1[m]);
            vf by = vf_set(scale[m]);
            acc0[m] = vf_fma(vf_mul(vi_float(dot0[m]), by), d0, acc0[m]);
            acc1[m] = vf_fma(vf_mul(vi_float(dot1[m]), by), d1, acc1[m]);
            if (FORMAT == LLK_Q4) {
                vf with = vf_set(sum[m]);
                acc0[m] = vf_fma(least0, with, acc0[m]);
                acc1[m] = vf_fma(least1, with, acc1[m]);
            }
        }
    }
}

// A tile of `reduce`: ranks of A, and rows that share an adapter.
static constexpr int RANKS = 4, REDUCED_ROWS = TILE_ROWS >= 16 ? 4 : 1;

static inline vf lora_load(const float *p) { return vf_load(p); }
static inline vf lora_load(const uint16_t *p) { return vf_load_bf16(p); }
static inline vf lora_load(const int8_t *p) { return vf_load_int8(p); }

// Calls f with a number of the type that an adapter consists of.
template <typename F> static inline auto with_lora_type(const llk_lora &lora, F &&f) {
    switch (lora.format) {
    case LLK_F32: return f(float());
    case LLK_BF16: return f(uint16_t());
    default: return f(int8_t());
    }
}

// to[m][0 … RANKS-1] = scale * A x for row m of M, behind its norm if `by` has a weight; `a` is four ranks of A.
template <int M, typename T>
static inline void reduce(const T *a, const float *scale, int cols, const float *const *x, const Norm &by, const RowNorm *norms, float *const *to) {
    vf acc[M][RANKS];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int k = 0; k < RANKS; k++) acc[m][k] = vf_zero();
    for (int i = 0; i < cols; i += 16, a += 16 * RANKS) {
        vf row[M];
        UNROLL for (int m = 0; m < M; m++) row[m] = by.weight ? normed(x[m], by, norms[m], i) : vf_load(x[m] + i);
        UNROLL for (int j = 0; j < (int)sizeof(T); j++) fetch((const uint8_t *)a + 4096 + 64 * j);
        UNROLL for (int k = 0; k < RANKS; k++) {
            const vf weight = lora_load(a + 16 * k);
            UNROLL for (int m = 0; m < M; m++) acc[m][k] = vf_fma(weight, row[m], acc[m][k]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int k = 0; k < RANKS; k++) to[m][k] = scale[k] * vf_sum(acc[m][k]);
}

// What adapters add to a product: `reduced` [rows][LLK_MOST_RANKS] is A x, `adapters` [rows] are NULL for rows without
// one; `which` is the place of the matrix in them.
struct Additions {
    const llk_lora *const *adapters;
    const float *reduced;
    int which;
};

// value + B reduced for the `count` ranks of a block. The rows of a batch may each read another adapter, more streams
// than the processor foresees: what is needed some blocks later is fetched (a hundredth to a thirtieth of a step).
static constexpr int AHEAD = 4;
template <typename T> static inline vf expand(const T *b, const float *reduced, int count, vf value) {
    for (int k = 0; k < count; k++) {
        if (k * sizeof(T) % 4 == 0) fetch(b + 16 * (k + AHEAD * count));
        value = vf_fma(lora_load(b + 16 * k), vf_set(reduced[k]), value);
    }
    return value;
}

// Out of line: rows without adapters, and the registers of their products, are not to feel it.
__attribute__((noinline)) static vf add_lora(const Additions &more, int row, int block, vf value) {
    if (!more.adapters[row]) return value;
    const llk_lora &lora = more.adapters[row][more.which];
    if (!lora.ranks) return value;
    const int place = lora.place[block], count = lora.place[block + 1] - place;
    const float *reduced = more.reduced + (size_t)row * LLK_MOST_RANKS + lora.first[block];
    return with_lora_type(lora, [&](auto type) {
        return expand((const decltype(type) *)lora.b + 16 * (size_t)place, reduced, count, value);
    });
}

enum Store { STORE_PLAIN, STORE_ADD, STORE_ACTIVATED, STORE_GATED };

struct Output {
    float *to;
    int stride;
    Store how;
    int activation;
    const Additions *more = nullptr;
};

static inline void store_row(const llk_matrix &matrix, const Output &out, int row, int block, vf value) {
    float *to = out.to + (size_t)row * out.stride + block * 16;
    if (matrix.bias) value = vf_add(value, vf_load(matrix.bias + block * 16));
    if (out.more) value = add_lora(*out.more, row, block, value);
    if (out.how == STORE_ADD) value = vf_add(value, vf_load(to));
    if (out.how == STORE_ACTIVATED) value = activate(out.activation, value);
    vf_store(to, value);
}

static inline void store_pair(const llk_matrix &matrix, const Output &out, int row, int block, vf first, vf second) {
    if (out.how != STORE_GATED) {
        store_row(matrix, out, row, block, first);
        store_row(matrix, out, row, block + 1, second);
        return;
    }
    if (matrix.bias) {
        first = vf_add(first, vf_load(matrix.bias + block * 16));
        second = vf_add(second, vf_load(matrix.bias + block * 16 + 16));
    }
    if (out.more) {
        first = add_lora(*out.more, row, block, first);
        second = add_lora(*out.more, row, block + 1, second);
    }
    vf_store(out.to + (size_t)row * out.stride + block / 2 * 16, vf_mul(activate(out.activation, first), second));
}

#ifdef __AMX_INT8__
#include "amx.h"
#else
static inline bool tiles_usable() { return true; }
static inline void find_units(const llk_matrix &, float *) {}
static inline void prepare_tiled(const float *, const Norm &, const RowNorm &, const Rows &, int, int) {}
static inline void multiply_tiles(const llk_matrix &, const Rows &, int, const Output &, int, int) {}
#endif

// Blocks `block` and, if `pair`, `block` + 1 for a tile of M rows.
template <int FORMAT, bool FINE, int M>
static inline void rows_of_blocks(const llk_matrix &matrix, const Rows &x, int first, int block, bool pair, const Output &out) {
    const size_t bytes = block_bytes(FORMAT, x.cols);
    const uint8_t *w = (const uint8_t *)matrix.data + bytes * (size_t)block;
    if constexpr (FORMAT >= LLK_Q8 && M >= 4 && TILE_ROWS == 16) {
        if (pair) {
            // As many rows as leave both blocks' sums in registers.
            constexpr int PART = M == 16 ? 8 : M;
            for (int lane = 0; lane < M; lane += PART) {
                vf acc0[PART], acc1[PART];
                product_pair<FORMAT, FINE, PART, M>(w, w + bytes, x, first, lane, acc0, acc1);
                for (int m = 0; m < PART; m++) store_pair(matrix, out, first + lane + m, block, acc0[m], acc1[m]);
            }
            return;
        }
    }
    vf acc[M], other[M];
    product<FORMAT, FINE, M>(w, x, first, acc);
    if (pair) product<FORMAT, FINE, M>(w + bytes, x, first, other);
    for (int m = 0; m < M; m++) {
        if (pair) store_pair(matrix, out, first + m, block, acc[m], other[m]);
        else store_row(matrix, out, first + m, block, acc[m]);
    }
}

template <int FORMAT, bool FINE>
static void multiply_as(const llk_matrix &matrix, const Rows &x, int rows, const Output &out, int begin, int end) {
    for (int block = begin; block < end; block += 2)
        for (int first = 0; first < rows;)
            first += with_width(rows - first, [&](auto width) {
                rows_of_blocks<FORMAT, FINE, decltype(width)::value>(matrix, x, first, block, block + 1 < end, out);
            });
}

// Blocks begin … end-1 of the matrix times all rows.
static void multiply(const llk_matrix &matrix, const Rows &x, int rows, const Output &out, int begin, int end) {
    if (is_tiled(matrix)) return multiply_tiles(matrix, x, rows, out, begin, end);
    with_format(matrix, [&](auto format, auto fine) {
        multiply_as<decltype(format)::value, decltype(fine)::value>(matrix, x, rows, out, begin, end);
    });
}

// One row of the embedding, unpacked.
static inline float half_to_float(uint16_t h) {
    uint16_t sixteen[16] = {h};
    float lanes[16];
    vf_store(lanes, vf_load_f16(sixteen));
    return lanes[0];
}
static void unpack_row(const llk_matrix &matrix, int row, float *x) {
    const int cols = matrix.cols, lane = row % 16;
    const uint8_t *w = (const uint8_t *)matrix.data + block_bytes(matrix.format, cols) * (size_t)(row / 16);
    switch (matrix.format) {
    case LLK_F32:
        for (int k = 0; k < cols; k++) x[k] = ((const float *)w)[k * 16 + lane];
        return;
    case LLK_BF16:
        for (int k = 0; k < cols; k++) {
            uint32_t bits = (uint32_t)((const uint16_t *)w)[(k / 2 * 16 + lane) * 2 + (k & 1)] << 16;
            memcpy(x + k, &bits, 4);
        }
        return;
    case LLK_Q8:
        for (int g = 0; g < cols / GROUP; g++, w += 544) {
            float d = half_to_float(((const uint16_t *)(w + 512))[lane]);
            for (int k = 0; k < GROUP; k++) x[g * GROUP + k] = d * (float)((int)w[k / 4 * 64 + lane * 4 + k % 4] - 128);
        }
        return;
    default:
        for (int g = 0; g < cols / GROUP; g++, w += 320) {
            float d = half_to_float(((const uint16_t *)(w + 256))[lane]);
            float least = half_to_float(((const uint16_t *)(w + 288))[lane]);
            for (int k = 0; k < GROUP; k++) {
                int byte = w[k % 16 / 4 * 64 + lane * 4 + k % 4];
                x[g * GROUP + k] = d * (float)(k < 16 ? byte & 15 : byte >> 4) + least;
            }
        }
    }
}

// -------------------------------------------------------------------------------------------- attention

// A tile holds the 16 positions of a block for one KV head: keys by dimension, values by position.
//   F32   K [head_dim][16]        V [16][head_dim]
//   BF16  K [head_dim / 2][16][2] V [8][head_dim][2]
//   INT8  K [head_dim / 4][16][4] as value+128, V [4][head_dim][4], 16 scales of K, 16 scales of V (float)
static inline size_t tile_bytes(int kv_format, int head_dim) {
    switch (kv_format) {
    case LLK_KV_F32: return (size_t)head_dim * 128;
    case LLK_KV_BF16: return (size_t)head_dim * 64;
    default: return (size_t)head_dim * 32 + 128;
    }
}

static inline float quantise_head(const float *x, int size, int8_t *q) {
    vf most = vf_zero();
    for (int i = 0; i < size; i += 16) most = vf_max(most, vf_abs(vf_load(x + i)));
    float top = vf_highest(most);
    top = top > 1e-20f ? top : 1e-20f;
    vf inverse = vf_set(127.f / top);
    for (int i = 0; i < size; i += 16) vf_store_int8(q + i, vf_mul(vf_load(x + i), inverse));
    return top / 127.f;
}

static inline void write_key(int kv_format, int head_dim, uint8_t *tile, int place, const float *k) {
    if (kv_format == LLK_KV_F32) {
        for (int d = 0; d < head_dim; d++) ((float *)tile)[d * 16 + place] = k[d];
    } else if (kv_format == LLK_KV_BF16) {
        uint16_t rounded[16];
        for (int d = 0; d < head_dim; d += 16) {
            vf_store_bf16(rounded, vf_load(k + d));
            for (int i = 0; i < 16; i += 2) memcpy(tile + ((d + i) / 2 * 16 + place) * 4, rounded + i, 4);
        }
    } else {
        int8_t q[512];
        ((float *)(tile + (size_t)head_dim * 32))[place] = quantise_head(k, head_dim, q);
        for (int d = 0; d < head_dim; d += 4) {
            uint32_t four;
            memcpy(&four, q + d, 4);
            four ^= 0x80808080;  // + 128
            memcpy(tile + d * 16 + place * 4, &four, 4);
        }
    }
}

static inline void write_value(int kv_format, int head_dim, uint8_t *tile, int place, const float *v) {
    if (kv_format == LLK_KV_F32) {
        memcpy((float *)tile + (size_t)head_dim * 16 + (size_t)place * head_dim, v, (size_t)head_dim * 4);
    } else if (kv_format == LLK_KV_BF16) {
        uint16_t rounded[16], *to = (uint16_t *)(tile + (size_t)head_dim * 32) + (size_t)(place / 2) * head_dim * 2;
        for (int d = 0; d < head_dim; d += 16) {
            vf_store_bf16(rounded, vf_load(v + d));
            for (int i = 0; i < 16; i++) to[(d + i) * 2 + place % 2] = rounded[i];
        }
    } else {
        int8_t q[512], *to = (int8_t *)tile + (size_t)head_dim * 16 + (size_t)(place / 4) * head_dim * 4;
        ((float *)(tile + (size_t)head_dim * 32))[16 + place] = quantise_head(v, head_dim, q);
        for (int d = 0; d < head_dim; d++) to[d * 4 + place % 4] = q[d];
    }
}

// Queries of one sequence and KV head in the form that the cache's format wants, interleaved by tiles as Rows.
struct Queries {
    int count;
    float *full;     // [head_dim][width]
    uint16_t *half;  // [head_dim / 2][width][2]
    int8_t *q;       // [head_dim / 4][width][4]
    float scale[TILE_ROWS];
    int32_t minus[TILE_ROWS];
    int first[TILE_ROWS], end[TILE_ROWS];  // the positions that a query sees
};

static inline void prepare_query(int kv_format, int head_dim, Queries &to, int row, const float *x) {
    const Tile tile = tile_of(row, to.count);
    const int width = tile.width, lane = row - tile.first, base = tile.first * head_dim;
    if (kv_format == LLK_KV_F32) {
        for (int d = 0; d < head_dim; d++) to.full[base + d * width + lane] = x[d];
    } else if (kv_format == LLK_KV_BF16) {
        uint16_t pairs[16];
        for (int d = 0; d < head_dim; d += 16) {
            vf_store_bf16(pairs, vf_load(x + d));
            for (int k = 0; k < 16; k += 2) memcpy(to.half + base + (d + k) * width + lane * 2, pairs + k, 4);
        }
    } else {
        int8_t q[512];
        to.scale[row] = quantise_head(x, head_dim, q);
        int32_t total = 0;
        for (int d = 0; d < head_dim; d++) total += q[d];
        for (int d = 0; d < head_dim; d += 4) memcpy(to.q + base + d * width + lane * 4, q + d, 4);
        to.minus[row] = -128 * total;
    }
}

// A softmax over some positions, not yet divided: its greatest score, the sum of its weights relative to
// that, and the weighted sum of values [head_dim]. `sum` 0: no position was seen.
struct Partial {
    float most, sum;
    float *values;
};

static inline void merge(Partial &into, const Partial &next, int head_dim) {
    if (next.sum == 0) return;
    if (into.sum == 0) {
        into.most = next.most, into.sum = next.sum;
        memcpy(into.values, next.values, (size_t)head_dim * 4);
        return;
    }
    const float apart = next.most - into.most;
    if (apart > 0) {
        const float a = expf(-apart);
        into.most = next.most;
        into.sum = fmaf(into.sum, a, next.sum);
        for (int d = 0; d < head_dim; d += 16)
            vf_store(into.values + d, vf_fma(vf_load(into.values + d), vf_set(a), vf_load(next.values + d)));
    } else {
        const float b = expf(apart);
        into.sum = fmaf(next.sum, b, into.sum);
        for (int d = 0; d < head_dim; d += 16)
            vf_store(into.values + d, vf_fma(vf_load(next.values + d), vf_set(b), vf_load(into.values + d)));
    }
}

// The cache of one layer at one KV head, for one sequence. `stride`: bytes from block to block.
struct Context {
    const uint8_t *tiles;
    size_t stride;
    const int32_t *blocks;
    int head_dim;
    const uint8_t *tile(int block) const { return tiles + stride * (size_t)blocks[block]; }
};

// Scores of the queries from … from+R-1, a tile, with blocks first … first+N-1. Several blocks at once only so
// that their sums can run side by side.
template <int KV, int R, int N>
static inline void score_blocks(const Context &at, const Queries &query, int from, int first, vf (*s)[R]) {
    const int head_dim = at.head_dim;
    const uint8_t *tile[N];
    UNROLL for (int n = 0; n < N; n++) tile[n] = at.tile(first + n);
    if (KV == LLK_KV_F32) {
        const float *x = query.full + from * head_dim;
        UNROLL for (int n = 0; n < N; n++) UNROLL for (int r = 0; r < R; r++) s[n][r] = vf_zero();
        for (int d = 0; d < head_dim; d++, x += R)
            UNROLL for (int n = 0; n < N; n++) {
                vf key = vf_load((const float *)tile[n] + d * 16);
                UNROLL for (int r = 0; r < R; r++) s[n][r] = vf_fma(key, vf_set(x[r]), s[n][r]);
            }
    } else if (KV == LLK_KV_BF16) {
        const uint16_t *x = query.half + from * head_dim;
        UNROLL for (int n = 0; n < N; n++) UNROLL for (int r = 0; r < R; r++) s[n][r] = vf_zero();
        for (int d = 0; d < head_dim; d += 2, x += 2 * R)
            UNROLL for (int n = 0; n < N; n++) {
                vb key = vb_load(tile[n] + d * 32);
                UNROLL for (int r = 0; r < R; r++) s[n][r] = dot_bf16(s[n][r], key, x + 2 * r);
            }
    } else {
        const int8_t *x = query.q + from * head_dim;
        vi dot[N][R];
        UNROLL for (int n = 0; n < N; n++) UNROLL for (int r = 0; r < R; r++) dot[n][r] = q8_start(query.minus[from + r]);
        for (int d = 0; d < head_dim; d += 4, x += 4 * R)
        {
            vb key[N];
            UNROLL for (int n = 0; n < N; n++) key[n] = vb_load_q8(tile[n] + d * 16);
            UNROLL for (int r = 0; r < R; r++) {
                UNROLL for (int n = 0; n < N; n++) dot[n][r] = dot_q8(dot[n][r], key[n], x + 4 * r);
                LOAD_LATE();
            }
        }
        UNROLL for (int n = 0; n < N; n++) {
            vf scales = vf_load((const float *)(tile[n] + (size_t)head_dim * 32));
            UNROLL for (int r = 0; r < R; r++) s[n][r] = vf_mul(vi_float(dot[n][r]), vf_mul(scales, vf_set(query.scale[from + r])));
        }
    }
}

// Weights of the positions of a chunk for R queries, in the form that the values' format wants: float; bfloat16;
// whole numbers of 15 bits by fours, see vf_store_15, with what one of them is worth.
template <int KV, int R> struct Weights {
    alignas(64) float full[R][CHUNK];
    alignas(64) uint16_t half[KV == LLK_KV_BF16 ? R : 1][CHUNK];
    alignas(64) int8_t fours[KV == LLK_KV_INT8 ? R : 1][CHUNK * 2];
    float step[R];
};

// Columns i … i + 16 N - 1 of the weighted sums of the values of `count` blocks from `first`.
template <int KV, int R, int N>
static inline void sum_values(const Context &at, const Weights<KV, R> &weights, int first, int count, int i, Partial *out) {
    const int head_dim = at.head_dim;
    vf acc[N][R];
    v15 sums[N][R];
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int r = 0; r < R; r++) {
        if (KV == LLK_KV_INT8) sums[n][r] = v15_zero();
        else acc[n][r] = vf_zero();
    }
    for (int b = 0; b < count; b++) {
        const uint8_t *tile = at.tile(first + b);
        if (KV == LLK_KV_F32) {
            const float *values = (const float *)tile + (size_t)head_dim * 16 + i;
            for (int t = 0; t < 16; t++, values += head_dim)
                UNROLL for (int n = 0; n < N; n++) {
                    vf value = vf_load(values + 16 * n);
                    UNROLL for (int r = 0; r < R; r++) acc[n][r] = vf_fma(value, vf_set(weights.full[r][b * 16 + t]), acc[n][r]);
                }
        } else if (KV == LLK_KV_BF16) {
            const uint8_t *values = tile + (size_t)head_dim * 32 + i * 4;
            for (int t = 0; t < 8; t++, values += head_dim * 4)
                UNROLL for (int n = 0; n < N; n++) {
                    vb value = vb_load(values + 64 * n);
                    UNROLL for (int r = 0; r < R; r++) acc[n][r] = dot_bf16(acc[n][r], value, &weights.half[r][b * 16 + 2 * t]);
                }
        } else {
            const uint8_t *values = tile + (size_t)head_dim * 16 + i * 4;
            for (int t = 0; t < 4; t++, values += head_dim * 4)
            {
                vb value[N];
                UNROLL for (int n = 0; n < N; n++) value[n] = vb_load(values + 64 * n);
                UNROLL for (int r = 0; r < R; r++) {
                    UNROLL for (int n = 0; n < N; n++) sums[n][r] = dot15_values(sums[n][r], value[n], &weights.fours[r][b * 32 + 8 * t]);
                    LOAD_LATE();
                }
            }
        }
    }
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int r = 0; r < R; r++) {
        if (KV == LLK_KV_INT8)
            acc[n][r] = vf_mul(vi_float(whole(sums[n][r])), vf_set(weights.step[r]));
        vf_store(out[r].values + i + 16 * n, acc[n][r]);
    }
}

// The queries from … from+R-1, a tile, over positions begin … end-1, begin a multiple of CHUNK and
// end - begin <= CHUNK.
template <int KV, int R>
static void attend_chunk(const Context &at, const Queries &query, int from, int begin, int end, Partial *out) {
    // Sums that run side by side hide each other's latency, and what is read of the queries serves all.
    constexpr int N = TILE_ROWS < 16 ? 1 : R <= 6 ? 4 : R <= 12 ? 2 : 1;
    const int first = begin / BLOCK_TOKENS, count = (end - begin + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const size_t bytes = tile_bytes(KV, at.head_dim);
    Weights<KV, R> weights;
    bool whole[R];  // whether a query sees all of these positions
    for (int r = 0; r < R; r++) whole[r] = query.first[from + r] <= begin && query.end[from + r] >= begin + count * BLOCK_TOKENS;
    const auto seen = [&](int r, int b, vf yes, vf no) {
        const int place = begin + b * BLOCK_TOKENS;
        return whole[r] ? yes : vf_between(query.first[from + r] - place, query.end[from + r] - place, yes, no);
    };
    for (int b = 0; b < count;) {
        for (int ahead = b + N; ahead < imin(count, b + 2 * N); ahead++)
            for (size_t i = 0; i < bytes; i += 64) fetch_far(at.tile(first + ahead) + i);
        vf s[N][R];
        const int many = count - b >= N ? N : 1;
        if (many == N) score_blocks<KV, R, N>(at, query, from, first + b, s);
        else score_blocks<KV, R, 1>(at, query, from, first + b, s);
        for (int n = 0; n < many; n++, b++)
            UNROLL for (int r = 0; r < R; r++) vf_store(&weights.full[r][b * 16], seen(r, b, s[n][r], vf_set(HIDDEN_SCORE)));
    }
    for (int r = 0; r < R; r++) {
        vf most = vf_set(HIDDEN_SCORE);
        for (int b = 0; b < count; b++) most = vf_max(most, vf_load(&weights.full[r][b * 16]));
        out[r].most = vf_highest(most);
    }
    vf scales[CHUNK / BLOCK_TOKENS];  // of the values
    if (KV == LLK_KV_INT8)
        for (int b = 0; b < count; b++) scales[b] = vf_load((const float *)(at.tile(first + b) + (size_t)at.head_dim * 32) + 16);
    float heaviest[R];
    for (int r = 0; r < R; r++) {
        float *row = weights.full[r];
        vf top = vf_set(out[r].most), sum = vf_zero(), heavy = vf_zero();
        const auto weigh = [&](int b, auto mask) {
            vf x = vf_sub(vf_load(row + b * 16), top);
            vf p = mask(KV == LLK_KV_F32 ? vf_exp(x) : vf_exp_coarse(x));
            sum = vf_add(sum, p);
            if (KV == LLK_KV_BF16) vf_store_bf16(&weights.half[r][b * 16], p);
            if (KV == LLK_KV_INT8) {  // the values' scales go into the weights; what lies beyond the end may be anything
                p = mask(vf_mul(p, scales[b]));
                heavy = vf_max(heavy, p);
            }
            if (KV != LLK_KV_BF16) vf_store(row + b * 16, p);
        };
        if (whole[r]) for (int b = 0; b < count; b++) weigh(b, [](vf p) { return p; });
        else for (int b = 0; b < count; b++) weigh(b, [&](vf p) { return seen(r, b, p, vf_zero()); });
        out[r].sum = vf_sum(sum);
        if (KV == LLK_KV_INT8) heaviest[r] = vf_highest(heavy);
    }
    if (KV == LLK_KV_INT8)
        for (int r = 0; r < R; r++) {
            const float most = heaviest[r] > 1e-30f ? heaviest[r] : 1e-30f;
            weights.step[r] = most / FINE_RANGE;
            const vf factor = vf_set(FINE_RANGE / most);
            for (int b = 0; b < count; b++) vf_store_15(&weights.fours[r][b * 32], 8, vf_mul(vf_load(&weights.full[r][b * 16]), factor));
        }
    int i = 0;
    for (; i + 16 * N <= at.head_dim; i += 16 * N) sum_values<KV, R, N>(at, weights, first, count, i, out);
    for (; i < at.head_dim; i += 16) sum_values<KV, R, 1>(at, weights, first, count, i, out);
}

// All queries over one chunk of positions.
static void attend(int kv_format, const Context &at, const Queries &query, int begin, int end, Partial *out) {
    for (int from = 0; from < query.count;)
        from += with_width(query.count - from, [&](auto width) {
            constexpr int R = decltype(width)::value;
            switch (kv_format) {
            case LLK_KV_F32: return attend_chunk<LLK_KV_F32, R>(at, query, from, begin, end, out + from);
            case LLK_KV_BF16: return attend_chunk<LLK_KV_BF16, R>(at, query, from, begin, end, out + from);
            default: return attend_chunk<LLK_KV_INT8, R>(at, query, from, begin, end, out + from);
            }
        });
}
