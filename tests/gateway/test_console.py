"""The console's stream and files, over plain HTTP."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmasos.syscalls import types as t
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.console import page
from llmasos.userland.gateway.console.feed import patch
from llmasos.userland.gateway.console.page import FILES

from .conftest import Gateway, serve

MOST_BYTES = 60_000
"""Of the whole page, before it is packed."""

names = st.text(max_size=3)
values = st.recursive(
    st.one_of(
        st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.lists(st.integers())
    ),
    lambda inner: st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
states = st.dictionaries(names, values, max_size=5)


def merged(target: Any, change: Any) -> Any:
    """RFC 7396, as it is written there."""
    if not isinstance(change, dict):
        return change
    made = dict(target) if isinstance(target, dict) else {}
    for name, value in change.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = merged(made.get(name), value)
    return made


@given(before=states, after=states)
def test_a_patch_makes_the_one_state_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert json.dumps(merged(before, patch(before, after)), sort_keys=True) == json.dumps(
        after, sort_keys=True
    )
    assert patch(after, after) == {}


def following(answer: httpx.Response) -> Callable[[Callable[[dict[str, Any]], bool]], dict[str, Any]]:
    """Reads patches until the state is as wanted, and gives it."""
    lines = answer.iter_lines()
    state: dict[str, Any] = {}

    def until(wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        nonlocal state
        for line in lines:
            if line.startswith("data: "):
                state = merged(state, json.loads(line.removeprefix("data: ")))
                if "error" in state or wanted(state):
                    return state
        raise AssertionError("the stream ended")

    return until


def test_the_stream_shows_what_comes_and_goes(gateway: Gateway, http: httpx.Client) -> None:
    with http.stream("GET", "/v1/console/events") as answer, gateway.http("bob") as bob:
        assert answer.headers["content-type"].startswith("text/event-stream")
        until = following(answer)
        first = until(lambda state: True)
        assert first["caller"] == {"tenant": "alice", "rights": ["infer", "process", "see"]}
        assert first["devices"]["null"]["state"] in ("ready", "busy")
        assert first["models"]["tiny"]["context_length"] == 512
        assert "encodes" not in first["models"]["tiny"]
        assert first["models"]["encoder"]["encodes"] == "embed"
        other = str(bob.post("/v1/processes", json={"model": "tiny"}).json()["pid"])
        pid = str(http.post("/v1/processes", json={"model": "tiny", "label": "mine"}).json()["pid"])
        seen = until(lambda state: pid in state["processes"])
        row = seen["processes"][pid]
        assert (row["name"], row["owner"], row["trains"]) == ("mine", "alice", False)
        assert other not in seen["processes"]
        assert 0 <= seen["time"] - row["born"] < 60
        http.post(f"/v1/processes/{pid}/signal", json={"signal": "STOP"})
        until(lambda state: state["processes"][pid]["state"] == "stopped")
        http.delete(f"/v1/processes/{pid}")
        until(lambda state: pid not in state["processes"])
        bob.delete(f"/v1/processes/{other}")


def test_what_does_not_change_is_not_told_again(http: httpx.Client) -> None:
    pid = http.post("/v1/processes", json={"model": "tiny"}).json()["pid"]
    with http.stream("GET", "/v1/console/events") as answer:
        events = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
        assert str(pid) in next(events)["processes"]
        assert str(pid) not in next(events).get("processes", {})
    http.delete(f"/v1/processes/{pid}")


def test_the_stream_asks_for_a_key_and_ends_with_it(gateway: Gateway) -> None:
    path = f"{gateway.url}/v1/console/events"
    assert httpx.get(path).status_code == 401
    keys = ApiKeys(folder())
    key = keys.make("guest", "guest", t.TENANT_RIGHTS)
    with httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=30) as guest:
        while (guest.get(f"{gateway.url}/v1/models")).status_code == 401:
            pass  # until the gateway has looked at its keys again
        with guest.stream("GET", path) as answer:
            until = following(answer)
            until(lambda state: state["caller"]["tenant"] == "guest")
            keys.revoke("guest")
            assert until(lambda state: False)["error"]["code"] == "invalid_api_key"


def test_the_stream_ends_with_the_server(home: Path) -> None:
    gateways = serve({})
    gateway = next(gateways)
    with httpx.stream("GET", f"{gateway.url}/v1/console/events", timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        gateway.server.should_exit = True
        assert not any("error" in line for line in lines)  # it comes to its end
    next(gateways, None)


def test_browsers_come_to_the_console_and_clients_of_ollama_do_not(gateway: Gateway) -> None:
    page = httpx.get(gateway.url, headers={"accept": "text/html,*/*"}, follow_redirects=True)
    assert page.url.path == "/console"
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    plain = httpx.get(gateway.url)
    assert (plain.status_code, plain.text) == (200, "Ollama is running")
    assert httpx.head(gateway.url).status_code == 200


def test_files_are_packed_and_not_sent_again(gateway: Gateway) -> None:
    path = f"{gateway.url}/console/console.js"
    whole = httpx.get(path, headers={"accept-encoding": "identity"})
    packed = httpx.get(path, headers={"accept-encoding": "gzip"})
    assert whole.content == packed.content == FILES["console.js"].plain
    assert int(packed.headers["content-length"]) < int(whole.headers["content-length"])
    again = httpx.get(path, headers={"if-none-match": whole.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for name in ("page.py", "..%2fpage.py", "nothing.js", "__init__.py"):
        assert httpx.get(f"{gateway.url}/console/{name}").status_code == 404


def test_docs_say_what_is_missing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "swagger", dict)
    answer = httpx.get(f"{gateway.url}/docs")
    assert answer.status_code == 404
    assert "llmasos[gateway]" in answer.json()["error"]["message"]


def test_the_page_is_small_and_needs_nobody_else() -> None:
    assert sum(len(file.plain) for file in FILES.values()) < MOST_BYTES
    for name, file in FILES.items():
        assert gzip.decompress(file.packed) == file.plain
        text = file.plain.decode()
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text
        ), name


def refers_to(text: str) -> Iterator[str]:
    yield from re.findall(r'(?:href|src)="console/([^"]+)"', text)
    yield from re.findall(r'from "\./([^"]+)"', text)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_is_missing(name: str) -> None:
    assert set(refers_to(FILES[name].plain.decode())) <= {*FILES, *page.SWAGGER}
