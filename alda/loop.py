"""How do the parts make a system? One training loop for each family of methods, and the command line.

    python -m alda.loop --src gta5 --tgt cityscapes --strategy ripu --root /data
    python -m alda.loop --root toy --strategy ripu                         # the miniature world, minutes on a CPU
    torch.load("runs/.../checkpoints/last.pt", weights_only=True)           # what a run leaves: see alda/run.py

RIPU: Xie et al., CVPR 2022, arXiv 2111.12940. CBDA: Schachtsiek, Rossi and Hannagan, arXiv 2311.14146.
CBST, CBST-SP, ST: Zou et al., ECCV 2018, arXiv 1810.07911. STAL (ILM-ASSL): Guan and Yuan, arXiv 2301.13361.
"""

import json
import os
import sys
import time
from bisect import bisect_right
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from alda import IGNORE, InputError, deeplab, toy
from alda.annotation import Rounds, ledger
from alda.datasets import PSEUDO, TrainingView, mix_seed, open_dataset, truth_inside
from alda.evaluation import describe, evaluate, pick_device
from alda.losses import cross_entropy, local_consistency, negative_learning
from alda.processes import join, leave, rank_and_number, wait
from alda.pseudolabels import label_target, pseudo_labels, source_prior
from alda.queries import (
    ask,
    ask_images,
    budget_pixels,
    labels_and_pseudo,
    labels_known,
    pseudo_schedule,
    query_schedule,
    regions_due,
)
from alda.run import Run, batches, mixed_batches, next_batch, prepare, run_folder, transform_of
from alda.selftraining import (
    cbst_learning_rate,
    mine_patch,
    rare_classes,
    source_portion,
    update_teacher,
)
from alda.settings import SELF_TRAINING, Settings, parse, protocol_of, settings_for
from alda.stal import Stal


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
        for group in (
            [sizes]
            if s.strategy == "cbda" and s.cbda != "balance"
            else [[size] for size in set(sizes)]
        ):
            regions_due(budget_pixels(s, group), s, 0)
    guesses = pseudo_schedule(s, schedule)
    rounds, pseudo = Rounds(out / "rounds"), Rounds(out / "pseudo")
    run = Run(s, out, device)
    start = run.resume()
    all_there(rounds, schedule, start)
    all_there(pseudo, guesses, start)
    prior = source_prior(s, source, device) if s.pseudo == "cbst-sp" else None
    source_batches = None if source is None else batches(s, source, start, stream=1, labels_of=None)
    target_batches = None

    for step in range(start, s.steps):
        if step in schedule and rounds.complete() == schedule.index(step):
            run.save(step)
            ask(s, run, target, rounds, schedule.index(step) + 1, out)
        known = partial(labels_known, target, rounds, upto=sum(q <= step for q in schedule))
        if step in guesses and pseudo.complete() == guesses.index(step):
            run.save(step)
            label_target(s, run, target, pseudo, guesses.index(step) + 1, s.pseudo, prior, known)
        if target is not None and step in (
            start,
            *schedule,
            *guesses,
        ):  # labels have changed: read on from here
            number = sum(g <= step for g in guesses)
            if number:
                known = partial(
                    labels_and_pseudo, target, rounds, pseudo, number=number, **known.keywords
                )
            target_batches = batches(
                s, target, step, stream=2, labels_of=None if s.strategy == "full" else known
            )

        run.set_rate(poly(step, s.poly_steps or round(1.5625 * s.steps)))
        source_batch, target_batch = (
            next_batch(source_batches, device),
            next_batch(target_batches, device),
        )
        with run.autocast():
            losses = losses_of_step(s, run.model, source_batch, target_batch)
        weights = {
            "source": 1.0,
            "target": 1.0,
            "pseudo": s.pseudo_weight,
            "consistency": s.consistency,
        }
        run.descend(losses, {**weights, "negative": s.negative})
        run.log(step + 1)
        evaluate_and_save(s, run, validation, step + 1)

    return {
        **evaluate(run.model, validation, protocol_of(s), device),
        **report(s, source, target, rounds),
        **({"cbda": s.cbda} if s.strategy == "cbda" else {}),
        **({"pseudo": s.pseudo, "pseudo_rounds": records_of(pseudo)} if s.pseudo != "none" else {}),
    }


