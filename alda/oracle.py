"""Questions to people on disk, their answers in files. How does a person answer?

    python -m alda.loop ... --oracle files        # asks: writes OUT/rounds/01.open, exit status 3
    python -m alda.annotate OUT                   # a page to answer on; any other program does, too
    python -m alda.loop --resume --out OUT        # checks every answer, makes them round 01, goes on

A round that waits is the folder `rounds/01.open`: `queries/IMAGE.png` (255 = asked), `overlays/IMAGE.jpg`
(to look at), `round.json` (the questions), `README.txt` (for the annotator) and `answers/`, where one
file for each image is expected: label ids, train ids, or the polygons of a Labelme JSON. When all are
right they become the round `rounds/01`, and the folder `rounds/01.answered` keeps what people wrote.
Axes: H rows, W columns; maps are (H,W). Points of polygons are (x, y): the pixel in row r and column c
covers r to r + 1 and c to c + 1, and belongs to a polygon that holds its centre.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from alda import IGNORE, InputError
from alda.annotation import (
    Rounds,
    begin_folder,
    checked_bytes,
    complete_folder,
    decode_map,
    ledger,
    write_map,
)
from alda.datasets import CLASSES, NAMES, NUM_CLASSES, misfits, read_json, read_label, write_atomic
from alda.distributed import world_size
from alda.pictures import NOW, class_picture, fit, marked, save_sheet, widened
from alda.run import started_with

# in a map of answers: nobody said anything; 255 is the answer "none of the classes"
NO_ANSWER = 254
NONE_NAMES = ("unknown", "unlabeled", "void", "ignore")  # labels of Labelme shapes without a class
# what follows the image's name in the name of its answer; Cityscapes' and ACDC's own are among them
_IDS = ("_labelIds.png", "_labelTrainIds.png")
ENDINGS = (*_IDS, *(f"_{gt}{ids}" for gt in ("gtFine", "gt") for ids in _IDS))
ENDINGS += (".json", "_leftImg8bit.json", "_rgb_anon.json")


class Waiting(Exception):
    """A round is open: people have to answer before the run can go on (exit status 3)."""


# ------------------------------------------------------------------------------------------- to ask


def asking(s, rounds: Rounds, number: int, target, centres=None):
    """Round `number` being asked, a context manager with `add` and `notes`: annotation.NewRound where
    the ground truth answers, else the Questions to people. `centres` are the picks of every image,
    (n,2) int64 (row, col); None where whole images are asked."""
    return (
        Questions(s, rounds, number, target, centres) if s.oracle == "files" else rounds.new(number)
    )


class Questions:
    """A round of questions being written; at its end the folder is complete and Waiting is raised. A
    round that asks nothing stands at once."""

    def __init__(self, s, rounds: Rounds, number: int, target, centres=None):
        self.rounds, self.number, self.path = rounds, number, open_folder(rounds, number)
        self.target, self.centres, self.root = target, centres, Path(s.root)
        self.places = {sample.id: index for index, sample in enumerate(target.samples)}
        self.unit = "image" if centres is None else s.unit
        self.radius = s.radius if self.unit == "region" else 0
        self.images: dict[str, dict] = {}
        self.notes: dict = {}  # what the round will say beside its ledger, see NewRound

    def __enter__(self) -> "Questions":
        if self.path.exists():
            raise InputError(f"{self.path} stands already: it waits for its answers")
        self.work = begin_folder(self.path, ("queries", "overlays", "answers"))
        return self

    def add(self, image_id: str, asked: torch.Tensor, *_) -> torch.Tensor:
        """Writes the question for the pixels `asked` (H,W) bool of an image; returns the answers so far:
        (H,W) uint8, all 255. Takes, and leaves, the further arguments of NewRound.add."""
        nothing = torch.full(asked.shape, IGNORE, dtype=torch.uint8)
        asked = asked.cpu()
        if not asked.any():
            return nothing
        index = self.places[image_id]
        picks = [] if self.centres is None else self.centres[index].tolist()
        write_map(self.work / "queries" / f"{image_id}.png", asked.to(torch.uint8) * 255)
        overlay = self.work / "overlays" / f"{image_id}.jpg"
        shown = ~asked if self.unit == "image" else asked
        draw_overlay(self.target.image(index), shown, overlay)
        path = self.target.samples[index].image
        below = path.relative_to(self.root) if path.is_relative_to(self.root) else ""
        self.images[image_id] = {
            "photograph": str(path.resolve()),
            "below_root": str(below),  # where it is, should the data move
            "size": list(asked.shape),
            "asked": int(asked.sum()),
            "picks": picks,
        }
        return nothing

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            return
        if not self.images:  # nothing to wait for
            shutil.rmtree(self.work)
            with self.rounds.new(self.number) as new:
                new.notes = {**self.notes, "unanswered": 0}
            return
        record = {"unit": self.unit, "radius": self.radius, "notes": self.notes}
        out = self.path.parent.parent
        text = instructions(self.unit, self.number, self.images, started_with(out))
        write_atomic(self.work / "README.txt", text)
        complete_folder(self.work, self.path, {**record, "images": self.images})
        count = sum(max(1, len(image["picks"])) for image in self.images.values())
        raise Waiting(
            f"round {self.number} asks {count:,} questions on {len(self.images):,} images, in "
            f"{self.path}: python -m alda.annotate {shlex.quote(str(out))} shows them, README.txt there "
            "tells other ways"
        )


def draw_overlay(image: torch.Tensor, asked: torch.Tensor, path: Path) -> None:
    """The photograph (3,H,W) uint8, at least 1280 wide, with the pixels `asked` marked, as a JPEG."""
    picture = marked(image, [asked], [NOW], fit(image.shape, max(1280, image.shape[-1])))
    picture = Image.fromarray(picture.permute(1, 2, 0).numpy())
    write_atomic(path, lambda file: picture.save(file, "jpeg", quality=88))


def instructions(unit: str, number: int, images: dict, start: str) -> str:
    """The README.txt of a round: what is asked, how an answer is written, how `start` --resume goes
    on."""
    what = {
        "pixel": "single pixels: what does each marked pixel show?",
        "region": "small squares: what does each pixel of each marked square show?",
        "image": "whole images: what does each pixel show?",
    }
    classes = "\n".join(
        f"  {c.name:<14} label id {c.cityscapes_id:>2}   train id {i:>2}"
        for i, c in enumerate(CLASSES)
    )
    example = next(iter(images), "IMAGE")
    return f"""Round {number} asks about {len(images)} images, {what[unit]}

