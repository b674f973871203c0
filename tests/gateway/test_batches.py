"""Batches through OpenAI's client, over the ends of gateways and kernels."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
from llmasos.syscalls import table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.openai import batches
from llmasos.userland.gateway.store import Store, gateway_folder

from .conftest import Gateway, serve, soon

CHAT = "/v1/chat/completions"


@pytest.fixture
def ai(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with client(gateway) as made:
        yield made


def client(gateway: Gateway, tenant: str = "alice") -> openai.OpenAI:
    key = gateway.keys.get(tenant, "none")
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def chat(number: int, **extra: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"w{number}"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 3, "temperature": 0, **extra}


def upload(ai: openai.OpenAI, bodies: list[dict[str, Any]], url: str = CHAT) -> str:
    lines = [
        json.dumps({"custom_id": f"r{number}", "method": "POST", "url": url, "body": body})
        for number, body in enumerate(bodies)
    ]
    return ai.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch").id


def begin(ai: openai.OpenAI, file: str, url: Any = CHAT, **options: Any) -> str:
    return ai.batches.create(input_file_id=file, endpoint=url, completion_window="24h", **options).id


def ended(ai: openai.OpenAI, id: str, patience_s: float = 120) -> Any:
    soon(lambda: ai.batches.retrieve(id).status in batches.ENDED, patience_s)
    return ai.batches.retrieve(id)


def until_done(ai: openai.OpenAI, id: str, count: int) -> None:
    def done() -> int:
        counts = ai.batches.retrieve(id).request_counts
        return counts.completed if counts else 0

    soon(lambda: done() >= count, 60)


def lines(ai: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ai.files.content(file).text.splitlines()] if file else []


def test_each_line_has_its_answer(ai: openai.OpenAI) -> None:
    bodies = [chat(n) for n in range(40)]
    bodies[7] = chat(7, model="nobody")
    bodies[8] = chat(8, temperature=9)
    bodies[9] = chat(9, stream=True)
    id = begin(ai, upload(ai, bodies), metadata={"of": "me"})
    batch = ended(ai, id)
    assert (batch.status, batch.metadata, batch.model) == ("completed", {"of": "me"}, None)
    assert batch.request_counts.to_dict() == {"total": 40, "completed": 37, "failed": 3}
    good, bad = lines(ai, batch.output_file_id), lines(ai, batch.error_file_id)
    assert [line["custom_id"] for line in good] == [f"r{n}" for n in range(40) if n not in (7, 8, 9)]
    for line in good[:3]:
        whole = ai.chat.completions.create(**chat(int(line["custom_id"][1:])))
        body = line["response"]["body"]
        assert body["choices"][0]["message"]["content"] == whole.choices[0].message.content
        assert body["service_tier"] == "batch"
    codes = {line["custom_id"]: line["response"]["status_code"] for line in bad}
    assert codes == {"r7": 404, "r8": 400, "r9": 400}
    assert bad[1]["response"]["body"]["error"]["param"] == "temperature"
    assert batch.usage.output_tokens == 3 * 37
    assert batch.usage.input_tokens == sum(
        line["response"]["body"]["usage"]["prompt_tokens"] for line in good
    )
    assert id in [one.id for one in ai.batches.list()]


def test_other_requests_come_in_batches_too(ai: openai.OpenAI) -> None:
    text = {"model": "encoder", "input": ["w1", "w2 w3"]}
    batch = ended(ai, begin(ai, upload(ai, [text], "/v1/embeddings"), "/v1/embeddings"))
    (line,) = lines(ai, batch.output_file_id)
    made = ai.embeddings.create(**text, encoding_format="float")
    assert [row["embedding"] for row in line["response"]["body"]["data"]] == [
        row.embedding for row in made.data
    ]
    assert batch.usage.input_tokens == made.usage.prompt_tokens
    late = {"model": "encoder", "input": ["w1 w2"] * 2000, "deadline_ms": 1}
    batch = ended(ai, begin(ai, upload(ai, [late], "/v1/embeddings"), "/v1/embeddings"))
    (line,) = lines(ai, batch.error_file_id)
    assert line["response"]["status_code"] == 408
    prompt = {"model": "tiny", "prompt": "w1", "max_tokens": 2, "temperature": 0}
    batch = ended(ai, begin(ai, upload(ai, [prompt], "/v1/completions"), "/v1/completions"))
    (line,) = lines(ai, batch.output_file_id)
    assert line["response"]["body"]["choices"][0]["text"] == ai.completions.create(**prompt).choices[0].text
    asked = {"model": "tiny", "input": "w1", "max_output_tokens": 2, "temperature": 0}
    batch = ended(ai, begin(ai, upload(ai, [asked], "/v1/responses"), "/v1/responses"))
    (line,) = lines(ai, batch.output_file_id)
    kept = ai.responses.retrieve(line["response"]["body"]["id"])
    assert kept.output_text == ai.responses.create(**asked).output_text
    assert batch.usage.output_tokens == 2


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("{", "invalid_json_line", 1),
        ('{"custom_id": "a"}', "invalid_json_line", 1),
        ("[" * 100_000, "invalid_json_line", 1),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}', "mismatched_url", 1),
        (
            f'{{"custom_id": "a", "method": "POST", "url": "{CHAT}", "body": {{}}}}\n' * 2,
            "duplicate_custom_id",
            2,
        ),
        ("\n\n", "empty_file", None),
    ],
)
def test_files_are_looked_through_first(ai: openai.OpenAI, text: str, code: str, line: int | None) -> None:
    file = ai.files.create(file=("in.jsonl", text.encode()), purpose="batch").id
    batch = ended(ai, begin(ai, file))
    assert batch.status == "failed"
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, line)
    assert batch.output_file_id is None


def test_files_and_errors_are_bounded(ai: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_LINES", 3)
    batch = ended(ai, begin(ai, upload(ai, [chat(1)] * 10)))
    assert [error.code for error in batch.errors.data] == ["too_many_tasks"]
    monkeypatch.undo()
    monkeypatch.setattr(batches, "MOST_BODY", 1000)
    batch = ended(ai, begin(ai, upload(ai, [chat(1, user="x" * 2000)])))
    assert [error.code for error in batch.errors.data] == ["line_too_long"]
    monkeypatch.undo()
    bad = ai.files.create(file=("in.jsonl", b"{\n" * 1000), purpose="batch").id
    assert len(ended(ai, begin(ai, bad)).errors.data) == batches.MOST_ERRORS


def test_what_cannot_be_a_batch_is_refused(ai: openai.OpenAI, gateway: Gateway) -> None:
    file = upload(ai, [chat(1)])
    for url, input_file, error in (
        ("/v1/images/edits", file, openai.BadRequestError),
        (CHAT, "file-none", openai.NotFoundError),
        (CHAT, ai.files.create(file=("x", b"x"), purpose="user_data").id, openai.BadRequestError),
    ):
        with pytest.raises(error):
            begin(ai, input_file, url)
    id = begin(ai, file)
    with client(gateway, "bob") as bob:
        for call in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(id)
        with pytest.raises(openai.NotFoundError):
            begin(bob, file)
        assert id not in [one.id for one in bob.batches.list()]
    ended(ai, id)


def test_a_batch_is_cancelled_with_what_is_done(ai: openai.OpenAI, kernel: Client) -> None:
    bodies = [chat(n, model="slow", max_tokens=400 if n else 1) for n in range(30)]
    id = begin(ai, upload(ai, bodies))
    until_done(ai, id, 1)
    rows = [row for row in kernel.ps() if row.owner == "alice"]
    assert 0 < len(rows) <= batches.MOST_AT_ONCE
    assert {row.sched_class for row in rows} == {t.SchedClass.BATCH}
    assert ai.batches.cancel(id).status == "cancelling"
    batch = ended(ai, id)
    assert batch.status == "cancelled"
    assert [line["custom_id"] for line in lines(ai, batch.output_file_id)] == ["r0"]
    assert batch.error_file_id is None
    soon(lambda: not [row for row in kernel.ps() if row.owner == "alice"])
    with pytest.raises(openai.ConflictError):
        ai.batches.cancel(ended(ai, begin(ai, upload(ai, [chat(1)]))).id)


def test_what_is_late_expires(ai: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOW_S", 3)
    bodies = [chat(n, model="slow", max_tokens=400 if n == 1 else 1) for n in range(3)]
    batch = ended(ai, begin(ai, upload(ai, bodies)))
    assert batch.status == "expired"
    done = {line["custom_id"] for line in lines(ai, batch.output_file_id)}
    late = {line["custom_id"]: line["error"]["code"] for line in lines(ai, batch.error_file_id)}
    assert done | late.keys() == {"r0", "r1", "r2"}
    assert set(late.values()) == {"batch_expired"}
    assert "r1" in late  # the others are done in time, if the machine is not very busy
    assert not done & late.keys()
    counts = {"total": 3, "completed": len(done), "failed": len(late)}
    assert batch.request_counts.to_dict() == counts


@contextlib.contextmanager
def another(keys: dict[str, str]) -> Iterator[openai.OpenAI]:
    """A gateway that is told to end."""
    running = serve(keys)
    with client(next(running)) as ai:
        yield ai
    assert next(running, None) is None


@contextlib.contextmanager
def mortal(keys: dict[str, str]) -> Iterator[openai.OpenAI]:
    """A gateway in a process of its own, which is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llmasos.userland.gateway.main", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert b"serves" in process.stdout.readline()
            with client(Gateway(f"http://127.0.0.1:{port}", keys, None)) as ai:  # type: ignore[arg-type]
                soon(lambda: answers(ai))
                yield ai
        finally:
            process.kill()


