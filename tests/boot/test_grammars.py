"""Constrained answers outlive everything that answers outlive, and keep to their grammar."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from ..drivers.conftest import VOCAB, characters
from .conftest import Daemon

END = 95
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 30, "maxLength": 40}, "n": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
GRAMMAR = t.Grammar(t.GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))


def ask(grammar: t.Grammar = GRAMMAR, **more: object) -> table.Infer:
    sampling = t.Sampling(grammar=grammar, stop_token_ids=[END], seed=1)
    given = {} if "pid" in more else {"model": "letters", "tokens": t.pack_tokens([1, 2, 3])}
    return table.Infer(max_tokens=200, sampling=sampling, **{**given, **more})


def text_of(tokens: list[int]) -> str:
    return "".join(chr(32 + token) for token in tokens if token < END)


@pytest.fixture(scope="module")
def letters(daemons: Callable[..., Daemon]) -> Daemon:
    model = {"vocab_size": VOCAB, "llmasos_null_step_seconds": 0.02, "tokenizer": characters()}
    return daemons('devices=["null"]', letters=model)


@pytest.fixture(scope="module")
def expected(letters: Daemon) -> list[int]:
    with letters.client() as client:
        made = [token for event in client.stream(ask()) for token in event.tokens]
    found = json.loads(text_of(made))
    assert 30 <= len(found["name"]) <= 40
    assert made[-1] == END
    return made


@pytest.mark.parametrize("victim", ["null", "--kernel"])
def test_an_answer_is_the_same_though_its_worker_or_kernel_is_killed(
    letters: Daemon, expected: list[int], victim: str
) -> None:
    with letters.client() as client, client.stream(ask()) as stream:
        made = list(next(stream).tokens)
        for event in stream:
            made += event.tokens
            if len(made) == 9:
                letters.children(victim)[0].kill()
        assert stream.reply.finish is t.Finish.STOP
    assert made == expected


def test_a_snapshot_goes_on_where_it_was_in_its_grammar(letters: Daemon, expected: list[int]) -> None:
    with letters.client() as client:
        pid = client.call(table.SpawnModel("letters")).pid
        made = []
        with client.stream(ask(pid=pid, tokens=t.pack_tokens([1, 2, 3]))) as stream:
            for event in stream:
                made += event.tokens
                if len(made) >= 9:
                    break
            client.call(table.Snapshot(pid, "half"))
        back = client.call(table.Restore("half"))
        known = t.unpack_tokens(client.read_file(f"/proc/{back.pid}/tokens"))[3:]
        assert known == expected[: len(known)]
        assert back.sampling.grammar == GRAMMAR
        call = table.Infer(back.pid, sampling=back.sampling, max_tokens=back.max_tokens)
        rest = [token for event in client.stream(call) for token in event.tokens]
    assert known + rest == expected


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (t.GrammarKind.REGEX, "(a"),
        (t.GrammarKind.JSON_SCHEMA, "{"),
        (t.GrammarKind.JSON_SCHEMA, '{"type": "strange"}'),
        (t.GrammarKind.JSON_SCHEMA, '{"$ref": "#/nowhere"}'),
        (t.GrammarKind.JSON_SCHEMA, "[" * 30_000),
        (t.GrammarKind.LARK, "start: nothing"),
        (t.GrammarKind.CHOICE, "[]"),
    ],
)
def test_a_bad_grammar_is_its_senders_error(letters: Daemon, kind: t.GrammarKind, text: str) -> None:
    with letters.client() as client:
        workers = {worker.pid for worker in letters.children("null")}
        with pytest.raises(errors.InvalidArgument, match="grammar"):
            client.stream(ask(t.Grammar(kind, text))).result()
        assert {worker.pid for worker in letters.children("null")} == workers
        assert not client.ps()


def test_a_checker_that_is_killed_is_started_again(letters: Daemon) -> None:
    with letters.client() as client:
        client.stream(ask(t.Grammar(t.GrammarKind.CHOICE, '["a", "b"]'))).result()
        (checker,) = [
            child
            for child in letters.kernel().children()
            if "llmasos.drivers.grammar_checker" in child.cmdline()
        ]
        checker.kill()
        checker.wait(5)
        with client.stream(ask(t.Grammar(t.GrammarKind.CHOICE, '["c", "d"]'))) as stream:
            made = [token for event in stream for token in event.tokens]
    assert text_of(made) in ("c", "d")
