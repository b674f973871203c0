"""/metrics as Prometheus reads it, and the log's lines."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from llmasos.syscalls import types as t
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.record import JsonLines, access
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Gateway, soon

NAMES = re.compile(r"llmasos_[a-z_]+")


@pytest.fixture(scope="module")
def scraper(gateway: Gateway) -> Iterator[httpx.Client]:
    key = ApiKeys(folder()).make("scraper", "prometheus", (t.Capability.SEE, t.Capability.AUDIT))
    with httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}) as client:
        soon(lambda: client.get("/v1/models").status_code == 200)
        yield client


def values(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sorted(map(str, sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_used_is_counted_under_both_names(http: httpx.Client, scraper: httpx.Client) -> None:
    before = values(scraper.get("/metrics").text)
    body = {"model": "tiny", "prompt": "w1 w2 w3", "max_tokens": 4, "temperature": 0}
    for _ in range(2):
        assert http.post("/v1/completions", json=body).status_code == 200

    def grown(*key: str) -> float:
        return values(scraper.get("/metrics").text).get(key, 0) - before.get(key, 0)

    model = "tiny:latest"
    soon(lambda: grown("llmasos_generated_tokens_total", "interactive", model) == 8)
    assert grown("vllm:generation_tokens_total", model) == 8
    assert grown("vllm:prompt_tokens_total", model) == 6
    assert grown("vllm:request_success_total", "length", model) == 2
    assert grown("vllm:time_to_first_token_seconds_count", model) == 2
    assert grown("llmasos_tenant_generated_tokens_total", "alice") == 8
    assert grown("llmasos_http_requests_total", "/v1/completions", "200", "POST") == 2
    assert values(scraper.get("/metrics").text)[("vllm:num_requests_running", model)] == 0


def test_metrics_of_all_need_the_right_audit(http: httpx.Client, gateway: Gateway) -> None:
    assert http.get("/metrics").status_code == 403
    assert httpx.get(f"{gateway.url}/metrics").status_code == 401


def test_a_request_is_a_line_of_json_without_what_was_said(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, access.name):
        body = {"model": "tiny", "prompt": "w77 w78", "max_tokens": 2, "temperature": 0}
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-7"})
        soon(lambda: any(r.told["request_id"] == "mine-7" for r in caplog.records if hasattr(r, "told")))
    (made,) = [r for r in caplog.records if hasattr(r, "told") and r.told["request_id"] == "mine-7"]
    line = JsonLines().format(made)
    told = json.loads(line)
    assert (told["tenant"], told["route"], told["status"]) == ("alice", "/v1/completions", 200)
    assert (told["model"], told["prompt_tokens"], told["generated_tokens"]) == ("tiny:latest", 2, 2)
    assert told["finish"] == ["length"]
    assert "w77" not in line
    assert answer.json()["choices"][0]["text"].strip() not in line


def test_the_dashboard_asks_for_what_there_is(scraper: httpx.Client) -> None:
    board = json.loads((Path(__file__).parents[2] / "deploy/grafana/llmasos.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in NAMES.findall(target["expr"])
    }
    names = {family.name for family in text_string_to_metric_families(scraper.get("/metrics").text)}
    known = {f"{name}{end}" for name in names for end in ("", "_total", "_bucket")}
    assert asked
    assert asked <= known
