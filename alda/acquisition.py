"""Scores and selection under a budget, as pure tensor functions. Which pixels do we ask for?

    from alda.acquisition import ripu_score, select_regions, paint
    score, impurity, uncertainty = ripu_score(logits, k=1)          # logits (C,H,W) -> three (H,W) maps in [0,1]
    centres = select_regions(score, count=1026, block_radius=2)      # (n,2) int64 rows and columns, best first
    asked = paint(centres, radius=1, shape=score.shape)              # (H,W) bool

RIPU: Xie et al., arXiv 2111.12940 (Eqs. 1-5). CBDA: Schachtsiek, Rossi and Hannagan, arXiv
2311.14146.

Axes: N images (optional), C classes, H rows, W columns. p is the softmax of the logits, y the
argmax; k is the region's radius: N_k(i) is the (2k+1) x (2k+1) square around pixel i, cut at the
image border. Scores take float32, float16 or bfloat16 on any device, compute in float32, and leave
their inputs unchanged.

Differences from papers and official code:

  D1. Normalisation (RIPU Eqs. 3-5): impurity and uncertainty are divided by log C. The code divides
      by log 19 also for 16 classes: a constant, ranks are the same.
  D2. log(x + 1e-6): the code adds 1e-6 in its logarithms, so a pure region gets an impurity of
      -3e-7 and, among pure regions, the least uncertain one is ranked first. Here 0 log 0 = 0. The
      gap between the recorded official scores and ours is this (at most C * 1e-6 nats).
  D3. Ties: equal scores go to the more uncertain, then by a seeded draw (rounds.tie_breaks); the
      code takes the smaller column, then row (--rules code).
  D4. Exhausted images: when everything is blocked the code picks pixel (0, 0) again and again. Here
      fewer picks are returned.
  D5. CBDA has no public code; its class weights are this project's formula for the paper's words,
      and a class of weight 0 is not asked at all. Where the last of equal scores do not all fit in
      the common budget, the images take turns.
  D6. Quotas of cities (STAL): largest remainders over the remaining images. The code rounds each,
      halves to even, with a fixed total of 2975, and zurich takes what is missing.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from alda.distributed import all_gather_list, all_reduce_number

ROWS = 32  # rows of logits worked on at a time: the temporaries of a strip stay in the cache (CPU) and small (GPU)


# ------------------------------------------------------------------------------------ what comes in


def check_logits(logits: torch.Tensor) -> None:
    """Raises ValueError, in one line, for what is no map of logits (C,H,W) or (N,C,H,W), C from 2 to
    255: NumPy arrays, other ranks, classes on the last axis, integers, probabilities."""
    if isinstance(logits, dict):
        raise ValueError(
            "logits must be a torch.Tensor, got a dict: give network(x)['out'], perhaps"
        )
    check_tensor(logits, "logits")
    shape = tuple(logits.shape)
    if logits.dim() not in (3, 4) or not logits.is_floating_point():
        raise ValueError(f"logits must be floats (C,H,W) or (N,C,H,W), got {logits.dtype} {shape}")
    if not 2 <= shape[-3] <= 255:
        order = "; are the classes on the last axis? use permute" if 2 <= shape[-1] <= 255 else ""
        raise ValueError(f"logits (C,H,W) need 2 to 255 classes, got {shape[-3]} of {shape}{order}")
    pixels = logits.flatten(-2)[..., :16].float()  # a few pixels of the first row: (...,C,16)
    sums_to_1 = ((pixels.sum(-2) - 1).abs() < 1e-3).all()
    if bool(sums_to_1 & (pixels >= 0).all()):
        raise ValueError("these are probabilities; give the logits before the softmax")


def check_tensor(values, name: str) -> None:
    """Raises ValueError, in one line, for what is no torch.Tensor."""
    if not isinstance(values, torch.Tensor):
        kind = f"{type(values).__module__}.{type(values).__name__}".removeprefix("builtins.")
        hint = ": use torch.from_numpy" if kind == "numpy.ndarray" else ""
        raise ValueError(f"{name} must be a torch.Tensor, got a {kind}{hint}")


def check_prob(prob: torch.Tensor) -> None:
    """Raises ValueError, in one line, for what is no map of probabilities (C,H,W) or (N,C,H,W)."""
    check_tensor(prob, "prob")
    shape = tuple(prob.shape)
    if prob.dim() not in (3, 4) or not 2 <= shape[-3] <= 255:
        raise ValueError(f"prob must be (C,H,W) or (N,C,H,W) with 2 to 255 classes, got {shape}")
    pixels = prob.flatten(-2)[..., :16].float()
    if bool((pixels < 0).any() | ((pixels.sum(-2) - 1).abs() > 0.02).any()):
        raise ValueError(
            "prob does not sum to 1 over the classes (axis -3): a softmax may be missing"
        )


def check_radius(k: int) -> None:
    """Raises ValueError, in one line, for a radius below 0."""
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")


# ------------------------------------------------------------------------------------------- scores


def entropy(prob: torch.Tensor) -> torch.Tensor:
    """H = -sum_c p_c log p_c of each pixel, in nats: (...,C,H,W) -> (...,H,W) float32; 0 log 0 =
    0."""
    return torch.special.entr(prob.float()).sum(-3)


def pixel_entropy(prob: torch.Tensor) -> torch.Tensor:
    """`entropy` over log C, so in [0,1]: (C,H,W) or (N,C,H,W) -> (H,W) or (N,H,W) float32. Raises
    ValueError for what is no map of probabilities."""
    check_prob(prob)
    return entropy(prob) / math.log(prob.shape[-3])


def region_impurity(prediction: torch.Tensor, num_classes: int, k: int = 1) -> torch.Tensor:
    """Entropy of the class histogram of each region over log C: (H,W) or (N,H,W) integer -> the
    same shape, float32.

    RIPU Eqs. (1)-(3): N_k(i) is the square around i, n_c the pixels of it that are predicted as c,
    f_c = n_c / n their share and P(i) = -sum_c f_c log f_c. One class is counted at a time: no
    one-hot of C full planes. Raises ValueError for ids outside 0..C-1, 255 among them.
    """
    if prediction.is_floating_point() or not 2 <= num_classes <= 255:
        kind = f"{prediction.dtype} and {num_classes} classes"
        raise ValueError(f"prediction must be integer class ids of 2 to 255 classes, got {kind}")
    least, most = (int(x) for x in prediction.aminmax())
    if least < 0 or most >= num_classes:
        ids = f"0..{num_classes - 1}, got {least}..{most}"
        raise ValueError(f"prediction must hold class ids {ids}")
    # RIPU Eq. (1): n = |N_k(i)|
    area = region_area(prediction.shape[-2:], k, prediction.device)
    total = torch.zeros(prediction.shape, device=prediction.device)
    for c in range(num_classes):
        # RIPU Eq. (2): n_c = |N_k^c(i)|
        count = box_sum((prediction == c).to(torch.uint8), k).float()
        total += torch.xlogy(count, count)
    # RIPU Eq. (3): P = -sum_c (n_c / n) log (n_c / n) = log n - (1 / n) sum_c n_c log n_c
    entropy = area.log() - total / area
    # a pure region is 0, not +-2e-6 by rounding; the least impure one is 3e-6 or more up to k = 1,150
    return (entropy / math.log(num_classes)).masked_fill_(entropy < 2.9e-6, 0)


def region_uncertainty(entropies: torch.Tensor, k: int = 1) -> torch.Tensor:
    """Mean of the pixels' entropies over each region: (H,W) or (N,H,W) -> the same shape,
    float32."""
    # RIPU Eq. (4): U(i) = 1 / |N_k(i)| sum_{j in N_k(i)} H_j
    return region_mean(entropies, k)


def prediction_uncertainty(prob: torch.Tensor, k: int = 1) -> torch.Tensor:
    """`region_uncertainty` of probabilities (C,H,W) or (N,C,H,W) -> (H,W) or (N,H,W) float32 in
    [0,1]."""
    return region_uncertainty(pixel_entropy(prob), k)


def ripu_score(logits: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RIPU's region score: (score, impurity, uncertainty), each (H,W) or (N,H,W) float32 in [0,1].

    `logits` (C,H,W) or (N,C,H,W). The softmax is never stored whole: strips of rows give the
    entropy and the argmax. Both factors are divided by log C (the official code writes log 19 for
    any C): a constant, ranks are unchanged.
    """
    entropies, prediction = entropy_and_prediction(logits)
    impurity = region_impurity(prediction, logits.shape[-3], k)
    uncertainty = region_uncertainty(entropies, k)
    # RIPU Eq. (5): A = P * U
    return impurity * uncertainty, impurity, uncertainty


