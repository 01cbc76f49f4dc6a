"""Speed of a step, a query round, a pseudo-label pass and the loader: our defaults against the plain version, in turn.

    python -m tests.benchmarks.speed --sizes toy                        # a CPU, minutes
    python -m tests.benchmarks.speed --sizes papers --device cuda       # ResNet-101 at the papers' sizes
    python -m tests.benchmarks.speed --sizes toy --parts loader --decode 2048x1024

Plain is float32, contiguous, float images, and a wait for the device in every step. Both run in one process, one after the
other, --runs times; medians and their ratio. FLOPs are counted (torch.utils.flop_counter); the peak is that of a large matrix
product on the same device, in the precision of the default. "waiting" is the share of a step's time in which the next batch
was waited for. Images are noise in the sizes of Cityscapes; the loader's files are PNGs of the miniature world's painter.
"""

import argparse
import copy
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from alda import acquisition, toy
from alda.datasets import (
    ImageCache,
    JointTransform,
    TrainingView,
    load,
    normalise,
    open_dataset,
    parse_size,
    read_image,
    resize_image,
)
from alda.deeplab import DilatedDepthwise, upsample
from alda.evaluation import network_logits
from alda.loop import forward_both, losses_of_queries
from alda.losses import (
    MemoryBank,
    class_centres,
    class_contrast,
    contrastive,
    cross_entropy,
    pick,
    places,
)
from alda.run import Run, batches, next_batch
from alda.selftraining import ConfidenceHistogram, cbst_pseudo_labels, update_teacher
from alda.settings import settings_for
from alda.stal import plain_logits, supervised_loss, train_mode, unlabelled_loss

SIZES = {
    "papers": {
        "net": "deeplabv2", "backbone": "resnet101", "source_size": "1280x720", "target_size": "1280x640",
        "crop": "769x769", "image": (1024, 2048),
    },
    "toy": {
        "net": "deeplabv2", "backbone": "resnet18", "source_size": "160x90", "target_size": "160x80",
        "crop": "97x97", "image": (128, 256),
    },
}  # fmt: skip


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(name: str, ours, plain, args, images: int, flops: float = 0.0) -> None:
    """Prints medians of both, in turn, and the ratio."""
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(args.runs + 1):  # the first is not counted
        for key, call in (("ours", ours), ("plain", plain)):
            wait(args.device)
            began = time.perf_counter()
            call()
            wait(args.device)
            if turn:
                times[key].append(time.perf_counter() - began)
    mine, other = (statistics.median(times[key]) for key in ("ours", "plain"))
    share = (
        f"{flops / mine / 1e12:.3f} TFLOP/s, {flops / mine / args.peak:.0%} of the peak"
        if flops
        else ""
    )
    memory = ""
    if args.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
        torch.cuda.reset_peak_memory_stats()
    print(
        f"| {name} | {1e3 * mine:.1f} ms, {images / mine:.2f} images/s | {1e3 * other:.1f} ms | "
        f"{other / mine:.2f} | {share} | {memory} |",
        flush=True,
    )


def peak(device, half: bool) -> float:
    """FLOP/s of a large matrix product."""
    n, kind = (
        (8192, torch.bfloat16 if half else torch.float32)
        if device.type == "cuda"
        else (1500, torch.float32)
    )
    a, times = torch.randn(n, n, device=device, dtype=kind), []
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        a @ a
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def run_of(args, strategy: str, precision: str, **more) -> Run:
    """A run's network and optimizer, random weights, live batch norm."""
    sizes = {k: v for k, v in SIZES[args.sizes].items() if k != "image"}
    given = {"strategy": strategy, "init": "none", "precision": precision, **sizes, **more}
    if strategy != "stal":
        del given["crop"]
    return Run(settings_for(given), Path("."), args.device)


def noise(n: int, size, device, kind=torch.uint8):
    """[images (n,3,H,W), labels (n,H,W)]."""
    images = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)
    images = images if kind == torch.uint8 else normalise(images)
    labels = torch.randint(0, 19, (n, *size), dtype=torch.uint8)
    return images.pin_memory() if device.type == "cuda" else images, labels


def ripu_step(args) -> None:
    """2 + 2 images: forward, RIPU's four losses, backward, SGD."""

    def step_of(run: Run, plain: bool):
        s, kind = run.s, torch.float32 if plain else torch.uint8
        batches = [noise(s.batch, size, args.device, kind) for size in (s.source_hw, s.target_hw)]
        if plain:
            run.optimizer = torch.optim.SGD(run.model.parameters(), 1e-4, 0.9, foreach=False)

        def step():
            on_device = []
            for images, labels in batches:
                x = images.to(args.device, non_blocking=not plain)
                on_device.append(
                    [x if plain else normalise(x), labels.to(args.device, non_blocking=not plain)]
                )
            with run.autocast():
                logits = forward_both(run.forward, *on_device)
            L = losses_of_queries(s, on_device[0], logits[0], on_device[1], logits[1])
            total = L["source"] + L["target"] + 0.1 * L["consistency"] + L["negative"]
            run.optimizer.zero_grad(set_to_none=True)
            total.backward()
            run.optimizer.step()
            if plain:
                total.item()

        return step

    ours, plain = run_of(args, "ripu", "auto"), run_of(args, "ripu", "float32")
    plain.model = plain.forward = plain.model.to(memory_format=torch.contiguous_format)
    step = step_of(ours, False)
    with FlopCounterMode(display=False) as counter:
        step()
    timed(
        "ripu, a step of 2 + 2 images",
        step,
        step_of(plain, True),
        args,
        4,
        counter.get_total_flops(),
    )


