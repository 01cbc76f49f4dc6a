"""CBST against slow loops, exact ranks and the recorded outputs of the official CRST and CBST code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_losses import close

from alda import selftraining as B
from alda.settings import settings_for

GOLDEN = Path(__file__).parent / "golden"
BOUND = 5e-4  # what the docstring promises; the task allows 1e-3


def maps(images=3, classes=6, height=41, width=70, seed=0, sharp=3.0):
    """Smooth probability maps as a network gives them; 41 rows: two strips, the last one short."""
    logits = sharp * torch.randn(
        images, classes, 7, 11, generator=torch.Generator().manual_seed(seed)
    )
    return F.interpolate(logits, size=(height, width), mode="bilinear").softmax(1)


def ranked(confidence, prediction, classes, portion, balanced=True, zeros=0):
    """The exact rule, by sorting all confidences: what the histogram stands for. `zeros` are added to each class's n."""
    groups = (
        [confidence[prediction == c] for c in range(classes)]
        if balanced
        else [confidence] * classes
    )
    result = torch.ones(classes)
    for c, values in enumerate(groups):
        rank = math.floor(portion * (len(values) + zeros)) if len(values) else 0
        if rank > 0:
            result[c] = values.sort(descending=True).values[rank - 1]
    return result


def exact(probs, portion, balanced=True, prior=None, stride=1, zeros=0):
    """The exact rule over images; every `stride`-th value of each image and class."""
    confidence, prediction = [], []
    for prob in probs:
        value, best = (prob.float() if prior is None else prob.float() * prior).max(0)
        for c in range(len(prob)):
            chosen = value[best == c][::stride]
            confidence.append(chosen)
            prediction.append(torch.full_like(chosen, c))
    return ranked(
        torch.cat(confidence), torch.cat(prediction), len(probs[0]), portion, balanced, zeros
    )


def from_confidences(values, classes=3, seed=0):
    """Maps (C,1,n) that are predicted as random classes with exactly these confidences."""
    values = torch.as_tensor(values, dtype=torch.float32)
    prediction = torch.randint(classes, values.shape, generator=torch.Generator().manual_seed(seed))
    prob = torch.zeros(classes, len(values)).scatter_(0, prediction[None], values[None])
    return prob[:, None], values, prediction


@pytest.fixture(scope="module")
def official():
    """Recorded probabilities (N,C,H,W), the priors of the MXNet record, and both records."""
    crst, mxnet = np.load(GOLDEN / "cbst_crst.npz"), np.load(GOLDEN / "cbst_mxnet_prior.npz")
    prob = torch.from_numpy(crst["prob"].transpose(0, 3, 1, 2).copy())
    return prob, torch.from_numpy(mxnet["prior"]), crst, mxnet


# ------------------------------------------------------------------------------------------- the official code's outputs


@pytest.mark.parametrize("percent", [20, 35, 50])
def test_thresholds_equal_the_recorded_ones_of_crst(official, percent):
    prob, _, crst, _ = official
    histogram = B.ConfidenceHistogram(19)
    for image in prob:
        histogram.add(image, stride=4)
    assert histogram.counts.sum(1).tolist() == crst["conf_count_after_ds4"].tolist()
    assert histogram.predicted.tolist() == crst["pred_cls_num"].tolist()
    found = histogram.thresholds(percent / 100)
    close(found, crst[f"cls_thresh_p{percent}"], BOUND, f"CRST p={percent} %")
    close(B.cbst_thresholds(prob, percent / 100, stride=4), found, 0)
    close(
        exact(prob, percent / 100, stride=4),
        crst[f"cls_thresh_p{percent}"],
        0,
        "our exact reference",
    )


