"""Training runs: what works for them, when they compute, what they tell, how they end.

A run is a process with its own folder in the model filesystem. First a program prepares its data set, then a
trainer (drivers/trainer) computes, then an importer commits what the trainer made. Which of them is due
follows from what is there, so a run goes on wherever it was when anything dies: trainer, kernel or machine.

A trainer computes while it holds its device's grant, which it gets when it is its process's turn, by the
order that steps are given in; it is called in as soon as somebody is to go first. It runs at the lowest
priority of the operating system, so steps need not wait for it to have stopped. What it computed is charged
as steps are.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from llmasos.drivers import base
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls.training import Method, Recipe, TrainEvent, TrainResult
from llmasos.syscalls.types import Capability, FileInfo
from msgspec.structs import replace

from . import residency, scheduler
from .devices import Device, Pool
from .effects import KillWorker, ToWorker
from .files import room_on_disk
from .imports import IMPORTER
from .modelfs import session_files
from .modelfs.manifest import Lineage, Manifest
from .modelfs.names import parse_name
from .modelfs.runs import RunRow, run_of
from .modelfs.session_files import SavedRun, Snapshot
from .process import CLASS_RANK, Exit, Process
from .programs import Program
from .sessions import Request, Session
from .shares import tenant_of
from .tenants import Subject

if TYPE_CHECKING:
    from .loop import Kernel

PREPARER = "llmasos.userland.dataset"
TRAINER = "llmasos.drivers.trainer"

LOOK_S = 0.1
"""So often what a run computes is charged, and somebody of its own class may go first."""

STOPPED_S = 30.0
"""A run that is stopped for so long gives up its memory."""

FROZEN_S = 120.0
"""A trainer that was called in has stopped by then, however little of the processors is left to it."""

PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
"""Between the death of a program and the next one, doubling."""

MOST_DEATHS = 6
"""A run whose programs die so often in a row, without a checkpoint between, has failed. More often than
`crash_limit`, for a machine that is short of memory kills trainers first, and hours of work hang on them."""

MOST_COMMITS = 60
"""So often a result is tried to be committed, once in LONGEST_PAUSE_S."""

MOST_METRICS = 64 << 20
"""Bytes of a run's metrics that are read after a restart."""

MOST_EVENTS = 4096
"""The last so many events of a run are kept for those who follow it."""


@dataclass(slots=True, eq=False)
class Run:
    """What a process trains: `dataset` with its `digest`. `program` is what works for it now; a trainer
    attaches as `connection` and is `ready` when it waits for grants. `deaths` are programs in a row that
    brought it no further."""

    id: str
    dataset: str
    digest: str
    target: str
    recipe: Recipe
    result: TrainResult | None = None
    problem: errors.LLMasOSError | None = None
    program: Program | None = None
    number: int = 0  # by which its trainer says whose it is
    connection: int | None = None
    ready: bool = False
    prepared: bool = False
    exited: bool = False  # the trainer's process, but something that it said may not have been heard
    leaving: bool = False
    stopping: bool = False
    tidied: bool = False
    deaths: int = 0
    due: float = 0.0
    stopped_at: float | None = None
    grant: int = 0
    aged: bool = False  # the grant was given because its class had waited for too long
    called_in: bool = False
    called_at: float = 0.0
    granted_at: float = 0.0
    charged_at: float = 0.0
    look_at: float = 0.0  # when the kernel looks again whether it has to yield
    step: int = 0
    steps: int = 0
    tokens: int = 0
    pace: float = 0.0
    events: deque[TrainEvent] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    dropped: int = 0  # events before those that are kept
    followers: list[Follower] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        """Whether it has a trainer."""
        return self.program is not None and self.program.arguments[0] == TRAINER

    @property
    def waits(self) -> bool:
        """For a grant."""
        return self.ready and not self.grant

    @property
    def waiting_for(self) -> str:
        """What keeps it from being ready."""
        if self.program is None:
            return "its turn to be loaded" if self.result is None else "its model to be committed"
        module = self.program.arguments[0]
        return {PREPARER: "its data set", TRAINER: "its trainer"}.get(module, "its model to be committed")

    def row(self) -> RunRow:
        problem = errors.to_wire(self.problem) if self.problem else None
        return RunRow(self.id, self.dataset, self.digest, self.target, self.recipe, self.result, problem)


@dataclass(slots=True, eq=False)
class Follower:
    """A `follow` that is being served; `next` is the number of the event that comes next."""

    request: Request
    next: int
    credits: int
    seq: int = 0


