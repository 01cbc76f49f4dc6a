"""What can be set? Every setting with its default, each paper's values, and the command line's options.

from alda.settings import settings_for
s = settings_for({"strategy": "ripu", "root": "toy"})      # the paper's values, changed for the miniature world
"""

import argparse
import dataclasses
import math
import os
import sys
from dataclasses import dataclass

from alda import InputError
from alda.evaluation import PROTOCOLS, parse_size, protocol_named


def option(default, group: str, text: str, choices: tuple = ()):
    """A settings field: its default, the --help group it stands in, its meaning and unit, its allowed values."""
    return dataclasses.field(
        default=default, metadata={"group": group, "help": text, "choices": choices}
    )


QUERIES = (
    "random",
    "entropy",
    "margin",
    "ripu",
    "ripu-pa",
    "cbda",
)  # strategies that ask for pixels
SELF_TRAINING = ("st", "cbst", "cbst-sp")  # strategies that ask for nothing
STRATEGIES = ("source-only", "full", *QUERIES, "stal", *SELF_TRAINING)


AT_LEAST_1 = ("steps", "batch", "rounds", "log_every", "checkpoint_every", "bank")
AT_LEAST_0 = ("workers", "threads", "epochs", "poly_steps", "momentum", "weight_decay", "radius", "pixels", "consistency",
              "negative", "eval_every", "pictures", "source_steps", "source_images", "pseudo_weight", "unlabelled", "contrast",
              "auxiliary", "ohem_pixels")  # fmt: skip
SHARES = ("portion", "portion_step", "portion_max", "source_portion", "source_portion_step", "source_portion_max", "mine",
          "drop", "contrast_start", "ema")  # fmt: skip


