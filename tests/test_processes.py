"""Two processes under torchrun do what one does: the same picks and pseudo-labels, losses within rounding."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_loop import arguments, metric_lines

from alda import distributed, evaluation, loop, losses
from alda.annotation import Rounds
from alda.datasets import open_dataset

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(words, *options):
    command = [*TORCHRUN, "--standalone", *options, "-m", "alda.loop", *words]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=300)


@pytest.fixture(scope="module")
def trained(tiny_world, tmp_path_factory):
    """A source-trained network: with it batch norm can be frozen, and no process sees fewer images
    through it than another."""
    out = tmp_path_factory.mktemp("start")
    assert loop.main(arguments(tiny_world, out, strategy="source-only", steps=4)) == 0
    return out / "checkpoints/last.pt"


SHARED = {
    # at the others' rate its losses reach 50, and rounding becomes another network in eight steps
    "cbda": {
        "strategy": "cbda",
        "budget": 0.2,
        "pseudo": "cbst",
        "pseudo_steps": "0,6",
        "lr": 1e-4,
    },
    "cbst": {"strategy": "cbst", "rounds": 2, "steps": 6},
    "ripu": {"strategy": "ripu", "budget": 0.2, "rules": "code", "pictures": 3},
    "ripu-pa": {"strategy": "ripu-pa", "pixels": 8, "radius": 2},
    "st": {"strategy": "st", "rounds": 2, "steps": 6, "mine": 0.0},
    "source-free": {"strategy": "entropy", "unit": "pixel", "rules": "code"},
}


@pytest.mark.parametrize(
    "name", ["cbda", "cbst"] + [pytest.param(n, marks=pytest.mark.slow) for n in list(SHARED)[2:]]
)
def test_two_processes_equal_one(name, trained, tiny_world, tmp_path):
    options = {"batch_norm": "frozen", "init": str(trained), "log_every": 1, **SHARED[name]}
    options["query_steps"] = "0,5"
    if name == "source-free":
        options["source_free"] = options["init"]
    outs = [tmp_path / "one", tmp_path / "two"]
    one, two = (arguments(tiny_world, out, **options) for out in outs)
    assert loop.main(one) == 0
    done = torchrun(two)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("last checkpoint") == 1 and "2 processes (cpu)" in done.stdout
    target = open_dataset("cityscapes", tiny_world, "train")
    maps = 0
    for kind, part in (("rounds", "queries"), ("rounds", "answers"), ("pseudo", "labels")):
        first, second = (Rounds(out / kind) for out in outs)
        assert first.complete() == second.complete()
        for number in range(1, first.complete() + 1):
            for sample in target.samples:
                a, b = (r.read(number, part, sample.id, sample.size, 7) for r in (first, second))
                # rounds before the first step see equal weights, later ones weights that differ by
                # the order of sums
                same = (a == b).double().mean()
                assert same == 1 if number == 1 else same > 0.995, (kind, number, part, sample.id)
                maps += 1
    assert maps >= len(target)
    pictures = [sorted(p.relative_to(out) for p in out.rglob("*.png")) for out in outs]
    assert pictures[0] == pictures[1]
    for a, b in zip(*(metric_lines(out) for out in outs), strict=True):
        assert a["step"] == b["step"] and a["losses"].keys() == b["losses"].keys()
        for loss, value in a["losses"].items():
            gap = 1e-5 if a["step"] == 1 else 2e-3  # rounding, then what training makes of it
            assert b["losses"][loss] == pytest.approx(value, rel=gap, abs=1e-6), (a["step"], loss)
    results = [json.loads((out / "result.json").read_text()) for out in outs]
    assert results[0]["mIoU19"] == pytest.approx(results[1]["mIoU19"], abs=2e-3)
    assert results[0]["budget"] == results[1]["budget"]


def share_of_losses(rank, world, path, values):
    """In a process of its own: the gradients of its half of the batch, averaged over both."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world
    )
    logits, labels = (x[rank::world] for x in values)
    logits = logits.clone().requires_grad_()
    total = sum(loss(logits, labels) for loss in LOSSES)
    total.backward()
    torch.save((logits.grad / world, total.detach()), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


LOSSES = (
    losses.cross_entropy,
    losses.local_consistency,
    lambda x, y: losses.local_consistency(x, y, boundary_only=True),
    lambda x, y: losses.negative_learning(x.softmax(1)),
    lambda x, y: losses.ohem_cross_entropy(x, y, threshold=0.2, min_kept=0),
    lambda x, y: losses.weighted_consistency(x, y, x.softmax(1).amax(1)),
)


def test_a_loss_is_the_mean_over_the_pixels_of_all_processes(tmp_path):
    """One of four images has most labels, another none: the mean of the processes' means would be
    something else."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, 6, 7), torch.randint(0, 5, (4, 6, 7))
    labels[1], labels[3, 1:] = 255, 255
    logits[0] *= 4
    whole = logits.clone().requires_grad_()
    expected = sum(loss(whole, labels) for loss in LOSSES)
    expected.backward()
    torch.multiprocessing.spawn(share_of_losses, (2, str(tmp_path), (logits, labels)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    gradient = torch.empty_like(logits)
    for rank, (part, _) in enumerate(parts):
        gradient[rank::2] = part
    assert (sum(total for _, total in parts) / 2 - expected).abs() < 1e-5
    assert (gradient - whole.grad).abs().max() < 1e-7


@pytest.mark.parametrize("strategy", ["full", "cbst"])
def test_a_step_in_parts_has_the_gradient_of_the_whole(
    strategy, trained, tiny_world, tmp_path, monkeypatch
):
    """--accumulate: the mean over the parts of each part's loss. With a loss that divides by all
    pixels (not the labelled ones, which parts have more or fewer of) that is the whole batch's."""
    seen = []

    def over_all_pixels(logits, labels):
        seen.append(len(logits))
        total = torch.nn.functional.cross_entropy(
            logits, labels.long(), ignore_index=255, reduction="sum"
        )
        return total / labels.numel()

    monkeypatch.setattr(loop, "cross_entropy", over_all_pixels)
    states = []
    for n in (1, 2):
        options = {"strategy": strategy, "steps": 2, "rounds": 1, "batch": 4, "accumulate": n}
        options |= {"batch_norm": "frozen", "init": str(trained), "log_every": 1}
        out = tmp_path / str(n)
        assert loop.main(arguments(tiny_world, out, **options)) == 0
        states.append(torch.load(out / "checkpoints/last.pt", weights_only=True))
        states[-1]["losses"] = [line["losses"] for line in metric_lines(out)]
    assert set(seen) == {4, 2}
    for name, value in states[0]["model"].items():
        gap = (value.double() - states[1]["model"][name].double()).abs().max()
        assert gap < 2e-5, (name, gap)  # float32 rounds by up to 3e-6; a lost 1/n moves it by 5e-2
    for a, b in zip(states[0]["losses"], states[1]["losses"], strict=True):
        assert all(b[k] == pytest.approx(v, rel=1e-4) for k, v in a.items())


def test_images_of_one_size_pass_together(tiny_world, monkeypatch):
    """Groups of up to four in their order; a scored set is the same as one by one."""
    sizes = [(4, 6), (4, 6), (4, 6), (4, 6), (4, 6), (6, 4), (4, 6)]
    pairs = [(n, torch.full((3, *size), n, dtype=torch.uint8)) for n, size in enumerate(sizes)]
    one_by_one = [indices for indices, _ in evaluation.same_sized(pairs, torch.device("cpu"))]
    assert one_by_one == [[n] for n in range(7)]
    monkeypatch.setitem(evaluation.TOGETHER, "cpu", 4)
    groups = [*evaluation.same_sized(pairs, torch.device("cpu"))]
    assert [indices for indices, _ in groups] == [[0, 1, 2, 3], [4], [5], [6]]
    assert all(x[:, 0, 0, 0].tolist() == indices for indices, x in groups)
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 19, 3, padding=1)
    data, scores = open_dataset("cityscapes", tiny_world, "val"), []
    for most in (1, 4):
        monkeypatch.setitem(evaluation.TOGETHER, "cpu", most)
        for protocol in ("ripu", "sliding"):
            window = 40 if protocol == "sliding" else None
            asked = evaluation.protocol_named(protocol, (32, 64), window)
            scores.append(evaluation.evaluate(model, data, asked, "cpu")["mIoU19"])
    assert scores[:2] == pytest.approx(scores[2:], abs=1e-5)


