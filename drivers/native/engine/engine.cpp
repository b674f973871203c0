// One step of a decoder: what each thread does between the barriers. See engine.h for what goes in and out.
#include <poll.h>

#include <new>
#include <type_traits>

#include "choose.h"
#include "kernels.h"
#include "pool.h"

// A run cut into pieces of so few rows that all queries of a KV head fit one tile.
struct Piece {
    int run, row, rows, start;  // `row` in the batch, `start` its position
};

// A row whose context is attended to chunk by chunk, each chunk together with the rows that share its blocks:
// forks, agents with a common prefix, guesses. Its partial sums of chunk c are number `partial` + c.
struct SplitRow {
    int run, row, position, chunks, partial;
};

// A chunk of positions for `count` rows, which are split_rows[order[first]] and those after it.
struct Item {
    int first, count, chunk;
};

// Rows adapted[first] … that have the same adapter.
struct AdaptedTile {
    const llk_lora *adapter;
    int first, count;
};

static constexpr int PRIVATE_ROWS = 2;  // so few rows are prepared by every thread for itself: no barrier
static constexpr size_t PARTIAL_FLOATS = 1 << 22;

struct Engine {
    llk_pool *pool;
    const llk_model *model;
    llk_step *step;
    bool last;  // behind the last layer's keys and values: only the rows that are kept are left
    int rows, kept, piece_count, split_count, item_count, adapted_tiles;
    // workspace
    float *x, *qkv, *attended, *inner, *cosines, *sines, *logits;
    Rows shared;
    Piece *pieces;
    int32_t *row_run, *row_position;  // of every row of the batch
    int32_t *wanted;                  // the rows that get logits
    SplitRow *split_rows;
    int32_t *order;  // of the split rows, those with equal beginnings side by side
    Item *items;
    float *partials;
    const llk_lora **adapters;  // of every row of the batch
    int32_t *adapted;           // rows that have one, those of an adapter side by side
    AdaptedTile *tiles;
    float *reduced;
    std::atomic<int32_t> *left;  // [split rows][KV heads] chunks that are still to come
    uint8_t *thread_space;
    size_t thread_bytes;
    alignas(64) std::atomic<int32_t> next[2];
    bool interrupted[2];  // by layers in turn: the first thread writes while the others may still read the other
};

static inline int qkv_columns(const llk_model &m) { return (m.heads + 2 * m.kv_heads) * m.head_dim; }
static inline int out_columns(const llk_model &m) { return (m.heads * m.head_dim + 31) / 32 * 32; }
static inline int padded_vocab(const llk_model &m) { return (m.vocab + 15) / 16 * 16; }
static inline int widest(const llk_model &m) { return imax(imax(m.hidden_padded, m.inner), out_columns(m)); }
// Rows of a piece: as many as give all queries of a group a width that with_width has.
static int piece_rows(const llk_model &m) {
    const int group = m.heads / m.kv_heads;
    for (int rows = TILE_ROWS / group; rows > 1; rows--) {
        int width = rows * group;
        if (width <= 4 || width == 6 || width == 8 || width == 12 || width == 16) return rows;
    }
    return 1;
}

struct Carver {
    uint8_t *at;
    size_t used = 0;
    template <typename T> T *take(size_t count) {
        T *here = (T *)(at ? at + used : nullptr);
        used += (count * sizeof(T) + 127) / 64 * 64;  // a spare line: prefetches and vectors run over
        return here;
    }
};

static Rows take_rows(Carver &carver, int rows, int cols) {
    Rows r;
    r.cols = cols;
    const size_t all = (size_t)rows * cols;
    const size_t tiles = HAS_TILES ? (size_t)((rows + 15) / 16) * ((cols + 63) / 64) * 2048 : 0;
    r.q = carver.take<int8_t>(tiles > 2 * all ? tiles : 2 * all);
    r.scale = carver.take<float>(all / GROUP);
    r.sum = carver.take<float>(all / GROUP);
    r.minus = carver.take<int32_t>((HAS_TILES ? 3 : 1) * all / GROUP);
    r.half = carver.take<uint16_t>(all);
    r.full = carver.take<float>(all);
    return r;
}

// A row's partial sums of one chunk at one KV head: values, greatest score and sum of weights of each query.
static inline int partial_floats(const llk_model &m) { return m.heads / m.kv_heads * (m.head_dim + 2); }
static inline int most_partials(const llk_model &m) { return (int)(PARTIAL_FLOATS / (size_t)(partial_floats(m) * m.kv_heads)); }

// What a thread needs for itself: a norm, prepared rows, queries, partial sums, space to choose in.
static size_t private_bytes(const llk_model &m) {
    Carver carver{nullptr};
    take_rows(carver, PRIVATE_ROWS, widest(m));
    carver.take<float>((size_t)TILE_ROWS * m.head_dim);
    carver.take<uint16_t>((size_t)TILE_ROWS * m.head_dim);
    carver.take<int8_t>((size_t)TILE_ROWS * m.head_dim);
    carver.take<float>(2 * (size_t)TILE_ROWS * m.head_dim);
    carver.take<uint8_t>(ChooseSpace::bytes(padded_vocab(m)));
    return carver.used;
}

