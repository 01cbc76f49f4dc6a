"""Measures, protocols, prediction export, pictures, comparison of runs. How good is it?

    python -m alda.evaluation score   RUN_OR_CHECKPOINT --tgt cityscapes --root /data --protocol sliding
    python -m alda.evaluation predict RUN_OR_CHECKPOINT --tgt cityscapes --root /data --split test --to predictions/
    python -m alda.evaluation compare RUN RUN ... --csv table.csv --plot curve.png
    from alda.evaluation import confusion_matrix, iou

Axes: N images, C classes, H rows, W columns. Prediction and labels are (…,H,W) integer train ids,
255 = ignore.

Differences from papers and official code:

 D29. Classes that do not occur in the truth have no IoU and are left out of the mean, which says
      over how many it is; the code counts them as 0. mIoU16 and mIoU13 leave out pixels whose truth
      SYNTHIA does not have (terrain, truck, train), as RIPU's and CRST's networks of 16 classes do;
      ours keeps 19 outputs, and a pixel that it gives to one of the three is missed.
 D30. The last checkpoint is scored; STAL's code reports the best one on the set it reports.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import re
import statistics
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Subset

from alda import IGNORE, InputError, deeplab, run_command
from alda.acquisition import check_tensor
from alda.annotation import PEOPLE
from alda.datasets import (
    CLASS_SETS,
    NAMES,
    NUM_CLASSES,
    SYNTHIA_16,
    SegmentationDataset,
    load,
    misfits,
    normalise,
    open_dataset,
    parse_size,
    progress,
    read_json,
    resize_image,
    to_label_ids,
    write_atomic,
)
from alda.distributed import all_reduce, broadcast_buffers, share
from alda.run import one_line_errors
from alda.settings import MAY_CHANGE
from alda.toy import is_toy

# ------------------------------------------------------------------------------------------ measure


def confusion_matrix(
    prediction: torch.Tensor, labels: torch.Tensor, num_classes: int = NUM_CLASSES
) -> torch.Tensor:
    """Pixel counts (num_classes, num_classes) int64, rows = truth, columns = predicted, on the
    inputs' device.

    Pixels whose label is 255 are left out. Raises ValueError for maps of different shapes, for another
    label outside 0..num_classes-1, and where a counted pixel's prediction is outside: it would be lost
    or counted as another class.
    """
    for name, values in (("prediction", prediction), ("labels", labels)):
        check_tensor(values, name)
    floats = prediction.is_floating_point() or labels.is_floating_point()
    if prediction.shape != labels.shape or floats:
        found = [f"{values.dtype} {tuple(values.shape)}" for values in (prediction, labels)]
        raise ValueError(
            f"prediction and labels must be integer maps of one shape, got {' and '.join(found)}"
        )
    valid = labels != IGNORE
    for name, values in (("prediction", prediction), ("labels", labels)):
        wrong = valid & ((values < 0) | (values >= num_classes))
        if wrong.any():
            found = values[wrong][0].item()
            raise ValueError(
                f"{name} holds {found} at a labelled pixel, outside 0..{num_classes - 1}"
            )
    cells = labels[valid].long() * num_classes + prediction[valid].long()
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def iou(matrix: torch.Tensor) -> torch.Tensor:
    """IoU_c = TP / (TP + FP + FN) for each class, (C,) float64; NaN where the class does not occur in
    the truth, whatever was predicted."""
    true_positive = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    present = matrix.sum(1) > 0
    return (true_positive / union.clamp(min=1)).masked_fill(~present, torch.nan)


def summary(matrix: torch.Tensor, names: tuple[str, ...] = NAMES) -> dict:
    """mIoU over 19, 16 and 13 classes (fractions), over how many of them the means are, the lowest
    class, per-class IoU, and the classes left out as absent.

    A mean is over the classes of its set that occur in the truth: one over classes that happen to be
    predicted would be no fixed measure. Those of 16 and 13 leave out the pixels whose truth is none of
    the 16 (D29), the IoU of each class does not. `names` of other classes: one mean, "mIoUn" over all n.
    """
    if len(names) != len(matrix):
        raise ValueError(f"{len(names)} names for a matrix of {len(matrix)} classes")
    sets = CLASS_SETS if tuple(names) == NAMES else {str(len(names)): tuple(range(len(names)))}
    matrix = matrix.cpu()
    result: dict = {}
    for name, members in sets.items():
        counted = matrix.clone()
        if sets is CLASS_SETS and name != "19":
            counted[[i for i in range(NUM_CLASSES) if i not in SYNTHIA_16]] = 0  # D29
        kept = iou(counted)[list(members)]
        kept = kept[~kept.isnan()]
        result[f"mIoU{name}"] = kept.mean().item() if len(kept) else None
        result[f"classes{name}"] = len(kept)
    scores = zip(names, iou(matrix).tolist(), strict=True)
    there = {name: value for name, value in scores if not math.isnan(value)}
    lowest = min(there, key=there.get, default=None)
    result["lowest"] = {"class": lowest, "IoU": there[lowest]} if there else None
    result["IoU"] = {name: there.get(name) for name in names}
    result["absent"] = [name for name in names if name not in there]
    return result


TOY_MARK = "TOY: numbers on the miniature world\n"  # above every report on it


def describe(result: dict) -> str:
    """A summary as text: one line a class, then the means, the absent classes and the protocol."""
    lines = []
    for name, value in result["IoU"].items():
        lines.append(f"  {name:14s} {'absent' if value is None else f'{100 * value:6.2f}'}")
    means = []
    for name in [key.removeprefix("mIoU") for key in result if key.startswith("mIoU")]:
        value = result[f"mIoU{name}"]
        if value is not None:
            means.append(f"mIoU{name} {100 * value:.2f} over {result[f'classes{name}']} classes")
    means = ", ".join(means)
    if result["lowest"]:
        means += f", lowest {result['lowest']['class']} {100 * result['lowest']['IoU']:.2f}"
    if result["absent"]:
        means += f" (left out as absent: {', '.join(result['absent'])})"
    if "protocol" in result:
        means += f" | protocol {result['protocol']}"
    return "\n".join([*lines, means])


# ---------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Protocol:
    """How a test image becomes a prediction at the size of its labels. `str(protocol)` stands
    beside every number."""

    name: str
    size: tuple[int, int] | None = None  # (H, W) the image is resized to; None: its own size
    flip: bool = False  # average the softmax of the image and of its mirror image
    window: int | None = None  # side of the sliding window; a smaller image is padded to it
    stride: float = 2 / 3  # of the window, in shares of its side

    def __post_init__(self):
        if self.window and (self.size or self.flip):
            raise ValueError("windows slide over an image at its own size, unmirrored")

    def __str__(self) -> str:
        size = f"{self.size[1]}x{self.size[0]}" if self.size else "full resolution"
        window = ""
        if self.window:
            window = f", window {self.window} stride {math.ceil(self.window * self.stride)}"
        flip = "flip" if self.flip else "no flip"
        return f"{self.name} ({size}{window}, {flip}, scored at label size)"


PROTOCOLS = {
    "ripu": Protocol("ripu", size=(640, 1280), flip=True),
    "sliding": Protocol("sliding", window=769),
    "whole": Protocol("whole"),
}


def protocol_of(s):
    """The protocol of a run's reports: `ripu` tests at the training size of the target unless
    --test-size says otherwise."""
    return protocol_named(s.protocol, s.test_hw or (s.target_hw if s.protocol == "ripu" else None))


def protocol_named(
    name: str, size: tuple[int, int] | None = None, window: int | None = None
) -> Protocol:
    """A protocol by name; `size` (H, W) and `window` replace its own (small data); the text says
    what was used."""
    if name not in PROTOCOLS:
        raise InputError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if window is not None and (window < 1 or not protocol.window):
        what = "expected 1 or more pixels" if protocol.window else "only sliding has a window"
        raise InputError(f"--window {window} with the protocol {name}: {what}")
    if size and not protocol.window:
        protocol = replace(protocol, size=size)
    return replace(protocol, window=window) if window else protocol


def network_logits(model, images: torch.Tensor, size, device, mirror=False) -> torch.Tensor:
    """Logits (N,C,H,W) float32 of images (N,3,H,W) uint8 at their own size; the network sees them at
    `size` (H, W). With `mirror` it sees mirror images, and the logits are mirrored back."""
    x = normalise(resize_image(images, size).to(device))
    logits = model(x.flip(-1) if mirror else x)
    logits = deeplab.upsample(logits.float(), images.shape[-2:])
    return logits.flip(-1) if mirror else logits


def probabilities(model, images: torch.Tensor, size, device, mirror: bool) -> torch.Tensor:
    """Softmax (N,C,H,W) float32 of `network_logits`; with `mirror` the mean of the images' and their
    mirror images'."""
    prob = network_logits(model, images, size, device).softmax(1)
    if mirror:
        prob = (prob + network_logits(model, images, size, device, mirror=True).softmax(1)) / 2
    return prob


