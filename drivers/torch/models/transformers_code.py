"""Any causal language model that transformers knows and no family here computes: transformers' own modelling
code, with the paged KV plugged in where that code attends. Slower than a family of our own.

What a step needs of such a model is that rows depend on each other only through attention. This is not
assumed but found out, in three stages, and whatever is in doubt is refused with its reason:

    survey   What each call of attention wants, before a byte of weights is read (transformers_survey.py).
    load     transformers' loader places the tensors, since it knows how names and layouts changed over time.
             Each must have its place, and each place its tensor.
    verify   Two short sequences run through the paged cache in uneven chunks and mixed with each other, and
             the logits must be those of transformers' own eager attention, each sequence by itself. Whatever
             the survey cannot see (a convolution over time, a state between steps, a bias added elsewhere)
             shows here, at load, in a fraction of a second.

No code comes from a model: classes are those of the installed transformers, and config.json only sets them.
"""

from __future__ import annotations

import re
from array import array
from typing import Any

import torch
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from torch import nn
from torch.nn import functional

from ...mirror import Piece, Sequence
from ..attention import KvPool, Plan
from ..config import Config, Shape
from ..weights import Checkpoint
from .transformers_survey import (
    Attention,
    Call,
    Code,
    Survey,
    answered_by,
    code_of,
    explained,
    freeze_rotary,
    refused,
    survey_of,
)

_BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention|self_attn)\.(masked_bias|bias|causal_mask))"
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def shape_of(config: Config) -> Shape:
    return survey_of(code_of(config)).shape


# -- load --------------------------------------------------------------------------------------------


class _Stored:
    """A tensor that transformers' loader reads when it needs it."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, everything: Any) -> torch.Tensor:
        return self._checkpoint.tensor(self._name, torch.float32)


def load(code: Code, survey: Survey, checkpoint: Checkpoint, dtype: torch.dtype, implementation: str) -> Any:
    """transformers' model with the checkpoint's weights, which attends by the `implementation` named. Raises
    Corrupt, UnsupportedModel."""
    if survey.parameters > checkpoint.numel:
        raise errors.Corrupt(
            f"its config asks for {survey.parameters} weights, the model has {checkpoint.numel}",
            hint="pull the model again",
        )
    stored = {name: _Stored(checkpoint, name) for name in checkpoint.names}
    with explained(code.kind, "transformers does not take its weights"):
        model, report = code.model_class.from_pretrained(
            None,
            config=code.config,
            state_dict=stored,
            dtype=dtype,
            attn_implementation=implementation,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise errors.Corrupt(f"the model has no tensor {missing[0][:96]!r}", hint="its config names it")
    if unfit := sorted(report["mismatched_keys"]):
        name, found, wanted = unfit[0]
        raise errors.Corrupt(f"tensor {name[:96]!r} is {tuple(found)}, its config says {tuple(wanted)}")
    extra = [name for name in sorted(report["unexpected_keys"]) if not re.fullmatch(_BUFFERS, name)]
    if extra:
        raise errors.UnsupportedModel(
            f"tensor {extra[0][:96]!r} has no place in transformers' code of {code.kind}",
            hint="no driver computes it",
            tensor=extra[0][:96],
        )
    freeze_rotary(model)
    return model


# -- run ---------------------------------------------------------------------------------------------


class _Paged:
    """Answers the attention calls of one forward pass from the paged cache; the n-th call is layer n."""

    def __init__(self, plan: Plan, calls: list[Call], head_dim: int, dtype: torch.dtype) -> None:
        self._plan, self._calls, self._head_dim, self._dtype = plan, calls, head_dim, dtype
        self._answered = 0

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        wishes: dict[str, Any],
    ) -> torch.Tensor:
        layer = self._answered
        self._answered += 1
        if layer >= len(self._calls):
            raise errors.DeviceFault(f"the model attends more than {len(self._calls)} times")
        call = self._calls[layer]
        found = self._plan.attend(
            layer,
            self._rows(query),
            torch.cat((self._rows(key), self._rows(value)), dim=1),
            call.key_dim**-0.5 if scale is None else float(scale),
            call.window,
            softcap=call.softcap,
            sinks=wishes["s_aux"] if call.sinks else None,
        )
        heads = found.view(1, -1, call.heads, self._head_dim)[..., : call.value_dim]
        return heads.to(value.dtype)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, dim] -> [T, heads, head_dim]. Zeros behind a narrower head change no score."""
        rows = x[0].transpose(0, 1).to(self._dtype)
        return functional.pad(rows, (0, self._head_dim - x.shape[3])).contiguous()

    def finish(self) -> None:
        if self._answered != len(self._calls):
            raise errors.DeviceFault(f"the model attended {self._answered} times, not {len(self._calls)}")


