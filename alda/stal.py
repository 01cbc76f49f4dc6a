"""What happens in a step of STAL? Teacher, mixing, pseudo-labels and the three losses of Eq. (1).

    system = Stal(s, run, source, target)
    losses, health = system.losses(batch, others, generator, progress)      # the loop itself is in loop.py

STAL (later ILM-ASSL): Guan and Yuan, arXiv 2301.13361. Adaptive parts: AEL, Hu et al., arXiv 2110.05474. Contrastive part:
U2PL, Wang et al., arXiv 2203.03884. N images of each kind (labelled, unlabelled), C classes, H, W pixels, h, w features.
"""

import copy

import torch

from alda import IGNORE, deeplab
from alda.datasets import NUM_CLASSES, mix_seed
from alda.evaluation import evaluate
from alda.losses import (
    MemoryBank,
    contrastive,
    contrastive_sets,
    ohem_cross_entropy,
    weighted_consistency,
)
from alda.mixing import CUT, PASTE, Partners
from alda.processes import rank_and_number, share_buffers
from alda.run import Run
from alda.selftraining import (
    ConfidenceBank,
    ImageBank,
    class_box,
    contrastive_masks,
    copy_paste,
    cutmix,
    drop_share,
    entropy,
    keep_by_class,
    reliable_pseudo_labels,
)
from alda.settings import Settings


