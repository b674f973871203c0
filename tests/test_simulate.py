"""The simulator: traces in, figures out, the kernel's own code in between."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SIMULATE = Path(__file__).parent / "bench" / "simulate.py"
HEADER = "time,tenant,class,prompt_tokens,output_tokens,prefix_id,prefix_tokens\n"


def simulate(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SIMULATE, *map(str, words)], capture_output=True, text=True)


def run(trace: Path, *words: object) -> dict[str, Any]:
    done = simulate("run", trace, "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def test_one_request_takes_what_the_model_of_the_device_says(trace: Path, tmp_path: Path) -> None:
    trace.write_text("time,tenant,class,prompt_tokens,output_tokens\n5,ann,interactive,100,11\n")
    step_time = {"fixed": 0.01, "prefill_token": 0.001, "decode_sequence": 0.002, "context_token": 0}
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({"step_time": step_time}))
    figures = run(trace, "--machine", machine)
    assert figures["all"]["ttft_ms"]["p50"] == pytest.approx(110)
    assert figures["all"]["inter_token_ms"]["p99"] == pytest.approx(12)
    assert figures["seconds"] == pytest.approx(0.110 + 10 * 0.012)
    assert figures["all"]["goodput_tokens_per_s"] == pytest.approx(11 / 0.230, abs=0.01)


def test_a_step_takes_longer_the_longer_the_device_was_idle(trace: Path, tmp_path: Path) -> None:
    lines = [f"{at},ann,interactive,100,2\n" for at in (1, 2, 4, 60)]
    trace.write_text("time,tenant,class,prompt_tokens,output_tokens\n" + "".join(lines))
    step_time = {"fixed": 0, "prefill_token": 0.001, "decode_sequence": 0, "context_token": 0}
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({"step_time": step_time, "wakes": [[0, 0, 0], [2, 0.04, 0.02]]}))
    simulate("run", trace, "--machine", machine, "--outcomes", tmp_path / "outcomes")
    found = [json.loads(line) for line in (tmp_path / "outcomes").read_text().splitlines()]
    second = [1000 * (one["times"][1] - one["times"][0]) for one in found]
    first = [1000 * (one["times"][0] - one["sent"]) for one in found]
    assert first == pytest.approx([120, 117.4, 137.5, 140], abs=0.1)
    assert second == pytest.approx([10, 8.7, 18.8, 20], abs=0.1)


def test_shared_prefixes_are_hits_within_a_tenant_only(trace: Path) -> None:
    lines = [f"{n},{'ann' if n < 4 else 'bob'},interactive,160,2,system,128\n" for n in range(5)]
    trace.write_text(HEADER + "".join(lines))
    assert run(trace)["prefix_hit_rate"] == pytest.approx(3 * 128 / 800)


def test_the_stronger_class_waits_less_and_devices_share_the_work(trace: Path) -> None:
    kinds = ["interactive", "batch"]
    lines = [f"{n / 6},{kinds[n % 2][:3]},{kinds[n % 2]},200,20,,\n" for n in range(80)]
    trace.write_text(HEADER + "".join(lines))
    one, four = run(trace), run(trace, "--devices", 4)
    first = {name: part["ttft_ms"]["p50"] for name, part in one["classes"].items()}
    assert first["interactive"] < first["batch"]
    assert one["all"]["failed"] == four["all"]["failed"] == 0
    assert four["all"]["ttft_ms"]["p95"] < one["all"]["ttft_ms"]["p95"] / 2
    assert 0 < one["jain"] <= 1 <= one["max_min_share"]


def test_too_little_memory_is_shared_by_preemption(trace: Path, tmp_path: Path) -> None:
    lines = [f"0.{n},ann,batch,100,200,,\n" for n in range(8)]
    trace.write_text(HEADER + "".join(lines) + "1,bob,interactive,500,20,,\n")
    machine = tmp_path / "machine.json"
    machine.write_text('{"blocks": 40}')
    figures = run(trace, "--machine", machine)
    assert figures["all"]["failed"] == 0
    assert figures["preemptions"] > 0
    assert run(trace)["preemptions"] == 0


def test_thousands_of_requests_take_seconds(trace: Path) -> None:
    assert simulate("make", trace, "--seconds", 1000, "--rate", 2).returncode == 0
    begun = time.monotonic()
    figures = run(trace)
    assert figures["all"]["requests"] > 1800
    assert time.monotonic() - begun < 30
    assert figures["kernel_us_per_decision"] < 1000


@pytest.mark.parametrize("line", ["x,ann,interactive,1,1", "1,ann,urgent,1,1", "1,ann,batch,0,1"])
def test_a_wrong_line_is_named(trace: Path, line: str) -> None:
    trace.write_text(f"time,tenant,class,prompt_tokens,output_tokens\n0,a,batch,1,1\n{line}\n")
    done = simulate("run", trace)
    assert done.returncode == 2
    assert "line 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fit_finds_the_machine_beside_disturbances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SIMULATE.parent))
    import fitting
    from llmasos.kernel.recorder import Decision, Work

    dice = random.Random(1)
    decisions, now = [], 0.0
    for ticket in range(400):
        rows = [Work(n, dice.randrange(900), 1, True, 0) for n in range(dice.randrange(9))]
        prompts = [Work(99, 0, dice.randrange(20, 300), True, 0)] if not rows or dice.random() < 0.3 else []
        count = sum(work.count for work in prompts)
        seconds = 0.005 + 0.0006 * len(rows) + 0.0004 * count
        seconds += 1e-6 * sum(work.start + 1 for work in rows) + 2e-7 * count * (count + 1) / 2
        seconds *= 3 if dice.random() < 0.1 else dice.uniform(0.97, 1.03)
        sent, now = now - 0.004, now + seconds + 0.0002
        work = rows + prompts
        decisions.append(
            Decision(sent, "cpu", "m", ticket, len(work), len(rows), count, 1, None, work, [], now, seconds)
        )
    rests = [fitting.Rest(0.01, 0.0167, 0.0147, 0.02), fitting.Rest(5.0, 0.0567, 0.0447, 0.025)]
    machine, _ = fitting.machine(decisions, rests, 64, 512, 64)
    fitted = machine.step_time
    assert fitted.fixed == pytest.approx(0.005, rel=0.05)
    assert fitted.decode_sequence == pytest.approx(0.0006, rel=0.05)
    assert fitted.prefill_token == pytest.approx(0.0004, rel=0.05)
    assert fitted.context_token == pytest.approx(1e-6, rel=0.1)
    assert machine.pause == pytest.approx(0.0002, rel=0.01)
    assert machine.transit == pytest.approx(0.001, rel=0.1)
    wakes = [(wake.idle, wake.first, wake.second) for wake in machine.wakes]
    assert wakes == [
        (0.01, pytest.approx(0, abs=0.0005), 0),
        (5.0, pytest.approx(0.04, abs=0.0005), 0.005),
    ]
