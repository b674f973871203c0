"""What `generate` means: Hugging Face's options, their defaults and their errors. No I/O.

Options become a Plan (the sampling, beams and lengths that travel in `infer`). A default comes from the
model's generation_config.json if that sets it, else it is Hugging Face's own, with one exception: when
neither max_length nor max_new_tokens is given anywhere, 256 new tokens at most are generated (Hugging Face
stops at 20 tokens with the prompt, which surprises everyone).
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_type_hints

from llmasos.syscalls import errors
from llmasos.syscalls import types as t

DEFAULT_NEW_TOKENS = 256


class Options(TypedDict, total=False):
    """Options of generate, stream and chat, with Hugging Face's meanings."""

    max_length: int | None
    """Tokens of prompt and answer together."""
    max_new_tokens: int | None
    """Tokens of the answer; wins over max_length."""
    min_new_tokens: int | None
    num_beams: int | None
    """Above 1: beam search."""
    num_return_sequences: int | None
    """Results a prompt: the best beams, or samples with seeds seed, seed+1, …"""
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
    stop: str | Sequence[str] | None
    """Strings that end the answer; they are not part of it."""
    return_full_text: bool | None
    """Whether the result begins with the prompt: true for generate, false for stream and chat."""
    logprobs: int | None
    """Scores of the answer's tokens, with this many alternatives each (0 to 20)."""
