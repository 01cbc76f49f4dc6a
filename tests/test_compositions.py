"""The compositions against cases one can do by hand: rounds, blocking, budgets, teacher, loops, label ids.

What a part gives is tested elsewhere; here is what the loops and rounds do with it.
"""

import itertools
import json
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_loop import arguments
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from alda import acquisition, loop, rounds, stal
from alda.annotation import Rounds, bought_and_pseudo, ground_truth
from alda.datasets import NAMES, open_dataset, read_label, resize_labels
from alda.evaluation import network_logits
from alda.run import network_of
from alda.settings import CODE_RULES, poly_length, settings_for
from alda.toy import write_png16

NONE = 255


class Target:
    """A target set in memory: `labels` (N,H,W) uint8, images that hold their index, one group each
    unless given."""

    def __init__(self, labels, groups=None):
        self.maps, size = labels, tuple(labels.shape[1:])
        groups = groups or ["g"] * len(labels)
        self.samples = [
            SimpleNamespace(id=f"i{n}", group=group, size=size, image=f"i{n}.png")
            for n, group in enumerate(groups)
        ]

    @property
    def pixels(self):
        return self.maps.numel()

    def __len__(self):
        return len(self.samples)

    def image(self, index):
        return torch.full((3, *self.maps.shape[1:]), index, dtype=torch.uint8)

    def labels(self, index):
        return self.maps[index]

    truth = labels


class Run(SimpleNamespace):
    """What rounds.py reads of a run."""

    def __init__(self, out, model=None):
        model = model or torch.nn.Identity()
        super().__init__(out=out, model=model, device=torch.device("cpu"))
        self.autocast = torch.no_grad


def scored(monkeypatch, scores, predictions=None):
    """Makes the strategies' scores `scores` (N,H,W), the predictions `predictions` (N,H,W)."""
    given = iter([])

    def each(s, run, target, see, *more, **keywords):
        nonlocal given
        given = iter(scores.float())
        for n in range(len(target)):
            classes = torch.zeros_like(scores[n]).long() if predictions is None else predictions[n]
            logits = torch.nn.functional.one_hot(classes, 19).permute(2, 0, 1) * 50.0
            yield n, target.image(n), logits

    monkeypatch.setattr(rounds, "over_target", each)
    for name in acquisition.SCORES:
        monkeypatch.setitem(acquisition.SCORES, name, lambda *_: next(given))


def settings(strategy="ripu", **changes):
    given = {"target_size": "9x9", "pictures": 0, "rounds": 2, "workers": 0, **changes}
    return settings_for({"strategy": strategy, **given})


def picks_of(s, tmp_path, target, number, store):
    """The centres of round `number`, asked and stored."""
    earlier = [store.record(n) for n in range(1, number)]
    centres, _, _, notes = rounds.choose(s, Run(tmp_path), target, store, number, earlier)
    with store.new(number) as new:
        for n, sample in enumerate(target.samples):
            radius = 0 if s.unit == "pixel" else s.radius
            asked = acquisition.paint(centres[n], radius, sample.size)
            new.add(sample.id, asked, ground_truth(target, n), len(centres[n]), sample.size)
    return [c.tolist() for c in centres], notes


# ------------------------------------------------------------------------------------------- pixels


def test_a_pick_blocks_2k_within_a_round_and_in_later_ones(tmp_path, monkeypatch):
    """A row of falling scores: regions of radius 1 are 3 apart, whichever round asks them."""
    score = torch.zeros(1, 9, 18)
    score[0, 4] = torch.arange(18, 0, -1)
    scored(monkeypatch, score)
    s = settings(target_size="18x9", budget=36 / 162)  # 4 regions of 9 pixels, 2 a round
    target, store = Target(torch.ones(1, 9, 18, dtype=torch.uint8)), Rounds(tmp_path)
    first, _ = picks_of(s, tmp_path, target, 1, store)
    assert first == [[[4, 0], [4, 3]]]
    second, _ = picks_of(s, tmp_path, target, 2, store)
    # the first region is cut at the border, so 6 pixels are left over; they pay for no region
    assert second == [[[4, 6], [4, 9]]]
    assert store.asked("i0", (9, 18)).sum() == 6 + 9 + 9 + 9


def test_pixel_queries_block_their_radius_and_ask_one_pixel(tmp_path, monkeypatch):
    score = torch.zeros(1, 9, 18)
    score[0, 4] = torch.arange(18, 0, -1)
    scored(monkeypatch, score)
    s = settings("ripu-pa", target_size="18x9", radius=3, pixels=4)
    target, store = Target(torch.ones(1, 9, 18, dtype=torch.uint8)), Rounds(tmp_path)
    assert picks_of(s, tmp_path, target, 1, store)[0] == [[[4, 0], [4, 4]]]
    assert picks_of(s, tmp_path, target, 2, store)[0] == [[[4, 8], [4, 12]]]
    assert store.asked("i0", (9, 18)).sum() == 4


def test_each_image_has_its_own_budget_but_cbda_has_one(tmp_path, monkeypatch):
    """All high scores are in image 1: RIPU asks 2 regions of each image, CBDA all 4 of that one."""
    score = torch.rand(2, 9, 18, generator=torch.Generator().manual_seed(0))
    score[1] += 5
    scored(monkeypatch, score)
    target = Target(torch.ones(2, 9, 18, dtype=torch.uint8))
    for name, expected in (("ripu", [2, 2]), ("cbda", [0, 4])):
        s = settings(name, target_size="18x9", budget=36 / 162, cbda="dynamic")
        centres, notes = picks_of(s, tmp_path, target, 1, Rounds(tmp_path / name))
        assert [len(c) for c in centres] == expected and notes["picks_due"] == 4


def test_cbda_spends_what_is_left_and_never_a_class_of_weight_0(tmp_path, monkeypatch):
    """Pixel picks, budget 38 in 2 rounds: 19 in each. Class 3 has used up its share (38 / 19 = 2
    pixels) in round 1, so round 2 asks none of it although it has the highest scores."""
    labels = torch.ones(1, 8, 19, dtype=torch.uint8)
    labels[:, :2] = 3
    score = torch.rand(1, 8, 19, generator=torch.Generator().manual_seed(0))
    score[:, :2] += 5
    scored(monkeypatch, score, labels.long())
    s = settings("cbda", unit="pixel", radius=0, budget=38 / 152, target_size="19x8")
    target, store = Target(labels), Rounds(tmp_path)
    first, notes = picks_of(s, tmp_path, target, 1, store)
    assert all(row < 2 for row, _ in first[0]) and len(first[0]) == 19
    assert notes["class_weights"] == dict.fromkeys(NAMES, 1.0)
    second, notes = picks_of(s, tmp_path, target, 2, store)
    assert notes["class_weights"][NAMES[3]] == 0
    assert len(second[0]) == 19 and all(row >= 2 for row, _ in second[0])
    s = settings(
        "cbda",
        cbda="dynamic",
        unit="pixel",
        radius=0,
        budget=38 / 152,
        target_size="19x8",
        rounds=3,
    )
    asked = [13, 13, 12]  # ceil(38 / 3), and in the last round what is left
    store = Rounds(tmp_path / "three")
    for number, due in enumerate(asked, 1):
        assert len(picks_of(s, tmp_path, target, number, store)[0][0]) == due


def test_class_weights_count_labelled_pixels_of_earlier_rounds(tmp_path, monkeypatch):
    """Half of what is asked has no class (255): only what is labelled counts."""
    labels = torch.full((1, 4, 10), NONE, dtype=torch.uint8)
    labels[:, :, :5] = 7
    score = torch.zeros(1, 4, 10)
    score[0, 0] = torch.arange(10, 0, -1) + 0.5
    scored(monkeypatch, score)
    s = settings("cbda", unit="pixel", radius=0, budget=20 / 40, target_size="10x4", cbda="balance")
    target, store = Target(labels), Rounds(tmp_path)
    first, _ = picks_of(s, tmp_path, target, 1, store)
    assert len(first[0]) == 10 and store.record(1)["labelled"] == 5
    _, notes = picks_of(s, tmp_path, target, 2, store)
    assert notes["class_weights"][NAMES[7]] == pytest.approx(max(0, 1 - 5 / (20 / 19)))
    assert notes["class_weights"][NAMES[8]] == 1


