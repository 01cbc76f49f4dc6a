"""One function for each loss; none changes a state. What is minimised?

    from alda.losses import cross_entropy, local_consistency, negative_learning
    from alda.losses import MemoryBank, contrastive, contrastive_sets, ohem_cross_entropy, weighted_consistency

RIPU: Xie et al., arXiv 2111.12940 (Eqs. 6-9). STAL: Guan and Yuan, arXiv 2301.13361 (Eqs. 1-4),
whose contrastive loss is that of U2PL, Wang et al., arXiv 2203.03884.

Axes: N images, C classes, H rows, W columns; in the contrastive part h, w the features' size, P =
N*h*w pixels, K features, A anchors, M negatives. Logits (N,C,H,W) float, labels (N,H,W) integer
train ids with 255 = ignore. Every loss is a scalar; a loss over an empty set of pixels is 0 with
zero gradient, never NaN. Under torch.distributed a mean is over the pixels of all processes
(distributed.mean_count): each process gets its part of it, times the number of processes, for
averaged gradients. What ranks pixels (OHEM's threshold, the contrastive draws) ranks its own.

Differences from papers and official code:

 D11. Local consistency (RIPU Eq. 7): the paper sums over all pixels, here their mean; the code
      averages over pixels next to a label change (--rules code: a 3x3 Laplacian of the ids that is
      not 0, zeros beyond the border). Without such a pixel the code gives NaN, here 0.
 D12. Negative learning (RIPU Eq. 8) is -log(1 - p); the code adds 1e-6 inside, so that its loss is
      1.0e-6 lower. It runs over all target pixels from the first step, as in the code.
 D13. OHEM: min_kept = 0 switches the code's mining off, and nothing labelled gives NaN. Here
      min_kept = 0 keeps the threshold, and a batch without labels has loss 0.
 D14. Unlabelled loss (STAL Eq. 3): weights sum to 1 over the pixels that count; in the code the
      weights of ignored pixels stay in the sum, so that dropping pixels shrinks the loss.
 D15. Contrastive negatives (STAL Eq. 4): labelled ones must be c and not c in the code (none),
      unlabelled ones pseudo-labelled c and ranking c low (nearly none). Here a labelled pixel of
      another class with c among its top 3, and any unreliable unlabelled pixel that ranks c 4th or
      later; the code also asks for a pseudo-label there. A step adds at most 1,024 of them a class to
      the bank, evenly spread over the pixels, where the code adds all that the bank holds.
 D16. Classes of the contrastive loss: in the code an absent class shifts the others' index, and all
      images' labels land in the first (label_onehot). Here each class and image has its own.
"""

import torch
import torch.nn.functional as F

from alda import IGNORE
from alda.distributed import all_gather, mean_count, mean_over_processes


