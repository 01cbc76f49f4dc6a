"""Batches, checkpoints and resume, the log, the run's folder. What do all training loops share?

    from alda.run import Run, batches, next_batch, prepare
    run = Run(settings, out, device); start = run.resume()

A run leaves in its folder: config.json (settings, versions, command, what its data is),
metrics.jsonl (a line each log step), checkpoints/last.pt and previous.pt, and what its loop writes
(rounds/, pictures/, result.json). One process at a time writes there: it holds the lock of run.lock.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision

from alda import InputError, deeplab
from alda.datasets import (
    LOST_WORKERS,
    EndlessSampler,
    ImageCache,
    JointTransform,
    Mixture,
    SegmentationDataset,
    TrainingView,
    class_presence,
    load,
    mix_seed,
    normalise,
    read_json,
    write_atomic,
)
from alda.distributed import (
    all_gather_list,
    all_reduce_number,
    barrier,
    mean_over_processes,
    rank_and_world,
    say,
)
from alda.settings import MAY_CHANGE, QUERIES, default_folder
from alda.toy import is_toy

# what only a run writes: without a config.json beside it, nobody knows whose it is
TRACES = ("checkpoints", "rounds", "pseudo", "source", "metrics.jsonl", "result.json")


def batches(s, dataset: SegmentationDataset, step: int, stream: int, labels_of):
    """An endless iterator of [images (N,3,H,W) uint8, labels (N,H,W) uint8] from step `step` on.

    Under torchrun N is --batch over the processes: a step has the same samples, however many share
    them. `stream` 1 is the source, 2 the target: their sizes, their order (class-balanced for the
    source) and their seeds differ. `labels_of(index)` replaces the dataset's labels, see TrainingView.
    Raises InputError where there is no image, and where no source label holds a class.
    """
    presence = None
    if stream == 1 and s.source_sampling == "balanced":
        say(f"reading {len(dataset)} source labels: which image holds which class")
        presence = class_presence(dataset, s.workers)
    rank, world = rank_and_world()
    sampler = EndlessSampler(len(dataset), mix_seed(s.seed, stream), rank, world, presence)
    sampler.position = step * s.batch
    transform, cache = transform_of(s, stream), None
    if s.cache and transform.size and transform.scale == (1.0, 1.0):
        cache = ImageCache(Path(s.cache), dataset, transform.size, s.cache_gb * 1e9)
        if cache.count < len(dataset):
            say(
                f"--cache-gb {s.cache_gb:g} holds {cache.count} of {len(dataset)} {dataset.name} images"
            )
    view = TrainingView(dataset, transform, mix_seed(s.seed, stream, 1), labels_of, cache)
    return endless(s, view, sampler)


def endless(s, dataset, sampler: EndlessSampler):
    """The iterator over this process's batches of what `sampler` draws from `dataset`."""
    pinned = torch.cuda.is_available() and s.device != "cpu"
    size = s.batch // rank_and_world()[1]
    return iter(load(dataset, s.workers, batch_size=size, sampler=sampler, pin_memory=pinned))


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
    shuffled, from step `step` on; under torchrun as in `batches`. The views must give images of one
    size.
    """
    rank, world = rank_and_world()
    sampler = EndlessSampler(len(entries), seed, rank, world)
    sampler.position = step * s.batch
    return endless(s, Mixture(views, entries), sampler)


def next_batch(iterator, device):
    """The next [images (N,3,H,W) float32, labels, ...] on the device, or None where there is no
    iterator (source-only, source-free). Images that come as bytes are normalised there."""
    if iterator is None:
        return None
    images, *rest = (x.to(device, non_blocking=True) for x in next(iterator))
    return [normalise(images) if images.dtype == torch.uint8 else images, *rest]


class Run:
    """Network, optimizer, checkpoints and the log of one run: what every training loop needs and no
    method differs in."""

    def __init__(self, s, out: Path, device: torch.device):
        self.s, self.out, self.device = s, out, device
        self.rank, world = rank_and_world()
        self.half = s.precision == "bfloat16" or (s.precision == "auto" and has_bfloat16(device))
        self.network = network_of(s)
        check_images_a_pass(s, self.network, device)
        self.model = self.fresh_model()
        if world > 1 and device.type == "cuda":
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if s.checkpointing:
            deeplab.checkpoint_blocks(self.model)
        if s.compile:
            self.model.compile()
        # what training calls; under torchrun it averages the gradients
        self.forward: torch.nn.Module = self.model
        if world > 1:
            ids = [device.index] if device.type == "cuda" else None
            parallel = torch.nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters
            sync = "forward_sync_buffers" if renamed else "broadcast_buffers"
            self.forward = parallel(self.model, device_ids=ids, **{sync: False})
        self.optimizer = torch.optim.SGD(
            deeplab.parameter_groups(self.model, s.lr),
            lr=s.lr,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            fused=device.type == "cuda" or None,
        )
        self.parts: dict = {}  # name: what else a checkpoint holds, anything with state_dict and load_state_dict
        # the losses of the steps since the last progress line, on the device
        self.history: list[torch.Tensor] = []
        self.names: list[str] = []
        self.lines = 0  # of metrics.jsonl
        # when the present step began; steps since the last progress line, and their seconds
        self.clock, self.timed, self.spent = 0.0, 0, 0.0
        self.began, self.earlier = time.time(), 0.0  # of this process; seconds of earlier ones
        # scores of the loops that are done (STAL), and before the first round; kept in checkpoints
        self.scores: list[dict] = []
        self.before: dict | None = None

    def fresh_model(self) -> torch.nn.Module:
        """The network with the weights of --init, in train mode, the same in every process."""
        torch.manual_seed(mix_seed(self.s.seed, 0))
        model = deeplab.build(**self.network, init=self.s.init).to(self.device).train()
        if self.half:  # the layout that bfloat16 units read
            model = model.to(memory_format=torch.channels_last)
        if rank_and_world()[1] > 1:
            # every process has its own dropout
            torch.manual_seed(mix_seed(self.s.seed, 0, self.rank))
        return model

    def autocast(self):
        """The context of forward passes: bfloat16 where the run has it, else nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def set_rate(self, factor: float) -> None:
        """Every group's rate for this step: --lr times the group's own factor (head: 10) times
        `factor`. The step has begun: signals wait for its end, see Stop."""
        STOP.unsaved = True
        self.clock = time.time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.s.lr * group["factor"] * factor

    def micro_batches(self, *batches):
        """Yields the step's batches in --accumulate equal parts, a tuple each, None where there is no
        batch; the caller adds up the parts' gradients. Processes exchange them with the last."""
        n = self.s.accumulate
        cut = []
        for batch in batches:
            there = [x.chunk(n) for x in batch or ()]
            cut.append([*zip(*there, strict=True)] if there else [None] * n)
        for i, part in enumerate(zip(*cut, strict=True)):
            several = isinstance(self.forward, torch.nn.parallel.DistributedDataParallel)
            with self.forward.no_sync() if several and i < n - 1 else nullcontext():
                yield part

    def log(self, step: int, *losses: dict[str, torch.Tensor | float], more=dict) -> None:
        """After step `step` - 1: keeps its losses on the device; at every log step reads all of
        them, stops if any is not finite, prints and writes a line.

        `losses` are 0-dim tensors by name, of each part of the step; what is a number was left out of
        this run and is not logged. `more()` gives further entries of the line in metrics.jsonl; it is
        called at log steps only.
        """
        self.names = [name for name, x in losses[0].items() if isinstance(x, torch.Tensor)]
        rows = [torch.stack([part[name] for name in self.names]).detach() for part in losses]
        self.history.append(rows[0] if len(rows) == 1 else torch.stack(rows).mean(0))
        s = self.s
        self.timed += 1
        every = min(s.log_every, max(2, s.steps // 10))  # short runs show their first steps, too
        due = step % every == 0 or step == s.steps
        values = self.finite_losses(step) if due else None  # waits for the device
        self.spent += time.time() - self.clock
        if not due:
            return
        self.history = []
        means = dict(zip(self.names, values.mean(0).tolist(), strict=True))
        rate = self.timed / self.spent  # of steps alone: queries and scores are not in it
        self.timed, self.spent = 0, 0.0
        eta = (s.steps - step) / rate
        memory = memory_in_use(self.device)
        line = {
            "step": step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "losses": means,
            "steps_per_s": rate,
            "memory_GB": memory,
            "wall_s": self.wall_s(),
            **more(),
        }
        self.write_metrics(line)
        text = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        left = f"{int(eta // 60)}:{int(eta % 60):02d}"
        say(f"step {step}/{s.steps} | {text} | {rate:.2f} step/s, ETA {left}, peak {memory:.2f} GB")

    def wall_s(self) -> float:
        """The seconds that the run has taken so far: of this process, and of those before it up to the line
        of the log that it went on from."""
        return self.earlier + time.time() - self.began

    def finite_losses(self, step: int) -> torch.Tensor:
        """The losses since the last progress line, (n,L) on the host, their mean over the processes;
        raises FloatingPointError where one is not finite."""
        values = torch.empty(0, len(self.names))
        if self.history:
            values = mean_over_processes(torch.stack(self.history))
            self.history = [*values]
            values = values.cpu()
        if not values.isfinite().all():
            row = (~values.isfinite()).any(1).nonzero()[0].item()
            losses = dict(zip(self.names, values[row].tolist(), strict=True))
            where = step - len(values) + row + 1
            raise FloatingPointError(
                f"step {where}: a loss is not finite: {losses}; try a lower --lr"
            )
        return values

    def write_metrics(self, line: dict) -> None:
        """Adds a line to metrics.jsonl. Raises InputError where it cannot be written."""
        if self.rank:
            return
        check_folder(self.out)
        path = self.out / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}): is the disk full? make room and go "
                "on with --resume"
            ) from None
        self.lines += 1

    def save(self, step: int) -> None:
        """Writes checkpoints/last.pt: everything that the rest of the run depends on. Under a
        temporary name, then renamed; the one before is kept as previous.pt. Raises InputError where
        it cannot be written, and Stopped where a signal has asked for it."""
        # a network that is lost is never saved, and never asks an annotator
        self.finite_losses(step)
        state = self.state(step)
        if self.rank == 0:
            check_folder(self.out)
            path = self.out / "checkpoints" / "last.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            work = path.with_name("next.pt")
            write_atomic(work, lambda file: torch.save(state, file))
            if path.is_file():
                os.replace(path, path.with_name("previous.pt"))
            os.replace(work, path)
        STOP.at_checkpoint()

    def stop_if_asked(self, step: int) -> None:
        """The end of a step: after a SIGTERM or SIGUSR1 saves and raises Stopped. Several processes
        agree on it, every tenth step."""
        asked = STOP.signal
        if rank_and_world()[1] > 1:
            asked = step % 10 == 0 and all_reduce_number(int(asked > 0))
        if asked:
            self.save(step)
            barrier()
            raise Stopped

    def state(self, step: int) -> dict:
        """What a checkpoint holds: tensors and plain values. Collective."""
        owned = all_gather_list([self.own()])
        return {
            "network": self.network,
            "run": run_identity(self.s),
            "step": step,  # the samplers' positions and the rounds to be read follow from it
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "names": self.names,
            "scores": self.scores,
            "lines": self.lines,
            "before": self.before,
            **{name: part.state_dict() for name, part in self.parts.items()},
            **owned[0],
            "others": owned[1:],
        }

    def buffers(self) -> list[torch.Tensor]:
        """The running statistics of the networks: on CPUs each process has its own."""
        modules = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        return [buffer for module in (self.model, *modules) for buffer in module.buffers()]

    def own(self) -> dict:
        """What of a checkpoint is this process's own, on the CPU: the first one's stands in the
        checkpoint itself, those of the others in its "others"."""
        on_cuda = self.device.type == "cuda"
        parts = {}
        for name in [name for name in ("images", "partners") if name in self.parts]:
            items = self.parts[name].state_dict().items()
            parts[name] = {k: v.cpu() if torch.is_tensor(v) else v for k, v in items}
        return {
            "history": [row.cpu() for row in self.history],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "buffers": [buffer.cpu() for buffer in self.buffers()],
            **parts,
        }

    def resume(self) -> int:
        """Restores checkpoints/last.pt where --resume asks for it; returns the step to go on from
        (0 without). A damaged one falls back to previous.pt with a line; InputError where both are
        damaged, or of another run."""
        if not self.s.resume:
            return 0
        path, state = self.newest()
        if state is None:
            say(f"{path}: no checkpoint yet, starting from the first step")
            self.forget_after(0)
            return 0
        try:
            step, lines = self.restore(state), state["lines"]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{path}: is no checkpoint of this run ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:160]}); restore the run's own, or use another --out"
            ) from None
        self.forget_after(step)
        if self.rank == 0 and self.lines < lines:
            print(
                f"warning: {self.out / 'metrics.jsonl'}: {lines - self.lines} of {lines} lines before "
                f"step {step} are lost; the log has a gap, the run not",
                flush=True,
            )
            self.lines = lines
        say(f"resumed from step {step}")
        return step

    def newest(self) -> tuple[Path, dict | None]:
        """(file, content) of the newest checkpoint that can be read, None where there is none yet. A
        damaged last.pt becomes a copy of previous.pt."""
        last = self.out / "checkpoints" / "last.pt"
        previous = last.with_name("previous.pt")
        if not last.is_file() and not previous.is_file():
            return last, None
        try:
            return last, deeplab.read(last)
        except InputError as error:
            if not previous.is_file():
                raise
            say(f"{error}; going on from {previous}")
        state = deeplab.read(previous)
        if self.rank == 0:  # the next save would put the damaged file in the place of the good one
            write_atomic(last, previous.read_bytes())
        return previous, state

    def restore(self, state: dict) -> int:
        """Takes over the content of a checkpoint; returns its step. Raises ValueError or what torch
        raises where it does not fit."""
        step = state["step"]
        if state["run"] != run_identity(self.s):
            raise ValueError("its run had other settings")
        if type(step) is not int or not 0 <= step <= self.s.steps:
            raise ValueError(f"it is of step {step!r}, the run has {self.s.steps}")
        self.model.load_state_dict(state["model"])
        self.load_optimizer(state["optimizer"])
        own = state
        if self.rank:
            own = state | state["others"][self.rank - 1]
        self.history, self.names = [row.to(self.device) for row in own["history"]], state["names"]
        self.scores, self.before = state["scores"], state["before"]
        for name, part in self.parts.items():
            part.load_state_dict(own[name])
        if self.rank:
            for buffer, kept in zip(self.buffers(), own["buffers"], strict=True):
                buffer.copy_(kept)
        torch.set_rng_state(own["random"])
        if self.device.type == "cuda" and own["random_cuda"] is not None:
            torch.cuda.set_rng_state(own["random_cuda"], self.device)
        return step

    def load_optimizer(self, state: dict) -> None:
        """Takes over an optimizer's state that another device may have saved: momentum comes into the
        memory layout of its parameter, and SGD is fused where it is here."""
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["fused"] = self.device.type == "cuda" or None
        for parameter, kept in self.optimizer.state.items():
            if kept.get("momentum_buffer") is not None:
                moved = torch.empty_like(parameter).copy_(kept["momentum_buffer"])
                kept["momentum_buffer"] = moved

    def forget_after(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after `step`: they will be written again."""
        metrics = self.out / "metrics.jsonl"
        if self.rank or not metrics.is_file():
            return
        kept = []
        for text in metrics.read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a kill may cut the last line
                line = json.loads(text)
                if line["step"] <= step:
                    kept.append(text)
                    self.earlier = line.get("wall_s", self.earlier)
        write_atomic(metrics, "".join(text + "\n" for text in kept))
        self.lines = len(kept)


def run_identity(s) -> str:
    """A sum over the settings that a run and its resumption share: a checkpoint knows its run.
    --init is left out: the network that CBST starts from lies in the run's folder, which may
    move."""
    fields = dataclasses.asdict(s).items()
    shared = {k: v for k, v in fields if k not in (*MAY_CHANGE, "init")}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------- signals, memory


class Stopped(BaseException):
    """A SIGTERM or SIGUSR1 was obeyed: everything is saved."""


class Stop:
    """SIGTERM and SIGUSR1 end a run where nothing is lost: at once while everything is saved (a
    round that is being asked begins again), else after the step, which saves.

    Under torchrun a process that leaves alone would let the others wait: all leave together, see
    Run.stop_if_asked.
    """

    def __init__(self):
        self.signal, self.unsaved = 0, False

    def __call__(self, number: int, frame) -> None:
        """The signals' handler."""
        self.signal = number
        if not self.unsaved and rank_and_world()[1] == 1:
            raise Stopped

    def at_checkpoint(self) -> None:
        """Everything is saved: raises Stopped where a signal has waited for it."""
        self.unsaved = False
        if self.signal and rank_and_world()[1] == 1:
            raise Stopped

    @contextmanager
    def listening(self):
        """While inside, the signals are obeyed (in the main thread; elsewhere they cannot be)."""
        self.signal, self.unsaved = 0, False
        numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1") if hasattr(signal, n)]
        main = threading.current_thread() is threading.main_thread()
        before = {n: signal.signal(n, self) for n in numbers} if main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


STOP = Stop()


def resume_line(out: Path) -> str:
    """The command that goes on with the run in `out`."""
    return f"{started_with(out)} --resume --out {shlex.quote(str(out))}"


def started_with(out: Path) -> str:
    """The command without options that began the run in `out`, as its config.json says: python, or
    torchrun with as many processes and machines; a script, which may have brought a score of its
    own, else -m alda.loop."""
    processes = here = 1
    try:
        record = read_json(out / "config.json", "command")
        script, processes = Path(record["command"][1]), record.get("processes", 1)
        here = record.get("processes_here", processes)
    except (InputError, LookupError, TypeError):  # the command that runs now
        script = Path(sys.argv[0])
    own = script.suffix == ".py" and script.is_file() and script.name != "__main__.py"
    own = own and script.resolve().parent != Path(__file__).resolve().parent
    machines = f"--nnodes {processes // here} " if processes > here else ""
    python = "python" if processes == 1 else f"torchrun {machines}--nproc_per_node {here}"
    return f"{python} {shlex.quote(str(script)) if own else '-m alda.loop'}"


@contextmanager
def one_line_errors(
    smaller="start with another --out and a smaller --batch, --crop, --source-size or --target-size "
    "(in a query or score: smaller photographs), or go on with --resume where there is more",
):
    """Turns what torch raises when memory or a loading process is lost, anywhere in a loop, into
    InputError; `smaller` is what to do where memory is short. And where live batch norm is left a
    single value: check_images_a_pass knows the number of images, not their size in the network."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:160]
        if "more than 1 value per channel" in text:
            raise InputError(
                "live batch norm is left one value, of one image that the network shrinks to a pixel: "
                "give a larger --batch, --crop, --source-size or --target-size, or --batch-norm frozen"
            ) from None
        words = ("allocate memory", "out of memory", "ALLOC_FAILED")
        if isinstance(error, MemoryError) or any(word in text for word in words):
            raise InputError(f"out of memory ({text}); {smaller}") from None
        if any(part in text for part in ("closed by peer", "Connection reset", "NCCL")):
            raise InputError(
                f"another process of this job was lost ({text}); go on with --resume (torchrun "
                "--max_restarts N ... --resume does it by itself)"
            ) from None
        if any(part in text for part in LOST_WORKERS):  # torch may say so in the middle of a step
            raise InputError(
                f"a loading process was lost ({text}); go on with --resume and fewer --workers"
            ) from None
        raise


def network_of(s) -> dict:
    """The arguments of deeplab.build that the settings ask for, and what the weights of a file in
    --init need beside them; a checkpoint keeps them."""
    from_file = s.init not in ("imagenet", "none")
    start = deeplab.network_in(deeplab.read(s.init), s.init) if from_file else {}
    batch_norm = s.batch_norm
    if batch_norm == "auto":
        live = s.init == "none" or s.backbone == "mobilenet_v2"
        batch_norm = start.get("batch_norm", "live" if live else "frozen")
    network = {"net": s.net, "backbone": s.backbone, "batch_norm": batch_norm}
    network |= {name: start[name] for name in ("stem", "caffe", "multi_grid") if name in start}
    if s.net == "deeplabv3plus" and s.head == "stal":
        network["aspp"] = "dense"
        if s.backbone != "mobilenet_v2":
            network["multi_grid"] = (2, 2, 4)
    if s.strategy == "stal":
        network |= {"representation": 256 if s.contrast else 0, "auxiliary": s.auxiliary > 0}
    return network


def check_images_a_pass(s, network: dict, device: torch.device) -> None:
    """Raises InputError, before anything is asked or trained, where DeepLabV3+ with live batch norm
    would see a single image: it normalises the mean over each image by those of the others, on GPUs
    of all processes (SyncBatchNorm)."""
    if network["net"] != "deeplabv3plus" or network["batch_norm"] != "live":
        return
    processes, parts = rank_and_world()[1], s.parts
    images = s.batch // (processes * parts)
    both = s.strategy in ("full", *QUERIES) and not s.source_free
    if both and (s.crop or s.source_hw == s.target_hw):  # source and target pass together
        images *= 2
    if device.type == "cuda":
        images *= processes
    if images < 2:
        raise InputError(
            f"--batch {s.batch} in {processes} processes and --accumulate {parts} parts is one image a "
            f"pass, DeepLabV3+ with live batch norm needs 2: give --batch {2 * processes * parts}"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16: without, it is emulated, many times slower than
    float32."""
    if device.type == "cuda":  # torch's own question says yes to emulation, too
        return torch.cuda.get_device_capability(device)[0] >= 8
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, n, bool)() for n in names)


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GB: of the device under CUDA, of the process otherwise; NaN where the system does
    not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def code_version() -> str | None:
    """The commit of this package's checkout, '-dirty' when changed; None where the package does not
    lie at the top of a git checkout that tracks it (another project's commit says nothing)."""
    folder = Path(__file__).resolve().parent
    outside = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10, env=outside
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.parent:
            return None
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------------------- the run's folder


