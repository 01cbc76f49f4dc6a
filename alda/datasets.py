"""Label spaces, the four datasets, joint transforms, samplers. What are the pixels and the labels?

    python -m alda.datasets check /data                    # what is found there, and what is missing
    from alda.datasets import open_dataset, JointTransform, TrainingView, EndlessSampler
    source = open_dataset("gta5", "/data")                # /data/gta5/images, /data/gta5/labels
    target = open_dataset("cityscapes", "/data", "train")  # /data/cityscapes/leftImg8bit/train, .../gtFine/train

GTA5: Richter et al., arXiv 1608.02192. SYNTHIA-RAND-CITYSCAPES: Ros et al., CVPR 2016. Cityscapes:
Cordts et al., arXiv 1604.01685. ACDC: Sakaridis et al., arXiv 2104.13395. Class-balanced source
sampling: RIPU's official code.

Axes: N images, C classes, H rows, W columns. Labels are uint8 train ids 0..18 with 255 = ignore,
everywhere.

Differences from papers and official code:

 D17. Labels at the training size: the code's nearest-neighbour resizing is the default, because the
      published numbers were made with it; it keeps about 39 % of the bought pixels at 1280x640.
      --keep-labels fills each cell that holds one.
 D18. Source sampling: class-balanced as in RIPU's code, on which the paper is silent (--source-
      sampling uniform). Presence of classes is read from the labels, no published list is needed;
      each sub-epoch shuffles the lists anew.
 D19. Padding of a crop is 255 in the labels; STAL's code pads them with 0, road.
 D20. One space of 19 train ids: STAL's code pastes GTA5's palette as grey levels and SYNTHIA's 16
      ids among Cityscapes' 19, and resizes SYNTHIA's labels bilinearly, which invents classes.
"""

import argparse
import atexit
import collections
import errno
import hashlib
import io
import json
import math
import multiprocessing.util
import os
import shutil
import signal
import struct
import sys
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.io import ImageReadMode, decode_image

from alda import IGNORE, InputError, run_command
from alda.distributed import all_gather_list, say, share

# in the truth of an unlabelled image: nobody knows this pixel's class; 255 is what a crop adds outside
NO_TRUTH = 254
# in a training label map, 100 + c is a pseudo-label of class c: nobody was asked for it
PSEUDO = 100
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_COLOUR = (124, 116, 104)  # of ImageNet, in 0..255: what padding is


class Class(NamedTuple):
    """One row of the class table; a class's train id is its place in the table."""

    name: str
    colour: tuple[int, int, int]  # RGB of the Cityscapes palette
    cityscapes_id: int  # also the GTA5 palette index and the ACDC label id
    synthia_id: int | None  # None: SYNTHIA does not have the class


CLASSES = (
    Class("road", (128, 64, 128), 7, 3),
    Class("sidewalk", (244, 35, 232), 8, 4),
    Class("building", (70, 70, 70), 11, 2),
    Class("wall", (102, 102, 156), 12, 21),
    Class("fence", (190, 153, 153), 13, 5),
    Class("pole", (153, 153, 153), 17, 7),
    Class("traffic light", (250, 170, 30), 19, 15),
    Class("traffic sign", (220, 220, 0), 20, 9),
    Class("vegetation", (107, 142, 35), 21, 6),
    Class("terrain", (152, 251, 152), 22, None),
    Class("sky", (70, 130, 180), 23, 1),
    Class("person", (220, 20, 60), 24, 10),
    Class("rider", (255, 0, 0), 25, 17),
    Class("car", (0, 0, 142), 26, 8),
    Class("truck", (0, 0, 70), 27, None),
    Class("bus", (0, 60, 100), 28, 19),
    Class("train", (0, 80, 100), 31, None),
    Class("motorcycle", (0, 0, 230), 32, 12),
    Class("bicycle", (119, 11, 32), 33, 11),
)
NUM_CLASSES = len(CLASSES)
NAMES = tuple(c.name for c in CLASSES)
SYNTHIA_16 = tuple(i for i, c in enumerate(CLASSES) if c.synthia_id is not None)
SYNTHIA_13 = tuple(i for i in SYNTHIA_16 if NAMES[i] not in ("wall", "fence", "pole"))
CLASS_SETS = {"19": tuple(range(NUM_CLASSES)), "16": SYNTHIA_16, "13": SYNTHIA_13}

_UNKNOWN = 253  # marks ids that no dataset defines, so that a wrong file is an error and not 19 classes of ignore
# Cityscapes and GTA5 define 0..33 and the licence plate (34)
_LARGEST_ID = {"cityscapes": 34, "synthia": 22}


def id_map(space: str) -> np.ndarray:
    """The (256,) uint8 table from raw ids of `space` ("cityscapes", "synthia" or "train") to train
    ids.

    Known ids without a train id map to 255, ids that the label space does not define to 253 (an
    error when met).
    """
    table = np.full(256, _UNKNOWN, np.uint8)
    if space == "train":
        table[:NUM_CLASSES] = np.arange(NUM_CLASSES)
    else:
        table[: _LARGEST_ID[space] + 1] = IGNORE
        for train_id, c in enumerate(CLASSES):
            raw = c.cityscapes_id if space == "cityscapes" else c.synthia_id
            if raw is not None:
                table[raw] = train_id
    table[IGNORE] = IGNORE
    return table


def to_label_ids(labels: np.ndarray) -> np.ndarray:
    """Train ids (H,W) uint8 to Cityscapes label ids (H,W) uint8, as the Cityscapes server takes
    them; 255 becomes 0."""
    table = np.zeros(256, np.uint8)
    table[:NUM_CLASSES] = [c.cityscapes_id for c in CLASSES]
    return table[labels]


