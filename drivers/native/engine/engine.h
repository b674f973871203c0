// The C interface of the native CPU engine: one step of a decoder over a paged KV cache.
//
// Only pointers and sizes; nothing here allocates but llk_pool_new. The caller (drivers/native/) keeps every
// array alive. All arithmetic of a row depends on that row alone: who shares the batch, how a prompt is cut
// into chunks and whether a token was guessed never change a bit of the result.
//
// Padding. Matrices are stored with `rows` rounded up to 16 and `cols` to 32; what is added is zero, and
// biases and norm weights are padded with zeros alike. A head has `head_dim` columns, a multiple of 16, of
// which the first `head_size` count. Vectors along the hidden size have `hidden_padded` columns.
//
// Packed matrices: blocks of 16 rows (output channels), one after another. Inside a block, by format:
//   LLK_F32    for each column: 16 floats, one a row
//   LLK_BF16   for each pair of columns: 16 rows x 2 bfloat16
//   LLK_Q8     for each group of 32 columns, 544 bytes: 8 vectors of 64 bytes, vector j holding for each of
//              the 16 rows the 4 columns 4j..4j+3 as value+128 (unsigned); then 16 fp16 scales d.
//              weight = d * (byte - 128)
//   LLK_Q4     for each group of 32 columns, 320 bytes: 4 vectors of 64 bytes, vector j holding for each of
//              the 16 rows 4 bytes, whose low nibbles are columns 4j..4j+3 and whose high nibbles are columns
//              16+4j..16+4j+3; then 16 fp16 scales d, 16 fp16 minima m.  weight = d * nibble + m
//              (GGUF's Q4_1 as it is; Q4_0 has m = -8 d)
// Every matrix begins at a multiple of 64 bytes.
//
// Adapters. A LoRA adapter adds B (scale * A x) to the products of some matrices, in float32 and without rounding x.
// Its numbers are float32, bfloat16 or int8 (LLK_Q8), with one scale a rank:
//   A          [ranks / 4][cols / 16][4][16], zero where it is padded
//   B          for each block of 16 rows of the matrix, for each rank that the block has: 16 numbers, one a row.
//              Matrices of one input that are packed as one have ranks of their own, side by side in A.
#pragma once
#include <stdint.h>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

#define LLK_ABI 6
#define LLK_MOST_RANKS 768  // of a llk_lora

enum { LLK_F32 = 0, LLK_BF16 = 1, LLK_Q8 = 2, LLK_Q4 = 3 };                // weight formats
enum { LLK_KV_F32 = 0, LLK_KV_BF16 = 1, LLK_KV_INT8 = 2 };                 // formats of the KV cache
enum { LLK_RMS_NORM = 0, LLK_LAYER_NORM = 1 };
enum { LLK_SILU = 0, LLK_GELU_TANH = 1, LLK_GELU = 2, LLK_RELU = 3 };

typedef struct {
    const void *data;   // packed
    const float *bias;  // [rows] or NULL
    int32_t rows, cols; // padded
    int32_t format;
    int32_t fine;       // Q8, Q4: whether activations have 15 bits instead of 8, at almost twice the cost
    const float *unit;  // from llk_units, or NULL. With units activations have 12 bits, and `fine` does not count
} llk_matrix;

typedef struct {
    const float *norm1, *norm1_bias;  // [hidden_padded]; biases are NULL for RMS norm
    const float *norm2, *norm2_bias;
    const float *q_norm, *k_norm;     // [head_dim] or NULL: RMS norm of each head before the rotation
    llk_matrix qkv;   // rows: heads queries, kv_heads keys, kv_heads values, of head_dim each
    llk_matrix out;   // cols: heads * head_dim (padded to 32)
    llk_matrix up;    // gated: blocks of 16 rows alternate, gate then up; else plain
    llk_matrix down;
    float scale;      // of the scores, 1/sqrt(head_size) as a rule
    int32_t window;   // 0: none; else a token sees itself and the window-1 tokens before it
    int32_t rotated;  // whether queries and keys are rotated
    int32_t reserved;
} llk_layer;

typedef struct {
    int32_t layers, hidden, hidden_padded, heads, kv_heads, head_dim, head_size, inner;  // inner: padded to 32
    int32_t vocab, norm, activation, gated, kv_format, rotary;  // rotary: pairs that are rotated
    float epsilon, rope_scale;
    const float *frequencies;         // [rotary]
    const float *positions;           // learned positions [context, hidden_padded] or NULL
    const float *final_norm, *final_norm_bias;
    llk_matrix head;                  // rows: the vocabulary
    llk_matrix embedding;             // the same as head when they are tied
    const llk_layer *layer;           // [layers]
    uint8_t *kv;                      // [blocks][layers][kv_heads][tile]; see llk_tile_bytes
} llk_model;