def test_a_flat_prediction_is_not_spent_on_the_left_border(tmp_path, monkeypatch):
    """Scores all 0, uncertainty the same: a seeded draw decides; --rules code takes the left."""
    scored(monkeypatch, torch.zeros(1, 40, 40))
    target = Target(torch.ones(1, 40, 40, dtype=torch.uint8))
    columns = {}
    for name, changes in (("a", {}), ("b", {"seed": 1}), ("code", {"rules": "code"})):
        s = settings(target_size="40x40", budget=0.2, **changes)
        store = Rounds(tmp_path / name)
        centres, notes = picks_of(s, tmp_path, target, 1, store)
        columns[name] = [column for _, column in centres[0]]
        assert notes["share_of_score_0"] == 1.0
        if name != "code":
            again, *_ = rounds.choose(s, Run(tmp_path), target, Rounds(tmp_path / "x"), 1, [])
            assert again[0].tolist() == centres[0]
            other, *_ = rounds.choose(s, Run(tmp_path), target, store, 2, [store.record(1)])
            assert len(other[0]) and not set(map(tuple, other[0].tolist())) & set(
                map(tuple, centres[0])
            )
    assert 10 < np.mean(columns["a"]) < 30 and columns["a"] != columns["b"]
    assert max(columns["code"]) <= 6


def test_ties_go_to_the_more_uncertain_pixel():
    score = torch.tensor([[1.0, 1, 1, 2, 1]])
    ties = torch.tensor([[0.1, 0.9, 0.5, 0.0, 0.9]])
    picks = acquisition.select_regions(score, 5, 0, tie_break=ties)[:, 1].tolist()
    assert picks == [3, 1, 4, 2, 0]
    second = torch.stack([ties, torch.tensor([[0.0, 0.2, 0, 0, 0.7]])])
    picks = acquisition.select_regions(score, 5, 0, tie_break=second)[:, 1].tolist()
    assert picks == [3, 4, 1, 2, 0]
    with pytest.raises(ValueError, match="tie_break"):
        acquisition.select_regions(score, 1, 0, tie_break=torch.zeros(2, 2))


def test_the_tie_break_of_a_run_is_the_uncertainty():
    logits = torch.randn(19, 12, 12, generator=torch.Generator().manual_seed(0))
    s = settings_for({"strategy": "ripu"})
    entropies = acquisition.pixel_entropy(logits.softmax(0))
    first, draw = rounds.tie_breaks(s, entropies, 1, 0)
    torch.testing.assert_close(first, acquisition.prediction_uncertainty(logits.softmax(0), 1))
    for number, index in ((2, 0), (1, 1)):
        assert not torch.equal(draw, rounds.tie_breaks(s, entropies, number, index)[1])
    pixel = rounds.tie_breaks(settings_for({"strategy": "ripu-pa"}), entropies, 1, 0)[0]
    torch.testing.assert_close(pixel, entropies)


def test_a_warning_tells_of_picks_without_a_score(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounds, "class_picture", lambda *_, **__: None)
    target = Target(torch.ones(1, 9, 18, dtype=torch.uint8))
    for name, score in (("flat", 0.0), ("good", 1.0)):
        scored(monkeypatch, torch.full((1, 9, 18), score))
        s = settings(target_size="18x9", budget=0.5)
        rounds.ask_pixels(s, Run(tmp_path), target, Rounds(tmp_path / name), 1)
        out = capsys.readouterr().out
        assert ("warning: more than half of the picks" in out) == (name == "flat")
        assert ("100% of the picks" if name == "flat" else "0% of the picks") in out
        assert Rounds(tmp_path / name).record(1)["share_of_score_0"] == float(name == "flat")


# ------------------------------------------------------------------------------- the oracle, the labels


def test_the_oracle_answers_what_was_asked_and_nothing_else():
    labels = torch.randint(0, 19, (1, 5, 6), dtype=torch.uint8)
    asked = torch.zeros(5, 6, dtype=torch.bool)
    asked[1, 2] = asked[3, 3] = True
    answers = ground_truth(Target(labels), 0)(asked)
    assert torch.equal(answers[asked], labels[0][asked]) and (answers[~asked] == NONE).all()


def test_a_round_asks_the_oracle_for_its_picks_only(tmp_path):
    asked = torch.zeros(5, 6, dtype=torch.bool)
    asked[1:3, 2:4] = True

    def strict(mask):
        if not torch.equal(mask, asked):
            raise AssertionError("the oracle was asked for a pixel that nobody picked")
        return torch.where(mask, 4, NONE).to(torch.uint8)

    with Rounds(tmp_path).new(1) as new:
        new.add("a", asked, strict, 1, (5, 6))
    assert torch.equal(Rounds(tmp_path).labels("a", (5, 6)) == 4, asked)
    assert torch.equal(Rounds(tmp_path).asked("a", (5, 6)), asked)


@pytest.fixture
def batches_seen(monkeypatch):
    """Every target batch of a run of queries, by step."""
    seen, original = [], loop.forward_both

    def note(model, source, target):
        seen.append(target[1].clone())
        return original(model, source, target)

    monkeypatch.setattr(loop, "forward_both", note)
    return seen


def test_bought_labels_are_trained_on_in_the_very_next_step(tiny_world, tmp_path, batches_seen):
    """Rounds before steps 2 and 5: the batches of steps 2-4 hold round 1, those of 5-7 both rounds."""
    words = arguments(tiny_world, tmp_path, strategy="ripu", budget=0.4)
    assert loop.main(words) == 0
    target, store = open_dataset("cityscapes", tiny_world, "train"), Rounds(tmp_path / "rounds")
    maps = {}
    for upto in (0, 1, 2):
        labels = [store.labels(sample.id, sample.size, upto) for sample in target.samples]
        maps[upto] = [resize_labels(x, (32, 64)) for x in labels]
    for step, batch in enumerate(batches_seen):
        upto = (step >= 2) + (step >= 5)
        for labels in batch:
            assert any(torch.equal(labels, x) for x in maps[upto]), f"step {step}: not round {upto}"
    assert (maps[2][0] != NONE).sum() > (maps[1][0] != NONE).sum() > (maps[0][0] != NONE).sum() == 0


def test_pseudo_labels_never_cover_bought_ones(tmp_path):
    target = Target(torch.zeros(1, 2, 3, dtype=torch.uint8))
    store, pseudo = Rounds(tmp_path / "rounds"), Rounds(tmp_path / "pseudo")
    asked = torch.tensor([[True, False, False], [False, False, True]])
    answers = torch.tensor([[4, NONE, NONE], [NONE, NONE, 9]], dtype=torch.uint8)
    with store.new(1) as new:
        new.add("i0", asked, lambda mask: answers, 2, (2, 3))
    folder = rounds.begin_folder(pseudo.path(1), ("labels",))
    guessed = torch.tensor([[1, 2, NONE], [NONE, 3, 8]], dtype=torch.uint8)
    rounds.write_map(folder / "labels/i0.png", guessed)
    rounds.complete_folder(folder, pseudo.path(1), {})
    both = bought_and_pseudo(target, store, 1, pseudo, 1, 0)
    assert both.tolist() == [[4, 102, NONE], [NONE, 103, 9]]
    assert bought_and_pseudo(target, store, 0, pseudo, 1, 0).tolist() == [
        [101, 102, NONE],
        [NONE, 103, 108],
    ]


