"""The kernel: events in, effects out. No sockets and no clock of its own; no files but the model
filesystem's, the keyring's and the audit log, where what an administrator does stands before it is done.

Each turn: inbox (messages, worker results) → plan → submit → collect → apply → outbox. While a step is on a
device the next one is sent, from what is certain of the first one's result, so that the device never waits
for the kernel; but only shortly before the first one is expected to end, so that who arrives waits for one
step at most, and who goes first not even for that (overtaking.py).

What keeps two steps in flight safe: but for those that overtake, a device computes steps in the order they
were sent. A block may be given away, and a process ended, cut or forked, while steps that write to it are in
flight: whoever gets the block writes there in a later step, and reads only what was written in its own steps
or booked (published) before. So results of an infer that is gone are simply dropped. Only who pushes others
out looks first: a process that is in flight keeps its blocks, for its result is still to be booked.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from llmasos.drivers import base
from llmasos.syscalls import errors
from llmasos.syscalls.types import FileInfo, Finish

from . import encoding, migration, overtaking, planning, residency, search, swapping, training, trap
from .audit import Audit
from .charges import Charges
from .config import LIVE, Config, changed
from .devices import Device, Flight, Pool
from .dmesg import Log, Readers
from .effects import Dump, Effect, Exited, KillWorker
from .grammars import Grammars
from .guard import Verdict
from .imports import Imports
from .infer import Infer
from .keyring import Keyring
from .ledger import Ledger
from .memory import blocks_for
from .metrics import Metrics
from .modelfs.store import ModelFS
from .process import Process
from .proctable import ProcessTable
from .programs import Programs
from .quotas import Quotas
from .recorder import Recorder
from .restore import restore
from .runqueue import RunQueue
from .sessions import Session, Sessions
from .shares import Shares
from .tenants import Subject
from .tiers import open_tiers
from .timers import Timers


class Kernel:
    """All tables. The I/O shell feeds events and carries out `take_effects()` after each."""

    def __init__(
        self,
        config: Config,
        store: ModelFS,
        device_names: list[str],
        now: Callable[[], float],
        seed: int,
        host_memory: Path | None = None,
        rows: Mapping[str, bytes] | None = None,
        epoch: float = 0.0,
        bus: Path = Path("bus.sock"),
    ) -> None:
        """`rows` are what an earlier kernel committed; `epoch` is the wall clock's time when `now` is 0;
        `bus` is where trainers attach."""
        self.config = config
        self.store = store
        self.tiers = open_tiers(host_memory, store.swap, config.swap_host_bytes, config.swap_disk_bytes)
        self.now = now
        self.bus = bus
        self.random = random.Random(seed)
        self.boot_id = f"{self.random.getrandbits(64):016x}"
        self.log = Log(now, config.log_lines)
        self.recorder = Recorder(now, config.flight_steps)
        self.ledger = Ledger(epoch)
        self.sessions = Sessions(self.ledger)
        self.quotas = Quotas(config.quotas)
        self.charges = Charges(now() + config.session_grace_s if rows else now())
        self.metrics = Metrics(now)
        self.processes = ProcessTable(
            config, self.sessions, self.ledger, self.quotas, self.random.randbytes(32), self.metrics
        )
        home = store.folder.parent
        self.audit = Audit(home / "state" / "audit.log")
        self.keys = Keyring(home / "keys" / "authorized")
        self.server_key = ""
        self.devices: dict[str, Device] = {}
        for name in device_names:
            shares = Shares(self.quotas.weight)
            self.devices[name] = Device(name, shares, RunQueue(shares, now))
        self.readers = Readers(self.log, self.sessions)
        self.programs = Programs()
        self.grammars = Grammars(self)
        self.imports = Imports(self.sessions, self.programs, str(home), self.imported)
        self.runs: dict[int, Process] = {}  # those that train, ended ones too until they are waited for
        self.trainers: dict[int, Process] = {}  # by connection
        self.departures: list[tuple[Process, Callable[[], None]]] = []  # who moves when no step has it
        self.draining = False
        self._verdict = Verdict.OPEN
        self.effects: list[Effect] = []
        self._timers = Timers()
        self.numbers = itertools.count(1)
        self.absent = restore(self, rows or {}, epoch)  # sessions of an earlier kernel, not yet back
        store.runs.sweep(set(self.runs))
        if self.absent:
            self.at(now() + config.session_grace_s, self._forget_absent)

    # Events

    def message(self, session: bytes, subject: Subject, frames: list[bytes]) -> None:
        """A client's message. Always answered, never raises."""
        trap.handle(self, session, subject, frames)

    def disconnected(self, session: bytes) -> None:
        """A client is gone: what it owned is freed now. What it was answered is kept for a while, for one
        that only lost its connection."""
        self.sessions.strikes.pop(session, None)
        self.end_session(session)

    def end_session(self, session: bytes) -> None:
        """The session ends, though its connection may live on: nobody can close just one."""
        gone = self.sessions.by_id.get(session)
        if gone is None:
            return
        self._end_requests(gone)
        if gone.returns:
            self.at(self.now() + self.config.session_grace_s, lambda: self._forget(gone.key))
        else:
            self.charges.forget(gone.key)
        if ended := self.processes.session_gone(session, gone.key):
            self.log.info(f"client {gone.subject.pid} of {gone.subject.path} left, {ended} processes ended")

    def keys_changed(self, keys: set[str]) -> None:
        """These keys lost or changed what they may do: their sessions end."""
        for problem in self.keys.problems:
            self.log.warn(f"key {problem}")
        self.keys.problems.clear()
        for session in list(self.sessions.by_id.values()):
            if session.subject.key in keys:
                waiting = list(session.open)
                self.end_session(session.id)
                for id_ in waiting:
                    self.sessions.refuse(session.id, id_, errors.PermissionDenied("the key was revoked"))

    def key_refused(self, key: str) -> None:
        """Somebody came with a key that nobody authorized."""
        self.audit.note("key refused", "unknown", key=key)

    def edge(self, verdict: Verdict, fds: int, resident: int) -> None:
        """The guard decided whether clients may come in."""
        if verdict is not self._verdict:
            self._verdict = verdict
            self.log.warn(f"edge {verdict.value}: {fds} descriptors, {resident >> 20} MB resident")
            self.audit.note(f"edge {verdict.value}", "kernel", descriptors=fds, resident=resident)

    def returned(self, session: Session) -> None:
        """A client said who it is: what its session had in an earlier kernel, or over another connection, is
        this one's."""
        self.absent.discard(session.key)
        for other in list(self.sessions.by_id.values()):
            if other.key == session.key and other is not session:
                self._end_requests(other)

    def _end_requests(self, session: Session) -> None:
        session.leaving = True
        for entry in list(session.open.values()):
            entry.cancel()
        for entry in list(session.open.values()):
            entry.closed()
        self.sessions.drop(session.id)

    def _forget_absent(self) -> None:
        """Who has not come back by now does not come."""
        absent, self.absent = self.absent, set()
        for key in absent:
            if ended := self.processes.session_gone(b"", key):
                self.log.info(f"a client did not return after the restart, {ended} processes ended")
            self.ledger.forget(key)

    def _forget(self, key: bytes) -> None:
        if all(session.key != key for session in self.sessions.by_id.values()):
            self.ledger.forget(key)
            self.charges.forget(key)

    def worker_attached(self, worker: int, attach: base.Attach) -> None:
        device = self.devices.get(attach.device)
        if device is None or device.worker is not None:
            self.log.warn(f"worker {attach.pid} for {attach.device!r} refused: unknown or already driven")
            self.effects.append(KillWorker(attach.pid))
            return
        device.worker, device.worker_pid = worker, attach.pid
        device.description = attach.description
        device.memory_free = attach.description.memory_free
        self.log.info(f"{device.name}: worker {attach.pid} attached, {attach.description.text}")
        residency.adopt(self, device, attach.residents)

    def worker_message(self, worker: int, message: base.FromWorker) -> None:
        device = next((d for d in self.devices.values() if d.worker == worker), None)
        match message:
            case base.Attach():
                self.worker_attached(worker, message)
            case base.AttachTrainer():
                training.attached(self, worker, message)
            case _ if worker in self.trainers:
                training.heard(self, self.trainers[worker], message)
            case base.LoadDone() if device and device.loading:
                residency.load_done(self, device, device.loading, message)
            case base.StepDone(result) if device and device.flights:
                self._step_done(device, device.flight(result.ticket), result)
            case base.Encoded() if device and device.flights:
                self._encoded(device, device.flight(message.ticket), message)
            case base.Moved() if device and message.ticket in device.orders:
                device.orders.pop(message.ticket)(message)
            case base.Failed() if device and message.ticket in device.orders:
                device.orders.pop(message.ticket)(errors.from_wire(dict(message.error)))
            case base.Failed() if device and device.loading and message.handle == device.loading.handle:
                residency.load_failed(self, device, device.loading, errors.from_wire(dict(message.error)))
            case base.Failed() if device and (flight := device.flight(message.ticket)):
                self._step_failed(device, flight, errors.from_wire(dict(message.error)))
            case base.Note() if device:
                self.log.write(message.level, message.text)
            case _:
                self.log.warn(f"unexpected {type(message).__name__} from a worker")

    def worker_gone(self, worker: int) -> None:
        """A driver died: its processes go back to their token history and wait for the next worker. Or a
        trainer did."""
        if (process := self.trainers.pop(worker, None)) is not None:
            training.gone(self, process)
            return
        device = next((d for d in self.devices.values() if d.worker == worker), None)
        if device is None:
            return
        device.restarts += 1
        self.log.warn(f"{device.name}: worker {device.worker_pid} died; its processes will be recomputed")
        # Of a step and the one that overtakes it either may have run.
        ran = list(device.flights)[: 2 if device.flights and device.flights[0].overtakes else 1]
        loading = device.loading
        device.worker, device.worker_pid, device.loading = None, 0, None
        for lost in device.flights:
            self.recorder.landed(lost.ticket, None, "lost")
        device.flights.clear()
        device.alarm()
        self._dump(f"{device.name}-died")
        swapping.worker_gone(device)
        for pool in device.pools:
            pool.forget()
            residency.expect_worker(self, device, pool)
        device.pools = [pool for pool in device.pools if pool.processes or pool.awaited]
        for texts in (texts for flight in ran for texts in flight.texts):
            texts.encoding.crashes += 1
            if texts.process.encoding is texts.encoding and texts.encoding.crashes >= self.config.crash_limit:
                died = errors.DeviceFault(f"the driver died {texts.encoding.crashes} times on this")
                self.fail(texts.process, died)
        # Beams share one infer, which was in one death.
        running = {id(part.infer): part for flight in ran for part in flight.parts}
        for part in running.values():
            infer = part.infer
            if part.process.infer is infer:
                infer.crashes += 1
                if infer.crashes >= self.config.crash_limit:
                    died = errors.DeviceFault(f"the driver died {infer.crashes} times on this")
                    self.fail(part.process, died)
        if loading:
            loading.deaths += 1
            if max(loading.deaths, device.hangs[loading.digest]) >= self.config.crash_limit:
                residency.give_up(
                    self, device, loading, errors.DeviceFault(f"the driver died loading {loading.model}")
                )

    def tick(self) -> None:
        """Runs what is due and starts what can start. Call after every batch of events."""
        for call in self._timers.due(self.now()):
            call()
        migration.depart(self)
        training.advance(self)
        for device in self.devices.values():
            overtaking.advance(self, device)
            planning.advance(self, device)
        if self.draining and not any(p.infer or p.encoding for p in self.processes):
            loading = any(pool.awaited for d in self.devices.values() for pool in d.pools)
            saving = any(process.run and process.run.ready for process in self.trainers.values())
            if not loading and not saving:
                self._exit()

    # Effects

    def take_effects(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        sends = self.sessions.take_outbox()
        return [*sends, *effects]

    def next_timer(self) -> float | None:
        """When `tick` has something to do by itself."""
        return self._timers.next()

    def at(self, when: float, call: Callable[[], None]) -> Callable[[], None]:
        """Has `call` made when the clock shows `when`; returns what calls it off."""
        return self._timers.add(when, call)

    def reconfigure(self, load: Callable[[], Config]) -> None:
        """Takes the configuration that `load` reads, whole or not at all; the log says which."""
        try:
            config = load()
        except errors.InvalidArgument as problem:
            self.log.warn(f"configuration not reloaded, the old one stays: {problem}")
            return
        names = changed(self.config, config)
        if fixed := [name for name in names if name not in LIVE]:
            self.log.warn(
                f"configuration not reloaded, the old one stays: {', '.join(fixed)} cannot change while the"
                " daemon runs; restart it"
            )
            return
        new = ", ".join(f"{name} = {getattr(config, name)}" for name in names)
        for path in self.quotas.configure(self.config.quotas, config.quotas):
            self.ledger.quota_gone(path)
        self.config = self.processes.config = config
        self.fail_what_never_fits()
        self.log.info(f"configuration reloaded: {new or 'nothing changed'}")

    def fail_what_never_fits(self) -> None:
        """There is less memory, or its owner may have less: what runs and cannot end within that fails, as it
        would wait for ever."""
        for process in list(self.processes):
            if (infer := process.infer) is not None and process.beam_of is None:
                width = infer.beams.params.num_beams if infer.beams else 0
                try:
                    self._may_ever_fit(
                        process.pool, process.owner, _blocks_needed(infer.start, infer.limit, width)
                    )
                except errors.NeverFits as problem:
                    self.fail(process, problem)

    def drain(self, seconds: float) -> None:
        """Refuses new work; exits when no infer runs, or after `seconds`."""
        if not self.draining:
            self.log.info(f"shutting down, draining for at most {seconds:g} s")
        self.draining = True
        self.at(self.now() + seconds, self._exit)

    def _exit(self) -> None:
        for device in self.devices.values():
            for pool in device.pools:
                residency.tell(pool, errors.ShuttingDown("the daemon is shutting down"))
        for process in list(self.processes):
            if process.encoding is not None:
                self.fail(process, errors.ShuttingDown("the daemon is shutting down"))
            elif process.beam_of is None:
                self.processes.end_infer(process, Finish.KILLED)
        if not any(isinstance(effect, Exited) for effect in self.effects):
            self.effects.append(Exited())

    # Steps

    def _landed(self, device: Device, flight: Flight) -> None:
        """Takes a flight off the device and out of its processes; the caller touches those that it has parts
        for."""
        device.flights.remove(flight)
        planning.watch(self, device)
        for part in flight.parts:
            process = part.process
            process.flights -= 1
            if process.infer is part.infer and process.epoch == part.epoch:
                process.ahead -= part.count
                process.coming -= part.sample
                process.guesses -= part.extra
        for texts in flight.texts:
            texts.process.flights -= 1
            texts.process.pool.queue.touch(texts.process)

    def _encoded(self, device: Device, flight: Flight | None, answer: base.Encoded) -> None:
        if flight is None or len(answer.data) != sum(
            encoding.row_bytes(flight.pool, texts) for texts in flight.texts
        ):
            self._not_asked(device)
            return
        self._landed(device, flight)
        encoding.landed(self, device, flight, answer)

    def _not_asked(self, device: Device) -> None:
        self.log.warn(f"{device.name}: answer to a step that was not asked")
        self.effects.append(KillWorker(device.worker_pid))

    def _step_done(self, device: Device, flight: Flight | None, result: base.StepResult) -> None:
        if flight is None or len(result.outputs) != len(flight.parts):
            self._not_asked(device)
            return
        self._landed(device, flight)
        self.recorder.landed(flight.ticket, result.seconds, "done", result.rounds)
        rounds, outputs = result.rounds, result.outputs
        planning.landed(self, flight, rounds)
        device.worked = self.now()
        device.step_seconds.append(result.seconds / rounds)
        self.metrics.step(device.name, rounds, result.seconds)
        rows = flight.rows if rounds == 1 else sum(out.rounds for out in outputs) / rounds
        rows += sum(out.drafted for out in outputs) / rounds
        flight.pool.pace.learn(rows, flight.tokens, result.seconds / rounds)
        leaders: dict[int, Process] = {}
        for part, out in zip(flight.parts, result.outputs, strict=True):
            process, infer = part.process, part.infer
            if process.infer is not infer or process.epoch != part.epoch:
                process.pool.queue.touch(process)
                continue
            computed = process.computed + part.count + max(0, len(out.tokens) - 1)
            if out.error or out.computed != computed:
                self._forget_kv(process)
                kind = errors.BY_CODE.get(out.code, errors.DeviceFault)
                self.fail(process, kind(out.error or "the driver lost count of its tokens"))
                continue
            if out.prompt:
                infer.take_prompt(process.computed + 1, out.prompt)
            process.computed = computed
            if infer.beams is None:
                self._take(process, infer, out)
                continue
            process.pool.memory.publish(process.table, process.tokens, computed)
            process.pool.queue.touch(process)
            if out.beams:
                infer.tops[process.pid] = out.beams
                leader = process.beam_of or process
                leaders[leader.pid] = leader
            elif computed == len(process.tokens):
                self.fail(process, errors.DeviceFault("no token may follow in a beam"))
            else:
                self.settle(process)
        for leader in leaders.values():
            search.advance(self, leader)

    def _take(self, process: Process, infer: Infer, out: base.SeqOut) -> None:
        """Books sampled tokens, if there are any, and ends the infer when it is over."""
        if out.tokens:
            process.tokens += out.tokens
            process.generated += len(out.tokens)
            process.drafted += out.drafted
            process.accepted += len(out.tokens) - out.rounds
            process.mirror.tokens += len(out.tokens)
            now = self.now()
            self.quotas.generated(process.owner, len(out.tokens), now)
            self.metrics.took(infer, len(out.tokens), now)
            if out.drafted:
                self.metrics.guessed(infer, out.drafted, len(out.tokens) - out.rounds)
            infer.take(out.tokens, out.chosen, now)
            if out.stop:
                infer.finish = Finish.STOP
            elif len(process.tokens) >= infer.limit:
                infer.finish = Finish.LENGTH
        process.pool.memory.publish(process.table, process.tokens, process.computed)
        self.settle(process)

    def settle(self, process: Process) -> None:
        """Ends an infer that wanted no tokens and has its input computed; sends what there is."""
        infer = process.infer
        if infer is not None and not infer.samples and process.computed >= process.goal:
            infer.finish = Finish.LENGTH
        self.deliver(process)

    def deliver(self, process: Process) -> None:
        """Sends what the reader has room for; the final answer follows the last item."""
        infer = process.infer
        if infer is None:
            return
        for seq, item in infer.deliver():
            self.sessions.item(infer.request, seq, item)
        process.pool.queue.touch(process)
        if infer.finish is not None and not infer.held:
            self.processes.end_infer(process, infer.finish)

    def fail(self, process: Process, error: errors.LLMasOSError) -> None:
        self.processes.fail_infer(process.beam_of or process, error)

    def _step_failed(self, device: Device, flight: Flight, error: errors.LLMasOSError) -> None:
        """The whole step raised: its requests are failed, the worker lives. Copies may not have been made,
        and the steps behind it build on them, so whoever holds a copy starts anew."""
        self._landed(device, flight)
        self.log.warn(f"{device.name}: step failed: {type(error).__name__}")
        self.recorder.landed(flight.ticket, None, type(error).__name__)
        self._dump(f"{device.name}-failed")
        infers = {part.process: part.infer for part in flight.parts}
        spoiled = frozenset(target for _, target in flight.copies)
        for process in infers:
            flight.pool.queue.touch(process)
        for process in [*infers, *(p for p in flight.pool.processes if p not in infers)]:
            ours = infers.get(process)
            if ours is None and spoiled.isdisjoint(process.table.blocks):
                continue
            flying = process.infer is not None and (process.infer is ours or process.ahead)
            self._forget_kv(process)
            if flying:
                self.fail(process, error)
        swapping.spoil(flight.pool, spoiled, flight.ticket)
        for texts in flight.texts:
            if texts.process.encoding is texts.encoding:
                self.fail(texts.process, error)

    def _forget_kv(self, process: Process) -> None:
        """After a failed step nobody knows what was written: the context is computed anew."""
        process.pool.memory.release(process.table)
        process.lose()

    def _dump(self, why: str) -> None:
        """Has the flight recorder written to disk, but not many times in a row."""
        if self.recorder.dump_due():
            self.effects.append(Dump(why, self.recorder.text()))

    # Imports

    def imported(self, model: str, problem: errors.LLMasOSError | None) -> FileInfo:
        """An importer has ended; on success the model is in the store. Raises what kept it out."""
        try:
            if problem is not None:
                raise problem
            info = self.store.stat(f"/models/{model}")
        except errors.LLMasOSError as refusal:
            self.log.warn(f"pull of {model}: {type(refusal).__name__}: {refusal.message}")
            raise
        finally:
            self.store.gc(self.pinned())
        self.log.info(f"pull of {model}: done")
        self.audit.note("imported", "kernel", model=model)
        return info

    def pinned(self) -> set[str]:
        """Blobs of models that are on a device or trained on: a worker may have to load them again."""
        pools = [pool for device in self.devices.values() for pool in device.pools]
        files = [pool.files for pool in pools] + [one.files for pool in pools for one in pool.adapters]
        files += [process.pool.files for process in self.runs.values()]
        return {file.digest for some in files for file in some.values()}

    # Admission

    def admit(self, pool: Pool, owner: str, length: int, limit: int, beams: int) -> None:
        """Raises ContextOverflow or NeverFits for what can never run, however empty the device is."""
        loaded = pool.loaded
        assert loaded is not None
        if max(length, limit) > loaded.context_length:
            raise errors.ContextOverflow(
                f"{length} tokens in the context and {max(0, limit - length)} to come, "
                f"the model's context is {loaded.context_length}",
                hint="shorten the prompt, lower max_tokens, or truncate the process",
                context_length=loaded.context_length,
                tokens=length,
            )
        self._may_ever_fit(pool, owner, _blocks_needed(length, limit, beams))

    def _may_ever_fit(self, pool: Pool, owner: str, needed: int) -> None:
        """Raises NeverFits for more KV blocks than a pool has or an owner may have."""
        if pool.ready and needed > pool.memory.total:
            raise errors.NeverFits(
                f"this needs {needed} KV blocks, the device has {pool.memory.total} for this model",
                hint="lower max_tokens or num_beams, or raise kv_fraction",
                needed=needed,
                total=pool.memory.total,
            )
        for path, quota in self.quotas.limits_of(owner):
            if quota.kv_max is not None and needed > quota.kv_max:
                raise errors.NeverFits(
                    f"this needs {needed} KV blocks, {path} may have {quota.kv_max}",
                    hint="lower max_tokens or num_beams, or see `llsh quota`",
                    needed=needed,
                    total=quota.kv_max,
                )


def _blocks_needed(length: int, limit: int, beams: int) -> int:
    """KV blocks that an infer has in the end; `beams` share what was there when it began."""
    if not beams:
        return blocks_for(limit)
    return blocks_for(length) + beams * (blocks_for(limit) - length // base.BLOCK_TOKENS)