struct Private {
    Rows rows;
    float *full;
    uint16_t *half;
    int8_t *q;
    float *values;
    ChooseSpace choose;
    Private(const llk_model &m, uint8_t *at) {
        Carver carver{at};
        rows = take_rows(carver, PRIVATE_ROWS, widest(m));
        full = carver.take<float>((size_t)TILE_ROWS * m.head_dim);
        half = carver.take<uint16_t>((size_t)TILE_ROWS * m.head_dim);
        q = carver.take<int8_t>((size_t)TILE_ROWS * m.head_dim);
        values = carver.take<float>(2 * (size_t)TILE_ROWS * m.head_dim);
        choose.place(carver.take<uint8_t>(ChooseSpace::bytes(padded_vocab(m))), padded_vocab(m));
    }
};

static size_t lay_out(Engine &e, const llk_model &m, uint8_t *at, int max_rows, int max_picks, int threads) {
    Carver carver{at};
    e.x = carver.take<float>((size_t)max_rows * m.hidden_padded);
    e.qkv = carver.take<float>((size_t)max_rows * qkv_columns(m));
    e.attended = carver.take<float>((size_t)max_rows * out_columns(m));
    e.inner = carver.take<float>((size_t)max_rows * m.inner);
    e.cosines = carver.take<float>((size_t)max_rows * imax(1, m.rotary));
    e.sines = carver.take<float>((size_t)max_rows * imax(1, m.rotary));
    e.logits = carver.take<float>((size_t)max_picks * padded_vocab(m));
    e.shared = take_rows(carver, imax(max_rows, max_picks), widest(m));
    e.pieces = carver.take<Piece>((size_t)max_rows);
    e.row_run = carver.take<int32_t>((size_t)max_rows);
    e.row_position = carver.take<int32_t>((size_t)max_rows);
    e.wanted = carver.take<int32_t>((size_t)max_picks);
    e.split_rows = carver.take<SplitRow>((size_t)max_rows);
    e.order = carver.take<int32_t>((size_t)max_rows);
    e.items = carver.take<Item>((size_t)most_partials(m));
    e.partials = carver.take<float>(PARTIAL_FLOATS);
    e.left = carver.take<std::atomic<int32_t>>((size_t)max_rows * m.kv_heads);
    e.adapters = carver.take<const llk_lora *>((size_t)max_rows);
    e.adapted = carver.take<int32_t>((size_t)max_rows);
    e.tiles = carver.take<AdaptedTile>((size_t)max_rows);
    e.reduced = carver.take<float>((size_t)max_rows * LLK_MOST_RANKS);
    e.thread_bytes = private_bytes(m);
    e.thread_space = carver.take<uint8_t>(e.thread_bytes * (size_t)threads);
    return carver.used;
}

extern "C" int32_t llk_abi(void) { return LLK_ABI; }
extern "C" int32_t llk_usable(void) { return tiles_usable(); }
extern "C" int32_t llk_units(const llk_matrix *matrix, float *to) {
    if (!HAS_TILES || matrix->format != LLK_Q4) return 0;
    if (to) find_units(*matrix, to);
    return 1;
}
extern "C" const char *llk_isa(void) { return LLK_ISA_NAME; }
extern "C" int64_t llk_tile_bytes(const llk_model *m) { return (int64_t)tile_bytes(m->kv_format, m->head_dim); }
extern "C" int64_t llk_workspace_bytes(const llk_pool *pool, const llk_model *m, int32_t max_rows, int32_t max_picks) {
    Engine e;
    return (int64_t)lay_out(e, *m, nullptr, max_rows, max_picks, pool->threads);
}

static inline void share(int count, int unit, int thread, int threads, int &begin, int &end) {
    const long units = count / unit;
    begin = (int)(units * thread / threads) * unit;
    end = (int)(units * (thread + 1) / threads) * unit;
}

// Rows that are to be multiplied: row i is at `from + rows[i] * stride`, or at i if `rows` is NULL.
struct Source {
    const float *from;
    int stride;
    const int32_t *rows;
    const float *row(int i) const { return from + (size_t)(rows ? rows[i] : i) * stride; }
};

