"""`llsh train`, `plot`, `cp` and `rm` of data sets: what is refused, what is drawn."""

from __future__ import annotations

from pathlib import Path

from llmasos.userland.llsh.curve import draw

from .conftest import Typist


def test_a_file_becomes_a_data_set_and_goes_again(llsh: Typist, tmp_path: Path) -> None:
    data = tmp_path / "facts.jsonl"
    data.write_text('{"text": "w1 w2"}\n')
    assert "/datasets/facts.jsonl" in llsh("cp", str(data), "/datasets/")
    assert "facts.jsonl" in llsh("ls", "/datasets")
    assert '"kind":"dataset"' in llsh("ls", "/datasets", "--json")
    assert llsh("cat", "/datasets/facts.jsonl") == data.read_text()
    data.write_text('{"text": "w3"}\n')
    llsh("cp", str(data), "/datasets/")
    assert (llsh.code, "--force replaces it" in llsh.err) == (1, True)
    llsh("cp", "-f", str(data), "/datasets/")
    assert llsh("cat", "/datasets/facts.jsonl") == data.read_text()
    llsh("rm", "/datasets/facts.jsonl")
    assert llsh.code == 0
    assert "facts" not in llsh("ls", "/datasets")


def test_what_cannot_be_trained_is_told_with_what_to_do(llsh: Typist, tmp_path: Path) -> None:
    data = tmp_path / "facts.jsonl"
    data.write_text('{"text": "w1 w2"}\n')
    for words, told in (
        (("train", "tiny", "nothere.jsonl"), "no file and no data set"),
        (("train", "tiny", str(data), "--set", "learn=3"), "no 'learn'"),
        (("train", "tiny", str(data), "--lr", "-1"), "learning_rate: must be a number from 0 to 10"),
        (("train", "tiny", str(data), "--rank", "0"), "r: must be a whole number from 1 to 256"),
        (("train", "tiny", str(data), "--lora", "--full"), "one of"),
        (("train", "nomodel", str(data)), "nomodel"),
        (("train",), "train MODEL DATA"),
    ):
        llsh(*words)
        assert llsh.code != 0
        assert told in llsh.err


def test_a_bad_row_is_named_and_leaves_no_model(llsh: Typist, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "w1"}\n{"txt": "w2"}\n')
    llsh("train", "tiny", str(data), "--name", "bad")
    assert llsh.code == 1
    assert "line 2" in llsh.err
    assert "bad" not in llsh("list")
    assert "train" not in llsh("ps")
    assert "bad" not in llsh("ls", "/datasets")
    llsh("train", "nomodel", str(data))
    assert "bad" not in llsh("ls", "/datasets")
    llsh("cp", str(data), "/datasets/")
    llsh("train", "tiny", str(data), "--name", "bad")
    assert (llsh.code, "bad" in llsh("ls", "/datasets")) == (1, True)  # it was there before
    llsh("rm", "/datasets/bad.jsonl")


def test_a_model_that_was_not_trained_has_no_curve(llsh: Typist) -> None:
    llsh("plot", "tiny")
    assert llsh.code == 1
    assert "was not trained" in llsh.err


def test_a_curve_goes_from_its_highest_to_its_lowest_point() -> None:
    text = draw([(n, 10.0 - n) for n in range(10)], [(9, 1.0)], 60, 12)
    lines = text.splitlines()
    assert len(lines) == 12
    assert lines[0].split("│")[0].strip() == "10"
    assert lines[9].split("│")[0].strip() == "1"
    assert lines[9].rstrip().endswith("×")
    assert lines[0].split("│")[1][0] != " "


def test_one_point_is_a_curve() -> None:
    assert "│" in draw([(1, 2.0)], [], 40, 8)
