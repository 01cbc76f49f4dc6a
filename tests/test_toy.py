"""The miniature world: the same bits from the same seed, real layouts, all classes, a long tail, no half-written folders."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from alda import InputError, toy
from alda.datasets import CLASSES, IGNORE, NAMES, SYNTHIA_16, open_dataset, read_label

TINY = {"gta5": 2, "synthia": 2, "train": 2, "val": 1}
MIDDLE = {"gta5": 50, "synthia": 40, "train": 48, "val": 24}
RARE = ("traffic light", "rider", "motorcycle", "bicycle")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("toy") / "world", counts=MIDDLE)


@pytest.fixture(scope="module")
def pixels(world):
    """Pixels of each class in each picture, (N,256) int64, by dataset and split."""
    names = {"gta5": ("gta5", "train"), "synthia": ("synthia", "train")}
    names |= {split: ("cityscapes", split) for split in ("train", "val")}
    counts = {}
    for key, (name, split) in names.items():
        data = open_dataset(name, world, split)
        counts[key] = np.stack(
            [np.bincount(data.labels(i).numpy().ravel(), minlength=256) for i in range(len(data))]
        )
    return counts


def digest(root):
    """One hash for each file below root, by its path."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def test_same_seed_gives_the_same_bits_and_another_seed_other_ones(tmp_path):
    first, again = toy.write(tmp_path / "a", 5, TINY), toy.write(tmp_path / "b", 5, TINY)
    other = toy.write(tmp_path / "c", 6, TINY)
    assert digest(first) == digest(again)
    assert len(digest(first)) == 2 * sum(TINY.values()) + 1
    pictures = [k for k in digest(first) if "images" in k or "RGB" in k or "leftImg8bit" in k]
    assert len(pictures) == sum(TINY.values())
    assert not set(map(digest(first).get, pictures)) & set(map(digest(other).get, pictures))


def test_a_picture_does_not_depend_on_what_was_drawn_before():
    size = (256, 128)
    alone = toy.picture("cityscapes", 0, 3, size, "ulm")
    toy.picture("gta5", 0, 1, (256, 144), "district 0")
    image, ids = toy.picture("cityscapes", 0, 3, size, "ulm")
    assert np.array_equal(alone[0], image) and np.array_equal(alone[1], ids)
    assert (
        image.shape == (128, 256, 3)
        and ids.shape == (128, 256)
        and image.dtype == ids.dtype == np.uint8
    )


