"""STAL's adaptive mixing, banks and contrastive masks. What happens in STAL's step?

    from alda.stal import Partners, ConfidenceBank, ImageBank, class_box, cutmix
    others = partners.next(step)                             # what step - 2 drew, loaded meanwhile
    partners.draw(confidence.value, images, generator)       # at once: what step + 2 will get

The losses are in losses.py, the pseudo-labels and the teacher in selftraining.py, the loop in
loop.py. STAL (later ILM-ASSL): Guan and Yuan, arXiv 2301.13361. Adaptive parts (confidence bank,
copy-paste, CutMix, keep rate): AEL, Hu et al., arXiv 2110.05474; STAL's official code uses them,
its equations do not name them. Contrastive masks: U2PL, Wang et al., arXiv 2203.03884. Each part is
a function or class of its own: leave the call out to ablate it.

Mixing takes three steps, so that the device never waits: a step draws classes and images on the
device, the next one reads the draws (the device has begun the step that made them, the rest of it is
queued) and starts threads that load them, the one after that mixes them in. Nothing else waits:
shapes do not depend on values, and random numbers u, uniform in [0,1), are arguments: draw them
with torch.rand(..., generator=...) or give recorded ones.

Axes: N images, C classes, H rows, W columns, h, w features; labels uint8 train ids, 255 = none.

Differences from papers and official code:

 D37. Confidences start at 0 and only classes of the batch move; the code starts from random numbers
      and pulls absent classes towards 0.
 D38. The keep map of the unlabelled loss is drawn for each image; the code shares one.
 D39. CutMix mixes every image of the batch, from an image that was drawn two steps before; the code
      mixes one image and fails at batch size 1. A class that fills an image has the image as its
      box; the code has none there, and takes H^2 for the area. A component is drawn by area, the
      code's uniformly, with another try if it is too small.
 D40. Where no image is known to hold the drawn class, CutMix cuts from any target image, the code from
      any unlabelled one; and the code notes the shares of classes of both images that it mixes, here
      those of the batch's own are noted.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from alda import IGNORE, deeplab
from alda.acquisition import entropy
from alda.datasets import (
    NUM_CLASSES,
    SegmentationDataset,
    TrainingView,
    mix_seed,
    normalise,
    truth_inside,
)
from alda.distributed import all_reduce, broadcast_buffers, rank_and_world
from alda.losses import (
    MemoryBank,
    contrastive_sets,
    ohem_cross_entropy,
    pick,
    places,
    weighted_consistency,
)
from alda.run import Run, transform_of
from alda.selftraining import percentile, reliable_pseudo_labels, update_teacher
from alda.settings import Settings

PASTED = 3  # draws of a class to copy and paste, for a batch; some are equal
# the official list for copy-paste: all train ids but road, sidewalk, building, vegetation and sky
COPY_PASTE_CLASSES = tuple(c for c in range(19) if c not in (0, 1, 2, 8, 10))


# ---------------------------------------------------------------------------- confidence of classes


class ConfidenceBank:
    """Running confidence of each class, `value` (C,) float32 (AEL): starts at 0, where all classes
    are alike.

    value_c <- m value_c + (1 - m) mean of p_c over the pixels labelled c, for the classes that are
    present. The official code starts from random numbers and pulls absent classes towards 0. Under
    torch.distributed `update` is a collective over the pixels of all processes.
    """

    def __init__(
        self, num_classes: int, momentum: float = 0.999, device: torch.device | str = "cpu"
    ):
        self.momentum, self.value = momentum, torch.zeros(num_classes, device=device)

    @torch.no_grad()
    def update(self, prob: torch.Tensor, labels: torch.Tensor) -> None:
        """prob (N,C,H,W), the student's on labelled images; labels (N,H,W), 255 = none."""
        hits = [labels == c for c in range(len(self.value))]
        sums = [(prob[:, c].float() * hit).sum().double() for c, hit in enumerate(hits)]
        pixels = [hit.sum() for hit in hits]
        both = torch.cat([torch.stack(sums), torch.stack(pixels)])  # (2C,)
        total, number = all_reduce(both).chunk(2)
        mean = (total / number.clamp(min=1)).float()
        now = self.momentum * self.value + (1 - self.momentum) * mean
        self.value = torch.where(number > 0, now, self.value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.value.copy_(state["value"])


def class_chances(confidence: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """How likely each class is drawn: softmax((1 - confidence)^power), (C,) -> (C,) float32 (AEL).

    The official code has power 1 for CutMix and 0.5 for copy-paste, there among COPY_PASTE_CLASSES
    only: pass confidence[list(COPY_PASTE_CLASSES)] and look the drawn places up in that tuple.
    """
    return ((1 - confidence).clamp(min=0) ** power).softmax(0)


def draw(chances: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Draws by `chances` (C,) from u in [0,1), by the inverse of the cumulative sum: u (...) ->
    (...) int64."""
    drawn = torch.searchsorted(chances.double().cumsum(0), u.double(), right=True)
    return drawn.clamp(max=len(chances) - 1)


def keep_by_class(
    prediction: torch.Tensor, confidence: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """Which pixels the unlabelled loss keeps: prediction (N,H,W) of the student, u the same shape
    -> (N,H,W) bool.

    AEL: a pixel predicted as c is kept with chance (1 - confidence_c) / max_d (1 - confidence_d), so
    that the least confident class is kept whole. Each image has its own random numbers.
    """
    weakness = (1 - confidence).clamp(min=0)
    rate = weakness / weakness.amax().clamp(min=1e-12)
    return u >= (1 - rate)[prediction.long()]


# ------------------------------------------------------------------------------------------- mixing


def copy_paste(
    images: torch.Tensor,
    labels: torch.Tensor,
    other_images: torch.Tensor,
    other_labels: torch.Tensor,
    classes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive copy-paste (AEL): the other images' pixels of `classes` (k,) over images and labels.

    Images (N,3,H,W) float, labels (N,H,W) train ids in one label space. Returns new images and
    labels.
    """
    # (N,H,W,1) == (k,) -> (N,H,W,k) -> (N,H,W)
    pasted = (other_labels[..., None] == classes).any(-1)
    images = torch.where(pasted[:, None], other_images, images)
    return images, torch.where(pasted, other_labels, labels)


class ImageBank:
    """Which unlabelled image holds how much of which class: `share` (C,images) float32, 0 until an
    image was predicted.

    Adaptive CutMix (AEL) draws a class by its weakness, then an image that holds it, as the image
    cut from.
    """

    def __init__(self, num_classes: int, images: int, device: torch.device | str = "cpu"):
        self.share = torch.zeros(num_classes, images, device=device)

    @torch.no_grad()
    def update(self, index: torch.Tensor, prediction: torch.Tensor) -> None:
        """Sets the shares of the images `index` (N,) int64 from the teacher's prediction
        (N,H,W)."""
        area = torch.stack([(prediction == c).sum((1, 2)) for c in range(len(self.share))])  # (C,N)
        self.share[:, index] = area / prediction[0].numel()

    def draw(
        self, chances: torch.Tensor, u: torch.Tensor, least: float = 0.01
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A class by `chances` (C,) and an image with at least the share `least` of it (any image
        if none has), u (2,).

        Returns two 0-dim int64 tensors on the device; read them a step later, so that the step does
        not wait.
        """
        c = draw(chances, u[:1])
        holds = self.share[c][0] >= least  # (images,)
        return c[0], nth(holds | ~holds.any(), u[1])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"share": self.share}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.share.copy_(state["share"])


def nth(mask: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The place of the floor(u * n)-th of the n Trues of `mask` (P,), a 0-dim int64; any where there
    is none."""
    return places(mask[None], pick(u, mask.sum()).view(1, 1))[0, 0]


def class_box(
    prediction: torch.Tensor,
    c: torch.Tensor | int,
    u: torch.Tensor,
    least: float = 0.005,
    stride: int = 4,
    sweeps: int = 16,
) -> torch.Tensor:
    """A box around a patch of class c for CutMix: prediction (H,W), u (4,) -> (4,) int64 y0, x0,
    y1, x1 (ends excluded).

    The patch is the connected component (8 neighbours) of a random pixel of the class (u[0]),
    searched on every `stride`-th pixel by `sweeps` sweeps along rows and columns: a maze with more
    turns is cut. The box is its bounding box, as in STAL's configurations. Where the class is absent
    or its patch has no more than the share `least` of the image, the box is a half of the image of
    random shape (u[1]) and place (u[2], u[3]), plain CutMix. The official code draws a component
    uniformly (here: by area) and tries the next if it is too small.
    """
    height, width = prediction.shape
    grid = prediction[::stride, ::stride] == c
    cells = torch.arange(grid.numel(), device=grid.device)
    start = (cells == nth(grid.flatten(), u[0])).view_as(grid) & grid
    patch = component(grid, start, sweeps)
    found = patch.sum() > least * grid.numel()
    y0, y1 = extent(patch.any(1), stride, height)
    x0, x1 = extent(patch.any(0), stride, width)
    tall = height * 0.5 ** u[1]  # from the whole height to half of it; the width makes up for it
    a0, a1 = place(tall, height, u[2])
    b0, b1 = place(height * width / 2 / tall, width, u[3])
    return torch.where(found, torch.stack([y0, x0, y1, x1]), torch.stack([a0, b0, a1, b1]))


def extent(filled: torch.Tensor, stride: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First row (or column) and the one after the last, of a mask of every `stride`-th: (n,) bool
    -> two 0-dim int64."""
    i = torch.arange(len(filled), device=filled.device)
    first, last = i.masked_fill(~filled, len(filled)).amin(), i.masked_fill(~filled, -1).amax()
    return first * stride, (last * stride + stride).clamp(max=length)


def place(size: torch.Tensor, length: int, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An interval of `size` within 0..length, from the first place (u = 0) to the last (u = 1)."""
    size = size.round().clamp(min=1).long()
    begin = ((length - size) * u).round().long()
    return begin, begin + size


def component(grid: torch.Tensor, start: torch.Tensor, sweeps: int) -> torch.Tensor:
    """The True pixels of `grid` (H,W) that are connected (8 neighbours) with `start`, by at most
    `sweeps` sweeps: bool."""
    reached = start.float()
    runs = [(~grid).cumsum(dim) for dim in (1, 0)]  # pixels of one run have the same number
    for _ in range(sweeps):
        for dim, run in zip((1, 0), runs, strict=True):
            hit = reached.new_zeros(len(grid) + (dim == 0), grid.shape[1] + (dim == 1))
            reached = hit.scatter_reduce(dim, run, reached, "amax").gather(dim, run) * grid
        reached = F.max_pool2d(reached[None, None], 3, stride=1, padding=1)[0, 0] * grid
    return reached.bool()


def cutmix(own: torch.Tensor, other: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """`own` with the boxes of `other`: images (N,3,H,W) or labels (N,H,W), boxes (N,4) -> the same
    shape."""
    y0, x0, y1, x1 = boxes.T[:, :, None, None]  # each (N,1,1)
    row = torch.arange(own.shape[-2], device=own.device)[:, None]
    col = torch.arange(own.shape[-1], device=own.device)
    inside = (row >= y0) & (row < y1) & (col >= x0) & (col < x1)  # (N,H,W)
    return torch.where(inside if own.ndim == 3 else inside[:, None], other, own)


# ----------------------------------------------------------------------------- images to mix in


class Others(NamedTuple):
    """Images to cut from, on the device."""

    images: torch.Tensor  # (N,3,H,W) float32
    truth: torch.Tensor  # (N,H,W) uint8, datasets.truth_inside: for the log, and where padding is
    classes: torch.Tensor  # (N,) int64, the drawn classes


class Partners:
    """For each unlabelled image of a batch another one to cut a box from: a target image that the
    image bank says to hold a class drawn by its weakness.

    With a checkpoint of `state_dict()` a resumed run mixes the same images.
    """

    def __init__(self, s: Settings, target: SegmentationDataset, device: torch.device):
        rank, world = rank_and_world()
        self.device, self.batch = device, s.batch // world  # images of this process
        seed = mix_seed(s.seed, 30, rank)
        self.view = TrainingView(target, transform_of(s, 2), seed, partial(truth_inside, target))
        self.pool = ThreadPoolExecutor(max(1, s.workers))
        self.reset()

    def reset(self) -> None:
        """Forgets what was drawn: the next two steps mix nothing."""
        self.drawn: torch.Tensor | None = None  # (N,2) of the last step, on its way to the host
        self.arrived: torch.cuda.Event | None = None
        # rows whose images are being loaded; the step that asked
        self.asked: tuple[torch.Tensor, int] | None = None
        self.loading: list[Future] = []  # one for each row

    def draw(self, confidence: torch.Tensor, bank: ImageBank, generator: torch.Generator) -> None:
        """Draws a row (class, image) for each image of a batch, by the classes' confidence (C,);
        reads nothing from the device."""
        u = torch.rand(self.batch, 2, generator=generator, device=self.device)
        chances = class_chances(confidence)
        rows = torch.stack([torch.stack(bank.draw(chances, one)) for one in u])
        self.drawn = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        self.drawn.copy_(rows, non_blocking=True)
        if rows.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def next(self, step: int) -> Others | None:
        """The images that were drawn two steps ago (None in the first two steps); starts loading
        those of the last step."""
        ready, self.loading, self.asked = self.loading, [], None
        if self.drawn is not None:
            self._start(self._read(), step)
        if not ready:
            return None
        batch = [torch.stack(part) for part in zip(*(row.result() for row in ready), strict=True)]
        if self.device.type == "cuda":
            batch = [x.pin_memory() for x in batch]
        images, truth, classes = (x.to(self.device, non_blocking=True) for x in batch)
        return Others(normalise(images), truth, classes)

    def _read(self) -> torch.Tensor:
        if self.arrived is not None:
            # until the device has begun the step that drew, not until it has done it
            self.arrived.synchronize()
        return self.drawn

    def _start(self, rows: torch.Tensor, step: int) -> None:
        self.asked = (rows.clone(), step)
        draws = [(step * self.batch + n, *row) for n, row in enumerate(rows.tolist())]
        self.loading = [self.pool.submit(self._load, *row) for row in draws]

    def _load(self, draw: int, c: int, index: int) -> tuple[torch.Tensor, ...]:
        """In a thread: image, truth and class of a row."""
        return (*self.view[draw, index], torch.tensor(c))

    def state_dict(self) -> dict:
        """What the next two steps depend on."""
        rows, step = self.asked or (torch.empty(0, 2, dtype=torch.int64), 0)
        drawn = self._read().clone() if self.drawn is not None else rows[:0]
        return {"drawn": drawn, "asked": rows, "step": step}

    def load_state_dict(self, state: dict) -> None:
        self.reset()
        if len(state["asked"]):
            self._start(state["asked"], state["step"])
        if len(state["drawn"]):
            self.drawn = state["drawn"]


# ------------------------------------------------------------------------------- contrastive masks


def contrastive_masks(
    labels: torch.Tensor,
    pseudo: torch.Tensor,
    uncertainty: torch.Tensor,
    size: tuple[int, int],
    share: float = 0.2,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, reliable and unreliable pixels at the features' size, for losses.contrastive_sets.

    `labels` (L,H,W) true labels, `pseudo` (U,H,W) pseudo-labels and `uncertainty` (U,H,W) their
    entropy -> (L+U,h,w) uint8 and twice bool, by nearest neighbour. Labelled pixels are both;
    unlabelled ones are reliable up to the 100 share-th percentile of the entropy and unreliable
    from the 100 (1 - share)-th on (STAL: 20 % and 80 %). `counts` as in
    selftraining.percentile. Pseudo-labels by the paper's rule label all reliable pixels; those by the
    code's rule hardly any.
    """
    low, high = (percentile(uncertainty, s, counts) for s in (share, 1 - share))
    masks = torch.stack([uncertainty <= low, uncertainty >= high])
    if counts is not None:
        masks = masks & counts
    known = (labels != IGNORE).expand(2, *labels.shape)
    # (3,L+U,H,W)
    planes = torch.cat([torch.cat([labels, pseudo])[None], torch.cat([known, masks], 1)]).float()
    small, reliable, unreliable = F.interpolate(planes, size=tuple(size), mode="nearest")
    return small.to(torch.uint8), reliable.bool(), unreliable.bool()


# ----------------------------------------------------------------------------------------- the step


class StalState:
    """What STAL keeps beside the student: `teacher`, `confidence` (ConfidenceBank), `images`
    (ImageBank), `partners` (Partners) and, with --contrast, `bank` (MemoryBank, else None)."""

    def __init__(self, s: Settings, run: Run, target):
        self.s, self.run = s, run
        self.teacher = copy.deepcopy(run.model).requires_grad_(False)
        self.confidence = ConfidenceBank(NUM_CLASSES, s.confidence_momentum, run.device)
        self.images = ImageBank(NUM_CLASSES, len(target), device=run.device)
        self.partners = Partners(s, target, run.device)
        self.bank = None
        if s.contrast:
            self.bank = MemoryBank(NUM_CLASSES, 256, s.bank, s.bank * 5 // 3, run.device)

    def parts(self) -> dict:
        """Everything of it under its name in a checkpoint."""
        names = ("teacher", "confidence", "images", "partners", "bank")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def begin_loop(self) -> None:
        """The second and later loops: the student starts as the last teacher, or anew with
        --restart; so does the teacher. Images that are labelled now are forgotten."""
        begin = self.run.fresh_model() if self.s.restart else self.teacher
        self.run.model.load_state_dict(begin.state_dict())
        self.teacher.load_state_dict(begin.state_dict())
        self.run.optimizer.state.clear()
        self.partners.reset()
        if self.s.restart:
            self.confidence.value.zero_()
            if self.bank is not None:
                self.bank.count.zero_()
        self.images.share.zero_()

    def for_the_log(self) -> dict:
        """For a log line: the confidence of each class and how full its part of the memory bank
        is."""
        line = {"confidence": self.confidence.value.tolist()}
        return line if self.bank is None else {**line, "bank": self.bank.count.tolist()}


def step_generator(s: Settings, step: int, device) -> torch.Generator:
    """The random draws of a step: a function of seed, step and process; a checkpoint needs no state
    of it."""
    seed = mix_seed(s.seed, 20, step, rank_and_world()[0])
    return torch.Generator(device).manual_seed(seed)


def supervised_loss(s: Settings, logits, auxiliary, labels) -> torch.Tensor:
    """L_s: OHEM cross-entropy on the labelled images, plus --auxiliary times the same on that head.

    `logits` (N,C,H,W), `auxiliary` (N,C,h,w) or None, `labels` (N,H,W).
    """
    loss = ohem_cross_entropy(logits, labels, s.ohem_threshold, s.ohem_pixels)
    if auxiliary is None:
        return loss
    auxiliary = deeplab.upsample(auxiliary.float(), labels.shape[-2:])
    extra = ohem_cross_entropy(auxiliary, labels, s.ohem_threshold, s.ohem_pixels)
    return loss + s.auxiliary * extra


def unlabelled_loss(
    s: Settings, logits, pseudo, confidence, state=None, generator=None
) -> torch.Tensor:
    """L_u: with --rules code weighted by the teacher's confidence^2; --class-keep thins the classes
    that are easy by now, which a `state` knows (STAL's; --teacher has none).

    `logits` (N,C,h,w) the student's, `pseudo` (N,H,W) labels and `confidence` (N,H,W) the teacher's.
    """
    logits = deeplab.upsample(logits.float(), pseudo.shape[-2:])
    keep = None
    if s.class_keep and state is not None:
        u = torch.rand(pseudo.shape, generator=generator, device=pseudo.device)
        keep = keep_by_class(logits.argmax(1), state.confidence.value, u)
    gamma = 2.0 if s.rules == "code" else 0.0
    return weighted_consistency(logits, pseudo, confidence, gamma, keep)


def contrast_sets(labels, labelled_logits, pseudo, weak, inside, size):
    """The sets of `losses.contrastive_sets` for the labelled and, behind them, the unlabelled images,
    at the features' `size` (h, w).

    `labels` (N,H,W) with the teacher's logits (N,C,h,w); `pseudo` (N,H,W) with its logits `weak`
    (N,C,H,W) on the plain images, cut as the images were; `inside` (N,H,W) bool.
    """
    uncertainty = entropy(weak.softmax(1))
    masks = contrastive_masks(labels, pseudo, uncertainty, size, counts=inside)
    logits = torch.cat([labelled_logits.float(), deeplab.upsample(weak, size)])
    return contrastive_sets(logits.softmax(1), *masks, labelled=len(labels))


def draw_others(s: Settings, state: StalState, step: int, generator) -> Others | None:
    """The images to cut from, drawn two steps ago; draws those for the step after next. None without
    CutMix."""
    if not s.cutmix or not (s.unlabelled or s.contrast):
        return None
    others = state.partners.next(step)
    state.partners.draw(state.confidence.value, state.images, generator)
    return others


def predicted(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The classes of the first images (N,H,W), 255 in a crop's padding: logits (N or 2N,C,H,W)."""
    return logits[: len(truth)].argmax(1).masked_fill(truth == IGNORE, IGNORE)


def paste(batch: list, others: list | None, confidence, generator):
    """Images and labels of a labelled batch, up to three classes of another image pasted over half of
    them.

    `batch` and `others` are [images (N,3,H,W), labels (N,H,W), ...]; the classes are drawn for the
    batch three times, with replacement, by their `confidence` (C,), among COPY_PASTE_CLASSES. AEL, as
    STAL's configurations.
    """
    images, labels = batch[:2]
    if others is None:
        return images, labels
    device = images.device
    u = torch.rand(len(images) + PASTED, generator=generator, device=device)
    allowed = torch.tensor(COPY_PASTE_CLASSES).to(device, non_blocking=True)
    chances = class_chances(confidence[allowed], power=0.5)
    classes = allowed[draw(chances, u[len(images) :])]
    left_out = (u[: len(images)] >= 0.5)[:, None, None]
    other_labels = others[1].masked_fill(left_out, IGNORE)
    return copy_paste(images, labels, others[0], other_labels, classes)


@torch.no_grad()
def plain_logits(run: Run, teacher, images, others: Others | None) -> torch.Tensor:
    """The teacher's logits, in eval mode, for the plain unlabelled images (N,3,H,W) and, behind them,
    for the images they are to be mixed with: (N,C,H,W) or (2N,C,H,W) float32 at the images' size."""
    if others is not None:
        images = torch.cat([images, others.images])
    teacher.eval()
    with run.autocast():
        logits = teacher(images)
    teacher.train()
    return deeplab.upsample(logits.float(), images.shape[-2:])


@torch.no_grad()
def taught(s: Settings, run: Run, teacher, batch, drop: float, generator) -> list[torch.Tensor]:
    """A queried target batch [images (N,3,H,W), labels (N,H,W)] with what the mean teacher says of the
    pixels that have no label: [images, labels, pseudo-labels (N,H,W) uint8, its confidence (N,H,W)],
    without the last two where --unlabelled 0 gives them no weight.

    --teacher, this project's combination: the teacher in eval mode on the plain images, the share
    `drop` of highest entropy left out (STAL Eqs. 5-7), then CutMix: half of each image is cut from the
    one before it in the batch, labels and pseudo-labels alike.
    """
    images, labels = batch
    given = [images, labels]
    if s.unlabelled:
        prob = plain_logits(run, teacher, images, None).softmax(1)
        pseudo = reliable_pseudo_labels(prob, drop, s.rules, labels == IGNORE)
        given += [pseudo, prob.amax(1)]
    if not s.cutmix or len(images) < 2:
        return given
    u = torch.rand(len(images), 4, generator=generator, device=images.device)
    no_class = NUM_CLASSES  # the box of a class that is absent is half of the image
    boxes = torch.stack([class_box(labels[n], no_class, u[n]) for n in range(len(images))])
    return [cutmix(x, x.roll(1, 0), boxes) for x in given]


@torch.no_grad()
def update_teacher_and_buffers(teacher, student, step: int, decay: float) -> None:
    """After step `step` of a run with --teacher: the mean teacher's parameters move towards the
    student's, and its batch norm takes over the student's running statistics (it sees no image in
    train mode, unlike STAL's): of the first process, for it labels in eval mode in every one."""
    update_teacher(teacher, student, step, decay)
    for own, new in zip(teacher.buffers(), student.buffers(), strict=True):
        own.copy_(new)
    broadcast_buffers(teacher)


@torch.no_grad()
def train_mode(teacher, images) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(logits (N,C,h,w), features (N,K,h,w) or None) of the teacher in train mode: its batch norm
    normalises these images alone and keeps its own running statistics."""
    logits, features, _ = teacher(images, extras=True)
    return logits, features


def cut(images, logits, truth, others: Others | None, generator):
    """Adaptive CutMix of an unlabelled batch: boxes around the drawn class of each other image are
    cut into `images` (N,3,H,W), into the teacher's `logits` (of `plain_logits`) and `truth` (N,H,W)."""
    if others is None:
        return images, logits, truth
    n = len(images)
    own, other = logits[:n], logits[n:]
    prediction = other.argmax(1).masked_fill(others.truth == IGNORE, IGNORE)
    u = torch.rand(n, 4, generator=generator, device=images.device)
    boxes = torch.stack([class_box(prediction[i], others.classes[i], u[i]) for i in range(n)])
    mixed = cutmix(images, others.images, boxes), cutmix(own, other, boxes)
    return *mixed, cutmix(truth, others.truth, boxes)


@torch.no_grad()
def pseudo_label_health(pseudo, truth, inside, labelled=True) -> dict[str, torch.Tensor]:
    """Share of the pixels `inside` that have a pseudo-label, and its accuracy where the truth is
    known, unless nothing is `labelled`; 0-dim. For the log only."""
    kept = {"kept": (pseudo != IGNORE).sum() / inside.sum().clamp(min=1)}
    if not labelled:
        return kept
    judged = (pseudo != IGNORE) & (truth < NUM_CLASSES)
    right = ((pseudo == truth) & judged).sum()
    return {**kept, "accuracy": right / judged.sum().clamp(min=1)}