HELD: dict[Path, int] = {}  # the locks of this process: file and descriptor


def _let_go() -> None:
    """In a forked process: the locks are its parent's, and end with it."""
    for descriptor in HELD.values():
        os.close(descriptor)
    HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(out: Path):
    """Makes the run's folder and holds its lock: no other process writes there. The kernel frees it
    when the process ends, however it ends. Gives the folders that were made, `out` first. Raises
    InputError where another process holds it, or the folder cannot be made."""
    path = out / "run.lock"
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written to ({error.strerror}); change its rights, or give another (--out)"
        ) from None
    try:
        take_lock(descriptor, out)
        HELD[path] = descriptor
        check_folder(out)  # the file may be one that a start which failed has just removed
        yield made
    finally:
        HELD.pop(path, None)
        os.close(descriptor)


def leave_nothing(out: Path, made: list[Path]) -> None:
    """After a start that failed, while it holds the lock: removes run.lock where nothing else lies in
    the folder, and of the folders that were `made` those that are empty."""
    with suppress(OSError):
        if [path.name for path in out.iterdir()] == ["run.lock"]:
            (out / "run.lock").unlink()
            for folder in made:
                folder.rmdir()


def take_lock(descriptor: int, out: Path) -> None:
    """Locks an open run.lock; where the system or the file system has no such locks, a line says
    so."""
    try:
        import fcntl
    except ImportError:
        print(f"{out}: this system has no file locks: start one process in it only", flush=True)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{out}: another process is running in it; wait for its end, or give another --out"
        ) from None
    except OSError as error:
        print(f"{out}: cannot be locked ({error.strerror}): start one process in it", flush=True)


