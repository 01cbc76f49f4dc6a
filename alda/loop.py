"""How do the parts make a system? The strategies, their settings, the training loops and the command line.

    python -m alda.loop --src gta5 --tgt cityscapes --strategy ripu --root /data
    python -m alda.loop --root toy --strategy ripu                         # the miniature world, minutes on a CPU
    torch.load("runs/.../checkpoints/last.pt", weights_only=True)           # what a run leaves: see Settings.out

RIPU: Xie et al., CVPR 2022, arXiv 2111.12940. CBDA: Schachtsiek, Rossi and Hannagan, arXiv 2311.14146.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from alda import acquisition, deeplab, toy
from alda.annotation import Rounds, ground_truth, ledger
from alda.datasets import (
    IGNORE,
    NAMES,
    ImagesOnly,
    SegmentationDataset,
    load,
    mix_seed,
    normalise,
    open_dataset,
    resize_image,
)
from alda.errors import InputError
from alda.evaluation import PROTOCOLS, class_picture, describe, evaluate, parse_size, pick_device, protocol_named
from alda.losses import cross_entropy, local_consistency, negative_learning
from alda.run import Run, batches, next_batch, prepare, save_picture

# ------------------------------------------------------------------------------------------------------------- settings


def option(default, group: str, text: str, choices: tuple = ()):
    """A settings field: its default, the --help group it stands in, its meaning and unit, its allowed values."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "choices": choices})


STRATEGIES = ("source-only", "full", "random", "entropy", "margin", "ripu", "ripu-pa", "cbda")


AT_LEAST_1 = ("steps", "batch", "rounds", "log_every", "checkpoint_every")
AT_LEAST_0 = ("workers", "threads", "poly_steps", "momentum", "weight_decay", "radius", "pixels", "consistency", "negative",
              "eval_every", "pictures")  # fmt: skip