def stal_step(args) -> None:
    """4 + 4 images: STAL's five passes, supervised and unlabelled loss, backward, SGD, mean teacher."""

    def step_of(run: Run, plain: bool):
        s, kind = run.s, torch.float32 if plain else torch.uint8
        teacher = copy.deepcopy(run.model).requires_grad_(False)
        labelled, other = (noise(s.batch, s.crop_hw, args.device, kind) for _ in range(2))

        def step():
            images, plain_images = (
                x if plain else normalise(x)
                for x in (b[0].to(args.device, non_blocking=not plain) for b in (labelled, other))
            )
            labels = labelled[1].to(args.device)
            with run.autocast():
                logits, _, auxiliary = run.forward(images, extras=True)
                train_mode(teacher, images)
            logits = upsample(logits.float(), labels.shape[-2:])
            loss = supervised_loss(s, logits, auxiliary, labels)
            weak = plain_logits(run, teacher, plain_images, None)
            with run.autocast():
                train_mode(teacher, plain_images)
                strong, _, _ = run.forward(plain_images, extras=True)
            prob = weak.softmax(1)
            loss = loss + unlabelled_loss(s, strong, prob.argmax(1).to(torch.uint8), prob.amax(1))
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()
            if plain:
                with torch.no_grad():
                    for own, new in zip(teacher.parameters(), run.model.parameters(), strict=True):
                        own.mul_(0.99).add_(new, alpha=0.01)
                loss.item()
            else:
                update_teacher(teacher, run.model, 1000)

        return step

    more = {
        "net": "deeplabv3plus",
        "head": "ripu" if args.sizes == "toy" else "stal",
        "class_keep": False,
    }
    ours = run_of(args, "stal", "auto", contrast=0.0, **more)
    plain = run_of(args, "stal", "float32", contrast=0.0, **more)
    step = step_of(ours, False)
    with FlopCounterMode(display=False) as counter:
        step()
    timed("stal, a step of 4 + 4 images without contrast", step, step_of(plain, True), args, 8,
          counter.get_total_flops())  # fmt: skip


def contrast(args) -> None:
    """L_c and its gradient at the evidence's sizes (2 + 2 images of 160x120, features at stride 4), 6 of
    19 classes there: ours against one that computes every class, from normalised copies of the keys."""
    bank = MemoryBank(19, 256, 3000, 5000, args.device)
    bank.keys.normal_()
    bank.count.fill_(3000)
    student, teacher = torch.randn(2, 4, 256, 30, 40, device=args.device)
    student.requires_grad_()
    labels = torch.randint(6, (4 * 30 * 40,), device=args.device)
    members = labels == torch.arange(19, device=args.device)[:, None]  # (C,P)
    draws = torch.rand(19, 256, device=args.device), torch.rand(19, 256, 50, device=args.device)

    def ours():
        sets = members, members, members
        contrastive(student, teacher, sets, bank, draws=draws).backward()

    def plain():
        at = places(members, pick(draws[0], members.sum(1, keepdim=True)))  # (C,A)
        chosen = student.transpose(0, 1).flatten(1).T[at]  # (N,K,h,w) -> (P,K) -> (C,A,K)
        centres = class_centres(teacher.flatten(2), members)
        losses = []
        for c, centre in enumerate(centres):
            negatives = F.normalize(bank.draw(c, draws[1][c]), dim=-1)
            losses.append(class_contrast(chosen[c], centre, negatives))
        there = members.any(1)
        ((torch.stack(losses) * there).sum() / there.sum()).backward()

    gradients = []
    for call in (ours, plain):
        call()
        gradients.append(student.grad.clone())
        student.grad = None
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[0].abs().max()
    timed("stal, L_c with its gradient, 6 of 19 classes there", ours, plain, args, 4)


def mobilenet_step(args) -> None:
    """Forward and backward of MobileNetV2 with V3+, 4 images of 128x64, as the evidence's steps: ours
    against torch's own gradient of dilated depthwise convolutions (a CPU's matter)."""
    calls = []
    for plain in (False, True):
        more = {"backbone": "mobilenet_v2", "net": "deeplabv3plus", "batch_norm": "live"}
        run = run_of(args, "source-only", "auto", **more)
        for block in [m for m in run.model.modules() if plain and isinstance(m, DilatedDepthwise)]:
            block.forward = partial(torch.nn.Conv2d.forward, block)
        images, labels = noise(4, (64, 128), args.device, torch.float32)

        def step(run=run, images=images, labels=labels):
            with run.autocast():
                logits = run.forward(images.to(args.device))
            logits = upsample(logits.float(), labels.shape[-2:])
            cross_entropy(logits, labels.to(args.device)).backward()

        calls.append(step)
    timed("mobilenet_v2 V3+, 4 images of 128x64, forward and backward", *calls, args, 4)


