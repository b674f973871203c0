"""Grammars that generated text has to match: which tokens may come next, as bit masks.

llguidance does the work, inside bounds: what a grammar may cost to compile and a token. A sequence's state
follows from the tokens that it has generated, so nothing of it is kept anywhere: it is the same after a
preemption, a snapshot or a death.
"""

from __future__ import annotations

import json
from array import array
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .base import File

# Nobody waits for its import who has no grammar.
if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MOST_CHOICES = 4096
MOST_COMPILED = 32
"""Grammars of a model that are kept as they begin: a copy takes 20 µs, compiling one up to 0.3 s."""

_JSON = {"whitespace_pattern": r"[ \n]{1,20}"}
"""Between the parts of a JSON text models may put white space as they were taught, but not for ever."""


@cache
def _limits() -> LLParserLimits:
    """What one grammar may cost, from llguidance's account of its pace."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,  # 20 ms
        step_lexer_fuel=100_000,  # 7 ms
        step_max_items=20_000,  # 1 ms
        max_lexer_states=20_000,  # 30 MB
        max_grammar_size=500_000,
    )


def problem_of(grammar: t.Grammar) -> str:
    """Why it cannot be used, "" if it can."""
    from llguidance import LLMatcher

    try:
        source = _source(grammar)
    except (ValueError, TypeError) as problem:
        return str(problem)
    except RecursionError:
        return "it is nested too deeply"
    failed, messages = LLMatcher.validate_grammar_with_warnings(source, limits=_limits())
    return messages[0] if failed and messages else "it is not valid" if failed else ""


@lru_cache(maxsize=64)
def _source(grammar: t.Grammar) -> str:
    """The grammar as llguidance reads it. Raises ValueError, TypeError."""
    from llguidance import LLMatcher

    match grammar.kind:
        case t.GrammarKind.JSON_SCHEMA:
            schema = json.loads(grammar.text)
            if schema is True:
                schema = {}
            if not isinstance(schema, dict):
                raise TypeError("a JSON schema is an object")
            return str(LLMatcher.grammar_from_json_schema(_bounded(schema), overrides=_JSON))
        case t.GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(_ascii_classes(grammar.text)))
        case t.GrammarKind.CHOICE:
            choices = msgspec.json.decode(grammar.text, type=list[str])
            if not 0 < len(choices) <= MOST_CHOICES or not all(choices):
                raise ValueError(f"a choice is among 1 to {MOST_CHOICES} strings that are not empty")
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, choices))))
        case t.GrammarKind.LARK:
            return str(LLMatcher.grammar_from_lark(grammar.text))


_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_DATE = (
    r"[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_BOUNDED = {"time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Formats (RFC 3339) that llguidance lets go on for ever: a second has any number of digits there."""

_LARGEST = 9 * 10**18
"""An integer without a bound has this one, about that of 64 bits (at which llguidance fails): small models
otherwise write digits until they are stopped."""


def _bounded(schema: Any) -> Any:
    """The schema with an end to what would have none: formats, integers."""
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _bounded(part) for key, part in schema.items() if key not in ("enum", "const")}
    made |= {key: schema[key] for key in ("enum", "const") if key in schema}
    pattern = _BOUNDED.get(schema["format"]) if isinstance(schema.get("format"), str) else None
    # In a map of properties it may be anything: the schema of a property that is called so.
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if pattern is not None and "pattern" not in schema and "string" in kinds:
        del made["format"]
        made["pattern"] = pattern
    if "integer" in kinds and "number" not in kinds and "multipleOf" not in schema:
        if not schema.keys() & {"minimum", "exclusiveMinimum"}:
            made["minimum"] = -_LARGEST
        if not schema.keys() & {"maximum", "exclusiveMaximum"}:
            made["maximum"] = _LARGEST
    return made


def _ascii_classes(regex: str) -> str:
    r"""`regex` with \d, \w and \s (and \D, \W, \S) of ASCII alone, as in JSON schemas and most tools; Rust's
    mean all of Unicode, digits of other scripts too."""
    inside = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r\f\v"}
    out, place, depth = [], 0, 0
    while place < len(regex):
        sign = regex[place : place + 2] if regex[place] == "\\" else regex[place]
        place += len(sign)
        known = inside.get(sign[1:2].lower()) if sign[0] == "\\" else None
        if known is None:
            depth += (sign == "[") - (sign == "]" and depth > 0)
            out.append(sign)
        elif sign[1].islower():
            out.append(known if depth else f"[{known}]")
        else:
            out.append(f"[^{known}]")  # a class in a class is a union
    return "".join(out)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=True)


