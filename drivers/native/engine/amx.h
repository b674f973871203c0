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
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

// Every tile has 16 rows of 64 bytes. To be opened by each thread that computes.
struct TileScope {
    TileScope() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    ~TileScope() { _tile_release(); }
};

// Whether the operating system lets this process use the tiles; it does after it was asked once.
static inline bool tiles_usable() {
    constexpr long REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
}

static constexpr int TILE_BYTES = 1024;
static constexpr int STRETCH = 9;         // pairs of groups that are unpacked at a time: they stay in the nearest cache
static constexpr int MOST_TILES = 32;     // of rows that use what was unpacked
static constexpr int TILED_ROWS = 5;      // so many rows make tiles worth while

static constexpr float WEIGHT_RANGE = 1900;  // w.high stays a byte: w.low may be 68

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

// a and b of a group of a block, for its 16 channels, and the shares of w.high in them.
struct Whole {
    vi a, b, a_high, b_high;
    Whole(const uint8_t *w, vf inverse) {
        const vf d = vf_mul(vf_load_f16((const uint16_t *)(w + 256)), inverse), scale = vf_round(d);
        // What rounding takes from a is made good in the middle of the nibbles.
        const vf least = vf_fma(vf_sub(d, scale), vf_set(7.5f), vf_mul(vf_load_f16((const uint16_t *)(w + 288)), inverse));
        a = _mm512_cvtps_epi32(scale);
        b = _mm512_cvtps_epi32(least);
        a_high = _mm512_srai_epi32(vi_add(a, _mm512_set1_epi32(8)), 4);
        // So that w.low is about zero in the middle: (b + 7.5 * a_low) / 16.
        const vf a_low = _mm512_cvtepi32_ps(_mm512_sub_epi32(a, _mm512_slli_epi32(a_high, 4)));
        b_high = _mm512_cvtps_epi32(vf_mul(vf_fma(a_low, vf_set(7.5f), vi_float(b)), vf_set(1.f / 16.f)));
    }
};

// A stretch of a block that is to be unpacked, as [pair of groups][high, low][16][16 channels][4].
struct Packed {
    const uint8_t *w = nullptr;
    int groups = 0;
    vf inverse;
    uint8_t *to;
};
static inline void unpack_pair(const Packed &from, int i) {
    const auto shorts = [](vi v) { return _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100)); };
    const auto bytes = [](vi v) { return _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0x00000000)); };
    const uint8_t *w = from.w + 640 * i;
    for (int g = 2 * i; g < imin(2 * i + 2, from.groups); g++, w += 320) {
        uint8_t *at = from.to + i * 2 * TILE_BYTES + g % 2 * (TILE_BYTES / 2);
        const Whole whole(w, from.inverse);
        const vi eight = _mm512_set1_epi32(8), a_high = shorts(whole.a_high), b_high = bytes(whole.b_high);
        // a_low may be below zero, which two bytes at once cannot have: a_low + 8, and 8 * nibble is taken away.
        const vi a_low = shorts(_mm512_sub_epi32(vi_add(whole.a, eight), _mm512_slli_epi32(whole.a_high, 4)));
        const vi b_low = bytes(_mm512_sub_epi32(whole.b, _mm512_slli_epi32(whole.b_high, 4)));
        UNROLL for (int j = 0; j < 4; j++) {
            const vb packed = vb_load(w + j * 64), halves[2] = {vb_low(packed), vb_high(packed)};
            // Two bytes are multiplied at once: no product exceeds a byte.
            UNROLL for (int h = 0; h < 2; h++) {
                _mm512_store_si512(at + (4 * h + j) * 64, _mm512_add_epi8(_mm512_mullo_epi16(halves[h], a_high), b_high));
                const vb low = _mm512_sub_epi8(_mm512_mullo_epi16(halves[h], a_low), _mm512_slli_epi16(halves[h], 3));
                _mm512_store_si512(at + TILE_BYTES + (4 * h + j) * 64, _mm512_add_epi8(low, b_low));
            }
        }
        UNROLL for (int j = 0; j < 5; j++) fetch(w + 320 * 8 + 64 * j);
    }
}

static inline vf in_units(const llk_matrix &matrix, int block, vi sum, float scale) {
    return vf_mul(vf_mul(vi_float(sum), vf_load(matrix.unit + block * 16)), vf_set(scale));
}