def passes(args) -> None:
    """A query round and a pseudo-label pass: per image of the target's own size."""
    height, width = SIZES[args.sizes]["image"]
    images = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8)
    ours, plain = run_of(args, "ripu", "auto"), run_of(args, "ripu", "float32")
    for run in (ours, plain):
        run.model.eval()
    together = 4 if args.device.type == "cuda" else 1

    def query(run, group, context):
        with context():
            for part in images.split(group):
                with run.autocast():
                    logits = network_logits(run.model, part, run.s.target_hw, args.device)
                for one in logits:
                    score = acquisition.SCORES["ripu"](one, 1, "region", 0)
                    acquisition.select_regions(score, height * width // 2000, 2)

    def label(run, group, context):
        histogram = ConfidenceHistogram(19, args.device)
        with context():
            for part in images.split(group):
                with run.autocast():
                    prob = network_logits(run.model, part, run.s.target_hw, args.device).softmax(1)
                for one in prob:
                    histogram.add(one)
                    cbst_pseudo_labels(one, torch.full((19,), 0.5))

    for name, call in (("query round", query), ("pseudo-label pass", label)):
        timed(f"{name}, 4 images", lambda call=call: call(ours, together, torch.inference_mode),
              lambda call=call: call(plain, 1, torch.no_grad), args, 4)  # fmt: skip


def loader(args) -> None:
    """Images a second of one process: decoded and resized from PNG against read from --cache."""
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        toy.write(world, seed=0, counts=toy.SMALL)
        data = open_dataset("cityscapes", world)
        if args.decode:
            size = parse_size(args.decode)
            for i, sample in enumerate(data.samples):
                large = resize_image(data.image(i), size).permute(1, 2, 0).numpy()
                Image.fromarray(large).save(sample.image)
        to = parse_size("1280x640") if args.decode else (80, 160)
        began = time.perf_counter()
        decoded = [read_image(sample.image) for sample in data.samples]
        decode = (time.perf_counter() - began) / len(data)
        began = time.perf_counter()
        for image in decoded:
            resize_image(image, to)
        resize = (time.perf_counter() - began) / len(data)
        print(f"decode {1e3 * decode:.1f} ms, resize {1e3 * resize:.1f} ms an image: the floor of one core is "
              f"{1 / (decode + resize):.1f} images/s")  # fmt: skip
        transform = JointTransform(size=to, flip=True)
        labels = torch.zeros(to, dtype=torch.uint8)
        cache = ImageCache(Path(folder) / "cache", data, to, 1e9)
        views = [TrainingView(data, transform, 0, lambda i: labels, c) for c in (None, cache)]
        pairs = [(draw, draw % len(data)) for draw in range(24)]

        def read(view):
            return lambda: [None for _ in load(view, args.workers, batch_size=2, sampler=pairs)]

        timed(
            f"loader, {args.workers} workers, 24 images (ours: --cache)",
            read(views[1]),
            read(views[0]),
            args,
            24,
        )


def waiting(args) -> None:
    """The share of a source-only step in which the next batch was waited for."""
    with tempfile.TemporaryDirectory() as folder:
        toy.write(Path(folder), seed=0, counts=toy.SMALL)
        run = run_of(args, "source-only", "auto", source_sampling="uniform", workers=args.workers)
        iterator = batches(run.s, open_dataset("gta5", folder), 0, stream=1, labels_of=None)
        spent = {"waiting": 0.0, "all": 0.0}
        for step in range(16):
            began = time.perf_counter()
            images, labels = next_batch(iterator, args.device)
            waited = time.perf_counter() - began
            with run.autocast():
                logits = run.forward(images)
            loss = cross_entropy(upsample(logits.float(), labels.shape[-2:]), labels)
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()
            wait(args.device)
            if step:  # the first starts the loader
                spent["waiting"] += waited
                spent["all"] += time.perf_counter() - began
    share = spent["waiting"] / spent["all"]
    print(
        f"| waiting for data, {args.workers} workers, source-only | {share:.1%} of a step | | | | |",
        flush=True,
    )


PARTS = {
    "ripu": ripu_step,
    "stal": stal_step,
    "contrast": contrast,
    "mobilenet": mobilenet_step,
    "passes": passes,
    "loader": loader,
    "waiting": waiting,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=SIZES, default="toy")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--decode", default="", help="WxH of the loader's files, resized to 1280x640"
    )
    args = parser.parse_args()
    args.peak = peak(args.device, half=True)
    print(
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, peak {args.peak / 1e12:.2f} TFLOP/s"
    )
    print("| | ours | plain | ratio | FLOPs | memory |\n|---|---|---|---|---|---|")
    for part in args.parts:
        PARTS[part](args)


if __name__ == "__main__":
    main()
