"""The workloads: which requests go to every system, and what is read off their times.

Prompts are windows of one English text (opticks.txt, Newton's Opticks, in the public domain) as token ids of
the model, the same ids for every system. No two prompts of a session begin at the same place, so no prefix
cache helps but where the workload shares a prefix on purpose.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systems.base import Request

TEXT = Path(__file__).parent / "opticks.txt"

Encode = Callable[[str], list[int]]
Run = dict[str, Any]


class Prompts:
    """Windows of the text. `begin` moves on with every window, by an odd stride that is no block's size."""

    def __init__(self, encode: Encode, round_number: int = 0) -> None:
        self.encode = encode
        self._text = encode(TEXT.read_text())
        self._at = 5077 * round_number

    def take(self, count: int) -> list[int]:
        self._at = (self._at + count + 37) % (len(self._text) - 2048)
        return self._text[self._at : self._at + count]


@dataclass(frozen=True)
class Metric:
    """A figure of a workload. `better` is "more" or "less"."""

    name: str
    unit: str
    better: str


@dataclass(frozen=True)
class Workload:
    """`requests` makes one round's requests, `measure` reads the figures off what came back."""

    name: str
    about: str
    metrics: tuple[Metric, ...]
    requests: Callable[[Prompts, int], list[Request]]
    measure: Callable[[Run], dict[str, float]]
    stop_after: float | None = None
    samples_memory: bool = False
    fresh_process: bool = False


RATE = "tokens/s"


def _last(run: Run) -> float:
    return max(float(request["times"][-1]) for request in run["requests"])


def _output_rate(run: Run) -> float:
    return sum(len(request["tokens"]) for request in run["requests"]) / _last(run)


def _decode1(prompts: Prompts, new: int) -> list[Request]:
    return [Request("one", prompts.take(32), new)]


def _measure_decode(run: Run) -> dict[str, float]:
    (request,) = run["requests"]
    # What came with the first event was not produced between the first and the last.
    made = len(request["tokens"]) - request["counts"][0]
    return {"decode": made / (request["times"][-1] - request["times"][0])}


def _agents16(prompts: Prompts, new: int) -> list[Request]:
    shared = prompts.take(512)
    return [Request(f"agent{n}", shared + prompts.take(64), new, prefix=512) for n in range(16)]


def _distinct16(prompts: Prompts, new: int) -> list[Request]:
    return [Request(f"prompt{n}", prompts.take(128), new) for n in range(16)]


def _prefill1024(prompts: Prompts, new: int) -> list[Request]:
    return [Request("long", prompts.take(1024), new)]


def _measure_prefill(run: Run) -> dict[str, float]:
    (request,) = run["requests"]
    return {"prefill": request["prompt"] / request["times"][0]}


TURNS = 8


def _chat8(prompts: Prompts, new: int) -> list[Request]:
    """Turns of 40 new tokens, the chat template's own among them."""
    opening = prompts.encode("<|im_start|>user\n")
    closing = prompts.encode("<|im_end|>\n<|im_start|>assistant\n")
    between = prompts.encode("<|im_end|>\n")
    turns = []
    for turn in range(TURNS):
        frame = (between if turn else []) + opening
        turns.append(frame + prompts.take(40 - len(frame) - len(closing)) + closing)
    return [Request("turn.0", turns[0], new, turns=turns[1:])]


def _measure_chat(run: Run) -> dict[str, float]:
    first = [request["times"][0] - request["at"] for request in run["requests"][1:]]
    return {"total": _last(run), "first_token_later_turns": statistics.median(first)}


BATCH_REQUESTS = 24
BATCH_NEW = 128
LOAD_S = 20.0
ARRIVE_S = (3.0, 1.0)


def _arrivals(prompts: Prompts, new: int, until: float) -> Iterator[Request]:
    first, every = ARRIVE_S
    for n in range(int((until - first) / every)):
        # Not in step with anything that repeats.
        at = first + n * every + 0.37 * math.sin(n)
        yield Request(f"caller{n}", prompts.take(24), min(new, 8), at=at)


def _load(prompts: Prompts, new: int) -> list[Request]:
    return [
        Request(f"batch{n}", prompts.take(128), max(8, new - n), background=True, repeat=True)
        for n in range(BATCH_REQUESTS)
    ]


def _waits(run: Run) -> list[float]:
    """Times to first token of the callers; who got none by the end waited at least until then."""
    callers = [request for request in run["requests"] if not request["background"]]
    return [(r["times"][0] if r["times"] else run["seconds"]) - r["at"] for r in callers]


def _batch_rate(run: Run) -> float:
    """Batch tokens a second once the load runs."""
    start, end = ARRIVE_S[0], run["seconds"]
    made = sum(
        count
        for request in run["requests"]
        if request["background"]
        for time, count in zip(request["times"], request["counts"], strict=True)
        if start <= time <= end
    )
    return made / (end - start)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of all are not above, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _measure_waits(suffix: str) -> Callable[[Run], dict[str, float]]:
    def measure(run: Run) -> dict[str, float]:
        waits = _waits(run)
        return {f"ttft_p50_{suffix}": percentile(waits, 0.5), f"ttft_p95_{suffix}": percentile(waits, 0.95)}

    return measure


def _measure_load(run: Run) -> dict[str, float]:
    return _measure_waits("load")(run) | {"batch_with_callers": _batch_rate(run)}


def _more(name: str) -> Metric:
    return Metric(name, RATE, "more")


def _less(name: str, unit: str = "s") -> Metric:
    return Metric(name, unit, "less")


