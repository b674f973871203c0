"""TextStream: the pieces of an answer as they are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType

from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .client import Stream
from .completion import Answer, Completion


class TextStream(Iterator[str]):
    """Iterate for text; afterwards `completion` is the whole and `reply` the kernel's account of it.

    Never yields half a character or part of a stop string. Leaving the `with` block, dropping the object or
    `cancel()` ends the generation in the kernel. `on_end` runs once after the kernel's final answer.
    """

    def __init__(
        self,
        stream: Stream[t.InferEvent, table.InferReply],
        answer: Answer,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._stream = stream
        self._answer = answer
        self._on_end = on_end
        self._ended = False

    def __next__(self) -> str:
        while not self._ended:
            try:
                event = next(self._stream)
            except StopIteration:
                piece = self._end()
            else:
                piece = self._answer.feed(event)
                if self._answer.stopped:
                    self._stream.cancel()
            if piece:
                return piece
        raise StopIteration

    @property
    def text(self) -> str:
        """What has come so far."""
        return self._answer.text

    @property
    def reply(self) -> table.InferReply:
        """The kernel's final answer. Raises RuntimeError before the end."""
        return self._stream.reply

    @property
    def completion(self) -> Completion:
        """The whole answer. Raises RuntimeError before the end."""
        score = self.reply.sequences[0].score if self.reply.sequences else None
        return self._answer.completion(self.reply, score=score)

    def cancel(self) -> None:
        """Asks the kernel to end the generation; what is under way can still be read."""
        self._stream.cancel()

    def close(self) -> None:
        """Cancels if need be and waits until the kernel confirms."""
        self._stream.close()
        if not self._ended and self._stream.ended:
            self._end()

    def _end(self) -> str:
        if self._ended:  # by another thread
            return ""
        self._ended = True
        for sequence in self._stream.reply.sequences[:1]:  # beams bring their tokens all at once
            piece = self._answer.feed(t.InferEvent(tokens=sequence.tokens)) + self._answer.flush()
            break
        else:
            piece = self._answer.flush(self._stream.reply.finish)
        self._on_end()
        return piece

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