@pytest.mark.slow
def test_a_teacher_is_the_same_after_a_resume(tiny_world, tmp_path):
    """Two processes, each with running statistics of its own, stopped between the second round and the
    next checkpoint: the round stands, and the run ends with the bits of one that was not stopped."""
    options = {"strategy": "ripu", "teacher": True, "query_steps": "2,4", "batch": 4, "ema": 0.5}
    options |= {"checkpoint_every": 100, "budget": 0.2, "lr": 1e-3}
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert torchrun(arguments(tiny_world, whole, **options)).returncode == 0
    words = [x.replace(str(whole), str(part)) for x in arguments(tiny_world, whole, **options)]
    shutil.copytree(whole, part)
    (part / "checkpoints/last.pt").unlink()  # previous.pt is the one before the second round
    (part / "result.json").unlink()
    done = torchrun([*words, "--resume"])
    assert done.returncode == 0 and "resumed from step 4" in done.stdout, done.stderr[-2000:]
    states = [torch.load(o / "checkpoints/last.pt", weights_only=True) for o in (whole, part)]
    for name in ("model", "teacher"):
        for key, value in states[0][name].items():
            assert torch.equal(value, states[1][name][key]), (name, key)


def test_a_restart_finds_nothing_of_the_start_before():
    """torchrun's store outlives its processes: those of another start are never met."""
    store = torch.distributed.HashStore()
    for start in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = [*pool.map(lambda rank: distributed.fresh(store, rank, 3), (2, 0, 1))]
        assert not any(part.check(["address"]) for part in found)
        found[0].set("address", f"{start}")
        assert [part.get("address") for part in found] == [f"{start}".encode()] * 3
        store.set("hello/1", f"killed {start}")  # before it was welcomed