def check_folder(out: Path) -> None:
    """Raises InputError where the run's folder was removed, or another made in its place."""
    path = out / "run.lock"
    try:
        if path in HELD:
            there = os.path.samestat(os.stat(path), os.fstat(HELD[path]))
        else:
            there = out.is_dir()
    except OSError:
        there = False
    if not there:
        raise InputError(
            f"{out}: was removed or replaced meanwhile; nothing more is written to it, start anew, "
            "perhaps with another --out"
        )


def run_folder(s) -> Path:
    """--out, or its default."""
    return Path(s.out or default_folder(dataclasses.asdict(s)))


def prepare(s, out: Path) -> None:
    """Makes config.json in the run's folder `out`; refuses to mix two runs, or a resumed run with
    other settings, and a folder whose files no config.json explains (InputError)."""
    config = out / "config.json"
    if config.is_file():
        check_same_run(s, out)
        return
    if foreign := [name for name in TRACES if (out / name).exists()]:
        raise InputError(
            f"{out} holds {', '.join(foreign)} but no config.json: nobody knows of which run; restore "
            "config.json, or give another --out"
        )
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    root = s.root if s.root == "toy" else str(Path(s.root).absolute())
    processes = rank_and_world()[1]
    here = os.environ.get("LOCAL_WORLD_SIZE", "") if processes > 1 else ""
    record = {
        "settings": {**dataclasses.asdict(s), "root": root},
        "command": [sys.executable, *sys.argv],
        "processes": processes,
        "processes_here": int(here) if here.isdigit() else processes,  # on each machine
        "versions": {"alda": code_version(), "python": platform.python_version(), **versions},
        "toy": is_toy(s.root),
    }
    write_atomic(config, json.dumps(record, indent=1))


