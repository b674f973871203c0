"""Prompts and completions appear nowhere but in the process's own history: a canary is looked for in every
file that the daemon writes for people, in its log, in what it prints and in what others are told."""

from __future__ import annotations

import os
import resource
import struct
import time

import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

CANARY = [48611, 47933, 46273]
STATE = ("modelfs", "journal", "run", "keys")
"""Folders of the home that hold contexts for the daemon itself, mode 0700, or no text at all."""


def traces() -> list[bytes]:
    """The canary as text, as it travels, and as msgpack writes it."""
    numbers = [str(token).encode() for token in CANARY]
    return [
        *numbers,
        struct.pack("<2I", *CANARY[:2]),
        b"".join(b"\xcd" + struct.pack(">H", token) for token in CANARY[:2]),
    ]


def told(home) -> dict[str, bytes]:
    """What people may read of the home folder."""
    files = {}
    for folder, folders, names in os.walk(home):
        folders[:] = [name for name in folders if name not in STATE or folder != str(home)]
        for name in names:
            files[name] = open(os.path.join(folder, name), "rb").read()  # noqa: SIM115
    return files


def test_a_prompt_is_nowhere_to_be_read(daemons):
    daemon = daemons('devices=["null"]', tiny={"vocab_size": 50000, "llmasos_null_step_seconds": 0.01})
    with daemon.client() as client, daemon.client("other") as other:
        pid = client.call(table.SpawnModel(model="tiny", label="secret-plan")).pid
        tokens = t.pack_tokens(CANARY * 30)
        client.call(table.Infer(pid=pid, tokens=tokens, max_tokens=5))
        for wrong in (
            table.Infer(pid=pid, tokens=t.pack_tokens([*CANARY, 60000]), max_tokens=1),
            table.Infer(pid=pid, tokens=t.pack_tokens(CANARY), max_tokens=10**6),
            table.Infer(pid=pid, tokens=t.pack_tokens(CANARY), public=10),
            table.Infer(pid=pid, tokens=t.pack_tokens(CANARY)[:-1]),
            table.Infer(model="nosuch", tokens=t.pack_tokens(CANARY)),
        ):
            with pytest.raises(errors.LLMasOSError) as refusal:
                client.call(wrong)
            assert not any(str(token) in str(refusal.value) for token in CANARY)
        with client.stream(table.Infer(pid=pid, tokens=tokens, max_tokens=300)) as stream:
            next(stream)
            [worker] = daemon.children("null")
            worker.kill()  # the flight recorder is dumped
            next(stream)
            daemon.kernel().kill()  # and the kernel's end is told too
            time.sleep(1)
        with daemon.client() as again:
            log = "\n".join(line.text for line in again.stream(table.Dmesg()))
            said = [log.encode(), again.read_audit(), again.read_file("/proc/flight")]
            said.append(repr(other.call(table.Ps())).encode())
            said.append(repr(again.ps()).encode())
    files = told(daemon.home)
    assert {"log", "audit.log"} <= set(files)
    for trace in traces():
        assert not [name for name, data in files.items() if trace in data], trace
        assert not any(trace in data for data in said)
    for process in (daemon.kernel(), *daemon.children("null")):
        assert process.rlimit(resource.RLIMIT_CORE) == (0, 0)
