"""What do we label without asking, over a whole target set? A round of CBST's pseudo-labels, and the folder it leaves.

    from alda.pseudolabels import label_target, pseudo_labels
    label_target(s, run, target, rounds, number=1, kind="cbst")      # rounds = Rounds(out / "pseudo")
    labels = pseudo_labels(target, rounds, 1, index=0)              # (H,W) uint8, 255 = none

CBST, CBST-SP, ST: Zou et al., ECCV 2018, arXiv 1810.07911; the equations are in selftraining.py. A round is a folder
`pseudo/01` that is never changed once it stands: `labels/IMAGE.png` (train ids, 255 = none) and `round.json`.
"""

import json
import os
import shutil
import time

import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from alda import IGNORE, deeplab
from alda.annotation import Rounds, read_map, write_map
from alda.datasets import (
    NAMES,
    NUM_CLASSES,
    ImagesOnly,
    LabelsOnly,
    SegmentationDataset,
    load,
    normalise,
    resize_image,
)
from alda.evaluation import parse_size
from alda.run import Run, save_picture
from alda.selftraining import (
    ConfidenceHistogram,
    cbst_pseudo_labels,
    pseudo_label_statistics,
    spatial_prior,
    target_portion,
)
from alda.settings import Settings


def label_target(
    s: Settings,
    run: Run,
    target: SegmentationDataset,
    rounds: Rounds,
    number: int,
    kind: str,
    prior=None,
    known=None,
) -> dict:
    """Pseudo-labels the whole target set with the present network and stores it as round `number`; returns its record.

    `kind` is "st", "cbst" or "cbst-sp" (then with `prior`, see source_prior). Two passes over the images: the first ranks
    confidences in fixed memory, the second labels; no probability map is kept. `known(index)`, where given, are bought
    labels (H,W): pixels that have one get no pseudo-label. Coverage and accuracy in the record are measured against
    the target's labels; they are reported and used for nothing.
    """
    began = time.time()
    histogram = ConfidenceHistogram(NUM_CLASSES, run.device)
    for _, _, prob in probabilities(s, run, target):
        histogram.add(prob, at_size(prior, prob))
    portion = target_portion(number - 1, s.portion, s.portion_step, s.portion_max)
    thresholds = histogram.thresholds(portion, balanced=kind != "st")
    path = rounds.path(number)
    work = path.with_name(path.name + ".incomplete")
    shutil.rmtree(work, ignore_errors=True)
    (work / "labels").mkdir(parents=True)
    total = dict.fromkeys(("labelled", "judged", "correct", "truth", "covered"), 0)
    every = -(-len(target) // max(1, s.pictures))
    for index, image, prob in probabilities(s, run, target):
        sample = target.samples[index]
        labels = cbst_pseudo_labels(prob, thresholds, at_size(prior, prob), s.rules).cpu()
        if known is not None:
            labels = labels.masked_fill(known(index) != IGNORE, IGNORE)
        write_map(work / "labels" / f"{sample.id}.png", labels)
        counts = pseudo_label_statistics(labels, target.labels(index), NUM_CLASSES)
        total = {name: total[name] + counts[name] for name in total}
        if s.pictures and index % every == 0:
            confidence, prediction = prob.max(0)
            panels = {"image": image, "prediction": prediction.to(torch.uint8), "confidence": confidence,
                      "pseudo-labels": labels, "truth": target.labels(index)}  # fmt: skip
            save_picture(
                panels,
                sample.size,
                run.out / "pictures" / f"pseudo-{number:02d}" / f"{sample.id}.png",
            )
    record = record_of(kind, portion, thresholds, histogram.predicted, total)
    (work / "round.json").write_text(json.dumps(record, indent=1))
    os.replace(work, path)
    pixels = sum(height * width for height, width in (sample.size for sample in target.samples))
    print(
        f"pseudo-labels {number}: portion {portion:.0%}, {record['labelled']:,} of {pixels:,} px labelled, accuracy "
        f"{percent(record['accuracy'])} ({time.time() - began:.0f} s); accuracy / coverage by class: "
        + ", ".join(
            f"{n} {percent(c['accuracy'])}/{percent(c['coverage'])}"
            for n, c in record["classes"].items()
        ),
        flush=True,
    )
    empty = [name for name, c in record["classes"].items() if c["predicted"] and not c["labelled"]]
    if empty and s.rules == "paper":
        print(
            f"no pixel of {', '.join(empty)} is surer than its threshold: too few are predicted, or more than the portion are "
            "equally sure (a saturated network: --rules code labels those)",
            flush=True,
        )
    return record


def record_of(kind: str, portion: float, thresholds, predicted, total: dict) -> dict:
    """What a round.json says: thresholds, predicted pixels, and per class how many pixels were labelled and how well."""
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


def percent(value: float | None) -> str:
    """A share as text, "-" for one that has no value."""
    return "-" if value is None else f"{100 * value:.1f}"


def pseudo_labels(
    target: SegmentationDataset, rounds: Rounds, number: int, index: int
) -> torch.Tensor:
    """The pseudo-labels that round `number` gave to a target image: (H,W) uint8 train ids, 255 = none."""
    sample = target.samples[index]
    return read_map(rounds.path(number) / "labels" / f"{sample.id}.png", sample.size, IGNORE)


@torch.no_grad()
def probabilities(s: Settings, run: Run, target: SegmentationDataset, model=None, indices=None):
    """Yields (index, image (3,H,W) uint8, softmax probabilities (C,H,W) float32 at the image's full size), in eval mode.

    `model` is the run's unless given (a teacher), `indices` all images unless given.
    """
    model, indices = model or run.model, range(len(target)) if indices is None else indices
    training = model.training
    model.eval()
    images = load(Subset(ImagesOnly(target), indices), s.workers, batch_size=None)
    for index, image in zip(indices, images, strict=True):
        x = normalise(resize_image(image, parse_size(s.target_size)).to(run.device))[None]
        with run.autocast():
            logits = model(x)
        # float32: in bfloat16 a sure pixel saturates at 1, where the paper's strict rule labels nothing
        prob = deeplab.upsample(logits.float(), target.samples[index].size).softmax(1)[0]
        if not prob.isfinite().all():
            raise FloatingPointError(
                f"{target.samples[index].image}: the network's output is not finite; try a lower --lr"
            )
        yield index, image, prob
    model.train(training)


def source_prior(s: Settings, source: SegmentationDataset, device) -> torch.Tensor:
    """CBST-SP's spatial priors (C,h,w) at --target-size, from all labels of the source (one pass over its files)."""
    labels = (label.to(device) for label in load(LabelsOnly(source), s.workers, batch_size=None))
    return spatial_prior(labels, NUM_CLASSES, parse_size(s.target_size))


def at_size(prior: torch.Tensor | None, prob: torch.Tensor) -> torch.Tensor | None:
    """The prior at the size of a probability map, bilinear where they differ."""
    if prior is None or prior.shape == prob.shape:
        return prior
    return F.interpolate(prior[None], prob.shape[-2:], mode="bilinear", align_corners=False)[0]
