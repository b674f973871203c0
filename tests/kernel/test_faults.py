"""A bug in the kernel is told by type and place: its text may quote a prompt."""

from __future__ import annotations

import pytest
from llmasos.kernel import dmesg, trap
from llmasos.syscalls import errors, table

from .conftest import World


def test_the_text_of_a_bug_is_not_told(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prompt = "my secret"

    def broken(*_: object) -> None:
        raise ValueError(prompt)

    world.send(table.Ps())
    monkeypatch.setattr(trap, "_dispatch", broken)
    id_ = world.send(table.Ps())
    world.turn()
    assert world.error(id_) is errors.KernelFault
    said = capfd.readouterr().err
    assert "ValueError" in said
    assert "test_faults.py" in said
    assert prompt not in said + str(world.result(id_).body)


def test_names_cannot_write_on_the_readers_terminal() -> None:
    log = dmesg.Log(lambda: 0.0, 4)
    log.info("pull of \x1b[2Jx\n[0.0] info: forged" + "y" * 5000)
    [line] = log.after(0)
    assert line.text.startswith("pull of \\x1b[2Jx\\n[0.0]")
    assert len(line.text) < 1100
