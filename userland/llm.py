"""LLM: a model of the daemon as a Python object, with Hugging Face's words.

    from llmasos import LLM
    llm = LLM.from_pretrained("smollm2")
    print(llm.generate("The capital of France is", max_new_tokens=8))

`generate`, `stream` and `chat` have the async twins `agenerate`, `astream` and `achat` on the same object.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Unpack, overload

from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .client import Client, Stream
from .generation import Options

Message = Mapping[str, str]


class Completion(str):
    """Generated text: a str that also knows how it came about.

    `text` is the answer without the prompt, `tokens` its ids, `finish` why it ended, `logprobs` its scores if
    asked for, `prompt_tokens` and `cached_tokens` the length of the input and how much of it was shared.
    """


class TextStream(Iterator[str]):
    """Pieces of text as they are generated: iterate, then read `.reply` (finish, token counts).

    Never yields half a character or part of a stop string. Closing early cancels the generation.
    """

    @property
    def reply(self) -> table.InferReply: ...

    @property
    def text(self) -> str:
        """What has come so far."""

    def cancel(self) -> None: ...

    def close(self) -> None: ...

    def __next__(self) -> str: ...

    def __enter__(self) -> TextStream: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Process:
    """A running context of a model: a pid, and text instead of tokens."""

    pid: int
    model: str

    def generate(self, text: str = "", **options: Unpack[Options]) -> Completion: ...

    def stream(self, text: str = "", **options: Unpack[Options]) -> TextStream: ...

    def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> TextStream:
        """Appends chat messages (the template's text for them) and streams the answer; the context stays."""

    def infer(
        self, tokens: Sequence[int], *, max_tokens: int | None = None, sampling: t.Sampling = t.Sampling()
    ) -> Stream[t.InferEvent, table.InferReply]: ...

    def fork(self, n: int = 1) -> list[Process]: ...

    def truncate(self, length: int) -> None: ...

    @property
    def tokens(self) -> list[int]: ...

    @property
    def text(self) -> str: ...

    def info(self) -> t.ProcessInfo: ...

    def nice(self, value: int) -> t.ProcessInfo: ...

    def kill(self, signal: t.Signal | str = "TERM") -> None: ...

    def wait(self, timeout_s: float | None = None) -> table.WaitReply: ...

    def __enter__(self) -> Process: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LLM:
    """A model in the model filesystem, ready to be used through a client."""

    client: Client
    model: str

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str = "",
        dtype: str = "",
        sched_class: str = "interactive",
        nice: int = 0,
        address: str | None = None,
        label: str = "",
        client: Client | None = None,
        progress: bool | None = None,
    ) -> LLM: ...

    @overload
    def generate(self, prompt: str = "", **options: Unpack[Options]) -> Completion: ...
    @overload
    def generate(self, prompt: Sequence[str], **options: Unpack[Options]) -> list[Completion]: ...
    def generate(
        self, prompt: str | Sequence[str] = "", **options: Unpack[Options]
    ) -> Completion | list[Completion]: ...

    def stream(self, prompt: str = "", **options: Unpack[Options]) -> TextStream: ...

    @overload
    def chat(
        self, messages: str | Sequence[Message], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: str | Sequence[Message], *, stream: Literal[True], **options: Unpack[Options]
    ) -> TextStream: ...
    def chat(
        self, messages: str | Sequence[Message], *, stream: bool = False, **options: Unpack[Options]
    ) -> Completion | TextStream: ...

    async def agenerate(
        self, prompt: str | Sequence[str] = "", **options: Unpack[Options]
    ) -> Completion | list[Completion]: ...

    def astream(self, prompt: str = "", **options: Unpack[Options]) -> AsyncIterator[str]: ...

    async def achat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Completion: ...

    def process(self, prompt: str | None = None, *, label: str = "", detached: bool = False) -> Process: ...

    def fork(self, prompt: str, n: int = 2) -> list[Process]: ...

    def logprobs(self, text: str) -> list[tuple[str, float]]: ...

    def close(self) -> None: ...

    def __enter__(self) -> LLM: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
