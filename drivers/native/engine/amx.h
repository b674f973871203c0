// Products with 4-bit weights on the tile registers of AMX: sixteen rows of activations by sixteen output channels an
// instruction. Included by kernels.h behind `store_pair`.
//
// A tile's sums come out through memory, so a scale every 32 columns would cost more than the product. Here a row of weights
// has one unit, see find_units, in which scales and minima are whole, w = a * nibble + b; a row of activations has one scale
// and whole numbers. Both are cut into bytes, x = 16 * x.high + x.low and w = 16 * w.high + w.low, and summed as
//   x.high * 16 * w.high + x.low * w.high + x.high * w.low
// What is left out, x.low * w.low / 16, is small and as often above zero as below, as w.low lies around zero. Sums of whole
// numbers are exact in any order, so a few rows, for which tiles do not pay, get the same from vector instructions, without
// unpacking weights.
//
// The tiles' unit works by itself, 16 cycles a product, while vectors unpack the weights that come next. What limits both is the
// nearest cache: bytes of weights are kept where they are used up next, and what does not fit costs more than any product.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

static constexpr int TILE_BYTES = 1024;
static constexpr int STRETCH = 9;      // pairs of groups that are unpacked at a time for many rows,
static constexpr int SHORT = 4;        // … and for up to 16, which use them once
static constexpr int MOST_TILES = 32;  // of rows that use what was unpacked
static constexpr int TILED_ROWS = 5;   // so many rows make tiles worth while

typedef uint8_t TileMemory[TILE_BYTES];  // [16][64]

// gcc's own functions do not tell it what of the memory they read and write. Tiles are numbered by constants.
template <int T> static inline void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T> static inline void tile_load(const void *from) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(from), "r"(64l), "i"(T), "m"(*(const TileMemory *)from));
}
template <int T> static inline void tile_store(void *to) {
    __asm__ volatile("tilestored %%tmm%c3, (%1,%2)" : "=m"(*(TileMemory *)to) : "r"(to), "r"(64l), "i"(T));
}
template <int SUM, int X, int W> static inline void tile_multiply() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}

static inline void fetch_to_write(const void *p) { __asm__ volatile("prefetchw (%0)" : : "r"(p)); }

// Tiles of weights have 16 rows of 64 bytes, those of activations and sums as many as there are, up to 16.
struct TileScope {
    explicit TileScope(int most) {
        const uint8_t n = (uint8_t)imin(most, 16);
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; i++) shape.rows[i] = i < 6 ? n : 16;
        __asm__ volatile("ldtilecfg %0" : : "m"(shape));
    }
    ~TileScope() { __asm__ volatile("tilerelease"); }
};

// Whether the operating system lets this process use the tiles; it does after it was asked once.
static inline bool tiles_usable() {
    constexpr long REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
}

static constexpr float WEIGHT_RANGE = 1900;  // w.high stays a byte: w.low may be 121

// The greatest number of a row: 16 * 127 + 7, and no sum may exceed 31 bits.
static inline float row_range(int cols) { return fminf(2039.f, floorf(17.0e6f / (float)cols)); }

// The units of the rows of a Q4 matrix, and behind them their inverses, into `to` [2][rows].
static void find_units(const llk_matrix &matrix, float *to) {
    for (int block = 0; block < matrix.rows / 16; block++) {
        const uint8_t *w = (const uint8_t *)matrix.data + block_bytes(LLK_Q4, matrix.cols) * (size_t)block;
        vf most = vf_set(1e-20f), sound = vf_zero();
        for (int g = 0; g < matrix.cols / GROUP; g++, w += 320) {
            const vf least = vf_load_f16((const uint16_t *)(w + 288)), last = vf_fma(vf_load_f16((const uint16_t *)(w + 256)), vf_set(15.f), least);
            most = vf_max(most, vf_max(vf_abs(least), vf_abs(last)));
            sound = vf_fma(vf_sub(last, least), vf_zero(), sound);
        }
        most = vf_add(most, sound);  // a NaN stays one
        vf_store(to + block * 16, vf_mul(most, vf_set(1.f / WEIGHT_RANGE)));
        vf_store(to + matrix.rows + block * 16, vf_div(vf_set(WEIGHT_RANGE), most));
    }
}