def test_each_loss_of_a_query_step_is_on_its_own_domain():
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(2, 19, 6, 6, generator=generator) for _ in range(2))
    labels = [
        torch.randint(0, 19, (2, 6, 6), generator=generator).to(torch.uint8) for _ in range(2)
    ]
    L = loop.losses_of_queries(
        settings_for({}), [None, labels[0]], source, [None, labels[1]], target
    )
    cross_entropy = torch.nn.functional.cross_entropy
    assert L["source"] == pytest.approx(float(cross_entropy(source, labels[0].long())), rel=1e-6)
    assert L["target"] == pytest.approx(float(cross_entropy(target, labels[1].long())), rel=1e-6)
    prob = source.softmax(1)
    padded = torch.nn.functional.pad(prob, (1, 1, 1, 1), mode="replicate")
    mean = sum(padded[..., i : i + 6, j : j + 6] for i in range(3) for j in range(3)) / 9
    assert L["consistency"] == pytest.approx(float((prob - mean).abs().sum(1).mean()), rel=1e-5)
    prob = target.softmax(1)
    negative = -(1 - prob[prob < 0.05]).log().mean()
    assert L["negative"] == pytest.approx(float(negative), rel=1e-5)


def test_the_decay_of_a_source_free_run_is_62500_steps_long():
    free = settings_for({"strategy": "ripu", "source_free": "x.pt"})
    assert (free.steps, poly_length(free)) == (30_000, 62_500)
    assert poly_length(settings_for({"strategy": "ripu"})) == 62_500
    assert poly_length(settings_for({"strategy": "ripu", "steps": 400})) == 625
    assert poly_length(settings_for({"strategy": "ripu", "poly_steps": 50_000})) == 50_000


def test_source_only_is_trained_as_ripus_source_network():
    """Its published configuration: rate, steps, the steps of the whole decay, images a step."""
    s = settings_for({"strategy": "source-only"})
    assert (s.lr, s.steps, poly_length(s), s.batch) == (5e-4, 20_000, 31_250, 2)


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ({"strategy": "ripu"}, 0.022),
        ({"strategy": "ripu", "net": "deeplabv3plus"}, 0.05),
        # as many as what it is compared with
        ({"strategy": "random", "net": "deeplabv3plus"}, 0.05),
        ({"strategy": "cbda"}, 0.05),
        ({"strategy": "ripu", "net": "deeplabv3plus", "budget": 0.01}, 0.01),
        ({"strategy": "ripu", "root": "toy", "net": "deeplabv3plus"}, 0.022),
    ],
)
def test_the_published_budget_of_each_network(given, budget):
    assert settings_for(given).budget == budget


# ---------------------------------------------------------------------------------------------- CBST


