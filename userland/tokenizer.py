"""Text to token ids and back, from the model's own files.

Three things live here: Tokenizer (text to ids and ids to text), Detokenizer (ids of a stream to text,
never half a character) and StopStrings (holds text back while it may be the start of a stop string).

User text can never become a control token: special tokens are recognised only in trusted text, which
comes from chat templates and not from people.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .client import Client
from .models import encodes

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TEMPLATE_FILE = "chat_template.jinja"
_BROKEN = "\ufffd"
# An unfinished UTF-8 character is at most three bytes, each shown as one replacement character.
_MOST_BROKEN = 3
_WINDOW = 8
_LONGEST_WINDOW = 32


def _alphabet() -> dict[str, int]:
    """GPT-2's: each byte as a character that can be seen. Those that cannot have one above 255."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _alphabet()
_ALPHABET_SPACE = "\u0120"

# What may be done to a text before it becomes tokens and takes nothing away. NFC makes a byte of four at most
# (of 3.5, in Unicode's tables: an iota with two accents).
_KEEPERS = {"ByteLevel", "Digits", "Metaspace", "NFC", "Prepend", "Punctuation", "Replace", "Split"}
_NFC_SHRINKS = 4

MOST_GROWTH = 64
"""So many times as long what a tokenizer replaces in a text may make it; that of a model is about 1."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a prompt. Special tokens count only in `trusted` text."""

    text: str
    trusted: bool


class Shown(str):
    """A token's own text, which of a part of a character is a replacement. `data` is the truth: what the
    tokens of a text have there is, one after the other, the text in UTF-8."""

    data: bytes

    def __new__(cls, text: str, data: bytes) -> Shown:
        made = super().__new__(cls, text)
        made.data = data
        return made


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
    that end an answer, `encodes` what the model makes of texts if it is an encoder (None: it generates).
    """

    encodes: t.Encodes | None = None

    def __init__(self, files: Mapping[str, bytes]) -> None:
        text = files["tokenizer.json"].decode()
        self._plain = tokenizers.Tokenizer.from_str(text)
        for part in (self._plain.normalizer, self._plain.decoder):
            _check_growth([] if part is None else _steps(json.loads(part.__getstate__())))
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
        decoder = self._plain.decoder
        self._byte_level = decoder is not None and decoder.decode([_ALPHABET_SPACE]) == " "
        self._anchor = self._plain.encode("a", add_special_tokens=False).ids[-1:]
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
        made = cls({name: client.read_file(f"{folder}/{name}") for name in wanted})
        made.encodes = encodes(client, model)
        return made

    def check_generates(self, model: str) -> None:
        """Raises UnsupportedModel for an encoder."""
        if self.encodes is not None:
            raise errors.UnsupportedModel(
                f"{model} is an encoder: it generates no text", hint=t.ENCODED_BY[self.encodes]
            )

    @property
    def vocab_size(self) -> int:
        return self._plain.get_vocab_size()

    def token(self, name: str) -> str:
        """The text of a special token of the configuration ("bos_token", "eos_token", …), or ""."""
        value = self.config.get(name) or ""
        return str(value.get("content", "")) if isinstance(value, dict) else str(value)

    def encode(self, text: str, *, start: bool = True, most: int | None = None) -> list[int]:
        """Ids of a person's text. `start`: it begins a context, so a BOS goes before it if the model has
        one. Never holds a special token that is written in the text. Raises ContextOverflow for more than
        `most` ids, of a very long text before it costs the time to make them."""
        self._check(text, most)
        ids = self._encode_plain(text)
        return _checked([*self._prefix, *ids] if start else ids, most)

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

    def encode_parts(self, parts: Sequence[Part], most: int | None = None) -> list[int]:
        """Ids of a rendered template: special tokens of trusted parts count, those of others are text. `most`
        is as of `encode`.

        Equals Hugging Face's encoding of the whole text whenever no untrusted part spells a special token.
        """
        whole = "".join(part.text for part in parts)
        self._check(whole, most)
        expected = [
            self._special_ids[match.group()]
            for part in parts
            if part.trusted
            for match in self._special_pattern.finditer(part.text)
        ]
        encoding = _encoded(self._trusting, [whole])[0]
        if self._controls(encoding, whole) == expected:
            return _checked(list(encoding.ids), most)
        return _checked(self._encode_runs(parts), most)

    def _check(self, text: str, most: int | None) -> None:
        """Raises ContextOverflow for a text that is too long however it becomes tokens."""
        if not isinstance(text, str):
            return  # the tokenizer refuses it
        if most is not None and len(text) > most and (least := self._least(text)) > most:
            raise too_long(least, most, at_least=True)

    def _least(self, text: str) -> int:
        """So many tokens the text has at least; 0 where that is not known."""
        longest, deaf = self._longest
        return len(text.encode(errors="ignore").translate(None, deaf)) // longest if longest else 0

    @functools.cached_property
    def _longest(self) -> tuple[int, bytes]:
        """Bytes of a text for which one token may stand, and those bytes for which none does. (0, b""): for
        any number, because something takes text away, or one unknown token stands for all that is unknown."""
        made = json.loads(self._plain.to_str())
        steps = [*_steps(made["normalizer"]), *_steps(made["pre_tokenizer"])]
        vocab, added = made["model"]["vocab"], made["added_tokens"]
        if (
            made["model"]["type"] != "BPE"
            or not all(map(_keeps, steps))
            or any(token["lstrip"] or token["rstrip"] for token in added)
        ):
            return 0, b""
        kinds = {step["type"] for step in steps}
        if "ByteLevel" in kinds:
            deaf = bytes(byte for char, byte in _ALPHABET.items() if char not in vocab)
            sizes = [len(piece) for piece in vocab]
        elif made["model"]["byte_fallback"] and len(self.byte_of) == 256:
            deaf, sizes = b"", [len(piece.encode()) for piece in vocab]
        else:
            return 0, b""
        longest = max(*sizes, *(len(token["content"].encode()) for token in added), 1)
        return longest * (_NFC_SHRINKS if "NFC" in kinds else 1), deaf

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids, without special tokens unless `special`."""
        return str(self._plain.decode(ids, skip_special_tokens=not special))

    def shown(self, id_: int) -> Shown:
        """One token for lists of scores; a special one by its name, and without bytes: no text holds it."""
        if (name := self.special.get(id_)) is not None:
            return Shown(name, b"")
        data = self._bytes_of(id_)
        return Shown(data.decode(errors="replace"), data)

    def _bytes_of(self, id_: int) -> bytes:
        """What a token that is not special adds to a text, of which it is not the first."""
        if (byte := self.byte_of.get(id_)) is not None:
            return bytes([byte])
        piece = self._plain.id_to_token(id_) or ""
        if self._byte_level and all(char in _ALPHABET for char in piece):
            return bytes(_ALPHABET[char] for char in piece)
        # Many decoders take a space away at the beginning of a text: something has to stand before it.
        before, text = self.decode(self._anchor), self.decode([*self._anchor, id_])
        return (text[len(before) :] if text.startswith(before) else self.decode([id_])).encode()

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
        self._falls = [_falls(stop) for stop in self.strings]
        self._matched = [0] * len(self.strings)  # so much of each does the text end with
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
        if found := [(end, end - len(self.strings[n]), self.strings[n]) for n, end in self._ends(piece)]:
            _, at, self.found = min(found)
            at += len(self._held)
            self._held = ""
            return text[:at]
        keep = max(self._matched)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _ends(self, piece: str) -> Iterator[tuple[int, int]]:
        """Which strings are complete in this piece, behind how many of its characters. As Knuth, Morris and
        Pratt look for them: each character costs the same, whatever the strings are."""
        for number, (stop, falls) in enumerate(zip(self.strings, self._falls, strict=True)):
            matched = self._matched[number]
            if not matched and stop[0] not in piece:
                continue
            for place, char in enumerate(piece):
                while matched and stop[matched] != char:
                    matched = falls[matched - 1]
                matched += stop[matched] == char
                if matched == len(stop):
                    yield number, place + 1
                    break
            self._matched[number] = matched

    def flush(self) -> str:
        """What was held back, when the text ends."""
        held, self._held = self._held, ""
        return held


