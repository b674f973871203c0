"""Training runs in the kernel's tables: what works for them, what is told, how they end, are saved and go on.
Programs and trainers are played by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llmasos.drivers import base
from llmasos.kernel.effects import KillWorker, ToWorker
from llmasos.kernel.programs import Program
from llmasos.kernel.tenants import Subject
from llmasos.kernel.training import MOST_DEATHS
from llmasos.syscalls import errors, table, training, wire
from llmasos.syscalls import types as t

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