overlays/ shows where (yellow), queries/ holds the same as masks (255 = asked). On this machine

  python -m alda.annotate RUN        (RUN is the folder above rounds/)

serves a page to answer on. Any other program does, too: put ONE file for each image into answers/.

  {example}_labelIds.png        label ids (Cityscapes), one channel, the size of the photograph; or
  {example}_labelTrainIds.png   train ids, 255 for none; or
  {example}.json                Labelme: polygons, rectangles, circles, points; later over earlier

The names that Cityscapes and ACDC give are read, too (NAME_gtFine_labelIds.png, NAME_leftImg8bit.json).
A PNG answers all that is asked of its image: ids that are none of the classes below, and 255, say "none
of them". In a JSON every asked pixel must lie in a shape (but for whole images); the label "unknown"
says "none of them". What was not asked is ignored and counted.

{classes}

  {start} --resume --out RUN

then checks all answers, lists everything that is wrong, and goes on when all is right; with
--accept-partial it takes what is right and leaves the rest unanswered.
"""


# ---------------------------------------------------------------------------------------- to collect


def open_folder(rounds: Rounds, number: int) -> Path:
    """The folder of round `number` while it waits for its answers."""
    return rounds.path(number).with_name(f"{number:02d}.open")


def open_round(out: Path) -> tuple[int, Path, dict] | None:
    """(number, folder, questions) of the round of a run that waits for answers; None where there is
    none. Raises InputError for a folder that was edited."""
    rounds = Rounds(out / "rounds")
    number = rounds.complete() + 1
    folder = open_folder(rounds, number)
    if not folder.is_dir():
        return None
    path = folder / "round.json"
    record = read_json(path, "unit", "radius", "notes", "images", "files")
    kinds = {"radius": int, "notes": dict, "images": dict, "files": dict}
    wrong = misfits(record, kinds)
    wrong += ["unit"] if record["unit"] not in ("pixel", "region", "image") else []
    parts = {"photograph": str, "size": list, "picks": list, "asked": int}
    for image_id, question in [] if wrong else record["images"].items():
        if f"queries/{image_id}.png" not in record["files"] or misfits(question, parts):
            wrong.append(image_id)
    if wrong:
        raise InputError(f"{path}: {', '.join(wrong[:5])} missing or of another kind; restore it")
    return number, folder, record


def collect(s, out: Path) -> None:
    """Makes the answers to the open round, where there is one, the next round of the run.

    Prints every problem on a line of its own. Raises InputError where an answer is wrong, Waiting
    where only some are missing; with --accept-partial neither: what is not right stays unanswered.
    """
    if s.oracle != "files":
        return
    if world_size() > 1:
        raise InputError("--oracle files runs in one process: start it without torchrun")
    set_aside(out)
    found = open_round(out)
    if found is None:
        return
    number, folder, record = found
    files = {path.name: path for path in sorted((folder / "answers").glob("*")) if path.is_file()}
    problems, missing, extra = [], [], 0
    for image_id, question in record["images"].items():
        given = answer_to(folder, record, image_id, files)
        problems += given.problems
        if given.missing:
            missing.append(f"{image_id} ({given.missing:,} of {question['asked']:,} px)")
        extra += given.extra
    known = {image_id + ending for image_id in record["images"] for ending in ENDINGS}
    folders = {f"{path.name}/" for path in (folder / "answers").glob("*") if path.is_dir()}
    others = sorted(files.keys() - known | folders)
    tell(problems, missing, extra, others)
    if not s.accept_partial:
        refuse(number, folder, problems, missing)
    merge(s, Rounds(out / "rounds"), number, folder, record, files)
    set_aside(out)


def tell(problems: list[str], missing: list[str], extra: int, others: list[str]) -> None:
    """Prints what is wrong, what is missing and what is ignored."""
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if missing:
        names = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        print(f"no answer yet: {len(missing):,} images: {names}", file=sys.stderr)
    if extra:
        print(f"ignored: {extra:,} px that have a class and were not asked", flush=True)
    if others:
        print(
            f"ignored: {len(others):,} files or folders in answers/ of images that were not asked, or of "
            f"other names: {', '.join(others[:5])}" + (", ..." if len(others) > 5 else ""),
            flush=True,
        )


def refuse(number: int, folder: Path, problems: list[str], missing: list[str]) -> None:
    """Raises InputError for problems, Waiting for missing answers."""
    partial = "or take what is right with --resume --accept-partial"
    if problems:
        raise InputError(
            f"{folder / 'answers'}: {len(problems)} problems, listed above; nothing was merged; mend "
            f"them and go on with --resume, {partial}"
        )
    if missing:
        raise Waiting(
            f"round {number}: {len(missing):,} images in {folder} lack answers ({partial})"
        )


def merge(s, rounds: Rounds, number: int, folder: Path, record: dict, files: dict) -> None:
    """Writes round `number` from its answers, reports it."""
    unanswered = 0
    with rounds.new(number) as new:
        for image_id, question in record["images"].items():
            given = answer_to(folder, record, image_id, files)
            if given.problems and not s.accept_partial:  # written since it was checked
                raise InputError(f"{given.problems[0]}; nothing was merged")
            labels = given.labels.masked_fill(given.labels == NO_ANSWER, IGNORE)
            picks = max(1, len(question["picks"]))
            new.add(image_id, given.asked, lambda _, x=labels: x, picks, s.target_hw, s.keep_labels)
            new.images[image_id] |= given.work
            unanswered += int((given.labels == NO_ANSWER).sum())
        if (folder / "picks").is_dir():
            shutil.copytree(folder / "picks", new.work / "picks")
        new.notes = {**record["notes"], "unanswered": unanswered}
    pictures = folder.parent.parent / "pictures" / f"round-{number:02d}"
    if record["unit"] != "image":
        so_far = ledger([rounds.record(n + 1) for n in range(number)])["classes"]
        class_picture(so_far, pictures / "classes.png", balanced="class_weights" in record["notes"])
    for image_id, question in record["images"].items():
        if (pictures / f"{image_id}.png").is_file():  # drawn when nobody had answered yet
            labels = rounds.labels(image_id, tuple(question["size"]), number)
            save_sheet({"answers so far": widened(labels)}, pictures / f"{image_id}_answers.png")
    done = ledger([rounds.record(number)])
    minutes = "time unknown"
    if "seconds" in done:
        minutes = f"{done['seconds'] / 60:.1f} min for {done['timed']:,} of them"
    print(
        f"round {number}: people gave {done.get('answers', 0):,} answers "
        f"({done.get('corrections', 0):,} corrections, {minutes}) on {done['images']:,} images: "
        f"{done['labelled']:,} of {done['asked']:,} px have a class, {unanswered:,} no answer, left at "
        f"{s.target_size} {done['trained']:,}",
        flush=True,
    )
    if done["trained"] < done["labelled"] / 2 and not s.keep_labels:
        print(
            f"warning: {done['labelled'] - done['trained']:,} of the {done['labelled']:,} px of round "
            f"{number} that people gave a class are not trained on: they are lost when labels are "
            f"resized to {s.target_size}; start with --keep-labels, or a larger --target-size",
            flush=True,
        )


def set_aside(out: Path) -> None:
    """Renames the folders of rounds that stand from NN.open to NN.answered, or NN.answered-2 and so on
    where that is there."""
    rounds = Rounds(out / "rounds")
    for number in range(1, rounds.complete() + 1):
        folder = open_folder(rounds, number)
        if folder.is_dir():
            aside, times = folder.with_suffix(".answered"), 1
            while aside.exists():  # of a round that was removed and asked again
                times += 1
                aside = folder.with_suffix(f".answered-{times}")
            os.replace(folder, aside)


# ------------------------------------------------------------------------------------ to read answers


class Answer(NamedTuple):
    """What people said about an image."""

    asked: torch.Tensor  # (H,W) bool
    labels: torch.Tensor  # (H,W) uint8: train ids, 255 none of them or not asked, 254 no answer
    missing: int  # asked pixels without an answer
    extra: int  # pixels with a class that were not asked
    problems: list[str]
    # {"answers": picks that have one, "corrections": , "seconds": or None where unknown}
    work: dict


def answer_to(folder: Path, record: dict, image_id: str, files: dict[str, Path]) -> Answer:
    """The Answer to an image of the open round in `folder` with the questions `record`; `files` are
    those in answers/, by name."""
    question, size = record["images"][image_id], tuple(record["images"][image_id]["size"])
    path = folder / "queries" / f"{image_id}.png"
    content = checked_bytes(path, record["files"][f"queries/{image_id}.png"])
    asked = decode_map(path, content, size) == 255
    labels, problems, work = torch.full(size, NO_ANSWER, dtype=torch.uint8), [], {}
    given = [files[image_id + ending] for ending in ENDINGS if image_id + ending in files]
    if len(given) > 1:
        names = ", ".join(path.name for path in given)
        problems = [f"{image_id}: has {len(given)} answers: {names}; leave one"]
    elif given:
        labels, problems, work = read_answer(given[0], size, record["unit"] == "image")
    extra = int(((labels < NUM_CLASSES) & ~asked).sum())
    labels = torch.where(asked, labels, torch.tensor(IGNORE, dtype=torch.uint8))
    missing = int((labels == NO_ANSWER).sum())
    done = [labels[row, col].item() != NO_ANSWER for row, col in question["picks"]]
    answers = sum(done) if question["picks"] else int(not missing)
    work = {"answers": answers, "corrections": 0, "seconds": None, **work}
    return Answer(asked, labels, 0 if problems else missing, extra, problems, work)


def read_answer(path: Path, size: tuple[int, int], whole: bool):
    """(labels (H,W) uint8 with 254 = no answer, problems, work) in the file of an answer, see Answer.
    `whole`: the question is a whole image, of which polygons need not cover everything."""
    nothing = torch.full(size, NO_ANSWER, dtype=torch.uint8)
    try:
        if path.suffix == ".json":
            return labelme_labels(path, read_json(path, "shapes"), size, whole)
        labels = read_label(path, "cityscapes")
    except InputError as error:
        return nothing, [str(error)], {}
    if tuple(labels.shape) != size:
        found = "x".join(map(str, labels.shape[::-1]))
        return nothing, [f"{path}: is {found}, its photograph {size[1]}x{size[0]}"], {}
    return labels, [], {}


def labelme_labels(path: Path, content: dict, size: tuple[int, int], whole: bool = False):
    """(labels (H,W) uint8 with 254 = no answer, problems, work): the shapes of a Labelme JSON, later
    ones over earlier ones. What lies under a shape that cannot be read is unanswered: nobody knows how
    far it reaches."""
    labels = np.full(size, IGNORE if whole else NO_ANSWER, np.uint8)
    own = page_part(content)
    if whole and own.get("finished") is not True and (own or not content["shapes"]):
        labels.fill(NO_ANSWER)  # begun on the page, or saved before anything was drawn
    said = (content.get("imageHeight") or size[0], content.get("imageWidth") or size[1])
    if said != size or not isinstance(content["shapes"], list):
        labels.fill(NO_ANSWER)
        what = f"is for {said[1]}x{said[0]}, its photograph has {size[1]}x{size[0]}"
        what = what if said != size else "'shapes' is no list"
        return torch.from_numpy(labels), [f"{path}: {what}"], {}
    problems = []
    for number, shape in enumerate(content["shapes"], 1):
        try:
            mask = shape_mask(shape, size)
            value = class_of(shape.get("label"))
        except InputError as error:
            problems.append(f"{path}: shape {number}: {error}")
            labels.fill(NO_ANSWER)
            continue
        if value is None:
            wrong = f"label {shape.get('label')!r} is none of {', '.join(NAMES)}, unknown"
            problems.append(f"{path}: shape {number}: {wrong}")
        labels[mask] = NO_ANSWER if value is None else value
    work = {key: own[key] for key in ("corrections", "seconds") if is_count(own.get(key))}
    return torch.from_numpy(labels), problems, work


def page_part(content: dict) -> dict:
    """The part "alda" of an answer as the page wrote it; {} in a file of another program, or one whose
    shapes another program changed since: Labelme keeps parts that it does not know."""
    own, digest = content.get("alda"), shapes_digest(content.get("shapes"))
    return own if digest and isinstance(own, dict) and own.get("shapes") == digest else {}


def shapes_digest(shapes) -> str | None:
    """Sixteen letters that say whether shapes are still the same, however their numbers are written;
    None where they are none."""
    try:
        known = [
            (
                shape["label"],
                shape["shape_type"],
                [[float(x), float(y)] for x, y in shape["points"]],
            )
            for shape in shapes
        ]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


def is_count(value) -> bool:
    """Whether this is a number of corrections or seconds that one can add up."""
    return type(value) in (int, float) and 0 <= value < 1e9


def class_of(label) -> int | None:
    """The train id of a class's name, 255 for one of NONE_NAMES, None for anything else."""
    name = label.strip().lower().replace("_", " ") if isinstance(label, str) else None
    if name in NONE_NAMES:
        return IGNORE
    return NAMES.index(name) if name in NAMES else None


