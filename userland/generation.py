"""What `generate` means: Hugging Face's options, their defaults and their errors. No I/O.

Options become a Plan (the sampling, beams and lengths that travel in `infer`). A default comes from the
model's generation_config.json if that sets it, else it is Hugging Face's own, with one exception: when
neither max_length nor max_new_tokens is given anywhere, 256 new tokens at most are generated (Hugging Face
stops at 20 tokens with the prompt, which surprises everyone).
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from llmasos.syscalls.bounds import refused

from .structured import grammar_of
from .tokenizer import too_long

DEFAULT_NEW_TOKENS = 256

W = TypeVar("W", bound=t.Wire)


class Options(TypedDict, total=False):
    """Options of generate, stream and chat, with Hugging Face's meanings."""

    max_length: int | None
    """Tokens of prompt and answer together."""
    max_new_tokens: int | None
    """Tokens of the answer; wins over max_length."""
    min_length: int | None
    """Tokens of prompt and answer together before which no stop token ends the answer."""
    min_new_tokens: int | None
    """Tokens of the answer before which none does; wins over min_length."""
    eos_token_id: int | Sequence[int] | None
    """Stop tokens, instead of the model's own."""
    num_beams: int | None
    """Above 1: beam search."""
    do_sample: bool | None
    """False: always the likeliest token; temperature, top_k, top_p and min_p do nothing."""
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    no_repeat_ngram_size: int | None
    seed: int | None
    """Of the first result; further ones count up from it."""
    stop: str | Sequence[str] | None
    """Strings that end the answer; they are not part of it."""
    return_full_text: bool | None
    """Whether the result begins with the prompt: by default so for generate, not for chat."""
    logprobs: int | None
    """Scores of the answer's tokens, with this many alternatives each (0 to 20)."""
    response_format: Any
    """What the answer has to look like, as OpenAI has it ({"type": "json_object"}, {"type": "json_schema",
    "json_schema": {"schema": …}}), or a pydantic model."""
    structured_outputs: Mapping[str, Any] | t.Grammar | None
    """The same as vLLM has it: one of json (a schema), json_object, regex, choice, grammar (Lark)."""
    max_time: float | None
    """Seconds after which the answer ends as it is, with finish "deadline"; waiting in the queue counts."""


# Hugging Face's defaults; `logprobs`, `seed` and the lengths have none.
_DEFAULTS: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
}
# What other libraries call the same thing.
_ELSEWHERE = {
    "stop_strings": "stop",
    "inputs": "prompt",
    "stop_sequences": "stop",
    "max_tokens": "max_new_tokens",
    "n": "num_return_sequences",
    "stop_token_ids": "eos_token_id",
    "regex": "structured_outputs={'regex': …}",
    "choice": "structured_outputs={'choice': […]}",
    "grammar": "structured_outputs={'grammar': …}",
    "json_schema": "structured_outputs={'json': …}",
    "schema": "structured_outputs={'json': …}",
    "json": "structured_outputs={'json': …}",
}
# What Hugging Face has and nobody needs here.
_UNNEEDED = {
    "pad_token_id": "nothing is padded, leave it out",
    "attention_mask": "nothing is padded, leave it out",
    "use_cache": "it always is, leave it out",
    "streamer": "stream() yields the text as it comes",
    "return_dict_in_generate": "the result has tokens, finish and, with logprobs=0, scores",
    "output_scores": "logprobs=0 gives the scores of the tokens",
}
_ONLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_ONLY_BEAMS = ("length_penalty", "early_stopping")


@dataclass(frozen=True, slots=True)
class Model:
    """What planning must know of a model. `generation` is its generation_config.json."""

    context_length: int
    eos_ids: Sequence[int]
    generation: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """One prompt's generation, ready for `infer`. `samples` processes, each with its own seed."""

    max_tokens: int
    sampling: t.Sampling
    beams: t.Beams | None
    samples: int
    stop: tuple[str, ...]
    deadline_ms: int | None

    def seeded(self, index: int) -> t.Sampling:
        """The sampling of sample `index`."""
        seed = self.sampling.seed
        return (
            self.sampling
            if seed is None
            else msgspec.structs.replace(self.sampling, seed=(seed + index) % 2**63)
        )


