"""Confusion matrix and IoU against slow loops and recorded official outputs; protocols, export, command line."""

import csv
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_pictures import no_space

from alda import InputError, deeplab
from alda import evaluation as E
from alda.datasets import CLASSES, SegmentationDataset, open_dataset
from alda.settings import settings_for

GOLDEN = Path(__file__).parent / "golden"


def test_confusion_matrix_equals_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (2, 9, 11), generator=generator).to(torch.uint8)
    labels[labels == 5] = 255
    prediction = torch.randint(0, 5, (2, 9, 11), generator=generator)
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for t, p in zip(labels.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if t < 5:
            expected[t, p] += 1
    before = prediction.clone()
    assert torch.equal(E.confusion_matrix(prediction, labels, 5), expected)
    assert torch.equal(prediction, before)  # the official GPU version writes into its input


def test_iou_equals_the_recorded_official_counts():
    golden = np.load(GOLDEN / "miou.npz")
    matrix = E.confusion_matrix(
        torch.from_numpy(golden["pred"]), torch.from_numpy(golden["target"])
    )
    assert matrix.diagonal().tolist() == golden["inter_np"].tolist()
    assert matrix.sum(1).tolist() == golden["target_np"].tolist()
    found = E.iou(matrix)
    # classes of the truth; the official code counts the others as 0
    present = golden["target_np"] > 0
    gap = np.abs(found.numpy()[present] - golden["iou_class"][present]).max()
    print(f"IoU: max gap {gap:.2e}")
    assert gap < 1e-9 and found.isnan().numpy().tolist() == (~present).tolist()


def test_a_prediction_outside_the_classes_is_an_error():
    golden = np.load(GOLDEN / "miou.npz")  # here the official histogram counts class 16 as 15
    prediction, labels = (
        torch.from_numpy(golden["pred_over"]),
        torch.from_numpy(golden["target_over"]),
    )
    with pytest.raises(ValueError, match=r"outside 0\.\.15"):
        E.confusion_matrix(prediction, labels, 16)


def test_16_classes_are_scored_where_the_truth_is_one_of_them():
    """By hand: 30 pixels of bus are found, 10 are missed; 20 of train are called bus."""
    matrix = torch.zeros(19, 19, dtype=torch.int64)
    bus, train = E.NAMES.index("bus"), E.NAMES.index("train")
    matrix[bus, bus], matrix[bus, train], matrix[train, bus] = 30, 10, 20
    before = matrix.clone()
    result = E.summary(matrix)
    assert result["IoU"]["bus"] == result["mIoU19"] * 2 == 30 / 60 and result["IoU"]["train"] == 0
    assert result["mIoU16"] == result["mIoU13"] == 30 / 40 and result["classes16"] == 1
    assert torch.equal(matrix, before)


def test_absent_classes_are_left_out_and_listed():
    matrix = torch.zeros(19, 19, dtype=torch.int64)
    # road 30/40, terrain predicted only: 0/10, wall 1
    matrix[0, 0], matrix[0, 9], matrix[3, 3] = (30, 10, 20)
    result = E.summary(matrix)
    assert result["mIoU19"] == pytest.approx((0.75 + 1) / 2) and result["classes19"] == 2
    assert result["mIoU16"] == pytest.approx((0.75 + 1) / 2) and result["classes16"] == 2
    assert result["mIoU13"] == pytest.approx(0.75) and result["classes13"] == 1
    assert result["lowest"] == {"class": "road", "IoU": 0.75} and len(result["absent"]) == 17
    assert result["IoU"]["train"] is None and result["IoU"]["terrain"] is None
    text = E.describe(result)
    assert "left out as absent: sidewalk" in text and "mIoU19 87.50 over 2 classes" in text
    assert E.summary(torch.zeros(19, 19, dtype=torch.int64))["mIoU19"] is None


class Echo(torch.nn.Module):
    """A 'network' whose logits are the image's channels: what a protocol does to it can be seen."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("window,stride", [(8, 2 / 3), (7, 0.5), (64, 2 / 3)])
def test_sliding_windows_cover_every_pixel_and_agree_with_one_pass(window, stride):
    image = torch.randint(0, 256, (3, 19, 30), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    whole = E.predict_prob(Echo(), image, E.Protocol("whole"), "cpu")
    tiles = E.predict_prob(
        Echo(), image, E.Protocol("sliding", window=window, stride=stride), "cpu"
    )
    assert (tiles - whole).abs().max() < 1e-6
    starts = E._starts(max(19, window), window, stride)
    assert starts[0] == 0 and starts[-1] == max(19, window) - window


def test_sliding_averages_logits_and_pads_small_images():
    """Two windows of 8 on a row of 12, stride ceil(8 * 2/3) = 6 (but the last one ends at the border):
    where both see a pixel, their logits are averaged, not their probabilities."""

    class Window(torch.nn.Module):
        """Logits 0 and 1, 4, ... by the order of the windows: which window said what can be seen."""

        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x)
            logits = torch.zeros(1, 2, *x.shape[-2:])
            logits[:, 1] = 3.0 * len(self.seen) - 2
            return logits

    model = Window()
    image = torch.full((3, 8, 12), 200, dtype=torch.uint8)
    prob = E.predict_prob(model, image, E.Protocol("sliding", window=8), "cpu")
    expected = torch.tensor([1.0] * 4 + [2.5] * 4 + [4.0] * 4).sigmoid()
    torch.testing.assert_close(prob[1, 0], expected)
    assert E._starts(2048, 769, 2 / 3) == [0, 513, 1026, 1279]  # stride 513, not 512

    model = Window()
    E.predict_prob(model, image[:, :5, :4], E.Protocol("sliding", window=8), "cpu")
    (x,) = model.seen
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[1:6, 2:6] = True  # 3 rows and 4 columns are missing: 1 above, 2 below, 2 on either side
    assert ((x[0, 0] != 0) == inside).all()


def test_a_prediction_that_is_not_finite_is_never_a_score():
    for bad in (torch.nan, torch.inf):
        image = torch.full((3, 4, 4), 7, dtype=torch.uint8)

        class Lost(torch.nn.Module):
            def forward(self, x, bad=bad):
                return x * bad

        for protocol in (E.Protocol("whole"), E.Protocol("sliding", window=3)):
            with pytest.raises(E.InputError, match="not finite"):
                E.predict_prob(Lost(), image, protocol, "cpu")


def test_flip_averages_the_mirror_image():
    image = torch.randint(0, 256, (3, 6, 8), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )

    class Shift(torch.nn.Module):
        def forward(self, x):
            return x.roll(1, -1)

    prob = E.predict_prob(Shift(), image, E.Protocol("whole", flip=True), "cpu")
    x = E.normalise(image)
    expected = (x.roll(1, -1).softmax(0) + x.roll(-1, -1).softmax(0)) / 2
    assert (prob - expected).abs().max() < 1e-6


def test_protocols_say_what_they_did():
    assert str(E.PROTOCOLS["ripu"]) == "ripu (1280x640, flip, scored at label size)"
    assert (
        str(E.PROTOCOLS["sliding"])
        == "sliding (full resolution, window 769 stride 513, no flip, scored at label size)"
    )
    assert "160x80" in str(E.protocol_named("ripu", size=(80, 160)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of an untrained network, and the world it is scored on."""
    folder = tmp_path_factory.mktemp("run")
    network = {"net": "deeplabv2", "backbone": "resnet18", "batch_norm": "live"}
    torch.manual_seed(0)
    model = deeplab.build(**network, init="none")
    (folder / "checkpoints").mkdir()
    torch.save({"network": network, "model": model.state_dict()}, folder / "checkpoints/last.pt")
    return folder, model


def test_evaluate_counts_every_labelled_pixel_once(run, tiny_world):
    model = run[1].train()
    data = open_dataset("cityscapes", tiny_world, "val")
    result = E.evaluate(model, data, E.protocol_named("ripu", size=(64, 128)), "cpu")
    matrix = torch.zeros(19, 19, dtype=torch.int64)
    model.eval()
    for i in range(len(data)):
        prob = E.predict_prob(model, data.image(i), E.protocol_named("ripu", size=(64, 128)), "cpu")
        matrix += E.confusion_matrix(prob.argmax(0), data.labels(i))
    assert result["images"] == len(data) and "128x64" in result["protocol"]
    assert result["mIoU19"] == pytest.approx(E.summary(matrix)["mIoU19"])


def test_score_command_prints_number_and_protocol(run, tiny_world, capsys, tmp_path):
    json_file = tmp_path / "score.json"
    arguments = [
        "score",
        str(run[0]),
        "--root",
        str(tiny_world),
        "--protocol",
        "whole",
        "--json",
        str(json_file),
    ]
    assert E.main(arguments) == 0
    out = capsys.readouterr().out
    assert (
        "mIoU19" in out
        and "protocol whole (full resolution, no flip" in out
        and json_file.is_file()
    )


@pytest.mark.parametrize("toy", [True, False])
def test_a_score_on_the_miniature_world_says_so(toy, run, tiny_world, capsys, tmp_path):
    """By whatever name it has; other folders are none."""
    root, path = tmp_path / "data", tmp_path / "score.json"
    root.mkdir()
    (root / "cityscapes").symlink_to(tiny_world / "cityscapes")
    if toy:
        root = tiny_world
    words = ["score", str(run[0]), "--root", str(root), "--size", "64x32", "--json", str(path)]
    assert E.main(words) == 0
    assert ("TOY: numbers on the miniature world\n" in capsys.readouterr().out) == toy
    assert json.loads(path.read_text())["toy"] is toy


def test_large_photographs_pass_in_smaller_groups():
    """Elsewhere than on a CPU: four of Cityscapes' size, of the larger as many as have its pixels."""
    for size, number in (((1024, 2048), 4), ((2048, 2048), 2), ((4096, 4096), 1), ((64, 32), 4)):
        pairs = [(n, torch.empty(1, dtype=torch.uint8).expand(3, *size)) for n in range(4)]
        groups = E.same_sized(pairs, torch.device("cuda"))
        assert [len(names) for names, _ in groups] == [number] * (4 // number)


def test_memory_that_is_short_is_one_line(run, tiny_world, capsys, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(E, "evaluate", short)
    assert E.main(["score", str(run[0]), "--root", str(tiny_world)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory (CUDA") and error.count("\n") == 1
    assert "--size" in error and "--batch" not in error


def test_predictions_need_no_labels(run, tiny_world, tmp_path):
    world = tmp_path / "world"
    shutil.copytree(tiny_world / "cityscapes/leftImg8bit", world / "cityscapes/leftImg8bit")
    words = [str(run[0]), "--root", str(world), "--size", "64x32", "--split", "train"]
    assert E.main(["predict", *words, "--to", str(tmp_path / "to")]) == 0
    assert len([*(tmp_path / "to").iterdir()]) == 6
    assert E.main(["score", *words]) == 2


@pytest.mark.parametrize("other", [{"flip": True}, {"size": (8, 8)}])
def test_windows_slide_over_the_image_as_it_is(other):
    with pytest.raises(ValueError, match="own size, unmirrored"):
        E.Protocol("mine", window=4, **other)


def test_predictions_of_acdc_are_train_ids(tiny_world, tmp_path):
    """Its server takes those, Cityscapes' the label ids."""
    samples = open_dataset("cityscapes", tiny_world, "val").samples[:1]
    data = SegmentationDataset("acdc", samples, "cityscapes")
    assert E.write_predictions(Echo(), data, E.PROTOCOLS["whole"], "cpu", tmp_path) == 1
    (path,) = tmp_path.iterdir()
    assert path.name == f"{samples[0].id}_pred_labelTrainIds.png"
    prob = E.predict_prob(Echo(), data.image(0), E.PROTOCOLS["whole"], "cpu")
    assert (np.array(Image.open(path)) == prob.argmax(0).numpy()).all()


def test_predict_command_writes_cityscapes_ids(run, tiny_world, tmp_path):
    arguments = [
        "predict",
        str(run[0]),
        "--root",
        str(tiny_world),
        "--size",
        "128x64",
        "--to",
        str(tmp_path),
    ]
    assert E.main(arguments) == 0
    files = sorted(tmp_path.glob("*_pred_labelIds.png"))
    samples = open_dataset("cityscapes", tiny_world, "val").samples
    assert [f.name for f in files] == [f"{s.id}_pred_labelIds.png" for s in samples]
    ids = np.array(Image.open(files[0]))
    assert ids.shape == samples[0].size and ids.dtype == np.uint8
    assert set(np.unique(ids)) <= {c.cityscapes_id for c in CLASSES}


def test_a_full_disk_leaves_scores_and_predictions_as_they_were(
    run, tiny_world, tmp_path, monkeypatch, capsys
):
    score = tmp_path / "score.json"
    score.write_text("before")
    monkeypatch.setattr(os, "fsync", no_space)
    for words in (["score", "--json", str(score)], ["predict", "--to", str(tmp_path / "to")]):
        assert E.main([*words, str(run[0]), "--root", str(tiny_world), "--size", "64x32"]) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert score.read_text() == "before" and not list((tmp_path / "to").iterdir())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["score", "nowhere"], "no nowhere: give a run's folder or a checkpoint file"),
        (["score", "RUN", "--size", "big"], "WIDTHxHEIGHT"),
        (["score", "RUN", "--device", "cuda:77"], "cannot be used"),
        (["score", "RUN", "--protocol", "sliding", "--window", "-5"], "expected 1 or more"),
        (["score", "RUN", "--protocol", "sliding", "--window", "0"], "expected 1 or more"),
        (["score", "RUN", "--window", "9"], "only sliding has a window"),
        (["score", "RUN", "--protocol", "sliding", "--size", "9x9"], "full resolution"),
    ],
)
def test_user_mistakes_are_one_line(arguments, message, run, capsys, tiny_world):
    arguments = [str(run[0]) if word == "RUN" else word for word in arguments]
    assert E.main([*arguments, "--root", str(tiny_world)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_dataset_without_labels_cannot_be_scored(tiny_world):
    data = open_dataset("cityscapes", tiny_world, "val")
    bare = SegmentationDataset(
        "cityscapes", [s._replace(label=None) for s in data.samples], "cityscapes"
    )
    with pytest.raises(E.InputError, match="publishes no labels"):
        E.evaluate(Echo(), bare, E.PROTOCOLS["whole"], "cpu")


# -------------------------------------------------------------------------------------------------------------- compare


def finished(folder, strategy="ripu", miou=0.5, protocol="ripu (64x32)", **more):
    """A run's folder as a finished run leaves it, without the network."""
    folder.mkdir()
    s = {
        "src": "gta5",
        "tgt": "cityscapes",
        "net": "deeplabv2",
        "backbone": "resnet18",
        "seed": 0,
        "pixels": 0,
        "budget": 0.05,
    }
    s |= {
        "cbda": "both",
        "unlabelled": 1.0,
        "contrast": 0.0,
        "image_queries": "random",
        "restart": False,
    }
    (folder / "config.json").write_text(json.dumps({"settings": s}))
    budget = {"asked": 50, "share": 0.05, "images": 3, "trained": 20, "class_entropy": 0.8}
    means = {"mIoU19": miou, "mIoU16": miou, "mIoU13": None}
    ious = {**dict.fromkeys(E.NAMES, miou), "train": None}
    lowest = {"class": "wall", "IoU": 0.01}
    result = {
        "strategy": strategy,
        "toy": False,
        "IoU": ious,
        **means,
        "lowest": lowest,
        "protocol": protocol,
        "images": 4,
    }
    (folder / "result.json").write_text(
        json.dumps({**result, "budget": budget, "steps": 9, "source_images": 8, **more})
    )
    return str(folder)


@pytest.fixture
def figures(monkeypatch):
    """The (figure, axes) that a test's commands draw."""
    drawn, new_figure = [], E.new_figure
    monkeypatch.setattr(E, "new_figure", lambda: drawn.append(new_figure()) or drawn[-1])
    return drawn


def test_a_curve_is_the_mean_over_seeds_in_a_band(tmp_path, figures):
    """Two seeds of one recipe are one line with a band of their deviation; over the steps the scores
    along the way, the one before the first round and the last are its points."""
    runs = []
    for seed, scores in ((0, (0.2, 0.4)), (1, (0.3, 0.6))):
        folder = tmp_path / f"s{seed}"
        before = {"step": 0, "mIoU19": scores[0] / 2}
        runs.append(finished(folder, "ripu", scores[1], before=before))
        config = json.loads((folder / "config.json").read_text())
        config["settings"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(config))
        lines = [{"step": 3, "losses": {}}, {"step": 4, "mIoU19": scores[0]}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for over, expected in (("budget", [50.0]), ("steps", [12.5, 25.0, 50.0])):
        words = ["compare", *runs, "--plot", str(tmp_path / f"{over}.png"), "--over", over]
        assert E.main(words) == 0
        axes = figures[-1][1]
        line = next(x for x in axes.lines if "n = 2" in str(x.get_label()))
        assert line.get_ydata() == pytest.approx(expected)
        if over == "steps":
            assert list(line.get_xdata()) == [0, 4, 9]
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx(
            (min(e - d for e, d in zip(expected, DEVIATION[over], strict=True)), 50 + 200**0.5)
        )


def test_each_recipe_that_asks_nobody_is_a_level_line_of_its_own(tmp_path, figures):
    budget = {"asked": 0, "share": 0.0, "images": 0, "trained": 0, "class_entropy": 0.0}
    runs = [finished(tmp_path / m, "source-only", float(m), budget=budget) for m in ("0.2", "0.4")]
    path = tmp_path / "0.4" / "config.json"
    path.write_text(path.read_text().replace('"settings": {', '"settings": {"lr": 9.0, '))
    assert E.main(["compare", *runs, "--plot", str(tmp_path / "x.png")]) == 0
    lines = figures[-1][1].lines
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([20, 40])
    assert len({line.get_label() for line in lines}) == len({x.get_color() for x in lines}) == 2


def test_without_matplotlib_a_plot_is_refused(tmp_path, monkeypatch, capsys):
    run = finished(tmp_path / "run", "ripu", 0.2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert E.main(["compare", run, "--plot", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.endswith("--plot needs matplotlib: pip install matplotlib\n")


def test_a_source_free_run_has_a_name_of_its_own():
    assert E.strategy_text({"strategy": "ripu"}, {"source_free": "x.pt"}) == "ripu source-free"


def test_what_asks_nobody_or_knows_all_is_a_level_line(tmp_path, figures):
    runs = []
    for name, share in (("source-only", 0.0), ("full", 1.0), ("ripu", 0.05)):
        budget = {"asked": 1, "share": share, "images": 3, "trained": 20, "class_entropy": 0.8}
        runs.append(finished(tmp_path / name, name, budget=budget))
    assert E.main(["compare", *map(str, runs), "--plot", str(tmp_path / "x.png")]) == 0
    lines = {line.get_label(): [*line.get_xdata()] for line in figures[-1][1].lines[:3]}
    assert lines == {"source-only": [0, 1], "full": [0, 1], "ripu": [5.0]}  # level: axes' shares


DEVIATION = {"budget": [200**0.5], "steps": [12.5**0.5, 50**0.5, 200**0.5]}


def test_compare_lays_runs_side_by_side(tmp_path, capsys):
    loops = [{"loop": 1, "share": 0.01, "mIoU19": 0.2}, {"loop": 2, "share": 0.05, "mIoU19": 0.4}]
    runs = [
        finished(tmp_path / "a"),
        finished(tmp_path / "b", "cbda", 0.6, cbda="both", pseudo="cbst"),
        finished(tmp_path / "c", "stal", 0.4, student={"mIoU19": 0.3}, loops=loops),
    ]
    files = {"--csv": tmp_path / "t.csv", "--plot": tmp_path / "p.png"}
    assert E.main(["compare", *runs, *(str(x) for pair in files.items() for x in pair)]) == 0
    out = capsys.readouterr().out
    assert "protocol: ripu (64x32)" in out and "TOY" not in out
    line = next(line for line in out.splitlines() if line.startswith("mIoU19"))
    assert line.split() == ["mIoU19", "50.0", "60.0", "40.0"]
    assert next(line for line in out.splitlines() if line.startswith("IoU train")).split()[2:] == [
        "-",
        "-",
        "-",
    ]
    with open(files["--csv"]) as file:
        rows = list(csv.DictReader(file))
    assert [row["strategy"] for row in rows] == [
        "ripu",
        "cbda both + cbst",
        "stal lambda_u 1 lambda_c 0 random",
    ]
    assert (
        rows[2]["student mIoU19"] == "30.0"
        and rows[0]["IoU wall"] == "50.0"
        and rows[0]["IoU train"] == ""
    )
    assert np.array(Image.open(files["--plot"]).convert("RGB")).std() > 5


def test_a_full_disk_leaves_tables_and_pictures_as_they_were(tmp_path, monkeypatch, capsys):
    run = finished(tmp_path / "a")
    for option, name in (("--csv", "t.csv"), ("--plot", "p.png"), ("--plot", "p.svg")):
        path = tmp_path / name
        path.write_text("before")
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", no_space)
            assert E.main(["compare", run, option, str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{path}: cannot be written" in error and error.count("\n") == 1
        assert path.read_text() == "before"
        assert E.main(["compare", run, option, str(path)]) == 0
        assert path.stat().st_size > 100 and not list(tmp_path.glob("*.incomplete"))
    assert E.main(["compare", run, "--plot", str(tmp_path / "p.foo")]) == 2
    assert "ends in .png" in capsys.readouterr().err


def test_a_table_goes_into_a_pipe_or_through_a_link(tmp_path):
    """/dev/stdout is such a link: it is never replaced."""
    run, link, pipe = finished(tmp_path / "a"), tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "t.csv")
    assert E.main(["compare", run, "--csv", str(link)]) == 0
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert E.main(["compare", run, "--csv", str(pipe)]) == 0
    assert link.is_symlink() and pipe.is_fifo()
    assert os.read(reader, 10**6) == (tmp_path / "t.csv").read_bytes() != b""
    os.close(reader)


@pytest.mark.parametrize(
    "first,second,alike",
    [
        ((0, "start-0.pt"), (1, "start-1.pt"), True),
        (
            (5, "runs/source-only-gta5-cityscapes-5"),
            (4, "runs/source-only-gta5-cityscapes-4"),
            True,
        ),
        ((2, "seed2/step12.pt"), (3, "seed3/step12.pt"), True),  # 12 is no 2
        ((1, "mobilenet_v2.pth"), (2, "mobilenet_v2.pth"), True),  # a name that is all seeds'
        ((2, "deeplabv2-source-2/x.pt"), (3, "deeplabv2-source-3/x.pt"), True),
        ((1, "exp1/source-1/last.pt"), (2, "exp1/source-2/last.pt"), True),
        ((1, "runs/112.pt"), (3, "runs/332.pt"), False),  # two starts, whatever the seeds
        ((1, "step10.pt"), (3, "step30.pt"), False),
        ((0, "start-7.pt"), (1, "start-8.pt"), False),
    ],
)
def test_a_start_counts_without_the_seed_as_a_number(first, second, alike):
    for names in (("init",), ("init", "source_free")):
        found = {E.recipe({"seed": k, **dict.fromkeys(names, x)}) for k, x in (first, second)}
        assert (len(found) == 1) == alike


def test_a_checkpoint_named_from_its_own_folder_knows_its_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    settings = dataclasses.asdict(settings_for({"strategy": "random", "seed": 7}))
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings}))
    monkeypatch.chdir(tmp_path / "checkpoints")
    for path in ("last.pt", "../checkpoints/last.pt", tmp_path, ".."):
        assert E.run_settings(path)["seed"] == 7
        assert E.unfinished(path, "left out")
    assert capsys.readouterr().err.count("is not finished") == 4


def test_a_classification_network_is_not_scored(tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(InputError, match="fill the backbone only; give a trained run"):
        E.load_run(path, "cpu", network={"net": "deeplabv2", "backbone": "resnet18"})


def test_a_foreign_file_with_our_word_in_it_has_an_unknown_layout(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"network": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(InputError, match="unknown layout; it holds network"):
        E.load_run(path, "cpu")


def test_pixels_an_image_are_no_budget_of_regions(tmp_path):
    """--pixels is ripu-pa's default, but counts for single pixels alone."""
    result = json.loads(Path(finished(tmp_path / "run"), "result.json").read_text())
    for unit, expected in (("pixel", "40 px an image"), ("region", 0.022)):
        s = settings_for({"strategy": "ripu-pa", "unit": unit})
        row = E.comparison_row("run", result, dataclasses.asdict(s))
        assert row["budget asked for"] == expected


def test_how_often_a_run_is_scored_and_saved_is_no_part_of_its_recipe():
    plain = {"seed": 0, "eval_every": 0, "checkpoint_every": 500, "lr": 0.1}
    often = {"seed": 1, "eval_every": 50, "checkpoint_every": 10, "lr": 0.1}
    assert E.recipe(plain) == E.recipe(often) != E.recipe(plain | {"lr": 0.2})


def test_means_are_over_runs_that_differ_in_the_seed_alone(tmp_path):
    runs = [
        finished(tmp_path / name, miou=m) for name, m in (("a0", 0.4), ("a1", 0.6), ("other", 0.9))
    ]
    for run, changes in zip(runs, ({"seed": 0}, {"seed": 1}, {"seed": 2, "lr": 9.0}), strict=True):
        path = tmp_path / run / "config.json"
        s = json.loads(path.read_text())["settings"] | {
            "init": f"start-{changes['seed']}.pt",
            **changes,
        }
        path.write_text(json.dumps({"settings": s}))
    rows = E.comparison(runs)
    assert rows[0]["recipe"] == rows[1]["recipe"] != rows[2]["recipe"]
    for run in runs[:2]:  # one start for both: the number in its path is that of one of them
        path = Path(run) / "config.json"
        s = json.loads(path.read_text())["settings"] | {"init": "runs/start-0/last.pt"}
        path.write_text(json.dumps({"settings": s}))
    rows = E.comparison(runs)
    assert rows[0]["recipe"] == rows[1]["recipe"] != rows[2]["recipe"]
    text = E.comparison_text(rows)
    assert "mIoU19 50.00 +- 14.14, n = 2, seeds 0, 1" in text and "n = 3" not in text
    assert runs[0] in text and "18 classes" in text


def with_config(run, data, **changes):
    """Changes a finished run's settings, and gives it the sums of its `data`."""
    path = Path(run) / "config.json"
    s = json.loads(path.read_text())["settings"] | changes
    sums = {part: {"sha256_without_photographs": 16 * letter} for part, letter in data.items()}
    path.write_text(json.dumps({"settings": s, "data": sums}))


def test_seeds_of_other_data_are_no_seeds_of_one_recipe(tmp_path, capsys):
    runs = [finished(tmp_path / name, miou=m) for name, m in (("a", 0.4), ("b", 0.6))]
    for seed, (run, target) in enumerate(zip(runs, "xy", strict=True)):
        with_config(run, {"target": target, "validation": "v"}, seed=seed)
    assert E.main(["compare", *runs]) == 0 and "n = 2" not in capsys.readouterr().out
    with_config(runs[1], {"target": "x", "validation": "v"})
    assert E.main(["compare", *runs]) == 0 and "n = 2" in capsys.readouterr().out
    with_config(runs[1], {"target": "x", "validation": "w"})
    assert E.main(["compare", *runs]) == 2
    assert "cityscapes (vvvvvvvv), 4 images" in capsys.readouterr().err
    (tmp_path / "b/config.json").write_text(
        json.dumps({**json.loads((tmp_path / "a/config.json").read_text()), "data": {"target": 3}})
    )
    assert E.main(["compare", *runs]) == 2
    assert "data.target missing or of another kind" in capsys.readouterr().err


def test_a_seed_that_ran_twice_counts_once(tmp_path, capsys, figures):
    scores = (0.3, 0.5, 0.6)
    runs = [finished(tmp_path / f"{n}", miou=m) for n, m in enumerate(scores)]
    with_config(runs[2], {}, seed=1)
    assert E.main(["compare", *runs, "--plot", str(tmp_path / "x.png")]) == 0
    assert "mIoU19 50.00 +- 14.14, n = 2, seeds 0, 1" in capsys.readouterr().out
    line = figures[-1][1].lines[0]
    assert line.get_ydata() == pytest.approx([50]) and "n = 2" in line.get_label()


def test_lines_do_not_join_what_was_tested_otherwise(tmp_path, figures):
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b", images=5)]
    with_config(runs[1], {}, tgt="acdc")
    assert E.main(["compare", *runs, "--mixed", "--plot", str(tmp_path / "x.png")]) == 0
    axes = figures[-1][1]
    labels = [axes.lines[0].get_label(), axes.lines[2].get_label()]
    assert ["cityscapes, 4" in labels[0], "acdc, 5" in labels[1]] == [True, True]
    assert axes.get_title() == "gta5; deeplabv2 resnet18; ripu (64x32)"


def test_a_curve_over_steps_has_all_seeds_at_each_point(tmp_path, figures):
    runs = [finished(tmp_path / f"s{seed}", miou=m) for seed, m in enumerate((0.4, 0.6))]
    for seed, (run, steps) in enumerate(zip(runs, ((2, 4, 6), (4,)), strict=True)):
        with_config(run, {}, seed=seed)
        lines = [{"step": step, "mIoU19": step / 10} for step in steps]
        (Path(run) / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    words = ["compare", *runs, "--over", "steps", "--plot", str(tmp_path / "x.png")]
    assert E.main(words) == 0
    line = figures[-1][1].lines[0]
    assert list(line.get_xdata()) == [4, 9] and line.get_ydata() == pytest.approx([40, 50])


def test_compare_refuses_to_mix(tmp_path, capsys):
    runs = [
        finished(tmp_path / "a"),
        finished(tmp_path / "b", protocol="sliding (full resolution)"),
    ]
    assert E.main(["compare", *runs]) == 2
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "different values of 'protocol'" in err
        and "sliding (full" in err
        and "--mixed" in err
    )
    assert E.main(["compare", *runs, "--mixed"]) == 0
    assert "sliding (full resolution)" in capsys.readouterr().out
    runs = [runs[0], finished(tmp_path / "c", images=5)]
    assert E.main(["compare", *runs]) == 2 and "cityscapes, 5 images" in capsys.readouterr().err
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((tmp_path / "a/config.json").read_bytes())
    assert E.main(["compare", runs[0], str(begun), "--csv", str(tmp_path / "t.csv")]) == 0
    assert (
        capsys.readouterr().err
        == f"note: {begun} is not finished (no result.json): it is left out\n"
    )
    assert (tmp_path / "t.csv").read_text().count("\n") == 2
    assert E.main(["compare", str(begun)]) == 2 and "no result.json" in capsys.readouterr().err
    (tmp_path / "a/config.json").unlink()
    assert E.main(["compare", runs[0]]) == 2 and "no config.json" in capsys.readouterr().err
    assert E.main(["compare", str(tmp_path)]) == 2 and "no result.json" in capsys.readouterr().err


def test_a_run_that_is_named_twice_counts_once(tmp_path, capsys):
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b")]
    (tmp_path / "latest").symlink_to(tmp_path / "a")
    table = tmp_path / "t.csv"
    words = [*runs, str(tmp_path / "latest"), runs[1] + "/"]
    assert E.main(["compare", *words, "--csv", str(table)]) == 0
    assert "note: 2 runs are named twice" in capsys.readouterr().err
    assert table.read_text().count("\n") == 3


def test_lines_of_a_log_that_are_cut_or_no_scores_are_passed_over(tmp_path):
    good = json.dumps({"step": 4, "mIoU19": 0.3})
    (tmp_path / "metrics.jsonl").write_text(f'[]\n3\n{good}\n{{"step": 5}}\n{{"step": 6, "mI')
    points = E.scores_over_steps(tmp_path, {"steps": 9, "mIoU19": 0.5})
    assert points == [(4, 0.3), (9, 0.5)]


def test_a_file_elsewhere_belongs_to_no_run(tmp_path):
    """Two folders above it another project may have a config.json."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for folder in ("weights", "checkpoints"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "last.pt").write_bytes(b"")
    assert E.run_settings(tmp_path / "weights/last.pt") == {}
    with pytest.raises(InputError, match="has no 'settings'"):
        E.run_settings(tmp_path / "checkpoints/last.pt")
