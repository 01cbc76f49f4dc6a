"""Wrong input is told in one line; the command line says what it does; the README's code runs."""

import argparse
import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mutants
import numpy as np
import pytest
import torch
from PIL import Image
from test_loop import arguments

from alda import (
    InputError,
    __main__,
    __version__,
    acquisition,
    annotate,
    datasets,
    distributed,
    evaluation,
    loop,
    losses,
    run,
    settings,
)
from alda.annotation import Rounds, ledger
from alda.run import run_folder

ROOT = Path(__file__).parent.parent
LOGITS, LABELS = torch.randn(2, 5, 6, 7), torch.zeros(2, 6, 7, dtype=torch.uint8)
SCORES = (
    acquisition.ripu_score,
    acquisition.pixel_score,
    acquisition.entropy_score,
    acquisition.margin_score,
)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "given,message",
    [
        (LOGITS.numpy(), "use torch.from_numpy"),
        (LOGITS[0, 0], r"\(C,H,W\) or \(N,C,H,W\), got torch.float32 \(6, 7\)"),
        (LOGITS.long(), "must be floats"),
        (LOGITS[:, :1], "2 to 255 classes, got 1"),
        (torch.randn(300, 4, 4), "2 to 255 classes, got 300"),
        (torch.randn(512, 600, 19), "use permute"),
        (LOGITS.softmax(1), "logits before the softmax"),
    ],
)
def test_scores_refuse_what_is_no_map_of_logits(score, given, message):
    with pytest.raises(ValueError, match=message) as error:
        score(given)
    assert "\n" not in str(error.value)


def test_scores_take_any_number_of_classes():
    for number in (2, 21, 255):
        score, _, _ = acquisition.ripu_score(torch.randn(number, 5, 6))
        assert score.shape == (5, 6) and score.max() <= 1


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: acquisition.pixel_entropy(LOGITS), "a softmax may be missing"),
        (lambda: acquisition.image_uncertainty(LOGITS.softmax(1).numpy()), "torch.from_numpy"),
        (lambda: acquisition.region_impurity(torch.rand(4, 4), 19), "integer class ids"),
        (lambda: acquisition.region_impurity(LABELS, 1), "2 to 255 classes"),
        (lambda: acquisition.region_impurity(LABELS + 255, 19), r"class ids 0..18, got 255..255"),
        (lambda: acquisition.select_regions(LOGITS[0, 0], 2.5, 1), "a whole count"),
        (
            lambda: acquisition.select_regions(LOGITS[0, 0], 2, 1, torch.zeros(2, 6, 7)),
            r"blocked \(2, 6, 7\)",
        ),
        (lambda: acquisition.select_regions(np.zeros((4, 4)), 1, 1), "torch.from_numpy"),
        (lambda: acquisition.paint(torch.tensor([[0, -1]]), 1, (4, 4)), "outside the 4x4 image"),
        (lambda: acquisition.paint(torch.tensor([[4, 0]]), 1, (4, 4)), "outside the 4x4 image"),
        (lambda: acquisition.paint(torch.rand(3, 2), 1, (4, 4)), r"integers \(n,2\)"),
        (lambda: acquisition.ripu_score(LOGITS, k=-1), "k must be at least 0, got -1"),
        (lambda: acquisition.pixel_score(LOGITS, k=-1), "k must be at least 0, got -1"),
        (lambda: acquisition.region_mean(LOGITS[0], -1), "k must be at least 0, got -1"),
        (lambda: acquisition.region_area((3, 4), -1), "k must be at least 0, got -1"),
        (lambda: acquisition.select_regions(LOGITS[0, 0], 3, -1), "must be at least 0, got -1"),
        (lambda: acquisition.select_regions(LOGITS[0, 0], -3, 1), "count of at least 0; got"),
        (lambda: acquisition.dilate(LABELS[0], -1), "k must be at least 0, got -1"),
        (lambda: acquisition.paint(torch.tensor([[0, 1]]), -1, (4, 4)), "k must be at least 0"),
        (lambda: losses.cross_entropy(LOGITS.numpy(), LABELS), "torch.from_numpy"),
        (lambda: losses.cross_entropy(LOGITS, LABELS[:1]), "integer labels"),
        (lambda: losses.local_consistency(LOGITS, LABELS[:, :3]), "integer labels"),
        (lambda: losses.ohem_cross_entropy(LOGITS, LABELS.float()), "integer labels"),
        (lambda: evaluation.confusion_matrix(LABELS, LABELS + 77, 5), "labels holds 77"),
        (lambda: evaluation.confusion_matrix(LABELS, LABELS[:1], 5), "one shape"),
        (lambda: evaluation.confusion_matrix(LOGITS[:, 0], LABELS, 5), "integer maps"),
        (lambda: evaluation.confusion_matrix(LABELS, LABELS + 0.6, 5), "integer maps"),
        (lambda: evaluation.confusion_matrix(LABELS.numpy(), LABELS, 5), "torch.from_numpy"),
        (lambda: evaluation.summary(torch.zeros(5, 5)), "19 names for a matrix of 5"),
    ],
)
def test_wrong_calls_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_masks_may_be_bool_or_uint8():
    score = torch.rand(6, 6)
    for block in (torch.rand(6, 6) > 0.5, torch.zeros(6, 6, dtype=torch.bool)):
        a, b = (
            acquisition.select_regions(score, 4, 1, m) for m in (block, block.to(torch.uint8) * 255)
        )
        assert torch.equal(a, b)
        assert torch.equal(
            acquisition.dilate(block, 1), acquisition.dilate(block.to(torch.uint8), 1)
        )