def check_names(options: Mapping[str, Any], caller: str) -> None:
    """Raises TypeError for an option that does not exist, with the nearest one that does."""
    for name in options:
        if name not in Options.__annotations__:
            near = [_ELSEWHERE[name]] if name in _ELSEWHERE else []
            near = near or difflib.get_close_matches(name, Options.__annotations__, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            hint = f": {_UNNEEDED[name]}" if name in _UNNEEDED else hint
            raise TypeError(f"{caller}() has no option {name!r}{hint}")


def plan(options: Options, model: Model, *, prompt_tokens: int, results: int = 1) -> Plan:
    """What `options` ask of `model` for a context of `prompt_tokens` tokens and `results` results.

    Raises InvalidArgument naming the option, ContextOverflow when the prompt fills the context.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("do_sample", "return_full_text"):
        if given.get(name, True) not in (True, False):
            raise _invalid(name, f"must be True or False, not {given[name]!r}")
    chosen = (
        _DEFAULTS | {k: v for k, v in model.generation.items() if k in _DEFAULTS and v is not None} | given
    )
    if chosen["num_beams"] != 1 and "do_sample" not in given:
        chosen["do_sample"] = False  # the caller's beams win over a habit of the model's configuration
    beams = _beams(chosen, results)
    _warn_unused(given, chosen)
    return Plan(
        max_tokens=_max_tokens(given, model, prompt_tokens),
        sampling=_sampling(chosen, _stop_ids(given, model), prompt_tokens, _grammar(options)),
        beams=beams,
        samples=results if beams is None else 1,
        stop=_stops(options.get("stop")),
        deadline_ms=_deadline_ms(options.get("max_time")),
    )


def _deadline_ms(max_time: float | None) -> int | None:
    if max_time is None:
        return None
    if not isinstance(max_time, int | float) or not 0 < max_time < 2**31 / 1000:
        raise _invalid("max_time", "must be seconds, above 0 and below 2147483 (24 days)")
    return max(1, round(1000 * max_time))


def _beams(chosen: Mapping[str, Any], results: int) -> t.Beams | None:
    if not isinstance(results, int) or results < 1:
        raise _invalid("num_return_sequences", f"must be a whole number, at least 1, not {results!r}")
    if (num_beams := chosen["num_beams"]) == 1:
        if results > 1 and not chosen["do_sample"]:
            raise _invalid(
                "num_return_sequences", "greedy search has one result", "set do_sample=True or num_beams"
            )
        return None
    if chosen["do_sample"]:
        raise _invalid(
            "do_sample", "sampling within beams is not supported", "leave out do_sample or num_beams"
        )
    stopping = chosen["early_stopping"]
    beams = _checked(
        t.Beams,
        num_beams=num_beams,
        num_return_sequences=results,
        length_penalty=chosen["length_penalty"],
        early_stopping=str(stopping).lower() if isinstance(stopping, bool) else stopping,
    )
    if results > num_beams:
        raise _invalid("num_return_sequences", f"{num_beams} beams have at most {num_beams} results")
    return beams


def _grammar(options: Options) -> t.Grammar | None:
    return grammar_of(options.get("response_format"), options.get("structured_outputs"))


def _stop_ids(given: Mapping[str, Any], model: Model) -> list[int]:
    ids = given.get("eos_token_id", model.eos_ids)
    ids = [ids] if isinstance(ids, int) else ids
    if not isinstance(ids, Collection) or not all(isinstance(id_, int) and 0 <= id_ < 2**31 for id_ in ids):
        raise _invalid("eos_token_id", f"must be a token's id, or a list of some, not {ids!r}")
    return list(ids)


def _sampling(
    chosen: Mapping[str, Any], stop_ids: list[int], prompt_tokens: int, grammar: t.Grammar | None
) -> t.Sampling:
    noise: dict[str, Any] = {}
    if chosen["do_sample"]:
        if chosen["temperature"] == 0:
            raise _invalid("temperature", "must be above 0 to sample", "do_sample=False takes the likeliest")
        noise = {name: chosen[name] for name in _ONLY_SAMPLING}
    same = ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size")
    if (least := chosen["min_new_tokens"]) is None:
        least = max(0, _natural("min_length", chosen["min_length"]) - prompt_tokens)
    return _checked(
        t.Sampling,
        **noise,
        **{name: chosen[name] for name in same},
        min_new_tokens=least,
        seed=chosen.get("seed"),
        stop_token_ids=stop_ids,
        logprobs=chosen.get("logprobs"),
        grammar=grammar,
    )


def _max_tokens(given: Mapping[str, Any], model: Model, prompt_tokens: int) -> int:
    room = model.context_length - prompt_tokens
    if room <= 0:
        raise too_long(prompt_tokens, model.context_length)
    if (new := given.get("max_new_tokens")) is not None:
        if "max_length" in given:
            _warn("both max_new_tokens and max_length are given: max_new_tokens wins")
        return _natural("max_new_tokens", new)
    if (length := given.get("max_length")) is not None:
        if _natural("max_length", length) <= prompt_tokens:
            raise _invalid(
                "max_length",
                f"{length} is not above the prompt's {prompt_tokens} tokens",
                "use max_new_tokens",
            )
        return int(length - prompt_tokens)
    if new := model.generation.get("max_new_tokens"):
        return min(int(new), room)
    if (length := model.generation.get("max_length")) and length > prompt_tokens:
        return min(int(length - prompt_tokens), room)
    return min(DEFAULT_NEW_TOKENS, room)


def _warn_unused(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    unused = [name for name in _ONLY_SAMPLING if name in given and not chosen["do_sample"]]
    if unused:
        _warn(f"{', '.join(unused)}: no effect without do_sample=True")
    unused = [name for name in _ONLY_BEAMS if name in given and chosen["num_beams"] == 1]
    if unused:
        _warn(f"{', '.join(unused)}: no effect without num_beams")


def _warn(words: str) -> None:
    """Of the line that called this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("llmasos."):
        level, frame = level + 1, frame.f_back
    warnings.warn(words, stacklevel=level)


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Collection) or not all(isinstance(one, str) and one for one in stops):
        raise _invalid("stop", f"must be a string, or a list of some, none of them empty, not {stop!r:.100}")
    return tuple(stops)


def _natural(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _invalid(name, f"must be a number of tokens, not {value!r}")
    return value


def _checked(kind: type[W], **fields: Any) -> W:
    """A struct with its types and bounds checked here, so that the caller's line is in the traceback."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as problem:
        name, words = refused(problem, kind)
        hint = "1 searches without beams" if name == "num_beams" else ""
        raise _invalid(name or kind.__name__, words, hint) from None


def _invalid(name: str, problem: str, hint: str = "") -> errors.InvalidArgument:
    return errors.InvalidArgument(f"{name}: {problem}", hint=hint, field=name)