@pytest.mark.parametrize("percent", [20, 35, 50])
def test_pseudo_labels_equal_the_recorded_ones_of_crst(official, percent):
    prob, _, crst, _ = official
    thresholds = torch.from_numpy(crst[f"cls_thresh_p{percent}"])
    recorded = torch.from_numpy(crst[f"pseudo_trainIDs_p{percent}"])
    assert torch.equal(B.cbst_pseudo_labels(prob, thresholds, rules="code"), recorded)
    paper = B.cbst_pseudo_labels(prob, thresholds)
    at_threshold = (prob / thresholds[:, None, None]).amax(1) == 1
    print(f"p={percent} %: {int((paper != recorded).sum())} pixels sit exactly on a threshold")
    assert at_threshold.any() and (paper[at_threshold] == 255).all()
    assert torch.equal(paper[~at_threshold], recorded[~at_threshold])
    own = B.cbst_pseudo_labels(prob, B.cbst_thresholds(prob, percent / 100, stride=4), rules="code")
    assert (
        own == recorded
    ).float().mean() > 0.995  # our thresholds are within the bound, so nearly all labels agree


@pytest.mark.parametrize("policy", ["cb", "global"])
@pytest.mark.parametrize("with_prior", [False, True])
def test_thresholds_and_labels_equal_the_recorded_ones_of_cbst_with_and_without_prior(
    official, policy, with_prior
):
    prob, prior, crst, mxnet = official
    prior, name = prior if with_prior else None, f"{policy}_prior{with_prior}"
    recorded = torch.from_numpy(mxnet[f"cls_thresh_{name}"]).float()
    recorded[recorded == 0] = 1.0  # as the official code does before it labels
    balanced = policy == "cb"
    # C1, a plain bug that alda does not reproduce: every official class array starts with a 0.0, the global one with one
    # more. The exact reference with those zeros is the record, bit for bit; ours is the exact rank without them.
    close(
        exact(prob, 0.2, balanced, prior, 4, zeros=1 if balanced else 20),
        recorded,
        0,
        f"{name}, reference with C1",
    )
    found, reference = (
        B.cbst_thresholds(prob, 0.2, balanced, prior, stride=4),
        exact(prob, 0.2, balanced, prior, 4),
    )
    close(found, reference, BOUND, f"{name}, C1 left out")
    same = reference == recorded
    print(
        f"{name}: C1 moves {int((~same).sum())} thresholds; elsewhere the gap to the record is below"
    )
    if same.any():
        close(found[same], recorded[same], BOUND, name)
    to_class = torch.full((256,), 255, dtype=torch.uint8)
    to_class[torch.from_numpy(crst["id_2_label"])] = torch.arange(19, dtype=torch.uint8)
    labels = to_class[torch.from_numpy(mxnet[f"pseudo_labelIDs_{name}"]).long()]
    assert torch.equal(B.cbst_pseudo_labels(prob, recorded, prior, rules="code"), labels)
    weighted = (prob if prior is None else prob * prior) / recorded[:, None, None]
    paper = labels.masked_fill(weighted.amax(1) == 1, 255)
    assert torch.equal(B.cbst_pseudo_labels(prob, recorded, prior), paper)


def test_rare_classes_equal_the_recorded_ones(official):
    _, _, crst, mxnet = official
    under, rarest = B.rare_classes(torch.from_numpy(crst["pred_cls_num"]))
    assert (under, rarest) == (crst["mine_id"].tolist(), crst["rare_id"].tolist())
    for name in ("cb_priorTrue", "cb_priorFalse", "global_priorTrue", "global_priorFalse"):
        under, rarest = B.rare_classes(torch.from_numpy(mxnet[f"cls_size_{name}"]))
        assert sorted(under) == mxnet[f"mine_id_priority_{name}"].tolist()
        assert rarest == mxnet[f"mine_id_{name}"].tolist()