def test_layouts_open_as_the_real_datasets(world):
    gta5, synthia = open_dataset("gta5", world), open_dataset("synthia", world)
    train, val = (
        open_dataset("cityscapes", world, "train"),
        open_dataset("cityscapes", world, "val"),
    )
    assert [len(d) for d in (gta5, synthia, train, val)] == list(MIDDLE.values())
    assert {s.size for s in gta5.samples} == {(144, 256), (136, 240)}  # mixed, like the real ones
    assert {s.size for s in synthia.samples} == {(152, 256)}
    assert {s.size for s in train.samples + val.samples} == {(128, 256)}
    assert {s.group for s in train.samples} == set(toy.CITIES["train"])
    assert {s.group for s in val.samples} == set(toy.CITIES["val"])
    assert (
        world / "cityscapes/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    ).is_file()
    assert (
        world / "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    ).is_file()
    for data in (gta5, synthia, train, val):
        image, labels = data[0]
        assert image.shape[1:] == labels.shape == data.samples[0].size
        assert image.dtype == labels.dtype == torch.uint8 and image.float().std() > 20


def test_gta5_labels_are_palette_pictures_of_cityscapes_ids(world):
    path = world / "gta5/labels/00001.png"
    with Image.open(path) as picture:
        ids, colours = np.array(picture), np.array(picture.convert("RGB"))
        assert picture.mode == "P"
    labels = read_label(path, "cityscapes").numpy()
    for train_id in np.unique(labels[labels != IGNORE]):
        assert set(ids[labels == train_id]) == {CLASSES[train_id].cityscapes_id}
        assert (colours[labels == train_id] == CLASSES[train_id].colour).all()


def test_png16_round_trip_and_what_pillow_makes_of_it(tmp_path):
    classes = (
        torch.randint(23, (5, 7), generator=torch.Generator().manual_seed(0))
        .numpy()
        .astype(np.uint16)
    )
    channels = np.stack(
        [
            classes,
            np.full_like(classes, 65535),
            np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000,
        ],
        2,
    )
    toy.write_png16(tmp_path / "label.png", channels)
    raw = decode_image(str(tmp_path / "label.png"), ImageReadMode.UNCHANGED)
    assert raw.dtype == torch.uint16
    assert np.array_equal(raw.numpy(), channels.transpose(2, 0, 1))
    expected = np.full(classes.shape, IGNORE)
    for train_id, c in enumerate(CLASSES):
        if c.synthia_id is not None:
            expected[classes == c.synthia_id] = train_id
    assert np.array_equal(read_label(tmp_path / "label.png", "synthia").numpy(), expected)
    with Image.open(
        tmp_path / "label.png"
    ) as picture:  # 8 bits only: every class silently reads as 0
        assert np.array(picture).dtype == np.uint8 and (np.array(picture)[..., 0] == 0).all()


def test_every_class_occurs_and_every_id_is_known(world, pixels):
    for key in ("gta5", "train", "val"):
        missing = [name for name, n in zip(NAMES, pixels[key].sum(0)[:19], strict=True) if n == 0]
        assert not missing, (key, missing)
    assert set(np.flatnonzero(pixels["synthia"].sum(0)[:19])) == set(SYNTHIA_16)
    for counts in pixels.values():
        assert set(np.flatnonzero(counts.sum(0))) <= {*range(19), IGNORE}
    raw = set()
    for path in (world / "cityscapes/gtFine").rglob("*_labelIds.png"):
        raw |= set(np.unique(np.array(Image.open(path))).tolist())
    assert raw <= {c.cityscapes_id for c in CLASSES} | {1, 4}  # ego vehicle and static besides
    assert 1 in raw and 0 < pixels["train"].sum(0)[IGNORE] / pixels["train"].sum() < 0.1


def test_frequencies_have_a_long_tail(pixels):
    for key, counts in pixels.items():
        share = dict(zip(NAMES, counts.sum(0)[:19] / counts[:, :19].sum(), strict=True))
        assert max(share, key=share.get) == "road" and 0.25 < share["road"] < 0.45, (
            key,
            share["road"],
        )
        assert all(share[name] < 0.01 for name in RARE), (key, {n: share[n] for n in RARE})
        top = sorted(share.values(), reverse=True)
        assert sum(top[:4]) > 0.7, (key, top)
    present = (pixels["train"][:, :19] > 0).mean(0)
    for name in ("truck", "bus", "train", "motorcycle"):
        assert present[NAMES.index(name)] < 0.4, name
    assert present[NAMES.index("road")] == 1


def test_domains_and_cities_look_different(world):
    def mean_colours(data, name, city=None):
        """(N,3): the class's mean colour in each picture that shows enough of it."""
        means = []
        for i, sample in enumerate(data.samples):
            image, labels = data[i]
            mask = labels == NAMES.index(name)
            if mask.sum() > 50 and city in (None, sample.group):
                means.append(image[:, mask].float().mean(1))
        return torch.stack(means)

    gta5, train = open_dataset("gta5", world), open_dataset("cityscapes", world, "train")
    for name in ("building", "vegetation", "sky", "car"):
        source, target = mean_colours(gta5, name), mean_colours(train, name)
        spread = [(m.amax(1) - m.amin(1)).mean() for m in (source, target)]
        assert spread[0] > 1.15 * spread[1], (name, spread)  # the source is the more colourful one
        # no constant colour within a domain
        assert source.std(0).max() > 5 and target.std(0).max() > 5, name
    cities = [mean_colours(train, "road", city).mean(0) for city in toy.CITIES["train"]]
    assert max((a - b).abs().max() for a in cities for b in cities) > 15


def test_ensure_writes_once_and_notices_what_is_not_its_world(tmp_path):
    root = tmp_path / "deep" / "world"
    toy.ensure(root, 0, TINY)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert toy.ensure(root, 0, TINY) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    assert list(root.parent.iterdir()) == [root]  # no temporary folder is left
    with pytest.raises(InputError, match=r"another|holds"):
        toy.ensure(root, 1, TINY)
    with pytest.raises(InputError, match="holds"):
        toy.ensure(root, 0, TINY | {"val": 2})
    with pytest.raises(InputError, match="never written over"):
        toy.write(root, 0, TINY)
    next(root.rglob("*_labelIds.png")).unlink()
    with pytest.raises(InputError, match="13 of 14"):
        toy.ensure(root, 0, TINY)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no miniature world"):
        toy.ensure(foreign, 0, TINY)
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "write_png16", fail)
    with pytest.raises(KeyboardInterrupt):
        toy.ensure(tmp_path / "world", 0, TINY)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "ensure", lambda root, seed: toy.write(root, seed, TINY))
    monkeypatch.setattr(sys, "argv", ["toy", str(tmp_path / "world"), "--seed", "5"])
    assert toy.main() == 0
    assert capsys.readouterr().out == f"miniature world: {tmp_path / 'world'}\n"
    assert '"seed": 5' in (tmp_path / "world" / toy.MARKER).read_text()
    monkeypatch.setattr(sys, "argv", ["toy", str(tmp_path)])  # not empty any more
    assert toy.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error
    link = tmp_path / "link"  # to an empty folder: a folder cannot be renamed over it
    (tmp_path / "empty").mkdir()
    link.symlink_to(tmp_path / "empty")
    monkeypatch.setattr(sys, "argv", ["toy", str(link)])
    assert toy.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(link) in error