# Beginning


def start(kernel: Kernel, session: Session, call: table.Train) -> table.TrainReply:
    """Makes the process of a run. Raises what `table.Train` names."""
    subject = session.subject
    subject.require_priority(call.sched_class, call.nice)
    kernel.processes.room_for(subject.path, 1)
    kernel.store.require_room()
    manifest = kernel.store.resolve(call.model, subject.may_command)
    if manifest.base:
        raise errors.UnsupportedModel(
            f"{manifest.name} is an adapter", hint="merge it into a model of its own first: llsh merge"
        )
    lora = call.recipe.method is Method.LORA
    target = str(parse_name(f"{call.model}+{call.target}" if lora else call.target))
    _must_be_free(kernel, target)
    data = kernel.store.datasets.path(subject.path, call.dataset)
    digest = kernel.store.datasets.digest(subject.path, call.dataset)
    room_on_disk(kernel, subject.path, 0 if lora else 2 * manifest.parameters)  # at least
    process = kernel.processes.spawn(
        subject.path,
        None if call.detached else session.key,
        _pool(kernel, manifest, call.device),
        call.sched_class,
        call.nice,
        call.label or "train",
        kernel.now(),
    )
    run = Run(kernel.random.randbytes(8).hex(), call.dataset, digest, target, call.recipe)
    runs = kernel.store.runs
    _begin(kernel, process, run, lambda pid: runs.make(pid, process.owner, manifest, data, call.dataset))
    return table.TrainReply(process.pid, manifest.name, process.pool.device_name, target)


def _begin(kernel: Kernel, process: Process, run: Run, make: Callable[[int], object]) -> None:
    """Has the folder of a run made; from now on it survives the kernel. Raises StorageFailed."""
    try:
        make(process.pid)
    except errors.LLMasOSError:
        kernel.processes.discard(process)
        raise
    _take_in(kernel, process, run)
    kernel.processes.name(process)
    kernel.log.info(f"process {process.pid} trains {process.pool.model} for {process.owner}")


def save(kernel: Kernel, subject: Subject, process: Process, name: str) -> FileInfo:
    """Makes a snapshot of a run, as its last checkpoint is. Raises ProcessEnded, QuotaExceeded,
    StorageFailed."""
    run, files, runs = process.run, kernel.store.sessions, kernel.store.runs
    assert run is not None
    if process.exit is not None:
        raise errors.ProcessEnded(f"process {process.pid} has ended", hint="only `wait` applies to it")
    size = runs.size(process.pid)
    room_on_disk(kernel, subject.path, size)
    folder = f"{kernel.random.getrandbits(64):016x}.run"
    runs.save(process.pid, files.kv_path(folder))
    record = Snapshot(
        created=session_files.now(),
        model=process.pool.model,
        digest=process.pool.digest,
        dtype="",
        sched_class=process.sched_class,
        nice=process.nice,
        label=process.label,
        generated=0,
        tokens=b"",
        lineage=[*process.lineage, name][-session_files.MOST_LINEAGE :],
        kv=None,
        unfinished=None,
        run=SavedRun(run.row(), folder, size, run.step, run.steps),
    )
    try:
        return files.commit(subject.path, name, record)
    except errors.StorageFailed:
        files.forget_kv(folder)
        raise


def bring_back(
    kernel: Kernel, session: Session, call: table.Restore, found: Snapshot, saved: SavedRun
) -> table.RestoreReply:
    """Makes a process of a run that was saved; if the name of what it makes is taken by now, the pid is added
    to it. Raises PermissionDenied, TooManyProcesses, Corrupt, NoSuchDevice, StorageFailed."""
    subject, row = session.subject, saved.row
    subject.require(Capability.TRAIN, "a training run")
    kernel.processes.room_for(subject.path, 1)
    folder = kernel.store.sessions.kv_path(saved.folder)
    process = kernel.processes.spawn(
        subject.path,
        None if call.detached else session.key,
        _pool(kernel, run_of(folder).base, call.device),
        found.sched_class,
        found.nice,
        found.label,
        kernel.now(),
    )
    process.lineage = found.lineage
    target = row.target
    with suppress(errors.AlreadyExists):
        _must_be_free(kernel, target)
        target = ""
    target = f"{row.target}-{process.pid}" if target else row.target
    run = Run(kernel.random.randbytes(8).hex(), row.dataset, row.digest, target, row.recipe, row.result)
    _begin(kernel, process, run, lambda pid: kernel.store.runs.bring_back(pid, folder))
    _recall(kernel, process, run)
    pool = process.pool
    return table.RestoreReply(process.pid, pool.model, pool.device_name, saved.steps, saved.step)


