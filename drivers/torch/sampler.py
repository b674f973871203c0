"""Chooses tokens from logits, many sequences at a time.

Order of Hugging Face `generate`: repetition penalty, presence and frequency, no_repeat_ngram_size,
min_new_tokens; then temperature, top_k, top_p, min_p, each leaving at least one token. Noise is one uniform
number from Philox (Salmon et al., 2011) keyed by the seed, counted by the position of the token, turned into
a token by the inverse of the distribution: it does not depend on the batch, and a recomputed sequence
repeats itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llmasos.syscalls import types as t

from ..grammar import blank
from ..mirror import Choice, Sequence
from .transfer import fetch, send

_Ids = np.ndarray[Any, np.dtype[np.int64]]

# The nucleus of top_p is looked for among so many tokens first; a flat distribution needs a full sort.
_NUCLEUS = 1024

NOT_FINITE = "the model's logits are not finite: it overflowed or its weights are broken"
NOTHING_LEFT = "no token is left to choose: no_repeat_ngram_size, min_new_tokens or the grammar forbid all"


def uniform(seed: int, position: int) -> float:
    """The noise of a sequence with `seed` for the token at `position`, in [0, 1)."""
    raw = np.random.Philox(key=seed, counter=position).random_raw()
    return (raw >> 11) / 2**53


def choose(logits: torch.Tensor, rows: list[tuple[Sequence, int]]) -> list[Choice]:
    """A token for each row of float32 logits [R, vocab_size], which are left as they are. A row is a
    sequence and the position of the token that is chosen; a sequence may have several, if nothing that came
    before changes its scores."""
    best, token = logits.max(dim=-1)
    finite, tokens = best.isfinite().tolist(), token.tolist()
    choices = [Choice(tokens[row], error="" if finite[row] else NOT_FINITE) for row in range(len(rows))]
    working = [
        row for row, (s, _) in enumerate(rows) if finite[row] and (s.sampling.temperature > 0 or s.changed)
    ]
    if working:
        scores = logits[working]
        process_rows(scores, [(index, *rows[row]) for index, row in enumerate(working)])
        for row, found in zip(working, _draw(scores, [rows[row] for row in working]), strict=True):
            choices[row] = Choice(found) if found >= 0 else Choice(-1, error=NOTHING_LEFT)
    asked = [
        row
        for row, choice in enumerate(choices)
        if not choice.error and rows[row][0].sampling.logprobs is not None
    ]
    if asked:
        wanted = [choices[row].token for row in asked]
        tops = [rows[row][0].sampling.logprobs or 0 for row in asked]
        for row, chosen in zip(asked, score(logits[asked], wanted, tops), strict=True):
            choices[row].chosen = chosen
    return choices


class Scored:
    """Natural log-probabilities by the raw logits [R, vocab_size]: of one token a row (`tokens` [R]), of the
    best `tops`. Read by `chosen` once the device has come so far."""

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, tops: list[int]) -> None:
        logprobs = torch.log_softmax(logits, dim=-1)
        self._tops, self._most = tops, min(max(tops), logits.shape[1])
        self._own = fetch(logprobs.gather(1, tokens[:, None])[:, 0])
        self._best = tuple(fetch(part) for part in logprobs.topk(self._most)) if self._most else ()

    def chosen(self) -> list[t.Chosen]:
        own = self._own.tolist()
        if not self._most:
            return [t.Chosen(value) for value in own]
        values, ids = (part.tolist() for part in self._best)
        return [
            t.Chosen(
                own[row], [t.TokenLogprob(ids[row][i], values[row][i]) for i in range(min(top, self._most))]
            )
            for row, top in enumerate(self._tops)
        ]


def score(logits: torch.Tensor, tokens: list[int], tops: list[int]) -> list[t.Chosen]:
    """See Scored."""
    scored = Scored(logits, send(np.array(tokens), logits.device), tops)
    if logits.device.type == "cuda":
        torch.cuda.current_stream(logits.device).synchronize()
    return scored.chosen()


def best_continuations(logits: torch.Tensor, sequence: Sequence, count: int) -> list[t.TokenLogprob]:
    """The best `count` tokens of a beam from its logits [vocab_size]: log-softmax first, processors after, as
    Hugging Face's beam search has it. Tokens that are forbidden are left out."""
    scores = torch.log_softmax(logits, dim=-1)
    process(scores, sequence)
    values, ids = (part.tolist() for part in scores.topk(min(count, len(scores))))
    pairs = zip(ids, values, strict=True)
    return [t.TokenLogprob(token, value) for token, value in pairs if value > -math.inf]


def process(scores: torch.Tensor, sequence: Sequence) -> None:
    """Applies the penalties and bans of `sequence` to the scores [vocab_size] of its next token, in place."""
    process_rows(scores[None], [(0, sequence, len(sequence.tokens))])


