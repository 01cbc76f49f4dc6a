"""Every strategy end to end at toy size; interrupted and resumed equals uninterrupted; budgets; the command line."""

import dataclasses
import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from alda import InputError, acquisition, annotation, evaluation, loop, settings
from alda import run as alda_run
from alda.annotation import Rounds
from alda.datasets import open_dataset
from alda.rounds import budget_pixels, pseudo_schedule, query_schedule, regions_due, report_pseudo

GOLDEN = Path(__file__).parent / "golden"
SMALL = {
    "net": "deeplabv2",
    "backbone": "resnet18",
    "init": "none",
    "steps": 8,
    "batch": 2,
    "lr": 0.01,
    "source_size": "64x32",
    "target_size": "64x32",
    "rounds": 2,
    "query_steps": "2,5",
    "workers": 0,
    "log_every": 2,
    "checkpoint_every": 3,
    "device": "cpu",
    "pictures": 1,
    "precision": "float32",
}


def arguments(world, out, **changes):
    given = {"root": str(world), "out": str(out), **SMALL, **changes}
    if given["strategy"] in ("source-only", "full", "stal", *settings.SELF_TRAINING):
        given.pop("query_steps")
    if given["strategy"] in ("source-only", "full"):
        given.pop("rounds")
    if given["strategy"] == "stal":
        given = {
            "head": "ripu",
            "crop": "48x24",
            "budget": 0.5,
            "ohem_pixels": 300,
            "bank": 40,
            "protocol": "ripu",
            **given,
        }
    if given["strategy"] in settings.SELF_TRAINING:
        given = {
            "crop": "48x24",
            "test_size": "64x32",
            "source_steps": 2,
            "source_portion": 0.3,
            **given,
        }
    words = []
    for name, value in given.items():
        name = "--" + name.replace("_", "-")
        words += (
            [name]
            if value is True
            else ["--no-" + name[2:]]
            if value is False
            else [name, str(value)]
        )
    return words


def state_of(out):
    return torch.load(out / "checkpoints/last.pt", weights_only=True)


def assert_same_bits(a, b, where="state"):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where}: max gap {(a.double() - b.double()).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def round_files(out):
    return {
        str(p.relative_to(out)): p.read_bytes()
        for part in ("rounds", "pseudo")
        for p in sorted((out / part).rglob("*.*"))
    }


def metric_lines(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("steps_per_s", "memory_GB", "wall_s")}
        for line in lines
    ]


# what a kill can be timed by: an optimizer step, an image scored for a query, a picture or map written
SEAMS = {
    "step": (torch.optim.SGD, "step"),
    "scored": (acquisition, "select_regions"),
    "written": (Image.Image, "save"),
}


@pytest.fixture
def interrupt(monkeypatch):
    """Makes a call of one of SEAMS raise KeyboardInterrupt after so many calls, as a kill would end it."""

    def after(name, calls):
        where, attribute = SEAMS[name]
        original, seen = getattr(where, attribute), [0]

        def counted(*args, **kwargs):
            seen[0] += 1
            if seen[0] > calls:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(where, attribute, counted)

    yield after
    monkeypatch.undo()