// Prepares row `row` of `rows` for multiply_tiles, behind its norm if `by` has a weight. `to.scale` is [rows].
//   q      of TILED_ROWS and more: [16 rows][pair of groups][high, low][16][64 columns]
//          of fewer: [cols / 4][rows][high, low][4]
//   minus  of fewer: [cols / 32][rows][3] of the group's high and low ones -8 * their sums, and both sums as two int16
static inline void prepare_tiled(const float *x, const Norm &by, const RowNorm &norm, const Rows &to, int row, int rows) {
    const int cols = to.cols, groups = cols / GROUP, pairs = (groups + 1) / 2;
    const auto value = [&](int i) { return by.weight ? normed(x, by, norm, i) : vf_load(x + i); };
    vf most = vf_set(1e-20f), sound = vf_zero();
    for (int i = 0; i < cols; i += 16) {
        const vf v = value(i);
        most = vf_max(most, vf_abs(v));
        sound = vf_fma(v, vf_zero(), sound);
    }
    const float top = vf_highest(most), range = row_range(cols);
    const vf inverse = vf_set(range / top);
    to.scale[row] = top / range * 16 + vf_sum(sound);  // a NaN stays one
    const auto halves = [&](int i, int8_t *high_to, int8_t *low_to) {
        const vf whole = vf_round(vf_mul(value(i), inverse)), high = vf_round(vf_mul(whole, vf_set(1.f / 16.f)));
        vf_store_int8(high_to, high);
        vf_store_int8(low_to, vf_fma(high, vf_set(-16.f), whole));
    };
    if (rows < TILED_ROWS) {
        for (int g = 0; g < groups; g++) {
            alignas(32) int8_t high[GROUP], low[GROUP];
            for (int i = 0; i < GROUP; i += 16) halves(g * GROUP + i, high + i, low + i);
            int high_sum = 0, low_sum = 0;
            for (int i = 0; i < GROUP; i++) high_sum += high[i], low_sum += low[i];
            int32_t *minus = to.minus + 3 * (g * rows + row);
            minus[0] = -8 * high_sum, minus[1] = -8 * low_sum, minus[2] = (high_sum & 0xffff) + low_sum * 65536;
            int8_t *out = to.q + 8 * ((size_t)g * GROUP / 4 * rows + row);
            for (int i = 0; i < GROUP; i += 4, out += 8 * rows) memcpy(out, high + i, 4), memcpy(out + 4, low + i, 4);
        }
        return;
    }
    int8_t *out = to.q + ((size_t)(row / 16) * pairs * 2 * 16 + row % 16) * 64;
    for (int i = 0; i < cols; i += 16) {
        int8_t *at = out + i / 64 * 2 * TILE_BYTES + i % 64;
        halves(i, at, at + TILE_BYTES);
    }
    if (groups % 2) {
        int8_t *at = out + (pairs - 1) * 2 * TILE_BYTES + GROUP;
        memset(at, 0, GROUP), memset(at + TILE_BYTES, 0, GROUP);
    }
}

// Scales and minima of a group for its 16 channels in units, and their shares in w.high. Where a scale is below zero nibbles are
// counted from the other end (15 - nibble), so that no `a` is.
struct Whole {
    vi a, b, a_high, b_high;
    __mmask16 below;
    Whole(const uint8_t *scales, vf inverse) {
        const vf scale = vf_mul(vf_load_f16((const uint16_t *)scales), inverse), d = vf_abs(scale);
        below = _mm512_movepi32_mask((vi)scale);
        const vf least = _mm512_mask3_fmadd_ps(scale, vf_set(15.f), vf_mul(vf_load_f16((const uint16_t *)(scales + 32)), inverse), below);
        a = _mm512_cvtps_epi32(d);
        a_high = _mm512_srli_epi32(a, 4);
        // What rounding takes from a is made good in the middle of the nibbles; there w.low is about zero, too.
        const vf middle = vf_fma(vf_sub(d, vi_float(a)), vf_set(7.5f), least);
        b = _mm512_cvtps_epi32(middle);
        const vf a_low = vi_float(_mm512_and_si512(a, _mm512_set1_epi32(15)));
        b_high = _mm512_cvtps_epi32(vf_mul(vf_fma(a_low, vf_set(7.5f), middle), vf_set(1.f / 16.f)));
    }
};

