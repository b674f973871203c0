"""What is told of a request when it is over: to metrics, to the log (a JSON line), to traces. Never what
people wrote or models answered.

A request has one Record, which whoever works for it finds by `current`.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

access = logging.getLogger("llmasos.gateway.access")

# gen_ai.operation.name by route, as OpenTelemetry's conventions for generative AI have it.
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
    "/api/chat": "chat",
    "/api/generate": "text_completion",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}


@dataclass(slots=True)
class Record:
    """`status` 0: nothing was answered. `parent`: the headers that say which trace it belongs to."""

    id: str
    method: str
    path: str
    parent: dict[str, str] = field(default_factory=dict)
    route: str = "other"
    tenant: str = ""
    status: int = 0
    received: int = 0  # bytes of the body
    whole: bool = False  # the answer was sent to its end
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)
    wall_ns: int = field(default_factory=time.time_ns)

    @property
    def hung_up(self) -> bool:
        return not self.whole or self.status == 499

    def used(self, model: str, prompt: int, cached: int, generated: int, finish: str) -> None:
        """An answer of `model` is over."""
        self.model = model
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.generated_tokens += generated
        self.finish.append(finish)


_RECORD: ContextVar[Record | None] = ContextVar("record", default=None)


def current() -> Record | None:
    """The record of the request that is being worked for; None: nobody waits for an answer."""
    return _RECORD.get()


def begin(record: Record) -> None:
    _RECORD.set(record)


def log(record: Record) -> None:
    """A line a request."""
    if not access.isEnabledFor(logging.INFO):
        return
    told: dict[str, Any] = {
        "request_id": record.id,
        "tenant": record.tenant,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "ms": round(1000 * (time.perf_counter() - record.begun), 1),
    }
    if record.model:
        told |= {
            "model": record.model,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "generated_tokens": record.generated_tokens,
            "finish": record.finish,
        }
    if record.hung_up:
        told["hung_up"] = True
    access.info("request", extra={"told": told})


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, logger, message, and what a request's record tells."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {"time": at.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        told = getattr(record, "told", None)
        line |= told if told is not None else {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def log_to_stderr() -> None:
    """Has this process log in JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    access.setLevel(logging.INFO)


def tracer() -> Tracer | None:
    """What makes spans, where OTEL_EXPORTER_OTLP_ENDPOINT says where they go and `llmasos[otel]` is there."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logging.getLogger("llmasos.gateway").warning("no traces: pip install 'llmasos[otel]'")
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": "llmasos-gateway"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("llmasos.gateway")


def trace(tracer: Tracer, record: Record) -> None:
    """The span of a request that is over, in the trace that its client began."""
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract(record.parent)
    name = f"{record.method} {record.route}"
    span = tracer.start_span(name, context, SpanKind.SERVER, start_time=record.wall_ns)
    attributes: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "llmasos.request_id": record.id,
        "llmasos.tenant": record.tenant,
    }
    if record.model:
        attributes |= {
            "gen_ai.operation.name": _OPERATIONS.get(record.route, "chat"),
            "gen_ai.provider.name": "llmasos",
            "gen_ai.request.model": record.model,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.generated_tokens,
            "gen_ai.response.finish_reasons": record.finish,
        }
    span.set_attributes(attributes)
    if record.status >= 500:
        span.set_status(StatusCode.ERROR)
    span.end()
