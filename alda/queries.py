"""Which labels does a round buy? Budgets, the choice over the whole target set, and the round itself.

    from alda.queries import ask, labels_known, query_schedule

RIPU: Xie et al., CVPR 2022, arXiv 2111.12940. CBDA: Schachtsiek, Rossi and Hannagan, arXiv 2311.14146. Axes: H rows, W
columns; the scores themselves are in acquisition.py, the folders that a round leaves in annotation.py.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch

from alda import IGNORE, InputError, acquisition, deeplab
from alda.annotation import Rounds, ground_truth, ledger
from alda.datasets import (
    NAMES,
    PSEUDO,
    ImagesOnly,
    SegmentationDataset,
    load,
    mix_seed,
    normalise,
    resize_image,
)
from alda.evaluation import class_picture, parse_size
from alda.processes import add_up, rank_and_number, share_buffers, wait
from alda.pseudolabels import probabilities, pseudo_labels
from alda.run import Run, save_picture
from alda.settings import Settings


def query_schedule(s: Settings) -> list[int]:
    """How many steps are done when each round is asked.

    RIPU: 10,000 to 18,000 of 40,000 in equal parts, that is 25 % to 45 % of the steps; source-free 0 to 8,000 of 30,000.
    """
    if s.query_steps:
        try:
            schedule = [int(part) for part in s.query_steps.split(",")]
        except ValueError:
            raise InputError(
                f"--query-steps is a list like 10000,12000; got {s.query_steps!r}"
            ) from None
        if (
            schedule != sorted(set(schedule))
            or schedule[0] < 0
            or schedule[-1] >= s.steps
            or len(schedule) != s.rounds
        ):
            raise InputError(
                f"--query-steps needs --rounds ({s.rounds}) growing steps below --steps ({s.steps}); got {s.query_steps}"
            )
        return schedule
    first, last = (0, 8 / 30) if s.source_free else (0.25, 0.45)
    share = np.linspace(first, last, s.rounds) if s.rounds > 1 else [first]
    schedule = [round(s.steps * float(x)) for x in share]
    if len(set(schedule)) < s.rounds:
        raise InputError(
            f"--steps {s.steps} is too short for --rounds {s.rounds}: two rounds fall on one step"
        )
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
        raise InputError(
            f"the budget (--budget {s.budget}) is {budget} pixels, less than one region ({area})"
        )
    return max(0, min(math.ceil(budget / s.rounds / area), (budget - asked_before) // area))


def score_of(s: Settings, logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The strategy's score map (H,W) of one image's logits (C,H,W); `seed` serves the strategy `random`."""
    if s.strategy == "random":
        return acquisition.random_score(logits.shape[-2:], seed, logits.device)
    if s.strategy in ("entropy", "margin"):
        score = {"entropy": acquisition.entropy_score, "margin": acquisition.margin_score}[
            s.strategy
        ]
        return score(logits, 0 if s.unit == "pixel" else s.radius)
    return (
        acquisition.pixel_score(logits, s.radius)
        if s.unit == "pixel"
        else acquisition.ripu_score(logits, s.radius)[0]
    )


def ask(
    s: Settings, run: Run, target: SegmentationDataset, rounds: Rounds, number: int, out: Path
) -> None:
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
                save_picture(
                    panels,
                    sample.size,
                    out / "pictures" / f"round-{number:02d}" / f"{sample.id}.png",
                )
        new.notes = notes
    record = rounds.record(number)
    histogram = out / "pictures" / f"round-{number:02d}" / "classes.png"
    class_picture(
        ledger([*records, record])["classes"], histogram, balanced="class_weights" in notes
    )
    print(
        f"round {number}/{s.rounds}: asked {record['asked']:,} px ({record['regions']:,} of {notes['picks_due']:,} picks due, "
        f"{len(record['images'])} images), labelled {record['labelled']:,}, ignored by the truth {record['ignored']:,}, "
        f"left at {s.target_size} {record['trained']:,} ({time.time() - began:.0f} s)",
        flush=True,
    )


@torch.no_grad()
def choose(
    s: Settings,
    run: Run,
    target: SegmentationDataset,
    rounds: Rounds,
    number: int,
    records: list[dict],
):
    """Which centres round `number` asks: (centres (n,2) int64 of every image, panels of the images drawn, notes).

    RIPU: each image has its own budget. CBDA `dynamic`: one budget over all images; `balance`: scores are weighted by what
    the classes have consumed so far. Scores are taken on the logits at the image's full size, in eval mode, one image at a
    time. A pick blocks the centres within 2k (regions) or k (pixels) in this round and, through the pixels asked so far,
    in all later ones.
    """
    dynamic, balance = (
        s.strategy == "cbda" and s.cbda in (part, "both") for part in ("dynamic", "balance")
    )
    whole = budget_pixels(s, [sample.size for sample in target.samples])
    notes: dict = {"budget_px": whole}
    weights = None
    if balance:
        weights = acquisition.class_weights(
            torch.tensor([*ledger(records)["classes"].values()]), whole
        )
        notes["class_weights"] = dict(zip(NAMES, weights.tolist(), strict=True))
    count = regions_due(
        whole, s, sum(record["asked"] for record in records)
    )  # of the round, over all images
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
        prediction, score = (
            logits.argmax(0),
            score_of(s, logits, mix_seed(s.seed, 3, number, index)),
        )
        if not logits.isfinite().all():
            raise FloatingPointError(
                f"{sample.image}: the network's output is not finite; nothing was asked; try a lower --lr"
            )
        if balance:
            score = acquisition.class_balanced(score, prediction, weights)
            score = score.masked_fill(
                (weights == 0).to(run.device)[prediction], -math.inf
            )  # has used up its share
        before = rounds.asked(sample.id, sample.size, number - 1)
        blocked = acquisition.dilate(before.to(run.device), s.radius) if number > 1 else None
        due = (
            count if dynamic else regions_due(budget_pixels(s, [sample.size]), s, int(before.sum()))
        )
        free = score.masked_fill(score < pool.floor, -math.inf) if dynamic else score
        picked = acquisition.select_regions(free, due, block_radius, blocked)
        if dynamic:
            pool.add(index, picked, score[picked[:, 0], picked[:, 1]])
        else:
            centres.append(picked.cpu())
            notes["picks_due"] += due
        if s.pictures and index % every == 0:
            shown[index] = {
                "image": image,
                "prediction": prediction.to(torch.uint8).cpu(),
                "score": score.cpu(),
            }
    run.model.train()
    if dynamic:
        picks = pool.select()
        centres = [
            picks.get(index, torch.empty(0, 2, dtype=torch.int64)) for index in range(len(target))
        ]
        notes["threshold"] = pool.threshold
    return centres, shown, notes