// Makes bytes of the nibbles of a matrix's blocks, a pair of groups after the other: [high, low][16][16 channels][4].
struct Unpacker {
    // What it takes for the 16 channels of a group: `a` twice as int16, for products of two bytes at once, the others in all four.
    struct Line {
        vi a_high, a_low, b_high, b_low, flip;
    };
    const uint8_t *w;      // of the group that is drawn next
    const float *inverse;  // of its block's units
    int groups, blocks, group = 0;
    const uint8_t *from[2];  // of the pair that is unpacked next; its lines are ready long before they are needed
    Line lines[2];

    Unpacker(const llk_matrix &matrix, int begin, int end)
        : w((const uint8_t *)matrix.data + block_bytes(LLK_Q4, matrix.cols) * (size_t)begin), inverse(matrix.unit + matrix.rows + begin * 16),
          groups(matrix.cols / GROUP), blocks(end - begin) {
        draw();
    }

    static Line line(const uint8_t *scales, vf inverse) {
        const Whole whole(scales, inverse);
        const auto twice = [](vi v) { return _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100)); };
        const auto bytes = [](vi v) { return _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0x00000000)); };
        const vi a_low = _mm512_and_si512(whole.a, _mm512_set1_epi32(15)), b_low = _mm512_sub_epi32(whole.b, _mm512_slli_epi32(whole.b_high, 4));
        return {twice(whole.a_high), twice(a_low), bytes(whole.b_high), bytes(b_low), _mm512_maskz_set1_epi32(whole.below, 0x0f0f0f0f)};
    }

    void draw() {
        if (!blocks) return;
        const vf by = vf_load(inverse);
        lines[0] = line(w + 256, by);
        from[0] = w;
        from[1] = group + 1 < groups ? w + 320 : nullptr;
        if (from[1]) lines[1] = line(w + 576, by);
        w += from[1] ? 640 : 320;
        if ((group += 2) < groups) return;
        group = 0, inverse += 16, blocks--;
    }

    void unpack(uint8_t *to) {
        UNROLL for (int g = 0; g < 2; g++) {
            if (g && !from[1]) break;
            UNROLL for (int j = 0; j < 4; j++) {
                const vb packed = vb_load(from[g] + j * 64);
                UNROLL for (int h = 0; h < 2; h++) {
                    // (packed & 15) ^ flip. Two bytes are multiplied at once: no product exceeds a byte.
                    const vi nibbles = _mm512_ternarylogic_epi32(h ? _mm512_srli_epi16(packed, 4) : packed, _mm512_set1_epi8(15), lines[g].flip, 0x6a);
                    uint8_t *at = to + g * (TILE_BYTES / 2) + (4 * h + j) * 64;
                    _mm512_store_si512(at, _mm512_add_epi8(_mm512_mullo_epi16(nibbles, lines[g].a_high), lines[g].b_high));
                    _mm512_store_si512(at + TILE_BYTES, _mm512_add_epi8(_mm512_mullo_epi16(nibbles, lines[g].a_low), lines[g].b_low));
                }
            }
            UNROLL for (int j = 0; j < 5; j++) fetch(from[g] + 320 * 8 + 64 * j);
        }
        draw();
    }
};

static inline vf in_units(const llk_matrix &matrix, int block, vi sum, float scale) {
    return vf_mul(vf_mul(vi_float(sum), vf_load(matrix.unit + block * 16)), vf_set(scale));
}

