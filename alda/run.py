"""Batches, checkpoints and resume, the log, the run's folder. What do all training loops share?

    from alda.run import Run, batches, next_batch, prepare
    run = Run(settings, out, device); start = run.resume()

A run leaves in its folder: config.json (settings, versions, command), metrics.jsonl (a line each
log step), checkpoints/last.pt, and what its loop writes (rounds/, pictures/, result.json).
"""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision

from alda import InputError, deeplab
from alda.datasets import (
    EndlessSampler,
    JointTransform,
    Mixture,
    SegmentationDataset,
    TrainingView,
    class_presence,
    load,
    mix_seed,
)
from alda.distributed import rank_and_world

# settings that may differ between a run and its resumption: where it runs and what it shows, not
# what it computes (another device or number of threads sums floats in another order, so the bits
# are then no longer the same)
MAY_CHANGE = ("resume", "device", "workers", "threads", "log_every", "pictures", "out", "root")


def batches(s, dataset: SegmentationDataset, step: int, stream: int, labels_of):
    """An endless iterator of [images (N,3,H,W) float32, labels (N,H,W) uint8] from step `step` on.

    `stream` 1 is the source, 2 the target: their sizes, their order (class-balanced for the source)
    and their seeds differ. `labels_of(index)` replaces the dataset's labels, see TrainingView.
    Raises InputError for a size that cannot be read.
    """
    presence = None
    if stream == 1 and s.source_sampling == "balanced":
        presence = class_presence(dataset, s.workers)
    sampler = EndlessSampler(len(dataset), mix_seed(s.seed, stream), presence=presence)
    sampler.load_state_dict({"position": step * s.batch})
    view = TrainingView(dataset, transform_of(s, stream), mix_seed(s.seed, stream, 1), labels_of)
    return iter(
        load(
            view,
            s.workers,
            batch_size=s.batch,
            sampler=sampler,
            pin_memory=torch.cuda.is_available(),
        )
    )


def transform_of(s, stream: int, crop_at=None, scale=None) -> JointTransform:
    """The training transform of the source (`stream` 1) or the target (2); `crop_at` see
    JointTransform; `scale` replaces --scale."""
    return JointTransform(
        size=s.source_hw if stream == 1 else s.target_hw,
        scale=scale or s.scale_range,
        halves=s.strategy == "stal",
        crop=s.crop_hw,
        centred=s.strategy == "stal",
        flip=s.flip,
        keep_labels=stream == 2 and s.keep_labels,
        crop_at=crop_at,
    )


def mixed_batches(
    s, views: list[TrainingView], entries: list[tuple[int, int]], step: int, seed: int
):
    """An endless iterator of [images, labels, dataset indices (N,) int64] of several views,
    shuffled, from step `step` on.

    Under torchrun each process gets its own part of every step. The views must give images of one
    size.
    """
    rank, world = rank_and_world()
    sampler = EndlessSampler(len(entries), seed, rank, world)
    sampler.load_state_dict({"position": step * s.batch * world})
    mixture = Mixture(views, entries)
    return iter(
        load(
            mixture,
            s.workers,
            batch_size=s.batch,
            sampler=sampler,
            pin_memory=torch.cuda.is_available(),
        )
    )


def next_batch(iterator, device):
    """The next [images, labels] on the device, or None where there is no iterator (source-only,
    source-free)."""
    return None if iterator is None else [x.to(device, non_blocking=True) for x in next(iterator)]


