"""Which processes exist: birth, fork, signals, death, wait.

The only writer of the table. Ending a process gives its blocks back at once; the row stays as a zombie
until it is waited for, unless nobody can.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmasos.syscalls import errors
from llmasos.syscalls.table import EncodeReply, ForkReply, InferReply, WaitReply
from llmasos.syscalls.types import BLOCK_TOKENS, Finish, SchedClass, Signal

from .config import Config
from .ledger import Ledger
from .memory import Table
from .metrics import FAILED, Metrics
from .process import INIT, Exit, Process
from .quotas import Quotas
from .sessions import Request, Sessions
from .shares import tenant_of
from .tenants import Subject

if TYPE_CHECKING:
    from .adapters import Adapter
    from .devices import Pool

_EXIT_CODES = {Signal.TERM: 143, Signal.KILL: 137}


class ProcessTable:
    """Rows by pid. Beams are rows too, but only their leader can be named."""

    def __init__(
        self,
        config: Config,
        sessions: Sessions,
        ledger: Ledger,
        quotas: Quotas,
        secret: bytes,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self.config = config
        self._sessions = sessions
        self._ledger = ledger
        self._quotas = quotas
        self._secret = secret
        self._rows: dict[int, Process] = {}
        self._waiters: dict[int, Request] = {}
        self._next_pid = INIT + 1

    def __iter__(self) -> Iterator[Process]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, pid: int, subject: Subject) -> Process:
        """The process, or NoSuchProcess: somebody else's looks like one that does not exist."""
        process = self._rows.get(pid)
        if process is None or process.beam_of is not None or not subject.may_command(process.owner):
            raise errors.NoSuchProcess(f"no process {pid}", hint="see `llsh ps`", pid=pid)
        return process

    def room_for(self, owner: str, count: int) -> None:
        """Raises TooManyProcesses, QuotaExceeded when `count` more are over a limit."""
        user = tenant_of(owner)  # labels are free to choose, so they share one limit
        own = self._quotas.processes(user)
        if len(self) + count > self.config.max_processes or own + count > self.config.max_processes_per_owner:
            raise errors.TooManyProcesses(
                f"{own} processes of {user}, {len(self)} in all",
                hint="kill or wait for some; the limits are max_processes and max_processes_per_owner",
            )
        self._quotas.room_for(owner, count)

    def spawn(
        self,
        owner: str,
        session: bytes | None,
        pool: Pool,
        sched_class: SchedClass,
        nice: int,
        label: str,
        now: float,
        adapter: Adapter | None = None,
    ) -> Process:
        """A new, empty process. The caller has asked `room_for`."""
        process = Process(
            pid=self._next_pid,
            parent=INIT,
            owner=owner,
            session=session,
            pool=pool,
            sched_class=sched_class,
            nice=nice,
            label=label,
            table=self._table(owner, adapter),
            born=now,
            adapter=adapter,
        )
        self._add(process)
        return process

    def restore(self, process: Process) -> None:
        """Takes in a process of an earlier kernel, under its own pid."""
        process.table = self._table(process.owner, process.adapter)
        self._insert(process)
        self.reserve_pids(process.pid + 1)

    def revive(self, process: Process, pool: Pool) -> None:
        """Takes back that a process ended with its infer, which is to be gone through again."""
        process.exit = None
        process.pool.processes.discard(process)
        process.pool = pool
        pool.processes.add(process)

    def reserve_pids(self, pid: int) -> None:
        """New processes get no pid below."""
        self._next_pid = max(self._next_pid, pid)
        self._ledger.next_pid(self._next_pid)

    def _table(self, owner: str, adapter: Adapter | None) -> Table:
        """An empty table whose blocks are found by `owner` alone, with this adapter alone."""
        model = adapter.digest.encode() if adapter else b""
        mine = hmac.digest(self._secret, b"of " + owner.encode() + b"\0" + model, "sha256")
        return Table(salt=mine, commons=hmac.digest(self._secret, b"commons\0" + model, "sha256"))

    def copy(self, parent: Process, session: bytes | None, now: float) -> Process:
        """A process with the same context, sharing the parent's blocks."""
        child = self.spawn(
            parent.owner,
            session,
            parent.pool,
            parent.sched_class,
            parent.nice,
            parent.label,
            now,
            parent.adapter,
        )
        child.parent = parent.pid
        child.tokens = list(parent.tokens)
        child.computed = parent.computed
        child.unfinished = parent.unfinished
        child.lineage = list(parent.lineage)
        child.vruntime = parent.vruntime
        child.table = parent.pool.memory.fork(parent.table)
        child.pool.holders.add(child)
        child.swap = parent.swap.share() if parent.swap else None
        return child

    def fork(self, parent: Process, count: int, session: bytes | None, now: float) -> ForkReply:
        self.must_be_idle(parent)
        self.room_for(parent.owner, count)
        children = [self.copy(parent, session, now) for _ in range(count)]
        for child in children:
            self.name(child)
        return ForkReply(pids=[child.pid for child in children])

    def name(self, process: Process) -> None:
        """Its pid is told: from now on it survives the kernel."""
        process.named = True
        self._ledger.process(process)

    def must_be_idle(self, process: Process) -> None:
        if process.exit is not None:
            raise errors.ProcessEnded(f"process {process.pid} has ended", hint="only `wait` applies to it")
        if process.run is not None:
            raise errors.ProcessBusy(
                f"process {process.pid} trains", hint="spawn one, or ask for the model that it makes"
            )
        if process.encoding is not None:
            raise errors.ProcessBusy(f"process {process.pid} encodes, and ends with that", hint="spawn one")
        if process.infer is not None:
            raise errors.ProcessBusy(f"process {process.pid} has an infer running", hint="wait or cancel it")

    def truncate(self, process: Process, length: int) -> None:
        self.must_be_idle(process)
        if length > len(process.tokens):
            raise errors.InvalidArgument(
                f"the context has {len(process.tokens)} tokens, not {length}", field="length"
            )
        del process.tokens[length:]
        process.table.public = min(process.table.public, length // BLOCK_TOKENS)  # what follows is private
        process.computed = min(process.computed, length)
        process.pool.memory.truncate(process.table, process.computed)
        process.mirror.stale = True
        process.unfinished = None
        if not length:
            process.forget_swap()
        self._ledger.process(process)

    def signal(self, process: Process, signal: Signal) -> None:
        """Acts between steps: what is on the device now is discarded."""
        if process.exit is not None:
            return
        match signal:
            case Signal.STOP | Signal.CONT:
                process.stopped = signal is Signal.STOP
                for member in [process, *(process.infer.members if process.infer else [])]:
                    process.pool.queue.touch(member)
                self._ledger.process(process)
            case Signal.TERM | Signal.KILL:
                self.end_infer(process, Finish.KILLED)
                if process.pid in self._rows:
                    self.end(process, Exit(_EXIT_CODES[signal], f"signal {signal}"))

    def end_infer(self, process: Process, finish: Finish) -> None:
        """Delivers what is left, answers the infer and lets go of its beams. May end the process too. Half an
        encode is worth nothing: it fails."""
        infer = process.infer
        if process.encoding is not None:
            self.fail_infer(process, errors.ProcessEnded(f"process {process.pid} was {finish}"))
        if infer is None:
            return
        # What the reader has no credit for is dropped: the context has it, and the reply tells how much.
        for seq, item in infer.deliver():
            self._sessions.item(infer.request, seq, item)
        if infer.beams and finish is Finish.DEADLINE:
            infer.beams.cut(finish)
        sequences = infer.beams.results() if infer.beams and infer.beams.done else []
        self._detach(process)
        if sequences:
            process.tokens += sequences[0].tokens
            process.generated += len(sequences[0].tokens)
            finish = finish if finish is Finish.DEADLINE else sequences[0].finish
        made = len(sequences[0].tokens) if sequences else infer.made
        self._metrics.ended(infer, str(finish), made)
        self._sessions.reply(
            infer.request,
            InferReply(
                pid=process.pid,
                finish=finish,
                prompt_tokens=infer.start - infer.first_input,
                cached_tokens=infer.cached,
                generated_tokens=made,
                context=len(process.tokens),
                seed=infer.sampling.seed or 0,
                sequences=sequences,
            ),
        )
        self._after_infer(process, infer.reap, infer.leave, Exit(0, f"infer ended: {finish}"))

    def end_encoding(self, process: Process) -> None:
        """Answers an encode that is complete; its process goes with it."""
        encoding, loaded = process.encoding, process.pool.loaded
        assert encoding is not None
        assert loaded is not None
        self._metrics.encoded(encoding, "encoded")
        self._sessions.reply(
            encoding.request, EncodeReply(encoding.total, loaded.width, bytes(encoding.rows))
        )
        self._after_infer(process, True, False, Exit(0, "encoded"))

    def fail_infer(self, process: Process, error: errors.LLMasOSError) -> None:
        infer = process.infer
        if process.encoding is not None:
            self._metrics.encoded(process.encoding, FAILED)
            self._sessions.fail(process.encoding.request, error)
            self._after_infer(process, True, False, Exit(1, f"encode failed: {type(error).__name__}"))
        if infer is None:
            return
        self._detach(process)
        self._metrics.ended(infer, FAILED, infer.made)
        self._sessions.fail(infer.request, error)
        self._after_infer(process, infer.reap, infer.leave, Exit(1, f"infer failed: {type(error).__name__}"))

    def _detach(self, process: Process) -> None:
        infer = process.infer
        assert infer is not None
        process.infer = None
        process.land()
        process.pool.forsake(process)
        # Room for guesses that did not come true. Steps in flight may still write there; whoever gets it
        # writes later (loop.py).
        process.pool.memory.truncate(process.table, process.computed)
        self._ledger.process(process)
        for member in infer.members:
            self._remove(member)
        infer.members = []
        process.pool.close(process)

    def _after_infer(self, process: Process, reap: bool, leave: bool, how: Exit) -> None:
        if reap or leave:
            self.end(process, how)
        if reap and process.pid in self._rows:
            self.reap(process)

    def end(self, process: Process, how: Exit) -> None:
        """Makes a zombie, or removes the process when somebody waits or nobody ever can. What became of one
        that trained is kept until somebody asks."""
        process.exit = how
        process.stopped = False
        self._ledger.process(process)
        process.pool.memory.release(process.table)
        process.forget_swap()
        process.computed = 0
        waiter = self._waiters.get(process.pid)
        if waiter is not None:
            self._sessions.reply(waiter, self._farewell(process))
        nobody = process.session is None and process.parent == INIT and process.run is None
        if waiter is not None or nobody:
            self.reap(process)

    def wait(self, process: Process, request: Request) -> None:
        """Answers `request` when the process is a zombie, and removes it. Raises ProcessBusy."""
        if process.exit is not None:
            self._sessions.reply(request, self._farewell(process))
            self.reap(process)
            return
        if process.pid in self._waiters:
            raise errors.ProcessBusy(f"somebody already waits for process {process.pid}")
        self._waiters[process.pid] = request

    def stop_waiting(self, process: Process, request: Request, error: errors.LLMasOSError) -> None:
        if self._waiters.get(process.pid) == request:
            del self._waiters[process.pid]
            self._sessions.fail(request, error)

    def discard(self, process: Process) -> None:
        """Removes a process that nobody has been told of."""
        if process in process.pool.processes:
            self.fail_infer(process, errors.Unavailable("cancelled"))
        if process in process.pool.processes:
            self.reap(process)

    def reap(self, process: Process) -> None:
        """Removes the row; children go to init."""
        self._waiters.pop(process.pid, None)
        children = [child for child in self._rows.values() if child.parent == process.pid]
        self._remove(process)
        for child in children:
            child.parent = INIT
            self._ledger.process(child)
            if child.exit is not None and child.session is None and child.pid in self._rows:
                self.reap(child)  # nobody is left who could wait for it

    def session_gone(self, session: bytes, key: bytes) -> int:
        """Ends and removes what a vanished client leaves: its connection's requests, its session's processes.
        Returns how many processes that were."""
        before = len(self)
        for pid, (waiting, _) in list(self._waiters.items()):
            if waiting == session:
                del self._waiters[pid]
        for process in [p for p in self if p.beam_of is None]:
            if process.infer is not None and process.infer.request[0] == session:
                self.end_infer(process, Finish.CANCELLED)
            if process.session == key:
                self.end_infer(process, Finish.KILLED)  # somebody else's infer on it
            if process.session == key and process.pid in self._rows:
                if process.exit is None:
                    self.end(process, Exit(129, "its client vanished"))
                if process.pid in self._rows:
                    self.reap(process)
        return before - len(self)

    def _farewell(self, process: Process) -> WaitReply:
        assert process.exit is not None
        return WaitReply(
            pid=process.pid,
            exit_code=process.exit.code,
            reason=process.exit.reason,
            generated_tokens=process.generated,
            trained=process.run.result if process.run else None,
        )

    def add_beam(self, leader: Process, now: float) -> Process:
        """A row for a beam of `leader`: same context, same infer, no life of its own."""
        member = self.copy(leader, None, now)
        member.beam_of = leader
        member.infer = leader.infer
        return member

    def remove_beam(self, member: Process) -> None:
        self._remove(member)

    def _add(self, process: Process) -> None:
        self.reserve_pids(process.pid + 1)
        self._insert(process)

    def _insert(self, process: Process) -> None:
        self._rows[process.pid] = process
        process.pool.processes.add(process)
        self._quotas.born(process.owner)

    def _remove(self, process: Process) -> None:
        process.pool.memory.release(process.table)
        process.forget_swap()
        process.pool.processes.discard(process)
        process.pool.holders.discard(process)
        process.pool.close(process)
        process.pool.forsake(process)
        process.infer = process.encoding = None
        self._ledger.gone(process)
        self._quotas.born(process.owner, -1)
        del self._rows[process.pid]
