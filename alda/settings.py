"""Every setting with its default, each paper's values, the command line's options. What can be set?

from alda.settings import settings_for
s = settings_for({"strategy": "ripu", "root": "toy"})   # the paper's values, for the miniature world
"""

import argparse
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from alda import InputError, deeplab
from alda.acquisition import SCORES
from alda.datasets import parse_scale, parse_size, read_json

QUERIES = tuple(SCORES)  # strategies that ask for pixels
SELF_TRAINING = ("st", "cbst", "cbst-sp")  # strategies that ask for nothing
STRATEGIES = ("source-only", "full", *QUERIES, "stal", *SELF_TRAINING)
PROTOCOLS = ("ripu", "sliding", "whole")  # how a network is tested: evaluation.PROTOCOLS
# settings that may differ between a run and its resumption: where it runs and what it shows, not
# what it computes (another device or number of threads sums floats in another order, so the bits
# are then no longer the same)
MAY_CHANGE = (
    "resume", "device", "workers", "threads", "log_every", "pictures", "out", "root", "cache", "cache_gb",
    "checkpointing", "compile", "accept_partial",
)  # fmt: skip
# who reads an option that not all strategies read
STAL = ("stal",)
SCHEDULED = ("source-only", "full", *QUERIES)
ROUNDS = (*QUERIES, "stal", *SELF_TRAINING)
TARGET_LABELS = ("full", *ROUNDS)


def option(default, group: str, text: str, choices=(), low=None, high=None, read_by=STRATEGIES):
    """A settings field: its default, the --help group it stands in, its meaning and unit, the
    values it may have (`choices`, or numbers from `low` to `high`), and the strategies that read
    it."""
    meta = {"group": group, "help": text, "choices": choices}
    meta |= {"low": low, "high": high, "read_by": read_by}
    return dataclasses.field(default=default, metadata=meta)


