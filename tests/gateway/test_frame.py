"""What every route shares: keys, bounds, ids, and who may come in at all."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from getpass import getuser
from pathlib import Path

import httpx
import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.gateway import http as frame
from llmasos.userland.gateway import record
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.http import LONG, MOST_BODY, aside

from .conftest import Gateway, serve, soon


@pytest.fixture(scope="module")
def open_gateway(home: Path) -> Iterator[Gateway]:
    """One without keys, for this machine only."""
    yield from serve({})


def test_answers_have_an_id_and_take_the_callers(http: httpx.Client) -> None:
    assert http.get("/v1/models").headers["x-request-id"].startswith("req_")
    assert http.get("/livez", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")


def test_the_gateway_says_how_it_is(gateway: Gateway) -> None:
    for path in ("/livez", "/health", "/readyz", "/version"):
        assert httpx.get(gateway.url + path).status_code == 200


def test_a_key_is_asked_for_and_only_its_hash_is_kept(gateway: Gateway) -> None:
    for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "Basic abc"}):
        answer = httpx.get(f"{gateway.url}/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert (
        httpx.get(f"{gateway.url}/v1/models", headers={"x-api-key": gateway.keys["bob"]}).status_code == 200
    )
    kept = "".join(file.read_text() for file in folder().iterdir())
    assert not any(key in kept for key in gateway.keys.values())


def test_a_revoked_key_is_shut_out(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path)
    key = keys.make("ci", "alice", t.TENANT_RIGHTS)
    again = ApiKeys(tmp_path)
    found = again.find(key)
    assert found is not None
    assert (found.tenant, found.rights) == ("alice", t.TENANT_RIGHTS)
    with pytest.raises(errors.AlreadyExists):
        again.make("ci", "bob", t.TENANT_RIGHTS)
    again.revoke("ci")
    assert ApiKeys(tmp_path).find(key) is None
    with pytest.raises(errors.NoSuchKey):
        again.revoke("../ci")
    with pytest.raises(errors.InvalidArgument):
        again.make("root", "root", (t.Capability.ADMIN,))


def test_a_damaged_key_file_lets_nobody_in(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path)
    keys.make("a", "alice", t.TENANT_RIGHTS)
    (tmp_path / "b.toml").write_text("tenant = 'bob'\nsha256 = ''\n")
    assert [key.tenant for key in keys.all()] == ["alice"]
    assert keys.problems


def test_bodies_are_bounded(http: httpx.Client) -> None:
    long = http.post("/v1/chat/completions", content=b"x" * (MOST_BODY + 1))
    assert long.status_code == 413
    for text in ("{", "[]", '"x"', '{"model": 1}', "[" * 100_000):
        answer = http.post("/v1/chat/completions", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 400, text[:10]
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_is_told_what_it_should_be(http: httpx.Client) -> None:
    for content, kind in ((b"{}", "application/x-www-form-urlencoded"), (b"[]", "application/json")):
        answer = http.post("/v1/chat/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == 400
        assert "application/json" in answer.json()["error"]["message"]


def test_tenants_do_not_see_each_other(gateway: Gateway, kernel: Client) -> None:
    with gateway.http("alice") as alice, gateway.http("bob") as bob:
        body = {"model": "tiny", "prompt": "w1", "max_tokens": 1}
        pid = alice.post("/v1/completions", json={**body, "pid": "new"}).json()["pid"]
        assert alice.post("/v1/completions", json={**body, "pid": pid}).status_code == 200
        assert bob.post("/v1/completions", json={**body, "pid": pid}).status_code == 404
        assert bob.post("/v1/completions", json={**body, "fork_of": pid}).status_code == 404
    kernel.kill(pid)


def test_without_keys_only_this_machine_comes_in(open_gateway: Gateway) -> None:
    with open_gateway.http() as http:
        assert http.get("/v1/models").status_code == 200
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            assert http.get("/v1/models", headers=headers).status_code == 403
        host = open_gateway.url.removeprefix("http://")
        assert http.get("/v1/models", headers={"origin": f"http://{host}"}).status_code == 200


def test_who_comes_without_a_key_changes_no_models(open_gateway: Gateway, home: Path) -> None:
    """Neither the gateway nor the kernel lets him: he is a label of an administrator."""
    with open_gateway.http() as http:
        copy = http.post("/api/copy", json={"source": "tiny", "destination": "stolen"})
        body = {"model": "stolen", "source": f"file:{home}"}
        pull = http.post("/v1/models/pull", json=body)
        train = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": "file-x"})
        assert {copy.status_code, pull.status_code, train.status_code} == {403}
        assert "without a key" in train.json()["error"]["message"]
        for error, right in ((train.json()["error"]["message"], "train"), (copy.json()["error"], "models")):
            assert f"(llsh key api new NAME --as {getuser()} --right {right})" in error
        assert http.get("/v1/models/stolen").status_code == 404


def test_a_model_that_is_not_seen_is_named_with_the_ways_to_it(
    gateway: Gateway, open_gateway: Gateway
) -> None:
    body = {"prompt": "w1", "max_tokens": 1}
    told = {}
    for one, model in itertools.product((gateway, open_gateway), ("tinny", "tiny+facts")):
        with one.http() as http:
            answer = http.post("/v1/completions", json={**body, "model": model})
            assert answer.status_code == 404
            told[one is gateway, model] = answer.json()["error"]["message"]
    assert all("llsh list" in message for message in told.values())
    assert [key for key, message in told.items() if "llsh pull" in message] == [
        (True, "tinny"),
        (False, "tinny"),
    ]
    mine = f"llsh key api new NAME --as {getuser()}"
    assert [key for key, message in told.items() if mine in message] == [
        (False, "tinny"),
        (False, "tiny+facts"),
    ]


def test_quotas_are_told_and_kept(gateway: Gateway, kernel: Client) -> None:
    kernel.call(table.SetQuota("dora", t.Quota(queue=1, tokens_out=60)))
    key = ApiKeys(folder()).make("dora", "dora", t.TENANT_RIGHTS)
    body = {"model": "slow", "prompt": "w1", "max_tokens": 400, "stream": True, "temperature": 0}
    with httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}) as dora:
        soon(lambda: dora.get("/v1/models").status_code == 200)
        with dora.stream("POST", "/v1/completions", json=body) as running:
            assert running.status_code == 200
            assert running.headers["x-ratelimit-limit-tokens"] == "60"
            refused = dora.post("/v1/completions", json=body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["x-ratelimit-limit-requests"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
    ApiKeys(folder()).revoke("dora")
    kernel.call(table.SetQuota("dora", None))


def test_tokens_and_back(http: httpx.Client) -> None:
    found = http.post("/tokenize", json={"model": "tiny", "prompt": "w1 w2"}).json()
    assert (found["count"], found["tokens"]) == (2, [1, 2])
    back = http.post("/detokenize", json={"model": "tiny", "tokens": [1, 2]}).json()
    assert back == {"prompt": "w1 w2"}
    assert http.post("/detokenize", json={"model": "tiny", "tokens": [10**6]}).status_code == 400
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "w1"}]}
    assert http.post("/tokenize", json=chat).json()["count"] > 1


def test_headers_without_an_end_are_cut_off(gateway: Gateway) -> None:
    url = httpx.URL(gateway.url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n")
        with suppress(OSError):  # it hangs up in the middle
            for number in range(64):
                connection.sendall(b"x%d: " % number + b"y" * (1 << 20) + b"\r\n")
            pytest.fail("64 MB of headers were taken")
    long = {"x-long": "y" * 20_000}
    with httpx.Client(base_url=gateway.url) as client:
        assert [client.get("/livez", headers=long).status_code for _ in range(4)] == [200] * 4
        assert client.post("/livez", content=b"z" * 200_000).status_code == 405
        assert client.get("/livez").status_code == 200


def test_long_texts_are_worked_on_beside_the_event_loop() -> None:
    async def beside(received: int) -> bool:
        record.begin(record.Record("id", "POST", "/", received=received))
        return await aside(threading.get_ident) != threading.get_ident()

    assert not asyncio.run(beside(LONG))
    assert asyncio.run(beside(LONG + 1))


def test_after_a_short_text_that_took_long_all_are_worked_on_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frame, "_wary_until", 0.0)

    async def beside() -> list[bool]:
        record.begin(record.Record("id", "POST", "/"))
        here = threading.get_ident()
        first = await aside(threading.get_ident) != here
        until = time.thread_time() + 2 * frame.LATE_S
        await aside(lambda: next(None for _ in iter(int, 1) if time.thread_time() > until))
        return [first, await aside(threading.get_ident) != here]

    assert asyncio.run(beside()) == [False, True]
