"""Saving, restoring and moving processes from the shell."""

from __future__ import annotations

import json

from llmasos.syscalls import table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.llm import LLM

from .conftest import Typist


def test_save_list_restore_remove(client: Client) -> None:
    llsh = Typist(client)
    pid = llsh("spawn", "tiny").strip()
    llsh("run", pid, "--raw", "w1 w2 w3", "--max-tokens", "5")
    assert llsh("snapshot", pid, "mine").startswith("/sessions/mine: 8 tokens")
    assert "mine" in llsh("ls", "/sessions")
    assert "SESSIONS" in llsh("df")
    restored = json.loads(llsh("restore", "mine", "--json"))
    assert (restored["context"], restored["recomputed"]) == (8, "")
    first = llsh("run", pid, "--raw", "w4", "--max-tokens", "4")
    assert llsh("run", str(restored["pid"]), "--raw", "w4", "--max-tokens", "4") == first
    assert "on null" in llsh("migrate", pid, "null")
    llsh("migrate", pid, "cpu:7")
    assert (llsh.code, "no device" in llsh.err) == (1, True)
    llsh("snapshot", pid, "my notes")
    assert (llsh.code, "letters, digits" in llsh.err, "regex" in llsh.err) == (1, True, False)
    before = [process.pid for process in client.ps()]
    llsh("restore", "mine", "--resume")
    assert (llsh.code, "no answer was under way" in llsh.err) == (1, True)
    assert [process.pid for process in client.ps()] == before
    llsh("rm", "/sessions/mine")
    assert llsh.code == 0
    llsh("restore", "mine")
    assert (llsh.code, "no snapshot mine" in llsh.err) == (1, True)
    llsh("kill", "-9", pid, str(restored["pid"]))


def test_an_answer_that_was_under_way_is_resumed(client: Client) -> None:
    llsh = Typist(client)
    llm = LLM.from_pretrained("slow", client=client)
    with llm.process("w1 w2 w3") as process:
        stream = process.infer(max_tokens=24, sampling=t.Sampling(temperature=1.0, seed=3))
        made = next(stream).tokens
        process.snapshot("middle")
        made += [token for event in stream for token in event.tokens]
        whole = process.text
    had = int(client.call(table.Stat("/sessions/middle")).details["tokens"])
    note = Typist(client)
    pid = note("restore", "middle").strip()
    assert "--resume" in note.err
    rest = llsh("restore", "middle", "--resume")
    assert rest.split() == whole.split()[had:]
    with llm.restore("middle") as again:
        assert "".join(again.resume()).split() == rest.split()
    llsh("rm", "/sessions/middle")
    llsh("kill", "-9", pid, *(str(p.pid) for p in client.ps() if str(p.pid) != pid))
