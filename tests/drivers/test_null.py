"""The null and simulated drivers: light, strict about block tables, and on time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from llmasos.drivers import base, null
from llmasos.drivers.simulated import SimulatedDriver, StepTime, VirtualClock
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .conftest import Kernel, file_of, start


def test_it_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from llmasos.drivers import null, simulated, worker;"
        "worker.make_driver('null:1', print);"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def null_kernel() -> Kernel:
    return start(null.NullDriver(), {})


def test_the_defaults_need_no_files() -> None:
    loaded = null_kernel().loaded
    assert (loaded.context_length, loaded.vocab_size, loaded.blocks) == (4096, 50257, 4096)


def test_a_config_sets_its_size(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"n_positions": 64, "vocab_size": 9, "llmasos_null_blocks": 5}))
    loaded = start(null.NullDriver(), {"config.json": file_of(config)}).loaded
    assert (loaded.context_length, loaded.vocab_size, loaded.blocks) == (64, 9, 5)
    config.write_text(json.dumps({"n_positions": 64, "llmasos_null_blocks": 3}))
    with pytest.raises(errors.NeverFits):
        start(null.NullDriver(), {"config.json": file_of(config)})
    config.write_text("{}")
    with pytest.raises(errors.Corrupt):
        start(null.NullDriver(), {"config.json": base.File(str(config), "sha256:0", 2)})


TOKENS = list(range(40))


def test_a_block_given_away_too_early_shows() -> None:
    kernel = null_kernel()
    victim, thief = kernel.open(TOKENS), kernel.open([7] * 16)
    kernel.step([(victim, 40)])
    thief.blocks = victim.blocks[:1]
    kernel._announce(thief)
    kernel.step([(thief, 16)])
    [out] = kernel.step([(victim, 1)])
    assert out.tokens != [null.next_token(victim.tokens[:-1], 50257)]


def test_a_forgotten_copy_shows() -> None:
    kernel = null_kernel()
    parent = kernel.open(TOKENS)
    kernel.step([(parent, 40)])
    child = kernel.fork(parent)
    child.copies = []
    [out] = kernel.step([(child, 1)])
    assert out.tokens != [null.next_token(child.tokens[:-1], 50257)]


def test_a_prefix_shared_by_mistake_shows() -> None:
    kernel = null_kernel()
    first, second = kernel.open([1] * 16 + [2] * 16), kernel.open([3] * 16 + [2] * 16)
    kernel.step([(first, 32)])
    second.blocks[1] = first.blocks[1]  # the same tokens, after another beginning
    kernel._announce(second)
    kernel.step([(second, 16)])
    second.computed = 31
    [out] = kernel.step([(second, 1)])
    assert out.tokens != [null.next_token(second.tokens[:-1], 50257)]


def test_sampled_sequences_are_predictable_too() -> None:
    kernel = null_kernel()
    sampling = t.Sampling(temperature=1.0, seed=9)
    seq = kernel.open(TOKENS, temperature=1.0, seed=9)
    [made] = kernel.generate([seq], 5)
    for place, token in enumerate(made):
        assert token == null.next_token(TOKENS + made[:place], sampling=sampling)
    assert made[0] != null.next_token(TOKENS)


def test_a_simulated_step_takes_its_time_on_the_clock_alone() -> None:
    clock = VirtualClock()
    driver = SimulatedDriver(clock, StepTime(1.0, 0.1, 0.01, 0.0))
    kernel = start(driver, {})
    first, second = kernel.open(TOKENS), kernel.open(TOKENS)
    kernel.step([(first, 40)])
    assert clock.now == pytest.approx(1 + 40 * 0.1)
    kernel.step([(first, 1), (second, 10)])
    assert clock.now == pytest.approx(5 + 1 + 0.01 + 10 * 0.1)


def test_simulated_steps_queue_behind_each_other() -> None:
    clock = VirtualClock()
    driver = SimulatedDriver(clock, StepTime(1.0, 0, 0, 0))
    start(driver, {})
    for ticket in (1, 2, 3):
        driver.submit(base.Batch(ticket, 1, [], [], [], []))
    clock.advance_to(1.5)
    assert [driver.collect(ticket).seconds for ticket in (1, 2, 3)] == [1, 1, 1]
    assert clock.now == 3
    driver.submit(base.Batch(4, 1, [], [], [], []))
    clock.advance_to(10)
    driver.collect(4)
    assert clock.now == 10