# V3+ has dropout: random states count
@pytest.mark.parametrize(
    "strategy",
    [
        "source-only",
        "full",
        *settings.QUERIES,
        "cbda dynamic",
        "cbda balance",
        "ripu deeplabv3plus",
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    strategy, tiny_world, tmp_path, interrupt, monkeypatch
):
    strategy, variant = (*strategy.split(), "")[:2]
    options = {"strategy": strategy, "budget": 0.022}
    if variant:
        options["cbda" if strategy == "cbda" else "net"] = variant
    if strategy == "ripu-pa":  # 40 pixels an image instead
        options = {"strategy": strategy, "radius": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert loop.main(arguments(tiny_world, whole, **options)) == 0
    interrupt("step", 4)  # between two checkpoints, after round 1
    with pytest.raises(KeyboardInterrupt):
        loop.main(arguments(tiny_world, parts, **options))
    monkeypatch.undo()
    if strategy not in ("source-only", "full"):
        interrupt("scored", 2)  # in the middle of round 2
        with pytest.raises(KeyboardInterrupt):
            loop.main(arguments(tiny_world, parts, resume=True, **options))
        monkeypatch.undo()
    assert loop.main(arguments(tiny_world, parts, resume=True, **options)) == 0
    assert_same_bits(state_of(whole), state_of(parts))
    assert round_files(whole) == round_files(parts)
    assert metric_lines(whole) == metric_lines(parts)
    results = [json.loads((out / "result.json").read_text()) for out in (whole, parts)]
    assert results[0] | {"wall_s": 0} == results[1] | {"wall_s": 0}
    check_result(whole, strategy, results[0], tiny_world)


@pytest.mark.parametrize("strategy", ["ripu", "cbst", "stal"])
def test_what_rounds_say_does_not_depend_on_lost_checkpoints(strategy, tiny_world, tmp_path):
    """All checkpoints are gone, the rounds stand: trained anew from the first step, the result tells
    the score before the first round and what each loop had asked, as the first time."""
    out, options = tmp_path / "out", {"strategy": strategy, "budget": 0.5, "rounds": 2, "steps": 6}
    words = arguments(tiny_world, out, **options)
    assert loop.main(words) == 0
    first = json.loads((out / "result.json").read_text())
    shutil.rmtree(out / "checkpoints")
    (out / "result.json").unlink()
    assert loop.main([*words, "--resume"]) == 0
    again = json.loads((out / "result.json").read_text())
    assert "mIoU19" in first["before"] and again | {"wall_s": 0} == first | {"wall_s": 0}


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(tiny_world, tmp_path):
    options = {"strategy": "source-only", "steps": 2, "checkpoint_every": 1}
    words = arguments(tiny_world, tmp_path, **options)
    assert loop.main(words) == 0
    (tmp_path / "checkpoints/last.pt").write_bytes(b"broken")
    (tmp_path / "result.json").unlink()
    assert loop.main([*words, "--resume"]) == 0
    for name, step in (("previous", 1), ("last", 2)):
        state = torch.load(tmp_path / f"checkpoints/{name}.pt", weights_only=True)
        assert state["step"] == step


def test_a_cache_that_holds_a_part_says_so(tiny_world, tmp_path, capsys):
    options = {"strategy": "full", "steps": 2, "cache": tmp_path / "cache"}
    assert loop.main(arguments(tiny_world, tmp_path / "whole", **options)) == 0
    assert "--cache-gb" not in capsys.readouterr().out
    options["cache_gb"] = 3 * (3 * 64 * 32 + 1) / 1e9  # three images of each
    assert loop.main(arguments(tiny_world, tmp_path / "part", **options)) == 0
    said = capsys.readouterr().out
    assert "holds 3 of 8 gta5 images" in said and "holds 3 of 6 cityscapes images" in said
    assert_same_bits(*(state_of(tmp_path / name)["model"] for name in ("whole", "part")))


def run_with_stops(stops, interrupt, monkeypatch, world, out, options):
    """A run that is killed at each of `stops` (see interrupt), resumed each time, and at last finished."""
    resume = {}
    for name, calls in stops:
        interrupt(name, calls)
        with pytest.raises(KeyboardInterrupt):
            loop.main(arguments(world, out, **options, **resume))
        monkeypatch.undo()
        resume = {"resume": True}
    assert loop.main(arguments(world, out, **options, **resume)) == 0


@pytest.mark.parametrize(
    "strategy", ["st", "cbst", "cbst-sp", "ripu st", "cbda cbst", "random cbst-sp"]
)
def test_pseudo_labels_interrupted_and_resumed(
    strategy, tiny_world, tmp_path, interrupt, monkeypatch
):
    strategy, pseudo = (*strategy.split(), "")[:2]
    options = {
        "strategy": strategy,
        **({"pseudo": pseudo, "pseudo_steps": "3,6"} if pseudo else {}),
    }
    # the network of 2 steps saturates: the paper's strict rule labels nothing
    options["rules"] = "code"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert loop.main(arguments(tiny_world, whole, **options)) == 0
    # in the middle of the source training (where there is one), of the second pass over the target, and of training
    stops = (("step", 1), ("written", 9), ("step", 3))
    run_with_stops(stops, interrupt, monkeypatch, tiny_world, parts, options)
    assert_same_bits(state_of(whole)["model"], state_of(parts)["model"])
    assert round_files(whole) == round_files(parts) and metric_lines(whole) == metric_lines(parts)
    result, again = (
        json.loads((out / "result.json").read_text()) | {"wall_s": 0} for out in (whole, parts)
    )
    assert result == again and (result["budget"]["asked"] > 0) == bool(pseudo)
    check_pseudo_labels(whole, result, tiny_world)


def check_pseudo_labels(out, result, world):
    """Every target image was pseudo-labelled in both rounds, never where it was bought, and the record counts it right."""
    target, rounds, pseudo = (
        open_dataset("cityscapes", world, "train"),
        Rounds(out / "rounds"),
        Rounds(out / "pseudo"),
    )
    assert pseudo.complete() == 2 and [r["portion"] for r in result["pseudo_rounds"]] == [0.2, 0.25]
    record, asked_before = (
        pseudo.record(2),
        sum(step <= 6 for step in (2, 5)) if rounds.complete() else 0,
    )
    labelled = correct = 0
    for index, sample in enumerate(target.samples):
        labels, truth = annotation.pseudo_labels(target, pseudo, 2, index), target.labels(index)
        labelled += int((labels != 255).sum())
        correct += int(((labels == truth) & (labels != 255)).sum())
        assert not (
            (labels != 255) & (rounds.labels(sample.id, sample.size, asked_before) != 255)
        ).any()
    assert record["labelled"] == labelled > 0 and 0 < record["accuracy"] <= 1
    # pixels whose truth is unknown are not judged
    assert record["accuracy"] >= correct / labelled - 1e-9
    validation = {s.id for s in open_dataset("cityscapes", world, "val").samples}
    files = {p.stem for p in (out / "pseudo").rglob("labels/*.png")}
    assert files == {s.id for s in target.samples} and not files & validation
    assert list((out / "pictures/pseudo-02").glob("*.png"))


STAL_OFF = {
    "copy_paste": False,
    "cutmix": False,
    "class_keep": False,
    "auxiliary": 0,
    "contrast": 0,
    "ohem_threshold": 1,
}
STAL_SWITCHES = {
    "default": {},
    "restart, code": {"restart": True, "rules": "code", "net": "deeplabv3plus", "head": "stal"},
    "random": {"image_queries": "random", **STAL_OFF},
    "supervised": {"unlabelled": 0, **STAL_OFF},
}


@pytest.mark.parametrize("switches", STAL_SWITCHES)
def test_stal_interrupted_and_resumed(switches, tiny_world, tmp_path, interrupt, monkeypatch):
    options = {"strategy": "stal", **STAL_SWITCHES[switches]}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert loop.main(arguments(tiny_world, whole, **options)) == 0
    # between two checkpoints of the first loop, in the second query, between two checkpoints of the second loop
    stops = (("step", 3), ("written", 1), ("step", 3))
    run_with_stops(stops, interrupt, monkeypatch, tiny_world, parts, options)
    assert_same_bits(state_of(whole), state_of(parts))
    assert round_files(whole) == round_files(parts) and metric_lines(whole) == metric_lines(parts)
    result, again = (
        json.loads((out / "result.json").read_text()) | {"wall_s": 0} for out in (whole, parts)
    )
    assert result == again
    check_loops(whole, result, switches, tiny_world)


def check_loops(out, result, switches, world):
    """Whole images, none twice, spread over the groups; losses and health of the log; teacher and student both scored."""
    target, rounds = open_dataset("cityscapes", world, "train"), Rounds(out / "rounds")
    first, second = (set(rounds.record(n)["images"]) for n in (1, 2))
    assert len(first) == 2 and len(second) == 1 and not first & second
    assert len({s.group for s in target.samples if s.id in first}) == 2
    for sample in target.samples:
        assert rounds.asked(sample.id, sample.size).all() == (sample.id in first | second)
    assert result["budget"]["asked"] == sum(
        math.prod(s.size) for s in target.samples if s.id in first | second
    )
    assert result["budget"]["images"] == 3 and [x["asked_images"] for x in result["loops"]] == [
        2,
        3,
    ]
    assert result["loops"][1]["mIoU19"] == result["mIoU19"] and result["student"]["images"] == 3
    state = state_of(out)
    assert not torch.equal(
        state["teacher"]["backbone.conv1.weight"], state["model"]["backbone.conv1.weight"]
    )
    # the teacher, as reported
    assert evaluation.main(["score", str(out), "--json", str(out / "again.json")]) == 0
    assert json.loads((out / "again.json").read_text())["IoU"] == result["IoU"]
    losses = metric_lines(out)[-2]["losses"]
    expected = {"supervised", "unlabelled", "contrastive", "kept", "accuracy"}
    expected -= {"contrastive"} if switches in ("random", "supervised") else set()
    expected -= {"unlabelled", "kept", "accuracy"} if switches == "supervised" else set()
    assert set(losses) == expected and len(metric_lines(out)[0]["confidence"]) == 19
    assert ("bank" in metric_lines(out)[0]) == ("contrastive" in expected)


def test_the_story_of_stal_is_of_an_image_that_was_asked(tiny_world, tmp_path, monkeypatch):
    def last(sizes, count):  # of the six cities with an image each
        return {group: int(i >= len(sizes) - count) for i, group in enumerate(sizes)}

    told = []
    monkeypatch.setattr(acquisition, "split_by_group", last)
    monkeypatch.setattr(loop, "save_story", lambda image, masks, *_: told.append(masks[0].all()))
    options = {"contrast": 0, "unlabelled": 0, "copy_paste": False}
    assert loop.main(arguments(tiny_world, tmp_path, strategy="stal", steps=2, **options)) == 0
    assert told == [True]


def test_images_due_are_the_published_ones():
    s = settings.settings_for({"strategy": "stal"})
    # the paper: 30, 65, 150 in all; 5 % of 2,975 is 148.75
    assert loop.images_due(s, 2975) == [30, 35, 84]
    with pytest.raises(InputError, match="every loop needs one"):
        loop.images_due(s, 20)


def test_pseudo_labels_are_a_loss_of_their_own():
    """A label map with 100 + c: those pixels are in the loss `pseudo` and nowhere else."""
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 19, (2, 8, 8), dtype=torch.uint8)
    labels[0, :4], labels[1, :2] = labels[0, :4] + 100, 255
    s = settings.settings_for({"strategy": "ripu", "pseudo": "cbst"})
    logits = torch.randn(2, 19, 8, 8)
    losses = loop.losses_of_queries(s, None, None, [images, labels], logits)
    bought, guessed = labels.clone(), torch.full_like(labels, 255)
    bought[0, :4], guessed[0, :4] = 255, labels[0, :4] - 100
    for name, expected in (("target", bought), ("pseudo", guessed)):
        torch.testing.assert_close(
            losses[name],
            torch.nn.functional.cross_entropy(logits, expected.long(), ignore_index=255),
        )
    s = settings.settings_for({"strategy": "ripu"})
    off = loop.losses_of_queries(s, None, None, [images, bought], logits)
    assert off["pseudo"] == 0.0 and off["source"] == 0.0


def test_schedules_of_rounds():
    s = settings.settings_for({"strategy": "cbst"})
    # 2 epochs of 2 images a step
    assert s.epochs == 2 and loop.round_starts(s, [3724, 3786]) == [0, 3724, 7510]
    assert loop.round_starts(
        settings.settings_for({"strategy": "cbst", "steps": 10}), [5, 5, 5]
    ) == [0, 3, 6, 10]
    s = settings.settings_for({"strategy": "ripu", "pseudo": "cbst"})
    assert pseudo_schedule(s, query_schedule(s)) == [18000, 23500, 29000, 34500]


def check_result(out, strategy, result, world):
    """Budget, rounds, pictures and report of a finished run."""
    assert (
        0 <= result["mIoU19"] <= 1
        and "64x32" in result["protocol"]
        and result["strategy"] == strategy
    )
    if strategy in ("source-only", "full"):
        assert result["budget"]["asked"] == 0 and not list(out.glob("rounds/*"))
        assert result["budget"]["share"] == (strategy == "full")
        return
    dynamic = strategy == "cbda" and result["cbda"] != "balance"
    target, rounds = open_dataset("cityscapes", world, "train"), Rounds(out / "rounds")
    for sample in target.samples:
        first, both = (rounds.asked(sample.id, sample.size, upto) for upto in (1, 2))
        assert strategy == "cbda" or 0 < first.sum() < both.sum()
        masks = [rounds.asked(sample.id, sample.size, 1), both & ~first]
        images = [rounds.record(n)["images"].get(sample.id, {"asked": 0})["asked"] for n in (1, 2)]
        assert [
            int(m.sum()) for m in masks
        ] == images  # no pixel is asked twice: the rounds' counts add up
        limit = 40 if strategy == "ripu-pa" else 0.022 * math.prod(sample.size)
        assert dynamic or both.sum() <= limit
    total = sum(rounds.record(n)["asked"] for n in (1, 2))
    assert result["budget"]["asked"] == total and result["budget"]["images"] <= len(target)
    assert strategy == "ripu-pa" or total <= 0.022 * sum(
        math.prod(sample.size) for sample in target.samples
    )
    if strategy == "cbda":
        second = rounds.record(2)
        assert ("threshold" in second) == dynamic and ("class_weights" in second) == (
            result["cbda"] != "dynamic"
        )
        if result["cbda"] != "dynamic":
            budget, classes = second["budget_px"], rounds.record(1)["classes"]
            expected = {name: max(0, 1 - n * 19 / budget) for name, n in classes.items()}
            assert second["class_weights"] == pytest.approx(expected)
    panels = np.array(Image.open(next((out / "pictures/round-02").glob("*_000019.png"))))
    assert panels.shape[1] > 6 * 128


def test_the_seed_decides_and_the_workers_do_not(tiny_world, tmp_path):
    options = {"strategy": "random", "steps": 4, "query_steps": "1", "rounds": 1}
    for name, changes in (("a", {}), ("b", {"workers": 2}), ("c", {"seed": 1})):
        assert loop.main(arguments(tiny_world, tmp_path / name, **options, **changes)) == 0
    a, b, c = (state_of(tmp_path / name)["model"] for name in "abc")
    assert_same_bits(a, b)
    files = [round_files(tmp_path / name) for name in "ab"]
    assert files[0] == files[1] and files[0]  # written by threads in any order
    assert not torch.equal(a["backbone.conv1.weight"], c["backbone.conv1.weight"])


def test_pixel_queries_of_cbda_with_every_switch_turned(tiny_world, tmp_path):
    """--rules code, --keep-labels, bfloat16, validation along the way, pixel picks at 20 %, SYNTHIA as the source."""
    switches = {
        "rules": "code",
        "keep_labels": True,
        "precision": "bfloat16",
        "eval_every": 4,
        "src": "synthia",
    }
    options = {
        "strategy": "cbda",
        "unit": "pixel",
        "radius": 1,
        "budget": 0.2,
        "source_sampling": "uniform",
        **switches,
    }
    assert loop.main(arguments(tiny_world, tmp_path, **options)) == 0
    result = json.loads((tmp_path / "result.json").read_text())["budget"]
    pixels = sum(math.prod(s.size) for s in open_dataset("cityscapes", tiny_world, "train").samples)
    assert result["asked"] == result["regions"] <= 0.2 * pixels  # a pick is one pixel
    assert result["asked"] > 0.1 * pixels
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines if "mIoU19" in line] == [4, 8]
    row = next(iter(Rounds(tmp_path / "rounds").record(1)["images"].values()))
    assert 0 < row["share"] <= 1 and row["trained"] > 0
    histogram = np.array(Image.open(tmp_path / "pictures/round-01/classes.png").convert("RGB"))
    assert (histogram != 255).any()


