"""Losses against slow loops and the recorded values and gradients of RIPU's official code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from alda import losses as L

GOLDEN = Path(__file__).parent / "golden"


def close(found, expected, tolerance, what=""):
    """Prints the largest gap of two tensors, arrays or lists, and fails where it is above `tolerance`."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    gap = (found - expected).abs()
    print(f"{what}: max gap {gap.max():.2e}, mean {gap.mean():.2e}")
    assert gap.max() <= tolerance, (
        f"{what}: max gap {gap.max():.3e} mean {gap.mean():.3e}, allowed {tolerance}"
    )


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "ripu_losses.npz")


@pytest.fixture
def inputs(golden):
    return torch.from_numpy(golden["logits"].astype(np.float32)).requires_grad_(), torch.from_numpy(
        golden["labels"]
    )


@pytest.mark.parametrize("distance", ["l1", "kl"])
def test_local_consistency_equals_the_recorded_official_one(golden, inputs, distance):
    logits, labels = inputs
    loss = L.local_consistency(logits, labels, boundary_only=True, distance=distance)
    (gradient,) = torch.autograd.grad(loss, logits)
    # the official KL adds 1e-6 in its logarithms
    close(loss.item(), golden[f"loss_{distance}"], 2e-6, distance)
    close(gradient, golden[f"grad_{distance}"], 1e-9, f"gradient {distance}")
    assert torch.equal(L.label_boundary(labels), torch.from_numpy(golden["boundary_mask"]))
    all5 = torch.full((1, *labels.shape[1:]), 5, dtype=torch.uint8)
    assert torch.equal(
        L.label_boundary(all5)[0], torch.from_numpy(golden["boundary_all5_label"])[0]
    )


def test_kl_has_a_gradient_where_a_class_has_probability_0():
    logits = torch.tensor([200.0, 0.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 4, 4).requires_grad_()
    loss = L.local_consistency(logits, torch.zeros(1, 4, 4, dtype=torch.uint8), distance="kl")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(0, abs=2e-6) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_of_half_precision_sums_in_float32(dtype):
    """51,200 pixels: their sum is beyond float16, and in bfloat16 a step of it is 1,024."""
    logits = 3 * torch.randn(2, 19, 160, 160, generator=torch.Generator().manual_seed(0))
    logits, labels = logits.to(dtype), torch.zeros(2, 160, 160, dtype=torch.uint8)
    loss = L.cross_entropy(logits, labels)
    expected = -logits.double().log_softmax(1)[:, 0].mean()
    assert loss.dtype == torch.float32
    close(loss, expected, 2e-6, f"cross-entropy of {dtype}")


def test_negative_learning_equals_the_recorded_official_one(golden, inputs):
    logits, _ = inputs
    loss = L.negative_learning(logits.softmax(1))
    (gradient,) = torch.autograd.grad(loss, logits)
    # the official code adds 1e-6 in the logarithm
    close(loss.item(), golden["neg_loss"], 2e-6, "negative")
    close(gradient, golden["neg_grad"], 1e-9, "gradient")


def test_local_consistency_over_all_pixels_equals_a_slow_loop(inputs):
    logits, labels = inputs
    prob = logits.detach().double().softmax(1)
    n, _, height, width = prob.shape
    total = 0.0
    for b in range(n):
        for i in range(height):
            for j in range(width):
                rows = [min(max(i + d, 0), height - 1) for d in (-1, 0, 1)]
                cols = [min(max(j + d, 0), width - 1) for d in (-1, 0, 1)]
                mean = sum(prob[b, :, r, c] for r in rows for c in cols) / 9
                total += (prob[b, :, i, j] - mean).abs().sum().item()
    close(L.local_consistency(logits, labels).item(), total / (n * height * width), 1e-6)


def test_negative_learning_equals_a_slow_loop():
    prob = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    low = [p for p in prob.flatten().tolist() if p < 0.18]
    close(L.negative_learning(prob, 0.18).item(), -np.mean(np.log1p(-np.array(low))), 1e-7)


def test_empty_masks_give_zero_with_zero_gradient(inputs):
    logits, labels = inputs
    nothing = torch.full_like(labels, 255)
    for loss in (
        L.cross_entropy(logits, nothing),
        L.local_consistency(
            logits, torch.zeros_like(labels), boundary_only=True
        ),  # the official code gives NaN here
        L.local_consistency(logits, nothing, boundary_only=True),
        L.negative_learning(logits.softmax(1), threshold=0.0),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and gradient.abs().max() == 0


def test_cross_entropy_is_torchs_mean_over_labelled_pixels(inputs):
    logits, labels = inputs
    labels = labels.clone()
    labels[0, :5] = 255
    close(
        L.cross_entropy(logits, labels).item(),
        torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=255).item(),
        1e-6,
    )


def test_an_unknown_distance_is_an_error(inputs):
    with pytest.raises(ValueError, match="'l1' or 'kl'"):
        L.local_consistency(*inputs, distance="l2")