def evaluate_and_save(s: Settings, run: Run, validation, step: int) -> None:
    """The end of a step: a score in the log every --eval-every steps, a checkpoint every --checkpoint-every steps."""
    if s.eval_every and step % s.eval_every == 0:
        run.write_metrics(
            {"step": step, **evaluate(run.model, validation, protocol_of(s), run.device)}
        )
    if step % s.checkpoint_every == 0 or step == s.steps:
        run.save(step)


def records_of(rounds: Rounds) -> list[dict]:
    """The round.json of every round that stands."""
    return [rounds.record(number + 1) for number in range(rounds.complete())]


def all_there(rounds: Rounds, schedule: list[int], start: int) -> None:
    """Raises InputError where a round that was made before step `start` is missing on disk."""
    if rounds.complete() < sum(step < start for step in schedule):
        raise InputError(
            f"{rounds.folder}: rounds made before step {start} are missing; restore them or use another --out"
        )


def report(s: Settings, source, target, rounds: Rounds, source_images: int | None = None) -> dict:
    """What result.json says beside the scores: the ledger, its share of all target pixels, steps, images trained on."""
    budget = ledger(records_of(rounds))
    return {
        "budget": {
            **budget,
            "share": 1.0
            if s.strategy == "full"
            else budget["asked"] / pixels_of(target)
            if target
            else 0.0,
        },
        "steps": s.steps,
        "source_images": source_images
        if source_images is not None
        else len(source)
        if source
        else 0,
        "target_images": len(target) if target else 0,
    }


def losses_of_step(s: Settings, model, source, target) -> dict[str, torch.Tensor]:
    """The named losses of one step. `source` and `target` are (images (N,3,H,W) float32, labels (N,H,W) uint8) or None.

    RIPU Eq. (9): L = CE(source) + CE(queried target) + 0.1 consistency(source) + 1.0 negative(target). With --pseudo the
    cross-entropy of the pseudo-labelled pixels is a term of its own, so that many guesses do not outweigh few answers.
    """
    given = [batch for batch in (source, target) if batch is not None]
    if (
        len(given) == 2 and source[0].shape == target[0].shape
    ):  # live batch norm then sees both domains at once
        given_logits = list(model(torch.cat([source[0], target[0]])).chunk(2))
    else:
        given_logits = [model(images) for images, _ in given]
    given_logits = [
        deeplab.upsample(x.float(), y.shape[-2:])
        for x, (_, y) in zip(given_logits, given, strict=True)
    ]
    losses = {}
    if source is not None:
        logits = given_logits.pop(0)
        losses["source"] = cross_entropy(logits, source[1])
        if s.consistency:
            losses["consistency"] = local_consistency(
                logits, source[1], boundary_only=s.rules == "code"
            )
    if target is not None:
        logits, labels = given_logits.pop(0), target[1]
        losses["target"] = cross_entropy(logits, labels.masked_fill(labels >= PSEUDO, IGNORE))
        if s.pseudo != "none":
            guessed = (labels >= PSEUDO) & (labels != IGNORE)
            losses["pseudo"] = cross_entropy(logits, torch.where(guessed, labels - PSEUDO, IGNORE))
        if s.negative:
            losses["negative"] = negative_learning(logits.softmax(1))
    return losses


# ------------------------------------------------------------------------------------------------ self-training: CBST