def test_source_free_sees_no_source_image(tiny_world, tmp_path, capsys):
    assert loop.main(arguments(tiny_world, tmp_path / "pre", strategy="source-only", steps=2)) == 0
    before = state_of(tmp_path / "pre")["model"]
    checkpoint = tmp_path / "pre/checkpoints/last.pt"
    cityscapes_only = tmp_path / "target"
    cityscapes_only.mkdir()
    (cityscapes_only / "cityscapes").symlink_to(tiny_world / "cityscapes")
    options = {
        "strategy": "ripu",
        "source_free": checkpoint,
        "init": checkpoint,
        "query_steps": "0,3",
    }
    assert loop.main(arguments(cityscapes_only, tmp_path / "out", **options)) == 0
    # the first query comes before the first step
    assert "round 1/2" in capsys.readouterr().out.split("ripu:")[1].split("step 2/")[0]
    losses = metric_lines(tmp_path / "out")[0]["losses"]
    assert set(losses) == {"target", "negative"}
    after = state_of(tmp_path / "out")["model"]
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])


def test_a_classification_network_is_no_source_trained_one(tiny_world, tmp_path, capsys):
    """Its classifier would be random: CBST trains on the source first, --source-free refuses."""
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    out = tmp_path / "cbst"
    options = {"strategy": "cbst", "backbone": "resnet18", "init": weights}
    assert loop.main(arguments(tiny_world, out, **options)) == 0
    assert (out / "source/result.json").is_file()
    assert "--source-steps" not in capsys.readouterr().err  # as "no effect"
    whole = tmp_path / "whole.pt"
    torch.save({"model": {"classifier.0.weight": torch.zeros(1)}}, whole)
    given = {"strategy": "cbst", "source_steps": 2, "init": str(whole)}
    idle = settings.without_effect(given, settings.settings_for(given))
    assert idle == ["--source-steps"]
    for start in (weights, "none"):
        options = {"strategy": "ripu", "source_free": start, "init": start, "query_steps": "0,3"}
        options |= {"backbone": "resnet18", "batch_norm": "live"}
        assert loop.main(arguments(tiny_world, tmp_path / "free", **options)) == 2
        assert f"--source-free {start}: fills the backbone only" in capsys.readouterr().err
    assert not (tmp_path / "free").exists()