def test_schedules_equal_the_recorded_ones(official):
    *_, crst, _ = official
    rounds, s = range(10), settings_for({"strategy": "cbst"})
    of_source = s.source_portion, s.source_portion_step, s.source_portion_max
    ours = [B.portion_of_round(r, s.portion, s.portion_step, s.portion_max) for r in rounds]
    close(ours, crst["crst_schedule_tgt_src"][:, 0], 1e-9, "target portion")
    source_ours = [B.portion_of_round(r, *of_source) for r in rounds]
    close(source_ours, crst["crst_schedule_tgt_src"][:, 1], 1e-9, "source portion")
    assert B.portion_of_round(12, *of_source) == B.portion_of_round(99, *of_source) == 0.06
    target, source, rate = crst["mxnet_schedule_tgt_src_lr"].T
    ours = np.array([B.portion_of_round(r, 0.15, s.portion_step, s.portion_max) for r in rounds])
    # C5: from the 9th round on the official loop has passed its maximum of 0.5 by float rounding; ours stays. (C6, one
    # round fewer than asked for, is a bug of CRST's main loop and has no counterpart here.)
    close(ours[:8], target[:8], 1e-9, "target portion from 15 %")
    assert (target[8:] > 0.54).all() and (ours[8:] == 0.5).all()
    close(source_ours, source, 1e-9, "source portion, MXNet")
    close([1e-4 * B.cbst_rate(r) for r in rounds], rate, 1e-12, "learning rate")


# ----------------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("stride", [1, 4])
def test_streaming_equals_the_exact_rank_within_the_bound(balanced, stride):
    probs, prior = maps(), torch.rand(6, 41, 70, generator=torch.Generator().manual_seed(1))
    for portion in (0.0, 0.003, 0.2, 0.5, 0.99, 1.0):
        for q in (None, prior, 1e-3 * prior):
            found = B.cbst_thresholds(probs, portion, balanced, q, stride)
            close(found, exact(probs, portion, balanced, q, stride), BOUND, f"portion {portion}")
            assert found.dtype == torch.float32 and found.shape == (6,)
    assert (found > 0).all()


@pytest.mark.parametrize(
    "values",
    [
        [0.75] * 500,  # constant
        [1.0] * 300 + [0.5] * 300,  # saturated
        [0.5, 0.75],  # fewer values than ranks
        [0.5 + 2.0**-24 * (i % 3) for i in range(900)],  # neighbouring floats
        np.linspace(0.34, 1, 5000),
        0.5 + 2.0**-11 * (np.arange(4000) % 7) - 1e-7,  # on both sides of the bins' edges
        1 - np.logspace(-7, -1, 3000),
        np.logspace(-5.9, 0, 3000),  # small values, as a prior makes them
    ],
    ids=["constant", "saturated", "few", "neighbours", "even", "edges", "near-one", "small"],
)
@pytest.mark.parametrize("balanced", [True, False])
def test_adversarial_confidences(values, balanced):
    prob, confidence, prediction = from_confidences(values)
    for portion in (0.001, 0.2, 0.35, 0.5, 0.999, 1.0):
        found = B.cbst_thresholds([prob], portion, balanced)
        expected = ranked(confidence, prediction, 3, portion, balanced)
        close(found, expected, BOUND, f"portion {portion}")
        assert ((found - expected).abs() <= 1e-3 * expected).all()
        if len(set(confidence.tolist())) < 3:
            assert torch.equal(found, expected)  # ties are exact


def test_thresholds_of_a_hand_made_set():
    prob, *_ = from_confidences(torch.arange(1, 11) / 16, classes=1)
    assert B.cbst_thresholds([prob], 0.35).tolist() == [8 / 16]  # 10 values: the 3rd highest
    assert B.cbst_thresholds([prob], 0.09).tolist() == [1]  # no first rank: nothing is selected
    prob, *_ = from_confidences([0.5] * 8, classes=1)
    absent = torch.cat([prob, torch.zeros(2, 1, 8)])
    assert B.cbst_thresholds([absent], 0.5).tolist() == [0.5, 1, 1]
    assert B.cbst_thresholds([absent], 0.5, balanced=False).tolist() == [0.5, 0.5, 0.5]
    assert (B.cbst_pseudo_labels(absent, torch.tensor([0.4, 1, 1])) == 0).all()