def factors_at(
    centres: torch.Tensor,
    entropies: torch.Tensor,
    prediction: torch.Tensor,
    num_classes: int,
    k: int = 1,
    unit: str = "region",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Why these places were asked: impurity and uncertainty, the factors of RIPU's score (Eqs. 3-5), at
    `centres` (n,2) int64 alone: two (n,) float32 in [0,1].

    `entropies` (H,W) float32 and `prediction` (H,W) uint8 are of `entropy_and_prediction`. The values
    are those of `region_impurity` and `region_uncertainty` (unit "pixel": the pixel's own entropy)
    there, computed in the picks' windows instead of on the whole map. Raises ValueError for a radius
    below 0.
    """
    check_radius(k)
    height, width = prediction.shape
    at = centres.to(prediction.device).unbind(1)
    if max(1, len(centres)) * (2 * k + 1) ** 2 > 4 * height * width:  # windows larger than the maps
        impurity = region_impurity(prediction, num_classes, k)[at]
        mean = region_uncertainty(entropies, k)[at]
        return impurity, entropies[at] if unit == "pixel" else mean
    steps = torch.arange(-k, k + 1, device=prediction.device)
    rows, cols = (places[:, None] + steps for places in at)  # (n,2k+1)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None]
    place = rows.clamp(0, height - 1)[:, :, None], cols.clamp(0, width - 1)[:, None]
    area = inside.sum((1, 2))  # (n,2k+1,2k+1) -> (n,)
    classes = prediction[place]
    shares = [((classes == c) & inside).sum((1, 2)) / area for c in range(num_classes)]
    impurity = torch.special.entr(torch.stack(shares)).sum(0) / math.log(num_classes)
    mean = (entropies[place] * inside).sum((1, 2)) / area
    return impurity, entropies[at] if unit == "pixel" else mean


def pixel_score(logits: torch.Tensor, k: int = 32) -> torch.Tensor:
    """RIPU's score for pixel queries (PA): impurity of the (2k+1)^2 region times the pixel's own
    entropy, not a mean: (C,H,W) or (N,C,H,W) -> (H,W) or (N,H,W) float32 in [0,1]. Raises ValueError for
    what is no map of logits."""
    entropies, prediction = entropy_and_prediction(logits)
    return region_impurity(prediction, logits.shape[-3], k) * entropies


def entropy_score(logits: torch.Tensor, k: int = 1) -> torch.Tensor:
    """The baseline `entropy`: region uncertainty alone, (C,H,W) or (N,C,H,W) -> (H,W) or (N,H,W)
    float32 in [0,1]. Raises ValueError for what is no map of logits."""
    return region_uncertainty(entropy_and_prediction(logits)[0], k)


def margin_score(logits: torch.Tensor, k: int = 1) -> torch.Tensor:
    """The baseline `margin`: region mean of 1 - (p_1st - p_2nd), (C,H,W) or (N,C,H,W) -> (H,W) or
    (N,H,W) in [0,1]. Raises ValueError for what is no map of logits."""
    check_logits(logits)
    strips = logits.split(ROWS, dim=-2)
    best = [strip.float().softmax(-3).topk(2, dim=-3).values for strip in strips]
    best = torch.cat(best, dim=-2)
    return region_mean(1 - (best.select(-3, 0) - best.select(-3, 1)), k)


def random_score(
    shape: tuple[int, int], seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The baseline `random`: uniform noise in [0,1), (H,W) float32, the same for a seed on every
    device."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def region_or_pixel_score(logits: torch.Tensor, k: int, unit: str) -> torch.Tensor:
    """RIPU's score for what a pick labels: `unit` "region" or "pixel"; (C,H,W) -> (H,W)."""
    return pixel_score(logits, k) if unit == "pixel" else ripu_score(logits, k)[0]


# Strategy: its score, called with logits (C,H,W), radius k, unit ("region" or "pixel": what a pick
# labels) and a seed; gives (H,W), the higher the sooner asked. A new score is one more line here.
SCORES = {
    "random": lambda logits, k, unit, seed: random_score(logits.shape[-2:], seed, logits.device),
    "entropy": lambda logits, k, unit, seed: entropy_score(logits, 0 if unit == "pixel" else k),
    "margin": lambda logits, k, unit, seed: margin_score(logits, 0 if unit == "pixel" else k),
    "ripu": lambda logits, k, unit, seed: region_or_pixel_score(logits, k, unit),
    "ripu-pa": lambda logits, k, unit, seed: region_or_pixel_score(logits, k, unit),
    "cbda": lambda logits, k, unit, seed: region_or_pixel_score(logits, k, unit),
}


def entropy_and_prediction(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel entropy over log C (float32) and argmax (uint8), each (H,W) or (N,H,W), in one pass
    over strips of the logits.

    With z = x - max x:  H = log sum_c e^z_c - (sum_c z_c e^z_c) / (sum_c e^z_c). Of equal maxima the lowest class wins.
    Logits with NaN give NaN entropy. At most 255 classes.
    """
    check_logits(logits)
    entropies, prediction = [], []
    num_classes = logits.shape[-3]
    for strip in logits.split(ROWS, dim=-2):
        strip = strip.float()
        z = strip - strip.amax(-3, keepdim=True)
        e = z.exp()
        total = e.sum(-3)
        # a logit of -inf has p = 0 and contributes nothing: -inf * 0 must not become NaN
        entropies.append(total.log() - (e * z.clamp(min=-1e30)).sum(-3) / total)
        first = torch.zeros_like(total, dtype=torch.uint8)
        for c in reversed(range(num_classes)):  # the lowest class last: it wins
            first.masked_fill_(z.select(-3, c) == 0, c)
        prediction.append(first)
    entropies = torch.cat(entropies, -2).div_(math.log(num_classes)).clamp_(min=0)
    return entropies, torch.cat(prediction, -2)


# ------------------------------------------------------------------------------------------ regions


# the narrowest integers that hold counts below a limit
KINDS = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))


def box_sum(values: torch.Tensor, k: int) -> torch.Tensor:
    """Sum over N_k(i) of every pixel, zero beyond the border: (...,H,W) -> (...,H,W), the cost
    grows with log k only.

    uint8 counts of 0/1 maps are widened as far as (2k+1)^2 needs; float maps stay float32.
    """
    check_radius(k)
    k = min(k, max(values.shape[-2:]))  # a larger window holds no more
    width = 2 * k + 1
    for dim, largest in ((-1, width), (-2, width * width)):
        if not values.is_floating_point():
            narrow = [kind for limit, kind in KINDS if largest < limit]
            values = values.to(narrow[0])
        values = _window_sum(values, k, dim)
    return values


def _window_sum(values: torch.Tensor, k: int, dim: int) -> torch.Tensor:
    """Sums of 2k+1 neighbours along `dim`, from sums of 1, 2, 4, ... neighbours (the binary digits
    of 2k+1)."""
    length, width = values.shape[dim], 2 * k + 1
    # sums of `size` neighbours, starting at each pixel
    power = F.pad(values, (k, k) if dim == -1 else (0, 0, k, k))
    total, offset, size = None, 0, 1
    while True:
        if width & size:
            part = power.narrow(dim, offset, length)
            total = part if total is None else total + part
            offset += size
        if 2 * size > width:
            return total
        power = power.narrow(dim, 0, power.shape[dim] - size) + power.narrow(
            dim, size, power.shape[dim] - size
        )
        size *= 2


def region_area(shape: tuple[int, int], k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """|N_k(i)|: how many pixels of the region lie in the image, (H,W) float32."""
    check_radius(k)

    def extent(n: int) -> torch.Tensor:
        i = torch.arange(n, device=device)
        return (i + k).clamp(max=n - 1) - (i - k).clamp(min=0) + 1

    return (extent(shape[-2])[:, None] * extent(shape[-1])[None, :]).float()


def region_mean(values: torch.Tensor, k: int) -> torch.Tensor:
    """Mean of `values` over N_k(i), the region cut at the border: (H,W) or (N,H,W) -> the same
    shape, float32."""
    return box_sum(values.float(), k) / region_area(values.shape, k, values.device)


def paint(centres: torch.Tensor, radius: int, shape: tuple[int, int]) -> torch.Tensor:
    """The pixels within `radius` (square, cut at the border) of any centre: (n,2) integer -> (H,W)
    bool, centres' device. Raises ValueError for centres of another kind, or outside."""
    height, width = shape
    check_tensor(centres, "centres")
    if centres.dim() != 2 or centres.shape[1] != 2 or centres.is_floating_point():
        raise ValueError(
            f"centres must be integers (n,2), got {centres.dtype} {tuple(centres.shape)}"
        )
    rows, columns = centres.long().unbind(1)
    if bool(((rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)).any()):
        raise ValueError(f"a centre lies outside the {height}x{width} image")
    mask = torch.zeros(tuple(shape), dtype=torch.uint8, device=centres.device)
    mask[rows, columns] = 1
    return dilate(mask.bool(), radius)


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """The pixels within `radius` (square) of a True pixel: (H,W) bool, or uint8 where not 0 is True ->
    (H,W) bool."""
    check_tensor(mask, "mask")
    return box_sum((mask != 0).to(torch.uint8), radius) > 0


# ---------------------------------------------------------------------------------------- selection


def select_regions(
    score: torch.Tensor,
    count: int,
    block_radius: int,
    blocked: torch.Tensor | None = None,
    tie_break: torch.Tensor | None = None,
) -> torch.Tensor:
    """Greedy picks: the highest score wins, its pick blocks every centre within `block_radius` rows
    and columns.

    RIPU's region selection (the paper's algorithm). `score` (H,W) float; `blocked` (H,W) bool marks
    centres that may not be picked. Returns (n,2) int64 (row, column) in picking order on the score's
    device, n <= `count`: fewer when the candidates run out. -inf and NaN are never picked. For
    regions of radius k use block_radius = 2k: they do not overlap.

    Equal scores: the larger `tie_break` wins, (H,W) float, or (K,H,W) where the first of K maps in
    which they differ decides. What is still equal, or all ties without it, goes to the smaller
    column, then the smaller row: the official code's order, which spends a flat prediction's budget
    on the left border.

    Exact without a step per pick on the device: a pick blocks at most (2 block_radius + 1)^2
    centres, itself included, so the best count * (2 block_radius + 1)^2 candidates always hold the
    first `count` picks. They are sorted once, and one walk over the sorted list on the host takes
    every candidate that no earlier pick has blocked. A quarter of them is nearly always enough and
    is tried first. Raises ValueError for other shapes, for a count that is not whole, and for a count
    or radius below 0.
    """
    for name, values in (("score", score), ("blocked", blocked), ("tie_break", tie_break)):
        if values is not None:
            check_tensor(values, name)
    check_radius(block_radius)
    fits = score.dim() == 2 and (blocked is None or blocked.shape == score.shape)
    fits = fits and (tie_break is None or tie_break.shape[-2:] == score.shape)
    if not fits or not hasattr(count, "__index__") or count < 0:  # a whole number, NumPy's too
        shapes = [None if x is None else tuple(x.shape) for x in (score, blocked, tie_break)]
        raise ValueError(
            "needs one (H,W) score, blocked and tie_break alike, a whole count of at least 0; got "
            f"{shapes[0]}, blocked {shapes[1]}, tie_break {shapes[2]}, {count}"
        )
    height, width = score.shape
    block_radius = min(block_radius, max(height, width))  # a larger one blocks no more
    values = score.detach().float()
    values = values.masked_fill(values.isnan(), -math.inf)
    if blocked is not None:
        values = values.masked_fill(blocked.to(values.device).bool(), -math.inf)
    values = values.cpu().numpy().ravel()
    ties = np.empty((0, values.size), np.float32)
    if tie_break is not None:
        ties = tie_break.detach().float().cpu().numpy().reshape(-1, values.size)
    enough = count * (2 * block_radius + 1) ** 2
    for number in (enough // 4 + 1, enough):
        candidates = _best_first(values, ties, width, number)
        picks = _walk(candidates, height, width, count, block_radius)
        if len(picks) == count or number >= values.size:
            break
    return torch.from_numpy(picks).to(score.device)


def _best_first(values: np.ndarray, ties: np.ndarray, width: int, number: int) -> np.ndarray:
    """Flat indices in picking order of at least the `number` highest values: all above a threshold,
    -inf left out.

    Any threshold that leaves enough values is exact, so a sample of every 64th value estimates it
    (a full partition is slow on score maps, where most values are equal: zeros); it is lowered
    until enough are left.
    """
    sample = np.sort(values[::64])[::-1]
    rank = number // 64 + 8
    chosen = None
    while chosen is None or (len(chosen) < number and rank < 4 * len(sample)):
        threshold = sample[rank] if rank < len(sample) else -math.inf
        chosen = np.flatnonzero((values >= threshold) & (values > -math.inf))
        rank *= 2
    rows, cols = np.divmod(chosen, width)
    # the last key decides first: the value, then the tie breaks, then column and row
    keys = [rows, cols, *(-ties[::-1, chosen]), -values[chosen]]
    return chosen[np.lexsort(keys)]


def _walk(candidates: np.ndarray, height: int, width: int, count: int, radius: int) -> np.ndarray:
    """The sequential greedy over candidates (flat indices, best first): (n,2) int64."""
    # a margin to the right catches what the block of the last columns writes beyond the row
    stride = width + radius
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


# --------------------------------------------------------------------------------------------- CBDA


def class_weights(
    counts: torch.Tensor, budget: int, target: torch.Tensor | None = None
) -> torch.Tensor:
    """CBDA's class balance: w_c = max(0, 1 - n_c / (t_c B)), (C,) float64.

    `counts` (C,) are the labelled pixels n_c of each class from earlier rounds, `budget` is B, all
    pixels that may be asked over all rounds and images, `target` (C,) is the distribution t wished
    for (uniform unless given; it is normalised). A class that has used up its share of the budget
    has weight 0, as has a class that the target leaves out; before the first round every weight is
    1.

    The paper says in words that scores are down-weighted for classes that have consumed more of the
    budget, relative to a target distribution. This formula is this project's reading of those
    words. Raises ValueError for a budget below 1, for negative counts and for a target that is not
    a distribution over the same classes.
    """
    counts = torch.as_tensor(counts).double()
    target = torch.ones_like(counts) if target is None else torch.as_tensor(target).double()
    if budget < 1 or (counts < 0).any():
        raise ValueError(
            f"budget must be at least 1 pixel and counts at least 0, got {budget} and {counts.tolist()}"
        )
    if target.shape != counts.shape or (target < 0).any() or target.sum() == 0:
        raise ValueError(
            f"target must hold {len(counts)} shares, none negative, not all 0; got {target.tolist()}"
        )
    share = target / target.sum() * budget
    # CBDA, class balance: w_c = max(0, 1 - n_c / (t_c B)), this project's reading of the paper's
    # words
    return torch.where(share > 0, (1 - counts / share.clamp(min=1e-12)).clamp(min=0), 0.0)


def class_balanced(
    score: torch.Tensor, prediction: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """A pixel predicted as c is ranked by w_c * score: score and prediction (...,H,W), weights (C,)
    -> (...,H,W) float32. Raises ValueError for different shapes."""
    if score.shape != prediction.shape:
        shapes = f"{tuple(score.shape)} and {tuple(prediction.shape)}"
        raise ValueError(f"score and prediction must have one shape, got {shapes}")
    return score * weights.to(score.device, torch.float32)[prediction.long()]


class GlobalBudget:
    """One budget over many images: the `count` best picks of all images together (CBDA's dynamic
    acquisition).

        budget = GlobalBudget(count)
        for image_id, score in ...:
            centres = select_regions(score.masked_fill(score < budget.floor, -math.inf), count, block_radius)
            budget.add(image_id, centres, score[centres[:, 0], centres[:, 1]])
        picks = budget.select()                       # {image_id: (n,2) int64 centres in picking order}

    The paper stacks the scores of all images in one tensor and takes the highest, whatever image
    they are in. Picks block each other within an image only, so that is the merge of the images'
    own greedy sequences, which this class makes without the stacked tensor. Where the last of equal
    scores do not all fit (zeros, often), the images take turns, the smaller id first.

    Memory: at most 2 * count picks and those of the image just added, 12 bytes each (score, row,
    column); `add` then throws away what can no longer win. `floor` is the score below which nothing
    can win any more. Under torch.distributed every process adds its own images, holds its own picks
    only, and all agree on the threshold.
    """

    def __init__(self, count: int):
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        self.count, self.floor, self.threshold = count, -math.inf, None
        self.images: dict = {}  # image id: (scores (n,) float32, never growing; centres (n,2) int32)

    def add(self, image_id, centres: torch.Tensor, scores: torch.Tensor) -> None:
        """Adds an image's picks: `centres` (n,2) integer and `scores` (n,) float, in picking order.
        One call per image.

        Raises ValueError for an image added twice, and for scores that are NaN, -inf or grow along
        the picks.
        """
        values = scores.detach().float().cpu().numpy() + np.float32(0)  # a copy; -0 becomes 0
        if image_id in self.images:
            raise ValueError(f"image {image_id!r} was added already")
        if (
            len(values) != len(centres)
            or not (values > -math.inf).all()
            or (np.diff(values) > 0).any()
        ):
            raise ValueError(
                f"image {image_id!r}: needs one finite score per centre, the best first"
            )
        self.images[image_id] = (values, centres.cpu().numpy().astype(np.int32).reshape(-1, 2))
        if sum(len(values) for values, _ in self.images.values()) > 2 * self.count:
            lowest = self._keep_best(lambda number: number, lambda items: items)
            self.floor = math.inf if lowest is None else lowest  # nothing wins where count is 0

    def select(self) -> dict:
        """{image_id: (n,2) int64 centres in picking order} of this process's images; images without
        a pick are left out.

        Sets `threshold`, the lowest score picked (None when nothing is). Exact; the same picks for
        any number of processes and any order of images. Collective under torch.distributed.
        """
        # CBDA, dynamic acquisition: the `count` highest scores of all images win
        self.threshold = self._keep_best(all_reduce_number, all_gather_list)
        picks = {}
        for name, (_, centres) in self.images.items():
            if len(centres):
                picks[name] = torch.from_numpy(centres.astype(np.int64))
        return picks

    def _keep_best(self, total, gather) -> float | None:
        """Cuts every image to its picks among the `count` best of all; returns the lowest score
        kept.

        `total` and `gather` sum a number and join a list over the processes that share the budget.
        Scores fall along an image's picks, so what an image keeps is the beginning of its list.
        """
        wanted = min(self.count, total(sum(len(values) for values, _ in self.images.values())))
        # bisects for the largest score that at least `wanted` picks reach
        low, high = (-(2**31), 2**31 - 1)
        while wanted and low < high:
            middle = (low + high + 1) // 2
            value = _float(middle)
            reached = total(sum(_at_least(values, value) for values, _ in self.images.values()))
            low, high = (middle, high) if reached >= wanted else (low, middle - 1)
        value = _float(low) if wanted else np.float32(math.inf)
        above = {
            name: _at_least(values, np.nextafter(value, np.float32(math.inf)))
            for name, (values, _) in self.images.items()
        }
        ties = [
            (name, _at_least(values, value) - above[name])
            for name, (values, _) in self.images.items()
        ]
        spare = wanted - total(sum(above.values()))
        for name, number in _in_turns(sorted(gather([tie for tie in ties if tie[1]])), spare):
            if name in above:
                above[name] += number
        for name, (values, centres) in self.images.items():
            if above[name] < len(values):  # copies, so that what is cut off is given back
                self.images[name] = (values[: above[name]].copy(), centres[: above[name]].copy())
        return float(value) if wanted else None


def _in_turns(ties: list[tuple], spare: int) -> list[tuple]:
    """(id, ties) of the images to (id, how many of them win) when the images take turns until
    `spare` have won."""
    numbers = np.array([number for _, number in ties], np.int64)
    low, high = 0, int(numbers.max(initial=0))  # bisects for the most full turns that fit
    while low < high:
        middle = (low + high + 1) // 2
        fits = np.minimum(numbers, middle).sum() <= spare
        low, high = (middle, high) if fits else (low, middle - 1)
    granted = np.minimum(numbers, low)
    left = np.flatnonzero(numbers > low)[: spare - int(granted.sum())]
    granted[left] += 1
    return [(name, int(number)) for (name, _), number in zip(ties, granted, strict=True)]


def _at_least(values: np.ndarray, value: np.float32) -> int:
    """How many of the falling `values` are `value` or more."""
    return len(values) - int(np.searchsorted(values[::-1], value, side="left"))


def _float(key: int) -> np.float32:
    """The float32 whose place in the order of all float32 is `key` (an int32): lets a threshold be
    bisected exactly."""
    bits = np.array(key if key >= 0 else key ^ 0x7FFFFFFF, np.int64)
    return bits.astype(np.int32).view(np.float32)[()]


# -------------------------------------------------------------------------- STAL: images as queries


def image_uncertainty(prob: torch.Tensor) -> torch.Tensor:
    """STAL's score of a whole image, in [0,1]: probabilities (C,H,W) -> 0-dim, (N,C,H,W) -> (N,),
    float32 on the same device."""
    # STAL Eq. (8): mean_i H_i, here over log C
    return pixel_entropy(prob).mean((-2, -1))


def split_by_group(sizes: dict, count: int) -> dict:
    """How many of `count` images to ask for in each group (city): {group: remaining images} ->
    {group: quota}.

    STAL asks in proportion to the remaining images. The quotas are n_g = count * size_g / sum_h
    size_h cut to whole images, the missing ones go to the largest remainders (ties: the earlier
    group). They sum to `count` and no group is asked for more than it has. The official code rounds
    each (halves to even) with a fixed total of 2975 and gives what is missing or too much to one
    city, zurich: its quotas need not be near their shares. Raises ValueError for a negative size or
    a count outside 0..sum of sizes.
    """
    total = sum(sizes.values())
    if min(sizes.values(), default=0) < 0 or not 0 <= count <= total:
        raise ValueError(
            f"cannot ask for {count} of {total} remaining images ({sizes}); ask for at most as many as remain"
        )
    # (whole, remainder * total)
    shares = {group: divmod(count * size, max(total, 1)) for group, size in sizes.items()}
    quotas = {group: whole for group, (whole, _) in shares.items()}
    # a stable sort: ties keep the order of `sizes`
    largest = sorted(shares, key=lambda group: -shares[group][1])
    for group in largest[: count - sum(quotas.values())]:
        quotas[group] += 1
    return quotas
