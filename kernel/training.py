"""The life of a training run: what works for it from its beginning to its end.

A run is a process with its own folder in the model filesystem. First a program prepares its data set, then a
trainer (drivers/trainer) computes while it has a grant (grants.py), then an importer commits what the trainer
made. Which of them is due follows from what is there, so a run goes on wherever it was when anything dies:
trainer, kernel or machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from llmasos.drivers import base
from llmasos.syscalls import errors, table
from llmasos.syscalls.training import Method, TrainEvent
from llmasos.syscalls.types import Capability, FileInfo
from msgspec.structs import replace

from . import following, grants, residency
from .devices import Pool
from .effects import KillWorker, ToWorker
from .files import room_on_disk
from .imports import IMPORTER
from .modelfs import session_files
from .modelfs.manifest import Lineage, Manifest
from .modelfs.names import parse_name
from .modelfs.runs import RunRow, run_of
from .modelfs.session_files import SavedRun, Snapshot
from .process import CLASS_RANK, Exit, Process
from .run import PREPARER, TRAINER, Run
from .sessions import Session
from .tenants import Subject

if TYPE_CHECKING:
    from .loop import Kernel

STOPPED_S = 30.0
"""A run that is stopped for so long gives up its memory."""

TURN_S = 60.0
"""So long a data set is prepared while others of its class wait; then they go first, and it begins anew with
twice as long, so that it gets done."""

PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
"""Between the death of a program and the next one, doubling."""

MOST_DEATHS = 6
"""A run whose programs die so often in a row, without a checkpoint between, has failed. More often than
`crash_limit`, for a machine that is short of memory kills trainers first, and hours of work hang on them."""

WEIGH_S = 1.0
"""Between two looks at what a run that is being prepared keeps on the disk."""

MOST_COMMITS = 60
"""So often a result is tried to be committed, once in LONGEST_PAUSE_S."""

MOST_METRICS = 64 << 20
"""Bytes of a run's metrics that are read after a restart."""


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
    recipe = call.recipe
    if recipe.max_length is None:
        recipe = replace(recipe, max_length=min(recipe.longest, max(8, manifest.context_length)))
    lora = recipe.method is Method.LORA
    target = str(parse_name(f"{call.model}+{call.target}" if lora else call.target))
    must_be_free(kernel, target)
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
    run = Run(kernel.random.randbytes(8).hex(), call.dataset, digest, target, recipe)
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
        must_be_free(kernel, target)
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
            run.remember(msgspec.json.decode(line, type=TrainEvent))


def pool_of(kernel: Kernel, pid: int, device_name: str) -> Pool:
    """The pool of the run of process `pid`. Raises Corrupt, NoSuchDevice."""
    return _pool(kernel, run_of(kernel.store.runs.folder(pid)).base, device_name)


def _pool(kernel: Kernel, manifest: Manifest, device_name: str) -> Pool:
    """One that only this run is in, and that no step is made of."""
    device = residency.device_for(kernel, device_name)
    files = kernel.store.driver_files(manifest)
    return Pool(
        0,
        manifest.name,
        manifest.digest,
        "",
        device.name,
        manifest.owner,
        files,
        kernel.now(),
        queue=device.runs,
    )


def _take_in(kernel: Kernel, process: Process, run: Run) -> None:
    process.run = run
    process.pool.admitted.add(process)
    kernel.runs[process.pid] = process


def must_be_free(kernel: Kernel, target: str) -> None:
    """Raises AlreadyExists."""
    taken = any(p.run is not None and p.exit is None and p.run.target == target for p in kernel.runs.values())
    with suppress(errors.NoSuchModel):
        kernel.store.resolve(target)
        taken = True
    if taken:
        raise errors.AlreadyExists(
            f"{target} is taken", hint=f"choose another name, or remove that: llsh rm {target}"
        )


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


def _standing(process: Process) -> tuple[int, int, int]:
    """The smaller, the earlier a run gets what prepares it, or a trainer."""
    return CLASS_RANK[process.sched_class], process.run.turns if process.run else 0, process.pid