class Stal:
    """What STAL keeps beside the student: teacher, memory bank, confidences, image bank, images to mix in.

    All of it is in the checkpoint (`run.parts`). Every part can be left out: --unlabelled 0, --contrast 0, --auxiliary 0,
    --no-copy-paste, --no-cutmix, --no-class-keep, --ohem-threshold 1, --drop 0.
    """

    def __init__(self, s: Settings, run: Run, source, target):
        self.s, self.run, self.device = s, run, run.device
        self.unlabelled = s.unlabelled > 0 or s.contrast > 0
        self.teacher = copy.deepcopy(run.model).requires_grad_(False)
        self.confidence = ConfidenceBank(NUM_CLASSES, device=self.device)
        self.images = ImageBank(NUM_CLASSES, len(target), device=self.device)
        self.partners = Partners(s, source, target, self.device)
        parts = {
            "teacher": self.teacher,
            "confidence": self.confidence,
            "images": self.images,
            "partners": self.partners,
        }
        self.bank = None
        if s.contrast:
            self.bank = MemoryBank(NUM_CLASSES, 256, s.bank, s.bank * 5 // 3, self.device)
            parts["bank"] = self.bank
        run.parts = parts

    def begin_loop(self) -> None:
        """The second and later loops: the student starts as the last teacher, or anew with --restart; so does the teacher."""
        begin = self.run.fresh_model() if self.s.restart else self.teacher
        self.run.model.load_state_dict(begin.state_dict())
        self.teacher.load_state_dict(begin.state_dict())
        self.run.optimizer.state.clear()
        self.partners.reset()
        if self.s.restart:
            self.confidence.value.zero_()
            if self.bank is not None:
                self.bank.count.zero_()
        self.images.share.zero_()  # images that are labelled now are forgotten

    def generator(self, step: int) -> torch.Generator:
        """The random draws of a step, a function of seed, step and process: a checkpoint needs no state of it."""
        return torch.Generator(self.device).manual_seed(
            mix_seed(self.s.seed, 20, step, rank_and_number()[0])
        )

    def losses(
        self, batch: list[torch.Tensor], others: dict, generator: torch.Generator, progress: float
    ):
        """The named losses of a step and the numbers that only the log shows; nothing is read from the device.

        `batch` is images (N,3,H,W), labels (N,H,W) and, unless the unlabelled parts are off, images, truth
        (datasets.truth_inside) and dataset indices of unlabelled images; `progress` is the share of the loop that is done.
        """
        s, (images, labels, *rest) = self.s, batch
        if (
            PASTE in others
        ):  # as in the official code, every image gets all classes that were drawn for the batch
            images, labels = copy_paste(
                images, labels, others[PASTE].images, others[PASTE].labels, others[PASTE].classes
            )
        everything, truth = images, None
        if self.unlabelled:
            mixed, truth = self.mix(*rest, others.get(CUT), generator)
            everything = torch.cat([images, mixed])
        with self.run.autocast():
            logits, features, auxiliary = self.run.forward(everything, extras=True)
            with (
                torch.no_grad()
            ):  # the teacher trains too, that is, its batch norm sees the mixed batch
                teacher_logits, teacher_features, _ = self.teacher(everything, extras=True)
        number = len(images)
        size = labels.shape[-2:]
        large = deeplab.upsample(logits.float(), size)
        # L = L_s + lambda_u L_u + lambda_c L_c (Eq. 1)
        losses = {"supervised": self.supervised(large[:number], auxiliary, labels)}
        self.confidence.update(large[:number].detach().softmax(1), labels)
        if not self.unlabelled:
            return losses, {}
        prob = deeplab.upsample(teacher_logits[number:].float(), size).softmax(1)  # (N,C,H,W)
        # Eqs. (5)-(7): argmax of the teacher where the entropy is below its percentile
        inside = truth != IGNORE
        pseudo = reliable_pseudo_labels(prob, drop_share(progress, 1.0, s.drop), s.rules, inside)
        health = pseudo_label_health(pseudo, truth, inside)
        if s.unlabelled:
            losses["unlabelled"] = self.consistency(large[number:], pseudo, prob, generator)
        if s.contrast and progress < s.contrast_start:
            losses["contrastive"] = (
                features.float().sum() * 0
            )  # torchrun wants every parameter to have a gradient
        elif s.contrast:
            small = contrastive_masks(
                labels, pseudo, entropy(prob), features.shape[-2:], counts=inside
            )
            sets = contrastive_sets(teacher_logits.float().softmax(1), *small, labelled=number)
            losses["contrastive"] = contrastive(
                features, teacher_features, sets, self.bank, generator=generator
            )
        return losses, health

    def supervised(
        self, logits: torch.Tensor, auxiliary: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """L_s: OHEM cross-entropy on the labelled images, plus --auxiliary times the same on the auxiliary head."""
        loss = ohem_cross_entropy(logits, labels, self.s.ohem_threshold, self.s.ohem_pixels)
        if auxiliary is None:
            return loss
        auxiliary = deeplab.upsample(auxiliary[: len(labels)].float(), labels.shape[-2:])
        extra = ohem_cross_entropy(auxiliary, labels, self.s.ohem_threshold, self.s.ohem_pixels)
        return loss + self.s.auxiliary * extra

    def consistency(self, logits, pseudo, prob, generator: torch.Generator) -> torch.Tensor:
        """L_u (Eq. 3), with --rules code weighted by confidence^2; --class-keep thins the classes that are easy by now."""
        keep = None
        if self.s.class_keep:
            u = torch.rand(pseudo.shape, generator=generator, device=self.device)
            keep = keep_by_class(logits.argmax(1), self.confidence.value, u)
        gamma = 2.0 if self.s.rules == "code" else 0.0
        return weighted_consistency(logits, pseudo, prob.amax(1), gamma, keep)

    @torch.no_grad()
    def mix(
        self, images, truth, index, other, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adaptive CutMix: boxes around the drawn class of `other` images, cut into `images`; updates the image bank.

        The teacher looks at the plain images in eval mode. Returns images and truth (N,H,W), which is mixed alike.
        """
        if not self.s.cutmix:
            return images, truth
        self.teacher.eval()
        with self.run.autocast():
            logits = self.teacher(images if other is None else torch.cat([images, other.images]))
        self.teacher.train()
        prediction = deeplab.upsample(logits.float(), images.shape[-2:]).argmax(1)
        outside = (truth if other is None else torch.cat([truth, other.labels])) == IGNORE
        prediction = prediction.masked_fill(outside, IGNORE)  # what a crop added holds no class
        self.images.update(index, prediction[: len(images)])
        if other is None:
            return images, truth
        u = torch.rand(len(images), 4, generator=generator, device=self.device)
        boxes = torch.stack(
            [
                class_box(prediction[len(images) + i], other.classes[i], u[i])
                for i in range(len(images))
            ]
        )
        return cutmix(images, other.images, boxes), cutmix(truth, other.labels, boxes)

    def state(self) -> dict:
        """For a log line: the confidence of each class and how full its part of the memory bank is."""
        state = {"confidence": self.confidence.value.tolist()}
        return state if self.bank is None else {**state, "bank": self.bank.count.tolist()}

    def evaluate(self, validation, protocol) -> dict:
        """The teacher's scores, and under "student" the student's."""
        share_buffers(self.run.model)
        share_buffers(self.teacher)
        student = evaluate(self.run.model, validation, protocol, self.device)
        return {**evaluate(self.teacher, validation, protocol, self.device), "student": student}


@torch.no_grad()
def pseudo_label_health(
    pseudo: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Share of the pixels `inside` that have a pseudo-label, and its accuracy where the truth is known; 0-dim."""
    judged = (pseudo != IGNORE) & (truth < NUM_CLASSES)
    return {
        "kept": (pseudo != IGNORE).sum() / inside.sum().clamp(min=1),
        "accuracy": ((pseudo == truth) & judged).sum() / judged.sum().clamp(min=1),
    }
