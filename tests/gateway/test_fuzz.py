"""Whatever is sent, no answer is a fault of the server and none has a status that is not documented."""

from __future__ import annotations

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from llmasos.userland.gateway.app import build
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from .conftest import Gateway

MORE = os.environ.get("LLMASOS_FUZZ_EXAMPLES", "")
EXAMPLES = int(MORE or 15)
"""Of each operation. tests/bench/fuzz.py sends more, which are drawn anew each time."""

CHECKS = [not_a_server_error, status_code_conformance]

SCHEMA = schemathesis.openapi.from_dict(build(None, None).openapi())
ENDLESS = {"GET /v1/console/events"}
"""Streams that only their reader ends; test_console.py has them."""

OPERATIONS = [one for found in SCHEMA.get_all_operations() if (one := found.ok()).label not in ENDLESS]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.label)
@settings(
    max_examples=EXAMPLES,
    derandomize=not MORE,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_no_answer_is_a_fault_or_a_surprise(
    operation: schemathesis.schemas.APIOperation, gateway: Gateway, data: st.DataObject
) -> None:
    case = data.draw(operation.as_strategy())
    if isinstance(case.body, dict) and "model" in case.body and data.draw(st.booleans()):
        case.body["model"] = "tiny"  # one that is there, so that more than the name is looked at
    headers = {"authorization": f"Bearer {gateway.keys['carol']}"}
    answer = case.call(base_url=gateway.url, headers=headers, timeout=20)
    case.validate_response(answer, checks=CHECKS)
