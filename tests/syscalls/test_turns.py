"""Turns at the processors, as Linux tells them."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOLD = """
import contextlib, ctypes, os, platform, struct, sys, threading
from llmasos.syscalls import turns

def told():
    found = ctypes.create_string_buffer(56)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, found, 56, 0) == 0
    _, policy, _, nice, _, runtime = struct.unpack_from("=IIQiIQ", found)
    return policy, nice, runtime

os.nice(3)
asked = sys.argv[1:]
if "batch" in asked:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
before = told()
turns.short()
with turns.ordinary() if "ordinary" in asked else contextlib.nullcontext():
    thread = threading.Thread(target=lambda: print(*before, *told()))
    thread.start()
    thread.join()
if asked:
    print(*told())
"""


def told(*arguments: str) -> list[int]:
    """Policy, nice value and turn in ns of a process before it asks, and of a thread that it then starts; at
    the end its own again if it was `asked` for something."""
    command = [sys.executable, "-c", TOLD, *arguments]
    return [int(word) for word in subprocess.run(command, check=True, capture_output=True).stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has turns to ask for")
def test_turns_are_short_and_nothing_else_changes() -> None:
    policy, nice, turn, *after = told()
    if turn == 0:
        pytest.skip("this kernel does not tell its turns: they came with Linux 6.12")
    assert after == [policy, nice, 100_000]
    assert turn > 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has policies")
def test_who_chose_a_policy_keeps_it() -> None:
    found = told("batch")
    assert found == found[:3] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has turns to ask for")
def test_who_computes_is_started_with_the_turns_of_everybody() -> None:
    policy, nice, turn, *found = told("ordinary")
    if turn == 0:
        pytest.skip("this kernel does not tell its turns: they came with Linux 6.12")
    assert found == [policy, nice, turn, policy, nice, 100_000]
