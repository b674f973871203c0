"""Training runs in the kernel's tables: what works for them, when they compute, what is told, how they end.
Programs and trainers are played by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llmasos.drivers import base
from llmasos.kernel.effects import KillWorker, ToWorker
from llmasos.kernel.files import disk_used
from llmasos.kernel.grants import FROZEN_S
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.programs import Program
from llmasos.kernel.tenants import Subject
from llmasos.kernel.training import MOST_DEATHS, TURN_S
from llmasos.syscalls import errors, table, training, wire
from llmasos.syscalls import types as t
from msgspec.structs import replace

from .conftest import ROOT, World, infer

ALICE = Subject("alice", 1, 1, False, frozenset(t.Capability) - {t.Capability.ADMIN})
BOB = Subject("bob", 2, 1, False, frozenset(t.Capability) - {t.Capability.ADMIN})


class Runs(World):
    """A world in which the test plays the programs. `told` is what trainers were sent, by connection."""

    def __init__(self, home: Path, **settings: Any) -> None:
        super().__init__(home, **settings)
        self.told: dict[int, list[base.ToWorker]] = {}
        self.next_connection = 100

    def carry_out(self, effect: object) -> None:
        if isinstance(effect, ToWorker) and effect.worker in self.told:
            self.told[effect.worker].append(effect.message)
        else:
            super().carry_out(effect)

    def dataset(self, name: str = "facts", session: bytes = b"\0a", subject: Subject = ROOT) -> None:
        id_ = self.send(
            table.Write(f"/datasets/{name}", 0, b'{"text": "a"}\n', True), session, subject=subject
        )
        assert self.reply(id_, session)["size"] == 14

    def reply(self, id_: int, session: bytes = b"\0a") -> dict[str, Any]:
        self.flush()
        answer = self.result(id_, session)
        assert answer.kind == wire.Kind.REPLY, answer.body
        return dict(answer.body)

    def train(self, session: bytes = b"\0a", subject: Subject = ROOT, **arguments: Any) -> int:
        call = table.Train(**{"model": "tiny", "dataset": "facts", "target": "facts", **arguments})
        return int(self.reply(self.send(call, session, subject=subject), session)["pid"])

    def program(self) -> Program:
        """The one that the kernel wants to be started now."""
        self.flush()
        programs = self.kernel.programs
        (program,), programs.to_start = programs.to_start, []
        return program

    def prepared(self, pid: int) -> None:
        """The data set is prepared."""
        program = self.program()
        assert program.arguments[0] == "llmasos.userland.dataset"
        folder = self.store.runs.folder(pid) / "data"
        folder.mkdir(exist_ok=True)
        (folder / "head.json").write_text("{}")
        self.kernel.programs.line(program.number, {"ok": {}})
        self.kernel.programs.over(program.number)

    def attached(self, step: int = 0) -> tuple[int, Program]:
        """The trainer comes and is ready; returns its connection."""
        program = self.program()
        assert program.arguments[0] == "llmasos.drivers.trainer"
        run = int(program.arguments[program.arguments.index("--run") + 1])
        self.next_connection += 1
        connection = self.next_connection
        self.told[connection] = []
        self.kernel.worker_message(connection, base.AttachTrainer(run, 4000 + connection))
        self.flush()
        (told,) = self.told[connection]
        assert isinstance(told, base.Train)
        self.said(connection, base.TrainReady(step, 10, 1000))
        return connection, program

    def said(self, connection: int, message: base.FromWorker) -> None:
        self.kernel.worker_message(connection, message)
        self.flush()

    def event(self, connection: int, step: int, phase: str = "train") -> None:
        event = training.TrainEvent(phase, step, 10, loss=1 / step, tokens=8 * step)
        run = self.kernel.trainers[connection]
        with (self.store.runs.folder(run.pid) / "metrics.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(event) + b"\n")
        self.said(connection, base.Trained(event))

    def trainer_dies(self, connection: int, program: Program) -> None:
        self.kernel.worker_gone(connection)
        self.kernel.programs.over(program.number)
        self.flush()

    def grant(self, connection: int) -> base.Grant | None:
        """The one that the trainer was given last, if it was not called in."""
        orders = [m for m in self.told[connection] if isinstance(m, base.Grant | base.CallIn)]
        return orders[-1] if orders and isinstance(orders[-1], base.Grant) else None

    def stopped(self, connection: int) -> None:
        """The trainer, called in, has stopped."""
        (ticket,) = {m.ticket for m in self.told[connection][-1:] if isinstance(m, base.CallIn)}
        self.said(connection, base.Granted(ticket, 0.1))

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.flush()


@pytest.fixture
def world(tmp_path: Path) -> Runs:
    made = Runs(tmp_path)
    made.model("tiny")
    made.attach()
    made.flush()
    return made


def result(steps: int = 10) -> training.TrainResult:
    return training.TrainResult("", "", training.Method.LORA, steps, 1.0, 80, 1.0, 0.1, None, 8)


def test_a_run_prepares_trains_commits_and_is_waited_for(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, trainer = world.attached()
    assert world.grant(connection)
    follower = world.send(table.Follow(pid))
    for step in (1, 2):
        world.event(connection, step)
    counted = {f.name: f.samples for f in world.kernel.metrics.families(world.kernel)}
    assert [s.value for s in counted["training_steps"]] == [2]
    assert [s.value for s in counted["training_tokens"]] == [16]
    assert counted["training_step"] == [t.Sample([str(pid)], 2)]
    waiter = world.send(table.Wait(pid))
    world.said(connection, base.TrainDone(result()))
    world.trainer_dies(connection, trainer)
    importer = world.program()
    assert importer.arguments[0] == "llmasos.kernel.modelfs.importer"
    world.kernel.programs.line(importer.number, {"ok": {"model": "tiny+facts:latest", "digest": "sha256:1"}})
    world.kernel.programs.over(importer.number)
    reply = world.reply(waiter)
    assert reply["exit_code"] == 0
    assert reply["trained"]["model"] == "tiny+facts:latest"
    assert [a.body["step"] for a in world.answers(follower) if a.kind == wire.Kind.ITEMS] == [1, 2]
    assert world.result(follower).kind == wire.Kind.REPLY
    assert not world.store.runs.folder(pid).exists()
    assert not world.kernel.runs


@pytest.mark.parametrize(("context", "length"), [(4096, 1024), (512, 512)])
def test_rows_are_as_long_as_the_model_takes(world: Runs, context: int, length: int) -> None:
    world.model("other", max_position_embeddings=context)
    world.dataset()
    pid = world.train(model="other")
    run = world.kernel.runs[pid].run
    assert run is not None
    assert run.recipe.max_length == length


def test_who_is_stronger_goes_at_once_and_who_trains_goes_on_when_nobody_is(world: Runs) -> None:
    pid = world.spawn_now()
    world.dataset()
    run = world.train(sched_class=t.SchedClass.IDLE)
    world.prepared(run)
    connection, _ = world.attached()
    assert world.grant(connection)
    world.holds_steps = True
    id_ = world.send(infer([1, 2, 3], pid=pid, max_tokens=2))
    world.flush()
    assert world.grant(connection) is None
    assert world.held, "the step does not wait until the trainer has stopped"
    world.stopped(connection)
    while world.held:
        assert world.grant(connection) is None
        world.land()
    assert len(world.tokens(id_)) == 2
    assert world.grant(connection)


def test_in_one_class_tenants_train_and_generate_by_turns(world: Runs) -> None:
    world.dataset(session=b"\0b", subject=BOB)
    run = world.train(b"\0b", BOB)
    world.prepared(run)
    connection, _ = world.attached()
    world.holds_steps = True
    call = infer([1, 2, 3], model="tiny", max_tokens=200, sched_class=t.SchedClass.BATCH)
    id_ = world.send(call, b"\0c", 512, ALICE)
    trained = served = 0.0
    for _ in range(400):
        world.flush()
        if world.grant(connection):
            trained += 0.02
        elif isinstance(world.told[connection][-1], base.CallIn):
            world.stopped(connection)
        if world.held:
            served += 0.02
            world.now += 0.02
            worker, step = world.held.popleft()
            done = world.drivers[worker].collect(world.drivers[worker].submit(step.batch))
            world.kernel.worker_message(worker, base.StepDone(replace(done, seconds=0.02)))
        else:
            world.now += 0.02
        if any(a.kind == wire.Kind.REPLY for a in world.inbox[b"\0c"] if a.id == id_):
            break
    assert trained > 0.5
    assert 0.5 < trained / served < 2


def test_a_trainer_that_dies_is_started_again_and_what_was_lost_is_told_again(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, trainer = world.attached()
    for step in (1, 2):
        world.event(connection, step)
    world.event(connection, 2, "save")
    world.event(connection, 2, "eval")
    world.event(connection, 3)
    world.trainer_dies(connection, trainer)
    assert world.reply(world.send(table.StatProcess(pid)))["state"] == "new"
    world.passes(10)
    connection, trainer = world.attached(step=2)
    follower = world.send(table.Follow(pid))
    world.event(connection, 3)
    steps = [a.body["step"] for a in world.answers(follower) if a.kind == wire.Kind.ITEMS]
    assert steps == [1, 2, 2, 3]


def test_a_trainer_that_dies_again_and_again_fails_its_run_with_a_typed_error(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    follower = world.send(table.Follow(pid))
    for _ in range(MOST_DEATHS):
        connection, trainer = world.attached()
        world.trainer_dies(connection, trainer)
        world.passes(20)
    assert world.error(follower) is errors.DeviceFault
    reply = world.reply(world.send(table.Wait(pid)))
    assert reply["exit_code"] == 1
    assert "DeviceFault" in reply["reason"]


def test_bad_data_ends_a_run_before_anything_is_loaded(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    program = world.program()
    problem = errors.InvalidArgument("line 3 is no JSON", field="line")
    world.kernel.programs.line(program.number, {"error": errors.to_wire(problem)})
    world.kernel.programs.over(program.number)
    follower = world.send(table.Follow(pid))
    world.flush()
    assert world.error(follower) is errors.InvalidArgument
    assert "line 3" in world.reply(world.send(table.Wait(pid)))["reason"]
    assert world.kernel.programs.to_start == []


def test_what_a_trainer_says_against_a_recipe_is_final(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, trainer = world.attached()
    problem = errors.NeverFits("out of memory", hint="lower max_length")
    world.said(connection, base.Failed(0, 0, errors.to_wire(problem)))
    world.trainer_dies(connection, trainer)
    world.passes(20)
    assert world.kernel.programs.to_start == []
    assert "NeverFits" in world.reply(world.send(table.Wait(pid)))["reason"]


def test_a_stopped_run_computes_nothing_and_gives_up_its_memory_after_a_while(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, trainer = world.attached()
    world.reply(world.send(table.Kill(pid, t.Signal.STOP)))
    world.stopped(connection)
    assert world.grant(connection) is None
    assert world.reply(world.send(table.StatProcess(pid)))["state"] == "stopped"
    world.passes(31)
    assert isinstance(world.told[connection][-1], base.Leave)
    world.trainer_dies(connection, trainer)
    world.passes(60)
    assert world.kernel.programs.to_start == []
    world.reply(world.send(table.Kill(pid, t.Signal.CONT)))
    connection, _ = world.attached(step=4)
    assert world.grant(connection)


def test_a_killed_run_leaves_nothing(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, trainer = world.attached()
    world.reply(world.send(table.Kill(pid, t.Signal.KILL)))
    assert world.kernel.programs.to_stop == [trainer.number]
    world.trainer_dies(connection, trainer)
    assert world.reply(world.send(table.Wait(pid)))["exit_code"] == 137
    world.flush()
    assert not world.store.runs.folder(pid).exists()
    assert world.kernel.devices["null"].granted is None


def test_a_run_goes_on_after_a_restart_of_the_kernel(world: Runs, tmp_path: Path) -> None:
    world.dataset()
    pid = world.train(detached=True)
    world.prepared(pid)
    connection, _ = world.attached()
    for step in (1, 2, 3):
        world.event(connection, step)
    rows = {name: data for name, data in world.kernel.ledger.take().items() if data is not None}
    after = Runs(tmp_path, rows=rows)
    after.attach()
    connection, trainer = after.attached(step=2)
    follower = after.send(table.Follow(pid))
    after.flush()
    assert [a.body["step"] for a in after.answers(follower)] == [1, 2]
    after.said(connection, base.TrainDone(result()))
    after.trainer_dies(connection, trainer)
    assert after.program().arguments[0] == "llmasos.kernel.modelfs.importer"


def test_runs_data_sets_and_models_are_their_owners(world: Runs) -> None:
    world.dataset(session=b"\0b", subject=BOB)
    pid = world.train(b"\0b", BOB)
    stolen = world.send(table.Train("tiny", "facts", "mine"), b"\0c", subject=ALICE)
    watched = world.send(table.Follow(pid), b"\0c", subject=ALICE)
    listed = world.send(table.Ls("/datasets"), b"\0c", subject=ALICE)
    world.flush()
    assert world.error(stolen, b"\0c") is errors.NoSuchFile
    assert world.error(watched, b"\0c") is errors.NoSuchProcess
    assert world.reply(listed, b"\0c")["entries"] == []
    again = world.send(table.Train("tiny", "facts", "facts"), b"\0b", subject=BOB)
    world.flush()
    assert world.error(again, b"\0b") is errors.AlreadyExists


def test_models_that_were_made_count_as_their_owners_disk(world: Runs) -> None:
    world.dataset()
    world.send(table.SetQuota("root", t.Quota(disk_bytes=10_000)))
    world.train(target="fits")
    made = replace(world.store.resolve("tiny"), owner="root")
    digest, size = world.store.put_bytes(bytes(20_000))
    large = replace(made, files=[*made.files, replace(made.files[0], path="large", digest=digest, size=size)])
    world.store.commit(parse_name("large"), large)
    refused = world.send(table.Train("tiny", "facts", "more"))
    written = world.send(table.Write("/datasets/more", 0, b"x", True))
    world.flush()
    assert world.error(refused) is world.error(written) is errors.QuotaExceeded


@pytest.mark.parametrize("trains", [False, True], ids=["prepares", "trains"])
def test_a_run_that_grows_over_its_owners_disk_ends(world: Runs, trains: bool) -> None:
    world.dataset()
    alone = disk_used(world.kernel, "root")
    world.send(table.SetQuota("root", t.Quota(disk_bytes=10_000)))
    pid = world.train()
    if trains:
        world.prepared(pid)
        connection, program = world.attached()
    else:
        program = world.program()
    folder = world.store.runs.folder(pid)
    before = disk_used(world.kernel, "root")
    for size in (5_000, 10_000):
        assert world.kernel.programs.to_stop == []
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "tokens.u32").write_bytes(bytes(size))
        world.now += 2
        if trains:
            world.event(connection, 1, "save")
        else:
            world.kernel.programs.line(program.number, {"phase": "prepare", "step": 1, "steps": 2})
        world.flush()
        assert disk_used(world.kernel, "root") >= before + size
    assert world.kernel.programs.to_stop == [program.number]
    assert "QuotaExceeded" in world.reply(world.send(table.Wait(pid)))["reason"]
    if trains:
        world.trainer_dies(connection, program)
    else:
        world.kernel.programs.over(program.number)
    world.flush()
    assert disk_used(world.kernel, "root") == alone


def test_a_data_set_counts_as_long_as_something_keeps_it(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    with_name = disk_used(world.kernel, "root")
    world.reply(world.send(table.Unlink("/datasets/facts")))
    in_run = disk_used(world.kernel, "root")
    assert with_name - in_run < 100, "the run keeps it; its name has gone"
    world.reply(world.send(table.Snapshot(pid, "half")))
    preparer = world.program()
    world.reply(world.send(table.Kill(pid)))
    world.kernel.programs.over(preparer.number)
    world.reply(world.send(table.Wait(pid)))
    world.flush()
    assert disk_used(world.kernel, "root") == world.store.sessions.usage() > in_run


def test_what_is_ones_own_is_removed_and_what_is_everybodys_is_an_administrators(world: Runs) -> None:
    world.dataset(session=b"\0b", subject=BOB)
    refused = world.send(table.Unlink("/models/tiny"), b"\0b", subject=BOB)
    file = world.send(table.Unlink("/models/tiny:latest/config.json"))
    world.reply(world.send(table.Unlink("/datasets/facts"), b"\0b", subject=BOB), b"\0b")
    gone = world.send(table.Unlink("/datasets/facts"), b"\0b", subject=BOB)
    world.flush()
    assert world.error(refused, b"\0b") is errors.PermissionDenied
    assert world.error(file) is errors.InvalidArgument
    assert world.error(gone, b"\0b") is errors.NoSuchFile
    world.store._manifest_path(parse_name("tiny")).write_text("damaged")
    world.reply(world.send(table.Unlink("/models/tiny")))
    world.flush()
    assert b'"unlink"' in world.kernel.audit.read(0, 1 << 20)[1]


def test_who_may_not_train_is_told(world: Runs) -> None:
    rights = frozenset({t.Capability.CONNECT, t.Capability.INFER, t.Capability.PROCESS})
    guest = Subject("guest", 3, 1, False, rights)
    id_ = world.send(table.Train("tiny", "facts", "x"), b"\0g", subject=guest)
    world.flush()
    assert world.error(id_, b"\0g") is errors.PermissionDenied


def test_only_so_many_trainers_are_loaded_and_a_stronger_run_has_a_weaker_one_leave(tmp_path: Path) -> None:
    world = Runs(tmp_path, max_trainers=1)
    world.model("tiny")
    world.attach()
    world.dataset()
    weak = world.train(sched_class=t.SchedClass.IDLE, target="weak")
    world.prepared(weak)
    connection, trainer = world.attached()
    strong = world.train(sched_class=t.SchedClass.BATCH, target="strong")
    world.prepared(strong)
    world.flush()
    assert world.reply(world.send(table.StatProcess(strong)))["waiting_for"] == "its turn to be loaded"
    assert base.Leave() in world.told[connection]
    world.trainer_dies(connection, trainer)
    connection, _ = world.attached()
    assert world.kernel.trainers[connection].pid == strong


def over(world: Runs, program: Program) -> None:
    """A program that was told to has ended."""
    assert world.kernel.programs.to_stop == [program.number]
    world.kernel.programs.to_stop.clear()
    world.kernel.programs.over(program.number)
    world.flush()


@pytest.mark.parametrize(
    ("weaker", "turn"), [(t.SchedClass.IDLE, 0.0), (t.SchedClass.BATCH, TURN_S)], ids=["weaker", "equal"]
)
def test_preparing_waits_for_no_weaker_run_and_for_equal_ones_by_turns(
    tmp_path: Path, weaker: t.SchedClass, turn: float
) -> None:
    world = Runs(tmp_path, max_trainers=1)
    world.model("tiny")
    world.attach()
    world.dataset()
    first = world.train(sched_class=weaker, target="first")
    preparer = world.program()
    second = world.train(sched_class=t.SchedClass.BATCH, target="second")
    if turn:
        world.passes(turn - 1)
        assert world.kernel.programs.to_stop == []
        world.passes(1)
    over(world, preparer)
    assert world.reply(world.send(table.StatProcess(first)))["waiting_for"] == "its turn to be loaded"
    if turn:
        restarted = world.program()
        world.passes(turn)
        over(world, restarted)
        preparer = world.program()  # the first one's: it has twice as long
        world.passes(turn)
        assert world.kernel.programs.to_stop == []
        world.passes(turn)
        over(world, preparer)
    world.prepared(second)
    run = world.kernel.runs[first].run
    assert run is not None
    assert run.deaths == 0
    assert run.problem is None


def test_a_stopped_run_is_not_prepared_until_it_goes_on(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    preparer = world.program()
    world.reply(world.send(table.Kill(pid, t.Signal.STOP)))
    over(world, preparer)
    world.passes(60)
    assert world.kernel.programs.to_start == []
    assert world.reply(world.send(table.StatProcess(pid)))["state"] == "stopped"
    world.reply(world.send(table.Kill(pid, t.Signal.CONT)))
    world.prepared(pid)
    world.attached()


def test_contexts_and_training_are_not_mixed_up(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    spawned = world.spawn_now()
    for call in (infer([1], pid=pid), table.Fork(pid), table.Truncate(pid, 0), table.Migrate(pid, "null:1")):
        id_ = world.send(call)
        world.flush()
        assert world.error(id_) is errors.ProcessBusy
    id_ = world.send(table.Follow(spawned))
    world.flush()
    assert world.error(id_) is errors.InvalidArgument


def test_a_stranger_on_the_bus_is_turned_away(world: Runs) -> None:
    world.kernel.worker_message(77, base.AttachTrainer(1234, 5555))
    effects = world.kernel.take_effects()
    assert KillWorker(5555) in effects


def test_metrics_are_read_below_proc(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, _ = world.attached()
    world.event(connection, 1)
    data = world.reply(world.send(table.Read(f"/proc/{pid}/metrics")))
    line = json.loads(bytes(data["data"]) if data["data"] else b"{}") if "data" in data else {}
    assert data["size"] > 0
    assert not line or line["step"] == 1


def test_a_run_is_saved_and_goes_on_as_a_process_of_its_own(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, trainer = world.attached()
    world.event(connection, 1)
    info = world.reply(world.send(table.Snapshot(pid, "half")))
    assert info["path"] == "/sessions/half"
    world.event(connection, 2)
    world.reply(world.send(table.Kill(pid)))
    world.trainer_dies(connection, trainer)
    reply = world.reply(world.send(table.Restore("half")))
    assert (reply["context"], reply["kept"]) == (10, 1)
    connection, trainer = world.attached(step=1)
    follower = world.send(table.Follow(reply["pid"]))
    world.flush()
    assert [a.body["step"] for a in world.answers(follower)] == [1]
    again = world.reply(world.send(table.Restore("half")))
    world.said(connection, base.TrainDone(result()))
    world.trainer_dies(connection, trainer)
    programs, world.kernel.programs.to_start = world.kernel.programs.to_start, []
    targets = {p.arguments[p.arguments.index("--model") + 1] for p in programs if "--model" in p.arguments}
    assert targets == {"tiny:latest+facts"}
    second = world.kernel.runs[again["pid"]].run
    assert second is not None
    assert second.target == f"tiny:latest+facts-{again['pid']}"
    world.reply(world.send(table.Discard("half")))
    assert world.store.sessions.usage() == 0


@pytest.mark.parametrize("again", [False, True], ids=["gone", "another"])
def test_a_saved_run_whose_base_is_gone_is_not_restored(world: Runs, again: bool) -> None:
    world.dataset()
    pid = world.train()
    world.reply(world.send(table.Snapshot(pid, "half")))
    world.reply(world.send(table.Kill(pid)))
    world.reply(world.send(table.Unlink("/models/tiny")))
    if again:
        world.model("tiny", max_position_embeddings=32)
    id_ = world.send(table.Restore("half"))
    world.flush()
    assert world.error(id_) is errors.NoSuchModel


def test_a_trainer_that_does_not_stop_computing_is_killed(world: Runs) -> None:
    pid = world.spawn_now()
    world.dataset()
    run = world.train(sched_class=t.SchedClass.IDLE)
    world.prepared(run)
    _, trainer = world.attached()
    id_ = world.send(infer([1, 2, 3], pid=pid, max_tokens=2))
    world.flush()
    assert len(world.tokens(id_)) == 2, "steps go on meanwhile"
    assert world.kernel.programs.to_stop == []
    world.passes(FROZEN_S + 1)
    assert world.kernel.programs.to_stop == [trainer.number]


def test_a_result_that_cannot_be_committed_yet_is_tried_again(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, trainer = world.attached()
    world.said(connection, base.TrainDone(result()))
    world.trainer_dies(connection, trainer)
    for problem in (errors.PullFailed("the disk is full"), errors.AlreadyExists("taken")):
        importer = world.program()
        world.kernel.programs.line(importer.number, {"error": errors.to_wire(problem)})
        world.kernel.programs.over(importer.number)
        world.passes(11)
    importer = world.program()
    assert importer.arguments[importer.arguments.index("--model") + 1] == f"tiny:latest+facts-{pid}"
    world.kernel.programs.line(importer.number, {"ok": {"model": "x", "digest": "y"}})
    world.kernel.programs.over(importer.number)
    assert world.reply(world.send(table.Wait(pid)))["exit_code"] == 0
