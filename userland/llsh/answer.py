"""One answer of a model on the screen: settings, streaming, timings. `run` and `chat` share it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .terminal import Terminal

if TYPE_CHECKING:
    from ..generation import Options
    from ..llm import TextStream

DEFAULT_TOKENS = 512


@dataclass(slots=True)
class Settings:
    """What `run`'s options and chat's /set change. None: as the model's own configuration says."""

    max_tokens: int = DEFAULT_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_time: float | None = None
    structured: dict[str, Any] | None = None  # as generate's structured_outputs

    def options(self, room: int) -> Options:
        """Options of `generate` for a context with `room` tokens left."""
        options: Options = {"max_new_tokens": max(1, min(self.max_tokens, room))}
        if self.temperature == 0:
            options["do_sample"] = False
        elif any(value is not None for value in (self.temperature, self.top_p, self.seed)):
            options["do_sample"] = True
        if self.temperature:
            options["temperature"] = self.temperature
        if self.top_p is not None:
            options["top_p"] = self.top_p
        if self.seed is not None:
            options["seed"] = self.seed
        if self.max_time is not None:
            options["max_time"] = self.max_time
        if self.structured is not None:
            options["structured_outputs"] = self.structured
        return options


class AnswerInfo(msgspec.Struct, frozen=True):
    """What `run --json` prints. Times in seconds from the moment the prompt was sent."""

    model: str
    pid: int
    text: str
    finish: t.Finish
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    context: int
    seed: int
    first_token_s: float
    total_s: float
    tokens_per_s: float


@dataclass(slots=True)
class Answer:
    """An answer as it arrives. `show` False: nothing is printed (JSON comes later)."""

    terminal: Terminal
    show: bool = True
    text: str = ""
    _began: float = field(default_factory=time.monotonic)
    _first: float | None = None
    _ended: float = 0.0

    def stream(self, pieces: TextStream, waiting_for: str) -> table.InferReply:
        """Prints the pieces as they come, a spinner before the first, and a newline at the end."""
        with self.terminal.spinner(waiting_for) as spinner:
            try:
                for piece in pieces:
                    if self._first is None:
                        self._first = time.monotonic()
                        spinner.stop()
                    self.text += piece
                    if self.show:
                        self.terminal.write(piece)
            finally:
                self._ended = time.monotonic()
                if self.show and self.text and not self.text.endswith("\n"):
                    self.terminal.line()
        return pieces.reply

    def info(self, model: str, reply: table.InferReply) -> AnswerInfo:
        first = self._first or self._ended
        later = max(0, reply.generated_tokens - 1)
        return AnswerInfo(
            model=model,
            pid=reply.pid,
            text=self.text,
            finish=reply.finish,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            generated_tokens=reply.generated_tokens,
            context=reply.context,
            seed=reply.seed,
            first_token_s=round(first - self._began, 4),
            total_s=round(self._ended - self._began, 4),
            tokens_per_s=round(later / (self._ended - first), 2) if self._ended > first else 0.0,
        )


def timings(info: AnswerInfo) -> str:
    """The lines of --verbose."""
    return (
        f"prompt       {info.prompt_tokens} tokens, {info.cached_tokens} of them shared\n"
        f"first token  {info.first_token_s:.2f} s\n"
        f"answer       {info.generated_tokens} tokens, {info.tokens_per_s:.1f} tokens/s\n"
        f"total        {info.total_s:.2f} s, finish {info.finish}, pid {info.pid}"
    )