def adapt_by_self_training(s: Settings, out: Path, device: torch.device) -> dict:
    """CBST, CBST-SP and ST: rounds of pseudo-labels on the whole target set, each trained on with some source images.

    Starts from a source-trained network: --init FILE, or one that is trained first in OUT/source. The training split of
    the target is used without its labels; the validation split is only scored.
    """
    source, target = open_dataset(s.src, s.root), open_dataset(s.tgt, s.root, "train")
    validation = open_dataset(s.tgt, s.root, "val")
    one_size(s)
    shares = [
        source_portion(n, s.source_portion, s.source_portion_step, s.source_portion_max)
        for n in range(s.rounds)
    ]
    chosen = [max(1, round(share * len(source))) for share in shares]
    starts = round_starts(s, [len(target) + n for n in chosen])
    if s.init in ("imagenet", "none"):
        s = train_source(s, out, device)
    s = replace(s, steps=starts[-1], poly_steps=0)
    rounds = Rounds(out / "pseudo")
    run = Run(s, out, device)
    start = run.resume()
    all_there(rounds, starts[:-1], start)
    iterator = None

    for step in range(start, s.steps):
        number = bisect_right(starts, step)  # the round, from 1
        if step == starts[number - 1] and rounds.complete() < number:
            run.save(step)
            prior = source_prior(s, source, device) if s.strategy == "cbst-sp" else None
            label_target(s, run, target, rounds, number, s.strategy, prior)
        if step in (start, starts[number - 1]):
            iterator = round_batches(
                s, source, target, rounds, number, chosen[number - 1], step - starts[number - 1]
            )

        run.set_rate(cbst_learning_rate(1.0, number - 1))
        images, labels, _ = next_batch(iterator, device)
        with run.autocast():
            logits = run.model(images)
        logits = deeplab.upsample(logits.float(), labels.shape[-2:])
        run.descend({"cross_entropy": cross_entropy(logits, labels)}, {"cross_entropy": 1.0})
        run.log(step + 1)
        evaluate_and_save(s, run, validation, step + 1)

    return {
        **evaluate(run.model, validation, protocol_of(s), device),
        **report(s, source, target, Rounds(out / "rounds"), chosen[-1]),
        "pseudo_rounds": records_of(rounds),
    }


def one_size(s: Settings) -> None:
    """Raises InputError where source and target images of one batch would have different sizes."""
    if not s.crop and s.source_size != s.target_size:
        raise InputError(
            "source and target images share a batch here: give --crop, or equal --source-size and --target-size"
        )


def round_batches(s: Settings, source, target, rounds: Rounds, number: int, chosen: int, step: int):
    """Batches of round `number` from its step `step` on: all target images with their pseudo-labels, `chosen` source images.

    With --crop, windows are placed around the classes that were predicted most rarely (--mine), in both domains: by reading
    the official code, which mines its joint list.
    """
    record = rounds.record(number)
    rare = rare_classes([c["predicted"] for c in record["classes"].values()])
    at = partial(mine_patch, rare=rare, chance=s.mine) if s.mine else None

    views = [
        TrainingView(source, transform_of(s, 1, at), mix_seed(s.seed, 6, number)),
        TrainingView(
            target,
            transform_of(s, 2, at),
            mix_seed(s.seed, 7, number),
            partial(pseudo_labels, target, rounds, number),
        ),
    ]
    order = np.random.default_rng(mix_seed(s.seed, 8, number)).permutation(len(source))
    entries = [(0, int(i)) for i in order[:chosen]] + [(1, i) for i in range(len(target))]
    return mixed_batches(s, views, entries, step, mix_seed(s.seed, 9, number))