// The 16 outputs of a block for all M rows, fewer than TILED_ROWS.
template <int M> static __attribute__((noinline)) void product_of_few(const llk_matrix &matrix, const Rows &x, int block, vf *out) {
    const uint8_t *w = (const uint8_t *)matrix.data + block_bytes(LLK_Q4, x.cols) * (size_t)block;
    const vf inverse = vf_load(matrix.unit + matrix.rows + block * 16);
    const int8_t *q = x.q;
    const int32_t *minus = x.minus;
    const auto twice = [](__mmask16 mask) { return _mm512_movepi16_mask(_mm512_movm_epi32(mask)); };
    const auto pair = [](vi a, vi b) { return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)); };
    vi total[M];
    UNROLL for (int m = 0; m < M; m++) total[m] = vi_zero();
    for (int g = 0; g < x.cols / GROUP; g++, w += 320, q += 2 * GROUP * M, minus += 3 * M) {
        // Of nibble - 8, so that sums fit 16 bits.
        vi high[M], low[M];
        UNROLL for (int m = 0; m < M; m++) high[m] = _mm512_set1_epi32(minus[3 * m]), low[m] = _mm512_set1_epi32(minus[3 * m + 1]);
        UNROLL for (int j = 0; j < 4; j++) {
            const vb packed = vb_load(w + j * 64), halves[2] = {vb_low(packed), vb_high(packed)};
            UNROLL for (int h = 0; h < 2; h++) UNROLL for (int m = 0; m < M; m++) {
                const int8_t *at = q + ((4 * h + j) * M + m) * 8;
                high[m] = dot_q8(high[m], halves[h], at);
                low[m] = dot_q8(low[m], halves[h], at + 4);
            }
        }
        UNROLL for (int j = 0; j < 5; j++) fetch(w + 320 * 8 + 64 * j);
        const Whole whole(w + 256, inverse);
        // a * (15 - nibble) + b is -a * (nibble - 8) + 7 * a + b.
        const auto eighth = [&](vi a, vi b) { return vi_add(b, _mm512_mask_sub_epi32(_mm512_slli_epi32(a, 3), whole.below, _mm512_slli_epi32(a, 3), a)); };
        const vi b = pair(eighth(whole.a, whole.b), eighth(whole.a_high, whole.b_high));
        const vi positive = pair(whole.a, whole.a_high), a = _mm512_mask_sub_epi16(positive, twice(whole.below), vi_zero(), positive);
        UNROLL for (int m = 0; m < M; m++) {
            total[m] = _mm512_dpwssd_epi32(total[m], a, pair(high[m], low[m]));
            total[m] = _mm512_dpwssd_epi32(total[m], b, _mm512_set1_epi32(minus[3 * m + 2]));
        }
    }
    UNROLL for (int m = 0; m < M; m++) out[m] = in_units(matrix, block, total[m], x.scale[m]);
}

typedef int32_t Sums[2][16][16];  // worth 16 and 1: [row][channel]

// Adds the products of 16 rows with `pairs` pairs of groups of a block to the sums in the tiles. Meanwhile `aside`(pair) does
// what can be done by vectors.
template <typename F>
__attribute__((always_inline)) static inline void add_tiles(const int8_t *x, const uint8_t *w, int pairs, F &&aside) {
    for (int i = 0; i < pairs; i++, x += 2 * TILE_BYTES, w += 2 * TILE_BYTES) {
        tile_load<4>(x);
        tile_load<6>(w);
        tile_multiply<0, 4, 6>();
        tile_load<5>(x + TILE_BYTES);
        tile_multiply<1, 5, 6>();
        tile_load<7>(w + TILE_BYTES);
        tile_multiply<1, 4, 7>();
        aside(i);
    }
}

// One block after the other: the first of a pair waits in its place for the second.
static inline void store_block(const llk_matrix &matrix, const Output &out, int row, int block, vf value) {
    if (out.how != STORE_GATED) return store_row(matrix, out, row, block, value);
    if (matrix.bias) value = vf_add(value, vf_load(matrix.bias + block * 16));
    if (out.more) value = add_lora(*out.more, row, block, value);
    float *to = out.to + (size_t)row * out.stride + block / 2 * 16;
    vf_store(to, block % 2 ? vf_mul(activate(out.activation, vf_load(to)), value) : value);
}

// Sums of `rows` rows from `row` on, up to 16, with a block.
struct Finished {
    const Sums *sums = nullptr;
    int row = 0, rows = 0, block = 0;
};

// Makes outputs of sums. Copies of what is known of them stay in registers.
template <Store HOW>
static __attribute__((noinline)) void store_sums(const llk_matrix matrix, const float *scale, Output out, const Finished done) {
    out.how = HOW;
    for (int m = 0; m < done.rows; m++) {
        const vi high = _mm512_slli_epi32(_mm512_load_si512((*done.sums)[0][m]), 4);
        const vi sum = vi_add(high, _mm512_load_si512((*done.sums)[1][m]));
        store_block(matrix, out, done.row + m, done.block, in_units(matrix, done.block, sum, scale[done.row + m]));
    }
}