@pytest.mark.parametrize(
    ("words", "images"),
    [
        ("stal --batch 1", 1),
        ("stal --batch 2", 2),
        ("ripu --batch 1", 2),  # source and target in one pass
        ("ripu --batch 1 --target-size 32x32", 1),
        ("ripu --batch 1 --target-size 32x32 --crop 32x16", 2),
        ("ripu --batch 4 --accumulate 4 --source-free x.pt", 1),
        ("full --batch 4 --accumulate 4", 2),
        ("source-only --batch 4 --accumulate 4", 1),
        ("cbst --batch 4 --accumulate 4", 1),
        ("cbst --batch 4 --accumulate 2", 2),
        ("stal --batch 1 --net deeplabv2", 2),
        ("stal --batch 1 --batch-norm frozen", 2),
    ],
)
def test_a_single_image_under_live_batch_norm_is_refused(words, images):
    """Before anything is asked: afterwards the batch can no longer be changed."""
    strategy, *words = words.split()
    given = dict(zip((w[2:].replace("-", "_") for w in words[::2]), words[1::2], strict=True))
    given |= {k: int(v) for k, v in given.items() if k in ("batch", "accumulate")}
    sizes = {"source_size": "64x32", "target_size": "64x32", "net": "deeplabv3plus"}
    s = settings.settings_for({"strategy": strategy, "root": "toy", **sizes, **given})
    network = {"net": s.net, "batch_norm": "live" if s.batch_norm == "auto" else s.batch_norm}
    with pytest.raises(InputError, match="one image a pass") if images == 1 else nullcontext():
        alda_run.check_images_a_pass(s, network, torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "processes", "right"), [("cpu", 4, False), ("cuda", 4, True), ("cuda", 1, True)]
)
def test_batch_norm_of_gpus_sees_the_images_of_all_processes(device, processes, right, monkeypatch):
    monkeypatch.setattr(alda_run, "rank_and_world", lambda: (0, processes))
    s = settings.settings_for({"strategy": "stal"})  # 4 images a step
    network = {"net": "deeplabv3plus", "batch_norm": "live"}
    with nullcontext() if right else pytest.raises(InputError, match="one image a pass"):
        alda_run.check_images_a_pass(s, network, torch.device(device))