// What an adapter adds to one matrix; nothing if `ranks` is 0.
typedef struct {
    const void *a, *b;
    const int32_t *place;  // [rows / 16 + 1] the vectors of B that belong to block i are place[i] … place[i + 1] - 1
    const int32_t *first;  // [rows / 16] the rank that the first of them belongs to
    const float *scale;    // [ranks]
    int32_t ranks;         // of A, padded to 4
    int32_t format;        // LLK_F32, LLK_BF16 or LLK_Q8
} llk_lora;

// A run: `count` consecutive positions of one sequence, from `start`. The last `wanted` rows get logits; of the last
// `kept`, at least `wanted`, llk_logits can be had behind the step.
typedef struct {
    const uint32_t *tokens;  // the token at `start` and those after it
    const int32_t *blocks;   // the sequence's block table
    const llk_lora *adapter; // [layers][4]: of qkv, out, up, down; NULL: none
    int32_t start, count, wanted, kept;
} llk_run;

// What to choose from one row of logits, in the order of Hugging Face `generate`: repetition penalty, presence
// and frequency, n-grams, forbidden stops, mask; then temperature, top_k, top_p, min_p.
typedef struct {
    const uint32_t *tokens;  // [known] the context that the penalties see
    const int32_t *stops;    // [stop_count] tokens that are forbidden when `forbid_stops`
    int64_t seed;
    double noise;            // out: the number drawn (tests)
    int32_t known, prompt_length, position, stop_count, forbid_stops;
    int32_t top_k, ngram, top, beams;  // top: how many alternatives to list (-1: no scores); beams: see below
    float temperature, top_p, min_p, repetition, presence, frequency;
    float logprob;           // out: natural log-probability of the token by the raw logits
    int32_t token;           // out; -1: nothing is left to choose; -2: the logits are not finite
    int32_t *ids;            // out [max(top, beams)]: the best tokens, best first
    float *values;           // out: their log-probabilities. With beams: log-softmax first, penalties after
    int32_t listed;          // out: how many
    int32_t reserved;
    const uint32_t *mask;    // [vocab / 32] bits of the tokens that may be chosen; NULL: all
} llk_pick;

typedef struct {
    const llk_run *runs;
    int32_t run_count;
    int32_t rows;        // sum of the runs' counts, at most `max_rows` of the workspace
    llk_pick *picks;     // one for each wanted row, in order
    int32_t pick_count;  // sum of the runs' wanted
    int32_t max_picks;
    uint8_t *workspace;  // llk_workspace_bytes bytes, 64-byte aligned
    int32_t max_rows;
    int32_t layer;       // in: 0; out: where a step that was interrupted goes on
    uint8_t *finite;     // out [run_count]: whether all hidden states of the run are finite
    int32_t watch;       // a descriptor: the step is interrupted within a layer when there is something to read; -1: none
    int32_t reserved;
} llk_step;

typedef struct llk_pool llk_pool;

int32_t llk_abi(void);
// 0: the operating system keeps registers that this variant needs from this process. Then there is no pool either.
int32_t llk_usable(void);
// 1 if products with this matrix are quicker in units: then `to` [2][rows], unless it is NULL, is what `unit` should be.
int32_t llk_units(const llk_matrix *matrix, float *to);
const char *llk_isa(void);
// Bytes of one KV tile: 16 positions of one KV head.
int64_t llk_tile_bytes(const llk_model *model);
// Bytes that a step needs; they have to be zero at first.
int64_t llk_workspace_bytes(const llk_pool *pool, const llk_model *model, int32_t max_rows, int32_t max_picks);

// Threads that wait for work. `cpus` [threads] are the processors that they run on, the first one being the caller's while it
// computes; NULL: any. NULL when it cannot.
llk_pool *llk_pool_new(int32_t threads, const int32_t *cpus);
void llk_pool_free(llk_pool *pool);

// Computes a step. Returns 0, or 1 when it was interrupted: the same call goes on with it, after steps with workspaces
// of their own if there are any. Nothing is checked that the caller can check.
int32_t llk_run_step(llk_pool *pool, const llk_model *model, llk_step *step);
// Logits of rows of the step just computed (`rows` count the rows that were kept), into [count][vocab padded
// to 16] floats. Needs that step's workspace.
int32_t llk_logits(llk_pool *pool, const llk_model *model, llk_step *step, const int32_t *rows, int32_t count,
                   float *logits);
// Log-probabilities of the wanted tokens in `picks` (token is in, not out) by rows of logits.
int32_t llk_score(llk_pool *pool, const llk_model *model, float *logits, llk_pick *picks, int32_t count);
// Chooses from logits, one row a pick (tests).
int32_t llk_choose(llk_pool *pool, const llk_model *model, float *logits, llk_pick *picks, int32_t count);
// y [rows, matrix rows] = x [rows, cols] @ matrixᵀ + bias (tests and benchmarks).
int32_t llk_matmul(llk_pool *pool, const llk_matrix *matrix, const float *x, int32_t rows, float *y);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
