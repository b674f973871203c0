"""llsh against a real daemon with the null driver, whose models speak in numbered words."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.store import Manifest, ManifestFile, ModelFS
from llmasos.userland.client import Client
from llmasos.userland.daemon import ensure_daemon
from llmasos.userland.llsh.main import dispatch
from llmasos.userland.llsh.shell import Shell
from llmasos.userland.llsh.terminal import Terminal
from tokenizers import models, pre_tokenizers

WORDS = 1000
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def add_model(home: Path, name: str, *, template: str = TEMPLATE, **config: object) -> None:
    """A model that answers with words from w0 to w999 and hardly ever with its stop token."""
    vocab = {f"w{number}": number for number in range(WORDS)}
    vocab |= {"<|im_start|>": WORDS, "<|im_end|>": WORDS + 1, "[UNK]": WORDS + 2}
    made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    files = {
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>", "add_bos_token": False}),
        "generation_config.json": json.dumps({"eos_token_id": WORDS + 1}),
        **({"chat_template.jinja": template} if template else {}),
    }
    put_model(home, name, files, {"vocab_size": WORDS + 3, **config})


def put_model(home: Path, name: str, files: dict[str, str], config: dict[str, object]) -> None:
    """A model of the null driver with these files and this configuration."""
    files = {**files, "config.json": json.dumps({"model_type": "null", **config})}
    store = ModelFS(home)
    stored = [ManifestFile(path, *store.put_bytes(text.encode())) for path, text in files.items()]
    manifest = Manifest(
        schema=1,
        source="test",
        architecture="null",
        parameters=135_000_000,
        quantization="F32",
        context_length=config.get("max_position_embeddings", 512),
        license="apache-2.0",
        created=time.time(),
        files=stored,
    )
    store.commit(parse_name(name), manifest)


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A home with a daemon, started as llsh starts it."""
    made = Path(tempfile.mkdtemp(prefix="ll", dir="/tmp"))
    (made / "config.toml").write_text('devices = ["null"]\n')
    add_model(made, "tiny", max_position_embeddings=512)
    add_model(made, "plain", template="", max_position_embeddings=512)
    add_model(made, "slow", max_position_embeddings=512, llmasos_null_step_seconds=0.05)
    before = {name: os.environ.pop(name, None) for name in ("LLMASOS_HOME", "LLMASOS_SOCKET", "NO_COLOR")}
    os.environ["LLMASOS_HOME"] = str(made)
    ensure_daemon().close()
    yield made
    assert dispatch(["shutdown", "--drain", "0"], Shell(Terminal(Paper(False), Paper(False)))) == 0
    os.environ.pop("LLMASOS_HOME")
    os.environ.update({name: value for name, value in before.items() if value is not None})
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def client(home: Path) -> Iterator[Client]:
    with Client() as client:
        yield client


class Paper(io.StringIO):
    """A terminal, or a pipe, that keeps what is written to it."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


class Typist:
    """Runs commands as `llsh WORDS…` would, in this process. `tty`: stdout and stderr are terminals."""

    def __init__(self, client: Client | None) -> None:
        self.client = client
        self.out = self.err = ""
        self.code = 0

    def __call__(self, *words: str, stdin: str = "", tty: bool = False) -> str:
        out, err = Paper(tty), Paper(tty)
        shell = Shell(Terminal(out, err), kernel=self.client, stdin=io.StringIO(stdin))
        self.code = dispatch(list(words), shell)
        shell.close()
        self.out, self.err = out.getvalue(), err.getvalue()
        return self.out

    def json(self, *words: str, stdin: str = ""):
        """The document that a command prints with --json."""
        out = self(*words, "--json", stdin=stdin)
        assert self.code == 0, self.err
        return json.loads(out)


@pytest.fixture
def llsh(client: Client) -> Typist:
    return Typist(client)


class Keyboard:
    """A real `llsh` on a pseudo-terminal: type, and expect what the screen says."""

    def __init__(self, *words: str, columns: int = 100) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmasos.userland.llsh.main", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: _own_terminal(slave),
            env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "30"},
        )
        os.close(slave)
        self._seen = self.raw = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def line(self, text: str) -> None:
        self.type(text + "\r")

    def expect(self, pattern: str, patience_s: float = 10.0) -> str:
        """Reads until `pattern` appears; returns what came before its end and forgets it."""
        until = time.monotonic() + patience_s
        while not (match := re.search(pattern, self._seen)):
            ready = select.select([self._master], [], [], max(0.0, until - time.monotonic()))[0]
            assert ready, f"no {pattern!r} in {self._seen!r}"
            self._seen += self._read()
        came, self._seen = self._seen[: match.end()], self._seen[match.end() :]
        return came

    def ends(self, patience_s: float = 10.0) -> int:
        """The exit code."""
        until = time.monotonic() + patience_s
        while self._process.poll() is None:
            assert time.monotonic() < until, self._seen
            if select.select([self._master], [], [], 0.05)[0]:
                with contextlib.suppress(AssertionError):
                    self._seen += self._read()
        return self._process.returncode

    def mode(self) -> list[Any]:
        """What the terminal does with keys."""
        return termios.tcgetattr(self._master)[:4]

    def terminate(self) -> None:
        self._process.terminate()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)

    def _read(self) -> str:
        """What the screen shows now, without escape sequences. Answers where the cursor is, if asked."""
        try:
            text = os.read(self._master, 65536).decode("utf-8", "replace")
        except OSError:  # the other side is closed
            raise AssertionError(f"llsh ended with {self._process.wait()}: {self._seen!r}") from None
        self.raw += text
        if "\x1b[6n" in text:
            self.type("\x1b[1;1R")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", text)


def _own_terminal(slave: int) -> None:
    """Makes the pseudo-terminal the controlling one, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def keyboard(home: Path) -> Iterator[type[Keyboard]]:
    made: list[Keyboard] = []

    def start(*words: str, columns: int = 100) -> Keyboard:
        made.append(Keyboard(*words, columns=columns))
        return made[-1]

    yield start
    for one in made:
        one.close()
