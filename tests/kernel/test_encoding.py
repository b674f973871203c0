"""Encoders in the kernel: their texts queue, are charged, cancelled and computed again as everything else."""

from __future__ import annotations

import array
import itertools
from pathlib import Path

import pytest
from llmasos.drivers.null import vector
from llmasos.drivers.simulated import StepTime
from llmasos.kernel.encoding import MOST_HELD
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.store import Manifest, ManifestFile
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

from .conftest import ROOT, Machine, World, infer, reference

WIDTH = 8


def encode(texts: list[list[int]], model: str = "encoder", **arguments: object) -> table.Encode:
    packed = t.pack_tokens([token for text in texts for token in text])
    return table.Encode(model, tokens=packed, lengths=[len(text) for text in texts], **arguments)  # type: ignore[arg-type]


def rows(world: World, id_: int) -> list[list[float]]:
    answer = world.result(id_)
    assert answer.kind == wire.Kind.REPLY, answer.body
    values = array.array("f", answer.payload)
    width = answer.body["width"]
    return [values[at : at + width].tolist() for at in range(0, len(values), width)]


def right(texts: list[list[int]], width: int = WIDTH) -> list[list[float]]:
    return [array.array("f", vector(text, width)).tolist() for text in texts]


def texts_of(count: int, length: int = 30) -> list[list[int]]:
    return [[(7 * n + place) % 1000 for place in range(length)] for n in range(count)]


@pytest.fixture
def world(world: World) -> World:
    world.model("encoder", llmasos_null_encodes="embed", max_position_embeddings=64)
    world.attach()
    return world


def test_texts_come_back_as_rows_in_their_order(world: World) -> None:
    texts = [[1, 2, 3], [4], [9] * 64, [1, 2, 3]]
    id_ = world.send(encode(texts))
    world.turn(4)
    assert rows(world, id_) == right(texts)
    assert world.result(id_).body["tokens"] == 71
    assert len(world.kernel.processes) == 0


def test_a_long_call_is_divided_over_steps(world: World) -> None:
    texts = texts_of(300)
    id_ = world.send(encode(texts))
    world.turn(300)
    assert rows(world, id_) == right(texts)
    assert len(world.encodes) > 1
    assert max(sum(order.lengths) for order in world.encodes) <= 8192


def test_ps_shows_it_as_a_process(world: World) -> None:
    world.holds_steps = True
    id_ = world.send(encode(texts_of(10), sched_class=t.SchedClass.BATCH, label="index"))
    world.flush()
    (row,) = [process.info(0.0, 0) for process in world.kernel.processes]
    assert (row.name, row.state, row.context, row.computed) == ("index", t.State.RUNNING, 300, 0)
    world.land()
    (row,) = [process.info(0.0, 0) for process in world.kernel.processes]
    assert 0 < row.computed < 300
    busy = [
        world.send(call)
        for call in (infer([1], pid=row.pid), table.Fork(row.pid), table.Snapshot(row.pid, "x"))
    ]
    world.flush()
    assert {world.error(one) for one in busy} == {errors.ProcessBusy}
    while world.held:
        world.land()
    assert rows(world, id_) == right(texts_of(10))


def test_tokens_are_encoded_one_by_one(world: World) -> None:
    world.model("tagger", llmasos_null_encodes="tokens", hidden_size=3)
    id_ = world.send(encode([[5, 6], [7]], "tagger", encodes=t.Encodes.TOKENS))
    world.turn(4)
    assert rows(world, id_) == right([[5], [6], [7]], 3)


