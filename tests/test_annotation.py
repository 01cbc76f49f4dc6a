"""Rounds on disk: atomic, never changed, the union of answers, the ledger counted by hand."""

import json

import pytest
import torch

from alda import InputError
from alda.annotation import Rounds, ledger
from alda.datasets import resize_labels

TRUTH = torch.arange(24, dtype=torch.uint8).view(4, 6) % 19
TRUTH[0, 0] = 255


def oracle(asked):
    return torch.where(asked, TRUTH, torch.tensor(255, dtype=torch.uint8))


def mask(*pixels):
    asked = torch.zeros(4, 6, dtype=torch.bool)
    for row, col in pixels:
        asked[row, col] = True
    return asked


def test_rounds_add_up_and_keep_the_ledger(tmp_path):
    rounds = Rounds(tmp_path / "rounds")
    assert rounds.complete() == 0
    with rounds.new(1) as new:
        new.add("a", mask((0, 0), (0, 1), (1, 1)), oracle, regions=2, training_size=(2, 3))
        new.add("b", mask(), oracle, regions=0, training_size=(2, 3))
        assert rounds.complete() == 0  # nothing stands until the last image is in
    with rounds.new(2) as new:
        new.add("a", mask((3, 5)), oracle, regions=1, training_size=(2, 3))
        new.add(
            "b", mask((1, 1), (2, 2)), oracle, regions=2, training_size=(2, 3), keep_labels=True
        )
    first, second = rounds.record(1), rounds.record(2)
    # at 2x3 the cells' centres are the pixels (1,1), (1,3), (1,5), (3,1), ...
    assert first["images"] == {
        "a": {"asked": 3, "labelled": 2, "trained": 1, "regions": 2, "share": 1.0}
    }
    assert (first["asked"], first["labelled"], first["ignored"], first["trained"]) == (3, 2, 1, 1)
    # keep_labels: (2,2) trains although no centre falls on it
    assert second["images"]["b"]["trained"] == 2
    assert first["classes"]["sidewalk"] == 1 and sum(first["classes"].values()) == 2
    total = ledger([first, second])
    assert (total["asked"], total["labelled"], total["regions"], total["images"]) == (6, 5, 5, 2)
    assert second["images"]["b"]["share"] == pytest.approx(2 / 3) and 0 < total["class_entropy"] < 1
    assert (
        rounds.labels("a", (4, 6), upto=1).ne(255).sum() == 2
        and rounds.labels("a", (4, 6)).ne(255).sum() == 3
    )
    assert rounds.asked("a", (4, 6)).sum() == 4 and rounds.asked("nobody", (4, 6)).sum() == 0
    assert rounds.labels("a", (4, 6))[3, 5] == TRUTH[3, 5]


def test_a_cell_that_two_rounds_label_is_trained_on_once(tmp_path):
    """--keep-labels: pixels of two rounds in one cell of the training size."""
    rounds = Rounds(tmp_path / "rounds")
    for number, pixels in enumerate([((0, 1), (2, 2)), ((1, 0), (3, 3)), ((0, 4),)], 1):
        with rounds.new(number) as new:
            new.add("a", mask(*pixels), oracle, 1, training_size=(2, 3), keep_labels=True)
    # cells of 2x2 pixels: the first round labels (0,0) and (1,1), the second the same, the third (0,2)
    records = [rounds.record(n) for n in (1, 2, 3)]
    assert [r["trained"] for r in records] == [2, 0, 1] and ledger(records)["trained"] == 3
    assert (resize_labels(rounds.labels("a", (4, 6)), (2, 3), True) != 255).sum() == 3


def test_answers_are_counted_apart_where_nobody_measured_the_time():
    row = {"asked": 4, "labelled": 4, "trained": 4, "regions": 4, "answers": 4, "corrections": 0}
    sums = {"asked": 8, "labelled": 8, "ignored": 0, "trained": 8, "regions": 8}
    images = {"page": row | {"seconds": 100.0}, "file": row | {"seconds": None}}
    total = ledger([{**sums, "classes": {"road": 8}, "images": images}])
    assert (total["answers"], total["seconds"], total["timed"]) == (8, 100.0, 4)
    del images["page"]
    total = ledger([{**sums, "classes": {"road": 8}, "images": images}])
    assert total["answers"] == 4 and not {"seconds", "timed"} & total.keys()


def test_an_interrupted_round_does_not_stand_and_can_be_asked_again(tmp_path):
    rounds = Rounds(tmp_path / "rounds")
    with pytest.raises(KeyboardInterrupt), rounds.new(1) as new:
        new.add("a", mask((1, 1)), oracle, 1, (4, 6))
        raise KeyboardInterrupt
    assert rounds.complete() == 0
    with rounds.new(1) as new:
        new.add("b", mask((1, 1)), oracle, 1, (4, 6))
    assert rounds.complete() == 1 and list(rounds.record(1)["images"]) == ["b"]
    assert not (tmp_path / "rounds/01/queries/a.png").exists()


def test_a_round_is_never_written_twice(tmp_path):
    rounds = Rounds(tmp_path)
    with rounds.new(1):
        pass
    with pytest.raises(InputError, match="never written twice"), rounds.new(1):
        pass


def test_a_removed_round_and_a_foreign_file_are_errors(tmp_path):
    rounds = Rounds(tmp_path)
    for number in (1, 2):
        with rounds.new(number) as new:
            new.add("a", mask((1, number)), oracle, 1, (4, 6))
    with pytest.raises(InputError, match=r"is \(4, 6\), its image is \(8, 6\)"):
        rounds.labels("a", (8, 6))
    (tmp_path / "01").rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"rounds \[2\] have a gap"):
        rounds.complete()
    assert json.loads((tmp_path / "gone/round.json").read_text())["asked"] == 1
