"""Which pixels do we ask for? Scores and selection under a budget: pure tensor functions, no files.

    from alda.acquisition import ripu_score, select_regions, paint
    score, impurity, uncertainty = ripu_score(logits, k=1)          # logits (C,H,W) -> three (H,W) maps in [0,1]
    centres = select_regions(score, count=1026, block_radius=2)      # (n,2) int64 rows and columns, best first
    asked = paint(centres, radius=1, shape=score.shape)              # (H,W) bool

RIPU: Xie et al., arXiv 2111.12940 (Eqs. 3-5).

Axes: N images (optional), C classes, H rows, W columns. p is the softmax of the logits, y the argmax; k is the region's
radius: N_k(i) is the (2k+1) x (2k+1) square around pixel i, cut at the image border. Scores take float32, float16 or
bfloat16 on any device, compute in float32, and leave their inputs unchanged.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

ROWS = 32  # rows of logits worked on at a time: the temporaries of a strip stay in the cache (CPU) and small (GPU)


# --------------------------------------------------------------------------------------------------------------- scores


def pixel_entropy(prob: torch.Tensor) -> torch.Tensor:
    """Entropy of each pixel's prediction over log C, so in [0,1]: (C,H,W) or (N,C,H,W) -> (H,W) or (N,H,W) float32.

    RIPU Eq. (4), the inner term: H = -sum_c p_c log p_c. A probability of 0 contributes 0.
    """
    return torch.special.entr(prob.float()).sum(-3) / math.log(prob.shape[-3])


def region_impurity(prediction: torch.Tensor, num_classes: int, k: int = 1) -> torch.Tensor:
    """Entropy of the class histogram of each region over log C: (H,W) or (N,H,W) integer -> the same shape, float32.

    RIPU Eq. (3): P(i) = -sum_c f_c log f_c with f_c the share of N_k(i) that is predicted as c. With n_c the counts and
    n = |N_k(i)| this is log n - (1/n) sum_c n_c log n_c, summed one class at a time: no one-hot of C full planes.
    """
    area = region_area(prediction.shape[-2:], k, prediction.device)
    total = torch.zeros(prediction.shape, device=prediction.device)
    for c in range(num_classes):
        count = box_sum((prediction == c).to(torch.uint8), k).float()
        total += torch.xlogy(count, count)
    return ((area.log() - total / area) / math.log(num_classes)).clamp_(min=0)  # a pure region is 0, not -1e-8


def prediction_uncertainty(prob: torch.Tensor, k: int = 1) -> torch.Tensor:
    """Mean pixel entropy of each region, RIPU Eq. (4): (C,H,W) or (N,C,H,W) -> (H,W) or (N,H,W) float32 in [0,1]."""
    return region_mean(pixel_entropy(prob), k)


def ripu_score(logits: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RIPU's region score, Eq. (5): A = P * U. Returns (score, impurity, uncertainty), each (H,W) or (N,H,W) float32.

    `logits` (C,H,W) or (N,C,H,W). The softmax is never stored whole: strips of rows give the entropy and the argmax.
    Both factors are divided by log C (the official code writes log 19 for any C): a constant, ranks are unchanged.
    """
    entropy, prediction = entropy_and_prediction(logits)
    impurity = region_impurity(prediction, logits.shape[-3], k)
    uncertainty = region_mean(entropy, k)
    return impurity * uncertainty, impurity, uncertainty


def pixel_score(logits: torch.Tensor, k: int = 32) -> torch.Tensor:
    """RIPU's score for pixel queries (PA): impurity of the (2k+1)^2 region times the pixel's own entropy, not a mean.

    `logits` (C,H,W) or (N,C,H,W) -> (H,W) or (N,H,W) float32 in [0,1].
    """
    entropy, prediction = entropy_and_prediction(logits)
    return region_impurity(prediction, logits.shape[-3], k) * entropy


def entropy_score(logits: torch.Tensor, k: int = 1) -> torch.Tensor:
    """The baseline `entropy`: the mean pixel entropy of the region alone (Eq. 4), (C,H,W) -> (H,W) float32 in [0,1]."""
    return region_mean(entropy_and_prediction(logits)[0], k)


def margin_score(logits: torch.Tensor, k: int = 1) -> torch.Tensor:
    """The baseline `margin`: region mean of 1 - (p_1st - p_2nd), (C,H,W) or (N,C,H,W) -> (H,W) or (N,H,W) in [0,1]."""
    best = torch.cat([strip.float().softmax(-3).topk(2, dim=-3).values for strip in logits.split(ROWS, dim=-2)], dim=-2)
    return region_mean(1 - (best.select(-3, 0) - best.select(-3, 1)), k)