def test_the_second_text_of_a_pair_travels(world: World) -> None:
    id_ = world.send(encode([[5, 6, 7], [8, 9]], pairs=[2, 0]))
    world.turn(4)
    assert rows(world, id_)[0] == array.array("f", vector([5, 6, 7], WIDTH, 2)).tolist()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (encode([]), errors.InvalidArgument),
        (table.Encode("encoder", tokens=b"1234", lengths=[2]), errors.InvalidArgument),
        (table.Encode("encoder", tokens=b"123", lengths=[1]), errors.InvalidArgument),
        (encode([[1, 2]], pairs=[2]), errors.InvalidArgument),
        (encode([[1, 2], [3]], pairs=[1]), errors.InvalidArgument),
        (encode([[1, 60_000]]), errors.InvalidArgument),
        (encode([[1], [1] * 65]), errors.ContextOverflow),
        (encode([[1]], encodes=t.Encodes.CLASSIFY), errors.UnsupportedModel),
        (encode([[1]], "tiny"), errors.UnsupportedModel),
        (encode([[1]], "unknown"), errors.NoSuchModel),
        (encode([[1]], device="cuda:7"), errors.NoSuchDevice),
        (encode([[1]], sched_class=t.SchedClass.REALTIME), errors.PermissionDenied),
        (infer([1], model="encoder"), errors.UnsupportedModel),
        (table.SpawnModel("encoder"), errors.UnsupportedModel),
    ],
)
def test_what_cannot_be_is_told_and_leaves_nothing(
    world: World, call: table.Call, error: type[errors.LLMasOSError]
) -> None:
    id_ = world.send(call, b"\0n", subject=ROOT.narrowed("alice"))
    world.turn(5)
    assert world.error(id_, b"\0n") is error
    assert len(world.kernel.processes) == 0
    assert world.kernel.quotas.nodes() == []


def test_an_adapter_of_an_encoder_is_not_taken_for_the_encoder(world: World) -> None:
    files = [ManifestFile("adapter_config.json", *world.store.put_bytes(b"{}"))]
    base, _ = world.store.put_bytes(world.store.resolve("encoder").content)
    manifest = Manifest(1, "test", "null", 0, "", 4096, "", 0.0, files, base=base)
    world.store.commit(parse_name("encoder+mine"), manifest)
    id_ = world.send(encode([[1]], "encoder+mine"))
    world.turn(4)
    assert world.error(id_) is errors.UnsupportedModel
    assert not world.encodes
    assert len(world.kernel.processes) == 0


def test_a_reply_that_is_too_big_is_refused_before_it_is_computed(world: World) -> None:
    world.model("wide", llmasos_null_encodes="embed", hidden_size=2**20)
    id_ = world.send(encode([[1]] * 5, "wide"))
    world.turn(4)
    assert world.error(id_) is errors.InvalidArgument
    assert not world.encodes


def test_what_waits_is_bounded_tenant_by_tenant(world: World) -> None:
    world.send(encode([[1]]))
    world.turn(4)  # resident, so that its width is known
    world.holds_steps = True
    full = encode([[1] * 64] * 1000, label="full")
    ids = [world.send(full) for _ in range(500)]
    other = world.send(encode([[1]]), b"\0b", subject=ROOT.assumed("bob", t.TENANT_RIGHTS))
    world.flush()
    refused = [id_ for id_ in ids if world.answers(id_)]
    assert {world.error(id_) for id_ in refused} == {errors.QueueFull}
    kept = len(ids) - len(refused)
    assert kept == MOST_HELD // (len(full.tokens) + 4 * WIDTH * 1000)
    assert len(world.kernel.processes) == kept + 1
    assert not world.answers(other, b"\0b")


def test_cancelled_killed_late_or_left_it_is_gone_at_once(world: World) -> None:
    world.holds_steps = True
    first = world.send(encode([[1]]))
    world.flush()
    world.land()
    assert rows(world, first) == right([[1]])

    ids = [world.send(encode(texts_of(100))) for _ in range(2)]
    late = world.send(encode(texts_of(100), deadline_ms=500))
    gone = world.send(encode(texts_of(100)), session=b"\0b")
    world.flush()
    pids = [process.pid for process in world.kernel.processes]
    assert len(pids) == 4
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(ids[0]))
    world.send(table.Kill(pids[1]))
    world.kernel.disconnected(b"\0b")
    world.now += 0.6
    world.flush()
    assert [world.error(id_) for id_ in (*ids, late)] == [
        errors.Unavailable,
        errors.ProcessEnded,
        errors.TimedOut,
    ]
    assert not world.answers(gone, b"\0b")
    assert len(world.kernel.processes) == 0
    while world.held:
        world.land()  # what was in flight is of nobody
    again = world.send(encode([[1, 2]]))
    world.flush()
    world.land()
    assert rows(world, again) == right([[1, 2]])


