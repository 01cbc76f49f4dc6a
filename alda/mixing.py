"""Which images are mixed into a batch? STAL's adaptive copy-paste and CutMix while training, without waiting for the device.

    partners = Partners(s, source, target, device)
    others = partners.next(step)                          # what step - 2 drew, loaded meanwhile; {} in the first two steps
    partners.draw(confidence.value, bank, generator)      # at once, before the step's work: what step + 2 will get

Copy-paste and CutMix: AEL, Hu et al., arXiv 2110.05474, as in STAL's official code (arXiv 2301.13361); the tensor functions are
in selftraining.py. A step begins by drawing classes and images on the device. The next step reads them: the device has then
begun the step that drew them, and all the rest of that step is still queued. Threads load the images; the step after that
uses them. N is the batch.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from alda.datasets import (
    NUM_CLASSES,
    SegmentationDataset,
    TrainingView,
    class_presence,
    mix_seed,
    truth_inside,
)
from alda.processes import rank_and_number
from alda.run import transform_of
from alda.selftraining import COPY_PASTE_CLASSES, ImageBank, class_chances, draw
from alda.settings import Settings

PASTE, CUT = 0, 1  # what a drawn row is for


class Others(NamedTuple):
    """Images to mix in, on the device."""

    images: torch.Tensor  # (N,3,H,W) float32
    labels: (
        torch.Tensor
    )  # (N,H,W) uint8; for CUT datasets.truth_inside: read for the log, and to know what is outside
    classes: torch.Tensor  # (N,) int64, the drawn classes


class Partners:
    """For each image of a batch another one, which holds a class drawn by its weakness.

    PASTE: a labelled source image, whose pixels of the class are pasted onto a labelled image. CUT: a target image that the
    image bank says to hold the class, of which a box is cut into an unlabelled image. `--no-copy-paste` and `--no-cutmix`
    leave them out. With a checkpoint of `state_dict()` a resumed run mixes the same images.
    """

    def __init__(
        self,
        s: Settings,
        source: SegmentationDataset,
        target: SegmentationDataset,
        device: torch.device,
    ):
        self.s, self.device, self.rank = s, device, rank_and_number()[0]
        seeds = [mix_seed(s.seed, 30, kind, self.rank) for kind in (PASTE, CUT)]
        self.views = [
            TrainingView(source, transform_of(s, 1), seeds[PASTE]),
            TrainingView(target, transform_of(s, 2), seeds[CUT], partial(truth_inside, target)),
        ]
        self.presence = (
            class_presence(source, s.workers) if s.copy_paste else np.zeros((1, NUM_CLASSES), bool)
        )
        self.classes = torch.tensor(COPY_PASTE_CLASSES, device=device)
        self.held = torch.from_numpy(self.presence.any(0)).to(device)[self.classes].float()
        self.kinds = [PASTE] * (s.copy_paste and bool(self.held.any())) + [CUT] * (
            s.cutmix and s.unlabelled + s.contrast > 0
        )
        self.pool = ThreadPoolExecutor(max(1, s.workers))
        self.reset()

    def reset(self) -> None:
        """Forgets what was drawn: the next two steps mix nothing."""
        self.drawn: torch.Tensor | None = None  # (rows, 2) of the last step, on its way to the host
        self.arrived: torch.cuda.Event | None = None
        self.asked: tuple[torch.Tensor, int] | None = (
            None  # rows whose images are being loaded; the step that asked
        )
        self.loading: list[Future] = []  # one for each row

    def draw(self, confidence: torch.Tensor, bank: ImageBank, generator: torch.Generator) -> None:
        """Draws a row (class, image) for each image, by the classes' confidence (C,); reads nothing from the device."""
        rows = []
        for kind in self.kinds:
            u = torch.rand(self.s.batch, 2, generator=generator, device=self.device)
            if (
                kind == PASTE
            ):  # the image is chosen when the row is read, from those that hold the class
                chances = class_chances(confidence[self.classes], power=0.5) * self.held
                classes = self.classes[draw(chances / chances.sum(), u[:, 0])]
                rows += [torch.stack([classes, classes], 1)]
            else:
                chances = class_chances(confidence)
                rows += [torch.stack([torch.stack(bank.draw(chances, one)) for one in u])]
        if rows:
            rows = torch.cat(rows)
            self.drawn = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda).copy_(
                rows, non_blocking=True
            )
            if rows.is_cuda:
                self.arrived = torch.cuda.Event()
                self.arrived.record()

    def next(self, step: int) -> dict[int, Others]:
        """The images that were drawn two steps ago, by kind; starts loading those of the last step."""
        ready, self.loading, self.asked = self.loading, [], None
        if self.drawn is not None:
            self._start(self._read(), step)
        found = {}
        for place, kind in enumerate(self.kinds if ready else ()):
            rows = [
                future.result()
                for future in ready[place * self.s.batch : (place + 1) * self.s.batch]
            ]
            batch = [torch.stack(part) for part in zip(*rows, strict=True)]
            if self.device.type == "cuda":
                batch = [x.pin_memory() for x in batch]
            found[kind] = Others(*(x.to(self.device, non_blocking=True) for x in batch))
        return found

    def _read(self) -> torch.Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()  # waits until the device has begun the step that drew, not until it has done it
        return self.drawn

    def _start(self, rows: torch.Tensor, step: int) -> None:
        self.asked = (rows.clone(), step)
        self.loading = [
            self.pool.submit(self._load, i, *row, step) for i, row in enumerate(rows.tolist())
        ]

    def _load(self, i: int, c: int, index: int, step: int) -> tuple[torch.Tensor, ...]:
        """In a thread: image, labels and class of row `i`."""
        kind, n = self.kinds[i // self.s.batch], i % self.s.batch
        if kind == PASTE:
            rng = np.random.default_rng(mix_seed(self.s.seed, 31, self.rank, step, n))
            index = int(rng.choice(np.flatnonzero(self.presence[:, c])))
        return (*self.views[kind][step * self.s.batch + n, index], torch.tensor(c))

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