def test_other_classes_than_cityscapes(tmp_path):
    names = ("background", "person", "car")
    result = evaluation.summary(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), names)
    assert result["mIoU3"] == pytest.approx((3 / 4 + 4 / 5) / 2) and result["classes3"] == 2
    assert result["absent"] == ["car"] and "over 2 classes" in evaluation.describe(result)
    with Rounds(tmp_path, names).new(1) as new:
        new.add(
            "a",
            torch.ones(2, 2, dtype=torch.bool),
            lambda m: torch.tensor([[0, 1], [1, 255]]).byte(),
            1,
            (2, 2),
        )
    total = ledger([Rounds(tmp_path, names).record(1)])
    assert total["classes"] == {"background": 1, "person": 2, "car": 0}
    third = torch.tensor([1 / 3, 2 / 3])
    assert total["class_entropy"] == pytest.approx(float(-(third * third.log()).sum() / np.log(3)))


# ------------------------------------------------------------------------------------- the command line


def test_python_m_alda_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "alda"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and __version__ in done.stdout
    for name in ("alda.loop", "alda.annotate", "alda.datasets", "alda.evaluation", "alda.toy"):
        assert name in done.stdout


def test_help_is_short_and_help_all_is_not(capsys):
    texts = []
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            settings.parse([word])
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
    short, full = texts
    assert "--strategy" in short and "--ohem-pixels" not in short and "--ohem-pixels" in full
    assert len(short.splitlines()) < 100 < len(full.splitlines())
    assert "stal 4" in short  # each strategy's own defaults
    assert "cbst ''" in full and not re.search(r"[\w-] +,|, *[\];]", re.sub(r"\s+", " ", full))
    assert "cbst 0.0001" in full and "25%..45% of steps" in full


def test_a_short_run_of_cbst_starts_no_long_source_training(tiny_world, tmp_path, capsys):
    words = arguments(tiny_world, tmp_path, strategy="cbst", steps=4, rules="code")
    at = words.index("--source-steps")
    assert loop.main(words[:at] + words[at + 2 :]) == 0
    assert "source-only: 4 steps in" in capsys.readouterr().out
    assert (
        settings.settings_for({"strategy": "cbst"}).source_steps == 0
    )  # as long as source-only's default


def test_the_source_network_of_cbst_is_trained_with_the_batch_that_was_given(tiny_world, tmp_path):
    """As memory and processes allow it: parts of one image here."""
    words = arguments(tiny_world, tmp_path, strategy="cbst", steps=4, batch=4, accumulate=4)
    assert loop.main(words) == 0
    config = json.loads((tmp_path / "source/config.json").read_text())["settings"]
    assert config["batch"] == config["accumulate"] == 4 and config["strategy"] == "source-only"


def test_the_miniature_world_and_real_data_have_folders_of_their_own():
    for root, folder in (("toy", "runs/toy-full-gta5-acdc-3"), ("data", "runs/full-gta5-acdc-3")):
        given = {"strategy": "full", "tgt": "acdc", "seed": 3, "root": root}
        assert str(run_folder(settings.settings_for(given))) == folder
        assert settings.default_folder(given) == folder  # where --resume looks