def _with_end(text: bytes, id_: int) -> str:
    """A tokenizer.json with one more token, for the end. What ends a sequence's text is for that to say, so
    it must be none that the model has."""
    made = msgspec.json.decode(text)
    end = {"id": id_, "content": "<|end of the grammar|>", "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    made["added_tokens"] = [*(made.get("added_tokens") or []), end]
    return msgspec.json.encode(made).decode()


def blank(vocab_size: int) -> array[int]:
    """A mask of no token: a bit for each and one more, in words of 32."""
    return array("I", bytes(4 * (vocab_size // 32 + 1)))


class Vocabulary:
    """A model's tokens as text. `files` are the model's; reading them takes a fifth of a second and 50 MB, so
    it is done when somebody first needs it."""

    def __init__(self, files: dict[str, File], size: int) -> None:
        self._file = files.get("tokenizer.json")
        self._tokenizer: LLTokenizer | None = None
        self._compiled = lru_cache(maxsize=MOST_COMPILED)(self._compile)
        self.size = size

    def constraint(self, grammar: t.Grammar, stops: list[int]) -> Constraint:
        """Raises UnsupportedModel, InvalidArgument."""
        matcher = self._compiled(grammar).deep_copy()
        return Constraint(matcher, [stop for stop in stops if stop < self.size], self.size)

    def _compile(self, grammar: t.Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLTokenizer

        if self._tokenizer is None:
            if self._file is None:
                raise errors.UnsupportedModel("the model has no tokenizer.json, which grammars need")
            try:
                text = _with_end(Path(self._file.path).read_bytes(), self.size)
                self._tokenizer = LLTokenizer(text, n_vocab=self.size + 1, eos_token=self.size)
            except (OSError, ValueError, TypeError, KeyError) as problem:
                raise errors.UnsupportedModel(
                    f"grammars cannot read the model's tokenizer: {problem}"
                ) from None
        try:
            source = _source(grammar)
        except (ValueError, TypeError, RecursionError) as problem:
            raise errors.InvalidArgument(f"the grammar: {problem}", field="sampling.grammar") from None
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_limits())
        if matcher.is_error():
            raise errors.InvalidArgument(f"the grammar: {_first_line(matcher)}", field="sampling.grammar")
        return matcher


def _first_line(matcher: LLMatcher) -> str:
    """What is wrong, without the state behind it, which holds generated text."""
    return str(matcher.get_error()).partition("\n")[0]


class Constraint:
    """What a sequence may say next. `stops` end it where its text may end; they are no part of the text."""

    def __init__(self, matcher: LLMatcher, stops: list[int], vocab_size: int) -> None:
        self._matcher, self._stops = matcher, stops
        self._none = blank(vocab_size)
        self._fed: list[int] = []

    @property
    def broken(self) -> bool:
        """Whether the grammar asked for more than its bounds allow, or for what cannot be."""
        return bool(self._matcher.is_error())

    def mask(self, tokens: array[int], first: int, position: int, out: array[int]) -> str:
        """Sets the bits of `out` for what may come at `position`; `tokens` from `first` on were
        generated. Returns what went wrong, or ""."""
        self._follow(tokens, first, position)
        matcher = self._matcher
        if matcher.is_error():
            return f"the grammar: {_first_line(matcher)}"
        if matcher.is_stopped():
            out[:] = self._none
        else:
            matcher.unsafe_compute_mask_ptr(out.buffer_info()[0], 4 * len(out))
            if matcher.is_error():
                return f"the grammar: {_first_line(matcher)}"
        if matcher.is_accepting():
            for stop in self._stops:
                out[stop // 32] |= 1 << stop % 32
        return ""

    def guesses(self, tokens: array[int], first: int, proposed: list[int], most: int) -> list[int]:
        """What may follow `tokens` for sure if anything is sure, else what is possible of `proposed`."""
        self._follow(tokens, first, len(tokens))
        if self._matcher.is_error() or self._matcher.is_stopped():
            return []
        if forced := self._matcher.compute_ff_tokens():
            return list(forced[:most])
        return proposed[: self._matcher.validate_tokens(proposed)] if proposed else []

    def _follow(self, tokens: array[int], first: int, position: int) -> None:
        """Has the matcher consumed tokens[first:position]. Of what it consumed before only the end can be
        otherwise: guesses that did not come true."""
        fed, wanted = self._fed, position - first
        back = 0
        while fed and (len(fed) > wanted or fed[-1] != tokens[first + len(fed) - 1]):
            fed.pop()
            back += 1
        if back:
            self._matcher.rollback(back)
        if fresh := tokens[first + len(fed) : position].tolist():
            fed += fresh
            self._matcher.consume_tokens(fresh)
