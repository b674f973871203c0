"""What a step computes besides matrices, as one interface: torch's operators here, our Triton kernels in
`triton_ops.py`. The same models run on both, and the tests compare them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from ..mirror import Choice, Sequence
from . import sampler
from .config import Activation
from .rope import rotate


class Turn(NamedTuple):
    """What happens to query and key heads before they attend, each unless None: RMS norm by `norm` [heads +
    kv_heads, head_dim], then rotation by the complex `turns` [T, 1, head_dim / 2]."""

    turns: torch.Tensor | None
    norm: torch.Tensor | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows that attend through block tables: row r sees the first `lengths[r]` positions of the blocks in
    `tables[r]` (int32 [R, width]), at most `longest`."""

    tables: torch.Tensor
    lengths: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens chosen on a device. `tokens` [R] is there, negative where nothing was chosen; `choices` gives
    them to the host once the step has ended."""

    tokens: torch.Tensor
    choices: Callable[[], list[Choice]]


class Ops(Protocol):
    """`pages`: attends through block tables, so that rows need not be gathered; what is behind a row's length
    is never multiplied, be it NaN. `multiplies_float8`: of matrices, by torch._scaled_mm."""

    pages: bool
    multiplies_float8: bool

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        """Adds `delta` to x [T, hidden] in place, then returns the RMS norm of x."""
        ...

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """activation(gate) * up for x [T, 2 * inner], the gate first. May overwrite x."""
        ...

    def place(self, rows: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, turn: Turn | None) -> None:
        """Norms and turns the queries and keys of rows [T, heads + 2 * kv_heads, head_dim] in place; puts
        keys and values into `slots` of a layer's pool [2 * kv_heads, blocks, 16, head_dim]."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        rows: PagedRows,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """query [R, heads, head_dim] over a layer's pool; returns the same shape."""
        ...

    def few_rows(
        self,
        x: torch.Tensor,
        stored: torch.Tensor,
        scales: torch.Tensor,
        lows: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """x [T, in] times a quantised weight (quantised.py), or None where that is not worth a kernel."""
        ...

    def choose(self, logits: torch.Tensor, places: list[int], rows: list[tuple[Sequence, int]]) -> Drawn:
        """`sampler.choose` of the logits' rows at `places`. Logits may be overwritten after the next step's
        start."""
        ...


class TorchOps:
    """See Ops."""

    pages = False
    multiplies_float8 = False

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        if delta is not None:
            x += delta
        return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate).mul_(up)

    def place(self, rows: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, turn: Turn | None) -> None:
        heads, dim = rows.shape[1] - pool.shape[0], rows.shape[2]
        if turn is not None:
            turning = rows[:, : heads + pool.shape[0] // 2]
            if turn.norm is not None:
                turning.copy_(functional.rms_norm(turning, (dim,), None, turn.epsilon) * turn.norm)
            if turn.turns is not None:
                rotate(turning, turn.turns)
        pool.flatten(1, 2).index_copy_(1, slots, rows[:, heads:].transpose(0, 1))

    def attend(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        rows: PagedRows,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Writes everything out: the reference of the kernel, and what runs without Triton in tests."""
        count, heads, dim = query.shape
        kv_heads = pool.shape[0] // 2
        place = torch.arange(rows.tables.shape[1] * pool.shape[2], device=query.device)
        lengths = rows.lengths[:, None]
        seen = place < lengths
        if window:
            seen &= place >= lengths - window
        kv = pool[:, rows.tables.long()].flatten(2, 3).float().transpose(0, 1)
        kv = kv.masked_fill(~seen[:, None, :, None], 0.0)  # [rows, 2 * kv_heads, positions, head_dim]
        asked = query.float().view(count, kv_heads, heads // kv_heads, dim)
        scores = asked @ kv[:, :kv_heads].transpose(2, 3) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        if sinks is not None:
            column = sinks.float().view(1, kv_heads, -1, 1).expand(count, -1, -1, 1)
            scores = torch.cat((scores, column), dim=-1)
        shares = scores.softmax(dim=-1)[..., : len(place)]
        return (shares @ kv[:, kv_heads:]).view(query.shape).to(query.dtype)

    def few_rows(
        self,
        x: torch.Tensor,
        stored: torch.Tensor,
        scales: torch.Tensor,
        lows: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor | None:
        return None

    def choose(self, logits: torch.Tensor, places: list[int], rows: list[tuple[Sequence, int]]) -> Drawn:
        choices = sampler.choose(logits[places], rows)
        tokens = torch.tensor([-1 if choice.error else choice.token for choice in choices])
        return Drawn(tokens.to(logits.device), lambda: choices)


@functools.cache
def triton_trouble(device: torch.device) -> str:
    """Why our kernels do not run on a CUDA device, or "". Triton wants a C compiler, Python's headers and a
    driver that is new enough; only trying tells."""
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton here"
    try:
        from .kernels import layer

        layer.add_norm(torch.ones(1, 16, device=device), None, torch.ones(16, device=device), 0.0)
    except Exception as problem:  # a compiler's, a linker's, a driver's
        return f"Triton does not work here: {' '.join(str(problem).split())[:160] or type(problem).__name__}"
    return ""


def has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and not triton_trouble(device)


def ops_for(device: torch.device) -> Ops:
    """Triton's where there is a CUDA device and Triton, which every CUDA build of torch for Linux brings."""
    if has_triton(device):
        from .triton_ops import TritonOps

        return TritonOps(device)
    return TorchOps()