def too_long(tokens: int, most: int, *, at_least: bool = False) -> errors.ContextOverflow:
    """A prompt of so many tokens does not fit."""
    return errors.ContextOverflow(
        f"the prompt has {'at least ' * at_least}{tokens} tokens, the model's context {most}",
        hint="shorten the prompt",
        prompt_tokens=tokens,
        context_length=most,
    )


def _checked(ids: list[int], most: int | None) -> list[int]:
    if most is not None and len(ids) > most:
        raise too_long(len(ids), most)
    return ids


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normaliser, pre-tokeniser or decoder in tokenizer.json, or those of which it consists."""
    if step is None:
        return
    inner = step.get("normalizers", step.get("pretokenizers", step.get("decoders")))
    if inner is None:
        yield step
    for one in inner or ():
        yield from _steps(one)


def _check_growth(steps: Iterable[Mapping[str, Any]]) -> None:
    """Raises UnsupportedModel for a tokenizer that makes much of a few characters, and then more of that."""
    growth = 1.0
    for step in steps:
        if step["type"] == "Replace":
            growth *= max(1.0, len(step["content"]) / max(1, len(step["pattern"].get("String", ""))))
    if growth > MOST_GROWTH:
        raise errors.UnsupportedModel(f"the model's tokenizer makes texts {growth:.0f} times as long")


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether nothing of a text is lost."""
    spaces = step["type"] != "Replace" or (step["pattern"] == {"String": " "} and step["content"] != "")
    return step["type"] in _KEEPERS and step.get("behavior") != "Removed" and spaces


def _encoded(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    for text in texts:
        if not isinstance(text, str):  # of two in a list it would make a pair
            raise errors.InvalidArgument(f"a text is a str, not {type(text).__name__}", field="prompt")
    try:
        # `encode` keeps all other threads from running, `encode_batch` does not, and costs no more.
        return tokenizer.encode_batch(texts, add_special_tokens=False)
    except TypeError:  # half a surrogate pair, which JSON can spell
        raise errors.InvalidArgument("the text is not valid Unicode", field="prompt") from None
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":  # Rust's, which is no Exception and cannot be imported
            raise
        raise errors.UnsupportedModel(f"the model's tokenizer fails on this text: {problem}") from None


def _falls(stop: str) -> list[int]:
    """Of each beginning of `stop`, how long the longest other beginning is with which it ends."""
    falls, matched = [0], 0
    for char in stop[1:]:
        while matched and stop[matched] != char:
            matched = falls[matched - 1]
        matched += stop[matched] == char
        falls.append(matched)
    return falls


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