def restore(kernel: Kernel, process: Process, row: RunRow) -> None:
    """Takes in the run of a process of an earlier kernel."""
    run = Run(row.id, row.dataset, row.digest, row.target, row.recipe, row.result)
    run.problem = errors.from_wire(row.problem) if row.problem else None
    _recall(kernel, process, run)
    _take_in(kernel, process, run)


def _recall(kernel: Kernel, process: Process, run: Run) -> None:
    """Reads what the run has told."""
    _, metrics = kernel.store.runs.metrics(process.pid, 0, MOST_METRICS)
    for line in metrics.splitlines():
        with suppress(msgspec.DecodeError):
            _remember(run, msgspec.json.decode(line, type=TrainEvent))


def pool_of(kernel: Kernel, pid: int, device_name: str) -> Pool:
    """The pool of the run of process `pid`. Raises Corrupt, NoSuchDevice."""
    return _pool(kernel, run_of(kernel.store.runs.folder(pid)).base, device_name)


def _pool(kernel: Kernel, manifest: Manifest, device_name: str) -> Pool:
    """One that only this run is in, and that no step is made of."""
    device = residency.device_for(kernel, device_name)
    files = kernel.store.driver_files(manifest)
    return Pool(0, manifest.name, manifest.digest, "", device.name, files, kernel.now(), queue=device.runs)


def _take_in(kernel: Kernel, process: Process, run: Run) -> None:
    process.run = run
    process.pool.admitted.add(process)
    kernel.runs[process.pid] = process


def _must_be_free(kernel: Kernel, target: str) -> None:
    """Raises AlreadyExists."""
    taken = any(p.run is not None and p.exit is None and p.run.target == target for p in kernel.runs.values())
    with suppress(errors.NoSuchModel):
        kernel.store.resolve(target)
        taken = True
    if taken:
        raise errors.AlreadyExists(f"{target} is taken", hint="choose another name, or remove that: llsh rm")


# From one program to the next


def advance(kernel: Kernel) -> None:
    """Starts the programs that are due, and tidies up behind runs that have ended."""
    if not kernel.runs:
        return
    waiting = []
    for process in list(kernel.runs.values()):
        run = process.run
        assert run is not None
        if process.exit is not None or process not in process.pool.processes:
            _tidy_up(kernel, process, run)
        elif kernel.draining:
            _leave(kernel, run)
        else:
            _watch_stop(kernel, process, run)
            if run.program is None and kernel.now() >= run.due:
                if run.result is not None:
                    _commit(kernel, process, run)
                elif not process.stopped:
                    waiting.append(process)
    for process in sorted(waiting, key=_standing):
        _load(kernel, process)


def _standing(process: Process) -> tuple[int, int]:
    """The smaller, the earlier a run gets a trainer."""
    return CLASS_RANK[process.sched_class], process.pid


def _load(kernel: Kernel, process: Process) -> None:
    """Starts what prepares a run, or its trainer, if there is room for one more, or has a weaker trainer make
    room."""
    run = process.run
    assert run is not None
    prepares = not (run.prepared or kernel.store.runs.prepared(process.pid))
    run.prepared = not prepares
    loaded = [p for p in kernel.runs.values() if p.run and p.run.program and p.run.trains != prepares]
    if len(loaded) < kernel.config.max_trainers:
        (_prepare if prepares else _train)(kernel, process, run)
        return
    weakest = max(loaded, key=_standing)
    if weakest.run is not None and CLASS_RANK[weakest.sched_class] > CLASS_RANK[process.sched_class]:
        _leave(kernel, weakest.run)


def _watch_stop(kernel: Kernel, process: Process, run: Run) -> None:
    """Has a run that is stopped for long give up its memory."""
    if not process.stopped:
        run.stopped_at = None
    elif run.stopped_at is None:
        run.stopped_at = kernel.now()
        kernel.at(kernel.now() + STOPPED_S, lambda: None)
    elif kernel.now() - run.stopped_at >= STOPPED_S:
        _leave(kernel, run)


def _leave(kernel: Kernel, run: Run) -> None:
    if run.ready and not run.leaving and run.connection is not None:
        run.leaving = True
        kernel.effects.append(ToWorker(run.connection, base.Leave()))