def check_same_run(s, out: Path) -> None:
    """Raises InputError where the run in `out` may not go on with these settings."""
    if not s.resume:
        raise InputError(
            f"{out} holds a run already: --resume goes on with it, another --out starts a new one"
        )
    record = read_json(out / "config.json", "settings")
    old, new = record["settings"], dataclasses.asdict(s)
    if not isinstance(old, dict):
        raise InputError(f"{out / 'config.json'}: 'settings' is no object; restore it from a copy")
    processes = record.get("processes", 1)
    if processes != rank_and_world()[1]:  # steps, batches and loops depend on it
        raise InputError(f"{out} was started with {processes} processes; resume it with as many")
    changed = [k for k in new if k not in MAY_CHANGE and old.get(k) != new[k]]
    begun_from, init = old.get("init"), s.init
    if "init" in changed and not {begun_from, init} & {"imagenet", "none"}:
        say(f"note: {out} began from {begun_from}, --init {init} is taken for the same file")
        changed.remove("init")
    if init not in ("imagenet", "none") and not Path(init).is_file():
        raise InputError(
            f"{init}: the file that {out} began from is not there; was it moved? --resume --init FILE"
        )
    if changed:
        what = ", ".join(f"--{k.replace('_', '-')} {old.get(k)!r} -> {new[k]!r}" for k in changed)
        raise InputError(
            f"{out} was started with other settings ({what}); resume with the same ones or use another --out"
        )


