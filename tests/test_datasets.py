"""Label spaces, readers, transforms and samplers."""

import errno
import math
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from alda import InputError
from alda import datasets as D
from alda.annotation import read_map, write_map
from alda.toy import write_png16


def put(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path) if mode is None else array.save(path)


def gta5_pair(root, name, labels, image_size=None, palette=True):
    height, width = image_size or labels.shape
    put(root / "gta5/images" / name, np.zeros((height, width, 3), np.uint8))
    picture = Image.fromarray(labels, "P" if palette else "L")
    if palette:
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    (root / "gta5/labels").mkdir(parents=True, exist_ok=True)
    picture.save(root / "gta5/labels" / name)


def cityscapes_pair(root, split="train", city="ulm", labels=None, suffix="labelIds"):
    labels = np.full((4, 6), 7, np.uint8) if labels is None else labels
    stem = f"{city}_000000_000019"
    put(
        root / f"cityscapes/leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png",
        np.zeros((*labels.shape, 3), np.uint8),
    )
    put(root / f"cityscapes/gtFine/{split}/{city}/{stem}_gtFine_{suffix}.png", labels)


# ---------------------------------------------------------------------------------------------------------- label maps


@pytest.mark.parametrize("space", ["cityscapes", "synthia"])
def test_every_class_survives_the_way_into_the_train_space_and_back(space):
    table = D.id_map(space)
    for train_id, c in enumerate(D.CLASSES):
        raw = c.cityscapes_id if space == "cityscapes" else c.synthia_id
        if raw is not None:
            assert table[raw] == train_id, (c.name, raw, table[raw])
    known = [t for t in table.tolist() if t < D.NUM_CLASSES]
    # no two ids give one class
    assert len(known) == len(set(known)) == (19 if space == "cityscapes" else 16)


def test_label_ids_invert_the_cityscapes_map():
    train = np.arange(19, dtype=np.uint8)
    assert (D.id_map("cityscapes")[D.to_label_ids(train)] == train).all()
    assert D.to_label_ids(np.array([255], np.uint8))[0] == 0


def test_hand_picked_ids():
    assert D.id_map("cityscapes")[[7, 24, 33, 0, 34, 99]].tolist() == [0, 11, 18, 255, 255, 253]
    assert D.id_map("synthia")[[3, 1, 10, 13, 22, 23]].tolist() == [0, 10, 11, 255, 255, 253]
    assert D.SYNTHIA_16 == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
    assert D.SYNTHIA_13 == (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)


# -------------------------------------------------------------------------------------------------------------- readers


@pytest.mark.parametrize("palette", [True, False])
def test_gta5_reads_palette_and_single_channel_labels(tmp_path, palette):
    labels = np.array([[7, 8, 11], [26, 0, 34]], np.uint8)
    gta5_pair(tmp_path, "00001.png", labels, palette=palette)
    image, found = D.open_dataset("gta5", tmp_path)[0]
    assert image.shape == (3, 2, 3) and image.dtype == torch.uint8
    assert found.tolist() == [[0, 1, 2], [13, 255, 255]]


def test_synthia_reads_sixteen_bit_labels_that_pillow_cannot(tmp_path):
    raw = np.zeros((2, 3, 3), np.uint16)
    raw[..., 0] = [[3, 4, 2], [8, 22, 0]]
    raw[..., 1] = 700  # instance ids above 8 bit
    put(tmp_path / "synthia/RGB/0000000.png", np.zeros((2, 3, 3), np.uint8))
    path = tmp_path / "synthia/GT/LABELS/0000000.png"
    path.parent.mkdir(parents=True)
    write_png16(path, raw)
    assert D.open_dataset("synthia", tmp_path)[0][1].tolist() == [[0, 1, 2], [13, 255, 255]]
    # Pillow drops the low byte: all zeros, without a word
    assert np.array(Image.open(path))[..., 0].max() == 0


def test_cityscapes_prefers_train_ids_and_tells_cities(tmp_path):
    cityscapes_pair(tmp_path, city="ulm")
    cityscapes_pair(tmp_path, city="jena")
    cityscapes_pair(
        tmp_path, city="jena", labels=np.full((4, 6), 5, np.uint8), suffix="labelTrainIds"
    )
    data = D.open_dataset("cityscapes", tmp_path)
    assert [s.group for s in data.samples] == ["jena", "ulm"] and data.samples[
        0
    ].id == "jena_000000_000019"
    assert (data.labels(0) == 5).all() and (data.labels(1) == 0).all()