class Run:
    """Network, optimizer, checkpoints and the log of one run: what every training loop needs and no
    method differs in."""

    def __init__(self, s, out: Path, device: torch.device):
        self.s, self.out, self.device = s, out, device
        self.rank, world = rank_and_world()
        self.network = network_of(s)
        self.model = self.fresh_model()
        # what training calls; under torchrun it averages the gradients
        self.forward: torch.nn.Module = self.model
        if world > 1:
            if device.type == "cuda":
                self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            ids = [device.index] if device.type == "cuda" else None
            self.forward = torch.nn.parallel.DistributedDataParallel(
                self.model, device_ids=ids, broadcast_buffers=False
            )
        self.optimizer = torch.optim.SGD(
            deeplab.parameter_groups(self.model, s.lr),
            lr=s.lr,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
        )
        self.parts: dict = {}  # name: what else a checkpoint holds, anything with state_dict and load_state_dict
        self.history: list[
            torch.Tensor
        ] = []  # the losses of the steps since the last progress line, on the device
        self.names: list[str] = []
        self.clock = None
        # scores of the loops that are done (STAL), and before the first round; kept in checkpoints
        self.scores: list[dict] = []
        self.before: dict | None = None

    def fresh_model(self) -> torch.nn.Module:
        """The network with the weights of --init, in train mode, the same in every process."""
        torch.manual_seed(mix_seed(self.s.seed, 0))
        model = deeplab.build(**self.network, init=self.s.init).to(self.device).train()
        if rank_and_world()[1] > 1:
            # every process has its own dropout
            torch.manual_seed(mix_seed(self.s.seed, 0, self.rank))
        return model

    def autocast(self):
        """The context of forward passes: bfloat16 under --precision bfloat16, else nothing."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.s.precision == "bfloat16"
        )

    def set_rate(self, factor: float) -> None:
        """Every group's rate for this step: --lr times the group's own factor (head: 10) times
        `factor`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.s.lr * group["factor"] * factor

    def log(self, step: int, losses: dict[str, torch.Tensor | float], more=dict) -> None:
        """After step `step` - 1: keeps its losses on the device; at every log step reads all of
        them, stops if any is not finite, prints and writes a line.

        `losses` are 0-dim tensors by name; what is a number was left out of this run and is not
        logged. `more()` gives further entries of the line in metrics.jsonl; it is called at log
        steps only.
        """
        there = {name: x for name, x in losses.items() if isinstance(x, torch.Tensor)}
        self.names = list(there)
        self.history.append(torch.stack([*there.values()]).detach())
        s = self.s
        if self.clock is None:
            self.clock = (step - 1, time.time())
        if step % s.log_every and step != s.steps:
            return
        values = self.finite_losses(step)
        self.history = []
        means = dict(zip(self.names, values.mean(0).tolist(), strict=True))
        rate = (step - self.clock[0]) / (time.time() - self.clock[1])
        eta = (s.steps - step) / rate
        memory = memory_in_use(self.device)
        line = {
            "step": step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "losses": means,
            "steps_per_s": rate,
            "memory_GB": memory,
            **more(),
        }
        self.write_metrics(line)
        text = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        if self.rank:
            return
        left = f"{int(eta // 60)}:{int(eta % 60):02d}"
        print(
            f"step {step}/{s.steps} | {text} | {rate:.2f} step/s, ETA {left}, peak {memory:.2f} GB",
            flush=True,
        )

    def finite_losses(self, step: int) -> torch.Tensor:
        """The losses since the last progress line, (n,L) on the host; raises FloatingPointError
        where one is not finite."""
        values = (
            torch.stack(self.history).cpu() if self.history else torch.empty(0, len(self.names))
        )
        if not values.isfinite().all():
            row = (~values.isfinite()).any(1).nonzero()[0].item()
            losses = dict(zip(self.names, values[row].tolist(), strict=True))
            where = step - len(values) + row + 1
            raise FloatingPointError(
                f"step {where}: a loss is not finite: {losses}; try a lower --lr"
            )
        return values

    def write_metrics(self, line: dict) -> None:
        if self.rank:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def scored(self) -> list[dict]:
        """The lines of metrics.jsonl that hold scores of the network, for a picture only."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        lines = [json.loads(line) for line in lines]
        return [line for line in lines if "mIoU19" in line]

    def save(self, step: int) -> None:
        """Writes checkpoints/last.pt: everything that the rest of the run depends on. Under a
        temporary name, then renamed."""
        # a network that is lost is never saved, and never asks an annotator
        self.finite_losses(step)
        if self.rank:
            return
        state = {
            "network": self.network,
            "step": step,  # the samplers' positions and the rounds to be read follow from it
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "names": self.names,
            "scores": self.scores,
            "before": self.before,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device)
            if self.device.type == "cuda"
            else None,
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        path = self.out / "checkpoints" / "last.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".incomplete"))
        os.replace(path.with_suffix(".incomplete"), path)

    def resume(self) -> int:
        """Restores checkpoints/last.pt where --resume asks for it; returns the step to go on from
        (0 without)."""
        path = self.out / "checkpoints" / "last.pt"
        if not self.s.resume:
            return 0
        if not path.is_file():
            print(f"{path}: no checkpoint yet, starting from the first step", flush=True)
            self.forget_after(0)
            return 0
        state = deeplab.read(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.names = [row.to(self.device) for row in state["history"]], state["names"]
        self.scores, self.before = state.get("scores", []), state.get("before")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        if self.rank == 0:
            torch.set_rng_state(state["random"])
        if self.rank == 0 and self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.forget_after(state["step"])
        if self.rank == 0:
            print(f"resumed from step {state['step']}", flush=True)
        return state["step"]

    def forget_after(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after `step`: they will be written again."""
        metrics = self.out / "metrics.jsonl"
        if self.rank or not metrics.is_file():
            return
        kept = []
        for line in metrics.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # a kill may cut the last line
                kept += [line] if json.loads(line)["step"] <= step else []
        metrics.write_text("".join(line + "\n" for line in kept))


