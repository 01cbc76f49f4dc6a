"""Scores and selection against slow loops, hand-made maps and the recorded outputs of RIPU's official code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_losses import close

from alda import acquisition as A

GOLDEN = Path(__file__).parent / "golden"


def random_logits(c, h, w, seed=0, smooth=4):
    x = (
        torch.randn(
            1,
            c,
            max(2, h // smooth),
            max(2, w // smooth),
            generator=torch.Generator().manual_seed(seed),
        )
        * 3
    )
    return F.interpolate(x, size=(h, w), mode="bilinear", align_corners=True)[0]


def slow_scores(logits, k):
    """Eqs. (3) and (4) pixel by pixel."""
    classes, height, width = logits.shape
    prob = logits.double().softmax(0)
    entropy = -(prob * prob.clamp(min=1e-300).log()).sum(0) / math.log(classes)
    prediction = logits.argmax(0)
    impurity, uncertainty = torch.zeros(height, width).double(), torch.zeros(height, width).double()
    for i in range(height):
        for j in range(width):
            window = (slice(max(0, i - k), i + k + 1), slice(max(0, j - k), j + k + 1))
            share = torch.bincount(prediction[window].flatten(), minlength=classes).double()
            share = share[share > 0] / share.sum()
            impurity[i, j] = -(share * share.log()).sum() / math.log(classes)
            uncertainty[i, j] = entropy[window].mean()
    return impurity * uncertainty, impurity, uncertainty


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("classes,k", [(19, 1), (19, 2), (16, 1), (5, 7), (2, 40)])
def test_ripu_score_equals_a_slow_loop(classes, k):
    logits = random_logits(classes, 17, 23, seed=k)
    for found, expected, what in zip(
        A.ripu_score(logits, k), slow_scores(logits, k), ("score", "P", "U"), strict=True
    ):
        close(found, expected, 2e-6, f"{what} C={classes} k={k}")


@pytest.mark.parametrize("name", "abc")
@pytest.mark.parametrize("k", [1, 2, 32])
def test_ripu_score_equals_the_recorded_official_one(name, k):
    golden = np.load(GOLDEN / f"ripu_region_score_{name}.npz")
    logits = torch.from_numpy(golden["logits"].astype(np.float32))[0]
    # the official code divides by log 19 for every C
    scale = math.log(logits.shape[0]) / math.log(19)
    score, impurity, uncertainty = A.ripu_score(logits, k)
    # The official logarithms add 1e-6, which lowers an entropy by at most C * 1e-6 nats: that is the whole gap.
    gap = logits.shape[0] * 1e-6 / math.log(19) + 1e-6
    close(impurity * scale, golden[f"impurity_k{k}"], gap, "impurity")
    close(uncertainty * scale, golden[f"uncertainty_k{k}"], gap, "uncertainty")
    close(score * scale**2, golden[f"score_k{k}"], 2 * gap, "score")
    assert torch.equal(A.entropy_and_prediction(logits)[1], torch.from_numpy(golden["pred"]))


@pytest.mark.parametrize("name,k", [("k8", 8), ("k32", 32)])
def test_pixel_score_equals_the_recorded_official_one(name, k):
    golden = np.load(GOLDEN / f"ripu_pixel_select_{name}.npz")
    logits = torch.from_numpy(golden["lowres_logits"])
    logits = F.interpolate(
        logits, size=tuple(golden["size"].tolist()), mode="bilinear", align_corners=True
    )[0]
    score = A.pixel_score(logits, k) * math.log(19) ** 2  # the official pixel score is in nats
    # 1e-6 in the logarithms, as above
    close(score[::3, ::3], golden["score_sub3"], 2 * 19e-6 * math.log(19), "pixel score")


def test_scores_of_a_map_one_can_do_by_hand():
    prediction = torch.zeros(5, 5, dtype=torch.long)
    prediction[2, 2] = 1
    share = torch.tensor([8 / 9, 1 / 9])
    centre = -(share * share.log()).sum().item() / math.log(2)
    impurity = A.region_impurity(prediction, 2, 1)
    close(impurity[1:4, 1:4], torch.full((3, 3), centre), 1e-6)
    # pure regions are exactly 0, none is negative
    assert impurity[0].max() == 0 and impurity[:, 0].max() == 0
    prob = torch.tensor([[[0.5, 1.0]], [[0.5, 0.0]]])
    close(A.pixel_entropy(prob), [[1.0, 0.0]], 1e-7)
    close(A.prediction_uncertainty(prob, 1), [[0.5, 0.5]], 1e-7)


def test_batches_types_and_inputs_left_alone():
    logits = torch.stack([random_logits(7, 20, 30, seed) for seed in range(3)])
    before = logits.clone()
    together = A.ripu_score(logits, 2)
    for n in range(3):
        for whole, single in zip(together, A.ripu_score(logits[n], 2), strict=True):
            close(whole[n], single, 1e-6)
    for half in (torch.float16, torch.bfloat16):
        expected = A.ripu_score(logits.to(half).float(), 2)[0]
        close(A.ripu_score(logits.to(half), 2)[0], expected, 1e-6, str(half))
        assert A.pixel_score(logits.to(half)).dtype == torch.float32
    close(A.entropy_score(logits, 1), A.prediction_uncertainty(logits.softmax(1), 1), 1e-6)
    best = logits.softmax(1).sort(1, descending=True).values
    close(A.margin_score(logits, 0), 1 - best[:, 0] + best[:, 1], 1e-6)
    assert torch.equal(logits, before)


def test_infinite_logits_are_probabilities_of_zero():
    logits = random_logits(4, 6, 6)
    logits[2] = -math.inf
    close(A.entropy_and_prediction(logits)[0], A.pixel_entropy(logits.softmax(0)), 1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_flip_equivariance_and_class_permutation(k):
    logits = random_logits(9, 24, 31)
    score = A.ripu_score(logits, k)[0]
    close(A.ripu_score(logits.flip(-1), k)[0].flip(-1), score, 1e-6, "flip")
    close(A.ripu_score(logits[torch.randperm(9)], k)[0], score, 1e-6, "permutation")


@pytest.mark.parametrize("k", [0, 1, 3, 32, 70])
def test_box_sum_equals_a_convolution(k):
    x = (torch.rand(2, 40, 55, generator=torch.Generator().manual_seed(k)) < 0.4).to(torch.uint8)
    expected = F.conv2d(
        x[:, None].double(), torch.ones(1, 1, 2 * k + 1, 2 * k + 1).double(), padding=k
    )[:, 0]
    assert torch.equal(A.box_sum(x, k).double(), expected)
    assert A.region_area((40, 55), k).max() <= (2 * k + 1) ** 2


def test_random_score_depends_on_the_seed_alone():
    assert torch.equal(A.random_score((4, 5), 1), A.random_score((4, 5), 1))
    assert not torch.equal(A.random_score((4, 5), 1), A.random_score((4, 5), 2))


# ------------------------------------------------------------------------------------------------------------ selection


def slow_greedy(score, count, radius, blocked=None):
    """The definition: the maximum of what is free, column by column, then block around it."""
    score = score.double().clone()
    score[score.isnan()] = -math.inf
    if blocked is not None:
        score[blocked] = -math.inf
    picks = []
    for _ in range(count):
        best = score.max()
        if best == -math.inf:
            break
        rows, cols = (score == best).nonzero(as_tuple=True)
        col = cols.min().item()
        row = rows[cols == col].min().item()
        picks.append([row, col])
        score[
            max(0, row - radius) : row + radius + 1, max(0, col - radius) : col + radius + 1
        ] = -math.inf
    return torch.tensor(picks, dtype=torch.int64).view(-1, 2)


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("kind", ["smooth", "noise", "ties", "constant", "holes"])
def test_selection_equals_the_sequential_greedy(radius, kind):
    generator = torch.Generator().manual_seed(radius)
    for height, width in ((30, 47), (1, 20), (19, 1)):
        noise = torch.rand(height, width, generator=generator)
        score = {
            "smooth": A.region_mean(noise, 2),
            "noise": noise,
            "ties": (noise * 4).floor(),
            "constant": torch.zeros(height, width),
            "holes": noise.masked_fill(noise < 0.3, -math.inf).masked_fill(noise > 0.9, math.nan),
        }[kind]
        blocked = torch.rand(height, width, generator=generator) < 0.2
        for count in (0, 1, 7, height * width):
            found = A.select_regions(score, count, radius, blocked)
            expected = slow_greedy(score, count, radius, blocked)
            assert torch.equal(found, expected), (kind, radius, count, found[:5], expected[:5])


def test_ties_go_to_the_smaller_column_then_the_smaller_row():
    score = torch.zeros(5, 6)
    score[3, 2] = score[1, 4] = score[4, 2] = 1
    assert A.select_regions(score, 4, 0).tolist() == [[3, 2], [4, 2], [1, 4], [0, 0]]


@pytest.mark.parametrize(
    "name", ["full_r022", "full_r20", "full_r20k2", "score_border", "score_exhaust", "score_ties"]
)
def test_region_picks_equal_the_recorded_official_ones(name):
    golden = np.load(GOLDEN / f"ripu_region_select_{name}.npz")
    k = int(golden["radius_k"])
    shape = tuple(golden["size"].tolist())
    blocked = torch.zeros(shape, dtype=torch.bool)
    selected = torch.zeros(shape, dtype=torch.bool)
    for number in (1, 2):
        key = f"score_round{number}"
        score = torch.from_numpy(golden[key] if key in golden else golden["score"])
        picks = golden[f"picks_round{number}"]
        # when all is blocked the official code picks (0, 0) again
        real = golden[f"pick_scores_round{number}"] > -math.inf
        found = A.select_regions(score, len(picks), 2 * k, blocked)
        assert found.tolist() == picks[real].tolist()
        painted = A.paint(found, k, shape)
        assert not (painted & selected).any()  # no pixel is asked twice
        selected |= painted
        blocked = A.dilate(selected, k)
        if real.all():  # else the official maps also hold the region around the repeated (0, 0)
            assert torch.equal(selected, torch.from_numpy(golden[f"selected_round{number}"]))
            assert torch.equal(blocked, torch.from_numpy(golden[f"active_round{number}"]))


def test_pixel_picks_equal_the_recorded_official_ones():
    golden = np.load(GOLDEN / "ripu_pixel_select_k8.npz")
    shape = tuple(golden["size"].tolist())
    logits = F.interpolate(
        torch.from_numpy(golden["lowres_logits"]), size=shape, mode="bilinear", align_corners=True
    )[0]
    score = A.pixel_score(logits, 8)
    first = A.select_regions(score, 21, 8)
    assert first.tolist() == golden["picks_round1"].tolist()
    blocked = A.dilate(A.paint(first, 0, shape), 8)
    assert A.select_regions(score, 21, 8, blocked).tolist() == golden["picks_round2"].tolist()


def test_selection_refuses_what_it_cannot_mean():
    for score, count, blocked in ((torch.zeros(2, 3, 4), 1, None), (torch.zeros(3, 4), -1, None),
                                  (torch.zeros(3, 4), 1, torch.zeros(4, 3, dtype=torch.bool))):  # fmt: skip
        with pytest.raises(ValueError, match=r"needs one \(H,W\) score"):
            A.select_regions(score, count, 1, blocked)
    assert len(A.select_regions(torch.full((3, 4), math.nan), 2, 1)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_region_mean_of_half_precision_sums_in_float32(dtype):
    values = torch.rand(80, 90, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, k = A.region_uncertainty(values, 32), 32
    expected = values[40 - k : 41 + k, 45 - k : 46 + k].double().mean().item()
    print(f"{dtype}: gap {abs(found[40, 45].item() - expected):.1e}")
    assert found.dtype == torch.float32 and found[40, 45].item() == pytest.approx(
        expected, abs=1e-6
    )


def test_paint_takes_integers_of_every_width():
    expected = A.paint(torch.tensor([[0, 0], [4, 5]]), 1, (5, 6))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(
            A.paint(torch.tensor([[0, 0], [4, 5]], dtype=dtype), 1, (5, 6)), expected
        )


def test_paint_cuts_at_the_border():
    mask = A.paint(torch.tensor([[0, 0], [4, 5]]), 1, (5, 6))
    assert mask.nonzero().tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
        [3, 4],
        [3, 5],
        [4, 4],
        [4, 5],
    ]
    assert A.paint(torch.empty(0, 2, dtype=torch.int64), 3, (5, 6)).sum() == 0


def test_regions_never_overlap_over_rounds_until_the_image_is_exhausted():
    score, selected = random_logits(1, 21, 33)[0], torch.zeros(21, 33, dtype=torch.bool)
    for _ in range(12):
        picks = A.select_regions(score, 20, 2, A.dilate(selected, 1))
        painted = A.paint(picks, 1, selected.shape)
        assert not (painted & selected).any()
        selected |= painted
    # nothing is left to ask, and asking is no error
    assert len(picks) == 0 and A.dilate(selected, 1).all()


# ------------------------------------------------------------------------------------------------------------------ CBDA


def test_class_weights_one_can_do_by_hand():
    assert A.class_weights(torch.zeros(4), 100).tolist() == [1, 1, 1, 1]
    # a fair share is 25
    close(A.class_weights(torch.tensor([0, 5, 25, 60]), 100), [1, 0.8, 0, 0], 1e-7)
    close(
        A.class_weights(torch.tensor([5, 5]), 20, torch.tensor([3.0, 1.0])), [1 - 5 / 15, 0], 1e-7
    )
    assert A.class_weights(torch.tensor([0, 0]), 20, torch.tensor([1.0, 0.0])).tolist() == [1, 0]
    for bad in (
        (torch.tensor([-1, 0]), 9, None),
        (torch.zeros(2), 0, None),
        (torch.zeros(2), 9, torch.zeros(2)),
    ):
        with pytest.raises(ValueError):
            A.class_weights(*bad)


def test_class_balanced_ranks_by_weight_times_score():
    score, prediction = (
        torch.tensor([[0.5, 0.2], [0.4, 1.0]]),
        torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8),
    )
    found = A.class_balanced(score, prediction, torch.tensor([1.0, 0.5, 0.0]))
    close(found, [[0.5, 0.1], [0.0, 0.0]], 1e-7)
    everyone = A.class_balanced(score, prediction, A.class_weights(torch.zeros(3), 9))
    assert torch.equal(everyone, score)


def stacked_greedy(scores: dict, count: int, radius: int) -> list:
    """The definition of CBDA's dynamic acquisition: the maximum of the stacked tensor, block around it, again.

    Images with equal maxima take turns: the one that has won fewest picks of this score, then the smaller id.
    """
    scores = {name: score.clone() for name, score in scores.items()}
    picks, won = [], {}
    for _ in range(count):
        best = max(score.max().item() for score in scores.values())
        if best == -math.inf:
            break
        tied = [n for n, score in scores.items() if score.max().item() == best]
        name = min(tied, key=lambda n: (won.get((n, best), 0), n))
        won[name, best] = won.get((name, best), 0) + 1
        row, col = slow_greedy(scores[name], 1, 0)[0].tolist()
        picks.append((name, row, col))
        scores[name][
            max(0, row - radius) : row + radius + 1, max(0, col - radius) : col + radius + 1
        ] = -math.inf
    return picks


def budgeted(scores: dict, count: int, radius: int, per_image: int = 10**6) -> A.GlobalBudget:
    budget = A.GlobalBudget(count)
    for name, score in scores.items():
        free = score.masked_fill(score < budget.floor, -math.inf)
        centres = A.select_regions(free, min(count, per_image), radius)
        budget.add(name, centres, score[centres[:, 0], centres[:, 1]])
    return budget


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("count", [0, 1, 13, 60, 5000])
def test_global_budget_equals_the_greedy_on_the_stacked_tensor(levels, count):
    generator = torch.Generator().manual_seed(count)
    names = [f"image{i}" for i in torch.randperm(9, generator=generator).tolist()]
    scores = {
        n: (torch.rand(14, 17, generator=generator) * levels).floor() - levels / 2 for n in names
    }
    budget = budgeted(scores, count, 1)
    found = budget.select()
    expected = stacked_greedy(scores, count, 1)
    for name in names:
        mine = [[row, col] for n, row, col in expected if n == name]
        assert found.get(name, torch.empty(0, 2)).tolist() == mine, name
    lowest = min((scores[n][row, col].item() for n, row, col in expected), default=None)
    assert budget.threshold == lowest


def test_global_budget_holds_no_more_than_twice_the_budget():
    generator = torch.Generator().manual_seed(0)
    budget, largest = A.GlobalBudget(200), 0
    for number in range(50):
        scores = torch.rand(150, generator=generator).sort(descending=True).values
        budget.add(number, torch.zeros(150, 2), scores)
        largest = max(largest, sum(len(values) for values, _ in budget.images.values()))
    assert largest <= 2 * 200 and sum(len(c) for c in budget.select().values()) == 200
    with pytest.raises(ValueError, match="added already"):
        budget.add(3, torch.zeros(0, 2), torch.zeros(0))
    for bad in (torch.tensor([0.1, 0.2]), torch.tensor([math.nan, 0.0]), torch.tensor([0.2])):
        with pytest.raises(ValueError, match="best first"):
            budget.add("new", torch.zeros(2, 2), bad)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_factors_of_picks_are_those_of_the_whole_map(k):
    """Also where a window leaves the image: why a place was asked is what ripu_score saw there."""
    torch.manual_seed(0)
    logits = torch.randn(5, 9, 12) * 3
    rows, cols = torch.meshgrid(torch.arange(9), torch.arange(12), indexing="ij")
    centres = torch.stack([rows.flatten(), cols.flatten()], 1)
    entropies, prediction = A.entropy_and_prediction(logits)
    maps = entropies, prediction, 5
    impurity, uncertainty = A.factors_at(centres, *maps, k)
    _, all_impurity, all_uncertainty = A.ripu_score(logits, k)
    assert (impurity.view(9, 12) - all_impurity).abs().max() < 1e-6
    assert (uncertainty.view(9, 12) - all_uncertainty).abs().max() < 1e-6
    assert torch.equal(prediction.long(), logits.argmax(0))
    _, own = A.factors_at(centres, *maps, k, unit="pixel")
    assert (own.view(9, 12) - A.pixel_entropy(logits.softmax(0))).abs().max() < 1e-6
    for radius in (k, 10**9):
        assert [len(x) for x in A.factors_at(centres[:0], *maps, radius)] == [0, 0]
    few = centres[[0, 50, 107]]  # windows that are smaller than the maps, and one that is not
    some, whole = A.factors_at(few, *maps, k), A.factors_at(few, *maps, 10**9)
    assert (some[0] - all_impurity.flatten()[[0, 50, 107]]).abs().max() < 1e-6
    assert (some[1] - all_uncertainty.flatten()[[0, 50, 107]]).abs().max() < 1e-6
    assert (whole[1] - A.pixel_entropy(logits.softmax(0)).mean()).abs().max() < 1e-6


def _share(rank: int, world: int, path: str, count: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world
    )
    scores = torch.load(f"{path}/scores.pt")
    budget = budgeted({name: scores[name] for name in list(scores)[rank::world]}, count, 1)
    torch.save((budget.select(), budget.threshold), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_picks_of_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    scores = {f"image{i}": (torch.rand(20, 30, generator=generator) * 40).floor() for i in range(7)}
    torch.save(scores, tmp_path / "scores.pt")
    # forked, not spawned: children that import torch anew take 10 s on a busy machine
    torch.multiprocessing.start_processes(
        _share, (2, str(tmp_path), 150), nprocs=2, start_method="fork"
    )
    (first, threshold), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = budgeted(scores, 150, 1)
    expected = alone.select()
    assert threshold == other == alone.threshold and not first.keys() & second.keys()
    assert {k: v.tolist() for k, v in (first | second).items()} == {
        k: v.tolist() for k, v in expected.items()
    }