WORKLOADS = [
    Workload(
        "decode1",
        "one stream, 32 tokens in, 128 out; between the first and the last",
        (_more("decode"),),
        lambda p, quick: _decode1(p, quick or 128),
        _measure_decode,
    ),
    Workload(
        "agents16",
        "16 agents with 512 tokens in common, 64 of their own, 64 out, all at once",
        (_more("output"),),
        lambda p, quick: _agents16(p, quick or 64),
        lambda run: {"output": _output_rate(run)},
    ),
    Workload(
        "distinct16",
        "16 different prompts of 128 tokens, 64 out, all at once",
        (_more("output"),),
        lambda p, quick: _distinct16(p, quick or 64),
        lambda run: {"output": _output_rate(run)},
    ),
    Workload(
        "prefill1024",
        "a prompt of 1,024 tokens, to its first token",
        (_more("prefill"),),
        lambda p, quick: _prefill1024(p, 2),
        _measure_prefill,
    ),
    Workload(
        "chat8",
        "8 turns of 40 tokens in and 48 out, the whole history sent each time",
        (_less("total"), _less("first_token_later_turns")),
        lambda p, quick: _chat8(p, quick or 48),
        _measure_chat,
    ),
    Workload(
        "interference_idle",
        "a caller with 24 tokens each second, nothing else running",
        (_less("ttft_p50_idle"), _less("ttft_p95_idle")),
        lambda p, quick: list(_arrivals(p, quick or 8, 13.0)),
        _measure_waits("idle"),
        stop_after=13.0,
    ),
    Workload(
        "interference_alone",
        "24 batch requests at any time, 128 tokens in, up to 128 out, no callers",
        (_more("batch_alone"),),
        lambda p, quick: _load(p, quick or BATCH_NEW),
        lambda run: {"batch_alone": _batch_rate(run)},
        stop_after=13.0,
    ),
    Workload(
        "interference",
        "the same, and a caller each second",
        (_less("ttft_p50_load"), _less("ttft_p95_load"), _more("batch_with_callers")),
        lambda p, quick: [*_load(p, quick or BATCH_NEW), *_arrivals(p, 8, LOAD_S)],
        _measure_load,
        stop_after=LOAD_S,
    ),
    Workload(
        "memory",
        "most memory of all the system's processes together during distinct16",
        (_less("peak_pss", "MB"), _less("peak_rss", "MB")),
        lambda p, quick: _distinct16(p, quick or 64),
        lambda run: {"peak_pss": run["peak_pss"] / 1e6, "peak_rss": run["peak_rss"] / 1e6},
        samples_memory=True,
        fresh_process=True,
    ),
    Workload(
        "coldstart",
        "from the start of the first process to the first token of a 32-token prompt",
        (_less("first_token"),),
        lambda p, quick: _decode1(p, 2),
        lambda run: {"first_token": run["begun"] - run["started"] + run["requests"][0]["times"][0]},
        fresh_process=True,
    ),
]

BY_NAME = {workload.name: workload for workload in WORKLOADS}


def check(workload: Workload, requests: list[Request], run: Run) -> None:
    """Raises RuntimeError unless every request got what it asked for, where the clock did not end it."""
    if workload.stop_after is not None:
        return
    new = requests[0].new
    for request in run["requests"]:
        if len(request["tokens"]) != new:
            raise RuntimeError(f"{workload.name}: {len(request['tokens'])} tokens instead of {new}")


# What the machine's limits allow.


@dataclass(frozen=True)
class Shape:
    """A decoder by its config.json, for counting what a token costs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
            config["vocab_size"],
        )

    def matmul(self) -> float:
        """Operations a token in the layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2.0 * self.layers * (attention + 3 * self.hidden * self.inner)

    def head(self) -> float:
        """Operations of one row of logits."""
        return 2.0 * self.hidden * self.vocabulary

    def attention(self, context: float) -> float:
        """Operations of one token that looks at `context` others."""
        return 4.0 * self.layers * self.heads * self.head_dim * context


@dataclass(frozen=True)
class Limits:
    """Bytes a second from memory, operations a second, bytes of packed weights."""

    read: float
    peak: float
    weights: float


def ideal_s(shape: Shape, limits: Limits, prompts: list[tuple[int, int]], new: int, batch: int) -> float:
    """The least seconds for prompts (already cached tokens, further tokens) and `new` tokens each in steps
    of `batch`: every step reads the weights once and computes at the peak, whichever takes longer. Reading
    the KV is left out."""
    work = sum(
        count * shape.matmul() + shape.head() + count * shape.attention(cached + count / 2)
        for cached, count in prompts
    )
    prefill = max(work / limits.peak, limits.weights / limits.read)
    context = statistics.mean(cached + count for cached, count in prompts) + new / 2
    row = shape.matmul() + shape.head() + shape.attention(context)
    step = max(batch * row / limits.peak, limits.weights / limits.read)
    return prefill + (new - 1) * step


def fraction(workload: str, value: float, shape: Shape, limits: Limits) -> float | None:
    """Which share of what the machine allows a figure is, None where that means nothing."""
    match workload:
        case "decode1":
            return value * limits.weights / limits.read
        case "prefill1024":
            return ideal_s(shape, limits, [(0, 1024)], 1, 1) / (1024 / value)
        case "distinct16":
            return ideal_s(shape, limits, [(0, 128)] * 16, 64, 16) / (16 * 64 / value)
        case "agents16":
            prompts = [(0, 512), *[(512, 64)] * 16]
            return ideal_s(shape, limits, prompts, 64, 16) / (16 * 64 / value)
        case "chat8":
            turns = [(88 * turn, 40) for turn in range(TURNS)]
            ideal = sum(ideal_s(shape, limits, [turn], 48, 1) for turn in turns)
            return ideal / value
        case _:
            return None
