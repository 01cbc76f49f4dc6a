"""One pass over the target set: ask for pixels or images, pseudo-label. What happens in a round?

    from alda.rounds import ask_pixels, ask_images, label_target, query_schedule

RIPU: Xie et al., CVPR 2022, arXiv 2111.12940. CBDA: Schachtsiek, Rossi and Hannagan, arXiv
2311.14146. STAL: Guan and Yuan, arXiv 2301.13361. CBST: Zou et al., ECCV 2018, arXiv 1810.07911.
The scores are in acquisition.py, CBST's thresholds in selftraining.py, the folders that a round
leaves in annotation.py. Axes: C classes, H rows, W columns.

Differences from papers and official code:

  D7. Budget: the code asks ceil(H W budget / rounds / (2k+1)^2) regions in each round, which adds
      up to more than the budget. Here a round is cut to what the budget has left: 4 x 1,026 + 1,022
      regions for 2.2 % of 2048x1024. Pixels not spent are not asked later; each round prints picks
      made and due.
  D8. Pixel queries: the paper asks 40 pixels an image, 8 a round; the code's formula 21 a round,
      105 in all (--rules code).
  D9. Scores at full size: the code resizes logits twice (to 1280x640, then to 2048x1024), here
      once. STAL's code squashes images to 769x769 to score them, here they keep --target-size.
 D10. The first images of STAL are drawn at random over the cities, as the paper; the code reads a
      published list.
"""

import math
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from alda import IGNORE, InputError, acquisition
from alda.annotation import Rounds, begin_folder, complete_folder, ground_truth, ledger, write_map
from alda.datasets import (
    NAMES,
    NUM_CLASSES,
    EachImage,
    SegmentationDataset,
    ahead,
    load,
    mix_seed,
    progress,
)
from alda.distributed import (
    all_reduce,
    all_reduce_number,
    barrier,
    broadcast_buffers,
    first_says,
    gather_list,
    is_first,
    rank_and_world,
    say,
    share,
)
from alda.evaluation import network_logits, probabilities, same_sized
from alda.oracle import asking
from alda.pictures import class_picture, save_round, save_sheet, widened
from alda.run import Run, check_folder
from alda.selftraining import (
    ConfidenceHistogram,
    cbst_pseudo_labels,
    portion_of_round,
    pseudo_label_statistics,
    spatial_prior,
)
from alda.settings import QUERIES, Settings

CHUNK = 16  # label maps that a process holds before they are written

# ------------------------------------------------------------------------------- when, and how many


