"""Rounds on disk, oracle, ledger, readers of labels. Who answers, and where do answers live?

    from alda.annotation import Rounds, bought_labels, ground_truth
    rounds = Rounds(out / "rounds")
    with rounds.new(1) as new:                      # written under a temporary name, renamed when complete
        new.add("aachen_000000_000019", asked, ground_truth(target, index), regions=1, training_size=(640, 1280))
    labels = rounds.labels("aachen_000000_000019", shape=(1024, 2048))    # the union over all rounds

A round of queries is a folder `rounds/01` that is never changed once it is complete:
`queries/IMAGE.png` (255 = asked), `answers/IMAGE.png` (train ids, 255 = no answer) and `round.json`
(the ledger). A round of pseudo-labels is a folder `pseudo/01` with `labels/IMAGE.png` (train ids,
255 = none) and `round.json`. Every round.json holds the sha256 of the round's files; whoever reads a
file checks it. Axes: H rows, W columns; maps are (H,W).
"""

import hashlib
import io
import json
import math
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alda import IGNORE, InputError
from alda.datasets import (
    NAMES,
    PICTURE_ERRORS,
    PSEUDO,
    SegmentationDataset,
    checked_picture,
    file_name,
    misfits,
    read_json,
    resize_labels,
    write_atomic,
)


def ground_truth(dataset: SegmentationDataset, index: int):
    """The oracle that knows the truth: a function asked (H,W) bool -> answers (H,W) uint8, 255
    where nothing was asked.

    Asked pixels whose truth is 255 get no answer: they are paid for and the ledger counts them as
    ignored.
    """

    def answer(asked: torch.Tensor) -> torch.Tensor:
        return torch.where(
            asked.cpu(), dataset.labels(index), torch.tensor(IGNORE, dtype=torch.uint8)
        )

    return answer


# ----------------------------------------------------------------------------------- rounds on disk


class Rounds:
    """The rounds of a run, of queries or of pseudo-labels, on disk below `folder`; `names` of the
    classes that the ledger counts."""

    def __init__(self, folder: str | Path, names: tuple[str, ...] = NAMES):
        self.folder, self.names = Path(folder), tuple(names)
        self.sums: dict[int, dict[str, str]] = {}  # of the rounds read so far, see `files`

    def complete(self) -> int:
        """How many rounds stand. Raises InputError when their numbers have a gap (a folder was
        removed by hand)."""
        numbers = sorted(
            int(p.name) for p in self.folder.glob("[0-9][0-9]*") if p.is_dir() and p.name.isdigit()
        )
        if numbers != list(range(1, len(numbers) + 1)):
            raise InputError(
                f"{self.folder}: rounds {numbers} have a gap; restore the missing folder or start with a new --out"
            )
        return len(numbers)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:02d}"

    def new(self, number: int) -> "NewRound":
        return NewRound(self.path(number), self.names, partial(self.labels, upto=number - 1))

    def record(self, number: int) -> dict:
        """The ledger of round `number`: its round.json but for the sums of its files."""
        path = self.path(number) / "round.json"
        record = read_json(path, "classes", "labelled")
        kinds = {"classes": dict, "labelled": int}
        if "kind" not in record:  # of queries
            kinds |= {**dict.fromkeys(LEDGER, int), "images": dict}
        wrong = misfits(record, kinds)
        if wrong or not record["classes"].keys() >= set(self.names):
            raise InputError(
                f"{path}: {', '.join(wrong or ['classes'])} missing or of another kind; restore it "
                "from a copy"
            )
        record.pop("files", None)
        return record

    def files(self, number: int) -> dict[str, str]:
        """{"answers/IMAGE.png": sha256, ...}: the files that round `number` was completed with."""
        if number not in self.sums:
            path = self.path(number) / "round.json"
            sums = read_json(path, "files")["files"]
            if not isinstance(sums, dict):
                raise InputError(f"{path}: 'files' is no table of sums; restore it from a copy")
            self.sums[number] = sums
        return self.sums[number]

    def verify(self) -> None:
        """Raises InputError where a file of a complete round is missing, was changed, or was added
        since the round was completed."""
        for number in range(1, self.complete() + 1):
            folder, sums, _ = self.path(number), self.files(number), self.record(number)
            for name, value in sums.items():
                checked_bytes(folder / name, value)
            found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
            if extra := sorted(found - sums.keys()):
                raise InputError(
                    f"{folder / extra[0]}: was not there when the round was completed; remove it"
                )

    def read(self, number: int, part: str, image_id: str, shape, default: int) -> torch.Tensor:
        """The (H,W) uint8 map of an image in `part` ("queries", "answers", "labels") of round
        `number`; `default` everywhere for an image that the round does not hold."""
        name = f"{part}/{file_name(image_id)}.png"
        path, sums = self.path(number) / name, self.files(number)
        if name not in sums:
            return torch.full(tuple(shape), default, dtype=torch.uint8)
        return decode_map(path, checked_bytes(path, sums[name]), shape)

    def asked(self, image_id: str, shape: tuple[int, int], upto: int | None = None) -> torch.Tensor:
        """Every pixel asked in rounds 1..upto (default: all), (H,W) bool."""
        mask = torch.zeros(tuple(shape), dtype=torch.bool)
        for number in range(1, self._upto(upto) + 1):
            mask |= self.read(number, "queries", image_id, shape, 0) == 255
        return mask

    def labels(
        self, image_id: str, shape: tuple[int, int], upto: int | None = None
    ) -> torch.Tensor:
        """The answers of rounds 1..upto (default: all) in one map, (H,W) uint8 train ids, 255 = no
        label."""
        union = torch.full(tuple(shape), IGNORE, dtype=torch.uint8)
        for number in range(1, self._upto(upto) + 1):
            answers = self.read(number, "answers", image_id, shape, IGNORE)
            check_ids(answers, f"{self.path(number) / 'answers' / image_id}.png", len(self.names))
            union = torch.where(answers != IGNORE, answers, union)
        return union

    def _upto(self, upto: int | None) -> int:
        return self.complete() if upto is None else upto