def check_batch(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises ValueError, in one line, for logits that are not (N,C,H,W) float and labels that are not
    (N,H,W) integer of the same images. Looks at shapes only: nothing waits for the device."""
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor):
        raise ValueError(
            "logits and labels must be torch.Tensors; of NumPy arrays: torch.from_numpy"
        )
    fit = logits.dim() == 4 and tuple(labels.shape) == (len(logits), *logits.shape[2:])
    if not fit or not logits.is_floating_point() or labels.is_floating_point():
        found = f"{logits.dtype} {tuple(logits.shape)} and {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"expected float logits (N,C,H,W) and integer labels (N,H,W), got {found}")


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log p_label over the labelled pixels; 0 where no pixel has a label: logits (N,C,H,W)
    float, labels (N,H,W) integer -> scalar float32. Raises ValueError for other shapes."""
    check_batch(logits, labels)
    # RIPU Eq. (6): L_CE = -1 / n sum_i log p_i[y_i] over the n labelled pixels
    total = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / mean_count(labels != IGNORE)


def local_consistency(
    logits: torch.Tensor, labels: torch.Tensor, boundary_only: bool = False, distance: str = "l1"
) -> torch.Tensor:
    """Distance between a pixel's prediction p and the mean m over its 3x3 neighbourhood, RIPU's
    L_cr.

    `boundary_only=False` (`--rules paper`, default): the mean over all pixels, as the equation sums
    them; labels are not read. `boundary_only=True` (`--rules code`): the mean over labelled pixels
    where the label changes, the official code's rule. `distance`: "l1" is sum_c |p_c - m_c|, "kl"
    is sum_c p_c log(p_c / (m_c + 1e-6)). The image border repeats its pixels. Raises ValueError for
    another distance.
    """
    check_batch(logits, labels)
    prob = logits.float().softmax(1)
    mean = F.avg_pool2d(F.pad(prob, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    if distance == "l1":
        # RIPU Eq. (7): || p_i - m_i ||_1
        gap = (prob - mean).abs().sum(1)  # (N,C,H,W) -> (N,H,W)
    elif distance == "kl":
        # the clamp: at p = 0 the logarithm has no gradient
        gap = (prob * (prob.clamp(min=1e-30).log() - (mean + 1e-6).log())).sum(1)
    else:
        raise ValueError(f"distance must be 'l1' or 'kl', got {distance!r}")
    if not boundary_only:
        return gap.mean()
    mask = label_boundary(labels)
    return (gap * mask).sum() / mean_count(mask)


def label_boundary(labels: torch.Tensor) -> torch.Tensor:
    """The official code's label changes: labelled pixels where the 3x3 Laplacian of the ids is not
    0, (N,H,W) -> bool.

    Zeros stand beyond the border, so border pixels count unless they are road (0), and neighbours
    that differ may cancel: kept as it is, because the published numbers were made with it.
    """
    ids = labels.float()
    # sum of 3x3, centre included
    neighbours = F.avg_pool2d(ids[:, None], 3, stride=1, padding=1, divisor_override=1)[:, 0]
    return (9 * ids != neighbours) & (labels != IGNORE)


def negative_learning(prob: torch.Tensor, threshold: float = 0.05) -> torch.Tensor:
    """Mean of -log(1 - p) over the entries with p < threshold, RIPU's L_nl: prob (N,C,H,W) ->
    scalar.

    The threshold decides which entries count and carries no gradient. That `prob` sums to 1 is not
    checked, which would wait for the device: logits give nonsense.
    """
    unlikely = prob.detach() < threshold
    # RIPU Eq. (8): -1 / n sum_{i,c} 1[p_ic < tau] log(1 - p_ic)
    each = -torch.log1p(-prob.float().clamp(max=threshold)) * unlikely
    return each.sum() / mean_count(unlikely)


# --------------------------------------------------------------------------------------------- STAL


def ohem_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, threshold: float = 0.7, min_kept: int = 100_000
) -> torch.Tensor:
    """Mean of -log p_label over the hard pixels: those with p_label <= `threshold`, and never fewer
    than `min_kept`.

    STAL's supervised loss L_s (with 0.4 times the same on the auxiliary head); the `min_kept` least
    likely pixels are kept even if they are above the threshold, all labelled pixels where there are
    fewer. `min_kept=0` leaves the threshold alone; `threshold=1` is plain cross-entropy. The
    official code switches the mining off for min_kept=0 and gives NaN where nothing is labelled;
    here that is 0. No host synchronisation.
    """
    check_batch(logits, labels)
    loss = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORE, reduction="none")
    labelled = labels != IGNORE
    prob = (-loss.detach()).exp().masked_fill(~labelled, 2.0)  # ignored pixels rank last
    if min_kept > 0:  # where fewer are labelled the kthvalue is 2, and all of them are kept
        rank = min(min_kept, prob.numel())
        threshold = prob.flatten().kthvalue(rank).values.clamp(min=threshold)
    kept = (prob <= threshold) & labelled
    # STAL Eq. (2): L_s, the mean of -log p_i[y_i], here over the hard pixels
    return (loss * kept).sum() / mean_count(kept)


def weighted_consistency(
    logits: torch.Tensor,
    labels: torch.Tensor,
    confidence: torch.Tensor,
    gamma: float = 2.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """STAL's unlabelled loss L_u: cross-entropy with pseudo-labels, weighted by confidence^gamma.

    `labels` (N,H,W) pseudo-labels, 255 = unreliable; `confidence` (N,H,W) is the teacher's largest
    probability; `keep` (N,H,W) bool further thins the pixels (stal.keep_by_class). gamma=0
    is the paper's equation, gamma=2 the official code's weighting. The weights are normalised over
    the pixels that count; the official code also sums the weights of ignored pixels, so that
    dropping pixels shrinks its loss (a plain bug, not reproduced).
    """
    check_batch(logits, labels)
    loss = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORE, reduction="none")
    counts = labels != IGNORE if keep is None else (labels != IGNORE) & keep
    weight = confidence.detach().float() ** gamma * counts  # w_i, 0 where pixel i does not count
    # STAL Eq. (3): L_u = sum_i w_i CE_i / sum_i w_i
    whole = mean_over_processes(weight.sum())
    return (loss * weight).sum() / whole.clamp(min=torch.finfo(weight.dtype).tiny)


class MemoryBank:
    """A queue of features for each class, the negatives of the contrastive loss (STAL, U2PL).

        bank = MemoryBank(19, 256, device="cuda")
        bank.add(keys, number)        # keys (C,L,K), the first number[c] of class c count; all processes' keys are added
        negatives = bank.draw(c, u)   # u (...) uniform in [0,1) -> (...,K): the floor(u * count)-th oldest of class c

    One ring buffer: class c owns `sizes[c]` rows of `keys` from row `start[c]`, `pointer[c]` is the
    row it writes next and `count[c]` how many are filled. It lies on the device and never grows
    (590,000 x 256 float32: 604 MB; float16 half of it), where the official code keeps lists on the
    host and copies them at every step. Neither method waits for the device.
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        size: int = 30_000,
        first: int = 50_000,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        sizes = [first] + [size] * (num_classes - 1)
        if min(sizes) < 1:
            raise ValueError(
                f"a class needs room for at least 1 key, got size {size} and first {first}"
            )
        self.smallest = min(sizes)
        self.most = min(1024, self.smallest)  # keys a class that a step adds at most
        self.sizes = torch.tensor(sizes, device=device)
        self.start = self.sizes.cumsum(0) - self.sizes
        self.keys = torch.zeros(sum(sizes), features, device=device, dtype=dtype)
        self.pointer = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.count = torch.zeros(num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, keys: torch.Tensor, number: torch.Tensor) -> None:
        """Appends keys[c, :number[c]] to class c: keys (C,L,K), number (C,) integer, L at most the
        smallest class size.

        Under torch.distributed a collective: every process calls it, and the keys of all are added
        in the order of ranks.
        """
        if keys.shape[1] > self.smallest:
            raise ValueError(
                f"{keys.shape[1]} keys a class at once, but the smallest class has room for {self.smallest}"
            )
        keys, number = keys.to(self.keys.dtype), number.to(torch.int64).clamp(max=keys.shape[1])
        for part, filled in zip(all_gather(keys), all_gather(number), strict=True):
            j = torch.arange(keys.shape[1], device=keys.device)
            # (C,L), all different
            row = self.start[:, None] + (self.pointer[:, None] + j) % self.sizes[:, None]
            real = (j < filled[:, None])[:, :, None]  # (C,L,1)
            # what is no key leaves its row as it was
            self.keys[row] = torch.where(real, part, self.keys[row])
            self.pointer = (self.pointer + filled) % self.sizes
            self.count = (self.count + filled).minimum(self.sizes)

    def draw(self, c: int, u: torch.Tensor) -> torch.Tensor:
        """The floor(u * count)-th oldest keys of class c, with replacement: u (...) in [0,1) ->
        (...,K); zeros if empty."""
        place = pick(u, self.count[c])
        return self.keys[self.start[c] + (self.pointer[c] - self.count[c] + place) % self.sizes[c]]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"keys": self.keys, "pointer": self.pointer, "count": self.count}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores `state_dict()`. Raises ValueError for a bank of other classes, sizes or
        features."""
        for name, own in self.state_dict().items():
            if state[name].shape != own.shape:
                found, expected = tuple(state[name].shape), tuple(own.shape)
                raise ValueError(
                    f"the saved memory bank's {name} are {found}, this run's {expected}: other settings?"
                )
            own.copy_(state[name])


def pick(u: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """floor(u * number), int64, below `number`: a uniform draw of one of `number` things from u in
    [0,1)."""
    return (u * number).long().minimum(number - 1).clamp(min=0)


def places(mask: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Where the rank-th (from 0) True of each row stands: mask (C,P) bool, rank (C,A) -> (C,A)
    int64, any where too few."""
    running = mask.cumsum(1, dtype=torch.int32)
    return torch.searchsorted(running, (rank + 1).int()).clamp(max=mask.shape[1] - 1)


def contrastive_sets(
    prob: torch.Tensor,
    labels: torch.Tensor,
    reliable: torch.Tensor,
    unreliable: torch.Tensor,
    labelled: int,
    threshold: float = 0.3,
    low_rank: int = 3,
    high_rank: int = 20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pixels that serve class c as members, anchors and negatives (STAL Eq. (4), after U2PL).

    `prob` (N,C,h,w) teacher's probabilities, `labels` (N,h,w) with 255 = none: true labels in the
    first `labelled` images, pseudo-labels in the others; `reliable`, `unreliable` (N,h,w) bool as
    from stal.contrastive_masks. Returns three (C,P) bool, P = N*h*w in raster order:
    members    reliable and (pseudo-)labelled c: their centre is the positive;
    anchors    members with p_c > `threshold`;
    negatives  unreliable and, if unlabelled, c ranked low_rank..high_rank-1 (from 0) among the pixel's probabilities;
               if labelled, c among the first low_rank although the label is another class.
    The official code asks labelled negatives to be c and not c (none), unlabelled ones to be
    pseudo-labelled c as well as to rank c low (nearly none), and mixes up classes when one is
    absent; here each class has its own sets.
    """
    num_classes = prob.shape[1]
    classes = torch.arange(num_classes, device=prob.device)[:, None]  # (C,1)
    order = prob.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (N,C,h,w): 0 for a pixel's likeliest class
    # (N,C,h,w) -> (C,N,h,w) -> (C,P)
    rank, chance = (x.transpose(0, 1).flatten(1) for x in (rank, prob))
    true = torch.arange(labels.numel(), device=labels.device) < labelled * labels[0].numel()  # (P,)
    # (N,h,w) -> (P,)
    labels, reliable, unreliable = (x.flatten() for x in (labels.long(), reliable, unreliable))
    members = reliable & (labels == classes)
    confused = (labels != IGNORE) & (labels != classes) & (rank < low_rank)
    unlikely = (rank >= low_rank) & (rank < high_rank)
    return (
        members,
        members & (chance > threshold),
        unreliable & torch.where(true, confused, unlikely),
    )


def class_contrast(
    anchors: torch.Tensor, positive: torch.Tensor, negatives: torch.Tensor, temperature: float = 0.5
) -> torch.Tensor:
    """The contrastive loss of one class: anchors (A,K), positive (K,), negatives (A,M,K) -> scalar;
    only anchors learn.

    With <,> the cosine and t the temperature:
    mean_a -log( e^(<z_a,z+>/t) / (e^(<z_a,z+>/t) + sum_m e^(<z_a,z-_am>/t)) )
    """
    anchors = F.normalize(anchors, dim=-1)
    with torch.no_grad():
        positive, negatives = F.normalize(positive, dim=-1), negatives.float()
        lengths = torch.linalg.vector_norm(negatives, dim=-1).clamp(min=1e-12)  # (A,M)
    to_positive = anchors @ positive  # (A,K) @ (K,) -> (A,)
    # divided afterwards: normalised negatives would be one more (A,M,K)
    to_negatives = torch.einsum("ak,amk->am", anchors, negatives) / lengths
    similarity = torch.cat([to_positive[:, None], to_negatives], 1) / temperature  # (A,1+M)
    # STAL Eq. (4): mean_a -log( e^s_a+ / (e^s_a+ + sum_m e^s_am) )
    return (similarity.logsumexp(1) - similarity[:, 0]).mean()


@torch.no_grad()
def contrastive_keys(
    teacher_features: torch.Tensor, negatives: torch.Tensor, most: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch's negatives for `MemoryBank.add`: (keys (C,L,K) float32, number (C,)), L = `most`.

    `teacher_features` (N,K,h,w), `negatives` (C,P) bool, the third of `contrastive_sets`. Of more
    than `most` negatives of a class that many are taken, evenly spread over the pixels.
    """
    pixels = teacher_features.shape[2] * teacher_features.shape[3]
    flat = teacher_features.float().flatten(2)  # (N,K,h,w) -> (N,K,hw)
    found = negatives.sum(1, keepdim=True)  # (C,1)
    j = torch.arange(most, device=flat.device)
    at = places(negatives, torch.where(found > most, j * found // most, j))  # (C,L)
    return flat[at // pixels, :, at % pixels], found[:, 0]


def class_centres(teacher_features, members, weight=None) -> torch.Tensor:
    """The mean of the teacher's features (N,K,hw) over each class's `members` (C,P) bool -> (C,K).

    `weight` (N,h,w), where given, weights the pixels.
    """
    pixels = teacher_features.shape[2]
    # (C,P) -> (C,N,hw) -> (N,C,hw)
    share = members.view(len(members), -1, pixels).transpose(0, 1).float()
    if weight is not None:
        share = share * weight.detach().float().flatten(1)[:, None]  # (N,C,hw) * (N,1,hw)
    # (N,C,hw) @ (N,hw,K) -> (N,C,K) -> (C,K)
    total = (share @ teacher_features.transpose(1, 2)).sum(0)
    return total / share.sum((0, 2))[:, None].clamp(min=1e-12)


def contrastive(
    features: torch.Tensor,
    teacher_features: torch.Tensor,
    sets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bank: MemoryBank,
    *,
    anchors: int = 256,
    negatives: int = 50,
    temperature: float = 0.5,
    weight: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    draws: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """STAL's contrastive loss L_c over the classes of the batch; reads the bank and leaves it as it
    is.

    `features` (N,K,h,w) the student's, `teacher_features` the teacher's at the same pixels, `sets`
    from `contrastive_sets`, whose negatives the caller has put into the bank (`contrastive_keys`).
    Each class draws, with replacement, `anchors` of its anchor pixels and `negatives` bank entries
    for each of them; its positive is the mean of the teacher's features over its members. The sum
    over classes is divided by the classes that have members; a class without anchors or with an
    empty bank adds 0; fewer than two classes give 0 (as in the official code). `weight` (N,h,w)
    weights the pixels in the class centres (the official option conf_weight: the teacher's largest
    probability).

    `generator` (on the features' device) draws; or `draws` gives the uniform numbers in [0,1),
    (C,anchors) and (C,anchors,negatives). Every shape is fixed, nothing waits for the device;
    float32 also under autocast. Raises ValueError for sets of other classes or pixels.
    """
    device, (members, pool, _) = features.device, sets
    number, pixels = len(members), features.shape[2] * features.shape[3]
    if members.shape[1] != len(features) * pixels or number != len(bank.sizes):
        raise ValueError(
            f"the sets are for {number} classes and {members.shape[1]} pixels, the bank holds "
            f"{len(bank.sizes)} classes and the features {len(features) * pixels} pixels: were the masks "
            "made at the features' size?"
        )
    if draws is None:
        u = torch.rand(number, anchors, generator=generator, device=device)
        v = torch.rand(number, anchors, negatives, generator=generator, device=device)
    else:
        u, v = draws
    with torch.autocast(device.type, enabled=False):
        features = features.float().flatten(2)  # (N,K,h,w) -> (N,K,hw)
        centres = class_centres(teacher_features.detach().float().flatten(2), members, weight)
        at = places(pool, pick(u, pool.sum(1, keepdim=True)))  # (C,A)
        chosen = features[at // pixels, :, at % pixels]  # (N,K,hw) -> (C,A,K)
        present = members.any(1)
        valid = pool.any(1) & (bank.count > 0) & (present.sum() > 1)
        # on a CPU looking is free: classes that are not there need not be computed
        there = valid.tolist() if features.is_cpu else [True] * number
        losses = []
        for c in range(number):
            if there[c]:
                negatives = bank.draw(c, v[c])  # (A,M,K)
                losses.append(class_contrast(chosen[c], centres[c], negatives, temperature))
            else:
                losses.append(chosen[c].sum() * 0)
        return (torch.stack(losses) * valid).sum() / present.sum().clamp(min=1)