@dataclass
class Settings:
    """Every setting of a run. Defaults are RIPU's published schedule; PAPER and TOY below change them by strategy."""

    strategy: str = option("ripu", "run", "who chooses the labels", STRATEGIES)
    src: str = option("gta5", "run", "source dataset", ("gta5", "synthia"))
    tgt: str = option("cityscapes", "run", "target dataset", ("cityscapes", "acdc"))
    root: str = option(
        "data",
        "run",
        "folder that holds the datasets; 'toy' writes and uses the miniature world in ./toy",
    )
    out: str = option("", "run", "folder of the run; default runs/STRATEGY-SRC-TGT-SEED")
    seed: int = option(0, "run", "seed of every random draw")
    device: str = option("auto", "run", "auto, cpu, cuda, cuda:1, ...")
    workers: int = option(
        4,
        "run",
        "processes that load data; 0 loads in the main process; results do not depend on it",
    )
    threads: int = option(0, "run", "CPU threads of torch; 0 leaves torch's choice")
    precision: str = option(
        "float32",
        "run",
        "bfloat16: autocast in training and scoring; tests stay float32",
        ("float32", "bfloat16"),
    )
    resume: bool = option(False, "run", "go on from the last checkpoint of --out")
    rules: str = option(
        "paper", "run", "where equation and official code contradict each other", ("paper", "code")
    )

    net: str = option("deeplabv2", "network", "segmentation head", ("deeplabv2", "deeplabv3plus"))
    backbone: str = option(
        "resnet101", "network", "torchvision ResNet", ("resnet101", "resnet50", "resnet18")
    )
    init: str = option(
        "imagenet",
        "network",
        "imagenet (torchvision IMAGENET1K_V1), none (random), or a checkpoint FILE",
    )
    head: str = option(
        "ripu",
        "network",
        "the DeepLabV3+ of RIPU, or of STAL (dense ASPP 12/24/36, multi-grid)",
        ("ripu", "stal"),
    )
    batch_norm: str = option(
        "auto", "network", "auto: live with --init none, else frozen", ("auto", "frozen", "live")
    )

    steps: int = option(40_000, "schedule", "optimizer steps, over all rounds")
    epochs: int = option(
        0,
        "schedule",
        "CBST, STAL: passes over the training images in each round, instead of --steps (0: --steps)",
    )
    poly_steps: int = option(
        0, "schedule", "length of the poly decay; 0 is 1.5625 x steps (RIPU: 62,500 for 40,000)"
    )
    batch: int = option(2, "schedule", "images a step, of the source and of the target each")
    lr: float = option(
        2.5e-4, "schedule", "learning rate of the backbone; the head has 10 times as much"
    )
    momentum: float = option(0.9, "schedule", "SGD momentum")
    weight_decay: float = option(5e-4, "schedule", "SGD weight decay")
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
        "balanced", "schedule", "order of source images", ("balanced", "uniform")
    )
    log_every: int = option(50, "schedule", "steps between progress lines")
    checkpoint_every: int = option(1000, "schedule", "steps between checkpoints")

    budget: float = option(
        0.022,
        "queries",
        "share of each target image's pixels (STAL: of the target images) that may be asked, over all rounds",
    )
    rounds: int = option(
        5, "queries", "rounds: of queries, of pseudo-labels (CBST), or loops (STAL)"
    )
    query_steps: str = option(
        "",
        "queries",
        "steps before which the rounds are asked, '10000,12000'; default 25%%..45%% of steps",
    )
    unit: str = option(
        "region",
        "queries",
        "what a pick labels: its whole region or its centre pixel",
        ("region", "pixel"),
    )
    radius: int = option(
        1,
        "queries",
        "k: a region is the (2k+1)^2 square around its centre; pixel picks block within k",
    )
    pixels: int = option(
        0,
        "queries",
        "with --unit pixel: pixels an image over all rounds instead of --budget; 0: --budget",
    )
    keep_labels: bool = option(
        False, "queries", "resize labels so that no bought one is lost (default: nearest neighbour)"
    )

    cbda: str = option(
        "both",
        "CBDA",
        "dynamic: one budget over the whole target set (the paper's words); balance: scores weighted by class with "
        "max(0, 1 - n_c / (t_c B)), this project's formula for the paper's words; both",
        ("dynamic", "balance", "both"),
    )

    portion: float = option(
        0.2, "CBST", "share of each class's predictions that is pseudo-labelled in the first round"
    )
    portion_step: float = option(0.05, "CBST", "what is added to it in each later round")
    portion_max: float = option(0.5, "CBST", "where it stops")
    source_portion: float = option(
        0.03, "CBST", "share of the source images that the first round trains on"
    )
    source_portion_step: float = option(0.0025, "CBST", "what is added to it in each later round")
    source_portion_max: float = option(0.06, "CBST", "where it stops")
    mine: float = option(0.8, "CBST", "chance of a crop around a rare class; needs --crop")
    source_steps: int = option(
        0,
        "CBST",
        "steps of the source training where --init is no file; 0: as many as source-only's default",
    )
    pseudo: str = option(
        "none",
        "CBST",
        "pseudo-labels beside the bought labels, for strategies that query pixels",
        ("none", *SELF_TRAINING),
    )
    pseudo_steps: str = option(
        "",
        "CBST",
        "with --pseudo: steps before which the target is labelled anew; default the last query and three more, evenly",
    )
    pseudo_weight: float = option(1.0, "CBST", "with --pseudo: weight of their cross-entropy")

    source_images: int = option(2000, "STAL", "source images, drawn by --seed; 0: all")
    drop: float = option(
        0.2, "STAL", "alpha_0: share of target pixels without pseudo-label, falling to 0 (Eq. 7)"
    )
    unlabelled: float = option(
        1.0, "STAL", "lambda_u, weight of the pseudo-labelled target pixels (Eq. 1); 0: left out"
    )
    contrast: float = option(
        0.1, "STAL", "lambda_c, weight of the contrastive loss (Eq. 1); 0: left out"
    )
    contrast_start: float = option(
        0.1, "STAL", "share of a loop's steps before the contrastive loss (20 of 200 epochs)"
    )
    image_queries: str = option(
        "uncertainty",
        "STAL",
        "images of the later loops: the most uncertain (Eq. 8), or random",
        ("uncertainty", "random"),
    )
    restart: bool = option(
        False,
        "STAL",
        "each loop starts from --init again, as the official configurations; default: from the last teacher",
    )
    auxiliary: float = option(0.4, "STAL", "weight of the auxiliary head's loss; 0: no such head")
    ohem_pixels: int = option(
        100_000, "STAL", "hard pixels that are kept at least in the supervised loss"
    )
    ohem_threshold: float = option(
        0.7, "STAL", "pixels less likely than this are hard; 1: all are, plain cross-entropy"
    )
    ema: float = option(0.99, "STAL", "largest decay of the teacher's average")
    bank: int = option(
        30_000, "STAL", "features a class in the memory bank; 5/3 as many for class 0"
    )
    copy_paste: bool = option(True, "STAL", "adaptive copy-paste on labelled images (AEL)")
    cutmix: bool = option(True, "STAL", "adaptive CutMix on unlabelled images (AEL)")
    class_keep: bool = option(True, "STAL", "thin the pseudo-labels of confident classes (AEL)")

    consistency: float = option(
        0.1, "RIPU losses", "weight of local consistency on the source (Eq. 7)"
    )
    negative: float = option(
        1.0, "RIPU losses", "weight of negative learning on the target (Eq. 8)"
    )
    source_free: str = option(
        "", "RIPU losses", "CHECKPOINT of a source-trained network: adapt without any source image"
    )

    protocol: str = option("ripu", "evaluation", "test protocol", tuple(PROTOCOLS))
    test_size: str = option(
        "", "evaluation", "WxH of the test input for ripu and whole; default --target-size for ripu"
    )
    eval_every: int = option(
        0,
        "evaluation",
        "also score the validation split every so many steps (logged, never chosen by)",
    )
    pictures: int = option(4, "evaluation", "target images drawn to pictures/ in each round")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            name = "--" + field.name.replace("_", "-")
            if field.type is float and isinstance(value, int):
                setattr(self, field.name, float(value))
            elif type(value) is not field.type:
                raise InputError(f"{name} must be {field.type.__name__}, got {value!r}")
            if choices and value not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for names, low in ((AT_LEAST_1, 1), (AT_LEAST_0, 0)):
            for name in names:
                if not getattr(self, name) >= low:  # also refuses nan
                    raise InputError(
                        f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}"
                    )
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"--{name.replace('_', '-')} is a share, from 0 to 1; got {getattr(self, name)}"
                )
        if self.pseudo != "none" and self.strategy not in QUERIES:
            raise InputError(
                f"--pseudo goes with {', '.join(QUERIES)}; --strategy {self.strategy} has its own labels"
            )
        if parse_scale(self.scale) != (1.0, 1.0) and not self.crop:
            raise InputError("--scale needs --crop: the images of a batch must have one size")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be above 0, got {self.lr}")
        if 0 < self.poly_steps < self.steps:
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
        for size in (self.source_size, self.crop, self.test_size):
            if size:
                parse_size(size)
        parse_size(self.target_size)
        if not self.source_size and not self.crop:
            raise InputError(
                "--source-size '' keeps each image's own size and needs --crop: a batch has one size"
            )
        if not 0 < self.budget <= 1:
            raise InputError(
                f"--budget is a share of the pixels, above 0 and at most 1; got {self.budget}"
            )


