"""CBDA towards another class distribution than the uniform one: `alda.loop` with t of class_weights given.

    python -m tests.benchmarks.cbda_target source     --strategy cbda --init START ...   # the source's labels
    python -m tests.benchmarks.cbda_target prediction --strategy cbda --init START ...   # what START predicts

`prediction` is tempered: shares are proportional to the square root of the pixels that START predicts
on the target's training images (one more each, so that no class is left out).
"""

import sys
from functools import partial

import torch

from alda import acquisition, loop
from alda.datasets import NAMES, NUM_CLASSES, open_dataset
from alda.evaluation import load_run, network_logits
from alda.settings import Settings, parse


def source_shares(s: Settings) -> torch.Tensor:
    """Pixels of each class in the source's labels, (C,) float64."""
    source = open_dataset(s.src, s.root)
    counts = torch.zeros(NUM_CLASSES, dtype=torch.int64)
    for index in range(len(source)):
        labels = source.labels(index)
        counts += torch.bincount(labels[labels < NUM_CLASSES].long(), minlength=NUM_CLASSES)
    return counts.double()


@torch.inference_mode()
def predicted_shares(s: Settings) -> torch.Tensor:
    """The square root of how many target pixels the network of --init predicts as each class, (C,)."""
    model = load_run(s.init, "cpu")
    target = open_dataset(s.tgt, s.root, "train", reads_labels=False)
    counts = torch.ones(NUM_CLASSES, dtype=torch.int64)
    for index in range(len(target)):
        logits = network_logits(model, target.image(index)[None], s.target_hw, "cpu")
        counts += torch.bincount(logits.argmax(1).flatten(), minlength=NUM_CLASSES)
    return counts.double().sqrt()


def main() -> int:
    shares = {"source": source_shares, "prediction": predicted_shares}[sys.argv.pop(1)]
    s = parse(None)
    torch.set_num_threads(s.threads or torch.get_num_threads())
    target = shares(s)
    words = [f"{n} {x:.3f}" for n, x in zip(NAMES, target / target.sum(), strict=True)]
    print(f"wished for: {', '.join(words)}", flush=True)
    acquisition.class_weights = partial(acquisition.class_weights, target=target)
    return loop.main()


if __name__ == "__main__":
    sys.exit(main())