def network_of(s) -> dict:
    """The arguments of deeplab.build that the settings ask for; a checkpoint keeps them."""
    batch_norm = s.batch_norm
    if batch_norm == "auto":
        batch_norm = "live" if s.init == "none" else "frozen"
    network = {"net": s.net, "backbone": s.backbone, "batch_norm": batch_norm}
    if s.net == "deeplabv3plus" and s.head == "stal":
        network |= {"aspp": "dense", "multi_grid": (2, 2, 4)}
    if s.strategy == "stal":
        network |= {"representation": 256 if s.contrast else 0, "auxiliary": s.auxiliary > 0}
    return network


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GB: of the device under CUDA, of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def code_version() -> str | None:
    """The commit of this package's checkout, '-dirty' when changed; None where it is not a git
    checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run_folder(s) -> Path:
    """--out, or its default."""
    return Path(s.out or f"runs/{s.strategy}-{s.src}-{s.tgt}-{s.seed}")


def prepare(s) -> Path:
    """Makes the run's folder and its config.json; refuses to mix two runs, or a resumed run with
    other settings."""
    out = run_folder(s)
    config = out / "config.json"
    if config.is_file():
        if not s.resume:
            raise InputError(
                f"{out} holds a run already: --resume goes on with it, another --out starts a new one"
            )
        old, new = json.loads(config.read_text())["settings"], dataclasses.asdict(s)
        processes = json.loads(config.read_text()).get("processes", 1)
        if processes != rank_and_world()[1]:  # steps, batches and loops depend on it
            raise InputError(
                f"{out} was started with {processes} processes; resume it with as many"
            )
        changed = [k for k in new if k not in MAY_CHANGE and old.get(k) != new[k]]
        if changed:
            what = ", ".join(
                f"--{k.replace('_', '-')} {old.get(k)!r} -> {new[k]!r}" for k in changed
            )
            raise InputError(
                f"{out} was started with other settings ({what}); resume with the same ones or use another --out"
            )
        return out
    out.mkdir(parents=True, exist_ok=True)
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    record = {
        "settings": dataclasses.asdict(s),
        "command": [sys.executable, *sys.argv],
        "processes": rank_and_world()[1],
        "versions": {"alda": code_version(), "python": platform.python_version(), **versions},
        "toy": s.root == "toy",
    }
    config.with_suffix(".incomplete").write_text(json.dumps(record, indent=1))
    os.replace(config.with_suffix(".incomplete"), config)
    return out