// The 16 outputs of a block for all M rows, fewer than TILED_ROWS.
template <int M> static __attribute__((noinline)) void product_of_few(const llk_matrix &matrix, const Rows &x, int block, vf *out) {
    const uint8_t *w = (const uint8_t *)matrix.data + block_bytes(LLK_Q4, x.cols) * (size_t)block;
    const vf inverse = vf_load(matrix.unit + matrix.rows + block * 16);
    const int8_t *q = x.q;
    const int32_t *minus = x.minus;
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
        const Whole whole(w, inverse);
        const vi a = pair(whole.a, whole.a_high);
        const vi b = pair(vi_add(whole.b, _mm512_slli_epi32(whole.a, 3)), vi_add(whole.b_high, _mm512_slli_epi32(whole.a_high, 3)));
        UNROLL for (int m = 0; m < M; m++) {
            total[m] = _mm512_dpwssd_epi32(total[m], a, pair(high[m], low[m]));
            total[m] = _mm512_dpwssd_epi32(total[m], b, _mm512_set1_epi32(minus[3 * m + 2]));
        }
    }
    UNROLL for (int m = 0; m < M; m++) out[m] = in_units(matrix, block, total[m], x.scale[m]);
}

typedef int32_t Sums[2][16][16];  // worth 16 and 1: [row][channel]

// Adds the products of 16 rows with `pairs` pairs of groups of a block to `sums`, which are nothing yet if `fresh`, and
// meanwhile if UNPACK unpacks `next`: a tile cannot be loaded from stores that are still under way, and the processor looks less far
// ahead than a stretch is long.
template <bool UNPACK>
static __attribute__((noinline)) void add_tiles(const int8_t *x, const uint8_t *w, int pairs, bool fresh, Sums &sums, const Packed &next) {
    // gcc takes the numbers of tiles as constants: 0 and 1 are sums, 4 and 5 rows, 6 and 7 weights.
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, sums[0], 64);
        _tile_loadd(1, sums[1], 64);
    }
    for (int i = 0; i < pairs; i++, x += 2 * TILE_BYTES, w += 2 * TILE_BYTES) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(5, x + TILE_BYTES, 64);
        _tile_dpbssd(1, 5, 6);
        _tile_loadd(7, w + TILE_BYTES, 64);
        _tile_dpbssd(1, 4, 7);
        if (UNPACK) unpack_pair(next, i);
    }
    if (UNPACK) for (int i = pairs; 2 * i < next.groups; i++) unpack_pair(next, i);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
}

// Blocks begin … end-1 of a matrix with units times rows from `from` on, at most MOST_TILES tiles of them. Arguments are values,
// which stay in registers.
static void multiply_panel(const llk_matrix matrix, const Rows x, int from, int rows, const Output out, int begin, int end) {
    const int groups = x.cols / GROUP, pairs = (groups + 1) / 2, stretches = (pairs + STRETCH - 1) / STRETCH;
    const int stretch = (pairs + stretches - 1) / stretches;
    alignas(64) uint8_t unpacked[2][STRETCH * 2 * TILE_BYTES];
    alignas(64) Sums sums[MOST_TILES];
    vf first[16 * MOST_TILES];  // of a pair of blocks
    const auto packed = [&](int block, int done) {
        Packed at;
        at.w = (const uint8_t *)matrix.data + block_bytes(LLK_Q4, x.cols) * (size_t)block + 640 * (size_t)done;
        at.groups = imin(2 * stretch, groups - 2 * done);
        at.inverse = vf_load(matrix.unit + matrix.rows + block * 16);
        at.to = unpacked[(block * stretches + done / stretch) & 1];
        return at;
    };
    Packed now = packed(begin, 0);
    for (int i = 0; 2 * i < now.groups; i++) unpack_pair(now, i);
    for (int block = begin; block < end; block++)
        for (int done = 0; done < pairs; done += stretch) {
            const bool last = done + stretch >= pairs;
            const Packed next = !last ? packed(block, done + stretch) : block + 1 < end ? packed(block + 1, 0) : Packed();
            for (int row = from; row < from + rows; row += 16) {
                const int8_t *q = x.q + ((size_t)row / 16 * pairs + done) * 2 * TILE_BYTES;
                Sums &sum = sums[stretches > 1 ? (row - from) / 16 : 0];  // the same place as long as it will do
                (row == from ? add_tiles<true> : add_tiles<false>)(q, now.to, imin(stretch, pairs - done), done == 0, sum, next);
                if (!last) continue;
                for (int m = row; m < imin(row + 16, from + rows); m++) {
                    const vi high = _mm512_slli_epi32(_mm512_load_si512(sum[0][m - row]), 4), low = _mm512_load_si512(sum[1][m - row]);
                    const vf value = in_units(matrix, block, vi_add(high, low), x.scale[m]);
                    if ((block - begin) % 2) store_pair(matrix, out, m, block - 1, first[m - from], value);
                    else if (block + 1 < end) first[m - from] = value;
                    else store_row(matrix, out, m, block, value);
                }
            }
            now = next;
        }
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
    for (int from = 0; from < rows; from += 16 * MOST_TILES)
        multiply_panel(matrix, x, from, imin(16 * MOST_TILES, rows - from), out, begin, end);
}
