"""Which rows a step learns from. Everything follows from the data set, the recipe and the number of the step:
a run that is started again, also with another number of ranks, goes on with the same rows.

The data is mapped, never read as a whole. Examples are cut to `max_length`; with packing, as many as fit
follow each other in a row. Positions begin anew with each example, which is how transformers' attention knows
that they see nothing of each other.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from llmasos.syscalls import errors
from llmasos.syscalls.training import DataHead, Recipe
from numpy.typing import NDArray

IGNORED = -100
"""As a target: nothing is learnt here."""

VERSION = 1
_FILES = {"tokens.u32": ("<u4", "tokens"), "learnt.u8": ("u1", "tokens"), "ends.u64": ("<u8", "examples")}

Numbers = NDArray[np.int64]


class Batch(NamedTuple):
    """Rows that go through the model together: [rows, length] each. `targets` at t is the token that is to
    come after it, or IGNORED. `tokens` counts those that are no padding."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    tokens: int

    def to(self, device: torch.device) -> Batch:
        ids, positions, targets, tokens = self
        return Batch(ids.to(device), positions.to(device), targets.to(device), tokens)

    @property
    def learning(self) -> torch.Tensor:
        """[rows, length]: where something is learnt."""
        return self.targets != IGNORED

    @property
    def learnt(self) -> int:
        return int(self.learning.sum())


class Step(NamedTuple):
    """The micro-batches of one rank in one step. `learnt` and `tokens` are counts over all ranks."""

    batches: list[Batch]
    learnt: int
    tokens: int


