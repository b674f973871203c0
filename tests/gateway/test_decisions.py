"""Scores, typed decisions, embeddings: likelihoods are the whole text's, and shapes the clients'."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest
from llmasos.syscalls import errors
from llmasos.userland.client import Client
from llmasos.userland.decisions import Option, Question, yes_or_no
from llmasos.userland.llm import LLM

from ..llsh.conftest import add_model
from .conftest import Gateway


@pytest.fixture
def llm(kernel: Client) -> LLM:
    return LLM.from_pretrained("tiny", client=kernel)


@pytest.fixture
def ai(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0) as client:
        yield client


def test_a_score_is_the_likelihood_of_the_whole_text(llm: LLM) -> None:
    choices = [" w3", " w4 w5 w6", " w3 w9"]
    scores = llm.score("w1 w2", choices).logprobs
    for choice, score in zip(choices, scores, strict=True):
        expected = sum(value for _, value in llm.logprobs("w1 w2" + choice)[2:])
        assert score == pytest.approx(expected, abs=1e-5)
    assert llm.score("w1 w2", [" w3"]).logprobs[0] == pytest.approx(scores[0], abs=1e-5)
    assert not llm.client.ps()


def test_more_options_than_are_scored_at_once(llm: LLM) -> None:
    scores = llm.score("w1 w2", [f" w{number}" for number in range(10, 160)]).logprobs
    assert scores[-1] == pytest.approx(llm.logprobs("w1 w2 w159")[2][1], abs=1e-5)
    assert not llm.client.ps()


def test_probabilities_sum_to_one_and_are_calibrated(llm: LLM) -> None:
    question = Question("w7", (Option("w3"), Option("w4"), Option("w5 w6")))
    (plain,) = llm.decide("w1", question, calibrate=False)
    (found,) = llm.decide("w1", question)
    (blank,) = llm.decide("N/A", question, calibrate=False)
    assert sum(found.probabilities) == pytest.approx(1)
    assert found.logprobs == plain.logprobs
    ratios = [a - b for a, b in zip(found.logprobs, blank.logprobs, strict=True)]
    expected = [math.exp(one - max(ratios)) for one in ratios]
    assert found.probabilities == pytest.approx([one / sum(expected) for one in expected])
    assert found.label == found.options[found.probabilities.index(max(found.probabilities))]
    assert 0 <= found.confidence <= 1
    assert llm.classify("w1", ["w3", "w4"]).label in ("w3", "w4")


def test_a_list_of_texts_gives_a_list(llm: LLM) -> None:
    texts, labels, question = ["w1", "w2 w3"], ["w3", "w4"], Question("w7", (Option("w3"), Option("w4")))
    alone = [llm.classify(text, labels).logprobs for text in texts]
    assert [one.logprobs for one in llm.classify(texts, labels)] == alone
    assert [one.logprobs for one in asyncio.run(llm.aclassify(tuple(texts), labels))] == alone
    assert [[one.label] for (one,) in llm.decide(texts, question)] == [
        [one.label for one in llm.decide(text, [question])] for text in texts
    ]
    assert len(asyncio.run(llm.adecide(texts, question))) == 2
    assert llm.classify([], labels) == []


@pytest.mark.parametrize("text", [None, 7, b"w1", ["w1", None], [["w1"]]])
def test_what_is_no_text_is_refused(llm: LLM, text: Any) -> None:
    for ask in (
        lambda: llm.classify(text, ["w3", "w4"]),
        lambda: llm.decide_all(text, yes_or_no("w7")),
        lambda: llm.score(text, ["w3", "w4"]),
        lambda: llm.generate(text),
        lambda: llm.logprobs(text),
    ):
        with pytest.raises(errors.InvalidArgument):
            ask()


@pytest.mark.parametrize("questions", [[], "w7", ["w7"], None])
def test_what_is_no_question_is_refused(llm: LLM, questions: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        llm.decide("w1", questions)


@pytest.mark.parametrize("options", [(), ("w1",), ("w1", "w1"), ("w1", "")])
def test_a_question_needs_options(options: tuple[str, ...]) -> None:
    with pytest.raises(errors.InvalidArgument):
        Question("w7", tuple(Option(name) for name in options))


def test_decisions_as_openai_has_them(ai: openai.OpenAI, kernel: Client) -> None:
    made = ai.decisions.create(
        model="bytes",
        input=[{"role": "user", "content": "w1 w2"}],
        questions=[
            {"type": "predicate", "instructions": "w3", "name": "is"},
            {"type": "choice", "instructions": "w4", "choices": [{"value": "w5"}, {"value": True}]},
            {
                "type": "score",
                "instructions": "w6",
                "levels": [{"label": "w7"}, {"label": "w8"}, {"label": "w9"}],
            },
        ],
    )
    first, second, third = made.answers
    assert first.type == "predicate"
    assert (first.name, 0 <= first.probability <= 1) == ("is", True)
    assert second.type == "choice"
    assert second.choice in ("w5", True)
    assert sum(one.probability for one in second.probabilities) == pytest.approx(1)
    assert third.type == "score"
    assert third.score == pytest.approx(sum(one.value * one.probability for one in third.probabilities))
    assert made.usage.input_tokens > 0
    assert not [row for row in kernel.ps() if row.owner == "alice"]


def test_decisions_as_system_one_has_them(http: httpx.Client) -> None:
    questions = {
        "yes": {"type": "noul", "instructions": "w3", "criteria": {"true": "w4", "false": "w5"}},
        "which": {"type": "choice", "instructions": "w3", "criteria": {"w6": "w7", "w8": None}},
        "much": {"type": "score", "instructions": {"w": 3}, "criteria": ["w1", "w2", "w3"]},
    }
    body = {"model": "bytes", "state": {"a": ["w1"]}, "questions": questions}
    answers = http.post("/v1/systemone", json=body).json()["answers"]
    assert list(answers) == list(questions)
    assert 0 <= answers["yes"]["noul"] <= 1
    assert answers["which"]["choice"] in ("w6", "w8")
    assert sum(answers["which"]["probabilities"].values()) == pytest.approx(1)
    assert answers["much"]["legend"] == {"0": "w1", "1": "w2", "2": "w3"}
    for bad in (
        {"type": "choice", "instructions": "w"},
        {"type": "score", "instructions": "w", "criteria": {}},
    ):
        refused = http.post("/v1/systemone", json={**body, "questions": {"q": bad}})
        assert refused.status_code == 400


def test_embeddings_as_openai_has_them(ai: openai.OpenAI, http: httpx.Client) -> None:
    texts = ["w1 w2", "w3"]
    made = ai.embeddings.create(model="encoder", input=texts)  # asks for base64
    plain = ai.embeddings.create(model="encoder", input=texts, encoding_format="float")
    assert [row.embedding for row in made.data] == [row.embedding for row in plain.data]
    assert made.usage.prompt_tokens == plain.usage.prompt_tokens > 0
    raw = http.post("/v1/embeddings", json={"model": "encoder", "input": "w3", "encoding_format": "base64"})
    vector = np.frombuffer(base64.b64decode(raw.json()["data"][0]["embedding"]), "<f4")
    assert vector.tolist() == pytest.approx(plain.data[1].embedding)
    short = ai.embeddings.create(model="encoder", input=texts, dimensions=3, encoding_format="float")
    assert np.linalg.norm(short.data[0].embedding) == pytest.approx(1)
    with pytest.raises(openai.BadRequestError, match="generates text"):
        ai.embeddings.create(model="tiny", input=texts)
    with pytest.raises(openai.BadRequestError):
        ai.embeddings.create(model="encoder", input=[])


def test_documents_by_how_well_they_fit(http: httpx.Client) -> None:
    documents = ["w9 w8", "w1 w2", "w3"]
    body = {"model": "encoder", "query": "w1 w2", "documents": documents, "top_n": 2}
    found = http.post("/v1/rerank", json=body).json()["results"]
    assert len(found) == 2
    assert found[0]["index"] == 1
    assert found[0]["relevance_score"] == pytest.approx(1)
    assert found[0]["document"] == {"text": "w1 w2"}
    pairs = {"model": "encoder", "text_1": "w1 w2", "text_2": documents}
    scores = [row["score"] for row in http.post("/v1/score", json=pairs).json()["data"]]
    assert scores[1] == pytest.approx(1)
    words = http.post("/v1/rerank", json={**body, "model": "bytes"}).json()["results"]
    assert all(0 <= row["relevance_score"] <= 1 for row in words)
    assert http.post("/v1/score", json={**pairs, "text_1": ["w1", "w2"]}).status_code == 400


def test_decisions_as_ollamas_client_asks_for_them(gateway: Gateway) -> None:
    client = ollama.Client(gateway.url, headers={"authorization": f"Bearer {gateway.keys['alice']}"})
    questions = {
        "yes": {"type": "noul", "instructions": "w3"},
        "which": {"type": "choice", "instructions": "w3", "criteria": {"w6": "w7", "w8": None}},
        "much": {"type": "score", "instructions": "w4", "criteria": ["w1", "w2", "w3"]},
    }
    made = client.systemone("bytes", {"a": ["w1"]}, questions, keep_alive=60)
    assert made.answers["which"].choice in ("w6", "w8")
    assert 0 <= made.answers["much"].score <= 2
    assert 0 <= made.answers["much"].confidence <= 1
    assert made.usage.input_tokens > 0


def test_an_input_may_hold_json_and_calls_of_tools(ai: openai.OpenAI) -> None:
    question = {"type": "predicate", "instructions": [{"type": "input_json", "data": {"is": "w3"}}]}

    def asked(item: dict) -> float:
        (answer,) = ai.decisions.create(model="bytes", input=[item], questions=[question]).answers
        assert answer.type == "predicate"
        return answer.probability

    assert 0 <= asked({"role": "user", "content": [{"type": "input_json", "data": [{"a": 1}]}]}) <= 1
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    assert 0 <= asked(call) <= 1
    assert 0 <= asked({"type": "function_call_output", "call_id": "c", "output": "w4"}) <= 1
    for part in ({"type": "input_image", "image_url": "data:,"}, {"type": "input_text"}):
        with pytest.raises(openai.BadRequestError):
            asked({"role": "user", "content": [part]})


def test_what_a_decision_cannot_do_is_refused_by_name(http: httpx.Client, kernel: Client) -> None:
    question = {"type": "choice", "instructions": "w", "choices": [{"value": "true"}, {"value": "w2"}]}
    body = {"model": "bytes", "input": "w1", "questions": [question]}
    both = {**question, "choices": [{"value": "true"}, {"value": True}]}
    long = {**body, "input": "w" * 5000}
    many = {**body, "questions": [question] * 9000}
    big = {**body, "input": "w" * (1 << 20), "questions": [question] * 9}
    for change in ({"pid": 7}, {"questions": [both]}, {"prompt_cache_options": {"ttl": "1h"}}):
        assert http.post("/v1/decisions", json={**body, **change}).status_code == 400
    for refused in (long, many, big):
        assert http.post("/v1/decisions", json=refused).status_code == 400
    assert http.post("/v1/decisions", json={**body, "model": "encoder"}).status_code == 400
    late = http.post("/v1/decisions", json={**body, "model": "slow", "input": "w1", "deadline_ms": 20})
    assert (late.status_code, late.json()["error"]["param"]) == (408, "deadline_ms")
    assert http.post("/v1/decisions", json={**body, "priority": "idle"}).status_code == 200
    assert http.post("/v1/decisions", json={**body, "priority": "realtime"}).status_code == 403
    assert not [row for row in kernel.ps() if row.owner == "alice"]


def test_texts_are_classified_by_labels_or_by_the_models_own_head(
    http: httpx.Client, kernel: Client, home: Path
) -> None:
    texts = ["w1 w2", "w3"]
    body = {"model": "bytes", "input": texts, "labels": ["up", "down"], "instructions": "Where?"}
    made = http.post("/v1/classify", json=body).json()
    llm = LLM.from_pretrained("bytes", client=kernel)
    for row, text in zip(made["data"], texts, strict=True):
        right = llm.classify(text, ["up", "down"], instructions="Where?")
        assert row["label"] == right.label
        assert row["probs"] == pytest.approx(right.probabilities, abs=1e-5)
        assert row["num_classes"] == 2
    assert made["usage"]["prompt_tokens"] > 0
    add_model(home, "judge", template="", llmasos_null_encodes="classify", id2label={"0": "bad", "1": "good"})
    own = http.post("/classify", json={"model": "judge", "input": texts}).json()
    logits = llm_of(kernel, "judge").encode(texts)
    for row, values in zip(own["data"], logits.tolist(), strict=True):
        powers = [math.exp(value) for value in values]
        assert row["probs"] == pytest.approx([power / sum(powers) for power in powers], abs=1e-5)
        assert row["label"] in ("bad", "good", *(f"LABEL_{n}" for n in range(2, len(values))))
    missing = http.post("/classify", json={"model": "bytes", "input": "w1"})
    assert missing.status_code == 400
    assert "labels" in missing.json()["error"]["message"]


HELLO = {"messages": [{"role": "user", "content": "w1"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", HELLO),
        ("/api/chat", HELLO),
        ("/v1/messages", {**HELLO, "max_tokens": 4}),
        ("/v1/responses", {"input": "w1"}),
        ("/v1/completions", {"prompt": "w1"}),
        ("/v1/classify", {"input": "w1"}),
        ("/v1/classify", {"input": "w1", "labels": ["w2", "w3"]}),
        ("/v1/decisions", {"input": "w1", "questions": [{"type": "predicate", "instructions": "w2"}]}),
    ],
)
def test_an_encoder_is_told_with_what_it_is_for(
    http: httpx.Client, home: Path, path: str, body: dict[str, Any]
) -> None:
    kind = {"architectures": ["BertModel"], "llmasos_null_encodes": "embed"}
    add_model(home, "vectors", template="", max_position_embeddings=64, **kind)
    refused = http.post(path, json={**body, "model": "vectors"})
    assert refused.status_code == 400
    error = refused.json()["error"]
    told = error if isinstance(error, str) else error["message"]
    assert "/v1/embeddings" in told
    assert "generate()" not in told
    assert "`labels`" not in told


def test_a_classifier_of_many_classes_is_no_judge_of_pairs(http: httpx.Client, home: Path) -> None:
    kind = {"architectures": ["BertForSequenceClassification"], "llmasos_null_encodes": "classify"}
    add_model(home, "sorter", template="", **kind)
    refused = http.post("/v1/rerank", json={"model": "sorter", "query": "w1", "documents": ["w2"]})
    assert refused.status_code == 400
    assert "classes apart, which are no score" in refused.json()["error"]["message"]


def llm_of(kernel: Client, name: str) -> LLM:
    return LLM.from_pretrained(name, client=kernel)