def answers(ai: openai.OpenAI) -> bool:
    try:
        return bool(ai.models.list().data)
    except openai.APIConnectionError:
        return False


def test_another_gateway_goes_on_with_it(gateway: Gateway) -> None:
    """Each line is there once, though the gateway is killed, and the next one ended, on the way."""
    count = 60
    bodies = [chat(n, model="slow", max_tokens=8) for n in range(count)]
    with mortal(gateway.keys) as ai:
        id = begin(ai, upload(ai, bodies))
        until_done(ai, id, 5)
    with another(gateway.keys) as ai:
        until_done(ai, id, 30)
    with another(gateway.keys) as ai:
        batch = ended(ai, id)
        assert batch.status == "completed"
        found = lines(ai, batch.output_file_id)
    assert [line["custom_id"] for line in found] == [f"r{n}" for n in range(count)]


def test_a_batch_does_not_need_its_file_any_more(ai: openai.OpenAI) -> None:
    file = upload(ai, [chat(n, model="slow", max_tokens=4) for n in range(40)])
    id = begin(ai, file)
    ai.files.delete(file)
    batch = ended(ai, id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 40)
    assert not (gateway_folder() / "files" / id).exists()


def test_who_has_no_key_any_more_has_no_work_done(gateway: Gateway) -> None:
    known = ApiKeys(folder())
    keys = gateway.keys | {"erin": known.make("erin", "erin", t.TENANT_RIGHTS)}
    running = serve(keys)
    with client(next(running), "erin") as ai:
        id = begin(ai, upload(ai, [chat(n, model="slow", max_tokens=8) for n in range(60)]))
        until_done(ai, id, 5)
    assert next(running, None) is None
    known.revoke("erin")
    running = serve(keys)
    next(running)

    async def status() -> str:
        store = Store(gateway_folder())
        kept = await store.get("erin", "batch", id)
        store.close()
        return str(kept.body["status"])

    soon(lambda: asyncio.run(status()) == "failed")
    assert next(running, None) is None
    keys["erin"] = known.make("erin", "erin", t.TENANT_RIGHTS)
    running = serve(keys)
    with client(next(running), "erin") as ai:
        batch = ai.batches.retrieve(id)
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert batch.errors.data[0].code == "invalid_api_key"
        assert len(lines(ai, batch.output_file_id)) >= 5
    assert next(running, None) is None
    known.revoke("erin")


