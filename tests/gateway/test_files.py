"""Files of tenants through OpenAI's client, and the store that keeps them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from llmasos.userland.gateway import store as stores
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.openai import files
from llmasos.userland.gateway.store import Kept, Store

from .conftest import Gateway, soon


@pytest.fixture
def ai(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0) as client:
        yield client


def test_a_file_is_brought_read_and_deleted(ai: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 100_000)
    with path.open("rb") as source:
        made = ai.files.create(file=source, purpose="user_data")
    assert (made.bytes, made.filename, made.purpose) == (900_000, "lines.jsonl", "user_data")
    assert made.expires_at is None
    assert ai.files.retrieve(made.id) == made
    assert ai.files.content(made.id).read() == path.read_bytes()
    assert made.id in [file.id for file in ai.files.list()]
    assert ai.files.delete(made.id).deleted
    for call in (ai.files.retrieve, ai.files.content, ai.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_lists_come_in_pages_by_purpose(ai: openai.OpenAI) -> None:
    made = [ai.files.create(file=(f"{n}.txt", b"x"), purpose="evals").id for n in range(3)]
    newest = [file.id for file in ai.files.list(purpose="evals", limit=2)]  # the client asks for all pages
    assert newest == made[::-1]
    page = ai.files.list(purpose="evals", limit=2, order="asc")
    assert [file.id for file in page.data] == made[:2]
    assert page.has_more
    assert [file.id for file in page.get_next_page().data] == made[2:]
    for each in made:
        ai.files.delete(each)
    assert not ai.files.list(purpose="evals").data


def test_files_of_batches_expire(ai: openai.OpenAI) -> None:
    made = ai.files.create(file=("b.jsonl", b"{}"), purpose="batch")
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == files.BATCH_S
    soon = ai.files.create(
        file=("b.jsonl", b"{}"),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert soon.expires_at == soon.created_at + 3600


def test_who_may_only_see_writes_nothing(ai: openai.OpenAI, gateway: Gateway) -> None:
    """Also where the kernel is not asked, or only afterwards."""
    file = ai.files.create(file=("b.jsonl", b"{}"), purpose="batch").id
    answer = ai.responses.create(model="tiny", input="w1", max_output_tokens=1).id
    keys = ApiKeys(folder())
    headers = {"authorization": f"Bearer {keys.make('onlooker', 'alice', (t.Capability.SEE,))}"}
    batch = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    asked = {"model": "tiny", "input": "w1", "background": True}
    with httpx.Client(base_url=f"{gateway.url}/v1", headers=headers) as http:
        soon(lambda: http.get(f"/files/{file}").status_code == 200)
        told = [
            http.post("/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}),
            http.delete(f"/files/{file}"),
            http.post("/batches", json=batch),
            http.post("/batches/batch_1/cancel"),
            http.post("/responses", json=asked),
            http.post(f"/responses/{answer}/cancel"),
            http.delete(f"/responses/{answer}"),
            *(http.post(f"/fine_tuning/jobs/ftjob-1/{what}") for what in ("cancel", "pause", "resume")),
        ]
    keys.revoke("onlooker")
    assert [(one.status_code, one.json()["error"]["code"]) for one in told] == [
        (403, "permission_denied")
    ] * 10
    assert ai.responses.retrieve(answer).id == answer
    ai.files.delete(file)


def test_only_the_owner_sees_a_file(ai: openai.OpenAI, gateway: Gateway) -> None:
    made = ai.files.create(file=("mine.txt", b"secret"), purpose="user_data")
    with gateway.http("bob") as bob:
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert bob.request(method, f"/v1/files/{made.id}{path}").status_code == 404
        assert made.id not in [file["id"] for file in bob.get("/v1/files").json()["data"]]
        assert bob.get("/v1/files", params={"after": made.id}).status_code == 404
    assert ai.files.content(made.id).read() == b"secret"


def test_uploads_are_bounded_and_checked(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def upload(body: bytes = b"x", **fields: str) -> httpx.Response:
        return http.post("/v1/files", files={"file": ("a.txt", body)}, data=fields)

    monkeypatch.setattr(files, "MOST_UPLOAD", 10_000)
    assert upload(b"x" * 20_000, purpose="user_data").status_code == 413
    monkeypatch.undo()
    assert upload(purpose="nothing").json()["error"]["param"] == "purpose"
    assert upload(b"", purpose="batch").json()["error"]["param"] == "file"
    assert upload(purpose="batch", colour="red").json()["error"]["param"] == "colour"
    late = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "1"}
    assert upload(purpose="batch", **late).json()["error"]["param"] == "expires_after"
    assert http.post("/v1/files", json={"purpose": "batch"}).status_code == 400
    assert (
        http.post("/v1/files", content=b"--x", headers={"content-type": "multipart/form-data"}).status_code
        == 400
    )
    monkeypatch.setattr(stores, "MOST_BYTES", 10)
    assert upload(purpose="user_data").status_code == 429


def test_what_expired_is_gone(tmp_path: Path) -> None:
    async def story() -> None:
        store = Store(tmp_path)
        old, kept = Kept("a", "file", "old", {}, {}, int(time.time()) - 1), Kept("a", "file", "kept", {}, {})
        for one in (old, kept):
            store.path(one.id).write_bytes(b"x")
            await store.add(one)
        with pytest.raises(errors.NotFound):
            await store.get("a", "file", "old")
        store.path("torn").write_bytes(b"x")  # an upload that was cut short long ago
        for name in ("old", "torn"):
            long_ago = time.time() - stores.UNFINISHED_S - 1
            os.utime(store.path(name), (long_ago, long_ago))
        await store.purge()
        assert [path.name for path in (tmp_path / "files").iterdir()] == ["kept"]
        store.close()

    asyncio.run(story())


def test_work_of_a_gateway_that_is_gone_is_anothers(tmp_path: Path) -> None:
    async def story() -> None:
        first, second = Store(tmp_path), Store(tmp_path)
        await first.add(Kept("a", "batch", "b1", {}, {}, held=True))
        await first.add(Kept("a", "batch", "done", {}, {}))
        assert await second.orphans("batch") == []
        first.close()
        (found,) = await second.orphans("batch")
        assert found.id == "b1"
        third = Store(tmp_path)
        assert await third.orphans("batch") == []
        second.close()
        third.close()

    asyncio.run(story())


def test_lines_are_written_once(tmp_path: Path) -> None:
    async def story() -> None:
        store = Store(tmp_path)
        batch = Kept("a", "batch", "b1", {"n": 0}, {})
        await store.add(batch)

        def adding(*lines: tuple[int, str]) -> Callable[[Kept], list[tuple[int, str]]]:
            def change(now: Kept) -> list[tuple[int, str]]:
                now.body["n"] += 1
                return list(lines)

            return change

        await store.change(batch, adding((0, "first"), (2, "third")))
        await store.change(batch, adding((1, "second")))
        with pytest.raises(errors.StorageFailed):  # nothing of it happens
            await store.change(batch, adding((3, "fourth"), (0, "again")))
        assert (await store.get("a", "batch", "b1")).body == {"n": 2}
        assert await store.lines("b1") == [(0, "first"), (1, "second"), (2, "third")]
        assert await store.lines("b1", after=0, limit=1) == [(1, "second")]
        assert await store.lines("b1", limit=2, newest_first=True) == [(2, "third"), (1, "second")]
        file = Kept("a", "file", "f1", {}, {})
        assert (await store.change(batch, adding(), bear=[file], without_lines=True)).body == {"n": 3}
        assert (await store.get("a", "file", "f1")).id == "f1"
        assert await store.lines("b1") == []
        store.close()

    asyncio.run(story())
