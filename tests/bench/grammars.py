"""Structured output: do answers match their schemas, what does it cost, and which engine is quicker.

    python tests/bench/grammars.py [--schemas 200] [--streams 16] [--only validate speed engines]

`validate`: that many JSON schemas of real-life kinds, each asked of SmolLM2 with greedy decoding; every
answer of one that compiles has to validate (jsonschema and rfc3339-validator judge), the rest are typed
errors. `speed`: the same tokens with and without a constraint, one stream and several, guesses off, in turns.
`engines`: llguidance and xgrammar (pip install xgrammar) on the same schemas: compiling, and the masks along
a valid text. JSON lines.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import daemon
import peers

STRINGS: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 24},
    {"type": "string", "minLength": 2, "maxLength": 12},
    {"type": "string", "enum": ["red", "green", "blue"]},
    {"type": "string", "enum": ["draft", "published", "archived"]},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
    {"type": "string", "pattern": "^\\d{3}-\\d{4}$"},
    {"type": "string", "pattern": "^[a-z]{3,10}@[a-z]{3,10}\\.(com|org)$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email", "maxLength": 40},
    {"const": "fixed"},
]
NUMBERS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": "integer", "minimum": 0, "maximum": 130},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1000},
    {"type": "integer", "minimum": -90, "maximum": 90},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "minimum": -180, "maximum": 180},
    {"type": "integer", "enum": [1, 2, 3, 5, 8]},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
]
NAMES = """id name title email age price currency status created_at tags address city country phone quantity
rating active color width height latitude longitude description author category sku owner priority"""
ODD: list[dict[str, Any]] = [  # what engines may refuse
    {"not": {"type": "string"}},
    {"type": "string", "pattern": "(?=a)b"},
    {"if": {"type": "string"}, "then": {"maxLength": 3}},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 3},
    {"type": "array", "contains": {"type": "integer"}, "maxItems": 2},
    {"$ref": "#/$defs/missing"},
    {"type": "object", "propertyNames": {"pattern": "^a"}, "maxProperties": 2},
    {"type": "unheard-of"},
]


def schema(dice: random.Random) -> dict[str, Any]:
    """One of real-life kinds, which ends: strings and arrays are bounded."""
    made = record(dice, depth=0)
    kind = dice.random()
    if kind < 0.1:
        made = {"type": "array", "items": made, "minItems": 1, "maxItems": 2}
    elif kind < 0.18:
        made["$defs"] = {"point": record(dice, depth=2)}
        made["properties"]["origin"] = {"$ref": "#/$defs/point"}
        made["required"] = [*made["required"], "origin"]
    elif kind < 0.24:
        made = {"anyOf": [record(dice, 1), record(dice, 1)]}
    elif kind < 0.28:
        node = {  # a tree of two levels: one without end has answers without end
            "type": "object",
            "properties": {
                "value": value(dice, 2),
                "children": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
        made = {"$defs": {"node": node, "leaf": record(dice, 2)}, "$ref": "#/$defs/node"}
    elif kind < 0.36:
        made["properties"]["odd"] = dice.choice(ODD)
        made["required"] = [*made["required"], "odd"]
    return made


def record(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(NAMES.split(), dice.randint(2, 6 if depth == 0 else 3))
    return {
        "type": "object",
        "properties": {name: value(dice, depth + 1) for name in names},
        "required": names if dice.random() < 0.7 else names[: dice.randint(1, len(names))],
        "additionalProperties": False,
    }


def value(dice: random.Random, depth: int) -> dict[str, Any]:
    kind = dice.random()
    if kind < 0.45:
        return dict(dice.choice(STRINGS))
    if kind < 0.7:
        return dict(dice.choice(NUMBERS))
    if kind < 0.78:
        return {"type": "boolean"}
    if kind < 0.84:
        return {"type": ["integer", "null"]}
    if kind < 0.94 or depth > 2:
        return {
            "type": "array",
            "items": dict(dice.choice(STRINGS + NUMBERS)),
            "maxItems": dice.randint(1, 4),
        }
    return record(dice, depth)


def schemas(count: int) -> list[dict[str, Any]]:
    dice = random.Random(3)
    return [schema(dice) for _ in range(count)]


def validate(llm: Any, wanted: list[dict[str, Any]]) -> dict[str, Any]:
    import jsonschema
    from llmasos.syscalls import errors

    ended: Counter[str] = Counter()
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER

    def one(asked: dict[str, Any]) -> None:
        try:
            made = llm.chat(
                f"Answer with an example as JSON for this schema: {json.dumps(asked)[:1500]}",
                max_new_tokens=900,
                do_sample=False,
                response_format={"type": "json_schema", "json_schema": {"schema": asked}},
            )
        except errors.InvalidArgument:
            ended["refused"] += 1
            return
        if made.finish != "stop":
            ended[f"ended by {made.finish}"] += 1
            print(json.dumps({"not ended": asked, "made": made.text[:300]}), file=sys.stderr)
            return
        try:
            jsonschema.validate(json.loads(made.text), asked, format_checker=checker)
            ended["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as problem:
            ended["WRONG"] += 1
            print(json.dumps({"wrong": asked, "made": made.text, "why": str(problem)[:200]}), file=sys.stderr)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, wanted))
    return dict(ended)


# A constraint that lets all through, so that both sides generate the same tokens; and one with work in it.
SENTENCES = r"(?s:.*)|[A-Z][a-z ,']{3,200}\."


def speed(llm: Any, streams: int, rounds: int, tokens: int = 200) -> dict[str, Any]:
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t
    from llmasos.userland.chat import encode_chat

    stops = list(llm.tokenizer.eos_ids)
    prompts = [encode_chat(llm.tokenizer, f"Write a long story about number {n}.") for n in range(streams)]
    found: dict[str, list[float]] = {"free": [], "constrained": []}

    def run(grammar: t.Grammar | None) -> tuple[float, list[list[int]]]:
        sampling = t.Sampling(stop_token_ids=stops, min_new_tokens=tokens, grammar=grammar)
        calls = [
            table.Infer(model=llm.model, tokens=t.pack_tokens(p), max_tokens=tokens, sampling=sampling)
            for p in prompts
        ]
        made: list[list[int]] = [[] for _ in calls]
        begun = time.perf_counter()
        for index, event in llm.client.gather(calls):
            made[index] += event.tokens
        return streams * tokens / (time.perf_counter() - begun), made

    grammar = t.Grammar(t.GrammarKind.REGEX, SENTENCES)
    run(grammar)
    for number in range(rounds):
        order = [("free", None), ("constrained", grammar)]
        texts = {}
        for name, asked in order if number % 2 else reversed(order):
            rate, texts[name] = run(asked)
            found[name].append(rate)
        assert texts["free"] == texts["constrained"]
    ratios = [c / f for c, f in zip(found["constrained"], found["free"], strict=True)]
    return {
        "streams": streams,
        "free": round(median(found["free"])),
        "constrained": round(median(found["constrained"])),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "median": round(median(ratios), 3),
    }


def engines(tokenizer: Path, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times in microseconds: medians over the schemas that both compile."""
    import llguidance
    import numpy as np
    import tokenizers
    import transformers
    import xgrammar

    text = tokenizer.read_text()
    plain = tokenizers.Tokenizer.from_str(text)
    size = plain.get_vocab_size()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
    begun = time.perf_counter()
    ours = llguidance.LLTokenizer(text, n_vocab=size)
    built = {"llguidance": time.perf_counter() - begun}
    begun = time.perf_counter()
    info = xgrammar.TokenizerInfo.from_huggingface(fast, vocab_size=size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    built["xgrammar"] = time.perf_counter() - begun
    compiled: dict[str, list[float]] = {"llguidance": [], "xgrammar": []}
    masks: dict[str, list[float]] = {"llguidance": [], "xgrammar": []}
    refused: Counter[str] = Counter()
    mask = np.zeros((1, -(-size // 32)), np.int32)

    def walk(name: str, fill: Any, accept: Any) -> None:
        dice = random.Random(1)
        for _ in range(60):
            begun = time.perf_counter()
            fill()
            masks[name].append(1e6 * (time.perf_counter() - begun))
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].nonzero()[0]
            if not len(bits) or not accept(int(dice.choice(bits.tolist()))):
                break

    for asked in wanted:
        try:
            begun = time.perf_counter()
            grammar = llguidance.LLMatcher.grammar_from_json_schema(asked)
            matcher = llguidance.LLMatcher(ours, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
            compiled["llguidance"].append(1e6 * (time.perf_counter() - begun))
            walk(
                "llguidance",
                lambda m=matcher: m.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes),
                lambda token, m=matcher: m.consume_token(token) and not m.is_stopped(),
            )
        except ValueError:
            refused["llguidance"] += 1
        try:
            begun = time.perf_counter()
            other = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(asked)))
            compiled["xgrammar"].append(1e6 * (time.perf_counter() - begun))
            import torch

            bitmask = torch.from_numpy(mask)
            walk(
                "xgrammar",
                lambda m=other, b=bitmask: m.fill_next_token_bitmask(b),
                lambda token, m=other: m.accept_token(token) and not m.is_terminated(),
            )
        except (RuntimeError, ValueError):
            refused["xgrammar"] += 1
    return [
        {
            "engine": name,
            "tokenizer_ms": round(1e3 * built[name]),
            "refused": refused[name],
            "compile_us": {"p50": round(median(compiled[name])), "most": round(max(compiled[name]))},
            "mask_us": {
                "p50": round(median(masks[name]), 1),
                "mean": round(sum(masks[name]) / len(masks[name]), 1),
                "most": round(max(masks[name])),
            },
        }
        for name in ("llguidance", "xgrammar")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["validate", "speed", "engines"])
    parser.add_argument("--home", type=Path, default=peers.CACHE / "gateway" / "real")
    arguments = parser.parse_args()
    arguments.home.mkdir(parents=True, exist_ok=True)
    wanted = schemas(arguments.schemas)
    with daemon.running(arguments.home, "draft_tokens=0"):
        subprocess.run([sys.executable, "-m", "llmasos.userland.llsh.main", "pull", peers.MODEL], check=True)
        from llmasos.userland.llm import LLM

        llm = LLM.from_pretrained(peers.MODEL)
        tokenizer = arguments.home / "tokenizer.json"
        tokenizer.write_bytes(llm.client.read_file(f"/models/{llm.model}/tokenizer.json"))
        for name in arguments.only:
            match name:
                case "validate":
                    print(json.dumps({"schemas": len(wanted), **validate(llm, wanted)}), flush=True)
                case "speed":
                    for streams in arguments.streams:
                        print(json.dumps(speed(llm, streams, arguments.rounds)), flush=True)
                case "engines":
                    for figures in engines(tokenizer, wanted):
                        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
