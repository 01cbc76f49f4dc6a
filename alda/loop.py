"""How do the parts make a system? One training loop for each family of methods, and the command line.

    python -m alda.loop --src gta5 --tgt cityscapes --strategy ripu --root /data
    python -m alda.loop --root toy --strategy ripu                         # the miniature world, minutes on a CPU
    torch.load("runs/.../checkpoints/last.pt", weights_only=True)           # what a run leaves: see alda/run.py

RIPU: Xie et al., CVPR 2022, arXiv 2111.12940. CBDA: Schachtsiek, Rossi and Hannagan, arXiv 2311.14146.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

from alda import deeplab, toy
from alda.annotation import Rounds, ledger
from alda.datasets import open_dataset
from alda.errors import InputError
from alda.evaluation import describe, evaluate, pick_device
from alda.losses import cross_entropy, local_consistency, negative_learning
from alda.queries import ask, budget_pixels, labels_known, query_schedule, regions_due
from alda.run import Run, batches, next_batch, prepare
from alda.settings import Settings, parse, protocol_of


def poly(step: int, steps: int, power: float = 0.9) -> float:
    """The factor of the learning rate before step `step` (from 0): (1 - step / steps)^power. RIPU's and DeepLab's poly."""
    return (1 - step / steps) ** power


# --------------------------------------------------------------------------------- the family of queries: RIPU, CBDA, baselines


def adapt_by_queries(s: Settings, out: Path, device: torch.device) -> dict:
    """Trains on the source, asks for target labels round by round, and goes on training on both. Returns the result.

    RIPU's algorithm, and with other scores its baselines. `source-only` never sees the target, `full` has all its labels
    from the first step, `--source-free` starts from a source-trained network and sees no source image.
    """
    source = None if s.source_free else open_dataset(s.src, s.root)
    target = None if s.strategy == "source-only" else open_dataset(s.tgt, s.root, "train")
    validation = open_dataset(s.tgt, s.root, "val")
    schedule = [] if s.strategy in ("source-only", "full") else query_schedule(s)
    if schedule:  # a budget too small for one region is noticed before training
        sizes = [sample.size for sample in target.samples]
        for group in [sizes] if s.strategy == "cbda" and s.cbda != "balance" else [[size] for size in set(sizes)]:
            regions_due(budget_pixels(s, group), s, 0)
    rounds = Rounds(out / "rounds")
    run = Run(s, out, device)
    start = run.resume()
    if rounds.complete() < sum(q < start for q in schedule):
        raise InputError(
            f"{rounds.folder}: rounds asked before step {start} are missing; restore them or use another --out"
        )
    source_batches = None if source is None else batches(s, source, start, stream=1, labels_of=None)
    target_batches = None

    for step in range(start, s.steps):
        if step in schedule and rounds.complete() == schedule.index(step):
            run.save(step)
            ask(s, run, target, rounds, schedule.index(step) + 1, out)
        if target is not None and (step in schedule or step == start):  # labels have changed: read on from here
            known = partial(labels_known, target, rounds, upto=sum(q <= step for q in schedule))
            labels_of = None if s.strategy == "full" else known
            target_batches = batches(s, target, step, stream=2, labels_of=labels_of)

        run.set_rate(poly(step, s.poly_steps or round(1.5625 * s.steps)))
        source_batch, target_batch = next_batch(source_batches, device), next_batch(target_batches, device)
        with run.autocast():
            losses = losses_of_step(s, run.model, source_batch, target_batch)
        run.descend(
            losses, weights={"source": 1.0, "target": 1.0, "consistency": s.consistency, "negative": s.negative}
        )
        run.log(step + 1)
        if s.eval_every and (step + 1) % s.eval_every == 0:
            run.write_metrics({"step": step + 1, **evaluate(run.model, validation, protocol_of(s), device)})
        if (step + 1) % s.checkpoint_every == 0 or step + 1 == s.steps:
            run.save(step + 1)

    records = [rounds.record(number + 1) for number in range(rounds.complete())]
    return {
        **evaluate(run.model, validation, protocol_of(s), device),
        "budget": ledger(records),
        "steps": s.steps,
        **({"cbda": s.cbda} if s.strategy == "cbda" else {}),
    }


def losses_of_step(s: Settings, model, source, target) -> dict[str, torch.Tensor]:
    """The named losses of one step. `source` and `target` are (images (N,3,H,W) float32, labels (N,H,W) uint8) or None.

    RIPU Eq. (9): L = CE(source) + CE(queried target) + 0.1 consistency(source) + 1.0 negative(target).
    """
    given = [batch for batch in (source, target) if batch is not None]
    if len(given) == 2 and source[0].shape == target[0].shape:  # live batch norm then sees both domains at once
        given_logits = list(model(torch.cat([source[0], target[0]])).chunk(2))
    else:
        given_logits = [model(images) for images, _ in given]
    given_logits = [deeplab.upsample(x.float(), y.shape[-2:]) for x, (_, y) in zip(given_logits, given, strict=True)]
    losses = {}
    if source is not None:
        logits = given_logits.pop(0)
        losses["source"] = cross_entropy(logits, source[1])
        if s.consistency:
            losses["consistency"] = local_consistency(logits, source[1], boundary_only=s.rules == "code")
    if target is not None:
        logits = given_logits.pop(0)
        losses["target"] = cross_entropy(logits, target[1])
        if s.negative:
            losses["negative"] = negative_learning(logits.softmax(1))
    return losses


# --------------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """The command line (see the top of this file); returns the exit status: 0 done, 2 bad usage or input."""
    out = None
    try:
        s = parse(argv)
        device = pick_device(s.device)
        if s.threads:
            torch.set_num_threads(s.threads)
        if s.root == "toy":
            toy.ensure("toy")
        out = prepare(s)
        began, mark = time.time(), "TOY " if s.root == "toy" else ""
        print(f"{mark}{s.strategy}: {s.src} -> {s.tgt}, {s.steps} steps on {device}, run folder {out}", flush=True)
        result = {"strategy": s.strategy, "toy": s.root == "toy", **adapt_by_queries(s, out, device)}
        result["wall_s"] = time.time() - began
        (out / "result.json").write_text(json.dumps(result, indent=1))
        print(f"{mark}{s.strategy}, last checkpoint, {result['images']} validation images\n{describe(result)}")
        return 0
    except (InputError, FloatingPointError, OSError) as error:
        if out is not None and not any((out / part).exists() for part in ("checkpoints", "rounds", "metrics.jsonl")):
            (out / "config.json").unlink(missing_ok=True)  # nothing was run: the folder stays free for the next try
        text = str(error).strip().splitlines()[-1]  # from a loading process the message comes below its traceback
        print(f"error: {text.removeprefix('alda.errors.InputError: ')}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command with --resume goes on from the last checkpoint")
