"""/metrics as Prometheus reads it, and the log's lines."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from llmasos.syscalls import types as t
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.metrics import collected
from llmasos.userland.gateway.record import JsonLines, Record, access, trace, tracer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Gateway, soon

NAMES = re.compile(r"(?:llmasos_|vllm:)[a-z0-9_]+")


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


def test_a_request_is_a_span_of_the_trace_that_its_client_began() -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    record = Record("req_1", "POST", "/v1/chat/completions", parent, route="/v1/chat/completions", status=200)
    record.used("tiny:latest", 7, 3, 5, "stop")
    trace(provider.get_tracer("test"), record)
    (span,) = spans.get_finished_spans()
    assert span.name == "POST /v1/chat/completions"
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.kind is SpanKind.SERVER
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["gen_ai.request.model"] == "tiny:latest"
    assert span.attributes["gen_ai.usage.input_tokens"] == 7
    assert span.attributes["gen_ai.usage.output_tokens"] == 5
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)


def test_traces_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracer() is None
    heard: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        made = tracer()
        assert made is not None
        trace(made, Record("req_9", "GET", "/health", route="/health", status=200))
        soon(lambda: any(path == "/v1/traces" and b"req_9" in body for path, body in heard), 10)
        collector.shutdown()


def test_pools_and_classes_of_one_model_are_one_line_of_vllms() -> None:
    """Prometheus refuses two values with the same labels."""
    key = ["tiny:latest"]
    families = [
        t.Family("kv_blocks", t.FamilyKind.GAUGE, "", ["device", "model"], both(10, 30)),
        t.Family("kv_blocks_free", t.FamilyKind.GAUGE, "", ["device", "model"], both(10, 10)),
        t.Family(
            "requests",
            t.FamilyKind.COUNTER,
            "",
            ["model", "class", "finish"],
            [
                t.Sample([*key, c, f], 1)
                for c in ("batch", "realtime")
                for f in ("stop", "killed", "deadline")
            ],
        ),
        t.Family(
            "requests_running",
            t.FamilyKind.GAUGE,
            "",
            ["model", "class"],
            [t.Sample([name, "batch"], 1) for name in ("tiny:latest", "tiny:latest+one", "tiny:latest+two")],
        ),
    ]
    made = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in collected(families)
        for sample in metric.samples
    }
    assert made["vllm:kv_cache_usage_perc", *key] == 0.5
    assert made["vllm:request_success_total", *key, "stop"] == 2
    assert made["vllm:request_success_total", *key, "abort"] == 4
    assert ("vllm:lora_requests_info", "one,two", "") in made


def both(first: int, second: int) -> list[t.Sample]:
    return [t.Sample(["cuda0", "tiny:latest"], first), t.Sample(["cuda1", "tiny:latest"], second)]


def test_made_up_methods_are_no_series(http: httpx.Client, scraper: httpx.Client) -> None:
    for number in range(3):
        assert http.request(f"MKCOL{number}" if number else "PROPFIND", "/v1/models").status_code in (
            400,
            405,
        )
    text = scraper.get("/metrics").text
    methods = {
        sample.labels["method"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "method" in sample.labels
    }
    assert methods <= {"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "other"}
