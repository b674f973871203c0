"""Any causal language model that transformers knows and no family here computes: transformers' own modelling
code, with the paged KV plugged in where that code attends. Slower than a family of our own.

What a step needs of such a model is that rows depend on each other only through attention. This is not
assumed but found out, in three stages, and whatever is in doubt is refused with its reason:

    survey   The model is built without memory (torch's meta device) and run once. Every call of attention
             tells its heads and what it wants beyond plain attention; every mask is asked which keys it shows
             to queries near and far, so that a sliding window is known even where it is longer than any
             prompt at hand. `shape_of` does this before a byte of weights is read.
    load     transformers' loader places the tensors, since it knows how names and layouts changed over time.
             Each must have its place, and each place its tensor.
    verify   Two short sequences run through the paged cache in uneven chunks and mixed with each other, and
             the logits must be those of transformers' own eager attention, each sequence by itself. Whatever
             the survey cannot see (a convolution over time, a state between steps, a bias added elsewhere)
             shows here, at load, in a fraction of a second.

No code comes from a model: classes are those of the installed transformers, and config.json only sets them.
"""

from __future__ import annotations

import inspect
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...mirror import Piece, Sequence
from ..attention import KvPool, Plan
from ..config import Config, Shape
from ..weights import Checkpoint

_NAME = "llmasos"  # what our attention is called in transformers' registries
_SURVEYED = "llmasos-survey"

# Keys of config.json that choose code or where to get it; none of them is a dimension of the model.
_CODE_KEYS = {"attn_implementation", "experts_implementation", "dtype", "torch_dtype", "name_or_path"}
_CODE_KEYS |= {"transformers_weights", "fusion_config", "kernel_config", "distributed_config"}
# Arguments of attention that change nothing in a forward pass that neither trains nor returns its scores.
_HARMLESS = {"dropout", "position_ids", "sliding_window", "is_causal", "use_cache", "training"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"}
_BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention|self_attn)\.(masked_bias|bias|causal_mask))"
# config.json is a stranger's: what it may cost before the weights bear it out.
_MOST_LAYERS = 512
_MOST_EXPERTS = 4096
_LONGEST_CONTEXT = 1 << 24
_LARGEST_BUFFERS = 1 << 28  # values in tables that are computed, not loaded
_SURVEYED_ROWS = 4096  # longer than what sparse attention leaves dense
_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
_GROWING_ROTARY = ("dynamic", "longrope")
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class _Call:
    """One attention of a forward pass. `window` 0: everything before; `softcap` 0: none."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    softcap: float
    sinks: bool


class _Attention(Protocol):
    """Who answers the model's attention calls: query [1, heads, T, key_dim], key and value [1, kv_heads, T,
    key_dim or value_dim] -> [1, T, heads, value_dim]."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        wishes: dict[str, Any],
    ) -> torch.Tensor: ...


_answering: ContextVar[_Attention] = ContextVar("answering")