@pytest.mark.parametrize(
    ("strategy", "option"), [("cbst", "(--rounds)"), ("ripu", "(--pseudo-steps)")]
)
def test_worse_pseudo_labels_name_the_option_that_ends_them(strategy, option, capsys):
    """--rounds are the queries' where labels are bought beside pseudo-labels."""
    s = settings.settings_for({"strategy": strategy})
    target = SimpleNamespace(pixels=6)
    record = {"portion": 0.2, "labelled": 5, "accuracy": 0.5, "classes": {}}
    report_pseudo(s, target, 2, record, 0.9, 1.0)
    assert f"end with an earlier round {option}" in capsys.readouterr().out


def test_nobody_is_asked_by_a_run_that_cannot_train(tiny_world, tmp_path, capsys):
    options = {"strategy": "stal", "net": "deeplabv3plus", "batch": 1, "crop": "64x32"}
    assert loop.main(arguments(tiny_world, tmp_path / "out", **options)) == 2
    assert "needs 2: give --batch 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_image_of_one_pixel_in_the_network_ends_in_a_line(tiny_world, tmp_path, capsys):
    options = {"strategy": "source-only", "net": "deeplabv2", "batch_norm": "live", "batch": 1}
    sizes = {"source_size": "8x8", "target_size": "8x8"}
    assert loop.main(arguments(tiny_world, tmp_path / "out", **options, **sizes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: live batch norm is left one value") and error.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_with_all_of_them(tiny_world, tmp_path, capsys):
    assert (
        loop.main(arguments(tiny_world, tmp_path, strategy="ripu", lr=1e9, query_steps="6,7")) == 2
    )
    err = capsys.readouterr().err
    assert (
        "a loss is not finite: {'source':" in err and "'negative':" in err and err.count("\n") == 1
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_file_is_one_line_from_any_process(workers, tiny_world, tmp_path, capsys):
    shutil.copytree(tiny_world / "gta5", tmp_path / "gta5")
    (tmp_path / "cityscapes").symlink_to(tiny_world / "cityscapes")
    for path in (tmp_path / "gta5/images").glob("*.png"):
        path.write_bytes(path.read_bytes()[:2000])
    assert (
        loop.main(arguments(tmp_path, tmp_path / "out", strategy="source-only", workers=workers))
        == 2
    )
    err = capsys.readouterr().err
    assert (
        err.startswith(f"error: {tmp_path}/gta5/images/")
        and err.count("\n") == 1
        and "cannot be read as an image" in err
    )


def test_rounds_that_stand_are_never_asked_again(tiny_world, tmp_path, interrupt, monkeypatch):
    interrupt("step", 6)  # after round 2 (before step 5), before the checkpoint at step 6
    with pytest.raises(KeyboardInterrupt):
        loop.main(arguments(tiny_world, tmp_path, strategy="ripu", checkpoint_every=100))
    monkeypatch.undo()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "rounds").rglob("*")}
    assert len(list((tmp_path / "rounds").glob("0?"))) == 2
    (tmp_path / "checkpoints/last.pt").unlink()  # as if killed before the first checkpoint
    assert (
        loop.main(
            arguments(tiny_world, tmp_path, strategy="ripu", checkpoint_every=100, resume=True)
        )
        == 0
    )
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "rounds").rglob("*")} == times