// Multiplies the rows that have adapters with this thread's share of their A.
static void reduce_rows(Engine &e, int thread, const Source &source, const Norm &by, const Additions &more, int cols) {
    const llk_model &m = *e.model;
    int all = 0, begin, end;
    for (int t = 0; t < e.adapted_tiles; t++) all += e.tiles[t].adapter[more.which].ranks / RANKS;
    share(all, 1, thread, e.pool->threads, begin, end);
    int unit = 0;
    for (int t = 0; t < e.adapted_tiles && unit < end; t++) {
        const AdaptedTile &tile = e.tiles[t];
        const llk_lora &lora = tile.adapter[more.which];
        const int units = lora.ranks / RANKS, first = imax(begin - unit, 0), last = imin(end - unit, units);
        unit += units;
        if (first >= last) continue;
        const float *x[REDUCED_ROWS];
        float *to[REDUCED_ROWS];
        RowNorm norms[REDUCED_ROWS];
        for (int i = 0; i < tile.count; i++) {
            const int row = e.adapted[tile.first + i];
            x[i] = source.row(row);
            norms[i] = by.weight ? norm_of(m.norm, x[i], m.hidden, m.hidden_padded, m.epsilon) : RowNorm{0, 1};
            to[i] = e.reduced + (size_t)row * LLK_MOST_RANKS + first * RANKS;
        }
        for (int u = first; u < last; u++) {
            for (int done = 0; done < tile.count;)
                done += with_width(imin(tile.count - done, REDUCED_ROWS), [&](auto width) {
                    constexpr int M = decltype(width)::value <= REDUCED_ROWS ? decltype(width)::value : 1;
                    with_lora_type(lora, [&](auto type) {
                        const auto a = (const decltype(type) *)lora.a + (size_t)u * RANKS * cols;
                        reduce<M>(a, lora.scale + u * RANKS, cols, x + done, by, norms + done, to + done);
                    });
                });
            for (int i = 0; i < tile.count; i++) to[i] += RANKS;
        }
    }
}

// Prepares this thread's share of `count` rows, of all if the thread is alone. The threads share the columns, not the rows,
// which lie interleaved but for tiles; so each finds the norms of the rows that it needs for itself.
static void prepare_share(Engine &e, int thread, const llk_matrix &matrix, const Source &source, int count, const Norm &by, const Rows &to, bool alone) {
    const llk_model &m = *e.model;
    const auto norm_at = [&](const float *x) {
        return by.weight ? norm_of(m.norm, x, m.hidden, m.hidden_padded, m.epsilon) : RowNorm{0, 1};
    };
    const int groups = matrix.cols / GROUP, units = is_tiled(matrix) ? count : (count + TILE_ROWS - 1) / TILE_ROWS * groups;
    int begin = 0, end = units;
    if (!alone) share(units, 1, thread, e.pool->threads, begin, end);
    if (is_tiled(matrix)) {
        for (int row = begin; row < end; row++) prepare_tiled(source.row(row), by, norm_at(source.row(row)), to, row, count);
        return;
    }
    for (int item = begin; item < end;) {
        const int first = item / groups * TILE_ROWS, last = imin(count, first + TILE_ROWS);
        const int group = item % groups, group_end = imin(groups, group + end - item);
        for (int row = first; row < last; row++) {
            const float *x = source.row(row);
            const Tile tile = tile_of(row, count);
            const RowNorm norm = norm_at(x);
            with_format(matrix, [&](auto format, auto fine) {
                for (int g = group; g < group_end; g++)
                    prepare_group<decltype(format)::value, decltype(fine)::value>(x, by, norm, to, tile, row - tile.first, g);
            });
        }
        item += group_end - group;
    }
}

// Prepares `count` rows, behind a norm if it has a weight, for a product with `matrix`. `more`: what adapters need for the
// same product is made too, unless it is NULL.
static Rows prepare(Engine &e, Private &mine, int thread, const llk_matrix &matrix, const Source &source, int count, const Norm &by, const Additions *more) {
    const bool alone = count <= PRIVATE_ROWS;
    Rows to = alone ? mine.rows : e.shared;
    to.cols = matrix.cols;
    prepare_share(e, thread, matrix, source, count, by, to, alone);
    if (more) reduce_rows(e, thread, source, by, *more, matrix.cols);
    if (!alone || more) e.pool->barrier();
    return to;
}

static void multiply_shared(Engine &e, int thread, const llk_matrix &matrix, const Rows &x, int rows, Output out) {
    int begin, end;
    share(matrix.rows / 16, out.how == STORE_GATED ? 2 : 1, thread, e.pool->threads, begin, end);
    multiply(matrix, x, rows, out, begin, end);
    e.pool->barrier();
}

static void embed(Engine &e, int thread) {
    const llk_model &m = *e.model;
    int begin, end;
    share(e.rows, 1, thread, e.pool->threads, begin, end);
    for (int row = begin; row < end; row++) {
        const llk_run &run = e.step->runs[e.row_run[row]];
        const int position = e.row_position[row];
        float *x = e.x + (size_t)row * m.hidden_padded;
        unpack_row(m.embedding, (int)run.tokens[position - run.start], x);
        if (m.positions)
            for (int i = 0; i < m.hidden_padded; i += 16)
                vf_store(x + i, vf_add(vf_load(x + i), vf_load(m.positions + (size_t)position * m.hidden_padded + i)));
        for (int i = 0; i < m.rotary; i++) {
            float angle = (float)position * m.frequencies[i];
            e.cosines[(size_t)row * m.rotary + i] = cosf(angle) * m.rope_scale;
            e.sines[(size_t)row * m.rotary + i] = sinf(angle) * m.rope_scale;
        }
        for (int i = m.heads * m.head_dim; i < out_columns(m); i++) e.attended[(size_t)row * out_columns(m) + i] = 0;
    }
    e.pool->barrier();
}

