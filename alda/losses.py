"""What is minimised? One function for each loss.

    from alda.losses import cross_entropy, local_consistency, negative_learning

RIPU: Xie et al., arXiv 2111.12940 (Eqs. 6-9).

Axes: N images, C classes, H rows, W columns. Logits (N,C,H,W) float, labels (N,H,W) integer train ids with 255 = ignore.
Every loss is a scalar; a loss over an empty set of pixels is 0 with zero gradient, never NaN.
"""

import torch
import torch.nn.functional as F

IGNORE = 255


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log p_label over the labelled pixels (RIPU Eq. (6)); 0 where no pixel has a label."""
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def local_consistency(
    logits: torch.Tensor, labels: torch.Tensor, boundary_only: bool = False, distance: str = "l1"
) -> torch.Tensor:
    """Distance between a pixel's prediction p and the mean m over its 3x3 neighbourhood (RIPU Eq. (7)).

    `boundary_only=False` (`--rules paper`, default): the mean over all pixels, as the equation sums them; labels are not
    read. `boundary_only=True` (`--rules code`): the mean over labelled pixels where the label changes, the official code's
    rule. `distance`: "l1" is sum_c |p_c - m_c|, "kl" is sum_c p_c log(p_c / m_c). The image border repeats its pixels.
    """
    prob = logits.float().softmax(1)
    mean = F.avg_pool2d(F.pad(prob, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    if distance == "l1":
        gap = (prob - mean).abs().sum(1)  # (N,C,H,W) -> (N,H,W)
    elif distance == "kl":
        gap = F.kl_div((mean + 1e-6).log(), prob, reduction="none").sum(1)
    else:
        raise ValueError(f"distance must be 'l1' or 'kl', got {distance!r}")
    if not boundary_only:
        return gap.mean()
    mask = label_boundary(labels)
    return (gap * mask).sum() / mask.sum().clamp(min=1)


def label_boundary(labels: torch.Tensor) -> torch.Tensor:
    """The official code's label changes: labelled pixels where the 3x3 Laplacian of the ids is not 0, (N,H,W) -> bool.

    Zeros stand beyond the border, so border pixels count unless they are road (0), and neighbours that differ may cancel:
    kept as it is, because the published numbers were made with it.
    """
    ids = labels.float()
    neighbours = F.avg_pool2d(ids[:, None], 3, stride=1, padding=1, divisor_override=1)[
        :, 0
    ]  # sum of 3x3, centre included
    return (9 * ids != neighbours) & (labels != IGNORE)


def negative_learning(prob: torch.Tensor, threshold: float = 0.05) -> torch.Tensor:
    """Mean of -log(1 - p) over the entries with p < threshold (RIPU Eq. (8)): prob (N,C,H,W) -> scalar.

    The threshold decides which entries count and carries no gradient.
    """
    unlikely = prob.detach() < threshold
    return -(torch.log1p(-prob.float().clamp(max=threshold)) * unlikely).sum() / unlikely.sum().clamp(min=1)
