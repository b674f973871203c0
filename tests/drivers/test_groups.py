"""A device group computes what a single device does, and lives and dies as one. What every driver must do is
in test_conformance.py."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmasos.drivers import base, launcher
from llmasos.drivers.model_config import Shape
from llmasos.drivers.torch.group import GroupDriver
from llmasos.drivers.torch.shards import heads_of, share
from llmasos.syscalls import errors, wire

from .conftest import CONFIGS, Tiny, files_of, start
from .test_adapters import make_adapter

# peft asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

GroupOf = Callable[[int], GroupDriver]


@given(st.integers(1, 8), st.integers(1, 6), st.data())
def test_heads_are_divided_whole(kv_heads: int, group: int, data: st.DataObject) -> None:
    heads = kv_heads * group
    size = data.draw(st.integers(1, heads))
    shape = Shape(1, heads, kv_heads, 8, 64, 100)
    parts = [heads_of(shape, rank, size) for rank in range(size)]
    assert [head for queries, _ in parts for head in queries] == list(range(heads))
    for queries, kept in parts:
        each = len(queries) // len(kept)
        assert each * len(kept) == len(queries) > 0
        assert [kept[place // each] for place in range(len(queries))] == [head // group for head in queries]


@given(st.integers(1, 1000), st.integers(1, 64))
def test_shares_are_even(count: int, size: int) -> None:
    shares = [share(count, rank, size) for rank in range(size)]
    assert [thing for one in shares for thing in one] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_model_that_a_rank_refuses_is_refused_by_all_and_the_group_goes_on(
    group_of: GroupOf, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    group, model = group_of(2), tiny("llama")
    with pytest.raises(errors.NeverFits):
        group.load(base.LoadSpec(3, model.files, "float32", 1e-9))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(errors.LLMasOSError):
        group.load(base.LoadSpec(3, files_of(tmp_path), "float32", 0.05))
    kernel = start(group, model.files)
    assert kernel.generate([kernel.open([4, 2])], 5) == [model.greedy([4, 2], 5)]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_adapters_are_divided_with_their_model(
    group_of: GroupOf, tiny: Callable[[str], Tiny], name: str, tmp_path: Path
) -> None:
    model, prompt = tiny(name), [3, 1, 4, 1, 5, 9, 2, 6]
    kernel = start(group_of(2), model.files)
    first, second = (make_adapter(model, tmp_path / str(seed), seed) for seed in (1, 2))
    for number, adapter in enumerate((first, second), 1):
        assert kernel.driver.load_adapter(1, number, adapter.files) > 0
    seqs = [kernel.open(prompt, adapter=number) for number in (1, 0, 2)]
    made = kernel.generate(seqs, 10)
    assert made == [first.greedy(prompt, 10), model.greedy(prompt, 10), second.greedy(prompt, 10)]
    kernel.driver.unload_adapter(1, 2)
    with pytest.raises(errors.Corrupt):
        kernel.driver.load_adapter(1, 2, {})
    assert kernel.generate([kernel.open(prompt, adapter=1)], 10) == made[:1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [2, 4])
def test_every_family_is_token_identical(
    group_of: GroupOf, tiny: Callable[[str], Tiny], size: int, name: str
) -> None:
    model = tiny(name)
    kernel = start(group_of(size), model.files)
    prompts = [[1, 5, 9, 44, 3, 2] * repeats for repeats in (1, 3, 7)]
    made = kernel.generate([kernel.open(prompt) for prompt in prompts], 12, chunk=13)
    assert made == [model.greedy(prompt, 12) for prompt in prompts]


def test_ranks_need_not_divide_the_heads(group_of: GroupOf, tiny: Callable[[str], Tiny]) -> None:
    model = tiny("gpt2")  # 4 heads, 97 tokens
    kernel = start(group_of(3), model.files)
    prompt = [7, 3, 88]
    assert kernel.generate([kernel.open(prompt)], 12) == [model.greedy(prompt, 12)]


class _Group:
    """The worker of `cpu*2`, which waits for a kernel, in a process of its own. `met` when its ranks have."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        code = (
            "import sys; from llmasos.drivers import launcher, worker; "
            f"launcher.TIMEOUT_S = {timeout_s}; launcher.BEAT_S = 0.5; sys.exit(worker.main())"
        )
        where = ["--device", "cpu*2", "--bus", str(folder / "bus")]
        self.process = subprocess.Popen([sys.executable, "-c", code, *where])

    def met(self) -> None:
        me = psutil.Process(self.process.pid)
        while not me.children():
            assert self.process.poll() is None
            time.sleep(0.01)
        self.other = me.children()[0]
        while len(self.other.net_connections()) == 0:
            assert self.process.poll() is None
            time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="pidfds are Linux's")
def test_a_group_lives_and_dies_as_one(tmp_path: Path) -> None:
    groups = first, second, frozen = [_Group(tmp_path, timeout_s) for timeout_s in (60, 60, 3)]
    for group in groups:
        group.met()
    time.sleep(1.0)
    first.other.kill()
    assert first.process.wait(5) == launcher.BROKEN
    second.process.kill()
    second.process.wait()
    second.other.wait(5)
    frozen.other.send_signal(signal.SIGSTOP)
    assert frozen.process.wait(15) == launcher.BROKEN
    frozen.other.wait(5)


def test_torchrun_tells_a_rank_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    place = launcher.launcher(0, "").join(16, ["a.module"])
    assert (place.rank, place.size, place.local, place.here, place.url) == (9, 16, 1, 8, "env://")
    with pytest.raises(errors.InvalidArgument, match="16 ranks, 4 are asked for"):
        launcher.launcher(0, "").join(4, ["a.module"])


def test_torchrun_starts_a_group(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "bus"))
        listener.listen()
        listener.settimeout(60)
        where = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        worker = ["-m", "llmasos.drivers.worker", "--device", "cpu*2", "--bus", str(tmp_path / "bus")]
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *where, *worker],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.DEVNULL,
        )
        bus, _ = listener.accept()
    with bus:
        bus.settimeout(60)
        [attach] = map(base.from_worker.decode, wire.FrameReader().feed(bus.recv(1 << 16)))
    assert isinstance(attach, base.Attach)
    assert attach.description.text.startswith("2 ranks")
    agent.terminate()
    agent.wait(30)
