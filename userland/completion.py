"""Generated text, and how it is put together from what a stream of `infer` brings. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .tokenizer import Detokenizer, Shown, StopStrings, Tokenizer
from .tools import Call, CallReader, Piece


class TokenScore(NamedTuple):
    """A token of an answer with its natural-log probability and the likeliest alternatives there."""

    text: Shown
    id: int
    logprob: float
    top: list[tuple[Shown, float]]


class Completion(str):
    """Generated text: a str that also knows how it came about.

    As a str it is the answer, after the prompt if return_full_text is on.
    """

    text: str
    """The answer without the prompt, and without calls of tools."""
    tool_calls: list[Call]
    """The tools that the model wants to be called."""
    called: bool
    """Whether the answer ended with tool_calls, all of them whole."""
    tokens: list[int]
    """Generated ids, with the stop token if there was one."""
    finish: t.Finish
    """Why it ended; a stop string is STOP."""
    stop: str
    """The stop string that ended it, or ""."""
    logprobs: list[TokenScore] | None
    """Parallel to `tokens` when they were asked for."""
    score: float | None
    """Beam search's length-normalised score."""
    prompt_tokens: int
    """Length of the context before the answer."""
    cached_tokens: int
    """Of the tokens that `infer` was given, how many were shared with an earlier prompt."""
    seed: int

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the assistant's message, for the conversation that goes on."""
        calls = {"tool_calls": [call.shown() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}


class Answer:
    """One answer while it comes. `context` are the ids before it, `prefix` text to begin the result with;
    `reader` tells calls of tools from words."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int],
        stop: Sequence[str] = (),
        prefix: str = "",
        reader: CallReader | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, context)
        self._stops = StopStrings(stop)
        self._prefix = prefix
        self._reader = reader
        self._context_tokens = len(context)
        self.context = context
        self._scores: list[t.Chosen] = []
        self.prompt_chosen: list[t.Chosen] = []
        self.tokens: list[int] = []
        self.text = ""
        self.pieces: list[Piece] = []
        """What the last feed or flush brought, words and calls."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: the generation should be cancelled."""
        return self._stops.stopped

    def feed(self, event: t.InferEvent) -> str:
        """Takes tokens in and returns the text that is certain now."""
        self.pieces = []
        if self.stopped:
            return ""
        self.prompt_chosen += event.prompt_logprobs
        # An event has as many tokens as the device happened to make at once; where it ends must not tell.
        size = 1 if self._stops.strings else max(1, len(event.tokens))
        text = ""
        for start in range(0, len(event.tokens), size):
            part = event.tokens[start : start + size]
            self.tokens += part
            self._scores += event.logprobs[start : start + size]
            text += self._grow(self._detokenizer.feed(part))
            if self.stopped:
                break
        if len(event.tokens) > size and text and all(isinstance(piece, str) for piece in self.pieces):
            self.pieces = [text]
        return text

    def flush(self, finish: t.Finish = t.Finish.STOP) -> str:
        """The text held back, once the stream has ended as `finish` says."""
        self.pieces = []
        return "" if self.stopped else self._grow(self._detokenizer.flush(), finish)

    def completion(
        self, reply: table.InferReply, *, finish: t.Finish | None = None, score: float | None = None
    ) -> Completion:
        """The whole, after `flush`."""
        done = Completion(self._prefix + self.text)
        done.text, done.tokens, done.score = self.text, self.tokens, score
        done.stop = self._stops.found
        done.finish = t.Finish.STOP if self.stopped else finish or reply.finish
        reader = None if self.stopped else self._reader  # words, which may stop, come before calls
        done.tool_calls = reader.calls if reader is not None else []
        done.called = reader is not None and reader.whole and done.finish is t.Finish.STOP
        done.logprobs = self.scores() if self._scores else None
        done.prompt_tokens, done.cached_tokens = self._context_tokens, reply.cached_tokens
        done.seed = reply.seed
        return done

    def _grow(self, text: str, ended: t.Finish | None = None) -> str:
        """Stop strings count in words, not in calls."""
        before = len(self.pieces)
        if self._reader is None:
            came: list[Piece] = [text]
        else:
            came = self._reader.feed(text)
            if ended:
                came += self._reader.flush(cut=ended is not t.Finish.STOP)
        for piece in came:
            if isinstance(piece, str):
                self._add(self._stops.feed(piece))
                if self.stopped:
                    break
            else:
                self._add(self._stops.flush())
                self.pieces.append(piece)
        if ended:
            self._add(self._stops.flush())
        grown = "".join(piece for piece in self.pieces[before:] if isinstance(piece, str))
        self.text += grown
        return grown

    def _add(self, words: str) -> None:
        if words:
            self.pieces.append(words)

    def scores(self, first: int = 0) -> list[TokenScore]:
        """Of the tokens so far, without the `first` ones."""
        return self._shown(self.tokens[first:], self._scores[first:])

    def prompt_scores(self) -> list[TokenScore]:
        """Of the context's tokens, if they were asked for; the first one's is NaN."""
        return self._shown(self.context[-len(self.prompt_chosen) :], self.prompt_chosen)

    def _shown(self, tokens: Sequence[int], scores: Sequence[t.Chosen]) -> list[TokenScore]:
        shown = self._tokenizer.shown
        return [
            TokenScore(shown(id_), id_, chosen.logprob, [(shown(o.token), o.logprob) for o in chosen.top])
            for id_, chosen in zip(tokens, scores, strict=False)
        ]