def test_the_order_of_the_images_and_their_cutting_do_not_change_a_bit():
    probs = [*maps(images=5, seed=3), *maps(images=2, height=30, width=33, seed=4)]
    thresholds = B.cbst_thresholds(probs, 0.2)
    assert torch.equal(B.cbst_thresholds(probs[::-1], 0.2), thresholds)
    assert torch.equal(
        B.cbst_thresholds((half for p in probs for half in p.split(17, 2)), 0.2), thresholds
    )
    first, second = B.ConfidenceHistogram(6), B.ConfidenceHistogram(6)
    for i, prob in enumerate(probs):
        (first, second)[i % 2].add(prob)
    for name in ("counts", "rest", "predicted"):  # histograms of several processes add up
        getattr(first, name).add_(getattr(second, name))
    assert torch.equal(first.thresholds(0.2), thresholds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_probabilities(dtype):
    probs = maps().to(dtype)
    before = probs.clone()
    thresholds = B.cbst_thresholds(probs, 0.2)
    close(thresholds, exact(probs, 0.2), BOUND, str(dtype))
    assert torch.equal(
        B.cbst_pseudo_labels(probs, thresholds), B.cbst_pseudo_labels(probs.float(), thresholds)
    )
    assert torch.equal(probs, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_results_stay_on_the_gpu_and_equal_those_of_the_cpu():
    probs, prior = maps().cuda(), torch.rand(6, 41, 70).cuda()
    thresholds = B.cbst_thresholds(probs, 0.2, prior=prior, stride=4)
    labels = B.cbst_pseudo_labels(probs, thresholds, prior)
    assert thresholds.is_cuda and labels.is_cuda
    assert torch.equal(
        thresholds.cpu(), B.cbst_thresholds(probs.cpu(), 0.2, prior=prior.cpu(), stride=4)
    )
    assert torch.equal(
        labels.cpu(), B.cbst_pseudo_labels(probs.cpu(), thresholds.cpu(), prior.cpu())
    )


def test_wrong_calls_are_errors():
    prob = maps()[0]
    ones = torch.ones(6)
    for call, words in [
        (lambda: B.cbst_thresholds([], 0.2), "no probability maps"),
        (lambda: B.cbst_thresholds([prob], 1.2), "portion"),
        (lambda: B.cbst_thresholds([prob.log()+ 5], 0.2), "softmax"),
        (lambda: B.cbst_thresholds([prob * math.nan], 0.2), "softmax"),
        (lambda: B.cbst_thresholds([prob, prob[:5]], 0.2), r"\(6,H,W\)"),
        (lambda: B.cbst_thresholds([prob], 0.2, prior=prob[:, 1:]), "prior"),
        (lambda: B.cbst_thresholds([prob], 0.2, stride=0), "stride"),
        (lambda: B.ConfidenceHistogram(256), "classes"),
        (lambda: B.cbst_pseudo_labels(prob, ones[:5]), "6 thresholds"),
        (lambda: B.cbst_pseudo_labels(prob, ones * 0), "above 0"),
        (lambda: B.cbst_pseudo_labels(prob, ones, rules="mine"), "'paper' or 'code'"),
        (lambda: B.spatial_prior([], 6, (4, 4)), "no source label"),
        (lambda: B.spatial_prior([torch.full((4, 4), 255)], 6, (4, 4)), "no source label"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


# -------------------------------------------------------------------------------------------------------- pseudo-labels


@pytest.mark.parametrize("rules", ["paper", "code"])
def test_pseudo_labels_equal_a_slow_loop(rules):
    prob, prior = maps(images=2, height=9, width=8, seed=5), torch.rand(6, 9, 8)
    thresholds = torch.rand(6) * 0.5 + 0.1
    thresholds[2] = prob[0, 2, 3, 3] * prior[2, 3, 3]  # one pixel exactly on it
    labels = B.cbst_pseudo_labels(prob, thresholds, prior, rules)
    assert labels.shape == (2, 9, 8) and labels.dtype == torch.uint8
    for n in range(2):
        assert torch.equal(B.cbst_pseudo_labels(prob[n], thresholds, prior, rules), labels[n])
        for i in range(9):
            for j in range(8):
                ratio = [float(prob[n, c, i, j] * prior[c, i, j] / thresholds[c]) for c in range(6)]
                best = max(range(6), key=lambda c: ratio[c])
                chosen = ratio[best] > 1 if rules == "paper" else ratio[best] >= 1
                assert labels[n, i, j] == (best if chosen else 255)


def test_balanced_thresholds_label_a_portion_of_every_class_and_one_threshold_does_not():
    probs = maps(images=4, height=64, width=64, seed=6)
    probs[:, 5] *= 0.3  # a timid class
    share = {}
    for balanced in (True, False):
        thresholds = B.cbst_thresholds(probs, 0.3, balanced)
        labels, prediction = B.cbst_pseudo_labels(probs, thresholds), probs.argmax(1)
        share[balanced] = torch.stack(
            [(labels[prediction == c] == c).float().mean() for c in range(6)]
        )
        if not balanced:
            assert abs(float((labels != 255).float().mean()) - 0.3) < 2e-3
    # reweighting gives some pixels to other classes
    assert ((share[True] - 0.3).abs() < 2e-2).all()
    assert share[False][5] == 0


def test_a_saturated_class_is_labelled_by_the_code_and_not_by_the_paper():
    prob = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 8, 8)
    thresholds = B.cbst_thresholds([prob], 0.2)
    assert thresholds.tolist() == [1, 1]
    assert (B.cbst_pseudo_labels(prob, thresholds) == 255).all()
    assert (B.cbst_pseudo_labels(prob, thresholds, rules="code") == 0).all()


def test_statistics_equal_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    pseudo, truth = (
        torch.randint(5, (2, 6, 7), generator=generator).to(torch.uint8) for _ in range(2)
    )
    pseudo[pseudo == 4], truth[truth == 4] = 255, 255
    expected = {name: [0] * 4 for name in ("labelled", "judged", "correct", "truth", "covered")}
    for p, t in zip(pseudo.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if p != 255:
            expected["labelled"][p] += 1
            expected["judged"][p] += t != 255
            expected["correct"][p] += t == p
        if t != 255:
            expected["truth"][t] += 1
            expected["covered"][t] += p != 255
    found = B.pseudo_label_statistics(pseudo, truth, 4)
    assert {name: counter.tolist() for name, counter in found.items()} == expected


# ------------------------------------------------------------------------------------------------------- spatial priors


def test_spatial_prior_equals_a_slow_loop():
    generator, size, sigma = torch.Generator().manual_seed(2), (6, 9), 1.3
    labels = [torch.randint(5, (12, 27), generator=generator).to(torch.uint8) for _ in range(3)]
    for label in labels:
        label[label == 4] = 255
        label[:, 20:][label[:, 20:] == 1] = 0  # class 1 stays left

    def weight(a, b):
        return math.exp(-((a - b) ** 2) / (2 * sigma**2)) if abs(a - b) <= 3 * sigma else 0.0

    share = torch.zeros(4, *size).double()
    for i in range(size[0]):
        for j in range(size[1]):
            known = 0.0
            for y in range(size[0]):
                for x in range(size[1]):
                    for label in labels:
                        c = label[(2 * y + 1) * 12 // 12, (2 * x + 1) * 27 // 18].item()
                        if c != 255:
                            share[c, i, j] += weight(i, y) * weight(j, x)
                            known += weight(i, y) * weight(j, x)
            share[:, i, j] /= known
    expected = share / share.sum((1, 2), keepdim=True)
    # The blur's weights sum to 1 in every row and column, so the border factors cancel in the share.
    close(B.spatial_prior(iter(labels), 4, size, sigma), expected / expected.max(), 1e-6, "prior")


def test_spatial_prior_of_a_hand_made_world():
    sky_over_road = torch.zeros(64, 128, dtype=torch.uint8)
    sky_over_road[:16] = 1
    prior = B.spatial_prior([sky_over_road], 3, (64, 128), sigma=0)
    assert prior.max() == 1 and (prior[2] == 0).all()  # a class without labels: 0 everywhere
    assert (prior[1, :16] == 1).all() and (prior[1, 16:] == 0).all()
    close(
        prior[0, 16:],
        torch.full((48, 128), 1 / 3),
        1e-6,
        "a class spread over three times the place",
    )
    blurred = B.spatial_prior([sky_over_road], 3, (64, 128))
    assert 0 < blurred[1, 17, 5] < blurred[1, 14, 5] and (blurred[1, 30:] == 0).all()
    close(
        blurred[:2].sum((1, 2)) / blurred[0].sum(),
        torch.ones(2),
        1e-5,
        "both classes sum to the same",
    )


def test_a_constant_factor_of_the_prior_changes_no_pseudo_label():
    probs = maps(seed=8)
    prior = torch.rand(6, 41, 70, generator=torch.Generator().manual_seed(9))
    labels = [
        B.cbst_pseudo_labels(probs, B.cbst_thresholds(probs, 0.2, prior=q), q)
        for q in (prior, prior / 64, prior / 1024)
    ]
    assert (
        torch.equal(labels[0], labels[1])
        and torch.equal(labels[0], labels[2])
        and (labels[0] != 255).any()
    )


def test_places_where_the_prior_allows_nothing_are_not_counted():
    probs, prior = maps(), torch.ones(6, 41, 70)
    prior[:, :20] = 0
    close(B.cbst_thresholds(probs, 0.2, prior=prior), B.cbst_thresholds(probs[:, :, 20:], 0.2), 0)
    assert (B.cbst_pseudo_labels(probs, torch.full((6,), 0.01), prior)[:, :20] == 255).all()


# --------------------------------------------------------------------------------------------------------- patch mining


def test_rare_classes_by_hand():
    counts = torch.tensor([5000, 0, 3, 4000, 2, 3000])
    assert B.rare_classes(counts) == ([1, 4, 2], [1, 4, 2])
    assert B.rare_classes(counts, number=1, share=2e-4) == ([1, 4], [1])
    assert B.rare_classes(torch.tensor([7, 7, 7, 7])) == ([], [0, 1, 2])
    assert B.rare_classes(torch.zeros(4))[1] == [0, 1, 2]


def test_mined_patches_hold_the_rare_class_and_lie_in_the_image():
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    labels[0, 0], labels[39, 59], labels[20, 30], labels[5, 5] = 3, 3, 4, 255
    generator, found = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        top, left = B.mine_patch(labels, ([7], [3, 4]), (10, 16), generator, chance=1)
        assert 0 <= top <= 30 and 0 <= left <= 44
        patch = labels[top : top + 10, left : left + 16]
        assert (patch == 3).any() or (patch == 4).any()
        found.add((top, left))
    assert found == {(0, 0), (30, 44), (15, 22)}  # centred on the pixel, moved into the image
    first = {B.mine_patch(labels, ([4], [3]), (10, 16), generator, chance=1) for _ in range(20)}
    assert first == {(15, 22)}  # the first group goes before the second
    # smaller than the crop
    assert B.mine_patch(labels, ([3], []), (50, 16), generator, chance=1)[0] == 0


def test_mining_follows_its_chance_and_its_generator():
    labels = torch.tensor([[1, 0], [0, 0]], dtype=torch.uint8)
    draws = [
        [B.mine_patch(labels, ([1], []), (1, 1), generator) for _ in range(500)]
        for generator in (torch.Generator().manual_seed(7), torch.Generator().manual_seed(7))
    ]
    assert draws[0] == draws[1] and 360 < sum(d is not None for d in draws[0]) < 440
    # no rare class in this image
    assert B.mine_patch(labels, ([5], [6]), (1, 1), torch.Generator(), chance=1) is None
    assert B.mine_patch(labels, ([], []), (1, 1), torch.Generator(), chance=1) is None
    assert (
        B.mine_patch(torch.full((2, 2), 255), ([255], []), (1, 1), torch.Generator(), chance=1)
        is None
    )