def begin_folder(path: Path, parts: tuple[str, ...]) -> Path:
    """The folder under whose temporary name a round is written, empty but for the folders
    `parts`."""
    work = path.with_name(path.name + ".incomplete")
    # left by an interrupted round; no person answered in it
    shutil.rmtree(work, ignore_errors=True)
    try:
        for part in parts:
            (work / part).mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{work}: cannot be made ({error.strerror}); make room or change its rights, then go on "
            "with --resume"
        ) from None
    return work


def complete_folder(work: Path, path: Path, record: dict) -> None:
    """Writes round.json, the sums of all files in it, and gives the folder its name: from now on
    the round is complete."""
    maps = sorted(work.rglob("*.png"))
    sums = {
        path.relative_to(work).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in maps
    }
    write_atomic(work / "round.json", json.dumps({**record, "files": sums}, indent=1))
    try:
        os.replace(work, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be completed ({error.strerror}): was the run's folder removed? go on "
            "with --resume, or with another --out"
        ) from None


class NewRound:
    """A round of queries being written: a context manager that completes the folder when every
    image is in it."""

    def __init__(self, path: Path, names: tuple[str, ...], earlier):
        self.path, self.names = path, names
        self.earlier = earlier  # (image's id, (H,W)) -> the labels of earlier rounds, (H,W) uint8
        self.images: dict[str, dict] = {}
        self.classes = np.zeros(len(names), np.int64)
        self.lock = threading.Lock()  # `add` may be called by several threads
        self.notes: dict = {}  # what else belongs into round.json: score threshold, class weights, ...

    def __enter__(self) -> "NewRound":
        if self.path.exists():
            raise InputError(f"{self.path} stands already: a round is never written twice")
        self.work = begin_folder(self.path, ("queries", "answers"))
        return self

    def add(
        self,
        image_id: str,
        asked: torch.Tensor,
        oracle,
        regions: int,
        training_size: tuple[int, int],
        keep_labels: bool = False,
    ) -> torch.Tensor:
        """Asks the oracle for the pixels `asked` (H,W) bool of one image; stores question and
        answer; keeps the ledger.

        Returns the answers (H,W) uint8. An image of which nothing is asked gets no file. `regions`
        is how many picks the pixels come from; `training_size` (h,w) and `keep_labels` say how the
        labels will be resized for training: the ledger counts what is left of them. Raises
        InputError for an id that is no file name, and for answers of another shape or kind, outside
        0..18 and 255, or where nothing was asked.
        """
        asked = asked.cpu()
        answers = oracle(asked)
        check_answers(image_id, asked, answers, len(self.names))
        if not asked.any():
            return answers
        write_map(self.work / "queries" / f"{image_id}.png", asked.to(torch.uint8) * 255)
        write_map(self.work / "answers" / f"{image_id}.png", answers)
        labelled = int((answers != IGNORE).sum())
        counts = torch.bincount(answers.flatten().long(), minlength=256)[: len(self.names)].numpy()
        with self.lock:
            self.classes += counts
        cells = resize_labels(answers, training_size, keep_labels) != IGNORE
        if keep_labels:  # a cell may hold pixels of several rounds; it trains once
            before = self.earlier(image_id, tuple(answers.shape))
            cells &= resize_labels(before, training_size, True) == IGNORE
        trained = int(cells.sum())
        self.images[image_id] = {
            "asked": int(asked.sum()),
            "labelled": labelled,
            "trained": trained,
            "regions": regions,
        }
        return answers

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            complete_folder(self.work, self.path, self.record())

    def record(self) -> dict:
        """What round.json says: the round's ledger in pixels and picks, its notes, a row for each
        image."""
        keys = ("asked", "labelled", "trained", "regions")
        total = {key: sum(row[key] for row in self.images.values()) for key in keys}
        asked, labelled = total["asked"], total["labelled"]
        for row in self.images.values():
            row["share"] = row["asked"] / max(1, asked)  # of what this round asked
        return {
            "asked": asked,  # pixels
            "labelled": labelled,  # of those, pixels with a class
            "ignored": asked - labelled,  # of those, pixels that the truth leaves out
            # cells with a label after resizing to the training size, and none of earlier rounds
            "trained": total["trained"],
            "regions": total["regions"],  # picks
            "classes": dict(zip(self.names, self.classes.tolist(), strict=True)),
            **self.notes,
            "images": self.images,
        }


