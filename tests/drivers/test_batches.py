"""Which rows a step learns from, on any number of ranks, and what is kept to measure on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.drivers.trainer.batches import IGNORED, Batches
from llmasos.syscalls import errors
from llmasos.syscalls.training import Recipe

from .conftest import VOCAB
from .test_trainer import examples, write_data


def apart(batch: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The single examples of a batch: tokens and targets."""
    for ids, positions, targets in zip(batch.input_ids, batch.position_ids, batch.targets, strict=True):
        begins = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for begin, end in itertools.pairwise(begins):
            learnt = torch.nonzero(targets[begin:end] != IGNORED).flatten()
            if len(learnt):  # what follows the last target is padding, or of no effect
                end = begin + int(learnt[-1]) + 1
                yield ids[begin:end], targets[begin:end]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_example_is_learnt_once_an_epoch_on_any_number_of_ranks(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = examples(data.draw(st.integers(1, 30)), seed=data.draw(st.integers(0, 99)))
    folder = write_data(tmp_path_factory.mktemp("rows") / "data", rows)
    recipe = Recipe(
        max_length=data.draw(st.integers(8, 30)),
        packing=data.draw(st.booleans()),
        per_device_train_batch_size=data.draw(st.integers(1, 3)),
        gradient_accumulation_steps=data.draw(st.integers(1, 3)),
    )
    expected = sorted(
        tokens[: recipe.max_length][: last_learnt(mark, recipe.max_length)] for tokens, mark in rows
    )
    for world in (1, 2, 3):
        batches = Batches(folder, recipe, VOCAB, world)
        found = []
        for step in range(batches.steps):
            work = [batches.step(step, rank) for rank in range(world)]
            assert len({(part.learnt, part.tokens, len(part.batches)) for part in work}) == 1
            learnt = sum(int((b.targets != IGNORED).sum()) for part in work for b in part.batches)
            assert learnt == work[0].learnt
            assert sum(b.tokens for part in work for b in part.batches) == work[0].tokens
            found += [
                [*tokens.tolist(), int(targets[-1])]
                for part in work
                for batch in part.batches
                for tokens, targets in apart(batch)
            ]
        assert sorted(found) == expected
        assert batches.epoch(batches.steps) == 1


def last_learnt(mark: list[int], longest: int) -> int:
    return max(i for i, learnt in enumerate(mark[:longest]) if learnt) + 1


def test_a_step_on_two_ranks_learns_what_one_rank_does_with_twice_the_rows(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", examples(30))
    one = Batches(folder, Recipe(max_length=40, per_device_train_batch_size=2), VOCAB)
    two = Batches(folder, Recipe(max_length=40, per_device_train_batch_size=1), VOCAB, 2)
    for step in range(one.steps):
        parts = [two.step(step, rank) for rank in range(2)]
        expected = sorted(tokens.tolist() for batch in one.step(step).batches for tokens, _ in apart(batch))
        found = sorted(tokens.tolist() for part in parts for b in part.batches for tokens, _ in apart(b))
        assert found == expected


def test_the_last_rows_are_kept_to_measure_on(tmp_path: Path) -> None:
    rows = examples(30)
    folder = write_data(tmp_path / "data", rows)
    plain = write_data(tmp_path / "plain", rows[:23])
    recipe = Recipe(max_length=40, packing=False)
    kept = Batches(folder, msgspec.structs.replace(recipe, validation_rows=7), VOCAB)
    alone = Batches(plain, recipe, VOCAB)
    assert kept.steps == alone.steps
    for step in range(kept.steps):  # it learns what it would learn of the others alone
        for one, other in zip(kept.step(step).batches, alone.step(step).batches, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
    found = [tokens for n in kept.validation() for tokens, _ in apart(kept.validation_batch(n))]
    assert sorted(tokens.tolist() for tokens in found) == sorted(tokens[:-1] for tokens, _ in rows[23:])
    both = Batches(folder, msgspec.structs.replace(recipe, validation_rows=7, validation_split=0.5), VOCAB)
    assert len(both.validation()) == 7 + 12
    with pytest.raises(errors.InvalidArgument, match=r"validation_rows=30 .* none of 30 rows"):
        Batches(folder, msgspec.structs.replace(recipe, validation_rows=30), VOCAB)


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", [([1, 2, 96], [0, 1, 1])])
    with pytest.raises(errors.InvalidArgument, match="has token 96, the model knows 96"):
        Batches(folder, Recipe(), 96)
    with pytest.raises(errors.InvalidArgument, match=r"validation_split=0\.5 leave none of 1 rows"):
        Batches(folder, Recipe(validation_split=0.5), VOCAB)
    nothing = write_data(tmp_path / "nothing", [([1, 2, 3] * 5, [1] + [0] * 14)])
    with pytest.raises(errors.InvalidArgument, match="no example has a token to learn"):
        Batches(nothing, Recipe(), VOCAB)
    with (folder / "tokens.u32").open("ab") as file:
        file.write(bytes(4))
    with pytest.raises(errors.Corrupt, match=r"tokens\.u32"):
        Batches(folder, Recipe(), VOCAB)
