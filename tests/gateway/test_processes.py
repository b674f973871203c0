"""Processes and the machine over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import transformers
from llmasos.syscalls import table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.gateway.access import ApiKeys, folder

from ..boot.tiny import write_tiny
from .conftest import Gateway, soon

TINY = transformers.LlamaConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


@pytest.fixture
def bob(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.http("bob") as client:
        yield client


@pytest.fixture
def carol(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.http("carol") as client:
        yield client


@pytest.fixture
def pid(http: httpx.Client) -> Iterator[int]:
    made = http.post("/v1/processes", json={"model": "slow", "label": "mine"})
    assert made.status_code == 201
    assert made.json()["owner"] == "alice"
    yield made.json()["pid"]
    http.delete(f"/v1/processes/{made.json()['pid']}")


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_nobody_learns_or_takes_the_turn_of_another_s_process(
    http: httpx.Client, bob: httpx.Client, pid: int
) -> None:
    body = {"model": "slow", "prompt": "w1", "max_tokens": 400, "pid": pid, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        told = [bob.post("/v1/completions", json={**body, "pid": which}) for which in (pid, 2**40)]
        assert [one.status_code for one in told] == [404, 404]
        assert http.post("/v1/completions", json=body).status_code == 409


def test_a_process_lives_over_http(http: httpx.Client, pid: int) -> None:
    row = http.get(f"/v1/processes/{pid}").json()
    assert (row["name"], row["model"], row["state"], row["nice"]) == ("mine", "slow:latest", "waiting", 0)
    assert pid in [row["pid"] for row in http.get("/v1/processes").json()["data"]]
    changed = http.patch(f"/v1/processes/{pid}", json={"nice": 5, "sched_class": "batch"}).json()
    assert (changed["nice"], changed["sched_class"]) == (5, "batch")
    assert http.patch(f"/v1/processes/{pid}", json={}).json()["nice"] == 5
    for signal, state in (("STOP", "stopped"), ("CONT", "waiting")):
        assert http.post(f"/v1/processes/{pid}/signal", json={"signal": signal}).status_code == 200
        assert http.get(f"/v1/processes/{pid}").json()["state"] == state
    assert http.delete(f"/v1/processes/{pid}").json() == {"pid": pid, "deleted": True}
    assert http.get(f"/v1/processes/{pid}").status_code == 404
    assert http.delete(f"/v1/processes/{pid}").status_code == 404


def test_a_conversation_goes_on_in_the_process(http: httpx.Client, pid: int) -> None:
    said = [{"role": "user", "content": "w1 w2"}]
    asked = {"model": "slow", "messages": said, "max_tokens": 3, "temperature": 0, "pid": pid}
    first = http.post("/v1/chat/completions", json=asked).json()
    assert first["pid"] == pid
    said.append({"role": "assistant", "content": first["choices"][0]["message"]["content"]})
    said.append({"role": "user", "content": "w3"})
    again = http.post("/v1/chat/completions", json={**asked, "messages": said}).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_running_answer_is_stopped_and_killed_from_elsewhere(http: httpx.Client, pid: int) -> None:
    asked = {
        "model": "slow",
        "messages": [{"role": "user", "content": "w1"}],
        "max_tokens": 400,
        "temperature": 0,
        "pid": pid,
        "stream": True,
    }
    with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        http.post(f"/v1/processes/{pid}/signal", json={"signal": "STOP"})
        soon(lambda: http.get(f"/v1/processes/{pid}").json()["state"] == "stopped")
        assert http.delete(f"/v1/processes/{pid}").status_code == 200
        assert any('"finish_reason":"killed"' in line for line in lines)


def test_others_processes_are_not_there(bob: httpx.Client, kernel: Client, pid: int) -> None:
    path = f"/v1/processes/{pid}"
    assert bob.get(path).status_code == 404
    assert bob.delete(path).status_code == 404
    assert bob.patch(path, json={"nice": 1}).status_code == 404
    assert bob.post(f"{path}/signal", json={"signal": "KILL"}).status_code == 404
    assert pid not in [row["pid"] for row in bob.get("/v1/processes").json()["data"]]
    assert kernel.call(table.StatProcess(pid)).state is t.State.WAITING


def test_rights_hold_over_http(http: httpx.Client, pid: int) -> None:
    for body in ({"nice": -5}, {"sched_class": "realtime"}):
        refused = http.patch(f"/v1/processes/{pid}", json=body)
        assert refused.status_code == 403
        told = refused.json()["error"]["message"]
        assert told.endswith("(llsh key api new NAME --as alice --right priority)")
    pull = http.post("/v1/models/pull", json={"model": "smollm2"})
    assert pull.status_code == 403
    assert pull.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/processes/0", None),
        ("GET", "/v1/processes/x", None),
        ("GET", "/v1/processes?limit=0", None),
        ("POST", "/v1/processes/1/signal", {"signal": "HUP"}),
        ("POST", "/v1/processes/1/signal", {}),
        ("PATCH", "/v1/processes/1", {"nice": 20}),
        ("PATCH", "/v1/processes/1", {"priority": 1}),
        ("POST", "/v1/processes", {"model": "tiny", "nice": "low"}),
        ("POST", "/v1/models/pull", {"model": ""}),
    ],
)
def test_nonsense_is_refused(http: httpx.Client, method: str, path: str, body: object) -> None:
    assert http.request(method, path, json=body).status_code == 400


def test_the_list_comes_in_pages(http: httpx.Client) -> None:
    made = [http.post("/v1/processes", json={"model": "tiny"}).json()["pid"] for _ in range(3)]
    page = http.get("/v1/processes", params={"limit": 2, "after": made[0] - 1}).json()
    assert [row["pid"] for row in page["data"]] == made[:2]
    assert page["has_more"]
    rest = http.get("/v1/processes", params={"after": made[1]}).json()
    assert [row["pid"] for row in rest["data"]] == made[2:]
    assert not rest["has_more"]
    for pid in made:
        http.delete(f"/v1/processes/{pid}")


def test_the_machine_says_what_it_has_and_who_uses_it(
    http: httpx.Client, bob: httpx.Client, pid: int
) -> None:
    asked = {"model": "slow", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 3, "pid": pid}
    http.post("/v1/chat/completions", json=asked)
    seen = http.get("/v1/system").json()
    assert seen["tenant"] == "alice"
    assert seen["rights"] == ["infer", "process", "see"]
    assert [device["name"] for device in seen["devices"]] == ["null"]
    assert 0 < seen["disk"]["free"] <= seen["disk"]["total"]
    pool = next(pool for pool in seen["pools"] if pool["model"] == "slow:latest")
    assert pool["owners"]["alice"] >= 1
    assert pool["owners"]["alice"] <= pool["used"] <= pool["total"]
    other = next(pool for pool in bob.get("/v1/system").json()["pools"] if pool["model"] == "slow:latest")
    assert "alice" not in other["owners"]
    assert {row["path"] for row in seen["quotas"]} <= {"alice"}


def test_a_model_comes_in_with_its_progress(gateway: Gateway, carol: httpx.Client, tmp_path: Path) -> None:
    write_tiny(tmp_path, TINY)
    body = {"model": "brought", "source": f"file:{tmp_path}"}
    assert carol.post("/v1/models/pull", json=body).status_code == 403  # files of the server are not for her
    keys = ApiKeys(folder())
    rights = (*t.TENANT_RIGHTS, t.Capability.MODELS, t.Capability.FILES)
    headers = {"authorization": f"Bearer {keys.make('dave', 'dave', rights)}"}
    soon(lambda: httpx.get(f"{gateway.url}/v1/models", headers=headers).status_code == 200)
    with httpx.stream("POST", f"{gateway.url}/v1/models/pull", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        told = events(answer)
    assert all(0 <= step["done"] <= step["total"] for step in told[:-1] if step["total"])
    assert (told[-1]["phase"], told[-1]["model"]) == ("done", "brought")
    assert "brought" in [model["id"] for model in carol.get("/v1/models").json()["data"]]
    keys.revoke("dave")


def test_what_does_not_train_has_no_curve(http: httpx.Client, pid: int) -> None:
    assert http.get(f"/v1/runs/{pid}/events").status_code == 400
    assert http.get("/v1/runs/999999/events").status_code == 404


def test_a_process_answers_one_request_at_a_time(http: httpx.Client, pid: int) -> None:
    asked = {"model": "slow", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 40, "pid": pid}
    with http.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        busy = http.post("/v1/chat/completions", json=asked | {"max_tokens": 2})
        assert busy.status_code == 409
        for _ in lines:
            pass
    assert http.post("/v1/chat/completions", json=asked | {"max_tokens": 2}).status_code == 200
    assert http.post("/v1/chat/completions", json=asked | {"temperature": 9}).status_code == 400
    assert http.post("/v1/chat/completions", json=asked | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 100_000}, {"max_tokens": 2, "structured_outputs": {"regex": "(("}}]
)
def test_a_refused_request_leaves_no_process_and_takes_no_context(
    http: httpx.Client, pid: int, wrong: dict[str, Any]
) -> None:
    asked = {"model": "slow", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=asked | {"pid": pid}).status_code == 200

    def pids() -> list[int]:
        return sorted(row["pid"] for row in http.get("/v1/processes").json()["data"])

    before = pids()
    assert http.post("/v1/chat/completions", json=asked | wrong | {"pid": "new"}).status_code == 400
    assert http.post("/v1/chat/completions", json=asked | wrong | {"fork_of": pid}).status_code == 400
    soon(lambda: pids() == before)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 100_000}, {"max_tokens": 2, "structured_outputs": {"regex": "(("}}]
)
def test_what_is_refused_does_not_cut_the_process(
    http: httpx.Client, pid: int, wrong: dict[str, Any]
) -> None:
    asked = {"model": "slow", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 2, "pid": pid}
    http.post("/v1/chat/completions", json=asked)
    before = http.get(f"/v1/processes/{pid}").json()["context"]
    other = asked | {"messages": [{"role": "user", "content": "w9"}]} | wrong
    assert http.post("/v1/chat/completions", json=other).status_code == 400
    assert http.get(f"/v1/processes/{pid}").json()["context"] == before
