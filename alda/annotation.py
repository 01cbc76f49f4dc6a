"""Rounds on disk, oracle, ledger, readers of labels. Who answers, and where do answers live?

    from alda.annotation import Rounds, bought_labels, ground_truth
    rounds = Rounds(out / "rounds")
    with rounds.new(1) as new:                      # written under a temporary name, renamed when complete
        new.add("aachen_000000_000019", asked, ground_truth(target, index), training_size=(640, 1280))
    labels = rounds.labels("aachen_000000_000019", shape=(1024, 2048))    # the union over all rounds

A round of queries is a folder `rounds/01` that is never changed once it is complete:
`queries/IMAGE.png` (255 = asked), `answers/IMAGE.png` (train ids, 255 = no answer) and `round.json`
(the ledger). A round of pseudo-labels is a folder `pseudo/01` with `labels/IMAGE.png` (train ids,
255 = none) and `round.json`. Axes: H rows, W columns; maps are (H,W).
"""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alda import IGNORE, InputError
from alda.datasets import NAMES, PSEUDO, SegmentationDataset, resize_labels


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
        return NewRound(self.path(number), self.names)

    def record(self, number: int) -> dict:
        """The ledger of round `number` (its round.json)."""
        return json.loads((self.path(number) / "round.json").read_text())

    def asked(self, image_id: str, shape: tuple[int, int], upto: int | None = None) -> torch.Tensor:
        """Every pixel asked in rounds 1..upto (default: all), (H,W) bool."""
        mask = torch.zeros(tuple(shape), dtype=torch.bool)
        for number in range(1, self._upto(upto) + 1):
            mask |= read_map(self.path(number) / "queries" / f"{image_id}.png", shape, 0) == 255
        return mask

    def labels(
        self, image_id: str, shape: tuple[int, int], upto: int | None = None
    ) -> torch.Tensor:
        """The answers of rounds 1..upto (default: all) in one map, (H,W) uint8 train ids, 255 = no
        label."""
        union = torch.full(tuple(shape), IGNORE, dtype=torch.uint8)
        for number in range(1, self._upto(upto) + 1):
            answers = read_map(self.path(number) / "answers" / f"{image_id}.png", shape, IGNORE)
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
    for part in parts:
        (work / part).mkdir(parents=True)
    return work


def complete_folder(work: Path, path: Path, record: dict) -> None:
    """Writes round.json and gives the folder its name: from now on the round is complete."""
    (work / "round.json").write_text(json.dumps(record, indent=1))
    os.replace(work, path)


class NewRound:
    """A round of queries being written: a context manager that completes the folder when every
    image is in it."""

    def __init__(self, path: Path, names: tuple[str, ...] = NAMES):
        self.path, self.names = path, names
        self.images: dict[str, dict] = {}
        self.classes = np.zeros(len(names), np.int64)
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
        labels will be resized for training: the ledger counts what is left of them.
        """
        asked = asked.cpu()
        answers = oracle(asked)
        if not asked.any():
            return answers
        write_map(self.work / "queries" / f"{image_id}.png", asked.to(torch.uint8) * 255)
        write_map(self.work / "answers" / f"{image_id}.png", answers)
        labelled = int((answers != IGNORE).sum())
        self.classes += torch.bincount(answers.flatten().long(), minlength=256)[
            : len(self.names)
        ].numpy()
        trained = int((resize_labels(answers, training_size, keep_labels) != IGNORE).sum())
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
        total = {
            key: sum(row[key] for row in self.images.values())
            for key in ("asked", "labelled", "trained", "regions")
        }
        for row in self.images.values():
            row["share"] = row["asked"] / max(1, total["asked"])  # of what this round asked
        return {
            "asked": total["asked"],  # pixels
            "labelled": total["labelled"],  # of those, pixels with a class
            "ignored": total["asked"]
            - total["labelled"],  # of those, pixels that the truth leaves out
            "trained": total["trained"],  # labelled cells after resizing to the training size
            "regions": total["regions"],  # picks
            "classes": dict(zip(self.names, self.classes.tolist(), strict=True)),
            **self.notes,
            "images": self.images,
        }


# ------------------------------------------------------------------------------- the ledger

LEDGER = ("asked", "labelled", "ignored", "trained", "regions")


def ledger(records: list[dict]) -> dict:
    """Sums over rounds: asked, labelled, ignored and trained pixels, regions, labelled pixels per
    class and their entropy (over log C), and how many images were asked."""
    total = {key: sum(r[key] for r in records) for key in LEDGER}
    total["images"] = len({image for r in records for image in r["images"]})
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
    return read_map(pseudo.path(number) / "labels" / f"{sample.id}.png", sample.size, IGNORE)


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
    """Writes (H,W) uint8 as a single-channel PNG."""
    Image.fromarray(values.numpy()).save(path)


def read_map(path: Path, shape: tuple[int, int], default: int) -> torch.Tensor:
    """The (H,W) uint8 map of a PNG, `default` everywhere where there is no file; InputError for
    another size than `shape`."""
    if not path.is_file():
        return torch.full(tuple(shape), default, dtype=torch.uint8)
    with Image.open(path) as picture:
        values = torch.from_numpy(np.array(picture))
    if tuple(values.shape) != tuple(shape):
        raise InputError(
            f"{path}: is {tuple(values.shape)}, its image is {tuple(shape)} (rows, columns); it belongs to other data"
        )
    return values