def colourise(labels: np.ndarray) -> np.ndarray:
    """Train ids (H,W) to RGB (H,W,3) uint8 in the class colours; 255 is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:NUM_CLASSES] = [c.colour for c in CLASSES]
    return palette[labels]


# -------------------------------------------------------------------------------------------- files

# what Pillow and torchvision raise for a broken or hostile picture; a decompression bomb is one
PICTURE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_json(path: Path, *keys: str) -> dict:
    """The object in a JSON file, which must have `keys`. Raises InputError naming the file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({_first_line(error)}); restore it from a copy"
        ) from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        what = f"has no {missing[0]!r}" if missing else "is no object"
        raise InputError(f"{path}: {what}: it is not of a run of this package, or was edited")
    return content


def misfits(content, table, where: str = "") -> list[str]:
    """The names of what `content` lacks or has of another kind than `table` says: a type, or a table
    of the parts of an object."""
    if not isinstance(table, dict):
        return [] if isinstance(content, table) else [where]
    if not isinstance(content, dict):
        return [where]
    found = []
    for key, kind in table.items():
        found += misfits(content.get(key), kind, f"{where}.{key}".lstrip("."))
    return found


def write_atomic(path: Path, content) -> None:
    """Writes a file under a temporary name, flushed to the disk, and renames it: it is whole or not
    there.

    `content` is bytes, text, or a function that is called with the open binary file. Raises
    InputError naming the file where it cannot be written (a full disk, a folder that was removed).
    """
    work = path.with_name(path.name + ".incomplete")
    try:
        with open(work, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        work.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot be written ({_first_line(error)}): is the disk full, or its folder "
            "removed? what was there before is kept; make room and start again, a run with --resume"
        ) from None


class Sample(NamedTuple):
    """One image of a dataset. `label` is None where there is none: Cityscapes and ACDC test, and
    training images of a target whose labels nobody reads."""

    id: str  # unique in its dataset; names the files of a query round
    image: Path
    label: Path | None
    group: str  # the city, the weather condition, or the dataset's own name
    size: tuple[int, int]  # (H, W) of the image file


@contextmanager
def checked_picture(content: bytes):
    """The picture in the bytes of a file, its checksums compared first: decoders may take a PNG with
    a flipped bit as it is. Raises one of PICTURE_ERRORS."""
    with Image.open(io.BytesIO(content)) as picture:
        picture.verify()
    with Image.open(io.BytesIO(content)) as picture:
        yield picture


def turned(picture: Image.Image) -> bool:
    """Whether a JPEG (MPO: one with a second picture behind it) of a camera that was held upright is
    stored lying (EXIF orientation 5 to 8), or upside down or mirrored (2 to 4)."""
    return picture.format in ("JPEG", "MPO") and picture.getexif().get(0x0112, 1) in range(2, 9)


def read_image(path: Path) -> torch.Tensor:
    """The image as (3,H,W) uint8 RGB. Raises InputError naming a missing, unreadable or truncated
    file, and one of 16-bit, 32-bit or float grey, which 8 bits would clip."""
    try:
        with checked_picture(path.read_bytes()) as picture:
            if picture.mode.startswith(("I", "F")):
                raise InputError(
                    f"{path}: is grey of more than 8 bits (mode {picture.mode}), expected 8-bit "
                    "RGB; convert it, or its values would be clipped"
                )
            if turned(picture):
                picture = ImageOps.exif_transpose(picture)
            # (H,W,3) -> (3,H,W)
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except PICTURE_ERRORS as error:
        raise InputError(
            f"{path}: cannot be read as an image ({_first_line(error)}); copy it again, or remove it before "
            "a run begins"
        ) from None


def read_label(path: Path, space: str) -> torch.Tensor:
    """The label file as (H,W) uint8 train ids.

    `space` is "cityscapes" (GTA5, Cityscapes, ACDC: palette or single-channel PNG) or "synthia"
    (16-bit RGB PNG, class in channel 0; Pillow opens those as 8 bit and silently returns zeros,
    torchvision reads them). A file that ends in `_labelTrainIds.png` holds train ids. Raises
    InputError naming the file when it cannot be read, has the wrong kind of channels, or holds ids
    that the label space does not define.
    """
    try:
        if space == "synthia":
            with checked_picture(path.read_bytes()) as picture:
                picture.load()  # torchvision crashes on what Pillow refuses
            raw = decode_image(str(path), ImageReadMode.UNCHANGED)
            if raw.dtype != torch.uint16 or raw.shape[0] < 3:
                kind = f"{raw.shape[0]} channels of {raw.dtype}"
                raise InputError(
                    f"{path}: expected a 16-bit RGB PNG (SYNTHIA's GT/LABELS), found {kind}"
                )
            ids = raw[0].numpy()
        else:
            with checked_picture(path.read_bytes()) as picture:
                if picture.mode not in ("P", "L", "I;16", "I"):
                    raise InputError(
                        f"{path}: expected label ids (palette or single-channel PNG), found a {picture.mode} picture; "
                        "colour renderings cannot be used, take the *_labelIds files or GTA5's palette PNGs"
                    )
                ids = np.array(picture)
    except PICTURE_ERRORS as error:
        raise InputError(
            f"{path}: cannot be read as a label ({_first_line(error)}); copy it again or remove it"
        ) from None
    space = "train" if path.name.endswith("_labelTrainIds.png") else space
    table = id_map(space)
    inside = (ids >= 0) & (ids <= 255)
    labels = np.where(inside, table[np.clip(ids, 0, 255)], _UNKNOWN).astype(np.uint8)
    if (labels == _UNKNOWN).any():
        unknown = np.unique(ids[labels == _UNKNOWN])[:8].tolist()
        if space == "train":
            what = "are no train ids, expected 0 to 18 or 255; label ids belong into _labelIds.png"
        else:
            what = f"are not in the {space} label table; is it another dataset's file?"
        raise InputError(f"{path}: holds ids {unknown} that {what}")
    return torch.from_numpy(labels)


