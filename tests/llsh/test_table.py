"""Tables fit the terminal, and are plain in a pipe."""

import msgspec
import pytest
from llmasos.syscalls import types as t
from llmasos.userland.llsh import quantity
from llmasos.userland.llsh.processes import rows
from llmasos.userland.llsh.table import Column, Table
from llmasos.userland.llsh.terminal import Terminal, clean

PROCESS = t.ProcessInfo(
    pid=123456,
    parent=1,
    owner="somebody/with-a-long-label",
    name="nightly\x1b[2Jjob",
    model="HuggingFaceTB/SmolLM2-360M-Instruct:latest",
    device="cpu",
    sched_class=t.SchedClass.INTERACTIVE,
    nice=-5,
    state=t.State.WAITING,
    waiting_for="owner",
    context=8192,
    computed=8192,
    blocks=512,
    generated=100,
    tokens_per_s=12.34,
    queue_place=3,
    age_s=7300.0,
)


def screen(paper, table: Table) -> list[str]:
    Terminal(paper, paper).table(table)
    return paper.getvalue().splitlines()


@pytest.fixture
def paper():
    import io

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    return Tty()


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_ps_fits_the_terminal_and_keeps_what_matters(paper, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    lines = screen(paper, rows([PROCESS]))
    assert len(lines) == 2
    assert all(len(line.rstrip()) <= columns for line in lines)
    assert lines[0].split()[0] == "PID"
    if columns >= 40:
        assert "123456" in lines[1]
        assert "STATE" in lines[0]
    if columns >= 60:
        assert "TOK/S" in lines[0]
        assert "12.3" in lines[1]
    if columns == 120:
        assert "QUEUE" in lines[0]


def test_a_pipe_gets_every_column_in_full_and_no_box():
    text = rows([PROCESS]).plain()
    assert "HuggingFaceTB/SmolLM2-360M-Instruct" in text
    assert "somebody/with-a-long-label" in text
    assert not set(text) & set("\t│┃─━┏┓╭╮…\x1b")
    header, row = text.splitlines()
    assert ",".join(header.split()) == "PID,OWNER,MODEL,CLASS,NICE,STATE,CONTEXT,TOK/S,QUEUE,AGE,NAME"
    assert row.split()[:2] == ["123456", "somebody/with-a-long-label"]


def test_colours_are_for_terminals_that_want_them(paper, monkeypatch):
    running = msgspec.structs.replace(PROCESS, state=t.State.RUNNING, waiting_for="", name="")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in "".join(screen(paper, rows([running])))
    monkeypatch.setenv("NO_COLOR", "1")
    paper.seek(0)
    paper.truncate()
    assert "\x1b" not in "".join(screen(paper, rows([running])))


def test_a_stranger_cannot_drive_the_terminal():
    assert "\x1b" not in rows([PROCESS]).plain()
    assert clean("a\x1b]0;title\x07b\u202e\nc\td") == "a]0;titleb\nc\td"


def test_wide_characters_are_counted_as_they_are_shown():
    table = Table([Column("A"), Column("B")])
    table.add("日本", "x")
    table.add("ab", "y")
    assert table.plain() == "A     B\n日本  x\nab    y\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (98_400_000, "98.4 MB"),
        (999_950_000, "1.0 GB"),
        (1.2e13, "12.0 TB"),
    ],
)
def test_sizes(number, text):
    assert quantity.size(int(number)) == text


def test_other_quantities():
    assert quantity.count(134_515_008) == "135M"
    assert quantity.count(1_240_000_000) == "1.2B"
    assert [quantity.age(s) for s in (0.4, 59, 61, 7300, 200000)] == ["0s", "59s", "1m", "2h", "2d"]
    assert quantity.ago(3 * 86400) == "3 days ago"
    assert quantity.number(1, "process") == "1 process"
    assert quantity.number(2, "process") == "2 processes"