def test_cityscapes_test_split_has_no_labels(tmp_path):
    put(
        tmp_path / "cityscapes/leftImg8bit/test/bonn/bonn_000000_000019_leftImg8bit.png",
        np.zeros((4, 6, 3), np.uint8),
    )
    data = D.open_dataset("cityscapes", tmp_path, "test")
    assert data.image(0).shape == (3, 4, 6)
    with pytest.raises(InputError, match="publishes no labels"):
        data.labels(0)


def test_acdc_lists_its_four_conditions(tmp_path):
    for condition in ("fog", "night", "rain", "snow"):
        stem = f"{condition}/train/GP01/GP01_{condition}_000001"
        put(tmp_path / f"acdc/rgb_anon/{stem}_rgb_anon.png", np.zeros((4, 6, 3), np.uint8))
        put(tmp_path / f"acdc/gt/{stem}_gt_labelIds.png", np.full((4, 6), 23, np.uint8))
    data = D.open_dataset("acdc", tmp_path)
    assert [s.group for s in data.samples] == ["fog", "night", "rain", "snow"] and (
        data.labels(2) == 10
    ).all()


@pytest.mark.parametrize("name", ["gta5", "synthia", "cityscapes", "acdc"])
def test_every_class_of_every_dataset_survives_files_and_back(name, tmp_path):
    """Raw ids on disk -> train ids -> a round of labels on disk -> Cityscapes label ids: each class returns as itself.

    CBST's official map inverts itself under Python 3 and turns 45 mIoU into 2.
    """
    known = [c for c in D.CLASSES if name != "synthia" or c.synthia_id is not None]
    ids = [c.synthia_id if name == "synthia" else c.cityscapes_id for c in known]
    raw = np.array([ids, [0] * len(ids)], np.uint8)  # a row of all classes, and one without a label
    if name == "gta5":
        gta5_pair(tmp_path, "00001.png", raw)
    elif name == "cityscapes":
        cityscapes_pair(tmp_path, labels=raw)
    elif name == "acdc":
        for condition in D.ACDC_CONDITIONS:
            place = f"{condition}/train/GP01/{condition}"
            put(
                tmp_path / f"acdc/rgb_anon/{place}_rgb_anon.png",
                np.zeros((*raw.shape, 3), np.uint8),
            )
            put(tmp_path / f"acdc/gt/{place}_gt_labelIds.png", raw)
    else:
        put(tmp_path / "synthia/RGB/a.png", np.zeros((*raw.shape, 3), np.uint8))
        (tmp_path / "synthia/GT/LABELS").mkdir(parents=True)
        write_png16(
            tmp_path / "synthia/GT/LABELS/a.png",
            np.repeat(raw.astype(np.uint16)[..., None], 3, axis=2),
        )
    labels = D.open_dataset(name, tmp_path).labels(0)
    assert [D.NAMES[c] for c in labels[0].tolist()] == [c.name for c in known] and (
        labels[1] == 255
    ).all()
    write_map(tmp_path / "round.png", labels)
    again = read_map(tmp_path / "round.png", labels.shape, 255)
    assert D.to_label_ids(again.numpy()).tolist() == [
        [c.cityscapes_id for c in known],
        [0] * len(known),
    ]


# --------------------------------------------------------------------------------------------------------------- errors


def test_missing_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(InputError, match=r"gta5.*images/\*\.png .*labels/\*\.png.*--root toy"):
        D.open_dataset("gta5", tmp_path)


def test_image_without_label_is_named(tmp_path):
    gta5_pair(tmp_path, "00001.png", np.full((2, 3), 7, np.uint8))
    (tmp_path / "gta5/labels/00001.png").unlink()
    with pytest.raises(InputError, match=r"images/00001\.png: has no label file"):
        D.open_dataset("gta5", tmp_path)


def photograph(root, name, split="train", size=(4, 6)):
    put(root / f"cityscapes/leftImg8bit/{split}/home/{name}", np.zeros((*size, 3), np.uint8))


