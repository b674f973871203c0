"""The kernel: events in, effects out. No sockets, no files but the model filesystem's, no clock of its own.

Each turn: inbox (messages, worker results) → plan → submit → collect → apply → outbox. One step is on a
device at a time; between steps signals, cancels and arrivals take effect, so they wait for one step at most.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from llmasos.drivers import base
from llmasos.syscalls import errors
from llmasos.syscalls.types import Finish, PullEvent

from . import residency, scheduler, trap
from .beams import Step
from .config import Config
from .devices import Device, Flight, Pool, build
from .dmesg import Log, Readers
from .effects import Effect, Exited, KillWorker, ToWorker
from .imports import Imports
from .infer import Infer
from .memory import blocks_for
from .modelfs.store import ModelFS
from .process import Process
from .proctable import ProcessTable
from .sessions import Sessions
from .tenants import Subject
from .timers import Timers


class Kernel:
    """All tables. The I/O shell feeds events and carries out `take_effects()` after each."""

    def __init__(
        self, config: Config, store: ModelFS, device_names: list[str], now: Callable[[], float], seed: int
    ) -> None:
        self.config = config
        self.store = store
        self.now = now
        self.random = random.Random(seed)
        self.boot_id = f"{self.random.getrandbits(64):016x}"
        self.log = Log(now, config.log_lines)
        self.sessions = Sessions()
        self.processes = ProcessTable(config, self.sessions, self.random.randbytes(32))
        self.devices = {name: Device(name) for name in device_names}
        self.readers = Readers(self.log, self.sessions)
        self.imports = Imports(self.sessions, config.max_imports)
        self.draining = False
        self.effects: list[Effect] = []
        self._timers = Timers()
        self.numbers = itertools.count(1)

    # Events

    def message(self, session: bytes, subject: Subject, frames: list[bytes]) -> None:
        """A client's message. Always answered, never raises."""
        trap.handle(self, session, subject, frames)

    def disconnected(self, session: bytes) -> None:
        """A client is gone: what it owned is freed now."""
        gone = self.sessions.by_id.pop(session, None)
        if gone is None:
            return
        for entry in list(gone.open.values()):
            entry.cancel()
            entry.closed()
        if ended := self.processes.session_gone(session):
            self.log.info(f"client {gone.subject.pid} of {gone.subject.path} left, {ended} processes ended")

    def worker_attached(self, worker: int, attach: base.Attach) -> None:
        device = self.devices.get(attach.device)
        if device is None or device.worker is not None:
            self.log.warn(f"worker {attach.pid} for {attach.device!r} refused: unknown or already driven")
            self.effects.append(KillWorker(attach.pid))
            return
        device.worker, device.worker_pid = worker, attach.pid
        device.description = attach.description
        device.memory_free = attach.description.memory_free
        for pool in device.pools:
            pool.dtype = pool.dtype or attach.description.default_dtype
        self.log.info(f"{device.name}: worker {attach.pid} attached, {attach.description.text}")

    def worker_message(self, worker: int, message: base.FromWorker) -> None:
        device = next((d for d in self.devices.values() if d.worker == worker), None)
        match message:
            case base.Attach():
                self.worker_attached(worker, message)
            case base.LoadDone() if device and device.loading:
                residency.load_done(self, device, device.loading, message)
            case base.StepDone() if device and device.flight:
                self._step_done(device, device.flight, message.result)
            case base.Failed() if device and device.loading and message.handle == device.loading.handle:
                residency.load_failed(self, device, device.loading, errors.from_wire(dict(message.error)))
            case base.Failed() if device and device.flight and message.ticket == device.flight.ticket:
                self._step_failed(device, device.flight, errors.from_wire(dict(message.error)))
            case base.Note() if device:
                self.log.write(message.level, message.text)
            case _:
                self.log.warn(f"unexpected {type(message).__name__} from a worker")

    def worker_gone(self, worker: int) -> None:
        """A driver died: its processes go back to their token history and wait for the next worker."""
        device = next((d for d in self.devices.values() if d.worker == worker), None)
        if device is None:
            return
        device.restarts += 1
        self.log.warn(f"{device.name}: worker {device.worker_pid} died; its processes will be recomputed")
        flight, loading = device.flight, device.loading
        device.worker, device.worker_pid, device.flight, device.loading = None, 0, None, None
        for pool in device.pools:
            pool.forget()
            residency.expect_worker(self, device, pool)
        device.pools = [pool for pool in device.pools if pool.processes or pool.waiters]
        # Beams share one infer, which was in one death.
        running = {id(infer): (process, infer) for process, infer, _ in flight.shares} if flight else {}
        for process, infer in running.values():
            if process.infer is infer:
                infer.crashes += 1
                if infer.crashes >= self.config.crash_limit:
                    self.fail(process, errors.DeviceFault(f"the driver died {infer.crashes} times on this"))
        if loading:
            loading.deaths += 1
            if loading.deaths >= self.config.crash_limit:
                residency.give_up(
                    self, device, loading, errors.DeviceFault(f"the driver died loading {loading.model}")
                )

    def tick(self) -> None:
        """Runs what is due and starts what can start. Call after every batch of events."""
        for call in self._timers.due(self.now()):
            call()
        for device in self.devices.values():
            self._advance(device)
        loading = any(pool.waiters for d in self.devices.values() for pool in d.pools)
        if self.draining and not loading and not any(p.infer for p in self.processes):
            self._exit()

    # Effects

    def take_effects(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        sends, self.sessions.outbox = self.sessions.outbox, []
        return [*sends, *effects]

    def next_timer(self) -> float | None:
        """When `tick` has something to do by itself."""
        return self._timers.next()

    def at(self, when: float, call: Callable[[], None]) -> Callable[[], None]:
        """Has `call` made when the clock shows `when`; returns what calls it off."""
        return self._timers.add(when, call)

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
            if process.beam_of is None:
                self.processes.end_infer(process, Finish.KILLED)
        if not any(isinstance(effect, Exited) for effect in self.effects):
            self.effects.append(Exited())

    # Steps

    def _advance(self, device: Device) -> None:
        """Loads what is wanted, or plans and submits the next step, if the device is free."""
        if device.worker is None or device.flight or device.loading:
            return
        for pool in device.pools:
            if not pool.ready and (pool.waiters or pool.processes):
                residency.load(self, device, pool)
                return
        resident = itertools.chain.from_iterable(pool.processes for pool in device.pools if pool.ready)
        queue = scheduler.order(resident, self.now(), self.config.aging_s)
        if not queue:
            return
        pool = queue[0].pool
        self._plan(device, pool, [p for p in queue if p.pool is pool])

    def _plan(self, device: Device, pool: Pool, queue: list[Process]) -> None:
        description = device.description
        assert description is not None
        assert device.worker is not None
        step_tokens = self.config.step_tokens or description.step_tokens
        # Who has the strongest claim to memory has to be in the step, or those in it may all lack room.
        first = min(queue, key=Process.rank)
        queue = queue[: min(description.max_sequences, step_tokens)]
        if first not in queue:
            queue[-1] = first
        for process in queue:
            self._match_prefix(process)
        for process in queue:
            self.settle(process)  # a shared prefix may be all that it wanted
        queue = [process for process in queue if process.runnable]
        if not queue:
            self._advance(device)
            return
        copies: list[tuple[int, int]] = []
        settled: set[int] = set()  # in the step already, or pushed out of it

        def reserve(process: Process, count: int) -> bool:
            room = None if process.pid in settled else self._reserve(process, count, settled)
            if room is None:
                return False
            copies.extend(room)
            settled.add(process.pid)
            return True

        shares = scheduler.plan(queue, step_tokens, reserve)
        if not shares:
            return
        ticket = next(self.numbers)
        infers = [(s.process, s.process.infer, s.count) for s in shares]
        device.flight = Flight(ticket, pool, [(p, i, n) for p, i, n in infers if i is not None])
        batch = build(pool, shares, copies, ticket)
        self.effects.append(ToWorker(device.worker, base.Step(batch)))

    def _match_prefix(self, process: Process) -> None:
        infer = process.infer
        assert infer is not None
        scores = infer.sampling.prompt_logprobs and infer.scored < infer.start
        if process.table.blocks or process.computed or scores:
            return
        process.computed = process.pool.memory.match(process.table, process.tokens, len(process.tokens) - 1)
        process.mirror.stale = True
        if infer.first_token is None:
            infer.cached = max(0, process.computed - infer.first_input)

    def _reserve(self, process: Process, count: int, settled: set[int]) -> list[tuple[int, int]] | None:
        """Room for `count` more tokens of `process`, taken from others if need be; the copies to make."""
        memory = process.pool.memory
        while True:
            room = memory.reserve(process.table, process.computed, process.computed + count)
            if room is not None:
                process.mirror.stale |= bool(room.copies)
                return room.copies
            victim = scheduler.victim(process.pool.processes, process, settled)
            if victim is None:
                return None
            memory.release(victim.table)
            victim.computed = 0
            victim.mirror.stale = True
            settled.add(victim.pid)

    def _step_done(self, device: Device, flight: Flight, result: base.StepResult) -> None:
        if result.ticket != flight.ticket or len(result.outputs) != len(flight.shares):
            self.log.warn(f"{device.name}: answer to a step that was not asked")
            self.effects.append(KillWorker(device.worker_pid))
            return
        device.flight = None
        device.step_seconds.append(result.seconds)
        now = self.now()
        leaders: dict[int, Process] = {}
        for (process, infer, count), out in zip(flight.shares, result.outputs, strict=True):
            process.running = False
            scheduler.charge(process.beam_of or process, count, now)
            process.last_run = now
            if process.infer is not infer:
                process.mirror.stale = True
                continue
            if out.error:
                self._forget_kv(process)
                self.fail(process.beam_of or process, errors.DeviceFault(out.error))
                continue
            infer.take_prompt(process.computed + 1, out.prompt)
            process.computed += count
            process.pool.memory.publish(process.table, process.tokens, process.computed)
            if infer.beams and process.computed == len(process.tokens) and not out.beams:
                self.fail(process, errors.DeviceFault("no token may follow in a beam"))
            elif out.beams:
                infer.tops[process.pid] = out.beams
                leader = process.beam_of or process
                leaders[leader.pid] = leader
            else:
                self._take(process, infer, out)
        for leader in leaders.values():
            self._advance_beams(leader)

    def _take(self, process: Process, infer: Infer, out: base.SeqOut) -> None:
        """Books a sampled token, if there is one, and ends the infer when it is over."""
        if out.token >= 0:
            process.tokens.append(out.token)
            process.generated += 1
            process.mirror.tokens += 1
            infer.take(out.token, out.chosen, self.now())
            if out.stop:
                infer.finish = Finish.STOP
            elif len(process.tokens) >= infer.limit:
                infer.finish = Finish.LENGTH
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
        if infer.finish is not None and not infer.held:
            self.processes.end_infer(process, infer.finish)

    def fail(self, process: Process, error: errors.LLMasOSError) -> None:
        self.processes.fail_infer(process.beam_of or process, error)

    def _step_failed(self, device: Device, flight: Flight, error: errors.LLMasOSError) -> None:
        """The whole step raised: its requests are failed, the worker lives."""
        device.flight = None
        self.log.warn(f"{device.name}: step failed: {type(error).__name__}")
        for process, infer, _ in flight.shares:
            process.running = False
            self._forget_kv(process)
            if process.infer is infer:
                self.fail(process, error)

    def _forget_kv(self, process: Process) -> None:
        """After a failed step nobody knows what was written: the context is computed anew."""
        process.pool.memory.release(process.table)
        process.computed = 0
        process.mirror.stale = True

    # Beams

    def _advance_beams(self, leader: Process) -> None:
        """When every running beam has its continuations, lets the search choose and re-forks the beams."""
        infer = leader.infer
        if infer is None or infer.beams is None:
            return
        running = infer.members or [leader]
        if any(p.pid not in infer.tops for p in running):
            return
        steps = infer.beams.advance([infer.tops[p.pid] for p in running])
        infer.tops = {}
        infer.made += 1
        infer.first_token = infer.first_token or self.now()
        if infer.beams.done:
            self.processes.end_infer(leader, Finish.LENGTH)
        else:
            infer.members = self._refork(leader, running, steps)

    def _refork(self, leader: Process, running: list[Process], steps: list[Step]) -> list[Process]:
        """The beams of the next round. A beam's first heir goes on in its place; further heirs are forks."""
        memory = leader.pool.memory
        chosen: list[Process | None] = [None] * len(steps)
        heirs: set[int] = set()
        for index, step in enumerate(steps):
            parent = running[step.parent]
            if parent is not leader and parent.pid not in heirs:
                heirs.add(parent.pid)
                chosen[index] = parent
        spare = [p for p in running if p is not leader and p.pid not in heirs]
        lengths = {p.pid: len(p.tokens) for p in running}
        for index, step in enumerate(steps):
            parent = running[step.parent]
            member = chosen[index]
            if member is None:
                member = spare.pop() if spare else self.processes.add_beam(leader, self.now())
                memory.release(member.table)
                member.table = memory.fork(parent.table)
                member.tokens = parent.tokens[: lengths[parent.pid]]
                member.computed = parent.computed
                member.mirror.stale = True
                chosen[index] = member
            member.tokens.append(step.token)
        for member in spare:
            self.processes.remove_beam(member)
        return [member for member in chosen if member is not None]

    # Imports

    def import_progress(self, job: int, event: PullEvent) -> None:
        self.imports.progress(job, event)

    def import_ended(self, job: int, error: errors.LLMasOSError | None) -> None:
        """An importer is done; on success the model is in the store."""
        model = self.imports.model(job)
        try:
            info = self.store.stat(f"/models/{model}") if error is None else None
        except errors.LLMasOSError as missing:
            info, error = None, missing
        if error is None:
            self.log.info(f"pull of {model}: done")
        else:
            self.log.warn(f"pull of {model}: {type(error).__name__}: {error.message}")
        self.imports.ended(job, info, error)
        self.store.gc(self.pinned())

    def pinned(self) -> set[str]:
        """Blobs of models that are on a device: a worker may have to load them again."""
        return {f.digest for d in self.devices.values() for pool in d.pools for f in pool.files.values()}

    # Admission

    def admit(self, pool: Pool, length: int, limit: int, beams: int) -> None:
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
        needed = blocks_for(limit)
        if beams:
            needed = blocks_for(length) + beams * (blocks_for(limit) - length // base.BLOCK_TOKENS)
        if needed > pool.memory.total:
            raise errors.NeverFits(
                f"this needs {needed} KV blocks, the device has {pool.memory.total} for this model",
                hint="lower max_tokens or num_beams, or raise kv_fraction",
                needed=needed,
                total=pool.memory.total,
            )