def random_score(shape: tuple[int, int], seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The baseline `random`: uniform noise in [0,1), (H,W) float32, the same for a seed on every device."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def entropy_and_prediction(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel entropy over log C (float32) and argmax (uint8), each (H,W) or (N,H,W), in one pass over strips of the logits.

    With z = x - max x:  H = log sum_c e^z_c - (sum_c z_c e^z_c) / (sum_c e^z_c). Of equal maxima the lowest class wins.
    Logits with NaN give NaN entropy. At most 255 classes.
    """
    entropy, prediction = [], []
    num_classes = logits.shape[-3]
    for strip in logits.split(ROWS, dim=-2):
        strip = strip.float()
        z = strip - strip.amax(-3, keepdim=True)
        e = z.exp()
        total = e.sum(-3)
        # a logit of -inf has p = 0 and contributes nothing: -inf * 0 must not become NaN
        entropy.append(total.log() - (e * z.clamp(min=-1e30)).sum(-3) / total)
        first = torch.zeros_like(total, dtype=torch.uint8)
        for c in range(num_classes - 1, 0, -1):
            first.masked_fill_(z.select(-3, c) == 0, c)
        prediction.append(first.masked_fill_(z.select(-3, 0) == 0, 0))
    return torch.cat(entropy, -2).div_(math.log(num_classes)).clamp_(min=0), torch.cat(prediction, -2)


# -------------------------------------------------------------------------------------------------------------- regions


def box_sum(values: torch.Tensor, k: int) -> torch.Tensor:
    """Sum over N_k(i) of every pixel, zero beyond the border: (...,H,W) -> (...,H,W), the cost grows with log k only.

    uint8 counts of 0/1 maps are widened as far as (2k+1)^2 needs; float maps stay float32.
    """
    width = 2 * k + 1
    for dim, largest in ((-1, width), (-2, width * width)):
        if not values.is_floating_point():
            values = values.to(torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32)
        values = _window_sum(values, k, dim)
    return values


def _window_sum(values: torch.Tensor, k: int, dim: int) -> torch.Tensor:
    """Sums of 2k+1 neighbours along `dim`, from sums of 1, 2, 4, ... neighbours (the binary digits of 2k+1)."""
    length, width = values.shape[dim], 2 * k + 1
    power = F.pad(values, (k, k) if dim == -1 else (0, 0, k, k))  # sums of `size` neighbours, starting at each pixel
    total, offset, size = None, 0, 1
    while True:
        if width & size:
            part = power.narrow(dim, offset, length)
            total = part if total is None else total + part
            offset += size
        if 2 * size > width:
            return total
        power = power.narrow(dim, 0, power.shape[dim] - size) + power.narrow(dim, size, power.shape[dim] - size)
        size *= 2


def region_area(shape: tuple[int, int], k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """|N_k(i)|: how many pixels of the region lie in the image, (H,W) float32."""

    def extent(n: int) -> torch.Tensor:
        i = torch.arange(n, device=device)
        return (i + k).clamp(max=n - 1) - (i - k).clamp(min=0) + 1

    return (extent(shape[-2])[:, None] * extent(shape[-1])[None, :]).float()


def region_mean(values: torch.Tensor, k: int) -> torch.Tensor:
    """Mean of `values` over N_k(i), the region cut at the border: (H,W) or (N,H,W) -> the same shape."""
    return box_sum(values, k) / region_area(values.shape, k, values.device)


def paint(centres: torch.Tensor, radius: int, shape: tuple[int, int]) -> torch.Tensor:
    """The pixels within `radius` (square, cut at the border) of any centre: (n,2) int64 -> (H,W) bool, centres' device."""
    mask = torch.zeros(tuple(shape), dtype=torch.uint8, device=centres.device)
    mask[centres[:, 0], centres[:, 1]] = 1
    return dilate(mask.bool(), radius)


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """The pixels within `radius` (square) of a True pixel: (H,W) bool -> (H,W) bool."""
    return box_sum(mask.to(torch.uint8), radius) > 0


# ------------------------------------------------------------------------------------------------------------ selection


def select_regions(
    score: torch.Tensor, count: int, block_radius: int, blocked: torch.Tensor | None = None
) -> torch.Tensor:
    """Greedy picks: the highest score wins, its pick blocks every centre within `block_radius` rows and columns.

    RIPU's region selection (the paper's algorithm, the official code's order). `score` (H,W) float; `blocked` (H,W) bool
    marks centres that may not be picked. Returns (n,2) int64 (row, column) in picking order on the score's device,
    n <= `count`: fewer when the candidates run out. -inf and NaN are never picked. Ties go to the smaller column, then
    the smaller row (the official code's order). For regions of radius k use block_radius = 2k: they do not overlap.

    Exact without a step per pick on the device: a pick blocks at most (2 block_radius + 1)^2 centres, itself included, so
    the best count * (2 block_radius + 1)^2 candidates always hold the first `count` picks. They are sorted once, and one
    walk over the sorted list on the host takes every candidate that no earlier pick has blocked.
    """
    height, width = score.shape
    values = score.detach().float()
    values = values.masked_fill(values.isnan(), -math.inf)
    if blocked is not None:
        values = values.masked_fill(blocked.to(values.device), -math.inf)
    values = values.cpu().numpy().ravel()
    candidates = _best_first(values, width, count * (2 * block_radius + 1) ** 2)
    return torch.from_numpy(_walk(candidates, height, width, count, block_radius)).to(score.device)


def _best_first(values: np.ndarray, width: int, number: int) -> np.ndarray:
    """Flat indices of the `number` highest finite values and of all that tie with the last, in picking order."""
    threshold = -math.inf
    if number < values.size:
        threshold = np.partition(values, values.size - number)[values.size - number] if number else math.inf
    chosen = np.flatnonzero((values >= threshold) & (values > -math.inf))
    rows, cols = np.divmod(chosen, width)
    return chosen[np.lexsort((rows, cols, -values[chosen]))]


def _walk(candidates: np.ndarray, height: int, width: int, count: int, radius: int) -> np.ndarray:
    """The sequential greedy over candidates (flat indices, best first): (n,2) int64."""
    stride = width + radius  # a margin to the right catches what the block of the last columns writes beyond the row
    rows, cols = np.divmod(candidates, width)
    taken = bytearray((height + 2 * radius) * stride + 2 * radius)
    block = b"\1" * (2 * radius + 1)
    picks = []
    for i, position in enumerate(((rows + radius) * stride + cols + radius).tolist()):
        if taken[position]:
            continue
        if len(picks) == count:
            break
        picks.append(i)
        for start in range(position - radius * stride - radius, position + radius * stride, stride):
            taken[start : start + 2 * radius + 1] = block
    return np.stack([rows[picks], cols[picks]], axis=1).astype(np.int64)
