"""Makes tokens of a data set, in a process of its own that limits itself: it reads what strangers wrote.

    python -m llmasos.userland.dataset --data FILE --digest SHA256 --files JSON --recipe JSON --out FOLDER

FILE is JSON lines, CSV, parquet or plain text: its name's ending says so, else its content. A row has
`text`, or `prompt` and `completion`, or `messages`, and all rows have the same; other columns are ignored.
Plain text is a `text` for each paragraph (blank lines separate them). `--files` names the files of the
model's tokenizer, `--recipe` is a training.Recipe. FOLDER becomes what training.DataHead says.

What is learnt: of `text` all; of `prompt` and `completion` the completion; of `messages` what the assistant
says, as the chat template writes it; with `completion_only_loss` false all of all. An example ends with the
model's end-of-sequence token, but a conversation as its template ends it.

Speaks JSON lines on standard output: training.TrainEvent of phase `prepare`, at most ten a second, `step` of
`steps` are bytes; last {"ok": {…}} or {"error": {…}} (a row that is refused is named by its line number).
Exits 0 or 1, and dies with its parent."""

from __future__ import annotations

import argparse
import csv
import ctypes
import errno
import hashlib
import itertools
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls.training import DataHead, Recipe, TrainEvent

from .chat import encode_chat
from .tokenizer import FILES, TEMPLATE_FILE, Tokenizer
from .tools import Tool

LONGEST_LINE = 16 << 20
"""Bytes of a row, or of a paragraph of plain text."""

MOST_EACH = 16
"""Answers of a conversation of which each is found by encoding all that came before it."""

_LEAD = 64  # characters of a message
_MOST_AGAIN = 16  # times as much as a conversation is encoded to find its answers

MEMORY = 8 << 30
NICE = 10
INTERVAL_S = 0.1
_FLUSH = 1 << 16  # tokens
_BATCH = 32  # rows of parquet
_PR_SET_PDEATHSIG = 1

KINDS = (("messages",), ("prompt", "completion"), ("text",))
COLUMNS = frozenset(name for kind in KINDS for name in kind)

Row = dict[str, Any]
Example = tuple[list[int], list[bool]]
"""Token ids, and which of them are learnt."""

Span = tuple[list[int], bool]
"""Token ids, and whether they are learnt."""


def refusal(line: int, why: str, hint: str = "") -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"line {line}: {why}", hint=hint or "mend or remove it, then train again", field="dataset", line=line
    )


# Rows


def format_of(path: Path) -> str:
    """`jsonl`, `csv`, `parquet` or `text`."""
    known = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
    known |= {".txt": "text", ".text": "text", ".md": "text"}
    if (found := known.get(path.suffix.lower())) is not None:
        return found
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return "jsonl"
    names = {name.strip().strip('"') for name in start.split(b"\n")[0].decode(errors="replace").split(",")}
    return "csv" if any(set(kind) <= names for kind in KINDS) else "text"


def rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """The rows of a data set with their line numbers, streamed; `file` is its open file, whose position tells
    how far it is. Raises InvalidArgument."""
    match format_of(path):
        case "jsonl":
            return _json_rows(file)
        case "csv":
            return _csv_rows(file)
        case "parquet":
            return _parquet_rows(file)
        case _:
            return _paragraphs(file)


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, without a byte order mark."""
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise refusal(number, f"longer than {LONGEST_LINE >> 20} MiB")
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as problem:
            raise refusal(number, f"not UTF-8 (byte {problem.start})") from None


def _json_rows(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        if number == 1 and line.startswith("["):
            raise refusal(
                1, "an array, not a JSON object on each line", "`jq -c '.[]' FILE` makes lines of it"
            )
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as problem:
            raise refusal(number, f"not JSON: {problem}") from None
        if not isinstance(row, dict):
            raise refusal(number, "not a JSON object", 'a row looks like {"prompt": "…", "completion": "…"}')
        yield number, row


def _csv_rows(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.DictReader((line for _, line in _lines(file)), strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as problem:
            raise refusal(reader.line_num + 1, f"not CSV: {problem}") from None
        if row is None:
            return
        if None in row or None in row.values():
            raise refusal(
                reader.line_num, f"not {len(reader.fieldnames or [])} fields, as the first line has"
            )
        found: Row = dict(row)
        if "messages" in found:
            try:
                found["messages"] = msgspec.json.decode(found["messages"])
            except (msgspec.DecodeError, RecursionError) as problem:
                raise refusal(reader.line_num, f"messages are not JSON: {problem}") from None
        yield reader.line_num, found


def _parquet_rows(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise errors.InvalidArgument(
            "parquet needs the package pyarrow", hint="pip install 'llmasos[train]'", field="dataset"
        ) from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name in COLUMNS]
        for batch in table.iter_batches(_BATCH, columns=columns):
            for place in range(batch.num_rows):
                number += 1
                cells = zip(batch.schema.names, batch.columns, strict=True)
                yield number, {name: _cell(number, name, column.slice(place, 1)) for name, column in cells}
    except MemoryError:  # pyarrow's own is one, too
        raise MemoryError from None
    except (pyarrow.ArrowException, OSError) as problem:
        raise refusal(number + 1, f"not parquet: {str(problem)[:200]}") from None


def _cell(number: int, name: str, cell: Any) -> Any:
    """The value of a parquet column, here an array of one row. Raises InvalidArgument."""
    if hasattr(cell, "dictionary_decode"):
        cell = cell.dictionary_decode()  # it would be as long as all that the column has
    if cell.nbytes > LONGEST_LINE:
        raise refusal(number, f"{name}: longer than {LONGEST_LINE >> 20} MiB")
    try:
        return cell.to_pylist()[0]
    except MemoryError:
        raise
    except Exception as problem:  # of text that is not UTF-8, of times that no calendar has, and what else
        raise refusal(number, f"{name}: not {str(cell.type)[:80]}: {type(problem).__name__}") from None


def _paragraphs(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """A paragraph is named by its first line."""
    begun, paragraph, size = 0, list[str](), 0
    for number, line in _lines(file):
        if line.strip():
            begun = begun if paragraph else number
            paragraph.append(line)
            size += len(line)
            if size > LONGEST_LINE:
                raise refusal(begun, f"a paragraph longer than {LONGEST_LINE >> 20} MiB")
        elif paragraph:
            yield begun, {"text": "".join(paragraph).rstrip("\r\n")}
            paragraph, size = [], 0
    if paragraph:
        yield begun, {"text": "".join(paragraph).rstrip("\r\n")}


# Examples


class Encoder:
    """Makes examples of rows. `all_learnt`: prompts too."""

    def __init__(self, tokenizer: Tokenizer, all_learnt: bool) -> None:
        self._tokenizer = tokenizer
        self._all = all_learnt
        self._kind: tuple[str, ...] = ()
        self._end = tokenizer.eos_ids[:1]

    @property
    def chats(self) -> bool:
        """Whether rows are conversations."""
        return self._kind == ("messages",)

    def encode(self, line: int, row: Row) -> Example:
        """Raises InvalidArgument naming the line."""
        if not self._kind:
            kinds = [kind for kind in KINDS if set(kind) <= row.keys()]
            if not kinds:
                raise refusal(
                    line,
                    f"no text, no prompt and completion, no messages, but {', '.join(map(str, row))[:200]}",
                    "rename the columns",
                )
            self._kind = kinds[0]
        if missing := [name for name in self._kind if row.get(name) is None]:
            raise refusal(line, f"no {' and no '.join(missing)}")
        try:
            ids, learnt = self._messages(row) if self.chats else self._strings(line, row)
        except errors.UnsupportedModel:
            raise
        except errors.LLMasOSError as problem:
            if problem.details.get("line"):
                raise
            raise refusal(line, problem.message) from None
        if not any(learnt):
            raise refusal(line, "nothing in it is to be learnt")
        return ids, [True] * len(ids) if self._all else learnt

    def _strings(self, line: int, row: Row) -> Example:
        for name in self._kind:
            if not isinstance(row[name], str):
                raise refusal(line, f"{name} is no string")
        if not row[self._kind[-1]].strip():
            raise refusal(line, f"{self._kind[-1]} is empty")
        if self._kind == ("text",):
            ids = self._tokenizer.encode(row["text"]) + self._end
            return ids, [True] * len(ids)
        # Apart, as they are when the model is asked: the prompt is encoded before there is an answer.
        prompt = self._tokenizer.encode(row["prompt"])
        completion = self._tokenizer.encode(row["completion"], start=False) + self._end
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _messages(self, row: Row) -> Example:
        messages = row["messages"]
        if not isinstance(messages, list):
            raise errors.InvalidArgument("messages are no list")
        # Tables have every key in every message, null where it is not meant.
        messages = [
            {key: value for key, value in said.items() if value is not None}
            if isinstance(said, dict)
            else said
            for said in messages
        ]
        tools = row.get("tools") or []
        if not isinstance(tools, list):
            raise errors.InvalidArgument("tools are no list")
        told = [Tool.from_openai(tool) for tool in tools]
        ids = encode_chat(self._tokenizer, messages, tools=told, answer=False)
        if self._all:
            return ids, [True] * len(ids)
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        find = self._each if len(places) <= MOST_EACH else self._by_blocks
        learnt: list[bool] = []
        for part, counts in find(messages, told, places, ids):
            if ids[len(learnt) : len(learnt) + len(part)] != part:
                raise _untold()
            learnt += [counts] * len(part)
        return ids, learnt + [False] * (len(ids) - len(learnt))

    def _each(
        self, messages: list[Any], tools: list[Tool], places: list[int], ids: list[int]
    ) -> Iterator[Span]:
        """The answers at `places` of a conversation that is `ids`, and what is between them: each ends where
        the conversation would end with it. All that came before is encoded again for each."""
        done = 0
        for place in places:
            asked = encode_chat(self._tokenizer, messages[:place], tools=tools) if place else []
            answered = encode_chat(self._tokenizer, messages[: place + 1], tools=tools, answer=False)
            if ids[:done] != asked[:done] or ids[: len(answered)] != answered:
                raise _untold()
            yield asked[done:], False
            yield _behind(asked, answered), True
            done = len(answered)

    def _by_blocks(
        self, messages: list[Any], tools: list[Tool], places: list[int], ids: list[int]
    ) -> Iterator[Span]:
        """The same for many answers. What was said since the last answer and the next one are encoded behind
        a short beginning, not behind all that came before. If the template writes them otherwise there, the
        parts are not the conversation."""
        first = places[0]
        yield from self._each(messages, tools, places[:1], ids)
        lead = [said | {"content": (said.get("content") or "")[:_LEAD]} for said in messages[: first + 1]]
        known = encode_chat(self._tokenizer, lead, answer=False)
        if len(known) * len(places) > _MOST_AGAIN * len(ids):
            raise _untold()
        for before, place in itertools.pairwise(places):
            asked = encode_chat(self._tokenizer, lead + messages[before + 1 : place])
            answered = encode_chat(self._tokenizer, lead + messages[before + 1 : place + 1], answer=False)
            yield _behind(known, asked), False
            yield _behind(asked, answered), True
        rest = encode_chat(self._tokenizer, lead + messages[places[-1] + 1 :], answer=False)
        yield _behind(known, rest), False


def _behind(ids: list[int], more: list[int]) -> list[int]:
    """What comes in `more` behind `ids`. Raises InvalidArgument if they are not its beginning."""
    if more[: len(ids)] != ids:
        raise _untold()
    return more[len(ids) :]


def _untold() -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "the chat template does not tell where the assistant's answers are; set completion_only_loss to false"
    )


class Writer:
    """Writes examples to a folder, piece by piece."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        self._folder = folder
        self._files = {name: (folder / name).open("wb") for name in ("tokens.u32", "learnt.u8", "ends.u64")}
        self._tokens, self._learnt, self._ends = array("I"), bytearray(), array("Q")
        self.examples = self.tokens = self.learnt = self.longest = 0

    def add(self, ids: list[int], learnt: list[bool]) -> None:
        self._tokens.extend(ids)
        self._learnt += bytes(learnt)
        self.examples += 1
        self.tokens += len(ids)
        self.learnt += sum(learnt)
        self.longest = max(self.longest, len(ids))
        self._ends.append(self.tokens)
        if len(self._tokens) >= _FLUSH:
            self._flush()

    def finish(self, digest: str, tokenizer: bytes, template: bytes) -> DataHead:
        """Makes everything durable, the head last."""
        self._flush()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        head = DataHead(
            version=1,
            examples=self.examples,
            tokens=self.tokens,
            learnt=self.learnt,
            longest=self.longest,
            dataset=digest,
            tokenizer=_digest(tokenizer),
            template=_digest(template) if template else "",
        )
        unfinished = self._folder / "head.tmp"
        with unfinished.open("wb") as file:
            file.write(msgspec.json.encode(head))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._folder / "head.json")
        for folder in (self._folder, self._folder.parent):
            fd = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        return head

    def _flush(self) -> None:
        if sys.byteorder == "big":
            self._tokens.byteswap()
            self._ends.byteswap()
        parts = (self._tokens.tobytes(), bytes(self._learnt), self._ends.tobytes())
        for file, part in zip(self._files.values(), parts, strict=True):
            file.write(part)
        self._tokens, self._learnt, self._ends = array("I"), bytearray(), array("Q")


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def prepare(
    data: Path,
    digest: str,
    files: dict[str, bytes],
    recipe: Recipe,
    out: Path,
    tell: Callable[[TrainEvent], None],
) -> DataHead:
    """Makes `out`; `tell` is told how far it is. Raises InvalidArgument, UnsupportedModel, OSError."""
    tokenizer = Tokenizer(files)
    encoder, writer = Encoder(tokenizer, not recipe.completion_only_loss), Writer(out)
    size, shown = data.stat().st_size, 0.0
    with data.open("rb") as file:
        for line, row in rows(data, file):
            writer.add(*encoder.encode(line, row))
            if (now := time.monotonic()) - shown >= INTERVAL_S:
                shown = now
                tell(TrainEvent("prepare", file.tell(), size, tokens=writer.tokens))
    if not writer.examples:
        raise errors.InvalidArgument("the data set has no rows", field="dataset")
    tell(TrainEvent("prepare", size, size, tokens=writer.tokens))
    template = tokenizer.template.encode() if encoder.chats else b""
    return writer.finish(digest, files["tokenizer.json"], template)