def remember_data(out: Path, **parts: SegmentationDataset | None) -> None:
    """Writes into config.json which images the run is about; InputError where a resumed run finds
    others.

    `parts` are source, target and validation, None for one that the run does not read; source and
    validation must have labels. Without a config.json (loops called from code) nothing is kept.
    """
    config = out / "config.json"
    parts = {name: data for name, data in parts.items() if data is not None}
    for name in parts.keys() & {"source", "validation"}:
        parts[name].check_labelled()
    if rank_and_world()[0] or not config.is_file():
        return
    record = read_json(config)
    known, now = record.get("data", {}), {n: data.fingerprint() for n, data in parts.items()}
    for name, found in now.items():
        before = known.get(name, found) if isinstance(known, dict) else None
        before = before if isinstance(before, dict) else {}
        if before.get("sha256") == found["sha256"]:
            continue
        if before.get("sha256_without_photographs") == found["sha256_without_photographs"]:
            print(
                f"warning: {parts[name].name}: photographs of the {name} have changed since {out} was "
                "started; their names, sizes and labels are the same",
                flush=True,
            )
        else:
            images = before.get("images")
            raise InputError(
                f"{out} was started with other data: its {name} had {images} images, now "
                f"{parts[name].name} has {found['images']}, or others: images of other names or sizes, "
                "other labels; give the --root it was started with, or another --out"
            )
    if known != now:
        write_atomic(config, json.dumps({**record, "data": {**known, **now}}, indent=1))