class Dataset:
    """A prepared data set. Raises Corrupt, InvalidArgument (a token that the model does not have)."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        try:
            self.head = msgspec.json.decode((folder / "head.json").read_bytes(), type=DataHead)
            maps: dict[str, Any] = {
                name: np.memmap(folder / name, kind, "r") for name, (kind, _) in _FILES.items()
            }
        except (OSError, ValueError, msgspec.DecodeError) as problem:
            raise errors.Corrupt(f"the prepared data set cannot be read: {type(problem).__name__}") from None
        for name, (_, count) in _FILES.items():
            if self.head.version != VERSION or len(maps[name]) != getattr(self.head, count):
                raise errors.Corrupt(f"{name} of the prepared data set has another size than its head says")
        self.tokens, self.learnt, self.ends = maps.values()
        lengths = np.diff(self.ends, prepend=np.uint64(0)).astype(np.int64)
        if (lengths < 0).any() or int(self.ends[-1]) != self.head.tokens:
            raise errors.Corrupt("the examples of the prepared data set do not follow each other")
        if int(self.tokens.max()) >= vocab_size:
            raise errors.InvalidArgument(
                f"the data set has token {int(self.tokens.max())}, the model knows {vocab_size}",
                hint="prepare it with the tokenizer of the model",
            )
        self.lengths: Numbers = lengths

    def example(self, number: int, longest: int) -> tuple[Numbers, Numbers]:
        """Tokens and targets of an example, cut to `longest` tokens."""
        end = int(self.ends[number])
        begin = end - int(self.lengths[number])
        end = min(end, begin + longest)
        tokens = self.tokens[begin:end].astype(np.int64)
        targets = np.full(len(tokens), IGNORED, np.int64)
        targets[:-1] = np.where(self.learnt[begin + 1 : end], tokens[1:], IGNORED)
        return tokens, targets


class Rows:
    """Some examples of a data set, arranged in rows."""

    def __init__(self, dataset: Dataset, examples: Numbers, recipe: Recipe) -> None:
        self._dataset, self._longest = dataset, recipe.longest
        self._examples = examples
        lengths = np.minimum(dataset.lengths[examples], recipe.longest)
        self._begins = _packed(lengths, recipe.longest) if recipe.packing else np.arange(len(lengths) + 1)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def row(self, number: int) -> tuple[Numbers, Numbers, Numbers]:
        """Tokens, positions and targets."""
        chosen = self._examples[self._begins[number] : self._begins[number + 1]]
        parts = [self._dataset.example(int(example), self._longest) for example in chosen]
        positions = [np.arange(len(tokens)) for tokens, _ in parts]
        return (
            np.concatenate([tokens for tokens, _ in parts]),
            np.concatenate(positions),
            np.concatenate([targets for _, targets in parts]),
        )

    def batch(self, numbers: list[int], rows: int, unit: int) -> Batch:
        """`rows` rows, the last of them empty if there are fewer `numbers`, of a multiple of `unit` tokens.
        Padding follows what it pads, so nothing sees it."""
        found = [self.row(number) for number in numbers]
        length = max((len(tokens) for tokens, _, _ in found), default=1)
        length = -(-length // unit) * unit
        ids = np.zeros((rows, length), np.int64)
        positions = np.tile(np.arange(length), (rows, 1))
        targets = np.full((rows, length), IGNORED, np.int64)
        for i, (tokens, places, wanted) in enumerate(found):
            end = len(tokens)
            ids[i, :end], targets[i, :end], positions[i, :end] = tokens, wanted, places
            positions[i, end:] = places[-1] + 1 + np.arange(length - end)
        count = sum(len(tokens) for tokens, _, _ in found)
        ids_, positions_, targets_ = map(torch.from_numpy, (ids, positions, targets))
        return Batch(ids_, positions_, targets_, count)


class Batches:
    """The rows of every step, dealt to `world` ranks. `steps` are all there are. `even`: every batch has as
    many rows as the next one, if need be empty ones. Rows are padded to a multiple of `unit` tokens.

    Raises Corrupt, InvalidArgument (nothing to learn)."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        vocab_size: int,
        world: int = 1,
        even: bool = False,
        unit: int = 1,
    ) -> None:
        self._recipe, self._world, self._even, self._unit = recipe, world, even or world > 1, unit
        dataset = Dataset(folder, vocab_size)
        training, validation = _split(_useful(dataset, recipe.longest), recipe, len(dataset.ends))
        self._training, self._validation = (Rows(dataset, part, recipe) for part in (training, validation))
        self.rows = len(self._training)
        self._rows_a_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * world
        # The last step of a run without `max_steps` has what is left.
        self._end = recipe.max_steps * self._rows_a_step or math.ceil(recipe.num_train_epochs * self.rows)
        self.steps = math.ceil(self._end / self._rows_a_step)
        self._shuffled = lru_cache(2)(self._shuffle)

    def _shuffle(self, epoch: int) -> Numbers:
        return np.random.default_rng([self._recipe.seed, 1, epoch]).permutation(self.rows)

    def epoch(self, step: int) -> float:
        """How often all data has been seen after `step` steps."""
        return min(step * self._rows_a_step, self._end) / self.rows

    def step(self, step: int, rank: int = 0) -> Step:
        """What `rank` learns from in step `step`, which counts from 0. Batches have the same number of rows
        on all ranks: where too few are left, some are empty."""
        size = self._recipe.per_device_train_batch_size
        first = step * self._rows_a_step
        counts = [self._count(number) for number in range(first, min(first + self._rows_a_step, self._end))]
        batches = []
        for accumulated in range(self._recipe.gradient_accumulation_steps):
            begin = first + (accumulated * self._world + rank) * size
            numbers = [self._row(n) for n in range(begin, min(begin + size, self._end))]
            if numbers or self._even:
                rows = size if self._even else len(numbers)
                batches.append(self._training.batch(numbers, rows, self._unit))
        return Step(batches, sum(learnt for learnt, _ in counts), sum(tokens for _, tokens in counts))

    def _row(self, number: int) -> int:
        return int(self._shuffled(number // self.rows)[number % self.rows])

    def _count(self, number: int) -> tuple[int, int]:
        """Learnt tokens and all tokens of a row."""
        tokens, _, targets = self._training.row(self._row(number))
        return int((targets != IGNORED).sum()), len(tokens)

    @property
    def validates(self) -> bool:
        return len(self._validation) > 0

    def validation(self, rank: int = 0) -> list[list[int]]:
        """Numbers of the rows of each batch that `rank` measures on: as many batches on all ranks."""
        size = self._recipe.per_device_train_batch_size
        mine = list(range(rank, len(self._validation), self._world))
        most = -(-len(self._validation) // self._world)
        return [mine[i : i + size] for i in range(0, most, size)]

    def validation_batch(self, numbers: list[int]) -> Batch:
        rows = self._recipe.per_device_train_batch_size if self._even else len(numbers)
        return self._validation.batch(numbers, rows, self._unit)


def _useful(dataset: Dataset, longest: int) -> Numbers:
    """The examples from which something is learnt."""
    begins = dataset.ends.astype(np.int64) - dataset.lengths
    ends = begins + np.minimum(dataset.lengths, longest)
    # The first token of an example has nothing before it that it could be told from.
    spans = np.stack([begins + 1, ends], 1)
    whole = spans[:, 0] < spans[:, 1]
    counts = np.zeros(len(spans), np.int64)
    if whole.any():
        edges = spans[whole].reshape(-1)
        # A sum goes on to the end where no edge follows.
        edges = edges[:-1] if edges[-1] == len(dataset.learnt) else edges
        counts[whole] = np.add.reduceat(dataset.learnt, edges, dtype=np.int64)[::2]
    found = np.flatnonzero(counts > 0)
    if not len(found):
        raise errors.InvalidArgument(
            f"no example has a token to learn among its first {longest}",
            hint="use a greater max_length, or completion_only_loss off",
        )
    return found


def _split(examples: Numbers, recipe: Recipe, rows: int) -> tuple[Numbers, Numbers]:
    """(training, validation) of the useful `examples` of a data set of so many `rows`, in random order."""
    last = examples >= rows - recipe.validation_rows
    training, validation = (
        np.random.default_rng([recipe.seed, 0]).permutation(part)
        for part in (examples[~last], examples[last])
    )
    kept = math.ceil(recipe.validation_split * len(training))
    if kept >= len(training):
        raise errors.InvalidArgument(
            f"validation_rows={recipe.validation_rows} and validation_split={recipe.validation_split:g} "
            f"leave none of {len(examples)} rows to learn from",
            hint="give more rows, or measure on fewer of them",
        )
    return training[kept:], np.concatenate([validation, training[:kept]])


def _packed(lengths: Numbers, room: int) -> Numbers:
    """Where rows begin, and the end: each has as many of the next examples as fit."""
    ends = np.cumsum(lengths)
    begins, begin, used = [0], 0, 0
    while begin < len(lengths):
        begin = int(np.searchsorted(ends, used + room, side="right"))
        used = int(ends[begin - 1])
        begins.append(begin)
    return np.array(begins)