static void rotate(float *head, int pairs, const float *cosine, const float *sine) {
    int i = 0;
    for (; i + 16 <= pairs; i += 16) {
        const vf a = vf_load(head + i), b = vf_load(head + i + pairs), c = vf_load(cosine + i), s = vf_load(sine + i);
        vf_store(head + i, vf_sub(vf_mul(a, c), vf_mul(b, s)));
        vf_store(head + i + pairs, vf_add(vf_mul(b, c), vf_mul(a, s)));
    }
    for (; i < pairs; i++) {
        const float a = head[i], b = head[i + pairs];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + pairs] = b * cosine[i] + a * sine[i];
    }
}

// The cache at layer `index`; the tiles of a block's KV heads lie side by side, blocks `block_stride` apart.
static inline uint8_t *layer_cache(const llk_model &m, int index) {
    return m.kv + tile_bytes(m.kv_format, m.head_dim) * (size_t)m.kv_heads * (size_t)index;
}
static inline size_t block_stride(const llk_model &m) {
    return tile_bytes(m.kv_format, m.head_dim) * (size_t)m.kv_heads * (size_t)m.layers;
}

// Rotates queries and keys, scales queries, writes keys and values.
static void write_cache(Engine &e, int thread, int index) {
    const llk_model &m = *e.model;
    const llk_layer &layer = m.layer[index];
    uint8_t *cache = layer_cache(m, index);
    const size_t bytes = tile_bytes(m.kv_format, m.head_dim), stride = block_stride(m);
    const int all = m.heads + 2 * m.kv_heads;
    int begin, end;
    share(e.rows * all, 1, thread, e.pool->threads, begin, end);
    for (int item = begin; item < end; item++) {
        const int row = item / all, head = item % all;
        const llk_run &run = e.step->runs[e.row_run[row]];
        const int position = e.row_position[row];
        float *v = e.qkv + (size_t)row * qkv_columns(m) + (size_t)head * m.head_dim;
        if (head < m.heads + m.kv_heads) {
            const float *weight = head < m.heads ? layer.q_norm : layer.k_norm;
            if (weight) {
                const RowNorm norm = norm_of(LLK_RMS_NORM, v, m.head_size, m.head_dim, m.epsilon);
                for (int i = 0; i < m.head_dim; i += 16) vf_store(v + i, normed(v, {weight, nullptr}, norm, i));
            }
            if (layer.rotated) rotate(v, m.rotary, e.cosines + (size_t)row * m.rotary, e.sines + (size_t)row * m.rotary);
        }
        if (head < m.heads) {
            for (int i = 0; i < m.head_dim; i += 16) vf_store(v + i, vf_mul(vf_load(v + i), vf_set(layer.scale)));
            continue;
        }
        const int kv_head = (head - m.heads) % m.kv_heads;
        uint8_t *tile = cache + (size_t)run.blocks[position / BLOCK_TOKENS] * stride + (size_t)kv_head * bytes;
        if (head < m.heads + m.kv_heads) write_key(m.kv_format, m.head_dim, tile, position % BLOCK_TOKENS, v);
        else write_value(m.kv_format, m.head_dim, tile, position % BLOCK_TOKENS, v);
    }
    e.pool->barrier();
}

// Writes what `per_row` queries of a row, from query head `first_head`, have found.
static void finish_row(const Engine &e, int row, int first_head, int per_row, const Partial *sums) {
    const llk_model &m = *e.model;
    for (int i = 0; i < per_row; i++) {
        float *to = e.attended + (size_t)row * out_columns(m) + (size_t)(first_head + i) * m.head_dim;
        vf inverse = vf_set(1.f / sums[i].sum);
        for (int d = 0; d < m.head_dim; d += 16) vf_store(to + d, vf_mul(vf_load(sums[i].values + d), inverse));
    }
}

static void open_queries(const Private &mine, int count, Queries &query) {
    query.full = mine.full;
    query.half = mine.half;
    query.q = mine.q;
    query.count = count;
}

// Query `index` is head `head` of a row of the batch.
static void add_query(const Engine &e, Queries &query, int index, int row, int head, int window) {
    const llk_model &m = *e.model;
    query.end[index] = e.row_position[row] + 1;
    query.first[index] = window ? imax(0, query.end[index] - window) : 0;
    prepare_query(m.kv_format, m.head_dim, query, index, e.qkv + (size_t)row * qkv_columns(m) + (size_t)head * m.head_dim);
}

// The cache of a run at a KV head of a layer.
static Context context_of(const Engine &e, int layer, int run, int kv_head) {
    const llk_model &m = *e.model;
    const uint8_t *tiles = layer_cache(m, layer) + tile_bytes(m.kv_format, m.head_dim) * (size_t)kv_head;
    return {tiles, block_stride(m), e.step->runs[run].blocks, m.head_dim};
}

