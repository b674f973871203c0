"""Encoders on a real daemon: beside decoders, through deaths of worker and kernel; a real model against
transformers."""

from __future__ import annotations

import array
import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from llmasos.drivers.null import next_token, vector
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.llm import LLM

TEXTS = [[(7 * n + place) % 1000 for place in range(1 + n % 40)] for n in range(400)]
WIDTH = 8


def encode(texts: list[list[int]] = TEXTS, **arguments: object) -> table.Encode:
    packed = t.pack_tokens([token for text in texts for token in text])
    return table.Encode("encoder", tokens=packed, lengths=[len(text) for text in texts], **arguments)  # type: ignore[arg-type]


def right(texts: list[list[int]] = TEXTS) -> bytes:
    return array.array("f", [x for text in texts for x in vector(text, WIDTH)]).tobytes()


@pytest.fixture(scope="module")
def daemon(daemons: Callable):
    return daemons(
        'devices=["null"]',
        "step_tokens=64",  # so TEXTS take two seconds at least, however quick the first steps seem
        encoder={"llmasos_null_encodes": "embed", "llmasos_null_step_seconds": 0.01},
        chat={"llmasos_null_step_seconds": 0.002},
    )


def busy(client: Client) -> None:
    """Waits until the first texts are computed."""
    until = time.monotonic() + 60
    while not any(row.computed for row in client.ps() if row.name == "slow"):
        assert time.monotonic() < until
        time.sleep(0.005)


def started(daemon, reply: list[table.EncodeReply]) -> threading.Thread:
    def work() -> None:
        with daemon.client() as client:
            reply.append(client.call(encode(label="slow")))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_an_encoder_works_beside_a_decoder(daemon) -> None:
    reply: list[table.EncodeReply] = []
    with daemon.client() as client:
        thread = started(daemon, reply)
        busy(client)
        prompt = t.pack_tokens([1, 2, 3])
        with client.stream(table.Infer(model="chat", tokens=prompt, max_tokens=50)) as stream:
            tokens = [token for event in stream for token in event.tokens]
        thread.join(120)
        context = [1, 2, 3]
        for _ in range(50):
            context.append(next_token(context))
        assert tokens == context[3:]
        assert reply[0].data == right()
        assert client.ps() == []


@pytest.mark.parametrize("what", ["--device", "--kernel"])
def test_nothing_is_lost_when_somebody_dies(daemon, what: str) -> None:
    reply: list[table.EncodeReply] = []
    with daemon.client() as client:
        thread = started(daemon, reply)
        busy(client)
        daemon.children(what)[0].kill()
        thread.join(120)
        assert reply[0].data == right()
        assert client.ps() == []


def test_who_hangs_up_leaves_nothing(daemon) -> None:
    with daemon.client() as client:
        with daemon.client() as other:
            threading.Thread(target=_quietly, args=(other, encode(label="slow")), daemon=True).start()
            busy(client)
        until = time.monotonic() + 60
        while client.ps():
            assert time.monotonic() < until
            time.sleep(0.01)
        with pytest.raises(errors.TimedOut):
            client.call(encode(deadline_ms=50))
        assert client.call(encode(TEXTS[:3])).data == right(TEXTS[:3])


def _quietly(client: Client, call: table.Encode) -> None:
    with pytest.raises(errors.ConnectionLost):
        client.call(call)


# A real one

SENTENCES = [
    "A cat sits on the mat.",
    "Markets fell on Monday as investors weighed the outlook for interest rates and growth.",
    "",
    "naïve café — 東京 [SEP] [MASK]",
    "word " * 200,
    "A kitten is lying on the rug.",
]


@pytest.fixture(scope="module")
def minilm(daemons: Callable, tmp_path_factory: pytest.TempPathFactory):
    daemon = daemons('devices=["cpu"]')
    with daemon.client() as client:
        try:
            client.call(table.Pull("all-minilm"), timeout_s=300)
        except errors.PullFailed as problem:
            pytest.skip(f"all-minilm cannot be fetched: {problem.message}")
        folder = tmp_path_factory.mktemp("minilm")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(client.read_file(f"/models/all-minilm/{name}"))
        digest = next(f.digest for f in client.ls("/models/all-minilm") if f.path.endswith(".safetensors"))
        (blob,) = (daemon.home / "modelfs" / "blobs").glob(f"*{digest.partition(':')[2]}")
        (folder / "model.safetensors").symlink_to(blob)
    with LLM.from_pretrained("all-minilm", address=daemon.address) as llm:
        yield llm, folder


def reference(folder: Path, sentences: list[str]) -> np.ndarray:
    """As sentence-transformers computes it; special tokens written in a text are text."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for sentence in sentences:
        ids = tokenizer(sentence, return_tensors="pt", split_special_tokens=True)
        with torch.inference_mode():
            hidden = model(**ids).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
    return torch.stack(rows).numpy()


def test_minilm_equals_transformers(minilm) -> None:
    llm, folder = minilm
    vectors = llm.embed(SENTENCES)
    assert vectors.shape == (6, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosines = (vectors * reference(folder, SENTENCES)).sum(1)
    assert cosines.min() >= 0.9999
    assert vectors[0] @ vectors[5] > 0.5 > vectors[0] @ vectors[1]
    np.testing.assert_allclose(llm.embed(SENTENCES[0]), vectors[0], atol=1e-5)
    np.testing.assert_allclose(asyncio.run(llm.aembed(SENTENCES)), vectors, atol=1e-5)


def test_what_is_too_long_is_never_cut_unasked(minilm) -> None:
    llm, folder = minilm
    assert llm.context_length == 256
    with pytest.raises(errors.ContextOverflow) as raised:
        llm.embed(["short", "word " * 300])
    assert raised.value.details == {"context_length": 256, "tokens": 302, "index": 1}
    (vector,) = llm.embed(["word " * 300], truncate=True)
    assert vector @ reference(folder, ["word " * 254])[0] >= 0.9999


def write_ranker(folder: Path) -> transformers.PreTrainedModel:
    """A random cross-encoder of words w0 to w96."""
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        num_labels=1,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    vocab = {"[UNK]": 97, "[CLS]": 98, "[SEP]": 99} | {f"w{n}": n for n in range(97)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 98), ("[SEP]", 99)],
    )
    words.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    words.save(str(folder / "tokenizer.json"))
    return model


def test_pairs_are_scored_as_transformers_does(minilm, tmp_path: Path) -> None:
    llm, _ = minilm
    model = write_ranker(tmp_path)
    pairs = [("w1 w2", "w3 w4 w5"), ("w1 w2", "w96"), ("w1", "w2 w3 w3 w4")]
    words = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    want = []
    for pair in pairs:
        read = words.encode(*pair)
        with torch.inference_mode():
            ids, kinds = torch.tensor([read.ids]), torch.tensor([read.type_ids])
            want.append(float(model(ids, token_type_ids=kinds).logits))
    ranker = LLM.from_pretrained(tmp_path, client=llm.client)
    scores = ranker.encode(pairs)
    assert scores.shape == (3, 1)
    np.testing.assert_allclose(scores[:, 0], want, atol=1e-4)
    with pytest.raises(errors.ContextOverflow):
        ranker.encode([("w1 " * 20, "w2 " * 20)])
    with pytest.raises(errors.UnsupportedModel):
        ranker.embed("w1")


def test_it_generates_nothing_and_classifies_nothing(minilm) -> None:
    llm, _ = minilm
    for act in (lambda: llm.generate("Hi"), lambda: llm.encode(["Hi"]), lambda: llm.process("Hi")):
        with pytest.raises(errors.UnsupportedModel):
            act()