def _first_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text names a buffer in memory
        return "its content is no picture"
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


class SegmentationDataset(Dataset):
    """A list of images with labels: `dataset[i]` is (image (3,H,W) uint8, labels (H,W) uint8 train
    ids).

    The list is checked once: every image must have a label (where the split has any) and an id of
    its own that is a plain file name (InputError), every header must be readable; an image whose
    label has another size is left out, with one warning line (GTA5 has a few of them). Where nothing
    is learnt from the labels (`reads_labels` False) they may be missing or broken, and change no
    fingerprint.
    """

    def __init__(self, name: str, samples: list[Sample], space: str, reads_labels: bool = True):
        self.name, self.samples, self.space = name, samples, space
        self.reads_labels = reads_labels
        self.unreadable: set[int] = set()  # labels that `truth` has warned of
        first: dict[str, Sample] = {}
        for sample in samples:
            file_name(sample.id)
            if first.setdefault(sample.id, sample) is not sample:
                raise InputError(
                    f"{sample.image} and {first[sample.id].image} have the same id {sample.id!r}: "
                    "their answers would be one file; rename one image and its label"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> torch.Tensor:
        return read_image(self.samples[index].image)

    def labels(self, index: int) -> torch.Tensor:
        sample = self.samples[index]
        if sample.label is None:
            raise InputError(f"{sample.image}: this split publishes no labels")
        return read_label(sample.label, self.space)

    @property
    def pixels(self) -> int:
        """The pixels of all images."""
        return sum(height * width for height, width in (sample.size for sample in self.samples))

    @property
    def labelled(self) -> bool:
        """Whether any image has a label."""
        return any(sample.label is not None for sample in self.samples)

    def truth(self, index: int) -> torch.Tensor:
        """The labels for reports and pictures, (H,W) uint8; 255 everywhere where an image has none,
        and, where nothing is learnt from them, with a warning, where they cannot be read."""
        sample = self.samples[index]
        try:
            if sample.label is not None:
                return self.labels(index)
        except InputError as error:
            if self.reads_labels:
                raise
            if index not in self.unreadable:
                print(f"warning: {error}; it counts as unlabelled here", flush=True)
            self.unreadable.add(index)
        return torch.full(sample.size, IGNORE, dtype=torch.uint8)

    def classes(self, index: int) -> torch.Tensor:
        """Which classes the image holds: (C,) bool."""
        counts = torch.bincount(self.labels(index).flatten().long(), minlength=256)
        return counts[:NUM_CLASSES] > 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image(index), self.labels(index)

    def check_labelled(self) -> None:
        """Raises InputError where no pixel of any image has a class; reads until the first one."""
        if not any(self.classes(index).any() for index in range(len(self))):
            raise InputError(
                f"{self.samples[0].image.parent}: no pixel of {len(self)} {self.name} images has a "
                "class (all labels are 255 after mapping); unpack the right labels"
            )

    def fingerprint(self) -> dict:
        """{"images": how many, "sha256": of ids, sizes and the lengths of all files,
        "sha256_without_photographs": the same but for the photographs' lengths}: what a run's
        config.json remembers of its data."""
        whole, rest = hashlib.sha256(), hashlib.sha256()
        for sample in self.samples:
            label = sample.label if self.reads_labels else None
            line = [sample.id, sample.group, *sample.size]
            lengths = [path.stat().st_size for path in (sample.image, label) if path is not None]
            whole.update(json.dumps([*line, *lengths]).encode())
            rest.update(json.dumps([*line, *lengths[1:]]).encode())
        sums = {"sha256": whole.hexdigest(), "sha256_without_photographs": rest.hexdigest()}
        return {"images": len(self), **sums}


def file_name(image_id: str) -> str:
    """The id, where it is a plain file name; InputError where it would lead to another folder, or no
    text file can hold it (a name that is not UTF-8)."""
    bad = not image_id or image_id.startswith(".") or any(c in image_id for c in "/\\:\0")
    if bad or any("\ud800" <= c <= "\udfff" for c in image_id):
        raise InputError(
            f"image id {image_id!r} is no plain file name: it must be UTF-8, have no slash, backslash "
            "or colon and not begin with a dot; rename the image and its label"
        )
    return image_id


PICTURES = (".png", ".jpg", ".jpeg")  # the endings of photographs, in small or capital letters


class Layout(NamedTuple):
    """How the files of a dataset are named below its folder, and where it is obtained. SPLIT, CITY,
    CONDITION, SEQUENCE and NAME stand for what differs."""

    images: str
    labels: str
    url: str


LAYOUTS = {
    "gta5": Layout("images/*.png", "labels/*.png", "https://download.visinf.tu-darmstadt.de/data/from_games/"),
    "synthia": Layout("RGB/*.png", "GT/LABELS/*.png (SYNTHIA-RAND-CITYSCAPES)", "https://synthia-dataset.net/downloads/"),
    "cityscapes": Layout(
        "leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png", "gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png",
        "https://www.cityscapes-dataset.com/",
    ),
    "acdc": Layout(
        "rgb_anon/CONDITION/SPLIT/SEQUENCE/NAME_rgb_anon.png", "gt/CONDITION/SPLIT/SEQUENCE/NAME_gt_labelIds.png",
        "https://acdc.vision.ee.ethz.ch/",
    ),
}  # fmt: skip
ACDC_CONDITIONS = ("fog", "night", "rain", "snow")


_TARGETS = ("cityscapes", "acdc")
# what needs no label of the target
_NO_LABELS = "--oracle files, or cbst, cbst-sp, st, source-only"


def open_dataset(
    name: str, root: str | Path, split: str = "train", reads_labels: bool = True
) -> SegmentationDataset:
    """Lists the dataset `name` ("gta5", "synthia", "cityscapes", "acdc") below `root`/`name`.

    `split` is "train", "val" or "test" for Cityscapes and ACDC; the sources have one split only.
    Without `reads_labels` images may lack a label (a target that people label, or nobody). Raises
    InputError with the folder looked for, what belongs in it and where it is obtained; and for
    images without labels.
    """
    if name not in LAYOUTS:
        raise InputError(f"unknown dataset {name!r}; known: {', '.join(LAYOUTS)}")
    base = Path(root) / name
    found = _LISTS[name](base, split)
    if not found:
        layout = LAYOUTS[name]
        others = _other_pictures(base, split)
        named = f" ({len(others)} pictures have other names, {others[0].name})" if others else ""
        raise InputError(
            f"no {name} images ({split}) below {base.resolve()}{named}: expected "
            f"{layout.images.replace('SPLIT', split)} (or .jpg, .jpeg) and "
            f"{layout.labels.replace('SPLIT', split)}; obtain it from {layout.url} or try the "
            "miniature world with --root toy; python -m alda.datasets check ROOT lists what is there"
        )
    missing = [row for row in found if row[2] is not None and not row[2].is_file()]
    if missing and reads_labels:
        _, image, label, _ = missing[0]
        own = name in _TARGETS and split == "train"
        hint = f"; without labels: {_NO_LABELS}" if own else ""
        raise InputError(
            f"{image}: has no label file, looked for {label} ({len(missing)} such images); unpack "
            f"the labels too or remove the image{hint}"
        )
    space = "synthia" if name == "synthia" else "cityscapes"
    return SegmentationDataset(name, _same_size_only(found, reads_labels), space, reads_labels)


def _pictures(folder: Path, pattern: str, ending: str = "") -> list[tuple[str, Path]]:
    """(name without `ending`, path) of the PNG and JPEG files of that pattern and ending, sorted."""
    paths = [path for path in folder.glob(pattern) if path.suffix.lower() in PICTURES]
    return [(p.stem.removesuffix(ending), p) for p in sorted(paths) if p.stem.endswith(ending)]


def _other_pictures(base: Path, split: str) -> list[Path]:
    """The pictures of a split whose names are not those of the dataset, sorted."""
    known = {row[1] for row in _LISTS[base.name](base, split)}
    images = LAYOUTS[base.name].images
    paths = []
    for part in ACDC_CONDITIONS if base.name == "acdc" else ("",):
        pattern = images.replace("CONDITION", part).replace("SPLIT", split).split("/")
        top = base.joinpath(*[part for part in pattern[:-1] if part not in ("CITY", "SEQUENCE")])
        paths += [path for path in top.rglob("*") if path.suffix.lower() in PICTURES]
    return sorted(set(paths) - known)


def _list_flat(base: Path, split: str) -> list[tuple]:
    images, labels = ("images", "labels") if base.name == "gta5" else ("RGB", "GT/LABELS")
    return [
        (stem, path, base / labels / f"{stem}.png", base.name)
        for stem, path in _pictures(base / images, "*")
    ]


def _list_cityscapes(base: Path, split: str) -> list[tuple]:
    found = []
    for stem, image in _pictures(base / "leftImg8bit" / split, "*/*", "_leftImg8bit"):
        city = image.parent.name
        label = _pick_label(base / "gtFine" / split / city, f"{stem}_gtFine", split)
        found.append((stem, image, label, city))
    return found


def _list_acdc(base: Path, split: str) -> list[tuple]:
    found = []
    for condition in ACDC_CONDITIONS:
        for stem, image in _pictures(base / "rgb_anon" / condition / split, "*/*", "_rgb_anon"):
            folder = base / "gt" / condition / split / image.parent.name
            found.append((stem, image, _pick_label(folder, f"{stem}_gt", split), condition))
    there = {condition for *_, condition in found}
    if there and there != set(ACDC_CONDITIONS):
        absent = [condition for condition in ACDC_CONDITIONS if condition not in there]
        raise InputError(
            f"{base / 'rgb_anon'}: has no images ({split}) of {', '.join(absent)}; ACDC has "
            f"{', '.join(ACDC_CONDITIONS)}: unpack all of rgb_anon and gt"
        )
    return found


_LISTS = {
    "gta5": _list_flat,
    "synthia": _list_flat,
    "cityscapes": _list_cityscapes,
    "acdc": _list_acdc,
}


def _pick_label(folder: Path, stem: str, split: str) -> Path | None:
    """The train-id file where there is one, else the label-id file (the official one); None for the
    test split."""
    train_ids = folder / f"{stem}_labelTrainIds.png"
    if split == "test":
        return None
    return train_ids if train_ids.is_file() else folder / f"{stem}_labelIds.png"


def _same_size_only(found: list[tuple], reads_labels: bool) -> list[Sample]:
    kept, dropped = [], []
    for stem, image, label, group in found:
        size = _header_size(image)
        if not reads_labels and not _fits(label, size):
            label = None  # nothing is learnt from it: the image stays
        if label is None or _header_size(label) == size:
            kept.append(Sample(stem, image, label, group, size))
        else:
            dropped.append(label.name)
    if dropped:
        names = ", ".join(dropped[:10]) + (", ..." if len(dropped) > 10 else "")
        print(
            f"warning: left out {len(dropped)} of {len(found)} images whose label has another size: {names}",
            flush=True,
        )
    if not kept:
        raise InputError(
            f"{found[0][1].parent}: every label has another size than its image; are they of another release?"
        )
    return kept


def _fits(label: Path | None, size: tuple[int, int]) -> bool:
    """Whether a label is there, can be read and has its image's size."""
    try:
        return label is not None and label.is_file() and _header_size(label) == size
    except InputError:
        return False


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            lying = turned(picture) and picture.getexif()[0x0112] >= 5
            return picture.size if lying else picture.size[::-1]
    except PICTURE_ERRORS as error:
        raise InputError(
            f"{path}: cannot be read as a picture ({_first_line(error)}); copy it again or remove it"
        ) from None


# ------------------------------------------------------------------------------- sizes


LONGEST_SIDE = 16_384  # of an image that a network sees: more is a typing error, or no memory


def parse_size(text: str) -> tuple[int, int]:
    """ "1280x640" (width x height, as people write it) to (640, 1280), the (H, W) used in the
    code."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise InputError(f"a size is WIDTHxHEIGHT, for example 1280x640; got {text!r}") from None
    if min(width, height) < 1:
        raise InputError(f"a size is WIDTHxHEIGHT with both at least 1; got {text!r}")
    if max(width, height) > LONGEST_SIDE:
        raise InputError(f"a size is WIDTHxHEIGHT with both at most {LONGEST_SIDE}; got {text!r}")
    return height, width


def parse_scale(text: str) -> tuple[float, float]:
    """ "0.5,1.5" to (0.5, 1.5)."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low <= high < math.inf:
        raise InputError(f"--scale is LOW,HIGH, for example 0.5,1.5; got {text!r}")
    return low, high


# --------------------------------------------------------------------------------------- transforms


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(3,H,W) uint8 to (3,*size) uint8, bicubic with antialiasing (RIPU resizes images bicubic)."""
    return F.resize(image, list(size), F.InterpolationMode.BICUBIC, antialias=True)


def resize_labels(labels: torch.Tensor, size: tuple[int, int], keep: bool = False) -> torch.Tensor:
    """(H,W) uint8 train ids to `size` by nearest neighbour (the pixel at the cell's centre).

    With `keep`, a cell whose centre pixel has no label (255, or a PSEUDO label) takes one from any
    labelled pixel that falls into it, the first in raster order, so that sparse labels that were
    paid for are not lost in the resizing (--keep-labels).
    """
    if tuple(labels.shape) == tuple(size):
        return labels
    small = F.resize(labels[None], list(size), F.InterpolationMode.NEAREST_EXACT)[0]
    if not keep:
        return small
    rows, cols = (labels < PSEUDO).nonzero(as_tuple=True)
    height, width = labels.shape
    row = (2 * rows + 1) * size[0] // (2 * height)
    cell = row * size[1] + (2 * cols + 1) * size[1] // (2 * width)
    # numpy keeps the last value written: write backwards, the first wins
    order = torch.arange(len(cell)).flip(0)
    filled = np.full(size[0] * size[1], IGNORE, np.uint8)
    filled[cell[order].numpy()] = labels[rows, cols][order].numpy()
    bought = torch.from_numpy(filled).view(*size)
    return torch.where((small >= PSEUDO) & (bought != IGNORE), bought, small)


@dataclass(frozen=True)
class JointTransform:
    """Resize, scale, crop and flip an image together with its labels.

    Called as `transform(image (3,H,W) uint8, labels (H,W) uint8, generator)`; gives (3,h,w) uint8,
    to be normalised where it is used (a quarter of the bytes travel), and (h,w) uint8. What the crop
    adds beyond the image (padding) is ImageNet's mean colour, and 255 in the labels.
    """

    size: tuple[int, int] | None = None  # (H, W) to resize to; None keeps the file's size
    scale: tuple[float, float] = (1.0, 1.0)  # range of a random further scaling
    # draw the scale below 1 half of the time and above 1 the other half (STAL)
    halves: bool = False
    # (H, W) of a random crop, padded where the image is smaller
    crop: tuple[int, int] | None = None
    centred: bool = False  # pad on all sides (STAL), else below and to the right
    flip: bool = False  # mirror left and right with probability 0.5
    keep_labels: bool = False  # see resize_labels
    # (labels (h,w), crop=, generator=) -> (top, left), or None for a random place
    crop_at: Callable | None = None

    def __call__(self, image, labels, generator: torch.Generator):
        height, width = self.size or image.shape[-2:]
        if self.scale != (1.0, 1.0):
            factor = self._draw_scale(generator)
            height, width = max(1, round(height * factor)), max(1, round(width * factor))
        image = resize_image(image, (height, width))
        labels = resize_labels(labels, (height, width), self.keep_labels)
        if self.crop:
            image, labels = self._crop(image, labels, generator)
        if self.flip and torch.rand((), generator=generator).item() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return image, labels

    def _draw_scale(self, generator: torch.Generator) -> float:
        low, high = self.scale
        if self.halves and low < 1 < high:
            below = torch.rand((), generator=generator).item() < 0.5
            low, high = (low, 1.0) if below else (1.0, high)
        return low + (high - low) * torch.rand((), generator=generator).item()

    def _crop(self, image, labels, generator):
        """A window of size `crop`, at a place that `crop_at` chooses or at a random one; smaller
        images are padded first."""
        sizes = zip(self.crop, labels.shape, strict=True)
        height, width = (max(0, crop - have) for crop, have in sizes)
        if height or width:
            top, left = (height // 2, width // 2) if self.centred else (0, 0)
            sides = (left, width - left, top, height - top)
            planes = zip(image, MEAN_COLOUR, strict=True)
            image = torch.stack([torch.nn.functional.pad(x, sides, value=v) for x, v in planes])
            labels = torch.nn.functional.pad(labels, sides, value=IGNORE)
        place = None
        if self.crop_at:
            place = self.crop_at(labels, crop=self.crop, generator=generator)
        if place is None:
            free = [have - crop + 1 for have, crop in zip(labels.shape, self.crop, strict=True)]
            place = [torch.randint(n, (), generator=generator).item() for n in free]
        window = tuple(slice(at, at + crop) for at, crop in zip(place, self.crop, strict=True))
        return image[(slice(None), *window)], labels[window]


def normalise(image: torch.Tensor) -> torch.Tensor:
    """(..., 3,H,W) uint8 RGB to float32 with ImageNet's mean and standard deviation."""
    mean, deviation = imagenet_colours(image.device)
    return F.to_dtype(image, torch.float32, scale=True).sub_(mean).div_(deviation)


@cache
def imagenet_colours(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's mean and standard deviation of RGB in 0..1, (3,1,1) each: sent to the device once,
    not at every step, which would wait for it."""
    return tuple(
        torch.tensor(x, device=device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD)
    )


class EachImage(Dataset):
    """`read(0)`, `read(1)`, ...: what a DataLoader needs to load one thing of every image.

    load(EachImage(len(target), target.image), workers, batch_size=None)     # the images, in order
    """

    def __init__(self, length: int, read: Callable):
        self.length, self.read = length, read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        return self.read(index)


def ahead(work: Callable, items, threads: int) -> Iterator:
    """Yields work(item) for each item, in order, computed by `threads` threads a few items ahead; 0:
    none, one after the other. For reading and writing pictures, which needs no lock of Python's."""
    if not threads:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def progress(items, total: int, what: str, every: float = 20.0):
    """Yields `items`; passes that take long print a line each `every` seconds, on the first process."""
    began = told = time.time()
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if now - told >= every and done < total:
            told, rate = now, done / (now - began)
            say(f"{done}/{total} {what}, {rate:.1f} a second, {(total - done) / rate:.0f} s left")


# parts of the messages with which torch reports loading processes that are lost, and what lost them
LOST_WORKERS = (
    "exited unexpectedly",
    "killed by signal",
    "shared memory",
    "No space left",
    "Too many open files",
    "/torch_",
)


WORKERS: weakref.WeakSet = weakref.WeakSet()  # loading processes that may still be there


class Loader(DataLoader):
    """A DataLoader that reports lost loading processes, and no room for what they load, as
    InputError."""

    def __iter__(self):
        try:
            before = set(multiprocessing.active_children())
            iterator = super().__iter__()
            WORKERS.update(set(multiprocessing.active_children()) - before)
            yield from iterator
        except (RuntimeError, OSError) as error:
            if not self.num_workers or not any(part in str(error) for part in LOST_WORKERS):
                raise
            raise InputError(
                f"a loading process was lost ({str(error).strip().splitlines()[-1][:160]}): memory "
                f"or /dev/shm is full, or it was killed; go on with --resume and fewer --workers "
                f"than {self.num_workers}, or --workers 0"
            ) from None


def load(dataset: Dataset, workers: int, **options) -> DataLoader:
    """A DataLoader that leaves torch's global random state alone (it would draw from it at every
    start), of no more `workers` than there are cores for them: what they load is the same."""
    options |= {"generator": torch.Generator(), "worker_init_fn": leave_signals}
    own = getattr(os, "sched_getaffinity", None)  # Linux: the cores that this process may use
    cores = len(own(0)) if own else os.cpu_count() or 1
    return Loader(dataset, num_workers=min(workers, cores), **options)


@atexit.register  # before multiprocessing's own hook, which would wait for them
def end_workers() -> None:
    """At the end of the process: ends the loading processes that are left, which leave SIGTERM
    alone."""
    left = [worker for worker in WORKERS if worker.is_alive()]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report them as lost
    for worker in left:
        worker.kill()


def leave_signals(worker: int) -> None:
    """In a loading process: SIGTERM and SIGUSR1 to a whole job are the main process's to obey; it
    finishes its step, for which it needs this one."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def take_room(file, size: int) -> None:
    """Reserves the first `size` bytes of a file, so that nobody else takes the room, where the system
    can. Raises OSError where the disk is too full."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # a file system that reserves nothing (EOPNOTSUPP, EBADF): the file keeps its holes


class ImageCache:
    """Images of one size on disk, decoded and resized, each kept when it is first read: a
    memory-mapped file of (3,h,w) uint8 in `folder`, for every process of this machine that reads these
    images at this size (a disk of its own: over a network two machines would overwrite each other).

    Its name holds the dataset's fingerprint and when each image was last written: other images never
    read it. At most `most` bytes: images beyond are decoded every time. Whether an image is there is a
    byte of its own, written after it. `size` is (h, w). Raises InputError where the file cannot be made.
    """

    def __init__(self, folder: Path, dataset: "SegmentationDataset", size, most: float):
        self.dataset, self.size = dataset, tuple(size)
        each = 3 * size[0] * size[1]
        self.count = min(len(dataset), int(most // (each + 1)))
        written = [sample.image.stat().st_mtime_ns for sample in dataset.samples]
        images = json.dumps([dataset.fingerprint()["sha256"], written]).encode()
        name = f"{dataset.name}-{hashlib.sha256(images).hexdigest()[:16]}-{size[1]}x{size[0]}"
        self.path, self.bytes = folder / f"{name}-{self.count}.u8", self.count * (each + 1)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self.bytes)
                # a file with holes: what is missing on the disk would end the process, without a word
                missing = self.bytes - 512 * getattr(os.fstat(file.fileno()), "st_blocks", 0)
                if missing > shutil.disk_usage(folder).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if missing > 0:
                    take_room(file, self.bytes)
        except OSError as error:
            raise InputError(
                f"{self.path}: {self.bytes / 1e9:.3g} GB cannot be made ({error.strerror}); give another "
                "--cache, a smaller --cache-gb, or none"
            ) from None
        self.there = self.images = None

    def image(self, index: int) -> torch.Tensor:
        """The image at the cache's size, (3,h,w) uint8."""
        if index >= self.count:
            return resize_image(self.dataset.image(index), self.size)
        if self.images is None:  # each process maps the file itself
            content = np.memmap(self.path, np.uint8, "r+", shape=(self.bytes,))
            self.there = content[: self.count]
            self.images = content[self.count :].reshape(self.count, 3, *self.size)
        if not self.there[index]:
            self.images[index] = resize_image(self.dataset.image(index), self.size).numpy()
            self.there[index] = 1
        return torch.from_numpy(self.images[index].copy())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "there": None, "images": None}


class TrainingView(Dataset):
    """A dataset seen through a JointTransform, indexed by the (draw, index) pairs of
    EndlessSampler.

    The augmentation of a sample depends on the seed and its draw number alone, never on the process
    that loads it: the same run gives the same bits with any number of workers, and with `cache`
    (images at the transform's size) or without. `labels_of(index)`, where given, replaces the
    dataset's own labels ((H,W) uint8; for queried targets: the union of the answers so far).
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: JointTransform,
        seed: int,
        labels_of=None,
        cache: ImageCache | None = None,
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.labels_of = labels_of or dataset.labels
        self.cache = cache

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        draw, index = key
        low = self.seed & 0xFFFFFFFF  # 32 bits of a mixed seed, as the results so far
        generator = torch.Generator().manual_seed(mix_seed(low, draw))
        image = (self.cache or self.dataset).image(index)
        return self.transform(image, self.labels_of(index), generator)


def truth_inside(dataset: SegmentationDataset, index: int) -> torch.Tensor:
    """The truth of an image with 254 where it says nothing, so that after a crop 255 marks what
    lies outside the image."""
    labels = dataset.truth(index)
    return labels.masked_fill(labels == IGNORE, NO_TRUTH)


class Mixture(Dataset):
    """Images of several TrainingViews as one list: `entries[k]` is (number of the view, index in
    its dataset).

    Indexed by the (draw, k) of EndlessSampler; gives image, labels and the index in the image's own
    dataset.
    """

    def __init__(self, views: list[TrainingView], entries: list[tuple[int, int]]):
        self.views, self.entries = views, entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        draw, k = key
        view, index = self.entries[k]
        return (*self.views[view][draw, index], index)


# ----------------------------------------------------------------------------------------- samplers


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; different parts give unrelated streams (numpy's
    SeedSequence), but zeros at their end do not count: (5, 8) is (5, 8, 0).

    SeedSequence takes words of 32 bits: parts of which one is negative or longer go through sha256,
    so that they do not collide with others.
    """
    words = [int(p) for p in parts]
    if any(not 0 <= p < 2**32 for p in words):
        words = [int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:20], "little")]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


class EndlessSampler(Sampler):
    """Yields (draw, index) for ever: draw counts 0, 1, 2, ... and index is the image drawn.

    Each pass over the data is a fresh permutation, a pure function of (seed, pass); so the draw to
    begin with, `position`, is the whole state. With `world` processes, process `rank` gets the draws
    d with d % world == rank. With `presence` ((N,C) bool, which image holds which class) a pass is
    the class-balanced order of `balanced_order`.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        presence: np.ndarray | None = None,
    ):
        self.length, self.seed, self.presence = length, seed, presence
        self.rank, self.world = rank, world
        self.position = 0  # draws of all processes together before the first one here
        if length < 1:
            raise InputError("there are no images to draw from: the list of this part is empty")

    def order(self, number: int) -> np.ndarray:
        """The image indices of pass `number`, int64."""
        rng = np.random.default_rng([self.seed, number])
        if self.presence is None:
            return rng.permutation(self.length)
        return balanced_order(self.presence, rng)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        number, order, start = -1, np.empty(0, np.int64), 0
        draw = self.position + (self.rank - self.position) % self.world
        while True:
            while draw >= start + len(order):
                start += len(order)
                number += 1
                order = self.order(number)
            yield draw, int(order[draw - start])
            draw += self.world


def balanced_order(
    presence: np.ndarray, rng: np.random.Generator, sub_epoch: int = 3000
) -> np.ndarray:
    """One sub-epoch of class-balanced source images: `sub_epoch` indices, int64.

    RIPU's official code; the paper is silent. A class is drawn with probability proportional to
    1 / log(1.01 + its share of the counts so far), then the next image of that class's own list,
    which is shuffled anew when it ends; every class that the image holds is counted. An image may
    come up again through another class. `presence` (N,C) bool; a class of no image is never drawn,
    InputError where all are False.
    """
    if not presence.any():
        raise InputError(
            "no source image holds a class (all labels are 255): there is nothing to balance; unpack "
            "the right labels"
        )
    lists = [rng.permutation(np.flatnonzero(column)) for column in presence.T]
    there = np.array([len(images) > 0 for images in lists])
    places, counts = np.zeros(len(lists), np.int64), np.zeros(len(lists))
    order = np.empty(sub_epoch, np.int64)
    for i in range(sub_epoch):
        weight = there / np.log(1.01 + counts / max(1.0, counts.sum()))
        c = rng.choice(len(lists), p=weight / weight.sum())
        if places[c] == len(lists[c]):
            lists[c], places[c] = rng.permutation(lists[c]), 0
        order[i] = lists[c][places[c]]
        places[c] += 1
        counts += presence[order[i]]
    return order


def class_presence(dataset: SegmentationDataset, workers: int = 0) -> np.ndarray:
    """Which image holds which class: (N,C) bool, from one read of every label file (published lists
    are not needed), which the processes share. Collective."""
    own = share(range(len(dataset)))
    rows = load(Subset(EachImage(len(dataset), dataset.classes), own), workers, batch_size=None)
    found = [row.numpy() for row in progress(rows, len(own), "labels read")]
    presence = np.empty((len(dataset), NUM_CLASSES), bool)
    for index, row in all_gather_list(list(zip(own, found, strict=True))):
        presence[index] = row
    return presence


# ------------------------------------------------------------------------------------- what is there


def check(root: str | Path) -> tuple[list[str], int]:
    """(lines, problems): what is found below `root` in each dataset's layout (images, labels, sizes,
    classes), what is missing and how its files must be named, and how many problems that is.

    Reads every image and label once. Raises InputError where there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder; give the one that holds cityscapes/")
    lines, problems, images = [], 0, {}
    for name in LAYOUTS:
        if not (root / name).is_dir():
            lines.append(f"{name}: no folder {root / name}")
            continue
        for split in ("train", "val", "test") if name in _TARGETS else ("train",):
            found, wrong, images[name, split] = check_split(name, root, split)
            title = f"{name} {split}" if name in _TARGETS else name
            lines += [f"{title}: {text}" for text in found]
            lines += [f"{title}: problem: {text}" for text in wrong]
            problems += len(wrong)
    if not any(images.values()):
        problems += 1
        for name, layout in LAYOUTS.items():
            lines.append(f"expected {name}/{layout.images} and {name}/{layout.labels}")
    for name in _TARGETS:
        if images.get((name, "train")) and not images.get((name, "val")):
            problems += 1
            lines.append(f"{name} val: problem: nothing to score on: label a few images for val")
    return lines, problems