def check_answers(image_id: str, asked: torch.Tensor, answers: torch.Tensor, classes: int) -> None:
    """Raises InputError where `answers` are none to the question `asked` (H,W) bool."""
    file_name(image_id)
    if answers.dtype != torch.uint8 or answers.shape != asked.shape:
        raise InputError(
            f"the oracle's answer for {image_id} is {tuple(answers.shape)} {answers.dtype}, expected "
            f"{tuple(asked.shape)} torch.uint8"
        )
    check_ids(answers, f"the oracle's answer for {image_id}", classes)
    unasked = int(((answers != IGNORE) & ~asked).sum())
    if unasked:
        raise InputError(
            f"the oracle's answer for {image_id} labels {unasked} pixels that were not asked; they "
            "must be 255"
        )


def check_ids(labels: torch.Tensor, what: str, classes: int) -> None:
    """Raises InputError, beginning with `what`, for labels that are no train ids."""
    wrong = (labels >= classes) & (labels != IGNORE)
    if wrong.any():
        ids = labels[wrong].unique()[:8].tolist()
        raise InputError(
            f"{what}: holds the ids {ids}, expected train ids 0..{classes - 1} or 255 (none)"
        )


# ------------------------------------------------------------------------------- the ledger

LEDGER = ("asked", "labelled", "ignored", "trained", "regions")
# of the images that people answered, see oracle.py; `seconds` is that of `timed` answers
PEOPLE = ("answers", "corrections", "seconds", "timed")