def ask_images(
    s: Settings,
    run: Run,
    teacher,
    target: SegmentationDataset,
    rounds: Rounds,
    number: int,
    count: int,
) -> None:
    """STAL's query: `count` whole images, the most uncertain of each group (Eq. (8)); stores them as round `number`.

    The groups (cities, conditions) are asked in proportion to their remaining images, see acquisition.split_by_group. The
    first round, and all with --image-queries random, take random images of each group. The uncertainty is the
    teacher's, at the images' full size. Under torchrun each process scores its share of the images.
    """
    began = time.time()
    rank, world = rank_and_number()
    taken = {image for earlier in range(1, number) for image in rounds.record(earlier)["images"]}
    left = [index for index, sample in enumerate(target.samples) if sample.id not in taken]
    score = torch.zeros(len(target), dtype=torch.float64)
    shown = {}
    if number > 1 and s.image_queries == "uncertainty":
        share_buffers(teacher)
        for index, image, prob in probabilities(s, run, target, teacher, left[rank::world]):
            score[index] = acquisition.image_uncertainty(prob)
            panels = {
                "image": image,
                "prediction": prob.argmax(0).to(torch.uint8),
                "uncertainty": acquisition.pixel_entropy(prob),
            }
            shown[index] = {name: panel.cpu() for name, panel in panels.items()}
            if len(shown) > s.pictures:  # only the most uncertain ones are drawn
                del shown[min(shown, key=lambda i: score[i].item())]
        score = add_up(score.to(run.device)).cpu()
    else:
        score[left] = torch.from_numpy(
            np.random.default_rng(mix_seed(s.seed, 3, number)).random(len(left))
        )
    if rank == 0:
        groups: dict[str, list[int]] = {}
        for index in left:
            groups.setdefault(target.samples[index].group, []).append(index)
        quotas = acquisition.split_by_group(
            {g: len(members) for g, members in groups.items()}, count
        )
        chosen = [
            i
            for g, members in groups.items()
            for i in sorted(members, key=lambda i: -score[i])[: quotas[g]]
        ]
        size = parse_size(s.target_size)
        with rounds.new(number) as new:
            for index in chosen:
                sample = target.samples[index]
                everything = torch.ones(sample.size, dtype=torch.bool)
                new.add(sample.id, everything, ground_truth(target, index), 1, size, s.keep_labels)
                if index in shown:
                    panels = {**shown[index], "answers": target.labels(index)}
                    save_picture(
                        panels,
                        sample.size,
                        run.out / "pictures" / f"round-{number:02d}" / f"{sample.id}.png",
                    )
            new.notes = {
                "quotas": quotas,
                "scores": {target.samples[i].id: score[i].item() for i in chosen},
            }
        record = rounds.record(number)
        print(
            f"round {number}/{s.rounds}: asked {len(record['images'])} whole images ({record['asked']:,} px) of {len(left)} "
            f"left, labelled {record['labelled']:,} px ({time.time() - began:.0f} s)",
            flush=True,
        )
    wait()


def pseudo_schedule(s: Settings, queries: list[int]) -> list[int]:
    """Before which steps --pseudo labels the target anew: --pseudo-steps, or the last query and three more, evenly."""
    if s.pseudo == "none":
        return []
    if s.pseudo_steps:
        try:
            schedule = [int(part) for part in s.pseudo_steps.split(",")]
        except ValueError:
            schedule = []
        if (
            not schedule
            or schedule != sorted(set(schedule))
            or schedule[0] < 0
            or schedule[-1] >= s.steps
        ):
            raise InputError(
                f"--pseudo-steps needs growing steps below --steps ({s.steps}); got {s.pseudo_steps!r}"
            )
        return schedule
    first = queries[-1]
    return sorted({first + (s.steps - first) * part // 4 for part in range(4)})


def labels_and_pseudo(
    target: SegmentationDataset, rounds: Rounds, pseudo: Rounds, index: int, upto: int, number: int
):
    """The bought labels of an image, and 100 + c where there is none but round `number` of pseudo-labels says c."""
    bought, guessed = (
        labels_known(target, rounds, index, upto),
        pseudo_labels(target, pseudo, number, index),
    )
    return torch.where(
        bought != IGNORE, bought, torch.where(guessed != IGNORE, guessed + PSEUDO, IGNORE)
    )


def labels_known(
    target: SegmentationDataset, rounds: Rounds, index: int, upto: int
) -> torch.Tensor:
    """The labels of a target image that rounds 1..upto bought: (H,W) uint8, 255 elsewhere."""
    sample = target.samples[index]
    return rounds.labels(sample.id, sample.size, upto)