def query_schedule(s: Settings) -> list[int]:
    """How many steps are done when each round is asked.

    RIPU: 10,000 to 18,000 of 40,000 in equal parts, that is 25 % to 45 % of the steps; source-free
    0 to 8,000 of 30,000. Raises InputError for --query-steps that do not fit, and for too few
    steps.
    """
    if s.query_steps:
        schedule = steps_of(s.query_steps, "--query-steps", s)
        if len(schedule) != s.rounds:
            raise InputError(
                f"--query-steps needs as many steps as --rounds ({s.rounds}); got {s.query_steps}"
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


def pseudo_schedule(s: Settings, queries: list[int]) -> list[int]:
    """Before which steps --pseudo labels the target anew: --pseudo-steps, or the last query and
    three more, evenly."""
    if s.pseudo == "none":
        return []
    if not s.pseudo_steps:
        first = queries[-1]
        return sorted({first + (s.steps - first) * part // 4 for part in range(4)})
    return steps_of(s.pseudo_steps, "--pseudo-steps", s)


def steps_of(text: str, option: str, s: Settings) -> list[int]:
    """The steps in "10000,12000". Raises InputError, naming the option, unless they grow and lie
    below --steps."""
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        steps = [-1]
    if steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= s.steps:
        raise InputError(
            f"{option} needs growing steps below --steps ({s.steps}), like 10000,12000; got {text!r}"
        )
    return steps


def budget_pixels(s: Settings, sizes: list[tuple[int, int]]) -> int:
    """How many pixels may be asked of images of these `sizes` (H, W), over all rounds.

    Pixel queries: --pixels an image. With --rules code the official formula, which scales their
    number from the training size to the image: 21 a round, 105 in all on Cityscapes, not 40.
    """
    if s.unit == "pixel" and s.pixels:
        if s.rules == "paper":
            return s.pixels * len(sizes)
        seen = s.target_hw[0] * s.target_hw[1]
        return sum(s.rounds * math.ceil(s.pixels / s.rounds / seen * h * w) for h, w in sizes)
    return int(sum(height * width for height, width in sizes) * s.budget)


def regions_due(budget: int, s: Settings, asked_before: int) -> int:
    """How many picks a round makes of `budget` pixels, of which `asked_before` are spent.

    RIPU asks ceil(budget / rounds / (2k+1)^2) regions of an image in each round; here never more
    than the budget has left, so that five roundings up do not add up to more than was promised. A
    pixel pick costs one pixel. Raises InputError for a budget below one region.
    """
    area = 1 if s.unit == "pixel" else (2 * s.radius + 1) ** 2
    if budget < area:
        raise InputError(
            f"the budget (--budget {s.budget}) is {budget} pixels, less than one region ({area})"
        )
    return max(0, min(math.ceil(budget / s.rounds / area), (budget - asked_before) // area))


def check_budget(s: Settings, target: SegmentationDataset) -> None:
    """Notices a budget that is too small for one region before anything is trained (InputError)."""
    sizes = [sample.size for sample in target.samples]
    for group in [sizes] if s.one_budget else [[size] for size in set(sizes)]:
        regions_due(budget_pixels(s, group), s, 0)


# -------------------------------------------------------------------- the network on the target set


@torch.inference_mode()
def over_target(s: Settings, run: Run, target, see, model=None, indices=None, lost=""):
    """Yields (index, image (3,H,W) uint8, see(s, model, images, device) (C,H,W) float32 at the image's
    full size), the model in eval mode: `see` is `logits_of` or `mirrored_probabilities`.

    `model` is the run's unless given (a teacher), `indices` all images unless given. Images of one
    size pass together, a few at a time. Raises FloatingPointError where a value is not finite; `lost`
    is added to the message.
    """
    model = run.model if model is None else model
    indices = range(len(target)) if indices is None else indices
    training = model.training
    model.eval()
    images = load(Subset(EachImage(len(target), target.image), indices), s.workers, batch_size=None)
    images = progress(images, len(indices), "images seen")
    try:
        for several, batch in same_sized(zip(indices, images, strict=True), run.device):
            with run.autocast():
                seen = see(s, model, batch, run.device)
            for index, image, one in zip(several, batch, seen, strict=True):
                if not one.isfinite().all():
                    raise FloatingPointError(
                        f"{target.samples[index].image}: the network's output is not finite{lost}; "
                        "try a lower --lr"
                    )
                yield index, image, one
    finally:
        model.train(training)


def logits_of(s: Settings, model, images: torch.Tensor, device) -> torch.Tensor:
    """The network's logits (N,C,H,W) for images that it sees at --target-size."""
    return network_logits(model, images, s.target_hw, device)


def mirrored_probabilities(s: Settings, model, images: torch.Tensor, device) -> torch.Tensor:
    """Probabilities (N,C,H,W) for pseudo-labels, at --label-scale of --target-size; with --label-flip
    the mean of the image's and its mirror image's. CRST's official script: 0.9, with the mirror.

    Softmax in float32: in bfloat16 a sure pixel saturates at 1, where CBST's strict rule labels
    nothing.
    """
    size = tuple(max(1, int(length * s.label_scale)) for length in s.target_hw)
    return probabilities(model, images, size, device, s.label_flip)


# ----------------------------------------------------------------------------------- ask for pixels


class Chosen(NamedTuple):
    """What a round asks; under torchrun complete on the first process alone."""

    centres: list[torch.Tensor]  # of every image, (n,2) int64 (row, column), the first picked first
    factors: dict[int, torch.Tensor]  # score, impurity, uncertainty, class (n,4), by image
    shown: dict[int, dict]  # by image: the panels to draw
    notes: dict  # what round.json says beside the ledger


def ask_pixels(s: Settings, run: Run, target: SegmentationDataset, rounds: Rounds, number: int):
    """Query round `number` over the whole target set: score and select, ask the oracle, store,
    draw, report. Under torchrun each process scores its share of the images, the first asks."""
    began = time.time()
    records = [rounds.record(earlier + 1) for earlier in range(number - 1)]
    say(f"round {number}/{s.rounds}: scoring {len(target)} images")
    chosen = choose(s, run, target, rounds, number, records)
    if is_first():
        folder = run.out / "pictures" / f"round-{number:02d}"
        report_choice(s, number, chosen)  # first: where people answer, the run ends in store_picks
        store_picks(s, target, rounds, number, chosen, folder)
        labelled = ledger([*records, rounds.record(number)])["classes"]
        class_picture(labelled, folder / "classes.png", balanced="class_weights" in chosen.notes)
        report_picks(s, rounds, number, time.time() - began)
    barrier(rounds.path(number) / "round.json")


def store_picks(s: Settings, target, rounds: Rounds, number: int, chosen: Chosen, folder: Path):
    """Asks the oracle for what was `chosen` and stores it as round `number`; draws some into
    `folder`."""
    centres, factors, shown, notes = chosen
    paint_radius = 0 if s.unit == "pixel" else s.radius
    with asking(s, rounds, number, target, centres) as new:

        def ask(index):
            sample, picks = target.samples[index], len(centres[index])
            asked = acquisition.paint(centres[index], paint_radius, sample.size)
            oracle = ground_truth(target, index)
            answers = new.add(sample.id, asked, oracle, picks, s.target_hw, s.keep_labels)
            if picks:
                place = new.work / "picks" / f"{sample.id}.csv"
                write_factors(place, centres[index], factors[index])
            return index, sample, asked, answers if index in shown else None

        for index, sample, asked, answers in ahead(ask, range(len(target)), s.workers):
            if index in shown:
                before = asked_before(target, rounds, number, index)
                known = rounds.labels(sample.id, sample.size, number - 1)
                answered = widened(torch.where(answers == IGNORE, known, answers))
                panels = {**shown[index], "answers so far": answered, **truth_of(target, index)}
                save_round(panels, asked, before, folder / f"{sample.id}.png")
                write_map(folder / f"{sample.id}_prediction.png", panels["prediction"])
        order = [sample.id for sample in target.samples if sample.id in new.images]
        new.images, new.notes = {name: new.images[name] for name in order}, notes


def truth_of(target, index: int) -> dict[str, torch.Tensor]:
    """The panel of an image's truth in a picture, where there is one."""
    return {"truth": target.truth(index)} if target.samples[index].label else {}


def write_factors(path: Path, centres: torch.Tensor, factors: torch.Tensor) -> None:
    """Why these places: rounds/NN/picks/IMAGE.csv, a line each pick, the first picked first."""
    path.parent.mkdir(exist_ok=True)
    lines = ["row,column,score,impurity,uncertainty,predicted"]
    for (row, column), values in zip(centres.tolist(), factors.tolist(), strict=True):
        score, impurity, uncertainty, c = values
        lines.append(f"{row},{column},{score:.6g},{impurity:.6g},{uncertainty:.6g},{NAMES[int(c)]}")
    path.write_text("\n".join(lines) + "\n")


def report_choice(s: Settings, number: int, chosen: Chosen) -> None:
    """Prints how much of what was due round `number` found to ask, and why where it is little."""
    picks, due = sum(map(len, chosen.centres)), chosen.notes["picks_due"]
    score_0 = chosen.notes["share_of_score_0"]
    print(
        f"round {number}/{s.rounds}: {picks:,} of {due:,} picks due; {score_0:.0%} of the picks "
        "have score 0",
        flush=True,
    )
    used_up = [name for name, w in chosen.notes.get("class_weights", {}).items() if w == 0]
    if used_up and (picks < due or score_0 > 0.5):
        little = "" if picks < due else " that scores above 0"
        print(
            f"warning: round {number} found little to ask{little}: {', '.join(used_up)} have had their share "
            f"of --budget, which CBDA's balance divides alike over {len(NAMES)} classes, and are not "
            "asked again; where few of the classes occur, --cbda dynamic asks on",
            flush=True,
        )
    elif picks < due and s.unit == "pixel":
        print(
            f"warning: round {number} asks {due - picks:,} px less than are due: every pixel left lies "
            f"within --radius {s.radius} of one that was asked; give a smaller --radius or budget",
            flush=True,
        )
    elif score_0 > 0.5 and s.radius:
        print(
            f"warning: more than half of the picks of round {number} have score 0: the network sees "
            "too few classes to tell regions apart; train longer before the first query (--query-steps)",
            flush=True,
        )


def report_picks(s: Settings, rounds: Rounds, number: int, seconds: float) -> None:
    """Prints what round `number` asked and got."""
    record = rounds.record(number)
    print(
        f"round {number}/{s.rounds}: asked {record['asked']:,} px on {len(record['images'])} images, "
        f"labelled {record['labelled']:,}, ignored by the truth {record['ignored']:,}, "
        f"left at {s.target_size} {record['trained']:,} ({seconds:.0f} s)",
        flush=True,
    )


@torch.inference_mode()
def choose(s: Settings, run: Run, target, rounds: Rounds, number: int, records: list[dict]):
    """Which centres round `number` asks: `Chosen`.

    RIPU: each image has its own budget. CBDA `dynamic`: one budget over all images; `balance`:
    scores are weighted by what the classes have consumed so far. Scores are taken on the logits at
    the image's full size, in eval mode, one image at a time. A pick blocks the centres within 2k
    (regions) or k (pixels) in this round and, through the pixels asked so far, in all later ones.
    Equal scores are ranked by `tie_breaks`.
    """
    whole = budget_pixels(s, [sample.size for sample in target.samples])
    notes: dict = {"budget_px": whole}
    weights = None
    if s.strategy == "cbda" and s.cbda in ("balance", "both"):
        counts = torch.tensor([*ledger(records)["classes"].values()])
        weights = acquisition.class_weights(counts, whole)
        notes["class_weights"] = dict(zip(NAMES, weights.tolist(), strict=True))
    count = regions_due(whole, s, sum(record["asked"] for record in records))  # over all images
    pool = acquisition.GlobalBudget(count)
    block_radius = s.radius if s.unit == "pixel" else 2 * s.radius
    centres, factors, shown, picks_due = {}, {}, {}, 0
    every = math.ceil(len(target) / max(1, s.pictures))
    broadcast_buffers(run.model)
    own, lost = share(range(len(target))), "; nothing was asked"
    seen = over_target(s, run, target, logits_of, indices=own, lost=lost)
    earlier = ahead(lambda i: asked_before(target, rounds, number, i), own, s.workers)
    for (index, image, logits), before in zip(seen, earlier, strict=True):
        sample = target.samples[index]
        entropies, prediction = acquisition.entropy_and_prediction(logits)
        score = score_of(s, logits, prediction, weights, number, index)
        blocked = acquisition.dilate(before.to(run.device), s.radius) if number > 1 else None
        due = count
        if not s.one_budget:
            due = regions_due(budget_pixels(s, [sample.size]), s, int(before.sum()))
            picks_due += due
        free = score.masked_fill(score < pool.floor, -math.inf)  # CBDA: what can still win
        ties = tie_breaks(s, entropies, number, index)
        picked = acquisition.select_regions(free, due, block_radius, blocked, ties)
        at = picked.unbind(1)
        why = acquisition.factors_at(picked, entropies, prediction, len(logits), s.radius, s.unit)
        factors[index] = torch.stack([score[at], *why, prediction[at]], 1).cpu()
        if s.one_budget:
            pool.add(index, picked.cpu(), factors[index][:, 0])
            for i, (kept, _) in pool.images.items():
                if len(kept) < len(factors[i]):  # what can no longer win was thrown away
                    factors[i] = factors[i][: len(kept)].clone()
        else:
            centres[index] = picked.cpu()
        if s.pictures and index % every == 0:
            panels = {"prediction": prediction.cpu(), "score": score.cpu()}
            shown[index] = {"image": image, **panels}
    if s.one_budget:
        centres = pool.select()
        factors = {index: factors[index][: len(picked)] for index, picked in centres.items()}
        notes["threshold"] = pool.threshold
    notes["picks_due"] = count if s.one_budget else all_reduce_number(picks_due)
    nothing = torch.empty(0, 2, dtype=torch.int64)
    chosen = gather_list([(index, centres[index], factors[index]) for index in centres])
    centres = {index: picked for index, picked, _ in chosen}
    centres = [centres.get(index, nothing) for index in range(len(target))]
    factors = {index: rows for index, _, rows in chosen}
    scores = torch.cat([torch.empty(0), *(rows[:, 0] for rows in factors.values())])
    notes["share_of_score_0"] = (scores == 0).double().mean().item() if len(scores) else 0.0
    return Chosen(centres, factors, dict(gather_list([*shown.items()])), notes)


def score_of(s: Settings, logits, prediction, weights, number: int, index: int) -> torch.Tensor:
    """The score (H,W) float32 of image `index` in round `number`: CBDA's `weights` (C,), where there
    are some, multiply it by its `prediction` (H,W), and -inf stands where the class has had its share
    of the budget. `logits` (C,H,W)."""
    seed = mix_seed(s.seed, 3, number, index)
    score = acquisition.SCORES[s.strategy](logits, s.radius, s.unit, seed)
    if weights is None:
        return score
    score = acquisition.class_balanced(score, prediction, weights)
    return score.masked_fill((weights == 0).to(score.device)[prediction.long()], -math.inf)


def asked_before(target, rounds: Rounds, number: int, index: int) -> torch.Tensor:
    """The pixels of an image that the rounds before round `number` asked, (H,W) bool."""
    sample = target.samples[index]
    return rounds.asked(sample.id, sample.size, number - 1)


def tie_breaks(
    s: Settings, entropies: torch.Tensor, number: int, index: int
) -> torch.Tensor | None:
    """What ranks equal scores of an image: the uncertainty of what a pick labels, from the pixels'
    `entropies` (H,W), then a draw by seed, round and image; (2,H,W) float32. None with --rules code:
    the official order, from the left.

    A flat prediction has impurity 0, and so score 0, everywhere: on real photographs a first round
    that follows the official order lies in the two leftmost columns.
    """
    if s.rules == "code":
        return None
    radius, seed = 0 if s.unit == "pixel" else s.radius, mix_seed(s.seed, 4, number, index)
    draw = acquisition.random_score(entropies.shape, seed, entropies.device)
    return torch.stack([acquisition.region_uncertainty(entropies, radius), draw])


# ----------------------------------------------------------------------------------- ask for images


def ask_images(
    s: Settings, run: Run, teacher, target, rounds: Rounds, number: int, count: int
) -> None:
    """STAL's query: `count` whole images, the most uncertain of each group; stores them as round
    `number`, unless that is complete.

    The groups (cities, conditions) are asked in proportion to their remaining images, see
    acquisition.split_by_group. The first round, and all with --image-queries random, take random
    images of each group. The uncertainty is the teacher's, at the images' full size. Under torchrun
    each process scores its share of the images.
    """
    began = time.time()
    check_folder(run.out)
    if not first_says(rounds.complete() < number):
        return
    taken = {image for n in range(1, number) for image in rounds.record(n)["images"]}
    left = [i for i, sample in enumerate(target.samples) if sample.id not in taken]
    if number > 1 and s.image_queries == "uncertainty":
        say(f"round {number}/{s.rounds}: scoring {len(left)} images")
        score, shown = uncertainty_of_images(s, run, teacher, target, left)
    else:
        draws = np.random.default_rng(mix_seed(s.seed, 3, number)).random(len(left))
        score, shown = torch.zeros(len(target), dtype=torch.float64), {}
        score[left] = torch.from_numpy(draws)
    if is_first():
        chosen, quotas = most_uncertain(target, left, score, count)
        folder = run.out / "pictures" / f"round-{number:02d}"
        with asking(s, rounds, number, target) as new:
            for index in chosen:
                sample = target.samples[index]
                everything = torch.ones(sample.size, dtype=torch.bool)
                oracle = ground_truth(target, index)
                answers = new.add(sample.id, everything, oracle, 1, s.target_hw, s.keep_labels)
                if index in shown:
                    panels = {} if s.oracle == "files" else {"answers": answers}
                    save_sheet({**shown[index], **panels}, folder / f"{sample.id}.png")
            scores = {target.samples[i].id: score[i].item() for i in chosen}
            new.notes = {"quotas": quotas, "scores": scores}
        record = rounds.record(number)
        print(
            f"round {number}/{s.rounds}: asked {len(record['images'])} whole images "
            f"({record['asked']:,} px) of {len(left)} left, labelled {record['labelled']:,} px "
            f"({time.time() - began:.0f} s)",
            flush=True,
        )
    barrier(rounds.path(number) / "round.json")


def uncertainty_of_images(s: Settings, run: Run, teacher, target, left: list[int]):
    """(uncertainty of every image (N,) float64, 0 for those not `left`; panels of the most
    uncertain ones).

    Collective under torchrun: each process scores its share, the first has the panels."""
    broadcast_buffers(teacher)
    score, shown = torch.zeros(len(target), dtype=torch.float64), {}
    for index, image, logits in over_target(s, run, target, logits_of, teacher, share(left)):
        prob = logits.softmax(0)
        score[index] = acquisition.image_uncertainty(prob)
        panels = {
            "image": image,
            "prediction": prob.argmax(0).to(torch.uint8),
            "uncertainty": acquisition.pixel_entropy(prob),
        }
        shown[index] = {name: panel.cpu() for name, panel in panels.items()}
        if len(shown) > s.pictures:  # only the most uncertain ones are drawn
            del shown[min(shown, key=lambda i: score[i].item())]
    score, shown = all_reduce(score.to(run.device)).cpu(), dict(gather_list([*shown.items()]))
    order = sorted(shown, key=lambda i: score[i].item(), reverse=True)
    return score, {index: shown[index] for index in order[: s.pictures]}


def most_uncertain(target, left: list[int], score: torch.Tensor, count: int):
    """(indices of the `count` images asked, {group: how many}): the highest scores of each
    group."""
    groups: dict[str, list[int]] = {}
    for index in left:
        groups.setdefault(target.samples[index].group, []).append(index)
    sizes = {group: len(members) for group, members in groups.items()}
    quotas = acquisition.split_by_group(sizes, count)
    chosen = []
    for group, members in groups.items():
        chosen += sorted(members, key=lambda i: -score[i])[: quotas[group]]
    return chosen, quotas


# ------------------------------------------------------------------------------------- pseudo-label


def label_target(
    s: Settings, run: Run, target, pseudo: Rounds, number: int, kind: str, prior=None, bought=None
) -> None:
    """Pseudo-labels the whole target set with the present network and stores it as round `number`.

    `kind` is "st", "cbst" or "cbst-sp" (then with `prior`, see source_prior). Two passes over the
    images: the first ranks confidences in fixed memory, the second labels; no probability map is
    kept. Under torchrun each process passes its share of the images, the histograms are added up, the
    first process writes. `bought(index)`, where given, are bought labels (H,W): pixels that have one get no
    pseudo-label. Coverage and accuracy in the record are measured against the target's labels; they
    are reported and used for nothing.
    """
    began = time.time()
    say(f"pseudo-labels {number}: two passes over {len(target)} images")
    broadcast_buffers(run.model)
    own, histogram = share(range(len(target))), ConfidenceHistogram(NUM_CLASSES, run.device)
    for _, _, prob in over_target(s, run, target, mirrored_probabilities, indices=own):
        histogram.add(prob, at_size(prior, prob))
    histogram.add_up()
    portion = portion_of_round(number - 1, s.portion, s.portion_step, s.portion_max)
    thresholds = histogram.thresholds(portion, balanced=kind != "st")
    if is_first():
        work = begin_folder(pseudo.path(number), ("labels",))
    folder = run.out / "pictures" / f"pseudo-{number:02d}"
    total = dict.fromkeys(("labelled", "judged", "correct", "truth", "covered"), 0)
    every = -(-len(target) // max(1, s.pictures))

    def label(index, image, prob):
        labels = cbst_pseudo_labels(prob, thresholds, at_size(prior, prob), s.rules).cpu()
        if bought is not None:
            labels = labels.masked_fill(bought(index) != IGNORE, IGNORE)
        panels = None
        if s.pictures and index % every == 0:
            confidence, prediction = (x.cpu() for x in prob.max(0))
            panels = {"image": image, "prediction": prediction.to(torch.uint8)}
            panels |= {"confidence": confidence, "pseudo-labels": labels}
        return index, labels, panels

    def store(labelled):
        index, labels, panels = labelled
        if panels:
            panels |= truth_of(target, index)
        name, truth = target.samples[index].id, target.truth(index)
        write_map(work / "labels" / f"{name}.png", labels)
        return name, pseudo_label_statistics(labels, truth, NUM_CLASSES), panels

    with closing(over_target(s, run, target, mirrored_probabilities, indices=own)) as seen:
        for _ in range(-(-len(target) // (CHUNK * rank_and_world()[1]))):
            labelled = gather_list([label(*x) for x in islice(seen, CHUNK)])
            for name, counts, panels in ahead(store, labelled, s.workers):
                total = {key: total[key] + counts[key] for key in total}
                if panels:
                    save_sheet(panels, folder / f"{name}.png")
    if is_first():
        record = pseudo_record(kind, portion, thresholds, histogram.predicted, total)
        complete_folder(work, pseudo.path(number), record)
        known = [pseudo.record(n).get("accuracy") for n in range(1, number)]
        best = max((x for x in known if x is not None), default=None)
        report_pseudo(s, target, number, record, best, time.time() - began)
    barrier(pseudo.path(number) / "round.json")


def pseudo_record(kind: str, portion: float, thresholds, predicted, total: dict) -> dict:
    """What a round.json says: thresholds, predicted pixels, and per class how many pixels were
    labelled and how well."""
    counts = {name: values.tolist() for name, values in total.items()}

    def share(part: str, whole: str, c: int) -> float | None:
        return counts[part][c] / counts[whole][c] if counts[whole][c] else None

    classes = {
        name: {
            "threshold": thresholds[c].item(),
            "predicted": int(predicted[c]),
            "labelled": counts["labelled"][c],
            "accuracy": share("correct", "judged", c),
            "coverage": share("covered", "truth", c),
        }
        for c, name in enumerate(NAMES)
    }
    sums = {name: sum(values) for name, values in counts.items()}
    return {
        "kind": kind,
        "portion": portion,
        "labelled": sums["labelled"],
        "accuracy": sums["correct"] / sums["judged"] if sums["judged"] else None,
        "coverage": sums["covered"] / sums["truth"] if sums["truth"] else None,
        "classes": classes,
    }


def report_pseudo(
    s: Settings, target, number: int, record: dict, best: float | None, seconds: float
) -> None:
    """Prints how much was pseudo-labelled and how well, and which classes got nothing; a warning where
    the labels are much worse than in the `best` of the earlier rounds."""
    pixels = target.pixels
    by_class = []
    for name, c in record["classes"].items():
        by_class.append(f"{name} {percent(c['accuracy'])}/{percent(c['coverage'])}")
    print(
        f"pseudo-labels {number}: portion {record['portion']:.0%}, {record['labelled']:,} of {pixels:,} px "
        f"labelled, accuracy {percent(record['accuracy'], 'unknown')} ({seconds:.0f} s); accuracy / coverage by class: "
        + ", ".join(by_class),
        flush=True,
    )
    classes = record["classes"].items()
    empty = [name for name, c in classes if c["predicted"] and not c["labelled"]]
    if empty and s.rules == "paper":
        print(
            f"no pixel of {', '.join(empty)} is surer than its threshold: too few are predicted, or more "
            "than the portion are equally sure (a saturated network: --rules code labels those)",
            flush=True,
        )
    now = record["accuracy"]
    if None not in (best, now) and now < best - 0.1:
        last = "--pseudo-steps" if s.strategy in QUERIES else "--rounds"
        print(
            f"warning: the accuracy of the pseudo-labels fell from {percent(best)} to {percent(now)} %: "
            "the network learns its own mistakes; begin with a better one (--init), or end with an "
            f"earlier round ({last})",
            flush=True,
        )


def percent(value: float | None, none: str = "-") -> str:
    """A share as text, `none` for one that has no value."""
    return none if value is None else f"{100 * value:.1f}"


def source_prior(s: Settings, source: SegmentationDataset, device) -> torch.Tensor:
    """CBST-SP's spatial priors (C,h,w) at --target-size, from all labels of the source (one pass
    over its files)."""
    files = load(EachImage(len(source), source.labels), s.workers, batch_size=None)
    files = progress(files, len(source), "source labels read for the spatial prior")
    return spatial_prior((label.to(device) for label in files), NUM_CLASSES, s.target_hw)


def at_size(prior: torch.Tensor | None, prob: torch.Tensor) -> torch.Tensor | None:
    """The prior at the size of a probability map, bilinear where they differ."""
    if prior is None or prior.shape == prob.shape:
        return prior
    return F.interpolate(prior[None], prob.shape[-2:], mode="bilinear", align_corners=False)[0]