def check_split(name: str, root: Path, split: str) -> tuple[list[str], list[str], int]:
    """(what is found, what is wrong, images) in one split of a dataset, see `check`."""
    images, labels = (f"{name}/{part.replace('SPLIT', split)}" for part in LAYOUTS[name][:2])
    wrong, rows = [], []
    try:
        listed = _LISTS[name](root / name, split)
        others = _other_pictures(root / name, split)
        if others:
            text = f"{len(others)} pictures are not read, {others[0]}: expected {images}"
            wrong.append(f"{text} (or .jpg, .jpeg)")
        if not listed:
            return [f"no images; expected {images} (or .jpg, .jpeg)"], wrong, 0
        for row in listed:
            try:
                _header_size(row[1])
                rows.append(row)
            except InputError as error:  # goes on: one check names them all
                wrong.append(str(error))
        if not rows:
            return [], wrong, len(listed)
        space = "synthia" if name == "synthia" else "cityscapes"
        data = SegmentationDataset(name, _same_size_only(rows, False), space, False)
    except InputError as error:
        return [], [*wrong, str(error)], len(rows)
    labelled = [i for i, sample in enumerate(data.samples) if sample.label is not None]
    there = sum(row[2] is not None and row[2].is_file() for row in rows)
    if there > len(labelled):
        wrong.append(
            f"{there - len(labelled)} labels have another size than their images, or are broken"
        )
    sizes = collections.Counter(f"{s.size[1]}x{s.size[0]}" for s in data.samples)
    sizes = ", ".join(f"{size} ({n})" for size, n in sizes.most_common(4))
    groups = len({sample.group for sample in data.samples})
    found = [f"{len(data)} images in {groups} groups, {len(labelled)} labels; {sizes}"]
    classes, broken = read_all(data)
    free = name in _TARGETS and split == "train"  # some strategies need none of its labels
    if classes:
        found.append(f"images that hold each class: {classes}")
    elif labelled and not broken:
        (found if free else wrong).append("no pixel of any label has a class")
    if there < len(data) and split != "test":
        lack = f"{len(data) - there} images have no label {labels}"
        (found if free else wrong).append(lack + f": run {_NO_LABELS}" * free)
    return found, wrong + broken, len(listed)


