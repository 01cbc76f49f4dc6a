"""People answer through files: the same labels and weights as the ground truth gives, and nothing is lost on the way."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from alda import InputError, evaluation, loop, oracle
from alda.annotation import Rounds
from alda.datasets import CLASSES, NAMES, id_map, open_dataset
from tests.test_loop import arguments, assert_same_bits, state_of

PIXELS = {"strategy": "ripu-pa", "radius": 3, "pixels": 4, "steps": 6, "query_steps": "2,4"}
REGIONS = {"strategy": "ripu", "budget": 0.022, "steps": 6, "query_steps": "2,4"}
IMAGES = {"strategy": "stal", "steps": 4}
SPREAD = {"strategy": "cbda", "budget": 0.05, "steps": 6, "query_steps": "2,4", "batch": 1}
GT = "cityscapes/gtFine/train"


@pytest.fixture(scope="module")
def unlabelled(tiny_world, tmp_path_factory):
    """A copy of the miniature world without labels of the target's training images."""
    world = tmp_path_factory.mktemp("unlabelled") / "world"
    shutil.copytree(tiny_world, world)
    shutil.rmtree(world / GT)
    return world


def opened(out):
    """(folder, questions) of the round that waits."""
    _, folder, record = oracle.open_round(out)
    return folder, record


def truth_of(world, image_id):
    (path,) = (world / GT).rglob(f"{image_id}_gtFine_labelIds.png")
    return path


def as_files(world, folder, record, kind):
    """Answers every image from the labels of `world`: label ids, train ids, or a Labelme JSON."""
    for image_id, question in record["images"].items():
        path, answers = truth_of(world, image_id), folder / "answers"
        if kind == "ids":
            shutil.copy(path, answers / path.name)
            continue
        train = id_map("cityscapes")[np.array(Image.open(path))]
        if kind == "train ids":
            Image.fromarray(train).save(answers / f"{image_id}_labelTrainIds.png")
            continue
        asked = np.array(Image.open(folder / f"queries/{image_id}.png")) == 255
        shapes = []  # a square around each asked pixel
        for row, col in np.argwhere(asked).tolist():
            label = "unknown" if train[row, col] == 255 else NAMES[train[row, col]]
            corners = [[col, row], [col + 1, row], [col + 1, row + 1], [col, row + 1]]
            shapes.append({"label": label, "points": corners, "shape_type": "polygon"})
        height, width = question["size"]
        content = {"shapes": shapes, "imageHeight": height, "imageWidth": width}
        (answers / f"{image_id}.json").write_text(json.dumps(content))


def answered(words, out, answer):
    """Runs until no round waits; the statuses on the way."""
    statuses = [loop.main(words)]
    while statuses[-1] == 3:
        answer(*opened(out))
        statuses.append(loop.main([*words, "--resume"]))
    return statuses


def same_rounds(a, b):
    """Two runs asked the same and got the same labels; what the rounds say differs by the people's part only."""
    assert Rounds(a / "rounds").complete() == Rounds(b / "rounds").complete() == 2
    for number in (1, 2):
        maps = [sorted((out / f"rounds/{number:02d}").rglob("*.png")) for out in (a, b)]
        assert [p.name for p in maps[0]] == [p.name for p in maps[1]] and (maps[0] or number == 2)
        for x, y in zip(*maps, strict=True):
            assert x.read_bytes() == y.read_bytes(), x
        mine, theirs = (Rounds(out / "rounds").record(number) for out in (a, b))
        assert theirs.pop("unanswered") == 0
        for row in theirs["images"].values():
            assert row.pop("answers") >= 1 and row.pop("corrections") == 0
            assert row.pop("seconds") is None
        assert mine == theirs


