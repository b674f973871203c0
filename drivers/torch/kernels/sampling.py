"""Chooses a token a row in one launch, without a word to the host: what `sampler.choose` does, on the device.

top_k and top_p need no sort. Both keep the scores from some threshold on, the largest from which on there are
still k scores, or still so much mass; it is searched for bit by bit in the order of floats read as integers.
Noise is the same Philox as the sampler's, keyed by seed and position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NOT_FINITE = -1
NOTHING_LEFT = -2

_TILE = 4096


@triton.jit
def _uniform(seed, position):
    """The first number of Philox4x64-10 (Salmon et al., 2011) as numpy counts, in [0, 1)."""
    a, b = tl.full((), 0xD2E7470EE14C6C93, tl.uint64), tl.full((), 0xCA5A826395121157, tl.uint64)
    zero = tl.full((), 0, tl.uint64)
    c0, c1, c2, c3 = position.to(tl.uint64) + 1, zero, zero, zero
    k0, k1 = seed.to(tl.uint64), zero
    for _ in tl.static_range(10):
        high0, low0, high1, low1 = tl.umulhi(a, c0), a * c0, tl.umulhi(b, c2), b * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        k1 += tl.full((), 0xBB67AE8584CAA73B, tl.uint64)
    return (c0 >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _key(score):
    """Unsigned integers in the order of the floats."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _scores(source, start, width, temperature, TILE: tl.constexpr):
    column = start + tl.arange(0, TILE)
    raw = tl.load(source + column, mask=column < width, other=float("-inf"))
    return tl.div_rn(raw, temperature)


@triton.jit
def _weights(score, highest, floor, WEIGHED: tl.constexpr):
    """What scores of at least `floor` (a key) count: 1 each, or their unnormalised probability."""
    if WEIGHED:
        weight = tl.exp(score - highest).to(tl.float64)
    else:
        weight = tl.where(score > float("-inf"), 1.0, 0.0).to(tl.float64)
    return tl.where(_key(score) >= floor, weight, 0.0)


@triton.jit
def _total(source, width, temperature, highest, floor, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    lanes = tl.zeros((TILE,), tl.float64)
    for start in range(0, width, TILE):
        lanes += _weights(_scores(source, start, width, temperature, TILE), highest, floor, WEIGHED)
    return tl.sum(lanes, 0)


@triton.jit
def _threshold(source, width, temperature, highest, floor, target, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """The largest key such that scores from it on, and from `floor` on, still count at least `target`."""
    base = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):  # two bits a pass
        first = tl.zeros((TILE,), tl.float64)
        second = tl.zeros((TILE,), tl.float64)
        third = tl.zeros((TILE,), tl.float64)
        for start in range(0, width, TILE):
            score = _scores(source, start, width, temperature, TILE)
            weight, key = _weights(score, highest, floor, WEIGHED), _key(score)
            first += tl.where(key >= base + step, weight, 0.0)
            second += tl.where(key >= base + 2 * step, weight, 0.0)
            third += tl.where(key >= base + 3 * step, weight, 0.0)
        reached = (tl.sum(first, 0) >= target).to(tl.uint32)
        reached += (tl.sum(second, 0) >= target).to(tl.uint32)
        reached += (tl.sum(third, 0) >= target).to(tl.uint32)
        base += reached * step
        step = step >> 2
    return base


@triton.jit(do_not_specialize=["rows"])  # or one more kernel would be compiled for a single row
def _sample(logits, numbers, reals, out, rows, width, logits_row, TILE: tl.constexpr):
    """`numbers` [4, rows]: row of the logits, seed, position, top_k. `reals` [3, rows]: temperature, top_p,
    log(min_p)."""
    row = tl.program_id(0)
    source = logits + tl.load(numbers + row) * logits_row
    peaks = tl.full((TILE,), float("-inf"), tl.float32)
    places = tl.zeros((TILE,), tl.int32)
    odd = tl.zeros((TILE,), tl.int32)
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        raw = tl.load(source + column, mask=column < width, other=float("-inf"))
        odd += ((raw != raw) | (raw == float("inf"))).to(tl.int32)
        places = tl.where(raw > peaks, column, places)
        peaks = tl.where(raw > peaks, raw, peaks)
    peak = tl.max(peaks, 0)
    token = tl.min(tl.where(peaks == peak, places, width), 0).to(tl.int64)
    temperature = tl.load(reals + row)
    if tl.sum(odd, 0) > 0:
        token = tl.full((), -1, tl.int64)
    elif peak == float("-inf"):
        token = tl.full((), -2, tl.int64)
    elif temperature > 0:
        highest = tl.div_rn(peak, temperature)
        floor = tl.full((), 0, tl.uint32)
        top_k = tl.load(numbers + 3 * rows + row)
        if (top_k > 0) & (top_k < width):
            floor = _threshold(source, width, temperature, highest, floor, top_k.to(tl.float64), False, TILE)
        top_p = tl.load(reals + rows + row)
        if top_p < 1:
            mass = top_p.to(tl.float64) * _total(source, width, temperature, highest, floor, True, TILE)
            found = _threshold(source, width, temperature, highest, floor, mass, True, TILE)
            # Less than one score is never left, whatever was rounded.
            floor = tl.minimum(tl.maximum(floor, found), _key(highest))
        floor = tl.maximum(floor, _key(highest + tl.load(reals + 2 * rows + row)))
        total = _total(source, width, temperature, highest, floor, True, TILE)
        level = total * _uniform(tl.load(numbers + rows + row), tl.load(numbers + 2 * rows + row))
        below = tl.zeros((TILE,), tl.int32)  # tokens whose cumulated weight the noise has passed
        latest = tl.zeros((TILE,), tl.int32)
        cumulated = tl.full((), 0.0, tl.float64)
        for start in range(0, width, TILE):
            column = start + tl.arange(0, TILE)
            score = _scores(source, start, width, temperature, TILE)
            weight = _weights(score, highest, floor, True)
            below += ((cumulated + tl.cumsum(weight, 0) <= level) & (column < width)).to(tl.int32)
            latest = tl.where(weight > 0, column, latest)
            cumulated += tl.sum(weight, 0)
        token = tl.minimum(tl.sum(below, 0), tl.max(latest, 0)).to(tl.int64)
    tl.store(out + row, token)


def sample(logits: torch.Tensor, numbers: torch.Tensor, reals: torch.Tensor) -> torch.Tensor:
    """A token for each column of `numbers` (int64 [4, R]: row of the logits, seed, position, top_k) and
    `reals` (float32 [3, R]: temperature, top_p, log of min_p) from float32 logits [rows, vocab_size]: int64
    [R], or NOT_FINITE, or NOTHING_LEFT where every score is -inf. Temperature 0 takes the best."""
    rows, width = numbers.shape[1], logits.shape[1]
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    tile = min(_TILE, triton.next_power_of_2(width))
    _sample[(rows,)](
        logits, numbers, reals, out, rows, width, logits.stride(0), TILE=tile, num_warps=max(1, tile // 256)
    )
    return out
