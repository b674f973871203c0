"""Turns at the processors, as Linux tells them."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOLD = """
import ctypes, os, platform, struct, sys, threading
from llmasos.syscalls import turns

def told():
    found = ctypes.create_string_buffer(56)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, found, 56, 0) == 0
    _, policy, _, nice, _, runtime = struct.unpack_from("=IIQiIQ", found)
    return policy, nice, runtime

os.nice(3)
if len(sys.argv) > 1:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
before = told()
turns.short()
thread = threading.Thread(target=lambda: print(*before, *told()))
thread.start()
"""


def told(*arguments: str) -> list[int]:
    """Policy, nice value and turn in ns of a process before it asks, and of a thread that it then starts."""
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
    before, after = (told("batch")[place : place + 3] for place in (0, 3))
    assert before == after