// A piece at a KV head, `per_row` queries of each row from query head `first_head`.
static void attend_piece(Engine &e, Private &mine, int layer, const Piece &piece, int kv_head, int first_head, int per_row) {
    const llk_model &m = *e.model;
    Queries query;
    const int count = piece.rows * per_row;
    open_queries(mine, count, query);
    Partial sums[TILE_ROWS], next[TILE_ROWS];
    for (int i = 0; i < count; i++) {
        add_query(e, query, i, piece.row + i / per_row, first_head + i % per_row, m.layer[layer].window);
        sums[i] = {HIDDEN_SCORE, 0, mine.values + (size_t)i * m.head_dim};
        next[i] = {HIDDEN_SCORE, 0, mine.values + (size_t)(TILE_ROWS + i) * m.head_dim};
    }
    const Context at = context_of(e, layer, piece.run, kv_head);
    const int end = query.end[count - 1];
    for (int begin = query.first[0] / CHUNK * CHUNK; begin < end; begin += CHUNK) {
        attend(m.kv_format, at, query, begin, imin(end, begin + CHUNK), next);
        for (int i = 0; i < count; i++) merge(sums[i], next[i], m.head_dim);
    }
    for (int r = 0; r < piece.rows; r++) finish_row(e, piece.row + r, first_head, per_row, sums + r * per_row);
}

// Where the partial sums of a split row lie.
static inline float *partial_at(const Engine &e, const SplitRow &row, int chunk, int kv_head, int query) {
    const llk_model &m = *e.model;
    return e.partials + ((size_t)(row.partial + chunk) * m.kv_heads + kv_head) * partial_floats(m) + (size_t)query * (m.head_dim + 2);
}