def test_jpeg_and_png_photographs_are_found_with_and_without_labels(tmp_path):
    for name in ("b_leftImg8bit.JPG", "a_leftImg8bit.png", "c_leftImg8bit.jpeg"):
        photograph(tmp_path, name)
    with pytest.raises(
        InputError, match=r"looked for .*a_gtFine_labelIds\.png .3 such.*--oracle files"
    ):
        D.open_dataset("cityscapes", tmp_path)
    data = D.open_dataset("cityscapes", tmp_path, reads_labels=False)
    assert [sample.id for sample in data.samples] == ["a", "b", "c"] and not data.labelled
    assert data.image(1).shape == (3, 4, 6) and (data.truth(2) == 255).all()
    with pytest.raises(InputError, match="publishes no labels"):
        data.labels(1)
    before = data.fingerprint()
    put(  # a label that nobody reads: of another size, and one that fits
        tmp_path / "cityscapes/gtFine/train/home/a_gtFine_labelIds.png", np.zeros((5, 5), np.uint8)
    )
    put(
        tmp_path / "cityscapes/gtFine/train/home/b_gtFine_labelIds.png",
        np.full((4, 6), 7, np.uint8),
    )
    data = D.open_dataset("cityscapes", tmp_path, reads_labels=False)
    assert data.fingerprint() == before and data.labelled
    assert (data.truth(0) == 255).all() and (data.truth(1) == 0).all()


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_a_photograph_of_a_turned_camera_stands_upright(orientation, tmp_path):
    """Red above green, whatever way the camera stored it."""
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24, :, 0] = upright[24:, :, 1] = 200
    turns = {None: 0, 1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    stored, exif = Image.fromarray(np.rot90(upright, turns).copy()), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = tmp_path / "cityscapes/leftImg8bit/train/home/a_leftImg8bit.jpg"
    path.parent.mkdir(parents=True)
    stored.save(path, exif=exif, quality=95)
    data = D.open_dataset("cityscapes", tmp_path, reads_labels=False)
    assert data.samples[0].size == (48, 32) and data.image(0).shape == (3, 48, 32)
    assert (data.image(0).float().permute(1, 2, 0) - torch.from_numpy(upright)).abs().mean() < 9


def test_a_turned_photograph_with_a_second_picture_behind_it_stands_upright(tmp_path):
    """Some telephones write one, as JPEG's format MPO."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "cityscapes/leftImg8bit/train/home/a_leftImg8bit.jpg"
    path.parent.mkdir(parents=True)
    lying, second = Image.new("RGB", (48, 32)), Image.new("RGB", (12, 8))
    lying.save(path, "MPO", save_all=True, append_images=[second], exif=exif)
    with Image.open(path) as picture:
        assert picture.format == "MPO"
    data = D.open_dataset("cityscapes", tmp_path, reads_labels=False)
    assert data.samples[0].size == (48, 32) and data.image(0).shape == (3, 48, 32)


def test_a_broken_label_that_nobody_learns_from_is_none(tmp_path, capsys):
    """Of the right size, but a picture in colours: a warning, once; an error where it is learnt from."""
    photograph(tmp_path, "a_leftImg8bit.png")
    label = tmp_path / "cityscapes/gtFine/train/home/a_gtFine_labelIds.png"
    put(label, np.zeros((4, 6, 3), np.uint8))
    data = D.open_dataset("cityscapes", tmp_path, reads_labels=False)
    for _ in range(2):
        assert (data.truth(0) == 255).all() and data.truth(0).shape == (4, 6)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and str(label) in said and "unlabelled here" in said
    with pytest.raises(InputError, match="RGB"):
        D.open_dataset("cityscapes", tmp_path).truth(0)


def test_a_name_that_no_text_can_hold_is_refused_at_once():
    with pytest.raises(InputError, match=r"stra.udcdfe.*must be UTF-8"):
        D.file_name(b"stra\xdfe".decode("utf-8", "surrogateescape"))


def test_check_finds_labels_without_a_class(tmp_path, capsys):
    """In val a problem, in train, which some strategies use without its labels, none."""
    gta5_pair(tmp_path, "00001.png", np.array([[7, 26, 0]], np.uint8))
    for split in ("train", "val"):
        photograph(tmp_path, "a_leftImg8bit.png", split)
        label = tmp_path / f"cityscapes/gtFine/{split}/home/a_gtFine_labelIds.png"
        put(label, np.zeros((4, 6), np.uint8))
    assert D.main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    none = [line for line in lines if "no pixel of any label has a class" in line]
    assert [line.startswith("cityscapes train: no pixel") for line in none] == [True, False]
    assert none[1].startswith("cityscapes val: problem: ")


def test_check_opens_every_photograph(tmp_path, capsys):
    for split, name in (("train", "a"), ("val", "b")):
        photograph(tmp_path, f"{name}_leftImg8bit.png", split, (64, 64))
        label = tmp_path / f"cityscapes/gtFine/{split}/home/{name}_gtFine_labelIds.png"
        put(label, np.full((64, 64), 7, np.uint8))
    assert D.main(["check", str(tmp_path)]) == 0
    path = tmp_path / "cityscapes/leftImg8bit/val/home/b_leftImg8bit.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    put(path, noise)
    path.write_bytes(path.read_bytes()[:6000])  # the header says 64x64, the rest is cut
    assert D.main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert f"cityscapes val: problem: {path}: cannot be read as an image" in said


def test_check_names_every_photograph_that_cannot_be_read(tmp_path, capsys):
    """And does not ask for labels that are there."""
    for split, names in (("train", "a"), ("val", "bcd")):
        for name in names:
            photograph(tmp_path, f"{name}_leftImg8bit.png", split, (64, 64))
            label = tmp_path / f"cityscapes/gtFine/{split}/home/{name}_gtFine_labelIds.png"
            put(label, np.full((64, 64), 7, np.uint8))
    for name in "bc":
        (tmp_path / f"cityscapes/leftImg8bit/val/home/{name}_leftImg8bit.png").write_bytes(b"?")
    assert D.main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr()
    wrong = [line for line in said.out.splitlines() if "problem" in line]
    assert [name in line for name, line in zip("bc", wrong, strict=True)] == [True, True]
    assert "cityscapes val: 1 images in 1 groups, 1 labels" in said.out
    (tmp_path / "cityscapes/leftImg8bit/val/home/d_leftImg8bit.png").write_bytes(b"?")
    assert D.main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert said.count("val: problem: ") == 3 and "nothing to score" not in said


def test_a_cache_that_the_disk_cannot_hold_is_told_at_once(tiny_world, tmp_path, monkeypatch):
    data = D.open_dataset("cityscapes", tiny_world)
    cache = D.ImageCache(tmp_path / "fits", data, (24, 40), 1e9)
    if hasattr(os, "posix_fallocate"):  # the room is taken, not looked at
        assert 512 * os.stat(cache.path).st_blocks >= cache.bytes == os.stat(cache.path).st_size

    def refuses(number):
        def reserve(*_):
            raise OSError(number, os.strerror(number))

        return reserve

    monkeypatch.setattr(os, "posix_fallocate", refuses(errno.EBADF), raising=False)
    D.ImageCache(tmp_path / "holes", data, (24, 40), 1e9)  # a file system without reservations
    monkeypatch.setattr(os, "posix_fallocate", refuses(errno.EDQUOT), raising=False)
    with pytest.raises(InputError, match="GB cannot be made"):
        D.ImageCache(tmp_path / "quota", data, (24, 40), 1e9)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(D.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"GB cannot be made .No space left.*smaller --cache-gb"):
        D.ImageCache(tmp_path / "full", data, (24, 40), 1e9)


def test_a_wrong_name_shows_the_pattern_that_is_looked_for(tmp_path):
    photograph(tmp_path, "IMG_1.JPG")
    pattern = r"1 pictures have other names, IMG_1\.JPG.*train/CITY/NAME_leftImg8bit\.png"
    with pytest.raises(InputError, match=pattern):
        D.open_dataset("cityscapes", tmp_path, reads_labels=False)


def test_check_lists_what_is_there_and_what_is_missing(tmp_path, capsys):
    gta5_pair(tmp_path, "00001.png", np.array([[7, 26, 0]], np.uint8))
    gta5_pair(tmp_path, "00002.png", np.array([[7, 99, 0]], np.uint8))
    photograph(tmp_path, "a_leftImg8bit.jpg")
    photograph(tmp_path, "b.jpg")
    cityscapes_pair(tmp_path, "val")
    assert D.main(["check", str(tmp_path)]) == 2
    found = capsys.readouterr()
    for words in (
        "gta5: 2 images in 1 groups, 2 labels; 3x1 (2)",
        "gta5: images that hold each class: road 1, car 1",
        "00002.png: holds ids [99]",
        "cityscapes train: 1 images in 1 groups, 0 labels; 6x4 (1)",
        "cityscapes/gtFine/train/CITY/NAME_gtFine_labelIds.png: run --oracle files, or cbst",
        "1 pictures are not read, ",
        "expected cityscapes/leftImg8bit/train/CITY/NAME_leftImg8bit.png (or .jpg, .jpeg)",
        "cityscapes val: 1 images in 1 groups, 1 labels",
        "acdc: no folder",
    ):
        assert words in found.out, words
    assert found.err == "error: 2 problems, listed above\n"
    assert D.main(["check", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_other_size_is_left_out_with_one_warning(tmp_path, capsys):
    gta5_pair(tmp_path, "00001.png", np.full((2, 3), 7, np.uint8))
    gta5_pair(tmp_path, "00002.png", np.full((2, 3), 7, np.uint8), image_size=(4, 6))
    gta5_pair(tmp_path, "00003.png", np.full((2, 3), 7, np.uint8), image_size=(3, 3))
    data = D.open_dataset("gta5", tmp_path)
    out = capsys.readouterr().out
    assert [s.id for s in data.samples] == ["00001"]
    assert out.count("\n") == 1 and "left out 2 of 3" in out and "00002.png, 00003.png" in out


@pytest.mark.parametrize("keep", [20, 0.6])
def test_truncated_and_unreadable_files_are_named(tmp_path, keep):
    rng = np.random.default_rng(0)
    gta5_pair(tmp_path, "00001.png", rng.choice([7, 8, 11], (64, 64)).astype(np.uint8))
    put(tmp_path / "gta5/images/00001.png", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for folder in ("images", "labels"):
        path = tmp_path / "gta5" / folder / "00001.png"
        whole = path.read_bytes()
        path.write_bytes(whole[: keep if keep > 1 else int(len(whole) * keep)])
        with pytest.raises(InputError, match=rf"{folder}/00001\.png: cannot be read"):
            D.open_dataset("gta5", tmp_path)[0]
        path.write_bytes(whole)


def test_ids_outside_the_table_are_an_error(tmp_path):
    gta5_pair(tmp_path, "00001.png", np.array([[7, 77, 200]], np.uint8))
    with pytest.raises(InputError, match=r"labels/00001\.png: holds ids \[77, 200\]"):
        D.open_dataset("gta5", tmp_path).labels(0)


def test_colour_rendering_is_refused(tmp_path):
    gta5_pair(tmp_path, "00001.png", np.full((2, 3), 7, np.uint8))
    put(tmp_path / "gta5/labels/00001.png", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(InputError, match="RGB picture"):
        D.open_dataset("gta5", tmp_path).labels(0)


# ----------------------------------------------------------------------------------------------------------- transforms


def test_labels_are_resized_by_nearest_neighbour_at_cell_centres():
    labels = torch.arange(16, dtype=torch.uint8).view(4, 4)
    assert D.resize_labels(labels, (2, 2)).tolist() == [[5, 7], [13, 15]]
    big = D.resize_labels(labels, (9, 13))
    assert set(big.unique().tolist()) <= set(range(16))


def test_keep_labels_loses_no_bought_cell():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels = torch.full((64, 128), 255, dtype=torch.uint8)
        rows = torch.randint(64, (40,), generator=generator)
        cols = torch.randint(128, (40,), generator=generator)
        labels[rows, cols] = torch.randint(19, (40,), generator=generator).to(torch.uint8)
        plain, kept = (
            D.resize_labels(labels, (40, 80)),
            D.resize_labels(labels, (40, 80), keep=True),
        )
        assert (kept[plain != 255] == plain[plain != 255]).all()
        cells = {
            (int((2 * r + 1) * 40 // 128), int((2 * c + 1) * 80 // 256))
            for r, c in (labels != 255).nonzero().tolist()
        }
        assert {tuple(x) for x in (kept != 255).nonzero().tolist()} == cells
        assert (plain != 255).sum() < (kept != 255).sum()


def test_keep_labels_prefers_bought_to_pseudo_labels():
    labels = torch.full((4, 4), D.PSEUDO + 3, dtype=torch.uint8)
    labels[0, 0], labels[2, 2] = 7, 255  # bought; and nothing at all
    assert D.resize_labels(labels, (2, 2)).tolist() == [[103, 103], [103, 103]]
    assert D.resize_labels(labels, (2, 2), keep=True).tolist() == [[7, 103], [103, 103]]


def test_joint_transform_moves_image_and_labels_together():
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    labels[10:30, 20:50] = 1
    image = (labels * 255)[None].expand(3, -1, -1).contiguous()
    transform = D.JointTransform(scale=(0.5, 2.0), crop=(32, 48), flip=True)
    for seed in range(20):
        x, y = transform(image, labels, torch.Generator().manual_seed(seed))
        assert x.shape == (3, 32, 48) and y.shape == (32, 48) and x.dtype == torch.uint8
        white = x[0] > 127
        agreement = (white == (y == 1))[y != 255].float().mean()
        assert agreement > 0.95, (seed, agreement)


def test_a_cache_gives_the_same_images_and_reads_each_file_once(tiny_world, tmp_path, monkeypatch):
    """Bounded: what does not fit is decoded every time; other data has another file; a second process
    finds what the first has kept."""
    data = D.open_dataset("cityscapes", tiny_world)
    size, each = (24, 40), 3 * 24 * 40 + 1
    plain = [D.resize_image(data.image(i), size) for i in range(len(data))]
    reads = []
    image = D.SegmentationDataset.image
    monkeypatch.setattr(
        D.SegmentationDataset, "image", lambda self, i: reads.append(i) or image(self, i)
    )
    cache = D.ImageCache(tmp_path, data, size, 4 * each)
    for _ in range(2):
        assert all(torch.equal(cache.image(i), x) for i, x in enumerate(plain))
    assert (
        reads == [*range(len(data)), *range(4, len(data))] and cache.path.stat().st_size == 4 * each
    )
    again = pickle.loads(pickle.dumps(D.ImageCache(tmp_path, data, size, 4 * each)))
    assert torch.equal(again.image(2), plain[2]) and len(reads) == 2 * len(data) - 4
    again.image(2).zero_()
    assert torch.equal(again.image(2), plain[2])
    data.samples[0], data.samples[1] = data.samples[1], data.samples[0]
    other = D.ImageCache(tmp_path, data, size, 4 * each)
    assert other.path != cache.path and torch.equal(other.image(0), plain[1])
    stamp = data.samples[3].image.stat()  # a file that was written anew, as long as before
    os.utime(data.samples[3].image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert D.ImageCache(tmp_path, data, size, 4 * each).path != other.path
    os.utime(data.samples[3].image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    transform = D.JointTransform(size=size, crop=(16, 16), flip=True)
    views = [D.TrainingView(data, transform, 7, cache=x) for x in (None, other)]
    for draw in range(4):
        assert all(torch.equal(a, b) for a, b in zip(*(v[draw, 1] for v in views), strict=True))


def test_crop_pads_labels_with_ignore():
    transform = D.JointTransform(crop=(6, 6))
    x, y = transform(
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.Generator(),
    )
    # what is added is the mean colour, to half a grey level: 0 once it is normalised
    assert (x[:, :4, :4] == 0).all() and D.normalise(x)[:, 4:].abs().max() < 0.5 / 255 / 0.224
    assert (y == 255).sum() == 36 - 16 and (y[:4, :4] == 0).all()


def test_a_crop_is_placed_where_it_is_told():
    labels = torch.arange(64, dtype=torch.uint8).view(8, 8)
    image = labels.expand(3, 8, 8)
    seen = []

    def at(labels, crop, generator):
        seen.append((tuple(labels.shape), crop))
        return (2, 5)

    transform = D.JointTransform(crop=(4, 3), crop_at=at)
    assert transform(image, labels, torch.Generator())[1].tolist() == labels[
        2:6, 5:8
    ].tolist() and seen == [((8, 8), (4, 3))]
    anywhere = D.JointTransform(crop=(4, 3), crop_at=lambda *args, **named: None)
    x, y = anywhere(image, labels, torch.Generator().manual_seed(0))
    expected = D.JointTransform(crop=(4, 3))(image, labels, torch.Generator().manual_seed(0))
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])


def test_a_mixture_shows_its_entries(tmp_path):
    for name, value in (("00001.png", 7), ("00002.png", 8), ("00003.png", 11)):
        gta5_pair(tmp_path, name, np.full((4, 6), value, np.uint8))
    data = D.open_dataset("gta5", tmp_path)
    views = [D.TrainingView(data, D.JointTransform(), seed) for seed in (1, 2)]
    mixture = D.Mixture(views, [(0, 2), (1, 0), (1, 1)])
    found = [mixture[draw, k] for draw, k in ((0, 0), (1, 1), (2, 2))]
    assert [(int(y[0, 0]), k) for _, y, k in found] == [(2, 2), (0, 0), (1, 1)] and len(
        mixture
    ) == 3


# ------------------------------------------------------------------------------------------------------------- samplers


def take(sampler, count):
    iterator = iter(sampler)
    return [next(iterator) for _ in range(count)]


def test_sampler_goes_on_where_it_was_saved():
    whole = take(D.EndlessSampler(7, seed=3), 50)
    later = D.EndlessSampler(7, seed=3)
    later.position = 23
    assert take(later, 27) == whole[23:]
    assert sorted(i for _, i in whole[7:14]) == list(range(7))  # a pass shows every image once
    assert take(D.EndlessSampler(7, seed=4), 50) != whole


@pytest.mark.parametrize("position", [0, 5, 6])
def test_processes_share_the_draws(position):
    def start(rank, world):
        sampler = D.EndlessSampler(7, seed=3, rank=rank, world=world)
        sampler.position = position
        return sampler

    shares = [take(start(rank, 3), 10) for rank in range(3)]
    assert sorted(draw for share in shares for draw in share) == take(start(0, 1), 30)


def test_balanced_order_settles_where_its_rule_does():
    """Class 0 is in all images, class 1 in 2 %. The share x of drawn images that hold class 1 settles
    where x = q + (1 - q) 0.02, q the chance of drawing class 1 when it has x / (1 + x) of the counts."""
    presence = np.zeros((1000, 2), bool)
    presence[:, 0], presence[:20, 1] = True, True
    x = 0.5
    for _ in range(200):
        rare, common = (1 / math.log(1.01 + share) for share in (x / (1 + x), 1 / (1 + x)))
        q = rare / (rare + common)
        x = q + (1 - q) * 0.02
    orders = [D.balanced_order(presence, np.random.default_rng(seed)) for seed in range(4)]
    found = [float((order < 20).mean()) for order in orders]
    print(f"share of images with the rare class: drawn {found}, by the rule {x:.3f}")
    assert np.mean(found) == pytest.approx(x, abs=0.02) and x > 0.3
    assert all(len(order) == 3000 for order in orders)


def test_balanced_order_walks_each_class_list_to_its_end_before_it_repeats():
    presence = np.zeros((30, 3), bool)
    presence[:10, 0] = presence[10:30, 1] = True  # no image holds class 2
    order = D.balanced_order(presence, np.random.default_rng(0), sub_epoch=300)
    for images, length in ((order[order < 10], 10), (order[order >= 10], 20)):
        for begin in range(0, len(images) - length + 1, length):
            assert len(set(images[begin : begin + length].tolist())) == length
    assert abs((order < 10).sum() - 150) < 25  # two classes that never meet are drawn alike


def test_views_give_the_same_bits_with_any_number_of_workers(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        gta5_pair(tmp_path, f"{i:05d}.png", rng.choice([7, 8, 11], (20, 30)).astype(np.uint8))
        put(
            tmp_path / f"gta5/images/{i:05d}.png", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        )
    data = D.open_dataset("gta5", tmp_path)
    view = D.TrainingView(data, D.JointTransform(scale=(0.5, 2), crop=(16, 16), flip=True), seed=1)

    def first(workers):
        loader = torch.utils.data.DataLoader(
            view, 2, sampler=D.EndlessSampler(4, 0), num_workers=workers
        )
        return [x for x, _ in zip(loader, range(3), strict=False)]

    for a, b in zip(first(0), first(2), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_class_presence_reads_the_labels(tmp_path):
    gta5_pair(tmp_path, "00001.png", np.array([[7, 24]], np.uint8))
    gta5_pair(tmp_path, "00002.png", np.array([[0, 8]], np.uint8))
    presence = D.class_presence(D.open_dataset("gta5", tmp_path))
    assert [np.flatnonzero(row).tolist() for row in presence] == [[0, 11], [1]]