@dataclass
class Settings:
    """Every setting of a run. Defaults are RIPU's published schedule; PAPER and TOY below change them by strategy."""

    strategy: str = option("ripu", "run", "who chooses the labels", STRATEGIES)
    src: str = option("gta5", "run", "source dataset", ("gta5", "synthia"))
    tgt: str = option("cityscapes", "run", "target dataset", ("cityscapes", "acdc"))
    root: str = option(
        "data", "run", "folder that holds the datasets; 'toy' writes and uses the miniature world in ./toy"
    )
    out: str = option("", "run", "folder of the run; default runs/STRATEGY-SRC-TGT-SEED")
    seed: int = option(0, "run", "seed of every random draw")
    device: str = option("auto", "run", "auto, cpu, cuda, cuda:1, ...")
    workers: int = option(
        4, "run", "processes that load data; 0 loads in the main process; results do not depend on it"
    )
    threads: int = option(0, "run", "CPU threads of torch; 0 leaves torch's choice")
    precision: str = option(
        "float32", "run", "bfloat16: autocast in training and scoring; tests stay float32", ("float32", "bfloat16")
    )
    resume: bool = option(False, "run", "go on from the last checkpoint of --out")
    rules: str = option("paper", "run", "where equation and official code contradict each other", ("paper", "code"))

    net: str = option("deeplabv2", "network", "segmentation head", ("deeplabv2", "deeplabv3plus"))
    backbone: str = option("resnet101", "network", "torchvision ResNet", ("resnet101", "resnet50", "resnet18"))
    init: str = option(
        "imagenet", "network", "imagenet (torchvision IMAGENET1K_V1), none (random), or a checkpoint FILE"
    )
    batch_norm: str = option("auto", "network", "auto: live with --init none, else frozen", ("auto", "frozen", "live"))

    steps: int = option(40_000, "schedule", "optimizer steps")
    poly_steps: int = option(0, "schedule", "length of the poly decay; 0 is 1.5625 x steps (RIPU: 62,500 for 40,000)")
    batch: int = option(2, "schedule", "images a step, of the source and of the target each")
    lr: float = option(2.5e-4, "schedule", "learning rate of the backbone; the head has 10 times as much")
    momentum: float = option(0.9, "schedule", "SGD momentum")
    weight_decay: float = option(5e-4, "schedule", "SGD weight decay")
    source_size: str = option("1280x720", "schedule", "WxH that source images are resized to")
    target_size: str = option("1280x640", "schedule", "WxH that target images are resized to, for training and scoring")
    source_sampling: str = option("balanced", "schedule", "order of source images", ("balanced", "uniform"))
    log_every: int = option(50, "schedule", "steps between progress lines")
    checkpoint_every: int = option(1000, "schedule", "steps between checkpoints")

    budget: float = option(0.022, "queries", "share of each target image's pixels that may be asked, over all rounds")
    rounds: int = option(5, "queries", "query rounds")
    query_steps: str = option(
        "", "queries", "steps before which the rounds are asked, '10000,12000'; default 25%%..45%% of steps"
    )
    unit: str = option(
        "region", "queries", "what a pick labels: its whole region or its centre pixel", ("region", "pixel")
    )
    radius: int = option(
        1, "queries", "k: a region is the (2k+1)^2 square around its centre; pixel picks block within k"
    )
    pixels: int = option(
        0, "queries", "with --unit pixel: pixels an image over all rounds instead of --budget; 0: --budget"
    )
    keep_labels: bool = option(
        False, "queries", "resize labels so that no bought one is lost (default: nearest neighbour)"
    )

    cbda: str = option(
        "both",
        "CBDA",
        "dynamic: one budget over the whole target set (the paper's words); balance: scores weighted by class with "
        "max(0, 1 - n_c / (t_c B)), this project's formula for the paper's words; both",
        ("dynamic", "balance", "both"),
    )

    consistency: float = option(0.1, "RIPU losses", "weight of local consistency on the source (Eq. 7)")
    negative: float = option(1.0, "RIPU losses", "weight of negative learning on the target (Eq. 8)")
    source_free: str = option(
        "", "RIPU losses", "CHECKPOINT of a source-trained network: adapt without any source image"
    )

    protocol: str = option("ripu", "evaluation", "test protocol", tuple(PROTOCOLS))
    test_size: str = option(
        "", "evaluation", "WxH of the test input for ripu and whole; default --target-size for ripu"
    )
    eval_every: int = option(
        0, "evaluation", "also score the validation split every so many steps (logged, never chosen by)"
    )
    pictures: int = option(4, "evaluation", "target images drawn to pictures/ in each round")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            name = "--" + field.name.replace("_", "-")
            if field.type is float and isinstance(value, int):
                setattr(self, field.name, float(value))
            elif type(value) is not field.type:
                raise InputError(f"{name} must be {field.type.__name__}, got {value!r}")
            if choices and value not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for names, low in ((AT_LEAST_1, 1), (AT_LEAST_0, 0)):
            for name in names:
                if not getattr(self, name) >= low:  # also refuses nan
                    raise InputError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be above 0, got {self.lr}")
        if 0 < self.poly_steps < self.steps:
            raise InputError(
                f"--poly-steps {self.poly_steps} is shorter than --steps {self.steps}: the rate would end early"
            )
        if self.strategy == "source-only" and self.source_free:
            raise InputError("--strategy source-only --source-free leaves nothing to train on")
        if not 0 < self.budget <= 1:
            raise InputError(f"--budget is a share of the pixels, above 0 and at most 1; got {self.budget}")


