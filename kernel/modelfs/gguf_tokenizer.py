"""Makes the tokenizer.json (format of the `tokenizers` library) that a GGUF file's metadata describes.

Two kinds: byte-level BPE ("gpt2"), where `tokenizer.ggml.pre` names the rule that cuts text into words, and
SentencePiece BPE with byte fallback ("llama"), whose merges follow from the pieces' scores. The rules are
those of the models' own tokenizers; where ggml and they differ, theirs count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from llmasos.syscalls.errors import Corrupt, UnsupportedModel
from msgspec import Struct

from .gguf_header import Value

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

_SPACE = "▁"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Rule(NamedTuple):
    """How text is cut into words before BPE. `pattern` empty: GPT-2's, which is ByteLevel's own."""

    pattern: str = ""
    digits: bool = False  # every digit is a word
    nfc: bool = False
    whole_words: bool = False  # a word that is a token needs no merges
    bos: bool = False  # unless the file says otherwise


_RULES = {
    **dict.fromkeys(("gpt-2", "gpt2", "default", "olmo", "jais", "mpt"), _Rule()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _Rule(digits=True)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"), _Rule(_LLAMA3, whole_words=True, bos=True)
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Rule(_LLAMA3, whole_words=True)),
    "qwen2": _Rule(_QWEN2, nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2"), _Rule(_QWEN2)),
    "tekken": _Rule(_TEKKEN, whole_words=True, bos=True),
}


class Tokenizer(Struct, frozen=True):
    """The files that say how a model's text becomes tokens; `chat_template` is empty if there is none."""

    tokenizer_json: bytes
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    chat_template: str


class _Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]
    pairs: dict[str, Value]

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.pairs.get(f"tokenizer.ggml.{name}", default))

    def token_id(self, name: str) -> int | None:
        """A special token's id, if the file names a valid one."""
        found = self.pairs.get(f"tokenizer.ggml.{name}_token_id")
        return found if isinstance(found, int) and 0 <= found < len(self.tokens) else None

    def token(self, name: str) -> str | None:
        found = self.token_id(name)
        return None if found is None else self.tokens[found]


def build(pairs: dict[str, Value], architecture: str, context_length: int) -> Tokenizer:
    """The tokenizer that the metadata describes. Raises UnsupportedModel (a kind or rule not known here)
    and Corrupt."""
    vocabulary = _vocabulary(pairs)
    kind = pairs.get("tokenizer.ggml.model")
    if kind == "gpt2":
        rule = _rule(pairs, architecture)
        body, bos = _byte_level(vocabulary, rule), vocabulary.flag("add_bos_token", rule.bos)
    elif kind == "llama":
        body, bos = _sentencepiece(vocabulary), vocabulary.flag("add_bos_token", True)
    else:
        raise UnsupportedModel(
            f"tokenizer of the kind {str(kind)[:40]!r}", hint="try another file of this model"
        )
    eos = vocabulary.flag("add_eos_token", False)
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(vocabulary)}
    template = pairs.get("tokenizer.chat_template", "")
    return Tokenizer(
        msgspec.json.encode({**head, **body, "post_processor": _frame(vocabulary, bos, eos)}),
        _tokenizer_config(vocabulary, bos, eos, context_length),
        _generation_config(vocabulary),
        template if isinstance(template, str) else "",
    )


def _vocabulary(pairs: dict[str, Value]) -> _Vocabulary:
    tokens = pairs.get("tokenizer.ggml.tokens")
    types = pairs.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise Corrupt("the GGUF file has no list of tokens")
    if types is None:
        types = [1] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise Corrupt("the GGUF file's token types do not match its tokens")
    vocabulary = _Vocabulary([str(t) for t in tokens], [int(t) for t in types], pairs)
    if len(set(vocabulary.tokens)) != len(tokens):
        raise Corrupt("the GGUF file has a token twice")
    return vocabulary