class _Blind:
    """Answers attention calls with zeros."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        wishes: dict[str, Any],
    ) -> torch.Tensor:
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


class _Done(nn.Module):
    """Stands where the decoder was in the model with the head, and gives the output that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    @property
    def decoder(self) -> nn.Module:
        """OPT's head asks for it."""
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class TransformersModel:
    """See models.Model. `engine` says what computes it, for people."""

    def __init__(self, code: Code, survey: Survey, model: Any, dtype: torch.dtype) -> None:
        self.shape = survey.shape
        self.windows = {call.window for call in survey.calls}
        self.engine = f"transformers' own code of {code.kind}: slower than a family of LLMasOS's own"
        held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.weights_bytes = sum(tensor.nbytes for tensor in held.values())
        self._intercepted, self._calls, self._dtype = code.intercepted, survey.calls, dtype
        self._decoder = model.base_model
        if self._decoder is model:
            raise refused(code.kind, "it is one with its head")
        # Heads scale, cap and bias their logits in the model's forward, so it is kept, around a decoder that
        # is already done.
        self._head, self._done = model, _Done()
        setattr(model, model.base_model_prefix, self._done)
        self._output_class: Any = None

    def forward(self, plan: Plan) -> torch.Tensor:
        paged = _Paged(plan, self._calls, self.shape.head_dim, self._dtype)
        output = _decode(self._decoder, plan.tokens, plan.positions, paged, self._intercepted)
        paged.finish()
        self._output_class = type(output)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._done.output = self._output_class(last_hidden_state=hidden[None])
        rows = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = self._head(input_ids=rows, use_cache=False).logits[0].float()
        self._done.output = None
        return logits


def _decode(
    decoder: Any, tokens: torch.Tensor, positions: torch.Tensor, attention: Attention, intercepted: bool
) -> Any:
    """The output of the decoder for rows [T]."""
    # No mask is wanted. None is made for an attention of ours, nor where one is given already.
    mask = torch.zeros(1, 1, 1, 1, device=tokens.device) if intercepted else None
    with answered_by(attention, intercepted):
        return decoder(
            input_ids=tokens[None], position_ids=positions[None], attention_mask=mask, use_cache=False
        )


# -- verify ------------------------------------------------------------------------------------------


# Steps of two sequences (21 and 9 tokens) as (sequence, start, end): chunks, decoding, and both at once.
_STEPS = (
    ((0, 0, 5),),
    ((1, 0, 4), (0, 5, 19)),
    ((0, 19, 20), (1, 4, 8)),
    ((0, 20, 21), (1, 8, 9)),
)
_BLOCKS = ([2, 0], [1])


def _eager(model: Any, sequences: list[list[int]], device: torch.device) -> list[torch.Tensor]:
    """transformers' own logits [T, vocab_size] of each sequence by itself."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    logits = [
        model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0].float()
        for tokens in sequences
    ]
    for config, name in zip(configs, before, strict=True):
        config._attn_implementation = name
    return logits


def _paged(
    model: TransformersModel, sequences: list[list[int]], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The same through the paged cache."""
    pool = KvPool(model.shape, 3, dtype, device)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in _STEPS:
        pieces = [
            Piece(index, _sequence(which, sequences[which]), start, end, False, 0)
            for index, (which, start, end) in enumerate(step)
        ]
        plan = Plan(pool, pieces, model.windows)
        hidden = model.forward(plan)
        for piece in pieces:
            row = plan.rows[piece.index]
            found[piece.sequence.id].append(model.logits(hidden[row : row + piece.end - piece.start]))
    return [torch.cat(rows) for rows in found]


def _sequence(which: int, tokens: list[int]) -> Sequence:
    length = len(tokens)
    return Sequence(
        which, array("I", tokens), length, 0, length, array("i", _BLOCKS[which]), t.Sampling(seed=0)
    )


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far logits are apart, relative to their spread. What all tokens share changes no probability."""
    found, expected = (x - x.mean(dim=-1, keepdim=True) for x in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))


def build(
    config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> TransformersModel:
    code = code_of(config)
    survey = survey_of(code)
    loaded = load(code, survey, checkpoint, dtype, code.implementation)
    random = torch.Generator().manual_seed(1)
    sequences = [
        torch.randint(survey.shape.vocab_size, (length,), generator=random).tolist() for length in (21, 9)
    ]
    with explained(code.kind, "it fails"):
        # Tables may be shorter than the config says; on a GPU, to read behind them costs the process.
        last = torch.tensor([survey.shape.context_length - 1])
        _decode(loaded.base_model, torch.zeros_like(last), last, _Blind(), code.intercepted)
        loaded.to(device)
        expected = _eager(loaded, sequences, device)
        model = TransformersModel(code, survey, loaded, dtype)
        found = _paged(model, sequences, device, dtype)
    for mine, theirs in zip(found, expected, strict=True):
        if not (difference := _difference(mine, theirs)) <= _TOLERANCE[dtype]:
            raise refused(
                code.kind, f"it gives other logits there (they differ by {difference:.1%} of their spread)"
            )
    return model
