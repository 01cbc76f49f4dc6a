"""What does a run cost? Hours, memory and files, from counted operations and a machine's rate.

    python -m tests.benchmarks.cost --rate 300 --strategy ripu                    # TFLOP/s of one device, the papers' sizes
    python -m tests.benchmarks.cost --rate 300 --processes 8 --images 10000000
    python -m tests.benchmarks.cost --rate 0.03 --cores 1 --image 256x128 --images 120 --val 48 --strategy ripu --root toy

The model, a line each in `model`: training is steps x FLOPs of a step / (rate x processes); a round is target images x FLOPs
of a forward pass / (rate x processes), plus the scores; evaluation likewise; and none is faster than the cores decode PNGs
(79 ms an image of 2048x1024, in proportion to its pixels: 57 + 22 ms measured for the official code, RESULTS.md has ours).
FLOPs are counted on the network itself (torch.utils.flop_counter, on torch's meta device), a multiplication and an addition
each being one. Every line says whether its factors were counted, measured or given. CBST's source training is not in it:
--strategy source-only.
"""

import argparse

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from alda import deeplab
from alda.datasets import parse_size
from alda.loop import images_due, round_starts, source_counts
from alda.run import network_of
from alda.settings import SELF_TRAINING, settings_for

DECODE = 79e-3 / (1024 * 2048)  # s a pixel of the file, one core: PNG and resize, measured
SCORE = 0.16 / (1024 * 2048)  # s a pixel, 2 threads, measured; ~0 on a GPU beside the network
PICK = 24  # bytes that CBDA's one budget holds for each pick


def flops(network, size, images: int, backward: bool) -> float:
    """Operations of a forward (and backward) pass of `images` at `size`."""
    with torch.device("meta"):
        model = network.train(backward)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            outputs = model(torch.empty(images, 3, *size), extras=True)
            if backward:
                sum(x.sum() for x in outputs if x is not None).backward()
    return counter.get_total_flops()


def model(s, args) -> dict[str, tuple[float, str]]:
    """{what: (seconds, where it is from)}."""
    with torch.device("meta"):
        network = deeplab.build(**{**network_of(s), "batch_norm": "live"}, init="none")
    height, width = parse_size(args.image)
    rate, cores = args.rate * 1e12 * args.processes, args.cores * args.processes
    alone = s.strategy in (*SELF_TRAINING, "source-only")  # one batch a step, not two
    if s.strategy == "stal":
        # student on labelled and mixed images with gradient; teacher on both, on the plain ones and on
        # those to cut from
        step = 2 * flops(network, s.crop_hw, s.batch, True) + 4 * flops(
            network, s.crop_hw, s.batch, False
        )
    else:
        step = sum(
            flops(network, size, s.batch, True)
            for size in (s.source_hw or s.crop_hw, s.crop_hw or s.target_hw)
        )
        step /= 2 if alone else 1
    seen = s.steps * s.batch * (1 if alone else 2)
    forward = flops(network, s.target_hw, 1, False)
    decode = DECODE * height * width / cores
    passes = {
        "stal": 2,
        "source-only": 0,
        "full": 0,
        **dict.fromkeys(SELF_TRAINING, 2 * s.rounds),
    }.get(s.strategy, s.rounds)
    twice = 2 if s.strategy in SELF_TRAINING and s.label_flip else 1
    score = SCORE * height * width / cores if args.rate < 1 else 0.0
    decode_s = args.images * passes * decode
    network_s = args.images * passes * (twice * forward / rate + score)
    tested = 2 * args.val * (2 * forward / rate + decode)
    return {
        f"training, {s.steps} steps of {step / 1e12:.3g} TFLOP": (
            s.steps * step / rate,
            "counted / given",
        ),
        f"loading {seen:,} images, beside it": (seen * decode, "measured on one core"),
        f"{passes} passes over {args.images:,} target images": (
            max(network_s, decode_s),
            "counted" if network_s > decode_s else f"decoding; the network {network_s:,.0f} s",
        ),
        "two evaluations": (tested, "counted"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rate", type=float, required=True, help="TFLOP/s that one device reaches in convolutions"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cores", type=int, default=16, help="that load data, for each process")
    parser.add_argument("--images", type=int, default=2975, help="target images")
    parser.add_argument("--source", type=int, default=24966, help="source images")
    parser.add_argument("--val", type=int, default=500, help="validation images")
    parser.add_argument("--image", default="2048x1024", help="WxH of the files")
    args, rest = parser.parse_known_args()
    pairs = {
        a.removeprefix("--").replace("-", "_"): b
        for a, b in zip(rest[::2], rest[1::2], strict=True)
    }
    kinds = {"steps": int, "batch": int, "rounds": int, "budget": float, "epochs": int}
    s = settings_for({k: kinds.get(k, str)(v) for k, v in {"strategy": "ripu", **pairs}.items()})
    if s.strategy == "stal" and s.epochs:
        asked = np.cumsum(images_due(s, args.images)).tolist()
        s.steps = round_starts(s, [args.images - n for n in asked])[-1]
    if s.strategy in SELF_TRAINING and s.epochs:
        counts = source_counts(s, args.source)
        s.steps = round_starts(s, [args.images + n for n in counts])[-1]
    total = 0.0
    for what, (seconds, source) in model(s, args).items():
        print(f"{what}: {seconds / 3600:.2f} h ({seconds:,.0f} s; {source})")
        total += seconds if "beside" not in what else 0.0
    print(
        f"together {total / 3600:.2f} h; loading is {'the bottleneck' if loading(s, args) > total else 'hidden'}"
    )
    height, width = parse_size(args.image)
    picks = args.images * height * width * s.budget / (2 * s.radius + 1) ** 2 / s.rounds
    print(
        f"CBDA's one budget, a round: {picks:,.0f} picks, {picks * PICK / 1e9:.2f} GB over {args.processes} processes (counted)"
    )
    print(f"files of the rounds: {3 * args.images * s.rounds:,} (questions, answers, picks)")


def loading(s, args) -> float:
    """Seconds that the cores decode for all steps."""
    return next(seconds for what, (seconds, _) in model(s, args).items() if "beside" in what)


if __name__ == "__main__":
    main()
