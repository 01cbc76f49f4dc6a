"""GlobalBudget at the size of Cityscapes: synthetic score streams, peak host memory and time.

    python -m tests.benchmarks.budget --images 2975 --share 0.2 --rounds 5

Every image of 2048x1024 offers as many picks as fit without overlap (regions of 3x3: 9 pixels each), with falling random
scores; the budget takes the best of all. Prints the bound (24 bytes per pick of the budget) beside the measured growth.
"""

import argparse
import resource
import time

import numpy as np
import torch

from alda.acquisition import GlobalBudget

HEIGHT, WIDTH = 1024, 2048


def stream(image: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Picks of a synthetic image: falling scores whose level differs from image to image, and centres."""
    rng = np.random.default_rng(image)
    scores = np.sort(rng.random(capacity, dtype=np.float32) * rng.uniform(0.2, 1))[::-1].copy()
    centres = np.stack(
        [rng.integers(0, HEIGHT, capacity), rng.integers(0, WIDTH, capacity)], axis=1
    )
    return torch.from_numpy(centres), torch.from_numpy(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2975)
    parser.add_argument("--share", type=float, default=0.2, help="of all pixels, over all rounds")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    count = int(args.images * HEIGHT * WIDTH * args.share / args.rounds / 9)
    capacity = HEIGHT * WIDTH // 18  # greedy regions rarely pack more than half of the image
    start, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    budget = GlobalBudget(count)
    for image in range(args.images):
        centres, scores = stream(image, capacity)
        # as the loop does: what cannot win is not offered
        keep = int((scores >= budget.floor).sum())
        budget.add(image, centres[:keep], scores[:keep])
    picks = budget.select()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024 / 1e9
    taken = sum(len(centres) for centres in picks.values())
    print(
        f"{args.images} images of {WIDTH}x{HEIGHT}, {100 * args.share:g} % in {args.rounds} rounds: {count:,} picks a round"
    )
    print(
        f"taken {taken:,} from {len(picks)} images, threshold {budget.threshold:.6f}, {time.time() - began:.0f} s"
    )
    print(
        f"peak host memory +{peak:.2f} GB; bound while adding {24 * count / 1e9:.2f} GB, result {16 * taken / 1e9:.2f} GB"
    )
    assert taken == count


if __name__ == "__main__":
    main()
