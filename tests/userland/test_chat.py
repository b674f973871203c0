"""Chat templates: Hugging Face's rendering, and no way from a message to a control token or out of bounds."""

from __future__ import annotations

import json
from collections.abc import Callable

import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmasos.syscalls import errors
from llmasos.userland import template
from llmasos.userland.chat import encode_chat, render
from llmasos.userland.tokenizer import Tokenizer

TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{% set c = m['content'] | trim %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + c.replace('[x]', '') ~ '<|im_end|>' }}{% endfor %}"
)
SPICY = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_[x]end|>", "<|", "|>", "<", "im_end", "</think>", "\U000f0000", " "])
    | st.text(max_size=5)
).map("".join)


@pytest.fixture(scope="module")
def tokenizer(bytes_model: dict[str, bytes]) -> Tokenizer:
    return Tokenizer(bytes_model)


@pytest.fixture(scope="module")
def make(bytes_model: dict[str, bytes]) -> Callable[[str], Tokenizer]:
    return lambda template: Tokenizer({**bytes_model, "chat_template.jinja": template.encode()})


def text_of(tokenizer: Tokenizer, messages: object) -> str:
    return "".join(part.text for part in render(tokenizer, messages))  # type: ignore[arg-type]


def test_a_conversation_ends_where_the_assistant_begins(tokenizer: Tokenizer) -> None:
    assert text_of(tokenizer, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = encode_chat(
        tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert [id_ for id_ in ids if id_ > 255] == [257, 258, 257, 258, 257]


@given(content=SPICY, role=st.sampled_from(["user", "user<|im_end|>", "<|im_start|>"]))
def test_messages_cannot_write_control_tokens(
    make: Callable[[str], Tokenizer], content: str, role: str
) -> None:
    tokenizer = make(TRIMMING)
    ids = encode_chat(tokenizer, [{"role": role, "content": content}])
    assert [id_ for id_ in ids if id_ > 255] == [256, 257, 258]


@given(content=SPICY)
def test_templates_see_what_hugging_face_shows_them(make: Callable[[str], Tokenizer], content: str) -> None:
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": content}]
    expected = plain.from_string(TRIMMING).render(messages=messages, bos_token="<|endoftext|>")
    assert text_of(make(TRIMMING), messages) == expected


def test_without_a_template_the_hint_says_what_to_do(bytes_model: dict[str, bytes]) -> None:
    files = {name: data for name, data in bytes_model.items() if "template" not in name}
    with pytest.raises(errors.UnsupportedModel, match="generate") as caught:
        encode_chat(Tokenizer(files), "Hi", model="gpt2")
    assert "gpt2" in caught.value.message


def test_helpers_are_those_of_transformers(make: Callable[[str], Tokenizer]) -> None:
    source = (
        "{{ {'a': 'é<'} | tojson }} {{ strftime_now('%Y') | length }} "
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %} "
        "{% generation %}kept{% endgeneration %}"
    )
    assert text_of(make(source), "Hi") == json.dumps({"a": "é<"}, ensure_ascii=False) + " 4 1 kept"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 'a' * 10**9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(3000) %}{% for j in range(3000) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ undefined_thing.field }}",
        "{{ 'a'.ljust(3000000000) }}",
        "{{ 'a' | center(3000000000) }}",
        "{{ '%02000000000d' | format(1) }}",
        "{{ '%(a)02000000000d' % {'a': 1} }}",
        "{{ '%0*d' % (2000000000, 1) }}",
        "{{ '{:>2000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, '2000000000') }}",
        "{% set n = namespace(x='ab') %}{% for _ in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for _ in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=10) %}{% for _ in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for _ in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
        "{% set n = namespace(x=[]) %}{% set n.x = [n, n] %}{{ n.x }}",
        "{% set n = namespace(x='a' * 50000) %}{% set y = [n.x] * 1000 %}{{ y | join(n.x) | length }}",
        "{% set x = 'a' * 50000 %}{{ x.replace('a', x) | length }}{{ x | replace('a', x) | length }}",
        "{% set x = 'a' * 50000 %}{{ x.join(['b'] * 50000) | length }}",
        "{% set x = 'a\n' * 30000 %}{{ x | indent(90000) | length }}",
        "{% set x %}{% for _ in range(99999) %}{{ 'a' * 50000 }}{% endfor %}{% endset %}",
        "{{ range(99999) | map('string') | map('indent', 99999) | join | length }}",
        "{{ lipsum(n=10**6) }}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_bad_template_fails_its_caller_only(
    make: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(template, "LONGEST_S", 0.1)
    with pytest.raises(errors.InvalidArgument, match="chat template"):
        encode_chat(make(source), "Hi")


def test_a_template_that_is_no_template(make: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(errors.UnsupportedModel, match="not valid"):
        encode_chat(make("{% for %}"), "Hi")


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        (["Hi"], "messages[0]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 3}], "messages[1].content"),
    ],
)
def test_a_bad_message_is_named(tokenizer: Tokenizer, messages: object, place: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        render(tokenizer, messages)  # type: ignore[arg-type]
    assert caught.value.details["field"] == place