def read_all(data: SegmentationDataset) -> tuple[str, list[str]]:
    """Reads each photograph and label once: ("road 3, car 1", errors), in how many images each class
    occurs and which files cannot be read."""

    def read(index: int) -> tuple[list[int], list[str]]:
        classes, broken = [], []
        try:
            data.image(index)
        except InputError as error:
            broken = [str(error)]
        try:
            if data.samples[index].label is not None:
                classes = data.classes(index).nonzero().flatten().tolist()
        except InputError as error:
            broken.append(str(error))
        return classes, broken

    counts, broken = collections.Counter(), []
    rows = ahead(read, range(len(data)), os.cpu_count() or 1)
    for classes, wrong in progress(rows, len(data), f"{data.name} images read"):
        counts.update(classes)
        broken += wrong
    return ", ".join(f"{NAMES[c]} {n}" for c, n in sorted(counts.items())), broken


def main(argv: list[str] | None = None) -> int:
    """The command line: `check ROOT`; the exit status is 2 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m alda.datasets", description="What is in a folder of datasets?"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "lists images, labels, sizes and classes in each layout, and what is missing"
    commands.add_parser("check", help=text, description=text).add_argument("root", metavar="ROOT")
    try:
        lines, problems = check(parser.parse_args(argv).root)
        print("\n".join(lines), flush=True)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if problems:
        print(f"error: {problems} problems, listed above", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    run_command(main)