@dataclass
class Settings:
    """Every setting of a run. Defaults are RIPU's published schedule; PAPER and TOY below change
    them by strategy.

    Sizes are given as WxH, as people write them; `source_hw`, `target_hw`, `crop_hw`, `test_hw` and
    `scale_range` are what they mean: (H, W) or None where the option is empty, and (lowest,
    highest).
    """

    strategy: str = option("ripu", "run", "who chooses the labels", choices=STRATEGIES)
    src: str = option("gta5", "run", "source dataset", choices=("gta5", "synthia"))
    tgt: str = option("cityscapes", "run", "target dataset", choices=("cityscapes", "acdc"))
    root: str = option(
        "data",
        "run",
        "folder that holds the datasets; 'toy' writes and uses the miniature world in ./toy",
    )
    out: str = option(
        "",
        "run",
        "folder of the run; default runs/STRATEGY-SRC-TGT-SEED, with --root toy runs/toy-...",
    )
    seed: int = option(0, "run", "seed of every random draw")
    device: str = option("auto", "run", "auto, cpu, cuda, cuda:1, ...")
    workers: int = option(
        4,
        "run",
        "processes that load data; 0 loads in the main process; results do not depend on it",
        low=0,
    )
    cache: str = option(
        "",
        "run",
        "DIR on a local disk for decoded images at --source-size and --target-size, where none is "
        "scaled at random: 2.5 to 2.8 MB an image at the defaults",
        read_by=SCHEDULED,
    )
    cache_gb: float = option(
        100.0,
        "run",
        "most that --cache holds of the source, and of the target, in GB",
        low=0,
        high=1e6,
        read_by=SCHEDULED,
    )
    threads: int = option(
        0, "run", "CPU threads of torch; 0 leaves torch's choice", low=0, high=4096
    )
    precision: str = option(
        "auto",
        "run",
        "of forward passes in training and scoring (tests are float32); auto: bfloat16, channels last, "
        "where the device has units for it",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool = option(False, "run", "torch.compile the network (needs a C++ compiler)")
    resume: bool = option(False, "run", "go on from the last checkpoint of --out")
    oracle: str = option(
        "ground-truth",
        "run",
        "who answers queries: the target's labels, or people through files (python -m alda.annotate)",
        choices=("ground-truth", "files"),
        read_by=(*QUERIES, "stal"),
    )
    accept_partial: bool = option(
        False,
        "run",
        "with --resume --oracle files: take the right answers, leave the rest unanswered",
        read_by=(*QUERIES, "stal"),
    )
    rules: str = option(
        "paper",
        "run",
        "where equation and official code contradict each other",
        choices=("paper", "code"),
    )

    net: str = option(
        "deeplabv2", "network", "segmentation head", choices=("deeplabv2", "deeplabv3plus")
    )
    backbone: str = option(
        "resnet101",
        "network",
        "torchvision network; mobilenet_v2 for small machines",
        choices=("resnet101", "resnet50", "resnet18", "mobilenet_v2"),
    )
    init: str = option(
        "imagenet",
        "network",
        "imagenet (torchvision IMAGENET1K_V1), none (random), or a checkpoint FILE",
    )
    head: str = option(
        "ripu",
        "network",
        "the DeepLabV3+ of RIPU, or of STAL (dense ASPP 12/24/36, on ResNets multi-grid)",
        choices=("ripu", "stal"),
    )
    batch_norm: str = option(
        "auto",
        "network",
        "auto: as the file of --init says, else live with --init none and on mobilenet_v2, else frozen",
        choices=("auto", "frozen", "live"),
    )

    steps: int = option(40_000, "schedule", "optimizer steps, over all rounds", low=1)
    epochs: int = option(
        0,
        "schedule",
        "CBST, STAL: passes over the training images (STAL: the unlabelled ones) in each round, "
        "instead of --steps (0: --steps)",
        low=0,
        read_by=("stal", *SELF_TRAINING),
    )
    poly_steps: int = option(
        0,
        "schedule",
        "length of the poly decay; 0: in proportion to --steps, RIPU's 62,500 for 40,000 (source-free 30,000)",
        low=0,
        read_by=SCHEDULED,
    )
    batch: int = option(
        2,
        "schedule",
        "images a step, of the source and of the target each (cbst, cbst-sp, st: of both together; "
        "stal: labelled and unlabelled); over all processes of torchrun",
        low=1,
    )
    accumulate: int = option(
        1,
        "schedule",
        "parts that a step's images pass in, one after the other: memory for time (live batch norm sees "
        "a part at a time; a part's loss is the mean over its own labelled pixels)",
        low=1,
        read_by=(*SCHEDULED, *SELF_TRAINING),
    )
    checkpointing: bool = option(
        False, "schedule", "compute the backbone's blocks again for the gradient: memory for time"
    )
    lr: float = option(
        2.5e-4, "schedule", "learning rate of the backbone; the head has 10 times as much"
    )
    momentum: float = option(0.9, "schedule", "SGD momentum", low=0)
    weight_decay: float = option(5e-4, "schedule", "SGD weight decay", low=0)
    source_size: str = option(
        "1280x720", "schedule", "WxH that source images are resized to; '': their own"
    )
    target_size: str = option(
        "1280x640", "schedule", "WxH that target images are resized to, for training and scoring"
    )
    crop: str = option("", "schedule", "WxH of a random crop after resizing; '': none")
    scale: str = option("1,1", "schedule", "range of a random scaling before the crop")
    flip: bool = option(False, "schedule", "mirror half of the training images")
    source_sampling: str = option(
        "balanced",
        "schedule",
        "order of source images",
        choices=("balanced", "uniform"),
        read_by=SCHEDULED,
    )
    log_every: int = option(
        50, "schedule", "steps between progress lines; in a short run a tenth of all", low=1
    )
    checkpoint_every: int = option(1000, "schedule", "steps between checkpoints", low=1)

    budget: float = option(
        0.022,
        "queries",
        "share of each target image's pixels (STAL: of the target images) that may be asked, "
        "over all rounds; queries with --net deeplabv3plus (but --root toy): 0.05",
        read_by=(*QUERIES, "stal"),
    )
    rounds: int = option(
        5,
        "queries",
        "rounds: of queries, of pseudo-labels (CBST), or loops (STAL)",
        low=1,
        read_by=ROUNDS,
    )
    query_steps: str = option(
        "",
        "queries",
        "steps before which the rounds are asked, '10000,12000'; default 25%%..45%% of steps "
        "(source-free: 0..27%%)",
        read_by=QUERIES,
    )
    unit: str = option(
        "region",
        "queries",
        "what a pick labels: its whole region or its centre pixel",
        choices=("region", "pixel"),
        read_by=QUERIES,
    )
    radius: int = option(
        1,
        "queries",
        "k: a region is the (2k+1)^2 square around its centre; pixel picks block within k",
        low=0,
        read_by=QUERIES,
    )
    pixels: int = option(
        0,
        "queries",
        "with --unit pixel: pixels an image over all rounds instead of --budget; 0: --budget",
        low=0,
        read_by=QUERIES,
    )
    keep_labels: bool = option(
        False,
        "queries",
        "resize labels so that each cell that holds a bought one has one (default: nearest neighbour)",
        read_by=TARGET_LABELS,
    )

    cbda: str = option(
        "both",
        "CBDA",
        "dynamic: one budget over the whole target set (the paper's words); balance: scores "
        "weighted by class with max(0, 1 - n_c / (t_c B)), this project's formula for the "
        "paper's words; both",
        choices=("dynamic", "balance", "both"),
        read_by=("cbda",),
    )

    portion: float = option(
        0.2,
        "CBST",
        "share of each class's predictions that is pseudo-labelled in the first round",
        low=0,
        high=1,
        read_by=(*QUERIES, *SELF_TRAINING),
    )
    portion_step: float = option(
        0.05,
        "CBST",
        "what is added to it in each later round",
        low=0,
        high=1,
        read_by=(*QUERIES, *SELF_TRAINING),
    )
    portion_max: float = option(
        0.5, "CBST", "where it stops", low=0, high=1, read_by=(*QUERIES, *SELF_TRAINING)
    )
    source_portion: float = option(
        0.03,
        "CBST",
        "share of the source images that the first round trains on",
        low=0,
        high=1,
        read_by=SELF_TRAINING,
    )
    source_portion_step: float = option(
        0.0025,
        "CBST",
        "what is added to it in each later round",
        low=0,
        high=1,
        read_by=SELF_TRAINING,
    )
    source_portion_max: float = option(
        0.06, "CBST", "where it stops", low=0, high=1, read_by=SELF_TRAINING
    )
    label_flip: bool = option(
        True,
        "CBST",
        "pseudo-labels from the mean over the image and its mirror image",
        read_by=(*QUERIES, *SELF_TRAINING),
    )
    label_scale: float = option(
        0.9,
        "CBST",
        "scale of --target-size at which the target is pseudo-labelled",
        read_by=(*QUERIES, *SELF_TRAINING),
    )
    mine: float = option(
        0.8,
        "CBST",
        "chance of a crop around a rare class; needs --crop",
        low=0,
        high=1,
        read_by=SELF_TRAINING,
    )
    source_steps: int = option(
        0,
        "CBST",
        "steps of the source training, where --init is no whole network; 0: --steps where given, else as "
        "source-only",
        low=0,
        read_by=SELF_TRAINING,
    )
    pseudo: str = option(
        "none",
        "CBST",
        "pseudo-labels beside the bought labels, for strategies that query pixels",
        choices=("none", *SELF_TRAINING),
        read_by=QUERIES,
    )
    pseudo_steps: str = option(
        "",
        "CBST",
        "with --pseudo: steps before which the target is labelled anew; default the last "
        "query and three more, evenly",
        read_by=QUERIES,
    )
    pseudo_weight: float = option(
        1.0, "CBST", "with --pseudo: weight of their cross-entropy", low=0, read_by=QUERIES
    )

    teacher: bool = option(
        False,
        "STAL",
        "beside pixel queries: STAL's mean teacher labels the pixels that nobody was asked for (this "
        "project's own combination)",
        read_by=QUERIES,
    )
    source_images: int = option(
        2000, "STAL", "source images, drawn by --seed; 0: all", low=0, read_by=STAL
    )
    drop: float = option(
        0.2,
        "STAL",
        "alpha_0: share of target pixels without pseudo-label, falling to 0 (Eq. 7)",
        low=0,
        high=1,
        read_by=(*QUERIES, "stal"),
    )
    unlabelled: float = option(
        1.0,
        "STAL",
        "lambda_u, weight of the pseudo-labelled target pixels (Eq. 1); 0: left out",
        low=0,
        read_by=(*QUERIES, "stal"),
    )
    contrast: float = option(
        0.1,
        "STAL",
        "lambda_c, weight of the contrastive loss (Eq. 1); 0: left out",
        low=0,
        read_by=STAL,
    )
    contrast_start: float = option(
        0.1,
        "STAL",
        "share of a loop's steps before the contrastive loss (20 of 200 epochs)",
        low=0,
        high=1,
        read_by=STAL,
    )
    image_queries: str = option(
        "uncertainty",
        "STAL",
        "images of the later loops: the most uncertain (Eq. 8), or random",
        choices=("uncertainty", "random"),
        read_by=STAL,
    )
    restart: bool = option(
        False,
        "STAL",
        "each loop starts from --init again, as the official configurations; default: from "
        "the last teacher",
        read_by=STAL,
    )
    auxiliary: float = option(
        0.4, "STAL", "weight of the auxiliary head's loss; 0: no such head", low=0, read_by=STAL
    )
    ohem_pixels: int = option(
        100_000,
        "STAL",
        "hard pixels that are kept at least in the supervised loss",
        low=0,
        read_by=STAL,
    )
    ohem_threshold: float = option(
        0.7,
        "STAL",
        "pixels less likely than this are hard; 1: all are, plain cross-entropy",
        low=0,
        high=1,
        read_by=STAL,
    )
    ema: float = option(
        0.99,
        "STAL",
        "largest decay of the teacher's average",
        low=0,
        high=1,
        read_by=(*QUERIES, "stal"),
    )
    confidence_momentum: float = option(
        0.999,
        "STAL",
        "momentum of the classes' running confidence, by which AEL thins and mixes (at 0.999 it "
        "takes some 1,000 steps to follow)",
        low=0,
        high=1,
        read_by=STAL,
    )
    bank: int = option(
        30_000,
        "STAL",
        "features a class in the memory bank; 5/3 as many for class 0",
        low=1,
        read_by=STAL,
    )
    copy_paste: bool = option(
        True, "STAL", "adaptive copy-paste on labelled images (AEL)", read_by=STAL
    )
    cutmix: bool = option(
        True,
        "STAL",
        "CutMix: stal's unlabelled images (adaptive, AEL); queried ones with --teacher",
        read_by=(*QUERIES, "stal"),
    )
    class_keep: bool = option(
        True, "STAL", "thin the pseudo-labels of confident classes (AEL)", read_by=STAL
    )

    consistency: float = option(
        0.1,
        "RIPU losses",
        "weight of local consistency on the source (Eq. 7)",
        low=0,
        read_by=SCHEDULED,
    )
    negative: float = option(
        1.0,
        "RIPU losses",
        "weight of negative learning on the target (Eq. 8)",
        low=0,
        read_by=SCHEDULED,
    )
    source_free: str = option(
        "",
        "RIPU losses",
        "CHECKPOINT of a source-trained network: adapt without any source image",
        read_by=SCHEDULED,
    )

    protocol: str = option("ripu", "evaluation", "test protocol", choices=PROTOCOLS)
    test_size: str = option(
        "", "evaluation", "WxH of the test input for ripu and whole; default --target-size for ripu"
    )
    eval_every: int = option(
        0,
        "evaluation",
        "also score the validation split every so many steps (logged, never chosen by)",
        low=0,
        read_by=(*SCHEDULED, *SELF_TRAINING),
    )
    pictures: int = option(4, "evaluation", "target images drawn to pictures/ in each round", low=0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self._check_field(field)
        sizes = {name: getattr(self, f"{name}_size") for name in ("source", "target", "test")}
        for name, text in {**sizes, "crop": self.crop}.items():
            setattr(self, f"{name}_hw", parse_size(text) if text or name == "target" else None)
        self.scale_range = parse_scale(self.scale)
        self._check_together()

    @property
    def parts(self) -> int:
        """In how many parts a step's images pass: STAL's step has no parts."""
        return 1 if self.strategy == "stal" else self.accumulate

    @property
    def one_budget(self) -> bool:
        """Whether all target images share one budget: CBDA's dynamic acquisition."""
        return self.strategy == "cbda" and self.cbda in ("dynamic", "both")

    @property
    def reads_truth(self) -> bool:
        """Whether the run learns from labels of the target's training images that are there already."""
        asks = self.strategy in (*QUERIES, "stal")
        return self.strategy == "full" or (asks and self.oracle == "ground-truth")

    def _check_field(self, field: dataclasses.Field) -> None:
        """Type, choices and range of one setting; a whole number is a float where one is due."""
        meta, value = field.metadata, getattr(self, field.name)
        name = "--" + field.name.replace("_", "-")
        if field.type is float and isinstance(value, int):
            value = float(value)
            setattr(self, field.name, value)
        if type(value) is not field.type:
            raise InputError(f"{name} must be {field.type.__name__}, got {value!r}")
        if meta["choices"] and value not in meta["choices"]:
            raise InputError(f"{name} must be one of {', '.join(meta['choices'])}; got {value!r}")
        low, high = meta["low"], meta["high"]
        if high == 1 and not low <= value <= high:
            raise InputError(f"{name} is a share, from 0 to 1; got {value}")
        if low is not None and not value >= low:  # also refuses nan
            raise InputError(f"{name} must be at least {low}, got {value}")
        if high is not None and value > high:
            raise InputError(f"{name} must be at most {high:,.0f}, got {value}")

    def _check_together(self) -> None:
        """Settings that contradict each other."""
        if self.pseudo != "none" and self.strategy not in QUERIES:
            raise InputError(
                f"--pseudo goes with {', '.join(QUERIES)}; --strategy {self.strategy} has its own labels"
            )
        if self.teacher and (self.strategy not in QUERIES or self.pseudo != "none"):
            raise InputError(
                f"--teacher goes with {', '.join(QUERIES)}, and without --pseudo: both label the rest"
            )
        if self.scale_range != (1.0, 1.0) and not self.crop:
            raise InputError("--scale needs --crop: the images of a batch must have one size")
        if self.strategy == "stal" and self.copy_paste and not self.crop:
            raise InputError("--copy-paste scales images and needs --crop, or give --no-copy-paste")
        if not 0 < self.label_scale <= 8:
            raise InputError(f"--label-scale must be above 0 and at most 8, got {self.label_scale}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be above 0, got {self.lr}")
        if self.strategy in SCHEDULED and 0 < self.poly_steps < self.steps:
            raise InputError(
                f"--poly-steps {self.poly_steps} is shorter than --steps {self.steps}: the rate would end early"
            )
        if self.strategy == "source-only" and self.source_free:
            raise InputError("--strategy source-only --source-free leaves nothing to train on")
        if self.source_free and self.strategy not in ("full", *QUERIES):
            raise InputError(
                f"--source-free goes with full, {', '.join(QUERIES)}; {self.strategy} trains on the source"
            )
        if self.source_free and self.pseudo == "cbst-sp":
            raise InputError(
                "--pseudo cbst-sp reads the source's labels, --source-free has none: take --pseudo cbst"
            )
        if not self.source_size and not self.crop:
            raise InputError(
                "--source-size '' keeps each image's own size and needs --crop: a batch has one size"
            )
        if not 0 < self.budget <= 1:
            raise InputError(
                f"--budget is a share of the pixels, above 0 and at most 1; got {self.budget}"
            )


# CBST's PyTorch version crops and augments as here; its MXNet version, whose learning rate falls by
# sqrt(2) a round as here, crops 500 at scales 0.7 to 1.3.
_CBST = {
    "lr": 1e-4,
    "rounds": 6,
    "epochs": 2,
    "source_size": "",
    "target_size": "2048x1024",
    "crop": "1024x512",
    "scale": "0.5,1.5",
    "flip": True,
    "test_size": "1280x640",
}
# What each strategy's paper sets otherwise than the defaults of Settings.
PAPER: dict[str, dict] = {
    # RIPU's code for the network that its source-free runs start from
    "source-only": {"lr": 5e-4, "steps": 20_000, "consistency": 0.0, "negative": 0.0},
    "full": {"consistency": 0.0, "negative": 0.0},
    "ripu-pa": {"unit": "pixel", "radius": 32, "pixels": 40},
    "cbda": {"net": "deeplabv3plus", "budget": 0.05},
    "stal": {
        "net": "deeplabv3plus",
        "head": "stal",
        "batch_norm": "live",
        "epochs": 200,
        "batch": 4,
        "lr": 2.5e-3,
        "weight_decay": 1e-4,
        "source_size": "2048x1024",
        "target_size": "2048x1024",
        "crop": "769x769",
        "scale": "0.5,2",
        "flip": True,
        "budget": 0.05,
        "rounds": 3,
        "protocol": "sliding",
    },
    **dict.fromkeys(SELF_TRAINING, _CBST),
}
# RIPU's 5 % on DeepLabV3+, 2.2 % on V2; its baselines ask as many
BUDGET_V3PLUS = 0.05
# queries at 0, 2,000, ..., 8,000 of 30,000: see query_schedule
SOURCE_FREE = {"steps": 30_000, "consistency": 0.0}
# The miniature world: ResNet-18 from random weights on small pictures.
TOY = {
    "backbone": "resnet18",
    "net": "deeplabv3plus",
    "init": "none",
    "steps": 300,
    "batch": 2,
    "lr": 0.01,
    "source_size": "160x80",
    "target_size": "160x80",
    "workers": 0,
    "log_every": 20,
    "checkpoint_every": 100,
}
_TOY_CBST = {
    "epochs": 0,
    "steps": 400,
    "lr": 0.002,
    "rounds": 4,
    "crop": "160x80",
    "test_size": "",
    "source_portion": 0.12,  # 30 source pictures to 120 of the target, about GTA5's 750 to Cityscapes' 2,975
    "source_portion_step": 0.01,
    "source_portion_max": 0.24,
}
TOY_BY_STRATEGY: dict[str, dict] = {
    "ripu-pa": {"radius": 4},  # 32 of Cityscapes' 2048 columns, on 256
    "stal": {
        "epochs": 0,
        "head": "ripu",
        "crop": "160x80",
        "source_images": 0,
        "protocol": "ripu",
        "bank": 3000,
        "ohem_threshold": 1.0,  # hard pixels alone teach little in minutes
    },
    **dict.fromkeys(SELF_TRAINING, _TOY_CBST),
}


# What --rules code changes, all of it: where equation and official code contradict each other, the code's
# rule. Key: the function that asks. What else the official code does otherwise is not reproduced; the
# modules list it.
CODE_RULES = {
    "rounds.budget_pixels": "ripu-pa asks 21 pixels a round on Cityscapes, 105 in all (paper: 8, 40)",
    "rounds.tie_breaks": "equal scores go to the smaller column, then row (paper: silent; here to the "
    "more uncertain, then by a draw)",
    "loop.losses_of_queries": "RIPU's consistency is the mean over pixels next to a label change (paper: "
    "the sum over all pixels, here their mean)",
    "settings.settings_for": "source-free RIPU has region radius 9 (paper: 1)",
    "selftraining.cbst_pseudo_labels": "CBST labels pixels that are as sure as the threshold (paper: surer)",
    "selftraining.reliable_pseudo_labels": "STAL ignores the pixels of lowest entropy (paper: of highest)",
    "stal.unlabelled_loss": "STAL weights each pseudo-label by the teacher's confidence^2 (paper: alike)",
}


def without_effect(given: dict, s: Settings) -> list[str]:
    """The options that were given although the strategy does not read them, as people write
    them."""
    readers = {field.name: field.metadata["read_by"] for field in dataclasses.fields(Settings)}
    idle = {name for name in given if s.strategy not in readers[name]}
    asks, stal = s.strategy in QUERIES, s.strategy == "stal"
    none = not (s.unlabelled or s.contrast)
    # read where it matters alone: a checkpoint may be large
    trained = "source_steps" in given and Path(s.init).is_file()
    trained = trained and not deeplab.backbone_only(s.init)
    adaptive = s.copy_paste or (s.cutmix and not none) or (s.class_keep and s.unlabelled)
    self_taught = {"portion", "portion_step", "portion_max", "pseudo_steps", "pseudo_weight"}
    unread = (  # where, what
        (asks and s.pseudo == "none", self_taught | {"label_flip", "label_scale"}),
        (asks and not s.teacher, {"drop", "unlabelled", "ema", "cutmix"}),
        (asks and not s.unlabelled, {"drop"}),
        (s.source_free, {"consistency", "source_sampling", "source_size"}),
        (stal and not s.contrast, {"bank", "contrast_start"}),
        (stal and not s.unlabelled, {"class_keep"}),
        (stal and none, {"cutmix", "drop"}),
        (stal and s.ohem_threshold == 1, {"ohem_pixels"}),  # no pixel is sure enough to be left out
        (stal and s.rounds == 1, {"restart", "image_queries"}),  # of later loops
        (stal and not adaptive, {"confidence_momentum"}),
        (s.strategy == "source-only", {"negative"}),
        (s.oracle == "ground-truth", {"accept_partial"}),
        (s.unit == "region", {"pixels"}),
        (s.unit == "pixel" and s.pixels, {"budget"}),
        (not s.crop, {"mine"}),
        (not s.cache, {"cache_gb"}),
        (s.protocol == "sliding", {"test_size"}),
        (s.scale_range != (1.0, 1.0), {"cache"}),
        (s.net == "deeplabv2", {"head"}),
        (trained, {"source_steps"}),
    )
    for here, names in unread:
        idle |= given.keys() & names if here else set()
    return [f"--{name.replace('_', '-')}" for name in sorted(idle)]


def settings_for(given: dict) -> Settings:
    """Settings from the options that were given, over the toy world's, over the paper's, over the
    defaults."""
    strategy = given.get("strategy", "ripu")
    merged = dict(PAPER.get(strategy, {}))
    if given.get("source_free"):
        if given.get("init", given["source_free"]) != given["source_free"]:
            raise InputError("--source-free starts from its CHECKPOINT: leave --init out")
        merged.update(SOURCE_FREE, init=given["source_free"])
        if given.get("rules") == "code":
            merged.setdefault("radius", 9)  # of regions: ripu-pa has its own
    if given.get("net") == "deeplabv3plus" and strategy in QUERIES and given.get("root") != "toy":
        merged["budget"] = BUDGET_V3PLUS
    if given.get("root") == "toy":
        merged.update(
            {k: v for k, v in TOY.items() if not (k == "init" and "init" in merged)},
            **TOY_BY_STRATEGY.get(strategy, {}),
        )
    if "steps" in given:
        if given.get("epochs"):
            raise InputError("--steps and --epochs are two ways to say how long: give one of them")
        merged["epochs"] = 0
        if strategy in SELF_TRAINING and "source_steps" not in given:
            merged["source_steps"] = given["steps"]  # no hidden long training before a short one
    if given.get("target_size") or given.get("protocol", "ripu") != "ripu":
        merged["test_size"] = ""  # tested as the other strategies, at the size that was given
    if "budget" in given and "pixels" in merged:
        merged["pixels"] = 0  # the share that was asked for, not the paper's 40 pixels
    return Settings(**{**merged, **given})


def default_folder(names: dict) -> str:
    """The run's folder without --out, from the settings or what of them is given: the miniature world
    has others."""
    names = {"strategy": "ripu", "src": "gta5", "tgt": "cityscapes", "seed": 0} | names
    toy = "toy-" if names.get("root") == "toy" else ""
    return "runs/{toy}{strategy}-{src}-{tgt}-{seed}".format(toy=toy, **names)


def settings_resumed(given: dict) -> Settings | None:
    """With --resume: the settings in the config.json of the run in --out or the default folder, under
    the options that were given; None without --resume or config.json. Raises InputError for a
    config.json that cannot be read, and where there is none and no --strategy is given to start."""
    if not given.get("resume"):
        return None
    config = Path(given.get("out") or default_folder(given)) / "config.json"
    if not config.is_file():
        if "strategy" not in given:
            raise InputError(f"no {config} to resume: give the run's folder with --out")
        return None
    kept = read_json(config, "settings")["settings"]
    fields = {field.name for field in dataclasses.fields(Settings)}
    if not isinstance(kept, dict) or not kept.keys() <= fields:
        raise InputError(
            f"{config}: 'settings' are not those of this version; resume with the version in "
            "'versions', or restore the file"
        )
    # said each time: what is right is taken once, not in every round that follows
    return Settings(**{**kept, "accept_partial": False, "out": str(config.parent), **given})


def poly_length(s: Settings) -> int:
    """How many steps the poly decay of a run with queries is long: --poly-steps, or RIPU's 62,500
    for 40,000 steps, and for 30,000 source-free, in proportion to --steps."""
    published = SOURCE_FREE["steps"] if s.source_free else Settings.steps
    return s.poly_steps or round(s.steps * 62_500 / published)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


# what --help shows; --help-all shows every option
ESSENTIAL = (
    "strategy", "src", "tgt", "root", "out", "seed", "device", "resume", "oracle", "rules", "net", "backbone",
    "init", "steps", "batch", "budget", "rounds", "cbda", "pseudo", "source_free", "protocol",
)  # fmt: skip


def help_text(field: dataclasses.Field) -> str:
    """An option's help: its meaning, its default, and the strategies' own defaults."""
    tables = {**PAPER, "source-free": SOURCE_FREE, "root toy": TOY}
    defaults = [] if field.default == "" else [f"{field.default}"]
    own = {name: table[field.name] for name, table in tables.items() if field.name in table}
    own = [f"{name} ''" if value == "" else f"{name} {value}" for name, value in own.items()]
    defaults += [", ".join(own)] if own else []
    text = field.metadata["help"]
    return f"{text} [{'; '.join(defaults)}]" if defaults else text


def parse(argv: list[str] | None) -> Settings:
    """The command line to Settings. --help shows the essential options, --help-all every one, both with
    each strategy's own defaults."""
    argv = sys.argv[1:] if argv is None else argv
    everything = "--help-all" in argv
    code = "; ".join(CODE_RULES.values())
    parser = Parser(
        prog="python -m alda.loop",
        description="Trains one strategy from a source to a target dataset.",
        epilog=f"An option that is given always wins over defaults. --rules code changes: {code}.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--help-all", action="help", help="show every option")
    groups: dict = {}
    for field in dataclasses.fields(Settings):
        meta, name = field.metadata, "--" + field.name.replace("_", "-")
        shown = everything or field.name in ESSENTIAL
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group, text = groups[meta["group"]], help_text(field) if shown else argparse.SUPPRESS
        if field.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = meta["choices"] or None
            group.add_argument(name, type=field.type, help=text, choices=choices)
    given = vars(parser.parse_args(argv))
    if str(Path(given.get("root", "data"))) == "toy":  # ./toy, toy/
        given["root"] = "toy"
    s = settings_resumed(given) or settings_for(given)
    if os.environ.get("RANK", "0") == "0":
        for note in notes_on(given, s):
            print(f"note: {note}", file=sys.stderr)
    return s


def notes_on(given: dict, s: Settings) -> list[str]:
    """What people should know of what they asked for."""
    notes = []
    if idle := without_effect(given, s):
        notes.append(f"no effect with --strategy {s.strategy}: {', '.join(idle)}")
    for name, size in (("source", s.source_hw), ("target", s.target_hw)):
        largest = None if size is None else [length * s.scale_range[1] for length in size]
        if s.crop_hw and largest and any(c > x for c, x in zip(s.crop_hw, largest, strict=True)):
            text = f"--crop {s.crop} is larger than --{name}-size {getattr(s, name + '_size')}"
            notes.append(f"{text} ever gets: every {name} image is padded")
    if s.strategy in ("ripu", "ripu-pa", "cbda") and s.radius == 0:
        notes.append("--radius 0: a region of one pixel has no impurity, so that every score is 0")
    return notes