def ledger(records: list[dict]) -> dict:
    """Sums over rounds: asked, labelled, ignored and trained pixels, regions, labelled pixels per
    class and their entropy (over log C), how many images were asked; and where people answered,
    their answers, corrections, seconds, and how many answers were timed."""
    total = {key: sum(r[key] for r in records) for key in LEDGER}
    total["images"] = len({image for r in records for image in r["images"]})
    rows = [row for r in records for row in r["images"].values()]
    rows = [row for row in rows if isinstance(row, dict) and "answers" in row]
    rows += [{"timed": row["answers"]} for row in rows if row.get("seconds") is not None]
    for key in PEOPLE:  # None: nobody measured how long it took
        known = [row[key] for row in rows if row.get(key) is not None]
        total |= {key: sum(known)} if known else {}
    names = list(records[0]["classes"]) if records else NAMES
    total["classes"] = {name: sum(r["classes"][name] for r in records) for name in names}
    share = torch.tensor([*total["classes"].values()]).double() / max(1, total["labelled"])
    # 1: all classes alike
    total["class_entropy"] = (torch.special.entr(share).sum() / math.log(len(names))).item()
    return total


# -------------------------------------------------------------------------------- readers of labels


def bought_labels(
    target: SegmentationDataset, rounds: Rounds, upto: int, index: int
) -> torch.Tensor:
    """The labels of a target image that rounds 1..upto bought: (H,W) uint8, 255 elsewhere."""
    sample = target.samples[index]
    return rounds.labels(sample.id, sample.size, upto)


def pseudo_labels(
    target: SegmentationDataset, pseudo: Rounds, number: int, index: int
) -> torch.Tensor:
    """The pseudo-labels that round `number` gave to a target image: (H,W) uint8 train ids, 255 =
    none."""
    sample = target.samples[index]
    labels = pseudo.read(number, "labels", sample.id, sample.size, IGNORE)
    check_ids(labels, f"{pseudo.path(number) / 'labels' / sample.id}.png", len(pseudo.names))
    return labels


def bought_and_pseudo(
    target: SegmentationDataset, rounds: Rounds, upto: int, pseudo: Rounds, number: int, index: int
) -> torch.Tensor:
    """The bought labels of an image, and PSEUDO + c where none is bought but the pseudo-labels of
    round `number` say c: (H,W) uint8, 255 elsewhere."""
    bought = bought_labels(target, rounds, upto, index)
    guessed = pseudo_labels(target, pseudo, number, index)
    guessed = torch.where(guessed != IGNORE, guessed + PSEUDO, IGNORE)
    return torch.where(bought != IGNORE, bought, guessed)


def write_map(path: Path, values: torch.Tensor) -> None:
    """Writes (H,W) uint8 as a single-channel PNG. Raises InputError where it cannot be written."""
    packed = io.BytesIO()
    Image.fromarray(values.numpy()).save(packed, "png")
    write_atomic(path, packed.getvalue())


def read_map(path: Path, shape: tuple[int, int], default: int) -> torch.Tensor:
    """The (H,W) uint8 map of a PNG, `default` everywhere where there is no file; InputError for
    another size than `shape`, and for a file that cannot be read."""
    if not path.is_file():
        return torch.full(tuple(shape), default, dtype=torch.uint8)
    return decode_map(path, path.read_bytes(), shape)


def decode_map(path: Path, content: bytes, shape: tuple[int, int]) -> torch.Tensor:
    """The (H,W) uint8 map in the bytes of a PNG; `path` names it in errors (InputError)."""
    try:
        with checked_picture(content) as picture:
            kind, values = picture.mode, np.array(picture)
    except PICTURE_ERRORS as error:
        raise InputError(
            f"{path}: cannot be read as a label map ({type(error).__name__}); restore it from a copy"
        ) from None
    if values.shape != tuple(shape):
        raise InputError(
            f"{path}: is {values.shape}, its image is {tuple(shape)} (rows, columns); it belongs to other data"
        )
    if values.dtype != np.uint8:
        raise InputError(f"{path}: is a {kind} picture, expected 8-bit grey; restore it")
    return torch.from_numpy(values)


def checked_bytes(path: Path, sha256: str) -> bytes:
    """The bytes of a file of a round; InputError where it is missing or not the one with this
    sum."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: is listed in round.json but cannot be read ({error.strerror}); restore it from "
            "a copy, or start with another --out"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(
            f"{path}: was changed since the round was completed (its sha256 is not the one in "
            "round.json); restore it from a copy, or start with another --out"
        )
    return content