def test_an_answered_round_never_replaces_another(tmp_path):
    """A round was removed and asked again: what people wrote for the first stays."""
    (tmp_path / "rounds/01").mkdir(parents=True)  # it stands
    for text in ("first", "second", "third"):
        (tmp_path / "rounds/01.open").mkdir()
        (tmp_path / "rounds/01.open/answers").write_text(text)
        oracle.set_aside(tmp_path)
    names = ("01.answered", "01.answered-2", "01.answered-3")
    texts = [(tmp_path / "rounds" / name / "answers").read_text() for name in names]
    assert texts == ["first", "second", "third"]


@pytest.mark.parametrize(
    "options,kind",
    [(PIXELS, "labelme"), (REGIONS, "labelme"), (IMAGES, "ids"), (SPREAD, "train ids")],
    ids=["pixels", "regions", "images", "cbda"],
)
def test_answers_in_files_equal_the_ground_truth(options, kind, tiny_world, unlabelled, tmp_path):
    a, b = tmp_path / "truth", tmp_path / "files"
    assert loop.main(arguments(tiny_world, a, **options)) == 0
    words = arguments(unlabelled, b, oracle="files", **options)
    statuses = answered(words, b, lambda *asked: as_files(tiny_world, *asked, kind))
    # CBDA's second round is empty: every class has had its share
    assert statuses == ([3, 0] if options is SPREAD else [3, 3, 0])
    same_rounds(a, b)
    ours, theirs = state_of(a), state_of(b)
    assert_same_bits(ours["model"], theirs["model"])
    assert_same_bits(ours["optimizer"], theirs["optimizer"])
    results = [json.loads((out / "result.json").read_text()) for out in (a, b)]
    assert results[0]["IoU"] == results[1]["IoU"]
    budget = results[1]["budget"]
    asked = budget["images" if options is IMAGES else "regions"]
    assert budget["answers"] == asked and budget["corrections"] == 0 and "seconds" not in budget
    assert "answers" not in results[0]["budget"]
    assert sorted(p.name for p in (b / "rounds").iterdir()) == [
        "01", "01.answered", "02", *["02.answered"] * (options is not SPREAD)
    ]  # fmt: skip
    if options is IMAGES:
        lines = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
        assert all("accuracy" not in line.get("losses", {}) for line in lines)


@pytest.mark.parametrize("strategy", ["cbst", "st", "source-only"])
def test_a_target_without_labels_needs_no_oracle(
    strategy, unlabelled, tiny_world, tmp_path, capsys
):
    """Pseudo-labels and weights are those of the labelled target; their accuracy is unknown."""
    a, b = tmp_path / "with", tmp_path / "without"
    options = {
        "strategy": strategy,
        "steps": 4,
        **({} if strategy == "source-only" else {"rules": "code"}),
    }
    assert loop.main(arguments(tiny_world, a, **options)) == 0
    capsys.readouterr()
    assert loop.main(arguments(unlabelled, b, **options)) == 0
    assert_same_bits(state_of(a)["model"], state_of(b)["model"])
    if strategy != "source-only":
        assert "accuracy unknown (" in capsys.readouterr().out
        assert json.loads((b / "pseudo/01/round.json").read_text())["accuracy"] is None
        maps = [sorted((out / "pseudo").rglob("*.png")) for out in (a, b)]
        assert [p.read_bytes() for p in maps[0]] == [p.read_bytes() for p in maps[1]]


def test_a_query_of_a_target_without_labels_says_the_ways_out(unlabelled, tmp_path, capsys):
    for strategy in ("ripu", "stal", "full"):
        words = arguments(unlabelled, tmp_path / "out", strategy=strategy)
        assert loop.main(words) == 2
        error = capsys.readouterr().err.splitlines()[-1]  # above it notes on options of the others
        assert "_gtFine_labelIds.png" in error and "--oracle files" in error, error
        assert error.startswith("error: ") and not (tmp_path / "out/config.json").exists()


# ------------------------------------------------------------------------------------- problems


