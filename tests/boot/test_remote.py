"""A daemon on tcp: who has no authorized key gets nothing, who has one is its tenant and no more."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from llmasos.syscalls import chain, errors, table, wire
from llmasos.syscalls import types as t
from llmasos.syscalls.types import Capability, KeyInfo
from llmasos.userland import keys
from llmasos.userland.client import Client


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def remote() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def daemon(daemons, remote):
    return daemons('devices=["null"]', f'listen="{remote}"', tiny={"llmasos_null_blocks": 256})


@pytest.fixture
def own_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A client's home of its own; its public key."""
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    return keys.make_pair().public


def test_a_key_is_its_tenant_and_loses_its_sessions_with_its_rights(daemon, remote, own_keys):
    with daemon.client() as admin:
        keys.trust(remote, admin.call(table.Keys()).server)
        with pytest.raises(errors.PermissionDenied, match="does not know this key"):
            Client(remote)
        admin.call(table.AuthorizeKey(KeyInfo("alice", own_keys)))
        mine = admin.call(table.SpawnModel(model="tiny")).pid
        with Client(remote) as alice:
            me = alice.call(table.Whoami())
            assert (me.subject, me.uid, me.admin) == ("alice", -1, False)
            made = alice.call(table.Infer(model="tiny", tokens=t.pack_tokens([1, 2]), max_tokens=3))
            assert made.generated_tokens == 3
            with pytest.raises(errors.NoSuchProcess):
                alice.kill(mine)
            with pytest.raises(errors.PermissionDenied):
                alice.call(table.Shutdown())
            pid = alice.call(table.SpawnModel(model="tiny")).pid
            assert [p.pid for p in alice.ps()] == [pid]
            stream = alice.stream(table.Infer(pid=pid, tokens=t.pack_tokens([1])), window=1)
            next(stream)
            admin.call(table.RevokeKey("alice"))
            with pytest.raises(errors.LLMasOSError, match="revoked"):
                stream.result()
            assert [p.pid for p in admin.ps()] == [mine]
            with pytest.raises(errors.PermissionDenied, match="revoked"):
                alice.call(table.Whoami(), timeout_s=3)
        with pytest.raises(errors.PermissionDenied):
            Client(remote)
        admin.kill(mine)
        told = [chain.unseal(line)[0] for line in admin.read_audit().splitlines()]
        assert {"key refused", "authorize_key", "login", "refused", "revoke_key"} <= {r.event for r in told}
        assert all(r.facts["key"] == own_keys for r in told if r.event in ("login", "authorize_key"))


def test_files_in_the_folder_count_without_a_restart(daemon, remote, own_keys):
    with daemon.client() as admin:
        keys.trust(remote, admin.call(table.Keys()).server)
        folder = daemon.home / "keys" / "authorized"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "bob.key"
        file.write_text(f'tenant = "bob"\npublic = "{own_keys}"\nrights = ["see"]\n')
        (folder / "broken.key").write_text("tenant = 7")
        until = time.monotonic() + 5
        while not admin.call(table.Keys()).keys:
            assert time.monotonic() < until
            time.sleep(0.05)
        with Client(remote) as bob:
            assert bob.call(table.Whoami()).subject == "bob"
            with pytest.raises(errors.PermissionDenied):
                bob.call(table.SpawnModel(model="tiny"))
            file.unlink()
            while admin.call(table.Keys()).keys:
                assert time.monotonic() < until
                time.sleep(0.05)
            with pytest.raises(errors.LLMasOSError):
                bob.call(table.Ps(), timeout_s=2)
        assert any("broken.key" in line.text for line in admin.stream(table.Dmesg()))
        (folder / "broken.key").unlink()


def test_nobody_gets_the_right_to_administer_by_key(daemon, own_keys):
    with daemon.client() as admin, pytest.raises(errors.InvalidArgument):
        admin.call(table.AuthorizeKey(KeyInfo("alice", own_keys, (Capability.ADMIN,))))


def test_without_curve_tcp_answers_nothing(daemon, remote):
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.connect(remote)
    plain.send_multipart(wire.encode_request(1, table.Hello(table.VERSION, table.table_hash()), 0))
    assert not plain.poll(500)
    context.destroy(0)


def test_the_daemons_key_is_kept_and_private(daemon):
    path = daemon.home / "keys" / "server.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with daemon.client() as admin:
        assert admin.call(table.Keys()).server in path.read_text()


def test_llsh_talks_to_another_daemon(daemon, remote, own_keys, tmp_path):
    def llsh(*words: str, home: Path) -> str:
        env = {**os.environ, "LLMASOS_HOME": str(home)}
        command = [sys.executable, "-m", "llmasos.userland.llsh.main", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    public = llsh("key", "show", home=tmp_path)
    assert public == own_keys
    server = llsh("key", "authorize", public, "--as", "carol", home=daemon.home).split()[1]
    llsh("key", "trust", remote, server, home=tmp_path)
    assert llsh("--host", remote, "whoami", home=tmp_path) == "carol"
    llsh("key", "revoke", "carol", home=daemon.home)
