"""A grammar is looked at before anything is admitted; a bad one is its sender's trouble alone."""

from __future__ import annotations

import msgspec
import pytest
from llmasos.kernel.grammars import CHECKER, MOST_WAITING, PATIENCE_S
from llmasos.kernel.programs import Program
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .conftest import ROOT, World, infer

BOB = Subject("bob", 1000, 7, False, frozenset(t.TENANT_RIGHTS) | {t.Capability.CONNECT})


class Checked(World):
    """The checking program is this object: it is told grammars and says what it thinks of them."""

    def ask(self, pattern: str, subject: Subject = ROOT, deadline_ms: int | None = None) -> int:
        sampling = t.Sampling(grammar=t.Grammar(t.GrammarKind.REGEX, pattern), stop_token_ids=[5])
        call = infer([1, 2, 3], model="tiny", max_tokens=3, sampling=sampling, deadline_ms=deadline_ms)
        id_ = self.send(call, self.session(subject), subject=subject)
        self.turn(2)
        return id_

    @staticmethod
    def session(subject: Subject) -> bytes:
        return b"\0" + subject.path.encode()

    @property
    def program(self) -> Program:
        """The one that runs."""
        started, self.kernel.programs.to_start = self.kernel.programs.to_start, []
        if started:
            (self.running,) = started
            assert self.running.arguments == [CHECKER]
        return self.running

    def told(self) -> list[str]:
        lines, self.kernel.programs.to_tell = self.kernel.programs.to_tell, []
        assert all(number == self.program.number for number, _ in lines)
        return [msgspec.json.decode(line)["text"] for _, line in lines]

    def says(self, problem: str) -> None:
        self.kernel.programs.line(self.program.number, {"problem": problem})
        self.turn(2)


@pytest.fixture
def checked(tmp_path) -> Checked:
    made = Checked(tmp_path)
    made.model("tiny")
    made.attach()
    made.spawn()
    return made


def test_a_bad_grammar_is_refused_and_remembered(checked: Checked) -> None:
    session = checked.session(ROOT)
    first = checked.ask("(a")
    assert checked.told() == ["(a"]
    assert not checked.answers(first, session)
    checked.says("unclosed group")
    assert checked.error(first, session) is errors.InvalidArgument
    again = checked.ask("(a")
    assert checked.told() == []
    assert checked.error(again, session) is errors.InvalidArgument
    assert len(checked.kernel.processes) == 1


def test_who_takes_too_long_is_refused_and_the_next_is_looked_at(checked: Checked) -> None:
    session = checked.session(ROOT)
    slow, good = checked.ask("slow"), checked.ask("good")
    assert checked.told() == ["slow"]
    checked.now += PATIENCE_S
    checked.turn()
    assert checked.kernel.programs.to_stop == [checked.program.number]
    checked.kernel.programs.over(checked.program.number)  # it was killed
    checked.turn(2)
    assert checked.error(slow, session) is errors.InvalidArgument
    assert checked.told() == ["good"]
    checked.says("")
    checked.turn(6)
    assert checked.answers(good, session)


def test_a_program_that_dies_is_started_again(checked: Checked) -> None:
    session = checked.session(ROOT)
    heavy = checked.ask("heavy")
    checked.told()
    first = checked.program.number
    checked.kernel.programs.over(first)
    checked.turn(2)
    assert checked.error(heavy, session) is errors.InvalidArgument
    again = checked.ask("heavy")  # it may not have been its fault
    assert checked.told() == ["heavy"]
    assert checked.program.number != first
    checked.says("")
    checked.turn(6)
    assert checked.answers(again, session)


def test_a_deadline_counts_from_the_call(checked: Checked) -> None:
    session = checked.session(ROOT)
    late = checked.ask("good", deadline_ms=1000)
    checked.told()
    checked.now += 1.5
    checked.says("")
    assert checked.result(late, session).body["finish"] == t.Finish.DEADLINE


def test_tenants_are_looked_at_by_turns(checked: Checked) -> None:
    for number in range(5):
        checked.ask(f"r{number}")
    checked.ask("b", BOB)
    order = []
    for _ in range(6):
        order += checked.told()
        checked.says("no")
    assert order.index("b") <= 2
    assert sorted(order) == ["b", "r0", "r1", "r2", "r3", "r4"]


def test_so_many_may_wait(checked: Checked) -> None:
    for number in range(MOST_WAITING + 1):  # one is being looked at
        checked.ask(f"r{number}")
    refused = checked.ask("one more")
    assert checked.error(refused, checked.session(ROOT)) is errors.QueueFull


def test_who_has_gone_is_not_admitted(checked: Checked) -> None:
    checked.ask("a", BOB)
    checked.told()
    checked.kernel.disconnected(checked.session(BOB))
    checked.says("")
    assert len(checked.kernel.processes) == 1


def test_a_grammar_needs_a_stop_token(checked: Checked) -> None:
    grammar = t.Grammar(t.GrammarKind.REGEX, "a")
    call = table.Infer(model="tiny", tokens=t.pack_tokens([1]), sampling=t.Sampling(grammar=grammar))
    id_ = checked.send(call)
    checked.turn()
    assert checked.error(id_) is errors.InvalidArgument
