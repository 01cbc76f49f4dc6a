"""Which images STAL mixes in: drawn by class, two steps ahead, the same after a resume; what is pasted."""

import numpy as np
import pytest
import torch

from alda.datasets import NO_TRUTH, open_dataset
from alda.run import Run
from alda.selftraining import reliable_pseudo_labels
from alda.settings import settings_for
from alda.stal import (
    COPY_PASTE_CLASSES,
    ImageBank,
    Others,
    Partners,
    StalState,
    cut,
    draw_others,
    paste,
    plain_logits,
    predicted,
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
    s = settings_for({"strategy": "stal", "batch": 2, **SIZES, **changes})
    return Partners(s, open_dataset("cityscapes", world), torch.device("cpu"))


def bank_of(world):
    """A bank that knows the true shares of the target images."""
    target = open_dataset("cityscapes", world)
    bank = ImageBank(19, len(target))
    truth = torch.stack([target.labels(i) for i in range(len(target))])
    bank.update(torch.arange(len(target)), truth)
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
    assert found[0] is None and found[1] is None  # nothing was drawn two steps before
    held = {c for c in range(19) if (bank.share[c] >= 0.01).any()}
    seen = set()
    for others in found[2:]:
        assert others.images.shape == (3, 3, 64, 128) and others.truth.dtype == torch.uint8
        for c, truth in zip(others.classes.tolist(), others.truth, strict=True):
            images = [i for i in range(len(target)) if _same(partners, i, truth)]
            assert images and (c not in held or any(bank.share[c, i] >= 0.01 for i in images))
            seen.add(c)
    assert len(seen) > 3


def _same(partners, index, truth):
    """Whether this is the truth of the image `index`, mirrored or not, 254 where it says nothing."""
    own = partners.view[0, int(index)][1]
    return torch.equal(own, truth) or torch.equal(own.flip(-1), truth)


def test_weak_classes_are_drawn_more_often(tiny_world):
    partners, bank = partners_of(tiny_world, batch=8), bank_of(tiny_world)
    confidence = torch.ones(19)
    confidence[5] = 0.0
    rows = []
    for step in range(200):
        partners.draw(confidence, bank, torch.Generator().manual_seed(step))
        rows.append(partners.drawn[:, 0])
    share = (torch.stack(rows) == 5).float().mean()
    # softmax of 1 - confidence: e / (e + n - 1) for the one class with confidence 0
    expected = np.e / (np.e + 18)
    print(f"drawn {share:.3f}, expected {expected:.3f}")
    assert float(share) == pytest.approx(expected, abs=0.03)


def test_up_to_three_classes_are_pasted_on_half_of_the_images():
    """Three draws with replacement among 14 alike: 3, 2 or 1 different ones in 14*13*12, 3*14*13 and
    14 of 14^3 cases."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.zeros(2, 1, 19, dtype=torch.uint8)
    images = torch.zeros(2, 3, 1, 19)
    other = [torch.ones(2, 3, 1, 19), torch.arange(19, dtype=torch.uint8).expand(2, 1, 19).clone()]
    number = torch.zeros(4)
    for _ in range(1000):
        mixed, found = paste([images, labels], other, torch.zeros(19), generator)
        for n in range(2):
            classes = found[n, 0][mixed[n, 0, 0] == 1].tolist()
            assert set(classes) <= set(COPY_PASTE_CLASSES)
            assert (found[n, 0][mixed[n, 0, 0] == 0] == 0).all()
            number[len(classes)] += 1
    expected = np.array([0.5, *(np.array([14, 3 * 14 * 13, 14 * 13 * 12]) / 14**3 / 2)])
    print(f"0, 1, 2, 3 classes: {(number / 2000).tolist()}, expected {expected.round(3).tolist()}")
    np.testing.assert_allclose(number / 2000, expected, atol=0.035)
    assert paste([images, labels], None, torch.zeros(19), generator)[0] is images


def test_image_logits_and_truth_are_cut_with_one_box():
    """Class 7 fills a block of the other image: its bounding box is cut out of all three."""
    own, other = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    logits = torch.zeros(2, 19, 16, 16)
    logits[0, 1], logits[1, 2] = 1, 1
    logits[1, 7, 4:12, 8:16] = 5
    truth, other_truth = (torch.full((1, 16, 16), v, dtype=torch.uint8) for v in (1, 9))
    others = Others(other, other_truth, torch.tensor([7]))
    image, mixed, labels = cut(own, logits, truth, others, torch.Generator().manual_seed(0))
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 8:16] = True
    assert torch.equal(image[0, 0] == 1, inside) and torch.equal(labels[0] == 9, inside)
    assert torch.equal(mixed[0], torch.where(inside, logits[1], logits[0]))
    same = cut(own, logits[:1], truth, None, None)
    assert same[0] is own and torch.equal(same[1], logits[:1])


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
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "switches", [{"cutmix": False}, {"unlabelled": 0.0, "contrast": 0.0}, {"copy_paste": False}]
)
def test_parts_can_be_left_out(switches, tiny_world, tmp_path):
    given = {"root": str(tiny_world), "init": "none", "backbone": "resnet18", "head": "ripu"}
    s = settings_for({"strategy": "stal", "bank": 40, **given, **SIZES, **switches})
    run = Run(s, tmp_path, torch.device("cpu"))
    state = StalState(s, run, open_dataset("cityscapes", tiny_world))
    found = [draw_others(s, state, step, torch.Generator().manual_seed(0)) for step in range(3)]
    assert (found[2] is not None) == ("copy_paste" in switches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_drawing_does_not_wait_for_the_device(tiny_world):
    s = settings_for({"strategy": "stal", **SIZES})
    device = torch.device("cuda")
    partners = Partners(s, open_dataset("cityscapes", tiny_world), device)
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
    state = StalState(s, run, target)
    truth = torch.randint(0, 19, (2, 64, 128), dtype=torch.uint8)
    truth[:, :10], truth[:, 32:] = NO_TRUTH, 255  # the lower half is padding
    logits = plain_logits(run, state.teacher, torch.randn(2, 3, 64, 128), None)
    prediction = predicted(logits, truth)
    assert (prediction[:, 32:] == 255).all() and (prediction[:, :32] < 19).all()
    assert state.teacher.training
    state.images.update(torch.tensor([1, 4]), prediction)
    torch.testing.assert_close(state.images.share.sum(0), torch.tensor([0, 0.5, 0, 0, 0.5, 0]))
    prob, inside = torch.randn(2, 19, 64, 128).softmax(1), truth != 255
    pseudo = reliable_pseudo_labels(prob, 0.1, "paper", inside)
    assert (pseudo[:, 32:] == 255).all()
    health = pseudo_label_health(pseudo, truth, inside)
    assert pseudo_label_health(pseudo, truth, inside, labelled=False).keys() == {"kept"}
    assert float(health["kept"]) == pytest.approx(0.9, abs=0.01)  # of the pixels inside
    known = (pseudo != 255) & (truth < 19)
    right = ((pseudo == truth) & known).sum() / known.sum()
    assert float(health["accuracy"]) == pytest.approx(right)