# What each strategy's paper sets otherwise than the defaults of Settings.
PAPER: dict[str, dict] = {
    "source-only": {"consistency": 0.0, "negative": 0.0},
    "full": {"consistency": 0.0, "negative": 0.0},
    "ripu-pa": {"unit": "pixel", "radius": 32, "pixels": 40},
    "cbda": {"net": "deeplabv3plus", "budget": 0.05},
}
SOURCE_FREE = {"steps": 30_000, "consistency": 0.0}  # queries at 0, 2,000, ..., 8,000 of 30,000: see query_schedule
# The miniature world: ResNet-18 from random weights on small pictures.
TOY = {
    "backbone": "resnet18",
    "net": "deeplabv3plus",
    "init": "none",
    "steps": 300,
    "batch": 2,
    "lr": 0.01,
    "source_size": "160x80",
    "target_size": "160x80",
    "workers": 0,
    "log_every": 20,
    "checkpoint_every": 100,
}
TOY_BY_STRATEGY: dict[str, dict] = {"ripu-pa": {"radius": 4}}  # 32 of Cityscapes' 2048 columns, on 256


def settings_for(given: dict) -> Settings:
    """Settings from the options that were given, over the toy world's, over the paper's, over the defaults."""
    strategy = given.get("strategy", "ripu")
    merged = dict(PAPER.get(strategy, {}))
    if given.get("source_free"):
        if given.get("init", given["source_free"]) != given["source_free"]:
            raise InputError("--source-free starts from its CHECKPOINT: leave --init out")
        merged.update(SOURCE_FREE, init=given["source_free"], **({"radius": 9} if given.get("rules") == "code" else {}))
    if given.get("root") == "toy":
        merged.update(
            {k: v for k, v in TOY.items() if not (k == "init" and "init" in merged)},
            **TOY_BY_STRATEGY.get(strategy, {}),
        )
    return Settings(**{**merged, **given})


# ------------------------------------------------------------------------------------------- pure functions of the step


def poly(step: int, steps: int, power: float = 0.9) -> float:
    """The factor of the learning rate before step `step` (from 0): (1 - step / steps)^power. RIPU's and DeepLab's poly."""
    return (1 - step / steps) ** power


def query_schedule(s: Settings) -> list[int]:
    """How many steps are done when each round is asked.

    RIPU: 10,000 to 18,000 of 40,000 in equal parts, that is 25 % to 45 % of the steps; source-free 0 to 8,000 of 30,000.
    """
    if s.query_steps:
        try:
            schedule = [int(part) for part in s.query_steps.split(",")]
        except ValueError:
            raise InputError(f"--query-steps is a list like 10000,12000; got {s.query_steps!r}") from None
        if schedule != sorted(set(schedule)) or schedule[0] < 0 or schedule[-1] >= s.steps or len(schedule) != s.rounds:
            raise InputError(
                f"--query-steps needs --rounds ({s.rounds}) growing steps below --steps ({s.steps}); got {s.query_steps}"
            )
        return schedule
    first, last = (0, 8 / 30) if s.source_free else (0.25, 0.45)
    share = np.linspace(first, last, s.rounds) if s.rounds > 1 else [first]
    schedule = [round(s.steps * float(x)) for x in share]
    if len(set(schedule)) < s.rounds:
        raise InputError(f"--steps {s.steps} is too short for --rounds {s.rounds}: two rounds fall on one step")
    return schedule


def budget_pixels(s: Settings, sizes: list[tuple[int, int]]) -> int:
    """How many pixels may be asked of images of these `sizes` (H, W), over all rounds."""
    if s.unit == "pixel" and s.pixels:
        return s.pixels * len(sizes)
    return int(sum(height * width for height, width in sizes) * s.budget)


