"""What transformers' code of a model does when it attends, found out before a byte of weights is read.

The model is built without memory (torch's meta device) and run once. Every call of attention tells its heads
and what it wants beyond plain attention; every mask is asked which keys it shows to queries near and far, so
that a sliding window is known even where it is longer than any prompt at hand. What cannot be computed is
refused with its reason. `answered_by` is how the survey, and later a step, answer those calls.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from llmasos.syscalls import errors
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...base import LONGEST_CONTEXT, MOST_LAYERS
from ..config import Config, Shape

_NAME = "llmasos"  # what our attention is called in transformers' registries
_SURVEYED = "llmasos-survey"

# Keys of config.json that choose code or where to get it; none of them is a dimension of the model.
_CODE_KEYS = {"attn_implementation", "experts_implementation", "dtype", "torch_dtype", "name_or_path"}
_CODE_KEYS |= {"transformers_weights", "fusion_config", "kernel_config", "distributed_config"}
# Arguments of attention that change nothing in a forward pass that neither trains nor returns its scores.
_HARMLESS = {"dropout", "position_ids", "sliding_window", "is_causal", "use_cache", "training"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"}
# config.json is a stranger's: what it may cost before the weights bear it out.
_MOST_EXPERTS = 1 << 16  # of all layers: some code has a module for each
_LARGEST_BUFFERS = 1 << 28  # values in tables that are computed, not loaded
_SURVEYED_ROWS = 4096  # longer than what sparse attention leaves dense
_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
_GROWING_ROTARY = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Call:
    """One attention of a forward pass. `window` 0: everything before; `softcap` 0: none."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    softcap: float
    sinks: bool


class Attention(Protocol):
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


_answering: ContextVar[Attention] = ContextVar("answering")


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
def answered_by(attention: Attention, intercepted: bool) -> Iterator[None]:
    token = _answering.set(attention)
    try:
        if intercepted:
            with _Interception():
                yield
        else:
            yield
    finally:
        _answering.reset(token)


class _Surveyor:
    """Records the attention calls of a forward pass; computes nothing."""

    def __init__(self, kind: str, context_length: int) -> None:
        self.calls: list[Call] = []
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
            raise self.refused(f"its attention takes {', '.join(sorted(wanted))}")
        unknown = "it makes or changes its attention masks itself"
        window = next((window for made, window in self._masks if made is mask), unknown)
        if isinstance(window, str):
            raise self.refused(window)
        self.calls.append(
            Call(
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

    def refused(self, reason: str) -> errors.UnsupportedModel:
        return refused(self._kind, reason)


def refused(kind: str, reason: str) -> errors.UnsupportedModel:
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
class Code:
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
class Survey:
    shape: Shape
    calls: list[Call]
    parameters: int


def code_of(config: Config) -> Code:
    """Raises UnsupportedModel."""
    kind = config.text("model_type")[:64]
    transformers = _transformers(kind)
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if not isinstance(name, str) or kind not in transformers.CONFIG_MAPPING:
        raise errors.UnsupportedModel(
            f"architecture {kind!r} is computed neither here nor by transformers {transformers.__version__}",
            hint="a newer transformers may know it",
            architecture=kind,
        )
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise refused(kind, f"{name} is more than a language model")
    config.refuse_unless(auto_map=None, quantization_config=None, is_encoder_decoder=False)
    values = {k: v for k, v in config.values.items() if k not in _CODE_KEYS and not k.startswith("_")}
    with explained(kind, "transformers does not take its config"):
        theirs = transformers.CONFIG_MAPPING[kind].from_dict(values)
        model_class = getattr(transformers, name)
        if theirs.sub_configs or theirs.is_encoder_decoder:
            raise refused(kind, "it is more than a decoder")
        if model_class._is_stateful:
            raise refused(kind, "it keeps a state between tokens that is no KV cache")
        odd = {str(layer) for layer in getattr(theirs, "layer_types", None) or []} - _ATTENDING
        if odd:
            raise refused(kind, f"it has layers of type {', '.join(sorted(odd))}")
        if not (model_class._can_set_attn_implementation() or model_class._supports_sdpa):
            raise refused(kind, "it does not attend through transformers' attention interface")
        if "position_ids" not in inspect.signature(model_class.forward).parameters:
            raise refused(kind, "it cannot be told the positions of its tokens")
        theirs.use_cache, theirs.return_dict, theirs.output_hidden_states = False, True, False
        return Code(
            kind=kind,
            model_class=model_class,
            config=theirs,
            context_length=_context_length(kind, theirs),
            intercepted=not model_class._can_set_attn_implementation() and model_class._supports_sdpa,
        )


@contextmanager
def explained(kind: str, what: str) -> Iterator[None]:
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
        raise refused(kind, f"{what} ({type(problem).__name__}: {text})") from None


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
    known = [length for length in lengths if isinstance(length, int) and 0 < length <= LONGEST_CONTEXT]
    if not known:
        raise refused(kind, "its config does not say how long a context may be")
    return min(known)


def freeze_rotary(model: nn.Module) -> None:
    """Keeps rotary frequencies at those for contexts of up to `_context_length`."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            kept = {layer: "default" if k in _GROWING_ROTARY else k for layer, k in kind.items()}
            object.__setattr__(module, "rope_type", kept)
        elif kind in _GROWING_ROTARY:
            object.__setattr__(module, "rope_type", "default")


def survey_of(code: Code) -> Survey:
    """Runs the model on the meta device. Raises UnsupportedModel."""
    theirs, kind = code.config, code.kind
    with explained(kind, "its code cannot be surveyed"):
        layers = getattr(theirs, "num_hidden_layers", None)
        if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
            raise refused(kind, f"its config says {str(layers)[:20]} layers")
        for name, value in theirs.to_dict().items():
            if "experts" in name and isinstance(value, int) and value * layers > _MOST_EXPERTS:
                raise refused(kind, f"its config says {name} = {value}")
        surveyor = _Surveyor(kind, code.context_length)
        masks = _transformers(kind).masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
        with torch.device("meta"):
            model = code.model_class._from_config(
                theirs, attn_implementation="sdpa" if code.intercepted else _SURVEYED, dtype=torch.float32
            ).eval()
        freeze_rotary(model)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")  # the one whose shapes do not depend on values
        length = min(code.context_length, _SURVEYED_ROWS)
        rows = torch.zeros(1, length, dtype=torch.int64, device="meta")
        seen = torch.ones_like(rows, dtype=torch.bool)
        if code.intercepted:
            masks["sdpa"] = _surveyed_mask
        try:
            with answered_by(surveyor, code.intercepted):
                model(input_ids=rows, attention_mask=seen, use_cache=False)
        finally:
            if code.intercepted:
                del masks["sdpa"]
        calls = surveyor.calls
        if not calls:
            raise refused(kind, "it does not attend through transformers' attention interface")
        if len(calls) < layers:
            raise refused(kind, f"{layers - len(calls)} of its {layers} layers do something else than attend")
        if len({call.kv_heads for call in calls}) > 1:
            raise refused(kind, "its layers differ in their number of key heads")
        if sum(buffer.numel() for buffer in model.buffers()) > _LARGEST_BUFFERS:
            raise refused(kind, "its tables take more memory than is sane")
        shape = Shape(
            layers=len(calls),
            heads=max(call.heads for call in calls),
            kv_heads=calls[0].kv_heads,
            head_dim=max(max(call.key_dim, call.value_dim) for call in calls),
            context_length=code.context_length,
            vocab_size=theirs.vocab_size,
        )
        return Survey(shape, calls, sum(parameter.numel() for parameter in model.parameters()))
