"""A kernel of a few lines for the client's tests: the real wire, a pseudo model, faults on demand."""

from __future__ import annotations

import json
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
import zmq
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t
from tokenizers import decoders, models, normalizers, pre_tokenizers

END, START, STOP = 256, 257, 258
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Ids 0 to 255 are bytes, in the alphabet's order; then three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made


def spm_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer in Llama 2's manner: spaces as ▁, a leading one added and stripped, bytes as a fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "▁th", "he", "▁the", "er", "in"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "t"), ("▁t", "h"), ("h", "e"), ("▁th", "e"), ("e", "r"), ("i", "n")]
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def model_files(made: tokenizers.Tokenizer, **changes: Any) -> dict[str, bytes]:
    """The files of a model that userland reads; `changes` replace or remove (None) some of them."""
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    files = {
        "tokenizer.json": made.to_str(),
        "config.json": "{}",
        "tokenizer_config.json": json.dumps(config),
        "generation_config.json": json.dumps({"eos_token_id": STOP}),
        "chat_template.jinja": TEMPLATE,
    }
    files |= {name.replace("__", "."): text for name, text in changes.items()}
    return {name: text.encode() for name, text in files.items() if text is not None}


@dataclass
class FakeProcess:
    pid: int
    tokens: list[int] = field(default_factory=list)
    nice: int = 0
    zombie: bool = False


@dataclass
class Stream:
    """An infer whose items wait for credits."""

    id: int
    call: table.Infer
    process: FakeProcess
    items: list[t.InferEvent]
    credits: int
    reply: table.InferReply
    seq: int = 0