def _interface(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **wishes: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls as an attention function."""
    return _answering.get().attend(query, key, value, attention_mask, scaling, wishes), None


class _Interception(TorchFunctionMode):
    """Answers calls of torch's attention from modelling code that is older than the interface (falcon)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._answer(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _answer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        return _answering.get().attend(query, key, value, attn_mask, scale, {}).transpose(1, 2)


@contextmanager
def _answered_by(attention: _Attention, intercepted: bool) -> Iterator[None]:
    token = _answering.set(attention)
    try:
        if intercepted:
            with _Interception():
                yield
        else:
            yield
    finally:
        _answering.reset(token)


# -- survey ------------------------------------------------------------------------------------------


class _Surveyor:
    """Records the attention calls of a forward pass; computes nothing."""

    def __init__(self, kind: str, context_length: int) -> None:
        self.calls: list[_Call] = []
        self._kind, self._context_length = kind, context_length
        self._masks: list[tuple[torch.Tensor, int | str]] = []

    def mask(
        self, *, q_length: int, kv_length: int, mask_function: Any, device: Any, **_: Any
    ) -> torch.Tensor:
        """What transformers calls to make a mask; `mask_function(batch, head, query, key)`: is it seen?"""
        made = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
        self._masks.append((made, self._window(mask_function)))
        return made

    def _window(self, mask_function: Any) -> int | str:
        """The sliding window that a mask makes, 0 for none; for any other pattern why it cannot be used.
        Models make masks that none of their layers use."""
        length = self._context_length
        key, zero = torch.arange(length), torch.tensor(0)
        query = torch.tensor(sorted({0, min(7, length - 1), length // 3, length // 2, length - 1}))[:, None]
        try:
            seen = mask_function(zero, zero, query, key[None]).expand(len(query), length)
        except Exception as problem:  # the function belongs to the model's code and may do anything
            return f"its mask cannot be read ({type(problem).__name__})"
        window = int(seen[-1].sum())
        causal = (key <= query) & (key > query - window)
        if window < 1 or not torch.equal(seen, causal):
            return "its tokens see neither all that came before nor a window of it"
        return window if window < length else 0

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        wishes: dict[str, Any],
    ) -> torch.Tensor:
        wanted = {name: wish for name, wish in wishes.items() if wish is not None and name not in _HARMLESS}
        softcap, sinks = wanted.pop("softcap", 0.0), wanted.pop("s_aux", None)
        if wanted:
            raise self._refused(f"its attention takes {', '.join(sorted(wanted))}")
        unknown = "it makes or changes its attention masks itself"
        window = next((window for made, window in self._masks if made is mask), unknown)
        if isinstance(window, str):
            raise self._refused(window)
        self.calls.append(
            _Call(
                heads=query.shape[1],
                kv_heads=key.shape[1],
                key_dim=key.shape[3],
                value_dim=value.shape[3],
                window=window,
                softcap=float(softcap),
                sinks=sinks is not None,
            )
        )
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    def _refused(self, reason: str) -> errors.UnsupportedModel:
        return _refused(self._kind, reason)


def _refused(kind: str, reason: str) -> errors.UnsupportedModel:
    return errors.UnsupportedModel(
        f"transformers' code of {kind[:64]} cannot run on the paged cache: {reason}",
        hint="only decoders whose tokens meet in attention alone are computed; try another model",
        architecture=kind[:64],
    )


def _transformers(kind: str) -> Any:
    """The transformers package, kept off the network. Raises UnsupportedModel when it is not installed."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    before = {name: os.environ.get(name) for name in offline}
    os.environ.update(offline)  # read once, at import
    try:
        import transformers
        from transformers import masking_utils, modeling_utils
    except ImportError:
        raise errors.UnsupportedModel(
            f"architecture {kind!r} is not computed here; transformers, which may know it, is not installed",
            hint="pip install 'llmasos[transformers]' and start the daemon again",
            architecture=kind,
        ) from None
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    for name in (_NAME, _SURVEYED):
        modeling_utils.ALL_ATTENTION_FUNCTIONS.register(name, _interface)
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(_SURVEYED, _surveyed_mask)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _surveyed_mask(**arguments: Any) -> torch.Tensor:
    surveyor = _answering.get()
    assert isinstance(surveyor, _Surveyor)
    return surveyor.mask(**arguments)


@dataclass(frozen=True, slots=True)
class _Code:
    """transformers' class for a config, and how it attends."""

    kind: str
    model_class: Any
    config: Any
    context_length: int
    intercepted: bool

    @property
    def implementation(self) -> str:
        return "sdpa" if self.intercepted else _NAME


@dataclass(frozen=True, slots=True)
class _Survey:
    shape: Shape
    calls: list[_Call]
    parameters: int


def _code_of(config: Config) -> _Code:
    """Raises UnsupportedModel."""
    kind = str(config.get("model_type"))[:64]
    transformers = _transformers(kind)
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if not isinstance(name, str) or kind not in transformers.CONFIG_MAPPING:
        raise errors.UnsupportedModel(
            f"architecture {kind!r} is computed neither here nor by transformers {transformers.__version__}",
            hint="a newer transformers may know it",
            architecture=kind,
        )
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise _refused(kind, f"{name} is more than a language model")
    config.refuse_unless(auto_map=None, quantization_config=None, is_encoder_decoder=False)
    values = {k: v for k, v in config.values.items() if k not in _CODE_KEYS and not k.startswith("_")}
    with _explained(kind, "transformers does not take its config"):
        theirs = transformers.CONFIG_MAPPING[kind].from_dict(values)
        model_class = getattr(transformers, name)
    if theirs.sub_configs or theirs.is_encoder_decoder:
        raise _refused(kind, "it is more than a decoder")
    if model_class._is_stateful:
        raise _refused(kind, "it keeps a state between tokens that is no KV cache")
    odd = {str(layer) for layer in getattr(theirs, "layer_types", None) or []} - _ATTENDING
    if odd:
        raise _refused(kind, f"it has layers of type {', '.join(sorted(odd))}")
    if not (model_class._can_set_attn_implementation() or model_class._supports_sdpa):
        raise _refused(kind, "it does not attend through transformers' attention interface")
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        raise _refused(kind, "it cannot be told the positions of its tokens")
    theirs.use_cache, theirs.return_dict, theirs.output_hidden_states = False, True, False
    return _Code(
        kind=kind,
        model_class=model_class,
        config=theirs,
        context_length=_context_length(kind, theirs),
        intercepted=not model_class._can_set_attn_implementation() and model_class._supports_sdpa,
    )


@contextmanager
def _explained(kind: str, what: str) -> Iterator[None]:
    """Errors of transformers' code as UnsupportedModel. There are hundreds of modelling files, each fails in
    its own way, so all are caught but those that say that memory ran out, which the executor answers."""
    try:
        yield
    except (errors.LLMasOSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        if "allocate memory" in str(problem):
            raise
        text = " ".join(str(problem).split())[:200]
        raise _refused(kind, f"{what} ({type(problem).__name__}: {text})") from None


def _context_length(kind: str, theirs: Any) -> int:
    """Positions that may be used. Rotary frequencies that change with the longest sequence of a batch would
    make sequences depend on their neighbours; below this length they never change."""
    lengths = [getattr(theirs, "max_position_embeddings", None)]
    found = getattr(theirs, "rope_parameters", None) or {}
    nested = bool(found) and all(isinstance(value, dict) for value in found.values())
    for rope in found.values() if nested else [found]:
        if rope.get("rope_type") in _GROWING_ROTARY:
            lengths.append(rope.get("original_max_position_embeddings"))
            lengths.append(getattr(theirs, "original_max_position_embeddings", None))
    known = [length for length in lengths if isinstance(length, int) and 0 < length <= _LONGEST_CONTEXT]
    if not known:
        raise _refused(kind, "its config does not say how long a context may be")
    return min(known)


def _freeze_rotary(model: nn.Module) -> None:
    """Keeps rotary frequencies at those for contexts of up to `_context_length`."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            kept = {layer: "default" if k in _GROWING_ROTARY else k for layer, k in kind.items()}
            object.__setattr__(module, "rope_type", kept)
        elif kind in _GROWING_ROTARY:
            object.__setattr__(module, "rope_type", "default")


def _survey(code: _Code) -> _Survey:
    """Runs the model on the meta device. Raises UnsupportedModel."""
    theirs, kind = code.config, code.kind
    layers = getattr(theirs, "num_hidden_layers", None)
    if not isinstance(layers, int) or not 1 <= layers <= _MOST_LAYERS:
        raise _refused(kind, f"its config says {str(layers)[:20]} layers")
    for name, value in theirs.to_dict().items():
        if "expert" in name and isinstance(value, int) and value > _MOST_EXPERTS:
            raise _refused(kind, f"its config says {name} = {value}")
    surveyor = _Surveyor(kind, code.context_length)
    masks = _transformers(kind).masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    with _explained(kind, "its code cannot be surveyed"):
        with torch.device("meta"):
            model = code.model_class._from_config(
                theirs, attn_implementation="sdpa" if code.intercepted else _SURVEYED, dtype=torch.float32
            ).eval()
        _freeze_rotary(model)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")  # the one whose shapes do not depend on values
        length = min(code.context_length, _SURVEYED_ROWS)
        rows = torch.zeros(1, length, dtype=torch.int64, device="meta")
        seen = torch.ones_like(rows, dtype=torch.bool)
        if code.intercepted:
            masks["sdpa"] = _surveyed_mask
        try:
            with _answered_by(surveyor, code.intercepted):
                model(input_ids=rows, attention_mask=seen, use_cache=False)
        finally:
            if code.intercepted:
                del masks["sdpa"]
    calls = surveyor.calls
    if not calls:
        raise _refused(kind, "it does not attend through transformers' attention interface")
    if len(calls) < layers:
        raise _refused(kind, f"{layers - len(calls)} of its {layers} layers do something else than attend")
    if len({call.kv_heads for call in calls}) > 1:
        raise _refused(kind, "its layers differ in their number of key heads")
    if sum(buffer.numel() for buffer in model.buffers()) > _LARGEST_BUFFERS:
        raise _refused(kind, "its tables take more memory than is sane")
    shape = Shape(
        layers=len(calls),
        heads=max(call.heads for call in calls),
        kv_heads=calls[0].kv_heads,
        head_dim=max(max(call.key_dim, call.value_dim) for call in calls),
        context_length=code.context_length,
        vocab_size=theirs.vocab_size,
    )
    return _Survey(shape, calls, sum(parameter.numel() for parameter in model.parameters()))


def shape_of(config: Config) -> Shape:
    return _survey(_code_of(config)).shape


# -- load --------------------------------------------------------------------------------------------


class _Stored:
    """A tensor that transformers' loader reads when it needs it."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, everything: Any) -> torch.Tensor:
        return self._checkpoint.tensor(self._name, torch.float32)


def _load(code: _Code, survey: _Survey, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' model with the checkpoint's weights. Raises Corrupt, UnsupportedModel."""
    if survey.parameters > checkpoint.numel:
        raise errors.Corrupt(
            f"its config asks for {survey.parameters} weights, the model has {checkpoint.numel}",
            hint="pull the model again",
        )
    stored = {name: _Stored(checkpoint, name) for name in checkpoint.names}
    with _explained(code.kind, "transformers does not take its weights"):
        model, report = code.model_class.from_pretrained(
            None,
            config=code.config,
            state_dict=stored,
            dtype=dtype,
            attn_implementation=code.implementation,
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
    _freeze_rotary(model)
    return model


# -- run ---------------------------------------------------------------------------------------------


class _Paged:
    """Answers the attention calls of one forward pass from the paged cache; the n-th call is layer n."""

    def __init__(self, plan: Plan, calls: list[_Call], head_dim: int, dtype: torch.dtype) -> None:
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

    def __init__(self, code: _Code, survey: _Survey, model: Any, dtype: torch.dtype) -> None:
        self.shape = survey.shape
        self.windows = {call.window for call in survey.calls}
        self.engine = f"transformers' own code of {code.kind}: slower than a family of LLMasOS's own"
        held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.weights_bytes = sum(tensor.nbytes for tensor in held.values())
        self._intercepted, self._calls, self._dtype = code.intercepted, survey.calls, dtype
        self._decoder = model.base_model
        if self._decoder is model:
            raise _refused(code.kind, "it is one with its head")
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
    decoder: Any, tokens: torch.Tensor, positions: torch.Tensor, attention: _Attention, intercepted: bool
) -> Any:
    """The output of the decoder for rows [T]."""
    # No mask is wanted. None is made for an attention of ours, nor where one is given already.
    mask = torch.zeros(1, 1, 1, 1, device=tokens.device) if intercepted else None
    with _answered_by(attention, intercepted):
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
    code = _code_of(config)
    survey = _survey(code)
    loaded = _load(code, survey, checkpoint, dtype)
    random = torch.Generator().manual_seed(1)
    sequences = [
        torch.randint(survey.shape.vocab_size, (length,), generator=random).tolist() for length in (21, 9)
    ]
    with _explained(code.kind, "it fails"):
        # Tables may be shorter than the config says; on a GPU, to read behind them costs the process.
        last = torch.tensor([survey.shape.context_length - 1])
        _decode(loaded.base_model, torch.zeros_like(last), last, _Blind(), code.intercepted)
        loaded.to(device)
        expected = _eager(loaded, sequences, device)
        model = TransformersModel(code, survey, loaded, dtype)
        found = _paged(model, sequences, device, dtype)
    for mine, theirs in zip(found, expected, strict=True):
        if not (difference := _difference(mine, theirs)) <= _TOLERANCE[dtype]:
            raise _refused(
                code.kind, f"it gives other logits there (they differ by {difference:.1%} of their spread)"
            )
    return model