TOGETHER = {"cpu": 1}  # images that pass together where nothing is trained; elsewhere 4
PIXELS = 4 * 1024 * 2048  # what they may have in all: four of Cityscapes' size, fewer larger ones


def same_sized(pairs, device: torch.device):
    """Yields (things, images (N,3,H,W)) of (thing, image (3,H,W)) pairs in their order, N of one size
    together: one by one on a CPU, which gains nothing by more, elsewhere up to four (PIXELS)."""
    several = []
    for pair in pairs:
        most = min(TOGETHER.get(device.type, 4), max(1, PIXELS // pair[1][0].numel()))
        if several and (len(several) == most or pair[1].shape != several[0][1].shape):
            yield [thing for thing, _ in several], torch.stack([image for _, image in several])
            several = []
        several.append(pair)
    if several:
        yield [thing for thing, _ in several], torch.stack([image for _, image in several])


@torch.inference_mode()
def predict_prob(model, images: torch.Tensor, protocol: Protocol, device) -> torch.Tensor:
    """Class probabilities of images (N,3,H,W) uint8 at their own size: (N,C,H,W) float32 on `device`;
    of one image (3,H,W): (C,H,W). The model must be in eval mode. Raises InputError where one is not
    finite: that is never a score."""
    if images.dim() == 3:
        return predict_prob(model, images[None], protocol, device)[0]
    size = protocol.size or tuple(images.shape[-2:])
    if protocol.window:
        prob = _sliding(model, normalise(images.to(device)), protocol).softmax(1)
    else:
        prob = probabilities(model, images, size, device, protocol.flip)
    if not prob.isfinite().all():
        raise InputError(
            "the network's output is not finite: its weights are lost, nothing is scored"
        )
    return prob


def _sliding(model, x: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Logits averaged over windows that overlap, as STAL's evaluation: x (N,3,H,W) -> (N,C,H,W).

    The last window of a row or column ends at the border; an image smaller than the window is padded
    on all sides with 0, the mean colour.
    """
    height, width = x.shape[-2:]
    window = protocol.window
    missing = [max(0, window - length) for length in (height, width)]
    top, left = (length // 2 for length in missing)
    x = torch.nn.functional.pad(x, (left, missing[1] - left, top, missing[0] - top))
    total, hits = 0, torch.zeros(x.shape[-2:], device=x.device)
    for row in _starts(x.shape[-2], window, protocol.stride):
        for column in _starts(x.shape[-1], window, protocol.stride):
            place = (..., slice(row, row + window), slice(column, column + window))
            logits = deeplab.upsample(model(x[place]).float(), (window, window))
            if isinstance(total, int):
                total = torch.zeros(*logits.shape[:2], *x.shape[-2:], device=x.device)
            total[place] += logits
            hits[place] += 1
    return (total / hits)[..., top : top + height, left : left + width]


def _starts(length: int, window: int, stride: float) -> list[int]:
    step = math.ceil(window * stride)
    last = length - window
    return [*range(0, last, step), last]


def evaluate(model, dataset: SegmentationDataset, protocol: Protocol, device, workers=0) -> dict:
    """Scores `model` on every image of `dataset`, read by `workers` processes, under `protocol`: a
    `summary` with "protocol" and "images" added.

    Under torchrun a collective: each process scores its share of the images, all get the result.
    Raises InputError where no pixel of the truth has a class.
    """
    training = model.training
    model.eval()
    matrix = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=device)
    broadcast_buffers(model)
    own = share(range(len(dataset)))
    pairs = load(Subset(dataset, own), workers, batch_size=None)
    pairs = ((truth, image) for image, truth in progress(pairs, len(own), "images scored"))
    for truths, images in same_sized(pairs, torch.device(device)):
        prediction = predict_prob(model, images, protocol, device).argmax(1)
        for one, truth in zip(prediction, truths, strict=True):
            matrix += confusion_matrix(one, truth.to(device))
    model.train(training)
    if not all_reduce(matrix).any():
        raise InputError(
            f"{dataset.samples[0].image.parent}: no pixel of {len(dataset)} {dataset.name} images has "
            "a class: nothing can be scored; unpack the right labels"
        )
    return {**summary(matrix), "protocol": str(protocol), "images": len(dataset)}


# ------------------------------------------------------------------------------------------ compare


def comparison(runs: list[str], mixed: bool = False) -> list[dict]:
    """One row a finished run, from its result.json and config.json: what was trained, what it cost,
    how good it is.

    Raises InputError for a run that has no result, and, unless `mixed`, for runs that were not
    tested alike: another protocol, target dataset, validation set or number of classes.
    """
    rows, shared, seeds = [], [], {}
    for run in runs:
        path = Path(run) / "result.json"
        s = run_settings(run)
        for name, there in (("result.json", path.is_file()), ("config.json", s)):
            if not there:
                hint = "give folders of finished runs (--out of alda.loop)"
                raise InputError(f"{run}: holds no {name}; {hint}")
        s = {**s, "data": data_of(run)}
        rows.append(comparison_row(str(run), checked_result(path), s))
        shared.append(recipe(s, own_start=False))
        seeds.setdefault(shared[-1], set()).add(s["seed"])
    for row, name in zip(rows, shared, strict=True):
        if len(seeds[name]) > 1:  # several seeds from one file: no number in its path is theirs
            row["recipe"] = name
    for key in ("protocol", "tested on"):
        kinds = sorted({row[key] for row in rows})
        if len(kinds) > 1 and not mixed:
            raise InputError(
                f"these runs have different values of {key!r} and cannot be compared: "
                f"{'; '.join(kinds)}; score them alike with `score`, or say --mixed to lay them side "
                "by side all the same"
            )
    return rows


NUMBER, SCORE = (int, float), (int, float, type(None))
# what a comparison reads of a result.json; of optional parts where they are there
RESULT = {
    "strategy": str,
    "images": int,
    "protocol": str,
    "steps": int,
    "toy": bool,
    "budget": {"asked": int, "images": int, "trained": int, "class_entropy": NUMBER},
    "lowest": {"class": str, "IoU": NUMBER},
    "IoU": dict.fromkeys(NAMES, SCORE),
    **{f"mIoU{name}": SCORE for name in CLASS_SETS},
}
OPTIONAL = {"student": {"mIoU19": SCORE}, "pseudo": str}
LOOP = {"loop": int, "share": NUMBER, "mIoU19": NUMBER}
SETTINGS = dict.fromkeys(("strategy", "src", "tgt", "root", "protocol", "test_size"), str)
SETTINGS |= dict.fromkeys(("target_size", "net", "backbone", "cbda", "image_queries"), str)
SETTINGS |= {"seed": int, "pixels": int, "restart": bool}
COMPARED = ("src", "tgt", "net", "backbone", "seed", "budget", "pixels")  # always read
SETTINGS |= dict.fromkeys(("budget", "unlabelled", "contrast"), NUMBER)


def checked_result(path: Path) -> dict:
    """The content of a result.json. Raises InputError where it lacks what a comparison reads."""
    result = read_json(path)
    wrong = misfits(result, RESULT | {k: v for k, v in OPTIONAL.items() if k in result})
    loops = result.get("loops", [])
    wrong += [] if isinstance(loops, list) else ["loops"]
    budget = result.get("budget") if not wrong else {}
    wrong += [key for key in PEOPLE if not isinstance(budget.get(key, 0), NUMBER)]
    wrong += [name for loop in loops for name in misfits(loop, LOOP, "loops")] if not wrong else []
    if wrong:
        raise InputError(
            f"{path}: {', '.join(wrong[:5])} missing or of another kind; is it of another version, or "
            "edited? run it again, or leave it out"
        )
    return result


def comparison_row(run: str, result: dict, s: dict) -> dict:
    """What `compare` says of a run: {fact: value}."""
    budget, present = result["budget"], sum(v is not None for v in result["IoU"].values())
    asked_for = s["budget"] if budget["asked"] else None
    if s["pixels"] and s.get("unit", "pixel") == "pixel":
        asked_for = f"{s['pixels']} px an image"
    teacher, validation = {}, s.get("data", {}).get("validation")
    if "student" in result:
        teacher = {"student mIoU19": _percent(result["student"]["mIoU19"])}
    return {
        "run": run,
        "strategy": strategy_text(result, s),
        "source": s["src"],
        "target": s["tgt"],
        "tested on": f"{s['tgt']}{f' ({validation})' * bool(validation)}, "
        f"{result['images']} images, {present} classes",
        "protocol": result["protocol"],
        "network": f"{s['net']} {s['backbone']}",
        "seed": s["seed"],
        "recipe": recipe(s),
        "steps": result["steps"],
        "source images": result.get("source_images"),
        "budget asked for": asked_for,
        "pixels asked": budget["asked"],
        "% of pixels": _percent(budget.get("share")),
        "images asked": budget["images"],
        "pixels trained": budget["trained"],
        **{f"people: {key}": round(budget[key], 1) for key in PEOPLE if key in budget},
        "class entropy": round(budget["class_entropy"], 3) if budget["asked"] else None,
        "before: mIoU19": _percent(result.get("before", {}).get("mIoU19")),
        **{f"mIoU{n}": _percent(result[f"mIoU{n}"]) for n in CLASS_SETS},
        **teacher,
        "lowest class": result["lowest"]["class"],
        "lowest IoU": _percent(result["lowest"]["IoU"]),
        **{f"IoU {name}": _percent(result["IoU"][name]) for name in NAMES},
        "toy": result["toy"],
    }


def recipe(s: dict, own_start: bool = True) -> str:
    """Eight letters that two runs share exactly when their data (`data_of`) and their settings are equal
    in everything but the seed and what changes no result; a start (--init FILE, --source-free FILE)
    counts without the seed in its path where each seed has its `own_start`."""
    without = (*MAY_CHANGE, "seed", "eval_every", "checkpoint_every")
    kept = {name: value for name, value in s.items() if name not in without}
    # a number of its own, not in gta5 or mobilenet_v2; of several the last: exp1/source-1/last.pt
    seed = rf"(?<!\d)(?<!gta)(?<!v){s['seed']}(?!\d)"
    for name in {"init", "source_free"} & kept.keys() if own_start else ():
        kept[name] = re.sub(rf"(.*){seed}", r"\1SEED", str(kept[name]), count=1)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def means_text(rows: list[dict]) -> str:
    """A line for each recipe that ran with several seeds: mean and standard deviation of mIoU19. A seed
    that ran several times counts once, with its mean."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["recipe"], []).append(row)
    lines = []
    for name, group in groups.items():
        scores: dict[int, list[float]] = {}
        for row in group:
            scores.setdefault(row["seed"], []).append(row["mIoU19"])
        if len(scores) > 1:
            values, seeds = [*map(statistics.mean, scores.values())], ", ".join(map(str, scores))
            mean, spread = statistics.mean(values), statistics.stdev(values)
            what = f"{group[0]['strategy']} ({name}, budget {group[0]['budget asked for']})"
            lines.append(
                f"{what}: mIoU19 {mean:.2f} +- {spread:.2f}, n = {len(values)}, seeds {seeds}"
            )
    return "".join(f"\n{line}" for line in lines)


def strategy_text(result: dict, s: dict) -> str:
    """A strategy with what makes its runs differ: CBDA's part, pseudo-labels, STAL's ablation."""
    text = result["strategy"]
    if text == "cbda":
        text += f" {s['cbda']}"
    if text == "stal":
        text += (
            f" lambda_u {s['unlabelled']:g} lambda_c {s['contrast']:g} {s['image_queries']}"
            + " restart" * s["restart"]
        )
    text += " source-free" * bool(s.get("source_free")) + " + teacher" * bool(s.get("teacher"))
    return text + (f" + {result['pseudo']}" if "pseudo" in result else "")


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 2)


def comparison_text(rows: list[dict]) -> str:
    """The rows as text: one line a fact, one column a run, so that any number of classes stays
    readable."""
    facts = list(dict.fromkeys(key for row in rows for key in row if key != "toy"))
    same, rest = [], []
    for fact in facts:
        line = [fact, *("-" if row.get(fact) is None else f"{row[fact]}" for row in rows)]
        alike = len(set(line[1:])) == 1 and not fact.startswith(("IoU", "mIoU"))
        (same if alike else rest).append(line)
    widths = [max(len(line[i]) for line in rest) for i in range(len(rows) + 1)]
    table = []
    for fact, *values in rest:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        table.append("  ".join([fact.ljust(widths[0]), *cells]))
    mark = TOY_MARK if any(row["toy"] for row in rows) else ""
    alike = "".join(f"{fact}: {values[0]}\n" for fact, *values in same)
    return mark + alike + "\n" + "\n".join(table) + means_text(rows)


def new_figure():
    """(figure, axes) of matplotlib, which is optional (InputError)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")  # inches
    return figure, figure.subplots()


ABOUT = ("source", "network", "tested on", "protocol")  # what the runs of one line share


def comparison_picture(runs: list[str], rows: list[dict], path: Path, over: str = "budget") -> None:
    """mIoU19 over the share of target pixels asked, or `over` the "steps" (what --eval-every scored):
    the mean over seeds in a band of +- their standard deviation; the seeds are dots. Over budgets a line
    is a strategy's (each point a recipe's), over steps a recipe's, at the steps where all its seeds were
    scored. What asks nobody, or has all labels, is a level line for each recipe. Needs matplotlib
    (InputError)."""
    figure, axes = new_figure()
    facts = [key for key in ABOUT if len({row[key] for row in rows}) > 1]  # a line has one of each
    lines: dict[str, dict] = {}  # name: {(place, recipe): {seed: [(x, mIoU19) of each run]}}
    for run, row in zip(runs, rows, strict=True):
        name = ", ".join([row["strategy"], *(row[key] for key in facts)])
        if over == "steps":
            budget = row["budget asked for"]
            name += f", budget {budget}" * (budget is not None) + f" ({row['recipe']})"
        for place, x, score in curve_points(Path(run), row, over):
            points = lines.setdefault(name, {}).setdefault((place, row["recipe"]), {})
            points.setdefault(row["seed"], []).append((x, 100 * score))
    curves = []
    for name, places in lines.items():
        seeds = set().union(*places.values())
        groups = {  # runs that differ in the seed alone; one that ran several times is their mean
            key: [*zip(*map(mean_point, points.values()), strict=True)]
            for key, points in places.items()
            if over == "budget" or points.keys() == seeds
        }
        level = over == "budget" and min(groups.values())[0][0] in (0, 100)
        if level and len(groups) > 1:
            curves += [(f"{name} ({key[1]})", [group], True) for key, group in groups.items()]
        else:
            curves.append((name, sorted(groups.values()), level))
    for number, curve in enumerate(curves):
        draw_curve(axes, *curve, color=f"C{number}")
    axes.set_xlabel("target pixels asked [%]" if over == "budget" else "steps")
    axes.set_xlim(left=0)
    axes.set_ylabel("mIoU19 [%]" + (" (TOY)" if any(row["toy"] for row in rows) else ""))
    title = "; ".join(rows[0][key] for key in ABOUT if key not in facts)
    axes.set_title(textwrap.fill(title, 90), fontsize=8)
    axes.legend(fontsize=6)
    kind = path.suffix.lstrip(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"--plot {path}: give a name that ends in .png, .pdf or .svg")
    write_output(path, lambda file: figure.savefig(file, format=kind, dpi=120))


def mean_point(points: list[tuple[float, float]]) -> list[float]:
    """[x, y]: the means of the points' coordinates."""
    return [statistics.mean(values) for values in zip(*points, strict=True)]


def draw_curve(axes, name: str, groups: list, level: bool, color: str) -> None:
    """One line of the picture: `groups` are [xs, ys] of the seeds at each place; `level`: over all x."""
    xs = [statistics.mean(x) for x, _ in groups]
    means = [statistics.mean(y) for _, y in groups]
    spreads = [statistics.stdev(y) if len(y) > 1 else 0.0 for _, y in groups]
    low, high = ([m + sign * d for m, d in zip(means, spreads, strict=True)] for sign in (-1, 1))
    seeds = sorted({len(y) for _, y in groups})
    number = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    label = f"{name}, n = {number}" if seeds[-1] > 1 else name
    if level:
        axes.axhline(means[0], linestyle="--", label=label, color=color)
        axes.axhspan(low[0], high[0], color=color, alpha=0.1, linewidth=0)
        return
    axes.plot(xs, means, "o-", label=label, color=color)
    axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
    for x, y in groups:
        axes.plot(x, y, ".", color=color)


def curve_points(run: Path, row: dict, over: str) -> list[tuple]:
    """A run's points of a curve: (what seeds share, x, mIoU19)."""
    result = read_json(run / "result.json")
    if over == "steps":
        return [(step, step, score) for step, score in scores_over_steps(run, result)]
    loops = result.get("loops", [])
    points = [(f"loop {x['loop']}", x["share"], x["mIoU19"]) for x in loops]
    share = result["budget"].get("share")
    points = points or [(f"{row['budget asked for']}", share, result["mIoU19"])]
    if any(share is None for _, share, _ in points):
        print(f"{run}: does not say which share of the pixels it asked; left out of the picture")
        return []
    return [(place, 100 * share, score) for place, share, score in points]


def scores_over_steps(run: Path, result: dict) -> list[tuple[int, float]]:
    """(step, mIoU19) of a run: before its first round, what metrics.jsonl holds, and at the end."""
    log, scores = run / "metrics.jsonl", {}
    if "before" in result:
        scores[result["before"]["step"]] = result["before"]["mIoU19"]
    for text in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        # a kill may cut a line, others hold no score
        with suppress(ValueError, LookupError, TypeError):
            line = json.loads(text)
            scores |= {line["step"]: line["mIoU19"]} if line["mIoU19"] is not None else {}
    return sorted({**scores, result["steps"]: result["mIoU19"]}.items())


def write_output(path: Path, write) -> None:
    """Calls `write` with the open binary file that --json, --csv or --plot names: whole or not there;
    links and what is no plain file (/dev/stdout, a pipe) are written in place."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with open(path, "wb") as file:
            write(file)
    else:
        write_atomic(path, write)


def compare(args: argparse.Namespace) -> int:
    """The command `compare`: of the finished runs; a line names the others."""
    runs = list({Path(run).resolve(): run for run in reversed(args.runs)}.values())[::-1]
    if len(runs) < len(args.runs):
        print(
            f"note: {len(args.runs) - len(runs)} runs are named twice; each counts once",
            file=sys.stderr,
        )
    done = [run for run in runs if not unfinished(run, "it is left out")]
    rows = comparison(done or runs, args.mixed)
    print(comparison_text(rows))
    if args.csv:
        fields = list(dict.fromkeys(key for row in rows for key in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, fields)
        writer.writeheader()
        writer.writerows(rows)
        write_output(args.csv, lambda file: file.write(table.getvalue().encode()))
    if args.plot:
        comparison_picture(done, rows, args.plot, args.over)
    return 0


# ------------------------------------------------------------------------------------- command line


def load_run(path: str | Path, device, which: str | None = None, network: dict | None = None):
    """A trained network in eval mode, from a run's folder, its checkpoints/last.pt, or an official
    checkpoint.

    Our own files, and STAL's and CRST's, say how their network is built (`deeplab.network_in`); for
    others `network` holds the arguments of `deeplab.build` (default: RIPU's DeepLabV2 on ResNet-101
    with frozen batch norm). `which` is "model" or "teacher"; by default the teacher of our own files
    that hold one, as in their run's report, else the model. Raises InputError.
    """
    path = Path(path)
    file = path / "checkpoints" / "last.pt" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no checkpoint there; give a run's folder or a checkpoint file")
    content = deeplab.read(file)
    which = which or ("teacher" if "network" in content and "teacher" in content else "model")
    if deeplab.layout_of(content, file) == "torchvision":
        raise InputError(
            f"{file}: the weights of a classification network, which fill the backbone only; give a "
            "trained run or a segmentation network's checkpoint"
        )
    network = {**(network or {"net": "deeplabv2"}), **deeplab.network_in(content, file)}
    return deeplab.build(**network, init=str(file), which=which).to(device).eval()


def write_predictions(
    model, dataset: SegmentationDataset, protocol: Protocol, device, folder: Path
) -> int:
    """Writes each prediction, (H,W) uint8, in the ids that its server takes: IMAGE_pred_labelIds.png
    (Cityscapes' label ids), of ACDC IMAGE_pred_labelTrainIds.png (train ids); returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(dataset.samples):
        prob = predict_prob(model, dataset.image(index), protocol, device)
        prediction = prob.argmax(0).to(torch.uint8).cpu().numpy()
        name = f"{sample.id}_pred_labelTrainIds.png"
        if dataset.name != "acdc":
            prediction, name = to_label_ids(prediction), f"{sample.id}_pred_labelIds.png"
        picture = Image.fromarray(prediction)
        write_atomic(folder / name, partial(picture.save, format="PNG"))
    return len(dataset)


def main(argv: list[str] | None = None) -> int:
    """The command line (see the top of this file); returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m alda.evaluation",
        description="Score checkpoints, export predictions, compare runs.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("score", "mIoU and per-class IoU under a named protocol"),
        ("predict", "PNGs for the servers: label ids of Cityscapes, train ids of ACDC"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("checkpoint", help="a run's folder or a checkpoint file")
        sub.add_argument(
            "--tgt",
            choices=["cityscapes", "acdc"],
            help="target dataset [the run's, else cityscapes]",
        )
        sub.add_argument(
            "--root", help="the folder that holds cityscapes/ or acdc/ [the run's, else data]"
        )
        sub.add_argument("--split", default="val", choices=["train", "val", "test"], help="[val]")
        sub.add_argument("--protocol", choices=list(PROTOCOLS), help="[the run's, else ripu]")
        sub.add_argument(
            "--size",
            help="WxH: test size for the protocols ripu [the run's, else 1280x640] and whole",
        )
        sub.add_argument("--window", type=int, help="another window for the protocol sliding [769]")
        sub.add_argument(
            "--which",
            choices=["model", "teacher"],
            help="[the teacher where a run has one, else model]",
        )
        sub.add_argument(
            "--net",
            default="deeplabv2",
            choices=("deeplabv2", "deeplabv3plus"),
            help="network of RIPU's checkpoint (our own, STAL's and CRST's files say theirs)",
        )
        sub.add_argument(
            "--backbone", default="resnet101", help="backbone of an official checkpoint"
        )
        sub.add_argument("--device", default="auto")
        if name == "score":
            sub.add_argument("--json", type=Path, help="also write the result here")
        else:
            sub.add_argument("--to", type=Path, required=True, help="folder for the predictions")
    sub = commands.add_parser(
        "compare", help="one table over runs", description="One table over finished runs."
    )
    sub.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    sub.add_argument(
        "--mixed", action="store_true", help="also lay runs side by side that were not tested alike"
    )
    sub.add_argument("--csv", type=Path, help="also write the table here, one line a run")
    sub.add_argument(
        "--plot", type=Path, help="also draw mIoU19 here, bands over seeds (needs matplotlib)"
    )
    sub.add_argument(
        "--over", choices=("budget", "steps"), default="budget", help="the plot's axis [budget]"
    )
    args = parser.parse_args(argv)
    try:
        with one_line_errors("take a smaller --size, smaller photographs or --device cpu"):
            return compare(args) if args.command == "compare" else _command(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_of(path: str | Path) -> Path:
    """The folder of the run that `path` belongs to: itself, or the one whose checkpoints/ holds the file;
    a file elsewhere is of no run: the file itself."""
    path = Path(path).absolute()
    inside = path.parent.name == "checkpoints" and not path.is_dir()
    return path.parent.parent if inside else path


def run_settings(path: str | Path) -> dict:
    """The settings in the config.json of the run that `path` (its folder or a checkpoint in it)
    belongs to; {} without."""
    config = run_of(path) / "config.json"
    if not config.is_file():
        return {}
    settings = read_json(config, "settings")["settings"]
    there = settings if isinstance(settings, dict) else SETTINGS
    table = {k: kind for k, kind in SETTINGS.items() if k in there or k in COMPARED}
    if wrong := misfits(settings, table, "settings"):
        raise InputError(
            f"{config}: {', '.join(wrong[:5])} missing or of another kind; restore it from a copy"
        )
    return settings


def data_of(path: str | Path) -> dict[str, str]:
    """{"source", "target", "validation": eight letters of the names, sizes and labels that the run of
    `path` remembers of it}; {} for a run that remembers none."""
    config, name = run_of(path) / "config.json", "sha256_without_photographs"
    data = read_json(config).get("data", {})
    kinds = {part: {name: str} for part in data} if isinstance(data, dict) else {}
    if wrong := misfits(data, kinds, "data"):
        raise InputError(f"{config}: {wrong[0]} missing or of another kind; restore it from a copy")
    return {part: content[name][:8] for part, content in data.items()}


def unfinished(path: str | Path, what: str) -> bool:
    """Whether a run's folder, or a checkpoint, belongs to a run of this package that has no result
    yet; a line says so, and `what` is done with it."""
    folder = run_of(path)
    there = (folder / "config.json").is_file() and not (folder / "result.json").is_file()
    if there:
        print(f"note: {folder} is not finished (no result.json): {what}", file=sys.stderr)
    return there


def _command(args: argparse.Namespace) -> int:
    if not Path(args.checkpoint).exists():
        raise InputError(f"no {args.checkpoint}: give a run's folder or a checkpoint file")
    device, run = pick_device(args.device), run_settings(args.checkpoint)
    root = args.root or run.get("root", "data")
    dataset = open_dataset(
        args.tgt or run.get("tgt", "cityscapes"), root, args.split, args.command == "score"
    )
    name = args.protocol or run.get("protocol", "ripu")
    own = run.get("test_size") if name == run.get("protocol") else None
    size = args.size or own or (run.get("target_size") if name == "ripu" else None)
    if args.size and PROTOCOLS[name].window:
        raise InputError(
            f"--size {args.size} with the protocol {name}: it tests at full resolution"
        )
    protocol = protocol_named(name, parse_size(size) if size else None, args.window)
    model = load_run(
        args.checkpoint, device, args.which, {"net": args.net, "backbone": args.backbone}
    )
    print(
        f"{len(dataset)} images ({dataset.name}, {args.split}), protocol {protocol}, on {device}",
        flush=True,
    )
    if args.command == "predict":
        number = write_predictions(model, dataset, protocol, device, args.to)
        print(f"{number} predictions in {args.to}")
        return 0
    scored = "its checkpoint is scored as it is"
    result = {
        **evaluate(model, dataset, protocol, device),
        "checkpoint": str(args.checkpoint),
        "which": args.which or "as reported",
        "toy": is_toy(root),
        **({"finished": False} if unfinished(args.checkpoint, scored) else {}),
    }
    print(TOY_MARK * result["toy"] + describe(result))
    if args.json:
        text = json.dumps(result, indent=1)
        write_output(args.json, lambda file: file.write(text.encode()))
    return 0


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; raises InputError for a device that is not
    there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on every GPU
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


if __name__ == "__main__":
    run_command(main)
