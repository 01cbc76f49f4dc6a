"""Sheets: every panel stands where it should, in its colours; picks of rounds are told apart."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from alda import InputError
from alda import pictures as P
from alda.datasets import CLASSES, NAMES

IMAGE = torch.full((3, 40, 80), 9, dtype=torch.uint8)


def test_a_sheet_is_two_rows_that_fit_a_screen():
    panels = {
        "image": IMAGE,
        "prediction": torch.zeros(40, 80, dtype=torch.uint8),
        "score": torch.linspace(0, 1, 80).expand(40, 80),
        "answers": torch.full((40, 80), 255, dtype=torch.uint8),
        "truth": torch.full((40, 80), 10, dtype=torch.uint8),
    }
    sheet = np.array(P.sheet(panels))
    height = 165  # of a small panel: 330 columns of a 2:1 image
    assert sheet.shape[1] == 2 * 330 + 6 + 2 * (330 + 6) and sheet.shape[0] < 500
    assert (sheet[18 + 20 : 300, 10:600] == 9).all()  # the first panel is large, over both rows
    left, lower = 666 + 6 + 10, 18 + height + 6 + 18 + 10
    assert (sheet[30:100, left : left + 100] == CLASSES[0].colour).all()  # prediction
    score = sheet[lower, 672:1002, 0].astype(int)
    assert score[0] == 0 and score[-1] == 255 and (np.diff(score) >= 0).all()
    assert (sheet[30:100, 1020:1100] == 0).all()  # answers: none
    assert (sheet[lower : lower + 50, 1020:1100] == CLASSES[10].colour).all()
    legend = sheet[2 * height + 18 + 6 + 18 :].reshape(-1, 3)
    for c in CLASSES:
        assert (legend == c.colour).all(1).any(), c.name


def test_picks_of_this_round_and_of_earlier_ones_have_their_colours():
    now, before = torch.zeros(40, 80, dtype=torch.bool), torch.zeros(40, 80, dtype=torch.bool)
    before[0:10, 0:10], now[20, 40] = True, True
    shown = P.marked(IMAGE, [before, now], [P.EARLIER, P.NOW], (160, 320)).permute(1, 2, 0).numpy()

    def colour(row, column):
        return shown[row, column].astype(int)

    mixed = [np.round(0.15 * 9 + 0.85 * np.array(c)) for c in (P.EARLIER, P.NOW)]
    assert (abs(colour(10, 10) - mixed[0]) <= 1).all() and (
        abs(colour(82, 162) - mixed[1]) <= 1
    ).all()
    assert (colour(120, 30) == 9).all()
    small = P.marked(
        IMAGE, [now], [P.NOW], (20, 40)
    )  # smaller than the image: the pixel is still seen
    assert (small[0] > 100).sum() == 9


def test_single_answers_are_seen_in_a_small_panel():
    """Of 2048 columns a panel of 330 shows every sixth: one answer of class 0 and one of class 5."""
    answers = torch.full((1024, 2048), 255, dtype=torch.uint8)
    answers[500, 1000], answers[500, 1100] = 0, 5
    shown = np.array(P.sheet({"image": IMAGE, "answers": P.widened(answers)}))
    panel = shown[18 : 18 + 165, 672:1002].reshape(-1, 3)
    for label in (0, 5):
        assert 16 <= (panel == CLASSES[label].colour).all(1).sum() <= 36, label
    wide = P.widened(answers)
    assert (wide != 255).sum() == 2 * 31 * 31  # nothing further than 15 pixels
    assert wide[500, 1100] == 5
    whole = torch.arange(19, dtype=torch.uint8).repeat(1024, 1)
    assert torch.equal(P.widened(whole), whole)  # no answer is painted over


def test_the_names_beside_the_bars_do_not_touch():
    """In the panel of a story: two columns, each name a line of its own with white between."""
    drawn = np.array(P.bars(dict.fromkeys(NAMES, 1), (165, 330)))
    for left, number in ((0, 10), (165, 9)):
        ink = (drawn[:, left : left + 70] < 200).any((1, 2))
        assert (np.diff(ink.astype(int)) == 1).sum() == number
        shares = (drawn[:, left + 130 : left + 165] < 200).any(2)
        assert shares.any() and not shares[:, -1].any()  # they end inside their column


def no_space(descriptor):
    """A disk that is full when a file is flushed to it."""
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_pictures_as_they_were(tmp_path, monkeypatch):
    counts, panels = dict.fromkeys(NAMES, 1), {"image": IMAGE, "truth": IMAGE[0]}
    calls = [
        (tmp_path / "sheet.png", lambda path: P.save_sheet(panels, path)),
        (tmp_path / "classes.png", lambda path: P.class_picture(counts, path, balanced=False)),
    ]
    for path, draw in calls:
        path.write_text("before")
        with monkeypatch.context() as full, pytest.raises(InputError, match="cannot be written"):
            full.setattr(os, "fsync", no_space)
            draw(path)
        assert path.read_text() == "before"
        draw(path)
        Image.open(path).verify()
    assert len(list(tmp_path.iterdir())) == 2


def test_bars_stand_beside_the_share_that_is_wanted():
    """Of 518 columns road has all, 3/4; the line of 1/4 is a third of them, over empty bars, too."""
    drawn = np.array(P.bars({"road": 30, "car": 10, "bus": 0}, (64, 640), 0.25))
    line = (drawn[:, 76 + 170 : 76 + 175] == 0).all(2).sum(1)
    assert (line == 2).sum() == 3 * 17, line


def test_bars_and_curves(tmp_path):
    counts = dict.fromkeys(NAMES, 0) | {"car": 30, "road": 10}
    P.class_picture(counts, tmp_path / "x/classes.png", balanced=True)
    drawn = np.array(Image.open(tmp_path / "x/classes.png"))
    car, road = (
        (drawn == CLASSES[NAMES.index(name)].colour).all(2).sum() for name in ("car", "road")
    )
    assert 2.5 < car / road < 3.5
    line = np.array(P.curve([(0, 0.1), (50, 0.3), (100, 0.2)], (100, 200), marks=(20,)))
    rows, columns = np.nonzero((line == (200, 0, 0)).all(2))
    assert columns.min() < 45 and columns.max() > 150
    assert rows[abs(columns - 96) < 3].min() < rows[columns < 40].min()  # the middle is the highest
    masks = [torch.zeros(40, 80, dtype=torch.bool)] * 2
    path = tmp_path / "story.png"
    P.save_story(IMAGE, masks, {"truth": IMAGE[0]}, counts, [(0, 0.1), (9, 0.2)], [3], path)
    assert Image.open(path).size[0] > 1000