@pytest.mark.parametrize("root", ["toy", "./toy", "toy/"])
def test_the_miniature_world_is_meant_however_it_is_written(root):
    s = settings.parse(["--root", root, "--strategy", "full"])
    assert (s.root, s.steps) == ("toy", 300)


def test_cbst_is_tested_at_the_target_size_that_is_given():
    for sizes, expected in (
        ({}, "1280x640"),
        ({"target_size": "96x48"}, ""),
        ({"target_size": "96x48", "test_size": "64x32"}, "64x32"),
        ({"protocol": "whole"}, ""),  # 1280x640 is a size of the protocol ripu
        ({"protocol": "whole", "test_size": "64x32"}, "64x32"),
    ):
        assert settings.settings_for({"strategy": "cbst", **sizes}).test_size == expected


def test_two_ways_to_write_a_size_are_one_size():
    sizes = {"source_size": "64X32", "target_size": "64x32", "crop": "", "scale": "1,1"}
    loop.check_one_size(settings.settings_for({"strategy": "cbst", **sizes}))


def test_a_crop_that_no_image_fills_is_said(capsys):
    settings.parse(
        [
            "--strategy",
            "cbst",
            "--crop",
            "4096x2048",
            "--source-size",
            "2048x1024",
            "--scale",
            "0.5,1.5",
        ]
    )
    err = capsys.readouterr().err
    assert "note: --crop 4096x2048 is larger than --source-size 2048x1024 ever gets" in err
    settings.parse(["--strategy", "stal"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("steps,log_every,first", [(12, 50, 2), (30, 50, 3), (8, 1, 1)])
def test_a_short_run_shows_its_first_steps(steps, log_every, first, tiny_world, tmp_path):
    """A tenth of all steps, or two, at most between two lines; the rate counts the first step's time, too."""
    words = arguments(
        tiny_world, tmp_path, strategy="source-only", steps=steps, log_every=log_every
    )
    assert loop.main(words) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(first, steps + 1, first))
    assert 0 < lines[0]["steps_per_s"] < 500


def test_the_rate_leaves_queries_out_and_long_passes_report(
    tiny_world, tmp_path, monkeypatch, capsys
):
    """With a clock by hand: a step takes 2 s, the rounds between them 1,000."""
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def asks(*_):
        now[0] += 1000.0

    def loss(*given):
        now[0] += 2.0
        return losses_of_queries(*given)

    losses_of_queries = loop.losses_of_queries
    monkeypatch.setattr(loop, "losses_of_queries", loss)
    monkeypatch.setattr(loop, "note_before", asks)
    assert loop.main(arguments(tiny_world, tmp_path, strategy="random", steps=8, log_every=4)) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["steps_per_s"] for line in lines} == {0.5}
    capsys.readouterr()

    def slowly():
        for n in range(5):
            now[0] += 15.0
            yield n

    assert [*datasets.progress(slowly(), 5, "images seen")] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out.splitlines() == [
        "2/5 images seen, 0.1 a second, 45 s left",
        "4/5 images seen, 0.1 a second, 15 s left",
    ]


# --------------------------------------------------------------------------------------------- the README


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(acquisition, "SCORES", dict(acquisition.SCORES))
    found = blocks("python")
    assert len(found) >= 2
    for block in found:
        exec(compile(block, "README.md", "exec"), {})
    assert acquisition.SCORES["confidence"](torch.zeros(19, 3, 4), 1, "region", 0).shape == (3, 4)


def test_a_new_score_is_a_strategy(tiny_world, tmp_path):
    """The README's ten lines before `alda.loop` is imported: the strategy is there and runs."""
    score, _, start = next(b for b in blocks("python") if "SCORES[" in b).partition("\nif __name__")
    words = arguments(
        tiny_world, tmp_path / "out", strategy="confidence", steps=4, query_steps="1,2"
    )
    assert "main()" in start
    script = f"{score}\nimport sys\nfrom alda import loop\nsys.exit(loop.main({words!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    assert '"confidence"' in (tmp_path / "out/config.json").read_text()


