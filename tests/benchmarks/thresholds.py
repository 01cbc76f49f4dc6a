"""CBST's thresholds at the size of Cityscapes: synthetic probability maps, peak host memory and CPU time, flat in the images.

    python -m tests.benchmarks.thresholds                                  # 200 and 800 images of 1024x2048
    python -m tests.benchmarks.thresholds --images 20 80 --exact

Every map (19 classes) is made when it is asked for, from low-resolution logits that are upsampled, and dropped after it has
been counted. Each number of images runs in its own process, so that one peak does not hide the other. Growth is beyond a
process that has made one map and counted a tiny one. `--exact` also keeps every 4th confidence in a tensor and sorts, as
the official rule (which keeps Python floats instead): the gap of the thresholds and what the memory would have been.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from alda.selftraining import ConfidenceHistogram, cbst_thresholds

CLASSES, HEIGHT, WIDTH, PORTION = 19, 1024, 2048, 0.2


def image(number: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> torch.Tensor:
    """Probabilities as a network gives them, (C,H,W) float32; some classes are rare and timid, as in street scenes."""
    low = 3 * torch.randn(1, CLASSES, 32, 64, generator=torch.Generator().manual_seed(number))
    low += torch.linspace(3, -3, CLASSES)[:, None, None]
    return F.interpolate(low, size=size, mode="bilinear")[0].softmax(0)


def peak() -> float:
    """Peak resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(images: int, exact: bool) -> None:
    """One process: prints the line of `images` images."""
    cbst_thresholds([image(0, (64, 64))], PORTION)
    made = image(0)
    del made
    start, spent, kept = peak(), 0.0, [[] for _ in range(CLASSES)]
    histogram = ConfidenceHistogram(CLASSES)
    for number in range(images):
        prob = image(number)
        began = time.process_time()
        histogram.add(prob, stride=4 if exact else 1)
        spent += time.process_time() - began
        if exact:
            confidence, prediction = prob.max(0)
            for c in range(CLASSES):
                kept[c].append(confidence[prediction == c][::4])
        del prob  # before the next one is made
    began = time.process_time()
    thresholds = histogram.thresholds(PORTION)
    spent += time.process_time() - began
    growth, each = peak() - start, spent / images * 1e3
    print(
        f"{images} images: peak host memory +{growth:.0f} MB over {start:.0f} MB, {each:.0f} ms of CPU time an image"
    )
    if exact:
        sorted_ = [torch.cat(values).sort(descending=True).values for values in kept]
        ranks = [int(PORTION * len(values)) for values in sorted_]
        pairs = zip(sorted_, ranks, thresholds.tolist(), strict=True)
        gap = max(
            abs((values[rank - 1].item() if rank else 1.0) - found) for values, rank, found in pairs
        )
        number = sum(map(len, sorted_))
        print(
            f"  max gap to the exact rank values {gap:.1e}; {number:,} confidences kept for them (every 4th)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[200, 800])
    parser.add_argument(
        "--exact", action="store_true", help="compare with sorting every 4th confidence (grows)"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args.images[0], args.exact)
        return
    print(
        f"{CLASSES}x{HEIGHT}x{WIDTH}, torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s)",
        flush=True,
    )
    for images in args.images:
        options = ["--child", "--images", str(images), *(["--exact"] if args.exact else [])]
        subprocess.run([sys.executable, "-m", "tests.benchmarks.thresholds", *options], check=True)


if __name__ == "__main__":
    main()