def test_stopped_it_waits(world: World) -> None:
    world.holds_steps = True
    id_ = world.send(encode(texts_of(100)))
    world.flush()
    (process,) = world.kernel.processes
    world.send(table.Kill(process.pid, t.Signal.STOP))
    while world.held:
        world.land()
    assert process.state is t.State.STOPPED
    world.send(table.Kill(process.pid, t.Signal.CONT))
    world.flush()
    while world.held:
        world.land()
    assert rows(world, id_) == right(texts_of(100))


def test_a_wait_for_it_is_answered_when_it_ends(world: World) -> None:
    world.holds_steps = True
    world.send(encode([[1]]))
    world.flush()
    (process,) = world.kernel.processes
    wait = world.send(table.Wait(process.pid))
    world.flush()
    world.land()
    assert world.result(wait).body["exit_code"] == 0


def test_a_worker_that_dies_loses_no_text(world: World) -> None:
    world.holds_steps = True
    texts = texts_of(100)
    id_ = world.send(encode(texts))
    world.flush()
    world.land()
    world.land()
    world.die()
    world.attach(2)
    world.flush()
    while world.held:
        world.land()
    assert rows(world, id_) == right(texts)


def test_what_kills_workers_is_given_up(world: World) -> None:
    world.holds_steps = True
    id_ = world.send(encode(texts_of(3)))
    world.flush()
    for worker in (1, 2):
        assert not world.answers(id_)
        world.die(worker)
        world.attach(worker + 1)
        world.flush()
    assert world.error(id_) is errors.DeviceFault
    assert len(world.kernel.processes) == 0


def test_a_step_that_raises_fails_those_in_it(world: World) -> None:
    world.holds_steps = True
    id_ = world.send(encode([[1]]))
    world.flush()
    other = world.send(encode([[2]]))
    world.land(fails=True)
    assert world.error(id_) is errors.DeviceFault
    while world.held:
        world.land()
    assert rows(world, other) == right([[2]])


def test_an_answer_of_the_wrong_size_ends_the_worker(world: World) -> None:
    world.holds_steps = True
    world.send(encode([[1]]))
    world.flush()
    worker, order = world.held[0]
    answer = world.drivers[worker].encode(order)
    world.kernel.worker_message(worker, type(answer)(answer.ticket, answer.data[:-4], 0.0))
    world.flush()
    assert world.killed == [101]


def test_quotas_count_its_tokens_and_its_place(tmp_path: Path) -> None:
    quota = t.Quota(tokens_in=100, queue=1)
    world = World(tmp_path, quotas={"root": quota})
    world.model("encoder", llmasos_null_encodes="embed")
    world.attach()
    world.holds_steps = True
    first = world.send(encode([[1] * 40, [2] * 40]))
    second = world.send(encode([[1]]))
    world.flush()
    while world.held:
        world.land()
    third = world.send(encode([[1] * 30]))
    world.flush()
    assert rows(world, first) == right([[1] * 40, [2] * 40])
    assert world.error(second) is world.error(third) is errors.QuotaExceeded


def test_it_is_counted(world: World) -> None:
    world.send(encode([[1, 2], [3]]))
    world.send(encode([[1] * 65]))
    world.turn(5)
    families = {family.name: family.samples for family in world.kernel.metrics.families(world.kernel)}
    assert {tuple(sample.labels): sample.value for sample in families["requests"]} == {
        ("encoder:latest", "interactive", "encoded"): 1,
        ("encoder:latest", "interactive", "error"): 1,
    }
    assert [sample.value for sample in families["prompt_tokens"]] == [68]
    assert [sum(sample.buckets) for sample in families["queue_seconds"]] == [1]
    assert [sample.value for sample in families["steps"]] == [len(world.encodes)]