def test_a_scripts_run_is_resumed_by_the_script(tiny_world, tmp_path):
    """A script brings its score: the line that resumes names it, and Ctrl-C ends it quietly."""
    score, _, start = next(b for b in blocks("python") if "SCORES[" in b).partition("\nif __name__")
    last = "import os, signal, torch\n"
    stop = (  # Ctrl-C in step 3
        "real, seen = torch.optim.SGD.step, []\n"
        "def step(*args, **kwargs):\n"
        "    seen.append(0)\n"
        "    if len(seen) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*args, **kwargs)\n"
        "torch.optim.SGD.step = step\n"
    )
    script, out = tmp_path / "my score.py", tmp_path / "out"
    options = {"strategy": "confidence", "steps": 4, "query_steps": "1,2", "checkpoint_every": 1}
    words = arguments(tiny_world, out, **options)
    script.write_text(f"{score}\n{last}{stop}\nif __name__{start}\nprint('on')\n")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    kinds = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": path}}
    done = subprocess.run([sys.executable, script.name, *words], cwd=tmp_path, **kinds)
    assert done.returncode == 130 and "on" not in done.stdout.splitlines()
    assert done.stderr == f"stopped: python 'my score.py' --resume --out {out} goes on\n"
    script.write_text(f"{score}\nif __name__{start}")
    line = done.stderr.removeprefix("stopped: python ").removesuffix(" goes on\n")
    done = subprocess.run([sys.executable, *shlex.split(line)], cwd=tmp_path, **kinds)
    assert done.returncode == 0 and (out / "result.json").is_file(), done.stderr[-500:]


