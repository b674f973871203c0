"""Process: a running context of a model, with text instead of tokens.

The kernel owns everything about it; this object holds its pid, which outlives a restart of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .chat import Message, encode_chat
from .client import Stream, to_signal
from .completion import Answer, Completion
from .generation import Options, check_names
from .text_stream import TextStream

if TYPE_CHECKING:
    from .llm import LLM


class Process:
    """A context of `llm`'s model. Leaving its `with` block kills and reaps it."""

    def __init__(self, llm: LLM, pid: int, unfinished: tuple[t.Sampling, int] | None = None) -> None:
        self._llm = llm
        self._unfinished = unfinished
        self.pid = pid

    @property
    def model(self) -> str:
        return self._llm.model

    def infer(
        self,
        tokens: Sequence[int] = (),
        *,
        max_tokens: int | None = None,
        sampling: t.Sampling = t.Sampling(),
        exit: bool = False,
        deadline_ms: int | None = None,
    ) -> Stream[t.InferEvent, table.InferReply]:
        """Appends token ids and streams what is generated; `exit` ends the process with it. It stops after
        `deadline_ms`, with finish "deadline"."""
        call = table.Infer(
            self.pid,
            tokens=t.pack_tokens(tokens),
            max_tokens=max_tokens,
            sampling=sampling,
            exit=exit,
            deadline_ms=deadline_ms,
        )
        return self._llm.client.stream(call)

    def append(self, text: str) -> None:
        """Takes text in without generating anything."""
        tokens = self._llm.tokenizer.encode(text, start=not self.tokens)
        if tokens:
            self.infer(tokens, max_tokens=0).result()

    def generate(self, text: str = "", **options: Unpack[Options]) -> Completion:
        """Appends `text` and returns the answer, which stays in the context too."""
        check_names(options, "generate")
        with self._stream(text, options) as pieces:
            for _ in pieces:
                pass
        return pieces.completion

    def stream(self, text: str = "", **options: Unpack[Options]) -> TextStream:
        """Appends `text` and yields the answer piece by piece."""
        check_names(options, "stream")
        return self._stream(text, options)

    def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> TextStream:
        """Streams the answer to a whole conversation.

        What the context already holds of it is kept, what differs is cut off: pass all messages each
        time, and only the new ones are computed.
        """
        check_names(options, "chat")
        wanted = encode_chat(self._llm.tokenizer, messages, model=self.model)
        return self._start([], wanted, options, whole=True)

    def logprobs(self, text: str) -> list[tuple[str, float]]:
        """Appends `text` and returns its tokens with their log probabilities in this context."""
        tokens = self._llm.tokenizer.encode(text, start=not self.tokens)
        return self._llm.scores(tokens, self.infer(tokens, max_tokens=0, sampling=_SCORING))

    def fork(self, n: int = 1) -> list[Process]:
        """`n` copies that share this context's memory and go on by themselves."""
        pids = self._llm.client.call(table.Fork(self.pid, n)).pids
        return [Process(self._llm, pid) for pid in pids]

    def truncate(self, length: int) -> None:
        """Cuts the context back to its first `length` tokens."""
        self._llm.client.call(table.Truncate(self.pid, length))

    def snapshot(self, name: str) -> t.FileInfo:
        """Saves it as /sessions/NAME, also while it generates; `LLM.restore` brings it back."""
        return self._llm.client.call(table.Snapshot(self.pid, name))

    def migrate(self, device: str) -> table.MigrateReply:
        """Moves it to another device; what it generates goes on there."""
        return self._llm.client.call(table.Migrate(self.pid, device))

    def resume(self, stop: Sequence[str] = ()) -> TextStream:
        """The rest of the answer that was under way when the process was saved, as if nothing had happened.

        `stop` strings have to be given again: the kernel knows no text. Raises InvalidArgument when nothing
        was under way, or it was resumed already.
        """
        if self._unfinished is None:
            raise errors.InvalidArgument(f"process {self.pid} has no interrupted answer", field="pid")
        (sampling, max_tokens), self._unfinished = self._unfinished, None
        context = self.tokens
        answer = Answer(self._llm.tokenizer, context, stop)
        stream = self.infer(max_tokens=max_tokens, sampling=sampling)
        return TextStream(stream, answer, lambda: self._cut(context, answer))

    @property
    def tokens(self) -> list[int]:
        """The whole context."""
        return t.unpack_tokens(self._llm.client.read_file(f"/proc/{self.pid}/tokens"))

    @property
    def text(self) -> str:
        """The whole context as text, without special tokens."""
        return self._llm.tokenizer.decode(self.tokens)

    def info(self) -> t.ProcessInfo:
        """This process's row of `ps`."""
        return self._llm.client.call(table.StatProcess(self.pid))

    def nice(self, value: int) -> t.ProcessInfo:
        """Sets the nice value: -20 goes first, 19 last."""
        return self._llm.client.call(table.SetPriority(self.pid, nice=value))

    def kill(self, signal: t.Signal | str = t.Signal.TERM) -> None:
        """Sends a signal: TERM, KILL, STOP or CONT."""
        self._llm.client.call(table.Kill(self.pid, to_signal(signal)))

    def wait(self, timeout_s: float | None = None) -> table.WaitReply:
        """Waits for the process's end, reaps it and says how it ended."""
        return self._llm.client.wait(self.pid, timeout_s)

    def close(self) -> None:
        """Kills and reaps it; does nothing when it is gone already."""
        try:
            self.kill(t.Signal.KILL)
        except errors.ProcessEnded:
            pass  # a zombie, still to be reaped
        except (errors.NotFound, errors.Unavailable):
            return
        try:
            self.wait()
        except (errors.NotFound, errors.Conflict, errors.Unavailable):
            pass  # somebody else reaps it, or it went with its session

    def _stream(self, text: str, options: Options) -> TextStream:
        held = self.tokens
        return self._start(held, self._llm.tokenizer.encode(text, start=not held), options)

    def _start(
        self, held: list[int], tokens: list[int], options: Options, *, whole: bool = False
    ) -> TextStream:
        context = held + tokens
        plan = self._llm.plan(options, len(context))
        call = table.Infer(
            self.pid,
            tokens=t.pack_tokens(tokens),
            max_tokens=plan.max_tokens,
            sampling=plan.sampling,
            beams=plan.beams,
            whole=whole,
            deadline_ms=plan.deadline_ms,
        )
        prefix = self._llm.tokenizer.decode(context) if options.get("return_full_text") else ""
        answer = Answer(self._llm.tokenizer, context, plan.stop, prefix)
        return TextStream(self._llm.client.stream(call), answer, lambda: self._cut(context, answer))

    def _cut(self, context: list[int], answer: Answer) -> None:
        """After a stop string: drops what was generated behind it before the kernel heard of it."""
        if answer.stopped:
            self.truncate(len(context) + len(answer.tokens))

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Process {self.pid} {self.model}>"


_SCORING = t.Sampling(prompt_logprobs=True)