# The process


def say(line: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def limit_self(parent: int) -> bool:
    """What a hostile file can cost is bounded. False: the parent was dead already."""
    for kind, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))
    os.nice(NICE)
    with suppress(OSError, AttributeError):  # as trainers are: else those of stronger runs would wait for it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return parent in (0, os.getppid())


def _explain(problem: BaseException) -> errors.LLMasOSError:
    if isinstance(problem, errors.LLMasOSError):
        return problem
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.StorageFailed(
            "the disk is full", hint="make room (`llsh df`, `llsh rm`), then train again"
        )
    if isinstance(problem, OSError):
        return errors.StorageFailed(f"the data set cannot be prepared: {problem.strerror}")
    if isinstance(problem, MemoryError):
        return errors.InvalidArgument(f"reading the data set takes more than {MEMORY >> 30} GiB of memory")
    traceback.print_tb(problem.__traceback__, file=sys.stderr)  # its text may quote the data
    return errors.DeviceFault(
        f"the data set cannot be prepared: {type(problem).__name__}",
        hint="see the daemon's log; this is a bug",
    )


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="llmasos.userland.dataset", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--digest", required=True)
    parser.add_argument("--files", required=True)
    parser.add_argument("--recipe", default="{}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parent", type=int, default=0, help="end when this is not the parent process")
    arguments = parser.parse_args()
    if not limit_self(arguments.parent):
        return 1
    try:
        paths = msgspec.json.decode(arguments.files, type=dict[str, str])
        if missing := [name for name in FILES if name not in paths]:
            raise errors.UnsupportedModel(f"the model has no {', '.join(missing)}", hint="pull it again")
        wanted = {name: Path(path) for name, path in paths.items() if name in (*FILES, TEMPLATE_FILE)}
        files = {name: path.read_bytes() for name, path in wanted.items()}
        recipe = msgspec.json.decode(arguments.recipe, type=Recipe)
        head = prepare(arguments.data, arguments.digest, files, recipe, arguments.out, say)
    except BrokenPipeError:
        return 1  # nobody listens any more
    except BaseException as problem:
        say({"error": errors.to_wire(_explain(problem))})
        return 1
    say({"ok": msgspec.to_builtins(head)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