class Pointwise(torch.nn.Module):
    """19 logits that depend on a pixel's own colour; notes the size and whether it was in eval mode."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(19, 3, 1, 1, generator=torch.Generator().manual_seed(3))
        self.weight, self.seen = torch.nn.Parameter(weight * 3), []

    def forward(self, x):
        self.seen.append((tuple(x.shape[-2:]), self.training))
        return torch.nn.functional.conv2d(x, self.weight)


class Colours(Target):
    """Random images, labelled with random classes."""

    def __init__(self, number, size=(12, 16)):
        generator = torch.Generator().manual_seed(number)
        super().__init__(torch.randint(0, 19, (number, *size), generator=generator).to(torch.uint8))
        values = torch.randint(0, 256, (number, 3, *size), generator=generator)
        self.photographs = values.to(torch.uint8)

    def image(self, index):
        return self.photographs[index]


@pytest.mark.parametrize("kind", ["st", "cbst", "cbst-sp"])
@pytest.mark.parametrize("number,rules", [(1, "code"), (3, "code"), (2, "paper")])
def test_pseudo_labels_of_a_round_equal_a_slow_version(kind, number, rules, tmp_path):
    """Prior, portion of the round and thresholds, from sorted lists; bought pixels get none."""
    target, model = Colours(3), Pointwise()
    options = {"target_size": "16x12", "label_flip": False, "label_scale": 1.0, "rules": rules}
    s = settings(kind, **options)
    prior = (
        torch.rand(19, 12, 16, generator=torch.Generator().manual_seed(8))
        if kind == "cbst-sp"
        else None
    )
    bought = torch.full((12, 16), NONE, dtype=torch.uint8)
    bought[0, :5] = 1
    pseudo = Rounds(tmp_path / "pseudo")
    for n in range(1, number):
        record = {"kind": kind, "classes": {name: {} for name in NAMES}, "labelled": 0}
        folder = rounds.begin_folder(pseudo.path(n), ("labels",))
        rounds.complete_folder(folder, pseudo.path(n), record)
    rounds.label_target(
        s, Run(tmp_path, model), target, pseudo, number, kind, prior, lambda i: bought
    )
    assert model.training and not any(training for _, training in model.seen)
    portion, weighted = 0.2 + 0.05 * (number - 1), []
    for index in range(3):
        x = network_logits(model, target.image(index)[None], (12, 16), "cpu").detach()[0]
        prob = x.softmax(0).numpy().astype(np.float64)
        weighted.append(prob if prior is None else prob * prior.numpy())
    best = np.stack([x.max(0) for x in weighted]), np.stack([x.argmax(0) for x in weighted])
    threshold = np.ones(19)
    for c in range(19):
        values = best[0] if kind == "st" else best[0][best[1] == c]
        rank = math.floor(portion * values.size)
        if rank:
            threshold[c] = np.sort(values.ravel())[::-1][rank - 1]
    for index in range(3):
        share = weighted[index] / threshold[:, None, None]
        expected = np.where(share.max(0) >= 1, share.argmax(0), NONE)
        expected[bought.numpy() != NONE] = NONE
        found = np.array(Image.open(pseudo.path(number) / f"labels/i{index}.png"))
        wrong = found != expected  # the histogram's thresholds are within 5e-4 of the exact rank
        assert (np.abs(share.max(0)[wrong] - 1) < 2e-3).all() and wrong.mean() < 0.1
        assert (expected != NONE).any()


def test_a_round_of_pseudo_labels_is_compared_with_the_best_earlier_one(tmp_path, monkeypatch):
    """Three falls of less than ten points each are a fall, too; a round without truth is none."""
    pseudo, told = Rounds(tmp_path), []
    monkeypatch.setattr(rounds, "report_pseudo", lambda *given: told.append(given[4]))
    for n, accuracy in enumerate((0.73, 0.64, None), 1):
        classes = {name: {} for name in NAMES}
        record = {"kind": "cbst", "classes": classes, "labelled": 0, "accuracy": accuracy}
        folder = rounds.begin_folder(pseudo.path(n), ("labels",))
        rounds.complete_folder(folder, pseudo.path(n), record)
    s = settings("cbst", target_size="8x6")
    rounds.label_target(s, Run(tmp_path, Pointwise()), Colours(1, (6, 8)), pseudo, 4, "cbst")
    assert told == [0.73]


def test_the_pixel_at_the_threshold_follows_the_rules(tmp_path):
    """All pixels alike: the threshold is their confidence, which the code labels and the paper does not."""
    target = Target(torch.ones(2, 6, 8, dtype=torch.uint8))
    target.image = lambda index: torch.full((3, 6, 8), 90, dtype=torch.uint8)
    for rules, labelled in (("code", 2 * 48), ("paper", 0)):
        s = settings("cbst", target_size="8x6", label_scale=1.0, rules=rules)
        pseudo = Rounds(tmp_path / rules)
        rounds.label_target(s, Run(tmp_path, Pointwise()), target, pseudo, 1, "cbst")
        assert pseudo.record(1)["labelled"] == labelled


def test_the_target_is_labelled_at_its_scale_with_its_mirror_image():
    image = torch.randint(0, 256, (1, 3, 10, 20), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )

    class Sided(Pointwise):
        def forward(self, x):
            return super().forward(x) + torch.linspace(-3, 3, x.shape[-1])  # left and right differ

    def alone(x, size):
        x = network_logits(Sided(), x, size, "cpu").detach()
        return x.softmax(1)

    s = settings("cbst", target_size="20x10", label_scale=0.5)
    model = Sided()
    found = rounds.mirrored_probabilities(s, model, image, "cpu").detach()
    assert [size for size, _ in model.seen] == [(5, 10), (5, 10)]
    expected = (alone(image, (5, 10)) + alone(image.flip(-1), (5, 10)).flip(-1)) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    plain = rounds.mirrored_probabilities(settings("cbst", target_size="20x10", label_flip=False, label_scale=0.5),
                                          model, image, "cpu").detach()  # fmt: skip
    torch.testing.assert_close(plain, alone(image, (5, 10)))
    assert (
        settings_for({"strategy": "cbst"}).label_scale == 0.9
        and settings_for({"strategy": "cbst"}).label_flip
    )


def test_patches_are_mined_in_the_target_only(monkeypatch):
    views, mixed = [], []
    monkeypatch.setattr(loop, "TrainingView", lambda *given: views.append(given))
    monkeypatch.setattr(loop, "mixed_batches", lambda *given: mixed.append(given))
    counts = {name: {"predicted": 10 + c} for c, name in enumerate(NAMES)}
    record = SimpleNamespace(record=lambda number: {"classes": counts})
    source, target = Colours(9), Colours(4)
    loop.round_batches(settings_for({"strategy": "cbst"}), source, target, record, 2, 3, 7)
    (of_source, of_target), ((_, _, entries, step, _),) = views, mixed
    assert of_source[0] is source and of_source[1].crop_at is None
    assert of_target[0] is target and of_target[1].crop_at is not None
    assert of_target[1].crop_at.keywords["rare"][1] == [0, 1, 2]
    assert [view for view, _ in entries] == [0] * 3 + [1] * 4 and step == 7


def test_cbst_rates_fall_by_sqrt_2_a_round(tiny_world, tmp_path):
    pre = tmp_path / "pre"
    assert loop.main(arguments(tiny_world, pre, strategy="source-only", steps=1)) == 0
    rates = []
    handle = register_optimizer_step_pre_hook(lambda o, *_: rates.append(o.param_groups[1]["lr"]))
    options = {
        "init": pre / "checkpoints/last.pt",
        "batch_norm": "live",
        "rules": "code",
        "rounds": 3,
    }
    words = arguments(tiny_world, tmp_path / "out", strategy="cbst", steps=6, lr=0.001, **options)
    assert loop.main(words) == 0
    handle.remove()
    assert rates == pytest.approx([0.01 / math.sqrt(2) ** r for r in (0, 0, 1, 1, 2, 2)])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert [r["portion"] for r in result["pseudo_rounds"]] == [0.2, 0.25, 0.3]


def test_the_source_share_of_cbst_grows():
    s = settings_for({"strategy": "cbst"})
    # 3 % of GTA5 are 748.98 images, 4.25 % 1,061.06: CRST's script rounds down
    assert loop.source_counts(s, 24_966) == [748, 811, 873, 936, 998, 1061]


# ---------------------------------------------------------------------------------------------- STAL


def test_image_queries_take_the_most_uncertain_of_each_city(tmp_path, monkeypatch):
    """Five images in city a, three of them asked before, and four in b. Three of the six that are left
    are asked: one of a's two, two of b's four, the teacher's largest scores of each (i2 of a has more
    than i7 of b)."""
    groups = ["a"] * 5 + ["b"] * 4
    target, teacher = Target(torch.ones(9, 4, 4, dtype=torch.uint8), groups), torch.nn.Identity()
    scores = {0: 0.9, 1: 0.95, 2: 0.45, 3: 0.99, 4: 0.97, 5: 0.1, 6: 0.5, 7: 0.4, 8: 0.3}

    def each(s, run, target, see, model, indices):
        assert model is teacher and see is rounds.logits_of
        for n in indices:
            yield n, target.image(n), torch.full((19, 4, 4), float(n))

    monkeypatch.setattr(rounds, "over_target", each)
    order = iter([0, 2, 5, 6, 7, 8])
    monkeypatch.setattr(rounds.acquisition, "image_uncertainty", lambda prob: scores[next(order)])
    store = Rounds(tmp_path)
    with store.new(1) as new:
        for n in (1, 3, 4):
            everything = torch.ones(4, 4, dtype=torch.bool)
            new.add(f"i{n}", everything, ground_truth(target, n), 1, (4, 4))
    s = settings("stal", target_size="4x4")
    rounds.ask_images(s, Run(tmp_path), teacher, target, store, 2, 3)
    assert set(store.record(2)["images"]) == {"i0", "i6", "i7"}
    assert store.record(2)["quotas"] == {"a": 1, "b": 2}
    assert store.record(2)["scores"] == {"i0": 0.9, "i6": 0.5, "i7": 0.4}
    assert store.asked("i6", (4, 4)).all() and not store.asked("i8", (4, 4)).any()
    # the first round draws: no score is left to be looked at
    rounds.ask_images(s, Run(tmp_path), teacher, target, Rounds(tmp_path / "first"), 1, 3)


@pytest.fixture
def stal_run(tiny_world, tmp_path):
    """A run of STAL, two loops of three steps, and what each optimizer step saw and left."""
    steps = []

    def before(optimizer, *_):
        weights = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        steps.append(SimpleNamespace(before=weights, momentum=len(optimizer.state)))

    def after(optimizer, *_):
        steps[-1].after = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]

    def run(**options):
        handles = [
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ]
        options = {"steps": 6, "log_every": 1, "checkpoint_every": 3, **options}
        words = arguments(tiny_world, tmp_path, strategy="stal", **options)
        assert loop.main(words) == 0
        for handle in handles:
            handle.remove()
        return steps, tmp_path

    return run


def weights_of(state):
    """The parameters of a state dict, in the optimizer's order: backbone, then heads."""
    names = [n for n in state if "running" not in n and "num_batches" not in n]
    ordered = [n for n in names if n.startswith("backbone.")]
    return [state[n] for n in ordered + [n for n in names if not n.startswith("backbone.")]]


def test_the_teacher_is_the_mean_of_its_first_students(stal_run):
    """Decay 1 - 1/(t+1) below 0.99: after three steps of a loop the teacher is the students' mean; the
    next loop begins from it, with no momentum."""
    steps, out = stal_run()
    state = torch.load(out / "checkpoints/last.pt", weights_only=True)
    for place, own in enumerate(weights_of(state["teacher"])):
        mean = sum(step.after[place].double() for step in steps[3:]) / 3
        torch.testing.assert_close(own.double(), mean, atol=1e-6, rtol=1e-5)
        first = sum(step.after[place].double() for step in steps[:3]) / 3
        torch.testing.assert_close(steps[3].before[place].double(), first, atol=1e-6, rtol=1e-5)
    assert [bool(step.momentum) for step in steps] == [False, True, True, False, True, True]


def test_a_restart_begins_from_the_first_weights(stal_run):
    steps, _ = stal_run(restart=True)
    for first, again in zip(steps[0].before, steps[3].before, strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("momentum", [0.999, 0.5])
def test_banks_of_a_run_fill_and_follow(stal_run, momentum):
    """Confidences move with their momentum, the image bank knows the unlabelled images, keys enter from
    the start on."""
    given = {} if momentum == 0.999 else {"confidence_momentum": momentum}
    _, out = stal_run(contrast_start=0.5, ohem_threshold=0.7, **given)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "losses" in line]
    assert all(sum(line["bank"]) == 0 for line in lines[:2]) and sum(lines[2]["bank"]) > 0
    assert lines[0]["losses"]["contrastive"] == lines[1]["losses"]["contrastive"] == 0
    assert lines[2]["losses"]["contrastive"] > 0
    values = [line["confidence"] for line in lines]
    assert all(a != b for a, b in itertools.pairwise(values))
    assert max(values[0]) <= 1 - momentum + 1e-9
    assert max(values[-1]) > 0 and (max(values[-1]) <= 0.006) == (momentum == 0.999)
    share = torch.load(out / "checkpoints/last.pt", weights_only=True)["images"]["share"]
    assert ((share.sum(0) > 0.3) & (share.sum(0) < 1.001)).any()