def _prepare(kernel: Kernel, process: Process, run: Run) -> None:
    runs, files = kernel.store.runs, process.pool.files
    arguments = [PREPARER, "--data", str(runs.dataset(process.pid)), "--out", str(runs.data(process.pid))]
    paths = {name: file.path for name, file in files.items()}
    arguments += ["--digest", run.digest, "--files", json.dumps(paths)]
    arguments += ["--recipe", msgspec.json.encode(run.recipe).decode()]

    def said(line: dict[str, Any]) -> None:
        with suppress(msgspec.ValidationError):
            _tell(kernel, process, run, msgspec.convert(line, TrainEvent))

    def ended(outcome: dict[str, Any] | errors.LLMasOSError) -> None:
        run.program = None
        if isinstance(outcome, errors.LLMasOSError):
            _failed(kernel, process, run, outcome)
        elif runs.prepared(process.pid):
            run.deaths = 0
        else:
            _failed(kernel, process, run, errors.DeviceFault("its data set is not there"))

    run.program = kernel.programs.start(arguments, said, ended)


def _train(kernel: Kernel, process: Process, run: Run) -> None:
    run.number = next(kernel.numbers)
    arguments = [TRAINER, "--run", str(run.number), "--bus", str(kernel.bus)]

    def ended(outcome: dict[str, Any] | errors.LLMasOSError) -> None:
        run.exited = True
        _trainer_over(kernel, process, run)

    run.program = kernel.programs.start(arguments, lambda line: None, ended, abrupt=True)
    run.exited = False


def _trainer_over(kernel: Kernel, process: Process, run: Run) -> None:
    """The trainer has ended and everything that it said was heard."""
    if not run.exited or run.connection is not None:
        return
    left, run.leaving, run.program = run.leaving, False, None
    if run.result is None and not left:
        died = errors.DeviceFault("its trainer died", hint="see the daemon's log")
        _failed(kernel, process, run, died)


def _commit(kernel: Kernel, process: Process, run: Run) -> None:
    assert run.result is not None
    made = run.result
    lineage = Lineage(
        base=process.pool.digest,
        run=run.id,
        dataset=run.digest,
        recipe=msgspec.json.encode(run.recipe).decode(),
        steps=made.steps,
        tokens=made.tokens,
        seconds=made.seconds,
        loss=made.loss,
        eval_loss=made.eval_loss,
    )
    try:
        source = kernel.store.runs.trained(process.pid, lineage)
    except errors.StorageFailed as problem:
        _not_committed(kernel, process, run, problem)
        return
    home = str(kernel.store.folder.parent)
    arguments = [IMPORTER, "--home", home, "--model", run.target, "--source", source]

    def ended(outcome: dict[str, Any] | errors.LLMasOSError) -> None:
        run.program = None
        if isinstance(outcome, errors.LLMasOSError):
            _not_committed(kernel, process, run, outcome)
            return
        assert run.result is not None
        run.result = replace(run.result, model=str(outcome["model"]), digest=str(outcome["digest"]))
        kernel.audit.note("trained", process.owner, pid=process.pid, model=run.result.model)
        kernel.log.info(f"process {process.pid}: {run.result.model} is trained")
        if process.exit is None and process in process.pool.processes:
            kernel.processes.end(process, Exit(0, f"trained {run.result.model}"))

    run.program = kernel.programs.start(arguments, lambda line: None, ended)


def _not_committed(kernel: Kernel, process: Process, run: Run, problem: errors.LLMasOSError) -> None:
    """What hours of training made is not given up because a disk is full or somebody took the name."""
    if isinstance(problem, errors.AlreadyExists):
        run.target = f"{run.target}-{process.pid}"
        kernel.ledger.process(process)
        return
    if run.deaths < MOST_COMMITS:
        run.deaths += 1
        run.due = kernel.now() + LONGEST_PAUSE_S
        kernel.at(run.due, lambda: None)
        kernel.log.warn(f"process {process.pid}: its model is not committed yet: {problem}")
        return
    _failed(kernel, process, run, problem)


def _failed(kernel: Kernel, process: Process, run: Run, problem: errors.LLMasOSError) -> None:
    """A program failed: it is started again if it just died, but not for ever."""
    if process.exit is not None or process not in process.pool.processes:
        return
    run.deaths += 1
    kernel.log.warn(f"process {process.pid}: {problem}")
    if isinstance(problem, errors.DeviceFault) and run.deaths < MOST_DEATHS:
        run.due = kernel.now() + min(LONGEST_PAUSE_S, PAUSE_S * 2**run.deaths)
        kernel.at(run.due, lambda: None)
        return
    run.problem = problem
    kernel.processes.end(process, Exit(1, f"{type(problem).__name__}: {problem.message}"))


