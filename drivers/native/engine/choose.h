// Chooses a token from one row of logits, in the order and with the meanings of Hugging Face `generate`.
//
// Noise is Philox4x64-10 (Salmon et al., 2011) keyed by the seed and counted by the position, turned into a
// token by the inverse of the cumulated distribution: it depends on nothing else, so a recomputed sequence
// repeats itself.
#pragma once
#include <algorithm>
#include <functional>

#include "kernels.h"

// The first of four numbers of numpy's Philox(key=seed, counter=position).
static inline uint64_t philox(uint64_t seed, uint64_t position) {
    uint64_t c[4] = {position + 1, position == UINT64_MAX, 0, 0}, k0 = seed, k1 = 0;
    for (int round = 0; round < 10; round++) {
        unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c[0];
        unsigned __int128 b = (unsigned __int128)0xCA5A826395121157u * c[2];
        uint64_t next[4] = {(uint64_t)(b >> 64) ^ c[1] ^ k0, (uint64_t)b, (uint64_t)(a >> 64) ^ c[3] ^ k1, (uint64_t)a};
        memcpy(c, next, sizeof c);
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    return c[0];
}

struct Candidate {
    float score;
    int32_t token;
};

// Better first: the higher score, and the lower number among equals.
static inline bool better(const Candidate &a, const Candidate &b) {
    return a.score != b.score ? a.score > b.score : a.token < b.token;
}

// What one thread needs besides the logits; `padded` is the vocabulary rounded up to 16.
struct ChooseSpace {
    float *scores;       // [padded]
    int32_t *times;      // [padded], all zero between calls
    Candidate *found;    // [padded]
    float *peaks;        // [padded / 16]
    static size_t bytes(int padded) { return (size_t)padded * 16 + (size_t)padded / 16 * 4 + 64; }
    void place(uint8_t *at, int padded) {
        scores = (float *)at;
        times = (int32_t *)(scores + padded);
        found = (Candidate *)(times + padded);
        peaks = (float *)(found + padded);
    }
};

// The `count` best of scores [padded], best first, and those equal to the last if `ties`. Returns how many.
static int best_of(const float *scores, int padded, int count, bool ties, const ChooseSpace &space) {
    const int vectors = padded / 16;
    float least = -INFINITY;
    if (count < vectors) {
        // At least `count` scores reach the count-th best of the vectors' peaks.
        for (int i = 0; i < vectors; i++) space.peaks[i] = vf_highest(vf_load(scores + i * 16));
        std::nth_element(space.peaks, space.peaks + count - 1, space.peaks + vectors, std::greater<float>());
        least = space.peaks[count - 1];
    }
    int found = 0;
    vf floor = vf_set(least);
    for (int i = 0; i < vectors; i++) {
        uint32_t mask = vf_not_below(vf_load(scores + i * 16), floor);
        for (; mask; mask &= mask - 1) {
            int token = i * 16 + __builtin_ctz(mask);
            if (scores[token] > -INFINITY) space.found[found++] = {scores[token], token};
        }
    }
    if (found > count) {
        std::nth_element(space.found, space.found + count - 1, space.found + found, better);
        int keep = count;
        if (ties)
            for (int i = count; i < found; i++)
                if (space.found[i].score == space.found[count - 1].score) std::swap(space.found[keep++], space.found[i]);
        found = keep;
    }
    std::sort(space.found, space.found + found, better);
    return found;
}

// log(sum(exp(x))) of x [padded]; what lies behind the vocabulary is -inf.
static double log_sum(const float *x, int padded, float most) {
    double sum = 0;
    vf top = vf_set(most);
    for (int i = 0; i < padded; i += 16) sum += vf_sum(vf_exp(vf_sub(vf_load(x + i), top)));
    // vf_exp ends at exp(-87), which adds nothing that a double would notice here.
    return (double)most + log(sum);
}

static inline bool has_processors(const llk_pick &pick) {
    return pick.repetition != 1 || pick.presence != 0 || pick.frequency != 0 || pick.ngram > 0 || pick.forbid_stops || pick.mask;
}

static void process(const llk_pick &pick, float *scores, int vocab, int32_t *times) {
    if (pick.repetition != 1) {
        for (int i = 0; i < pick.known; i++) {
            uint32_t token = pick.tokens[i];
            if (times[token]++) continue;
            scores[token] = scores[token] < 0 ? scores[token] * pick.repetition : scores[token] / pick.repetition;
        }
        for (int i = 0; i < pick.known; i++) times[pick.tokens[i]] = 0;
    }
    if (pick.presence != 0 || pick.frequency != 0) {
        for (int i = pick.prompt_length; i < pick.known; i++) times[pick.tokens[i]]++;
        for (int i = pick.prompt_length; i < pick.known; i++) {
            uint32_t token = pick.tokens[i];
            if (times[token]) scores[token] -= pick.presence + pick.frequency * (float)times[token];
            times[token] = 0;
        }
    }
    if (pick.ngram > 0 && pick.known >= pick.ngram) {
        const uint32_t *last = pick.tokens + pick.known - pick.ngram + 1;
        for (int i = 0; i + pick.ngram <= pick.known; i++)
            if (!memcmp(pick.tokens + i, last, (size_t)(pick.ngram - 1) * 4)) scores[pick.tokens[i + pick.ngram - 1]] = -INFINITY;
    }
    if (pick.forbid_stops)
        for (int i = 0; i < pick.stop_count; i++)
            if (pick.stops[i] < vocab) scores[pick.stops[i]] = -INFINITY;
    if (pick.mask)
        for (int i = 0; i < vocab; i += 32) {
            const uint32_t may = pick.mask[i / 32];
            if (may == UINT32_MAX) continue;
            const int end = imin(32, vocab - i);
            if (!may) {
                for (int k = 0; k < end; k++) scores[i + k] = -INFINITY;
            } else {
                for (int k = 0; k < end; k++)
                    if (!(may >> k & 1)) scores[i + k] = -INFINITY;
            }
        }
}

// The token at `pick.noise` of the distribution over `found` candidates with these scores.
static int32_t draw(const llk_pick &pick, Candidate *found, int count, float most) {
    std::sort(found, found + count, [](const Candidate &a, const Candidate &b) { return a.token < b.token; });
    double total = 0;
    for (int i = 0; i < count; i++) total += exp((double)found[i].score - most);
    double level = pick.noise * total, sum = 0;
    for (int i = 0; i < count; i++)
        if ((sum += exp((double)found[i].score - most)) > level) return found[i].token;
    return found[count - 1].token;
}

// The token at `pick.noise` of the distribution over the whole vocabulary.
static int32_t draw_from_all(const llk_pick &pick, const float *scores, int padded, float most, float *weights) {
    double total = 0;
    vf top = vf_set(most), none = vf_set(-80.f);
    for (int i = 0; i < padded; i += 16) {
        vf x = vf_sub(vf_load(scores + i), top);
        vf_store(weights + i, vf_exp(x));
        uint32_t there = vf_not_below(x, none);  // the others have no weight
        for (int k = 0; k < 16; k++) {
            if (!(there >> k & 1)) weights[i + k] = 0;
            total += weights[i + k];
        }
    }
    double level = pick.noise * total, sum = 0;
    int32_t last = 0;
    for (int token = 0; token < padded; token++) {
        if (weights[token] > 0) last = token;
        if ((sum += weights[token]) > level) return token;
    }
    return last;
}

static int32_t sample(const llk_pick &pick, float *scores, int vocab, int padded, float most, const ChooseSpace &space) {
    for (int i = 0; i < padded; i += 16) vf_store(scores + i, vf_div(vf_load(scores + i), vf_set(pick.temperature)));
    most /= pick.temperature;
    const bool few = pick.top_k > 0 && pick.top_k < vocab;
    if (!few && pick.top_p >= 1 && pick.min_p <= 0)
        return draw_from_all(pick, scores, padded, most, (float *)space.found);
    int count;
    double all = 0;  // the mass of what is left after top_k, relative to exp(most)
    if (few) {
        count = best_of(scores, padded, pick.top_k, true, space);
        for (int i = 0; i < count; i++) all += exp((double)space.found[i].score - most);
    } else {
        if (pick.top_p < 1) all = exp(log_sum(scores, padded, most) - most);
        count = best_of(scores, padded, 1024, false, space);
        double sum = 0;
        for (int i = 0; i < count; i++) sum += exp((double)space.found[i].score - most);
        // A flat distribution: its nucleus, or what min_p leaves, may reach further down.
        if ((pick.top_p < 1 && sum < pick.top_p * all) || pick.top_p >= 1) count = best_of(scores, padded, padded, false, space);
    }
    if (pick.top_p < 1) {
        double before = 0;
        int keep = 0;
        while (keep < count && (keep == 0 || before < pick.top_p * all)) before += exp((double)space.found[keep++].score - most);
        while (keep < count && space.found[keep].score == space.found[keep - 1].score) keep++;  // ties stay
        count = keep;
    }
    if (pick.min_p > 0) {
        float floor = most + logf(pick.min_p);
        while (count > 1 && space.found[count - 1].score < floor) count--;
    }
    return draw(pick, space.found, count, most);
}

// Fills in what `pick` asks for. logits [padded]; behind `vocab` they are overwritten with -inf.
static void choose_row(llk_pick &pick, float *logits, int vocab, int padded, const ChooseSpace &space) {
    for (int i = vocab; i < padded; i++) logits[i] = -INFINITY;
    vf most = vf_set(-INFINITY), sound = vf_zero();
    for (int i = 0; i < padded; i += 16) {
        vf x = vf_load(logits + i);
        most = vf_max(most, x);
        if (i + 16 <= vocab) sound = vf_fma(x, vf_zero(), sound);
    }
    for (int i = vocab / 16 * 16; i < vocab; i++) sound = vf_fma(vf_set(logits[i]), vf_zero(), sound);
    float top = vf_highest(most);
    pick.listed = 0;
    pick.token = -2;
    if (!(vf_sum(sound) == 0) || !(top < INFINITY)) return;
    const float *scores = logits;
    const double whole = pick.top >= 0 || pick.beams ? log_sum(logits, padded, top) : 0;
    if (pick.beams) {
        for (int i = 0; i < padded; i++) space.scores[i] = (float)((double)logits[i] - whole);
        process(pick, space.scores, vocab, space.times);
        pick.listed = best_of(space.scores, padded, imin(pick.beams, vocab), false, space);
        for (int i = 0; i < pick.listed; i++) pick.ids[i] = space.found[i].token, pick.values[i] = space.found[i].score;
        pick.token = -1;
        return;
    }
    if (pick.temperature > 0 || has_processors(pick)) {
        memcpy(space.scores, logits, (size_t)padded * 4);
        process(pick, space.scores, vocab, space.times);
        scores = space.scores;
        top = -INFINITY;
        for (int i = 0; i < padded; i++) top = scores[i] > top ? scores[i] : top;
        if (top == -INFINITY) {
            pick.token = -1;
            return;
        }
    }
    if (pick.temperature > 0) {
        pick.noise = (double)(philox((uint64_t)pick.seed, (uint64_t)pick.position) >> 11) * 0x1p-53;
        pick.token = sample(pick, space.scores, vocab, padded, top, space);
    } else {
        vf best = vf_set(top);
        for (int i = 0; i < padded; i += 16)
            if (uint32_t mask = vf_not_below(vf_load(scores + i), best)) {
                pick.token = i + __builtin_ctz(mask);
                break;
            }
    }
    if (pick.top < 0) return;
    pick.logprob = (float)((double)logits[pick.token] - whole);
    if (pick.top > 0) {
        pick.listed = best_of(logits, padded, imin(pick.top, vocab), false, space);
        for (int i = 0; i < pick.listed; i++)
            pick.ids[i] = space.found[i].token, pick.values[i] = (float)((double)space.found[i].score - whole);
    }
}

// The score of the token that `pick` names, and the best alternatives.
static void score_row(llk_pick &pick, float *logits, int vocab, int padded, const ChooseSpace &space) {
    for (int i = vocab; i < padded; i++) logits[i] = -INFINITY;
    float top = -INFINITY;
    for (int i = 0; i < vocab; i++) top = logits[i] > top ? logits[i] : top;
    const double whole = log_sum(logits, padded, top);
    pick.logprob = (float)((double)logits[pick.token] - whole);
    pick.listed = pick.top > 0 ? best_of(logits, padded, imin(pick.top, vocab), false, space) : 0;
    for (int i = 0; i < pick.listed; i++)
        pick.ids[i] = space.found[i].token, pick.values[i] = (float)((double)space.found[i].score - whole);
}
