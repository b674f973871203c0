"""What the journal is to hold: every process that can be named, answers that a client may ask for again, and
limits that a call set.

Collects what changed since the last `take`; the I/O shell commits that before it sends the answers of the
same turn, so what was acknowledged is durable. Tokens of a running infer are not kept: its process's row has
the context from before it until it ends, and the client, which has the tokens that it was sent, brings them
when it resumes. Never does I/O.

Answers are kept by session and request id until the session is forgotten; of each session the last
MOST_ANSWERS, more than its socket can hold."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict

import msgspec
from llmasos.syscalls.types import Quota, SchedClass, pack_tokens

from .modelfs.runs import RunRow
from .modelfs.session_files import Unfinished
from .process import Process

MOST_ANSWERS = 4096


class ProcessRow(msgspec.Struct, frozen=True):
    """A process. `session` empty: detached; `born` on the wall clock; `exit`: code and reason of a zombie."""

    pid: int
    parent: int
    owner: str
    session: bytes
    model: str
    digest: str
    device: str
    dtype: str
    sched_class: SchedClass
    nice: int
    label: str
    born: float
    stopped: bool
    generated: int
    tokens: bytes
    exit: tuple[int, str] | None
    unfinished: Unfinished | None
    lineage: list[str]
    run: RunRow | None


class AnswerRow(msgspec.Struct, frozen=True):
    """The frames that answered a request."""

    session: bytes
    id: int
    frames: list[bytes]


class QuotaRow(msgspec.Struct, frozen=True):
    """What a call made of an owner path's limits, whatever the configuration says; None: no limits."""

    path: str
    limit: Quota | None


def schema() -> int:
    """Changes with the rows above, so that no kernel takes the rows of another for its own. 31 bits."""
    _, components = msgspec.json.schema_components([ProcessRow, AnswerRow, QuotaRow])
    text = json.dumps(components, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


PROCESS, ANSWER, QUOTA, NEXT_PID = "process", "answer", "quota", "next pid"
"""What the names of the journal's rows begin with, or are."""


class Ledger:
    """Changes not yet taken. `epoch` is the wall clock's time when the kernel's clock shows 0."""

    def __init__(self, epoch: float) -> None:
        self._epoch = epoch
        self._processes: dict[int, Process | None] = {}
        self._answers: dict[bytes, OrderedDict[int, list[bytes]]] = {}
        self._rows: dict[str, bytes | None] = {}
        self._next_pid = 0

    def process(self, process: Process) -> None:
        """Its row changes. One that nobody can name (a one-shot's, a beam) has none."""
        if process.named:
            self._processes[process.pid] = process

    def gone(self, process: Process) -> None:
        if process.named:
            self._processes[process.pid] = None

    def next_pid(self, pid: int) -> None:
        """Pids below are taken. Alone it is no reason to commit."""
        self._next_pid = pid

    def quota(self, path: str, limit: Quota | None) -> None:
        self._rows[f"{QUOTA} {path}"] = msgspec.msgpack.encode(QuotaRow(path, limit))

    def quota_gone(self, path: str) -> None:
        """The configuration decides again."""
        self._rows[f"{QUOTA} {path}"] = None

    def answer(self, session: bytes, id_: int, frames: list[bytes]) -> None:
        answers = self._answers.setdefault(session, OrderedDict())
        answers[id_] = frames
        self._rows[_answer_name(session, id_)] = msgspec.msgpack.encode(AnswerRow(session, id_, frames))
        while len(answers) > MOST_ANSWERS:
            oldest, _ = answers.popitem(last=False)
            self._rows[_answer_name(session, oldest)] = None

    def known(self, rows: list[AnswerRow]) -> None:
        """Takes in answers that an earlier kernel gave."""
        for row in sorted(rows, key=lambda row: row.id):
            self._answers.setdefault(row.session, OrderedDict())[row.id] = row.frames

    def answered(self, session: bytes, id_: int) -> list[bytes] | None:
        """What the request was answered with, if it is known to have been."""
        answers = self._answers.get(session)
        return answers.get(id_) if answers else None

    def take_back(self, session: bytes, id_: int) -> None:
        """The request is going to be answered anew."""
        if self.answered(session, id_):
            del self._answers[session][id_]
            self._rows[_answer_name(session, id_)] = None

    def forget(self, session: bytes) -> None:
        """The session does not come back."""
        for id_ in self._answers.pop(session, {}):
            self._rows[_answer_name(session, id_)] = None

    def take(self) -> dict[str, bytes | None]:
        """The rows that changed; None: removed. Empty when nothing did."""
        rows, self._rows = self._rows, {}
        for pid, process in self._processes.items():
            rows[f"{PROCESS} {pid}"] = None if process is None else msgspec.msgpack.encode(self._row(process))
        self._processes.clear()
        if rows:
            rows[NEXT_PID] = msgspec.msgpack.encode(self._next_pid)
        return rows

    def _row(self, process: Process) -> ProcessRow:
        infer, pool, end = process.infer, process.pool, process.exit
        tokens, generated, unfinished = process.tokens, process.generated, process.unfinished
        if infer is not None:
            tokens = tokens[: infer.first_input]
            unfinished = infer.unfinished(infer.start) if infer.prompt_length < infer.start else None
            generated -= 0 if infer.beams else infer.made
        return ProcessRow(
            pid=process.pid,
            parent=process.parent,
            owner=process.owner,
            session=process.session or b"",
            model=process.model,
            digest=process.digest,
            device=pool.device_name,
            dtype=pool.dtype,
            sched_class=process.sched_class,
            nice=process.nice,
            label=process.label,
            born=self._epoch + process.born,
            stopped=process.stopped,
            generated=generated,
            tokens=pack_tokens(tokens),
            exit=(end.code, end.reason) if end else None,
            unfinished=unfinished,
            lineage=process.lineage,
            run=process.run.row() if process.run else None,
        )


def _answer_name(session: bytes, id_: int) -> str:
    return f"{ANSWER} {session.hex()} {id_}"