def _tidy_up(kernel: Kernel, process: Process, run: Run) -> None:
    """The run has ended: its program, then what it kept; its metrics go with its process."""
    gone = process not in process.pool.processes
    if run.program is not None:
        if not run.stopping:
            run.stopping = True
            kernel.programs.stop(run.program)
        return
    if not run.tidied or gone:
        run.tidied = True
        for follower in list(run.followers):
            _serve(kernel, process, run, follower)
        kernel.store.runs.trim(process.pid)
    if gone:
        kernel.store.runs.remove(process.pid)
        del kernel.runs[process.pid]


# The trainer


def attached(kernel: Kernel, connection: int, message: base.AttachTrainer) -> None:
    """A trainer came; it is told what to do."""
    for process in kernel.runs.values():
        run = process.run
        if run is not None and run.trains and run.number == message.run and run.connection is None:
            break
    else:
        kernel.log.warn(f"trainer {message.pid} refused: nobody waits for it")
        kernel.effects.append(KillWorker(message.pid))
        return
    run.connection = connection
    kernel.trainers[connection] = process
    folder = kernel.store.runs.folder(process.pid)
    spec = base.TrainSpec(
        name=run.target,
        device=process.pool.device_name,
        files=process.pool.files,
        derived=str(kernel.store.derived),
        recipe=run.recipe,
        data=str(kernel.store.runs.data(process.pid)),
        folder=str(folder),
    )
    kernel.effects.append(ToWorker(connection, base.Train(spec)))


def heard(kernel: Kernel, process: Process, message: base.FromWorker) -> None:
    """A message of a run's trainer."""
    run = process.run
    assert run is not None
    match message:
        case base.TrainReady():
            run.ready, run.steps = True, message.steps
            _forget_after(run, message.step)
            process.pool.queue.touch(process)
        case base.Granted() if message.ticket == run.grant:
            _landed(kernel, process, run)
        case base.Trained(event):
            if event.phase == "save":
                run.deaths = 0
            _tell(kernel, process, run, event)
        case base.TrainDone(result):
            run.result, run.ready = replace(result, model=run.target), False
            kernel.ledger.process(process)
        case base.Failed():
            problem = errors.from_wire(dict(message.error))
            run.deaths = MOST_DEATHS  # it said why, and would again
            _failed(kernel, process, run, problem)
        case base.Note():
            kernel.log.write(message.level, message.text)
        case _:
            kernel.log.warn(f"unexpected {type(message).__name__} from a trainer")


def gone(kernel: Kernel, process: Process) -> None:
    """The connection of a trainer broke."""
    run = process.run
    assert run is not None
    run.connection, run.ready = None, False
    if run.grant:
        _landed(kernel, process, run)
    if run.program is not None and not run.exited:
        kernel.programs.stop(run.program)
    process.pool.queue.touch(process)
    _trainer_over(kernel, process, run)


# Grants


def grant(kernel: Kernel, device: Device) -> None:
    """Lets the run whose turn it is compute."""
    aging_s = kernel.config.aging_s
    head = device.runs.head(aging_s)
    process = next(device.runs.take(aging_s, lambda _: 0.0), None)
    run = process.run if process else None
    if process is not None and run is not None and run.connection is not None:
        run.grant, run.called_in = next(kernel.numbers), False
        run.aged = head is not None and not head[0]
        run.granted_at = run.charged_at = kernel.now()
        process.flights, device.granted = 1, process
        kernel.effects.append(ToWorker(run.connection, base.Grant(run.grant)))
        _look_again(kernel, run, kernel.now() + LOOK_S)
    device.runs.settle()


def yields(kernel: Kernel, device: Device) -> bool:
    """Whether steps may be sent: nobody computes by a grant, or who does is called in now, because it is
    somebody else's turn."""
    process = device.granted
    if process is None or process.run is None:
        return True
    run, now = process.run, kernel.now()
    if run.called_in:
        if now >= run.called_at + FROZEN_S and run.program is not None:
            kernel.log.warn(f"process {process.pid}: its trainer does not stop computing and is killed")
            kernel.programs.stop(run.program)
        return True
    if process.exit is not None or process.stopped or run.leaving or _is_wanted(kernel, device, process, run):
        run.called_in, run.called_at = True, now
        kernel.at(now + FROZEN_S, lambda: None)
        if run.connection is not None:
            kernel.effects.append(ToWorker(run.connection, base.CallIn(run.grant)))
        return True
    if now - run.charged_at >= LOOK_S:
        _charge(kernel, process, run)
    _look_again(kernel, run, run.charged_at + LOOK_S)
    return False


