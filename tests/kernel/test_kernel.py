"""The kernel in virtual time: what clients and workers see of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmasos.drivers import base
from llmasos.drivers.null import NullDriver
from llmasos.kernel.config import Config
from llmasos.kernel.effects import ToWorker
from llmasos.kernel.main import device_names
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

from .conftest import ROOT, World, infer, reference


def test_work_that_came_before_the_worker_waits_for_it(world: World) -> None:
    id_ = world.send(infer([1, 2], model="tiny", max_tokens=5))
    world.turn(3)
    assert not world.answers(id_)
    (row,) = world.kernel.processes
    assert (row.state, row.waiting_for) == (t.State.NEW, "model tiny:latest on null")
    world.attach()
    world.turn(20)
    assert world.tokens(id_) == reference([1, 2], 5)
    assert world.result(id_).kind == wire.Kind.REPLY
    assert len(world.kernel.processes) == 0


def test_a_device_that_never_comes_is_told_after_two_minutes(world: World) -> None:
    id_ = world.send(table.SpawnModel(model="tiny"))
    world.now = 121.0
    world.turn()
    assert world.error(id_) is errors.DeviceUnavailable
    assert len(world.kernel.processes) == 0


def test_a_model_that_cannot_be_loaded_fails_its_callers_not_the_device(world: World) -> None:
    world.attach()
    world.refuse_load = errors.UnsupportedModel("no such architecture")
    spawn, one_shot = world.send(table.SpawnModel(model="tiny")), world.send(infer([1], model="tiny"))
    world.turn(3)
    assert world.error(spawn) is world.error(one_shot) is errors.UnsupportedModel
    assert len(world.kernel.processes) == 0
    world.refuse_load = None
    assert world.spawn() > 0


def test_idle_models_make_room_for_a_new_one(world: World) -> None:
    world.attach()
    done = world.send(infer([1], model="tiny", max_tokens=1))
    world.turn(5)
    world.result(done)
    world.model("other", max_position_embeddings=128)
    world.refuse_load = errors.NeverFits("no memory")
    id_ = world.send(table.SpawnModel(model="other"))
    world.turn(1)
    world.refuse_load = None
    world.turn(3)
    assert world.result(id_).kind == wire.Kind.REPLY
    assert [pool.model for pool in world.kernel.devices["null"].pools] == ["other:latest"]


def test_a_driver_death_is_a_pause_and_a_second_one_is_an_error(world: World) -> None:
    world.attach()
    id_ = world.send(infer([1, 2, 3], model="tiny", max_tokens=30))
    world.turn(8)
    assert 0 < len(world.tokens(id_)) < 30
    world.kernel.tick()  # a step is on the device
    world.die()
    world.attach(2)
    world.turn(40)
    assert world.tokens(id_) == reference([1, 2, 3], 30)
    again = world.send(infer([1, 2, 3], model="tiny", max_tokens=30))
    for worker in (2, 3):
        world.turn(4)
        world.kernel.tick()
        world.die(worker)
        world.attach(worker + 1)
    world.turn(2)
    assert world.error(again) is errors.DeviceFault
    assert world.spawn() > 0


def test_a_worker_that_answers_what_was_not_asked_is_killed(world: World) -> None:
    world.attach()
    world.spawn()
    world.send(infer([1], model="tiny"))
    world.kernel.tick()
    world.kernel.worker_message(1, base.StepDone(base.StepResult(10**6, [], 0.0)))
    world.kernel.worker_message(7, base.Attach("toaster", 55, NullDriver().describe()))
    world.turn()
    assert world.killed == [101, 55]


def test_nothing_is_served_before_hello_or_with_another_table(world: World) -> None:
    world.inbox[b"\0x"] = []
    world.kernel.message(b"\0x", ROOT, wire.encode_request(1, table.Ps(), 0))
    world.kernel.message(b"\0x", ROOT, wire.encode_request(2, table.Hello(table.VERSION, "0" * 16), 0))
    world.kernel.message(b"\0x", ROOT, wire.encode_request(3, table.Ps(), 0))
    world.turn()
    assert world.error(1, b"\0x") is errors.NotGreeted
    assert world.error(2, b"\0x") is errors.VersionMismatch
    assert world.error(3, b"\0x") is errors.NotGreeted


def test_cancel_keeps_the_context_and_answers_once(world: World) -> None:
    world.attach()
    pid = world.spawn()
    id_ = world.send(infer([1, 2], pid=pid, max_tokens=100))
    world.turn(6)
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))
    world.turn(2)
    final = world.result(id_)
    assert final.body["finish"] == "cancelled"
    made = world.tokens(id_)
    assert made == reference([1, 2], len(made))
    more = world.send(infer([5], pid=pid, max_tokens=4))
    world.turn(10)
    assert world.tokens(more) == reference([1, 2, *made, 5], 4)


def test_of_a_whole_context_only_what_is_new_is_computed_and_charged(world: World) -> None:
    world.attach()
    pid = world.spawn()
    first = world.send(infer([*range(1, 41)], pid=pid, max_tokens=5))
    world.turn(10)
    made = world.tokens(first)
    world.send(table.SetQuota("root", t.Quota(tokens_in=60)))
    for wanted, new in (([*range(1, 41), *made, 7], 1), ([*range(1, 31), 9], 1), ([*range(1, 31)], 1)):
        world.sent.clear()
        id_ = world.send(infer(wanted, pid=pid, whole=True, max_tokens=4))
        world.turn(10)
        assert world.tokens(id_) == reference(wanted, 4)
        reply = world.result(id_).body
        assert (reply["prompt_tokens"], reply["context"]) == (new, len(wanted) + 4)
        assert sum(work.count for batch in world.sent for work in batch.work) < 20
    # What is refused changes nothing.
    long = world.send(infer([8] * 50, pid=pid, whole=True, max_tokens=5000))
    world.turn(2)
    assert world.error(long) is errors.ContextOverflow
    assert world.kernel.processes.find(pid, ROOT).tokens[:30] == [*range(1, 31)]


def test_a_busy_process_refuses_a_second_infer_fork_and_truncate(world: World) -> None:
    world.attach()
    pid = world.spawn()
    world.send(infer([1], pid=pid, max_tokens=1000))
    ids = [world.send(call) for call in (infer([2], pid=pid), table.Fork(pid), table.Truncate(pid, 0))]
    world.turn(2)
    assert {world.error(id_) for id_ in ids} == {errors.ProcessBusy}


def test_a_zombie_answers_only_wait(world: World) -> None:
    world.attach()
    pid = world.spawn()
    world.send(table.Kill(pid))
    ids = [world.send(call) for call in (infer([2], pid=pid), table.Fork(pid), table.Truncate(pid, 0))]
    wait = world.send(table.Wait(pid))
    world.turn(2)
    assert {world.error(id_) for id_ in ids} == {errors.ProcessEnded}
    assert world.result(wait).body["exit_code"] == 143


def test_draining_refuses_new_work_lets_the_old_end_and_exits(world: World) -> None:
    world.attach()
    id_ = world.send(infer([1], model="tiny", max_tokens=20))
    world.turn(5)
    world.send(table.Shutdown(drain_s=60))
    late = world.send(infer([1], model="tiny"))
    world.turn(1)
    assert world.error(late) is errors.ShuttingDown
    assert not world.exited
    world.turn(30)
    assert world.exited
    assert world.result(id_).body["finish"] == "length"


def test_limits_are_told_and_hold(tmp_path: Path) -> None:
    world = World(tmp_path, max_processes_per_owner=2, max_requests=3, max_sessions=2)
    world.model("tiny")
    world.attach()
    world.spawn()
    pid = world.spawn()
    third = world.send(table.SpawnModel(model="tiny"))
    forks = world.send(table.Fork(pid))
    world.turn(2)
    assert world.error(third) is world.error(forks) is errors.TooManyProcesses
    waits = [world.send(table.Wait(pid if n == 0 else pid - 1)) for n in range(2)]
    world.send(table.Dmesg(follow=True))
    over = world.send(table.Whoami())
    world.turn()
    assert world.error(over) is errors.QueueFull
    assert not world.answers(waits[0])
    world.send(table.Whoami(), session=b"\0b")
    refused = world.send(table.Whoami(), session=b"\0c")
    world.turn()
    assert world.error(refused, b"\0c") is errors.NotGreeted


def test_a_subtenant_cannot_raise_itself_over_others(world: World) -> None:
    world.attach()
    alice = ROOT.narrowed("alice")
    ids = [
        world.send(call, session=b"\0n", subject=alice)
        for call in (
            table.SpawnModel(model="tiny", nice=-1),
            table.SpawnModel(model="tiny", sched_class=t.SchedClass.REALTIME),
            table.Unlink("/models/tiny"),
            table.Dmesg(),
        )
    ]
    world.turn(2)
    assert {world.error(id_, b"\0n") for id_ in ids} == {errors.PermissionDenied}


def test_dmesg_follows_within_its_credits(world: World) -> None:
    id_ = world.send(table.Dmesg(follow=True), credits_=2)
    for n in range(5):
        world.kernel.log.info(f"line {n}")
    world.turn()
    assert [a.body["text"] for a in world.answers(id_)] == ["line 0", "line 1"]
    world.kernel.message(b"\0a", ROOT, wire.encode_credit(id_, 64))
    world.turn()
    assert [a.body["text"] for a in world.answers(id_)] == [f"line {n}" for n in range(5)]
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))
    world.turn()
    assert world.result(id_).kind == wire.Kind.REPLY


def test_two_pulls_of_one_model_are_one_import_and_the_last_to_leave_stops_it(world: World) -> None:
    first, second = world.send(table.Pull("new")), world.send(table.Pull("new"))
    programs = world.kernel.programs
    (importer,) = programs.to_start
    programs.line(importer.number, {"phase": "download", "file": "x", "done": 1, "total": 2})
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(first))
    world.turn()
    assert world.error(first) is errors.PullFailed
    assert programs.to_stop == []
    world.model("new")
    programs.line(importer.number, {"ok": {}})
    programs.over(importer.number)
    world.turn()
    assert world.result(second).body["path"] == "/models/new:latest"
    third = world.send(table.Pull("newer"))
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(third))
    assert len(programs.to_stop) == 1


def test_detached_processes_outlive_their_client_and_others_do_not(world: World) -> None:
    world.attach()
    kept = world.send(table.SpawnModel(model="tiny", detached=True))
    world.send(table.SpawnModel(model="tiny"))
    world.turn(3)
    world.kernel.disconnected(b"\0a")
    assert [p.pid for p in world.kernel.processes] == [world.result(kept).body["pid"]]


def test_batch_work_yields_to_interactive_within_a_step(world: World) -> None:
    world.attach()
    driver = world.drivers[1]
    one_at_a_time = base.Description(**{**_fields(driver.describe()), "max_sequences": 1})
    world.kernel.devices["null"].description = one_at_a_time
    batch = world.send(infer([1], model="tiny", max_tokens=500, sched_class=t.SchedClass.BATCH))
    world.turn(10)
    made = len(world.tokens(batch))
    chat = world.send(infer([2], model="tiny", max_tokens=20))
    while not world.answers(chat) or world.answers(chat)[-1].kind == wire.Kind.ITEMS:
        world.turn()
    assert world.result(chat).kind == wire.Kind.REPLY
    assert len(world.tokens(batch)) - made <= 4  # two steps in flight when it came, two behind its last


def _fields(description: base.Description) -> dict[str, object]:
    return {name: getattr(description, name) for name in description.__struct_fields__}


def test_queued_work_shows_its_place(world: World) -> None:
    world.attach()
    for n in range(3):
        world.send(infer([n], model="tiny", max_tokens=100, nice=n))
    ps = world.send(table.Ps())
    world.turn(1)
    places = [row["queue_place"] for row in world.result(ps).body["processes"]]
    assert places in ([0, 0, 0], [1, 2, 3])


def test_prompt_scores_come_once_even_when_recomputed(world: World) -> None:
    world.attach()
    prompt = list(range(1, 60))
    id_ = world.send(
        infer(prompt, model="tiny", max_tokens=3, sampling=t.Sampling(prompt_logprobs=True, logprobs=2))
    )
    world.turn(3)
    world.kernel.tick()
    world.die()
    world.attach(2)
    world.turn(20)
    items = [a.body for a in world.answers(id_) if a.kind == wire.Kind.ITEMS]
    scores = [score for item in items for score in item["prompt_logprobs"]]
    assert len(scores) == len(prompt)
    assert scores[0][0] != scores[0][0], "the first token has nothing to be scored by"
    made = [score for item in items for score in item["logprobs"]]
    assert [len(score[1]) for score in made] == [2, 2, 2]


def test_timeouts_that_were_not_needed_leave_nothing(world: World) -> None:
    world.attach()
    pid = world.spawn()
    for _ in range(500):
        id_ = world.send(table.Wait(pid, 1e6))
        world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))
    world.turn()
    assert world.error(id_) is errors.TimedOut
    assert len(world.kernel._timers) < 200


def test_a_flood_of_pulls_is_refused(world: World) -> None:
    ids = [world.send(table.Pull(f"m{n}")) for n in range(6)]
    world.turn()
    assert len(world.kernel.programs.to_start) == 4
    assert [world.error(id_) for id_ in ids[4:]] == [errors.QueueFull, errors.QueueFull]


def test_spawning_and_killing_without_a_step_leaves_nothing(world: World) -> None:
    world.attach()
    for _ in range(50):
        pid = world.spawn()
        world.send(table.Kill(pid))
        world.send(table.Wait(pid))
        world.turn()
    assert world.kernel.devices["null"].pools[0].closes == []


def test_a_slow_reader_gets_everything_in_few_items(world: World) -> None:
    world.attach()
    id_ = world.send(infer([1, 2], model="tiny", max_tokens=40), credits_=1)
    world.turn(4)
    assert len(world.tokens(id_)) == 1
    for _ in range(40):
        world.kernel.message(b"\0a", ROOT, wire.encode_credit(id_, 1))
        world.turn(3)
    assert world.tokens(id_) == reference([1, 2], 40)
    assert world.result(id_).kind == wire.Kind.REPLY


def test_extreme_length_penalties_do_not_reach_the_kernel(world: World) -> None:
    world.attach()
    for penalty in (10.0, -10.0):
        beams = t.Beams(num_beams=2, length_penalty=penalty, early_stopping="never")
        id_ = world.send(infer([1], model="tiny", max_tokens=30, beams=beams))
        world.turn(40)
        assert world.result(id_).kind == wire.Kind.REPLY
    frames = wire.encode_request(99, infer([1], model="tiny", beams=t.Beams(2, length_penalty=99.0)), 0)
    assert isinstance(wire.decode_request(frames), wire.Refused)


def test_pulls_are_named_like_models_and_replace_nothing_for_a_subtenant(world: World) -> None:
    bad = world.send(table.Pull("a\0b"))
    odd = world.send(table.Pull("new", "file:/x\0y"))
    alice = ROOT.narrowed("alice")
    replace = world.send(table.Pull("tiny", "file:/tmp/x"), session=b"\0n", subject=alice)
    link = world.send(table.Link("tiny", "tiny"), session=b"\0n", subject=alice)
    world.turn()
    assert world.error(bad) is world.error(odd) is errors.InvalidArgument
    assert world.error(replace, b"\0n") is world.error(link, b"\0n") is errors.PermissionDenied


def test_a_cancelled_reader_gets_no_more_than_its_credits(world: World) -> None:
    world.attach()
    pid = world.spawn()
    id_ = world.send(infer([1, 2], pid=pid, max_tokens=50), credits_=3)
    world.turn(10)
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))
    world.turn(2)
    items = [a for a in world.answers(id_) if a.kind == wire.Kind.ITEMS]
    assert len(items) == 3
    assert world.result(id_).body["generated_tokens"] == 4  # one more is in the context


def test_an_overlong_prompt_is_refused_whatever_max_tokens(world: World) -> None:
    world.attach()
    ids = [world.send(infer([1] * 5000, model="tiny", max_tokens=n)) for n in (None, 0, 1)]
    world.turn(3)
    assert {world.error(id_) for id_ in ids} == {errors.ContextOverflow}
    assert len(world.kernel.processes) == 0


def test_more_processes_than_a_step_takes_and_little_memory_still_finish(world: World) -> None:
    world.model("small", llmasos_null_blocks=8, max_position_embeddings=128)
    world.attach()
    description = world.kernel.devices["null"].description
    assert description is not None
    few = base.Description(**{**_fields(description), "max_sequences": 2})
    world.kernel.devices["null"].description = few
    ids = [world.send(infer([n] * 30, model="small", max_tokens=80), credits_=999) for n in range(6)]
    world.turn(2000)
    for n, id_ in enumerate(ids):
        assert world.tokens(id_) == reference([n] * 30, 80)


def test_input_that_is_all_shared_prefix_is_answered(world: World) -> None:
    world.attach()
    for _ in range(2):
        id_ = world.send(infer(list(range(17)), model="tiny", max_tokens=0))
        world.turn(5)
        assert world.result(id_).body["generated_tokens"] == 0


def test_the_owner_leaving_answers_others_on_its_process(world: World) -> None:
    world.attach()
    pid = world.spawn()
    id_ = world.send(infer([1], pid=pid, max_tokens=1000), session=b"\0b")
    world.turn(4)
    world.kernel.disconnected(b"\0a")
    world.turn(2)
    assert world.result(id_, b"\0b").body["finish"] == "killed"
    assert len(world.kernel.processes) == 0


def test_after_a_failed_step_the_context_is_computed_anew(world: World) -> None:
    world.attach()
    pid = world.spawn()
    world.send(infer(list(range(20)), pid=pid, max_tokens=0))
    world.turn(3)
    fork = world.send(table.Fork(pid))
    world.turn()
    child = int(world.result(fork).body["pids"][0])
    failing = world.send(infer([5], pid=child, max_tokens=3))
    world.kernel.tick()
    step, *behind = [e.message for e in world.kernel.take_effects() if isinstance(e, ToWorker)]
    assert isinstance(step, base.Step)
    failed = base.Failed(0, step.batch.ticket, errors.to_wire(errors.DeviceFault("x")))
    world.kernel.worker_message(1, failed)
    for message in behind:
        world.answer(1, message)
    world.turn()
    assert world.error(failing) is errors.DeviceFault
    again = world.send(infer([6], pid=child, max_tokens=3))
    world.turn(6)
    assert world.tokens(again) == reference([*range(20), 5, 6], 3)


def test_draining_waits_for_accepted_work_whose_model_is_loading(world: World) -> None:
    id_ = world.send(infer([1], model="tiny", max_tokens=3))
    world.send(table.Shutdown(drain_s=60))
    world.turn(2)
    assert not world.exited
    world.attach()
    world.turn(10)
    assert world.result(id_).body["generated_tokens"] == 3
    assert world.exited


def test_one_copy_of_a_model_however_early_it_was_asked_for(world: World) -> None:
    world.send(table.SpawnModel(model="tiny"))
    world.turn()
    world.attach()
    world.send(table.SpawnModel(model="tiny"))
    world.turn(3)
    assert len(world.kernel.devices["null"].pools) == 1


def test_detached_zombies_go_with_their_parent(world: World) -> None:
    world.attach()
    pid = world.spawn()
    fork = world.send(table.Fork(pid, detached=True))
    world.turn()
    world.send(table.Kill(int(world.result(fork).body["pids"][0])))
    world.send(table.Kill(pid))
    world.send(table.Wait(pid))
    world.turn()
    assert len(world.kernel.processes) == 0


def test_a_model_is_loaded_again_only_for_another_dtype(world: World) -> None:
    world.attach()

    def pools(dtype: str) -> int:
        world.send(table.SpawnModel(model="tiny", dtype=dtype))
        world.turn(3)
        return len(world.kernel.devices["null"].pools)

    # The null driver takes float32 where it is asked for nothing.
    assert [pools(dtype) for dtype in ("", "", "float32", "bfloat16", "bfloat16", "")] == [1, 1, 1, 2, 2, 2]
    refused = world.send(table.SpawnModel(model="tiny", dtype="int4"))
    world.turn(3)
    assert world.error(refused) is errors.UnsupportedModel
    odd = wire.encode_request(5, table.SpawnModel(model="tiny", dtype="int3"), 0)
    assert isinstance(wire.decode_request(odd), wire.Refused)


def test_the_driver_hears_what_contexts_are_kept_in_and_where_to_keep_what_it_makes(tmp_path: Path) -> None:
    world = World(tmp_path, kv_dtype="bfloat16")
    world.model("tiny")
    specs: list[base.LoadSpec] = []
    load = NullDriver.load
    world.attach()
    world.drivers[1].load = lambda spec: specs.append(spec) or load(world.drivers[1], spec)  # type: ignore
    world.spawn()
    (spec,) = specs
    assert (spec.dtype, spec.kv_dtype, spec.derived) == ("", "bfloat16", str(world.store.derived))
    lsdev = world.send(table.Lsdev())
    world.turn()
    (pool,) = world.result(lsdev).body["devices"][0]["pools"]
    assert (pool["dtype"], pool["kv_dtype"]) == ("float32", "bfloat16")
    assert pool["engine"] == "hashes of the history"


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("2", 1), ("0,1,", 2), ("", 0), ("-1", 0), ("MIG-1,MIG-2", 2)]
)
def test_devices_are_those_that_cuda_shows(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    monkeypatch.setattr("glob.glob", lambda pattern: [f"/dev/nvidia{index}" for index in range(4)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_names(Config()) == ["cpu", *(f"cuda:{index}" for index in range(count))]