def parse_scale(text: str) -> tuple[float, float]:
    """ "0.5,1.5" to (0.5, 1.5)."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low <= high < math.inf:
        raise InputError(f"--scale is LOW,HIGH, for example 0.5,1.5; got {text!r}")
    return low, high


# CBST's PyTorch version crops and augments as here; its MXNet version, whose learning rate falls by sqrt(2) a round as
# here, crops 500 at scales 0.7 to 1.3.
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
    "source-only": {"consistency": 0.0, "negative": 0.0},
    "full": {"consistency": 0.0, "negative": 0.0},
    "ripu-pa": {"unit": "pixel", "radius": 32, "pixels": 40},
    "cbda": {"net": "deeplabv3plus", "budget": 0.05},
    "stal": {
        "net": "deeplabv3plus",
        "head": "stal",
        "batch_norm": "live",
        "epochs": 200,
        "lr": 2.5e-3,
        "weight_decay": 1e-4,
        "source_size": "",
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
SOURCE_FREE = {
    "steps": 30_000,
    "consistency": 0.0,
}  # queries at 0, 2,000, ..., 8,000 of 30,000: see query_schedule
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


# Which strategies read a setting that not all of them read; the fields of the group STAL belong to stal alone.
_SCHEDULED = ("source-only", "full", *QUERIES)
READ_BY: dict[str, tuple] = {
    **dict.fromkeys(
        ("query_steps", "unit", "radius", "pixels", "pseudo", "pseudo_steps", "pseudo_weight"),
        QUERIES,
    ),
    **dict.fromkeys(("budget",), (*QUERIES, "stal")),
    "keep_labels": ("full", *QUERIES, "stal", *SELF_TRAINING),
    "rounds": (*QUERIES, "stal", *SELF_TRAINING),
    "cbda": ("cbda",),
    **dict.fromkeys(
        ("poly_steps", "source_sampling", "consistency", "negative", "source_free"), _SCHEDULED
    ),
    **dict.fromkeys(
        ("source_portion", "source_portion_step", "source_portion_max", "mine", "source_steps"),
        SELF_TRAINING,
    ),
    **dict.fromkeys(("portion", "portion_step", "portion_max"), (*QUERIES, *SELF_TRAINING)),
    "epochs": ("stal", *SELF_TRAINING),
    "eval_every": (*_SCHEDULED, *SELF_TRAINING),
    **{
        field.name: ("stal",)
        for field in dataclasses.fields(Settings)
        if field.metadata["group"] == "STAL"
    },
}


def without_effect(given: dict, s: Settings) -> list[str]:
    """The options that were given although the strategy does not read them, as people write them."""
    idle = {name for name in given if s.strategy not in READ_BY.get(name, STRATEGIES)}
    if s.pseudo == "none" and s.strategy in QUERIES:
        idle |= given.keys() & {
            "portion",
            "portion_step",
            "portion_max",
            "pseudo_steps",
            "pseudo_weight",
        }
    idle |= given.keys() & {"pixels"} if s.unit == "region" else set()
    idle |= given.keys() & {"test_size"} if s.protocol == "sliding" else set()
    idle |= given.keys() & {"head"} if s.net == "deeplabv2" else set()
    idle |= given.keys() & {"source_steps"} if s.init not in ("imagenet", "none") else set()
    return [f"--{name.replace('_', '-')}" for name in sorted(idle)]


def settings_for(given: dict) -> Settings:
    """Settings from the options that were given, over the toy world's, over the paper's, over the defaults."""
    strategy = given.get("strategy", "ripu")
    merged = dict(PAPER.get(strategy, {}))
    if given.get("source_free"):
        if given.get("init", given["source_free"]) != given["source_free"]:
            raise InputError("--source-free starts from its CHECKPOINT: leave --init out")
        merged.update(
            SOURCE_FREE,
            init=given["source_free"],
            **({"radius": 9} if given.get("rules") == "code" else {}),
        )
    if given.get("root") == "toy":
        merged.update(
            {k: v for k, v in TOY.items() if not (k == "init" and "init" in merged)},
            **TOY_BY_STRATEGY.get(strategy, {}),
        )
    if "steps" in given:
        if given.get("epochs"):
            raise InputError("--steps and --epochs are two ways to say how long: give one of them")
        merged["epochs"] = 0
    if "budget" in given and "pixels" in merged:
        merged["pixels"] = 0  # the share that was asked for, not the paper's 40 pixels
    return Settings(**{**merged, **given})


def protocol_of(s: Settings):
    """The protocol of the run's reports; `ripu` tests at the training size of the target unless --test-size says otherwise."""
    size = s.test_size or (s.target_size if s.protocol == "ripu" else "")
    return protocol_named(s.protocol, parse_size(size) if size else None)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: list[str] | None) -> Settings:
    """The command line to Settings; --help groups the options."""
    tables = {**PAPER, "--source-free": SOURCE_FREE, "--root toy": TOY}
    others = "; ".join(
        f"{name}: {', '.join(f'{k} {v}' for k, v in table.items())}"
        for name, table in tables.items()
    )
    parser = Parser(
        prog="python -m alda.loop",
        description="Trains one strategy from a source to a target dataset.",
        epilog=f"Defaults in [brackets]; other ones of {others}. An option that is given always wins.",
        argument_default=argparse.SUPPRESS,
    )
    groups: dict = {}
    for field in dataclasses.fields(Settings):
        meta, name = field.metadata, "--" + field.name.replace("_", "-")
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group = groups[meta["group"]]
        if field.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=meta["help"])
        else:
            text = f"{meta['help']} [{field.default}]" if field.default != "" else meta["help"]
            group.add_argument(name, type=field.type, help=text, choices=meta["choices"] or None)
    given = vars(parser.parse_args(argv))
    s = settings_for(given)
    if (idle := without_effect(given, s)) and os.environ.get("RANK", "0") == "0":
        print(f"note: no effect with --strategy {s.strategy}: {', '.join(idle)}", file=sys.stderr)
    return s
