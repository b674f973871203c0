"""Text to token ids and back, from the model's own files.

Three things live here: Tokenizer (text to ids and ids to text), Detokenizer (ids of a stream to text,
never half a character) and StopStrings (holds text back while it may be the start of a stop string).

User text can never become a control token: special tokens are recognised only in trusted text, which
comes from chat templates and not from people.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from llmasos.syscalls import errors

from .client import Client

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TEMPLATE_FILE = "chat_template.jinja"
_BROKEN = "\ufffd"
# An unfinished UTF-8 character is at most three bytes, each shown as one replacement character.
_MOST_BROKEN = 3
_WINDOW = 8
_LONGEST_WINDOW = 32


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a prompt. Special tokens count only in `trusted` text."""

    text: str
    trusted: bool


@dataclass(frozen=True, slots=True)
class Framed:
    """A text, or a pair of them, as an encoder reads it. `second`: where the second one begins for the model,
    0 if it is told nothing of that."""

    ids: list[int]
    second: int = 0


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the tokenizer's own post-processor puts before a text, behind it, and between two. `told`: the
    model is told which of the two a token is of."""

    before: list[int]
    between: list[int]
    behind: list[int]
    told: bool


class Tokenizer:
    """A model's tokenizer, with what its configuration says about special tokens and generation.

    `generation` is generation_config.json, `template` the chat template ("": none), `eos_ids` the tokens
    that end an answer.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        text = files["tokenizer.json"].decode()
        self._plain = tokenizers.Tokenizer.from_str(text)
        self._plain.encode_special_tokens = True  # their text is ordinary text here
        self._trusting = tokenizers.Tokenizer.from_str(text)
        for tokenizer in (self._plain, self._trusting):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self.config: dict[str, Any] = json.loads(files["tokenizer_config.json"])
        self.generation: dict[str, Any] = json.loads(files["generation_config.json"])
        self.template = files.get(TEMPLATE_FILE, b"").decode()
        added = self._plain.get_added_tokens_decoder()
        self.special: dict[int, str] = {id_: token.content for id_, token in added.items() if token.special}
        self._unknown_id = self._plain.token_to_id(self.token("unk_token"))
        self._special_ids = {content: id_ for id_, content in self.special.items()}
        self._special_pattern = _any_of(self.special.values())
        bytes_ = {self._plain.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self.byte_of = {id_: byte for id_, byte in bytes_.items() if id_ is not None}
        self.bos_id = self._id_of("bos_token")
        self.eos_ids = self._eos()
        self._prefix = self._sequence_start()

    @classmethod
    def load(cls, client: Client, model: str) -> Tokenizer:
        """Reads the tokenizer of a model in the model filesystem. Raises NoSuchModel, UnsupportedModel."""
        folder = f"/models/{model}"
        names = {entry.path.rpartition("/")[2] for entry in client.ls(folder)}
        if missing := set(FILES) - names:
            raise errors.UnsupportedModel(
                f"{model} has no {', '.join(sorted(missing))}", hint="pull it again"
            )
        wanted = [name for name in (*FILES, TEMPLATE_FILE) if name in names]
        return cls({name: client.read_file(f"{folder}/{name}") for name in wanted})

    @property
    def vocab_size(self) -> int:
        return self._plain.get_vocab_size()

    def token(self, name: str) -> str:
        """The text of a special token of the configuration ("bos_token", "eos_token", …), or ""."""
        value = self.config.get(name) or ""
        return str(value.get("content", "")) if isinstance(value, dict) else str(value)

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a person's text. `start`: it begins a context, so a BOS goes before it if the model has
        one. Never holds a special token that is written in the text."""
        return [*self._prefix, *self._encode_plain(text)] if start else self._encode_plain(text)

    def frame(self, texts: Sequence[str | tuple[str, str]], most: int | None = None) -> list[Framed]:
        """Texts, or pairs, as an encoder reads them: people's texts, with the special tokens that the
        tokenizer puts around them. At most `most` tokens of each: the longer one of a pair is cut first."""
        pairs = [text if isinstance(text, tuple | list) else (text, "") for text in texts]
        flat = [part for pair in pairs for part in pair]
        ids = [
            self._encode_broken(text) if self._controls(encoding, text) else list(encoding.ids)
            for text, encoding in zip(flat, _encoded(self._plain, flat), strict=True)
        ]
        single, double = self._frame_of(1), self._frame_of(2)
        found = []
        for index, text in enumerate(texts):
            a, b = ids[2 * index], ids[2 * index + 1]
            frame = single if isinstance(text, str) else double
            around = len(frame.before) + len(frame.between) + len(frame.behind)
            if most is not None:
                _shorten_pair(a, b, most - around)
            second = len(frame.before) + len(a) + len(frame.between) if frame.told else 0
            found.append(Framed([*frame.before, *a, *frame.between, *b, *frame.behind], second))
        return found

    def _frame_of(self, count: int) -> _Frame:
        """What stands around `count` texts, read off an example."""
        shown = self._trusting.encode("a", "a" if count == 2 else None, add_special_tokens=True)
        of, ids = list(shown.sequence_ids), list(shown.ids)
        first = [place for place, sequence in enumerate(of) if sequence == 0]
        last = [place for place, sequence in enumerate(of) if sequence == count - 1]
        if not first or not last:
            raise errors.UnsupportedModel(
                "the tokenizer leaves nothing of a text", hint="pull the model again"
            )
        between = ids[first[-1] + 1 : last[0]]
        return _Frame(ids[: first[0]], between, ids[last[-1] + 1 :], 1 in shown.type_ids)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Ids of a rendered template: special tokens of trusted parts count, those of others are text.

        Equals Hugging Face's encoding of the whole text whenever no untrusted part spells a special token.
        """
        expected = [
            self._special_ids[match.group()]
            for part in parts
            if part.trusted
            for match in self._special_pattern.finditer(part.text)
        ]
        whole = "".join(part.text for part in parts)
        encoding = _encoded(self._trusting, [whole])[0]
        if self._controls(encoding, whole) == expected:
            return list(encoding.ids)
        return self._encode_runs(parts)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids, without special tokens unless `special`."""
        return str(self._plain.decode(ids, skip_special_tokens=not special))

    def shown(self, id_: int) -> str:
        """One token's own text, for lists of scores; a special token by its name."""
        return self.special.get(id_) or self.decode([id_], special=True)

    def _encode_runs(self, parts: Sequence[Part]) -> list[int]:
        """Text between the trusted special tokens is encoded with no special token recognised."""
        ids: list[int] = []
        run = ""
        for part in parts:
            if not part.trusted:
                run += part.text
                continue
            at = 0
            for match in self._special_pattern.finditer(part.text):
                ids += self._encode_plain(run + part.text[at : match.start()])
                ids.append(self._special_ids[match.group()])
                run, at = "", match.end()
            run += part.text[at:]
        return ids + self._encode_plain(run)

    def _encode_plain(self, text: str) -> list[int]:
        if text == "":
            return []
        encoding = _encoded(self._plain, [text])[0]
        return self._encode_broken(text) if self._controls(encoding, text) else list(encoding.ids)

    def _encode_broken(self, text: str) -> list[int]:
        """Some vocabularies (unigram ones) hold special tokens as ordinary pieces: cut them in two. What is
        spelled in characters that are only normalised to a special token is left out."""
        ids: list[int] = []
        cuts = [match.start() + 1 for match in self._special_pattern.finditer(text)]
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            encoding = _encoded(self._plain, [text[start:end]])[0]
            controls = self._controls(encoding, text[start:end])
            ids += [id_ for id_ in encoding.ids if id_ not in controls]
        return ids

    def _controls(self, encoding: tokenizers.Encoding, text: str) -> list[int]:
        """The special tokens of an encoding. The unknown token counts only where the text spells it: it
        may just as well stand for a character that the vocabulary lacks."""
        if self.special.keys().isdisjoint(encoding.ids):
            return []
        return [
            id_
            for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if id_ in self.special
            and (id_ != self._unknown_id or text[start:end].strip() == self.special[id_])
        ]

    def _id_of(self, name: str) -> int | None:
        token = self.token(name)
        found = self._plain.token_to_id(token) if token else None
        if found is None:
            found = self.generation.get(name.replace("_token", "_token_id"))
        return found if isinstance(found, int) else None

    def _eos(self) -> list[int]:
        ids = self.generation.get("eos_token_id")
        if ids is None:
            ids = self._id_of("eos_token")
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def _sequence_start(self) -> list[int]:
        """What stands before a text: BOS if the configuration says so; if it does not say, what the
        tokenizer's own post-processor puts there."""
        wanted = self.config.get("add_bos_token")
        if wanted is None:
            ids: list[int] = self._trusting.encode("", add_special_tokens=True).ids
            return ids[:1] if self.bos_id is not None and ids[:1] == [self.bos_id] else []
        return [self.bos_id] if wanted and self.bos_id is not None else []


def _shorten_pair(a: list[int], b: list[int], most: int) -> None:
    """Cuts the ends of both to `most` in all, of the longer one first."""
    most = max(0, most)
    half = most // 2
    keep_b = len(b) if len(a) + len(b) <= most else min(len(b), max(half, most - len(a)))
    del b[keep_b:]
    del a[most - len(b) :]


class Detokenizer:
    """Text of a growing sequence of ids, given out as soon as no later id can change it.

    `context` are the ids before it: a leading space is kept or dropped as in the text of the whole.
    Cost of a token is bounded: only the last ids are decoded again.

    Tokenizers with a byte fallback decode a run of byte tokens as one and spoil all of it while its last
    character is unfinished: such bytes are put together here, and the letter A stands in for each.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stand_in = next((id_ for id_, byte in tokenizer.byte_of.items() if byte == ord("A")), -1)
        self._ids: list[int] = []
        self._given = 0
        self.feed(context[-_WINDOW:])

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is settled now and was not before."""
        return "".join(map(self._take, ids))

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        return self._rest() + self._utf8.decode(b"", final=True)

    def _take(self, id_: int) -> str:
        if (byte := self._tokenizer.byte_of.get(id_)) is not None:
            piece = self._rest() + self._utf8.decode(bytes([byte]))
            self._ids.append(self._stand_in)
            self._given += 1
            self._shorten()
            return piece
        unfinished = self._utf8.decode(b"", final=True)
        self._ids.append(id_)
        text = self._tokenizer.decode(self._ids)
        settled = text[: max(len(text.rstrip(_BROKEN)), len(text) - _MOST_BROKEN)]
        piece = settled[self._given :]
        self._given = max(self._given, len(settled))
        if settled == text:
            self._shorten()
        return unfinished + piece

    def _rest(self) -> str:
        text = self._tokenizer.decode(self._ids)
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece

    def _shorten(self) -> None:
        if len(self._ids) <= _LONGEST_WINDOW:
            return
        tail = self._ids[-_WINDOW:]
        if text := self._tokenizer.decode(tail):  # special tokens alone say nothing about spaces
            self._ids, self._given = tail, len(text)


class StopStrings:
    """Passes text on until one of the stop strings, which may be spread over several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.strings = [stop for stop in stops if stop]
        self._held = ""
        self.found = ""
        """The one that came."""

    @property
    def stopped(self) -> bool:
        return bool(self.found)

    def feed(self, piece: str) -> str:
        """Text that certainly comes before a stop string. Nothing more after `stopped`."""
        if self.stopped:
            return ""
        if not self.strings:
            return piece
        text = self._held + piece
        # The one that is complete first counts, however the text was cut into pieces.
        if found := [(at + len(stop), at, stop) for stop in self.strings if (at := text.find(stop)) >= 0]:
            _, at, self.found = min(found)
            self._held = ""
            return text[:at]
        keep = max(overlap(text, stop) for stop in self.strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the text ends."""
        held, self._held = self._held, ""
        return held


def _encoded(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    try:
        # `encode` keeps all other threads from running, `encode_batch` does not, and costs no more.
        return tokenizer.encode_batch(texts, add_special_tokens=False)
    except TypeError:
        why = "the text is not valid Unicode"  # half a surrogate pair, which JSON can spell
        for text in texts:
            if not isinstance(text, str):
                why = f"a text is a str, not {type(text).__name__}"
        raise errors.InvalidArgument(why, field="prompt") from None


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark`, which is longer, begins with."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first; nothing when there are none."""
    ordered = sorted((c for c in contents if c), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")