def round_starts(s: Settings, images: list[int]) -> list[int]:
    """The steps at which each round begins, and the end: --epochs passes over so many `images`, or equal parts of --steps."""
    if not s.epochs:
        if s.steps < len(images):
            raise InputError(f"--steps {s.steps} is too short for --rounds {len(images)}")
        return [s.steps * number // len(images) for number in range(len(images) + 1)]
    a_step = s.batch * rank_and_number()[1]
    return [0, *np.cumsum([-(-s.epochs * n // a_step) for n in images]).tolist()]


def train_source(s: Settings, out: Path, device: torch.device) -> Settings:
    """Trains `source-only` in OUT/source, or goes on with it; returns the settings that start from its network."""
    default = settings_for({"strategy": "source-only", "root": s.root})
    schedule = {
        name: getattr(default, name)
        for name in ("lr", "batch", "source_sampling", "consistency", "negative")
    }
    own = replace(
        s, strategy="source-only", steps=s.source_steps or default.steps, epochs=0, poly_steps=0, eval_every=0,
        out=str(out / "source"), resume=True, **schedule)  # fmt: skip
    last = out / "source" / "checkpoints" / "last.pt"
    if not (out / "source" / "result.json").is_file():
        print(f"source-only: {own.steps} steps in {out / 'source'}", flush=True)
        result = adapt_by_queries(own, prepare(own), device)
        (out / "source" / "result.json").write_text(
            json.dumps({"strategy": "source-only", "toy": s.root == "toy", **result}, indent=1)
        )
        print(f"source-only: mIoU19 {100 * result['mIoU19']:.2f}", flush=True)
    batch_norm = deeplab.read(last)["network"]["batch_norm"]
    return replace(s, init=str(last), batch_norm=batch_norm)


# ------------------------------------------------------------------------------- self-training with whole-image queries: STAL


def adapt_in_loops(s: Settings, out: Path, device: torch.device) -> dict:
    """STAL (ILM-ASSL): mean-teacher self-training, in loops that each begin by asking for whole images.

    Loop 1 asks for random images spread over the groups, later loops for the most uncertain ones of the teacher. A loop goes on
    from the last teacher, or with --restart from --init. Of the paper's text this was not at hand; the official
    configurations start each of their three trainings from ImageNet weights. Student and teacher are scored, the teacher
    is reported. Runs on one device or, started by torchrun, on several (SyncBatchNorm on GPUs).
    """
    source, target = open_dataset(s.src, s.root), open_dataset(s.tgt, s.root, "train")
    validation = open_dataset(s.tgt, s.root, "val")
    one_size(s)
    counts = images_due(s, len(target))
    order = np.random.default_rng(mix_seed(s.seed, 8)).permutation(len(source))
    source.samples = [source.samples[i] for i in sorted(order[: s.source_images or len(source)])]
    starts = round_starts(
        s, [2 * len(source)] * s.rounds
    )  # an epoch: the source, and as many repeated target images
    s = replace(s, steps=starts[-1])
    rounds = Rounds(out / "rounds")
    run = Run(s, out, device)
    system = Stal(s, run, source, target)
    start = run.resume()
    all_there(rounds, starts[:-1], start)

    for step in range(start, s.steps):
        number = bisect_right(starts, step)  # the loop, from 1
        local, length = step - starts[number - 1], starts[number] - starts[number - 1]
        if local == 0:
            due = rounds.complete() < number
            wait()  # every process has looked before the first one writes
            if due:
                ask_images(s, run, system.teacher, target, rounds, number, counts[number - 1])
            if number > 1:
                system.begin_loop()
        if step == start or local == 0:
            labelled, unlabelled = loop_batches(s, source, target, rounds, number, local)

        run.set_rate(poly(local, length))
        others, generator = system.partners.next(step), system.generator(step)
        system.partners.draw(system.confidence.value, system.images, generator)
        batch = [*next_batch(labelled, device)[:2], *(next_batch(unlabelled, device) or ())]
        losses, health = system.losses(batch, others, generator, local / length)
        run.descend(
            losses,
            {"supervised": 1.0, "unlabelled": s.unlabelled, "contrastive": s.contrast},
            health,
        )
        update_teacher(system.teacher, run.model, local, s.ema)
        run.log(step + 1, system.state)
        if step + 1 == starts[number]:
            scores = system.evaluate(validation, protocol_of(s))
            asked = ledger(records_of(rounds))
            labelled_so_far = {
                "asked_images": asked["images"],
                "share": asked["asked"] / pixels_of(target),
            }
            run.write_metrics({"step": step + 1, "loop": number, **labelled_so_far, **scores})
        if (step + 1) % s.checkpoint_every == 0 or step + 1 == starts[number]:
            run.save(step + 1)

    lines = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        if run.rank == 0
        else []
    )
    loops = [line for line in lines if "loop" in line]
    keys = ("loop", "asked_images", "share", "mIoU19")
    return {
        **{
            key: value
            for key, value in (loops[-1] if loops else {}).items()
            if key not in ("step", *keys[:3])
        },
        **report(s, source, target, rounds),
        "loops": [
            {**{k: line[k] for k in keys}, "student mIoU19": line["student"]["mIoU19"]}
            for line in loops
        ],
    }


def pixels_of(dataset) -> int:
    """The pixels of all images of a dataset."""
    return sum(height * width for height, width in (sample.size for sample in dataset.samples))


def images_due(s: Settings, images: int) -> list[int]:
    """How many whole images each loop asks: 20 %, 44 % and 100 % of --budget in three loops, as STAL's 1, 2.2 and 5 %.

    Other numbers of loops share the budget equally. Raises InputError where a loop would ask for none or none would be left.
    """
    shares = [0.2, 0.44, 1.0] if s.rounds == 3 else [(n + 1) / s.rounds for n in range(s.rounds)]
    ends = [max(1, round(s.budget * share * images)) for share in shares]
    counts = [end - before for end, before in zip(ends, [0, *ends], strict=False)]
    if min(counts) < 1 or ends[-1] >= images:
        raise InputError(
            f"--budget {s.budget} of {images} target images in {s.rounds} loops asks {counts} images: every loop needs one or "
            "more, and some must stay unlabelled"
        )
    return counts


def loop_batches(s: Settings, source, target, rounds: Rounds, number: int, step: int):
    """(labelled, unlabelled) batches of loop `number` from its step `step` on; None for unlabelled ones that no loss reads.

    Labelled: all source images and the asked target images, these repeated to about as many as the source has. Unlabelled:
    the other target images, whose truth comes along for the log's accuracy and to know what a crop added outside the image.
    """
    asked = {
        image for earlier in range(1, number + 1) for image in rounds.record(earlier)["images"]
    }
    known = [i for i, sample in enumerate(target.samples) if sample.id in asked]
    unknown = [i for i, sample in enumerate(target.samples) if sample.id not in asked]
    views = [
        TrainingView(source, transform_of(s, 1), mix_seed(s.seed, 21, number)),
        TrainingView(
            target,
            transform_of(s, 2),
            mix_seed(s.seed, 22, number),
            partial(labels_known, target, rounds, upto=number),
        ),
        TrainingView(
            target, transform_of(s, 2), mix_seed(s.seed, 23, number), partial(truth_inside, target)
        ),
    ]
    repeats = max(1, round(len(source) / len(known)))
    labelled = [(0, i) for i in range(len(source))] + [(1, i) for i in known] * repeats
    first = mixed_batches(s, views, labelled, step, mix_seed(s.seed, 24, number))
    if not (s.unlabelled or s.contrast):
        return first, None
    return first, mixed_batches(
        s, views, [(2, i) for i in unknown], step, mix_seed(s.seed, 25, number)
    )


# --------------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """The command line (see the top of this file); returns the exit status: 0 done, 2 bad usage or input."""
    out = None
    try:
        s = parse(argv)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and s.strategy != "stal":
            raise InputError(
                f"--strategy {s.strategy} runs in one process: start it without torchrun"
            )
        device = join(pick_device(s.device))
        if s.threads:
            torch.set_num_threads(s.threads)
        if rank_and_number()[0] == 0:
            if s.root == "toy":
                toy.ensure("toy")
            out = prepare(s)
        wait()
        run_strategy(s, out or run_folder(s), device)
        leave()
        return 0
    except (InputError, FloatingPointError, OSError) as error:
        traces = ("checkpoints", "rounds", "pseudo", "source", "metrics.jsonl")
        if out is not None and not any((out / part).exists() for part in traces):
            (out / "config.json").unlink(
                missing_ok=True
            )  # nothing was run: the folder stays free for the next try
        text = (
            str(error).strip().splitlines()[-1]
        )  # from a loading process the message comes below its traceback
        print(f"error: {text.removeprefix('alda.InputError: ')}", file=sys.stderr)
        return 2


def run_strategy(s: Settings, out: Path, device: torch.device) -> None:
    """Runs the strategy's loop; the first process writes result.json and prints the scores."""
    rank, world = rank_and_number()
    began, mark = time.time(), "TOY " if s.root == "toy" else ""
    if rank == 0:
        length = f"{s.epochs} epochs a round" if s.epochs else f"{s.steps} steps"
        where = f"{device}" if world == 1 else f"{world} processes ({device.type})"
        print(
            f"{mark}{s.strategy}: {s.src} -> {s.tgt}, {length} on {where}, run folder {out}",
            flush=True,
        )
    if world > 1 and device.type == "cpu" and rank == 0:
        print(
            "batch norm is not synchronised on CPUs: each process normalises its own images",
            flush=True,
        )
    families = {"stal": adapt_in_loops, **dict.fromkeys(SELF_TRAINING, adapt_by_self_training)}
    result = {
        "strategy": s.strategy,
        "toy": s.root == "toy",
        **families.get(s.strategy, adapt_by_queries)(s, out, device),
    }
    if rank == 0:
        result["wall_s"] = time.time() - began
        (out / "result.json").write_text(json.dumps(result, indent=1))
        teacher = ", teacher" if "student" in result else ""
        print(
            f"{mark}{s.strategy}, last checkpoint{teacher}, {result['images']} validation images\n{describe(result)}"
        )
    wait()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command with --resume goes on from the last checkpoint")