// Blocks begin … end-1 of a matrix with units times rows from `from` on, at most MOST_TILES tiles of them. Arguments are values,
// which stay in registers.
static void multiply_panel(const llk_matrix matrix, const Rows x, int from, int rows, const Output out, int begin, int end) {
    const int pairs = (x.cols / GROUP + 1) / 2, tiles = (rows + 15) / 16, most = tiles > 1 ? STRETCH : SHORT;
    const int stretches = (pairs + most - 1) / most, stretch = (pairs + stretches - 1) / stretches;
    alignas(64) uint8_t unpacked[STRETCH][2 * TILE_BYTES];
    alignas(64) Sums sums[MOST_TILES];
    Finished finished;
    const auto finish = [&] {
        if (out.how == STORE_PLAIN) store_sums<STORE_PLAIN>(matrix, x.scale, out, finished);
        else if (out.how == STORE_ADD) store_sums<STORE_ADD>(matrix, x.scale, out, finished);
        else if (out.how == STORE_GATED) store_sums<STORE_GATED>(matrix, x.scale, out, finished);
        else store_sums<STORE_ACTIVATED>(matrix, x.scale, out, finished);
        finished.rows = 0;
    };
    Unpacker unpacker(matrix, begin, end);
    for (int i = 0; i < stretch; i++) unpacker.unpack(unpacked[i]);
    for (int block = begin; block < end; block++)
        for (int done = 0; done < pairs; done += stretch) {
            const bool last = done + stretch >= pairs;
            const int count = imin(stretch, pairs - done);
            const int each = 10 / imax(1, tiles - 1) + 1;  // cache lines to fetch beside a pair: ten are what it takes itself
            for (int tile = 0; tile < tiles; tile++) {
                const int8_t *q = x.q + ((size_t)(from / 16 + tile) * pairs + done) * 2 * TILE_BYTES;
                // The same places as long as they will do.
                Sums &sum = sums[stretches > 1 && tiles > 1 ? tile : (block + tile) & 1];
                if (!done) {
                    tile_zero<0>();
                    tile_zero<1>();
                } else if (tiles > 1) {
                    tile_load<0>(sum[0]);
                    tile_load<1>(sum[1]);
                }
                const int coming = !last ? imin(stretch, pairs - done - stretch) : block + 1 < end ? stretch : 0;
                const float *place = out.to + (size_t)(from + 16 * tile) * out.stride + (out.how == STORE_GATED ? block / 2 : block) * 16;
                add_tiles(q, unpacked[0], count, [&](int i) {
                    if (i == 0 && finished.rows) finish();
                    // Another thread may have read there last, and stores go one after the other.
                    for (int m = 2 * i; last && m < imin(16, 2 * i + 2); m++) fetch_to_write(place + (size_t)m * out.stride);
                    if (tile + 1 < tiles) {
                        for (int line = 0; line < each; line++) fetch_far(unpacker.w + 64 * ((tile * count + i) * each + line));
                    } else if (i && i <= coming) {
                        unpacker.unpack(unpacked[i - 1]);  // over what has just been used for the last time
                    }
                });
                if (tile + 1 == tiles)
                    for (int i = count - 1; i < coming; i++) unpacker.unpack(unpacked[i]);
                if (finished.rows) finish();
                if (last || tiles > 1) {
                    tile_store<0>(sum[0]);
                    tile_store<1>(sum[1]);
                }
                if (last) finished = {&sum, from + 16 * tile, imin(16, rows - 16 * tile), block};
            }
        }
    finish();
}

// Blocks begin … end-1 of a matrix with units times all rows.
static void multiply_tiles(const llk_matrix &matrix, const Rows &x, int rows, const Output &out, int begin, int end) {
    if (rows < TILED_ROWS) {
        for (int block = begin; block < end; block += 2)
            with_width(rows, [&](auto width) {
                constexpr int M = decltype(width)::value < TILED_ROWS ? decltype(width)::value : 1;
                vf first[M], second[M];
                product_of_few<M>(matrix, x, block, first);
                if (block + 1 < end) product_of_few<M>(matrix, x, block + 1, second);
                for (int m = 0; m < M; m++) {
                    if (block + 1 < end) store_pair(matrix, out, m, block, first[m], second[m]);
                    else store_row(matrix, out, m, block, first[m]);
                }
            });
        return;
    }
    if (begin == end) return;
    TileScope scope(rows);
    for (int from = 0; from < rows; from += 16 * MOST_TILES)
        multiply_panel(matrix, x, from, imin(16 * MOST_TILES, rows - from), out, begin, end);
}
