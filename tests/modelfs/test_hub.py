"""The Hugging Face source against a small hub on this machine: listing, progress, resuming, refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
from llmasos.kernel.modelfs.store import ModelFS
from llmasos.syscalls.errors import PullFailed, RefusedFile
from safetensors.numpy import save_file

Importer = Callable[..., tuple[int, list[dict[str, Any]]]]

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as the repository tiny-org/tiny; `cut` breaks the weights' transfer off
    once after so many bytes; `asked` lists the requests (method, path, Range)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cut = 0
        self.asked: list[tuple[str, str, str]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def serve(self) -> None:
        path = urlparse(self.path).path
        self.server.asked.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/api/models/tiny-org/tiny"):
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in self.server.folder.iterdir()]
            about = {"id": "tiny-org/tiny", "sha": COMMIT, "siblings": files, "cardData": {"license": "mit"}}
            self.answer(200, json.dumps(about).encode())
        elif path.startswith(f"/tiny-org/tiny/resolve/{COMMIT}/"):
            data = (self.server.folder / path.rpartition("/")[2]).read_bytes()
            self.file(data)
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def file(self, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        begin = self.headers.get("Range", "")
        if begin.startswith("bytes=") and self.command == "GET":
            start = int(begin[6:].partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[start:], headers)
        else:
            self.answer(200, data, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if 0 < self.server.cut < len(body):
            body, self.server.cut = body[: self.server.cut], 0
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    save_file({"model.embed_tokens.weight": np.ones((258, 24_000), np.float32)}, folder / "model.safetensors")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": "hf_test",
    }


def test_a_repository_is_pulled(
    store: ModelFS, importer: Importer, hub: Hub, environment: dict[str, str], folder: Path
) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle beside")
    hub.cut = 12_000_000  # the transfer breaks once; huggingface_hub goes on where it stopped
    code, lines = importer("tiny-org/tiny", **environment)
    assert (code, lines[-1].get("error")) == (0, None)
    manifest = store.resolve("tiny-org/tiny")
    assert (manifest.license, manifest.source) == ("mit", f"hf:tiny-org/tiny@{COMMIT}")
    assert store.fsck() == store.garbage() == []
    total = (folder / "model.safetensors").stat().st_size
    downloads = [line for line in lines[:-1] if line["phase"] == "download"]
    assert {(line["file"], line["total"]) for line in downloads} == {("model.safetensors", total)}
    assert any(range_ for _, path, range_ in hub.asked if path.endswith("model.safetensors"))
    assert not any("pytorch_model.bin" in path for _, path, _ in hub.asked)
    cached = next(Path(environment["HF_HOME"]).glob("hub/*/snapshots/*/model.safetensors"))
    assert cached.samefile(store.driver_files(manifest)["model.safetensors"].path)


def test_refusals_come_before_the_download(
    importer: Importer, hub: Hub, environment: dict[str, str], folder: Path
) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}')
    code, lines = importer("tiny-org/tiny", **environment)
    assert (code, lines[-1]["error"]["code"]) == (1, RefusedFile.code)
    assert not any(path.endswith("model.safetensors") for _, path, _ in hub.asked)


def test_a_repository_that_is_not_there(importer: Importer, environment: dict[str, str]) -> None:
    code, lines = importer("no/such", **environment)
    assert (code, lines[-1]["error"]["code"]) == (1, PullFailed.code)
    assert "there is no hf:no/such" in lines[-1]["error"]["message"]


def test_an_adapter_is_pulled_of_a_repository(
    store: ModelFS, importer: Importer, hub: Hub, environment: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    assert importer("tiny", str(folder))[0] == 0
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "config.json").unlink()
    name = "base_model.model.model.embed_tokens"
    halves = {f"{name}.lora_A.weight": np.ones((2, 24_000), np.float32)}
    halves |= {f"{name}.lora_B.weight": np.ones((258, 2), np.float32)}
    save_file(halves, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (folder / "checkpoint.pt").write_bytes(b"a pickle beside")
    for revision, offline in (("", {}), (f"@{COMMIT}", {"HF_HUB_OFFLINE": "1"})):
        code, lines = importer("tiny+x", f"hf:tiny-org/tiny{revision}", **environment, **offline)
        assert lines[-1].get("error") is None
        assert code == 0
        manifest = store.resolve("tiny+x")
        assert manifest.source == f"hf:tiny-org/tiny@{COMMIT}"
        shared = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        own = {"adapter_config.json", "adapter_model.safetensors"}
        assert {file.path for file in manifest.files} == own | shared
    assert not any("tokenizer" in path or path.endswith(".pt") for _, path, _ in hub.asked)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    code, lines = importer("tiny+y", "hf:tiny-org/tiny", **environment)
    assert (code, lines[-1]["error"]["code"]) == (1, RefusedFile.code)
    assert not any(path.endswith(".bin") for _, path, _ in hub.asked)
