"""CBST's thresholds and pseudo-labels, STAL's pseudo-labels and teacher. What is labelled unasked?

    from alda.selftraining import cbst_thresholds, cbst_pseudo_labels
    thresholds = cbst_thresholds((softmax_of(image) for image in target), portion=0.2)   # (C,) confidences exp(-k_c)
    labels = cbst_pseudo_labels(softmax_of(image), thresholds)               # (H,W) uint8 train ids, 255 = ignore

    from alda.selftraining import update_teacher, reliable_pseudo_labels, drop_share
    labels = reliable_pseudo_labels(teacher(images).softmax(1), drop_share(epoch, epochs))   # (N,H,W) uint8, 255 = unsure
    update_teacher(teacher, student, step)                                                   # after every optimizer step

CBST, CBST-SP, ST: Zou et al., ECCV 2018, arXiv 1810.07911. CRST: Zou et al., ICCV 2019, arXiv
1908.09822 (its code is CBST's PyTorch version). STAL (later ILM-ASSL): Guan and Yuan, arXiv
2301.13361.

Axes: N images (optional in the CBST part), C classes, H rows, W columns, B histogram bins; prob are
softmax probabilities, labels uint8 train ids, 255 = none. Everything stays on the inputs' device;
inputs are left unchanged. In the STAL part shapes do not depend on values and nothing waits for the
device.

Differences from papers and official code:

 D31. CBST's threshold pixel: the paper labels where p / exp(-k) exceeds 1, the code also where it
      equals 1 (--rules code). They differ where many pixels tie: a saturated network.
 D32. CBST's solve_ST.py starts each class with an extra 0.0, so that ranks shift by one now and
      then, and solve_AO.py lets the portion grow past its maximum by float rounding: not
      reproduced.
 D33. All confidences are ranked; both codes keep every 4th of an image and class (stride=4). They
      store every probability map (159 MB each at 19x1024x2048) and every confidence as a Python
      float; here images pass twice, in fixed memory.
 D34. CRST mines only classes under 0.1 % of the predictions, CBST those first and then the 3
      rarest: the second.
 D35. CBST-SP's spatial priors are a download officially; here they are estimated from the source's
      labels, their width and normalisation are this project's reading.
 D36. STAL's pseudo-labels drop the pixels of highest entropy, as the paper; the code drops those of
      lowest (--rules code).
"""

import math
from collections.abc import Iterable, Sequence

import torch

from alda import IGNORE
from alda.acquisition import entropy
from alda.distributed import all_reduce

ROWS = 32  # rows of probabilities worked on at a time, so that products with a prior stay small
CHUNK = 2**18  # pixels counted at a time
DROPPED = 13  # low bits of a float32 that a bin leaves out: 10 bits of the fraction remain
# the bin of 2^-20; what is less confident counts as no prediction at all
FIRST = (127 - 20) << (23 - DROPPED)
# 2^-20 ... 1: 1024 bins for each halving of the confidence, and one for exactly 1
BINS = (20 << (23 - DROPPED)) + 1


# --------------------------------------------------------------------------------- CBST: thresholds


def cbst_thresholds(
    probs: Iterable[torch.Tensor],
    portion: float,
    balanced: bool = True,
    prior: torch.Tensor | None = None,
    stride: int = 1,
) -> torch.Tensor:
    """The confidences exp(-k_c) above which pixels become pseudo-labels: probability maps (C,H,W)
    -> (C,) float32.

    CBST's rule for k_c: of the n_c pixels predicted as c over all images, the confidence ranked
    floor(portion * n_c) from the top. `balanced=False` ranks all classes together and gives each
    the same threshold (ST). `prior` (C,H,W) in [0,1] multiplies every map first (CBST-SP). A class
    that is never predicted, or too rarely for a first rank, gets 1.

    One pass, memory independent of the number of images, within 5e-4 of the exact value: see
    ConfidenceHistogram. Raises ValueError for no maps, a portion outside [0,1], and maps that are
    no probabilities.
    """
    histogram = None
    for prob in probs:
        if histogram is None:
            histogram = ConfidenceHistogram(prob.shape[-3], prob.device)
        histogram.add(prob, prior, stride)
    if histogram is None:
        raise ValueError("cbst_thresholds got no probability maps")
    return histogram.thresholds(portion, balanced)