@pytest.fixture(scope="module")
def asked(unlabelled, tmp_path_factory):
    """(run folder, what was printed) of a run of ripu-pa whose first round waits."""
    out, text = tmp_path_factory.mktemp("asked") / "out", io.StringIO()
    with contextlib.redirect_stderr(text):
        assert loop.main(arguments(unlabelled, out, oracle="files", **PIXELS)) == 3
    return out, text.getvalue()


@pytest.fixture
def waiting(asked, unlabelled, tmp_path):
    """(arguments, run folder, folder, questions) of a copy of that run."""
    out = tmp_path / "out"
    shutil.copytree(asked[0], out)
    return arguments(unlabelled, out, oracle="files", **PIXELS), out, *opened(out)


def test_a_round_of_questions_can_be_read_and_looked_at(waiting, asked, unlabelled):
    _, out, folder, record = waiting
    assert asked[1].startswith("waiting: round 1 asks 12 questions on 6 images, in ")
    assert asked[1].endswith(f"python -m alda.loop --resume --out {asked[0]} goes on\n")
    assert record["unit"] == "pixel" and len(record["images"]) == 6
    target = open_dataset("cityscapes", unlabelled, "train", False)
    for sample in target.samples:
        question = record["images"][sample.id]
        asked = np.array(Image.open(folder / f"queries/{sample.id}.png"))
        assert np.argwhere(asked == 255).tolist() == sorted(question["picks"])
        assert question["photograph"] == str(sample.image.resolve())
        assert question["size"] == list(sample.size)
        overlay = np.array(Image.open(folder / f"overlays/{sample.id}.jpg"), int)
        assert overlay.shape == (640, 1280, 3)
        yellow = (overlay[..., 0] > 180) & (overlay[..., 1] > 150) & (overlay[..., 2] < 90)
        row, col = question["picks"][0]
        scale = 1280 / sample.size[1]
        assert yellow[round((row + 0.5) * scale), round((col + 0.5) * scale)]
    text = (folder / "README.txt").read_text()
    assert "_labelIds.png" in text and "motorcycle" in text and "Labelme" in text
    assert "python -m alda.loop --resume --out RUN" in text
    assert not list((folder / "answers").iterdir()) and Rounds(out / "rounds").complete() == 0


