"""Runs chat templates, which are somebody else's programs, in jinja2's immutable sandbox and within bounds.

The sandbox stops escapes. Here nothing that a template makes is longer than a rendering allows, and all of it
takes no more than so much of the processor's time: what can make something long of what is short (literals,
products, joins, calls, filters) is measured, and each turn of a loop looks at the clock.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2.exceptions import SecurityError
from llmasos.syscalls import errors

LONGEST_S = 0.5
"""Of the processor's time, for a rendering of a short conversation."""

CHARACTERS_A_S = 500_000
"""So many characters of a conversation allow a second more."""

LARGEST_NUMBER = 100_000
"""Of what a call or a filter is told: widths, counts, places."""

_WIDE = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*([0-9]{6}|\*)|\{[^{}]*([0-9]{6}|\{)")
"""In a text with places to fill in: a width of six digits, or one that is filled in itself."""

_DROPPED_FILTERS = ("wordwrap", "urlize", "xmlattr")


class _Bounds(threading.local):
    """Of the rendering that goes on in this thread: the longest value, and when its time is over."""

    most = 1 << 20
    until = float("inf")


_bounds = _Bounds()


def run(source: str, variables: dict[str, Any], most: int) -> str:
    """What a template writes, in which neither that nor anything on the way is longer than `most` characters.
    Raises InvalidArgument when the template refuses what it is given or goes beyond its bounds,
    UnsupportedModel when it is none."""
    chunks: list[str] = []
    length = 0
    _bounds.most, _bounds.until = most, time.thread_time() + LONGEST_S + most / CHARACTERS_A_S
    try:
        for chunk in _compiled(source).generate(variables):
            length += len(chunk)
            if length > most:
                raise errors.InvalidArgument(f"the chat template writes more than {most} characters")
            chunks.append(chunk)
    except errors.LLMasOSError:
        raise
    except Exception as problem:  # whatever somebody else's program raises is about these messages
        raise errors.InvalidArgument(
            f"the chat template does not take these messages: {type(problem).__name__}: {problem}",
            field="messages",
        ) from None
    return "".join(chunks)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _Sandbox().from_string(source)
    except jinja2.TemplateSyntaxError as problem:
        raise errors.UnsupportedModel(f"the model's chat template is not valid: {problem}") from None


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_measured,
        )
        self.filters["tojson"] = _tojson
        self.filters = {
            name: _guarded(name, filter_)
            for name, filter_ in self.filters.items()
            if name not in _DROPPED_FILTERS
        }
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        bounded = _Bounder().visit(tree)
        bounded.set_environment(self)
        assert isinstance(bounded, jinja2.nodes.Template)
        return bounded

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_small(left) and _small(right)):
            raise SecurityError("a power of big numbers")
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_places(left, right)
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(many, (str, bytes, list, tuple)):
                    _check_length(len(many) * times)
        return _measured(super().call_binop(context, operator, left, right))

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)
        __self.tick()
        _check_numbers(*args, *kwargs.values())
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox has its own str.format around it
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, (str, bytes)):
            match name:
                case "translate" | "expandtabs":
                    raise SecurityError(f"str.{name}")
                case "format" | "format_map":
                    _check_places(str(text), args, kwargs)
                case "replace" if len(args) > 1:
                    _check_length(len(text) + text.count(args[0]) * len(args[1]))
                case "join" if args:
                    args = (_joinable(args[0], len(text)), *args[1:])
        return _limited(super().call(__context, __obj, *args, **kwargs))

    # What templates are made to call.

    def tick(self) -> None:
        """A step of the program."""
        _tick()

    def made(self, value: Any) -> Any:
        """A list, tuple or object that is written in the template."""
        return _measured(value)

    def joined(self, *values: Any) -> str:
        """`a ~ b ~ c`."""
        return self.concat(str(_measured(value)) for value in values)

    def concat(self, parts: Any) -> str:
        """What a block or a macro has written."""
        found = list(parts)
        _check_length(sum(map(len, found)))
        return "".join(found)


class _Bounder(jinja2.visitor.NodeTransformer):
    """Has a template call the sandbox where jinja2 does not by itself."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(_call("tick", node), lineno=node.lineno))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("joined", node, *node.nodes)

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("made", node, node)

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("made", node, node) if node.ctx == "load" else node

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("made", node, node)


def _call(name: str, at: jinja2.nodes.Node, *values: jinja2.nodes.Expr) -> jinja2.nodes.Call:
    method = jinja2.nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return jinja2.nodes.Call(method, list(values), [], None, None, lineno=at.lineno)


def _guarded(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the bounds. What it is applied to comes first, or behind what jinja2 passes to it."""
    first = 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @functools.wraps(filter_)  # with what jinja2 notes at it
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _tick()
        told = [*args[first + 1 :], *kwargs.values()]
        _check_numbers(*told)
        given = args[first] if len(args) > first else None
        match name:
            case "format":
                _check_places(str(given), told)
            case "string" | "pprint" | "tojson":
                _measured(given)
            case "indent" | "replace":
                longest = max((len(one) if isinstance(one, str) else 4 for one in told), default=4)
                lines = (
                    str(given).count(str(told[0])) if name == "replace" and told else str(given).count("\n")
                )
                _check_length(len(str(given)) + (lines + 1) * longest)
            case "join":
                between = len(str(told[0])) if told else 0
                args = (*args[:first], _joinable(given, between), *args[first + 1 :])
        return _limited(filter_(*args, **kwargs))

    return guarded


def _tick() -> None:
    if time.thread_time() > _bounds.until:
        raise SecurityError("it takes too long")


def _limited(value: Any) -> Any:
    """A result: measured, or as it comes."""
    return _ticking(value) if isinstance(value, Iterator) else _measured(value)


def _ticking(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        _tick()
        yield value


def _joinable(values: Any, between: int) -> list[Any]:
    found = list(values)
    _measured(found)
    _check_length(len(found) * between)
    return found


def _measured(value: Any) -> Any:
    """The same. Raises SecurityError when it is more than the rendering allows, written out."""
    if isinstance(value, (str, bytes)):
        _check_length(len(value))
        return value
    left, stack = _bounds.most, [value]
    while stack:
        match stack.pop():
            case str() | bytes() as text:
                left -= len(text)
            case int() as number:
                left -= number.bit_length() // 3
            case list() | tuple() | set() as several:
                stack += several
            case dict() as pairs:
                stack += pairs
                stack += pairs.values()
            case jinja2.utils.Namespace() as names:
                stack.append(object.__getattribute__(names, "_Namespace__attrs"))
        left -= 1
        if left < len(stack):
            _check_length(_bounds.most + 1)
    return value


def _check_length(length: int) -> None:
    if length > _bounds.most:
        raise SecurityError(f"it makes more than {_bounds.most} characters")


def _check_numbers(*told: Any) -> None:
    if any(isinstance(one, int) and abs(one) > LARGEST_NUMBER for one in told):
        raise SecurityError(f"a number above {LARGEST_NUMBER}")


def _check_places(form: str | bytes, *values: Any) -> None:
    text = form if isinstance(form, str) else form.decode("latin-1")
    if _WIDE.search(text.replace("{{", "").replace("}}", "")):
        raise SecurityError("a width in a format")
    _measured(list(values))


def _small(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= 1000


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training: here only its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