def regions_due(budget: int, s: Settings, asked_before: int) -> int:
    """How many picks a round makes of `budget` pixels, of which `asked_before` are spent.

    RIPU asks ceil(budget / rounds / (2k+1)^2) regions of an image in each round; here never more than the budget has
    left, so that five roundings up do not add up to more than was promised. A pixel pick costs one pixel.
    """
    area = 1 if s.unit == "pixel" else (2 * s.radius + 1) ** 2
    if budget < area:
        raise InputError(f"the budget (--budget {s.budget}) is {budget} pixels, less than one region ({area})")
    return max(0, min(math.ceil(budget / s.rounds / area), (budget - asked_before) // area))


def score_of(s: Settings, logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The strategy's score map (H,W) of one image's logits (C,H,W); `seed` serves the strategy `random`."""
    if s.strategy == "random":
        return acquisition.random_score(logits.shape[-2:], seed, logits.device)
    if s.strategy in ("entropy", "margin"):
        score = {"entropy": acquisition.entropy_score, "margin": acquisition.margin_score}[s.strategy]
        return score(logits, 0 if s.unit == "pixel" else s.radius)
    return (
        acquisition.pixel_score(logits, s.radius) if s.unit == "pixel" else acquisition.ripu_score(logits, s.radius)[0]
    )


def test_protocol(s: Settings):
    """The protocol of the run's reports; `ripu` tests at the training size of the target unless --test-size says otherwise."""
    size = s.test_size or (s.target_size if s.protocol == "ripu" else "")
    return protocol_named(s.protocol, parse_size(size) if size else None)


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
            run.write_metrics({"step": step + 1, **evaluate(run.model, validation, test_protocol(s), device)})
        if (step + 1) % s.checkpoint_every == 0 or step + 1 == s.steps:
            run.save(step + 1)

    records = [rounds.record(number + 1) for number in range(rounds.complete())]
    return {
        **evaluate(run.model, validation, test_protocol(s), device),
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


def ask(s: Settings, run: Run, target: SegmentationDataset, rounds: Rounds, number: int, out: Path) -> None:
    """One query round over the whole target set: score and select, ask the oracle, store, draw, report."""
    began = time.time()
    records = [rounds.record(earlier + 1) for earlier in range(number - 1)]
    centres, shown, notes = choose(s, run, target, rounds, number, records)
    size, paint_radius = parse_size(s.target_size), 0 if s.unit == "pixel" else s.radius
    with rounds.new(number) as new:
        for index, sample in enumerate(target.samples):
            before = rounds.asked(sample.id, sample.size, number - 1)
            asked = acquisition.paint(centres[index], paint_radius, sample.size)
            oracle = ground_truth(target, index)
            answers = new.add(sample.id, asked, oracle, len(centres[index]), size, s.keep_labels)
            if index in shown:
                known = rounds.labels(sample.id, sample.size, number - 1)
                panels = {
                    **shown[index],
                    "asked so far": before | asked,
                    "answers so far": torch.where(answers == IGNORE, known, answers),
                    "truth": target.labels(index),
                }
                save_picture(panels, sample.size, out / "pictures" / f"round-{number:02d}" / f"{sample.id}.png")
        new.notes = notes
    record = rounds.record(number)
    histogram = out / "pictures" / f"round-{number:02d}" / "classes.png"
    class_picture(ledger([*records, record])["classes"], histogram, balanced="class_weights" in notes)
    print(
        f"round {number}/{s.rounds}: asked {record['asked']:,} px ({record['regions']:,} of {notes['picks_due']:,} picks due, "
        f"{len(record['images'])} images), labelled {record['labelled']:,}, ignored by the truth {record['ignored']:,}, "
        f"left at {s.target_size} {record['trained']:,} ({time.time() - began:.0f} s)",
        flush=True,
    )


@torch.no_grad()
def choose(s: Settings, run: Run, target: SegmentationDataset, rounds: Rounds, number: int, records: list[dict]):
    """Which centres round `number` asks: (centres (n,2) int64 of every image, panels of the images drawn, notes).

    RIPU: each image has its own budget. CBDA `dynamic`: one budget over all images; `balance`: scores are weighted by what
    the classes have consumed so far. Scores are taken on the logits at the image's full size, in eval mode, one image at a
    time. A pick blocks the centres within 2k (regions) or k (pixels) in this round and, through the pixels asked so far,
    in all later ones.
    """
    dynamic, balance = (s.strategy == "cbda" and s.cbda in (part, "both") for part in ("dynamic", "balance"))
    whole = budget_pixels(s, [sample.size for sample in target.samples])
    notes: dict = {"budget_px": whole}
    weights = None
    if balance:
        weights = acquisition.class_weights(torch.tensor([*ledger(records)["classes"].values()]), whole)
        notes["class_weights"] = dict(zip(NAMES, weights.tolist(), strict=True))
    count = regions_due(whole, s, sum(record["asked"] for record in records))  # of the round, over all images
    pool = acquisition.GlobalBudget(count)
    block_radius = s.radius if s.unit == "pixel" else 2 * s.radius
    centres, shown, every = [], {}, math.ceil(len(target) / max(1, s.pictures))
    notes["picks_due"] = count if dynamic else 0
    run.model.eval()
    for index, image in enumerate(load(ImagesOnly(target), s.workers, batch_size=None)):
        sample = target.samples[index]
        x = normalise(resize_image(image, parse_size(s.target_size)).to(run.device))[None]
        with run.autocast():
            logits = run.model(x).float()
        logits = deeplab.upsample(logits, sample.size)[0]  # (C,H,W) at full size
        prediction, score = logits.argmax(0), score_of(s, logits, mix_seed(s.seed, 3, number, index))
        if not logits.isfinite().all():
            raise FloatingPointError(
                f"{sample.image}: the network's output is not finite; nothing was asked; try a lower --lr"
            )
        if balance:
            score = acquisition.class_balanced(score, prediction, weights)
            score = score.masked_fill((weights == 0).to(run.device)[prediction], -math.inf)  # has used up its share
        before = rounds.asked(sample.id, sample.size, number - 1)
        blocked = acquisition.dilate(before.to(run.device), s.radius) if number > 1 else None
        due = count if dynamic else regions_due(budget_pixels(s, [sample.size]), s, int(before.sum()))
        free = score.masked_fill(score < pool.floor, -math.inf) if dynamic else score
        picked = acquisition.select_regions(free, due, block_radius, blocked)
        if dynamic:
            pool.add(index, picked, score[picked[:, 0], picked[:, 1]])
        else:
            centres.append(picked.cpu())
            notes["picks_due"] += due
        if s.pictures and index % every == 0:
            shown[index] = {"image": image, "prediction": prediction.to(torch.uint8).cpu(), "score": score.cpu()}
    run.model.train()
    if dynamic:
        picks = pool.select()
        centres = [picks.get(index, torch.empty(0, 2, dtype=torch.int64)) for index in range(len(target))]
        notes["threshold"] = pool.threshold
    return centres, shown, notes


def labels_known(target: SegmentationDataset, rounds: Rounds, index: int, upto: int) -> torch.Tensor:
    """The labels of a target image that rounds 1..upto bought: (H,W) uint8, 255 elsewhere."""
    sample = target.samples[index]
    return rounds.labels(sample.id, sample.size, upto)


# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: list[str] | None) -> Settings:
    """The command line to Settings; --help groups the options."""
    tables = {**PAPER, "--source-free": SOURCE_FREE, "--root toy": TOY}
    others = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in table.items())}" for name, table in tables.items())
    parser = Parser(
        prog="python -m alda.loop",
        description=__doc__.splitlines()[0],
        epilog=f"Defaults in [brackets]; other ones of {others}. An option that is given always wins.",
        argument_default=argparse.SUPPRESS,
    )
    groups: dict = {}
    for field in dataclasses.fields(Settings):
        meta, name = field.metadata, "--" + field.name.replace("_", "-")
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group = groups[meta["group"]]
        if field.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=meta["help"])
        else:
            text = f"{meta['help']} [{field.default}]" if field.default != "" else meta["help"]
            group.add_argument(name, type=field.type, help=text, choices=meta["choices"] or None)
    return settings_for(vars(parser.parse_args(argv)))


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
