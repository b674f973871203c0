"""Runs one compiled engine through fixed cases: python engine_check.py ENGINE MODELS, where MODELS is what
emulated.py recorded. Needs no torch, so that it runs under an emulator too.

Asserts that a row's result is bit for bit its own, whatever shares the batch and however a prompt is cut, and
that products are right. Prints JSON: `numbers` and `digests` of each case, to compare with another engine's.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from emulated import helpers, use_engine  # isort: skip

DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("int8", "int8"),
    ("int4", "int8"),
    ("int4", "bfloat16"),
    ("int4", "float32"),
]
# How far a product may be from the exact one, relative to the largest: activations of 24, 8, 8 and 8 bits.
ERROR = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 8e-3, "int4": 8e-3}
FINE_ERROR = 1e-4
UNITS_ERROR = 1.5e-2  # beside an outlier, 200 times as large as the rest of a row

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 3.0},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"repetition": 1.8},
    {"temperature": 1.0, "repetition": 0.7, "presence": 1.0, "frequency": 0.3},
    {"temperature": 1.0, "ngram": 2},
    {"temperature": 1.0, "forbid_stops": 1, "stop_count": 3},
    {"top": 20},
]


def digest(*parts: Any) -> str:
    return hashlib.sha256(b"".join(bytes(part) for part in parts)).hexdigest()[:16]


def aligned(values: Any) -> Any:
    """A copy at a multiple of 64."""
    room = np.empty(values.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


class Check:
    def __init__(self, path: Path) -> None:
        from llmasos.drivers.native import library

        self.library = library
        self.functions = use_engine(path).functions
        self.numbers: dict[str, list[float]] = {}
        self.digests: dict[str, str] = {}
        self.cases = 0
        self.in_units = 0

    def products(self) -> None:
        from llmasos.drivers.native import formats

        rng = np.random.default_rng(1)
        pool = self.functions.llk_pool_new(2, None)
        rows, cols = 80, 160
        weights = (rng.integers(-500, 500, (rows, cols)) / 1024).astype(np.float32)
        bias = aligned((rng.integers(-500, 500, rows) / 1024).astype(np.float32))
        x = (rng.integers(-4000, 4000, (17, cols)) / 1024).astype(np.float32)
        for name in formats.DTYPES:
            packed = aligned(formats.interleave(name, formats.to_rows(name, "F32", weights)))
            self.digests[f"packed {name}"] = digest(packed)
            exact = (
                x.astype(np.float64) @ formats.unpack(name, packed, rows, cols).T.astype(np.float64) + bias
            )
            for fine in (0, 1):
                matrix = self.library.Matrix(
                    packed.ctypes.data, bias.ctypes.data, rows, cols, self.library.FORMATS[name], fine
                )

                def product(x: Any, matrix: Any = matrix) -> Any:
                    x, y = aligned(x), aligned(np.zeros((len(x), rows), np.float32))
                    self.functions.llk_matmul(pool, matrix, x.ctypes.data, len(x), y.ctypes.data)
                    return y

                alone = np.concatenate([product(x[i : i + 1]) for i in range(17)])
                for count in range(1, 18):
                    assert product(x[:count]).tobytes() == alone[:count].tobytes(), (name, fine, count)
                    self.cases += 1
                allowed = FINE_ERROR if fine and name in ("int8", "int4") else ERROR[name]
                error = float(np.abs(alone - exact).max() / np.abs(exact).max())
                assert error < allowed, (name, fine, error)
                self.numbers[f"product {name} {fine}"] = alone.reshape(-1)[::7].tolist()
        self.functions.llk_pool_free(pool)

    def units(self) -> None:
        """Products of int4 in units, where the engine has them."""
        from llmasos.drivers.native import formats

        rng = np.random.default_rng(3)
        pool = self.functions.llk_pool_new(2, None)
        for rows, cols, negative in ((80, 160, 0), (16, 64, 0), (48, 1376, 0), (48, 608, 1)):
            weights = (rng.standard_normal((rows, cols)) * rng.uniform(0.01, 1, (rows, 1))).astype(np.float32)
            stored = formats.to_rows("int4", "F32", weights)
            if negative:  # as Q4_0 has them: levels counted from the other end
                groups = stored.view([("d", "<f2"), ("m", "<f2"), ("q", "<u4", (4,))])
                flipped = rng.random(groups.shape) < 0.5
                groups["m"][flipped] += 15 * groups["d"][flipped]
                groups["d"][flipped] *= -1
                groups["q"][flipped] ^= 0xFFFFFFFF
            packed = aligned(formats.interleave("int4", stored))
            bias = aligned(rng.standard_normal(rows).astype(np.float32))
            matrix = self.library.Matrix(
                packed.ctypes.data, bias.ctypes.data, rows, cols, self.library.FORMATS["int4"], 0
            )
            if not self.functions.llk_units(matrix, None):
                break
            units = aligned(np.empty((2, rows), np.float32))
            self.functions.llk_units(matrix, units.ctypes.data)
            matrix.unit = units.ctypes.data
            x = rng.standard_normal((600, cols)).astype(np.float32)
            x[5] *= 1e4
            x[:, 3] *= 50

            def product(x: Any, matrix: Any = matrix, rows: int = rows) -> Any:
                x, y = aligned(x), aligned(np.zeros((len(x), rows), np.float32))
                self.functions.llk_matmul(pool, matrix, x.ctypes.data, len(x), y.ctypes.data)
                return y

            exact = x.astype(np.float64) @ formats.unpack("int4", packed, rows, cols).T.astype(np.float64)
            whole = product(x)
            error = np.abs(whole - exact - bias).max(1) / np.abs(exact).max(1)
            assert error.max() < UNITS_ERROR, (rows, cols, error.max())
            for count in (*range(1, 18), 40, 100, 530, 600):
                assert product(x[600 - count :]).tobytes() == whole[600 - count :].tobytes(), (cols, count)
                self.in_units += 1
            x[7, 9] = np.nan
            broken = np.isnan(product(x)).all(1)
            assert np.flatnonzero(broken).tolist() == [7]
        self.functions.llk_pool_free(pool)

    def models(self, folder: Path) -> None:
        conftest = helpers()
        tokens = random.Random(1).choices(range(conftest.VOCAB), k=170)
        for family in ("llama", "gpt2", "qwen3", "mistral"):
            for dtype, kv_dtype in DTYPES:
                case = f"{family} {dtype} {kv_dtype}"
                driver = conftest.NativeDriver(lambda *_: None)
                kernel = conftest.start(driver, conftest.files_of(folder / family), dtype, kv_dtype)
                self.digests[f"weights {case}"] = digest(
                    *(
                        ctypes.string_at(tensor.address, tensor.nbytes)
                        for _, tensor in sorted(driver._resident(1).model._packed.tensors.items())
                    )
                )
                whole = driver.all_logits(1, tokens)
                for chunk in (1, 5, 33):
                    assert driver.all_logits(1, tokens, chunk).tobytes() == whole.tobytes(), (case, chunk)
                    self.cases += 1
                self.numbers[case] = whole[[0, 20, 169]].reshape(-1).tolist()
                self.forks(kernel, tokens[:150], case)
                driver.close()

    def forks(self, kernel: Any, tokens: list[int], case: str) -> None:
        parent = kernel.open(tokens)
        kernel.step([(parent, 150)], sample=False)
        forks = []
        for number in range(5):
            fork = kernel.fork(parent, logprobs=2)
            fork.tokens += [number, number + 1]
            kernel._announce(fork)
            forks.append(fork)
        together = kernel.step([(fork, 2) for fork in forks])
        for number, out in enumerate(together):
            alone = kernel.open([*tokens, number, number + 1], logprobs=2)
            [expected] = kernel.step([(alone, 152)])
            assert (out.tokens, out.chosen) == (expected.tokens, expected.chosen), (case, number)
            self.cases += 1

    def choices(self) -> None:
        rng = np.random.default_rng(2)
        pool = self.functions.llk_pool_new(1, None)
        context, stops = array("I", [3, 5, 3, 7, 5, 3] * 4), array("i", [1, 2, 3])
        ids, values = (ctypes.c_int32 * 64)(), (ctypes.c_float * 64)()
        chosen: list[int] = []
        for options in SAMPLINGS:
            for seed in range(20):
                logits = np.full(1008, 7e7, np.float32)  # what lies behind the vocabulary is never chosen
                logits[:1003] = rng.integers(-3000, 3000, 1003) / 512
                picks = (self.library.Pick * 1)(
                    self.library.Pick(
                        tokens=context.buffer_info()[0],
                        known=len(context),
                        prompt_length=10,
                        stops=stops.buffer_info()[0],
                        seed=seed,
                        position=24,
                        ids=ids,
                        values=values,
                        **{"top": -1, "top_p": 1.0, "repetition": 1.0, **options},
                    )
                )
                model, logits = self.library.Model(vocab=1003), aligned(logits)
                self.functions.llk_choose(pool, model, logits.ctypes.data, picks, 1)
                assert 0 <= picks[0].token < 1003
                chosen.append(picks[0].token)
                self.cases += 1
        self.digests["choices"] = digest(array("i", chosen))
        self.numbers["alternatives"] = list(values[:20])
        self.functions.llk_pool_free(pool)


def main() -> None:
    begun = time.perf_counter()
    check = Check(Path(sys.argv[1]))
    check.products()
    check.choices()
    check.units()
    check.models(Path(sys.argv[2]))
    json.dump(
        {
            "isa": check.functions.llk_isa().decode(),
            "cases": check.cases,
            "in_units": check.in_units,
            "seconds": round(time.perf_counter() - begun, 1),
            "numbers": check.numbers,
            "digests": check.digests,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
