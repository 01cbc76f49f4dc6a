"""Which images STAL mixes in: drawn by class, two steps ahead, the same after a resume."""

import numpy as np
import pytest
import torch

from alda.datasets import NO_TRUTH, open_dataset
from alda.run import Run
from alda.selftraining import reliable_pseudo_labels
from alda.settings import settings_for
from alda.stal import (
    COPY_PASTE_CLASSES,
    CUT,
    PASTE,
    ImageBank,
    Partners,
    StalState,
    predict_plain,
    pseudo_label_health,
)

SIZES = {
    "source_size": "128x64",
    "target_size": "128x64",
    "crop": "128x64",
    "scale": "1,1",
    "workers": 0,
}


def partners_of(world, **changes):
    s = settings_for({"strategy": "stal", **SIZES, **changes})
    return Partners(
        s, open_dataset("gta5", world), open_dataset("cityscapes", world), torch.device("cpu")
    )


def bank_of(world):
    """A bank that knows the true shares of the target images."""
    target = open_dataset("cityscapes", world)
    bank = ImageBank(19, len(target))
    bank.update(
        torch.arange(len(target)), torch.stack([target.labels(i) for i in range(len(target))])
    )
    return bank


def walk(partners, bank, steps, confidence=None):
    """What the steps get."""
    found = []
    for step in steps:
        found.append(partners.next(step))
        generator = torch.Generator().manual_seed(step)
        partners.draw(torch.zeros(19) if confidence is None else confidence, bank, generator)
    return found


def test_partners_hold_the_class_that_was_drawn(tiny_world):
    bank, target = bank_of(tiny_world), open_dataset("cityscapes", tiny_world)
    partners = partners_of(tiny_world, batch=3)
    found = walk(partners, bank, range(12))
    assert found[0] == found[1] == {}  # nothing was drawn two steps before
    held = {c for c in range(19) if (bank.share[c] >= 1e-4).any()}
    seen = set()
    for others in found[2:]:
        assert (
            others[PASTE].images.shape == (3, 3, 64, 128)
            and others[PASTE].labels.dtype == torch.uint8
        )
        for c, labels in zip(others[PASTE].classes.tolist(), others[PASTE].labels, strict=True):
            assert c in COPY_PASTE_CLASSES and (partners.presence[:, c]).any()
            seen.add(c)
            full = [
                i
                for i in np.flatnonzero(partners.presence[:, c])
                if _same(partners, PASTE, i, labels)
            ]
            assert full, f"no source image with class {c} has these labels"
        for c, labels in zip(others[CUT].classes.tolist(), others[CUT].labels, strict=True):
            images = [i for i in range(len(target)) if _same(partners, CUT, i, labels)]
            assert images and (c not in held or any(bank.share[c, i] >= 1e-4 for i in images))
    assert len(seen) > 3


def _same(partners, kind, index, labels):
    """Whether these training labels are those of the image `index`, mirrored or not."""
    # with 254 where the truth of a target image says nothing
    own = partners.views[kind][0, int(index)][1]
    return torch.equal(own, labels) or torch.equal(own.flip(-1), labels)


def test_weak_classes_are_drawn_more_often(tiny_world):
    partners, bank = partners_of(tiny_world, batch=8), bank_of(tiny_world)
    partners.held[:] = 1
    confidence = torch.ones(19)
    confidence[5] = 0.0
    rows = []
    for step in range(200):
        partners.draw(confidence, bank, torch.Generator().manual_seed(step))
        rows.append(partners.drawn.view(2, 8, 2)[:, :, 0])
    share = (torch.stack(rows) == 5).float().mean((0, 2))
    # softmax of (1 - confidence)^power: e / (e + n - 1) for the one class with confidence 0
    expected = [np.e / (np.e + len(COPY_PASTE_CLASSES) - 1), np.e / (np.e + 18)]
    print(f"drawn {share.tolist()}, expected {expected}")
    torch.testing.assert_close(share, torch.tensor(expected).float(), atol=0.03, rtol=0)


def test_a_resumed_run_mixes_the_same_images(tiny_world):
    bank = bank_of(tiny_world)
    whole = partners_of(tiny_world)
    expected = walk(whole, bank, range(7))[4:]
    parts = partners_of(tiny_world)
    walk(parts, bank, range(4))
    later = partners_of(tiny_world)
    later.load_state_dict(parts.state_dict())
    found = walk(later, bank, range(4, 7))
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys() == {PASTE, CUT}
        assert all(torch.equal(x, y) for kind in a for x, y in zip(a[kind], b[kind], strict=True))


@pytest.mark.parametrize(
    "switches,kinds",
    [
        ({"copy_paste": False}, [CUT]),
        ({"cutmix": False}, [PASTE]),
        ({"unlabelled": 0.0, "contrast": 0.0}, [PASTE]),
        ({"copy_paste": False, "cutmix": False}, []),
    ],
)
def test_parts_can_be_left_out(switches, kinds, tiny_world):
    partners = partners_of(tiny_world, **switches)
    assert [list(others) for others in walk(partners, bank_of(tiny_world), range(3))] == [
        [],
        [],
        kinds,
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_drawing_does_not_wait_for_the_device(tiny_world):
    s = settings_for({"strategy": "stal", **SIZES})
    device = torch.device("cuda")
    partners = Partners(
        s, open_dataset("gta5", tiny_world), open_dataset("cityscapes", tiny_world), device
    )
    bank, generator = ImageBank(19, 6, device), torch.Generator(device).manual_seed(0)
    confidence = torch.zeros(19, device=device)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error")
        try:
            partners.next(step)
            partners.draw(confidence, bank, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert partners.drawn.shape == (2 * s.batch, 2)


def test_what_a_crop_adds_is_no_class(tiny_world, tmp_path):
    """Outside the image there are no pseudo-labels, no share in the image bank, no percentile; truth is only judged."""
    given = {
        "root": str(tiny_world),
        "init": "none",
        "backbone": "resnet18",
        "head": "ripu",
        "batch": 2,
        "bank": 40,
        **SIZES,
    }
    s = settings_for({"strategy": "stal", "copy_paste": False, **given})
    run = Run(s, tmp_path, torch.device("cpu"))
    target = open_dataset("cityscapes", tiny_world)
    state = StalState(s, run, open_dataset("gta5", tiny_world), target)
    truth = torch.randint(0, 19, (2, 64, 128), dtype=torch.uint8)
    truth[:, :10], truth[:, 32:] = NO_TRUTH, 255  # the lower half is padding
    prediction = predict_plain(run, state.teacher, torch.randn(2, 3, 64, 128), truth, {})
    assert (prediction[:, 32:] == 255).all() and (prediction[:, :32] < 19).all()
    assert state.teacher.training
    state.images.update(torch.tensor([1, 4]), prediction)
    torch.testing.assert_close(state.images.share.sum(0), torch.tensor([0, 0.5, 0, 0, 0.5, 0]))
    prob, inside = torch.randn(2, 19, 64, 128).softmax(1), truth != 255
    pseudo = reliable_pseudo_labels(prob, 0.1, "paper", inside)
    assert (pseudo[:, 32:] == 255).all()
    health = pseudo_label_health(pseudo, truth, inside)
    assert float(health["kept"]) == pytest.approx(0.9, abs=0.01)  # of the pixels inside
    known = (pseudo != 255) & (truth < 19)
    right = ((pseudo == truth) & known).sum() / known.sum()
    assert float(health["accuracy"]) == pytest.approx(right)
