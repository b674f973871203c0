"""Data sets become tokens: every format, what is learnt, rows that are refused by their line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.syscalls import errors
from llmasos.syscalls.training import DataHead, Recipe, TrainEvent
from llmasos.userland import dataset
from llmasos.userland.chat import encode_chat
from llmasos.userland.tokenizer import Tokenizer
from llmasos.userland.tools import Tool

from .conftest import END, START, STOP

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
WORDS = TEXTS.filter(lambda text: bool(text.strip()))
SPICY = st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<|endoftext|>", "hi", "\n", "<|im_start|>user\n"])

Example = tuple[list[int], list[bool]]


def prepare(
    tmp_path: Path, files: dict[str, bytes], name: str, data: bytes, recipe: Recipe | None = None
) -> tuple[DataHead, list[Example]]:
    """What the trainer will read of a data set of these bytes."""
    path, out = tmp_path / name, tmp_path / "data"
    path.write_bytes(data)
    head = dataset.prepare(path, "sha256:d", files, recipe or Recipe(), out, lambda event: None)
    return head, examples(out)


def examples(out: Path) -> list[Example]:
    tokens, ends = array("I"), array("Q")
    tokens.frombytes((out / "tokens.u32").read_bytes())
    ends.frombytes((out / "ends.u64").read_bytes())
    learnt = (out / "learnt.u8").read_bytes()
    assert len(learnt) == len(tokens)
    assert set(learnt) <= {0, 1}
    found, begin = [], 0
    for end in ends:
        found.append((tokens[begin:end].tolist(), list(map(bool, learnt[begin:end]))))
        begin = end
    assert begin == len(tokens)
    return found


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def ids(text: str, files: dict[str, bytes]) -> list[int]:
    return Tokenizer(files).encode(text)


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# What an example is


def test_of_text_all_is_learnt_with_its_end(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    head, found = prepare(tmp_path, bytes_model, "d.jsonl", lines({"text": "ab"}, {"text": "c", "id": 7}))
    assert found == [
        ([*ids("ab", bytes_model), STOP], [True] * 3),
        ([*ids("c", bytes_model), STOP], [True] * 2),
    ]
    tokenizer = hashlib.sha256(bytes_model["tokenizer.json"]).hexdigest()
    assert head == DataHead(1, 2, 5, 5, 3, "sha256:d", f"sha256:{tokenizer}", "")
    assert msgspec.json.decode((tmp_path / "data" / "head.json").read_bytes(), type=DataHead) == head


def test_of_a_prompt_only_the_completion_is_learnt(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    row = {"prompt": "abc", "completion": "de"}
    _, [(tokens, learnt)] = prepare(tmp_path, bytes_model, "d.jsonl", lines(row))
    assert tokens == [*ids("abcde", bytes_model), STOP]
    assert learnt == [False] * 3 + [True] * 3


def test_of_a_conversation_the_assistants_answers_are_learnt(
    tmp_path: Path, bytes_model: dict[str, bytes]
) -> None:
    talk = [says("system", "s"), says("user", "u1"), says("assistant", "a1")]
    talk += [says("user", "u2"), says("assistant", "a2")]
    _, [(tokens, learnt)] = prepare(tmp_path, bytes_model, "d.jsonl", lines({"messages": talk}))
    expected: Example = ([], [])
    for message in talk:
        header, rest = f"{message['role']}\n", f"{message['content']}"
        answers = message["role"] == "assistant"
        for part, counts in (
            ([START, *ids(header, bytes_model)], False),
            ([*ids(rest, bytes_model), STOP, *ids("\n", bytes_model)], answers),
        ):
            expected[0].extend(part)
            expected[1].extend([counts] * len(part))
    assert (tokens, learnt) == expected


def test_calls_of_tools_are_learnt_and_results_are_not(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    talk = [
        says("user", "Well?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
        says("assistant", "Noon."),
    ]
    row = {"messages": talk, "tools": [{"type": "function", "function": {"name": "clock"}}]}
    _, [(tokens, learnt)] = prepare(tmp_path, bytes_model, "d.jsonl", lines(row))
    tokenizer = Tokenizer(bytes_model)
    assert tokens == encode_chat(tokenizer, talk, tools=[Tool("clock")], answer=False)
    said = tokenizer.decode([token for token, counts in zip(tokens, learnt, strict=True) if counts])
    assert said == '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\nNoon.\n'


DEFAULT_SYSTEM = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
Be good.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content | trim }}{% for c in m.tool_calls or [] %}
{{ c.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
BY_TURNS = """{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('by turns') }}{% endif %}
{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}
{% endfor %}"""
NUMBERED = """{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.content }}<|im_end|>{% endfor %}"""


@pytest.mark.parametrize("template", ["", DEFAULT_SYSTEM, BY_TURNS, NUMBERED])
@settings(deadline=None, max_examples=20)
@given(
    texts=st.lists(st.tuples(st.lists(TEXTS, min_size=1, max_size=3), SPICY | TEXTS), min_size=2, max_size=9)
)
def test_answers_of_long_conversations_are_found_as_those_of_short_ones(
    tmp_path_factory: pytest.TempPathFactory,
    bytes_model: dict[str, bytes],
    template: str,
    texts: list[tuple[list[str], str]],
) -> None:
    talk = [says("system", "s")] if template == DEFAULT_SYSTEM and len(texts) % 2 else []
    for said, answer in texts:
        talk += [says("user", said[0])]
        if template in ("", DEFAULT_SYSTEM):
            call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
            talk += [{"role": "assistant", "content": None, "tool_calls": [call]}] * (len(said) > 1)
            talk += [says("tool", text) for text in said[1:]]
        talk += [says("assistant", answer)]
    files = bytes_model | ({"chat_template.jinja": template.encode()} if template else {})
    row = {"messages": [*talk, says("user", "bye")]}
    found = []
    for most in (100, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, "MOST_EACH", most)
            if template == NUMBERED and most == 1:
                with pytest.raises(errors.InvalidArgument, match="does not tell where"):
                    prepare(tmp_path_factory.mktemp("d"), files, "d.jsonl", lines(row))
                return
            found.append(prepare(tmp_path_factory.mktemp("d"), files, "d.jsonl", lines(row))[1])
    assert found[0] == found[1]


def test_the_work_of_a_conversation_is_as_long_as_it_is(
    tmp_path: Path, bytes_model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def counted(*arguments: Any, **options: Any) -> list[int]:
        encoded.append(encode_chat(*arguments, **options))
        return encoded[-1]

    monkeypatch.setattr(dataset, "encode_chat", counted)
    talk = [says("system", "s" * 1000)] + [says("user", "question"), says("assistant", "answer")] * 300
    _, [(tokens, learnt)] = prepare(tmp_path, bytes_model, "d.jsonl", lines({"messages": talk}))
    assert sum(learnt) == 300 * (len(ids("answer\n", bytes_model)) + 1)
    assert sum(map(len, encoded)) < 20 * len(tokens)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "abc", "completion": "de"}, {"messages": [says("user", "u"), says("assistant", "a")]}],
    ids=["completion", "messages"],
)
def test_all_is_learnt_when_the_recipe_says_so(
    tmp_path: Path, bytes_model: dict[str, bytes], row: dict[str, Any]
) -> None:
    recipe = Recipe(completion_only_loss=False)
    _, [(tokens, learnt)] = prepare(tmp_path, bytes_model, "d.jsonl", lines(row), recipe)
    assert learnt == [True] * len(tokens)


@settings(deadline=None)
@given(parts=st.lists(SPICY, min_size=1).map("".join).filter(str.strip), answer=SPICY.filter(str.strip))
def test_control_tokens_in_peoples_text_stay_text(
    tmp_path_factory: pytest.TempPathFactory, bytes_model: dict[str, bytes], parts: str, answer: str
) -> None:
    rows: list[tuple[dict[str, Any], list[int]]] = [
        ({"text": parts}, [STOP]),
        ({"prompt": parts, "completion": answer}, [STOP]),
        ({"messages": [says("user", parts), says("assistant", answer)]}, [START, STOP, START, STOP]),
    ]
    for row, expected in rows:
        tmp_path = tmp_path_factory.mktemp("d")
        _, [(tokens, _)] = prepare(tmp_path, bytes_model, "d.jsonl", lines(row))
        assert [token for token in tokens if token >= END] == expected


def test_the_start_token_comes_once(tmp_path: Path, spm_model: dict[str, bytes]) -> None:
    row = {"prompt": "the", "completion": " rein"}
    _, [(tokens, learnt)] = prepare(tmp_path, spm_model, "d.jsonl", lines(row))
    assert tokens[0] == Tokenizer(spm_model).bos_id
    assert tokens.count(tokens[0]) == 1
    assert not learnt[0]


# Formats


@settings(deadline=None)
@given(texts=st.lists(WORDS, min_size=1, max_size=20))
def test_formats_of_the_same_rows_are_the_same_examples(
    tmp_path_factory: pytest.TempPathFactory, bytes_model: dict[str, bytes], texts: list[str]
) -> None:
    tmp_path = tmp_path_factory.mktemp("d")
    expected = [[*ids(text, bytes_model), STOP] for text in texts]
    head, found = prepare(tmp_path, bytes_model, "d", lines(*({"text": text} for text in texts)))
    assert [tokens for tokens, _ in found] == expected
    assert all(all(learnt) for _, learnt in found)
    assert head.examples == len(texts)
    assert head.tokens == head.learnt == sum(map(len, expected))
    assert head.longest == max(map(len, expected))
    if not any(set("\0\r") & set(text) for text in texts):  # csv has its own manners about these
        table = io.StringIO(newline="")
        csv.writer(table).writerows([["id", "text"], *enumerate(texts)])
        _, found = prepare(tmp_path, bytes_model, "d.csv", table.getvalue().encode())
        assert [tokens for tokens, _ in found] == expected


def test_parquet(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    talks = [[says("user", "hi"), says("assistant", f"a{n}")] for n in range(600)]
    parquet.write_table(pyarrow.table({"messages": talks, "id": range(600)}), tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    _, as_lines = prepare(tmp_path, bytes_model, "d", lines(*({"messages": talk} for talk in talks)))
    for name in ("d.parquet", "unnamed"):
        assert prepare(tmp_path, bytes_model, name, data)[1] == as_lines
    with pytest.raises(errors.InvalidArgument, match="not parquet"):
        prepare(tmp_path, bytes_model, "d.parquet", data[: len(data) // 2])


def test_what_is_null_in_a_message_is_not_there(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    talk = [says("user", "u") | {"name": "Ada"}, says("assistant", "a")]
    parquet.write_table(pyarrow.table({"messages": [talk]}), tmp_path / "t.parquet")
    _, found = prepare(tmp_path, bytes_model, "d.parquet", (tmp_path / "t.parquet").read_bytes())
    assert found == prepare(tmp_path, bytes_model, "d.jsonl", lines({"messages": talk}))[1]


def test_messages_in_csv_are_json(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    talk = [says("user", "u"), says("assistant", "a, b")]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["messages"], [json.dumps(talk)]])
    _, found = prepare(tmp_path, bytes_model, "d.csv", table.getvalue().encode())
    assert found == prepare(tmp_path, bytes_model, "d.jsonl", lines({"messages": talk}))[1]


def test_a_paragraph_of_plain_text_is_an_example(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    text = "\n\nA title\n\nTwo lines\nof text\n \n\nthe end"
    _, found = prepare(tmp_path, bytes_model, "d.txt", text.encode())
    expected = ["A title", "Two lines\nof text", "the end"]
    assert [tokens for tokens, _ in found] == [[*ids(text, bytes_model), STOP] for text in expected]


def test_a_byte_order_mark_and_empty_lines_are_nothing(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    data = b"\xef\xbb\xbf" + lines({"text": "a"}) + b"\r\n\n" + lines({"text": "b"})
    assert len(prepare(tmp_path, bytes_model, "d.jsonl", data)[1]) == 2


# Refusals

GOOD = lines({"text": "a"})


@pytest.mark.parametrize(
    ("data", "line", "why"),
    [
        (GOOD + b"{\n", 2, "not JSON"),
        (GOOD + b"\n\n[1]\n", 4, "not a JSON object"),
        (b'[\n{"text": "a"}\n]\n', 1, "an array"),
        (GOOD + b'{"txt": "b"}\n', 2, "no text"),
        (GOOD + b'{"text": null}\n', 2, "no text"),
        (GOOD + b'{"text": 3}\n', 2, "text is no string"),
        (GOOD + b'{"text": " "}\n', 2, "text is empty"),
        (GOOD + b'{"text": "\xff"}\n', 2, "not UTF-8"),
        (GOOD * 3 + b"[" * 100_000 + b"\n", 4, "not JSON"),
        (b'{"a": 1, "b": 2}\n', 1, "but a, b"),
        (lines({"prompt": "a", "completion": ""}), 1, "completion is empty"),
        (lines({"prompt": "a", "completion": "b"}, {"prompt": "a"}), 2, "no completion"),
        (lines({"messages": "hi"}), 1, "no list"),
        (lines({"messages": []}), 1, "no messages"),
        (lines({"messages": [says("assistant", "a")], "tools": 3}), 1, "tools are no list"),
        (lines({"messages": [says("assistant", "a")], "tools": [3]}), 1, "has to be a function"),
        (lines({"messages": [{"role": "user"}]}), 1, "needs a role and a content"),
        (
            lines({"messages": [says("user", "u"), {"role": "assistant", "content": 3}]}),
            1,
            "must be a string",
        ),
        (lines({"messages": [says("user", "u")]}), 1, "nothing in it is to be learnt"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(
    tmp_path: Path, bytes_model: dict[str, bytes], data: bytes, line: int, why: str
) -> None:
    with pytest.raises(errors.InvalidArgument, match=why) as caught:
        prepare(tmp_path, bytes_model, "d.jsonl", data)
    assert caught.value.details["line"] == line
    assert caught.value.message.startswith(f"line {line}: ")
    assert caught.value.hint
    assert not (tmp_path / "data" / "head.json").exists()


@pytest.mark.parametrize(
    ("data", "line", "why"),
    [
        (b"text\na\nb,c\n", 3, "not 1 fields"),
        (b"text,id\na\n", 2, "not 2 fields"),
        (b'text\n"a\nb"\n"c', 4, "not CSV"),
        (b"messages\nhi\n", 2, "messages are not JSON"),
        (b"name,age\nAda,36\n", 2, "no text"),
    ],
)
def test_a_bad_row_of_csv_is_refused_by_its_line(
    tmp_path: Path, bytes_model: dict[str, bytes], data: bytes, line: int, why: str
) -> None:
    with pytest.raises(errors.InvalidArgument, match=why) as caught:
        prepare(tmp_path, bytes_model, "d.csv", data)
    assert caught.value.details["line"] == line


@pytest.mark.parametrize(
    ("values", "kind", "why"),
    [
        ([b"ok", b"\xff\xfe"], "string", "text: not string"),
        ([b"ok", b"x" * (2 << 20)], "string", "text: longer than 1 MiB"),
        ([0, 2**30], "date32", "text: not date32"),
        ([0, 2**62], "timestamp[us]", "text: not timestamp"),
        ([0, 2**62], "timestamp[ns]", "text: not timestamp"),
        ([0, 0], "Mars/Olympus", "text: not timestamp"),
    ],
)
def test_a_bad_cell_of_parquet_is_refused_by_its_row_and_column(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: list[Any],
    kind: str,
    why: str,
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(dataset, "LONGEST_LINE", 1 << 20)
    if kind == "string":
        data = pyarrow.array(values, pyarrow.binary())
        cells = pyarrow.Array.from_buffers(pyarrow.string(), 2, data.buffers())
        if len(values[1]) > 2:
            cells = cells.dictionary_encode()
    else:
        cells = pyarrow.array(
            values, pyarrow.timestamp("us", tz=kind) if "/" in kind else pyarrow.type_for_alias(kind)
        )
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": cells}), tmp_path / "t.parquet")
    path = tmp_path / "t.parquet"
    with path.open("rb") as file, pytest.raises(errors.InvalidArgument, match=re.escape(why)) as caught:
        list(dataset.rows(path, file))
    assert caught.value.details["line"] == (1 if "/" in kind else 2)


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.txt", "d"])
@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_a_data_set_without_rows_is_refused(
    tmp_path: Path, bytes_model: dict[str, bytes], name: str, data: bytes
) -> None:
    with pytest.raises(errors.InvalidArgument, match="no rows"):
        prepare(tmp_path, bytes_model, name, data)


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_too_long_a_row_is_refused_before_all_of_it_is_read(
    tmp_path: Path, bytes_model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(dataset, "LONGEST_LINE", 1 << 20)
    long = b"x" * (1 << 10) + b"\n" if name == "d.txt" else b"x" * (1 << 10)
    with pytest.raises(errors.InvalidArgument, match="longer than 1 MiB") as caught:
        prepare(tmp_path, bytes_model, name, GOOD + b"\n" + long * (1 << 11))
    assert caught.value.details["line"] == 3


def test_a_template_that_rewrites_what_was_said_cannot_tell_the_answers(
    tmp_path: Path, bytes_model: dict[str, bytes]
) -> None:
    template = b"{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    row = {"messages": [says("user", "u"), says("assistant", "a"), says("user", "u")]}
    with pytest.raises(errors.InvalidArgument, match="completion_only_loss"):
        prepare(tmp_path, {**bytes_model, "chat_template.jinja": template}, "d.jsonl", lines(row))


def test_a_model_without_a_template_learns_no_conversations(
    tmp_path: Path, bytes_model: dict[str, bytes]
) -> None:
    files = {name: data for name, data in bytes_model.items() if name != "chat_template.jinja"}
    row = {"messages": [says("user", "u"), says("assistant", "a")]}
    with pytest.raises(errors.UnsupportedModel, match="chat template"):
        prepare(tmp_path, files, "d.jsonl", lines(row))


# The process


def run(
    tmp_path: Path, files: dict[str, bytes], data: bytes, *, limit: int | None = None, out: Path | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the lines that it prints; no file may get longer than `limit` bytes.
    What it makes is `out`, without one tmp_path/data."""
    (tmp_path / "d.jsonl").write_bytes(data)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    places = json.dumps({name: str(tmp_path / name) for name in files})
    command = [sys.executable, "-m", "llmasos.userland.dataset", "--digest", "sha256:d", "--files", places]
    command += ["--data", str(tmp_path / "d.jsonl"), "--out", str(out or tmp_path / "data")]
    command += ["--parent", str(os.getpid())]

    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=bound, timeout=60, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_process_tells_how_far_it_is_and_what_it_made(
    tmp_path: Path, bytes_model: dict[str, bytes]
) -> None:
    data = lines(*({"text": f"{n}" * 9} for n in range(5000)))
    code, told = run(tmp_path, bytes_model, data)
    assert code == 0
    events = [msgspec.convert(line, TrainEvent) for line in told[:-1]]
    assert {event.phase for event in events} == {"prepare"}
    assert [event.step for event in events] == sorted(event.step for event in events)
    assert events[-1].step == events[-1].steps == len(data)
    head = msgspec.convert(told[-1]["ok"], DataHead)
    assert head.examples == 5000
    assert len(examples(tmp_path / "data")) == 5000