# ----------------------------------------------------------------------------------------------- pure functions, settings


def test_poly_equals_the_recorded_official_rates():
    golden = np.load(GOLDEN / "ripu_poly_lr.npz")
    base, steps = float(golden["base_lr"]), int(golden["max_iter"])
    for step, rate in zip(golden["iters"].tolist(), golden["lr"].tolist(), strict=True):
        assert base * loop.poly(step, steps) == pytest.approx(rate, rel=1e-12)


def test_schedules_are_the_published_ones():
    assert query_schedule(settings.settings_for({"strategy": "ripu"})) == [
        10000,
        12000,
        14000,
        16000,
        18000,
    ]
    free = settings.settings_for({"strategy": "ripu", "source_free": "x.pt"})
    assert (
        query_schedule(free) == [0, 2000, 4000, 6000, 8000]
        and free.steps == 30000
        and free.init == "x.pt"
    )
    code = {"source_free": "x.pt", "rules": "code"}
    assert settings.settings_for({"strategy": "ripu", **code}).radius == 9
    assert settings.settings_for({"strategy": "ripu-pa", **code}).radius == 32
    assert settings.settings_for({"strategy": "ripu-pa"}).radius == 32
    assert settings.settings_for({"strategy": "ripu-pa"}).pixels == 40
    # what is given wins
    assert settings.settings_for({"strategy": "ripu-pa", "budget": 0.1}).pixels == 0


