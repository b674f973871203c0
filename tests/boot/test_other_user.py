"""Another user of the machine, let in by `socket_group`: gets its own processes, nothing of the first's."""

from __future__ import annotations

import grp
import json
import os
import stat
import subprocess
import sys
from typing import Any

import pytest
from llmasos.syscalls import table
from llmasos.syscalls import types as t

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")

SPY = """
import json, os, sys
from llmasos.syscalls import errors, table, types as t
from llmasos.userland.client import Client

# The interpreter may lie where only root can read it, so it becomes somebody else when all is imported.
address, pid, nobody = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([])
os.setgid(nobody)
os.setuid(nobody)
told = {}
with Client(address, timeout_s=3) as client:
    def attempt(name, call):
        try:
            told[name] = repr(client.call(call))
        except errors.LLMasOSError as refusal:
            told[name] = type(refusal).__name__
    told["me"] = client.call(table.Whoami()).subject
    for name, call in {
        "kill": table.Kill(pid, t.Signal.KILL), "stop": table.Kill(pid, t.Signal.STOP),
        "fork": table.Fork(pid),
        "wait": table.Wait(pid, 0.0), "truncate": table.Truncate(pid, 0),
        "nice": table.SetPriority(pid, nice=5),
        "stat_process": table.StatProcess(pid), "infer": table.Infer(pid=pid, tokens=t.pack_tokens([1])),
        "read": table.Read(f"/proc/{pid}/tokens"), "stat": table.Stat(f"/proc/{pid}"),
        "ls": table.Ls(f"/proc/{pid}"), "snapshot": table.Snapshot(pid, "mine"),
        "session": table.Stat("/sessions/secret"),
        "restore": table.Restore("secret"), "sessions": table.Ls("/sessions"),
        "unlink": table.Unlink("/models/tiny"), "dmesg": table.Dmesg(), "audit": table.ReadAudit(),
        "keys": table.Keys(), "shutdown": table.Shutdown(), "pull": table.Pull("other"),
    }.items():
        attempt(name, call)
    told["ps"] = [process.pid for process in client.ps()]
    own = client.call(table.Infer(model="tiny", tokens=t.pack_tokens([1, 2]), max_tokens=3))
    told["own"] = own.generated_tokens
print(json.dumps(told))
"""
MISSING = {
    "kill",
    "stop",
    "fork",
    "wait",
    "truncate",
    "nice",
    "stat_process",
    "infer",
    "read",
    "stat",
    "ls",
    "snapshot",
}
DENIED = {"unlink", "dmesg", "audit", "keys", "shutdown", "pull"}


def spy(address: str, pid: int) -> subprocess.CompletedProcess[str]:
    """Runs SPY as nobody."""
    command = [sys.executable, "-c", SPY, address, str(pid), str(NOBODY)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_another_user_finds_nothing_of_the_first(daemons):
    group = grp.getgrgid(NOBODY).gr_name
    daemon = daemons('devices=["null"]', f'socket_group="{group}"', tiny={})
    path = daemon.address.removeprefix("ipc://")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    for folder in (daemon.home, daemon.home / "run"):
        folder.chmod(0o711)
    with daemon.client() as client:
        pid = client.call(table.SpawnModel(model="tiny")).pid
        client.call(table.Infer(pid=pid, tokens=t.pack_tokens(list(range(1, 50))), max_tokens=2))
        client.call(table.Snapshot(pid, "secret"))
        before = client.call(table.StatProcess(pid))
        run = spy(daemon.address, pid)
        assert run.returncode == 0, run.stderr
        told: dict[str, Any] = json.loads(run.stdout)
        assert {name: told[name] for name in MISSING} == dict.fromkeys(MISSING, "NoSuchProcess")
        assert {name: told[name] for name in DENIED} == dict.fromkeys(DENIED, "PermissionDenied")
        assert (told["ps"], told["own"], told["me"]) == ([], 3, "nobody")
        assert "secret" not in told["sessions"]
        assert told["session"] == told["restore"] == "NoSuchFile"
        after = client.call(table.StatProcess(pid))
        assert (after.state, after.context, after.nice) == (before.state, before.context, before.nice)
        assert client.read_audit().count(b'"subject":"nobody"') >= len(DENIED)


def test_without_the_group_nobody_else_gets_in(daemons):
    daemon = daemons('devices=["null"]', tiny={})
    for folder in (daemon.home, daemon.home / "run"):
        folder.chmod(0o711)
    run = spy(daemon.address, 2)
    assert run.returncode != 0
    assert "DaemonUnreachable" in run.stderr
