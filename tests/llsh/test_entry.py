"""`llsh` as a program: exit codes, streams, what it imports."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

LLSH = [sys.executable, "-m", "llmasos.userland.llsh.main"]


def run(*words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LLSH, *words], input=stdin, capture_output=True, text=True, timeout=30, env={**os.environ, **env}
    )


@pytest.mark.parametrize(
    "words", [["ps"], ["top"], ["kill", "1"], ["list"], ["shutdown"], ["run", "12", "hi"]]
)
def test_without_a_daemon_commands_say_so_and_start_none(tmp_path, words):
    done = run(*words, LLMASOS_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "llsh: the daemon is not running"
    assert "llmasosd" in done.stderr.splitlines()[1]
    assert not (tmp_path / "run").exists()


def test_help_and_usage_need_no_daemon(tmp_path):
    helped = run("--help", LLMASOS_HOME=str(tmp_path))
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "llsh run smollm2" in helped.stdout
    wrong = run("ps", "--nonsense", LLMASOS_HOME=str(tmp_path))
    assert wrong.returncode == 2
    assert run("--version").stdout.startswith("llsh 0.")


def test_who_reads_no_further_is_told_as_sigpipe_does(home):
    reader, writer = os.pipe()
    os.close(reader)
    words = [*LLSH, "cat", "/models/tiny/tokenizer.json"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, timeout=30)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("line", ["ps | head", "list > models.txt"])
def test_pipes_are_the_outer_shells(home, line):
    done = run("-c", line)
    assert done.returncode == 2
    assert "outer shell" in done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys, io\n"
        "from llmasos.userland.llsh.main import dispatch\n"
        "from llmasos.userland.llsh.shell import Shell\n"
        "from llmasos.userland.llsh.terminal import Terminal\n"
        "dispatch(['help'], Shell(Terminal(io.StringIO(), io.StringIO())))\n"
        "heavy = 'torch transformers tokenizers prompt_toolkit zmq jinja2 numpy rich'.split()\n"
        "print(sorted(set(heavy) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "[]\n", done.stderr


def test_prompts_come_from_a_pipe_and_answers_go_to_one(home):
    done = run("run", "tiny", "--max-tokens", "5", stdin="w1 w2\n")
    assert done.returncode == 0
    assert len(done.stdout.split()) == 5
    assert done.stderr == ""


def test_a_gateway_that_cannot_serve_says_why_and_nothing_else(home, tmp_path):
    (junk := tmp_path / "junk.pem").write_bytes(b"\xff")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for words, says in (
            (["--port", port], f"port {port} is taken"),
            (["--port", "0", "--tls-cert", str(junk), "--tls-key", str(junk)], "files in PEM"),
            (["--port", "0", "--tls-cert", "/etc", "--tls-key", "/etc"], "Is a directory"),
        ):
            done = run("serve", *words)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith("llsh: ")
            assert says in done.stderr.splitlines()[0]


def test_any_bytes_may_come_from_a_pipe_and_none_need_to(home):
    for stdin in ("printf 'w1 \\377' |", "<&-"):
        line = f"{stdin} {' '.join(LLSH)} run tiny w2 --max-tokens 3"
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=30)
        assert (done.returncode, len(done.stdout.split()), done.stderr) == (0, 3, "")


def test_a_full_disk_is_told(home):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*LLSH, "list"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "llsh: cannot write: No space left on device\n")


def test_a_key_that_does_not_fit_on_the_disk_leaves_no_half_of_it(tmp_path):
    done = subprocess.run(
        [*LLSH, "key", "new"],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "LLMASOS_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8)),
    )
    assert (done.returncode, done.stderr) == (1, "llsh: cannot write: File too large\n")
    assert list((tmp_path / "keys").iterdir()) == []


def test_a_reader_that_leaves_is_no_drama(home):
    writer = subprocess.Popen(
        [*LLSH, "run", "tiny", "hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    writer.wait(20)
    assert writer.stderr.read() == b""
    writer.stderr.close()


def test_ctrl_c_is_130_and_the_process_is_gone(home, client):
    child = subprocess.Popen(
        [*LLSH, "run", "slow", "hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.read(3)
    child.send_signal(signal.SIGINT)
    assert child.wait(10) == 130
    assert b"Traceback" not in child.stderr.read()
    child.stdout.close()
    child.stderr.close()
    until = time.monotonic() + 5
    while client.ps():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_shells_complete_models_of_the_daemon(home):
    done = run(
        _LLSH_COMPLETE="complete_bash",
        COMP_WORDS="llsh run t",
        COMP_CWORD="2",
        _TYPER_COMPLETE_ARGS="llsh run t",
    )
    assert done.stdout.split() == ["tiny"]