def test_regions_due_follow_the_paper_and_never_pass_the_budget():
    s = settings.settings_for({"strategy": "ripu"})
    budget, spent, counts = budget_pixels(s, [(1024, 2048)]), 0, []
    for _ in range(6):
        counts.append(regions_due(budget, s, spent))
        spent += counts[-1] * 9
    assert counts == [1026, 1026, 1026, 1026, 1022, 0] and spent <= budget == 46137
    s = settings.settings_for({"strategy": "ripu-pa"})
    assert budget_pixels(s, [(1024, 2048)] * 3) == 120
    assert [regions_due(40, s, n) for n in (0, 8, 32, 36, 40)] == [8, 8, 8, 4, 0]
    whole = settings.settings_for({"strategy": "ripu", "budget": 1.0, "rounds": 1})
    assert regions_due(900, whole, 0) == 100  # more than can be placed: the selection returns fewer
    with pytest.raises(InputError, match="less than one region"):
        regions_due(2, whole, 0)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"budget": 2.0}, "--budget is a share"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"radius": -1}, "--radius must be at least 0"),
        ({"threads": -2}, "--threads must be at least 0"),
        ({"threads": 99999999999}, "--threads must be at most 4,096"),
        ({"cache_gb": "inf"}, "--cache-gb must be at most 1,000,000"),
        ({"lr": "nan"}, "--lr must be above 0"),
        ({"poly_steps": 4}, "shorter than --steps"),
        ({"budget": 1e-6}, "less than one region"),
        ({"source_free": "x.pt", "init": "none"}, "leave --init out"),
        ({"steps": 3, "query_steps": ""}, "too short for --rounds"),
        ({"strategy": "cbst", "steps": 1}, "too short for --rounds"),
        ({"strategy": "cbst", "crop": ""}, "--scale needs --crop"),
        (
            {"strategy": "cbst", "crop": "", "scale": "1,1", "source_size": "32x32"},
            "give --crop, or equal",
        ),
        ({"strategy": "cbst", "portion": 1.5}, "--portion is a share"),
        ({"strategy": "stal", "ohem_threshold": math.nan}, "--ohem-threshold"),
        ({"strategy": "cbst", "scale": "0"}, "--scale is LOW,HIGH"),
        ({"strategy": "full", "pseudo": "cbst"}, "--pseudo goes with"),
        (
            {
                "strategy": "stal",
                "net": "deeplabv3plus",
                "crop": "",
                "scale": "1,1",
                "source_size": "32x32",
                "copy_paste": False,
            },
            "give --crop, or equal",
        ),
        ({"strategy": "stal", "crop": "", "scale": "1,1"}, "or give --no-copy-paste"),
        ({"teacher": True, "batch": 1}, "give --batch 2, or --no-cutmix"),
        ({"teacher": True, "crop": "64x32", "scale": "0.5,1"}, "at the lowest --scale 0.5 (32x16)"),
        ({"strategy": "stal", "source_free": "x.pt", "init": "x.pt"}, "--source-free goes with"),
        ({"source_free": "x.pt", "init": "x.pt", "pseudo": "cbst-sp"}, "take --pseudo cbst"),
        ({"strategy": "cbst", "epochs": 2}, "two ways to say how long"),
        ({"source_size": ""}, "needs --crop"),
        ({"test_size": "big"}, "WIDTHxHEIGHT"),
        ({"strategy": "cbst", "target_size": ""}, "WIDTHxHEIGHT"),
        ({"pseudo": "cbst", "pseudo_steps": "7,3"}, "--pseudo-steps needs"),
        ({"query_steps": "5,2"}, "growing steps"),
        ({"query_steps": "a,b"}, "growing steps below --steps"),
        ({"target_size": "64"}, "WIDTHxHEIGHT"),
        ({"strategy": "source-only", "source_free": "x.pt", "init": "x.pt"}, "nothing to train on"),
        ({"init": "nowhere.pt"}, "nowhere.pt"),
        ({"batch_norm": "frozen"}, "frozen"),
        ({"strategy": "cbst", "batch_norm": "frozen"}, "frozen"),
        ({"root": "/nowhere"}, "no gta5 images"),
        ({"device": "cuda:99"}, "cannot be used"),
        ({"device": "mps"}, "expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_user_mistakes_are_one_line_and_status_2(changes, message, tiny_world, tmp_path, capsys):
    assert (
        loop.main(arguments(tiny_world, tmp_path / "out", **{"strategy": "ripu", **changes})) == 2
    )
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out/config.json").exists()  # the folder stays free for the next try


def test_an_out_folder_that_cannot_be_made_is_one_line(tiny_world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert loop.main(arguments(tiny_world, tmp_path / "file/out", strategy="ripu")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_lost_network_asks_nothing(tiny_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        loop.Run, "finite_losses", lambda self, step: torch.zeros(1, len(self.names))
    )
    original = torch.optim.SGD.step

    def spoil(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", spoil)
    assert loop.main(arguments(tiny_world, tmp_path, strategy="ripu")) == 2
    err = capsys.readouterr().err
    assert "the network's output is not finite" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("rounds/0?"))


def test_score_takes_the_settings_of_the_run(tiny_world, tmp_path, capsys):
    options = {"strategy": "source-only", "steps": 2, "test_size": "32x16"}
    assert loop.main(arguments(tiny_world, tmp_path, **options)) == 0
    said = capsys.readouterr().out  # it draws no story
    assert said.splitlines()[-1] == f"run folder {tmp_path}"
    assert evaluation.main(["score", str(tmp_path), "--json", str(tmp_path / "again.json")]) == 0
    first, again = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("result", "again")
    )
    assert first["protocol"] == again["protocol"] and first["IoU"] == again["IoU"]
    assert "ripu (32x16" in capsys.readouterr().out
    # another protocol has a size of its own
    assert evaluation.main(["score", str(tmp_path), "--protocol", "whole"]) == 0
    assert "whole (full resolution" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,idle",
    [
        ("ripu --drop 0.1 --portion 0.3 --head stal --budget 0.1", "--drop, --head, --portion"),
        (
            "cbst --init x.pt --budget 0.1 --cbda both --source-steps 4 --rounds 2",
            "--budget, --cbda",
        ),
        ("stal --head stal --budget 0.1 --drop 0.1 --eval-every 5", "--eval-every"),
        ("ripu --pseudo cbst --portion 0.3", ""),
        ("full --keep-labels --protocol sliding --test-size 64x32", "--test-size"),
        ("ripu --pixels 4", "--pixels"),
        ("ripu --teacher --no-cutmix --drop 0.1", ""),
        ("ripu --teacher --unlabelled 0 --drop 0.1", "--drop"),
        ("ripu --no-cutmix", "--cutmix"),
        ("ripu-pa --pixels 4 --budget 0.1", "--budget"),
        ("ripu --source-free x --source-size 8x8 --consistency 1", "--consistency, --source-size"),
        ("stal --unlabelled 0 --contrast 0 --bank 9 --drop 0.1", "--bank, --drop"),
        ("stal --contrast 0 --bank 9 --drop 0.1", "--bank"),
        ("stal --unlabelled 0 --drop 0.1", ""),
        ("stal --contrast 0 --contrast-start 0.5", "--contrast-start"),
        ("stal --unlabelled 0 --no-class-keep", "--class-keep"),
        ("stal --confidence-momentum 0.9", ""),
        (
            "stal --no-copy-paste --no-cutmix --no-class-keep --confidence-momentum 0.9",
            "--confidence-momentum",
        ),
        ("stal --poly-steps 100 --accumulate 3", "--accumulate, --poly-steps"),
        ("source-only --negative 1 --cache-gb 3", "--cache-gb, --negative"),
        ("stal --rounds 1 --restart --image-queries random", "--image-queries, --restart"),
        ("stal --rounds 2 --restart --image-queries random", ""),
        ("stal --ohem-pixels 5 --ohem-threshold 1", "--ohem-pixels"),
        ("stal --ohem-pixels 5", ""),
    ],
)
def test_options_that_do_nothing_are_named(words, idle, capsys):
    strategy, *options = words.split()
    loop.check_shares(settings.parse(["--strategy", strategy, *options]))
    expected = f"note: no effect with --strategy {strategy}: {idle}\n" if idle else ""
    assert capsys.readouterr().err == expected
    for field in dataclasses.fields(settings.Settings):
        assert set(field.metadata["read_by"]) <= set(settings.STRATEGIES), field.name


def test_regions_of_one_pixel_are_told_of(capsys):
    for strategy, told in (("cbda", True), ("entropy", False)):
        settings.parse(["--strategy", strategy, "--radius", "0"])
        assert ("--radius 0: a region of one pixel" in capsys.readouterr().err) == told


def test_a_checkpoint_of_another_device_goes_on_here(tmp_path):
    """What a GPU saves: momentum in the layout of its weights, SGD in one kernel. The step that follows
    is the one that follows here."""
    options = {**SMALL, "strategy": "full", "batch_norm": "live", "lr": 1.0}
    options = {name: x for name, x in options.items() if name not in ("rounds", "query_steps")}
    s, device = settings.settings_for(options), torch.device("cpu")
    for half in (False, True):
        run = alda_run.Run(s, tmp_path, device)
        for p in run.model.parameters():
            p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
        run.optimizer.step()
        state = run.state(1)
        momentum = state["optimizer"]["state"]
        if half:
            for group in state["optimizer"]["param_groups"]:
                group["fused"] = True
            for kept in momentum.values():
                if kept["momentum_buffer"].dim() == 4:
                    moved = kept["momentum_buffer"].to(memory_format=torch.channels_last)
                    kept["momentum_buffer"] = moved
        other = alda_run.Run(s, tmp_path, device)
        assert other.restore(state) == 1
        for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
            p.grad = q.grad = torch.ones_like(p)
            assert other.optimizer.state[q]["momentum_buffer"].stride() == q.stride()
        assert not any(group["fused"] for group in other.optimizer.param_groups)
        run.optimizer.step()
        other.optimizer.step()
        for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_each_process_goes_on_with_what_is_its_own(tmp_path, monkeypatch):
    s = settings.settings_for({**SMALL, "strategy": "ripu"})
    first, second = (alda_run.Run(s, tmp_path, torch.device("cpu")) for _ in range(2))
    first.history, second.history = [torch.zeros(2)], [torch.ones(2)]
    torch.manual_seed(7)
    owned = second.own()
    expected = torch.rand(3)
    torch.manual_seed(8)
    monkeypatch.setattr(alda_run, "all_gather_list", lambda own: [*own, owned])
    first.save(3)
    again = alda_run.Run(s, tmp_path, torch.device("cpu"))
    again.rank = 1
    assert again.restore(torch.load(tmp_path / "checkpoints/last.pt", weights_only=True)) == 3
    assert torch.equal(torch.rand(3), expected) and again.history[0].sum() == 2


def test_what_the_device_can_do(monkeypatch):
    for capability, there in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, x=capability: x)
        assert alda_run.has_bfloat16(torch.device("cuda")) == there
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    evaluation.pick_device("cpu")
    assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_run_on_the_cpu_leaves_the_gpu_alone(device, monkeypatch, tiny_world):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(alda_run, "load", lambda *_, **kinds: seen.append(kinds) or [])
    s = settings.settings_for({**SMALL, "strategy": "full", "device": device})
    alda_run.batches(s, open_dataset("cityscapes", tiny_world), 0, 2, None)
    assert seen[0]["pin_memory"] == (device == "auto")