def _rule(pairs: dict[str, Value], architecture: str) -> _Rule:
    # Files from before `pre` existed say nothing; only for GPT-2 itself is that no loss.
    name = pairs.get("tokenizer.ggml.pre", "gpt-2" if architecture == "gpt2" else "")
    if not isinstance(name, str) or name not in _RULES:
        raise UnsupportedModel(
            f"no rule for the pre-tokenizer {str(name)[:40]!r}", hint="try the model's safetensors files"
        )
    return _RULES[name]


def _byte_level(vocabulary: _Vocabulary, rule: _Rule) -> dict[str, Any]:
    merges = vocabulary.pairs.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise Corrupt("the GGUF file has no list of merges")
    split = [str(merge).split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in split):
        raise Corrupt("the GGUF file has a merge that is no pair")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if rule.pattern:
        words = {"type": "Split", "pattern": {"Regex": rule.pattern}, "behavior": "Isolated", "invert": False}
        cutters = [words, {**byte_level, "use_regex": False}]
    elif rule.digits:
        cutters = [{"type": "Digits", "individual_digits": True}, byte_level]
    else:
        cutters = [byte_level]
    return {
        "normalizer": {"type": "NFC"} if rule.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutters},
        "decoder": byte_level,
        "model": _bpe(vocabulary, split, ignore_merges=rule.whole_words),
    }


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    scores = vocabulary.pairs.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise Corrupt("the GGUF file's scores do not match its tokens")
    prefix = vocabulary.flag("add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    start = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _bpe(vocabulary, _merges(vocabulary, [float(s) for s in scores]))
    unknown = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _UNKNOWN]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*start, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            **model,
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": unknown[0] if unknown else None,
        },
    }


def _merges(vocabulary: _Vocabulary, scores: list[float]) -> list[list[str]]:
    """SentencePiece joins the neighbours whose joint piece scores best, so every way to make a piece of two
    others is a merge, and better pieces come first."""
    mergeable = {
        token: number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind not in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    }
    ranked = []
    for piece, number in mergeable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[number], number, mergeable[left], mergeable[right], left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def _bpe(vocabulary: _Vocabulary, merges: list[list[str]], ignore_merges: bool = False) -> dict[str, Any]:
    # Unused places in the vocabulary would be found by `ignore_merges`, so they are left out.
    usable = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {token: number for number, (token, kind) in enumerate(usable) if kind != _UNUSED},
        "merges": merges,
    }


def _added(vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in text before it is cut. Special ones are hidden when text is decoded."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": token, **plain, "special": kind != _USER_DEFINED}
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _frame(vocabulary: _Vocabulary, bos: bool, eos: bool) -> dict[str, Any] | None:
    """Puts the token that begins (and the one that ends) a text around it, if the model wants that."""

    def parts(sequence: str) -> list[dict[str, Any]]:
        special = [[{"SpecialToken": {"id": t, "type_id": 0}}] if t else [] for t in (first, last)]
        return [*special[0], {"Sequence": {"id": sequence, "type_id": 0}}, *special[1]]

    first = vocabulary.token("bos") if bos else None
    last = vocabulary.token("eos") if eos else None
    if first is None and last is None:
        return None
    numbers = {t: vocabulary.tokens.index(t) for t in (first, last) if t is not None}
    return {
        "type": "TemplateProcessing",
        "single": parts("A"),
        "pair": parts("A") + parts("B"),
        "special_tokens": {t: {"id": t, "ids": [n], "tokens": [t]} for t, n in numbers.items()},
    }


def _tokenizer_config(vocabulary: _Vocabulary, bos: bool, eos: bool, context_length: int) -> dict[str, Any]:
    unknown = vocabulary.token("unknown")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.token("bos"),
        "eos_token": vocabulary.token("eos"),
        "unk_token": unknown,
        "pad_token": vocabulary.token("padding"),
        "add_bos_token": bos,
        "add_eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }


def _generation_config(vocabulary: _Vocabulary) -> dict[str, Any]:
    ends = [vocabulary.token_id(name) for name in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    found = {
        "bos_token_id": vocabulary.token_id("bos"),
        "eos_token_id": unique[0] if len(unique) == 1 else unique or None,
        "pad_token_id": vocabulary.token_id("padding"),
    }
    return {name: value for name, value in found.items() if value is not None}
