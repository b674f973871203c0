"""How a response comes about: from what a model writes to output items and the events that tell of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from ...tools import Arguments, Begun, Ended, Piece
from .. import problems
from ..answers import Asked, Usage
from .items import item_id
from .shared import chat_score

Event = dict[str, Any]

ENDED = ("completed", "incomplete", "failed", "cancelled")


class Teller:
    """Adds to `response` what comes, and tells of each step. Events hold the response itself: they are to be
    encoded before the next one is asked for."""

    def __init__(self, response: dict[str, Any]) -> None:
        self.response = response
        self._number = 0
        self._item: dict[str, Any] | None = None

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def begin(self) -> Iterator[Event]:
        self.response["status"] = "in_progress"
        yield self._event("created", response=self.response)
        yield self._event("in_progress", response=self.response)

    def _new_id(self, prefix: str) -> str:
        return item_id(prefix, self.response["id"], len(self.response["output"]))

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self.close()
        self._item = item
        self.response["output"].append(item)
        yield self._event("output_item.added", item=item, **self._output)

    @property
    def _output(self) -> dict[str, Any]:
        return {"output_index": len(self.response["output"]) - 1}

    @property
    def _call(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], **self._output}

    @property
    def _place(self) -> dict[str, Any]:
        return {**self._call, "content_index": 0}

    def text(self, text: str, scores: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """What the model says, in a message that goes on or begins."""
        if self._item is None or self._item["type"] != "message":
            message: dict[str, Any] = {
                "id": self._new_id("msg_"),
                "type": "message",
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
            yield from self._open(message)
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._event("content_part.added", part=part, **self._place)
            message["content"] = [part]
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        part["logprobs"] += scores
        if text or scores:
            yield self._event("output_text.delta", delta=text, logprobs=list(scores), **self._place)

    def piece(self, piece: Piece, scores: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """What came of the answer; `scores` are those of its tokens, if it is text."""
        match piece:
            case str():
                yield from self.text(piece, scores)
            case Begun(_, id_, name):
                call = {
                    "id": self._new_id("fc_"),
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": id_,
                    "name": name,
                    "arguments": "",
                }
                yield from self._open(call)
            case Arguments(_, text):
                assert self._item is not None
                self._item["arguments"] += text
                yield self._event("function_call_arguments.delta", delta=text, **self._call)
            case Ended():
                yield from self.close()

    def close(self, status: str = "completed") -> Iterator[Event]:
        """Ends the item that is open."""
        item = self._item
        if item is None:
            return
        if item["type"] == "message":
            part = item["content"][0]
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("output_text.done", **told, **self._place)
            yield self._event("content_part.done", part=part, **self._place)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("function_call_arguments.done", **told, **self._call)
        item["status"] = status
        yield self._event("output_item.done", item=item, **self._output)
        self._item = None

    def end(self) -> Event:
        """The last event, once the response says how it ended."""
        status = self.response["status"]
        return self._event("incomplete" if status == "cancelled" else status, response=self.response)


async def tell(
    asked: Asked, response: dict[str, Any], scored: bool, save: Callable[[], Awaitable[None]]
) -> AsyncIterator[Event]:
    """Generates the answer into `response`, whose one answer `asked` is, and tells of it. `save` is awaited
    before the last event. What the kernel refuses is raised; what goes wrong later is told."""
    teller = Teller(response)
    begun, told, finish = False, 0, t.Finish.CANCELLED
    scores: list[dict[str, Any]] = []  # of tokens whose text is not certain yet
    try:
        async with contextlib.aclosing(asked.deltas()) as deltas:
            async for delta in deltas:
                if not begun:
                    begun = True
                    for event in teller.begin():
                        yield event
                if scored:
                    scores += [chat_score(score) for score in delta.answer.scores(told)]
                    told = len(delta.answer.tokens)
                for piece in delta.pieces:
                    for event in teller.piece(piece, scores):
                        yield event
                    scores = []
                if delta.done is not None:
                    finish = delta.done.finish
    except errors.LLMasOSError as problem:
        if not begun:
            raise
        fail(response, problem)
    else:
        if not response["output"] or (scores and response["output"][-1]["type"] == "message"):
            for event in teller.text("", scores):
                yield event
        _finish(response, finish)
        response["usage"] = usage(asked.usage)
    for event in teller.close("completed" if response["status"] == "completed" else "incomplete"):
        yield event
    await save()
    yield teller.end()


def _finish(response: dict[str, Any], finish: t.Finish) -> None:
    match finish:
        case t.Finish.STOP:
            response["status"] = "completed"
            response["completed_at"] = int(time.time())
        case t.Finish.CANCELLED:
            response["status"] = "cancelled"
        case _:  # `deadline` and `killed` are no words of OpenAI's, and true
            reason = "max_output_tokens" if finish is t.Finish.LENGTH else str(finish)
            response["status"] = "incomplete"
            response["incomplete_details"] = {"reason": reason}


def fail(response: dict[str, Any], error: errors.LLMasOSError) -> None:
    problem = problems.problem_of(error)
    code = problem.code or problem.type
    response["status"] = "failed"
    response["error"] = {"code": code, "message": problem.message, "param": problem.param}


def usage(used: Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
        "output_tokens": used.generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.prompt + used.generated,
    }