@pytest.mark.parametrize("started", ["-c", "pytest", loop.__file__, annotate.__file__])
def test_without_a_script_alda_loop_resumes(started, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    assert run.resume_line(Path("a b")) == "python -m alda.loop --resume --out 'a b'"


def test_a_run_of_several_processes_is_resumed_with_as_many(tmp_path):
    record = {"command": ["python", loop.__file__], "processes": 4}
    (tmp_path / "config.json").write_text(json.dumps(record))
    expected = f"torchrun --nproc_per_node 4 -m alda.loop --resume --out {tmp_path}"
    assert run.resume_line(tmp_path) == expected
    record["processes_here"] = 2  # of each of two machines
    (tmp_path / "config.json").write_text(json.dumps(record))
    expected = expected.replace("--nproc_per_node 4", "--nnodes 2 --nproc_per_node 2")
    assert run.resume_line(tmp_path) == expected


def test_a_barrier_waits_for_a_file_that_another_machine_sees_late(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed.torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(distributed.dist, "barrier", lambda **words: calls.append(words))
    monkeypatch.setattr(distributed.time, "sleep", lambda _: (tmp_path / "late").touch())
    distributed.barrier(tmp_path / "late")
    assert calls == [{"device_ids": [3]}] and (tmp_path / "late").is_file()
    monkeypatch.setattr(distributed, "JOINING", 0.0)
    distributed.barrier(tmp_path / "never")  # whoever reads it says what is missing
    distributed.barrier()


def test_readme_help_and_the_list_of_commands_agree(monkeypatch, capsys):
    """Every command of the README is understood without a note, every option and strategy is there."""
    text = (ROOT / "README.md").read_text()
    for name in ("_command", "compare"):
        monkeypatch.setattr(evaluation, name, lambda args: 0)
    commands = re.findall(r"(?:python|torchrun \S+ \S+) -m alda\.(\w+)([^#`\n]*)", text)
    commands += [
        ("loop", words) for words in re.findall(r"`(--strategy (?!confidence)[^`]*)`", text)
    ]
    assert len(commands) > 10
    assert {name for name, _ in commands} == {"loop", "evaluation", "annotate", "datasets"}
    for name, words in commands:
        if name == "loop" and "--resume" not in words:  # what resumes needs a run
            settings.parse(words.split())
        elif name == "evaluation":
            assert evaluation.main(words.split()) == 0
        assert capsys.readouterr().err == "", words
    for words in (["predict", "--help"], ["compare", "--help"], ["score", "--help"]):
        with pytest.raises(SystemExit):
            evaluation.main(words)
    with pytest.raises(SystemExit):
        settings.parse(["--help-all"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    others = {"--nnodes", "--rate"}  # torchrun, the cost model
    others |= {"--world", "--rows", "--seeds", "--only-table", "--record"}  # evidence
    assert set(re.findall(r"(?<=[ `])--[a-z-]+(?!\w)", text)) <= known | others
    for name in settings.STRATEGIES:
        assert re.search(rf"`(--strategy )?{name}[ `]", text), name
    assert set(__main__.COMMANDS) == {"loop", "evaluation", "annotate", "datasets", "toy"}
    assert "alda.loop --root toy --strategy ripu" in text


def test_the_readme_is_a_front_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), f"README links to {link}, which is not there"


def test_differences_have_unique_numbers_and_the_readme_names_their_homes():
    """D1, D2, ... stand in the modules they concern; the README's list of homes is right."""
    homes = {}
    for path in sorted((ROOT / "alda").glob("*.py")):
        for number in re.findall(r"^ +D(\d+)\. ", path.read_text(), flags=re.M):
            assert number not in homes, f"D{number} stands in {homes[number]} and in {path.name}"
            homes[number] = path.name
    assert sorted(map(int, homes)) == list(range(1, len(homes) + 1))
    listed = re.findall(
        r"D(\d+)(?:-D(\d+))? \[`(\w+)`\]\(alda/\w+\.py\)", (ROOT / "README.md").read_text()
    )
    found = {}
    for first, last, module in listed:
        for number in range(int(first), int(last or first) + 1):
            found[str(number)] = f"{module}.py"
    assert found == homes


WRONG_STARTS = [
    {"root": "nowhere"},
    {"src": "synthia", "root": "partly"},  # holds gta5 alone
    {"root": "partly"},
    {"init": "nothing.pt"},
    {"strategy": "cbst", "init": "nothing.pt"},
    {"strategy": "stal", "budget": 0.9, "rounds": 40},
    {"root": "toy"},  # ./toy is no miniature world
]


@pytest.mark.parametrize("wrong", WRONG_STARTS, ids=str)
def test_a_start_that_fails_leaves_no_folder(wrong, tiny_world, tmp_path, monkeypatch, capsys):
    wrong = {"strategy": "ripu", **wrong}
    monkeypatch.chdir(tmp_path)
    Path("partly").mkdir()
    Path("partly/gta5").symlink_to(tiny_world / "gta5")
    Path("toy").mkdir()
    Path("toy/mine.txt").write_text("mine")
    Path("empty/inner").mkdir(parents=True)
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")

    def files():
        return sorted(str(path) for path in Path().rglob("*"))

    before = files()
    for out in ("runs/new/a", "empty/inner", "empty/inner/b", "notes/c"):
        assert loop.main(arguments(tiny_world, out, **wrong)) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
        assert files() == before, out
    assert loop.main(arguments(tiny_world, "notes", **wrong)) == 2
    assert files() == sorted([*before, "notes/run.lock"])  # not alone there: it stays
    assert Path("notes/mine.txt").read_text() == "mine"


def test_a_failed_start_removes_no_folder_that_another_takes(tmp_path, monkeypatch):
    """Between the removal of run.lock and of its folder another start may come."""
    out, other = tmp_path / "out", []
    real = Path.unlink

    def unlink(path, **kwargs):
        real(path, **kwargs)
        if path.name == "run.lock":
            other.append(path.touch())

    monkeypatch.setattr(Path, "unlink", unlink)
    assert loop.main(arguments(tmp_path / "nowhere", out, strategy="ripu")) == 2
    assert other and [path.name for path in out.iterdir()] == ["run.lock"]


def test_a_lock_file_that_a_failed_start_removed_locks_nothing(tmp_path, monkeypatch):
    """It was opened before its removal, and locked after it: two runs would hold two files."""
    real = run.take_lock

    def late(descriptor, out):
        (out / "run.lock").unlink()
        real(descriptor, out)

    monkeypatch.setattr(run, "take_lock", late)
    with pytest.raises(InputError, match="removed or replaced meanwhile"), run.locked(tmp_path):
        raise AssertionError("it holds a lock that the next start does not see")
    assert not run.HELD


def test_a_run_that_was_moved_goes_on_where_it_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Path("runs/ripu-gta5-cityscapes-0")  # where --resume looks without --out
    found.mkdir(parents=True)
    kept = dataclasses.asdict(settings.settings_for({"strategy": "ripu", "out": "elsewhere"}))
    (found / "config.json").write_text(json.dumps({"settings": kept}))
    assert run_folder(settings.settings_resumed({"resume": True})) == found


def test_a_folder_that_the_terminal_has_no_letters_for(tmp_path):
    command = [sys.executable, "-m", "alda.datasets", "check", str(tmp_path / "straße")]
    (tmp_path / "straße/gta5").mkdir(parents=True)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "Traceback" not in done.stderr and "stra\\xdfe" in done.stdout


def test_a_resume_without_a_run_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--resume"], ["--resume", "--out", "nothing"], ["--resume", "--threads", "1"]):
        assert loop.main(words) == 2
        assert "to resume: give the run's folder with --out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call,message",
    [
        (
            lambda: acquisition.ripu_score({"out": LOGITS}),
            r"got a dict: give network\(x\)\['out'\]",
        ),
        (
            lambda: acquisition.select_regions((1, 2), 1, 1),
            "score must be a torch.Tensor, got a tuple",
        ),
        (lambda: acquisition.dilate(np.zeros((3, 3)), 1), "mask must be a torch.Tensor"),
        (
            lambda: acquisition.paint([(3, 4)], 1, (9, 9)),
            "centres must be a torch.Tensor, got a list",
        ),
        (
            lambda: acquisition.select_regions(torch.rand(3, 3), 1, 1, np.zeros((3, 3))),
            "blocked must be a torch.Tensor",
        ),
    ],
)
def test_things_of_other_kinds_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_readme_holds_no_gap():
    assert (
        "@@"
        not in (ROOT / "README.md").read_text() + (ROOT / "tests/benchmarks/RESULTS.md").read_text()
    )


def test_every_mutant_still_changes_what_stands_in_its_module():
    """tests/mutants.py needs hours; whether its changes can be made at all is seen at once."""
    for mutant in mutants.mutants(mutants.TABLE):
        was = (ROOT / f"alda/{mutant.module}.py").read_text()
        assert mutants.changed(mutant, ROOT) != was, mutant.what


def test_a_run_goes_on_where_its_files_have_moved(tiny_world, tmp_path, capsys, monkeypatch):
    """The start in another place, another working directory, a photograph that was mended; its seconds
    add up."""
    world, first, out = tmp_path / "world", tmp_path / "first", tmp_path / "out"
    shutil.copytree(tiny_world, world)
    monkeypatch.chdir(tmp_path)
    assert loop.main(arguments("world", first, strategy="source-only", steps=1)) == 0
    init, moved = first / "checkpoints/last.pt", tmp_path / "moved.pt"
    words = arguments("world", out, strategy="source-only", steps=1, init=init)
    assert loop.main(words) == 0
    line = json.loads((out / "metrics.jsonl").read_text())
    assert 0 < line["wall_s"] < json.loads((out / "result.json").read_text())["wall_s"]
    (out / "metrics.jsonl").write_text(json.dumps({**line, "wall_s": 1000}) + "\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    init.rename(moved)
    capsys.readouterr()
    assert loop.main(["--resume", "--out", "../out"]) == 2
    assert "was it moved? --resume --init FILE" in capsys.readouterr().err
    photograph = sorted(world.glob("cityscapes/leftImg8bit/val/*/*.png"))[0]
    Image.fromarray(np.zeros_like(np.array(Image.open(photograph).convert("RGB")))).save(photograph)
    assert loop.main(["--resume", "--out", "../out", "--init", str(moved)]) == 0
    said = capsys.readouterr().out
    assert "is taken for the same file" in said and "resumed from step 1" in said
    assert "warning: cityscapes: photographs of the validation have changed" in said
    assert json.loads((out / "result.json").read_text())["wall_s"] > 1000
    assert loop.main(["--resume", "--out", "../out", "--init", "imagenet"]) == 2
    assert "other settings (--init" in capsys.readouterr().err


def test_the_list_of_commands_is_no_command(monkeypatch, capsys):
    for words, status in (([], 0), (["--help"], 0), (["loop", "--root", "toy"], 2), (["train"], 2)):
        monkeypatch.setattr(sys, "argv", ["alda", *words])
        assert __main__.main() == status
        assert ("python -m alda.loop is one" in capsys.readouterr().err) == bool(status)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["datasets", "evaluation", "toy"])
def test_ctrl_c_is_status_130(name, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"alda.{name}", run_name="__main__")
    assert left.value.code == 130 and capsys.readouterr().err == "interrupted\n"
