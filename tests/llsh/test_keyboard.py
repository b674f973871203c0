"""A person at a terminal: the chat, the shell, top."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmasos.userland.client import Client

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
    chat = keyboard("chat", "tiny", "--max-tokens", "3")
    chat.expect(">>>")
    chat.line("w1")
    soon(lambda: client.ps()[0].context > 5 and client.ps()[0].state == "waiting")
    (row,) = client.ps()
    (copy,) = llsh.json("fork", str(row.pid))["pids"]
    other = keyboard("chat", str(copy), "--max-tokens", "3")
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
    top.expect("q leaves")
    top.type("q")
    assert top.ends() == 0


def test_a_chat_of_lines_from_a_pipe(llsh):
    llsh("chat", "tiny", "--max-tokens", "2", stdin='w1\n"""w2\nw3"""\n/bye\nnever\n')
    assert llsh.code == 0, llsh.err
    assert len(llsh.out.splitlines()) == 2
    llsh("chat", "plain", stdin="w1\n")
    assert llsh.code == 1
    assert "no chat template" in llsh.err