def test_unknown_options_and_wrong_types_are_one_line(capsys):
    for words in (["--strategie", "ripu"], ["--steps", "many"], ["--strategy", "magic"]):
        with pytest.raises(SystemExit) as stop:
            loop.main(words)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="--steps must be int"):
        settings.Settings(steps="many")


def test_two_runs_are_never_mixed(tiny_world, tmp_path, capsys):
    assert loop.main(arguments(tiny_world, tmp_path, strategy="source-only", steps=2)) == 0
    assert loop.main(arguments(tiny_world, tmp_path, strategy="source-only", steps=2)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (
        loop.main(arguments(tiny_world, tmp_path, strategy="source-only", steps=3, resume=True))
        == 2
    )
    assert "--steps 2 -> 3" in capsys.readouterr().err


def test_lines_after_the_checkpoint_are_written_once(tiny_world, tmp_path, interrupt, monkeypatch):
    """Also when there is no checkpoint yet, and when the last line was cut."""
    interrupt("step", 3)
    with pytest.raises(KeyboardInterrupt):
        loop.main(arguments(tiny_world, tmp_path, strategy="source-only", checkpoint_every=100))
    monkeypatch.undo()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "losses": {"source": 1}')
    assert (
        loop.main(
            arguments(
                tiny_world, tmp_path, strategy="source-only", checkpoint_every=100, resume=True
            )
        )
        == 0
    )
    assert [line["step"] for line in metric_lines(tmp_path)] == [2, 4, 6, 8]


def test_a_lost_round_is_noticed_on_resume(tiny_world, tmp_path, capsys, interrupt, monkeypatch):
    interrupt("step", 7)
    with pytest.raises(KeyboardInterrupt):
        loop.main(arguments(tiny_world, tmp_path, strategy="ripu"))
    monkeypatch.undo()
    (tmp_path / "rounds/02").rename(tmp_path / "lost")
    assert loop.main(arguments(tiny_world, tmp_path, strategy="ripu", resume=True)) == 2
    assert "rounds made before step 6 are missing" in capsys.readouterr().err


def test_help_groups_the_options(capsys):
    with pytest.raises(SystemExit):
        loop.main(["--help"])
    out = capsys.readouterr().out
    assert all(
        f"{group}:" in out
        for group in ("run", "network", "schedule", "queries", "RIPU losses", "CBDA", "evaluation")
    )
    assert "this project's formula" in " ".join(out.split())