class ConfidenceHistogram:
    """The confidences of a whole target set, by predicted class, in fixed memory: 0.3 MB a class.

        histogram = ConfidenceHistogram(num_classes)
        for prob in ...:
            histogram.add(prob)
        thresholds, counts = histogram.thresholds(0.2), histogram.predicted    # (C,) float32, (C,) int64

    A bin is what float32 numbers with the same upper 19 bits have in common: 2^-10 of its value
    wide at most, 2^-11 for confidences in [0.5, 1), and exactly 1 has a bin of its own. The bin
    that holds the rank is found exactly; the threshold is the mean of the values in it, so it lies
    less than 5e-4 (and less than 0.1 %) from the exact rank value, and is that value itself where
    all values of the bin are equal. All sums are of integers: the order of the images, the device
    and the number of parts that are added up do not change a bit.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(
                f"labels are uint8 with 255 = ignore: 1 to 255 classes, got {num_classes}"
            )
        # all pixels predicted as c
        self.predicted = torch.zeros(num_classes, dtype=torch.int64, device=device)
        # those that are ranked
        self.counts = torch.zeros(num_classes, BINS, dtype=torch.int64, device=device)
        # sums of the dropped bits: they give the mean of a bin
        self.rest = torch.zeros_like(self.counts)

    @torch.no_grad()
    def add(self, prob: torch.Tensor, prior: torch.Tensor | None = None, stride: int = 1) -> None:
        """Adds an image's probabilities (C,H,W), times `prior` (C,H,W); `stride` ranks every so
        many pixels of each class.

        Pixels whose best value is under 2^-20 (places where the prior rules out every class) are
        not counted.
        """
        if prob.dim() != 3 or len(prob) != len(self.predicted) or stride < 1:
            expected = f"({len(self.predicted)},H,W) and a stride of at least 1"
            raise ValueError(
                f"expected probabilities {expected}, got {tuple(prob.shape)} and {stride}"
            )
        confidence, prediction = _best_class(prob, prior)
        if not (confidence <= 1 + 1e-3).all():
            raise ValueError(
                f"expected probabilities in [0,1], found {confidence.max():g}: a softmax may be missing"
            )
        valid = confidence >= 2.0**-20
        confidence, prediction = confidence[valid].clamp_(max=1), prediction[valid]  # (H,W) -> (n,)
        self.predicted += torch.bincount(prediction, minlength=len(self.predicted)).to(
            self.predicted.device
        )
        if stride > 1:  # in raster order within the class, as the official code
            kept = torch.cat([(prediction == c).nonzero()[::stride, 0] for c in range(len(prob))])
            confidence, prediction = confidence[kept], prediction[kept]
        for part, classes in zip(confidence.split(CHUNK), prediction.split(CHUNK), strict=True):
            # the bits of positive floats are in the order of their values
            bits = part.view(torch.int32)
            bins = (classes.long() * BINS + (bits >> DROPPED) - FIRST).to(self.counts.device)
            rest = (bits & ((1 << DROPPED) - 1)).long().to(self.counts.device)
            self.counts.view(-1).scatter_add_(0, bins, torch.ones_like(bins))
            self.rest.view(-1).scatter_add_(0, bins, rest)

    def add_up(self) -> None:
        """Under torch.distributed a collective: from now on each process has the counts of all."""
        for counts in (self.counts, self.rest, self.predicted):
            all_reduce(counts)

    def thresholds(self, portion: float, balanced: bool = True) -> torch.Tensor:
        """(C,) float32, see cbst_thresholds; any number of portions can be asked of one
        histogram."""
        if not 0 <= portion <= 1:
            raise ValueError(f"portion must lie in [0,1], got {portion}")
        # (C,B) or (1,B)
        counts, rest = (x if balanced else x.sum(0, keepdim=True) for x in (self.counts, self.rest))
        # CBST, thresholds: exp(-k_c) = the floor(portion * n_c)-th highest of the n_c confidences
        # of the pixels predicted as c
        rank = (portion * counts.sum(1).double()).floor().long()
        # (C,B), the top bin first: how many values are in this bin or a higher one
        reached = counts.flip(1).cumsum(1)
        place = BINS - 1 - (reached < rank[:, None]).sum(1, keepdim=True)  # (C,1)
        number, rest = counts.gather(1, place).clamp(min=1), rest.gather(1, place)
        # within a bin the exponent is one, so values are linear in their bits
        mean = (rest + number // 2) // number
        value = (((place + FIRST) << DROPPED) + mean)[:, 0].to(torch.int32).view(torch.float32)
        return torch.where(rank > 0, value, 1.0).expand(len(self.predicted)).clone()


# ------------------------------------------------------------------------------------ pseudo-labels


@torch.no_grad()
def cbst_pseudo_labels(
    prob: torch.Tensor,
    thresholds: torch.Tensor,
    prior: torch.Tensor | None = None,
    rules: str = "paper",
) -> torch.Tensor:
    """Pseudo-labels of an image: probabilities (C,H,W) or (N,C,H,W) -> uint8 (H,W) or (N,H,W), 255
    = ignore.

    CBST's solution of the class-balanced problem: y = argmax_c p_c / exp(-k_c) if that maximum
    exceeds 1, else ignore. `thresholds` (C,) are the exp(-k_c) of cbst_thresholds; `prior` (C,H,W)
    multiplies the probabilities as it did there. `rules="paper"`: > 1; `rules="code"`: >= 1, so
    that the pixel that set the threshold is labelled too. They differ where many pixels tie: if
    more than the portion of a class are as sure as its threshold (a saturated network with p = 1,
    which bfloat16 reaches at 0.998: take the softmax in float32), the paper's rule labels none of
    those and the code's all. Raises ValueError for thresholds of the wrong shape or not above 0 and
    for unknown rules.
    """
    if thresholds.shape != prob.shape[-3:-2] or not (thresholds > 0).all():
        raise ValueError(f"expected {prob.shape[-3]} thresholds above 0, got {thresholds.tolist()}")
    if rules not in ("paper", "code"):
        raise ValueError(f"rules must be 'paper' or 'code', got {rules!r}")
    share = thresholds.to(prob.device, torch.float32)[:, None, None]
    weighted, labels = _best_class(prob, prior, share)
    reached = weighted > 1 if rules == "paper" else weighted >= 1
    # CBST, pseudo-labels: y = argmax_c p_c / exp(-k_c) where that maximum exceeds 1, else none
    return labels.masked_fill_(~reached, IGNORE)


def _best_class(prob, prior=None, thresholds=None) -> tuple[torch.Tensor, torch.Tensor]:
    """max_c p_c q_c / exp(-k_c) float32 and its class uint8, (...,H,W) each; of equal maxima the
    lowest class wins."""
    if prior is not None and prior.shape != prob.shape[-3:]:
        raise ValueError(
            f"prior {tuple(prior.shape)} and probabilities {tuple(prob.shape)} differ in C, H or W"
        )
    values, classes = [], []
    for start in range(0, prob.shape[-2], ROWS):
        strip = prob[..., start : start + ROWS, :].float()  # (...,C,ROWS,W)
        if prior is not None:
            # CBST, spatial priors: q_c p_c in place of p_c
            strip = strip * prior[:, start : start + ROWS].to(prob.device, torch.float32)
        if thresholds is not None:
            strip = strip / thresholds
        value, best = strip.max(-3)  # (...,C,ROWS,W) -> (...,ROWS,W)
        values.append(value)
        classes.append(best.to(torch.uint8))
    return torch.cat(values, -2), torch.cat(classes, -2)


def pseudo_label_statistics(
    pseudo: torch.Tensor, truth: torch.Tensor, num_classes: int
) -> dict[str, torch.Tensor]:
    """Counters of one image for a report, each (C,) int64; add them up over images, then divide.

    `pseudo` and `truth` are integer labels (...,H,W), 255 = none. Accuracy of class c is correct /
    judged, coverage covered / truth, with: `labelled` pixels pseudo-labelled c; `judged` those of
    them whose truth is known; `correct` those whose truth is c; `truth` pixels that are c in truth;
    `covered` those of them with any pseudo-label.
    """
    has, known = pseudo != IGNORE, truth != IGNORE

    def count(labels: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.bincount(labels[where].long(), minlength=num_classes)

    return {
        "labelled": count(pseudo, has),
        "judged": count(pseudo, has & known),
        "correct": count(pseudo, has & (pseudo == truth)),
        "truth": count(truth, known),
        "covered": count(truth, has & known),
    }


# ----------------------------------------------------------------------------------- spatial priors


@torch.no_grad()
def spatial_prior(
    labels: Iterable[torch.Tensor],
    num_classes: int,
    size: tuple[int, int],
    sigma: float | None = None,
) -> torch.Tensor:
    """CBST-SP's spatial priors q_c from the source's label maps: (C,*size) float32 in [0,1], on the
    labels' device.

    The official priors are a download; these are estimated here. `labels` are (h,w) train ids of
    any size, 255 = none, each read at the centres of the cells of `size` (nearest neighbour). With
    G a separable Gaussian of deviation `sigma` cells, cut at 3 sigma and at the image border (its
    weights always sum to 1):

        f_c(n) = (G * pixels labelled c)(n) / (G * labelled pixels)(n)         how often place n is c
        q_c(n) = f_c(n) / sum_m f_c(m)                                         each class sums to 1 over the places
        q      = q / max q                                                     one constant for all classes

    That each class sums to 1 over the places is this project's reading of CBST: q says where a
    class is, not how frequent it is, so rare classes are not drowned. The last line keeps p * q in
    [0,1] and decides nothing, because thresholds scale with q. `sigma` defaults to 35/3 pixels at
    1024 rows (a kernel of 70x70), in proportion to `size`; this width is a choice. A class without
    source labels has q = 0 and is never pseudo-labelled (SYNTHIA: terrain, truck, train). Raises
    ValueError where no label map holds a label.
    """
    sigma = size[0] / 1024 * 35 / 3 if sigma is None else sigma
    counts = None
    for label in labels:
        if counts is None:
            # the last plane takes the ignored pixels
            counts = torch.zeros(num_classes + 1, *size, device=label.device)
        (height, width), (h, w) = size, label.shape
        rows = (2 * torch.arange(height, device=label.device) + 1) * h // (2 * height)
        cols = (2 * torch.arange(width, device=label.device) + 1) * w // (2 * width)
        cells = label[rows][:, cols].long()  # (h,w) -> (H,W)
        cells = cells.masked_fill(cells == IGNORE, num_classes)
        counts.scatter_add_(0, cells[None], torch.ones_like(counts[:1]))
    if counts is None or not counts[:-1].any():
        raise ValueError(
            "no source label map holds a label: there is nothing to estimate a spatial prior from"
        )
    blur_rows, blur_cols = (_gaussian(n, sigma).to(counts.device) for n in size)
    smooth = blur_rows @ counts[:-1] @ blur_cols.T  # (H,H) (C,H,W) (W,W) -> (C,H,W)
    frequency = smooth / smooth.sum(0).clamp(min=1e-12)
    prior = frequency / frequency.sum((1, 2), keepdim=True).clamp(min=1e-12)
    return prior / prior.max()


def _gaussian(length: int, sigma: float) -> torch.Tensor:
    """(length, length) weights of a Gaussian blur along one axis; every row sums to 1. `sigma` 0
    blurs nothing."""
    distance = (torch.arange(length)[:, None] - torch.arange(length)).float()
    weight = torch.exp(-((distance / max(sigma, 1e-6)) ** 2) / 2).masked_fill(
        distance.abs() > 3 * sigma, 0
    )
    return weight / weight.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------- schedules


def portion_of_round(number: int, start: float, step: float, maximum: float) -> float:
    """A share in round `number` = 0, 1, 2, ... of CBST: of each class's predictions that become
    pseudo-labels (20 % + 5 % to 50 %), or of the source images that are trained on (3 % + 0.25 % to
    6 %)."""
    return round(min(start + step * number, maximum), 9)


def cbst_rate(number: int) -> float:
    """The factor of the learning rate in round `number` = 0, 1, 2, ...: 1 / sqrt(2)^number, CBST's
    official code (from 1e-4); CRST's keeps its rate (5e-5) in all rounds."""
    return 1 / math.sqrt(2) ** number