def test_draining_lets_it_end(world: World) -> None:
    world.holds_steps = True
    id_ = world.send(encode([[1]]))
    world.flush()
    world.send(table.Shutdown(drain_s=5))
    world.flush()
    assert not world.exited
    worker, order = world.held.popleft()
    world.kernel.worker_message(worker, world.drivers[worker].encode(order))
    world.turn()
    assert rows(world, id_) == right([[1]])
    assert world.exited


# Beside others


def machine(tmp_path: Path, **settings: object) -> Machine:
    made = Machine(tmp_path, StepTime(), **settings)
    made.model("tiny", max_position_embeddings=4096)
    made.model("encoder", llmasos_null_encodes="embed", max_position_embeddings=512)
    made.attach()
    return made


def warm(world: Machine, *calls: table.Call) -> None:
    """Loads the models, and lets the kernel learn what steps cost."""
    for call in (*calls, encode(texts_of(200)), infer([1, 2, 3], model="tiny", max_tokens=30)):
        id_ = world.send(call)
        world.run(lambda id_=id_: world.ended(id_))


def gaps(world: Machine, id_: int) -> list[float]:
    times = [at for at, answer in world.seen[id_] if answer.kind == wire.Kind.ITEMS]
    return [after - before for before, after in itertools.pairwise(times)]


def test_a_batch_of_texts_does_not_slow_a_chat(tmp_path: Path) -> None:
    world = machine(tmp_path)
    warm(world)
    many = world.send(encode(texts_of(1000), sched_class=t.SchedClass.BATCH))
    world.run(world.now + 1.0)
    chat = world.send(infer([5, 6, 7], model="tiny", max_tokens=60))
    came = world.now
    world.run(lambda: world.ended(chat))
    assert world.tokens(chat) == reference([5, 6, 7], 60)
    assert world.first_token_s(chat) - came < 0.3  # the steps that were on their way, and its own
    assert max(gaps(world, chat)) < 0.05
    world.run(lambda: world.ended(many))
    assert rows(world, many) == right(texts_of(1000))


def test_of_one_tenant_a_chat_and_texts_of_one_class_take_turns(tmp_path: Path) -> None:
    world = machine(tmp_path)
    warm(world)
    chat = world.send(infer([5, 6, 7], model="tiny", max_tokens=400), credits_=400)
    world.run(world.now + 0.2)
    many = world.send(encode(texts_of(60)))
    world.run(lambda: world.ended(many))
    assert not world.ended(chat)
    assert max(gaps(world, chat)) < 0.12
    later = world.send(encode(texts_of(1000)))
    world.run(lambda: world.ended(chat))
    assert not world.ended(later)


def test_a_few_texts_need_not_wait_for_many(tmp_path: Path) -> None:
    world = machine(tmp_path)
    warm(world)
    many = world.send(encode(texts_of(1000)))
    world.run(world.now + 1.0)
    few = world.send(encode(texts_of(1)))
    came = world.now
    world.run(lambda: world.ended(few))
    assert world.now - came < 0.45  # what is computed, what is on its way, and its own step
    assert not world.ended(many)


def test_tenants_share_an_encoder_by_their_weights(tmp_path: Path) -> None:
    world = machine(tmp_path, quotas={"alice": t.Quota(weight=2.0)})
    warm(world)
    people = {name: ROOT.assumed(name, t.TENANT_RIGHTS) for name in ("alice", "bob")}
    for name, subject in people.items():
        for _ in range(3 if name == "bob" else 1):
            world.send(encode(texts_of(1000)), name.encode(), subject=subject)
    world.run(world.now + 12.0)
    done = dict.fromkeys(people, 0)
    for process in world.kernel.processes:
        assert process.encoding is not None
        done[process.owner] += process.encoding.computed
    assert 1.7 < done["alice"] / done["bob"] < 2.3