def _is_wanted(kernel: Kernel, device: Device, process: Process, run: Run) -> bool:
    """Whether the device is to do something else first: at once for a stronger class, after a step's time for
    who else is to go first."""
    if any(not pool.ready and (pool.awaited or pool.processes) for pool in device.pools):
        return True
    queues = [device.runs, *(pool.queue for pool in device.pools if pool.ready)]
    heads = [head for queue in queues if len(queue) and (head := queue.head(kernel.config.aging_s))]
    if not heads:
        return False
    first, rank = min(heads), CLASS_RANK[process.sched_class]
    held = kernel.now() - run.granted_at >= kernel.config.step_ms / 1000
    if first[1] < rank:
        return held or not run.aged
    if not held:
        _look_again(kernel, run, run.granted_at + kernel.config.step_ms / 1000)
        return False
    _charge(kernel, process, run)
    counter = device.shares.counter(rank, tenant_of(process.owner))
    return first < (True, rank, counter, process.pid)


def _look_again(kernel: Kernel, run: Run, when: float) -> None:
    if run.look_at <= kernel.now() or when < run.look_at:
        run.look_at = when
        kernel.at(when, lambda: None)


def _charge(kernel: Kernel, process: Process, run: Run) -> None:
    now = kernel.now()
    scheduler.charge(process, now - run.charged_at, now)
    process.pool.queue.shares.chosen(CLASS_RANK[process.sched_class], tenant_of(process.owner))
    run.charged_at = now


def _landed(kernel: Kernel, process: Process, run: Run) -> None:
    _charge(kernel, process, run)
    run.grant, process.flights = 0, 0
    device = kernel.devices[process.pool.device_name]
    device.granted = None
    process.pool.queue.touch(process)


# Events


def follow(kernel: Kernel, process: Process, request: Request, after: int, credits_: int) -> None:
    """Streams the events of a run. Raises InvalidArgument."""
    run = process.run
    if run is None:
        raise errors.InvalidArgument(f"process {process.pid} does not train", field="pid")
    follower = Follower(request, after, credits_)
    run.followers.append(follower)

    def cancel() -> None:
        if follower in run.followers:
            run.followers.remove(follower)
            kernel.sessions.reply(request, table.Done())

    def credit(n: int) -> None:
        follower.credits = min(follower.credits + n, wire.MAX_CREDITS)
        _serve(kernel, process, run, follower)

    kernel.sessions.on_cancel(request, cancel)
    kernel.sessions.on_credit(request, credit)
    _serve(kernel, process, run, follower)


def _serve(kernel: Kernel, process: Process, run: Run, follower: Follower) -> None:
    """Sends what a follower has room for; the final answer follows the last event."""
    if follower not in run.followers:
        return
    known = run.dropped + len(run.events)
    follower.next = min(max(follower.next, run.dropped), known)
    first = follower.next - run.dropped
    for event in itertools.islice(run.events, first, first + follower.credits):
        kernel.sessions.item(follower.request, follower.seq, event)
        follower.seq += 1
        follower.credits -= 1
        follower.next += 1
    over = process.exit is not None or process not in process.pool.processes
    if over and follower.next == known:
        run.followers.remove(follower)
        if run.problem is not None:
            kernel.sessions.fail(follower.request, run.problem)
        else:
            kernel.sessions.reply(follower.request, table.Done())


def _tell(kernel: Kernel, process: Process, run: Run, event: TrainEvent) -> None:
    _remember(run, event)
    for follower in list(run.followers):
        _serve(kernel, process, run, follower)


def _remember(run: Run, event: TrainEvent) -> None:
    run.dropped += len(run.events) == MOST_EVENTS
    run.events.append(event)
    if event.phase == "train":
        run.step, run.steps, run.tokens, run.pace = (
            event.step,
            event.steps,
            event.tokens,
            event.tokens_per_s,
        )


def _forget_after(run: Run, step: int) -> None:
    """The trainer goes on behind `step`: what came after it has not been."""
    while run.events and run.events[-1].phase != "prepare" and run.events[-1].step > step:
        run.events.pop()
    run.step = step