def test_the_kernel_may_die_meanwhile(ai: openai.OpenAI, kernel: Client) -> None:
    count = 40
    id = begin(ai, upload(ai, [chat(n, model="slow", max_tokens=8) for n in range(count)]))
    until_done(ai, id, 5)
    boot = kernel.boot_id
    os.kill(kernel_pid(), signal.SIGKILL)
    soon(lambda: kernel.call(table.Df()) is not None and kernel.boot_id != boot, 20)
    batch = ended(ai, id)
    assert batch.status == "completed"
    assert batch.request_counts.to_dict() == {"total": count, "completed": count, "failed": 0}
    found = lines(ai, batch.output_file_id)
    assert [line["custom_id"] for line in found] == [f"r{n}" for n in range(count)]
    for line in found[::7]:
        whole = ai.chat.completions.create(**chat(int(line["custom_id"][1:]), model="slow", max_tokens=8))
        content = line["response"]["body"]["choices"][0]["message"]["content"]
        assert content == whole.choices[0].message.content


def kernel_pid() -> int:
    """Of the daemon of this home."""
    home = os.environ["LLMASOS_HOME"]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "--kernel" in process.cmdline() and process.environ().get("LLMASOS_HOME") == home:
                return process.pid
    raise AssertionError("there is no kernel")