def test_stal_on_two_processes(tiny_world, tmp_path, capsys):
    """One run folder, one report; a resume needs as many processes."""
    options = {"strategy": "stal", "steps": 4, "net": "deeplabv3plus", "threads": 1, "batch": 4}
    words = arguments(tiny_world, tmp_path / "out", **options)
    done = torchrun(words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("last checkpoint, teacher") == 1 and "2 processes (cpu)" in done.stdout
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["budget"]["images"] == 3 and result["images"] == 3
    assert loop.main([*words, "--resume"]) == 2
    assert "started with 2 processes" in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_is_refused(tiny_world, tmp_path):
    words = arguments(tiny_world, tmp_path / "out", strategy="source-only", batch=3)
    done = torchrun(words)
    assert done.returncode != 0
    assert "--batch 3 cannot be shared by 2 processes" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ripu", "stal"])
def test_a_killed_process_ends_the_job_and_a_restart_goes_on(
    strategy, trained, tiny_world, tmp_path
):
    """One of two processes is killed: the other ends with a line, torchrun starts both again, and the
    run ends with the bits of one that was never killed."""
    options = {"batch_norm": "frozen", "init": str(trained), "checkpoint_every": 1, "steps": 60}
    options |= {"strategy": strategy, "query_steps": "3,20"}
    if strategy == "stal":  # dropout and mixed images, which differ from process to process
        options |= {"batch_norm": "live", "init": "none", "net": "deeplabv3plus", "batch": 4}
        options["steps"] = 16
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert torchrun(arguments(tiny_world, whole, **options)).returncode == 0
    words = [*arguments(tiny_world, killed, **options), "--resume"]
    command = [*TORCHRUN, "--standalone", "--max_restarts", "4", "-m", "alda.loop", *words]
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    )
    last = killed / "checkpoints/last.pt"
    while not last.is_file() or torch.load(last, weights_only=True)["step"] < 5:
        assert job.poll() is None, job.communicate()[1][-2000:]
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err[-2000:]
    assert "resumed from step" in out and "another process of this job was lost" in err
    states = [torch.load(o / "checkpoints/last.pt", weights_only=True) for o in (whole, killed)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