def _load(kernel: Kernel, process: Process) -> None:
    """Starts what prepares a run, or its trainer, if there is room for one more, or has another one make
    room: a weaker one, or one whose turn of being prepared is over."""
    run = process.run
    assert run is not None
    prepares = not (run.prepared or kernel.store.runs.prepared(process.pid))
    run.prepared = not prepares
    loaded = [p for p in kernel.runs.values() if p.run and p.run.program and p.run.trains != prepares]
    if len(loaded) < kernel.config.max_trainers:
        (_prepare if prepares else _train)(kernel, process, run)
        return
    if any(other.run and other.run.leaving for other in loaded):
        return  # one at a time
    weakest = max(loaded, key=_standing)
    if weakest.run is not None and CLASS_RANK[weakest.sched_class] > CLASS_RANK[process.sched_class]:
        _leave(kernel, weakest.run)
        return
    for other in loaded:
        if other.run and other.sched_class is process.sched_class and _had_its_turn(kernel, other.run):
            other.run.turns += 1
            _leave(kernel, other.run)
            return


def _had_its_turn(kernel: Kernel, run: Run) -> bool:
    return run.prepares and kernel.now() - run.begun_at >= TURN_S * 2**run.turns


def _watch_stop(kernel: Kernel, process: Process, run: Run) -> None:
    """Has a run that is stopped compute nothing, and give up its memory when it is for long."""
    if not process.stopped:
        run.stopped_at = None
    elif run.prepares:
        _leave(kernel, run)
    elif run.stopped_at is None:
        run.stopped_at = kernel.now()
        kernel.at(kernel.now() + STOPPED_S, lambda: None)
    elif kernel.now() - run.stopped_at >= STOPPED_S:
        _leave(kernel, run)


def _leave(kernel: Kernel, run: Run) -> None:
    """Has a trainer end with a checkpoint, or a preparer, which will begin anew."""
    if run.leaving:
        return
    if run.prepares and run.program is not None:
        run.leaving = True
        kernel.programs.stop(run.program)
    elif run.ready and run.connection is not None:
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
            following.tell(kernel, process, run, msgspec.convert(line, TrainEvent))
        if kernel.now() - run.weighed_at >= WEIGH_S:
            _weigh(kernel, process, run)

    def ended(outcome: dict[str, Any] | errors.LLMasOSError) -> None:
        left, run.leaving, run.program = run.leaving, False, None
        if runs.prepared(process.pid):
            run.deaths = run.turns = 0
            _weigh(kernel, process, run)
        elif left:
            kernel.at(kernel.now(), lambda: None)  # there is room now
        elif isinstance(outcome, errors.LLMasOSError):
            _failed(kernel, process, run, outcome)
        else:
            _failed(kernel, process, run, errors.DeviceFault("its data set is not there"))

    run.program = kernel.programs.start(arguments, said, ended, abrupt=True)
    run.begun_at = kernel.now()
    kernel.at(run.begun_at + TURN_S * 2**run.turns, lambda: None)


def _weigh(kernel: Kernel, process: Process, run: Run) -> None:
    """Ends a run that has grown over what its owner may keep on the disk, or fills it before it trains."""
    run.weighed_at = kernel.now()
    try:
        room_on_disk(kernel, process.owner, 0)
        if not run.trains:
            kernel.store.require_room()
    except errors.LLMasOSError as problem:
        _failed(kernel, process, run, problem)


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
            following.serve(kernel, process, run, follower)
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
            run.forget_after(message.step, message.eval_step)
            process.pool.queue.touch(process)
        case base.Granted() if message.ticket == run.grant:
            grants.landed(kernel, process, run)
        case base.Trained(event):
            if event.phase == "save":
                run.deaths = 0
                _weigh(kernel, process, run)
            if event.phase == "train":
                steps, tokens = event.step - run.step, event.tokens - run.tokens
                kernel.metrics.trained(process.pool.device_name, max(0, steps), max(0, tokens))
            following.tell(kernel, process, run, event)
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
        grants.landed(kernel, process, run)
    if run.program is not None and not run.exited:
        kernel.programs.stop(run.program)
    process.pool.queue.touch(process)
    _trainer_over(kernel, process, run)