def test_all_problems_are_listed_at_once_and_nothing_is_merged(waiting, tiny_world, capsys):
    words, out, folder, record = waiting
    as_files(tiny_world, folder, record, "ids")
    first, second, third, fourth, fifth, _ = record["images"]
    answers = folder / "answers"

    def drop(image_id):
        (answers / f"{image_id}_gtFine_labelIds.png").unlink()

    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(answers / f"{first}_gtFine_labelIds.png")
    ids = np.array(Image.open(answers / f"{second}_gtFine_labelIds.png"))
    ids[0, 0] = 99
    Image.fromarray(ids).save(answers / f"{second}_gtFine_labelIds.png")
    drop(third)
    square = [[0, 0], [400, 0], [400, 400], [0, 400]]
    shapes = [{"label": "road", "points": square}, {"label": "cat", "points": square[:3]}]
    (answers / f"{third}.json").write_text(json.dumps({"shapes": shapes}))
    (answers / f"{fourth}.json").write_text("{")
    drop(fifth)
    shutil.copy(tiny_world / "gta5/images/00001.png", answers / "holiday.png")
    before = {p: p.read_bytes() for p in (out / "rounds").rglob("*.*") if p.is_file()}
    assert loop.main([*words, "--resume"]) == 2
    error = capsys.readouterr()
    problems = [line for line in error.err.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 4
    for image_id, text in (
        (first, "is 9x9, its photograph 256x128"),
        (second, "holds ids [99]"),
        (third, "shape 2: label 'cat' is none of road, sidewalk"),
        (fourth, f"has 2 answers: {fourth}_gtFine_labelIds.png, {fourth}.json; leave one"),
    ):
        assert any(image_id in line and text in line for line in problems), (text, problems)
    assert f"no answer yet: 1 images: {fifth} (2 of 2 px)" in error.err
    assert error.err.splitlines()[-1].startswith("error: ") and "4 problems" in error.err
    assert "holiday.png" in error.out and "were not asked" in error.out
    assert before == {p: p.read_bytes() for p in (out / "rounds").rglob("*.*") if p.is_file()}
    assert Rounds(out / "rounds").complete() == 0

    assert loop.main([*words, "--resume", "--accept-partial"]) == 3  # the second round asks
    assert (out / "pictures/round-01/classes.png").is_file()
    rounds = Rounds(out / "rounds")
    assert rounds.complete() == 1
    rows, size = rounds.record(1)["images"], (128, 256)
    assert [rows[i]["answers"] for i in (first, second, fourth, fifth)] == [0] * 4
    assert rounds.record(1)["unanswered"] >= 4 * 2 and all(r["asked"] == 2 for r in rows.values())
    for image_id in (first, second, fourth, fifth):
        assert (rounds.labels(image_id, size) == 255).all()
    # the right shape of the third image is taken but for what the wrong one covers
    labels, asked = rounds.labels(third, size), rounds.asked(third, size)
    inside = torch.from_numpy(oracle.polygon_mask(np.array(square[:3]), size))
    assert (labels[asked & ~inside] == 0).all() and (labels[asked & inside] == 255).all()
    assert {p.name for p in (out / "rounds").iterdir()} == {"01", "01.answered", "02.open"}
    assert loop.main([*words, "--resume"]) == 3  # what is right was taken once


def test_an_image_that_nobody_answered_stays_unlabelled(
    unlabelled, tiny_world, tmp_path, monkeypatch
):
    """STAL, --accept-partial: it trains among the unlabelled images, not as one without any label."""
    words = arguments(unlabelled, tmp_path / "out", oracle="files", **IMAGES, rounds=1, budget=0.7)
    assert loop.main(words) == 3
    folder, record = opened(tmp_path / "out")
    one, *others = record["images"]
    assert others
    shutil.copy(truth_of(tiny_world, one), folder / "answers" / truth_of(tiny_world, one).name)
    drawn, mixed = [], loop.mixed_batches
    monkeypatch.setattr(loop, "mixed_batches", lambda *a: drawn.append(a[2]) or mixed(*a))
    assert loop.main([*words, "--resume", "--accept-partial"]) == 0
    names = [sample.id for sample in open_dataset("cityscapes", unlabelled, "train", False).samples]
    labelled, _, rest = drawn
    assert {names[i] for view, i in labelled if view == 1} == {one}
    assert {names[i] for view, i in rest} == {*names} - {one}


def test_to_accept_what_is_right_is_said_each_time(unlabelled, tmp_path, capsys):
    words = arguments(unlabelled, tmp_path / "out", oracle="files", **PIXELS)
    assert loop.main([*words, "--accept-partial"]) == 3
    said = capsys.readouterr().out
    assert "round 1/2: 12 of 12 picks due" in said and "of round 1 have score 0" in said
    assert loop.main(["--out", str(tmp_path / "out"), "--resume"]) == 3  # nobody has answered yet
    assert opened(tmp_path / "out")[0].name == "01.open"


def test_missing_answers_are_waited_for_and_written_ones_stay(waiting, tiny_world, capsys):
    words, out, folder, record = waiting
    as_files(tiny_world, folder, record, "labelme")
    one, other = list(record["images"])[:2]
    path = folder / "answers" / f"{one}.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "shapes": content["shapes"][:1]}))
    (folder / "answers" / f"{other}.json").rename(folder / "answers" / f"{other}.jsonx")
    for _ in range(2):  # as often as one likes
        assert loop.main([*words, "--resume"]) == 3
        error = capsys.readouterr().err
        assert (
            f"2 images: {one} (1 of 2 px), {other} (2 of 2 px)" in error and "problem" not in error
        )
        assert "waiting: round 1: 2 images in" in error and f"--resume --out {out} goes on" in error
    assert len(list((folder / "answers").iterdir())) == 6
    path.write_text(json.dumps(content))
    (folder / "answers" / f"{other}.jsonx").rename(folder / "answers" / f"{other}.json")
    assert loop.main([*words, "--resume"]) == 3 and opened(out)[0].name == "02.open"
    said = capsys.readouterr().out  # 256x128 pixels become 64x32
    assert "that people gave a class are not trained on" in said and "--keep-labels" in said


def test_a_kill_between_the_two_names_of_a_round_loses_nothing(waiting, tiny_world, monkeypatch):
    words, out, folder, record = waiting
    as_files(tiny_world, folder, record, "ids")
    monkeypatch.setattr(oracle, "merge", lambda *a, real=oracle.merge: real(*a) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.main([*words, "--resume"])
    monkeypatch.undo()
    assert {p.name for p in (out / "rounds").iterdir()} == {"01", "01.open"}
    assert loop.main([*words, "--resume"]) == 3
    assert {p.name for p in (out / "rounds").iterdir()} == {"01", "01.answered", "02.open"}


def test_a_kill_while_asking_asks_the_same_again(asked, unlabelled, tmp_path, monkeypatch):
    out, drawn = tmp_path / "out", []

    def killed(*args, real=oracle.draw_overlay):
        drawn.append(real(*args))
        if len(drawn) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(oracle, "draw_overlay", killed)
    words = arguments(unlabelled, out, oracle="files", **PIXELS)
    with pytest.raises(KeyboardInterrupt):
        loop.main(words)
    assert [p.name for p in (out / "rounds").iterdir()] == ["01.open.incomplete"]
    assert loop.main([*words, "--resume"]) == 3
    folders = [(run / "rounds/01.open") for run in (out, asked[0])]
    mine, theirs = ({p.name: p.read_bytes() for p in f.rglob("*.*")} for f in folders)
    assert mine == theirs and len(mine) == 3 * 6 + 2
    assert [p.name for p in (out / "rounds").iterdir()] == ["01.open"]


@pytest.mark.parametrize("part", ["unit", "images", "files", "notes"])
def test_edited_questions_are_one_line(part, waiting, capsys):
    words, _, folder, record = waiting
    (folder / "round.json").write_text(json.dumps({**record, part: 3}))
    assert loop.main([*words, "--resume"]) == 2
    assert "round.json" in capsys.readouterr().err.splitlines()[-1]


def test_a_changed_question_is_noticed(waiting, capsys):
    words, _, folder, record = waiting
    path = folder / f"queries/{next(iter(record['images']))}.png"
    Image.fromarray(255 - np.array(Image.open(path))).save(path)
    assert loop.main([*words, "--resume"]) == 2 and "sha256" in capsys.readouterr().err


def test_people_are_in_the_comparison(waiting, tiny_world, tmp_path, capsys):
    words, out, folder, record = waiting
    as_files(tiny_world, folder, record, "labelme")
    path = folder / "answers" / f"{next(iter(record['images']))}.json"
    content = json.loads(path.read_text())
    own = {"seconds": 61.25, "corrections": 2, "finished": True}
    own["shapes"] = oracle.shapes_digest(content["shapes"])
    path.write_text(json.dumps({**content, "alda": own}))
    words += ["--resume"]
    assert loop.main(words) == 3
    row = Rounds(out / "rounds").record(1)["images"][path.stem]
    assert (row["answers"], row["corrections"], row["seconds"]) == (2, 2, 61.25)
    assert "1.0 min for 2 of them" in capsys.readouterr().out
    (sheet,) = (out / "pictures/round-01").glob("*_prediction.png")
    answers = Image.open(str(sheet).replace("_prediction", "_answers")).convert("RGB")
    panel = answers.crop((0, 0, answers.width, answers.height - 60))  # without the legend
    labels = Rounds(out / "rounds").labels(sheet.name.removesuffix("_prediction.png"), (128, 256))
    given = {CLASSES[c].colour for c in labels.unique().tolist() if c != 255}
    assert given and given <= {colour for _, colour in panel.getcolors(1 << 16)}
    as_files(tiny_world, *opened(out), "ids")
    assert loop.main(words) == 0
    budget = json.loads((out / "result.json").read_text())["budget"]
    assert (budget["answers"], budget["corrections"], budget["seconds"]) == (24, 2, 61.25)
    other = tmp_path / "truth"
    assert loop.main(arguments(tiny_world, other, **PIXELS)) == 0
    capsys.readouterr()
    assert evaluation.main(["compare", str(out), str(other)]) == 0
    table = capsys.readouterr().out
    assert [line.split()[2:] for line in table.splitlines() if line.startswith("people: ")] == [
        ["24", "-"], ["2", "-"], ["61.2", "-"], ["2", "-"],
    ]  # fmt: skip


# -------------------------------------------------------------------------------------- Labelme


def test_polygons_hold_the_pixels_whose_centres_they_hold():
    """Against one pixel and one side at a time."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        points = rng.uniform(-4, 24, (rng.integers(3, 9), 2))
        slow = np.zeros((17, 21), bool)
        for row, col in np.ndindex(slow.shape):
            x, y, inside = col + 0.5, row + 0.5, False
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
                if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                    inside = not inside
            slow[row, col] = inside
        assert (oracle.polygon_mask(points, (17, 21)) == slow).all()
    square = np.array([(2, 1), (5, 1), (5, 3), (2, 3)])
    assert oracle.polygon_mask(square, (4, 6)).tolist() == [
        [False] * 6,
        *[[False, False, True, True, True, False]] * 2,
        [False] * 6,
    ]


def test_circles_and_points_hold_pixels_inside_the_image_alone():
    """Against one pixel at a time."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        (x, y), (x1, y1) = points = rng.uniform(-4, 24, (2, 2))
        circle, point = np.zeros((2, 17, 21), bool)
        for row, col in np.ndindex(circle.shape):
            circle[row, col] = np.hypot(col + 0.5 - x, row + 0.5 - y) <= np.hypot(x1 - x, y1 - y)
            point[row, col] = col <= x < col + 1 and row <= y < row + 1
        for kind, count, slow in (("circle", 2, circle), ("point", 1, point)):
            shape = {"shape_type": kind, "points": points[:count].tolist()}
            assert (oracle.shape_mask(shape, (17, 21)) == slow).all()


def test_labelme_shapes_and_their_order(tmp_path):
    shapes = [
        {"label": "Road", "shape_type": "rectangle", "points": [[6, 4], [0, 0]]},
        {"label": "traffic_light", "shape_type": "point", "points": [[2.9, 1.0]]},
        {"label": "unknown", "shape_type": "circle", "points": [[5.5, 3.5], [5.5, 3.9]]},
        {"label": "car", "points": [[0, 3], [2, 3], [2, 4], [0, 4]], "shape_type": None},
    ]
    content = {"shapes": shapes, "imageHeight": 4, "imageWidth": 7}
    labels, problems, work = oracle.labelme_labels(tmp_path, content, (4, 7))
    assert labels.tolist() == [
        [0, 0, 0, 0, 0, 0, 254],
        [0, 0, 6, 0, 0, 0, 254],
        [0, 0, 0, 0, 0, 0, 254],
        [13, 13, 0, 0, 0, 255, 254],
    ]
    assert not problems and not work
    whole, _, _ = oracle.labelme_labels(tmp_path, content, (4, 7), whole=True)
    assert (whole[:, 6] == 255).all() and (whole[:, :6] == labels[:, :6]).all()


BROKEN = {
    "no object": 3,
    "no points": {"label": "car"},
    "text for points": {"label": "car", "points": "here"},
    "points of three": {"label": "car", "points": [[1, 2, 3], [1, 2, 3]]},
    "two points": {"label": "car", "points": [[1, 2], [3, 4]]},
    "not finite": {"label": "car", "points": [[1, 2], [3, float("nan")], [5, 6]]},
    "huge": {"label": "car", "points": [[1, 2], [3, 1e300], [5, 6]]},
    "a line": {"label": "car", "points": [[1, 2], [3, 4]], "shape_type": "line"},
    "a list for its kind": {"label": "car", "points": [[1, 2]], "shape_type": []},
    "an object for its kind": {"label": "car", "points": [[1, 2]], "shape_type": {"a": 1}},
    "no label": {"points": [[1, 2], [3, 4], [5, 6]]},
    "a number for a label": {"label": 7, "points": [[1, 2], [3, 4], [5, 6]]},
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_shape_is_a_problem_with_its_number(name, whole, tmp_path):
    """How far it reaches is unknown, unless its label alone is wrong: what lies under it is no answer,
    nor is the background; what lies over it is."""
    good = {"label": "sky", "points": [[0, 0], [9, 0], [9, 9], [0, 9]]}
    over = {"label": "car", "points": [[3.5, 3.5]], "shape_type": "point"}
    content = {"shapes": [good, BROKEN[name], over]}
    labels, problems, _ = oracle.labelme_labels(tmp_path, content, (4, 4), whole)
    assert len(problems) == 1 and "shape 2: " in problems[0] and "\n" not in problems[0]
    assert labels[3, 3] == 13 and (labels == 13).sum() == 1
    assert (labels == 10).sum() == (15 if "label" in name else 0)
    assert (labels == 254).sum() == (0 if "label" in name else 15)


@pytest.mark.parametrize("value", [-1, float("nan"), 1e300, "3", None, True, [2]])
def test_work_that_is_no_number_is_not_counted(value, tmp_path):
    for key, work in (("seconds", {"corrections": 1}), ("corrections", {"seconds": 1})):
        own = {"seconds": 1, "corrections": 1, key: value, "shapes": oracle.shapes_digest([])}
        assert oracle.labelme_labels(tmp_path, {"shapes": [], "alda": own}, (4, 4))[2] == work


@pytest.mark.parametrize("content", [{"shapes": 3}, {"shapes": [], "imageHeight": 5}])
def test_a_json_of_another_image_is_a_problem(content, tmp_path):
    labels, problems, _ = oracle.labelme_labels(tmp_path, content, (4, 4), whole=True)
    assert len(problems) == 1 and (labels == 254).all()


def test_a_file_without_shapes_is_no_answer_to_a_whole_image(tmp_path):
    """Saved before anything was drawn; the page says when nothing is to be drawn."""
    labels, problems, _ = oracle.labelme_labels(tmp_path, {"shapes": []}, (4, 4), whole=True)
    assert (labels == 254).all() and not problems
    own = {"finished": True, "shapes": oracle.shapes_digest([])}
    labels, _, _ = oracle.labelme_labels(tmp_path, {"shapes": [], "alda": own}, (4, 4), whole=True)
    assert (labels == 255).all()


def test_a_folder_in_answers_is_told(waiting, capsys):
    words, _, folder, _ = waiting
    (folder / "answers/mine").mkdir()
    assert loop.main([*words, "--resume"]) == 3
    assert "ignored: 1 files or folders in answers/" in (said := capsys.readouterr().out)
    assert "mine/" in said


def test_asking_twice_is_refused(waiting, unlabelled):
    _, out, _, _ = waiting
    target = open_dataset("cityscapes", unlabelled, "train", False)

    class Settings:
        oracle, unit, radius, root = "files", "pixel", 3, str(unlabelled)

    rounds = Rounds(out / "rounds")
    with (
        pytest.raises(InputError, match="stands already"),
        oracle.asking(Settings, rounds, 1, target),
    ):
        pass
