"""A step of STAL at 769x769, 2 + 2 images, 19 classes: does it wait for the device, and what does its
contrastive part cost?

    python -m tests.benchmarks.stal_step                          # ResNet-18 on a CPU, ResNet-101 on a GPU
    python -m tests.benchmarks.stal_step --backbone resnet101

First the profiler looks at a whole step of the loop (mixing, teacher, student, three losses, optimizer,
averages) for operations that hand a value of the device to the host: on a GPU each of them would wait for
all work that is queued (one cudaEventSynchronize is expected there: the read of what the step before
drew, see alda/stal.py). Then the contrastive loss with the memory bank on the device runs in turn with a
plain version that keeps the bank as tensors on the host, from the same random numbers: gap, medians,
memory.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from alda import loop, toy
from alda.losses import MemoryBank, contrastive, contrastive_keys, contrastive_sets
from alda.settings import settings_for

CLASSES, SIZE = 19, 769
WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
         "aten::_unique2", "aten::equal", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
         "cudaMemcpy")  # fmt: skip


class Enough(Exception):
    """Ends a run of the loop after the steps that are measured."""


def measure_steps(folder: str, backbone: str, device: torch.device, runs: int):
    """Runs loop.train_stal on one batch of the benchmark's sizes: (profile of the fourth step, the first
    that mixes with a full bank; seconds of each of the `runs` steps after it)."""
    toy.write(folder, counts=toy.SMALL)
    given = {"root": folder, "init": "none", "backbone": backbone, "batch": 2, "workers": 0}
    s = settings_for(
        {
            "strategy": "stal",
            "steps": 60,
            "contrast_start": 0.0,
            "budget": 0.5,
            "rounds": 2,
            **given,
        }
    )
    batch = example_batch(device)
    endless = [itertools.repeat(part) for part in (batch[:2], batch[:2], batch[2:])]
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    recorder, marks = profile(activities=kinds), []

    def after_step(run, step, *_):
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        if step == 3:
            run.parts["bank"].count.copy_(run.parts["bank"].sizes)  # full, as after some epochs
            run.parts["bank"].keys.normal_()
            recorder.start()
        if step == 4:
            recorder.stop()
        if step == 4 + runs:
            raise Enough

    patches = {
        "loop_batches": lambda *_: endless,
        "ask_images": lambda *_: None,
        "note_before": lambda *_: None,
    }
    with (
        mock.patch.multiple(loop, **patches),
        mock.patch.object(loop.Run, "log", after_step),
        contextlib.suppress(Enough),
    ):
        loop.train_stal(s, Path(folder) / "run", device)
    return recorder, [later - sooner for sooner, later in itertools.pairwise(marks[3:])]


def waits(recorded) -> dict[str, int]:
    """How often the recorded work handed a value of the device to the host, by operation."""
    return {e.key: e.count for e in recorded.key_averages() if e.key in WAITS}


def example_batch(device) -> list[torch.Tensor]:
    """Images, labels, unlabelled images, their truth, their index; labels in blocks, as streets are."""
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 3, SIZE, SIZE, generator=g) for _ in range(2)]
    blocks = [torch.randint(CLASSES, (2, 1, 40, 40), generator=g).float() for _ in range(2)]
    labels = [F.interpolate(b, (SIZE, SIZE))[:, 0].to(torch.uint8) for b in blocks]
    return [
        x.to(device) for x in (images[0], labels[0], images[1], labels[1], torch.tensor([0, 1]))
    ]


def plain_contrastive(
    features, teacher_features, sets, bank: list[torch.Tensor], sizes, draws, keys=1024
):
    """STAL Eq. (4) written down directly, class by class, the bank a list of tensors on the host."""
    members, pool, strangers = sets
    flat = features.permute(0, 2, 3, 1).flatten(0, 2)  # (P,K)
    teacher = teacher_features.permute(0, 2, 3, 1).flatten(0, 2)
    total, present = (
        torch.zeros((), device=features.device),
        [c for c in range(CLASSES) if members[c].any()],
    )
    for c in range(CLASSES):
        new = strangers[c].nonzero()[:, 0]
        if len(new) > keys:
            new = new[torch.arange(keys, device=new.device) * len(new) // keys]
        bank[c] = torch.cat([bank[c], teacher[new].cpu()])[-sizes[c] :]
    for c in present:
        anchors = pool[c].nonzero()[:, 0]
        if len(anchors) == 0 or len(bank[c]) == 0 or len(present) < 2:
            continue
        positive = F.normalize(teacher[members[c]].mean(0), dim=0)
        z = F.normalize(flat[anchors[(draws[0][c] * len(anchors)).long()]], dim=1)  # (A,K)
        negatives = bank[c][(draws[1][c].cpu() * len(bank[c])).long()].to(z.device)  # (A,M,K)
        similarity = (
            torch.cat(
                [(z @ positive)[:, None], (z[:, None] * F.normalize(negatives, dim=-1)).sum(-1)], 1
            )
            / 0.5
        )
        total = total + F.cross_entropy(
            similarity, torch.zeros(len(z), dtype=torch.int64, device=z.device)
        )
    return total / max(1, len(present))


def contrastive_inputs(device):
    """Features (2,256,193,193), probabilities and the sets of every class."""
    g, h = torch.Generator().manual_seed(1), (SIZE + 3) // 4
    features, teacher = (torch.randn(2, 256, h, h, generator=g).to(device) for _ in range(2))
    prob = (
        F.interpolate(4 * torch.randn(2, CLASSES, 25, 25, generator=g), (h, h), mode="bilinear")
        .softmax(1)
        .to(device)
    )
    labels = prob.argmax(1).to(torch.uint8)
    uncertainty = torch.special.entr(prob).sum(1)
    masks = [uncertainty <= uncertainty.quantile(0.2), uncertainty >= uncertainty.quantile(0.8)]
    return features.requires_grad_(), teacher, contrastive_sets(prob, labels, *masks, labelled=1)


def compare_contrastive(device: torch.device, runs: int) -> None:
    """Ours and the plain version in turn; prints gap, medians and what the banks hold."""
    features, teacher, sets = contrastive_inputs(device)
    ours, plain_bank = (
        MemoryBank(CLASSES, 256, device=device),
        [torch.empty(0, 256) for _ in range(CLASSES)],
    )
    sizes, times, gaps = ours.sizes.tolist(), [], []
    for c in range(CLASSES):  # both banks full, of the same keys
        plain_bank[c] = torch.randn(sizes[c], 256, generator=torch.Generator().manual_seed(c))
        start = ours.start[c].item()
        ours.keys[start : start + sizes[c]] = plain_bank[c].to(device)
        ours.count[c] = sizes[c]
    for number in range(runs + 1):
        g = torch.Generator(device).manual_seed(number)
        draws = (
            torch.rand(CLASSES, 256, generator=g, device=device),
            torch.rand(CLASSES, 256, 50, generator=g, device=device),
        )

        def ours_step(draws=draws):
            ours.add(*contrastive_keys(teacher, sets[2], ours.most))
            return contrastive(features, teacher, sets, ours, draws=draws)

        plain = partial(plain_contrastive, features, teacher, sets, plain_bank, sizes, draws)
        both = (ours_step, plain)
        row, losses, gradients = [], [], []
        for function in both:
            features.grad = None
            began = time.perf_counter()
            loss = function()
            loss.backward()
            losses.append(loss.item())  # waits
            row.append(time.perf_counter() - began)
            gradients.append(features.grad.clone())
        gaps.append((abs(losses[0] - losses[1]), (gradients[0] - gradients[1]).abs().max().item()))
        times.append(row)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        both[1]()
    medians = [statistics.median(t[i] for t in times[1:]) for i in (0, 1)]
    print(f"contrastive loss forward and backward, banks full: ours {medians[0] * 1e3:.0f} ms, bank on the host "
          f"{medians[1] * 1e3:.0f} ms, ratio {medians[1] / medians[0]:.1f}, n={runs}; gap of the loss "
          f"{max(g[0] for g in gaps):.1e}, of the gradient {max(g[1] for g in gaps):.1e}")  # fmt: skip
    print(f"ours holds {ours.keys.numel() * 4 / 1e6:.0f} MB on the device; host to device at each step: ours 0 MB, the other "
          f"{CLASSES * 256 * 50 * 256 * 4 / 1e6:.0f} MB at most, and it would "
          f"wait {sum(waits(recorded).values())} times")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", help="[resnet101 on a GPU, else resnet18]")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    backbone = args.backbone or ("resnet101" if device.type == "cuda" else "resnet18")
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{where}, torch {torch.__version__}, {backbone}, {SIZE}x{SIZE}, 2 + 2 images, {CLASSES} classes"
    )
    with tempfile.TemporaryDirectory() as folder:
        recorded, times = measure_steps(folder, backbone, device, args.runs)
    print(f"operations in a step that would wait for the device: {waits(recorded) or 'none'}")
    peak = ""
    if device.type == "cuda":
        peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    print(f"a step: {statistics.median(times):.2f} s (n={args.runs}){peak}")
    compare_contrastive(device, args.runs)


if __name__ == "__main__":
    main()