# ------------------------------------------------------------------------------------- patch mining


def rare_classes(
    counts: torch.Tensor, number: int = 3, share: float = 1e-3
) -> tuple[list[int], list[int]]:
    """The classes to mine patches for, from the predicted pixels (C,) of each class: (under
    `share`, the `number` rarest).

    Both lists are ordered from the rarest on, ties by class id; classes never predicted come first
    and take places, though no label holds them. By reading the official code: CBST mines the first
    list before the second, CRST the first only.
    """
    counts = torch.as_tensor(counts).double()
    order = counts.argsort(stable=True).tolist()
    under = int((counts / counts.sum().clamp(min=1) < share).sum())
    return order[:under], order[:number]


def mine_patch(
    labels: torch.Tensor,
    rare: Sequence[Sequence[int]],
    crop: tuple[int, int],
    generator: torch.Generator,
    chance=0.8,
) -> tuple[int, int] | None:
    """(top, left) of a crop around a pixel of a rare class in the pseudo-labels (H,W), or None:
    crop anywhere.

    With probability `chance`: of the first group of `rare` (see rare_classes) that has classes in
    this image, one of them is drawn, then one of its pixels; the crop is centred on it and moved
    into the image. An image smaller than the crop gives 0 on that side. Patch mining of CBST's and
    CRST's official code.
    """
    if torch.rand((), generator=generator).item() >= chance:
        return None
    present = set(labels.unique().tolist()) - {IGNORE}
    candidates = next(
        (found for group in rare if (found := [c for c in group if c in present])), None
    )
    if candidates is None:
        return None
    chosen = candidates[torch.randint(len(candidates), (), generator=generator).item()]
    pixels = (labels == chosen).nonzero()  # (n,2)
    centre = pixels[torch.randint(len(pixels), (), generator=generator).item()].tolist()
    edges = zip(centre, crop, labels.shape, strict=True)
    top, left = (max(0, min(at - length // 2, whole - length)) for at, length, whole in edges)
    return top, left


# ----------------------------------------------------------------- STAL: the teacher and its labels


@torch.no_grad()
def update_teacher(
    teacher: torch.nn.Module, student: torch.nn.Module, step: int, decay: float = 0.99
) -> None:
    """Moves the teacher's parameters towards the student's after step `step` (from 0); buffers stay
    the teacher's own.

    STAL's mean teacher: t <- a t + (1 - a) s, a = min(1 - 1/(step + 1), decay), so that step 0
    copies.
    """
    keep = min(1 - 1 / (step + 1), decay)
    own, new = list(teacher.parameters()), list(student.parameters())
    # STAL's official code, mean teacher: t <- a t + (1 - a) s, all tensors in one call
    torch._foreach_mul_(own, keep)
    torch._foreach_add_(own, new, alpha=1 - keep)


def drop_share(epoch: float, epochs: float, start: float = 0.2) -> float:
    """The share alpha_t of pixels without a pseudo-label: `start` at epoch 0, none at the end. In any
    unit: the loops count in steps."""
    # STAL Eq. (7): alpha_t = alpha_0 (1 - t / T)
    return start * (1 - epoch / epochs)


def percentile(
    values: torch.Tensor, share: float, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """The value that `share` of `values` lie below, interpolated as numpy.percentile does: any
    shape -> (1,) float32.

    `counts`, bool of the same shape, leaves values out. By sorting: any size (torch.quantile has a
    limit), no waiting.
    """
    if counts is None:
        last = torch.full((1,), values.numel() - 1, device=values.device)
    else:
        last = (counts.sum() - 1).clamp(min=0).view(1)
        values = values.masked_fill(~counts, torch.inf)
    rank = share * last.double()
    low = rank.floor().long()
    ordered = values.float().flatten().sort().values
    below, above = ordered.gather(0, low), ordered.gather(0, (low + 1).minimum(last))
    return torch.where(rank == low, below, below + (above - below) * (rank - low).float())


def reliable_pseudo_labels(
    prob: torch.Tensor, drop: float, rules: str = "paper", counts: torch.Tensor | None = None
) -> torch.Tensor:
    """The teacher's argmax, 255 for the share `drop` of pixels: (C,H,W) or (N,C,H,W) -> (H,W) or
    (N,H,W) uint8.

    STAL Eqs. (5)-(7): label i is argmax_c p_c where H_i < gamma_t, else ignored; gamma_t is the 100
    (1 - drop)-th percentile of H over the batch (under torchrun over each process's own images).
    `rules="code"`: the official code takes the 100 drop-th percentile and ignores H_i < gamma_t, the
    most confident pixels. drop=0 labels every pixel. `counts` (H,W) or (N,H,W) bool: pixels outside (a
    crop's padding) are ignored and not counted. Raises ValueError for a share outside [0,1] or other
    rules. That `prob` sums to 1 is not checked, which would wait for the device: logits give nonsense.
    """
    if not 0 <= drop <= 1 or rules not in ("paper", "code"):
        raise ValueError(
            f"drop must be in [0,1] and rules 'paper' or 'code', got {drop} and {rules!r}"
        )
    # STAL Eq. (5): H_i = -sum_c p_ic log p_ic
    uncertainty = entropy(prob)
    labels = prob.argmax(-3).to(torch.uint8)
    if drop > 0 and rules == "paper":
        # STAL Eq. (6): y_i = argmax_c p_ic where H_i < gamma_t, else ignored
        labels = labels.masked_fill(
            ~(uncertainty < percentile(uncertainty, 1 - drop, counts)), IGNORE
        )
    elif drop > 0:
        labels = labels.masked_fill(uncertainty < percentile(uncertainty, drop, counts), IGNORE)
    return labels if counts is None else labels.masked_fill(~counts, IGNORE)