def process_rows(scores: torch.Tensor, rows: list[tuple[int, Sequence, int]]) -> None:
    """Applies penalties, bans and grammars to scores [R, vocab_size], in place, all rows at once: each entry
    is a row of the scores, its sequence and the position that is chosen. What changes is found on the host
    and sent as lists of places, masks as bytes."""
    size = scores.shape[1]
    seen, penalties, made, costs, banned = [], [], [], [], []
    _constrain(scores, [entry for entry in rows if entry[1].constraint is not None])
    for row, sequence, _ in rows:
        if not sequence.processed:
            continue
        sampling, first = sequence.sampling, row * size
        tokens = np.array(sequence.tokens, np.int64)
        if sampling.repetition_penalty != 1:
            seen.append(np.unique(tokens) + first)
            penalties.append(np.full(len(seen[-1]), sampling.repetition_penalty, np.float32))
        if sampling.presence_penalty or sampling.frequency_penalty:
            generated, times = np.unique(tokens[sequence.prompt_length :], return_counts=True)
            made.append(generated + first)
            cost = sampling.presence_penalty + sampling.frequency_penalty * times
            costs.append(cost.astype(np.float32))
        if sampling.no_repeat_ngram_size:
            banned.append(_completes_ngram(tokens, sampling.no_repeat_ngram_size) + first)
        if sequence.generated < sampling.min_new_tokens:
            stops = [token for token in sampling.stop_token_ids if token < size]
            banned.append(np.array(stops, np.int64) + first)
    flat, device = scores.view(-1), scores.device
    if seen:
        places, penalty = send(np.concatenate(seen), device), send(np.concatenate(penalties), device)
        had = flat[places]
        flat[places] = torch.where(had < 0, had * penalty, had / penalty)
    if made:
        places = send(np.concatenate(made), device)
        flat[places] = flat[places] - send(np.concatenate(costs), device)
    if banned:
        flat.index_fill_(0, send(np.concatenate(banned), device), -math.inf)


def _constrain(scores: torch.Tensor, rows: list[tuple[int, Sequence, int]]) -> None:
    """Forbids what the rows' grammars do not let follow; everything where one has failed."""
    if not rows:
        return
    size = scores.shape[1]
    masks = np.zeros((len(rows), size // 32 + 1), np.uint32)
    for row, (_, sequence, position) in enumerate(rows):
        mask = blank(size)
        if not sequence.mask(position, mask):
            masks[row] = mask
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=size, bitorder="little")
    places = send(np.array([row for row, _, _ in rows]), scores.device)
    forbidden = send(bits, scores.device) == 0
    scores[places] = scores[places].masked_fill(forbidden, -math.inf)


def _completes_ngram(tokens: _Ids, size: int) -> _Ids:
    """The tokens that would repeat an n-gram of `tokens`."""
    if len(tokens) < size:
        return tokens[:0]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    last = tokens[len(tokens) - size + 1 :]
    found: _Ids = windows[(windows[:, :-1] == last).all(axis=1), -1].copy()
    return found


def _draw(scores: torch.Tensor, rows: list[tuple[Sequence, int]]) -> list[int]:
    """One token a row of processed scores [R, vocab_size], which are overwritten; -1 if all are forbidden."""
    best, token = scores.max(dim=-1)
    found = [
        value if possible else -1
        for value, possible in zip(token.tolist(), best.isfinite().tolist(), strict=True)
    ]
    noisy = [row for row, (s, _) in enumerate(rows) if s.sampling.temperature > 0 and found[row] >= 0]
    if noisy:
        chosen = [rows[row] for row in noisy]
        drawn = sample(warp(scores[noisy], [s.sampling for s, _ in chosen]), chosen)
        for row, value in zip(noisy, drawn, strict=True):
            found[row] = value
    return found


def sample(scores: torch.Tensor, rows: list[tuple[Sequence, int]]) -> list[int]:
    """Inverse of the cumulated distribution at each row's noise, in double precision."""
    cumulated = torch.softmax(scores, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    noise = [uniform(s.sampling.seed or 0, position) for s, position in rows]
    level = torch.tensor(noise, dtype=torch.float64, device=scores.device)[:, None] * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, level, right=True)
    return [int(value) for value in place[:, 0].clamp_(max=scores.shape[1] - 1).tolist()]


def warp(scores: torch.Tensor, samplings: list[t.Sampling]) -> torch.Tensor:
    """Temperature, top_k, top_p and min_p on scores [R, vocab_size]; in place."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=scores.dtype, device=scores.device)[:, None]

    scores /= column([s.temperature for s in samplings])
    size = scores.shape[1]
    if rows := [row for row, s in enumerate(samplings) if 0 < s.top_k < size]:
        _keep_top_k(scores, rows, [samplings[row].top_k for row in rows])
    if rows := [row for row, s in enumerate(samplings) if s.top_p < 1]:
        _keep_nucleus(scores, rows, column([samplings[row].top_p for row in rows]))
    if any(s.min_p > 0 for s in samplings):
        floor = column([math.log(s.min_p) if s.min_p > 0 else -math.inf for s in samplings])
        scores.masked_fill_(scores < scores.amax(dim=-1, keepdim=True) + floor, -math.inf)
    return scores


def _keep_top_k(scores: torch.Tensor, rows: list[int], counts: list[int]) -> None:
    """Ties with the k-th score stay, as in Hugging Face."""
    part = scores[rows]
    index = torch.tensor(counts, device=scores.device)[:, None] - 1
    least = part.topk(max(counts)).values.gather(1, index)
    scores[rows] = part.masked_fill(part < least, -math.inf)


def _keep_nucleus(scores: torch.Tensor, rows: list[int], mass: torch.Tensor) -> None:
    """Keeps the likeliest tokens before which less than `mass` [rows, 1] has been collected."""
    part = scores[rows]
    probabilities = torch.softmax(part, dim=-1)
    for count in (min(_NUCLEUS, scores.shape[1]), scores.shape[1]):
        values = probabilities.topk(count).values
        collected = values.cumsum(dim=-1)
        if count == scores.shape[1] or bool((collected[:, -1:] >= mass).all()):
            break
    # Ties with the least of them stay, so that what is kept does not depend on how equals are sorted.
    least = values.masked_fill(collected - values >= mass, math.inf).amin(dim=-1, keepdim=True)
    scores[rows] = part.masked_fill(probabilities < least, -math.inf)
