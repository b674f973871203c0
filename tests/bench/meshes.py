"""Training on many ranks beside training on one: do they learn the same, and does a run survive its ranks?

    python tests/bench/meshes.py [curves] [kills] [--ranks 2,4] [--steps 20] [--kills 50]

  curves   every mix of data, sharded, tensor, sequence and pipeline parallel on 2 and on 4 gloo ranks, full
           and LoRA, a tiny Llama with and without a tied head, fp32: the greatest relative difference of a
           step's loss and of its gradients' norm to one rank's, of the weights that come out, and seconds
  kills    one run on 2 sharded ranks again and again, any of its ranks killed (SIGKILL) at random moments:
           how many curves differ from an undisturbed run's by more than 1e-5, and how many steps a kill cost
A JSON line each; exit code 1 if a difference is above 1e-5.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "drivers"), os.environ.get("PYTHONPATH", "")])
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

ROWS, LIMIT = 16, 1e-5
KILLED_STEPS, SAVE_STEPS = 60, 4


def meshes(ranks: int) -> dict[str, Any]:
    from llmasos.syscalls.training import Mesh, Pipeline, Shard

    def piped(kind: Pipeline, **more: int) -> Mesh:
        return Mesh(micro_batches=4, pipeline=kind, **{"stages": 2, **more})

    if ranks == 2:
        return {
            "ddp": Mesh(data=2),
            "fsdp2 zero 2": Mesh(data=2, shard=Shard.OPTIMIZER),
            "fsdp2 zero 3": Mesh(data=2, shard=Shard.FULL),
            "tensor": Mesh(tensor=2),
            "tensor, sequence": Mesh(tensor=2, sequence=True),
            "pipeline 1f1b": piped(Pipeline.ONE_F_ONE_B),
            "pipeline interleaved": piped(Pipeline.INTERLEAVED),
            "pipeline zero bubble": piped(Pipeline.ZERO_BUBBLE),
        }
    return {
        "ddp": Mesh(data=4),
        "fsdp2 zero 3": Mesh(data=4, shard=Shard.FULL),
        "hsdp": Mesh(data=2, replicas=2, shard=Shard.FULL),
        "tensor": Mesh(tensor=4),
        "tensor, sequence": Mesh(tensor=4, sequence=True),
        "ddp x tensor": Mesh(data=2, tensor=2),
        "fsdp2 zero 2 x tensor, sequence": Mesh(data=2, tensor=2, shard=Shard.OPTIMIZER, sequence=True),
        "fsdp2 zero 3 x tensor": Mesh(data=2, tensor=2, shard=Shard.FULL),
        "pipeline 1f1b": piped(Pipeline.ONE_F_ONE_B, stages=4),
        "ddp x pipeline 1f1b": piped(Pipeline.ONE_F_ONE_B, data=2),
        "ddp x pipeline zero bubble": piped(Pipeline.ZERO_BUBBLE, data=2),
    }


class World:
    """Models, data and specs in a folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self._steps, self._count = folder, steps, 0
        dice = random.Random(3)
        rows = []
        for _ in range(120):
            length, first, pace = dice.randint(5, 24), dice.randrange(97), dice.randint(1, 3)
            rows.append([(first + pace * i) % 97 for i in range(length)])
        self._write(folder / "data", rows)

    def _write(self, folder: Path, rows: list[list[int]]) -> None:
        import numpy as np
        from llmasos.syscalls.training import DataHead

        folder.mkdir()
        tokens = np.concatenate([np.array(row, "<u4") for row in rows])
        tokens.tofile(folder / "tokens.u32")
        np.ones(len(tokens), "u1").tofile(folder / "learnt.u8")
        np.cumsum([len(row) for row in rows]).astype("<u8").tofile(folder / "ends.u64")
        head = DataHead(1, len(rows), len(tokens), len(tokens), max(map(len, rows)), "bench", "", "")
        (folder / "head.json").write_bytes(msgspec.json.encode(head))

    def model(self, tied: bool) -> dict[str, Any]:
        """Files of a Llama of four layers."""
        import torch
        import transformers
        from llmasos.drivers.base import File

        folder = self._folder / f"model-{tied}"
        if not folder.exists():
            torch.manual_seed(7)
            config = transformers.LlamaConfig(
                vocab_size=97,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=256,
                initializer_range=0.25,
                tie_word_embeddings=tied,
                eos_token_id=None,
                bos_token_id=None,
            )
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
            _index(folder)
        return {path.name: File(str(path), _digest(path), path.stat().st_size) for path in folder.iterdir()}

    def spec(self, tied: bool, method: Any, mesh: Any, **fields: Any) -> Any:
        """A run in a folder of its own; each step learns from ROWS rows."""
        from llmasos.drivers.base import TrainSpec
        from llmasos.syscalls.training import Lora, Method, Recipe

        self._count += 1
        folder = self._folder / f"run{self._count}"
        folder.mkdir()
        recipe = Recipe(
            **{
                "method": method,
                "lora": Lora(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
                "max_steps": self._steps,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": ROWS // (4 * mesh.data * mesh.replicas),
                "max_length": 40,
                "learning_rate": 2e-3 if method is Method.LORA else 2e-4,
                "bf16": False,
                "dtype": "float32" if method is Method.LORA else "",
                "mesh": mesh,
                **fields,
            }
        )
        derived, data = str(self._folder / "derived"), str(self._folder / "data")
        return TrainSpec("tiny+bench", "cpu", self.model(tied), derived, recipe, data, str(folder))


def _index(folder: Path) -> None:
    """The tensors.json of a model."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    start = int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            where = {"file": path.name, "offset": 8 + start + first, "nbytes": last - first}
            tensors[name] = {"type": entry["dtype"], "shape": entry["shape"], **where}
    (folder / "tensors.json").write_text(json.dumps({"tensors": tensors}))


def _digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _apart(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _steps(events: list[Any], field: str) -> list[float]:
    return [getattr(event, field) for event in events if event.phase == "train"]


def _weights_apart(ours: Any, theirs: Any) -> float:
    """The greatest difference of two results, relative to the greatest weight of the tensor."""
    from safetensors.torch import load_file

    worst = 0.0
    for path in (Path(ours.folder) / "result").glob("*.safetensors"):
        mine, other = load_file(path), load_file(Path(theirs.folder) / "result" / path.name)
        assert mine.keys() == other.keys()
        for name, tensor in other.items():
            worst = max(worst, float((mine[name] - tensor).abs().max() / tensor.abs().max()))
    return worst


def curves(world: World, sizes: list[int]) -> bool:
    from llmasos.drivers.trainer.gate import Gate
    from llmasos.drivers.trainer.run import Run
    from llmasos.syscalls.training import Mesh, Method
    from mesh_ranks import Group

    fine = True
    alone: dict[Any, Any] = {}
    for size in sizes:
        group = Group(size)
        for tied in (True, False):
            for method in (Method.FULL, Method.LORA):
                if (tied, method) not in alone:
                    spec, events, gate = world.spec(tied, method, Mesh()), [], Gate()
                    gate.open()
                    Run(spec, gate, events.append).train()
                    alone[tied, method] = spec, events
                one, expected = alone[tied, method]
                for name, mesh in meshes(size).items():
                    if mesh.sequence and method is Method.LORA:
                        continue  # refused
                    begun = time.perf_counter()
                    spec = world.spec(tied, method, mesh)
                    found, _, _ = group.train(spec)
                    loss = _apart(_steps(found, "loss"), _steps(expected, "loss"))
                    fine &= loss <= LIMIT
                    _say(
                        figure="curves",
                        ranks=size,
                        mesh=name,
                        method=str(method),
                        tied=tied,
                        steps=len(_steps(found, "loss")),
                        loss=loss,
                        norm=_apart(_steps(found, "grad_norm"), _steps(expected, "grad_norm")),
                        weights=_weights_apart(spec, one),
                        seconds=round(time.perf_counter() - begun, 2),
                    )
        group.close()
    return fine


class Trainer:
    """The trainer's processes, started as the kernel starts one, and the kernel's end of its bus."""

    def __init__(self, spec: Any) -> None:
        from llmasos.drivers import base
        from llmasos.syscalls import wire

        path = Path(spec.folder) / "bus"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-m", "llmasos.drivers.trainer", "--run", "1", "--bus", str(path)]
        self.process = subprocess.Popen([*command, "--parent", str(os.getpid())], stderr=subprocess.DEVNULL)
        self._bus, _ = listener.accept()
        listener.close()
        self._base, self._wire, self._reader = base, wire, wire.FrameReader()
        self._send(base.Train(spec))
        for message in self.until(120.0):
            if isinstance(message, base.TrainReady):
                break
        self._send(base.Grant(1))

    def _send(self, message: Any) -> None:
        self._bus.sendall(self._wire.frame(msgspec.msgpack.encode(message)))

    def until(self, seconds: float) -> Iterator[Any]:
        """What it says within so many seconds, or until it ends."""
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while (left := end - time.monotonic()) > 0:
                self._bus.settimeout(left)
                if not (data := self._bus.recv(1 << 16)):
                    return
                yield from map(self._base.from_worker.decode, self._reader.feed(data))

    def ranks(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children()]

    def kill(self, victim: int) -> None:
        """Kills a rank; all others end with it."""
        ranks = self.ranks()
        ranks[victim].kill()
        self.process.wait(10)
        psutil.wait_procs(ranks, 10)
        assert not [rank for rank in ranks if rank.is_running()], "a rank has outlived another"
        self._bus.close()


def kills(world: World, count: int) -> bool:
    from llmasos.drivers.base import TrainDone, Trained
    from llmasos.drivers.trainer.gate import Gate
    from llmasos.drivers.trainer.run import Run
    from llmasos.syscalls.training import Mesh, Method, Shard, TrainEvent

    dice = random.Random(11)
    fields = {"max_steps": KILLED_STEPS, "save_steps": SAVE_STEPS}
    spec, events, gate = world.spec(True, Method.FULL, Mesh(), **fields), [], Gate()
    gate.open()
    Run(spec, gate, events.append).train()
    expected = _steps(events, "loss")
    different, lost, runs, begun = 0, [0], 0, time.monotonic()
    killed = [0, 0]
    while sum(killed) < count:
        runs += 1
        spec = world.spec(True, Method.FULL, Mesh(data=2, shard=Shard.FULL), **fields)
        done = False
        while not done:
            one = Trainer(spec)
            last = sum(killed) >= count
            told = list(one.until(600.0 if last else dice.uniform(0.0, 2.5)))
            done = any(isinstance(message, TrainDone) for message in told)
            if done:
                assert one.process.wait(60) == 0
                continue
            victim = dice.randrange(2)
            one.kill(victim)
            killed[victim] += 1
            steps = [m.event for m in told if isinstance(m, Trained)]
            reached = max((event.step for event in steps if event.phase == "train"), default=0)
            saved = [event.step for event in steps if event.phase == "save"]
            lost += [reached - max(saved)] if saved else []
        lines = (Path(spec.folder) / "metrics.jsonl").read_bytes().splitlines()
        found = [msgspec.json.decode(line, type=TrainEvent) for line in lines]
        different += _apart(_steps(found, "loss"), expected) > LIMIT
    _say(
        figure="kills",
        rank0=killed[0],
        rank1=killed[1],
        runs=runs,
        different=different,
        most_steps_lost=max(lost),
        save_steps=SAVE_STEPS,
        seconds=round(time.monotonic() - begun, 1),
    )
    return not different


def _say(**figure: Any) -> None:
    print(json.dumps(figure), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", default=[])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    wanted = options.figures or ["curves", "kills"]
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE.parent / "drivers"))
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), options.steps)
        if "curves" in wanted:
            fine &= curves(world, [int(size) for size in options.ranks.split(",")])
        if "kills" in wanted:
            fine &= kills(world, options.kills)
    return not fine


if __name__ == "__main__":
    sys.exit(main())