def test_a_pseudo_label_depends_on_its_own_image_only(tiny_world, tmp_path):
    """Live batch norm, teacher in eval mode: other images of the batch change no logit; its mode and
    its running statistics are left alone."""
    given = {
        "root": str(tiny_world),
        "init": "none",
        "backbone": "resnet18",
        "head": "ripu",
        "bank": 40,
    }
    s = settings_for({"strategy": "stal", "crop": "64x32", "target_size": "64x32", **given})
    run = loop.Run(s, tmp_path, torch.device("cpu"))
    teacher = stal.StalState(s, run, open_dataset("cityscapes", tiny_world)).teacher
    own, others = torch.randn(1, 3, 32, 64), torch.randn(2, 1, 3, 32, 64) * 3
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    found = [stal.plain_logits(run, teacher, torch.cat([own, other]), None)[0] for other in others]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    assert teacher.training and all(
        torch.equal(x, before[n]) for n, x in teacher.state_dict().items()
    )
    stal.train_mode(teacher, torch.cat([own, others[0]]))
    after = teacher.state_dict()
    assert not torch.equal(after["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"])


def test_the_losses_of_two_classes_by_hand():
    """One image of two pixels. L_s: p = 0.8 and 0.4 on the main head, 0.5 and 0.5 on the auxiliary one;
    L_u: one of two pixels has a pseudo-label."""
    s = settings_for(
        {"strategy": "stal", "ohem_threshold": 0.7, "ohem_pixels": 1, "class_keep": False}
    )
    logits = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log().T[None, :, None]  # (1,2,1,2)
    labels = torch.tensor([[[0, 0]]], dtype=torch.uint8)
    auxiliary = torch.zeros(1, 2, 1, 2)
    expected = -math.log(0.4) + 0.4 * -math.log(0.5)  # 0.8 is above the threshold
    assert float(stal.supervised_loss(s, logits, auxiliary, labels)) == pytest.approx(
        expected, rel=1e-5
    )
    assert float(stal.supervised_loss(s, logits, None, labels)) == pytest.approx(
        -math.log(0.4), rel=1e-5
    )
    pseudo = torch.tensor([[[NONE, 1]]], dtype=torch.uint8)
    prob = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).T[None, :, None]
    state = SimpleNamespace(confidence=SimpleNamespace(value=torch.zeros(2)))
    for rules in ("paper", "code"):
        loss = stal.unlabelled_loss(settings_for({"strategy": "stal", "rules": rules, "class_keep": False}),
                                    logits, pseudo, prob.amax(1), state, None)  # fmt: skip
        assert float(loss) == pytest.approx(-math.log(0.6), rel=1e-5)
    both = torch.tensor([[[0, 1]]], dtype=torch.uint8)  # confidence^2: 0.81 and 0.49
    code = settings_for({"strategy": "stal", "rules": "code", "class_keep": False})
    loss = stal.unlabelled_loss(code, logits, both, prob.amax(1), state, None)
    expected = (0.81 * -math.log(0.8) + 0.49 * -math.log(0.6)) / (0.81 + 0.49)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_what_a_loop_trains_on(monkeypatch, tmp_path):
    """2 of 10 target images asked: labelled are all source images and as many target images as stay
    unlabelled, only asked ones; unlabelled the other 8; pasted the labelled list at a scale of its own."""
    source, target, store = Colours(6), Colours(10), Rounds(tmp_path)
    with store.new(1) as new:
        for n in (3, 7):
            everything = torch.ones(12, 16, dtype=torch.bool)
            new.add(f"i{n}", everything, ground_truth(target, n), 1, (12, 16))
    seen = []
    monkeypatch.setattr(
        loop, "mixed_batches", lambda s, views, entries, *_: seen.append((views, entries))
    )
    loop.loop_batches(settings_for({"strategy": "stal"}), source, target, store, 1, 0)
    (views, labelled), (_, pasted), (_, unlabelled) = seen
    assert labelled == [(0, i) for i in range(6)] + [(1, 3), (1, 7)] * 4
    assert unlabelled == [(2, i) for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert pasted == [(view + 3, i) for view, i in labelled]
    assert [view.dataset for view in views] == [source, target, target, source, target]
    assert [view.transform.scale for view in views] == [(0.5, 2.0)] * 3 + [(0.1, 2.0)] * 2
    assert all(view.transform.halves and view.transform.centred for view in views)
    assert torch.equal(views[1].labels_of(3), target.labels(3))  # an answer
    assert (views[1].labels_of(0) == NONE).all()  # nobody asked


def test_no_bought_image_is_left_out_where_most_are_bought(monkeypatch, tmp_path):
    target, store, seen = Colours(6), Rounds(tmp_path), []
    with store.new(1) as new:
        for n in (0, 1, 3, 5):
            everything = torch.ones(12, 16, dtype=torch.bool)
            new.add(f"i{n}", everything, ground_truth(target, n), 1, (12, 16))
    monkeypatch.setattr(loop, "mixed_batches", lambda s, views, entries, *_: seen.append(entries))
    loop.loop_batches(settings_for({"strategy": "stal"}), Colours(1), target, store, 1, 0)
    assert seen[0] == [(0, 0), (1, 0), (1, 1), (1, 3), (1, 5)] and seen[2] == [(2, 2), (2, 4)]


def test_the_published_configuration_of_stal():
    s = settings_for({"strategy": "stal"})
    assert (s.batch, s.source_size, s.target_size, s.crop) == (
        4,
        "2048x1024",
        "2048x1024",
        "769x769",
    )
    assert (s.epochs, s.lr, s.weight_decay, s.auxiliary, s.ema) == (200, 2.5e-3, 1e-4, 0.4, 0.99)
    assert (s.scale, s.flip, s.source_images, s.drop, s.contrast_start) == (
        "0.5,2",
        True,
        2000,
        0.2,
        0.1,
    )
    # an epoch is a pass over the unlabelled images, 4 a step: 2,945, 2,910 and 2,826 of them
    starts = loop.round_starts(s, [2975 - n for n in (30, 65, 149)])
    assert starts == [0, 147_250, 292_750, 434_050]


# --------------------------------------------------------------------------------------- label ids, rules

CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
SYNTHIA = {
    "road": 3, "sidewalk": 4, "building": 2, "wall": 21, "fence": 5, "pole": 7, "traffic light": 15,
    "traffic sign": 9, "vegetation": 6, "sky": 1, "person": 10, "rider": 17, "car": 8, "bus": 19,
    "motorcycle": 12, "bicycle": 11,
}  # fmt: skip
TRAIN_ORDER = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


def test_label_ids_are_those_of_the_data_sets(tmp_path):
    """Typed here, not read from the package's table: GTA5's palette, Cityscapes, ACDC, SYNTHIA."""
    assert NAMES == TRAIN_ORDER
    expected = torch.arange(19)
    ids = np.array([[CITYSCAPES[name] for name in TRAIN_ORDER]], np.uint8)
    for name in ("a_gtFine_labelIds.png", "a_gt_labelIds.png", "00001.png"):
        picture = Image.fromarray(ids)
        if name == "00001.png":
            picture = picture.convert("P")
            picture.putpalette([v for c in range(256) for v in (c, 255 - c, 7)])
            picture.putdata(ids.ravel().tolist())
        picture.save(tmp_path / name)
        assert torch.equal(read_label(tmp_path / name, "cityscapes")[0].long(), expected), name
    wide = np.zeros((1, 16, 3), np.uint16)
    wide[0, :, 0] = list(SYNTHIA.values())
    wide[0, :, 1] = 999  # instances
    write_png16(tmp_path / "s.png", wide)
    found = read_label(tmp_path / "s.png", "synthia")[0].tolist()
    assert found == [TRAIN_ORDER.index(name) for name in SYNTHIA]


def test_the_table_of_the_codes_rules_is_complete():
    """Every place that asks for the rules is in the table of --rules code, and nothing else is."""
    import ast
    from pathlib import Path

    found = set()
    for path in Path(loop.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for x in ast.walk(function):
                text = ast.unparse(x) if isinstance(x, ast.Compare) else ""
                if text.endswith(("== 'code'", "== 'paper'")):
                    found.add(f"{path.stem}.{function.name}")
    assert found - {"rounds.report_pseudo"} == set(CODE_RULES)  # that one only prints


# ------------------------------------------------------------------------------- what mutants got through


def test_a_class_of_weight_0_is_not_asked_even_when_nothing_else_is_left(tmp_path, monkeypatch):
    """Round 1 spends class 3's share; 12 of 80 pixels are another class, 20 are due: 12 are asked."""
    labels = torch.full((1, 8, 10), 3, dtype=torch.uint8)
    labels[0, 7], labels[0, 6, :2] = 1, 2
    score = torch.rand(1, 8, 10, generator=torch.Generator().manual_seed(0)) + 0.1
    score[0, :6] += 5
    scored(monkeypatch, score, labels.long())
    s = settings("cbda", cbda="balance", unit="pixel", radius=0, budget=0.5, target_size="10x8")
    target, store = Target(labels), Rounds(tmp_path)
    first, _ = picks_of(s, tmp_path, target, 1, store)
    assert len(first[0]) == 20 and all(row < 6 for row, _ in first[0])
    second, notes = picks_of(s, tmp_path, target, 2, store)
    assert notes["class_weights"][NAMES[3]] == 0 and notes["picks_due"] == 20
    assert {tuple(c) for c in second[0]} == {(7, c) for c in range(10)} | {(6, 0), (6, 1)}


@pytest.mark.parametrize(
    "weights, regions, share_of_0, words",
    [
        (
            {"road": 0.0, "sky": 0.0, "car": 0.4},
            4,
            0.0,
            "road, sky have had their share of --budget",
        ),
        ({"road": 0.0, "car": 0.4}, 20, 0.6, "road have had their share"),
        ({"road": 0.0, "car": 0.4}, 20, 0.0, None),  # all that was due was found
        ({"road": 1.0, "car": 1.0}, 20, 0.6, "sees too few classes"),
        (None, 20, 0.6, "sees too few classes"),
        (None, 4, 0.0, None),
    ],
)
def test_a_round_says_why_it_found_little_to_ask(capsys, weights, regions, share_of_0, words):
    notes = {"picks_due": 20, "share_of_score_0": share_of_0}
    notes |= {"class_weights": weights} if weights else {}
    chosen = rounds.Chosen([torch.zeros(regions - 1, 2), torch.zeros(1, 2)], {}, {}, notes)
    rounds.report_choice(settings("cbda"), 5, chosen)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == (2 if words else 1)
    assert words is None or words in told[1]


def test_class_weights_are_relative_to_the_whole_budget(tmp_path, monkeypatch):
    """190 pixels of budget: each of 19 classes has 10; 4 of class 5 bought: weight 0.6."""
    labels = torch.full((1, 19, 20), NONE, dtype=torch.uint8)
    labels[0, 0, :4] = 5
    score = torch.zeros(1, 19, 20)
    score[0, 0] = 1 + torch.arange(20) / 100
    scored(monkeypatch, score)
    s = settings(
        "cbda", cbda="both", unit="pixel", radius=0, budget=0.5, rounds=5, target_size="20x19"
    )
    target, store = Target(labels), Rounds(tmp_path)
    picks_of(s, tmp_path, target, 1, store)
    _, notes = picks_of(s, tmp_path, target, 2, store)
    assert notes["budget_px"] == 190
    assert notes["class_weights"] == pytest.approx(dict.fromkeys(NAMES, 1.0) | {NAMES[5]: 0.6})
    total = rounds.ledger([store.record(1)])
    assert total["asked"] == 38 and total["labelled"] == 4 and total["class_entropy"] == 0


def test_the_last_round_asks_what_the_budget_has_left(tmp_path, monkeypatch):
    scored(monkeypatch, torch.rand(1, 9, 18, generator=torch.Generator().manual_seed(1)))
    s = settings("ripu-pa", target_size="18x9", radius=0, pixels=5)
    target, store = Target(torch.ones(1, 9, 18, dtype=torch.uint8)), Rounds(tmp_path)
    assert [len(picks_of(s, tmp_path, target, n, store)[0][0]) for n in (1, 2)] == [3, 2]


def test_the_codes_rule_asks_105_pixels_of_a_cityscapes_image():
    s = settings_for({"strategy": "ripu-pa", "rules": "code"})
    size = (1024, 2048)
    assert rounds.budget_pixels(s, [size]) == 105 and rounds.budget_pixels(s, [size] * 3) == 315
    assert [rounds.regions_due(105, s, 21 * n) for n in range(6)] == [21] * 5 + [0]
    assert rounds.budget_pixels(settings_for({"strategy": "ripu-pa"}), [size]) == 40


def test_equal_scores_share_one_budget_over_the_images(tmp_path, monkeypatch):
    """All scores alike: the images take turns until the budget is spent, whatever their order."""
    scored(monkeypatch, torch.ones(5, 4, 5))
    s = settings(
        "cbda", cbda="dynamic", unit="pixel", radius=0, budget=0.2, rounds=2, target_size="5x4"
    )
    target = Target(torch.ones(5, 4, 5, dtype=torch.uint8))
    centres, notes = picks_of(s, tmp_path, target, 1, Rounds(tmp_path))
    assert notes["picks_due"] == 10 and [len(c) for c in centres] == [2] * 5


def test_a_common_budget_holds_few_picks_where_all_scores_are_alike(tmp_path, monkeypatch):
    """At most twice the picks of a round and one image's, also in what the ledger says of them."""
    scored(monkeypatch, torch.ones(12, 4, 5))
    changes = {"cbda": "dynamic", "unit": "pixel", "radius": 0, "target_size": "5x4"}
    s = settings("cbda", budget=0.1, rounds=2, **changes)
    target, real, held = Target(torch.ones(12, 4, 5, dtype=torch.uint8)), torch.Tensor.cpu, []

    def cpu(tensor):
        if tensor.shape[1:] == (4,):  # a row of factors for each pick
            held.append(weakref.ref(kept := real(tensor).clone()))
            return kept
        return real(tensor)

    def rows():
        return sum(len(row()) for row in held if row() is not None)

    most, add = [], acquisition.GlobalBudget.add

    def watched(self, *what):
        most.append(rows())
        add(self, *what)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(acquisition.GlobalBudget, "add", watched)
    centres, notes = picks_of(s, tmp_path, target, 1, Rounds(tmp_path))
    assert notes["picks_due"] == 12 and [len(c) for c in centres] == [1] * 12
    assert max(most) <= 2 * 12 + 12


def test_a_radius_that_leaves_no_pixel_is_said(tmp_path, monkeypatch, capsys):
    """The budget is a half of the pixels, the radius 3: one pixel of an image of 4x4."""
    scored(monkeypatch, torch.ones(2, 4, 4))
    s = settings("ripu-pa", radius=3, budget=0.5, rounds=1, target_size="4x4")
    target = Target(torch.ones(2, 4, 4, dtype=torch.uint8))
    chosen = rounds.choose(s, Run(tmp_path), target, Rounds(tmp_path), 1, [])
    rounds.report_choice(s, 1, chosen)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "round 1/1: 2 of 16 picks due; 0% of the picks have score 0"
    assert said[1].startswith(
        "warning: round 1 asks 14 px less than are due: every pixel left lies"
    )


def test_noise_differs_between_images_and_rounds(tmp_path, monkeypatch):
    """The strategy random: other places in every image and every round, the same for a seed."""
    target = Target(torch.ones(3, 20, 20, dtype=torch.uint8))

    def each(s, run, target, *more, **keywords):
        for n in range(len(target)):
            yield n, target.image(n), torch.zeros(19, 20, 20)

    monkeypatch.setattr(rounds, "over_target", each)
    s, store = settings("random", target_size="20x20", budget=0.2), Rounds(tmp_path / "a")
    first, _ = picks_of(s, tmp_path, target, 1, store)
    assert first[0] != first[1] != first[2]
    again, *_ = rounds.choose(s, Run(tmp_path), target, Rounds(tmp_path / "b"), 1, [])
    assert [c.tolist() for c in again] == first
    with Rounds(tmp_path / "b").new(1):
        pass  # a round that asked nothing
    other, *_ = rounds.choose(s, Run(tmp_path), target, Rounds(tmp_path / "b"), 2, [])
    assert [c.tolist() for c in other] != first


def test_queries_see_the_target_at_its_training_size(tmp_path):
    model, target = Pointwise(), Colours(2)
    s = settings(target_size="8x6", budget=0.5)
    centres, *_ = rounds.choose(s, Run(tmp_path, model), target, Rounds(tmp_path), 1, [])
    assert model.seen == [((6, 8), False)] * 2 and model.training
    assert (
        max(row for c in centres for row, _ in c.tolist()) > 6
    )  # picks are at the image's full size


@pytest.mark.parametrize("restart", [False, True])
def test_what_a_new_loop_begins_with(restart, tiny_world, tmp_path):
    """Student and teacher from the last teacher, or anew; no momentum, no images to cut from, no shares
    of images that are labelled now; confidence and bank are kept, or emptied."""
    given = {
        "root": str(tiny_world),
        "init": "none",
        "backbone": "resnet18",
        "head": "ripu",
        "bank": 40,
    }
    s = settings_for({"strategy": "stal", "restart": restart, "target_size": "64x32", **given})
    run = loop.Run(s, tmp_path, torch.device("cpu"))
    state = stal.StalState(s, run, open_dataset("cityscapes", tiny_world))
    first = {name: x.clone() for name, x in run.model.state_dict().items()}
    with torch.no_grad():
        for shift, network in ((0.5, state.teacher), (0.25, run.model)):
            for parameter in network.parameters():
                parameter.add_(shift)
    last = {name: x.clone() for name, x in state.teacher.state_dict().items()}
    parameter = next(run.model.parameters())
    run.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    state.images.share.fill_(0.5)
    state.confidence.value.fill_(0.5)
    state.bank.count.fill_(7)
    state.partners.drawn = torch.zeros(4, 2, dtype=torch.int64)
    state.begin_loop()
    expected = first if restart else last
    for network in (run.model, state.teacher):
        assert all(torch.equal(x, expected[name]) for name, x in network.state_dict().items())
    assert (
        not run.optimizer.state and state.partners.next(0) is None and state.partners.drawn is None
    )
    assert (state.images.share == 0).all()
    assert (state.confidence.value == (0 if restart else 0.5)).all()
    assert (state.bank.count == (0 if restart else 7)).all()


def test_the_papers_unlabelled_loss_weights_all_pixels_alike():
    logits = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log().T[None, :, None]  # (1,2,1,2)
    prob = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).T[None, :, None]
    s = settings_for({"strategy": "stal", "class_keep": False})
    pseudo = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    loss = stal.unlabelled_loss(s, logits, pseudo, prob.amax(1))
    assert float(loss) == pytest.approx((-math.log(0.8) - math.log(0.6)) / 2, rel=1e-5)


def test_padding_takes_no_part_in_the_contrastive_percentiles():
    """The lower half is padding of low entropy: the reliable fifth is of the upper half."""
    labels = torch.zeros(1, 10, 10, dtype=torch.uint8)
    uncertainty = torch.arange(100).view(1, 10, 10).float()
    uncertainty[:, 5:] = -1
    inside = torch.ones(1, 10, 10, dtype=torch.bool)
    inside[:, 5:] = False
    pseudo = torch.zeros(1, 10, 10, dtype=torch.uint8).masked_fill(~inside, NONE)
    _, low, high = stal.contrastive_masks(labels, pseudo, uncertainty, (10, 10), counts=inside)
    assert low[1].flatten().nonzero()[:, 0].tolist() == list(range(10))
    assert high[1].flatten().nonzero()[:, 0].tolist() == list(range(40, 50))
    assert low[0].all() and high[0].all()  # labelled pixels are both


def test_the_draws_of_a_step_differ_from_step_to_step_and_by_seed():
    s, device = settings_for({"strategy": "stal"}), torch.device("cpu")
    first, again, later = (
        torch.rand(4, generator=stal.step_generator(s, n, device)) for n in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, later)
    other = settings_for({"strategy": "stal", "seed": 1})
    assert not torch.equal(first, torch.rand(4, generator=stal.step_generator(other, 3, device)))


def test_weak_classes_are_pasted_by_the_square_root_of_their_weakness():
    """One class of confidence 0, the others 0.96: chances e^1 against e^0.2, in each of three draws."""
    confidence = torch.full((19,), 0.96)
    confidence[5] = 0.0
    generator = torch.Generator().manual_seed(0)
    other = [torch.ones(1, 3, 1, 19), torch.arange(19, dtype=torch.uint8).expand(1, 1, 19).clone()]
    own = [torch.zeros(1, 3, 1, 19), torch.zeros(1, 1, 19, dtype=torch.uint8)]
    hits = total = 0
    for _ in range(3000):
        mixed, labels = stal.paste(own, other, confidence, generator)
        classes = labels[0, 0][mixed[0, 0, 0] == 1].tolist()
        hits, total = hits + (5 in classes), total + bool(classes)
    weak, others = math.exp(1), 13 * math.exp(0.2)  # 14 classes may be pasted
    missed = (others / (weak + others)) ** 3  # with replacement
    assert hits / total == pytest.approx(1 - missed, abs=0.02)


def test_full_trains_on_all_labels_of_the_target(tiny_world, tmp_path, batches_seen):
    assert loop.main(arguments(tiny_world, tmp_path, strategy="full", steps=2)) == 0
    target = open_dataset("cityscapes", tiny_world, "train")
    maps = [resize_labels(target.labels(i), (32, 64)) for i in range(len(target))]
    for batch in batches_seen:
        assert all(any(torch.equal(labels, x) for x in maps) for labels in batch)


def test_a_mixed_in_image_is_augmented_anew_in_every_step(tiny_world):
    s = settings_for(
        {"strategy": "stal", "crop": "40x20", "target_size": "128x64", "workers": 0, "batch": 1}
    )
    partners = stal.Partners(s, open_dataset("cityscapes", tiny_world), torch.device("cpu"))
    images = []
    for step in range(3):
        partners.drawn = torch.tensor([[0, 1]])  # the same class and image
        found = partners.next(step)
        images += [found.images] if found else []
    assert len(images) == 2 and not torch.equal(*images)


def test_a_place_without_truth_is_no_padding():
    """254, nobody knows the class, is inside the image: its prediction may be cut out."""
    logits = torch.zeros(2, 19, 8, 8)
    logits[1, 7, 2:6, 2:6] = 5
    truth = torch.full((1, 8, 8), 254, dtype=torch.uint8)
    others = stal.Others(torch.ones(1, 3, 8, 8), truth, torch.tensor([7]))
    generator = torch.Generator().manual_seed(0)
    image, _, _ = stal.cut(torch.zeros(1, 3, 8, 8), logits, truth, others, generator)
    # searched on every 4th pixel: the patch holds (4, 4), its cell is rows and columns 4 to 7
    assert image[0, 0].nonzero().tolist() == [[r, c] for r in range(4, 8) for c in range(4, 8)]
    padding = stal.Others(torch.ones(1, 3, 8, 8), torch.full_like(truth, NONE), torch.tensor([7]))
    image, _, _ = stal.cut(torch.zeros(1, 3, 8, 8), logits, truth, padding, generator)
    assert abs(int(image[0, 0].sum()) - 32) <= 8  # no prediction in padding: a random half


def test_source_only_passes_no_target_image(tiny_world, tmp_path, monkeypatch):
    original = loop.forward_both

    def check(model, source, target):
        assert target is None and source is not None
        return original(model, source, target)

    monkeypatch.setattr(loop, "forward_both", check)
    assert loop.main(arguments(tiny_world, tmp_path, strategy="source-only", steps=1)) == 0


def test_pseudo_labels_are_trained_on_beside_the_bought_ones(tiny_world, tmp_path, batches_seen):
    """A round before step 1, pseudo-labels before step 2: bought labels first, then both."""
    options = {
        "pseudo": "cbst",
        "pseudo_steps": "2",
        "query_steps": "1",
        "rounds": 1,
        "rules": "code",
    }
    words = arguments(tiny_world, tmp_path, strategy="ripu", steps=4, budget=0.4, **options)
    assert loop.main(words) == 0
    target = open_dataset("cityscapes", tiny_world, "train")
    store, pseudo = Rounds(tmp_path / "rounds"), Rounds(tmp_path / "pseudo")
    for step in (2, 3):
        maps = []
        for index in range(len(target)):
            both = bought_and_pseudo(target, store, 1, pseudo, 1, index)
            assert ((both < 19).any()) and ((both >= 100) & (both != NONE)).any()
            maps.append(resize_labels(both, (32, 64)))
        for labels in batches_seen[step]:
            assert any(torch.equal(labels, x) for x in maps), f"step {step}"
    assert (batches_seen[0] == NONE).all() and (batches_seen[1][batches_seen[1] != NONE] < 19).all()


def test_source_and_target_of_one_size_pass_together():
    """Live batch norm then sees both domains at once; of other sizes they pass apart."""
    seen = []

    def model(x):
        seen.append(tuple(x.shape))
        return x[:, :2].repeat_interleave(10, 1)[:, :19]

    labels = torch.zeros(2, 6, 8, dtype=torch.uint8)
    source, target = [torch.ones(2, 3, 6, 8), labels], [torch.full((2, 3, 6, 8), 2.0), labels]
    a, b = loop.forward_both(model, source, target)
    assert seen == [(4, 3, 6, 8)] and (a == 1).all() and (b == 2).all()
    other = [torch.full((2, 3, 4, 8), 3.0), labels]
    a, b = loop.forward_both(model, source, other)
    assert seen[1:] == [(2, 3, 6, 8), (2, 3, 4, 8)] and b.shape[-2:] == (6, 8) and (b == 3).all()
    assert loop.forward_both(model, None, target)[0] is None


@pytest.mark.parametrize("before, now, warned", [
    (0.88, 0.63, True), (0.88, 0.80, False), (0.6, 0.9, False), (None, 0.5, False), (0.9, None, False)
])  # fmt: skip
def test_pseudo_labels_that_get_worse_are_warned_of(before, now, warned, capsys):
    s, target = settings_for({"strategy": "cbst"}), SimpleNamespace(pixels=9)
    record = {"portion": 0.2, "labelled": 1, "classes": {}, "accuracy": now}
    rounds.report_pseudo(s, target, 2, record, before, 1.0)
    assert ("warning: the accuracy" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("norm, sizes, warned", [
    ("live", ("32x16", "32x24"), True), ("live", ("32x24", "32x24"), False), ("frozen", ("32x16", "32x24"), False)
])  # fmt: skip
def test_two_sizes_under_live_batch_norm_are_warned_of(norm, sizes, warned, capsys):
    s = settings_for({"strategy": "full", "source_size": sizes[0], "target_size": sizes[1]})
    loop.warn_of_two_sizes(s, SimpleNamespace(network={"batch_norm": norm}))
    assert ("warning: live batch norm" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("kind", ["cbst", "cbst-sp"])
def test_each_round_of_pseudo_labels_is_made_anew_with_its_prior(
    kind, tiny_world, tmp_path, monkeypatch
):
    """Rounds before steps 1 and 3: the second replaces the first; only cbst-sp has the source's prior."""
    given, original, trained = [], loop.label_target, []

    def note(s, run, target, pseudo, number, name, prior=None, bought=None):
        given.append((number, name, prior is not None))
        return original(s, run, target, pseudo, number, name, prior, bought)

    monkeypatch.setattr(loop, "label_target", note)
    read = loop.bought_and_pseudo
    monkeypatch.setattr(
        loop, "bought_and_pseudo", lambda *args: trained.append(args[4]) or read(*args)
    )
    options = {
        "pseudo": kind,
        "pseudo_steps": "1,3",
        "query_steps": "0",
        "rounds": 1,
        "rules": "code",
    }
    assert loop.main(arguments(tiny_world, tmp_path, strategy="ripu", steps=4, **options)) == 0
    assert given == [(1, kind, kind == "cbst-sp"), (2, kind, kind == "cbst-sp")]
    assert trained[:2] == [1, 1] and trained[-1] == 2  # the numbers of the rounds that were read


def test_padding_is_in_no_contrastive_set():
    """Two pixels a class apart; the right half of the unlabelled image is padding, the surest of all."""
    labels = torch.zeros(1, 4, 8, dtype=torch.uint8)
    weak = torch.zeros(1, 19, 4, 8)
    weak[0, 1, :, :4] = torch.arange(16).view(4, 4) * 0.3 + 1  # ever surer
    weak[0, 1, :, 4:] = 50
    inside = torch.zeros(1, 4, 8, dtype=torch.bool)
    inside[..., :4] = True
    pseudo = weak.argmax(1).to(torch.uint8).masked_fill(~inside, NONE)
    members, _, strangers = stal.contrast_sets(
        labels, torch.zeros(1, 19, 4, 8), pseudo, weak, inside, (4, 8)
    )
    sure, unsure = (x[:, 32:].view(19, 4, 8) for x in (members, strangers))
    assert not sure[..., 4:].any() and not unsure[..., 4:].any()
    # 16 pixels inside: the percentiles leave the 4 surest and the 4 least sure (20 % of 15 gaps, inclusive)
    assert sure[1, 3].tolist() == [True] * 4 + [False] * 4 and sure.sum() == 4
    assert unsure.any(0)[0].tolist() == [True] * 4 + [False] * 4 and unsure.any(0).sum() == 4


def test_what_is_cut_from_knows_padding_from_missing_truth(tiny_world):
    s = settings_for(
        {
            "strategy": "stal",
            "crop": "128x64",
            "target_size": "128x64",
            "scale": "1,1",
            "workers": 0,
        }
    )
    target = open_dataset("cityscapes", tiny_world)
    partners = stal.Partners(s, target, torch.device("cpu"))
    index = next(i for i in range(len(target)) if (target.labels(i) == NONE).any())
    truth = partners.view[0, index][1]
    assert (truth == 254).any() and not (truth == NONE).any()


def test_batch_norm_is_frozen_where_a_resnet_starts_from_weights():
    """As RIPU trains; live from random weights, and on MobileNetV2, which no paper has."""
    for given, expected in (
        ({}, "frozen"),
        ({"init": "none"}, "live"),
        ({"backbone": "mobilenet_v2"}, "live"),
        ({"backbone": "mobilenet_v2", "batch_norm": "frozen"}, "frozen"),
    ):
        s = settings_for({"strategy": "ripu", **given})
        assert network_of(s)["batch_norm"] == expected, given