def test_the_process_steps_back_as_far_as_trainers_do() -> None:
    code = "import os; from llmasos.userland.dataset import limit_self; limit_self(0)"
    code += "; print(os.sched_getscheduler(0) == os.SCHED_IDLE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"True\n"


def test_the_process_tells_what_it_refuses(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    code, told = run(tmp_path, bytes_model, GOOD + b"{\n")
    assert code == 1
    problem = errors.from_wire(told[-1]["error"])
    assert isinstance(problem, errors.InvalidArgument)
    assert problem.details["line"] == 2


def test_a_file_that_cannot_grow_is_a_failure_of_storage(
    tmp_path: Path, bytes_model: dict[str, bytes]
) -> None:
    code, told = run(tmp_path, bytes_model, lines({"text": "abc" * 100_000}), limit=1 << 16)
    assert code == 1
    assert isinstance(errors.from_wire(told[-1]["error"]), errors.StorageFailed)
    assert not (tmp_path / "data" / "head.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 KiB are its size."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    if os.geteuid() or subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("only root may mount, and not everywhere")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_named(tmp_path: Path, bytes_model: dict[str, bytes], small_disk: Path) -> None:
    code, told = run(tmp_path, bytes_model, lines({"text": "abc" * 100_000}), out=small_disk / "data")
    assert code == 1
    problem = errors.from_wire(told[-1]["error"])
    assert isinstance(problem, errors.StorageFailed)
    assert "full" in problem.message
    assert problem.hint
    assert not (small_disk / "data" / "head.json").exists()


def test_the_files_are_little_endian(tmp_path: Path, bytes_model: dict[str, bytes]) -> None:
    prepare(tmp_path, bytes_model, "d.jsonl", lines({"text": "a"}))
    assert (tmp_path / "data" / "tokens.u32").read_bytes()[4:] == struct.pack("<I", STOP)
    assert (tmp_path / "data" / "ends.u64").read_bytes() == struct.pack("<Q", 2)
