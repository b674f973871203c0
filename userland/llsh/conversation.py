"""A conversation with one process: the messages so far, and the context that already holds them.

Only what is new of a conversation is sent and computed. A process that was there before (a fork, a detached
one) is continued at its end: what was said in it before is in its context, not in `messages`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .answer import Settings
from .models import installed
from .shell import Shell

if TYPE_CHECKING:
    from ..llm import LLM
    from ..process import Process
    from ..text_stream import TextStream
    from ..tokenizer import Tokenizer


class Conversation:
    """`inherited`: the context was there before this conversation."""

    def __init__(self, llm: LLM, process: Process, inherited: bool = False) -> None:
        self.llm = llm
        self.process = process
        self.inherited = inherited
        self.system = ""
        self.turns: list[dict[str, str]] = []

    @property
    def model(self) -> str:
        return self.llm.model

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def has_template(self) -> bool:
        return bool(self.llm.tokenizer.template)

    @property
    def messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def ask(self, text: str, settings: Settings) -> TextStream:
        """What the user says; the answer streams. Give it to `heard` when it has ended.

        Raises UnsupportedModel without a chat template, ContextOverflow.
        """
        from ..chat import encode_chat

        said = {"role": "user", "content": text}
        if self.inherited:
            return self._append(next_turn(self.llm.tokenizer, self.process.tokens, said), settings)
        messages = [*self.messages, said]
        taken = len(encode_chat(self.llm.tokenizer, messages, model=self.model))
        stream = self.process.chat(messages, **settings.options(self.llm.context_length - taken))
        self.turns.append(said)
        return stream

    def raw(self, text: str, settings: Settings) -> TextStream:
        """Appends text as it is; the answer continues it."""
        held = self.process.tokens
        return self._append(self.llm.tokenizer.encode(text, start=not held), settings)

    def heard(self, text: str) -> None:
        """The answer to the last question, whole or as far as it came."""
        if self.turns:
            self.turns.append({"role": "assistant", "content": text})

    def clear(self) -> None:
        """Forgets everything said; the process stays."""
        self.process.truncate(0)
        self.turns.clear()
        self.inherited = False

    def _append(self, tokens: Sequence[int], settings: Settings) -> TextStream:
        from ..completion import Answer
        from ..text_stream import TextStream

        context = [*self.process.tokens, *tokens]
        plan = self.llm.plan(settings.options(self.llm.context_length - len(context)), len(context))
        stream = self.process.infer(
            tokens, max_tokens=plan.max_tokens, sampling=plan.sampling, deadline_ms=plan.deadline_ms
        )
        return TextStream(stream, Answer(self.llm.tokenizer, context, plan.stop))


def next_turn(tokenizer: Tokenizer, held: Sequence[int], said: dict[str, str]) -> list[int]:
    """Tokens that a user's message adds to a context that ends with an answer, or to an empty one.

    They are found by rendering the message behind a sample exchange and cutting the sample off.
    """
    from ..chat import encode_chat

    if not held:
        return encode_chat(tokenizer, [said])
    sample = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = encode_chat(tokenizer, sample, answer=False)
    whole = encode_chat(tokenizer, [*sample, said])
    if whole[: len(before)] != before:
        raise errors.UnsupportedModel("the model's chat template does not append one message to another")
    closing = _after_last_answer(before, tokenizer)
    if held[-1] in tokenizer.eos_ids:
        closing = closing[1:] if closing[:1] == [held[-1]] else closing
    return [*closing, *whole[len(before) :]]


def _after_last_answer(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """How the template closes an answer: everything from the last token that ends one."""
    ends = [place for place, token in enumerate(tokens) if token in tokenizer.eos_ids]
    return tokens[ends[-1] :] if ends else []


@contextlib.contextmanager
def opened(shell: Shell, target: str, sched_class: t.SchedClass | None, nice: int) -> Iterator[Conversation]:
    """A conversation with `target`: a model, whose new process ends with the block, or the process with
    that pid, which stays. Starts the daemon and pulls the model if need be."""
    from ..llm import LLM
    from ..process import Process

    client = shell.client() if target.isdecimal() else shell.started()
    if target.isdecimal():
        row = client.call(table.StatProcess(int(target)))
        if row.state is t.State.STOPPED:
            raise errors.ProcessBusy(f"process {row.pid} is stopped", hint=f"llsh cont {row.pid}")
        shell.pid = row.pid
        llm = LLM.from_pretrained(row.model, client=client)
        yield Conversation(llm, Process(llm, row.pid), inherited=row.context > 0)
        return
    name = installed(shell, client, target)
    with shell.terminal.spinner(f"loading {target}"):
        llm = LLM.from_pretrained(
            name, client=client, sched_class=sched_class or t.SchedClass.INTERACTIVE, nice=nice
        )
        process = llm.process()
    with process:
        shell.pid = process.pid
        try:
            yield Conversation(llm, process)
        finally:
            shell.pid = 0