// A chunk of some rows at a KV head; whoever finishes a row's last chunk puts them together, in order.
static void attend_item(Engine &e, Private &mine, int layer, const Item &item, int kv_head) {
    const llk_model &m = *e.model;
    const int group = m.heads / m.kv_heads, count = item.count * group, size = m.head_dim, begin = item.chunk * CHUNK;
    Queries query;
    open_queries(mine, count, query);
    Partial sums[TILE_ROWS];
    int end = 0, first = begin + CHUNK;
    for (int i = 0; i < count; i++) {
        const SplitRow &row = e.split_rows[e.order[item.first + i / group]];
        add_query(e, query, i, row.row, kv_head * group + i % group, m.layer[layer].window);
        sums[i] = {HIDDEN_SCORE, 0, partial_at(e, row, item.chunk, kv_head, i % group)};
        end = imax(end, query.end[i]);
        first = imin(first, query.first[i]);
    }
    if (first < begin + CHUNK) {
        const Context at = context_of(e, layer, e.split_rows[e.order[item.first]].run, kv_head);
        attend(m.kv_format, at, query, begin, imin(end, begin + CHUNK), sums);
    }
    for (int i = 0; i < count; i++) sums[i].values[size] = sums[i].most, sums[i].values[size + 1] = sums[i].sum;
    for (int r = 0; r < item.count; r++) {
        const int index = e.order[item.first + r];
        const SplitRow &row = e.split_rows[index];
        std::atomic<int32_t> &left = e.left[index * m.kv_heads + kv_head];
        if (left.fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
        left.store(row.chunks, std::memory_order_relaxed);  // for the next layer
        Partial whole[TILE_ROWS];
        for (int q = 0; q < group; q++) {
            whole[q] = {HIDDEN_SCORE, 0, mine.values + (size_t)q * size};
            for (int chunk = 0; chunk < row.chunks; chunk++) {
                float *at = partial_at(e, row, chunk, kv_head, q);
                merge(whole[q], {at[size], at[size + 1], at}, size);
            }
        }
        finish_row(e, row.row, kv_head * group, group, whole);
    }
}

static void attention(Engine &e, Private &mine, int thread, int layer) {
    const llk_model &m = *e.model;
    const int group = m.heads / m.kv_heads, items = e.item_count * m.kv_heads, all = items + e.piece_count * m.kv_heads;
    std::atomic<int32_t> &next = e.next[layer & 1];
    if (thread == 0) e.next[(layer + 1) & 1].store(0, std::memory_order_relaxed);  // for the next layer
    for (int work; (work = next.fetch_add(1, std::memory_order_relaxed)) < all;) {
        // The last piece of a prompt sees most: it goes first. Items are small and fill the end.
        if (work >= e.piece_count * m.kv_heads) {
            const int item = work - e.piece_count * m.kv_heads;
            attend_item(e, mine, layer, e.items[item / m.kv_heads], item % m.kv_heads);
            continue;
        }
        const int unit = e.piece_count * m.kv_heads - 1 - work, kv_head = unit % m.kv_heads;
        for (int first = 0; first < group; first += TILE_ROWS)
            attend_piece(e, mine, layer, e.pieces[unit / m.kv_heads], kv_head, kv_head * group + first, imin(TILE_ROWS, group - first));
    }
    e.pool->barrier();
}

// Rows of a run that are left.
static inline int rows_of(const Engine &e, const llk_run &run) { return e.last ? run.kept : run.count; }

// Notes the runs that have something in `values` [rows][columns] that is not finite.
static void check_finite(Engine &e, int thread, const float *values, int columns) {
    int begin, end, row = 0;
    share(e.step->run_count, 1, thread, e.pool->threads, begin, end);
    for (int r = 0; r < end; r++) {
        const int count = rows_of(e, e.step->runs[r]);
        if (r >= begin) {
            vf sound = vf_zero();
            const float *x = values + (size_t)row * columns;
            for (size_t i = 0; i < (size_t)count * columns; i += 16) sound = vf_fma(vf_load(x + i), vf_zero(), sound);
            if (vf_sum(sound) != 0) e.step->finite[r] = 0;
        }
        row += count;
    }
}

static void lay_out_rows(Engine &e);

// Drops the rows of which nothing but keys and values is needed: most rows of a prompt.
static void keep_rows(Engine &e, int thread) {
    const llk_model &m = *e.model;
    check_finite(e, thread, e.qkv, qkv_columns(m));
    e.pool->barrier();
    if (thread == 0) {
        int from = 0, to = 0;
        for (int r = 0; r < e.step->run_count; r++) {
            const llk_run &run = e.step->runs[r];
            from += run.count;
            for (int row = from - run.kept; row < from; row++, to++) {
                memmove(e.x + (size_t)to * m.hidden_padded, e.x + (size_t)row * m.hidden_padded, (size_t)m.hidden_padded * 4);
                memmove(e.qkv + (size_t)to * qkv_columns(m), e.qkv + (size_t)row * qkv_columns(m), (size_t)qkv_columns(m) * 4);
            }
        }
        e.last = true;
        lay_out_rows(e);
    }
    e.pool->barrier();
}

// Whether there is something to read. A millisecond may pass between two looks, so a system call is nothing.
static bool is_readable(int descriptor) {
    pollfd watched = {descriptor, POLLIN, 0};
    return descriptor >= 0 && poll(&watched, 1, 0) > 0;
}

// Returns whether the step is to be interrupted behind this layer.
static bool layer_step(Engine &e, Private &mine, int thread, int index) {
    const llk_model &m = *e.model;
    const llk_layer &y = m.layer[index];
    const Source x = {e.x, m.hidden_padded, nullptr}, attended = {e.attended, out_columns(m), nullptr};
    const Source inner = {e.inner, m.inner, nullptr};
    Additions more = {e.adapters, e.reduced, index * 4};
    const auto product = [&](const llk_matrix &matrix, const Source &source, const Norm &norm, Output out) {
        if (e.adapted_tiles) out.more = &more;
        multiply_shared(e, thread, matrix, prepare(e, mine, thread, matrix, source, e.rows, norm, out.more), e.rows, out);
        more.which++;
    };
    const Output residual = {e.x, m.hidden_padded, STORE_ADD, 0};
    product(y.qkv, x, {y.norm1, y.norm1_bias}, {e.qkv, qkv_columns(m), STORE_PLAIN, 0});
    write_cache(e, thread, index);
    if (index + 1 == m.layers && e.kept < e.rows) keep_rows(e, thread);
    if (!e.rows) return false;
    attention(e, mine, thread, index);
    product(y.out, attended, {nullptr, nullptr}, residual);
    product(y.up, x, {y.norm2, y.norm2_bias}, {e.inner, m.inner, m.gated ? STORE_GATED : STORE_ACTIVATED, m.activation});
    if (thread == 0) e.interrupted[index & 1] = index + 1 < m.layers && is_readable(e.step->watch);
    product(y.down, inner, {nullptr, nullptr}, residual);
    return e.interrupted[index & 1];
}

// Logits of `count` rows of the hidden states, into `logits`.
static void head(Engine &e, Private &mine, int thread, const int32_t *rows, int count, float *logits) {
    const llk_model &m = *e.model;
    const Source x = {e.x, m.hidden_padded, rows};
    const Rows ready = prepare(e, mine, thread, m.head, x, count, {m.final_norm, m.final_norm_bias}, nullptr);
    multiply_shared(e, thread, m.head, ready, count, {logits, padded_vocab(m), STORE_PLAIN, 0});
}

// A step from layer `first` on, or the head alone.
struct StepJob {
    Engine *engine;
    const int32_t *rows;
    int count;
    float *logits;
    int first;
};

static void step_thread(void *argument, int thread) {
    StepJob &job = *(StepJob *)argument;
    Engine &e = *job.engine;
    const llk_model &m = *e.model;
    Private mine(m, e.thread_space + e.thread_bytes * (size_t)thread);
    if (job.first == 0) embed(e, thread);
    for (int i = job.first; i < m.layers; i++) {
        if (!layer_step(e, mine, thread, i)) continue;
        if (thread == 0) e.step->layer = i + 1;
        return;
    }
    if (thread == 0) e.step->layer = 0;
    check_finite(e, thread, e.x, m.hidden_padded);
    if (!job.count) return;
    head(e, mine, thread, job.rows, job.count, job.logits);
    for (int i = thread; i < job.count; i += e.pool->threads)
        choose_row(e.step->picks[i], job.logits + (size_t)i * padded_vocab(m), m.vocab, padded_vocab(m), mine.choose);
}

static void head_thread(void *argument, int thread) {
    StepJob &job = *(StepJob *)argument;
    Private mine(*job.engine->model, job.engine->thread_space + job.engine->thread_bytes * (size_t)thread);
    head(*job.engine, mine, thread, job.rows, job.count, job.logits);
}

static void open_engine(Engine &e, llk_pool *pool, const llk_model *model, llk_step *step) {
    e.pool = pool;
    e.model = model;
    e.step = step;
    e.last = false;
    e.rows = step->rows;
    e.kept = 0;
    for (int r = 0; r < step->run_count; r++) e.kept += step->runs[r].kept;
    lay_out(e, *model, step->workspace, step->max_rows, step->max_picks, pool->threads);
    e.next[0] = e.next[1] = 0;
}

// Blocks of a chunk that a row sees.
static inline int chunk_blocks(const SplitRow &row, int chunk) {
    return (imin(row.position + 1, (chunk + 1) * CHUNK) - chunk * CHUNK + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static bool same_blocks(const Engine &e, const SplitRow &a, const SplitRow &b, int chunk) {
    if (chunk >= a.chunks || chunk >= b.chunks || chunk_blocks(a, chunk) != chunk_blocks(b, chunk)) return false;
    const int32_t *left = e.step->runs[a.run].blocks, *right = e.step->runs[b.run].blocks;
    const int from = chunk * (CHUNK / BLOCK_TOKENS);
    return left == right || !memcmp(left + from, right + from, (size_t)chunk_blocks(a, chunk) * 4);
}

// Puts rows with equal beginnings of their block tables side by side and makes one item of each chunk that
// neighbours share.
static void make_items(Engine &e) {
    for (int i = 0; i < e.split_count; i++) e.order[i] = i;
    std::sort(e.order, e.order + e.split_count, [&](int a, int b) {
        const SplitRow &x = e.split_rows[a], &y = e.split_rows[b];
        const int32_t *left = e.step->runs[x.run].blocks, *right = e.step->runs[y.run].blocks;
        if (left != right) {
            const int blocks = imin(x.position, y.position) / BLOCK_TOKENS + 1;
            for (int i = 0; i < blocks; i++)
                if (left[i] != right[i]) return left[i] < right[i];
        }
        return x.position != y.position ? x.position < y.position : a < b;
    });
    const int most = piece_rows(*e.model);
    int longest = 0;
    for (int i = 0; i < e.split_count; i++) longest = imax(longest, e.split_rows[i].chunks);
    e.item_count = 0;
    for (int chunk = 0; chunk < longest; chunk++)
        for (int i = 0; i < e.split_count;) {
            const SplitRow &row = e.split_rows[e.order[i]];
            int count = 1;
            if (row.chunks > chunk) {
                while (i + count < e.split_count && count < most && same_blocks(e, row, e.split_rows[e.order[i + count]], chunk)) count++;
                e.items[e.item_count++] = {i, count, chunk};
            }
            i += count;
        }
    for (int i = 0; i < e.split_count; i++)
        for (int h = 0; h < e.model->kv_heads; h++)
            e.left[i * e.model->kv_heads + h].store(e.split_rows[i].chunks, std::memory_order_relaxed);
}

// Whether two runs begin with the same chunk.
static bool share_a_chunk(const llk_step &step) {
    for (int a = 0; a < step.run_count; a++)
        for (int b = a + 1; b < step.run_count; b++)
            if (step.runs[a].start >= CHUNK && step.runs[b].start >= CHUNK && step.runs[a].blocks[0] == step.runs[b].blocks[0]) return true;
    return false;
}

// Puts the rows that share an adapter side by side.
static void group_adapted(Engine &e) {
    int count = 0;
    for (int row = 0; row < e.rows; row++) {
        e.adapters[row] = e.step->runs[e.row_run[row]].adapter;
        if (e.adapters[row]) e.adapted[count++] = row;
    }
    std::sort(e.adapted, e.adapted + count, [&](int a, int b) { return e.adapters[a] != e.adapters[b] ? e.adapters[a] < e.adapters[b] : a < b; });
    e.adapted_tiles = 0;
    for (int i = 0; i < count; i++) {
        AdaptedTile *last = e.adapted_tiles ? &e.tiles[e.adapted_tiles - 1] : nullptr;
        if (last && last->adapter == e.adapters[e.adapted[i]] && last->count < REDUCED_ROWS) last->count++;
        else e.tiles[e.adapted_tiles++] = {e.adapters[e.adapted[i]], i, 1};
    }
}

// Decides how each row is attended to: generating ones chunk by chunk where that pays, for it gives every thread
// something to do, or reads a common beginning once; the others in pieces.
static void lay_out_rows(Engine &e) {
    const llk_model &m = *e.model;
    const llk_step &step = *e.step;
    const int most = piece_rows(m), group = m.heads / m.kv_heads;
    int row = 0, picks = 0, partials = 0, generating = 0;
    for (int r = 0; r < step.run_count; r++) generating += rows_of(e, step.runs[r]) <= TILE_ROWS;
    const bool few = e.pool->threads > 1 && generating * m.kv_heads < 4 * e.pool->threads;
    const bool split = group <= TILE_ROWS && (few || share_a_chunk(step));
    e.piece_count = e.split_count = e.item_count = 0;
    for (int r = 0; r < step.run_count; r++) {
        const llk_run &run = step.runs[r];
        const int count = rows_of(e, run), start = run.start + run.count - count;
        int needed = 0;
        for (int i = 0; i < count; i++) {
            e.row_run[row + i] = r;
            e.row_position[row + i] = start + i;
            needed += (start + i) / CHUNK + 1;
        }
        if (split && count <= TILE_ROWS && partials + needed <= most_partials(m)) {
            for (int i = 0; i < count; i++) {
                const int chunks = (start + i) / CHUNK + 1;
                e.split_rows[e.split_count++] = {r, row + i, start + i, chunks, partials};
                partials += chunks;
            }
        } else {
            for (int done = 0; done < count; done += most)
                e.pieces[e.piece_count++] = {r, row + done, imin(most, count - done), start + done};
        }
        for (int i = count - run.wanted; i < count; i++) e.wanted[picks++] = row + i;
        row += count;
    }
    e.rows = row;
    make_items(e);
    group_adapted(e);
}

extern "C" int32_t llk_run_step(llk_pool *pool, const llk_model *model, llk_step *step) {
    Engine e;
    open_engine(e, pool, model, step);
    lay_out_rows(e);
    memset(step->finite, 1, (size_t)step->run_count);
    StepJob job{&e, e.wanted, step->pick_count, e.logits, step->layer};
    pool->run(step_thread, &job);
    return step->layer > 0;
}

extern "C" int32_t llk_logits(llk_pool *pool, const llk_model *model, llk_step *step, const int32_t *rows, int32_t count,
                              float *logits) {
    Engine e;
    open_engine(e, pool, model, step);
    StepJob job{&e, rows, count, logits, 0};
    pool->run(head_thread, &job);
    return 0;
}

struct ChooseJob {
    const llk_model *model;
    float *logits;
    llk_pick *picks;
    int count, threads;
    bool score;
    uint8_t *space;
};

static void choose_thread(void *argument, int thread) {
    ChooseJob &job = *(ChooseJob *)argument;
    const int padded = padded_vocab(*job.model);
    ChooseSpace space;
    space.place(job.space + (ChooseSpace::bytes(padded) + 63) / 64 * 64 * (size_t)thread, padded);
    for (int i = thread; i < job.count; i += job.threads)
        (job.score ? score_row : choose_row)(job.picks[i], job.logits + (size_t)i * padded, job.model->vocab, padded, space);
}

static int32_t choose_all(llk_pool *pool, const llk_model *model, float *logits, llk_pick *picks, int count, bool score) {
    const size_t each = (ChooseSpace::bytes(padded_vocab(*model)) + 63) / 64 * 64;
    uint8_t *space = (uint8_t *)calloc((size_t)pool->threads, each);
    if (!space) return -1;
    ChooseJob job{model, logits, picks, count, pool->threads, score, space};
    pool->run(choose_thread, &job);
    free(space);
    return 0;
}

extern "C" int32_t llk_score(llk_pool *pool, const llk_model *model, float *logits, llk_pick *picks, int32_t count) {
    return choose_all(pool, model, logits, picks, count, true);
}

extern "C" int32_t llk_choose(llk_pool *pool, const llk_model *model, float *logits, llk_pick *picks, int32_t count) {
    return choose_all(pool, model, logits, picks, count, false);
}

struct ProductJob {
    llk_pool *pool;
    const llk_matrix *matrix;
    const float *x;
    int rows;
    float *y;
    Rows prepared;
};

static void product_thread(void *argument, int thread) {
    ProductJob &job = *(ProductJob *)argument;
    const Norm none = {nullptr, nullptr};
    int begin, end;
    if (is_tiled(*job.matrix)) {
        share(job.rows, 1, thread, job.pool->threads, begin, end);
        for (; begin < end; begin++) prepare_tiled(job.x + (size_t)begin * job.matrix->cols, none, {0, 1}, job.prepared, begin, job.rows);
    } else {
        share(job.matrix->cols / GROUP, 1, thread, job.pool->threads, begin, end);
        for (int row = 0; row < job.rows; row++) {
            const Tile tile = tile_of(row, job.rows);
            const float *x = job.x + (size_t)row * job.matrix->cols;
            with_format(*job.matrix, [&](auto format, auto fine) {
                for (int g = begin; g < end; g++)
                    prepare_group<decltype(format)::value, decltype(fine)::value>(x, none, {0, 1}, job.prepared, tile, row - tile.first, g);
            });
        }
    }
    job.pool->barrier();
    share(job.matrix->rows / 16, 1, thread, job.pool->threads, begin, end);
    multiply(*job.matrix, job.prepared, job.rows, {job.y, job.matrix->rows, STORE_PLAIN, 0}, begin, end);
}

extern "C" int32_t llk_matmul(llk_pool *pool, const llk_matrix *matrix, const float *x, int32_t rows, float *y) {
    Carver measure{nullptr};
    take_rows(measure, rows, matrix->cols);
    void *space = nullptr;
    if (posix_memalign(&space, 64, measure.used)) return -1;
    Carver carver{(uint8_t *)space};
    ProductJob job{pool, matrix, x, rows, y, take_rows(carver, rows, matrix->cols)};
    pool->run(product_thread, &job);
    free(space);
    return 0;
}
