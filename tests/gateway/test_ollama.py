"""Ollama's API through its own client, and what it cannot show over plain HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import jsonschema
import msgspec
import ollama
import pytest
from llmasos.kernel.modelfs.manifest import ManifestFile
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.store import ModelFS
from llmasos.syscalls import table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.ollama.shared import rfc3339

from ..boot.tiny import write_tiny
from .conftest import Gateway, soon
from .test_processes import TINY

HELLO = [{"role": "user", "content": "w1 w2"}]
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "dark": {"type": "boolean"}},
    "required": ["colour", "dark"],
    "additionalProperties": False,
}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": COLOURS}}
GREEDY = {"temperature": 0, "num_predict": 6}


def client(gateway: Gateway, tenant: str = "alice") -> ollama.Client:
    return ollama.Client(gateway.url, headers={"authorization": f"Bearer {gateway.keys[tenant]}"})


@pytest.fixture
def llama(gateway: Gateway) -> Iterator[ollama.Client]:
    with client(gateway) as made:
        yield made


def test_a_chat_streams_what_it_answers_at_once(llama: ollama.Client) -> None:
    whole = llama.chat("tiny", HELLO, options=GREEDY)
    assert whole.message.role == "assistant"
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 6)
    parts = list(llama.chat("tiny", HELLO, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].prompt_eval_count == whole.prompt_eval_count
    durations = [whole.load_duration, whole.prompt_eval_duration, whole.eval_duration]
    assert all(isinstance(one, int) and one > 0 for one in durations)
    assert sum(one or 0 for one in durations) == whole.total_duration
    assert datetime.fromisoformat(whole.created_at or "").tzinfo is not None


def test_generate_goes_through_the_template_or_not(llama: ollama.Client) -> None:
    said = llama.chat("tiny", [{"role": "system", "content": "w9"}, *HELLO], options=GREEDY)
    generated = llama.generate("tiny", "w1 w2", system="w9", options=GREEDY)
    assert generated.response == said.message.content
    assert generated.context
    parts = list(llama.generate("tiny", "w1 w2", system="w9", options=GREEDY, stream=True))
    assert "".join(part.response or "" for part in parts) == generated.response
    raw = llama.generate("tiny", "w5 w6", raw=True, options=GREEDY)
    assert raw.prompt_eval_count == 2
    assert raw.context is None
    spelled = llama.generate("tiny", "<|im_start|> w5", raw=True, options=GREEDY)
    assert spelled.prompt_eval_count == 2
    base = llama.generate("plain", "w5 w6", options=GREEDY)
    assert base.prompt_eval_count == 2


def test_a_context_is_gone_on_with(llama: ollama.Client) -> None:
    first = llama.generate("plain", "w1 w2", options=GREEDY)
    both = llama.generate("plain", "w3", context=first.context, options=GREEDY)
    assert first.context is not None
    assert both.prompt_eval_count == len(first.context) + 1
    assert both.context is not None
    assert both.context[: len(first.context)] == first.context


def test_calls_of_tools_come_whole(llama: ollama.Client) -> None:
    """The model knows nothing: with a format, what it says is that or a call, as the seed has it."""

    def answers(stream: bool) -> list[list[ollama.ChatResponse]]:
        made = []
        for seed in range(6):
            options = {"seed": seed, "num_predict": 2000}
            asked = {"tools": [PAINT], "format": COLOURS, "options": options, "stream": stream}
            answer = llama.chat("bytes", HELLO, **asked)
            made.append(list(answer) if stream else [answer])
        return made

    called = []
    for (whole,), parts in zip(answers(False), answers(True), strict=True):
        calls = [call for part in parts for call in part.message.tool_calls or []]
        assert [call.model_dump() for call in calls] == [
            call.model_dump() for call in whole.message.tool_calls or []
        ]
        assert "".join(part.message.content or "" for part in parts) == whole.message.content
        if not calls:
            jsonschema.validate(json.loads(whole.message.content or ""), COLOURS)
        for call in calls:
            assert call.function.name == "paint"
            jsonschema.validate(call.function.arguments, COLOURS)
        called.append(bool(calls))
    assert set(called) == {True, False}


def test_functions_and_results_are_told(llama: ollama.Client) -> None:
    def paint(colour: str) -> str:
        """Paints.

        Args:
          colour: Which one.
        """
        return colour

    call = {"function": {"name": "paint", "arguments": {"colour": "red"}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    told = {"role": "tool", "content": "w3", "tool_name": "paint"}
    counts = [
        llama.chat("bytes", messages, tools=[paint], options=GREEDY).prompt_eval_count or 0
        for messages in ([*HELLO], [*HELLO, asked], [*HELLO, asked, told])
    ]
    assert counts == sorted(set(counts))
    assert counts[0] > (llama.chat("bytes", HELLO, options=GREEDY).prompt_eval_count or 0)


def test_answers_have_the_format_that_was_asked_for(llama: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 400}
    shaped = llama.chat("bytes", HELLO, format=COLOURS, options=options)
    jsonschema.validate(json.loads(shaped.message.content or ""), COLOURS)
    generated = llama.generate("bytes", "w1", format=COLOURS, options=options)
    jsonschema.validate(json.loads(generated.response), COLOURS)
    begun = llama.generate("bytes", "w1", format="json", options=options).response
    assert begun.startswith("{")
    with pytest.raises(ollama.ResponseError) as refused:
        llama.generate("bytes", "w1", format={"type": "colour"})
    assert refused.value.status_code == 400


async def _both(gateway: Gateway) -> tuple[str | None, str]:
    made = ollama.AsyncClient(gateway.url, headers={"authorization": f"Bearer {gateway.keys['bob']}"})
    async with made as llama:
        whole = await llama.chat("tiny", HELLO, options=GREEDY)
        parts = [part async for part in await llama.chat("tiny", HELLO, options=GREEDY, stream=True)]
    return whole.message.content, "".join(part.message.content or "" for part in parts)


def test_async_clients_are_answered_too(gateway: Gateway) -> None:
    whole, streamed = asyncio.run(_both(gateway))
    assert whole == streamed


def test_the_assistants_last_words_are_gone_on_with(llama: ollama.Client) -> None:
    whole = (llama.chat("tiny", HELLO, options=GREEDY).message.content or "").split()
    begun = [*HELLO, {"role": "assistant", "content": " ".join(whole[:2])}]
    rest = llama.chat("tiny", begun, options={**GREEDY, "num_predict": 4}).message.content or ""
    assert rest.split() == whole[2:]


def test_options_do_what_they_say(llama: ollama.Client) -> None:
    text = llama.generate("tiny", "w1 w2", options=GREEDY).response
    word = text.split()[3]
    stopped = llama.generate("tiny", "w1 w2", options={**GREEDY, "stop": [word]})
    assert (stopped.response, stopped.done_reason) == (text.partition(word)[0], "stop")
    drawn = [llama.generate("tiny", "w1", options={"seed": 7, "num_predict": 4}).response for _ in range(2)]
    assert drawn[0] == drawn[1]
    full = llama.generate("plain", "w1 " * 20, options={"temperature": 0, "num_ctx": 24})
    assert (full.done_reason, full.eval_count) == ("length", 4)
    scored = llama.generate("tiny", "w1", options=GREEDY, logprobs=True, top_logprobs=2)
    assert scored.logprobs is not None
    assert len(scored.logprobs) == 6
    assert scored.logprobs[0].top_logprobs is not None
    assert scored.logprobs[0].logprob == scored.logprobs[0].top_logprobs[0].logprob


def test_texts_become_vectors(llama: ollama.Client) -> None:
    both = llama.embed("encoder", ["w1", "w2"])
    assert len(both.embeddings) == 2
    assert both.embeddings[0] != both.embeddings[1]
    single = llama.embed("encoder", "w1")
    assert list(single.embeddings) == [both.embeddings[0]]
    assert list(llama.embeddings("encoder", "w1").embedding) == list(both.embeddings[0])
    assert both.prompt_eval_count == 2 * (single.prompt_eval_count or 0) > 0
    many = llama.embed("encoder", [f"w{n}" for n in range(300)]).embeddings
    assert len(many) == 300
    assert many[1] == both.embeddings[0]
    assert list(llama.embed("encoder", []).embeddings) == []
    short = llama.embed("encoder", "w1", dimensions=3).embeddings[0]
    assert sum(x * x for x in short) == pytest.approx(1)
    assert llama.show("encoder").capabilities == ["embedding"]


def test_texts_that_are_too_long_are_cut_only_if_asked(llama: ollama.Client) -> None:
    long = "x" * 100
    for options in ({}, {"truncate": False}):
        with pytest.raises(ollama.ResponseError, match="context is 64") as refused:
            llama.embed("encoder", long, **options)
        assert refused.value.status_code == 400
    assert llama.embed("encoder", long, truncate=True).prompt_eval_count == 64


def test_models_do_what_they_were_made_for(llama: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as refused:
        llama.embed("tiny", "w1")
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError) as refused:
        llama.generate("encoder", "w1")
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="dimensions"):
        llama.embed("encoder", "w1", dimensions=10**6)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/generate", {"content-type": "application/x-www-form-urlencoded"}, 200),  # as curl -d sends it
        ("/api/generate", {}, 200),
        ("/api/generate", {"content-type": "text/plain"}, 400),
        ("/v1/completions", {"content-type": "application/x-www-form-urlencoded"}, 400),
    ],
)
def test_ollamas_own_examples_name_no_content_type(
    gateway: Gateway, path: str, headers: dict[str, str], status: int
) -> None:
    body = b'{"model": "tiny", "prompt": "w1", "stream": false}'
    with gateway.http() as http:
        assert http.post(path, content=body, headers=headers).status_code == status
        for by in ({"origin": "null"}, {"origin": gateway.url}, {"sec-fetch-site": "cross-site"}):
            assert http.post(path, content=body, headers={**headers, **by}).status_code == 400


def test_an_empty_request_loads_the_model(llama: ollama.Client) -> None:
    assert llama.generate("plain").done_reason == "load"
    assert llama.chat("plain").done_reason == "load"
    assert "plain:latest" in {model.model for model in llama.ps().models}
    for nothing in (0, "0s"):
        assert llama.generate("plain", keep_alive=nothing).done_reason == "unload"
    assert llama.generate("plain", "w1", options={"num_predict": 1}, keep_alive=0).done_reason == "length"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"options": {"mirostat": 2}}, "mirostat"),
        ({"options": {"num_thread": 4}}, "num_thread"),
        ({"options": {"colour": "red"}}, "colour"),
        ({"options": {"repeat_penalty": 1.2, "repeat_last_n": 64}}, "repeat_last_n"),
        ({"options": {"num_ctx": 2}}, "context 2"),
        ({"think": True}, "think"),
        ({"images": ["AAAA"]}, "images"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"suffix": "w1"}, "suffix"),
        ({"prompt": "w1 " * 600}, "context 512"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"context": [10**6]}, "vocabulary"),
        ({"format": "yaml"}, "format"),
    ],
)
def test_what_is_not_done_is_named(http: httpx.Client, body: dict, said: str) -> None:
    answer = http.post("/api/generate", json={"model": "tiny", "prompt": "w1 w2 w3", **body})
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_options_that_ask_for_nothing_are_taken(llama: ollama.Client) -> None:
    options = {**GREEDY, "mirostat": 0, "num_keep": 4, "repeat_last_n": 64, "use_mmap": True}
    llama.chat("tiny", HELLO, options=options, keep_alive="5m", think=False, format="")


def test_errors_have_ollamas_shape(llama: ollama.Client, gateway: Gateway) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as missing:
        llama.chat("llama9", HELLO)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as missing:
        list(llama.generate("llama9", "w1", stream=True))
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="no chat template"):
        llama.chat("plain", HELLO)
    with pytest.raises(ollama.ResponseError) as stranger:
        ollama.Client(gateway.url).list()
    assert stranger.value.status_code == 401


def test_what_there_is_is_listed_and_shown(llama: ollama.Client, gateway: Gateway) -> None:
    tiny = next(model for model in llama.list().models if model.model == "tiny:latest")
    assert tiny.details is not None
    assert tiny.details.parameter_size == "135M"
    assert len(tiny.digest or "") == 64
    assert tiny.modified_at is not None
    shown = llama.show("tiny")
    assert shown.modelinfo is not None
    assert shown.modelinfo["null.context_length"] == 512
    assert shown.license == "apache-2.0"
    assert "im_start" in (shown.template or "")
    assert shown.capabilities == ["completion", "tools"]
    assert httpx.get(f"{gateway.url}/").text == "Ollama is running"
    assert httpx.get(f"{gateway.url}/api/version").json()["version"]


def test_a_gguf_file_is_called_one_wherever_it_came_from(
    llama: ollama.Client, home: Path, kernel: Client
) -> None:
    store = ModelFS(home)
    tiny = store.resolve("tiny")
    files = [*tiny.files, ManifestFile("model.gguf", *store.put_bytes(b"GGUF"))]
    source = "hf:owner/repo/Q4_0.gguf@0123456"
    store.commit(parse_name("packed"), msgspec.structs.replace(tiny, source=source, files=files))
    found = {model.model: model.details for model in llama.list().models}
    formats = [one and one.format for one in (found["packed:latest"], found["tiny:latest"])]
    assert formats == ["gguf", "safetensors"]
    details = llama.show("packed").details
    assert details is not None
    assert details.format == "gguf"
    kernel.call(table.Unlink("/models/packed"))


def test_models_are_copied_by_who_may(gateway: Gateway, kernel: Client) -> None:
    carol = client(gateway, "carol")
    with pytest.raises(ollama.ResponseError) as refused:
        client(gateway).copy("tiny", "mine")
    assert refused.value.status_code == 403
    carol.copy("tiny", "mine")
    carol.create("ours", from_="tiny")
    assert {"mine:latest", "ours:latest"} <= {model.model for model in carol.list().models}
    with pytest.raises(ollama.ResponseError) as refused:
        carol.copy("tiny", "plain")  # a name that everybody has
    assert refused.value.status_code == 403
    assert "no API key has it" in refused.value.error
    with pytest.raises(ollama.ResponseError, match="system"):
        carol.create("theirs", from_="tiny", system="w1")
    with pytest.raises(ollama.ResponseError) as missing:
        carol.copy("llama9", "mine2")
    assert missing.value.status_code == 404
    for name in ("mine", "ours"):
        with pytest.raises(ollama.ResponseError) as refused:
            carol.delete(name)  # everybody has it now
        assert refused.value.status_code == 403
        kernel.call(table.Unlink(f"/models/{name}"))


def test_what_is_ones_own_is_copied_and_deleted(gateway: Gateway, home: Path) -> None:
    store, carol = ModelFS(home), client(gateway, "carol")
    store.commit(parse_name("hers"), msgspec.structs.replace(store.resolve("tiny"), owner="carol"))
    carol.copy("hers", "hers2")
    for name in ("hers", "hers2"):
        with pytest.raises(ollama.ResponseError) as hidden:
            client(gateway).show(name)
        assert hidden.value.status_code == 404
        carol.generate(name, "once", options={"num_predict": 1})
        carol.delete(name)
        with pytest.raises(ollama.ResponseError, match=name) as refused:
            carol.generate(name, "twice", options={"num_predict": 1})
        assert refused.value.status_code == 404
    assert not {"hers:latest", "hers2:latest"} & {model.model for model in carol.list().models}
    with pytest.raises(ollama.ResponseError) as gone:
        carol.delete("hers")
    assert gone.value.status_code == 404


def test_a_pull_tells_how_it_goes(gateway: Gateway, tmp_path: Path) -> None:
    write_tiny(tmp_path, TINY)
    rights = (*t.TENANT_RIGHTS, t.Capability.MODELS, t.Capability.FILES)
    headers = {"authorization": f"Bearer {ApiKeys(folder()).make('erin', 'erin', rights)}"}
    with httpx.Client(base_url=gateway.url, headers=headers) as erin:
        soon(lambda: erin.get("/api/tags").status_code == 200)
        body = {"model": "fetched", "source": f"file:{tmp_path}"}
        with erin.stream("POST", "/api/pull", json=body) as answer:
            assert answer.headers["content-type"] == "application/x-ndjson"
            told = [json.loads(line) for line in answer.iter_lines()]
        assert told[-1] == {"status": "success"}
        assert all(0 <= step["completed"] <= step["total"] for step in told[:-1] if "total" in step)
        assert erin.post("/api/pull", json={**body, "stream": False}).status_code == 403  # nobody replaces
        for name in ("fetched", "tiny"):
            again = erin.post("/api/pull", json={"model": name, "stream": False})
            assert again.json() == {"status": "success"}
        shown = erin.post("/api/show", json={"name": "fetched"}).json()  # as older clients call it
        assert shown["details"]["format"] == "safetensors"
    ApiKeys(folder()).revoke("erin")


def test_a_pull_tells_that_it_fails(gateway: Gateway) -> None:
    statuses = [part.status for part in client(gateway).pull("tiny", stream=True)]
    assert statuses == ["already there", "success"]
    with pytest.raises(ollama.ResponseError) as refused:
        client(gateway).pull("nobody-has-this")
    assert refused.value.status_code == 403
    with pytest.raises(ollama.ResponseError):
        client(gateway, "carol").pull("nobody-has-this")
    with pytest.raises(ollama.ResponseError):
        list(client(gateway, "carol").pull("nobody-has-this", stream=True))


def test_who_hangs_up_frees_his_process(gateway: Gateway, kernel: Client) -> None:
    def running() -> int:
        return len([row for row in kernel.ps() if row.owner == "bob"])

    for path, body in (
        ("/api/chat", {"model": "slow", "messages": HELLO, "options": {"temperature": 0}}),
        ("/api/generate", {"model": "slow", "prompt": "w1 w2", "options": {"temperature": 0}}),
    ):
        with gateway.http("bob") as http, http.stream("POST", path, json=body) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines))["done"] is False
            assert running() == 1
        soon(lambda: running() == 0)
        with gateway.http("bob") as http, pytest.raises(httpx.ReadTimeout):
            http.post(path, json={**body, "stream": False}, timeout=0.5)
        soon(lambda: running() == 0)


def test_a_process_holds_a_conversation(http: httpx.Client, kernel: Client) -> None:
    body = {"model": "tiny", "messages": HELLO, "options": GREEDY, "stream": False}
    first = http.post("/api/chat", json={**body, "pid": "new"}).json()
    body["messages"] = [*HELLO, first["message"], {"role": "user", "content": "w3"}]
    second = http.post("/api/chat", json={**body, "pid": first["pid"]}).json()
    assert second["pid"] == first["pid"]
    assert second["message"] == http.post("/api/chat", json=body).json()["message"]
    kernel.kill(first["pid"])


def test_a_killed_answer_is_told_so(http: httpx.Client, kernel: Client) -> None:
    with http.stream(
        "POST", "/api/chat", json={"model": "slow", "messages": HELLO, "options": {"temperature": 0}}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        (row,) = [row for row in kernel.ps() if row.owner == "alice"]
        kernel.kill(row.pid)
        told = [json.loads(line) for line in lines]
    assert (told[-1]["done"], told[-1]["done_reason"]) == (True, "killed")


def test_times_are_utc() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00Z"
    assert datetime.fromisoformat(rfc3339(1.5)) == datetime.fromtimestamp(1.5, UTC)