def shape_mask(shape: dict, size: tuple[int, int]) -> np.ndarray:
    """The pixels of a Labelme shape, (H,W) bool: polygon, rectangle (two corners), circle (centre, a
    point on it) or point (the pixel it lies in). InputError where it is none of these."""
    kind = shape.get("shape_type") or "polygon" if isinstance(shape, dict) else None
    least = {"polygon": 3, "rectangle": 2, "circle": 2, "point": 1}
    if not isinstance(kind, str) or kind not in least:
        raise InputError(f"is a {kind}, expected one of {', '.join(least)}")
    try:
        points = np.array(shape["points"], np.float64)
    except (LookupError, TypeError, ValueError, OverflowError):
        points = np.array(np.nan)
    pairs = points.ndim == 2 and points.shape[1] == 2
    if not pairs or not np.isfinite(points).all() or np.abs(points).max(initial=0) > 1e6:
        raise InputError("'points' are no finite pairs of numbers")
    if len(points) < least[kind] or (kind != "polygon" and len(points) != least[kind]):
        raise InputError(f"a {kind} of {len(points)} points")
    if kind == "rectangle":
        (left, top), (right, bottom) = points
        points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    if kind in ("polygon", "rectangle"):
        return polygon_mask(points, size)
    x, y = points[0]
    radius = np.hypot(*(points[1] - points[0])) if kind == "circle" else 0.0
    # only the rows and columns that it can reach: all of a point, the square around a circle
    edges = [y - radius, y + radius + 1, x - radius, x + radius + 1]
    limits = [size[0], size[0], size[1], size[1]]
    top, bottom, left, right = np.clip(np.floor(edges), 0, limits).astype(int)
    mask = np.zeros(size, bool)
    if kind == "point":
        mask[top:bottom, left:right] = True
        return mask
    rows, cols = np.arange(top, bottom)[:, None], np.arange(left, right)
    mask[top:bottom, left:right] = np.hypot(cols + 0.5 - x, rows + 0.5 - y) <= radius
    return mask


def polygon_mask(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie in a polygon, (H,W) bool: `points` (n,2) float64 (x, y), closed,
    inside by the even-odd rule."""
    mask = np.zeros(size, bool)
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    first, last = np.clip(np.ceil([y0.min() - 0.5, y0.max() - 0.5]), 0, size[0]).astype(int)
    for row in range(first, last):
        y = row + 0.5
        cut = (y0 <= y) != (y1 <= y)  # the sides that the line through the pixels' centres cuts
        x = np.sort(x0[cut] + (y - y0[cut]) * (x1[cut] - x0[cut]) / (y1[cut] - y0[cut]))
        ends = np.clip(np.ceil(x - 0.5), 0, size[1]).astype(int)
        for left, right in zip(ends[::2], ends[1::2], strict=True):
            mask[row, left:right] = True
    return mask