class FakeKernel:
    """Answers on a ROUTER in its own thread. `script(tokens, call)` says what an infer generates."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/k.sock"
        self.models: dict[str, dict[str, bytes]] = {"tiny:latest": model_files(byte_tokenizer())}
        self.pulls: dict[str, dict[str, bytes]] = {}
        self.context_length = 512
        self.script: Callable[[list[int], table.Infer], list[int]] = lambda tokens, call: tokens[::-1]
        self.score: Callable[[list[int]], list[float]] = lambda tokens: [-float(i) for i in tokens]
        self.beams: list[t.Sequence] = []
        self.failing: dict[str, errors.LLMasOSError] = {}
        self.silent: set[str] = set()  # calls that are never answered
        self.mangle: Callable[[int], int] = lambda seq: seq  # what becomes of sequence numbers
        self.endless: set[str] = set()  # models whose infers only end when cancelled
        self.calls: list[table.Call] = []
        self.cancelled: list[int] = []
        self.most_unread = 0
        self.processes: dict[int, FakeProcess] = {}
        self.boots = 0
        self._next_pid = 2
        self.start()

    def start(self) -> None:
        self.boots += 1
        self.streams: dict[tuple[bytes, int], Stream] = {}
        self._stop = threading.Event()
        ready: queue.Queue[None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.get()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def restart(self) -> None:
        self.stop()
        self.processes.clear()
        self.start()

    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def _run(self, ready: queue.Queue[None]) -> None:
        context = zmq.Context()
        self._router = context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.bind(self.address)
        ready.put(None)
        while not self._stop.is_set():
            if self._router.poll(5):
                peer, *frames = self._router.recv_multipart()
                self._serve(peer, wire.decode_request(frames))
        self._router.close()
        context.term()

    def _serve(self, peer: bytes, message: wire.FromClient) -> None:
        match message:
            case wire.Refused(id_, error):
                self._send(peer, wire.encode_error(id_ or 0, error))
            case wire.Credit(id_, n):
                if stream := self.streams.get((peer, id_)):
                    stream.credits += n
                    self._pump(peer, stream)
            case wire.Cancel(id_):
                self.cancelled.append(id_)
                if stream := self.streams.get((peer, id_)):
                    self._finish(peer, stream, t.Finish.CANCELLED)
            case wire.Request(id_, call, credits_):
                self.calls.append(call)
                if call.name in self.silent:
                    return
                try:
                    if call.name in self.failing:
                        raise self.failing[call.name]
                    reply = self._answer(peer, id_, call, credits_)
                except errors.LLMasOSError as error:
                    self._send(peer, wire.encode_error(id_, error))
                else:
                    if reply is not None:
                        self._send(peer, wire.encode_reply(id_, type(call), reply))

    def _send(self, peer: bytes, frames: list[bytes]) -> None:
        self._router.send_multipart([peer, *frames])

    def _answer(self, peer: bytes, id_: int, call: table.Call, credits_: int) -> t.Wire | None:
        match call:
            case table.Hello():
                return table.HelloReply(table.VERSION, table.table_hash(), f"boot{self.boots}", "me", 2**20)
            case table.Whoami():
                return table.WhoamiReply("me", os.getuid(), os.getpid(), False)
            case table.SpawnModel(model):
                return table.SpawnReply(self._spawn().pid, model, "sha256:0", "cpu", self.context_length)
            case table.Infer():
                self._infer(peer, id_, call, credits_)
                return None
            case table.Fork(pid, count):
                parent = self._process(pid)
                children = [self._spawn(parent.tokens) for _ in range(count)]
                return table.ForkReply([child.pid for child in children])
            case table.Kill(pid, signal):
                if signal in (t.Signal.TERM, t.Signal.KILL):
                    self._process(pid).zombie = True
                return table.Done()
            case table.Wait(pid):
                del self.processes[self._process(pid, zombie=True).pid]
                return table.WaitReply(pid, 0, "exited", 0)
            case table.Truncate(pid, length):
                del self._process(pid).tokens[length:]
                return table.Done()
            case table.SetPriority(pid, nice):
                self._process(pid).nice = nice or 0
                return self._row(self._process(pid))
            case table.StatProcess(pid):
                return self._row(self._process(pid))
            case table.Ps(after, limit):
                rows = [self._row(p) for pid, p in sorted(self.processes.items()) if pid > after]
                return table.PsReply(rows[: min(limit, 3)], len(rows) > 3)
            case table.Ls(path):
                model = self._model(path)
                return table.LsReply([t.FileInfo(f"{path}/{name}", t.FileKind.FILE, 1) for name in model])
            case table.Stat(path):
                self._model(path)
                return t.FileInfo(path, t.FileKind.MODEL, 1, details={"context_length": self.context_length})
            case table.Read(path, offset, length):
                data = self._file(path)
                return table.ReadReply(len(data), data[offset : offset + min(length, 1000)])
            case table.Pull(model):
                if model not in self.pulls:
                    raise errors.PullFailed(f"no source for {model}")
                for done in (0, 50, 100):
                    self._send(
                        peer, wire.encode_items([(id_, done // 50, t.PullEvent("download", "f", done, 100))])
                    )
                self.models[model] = self.pulls[model]
                return t.FileInfo(f"/models/{model}", t.FileKind.MODEL, 1)
        raise errors.UnknownCall(f"the fake kernel has no {call.name}")

    def _spawn(self, tokens: list[int] | None = None) -> FakeProcess:
        process = FakeProcess(self._next_pid, list(tokens or []))
        self.processes[process.pid] = process
        self._next_pid += 1
        return process

    def _process(self, pid: int, *, zombie: bool = False) -> FakeProcess:
        if (process := self.processes.get(pid)) is None:
            raise errors.NoSuchProcess(f"no process {pid}", pid=pid)
        if process.zombie and not zombie:
            raise errors.ProcessEnded(f"process {pid} has ended", pid=pid)
        return process

    def _model(self, path: str) -> dict[str, bytes]:
        if (model := self.models.get(path.removeprefix("/models/"))) is None:
            raise errors.NoSuchModel(f"no {path}", path=path)
        return model

    def _file(self, path: str) -> bytes:
        if path.startswith("/proc/"):
            return t.pack_tokens(self._process(int(path.split("/")[2])).tokens)
        folder, _, name = path.rpartition("/")
        return self._model(folder)[name]

    def _row(self, process: FakeProcess) -> t.ProcessInfo:
        return t.ProcessInfo(
            pid=process.pid,
            parent=1,
            owner="me",
            name="",
            model="tiny:latest",
            device="cpu",
            sched_class=t.SchedClass.INTERACTIVE,
            nice=process.nice,
            state=t.State.ZOMBIE if process.zombie else t.State.WAITING,
            waiting_for="",
            context=len(process.tokens),
            computed=0,
            blocks=0,
            generated=0,
            tokens_per_s=0,
            queue_place=0,
            age_s=0,
        )

    def _infer(self, peer: bytes, id_: int, call: table.Infer, credits_: int) -> None:
        process = self._spawn() if call.pid is None else self._process(call.pid)
        given = t.unpack_tokens(call.tokens[: len(call.tokens) - 4 * call.seen])
        if call.whole:
            process.tokens.clear()
        process.tokens += given
        made: list[int] = []
        if call.max_tokens != 0 and call.beams is None:
            made = self.script(list(process.tokens), call)[: call.max_tokens]
            for at, token in enumerate(made):
                if token in call.sampling.stop_token_ids:
                    del made[at + 1 :]
                    break
        finish = t.Finish.STOP if made and made[-1] in call.sampling.stop_token_ids else t.Finish.LENGTH
        scored = call.sampling.logprobs is not None
        items = [
            t.InferEvent([token], [t.Chosen(-0.5, [t.TokenLogprob(token, -0.5)])] if scored else [])
            for token in made
        ]
        if call.sampling.prompt_logprobs:
            items.insert(0, t.InferEvent(prompt_logprobs=[t.Chosen(s) for s in self.score(given)]))
        process.tokens += made[: call.seen]
        del items[: call.seq]
        reply = table.InferReply(
            process.pid,
            finish,
            len(given),
            0,
            0,
            0,
            call.sampling.seed or 0,
            self.beams if call.beams else [],
        )
        stream = self.streams[peer, id_] = Stream(id_, call, process, items, credits_, reply, call.seq)
        self._pump(peer, stream)

    def _pump(self, peer: bytes, stream: Stream) -> None:
        while stream.credits and stream.items:
            item = stream.items.pop(0)
            self._send(peer, wire.encode_items([(stream.id, self.mangle(stream.seq), item)]))
            stream.process.tokens += item.tokens
            stream.seq += 1
            stream.credits -= 1
        if not stream.items and stream.call.model not in self.endless:
            self._finish(peer, stream, stream.reply.finish)

    def _finish(self, peer: bytes, stream: Stream, finish: t.Finish) -> None:
        if self.streams.pop((peer, stream.id), None) is None:
            return
        if stream.call.model is not None:
            del self.processes[stream.process.pid]
        elif stream.call.exit:
            stream.process.zombie = True
        reply = msgspec.structs.replace(
            stream.reply, finish=finish, generated_tokens=stream.seq, context=len(stream.process.tokens)
        )
        self._send(peer, wire.encode_reply(stream.id, table.Infer, reply))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="lu", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def kernel(folder: Path) -> Iterator[FakeKernel]:
    made = FakeKernel(folder)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def bytes_model() -> dict[str, bytes]:
    """Files of a model whose tokens are bytes."""
    return model_files(byte_tokenizer())


@pytest.fixture(scope="session")
def spm_model() -> dict[str, bytes]:
    """Files of a model with a sentencepiece-like tokenizer that wants a BOS."""
    return model_files(
        spm_tokenizer(),
        tokenizer_config__json=json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}),
        generation_config__json=json.dumps({"eos_token_id": [2]}),
        chat_template__jinja=None,
    )
