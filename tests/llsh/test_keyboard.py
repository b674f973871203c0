"""A person at a terminal: the chat, the shell, top."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmasos.userland.client import Client
from llmasos.userland.llsh import editor

CTRL_C, CTRL_D = "\x03", "\x04"


def soon(condition: Callable[[], bool], patience_s: float = 5.0) -> None:
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def context_of(client: Client, pid: int) -> int:
    return {row.pid: row.context for row in client.ps()}[pid]


def test_a_chat_over_several_turns(keyboard, client):
    chat = keyboard("chat", "slow", "--max-tokens", "400", "--temperature", "0")
    chat.expect("Ctrl-D or /bye leaves")
    chat.expect(">>>")
    chat.line('"""w1 w2')
    chat.expect(r"\.\.\.")
    chat.line('w3"""')
    chat.expect(r"w\d+ w\d+ w\d+")
    (row,) = client.ps()
    chat.type(CTRL_C)  # stops the answer only
    chat.expect(r"\(stopped\)")
    chat.expect(">>>")
    soon(lambda: client.ps()[0].state == "waiting")
    (same,) = client.ps()
    assert same.pid == row.pid
    chat.line("/set max_tokens 3")
    chat.expect(">>>")
    chat.line("w4")
    chat.expect(r"w\d+ w\d+ w\d+\n.*stopped after 3 tokens")
    (longer,) = client.ps()
    assert longer.pid == row.pid
    assert longer.context > same.context
    chat.line("/show")
    chat.expect(rf"context +{longer.context} of 512 tokens, 4 messages")
    chat.line("/clear")
    chat.expect("the context is empty")
    assert client.ps()[0].context == 0
    chat.line("/clera")
    chat.expect("did you mean /clear")
    chat.type(CTRL_C)  # at an empty prompt
    chat.expect("Ctrl-D or /bye leaves")
    chat.line("/bye")
    assert chat.ends() == 0
    assert client.ps() == []


def test_a_chat_goes_on_with_a_fork(keyboard, client, llsh):
    three_words = ("--max-tokens", "3", "--temperature", "0")  # of drawn ones one in a hundred is not shown
    chat = keyboard("chat", "tiny", *three_words)
    chat.expect(">>>")
    chat.line("w1")
    soon(lambda: client.ps()[0].context > 5 and client.ps()[0].state == "waiting")
    (row,) = client.ps()
    (copy,) = llsh.json("fork", str(row.pid))["pids"]
    other = keyboard("chat", str(copy), *three_words)
    other.expect(">>>")
    other.line("w2")
    other.expect(r"w\d+ w\d+ w\d+")
    other.expect(">>>")
    soon(lambda: context_of(client, copy) > row.context)
    assert context_of(client, row.pid) == row.context
    other.type(CTRL_D)
    assert other.ends() == 0
    assert copy in {row.pid for row in client.ps()}  # it was there before the chat
    chat.type(CTRL_D)
    assert chat.ends() == 0
    llsh("kill", str(copy))
    llsh("wait", str(copy))


def test_the_interactive_shell(keyboard, client):
    shell = keyboard()
    shell.expect("LLMasOS: .*\n.*\n")
    shell.expect("llsh>")
    shell.line("pss")
    shell.expect("did you mean ps")
    shell.line("run slow hello &")
    shell.expect(r"\[1\] run slow hello")
    shell.line("jobs")
    shell.expect("%1 .*running")
    shell.line("fg")
    shell.expect(r"w\d+ w\d+")
    shell.type(CTRL_C)
    shell.expect("llsh>")
    shell.line("run tiny hello --max-tokens 2; whoami")
    shell.expect(r"w\d+ w\d+\n")
    shell.expect("llsh>")
    shell.type("who\t")
    shell.expect("whoami")
    shell.line(" --json")
    shell.expect('"subject"')
    shell.expect("llsh>")
    shell.line("exit")
    assert shell.ends() == 0
    soon(lambda: not client.ps())


def test_top_is_left_with_q(keyboard, client):
    top = keyboard("top", columns=60)
    top.expect("0 processes, 0 running")
    top.type("?")
    top.expect("select a process")
    top.type("x")
    top.expect("0 processes, 0 running")
    top.type("k")
    top.expect("no process")
    top.type("q")
    assert top.ends() == 0


def test_keys_in_top_act_on_the_selected_process(keyboard, client, llsh):
    pids = [llsh.json("spawn", "tiny")["pid"] for _ in range(2)]
    nices = lambda: {row.pid: row.nice for row in client.ps()}  # noqa: E731
    top = keyboard("top", "-d", "0.2")
    top.expect("2 processes, 0 running")
    top.type("p")
    top.expect("sorted by pid")
    top.type("r")
    top.expect(f"nice value of process {pids[0]}")
    top.type("7\r")
    top.expect(f"process {pids[0]}: nice 7")
    assert nices() == {pids[0]: 7, pids[1]: 0}
    top.type("\x1b[B")
    top.type("s")
    top.expect(f"process {pids[1]}: STOP sent")
    top.expect("stopped")
    top.type("s")
    top.expect(f"process {pids[1]}: CONT sent")
    top.type("k")
    top.expect(f"kill process {pids[1]}")
    top.type("n")
    top.expect("left alone")
    assert set(nices()) == set(pids)
    top.type("ky")
    top.expect(f"process {pids[1]}: TERM sent")
    soon(lambda: {row.pid for row in client.ps() if row.state != "zombie"} == {pids[0]})
    top.type("q")
    assert top.ends() == 0
    llsh("kill", str(pids[0]))


def test_top_gives_the_terminal_back_when_it_is_terminated(keyboard, home):
    top = keyboard("top")
    before = top.mode()
    top.expect("0 processes, 0 running")
    assert top.mode() != before
    top.terminate()
    assert top.ends() == 143
    assert top.mode() == before
    assert "\x1b[?1049l" in top.raw


def test_a_chat_of_lines_from_a_pipe(llsh):
    llsh("chat", "tiny", "--max-tokens", "2", stdin='w1\n"""w2\nw3"""\n/bye\nnever\n')
    assert llsh.code == 0, llsh.err
    assert len(llsh.out.splitlines()) == 2
    llsh("chat", "plain", stdin="w1\n")
    assert llsh.code == 1
    assert "no chat template" in llsh.err


def test_a_history_that_cannot_be_written_is_no_drama(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    history = editor._history("llsh")
    (tmp_path / "llsh_history").unlink()
    (tmp_path / "llsh_history").mkdir()
    history.append_string("ps")
    assert history.get_strings() == ["ps"]
