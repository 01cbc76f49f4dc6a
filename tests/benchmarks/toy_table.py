"""The tables of RESULTS.md: methods on the miniature world, several seeds, mean and standard deviation.

    python -m tests.benchmarks.toy_table --methods random entropy ripu ripu-pa full --budgets 0.022
    python -m tests.benchmarks.toy_table --methods ripu cbda:dynamic cbda:balance cbda:both --budgets 0.05 0.1 0.2
    python -m tests.benchmarks.toy_table --methods st cbst cbst-sp ripu ripu+cbst --budgets 0.01
    python -m tests.benchmarks.toy_table --methods stal:supervised stal:unlabelled stal:random stal --budgets 0.05

For each seed a network is trained on the source once (`source-only`, its score is the first row) and every method starts
from it. Runs lie in runs/table/; a run that is finished is not run again, one that was interrupted is resumed. `--jobs`
runs go at a time, each on one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alda.settings import SELF_TRAINING

SOURCE = ["--batch", "4"]
ADAPT = [
    "--steps",
    "450",
    "--poly-steps",
    "450",
    "--query-steps",
    "0,20,40,60,80",
    "--batch",
    "2",
    "--lr",
    "0.005",
    "--batch-norm",
    "live",
]
STAL = {  # the rows of the paper's Table III; images are drawn at random but for the last
    "supervised": ["--unlabelled", "0", "--contrast", "0", "--image-queries", "random"],
    "unlabelled": ["--contrast", "0", "--image-queries", "random"],
    "random": ["--image-queries", "random"],
    "": [],
}
COMMON = ["--root", "toy", "--threads", "1", "--pictures", "3", "--resume"]


def train(folder: Path, options: list[str]) -> dict:
    """Runs (or resumes, or only reads) one run; its result.json."""
    result = folder / "result.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "alda.loop", "--out", str(folder), *COMMON, *options]
        with open(folder / "log.txt", "a") as log:
            subprocess.run(
                command,
                stdout=log,
                stderr=log,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
    return json.loads(result.read_text())


def adapt(root: Path, method: str, budget: float, seed: int, extra: list[str]) -> dict:
    """One method from the seed's source-trained network."""
    name, _, variant = method.partition(":")
    strategy, _, pseudo = name.partition("+")
    start = root / f"source-only-{seed}" / "checkpoints" / "last.pt"
    options = [
        "--strategy",
        strategy,
        "--init",
        str(start),
        "--batch-norm",
        "live",
        "--seed",
        str(seed),
    ]
    if strategy in SELF_TRAINING:  # no budget
        return train(root / f"{strategy}-{seed}", options + extra)
    if strategy == "stal":
        options += ["--steps", "240", "--lr", "0.003", *STAL[variant]]
    else:
        options += [*ADAPT, "--net", "deeplabv3plus"]
    # ripu-pa: 40 pixels an image
    options += ["--budget", str(budget)] if strategy not in ("full", "ripu-pa") else []
    options += ["--cbda", variant] if strategy == "cbda" else []
    options += ["--pseudo", pseudo] if pseudo else []
    return train(root / f"{method.replace(':', '-')}-{budget:g}-{seed}", options + extra)


def row(name: str, results: list[dict]) -> str:
    """A line of the table: mean +- standard deviation over the seeds, in percent."""

    def text(values: list[float]) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.1f} ± {spread:.1f}"

    miou = text([100 * r["mIoU19"] for r in results])
    lowest = text([100 * r["lowest"]["IoU"] for r in results])
    rare = text(
        [
            100 * statistics.mean(sorted(v for v in r["IoU"].values() if v is not None)[:5])
            for r in results
        ]
    )
    asked_any = results[0]["budget"]["asked"] > 0
    entropy = (
        f"{statistics.mean(r['budget']['class_entropy'] for r in results):.3f}" if asked_any else ""
    )
    asked = f"{statistics.mean(r['budget']['asked'] for r in results):,.0f}"
    minutes = statistics.mean(r["wall_s"] for r in results) / 60
    return f"| {name} | {miou} | {lowest} | {rare} | {entropy} | {asked} | {minutes:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        help="strategies; cbda:dynamic and the like for variants",
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.022])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("runs/table"))
    parser.add_argument("--source-steps", default="600", help="of the common start [600]")
    parser.add_argument(
        "--precision",
        default="float32",
        help="[float32]; bfloat16 is 2 to 3 times as fast on a CPU with bfloat16 units, 10 times as slow "
        "on one without",
    )
    parser.add_argument(
        "--extra", nargs=argparse.REMAINDER, default=[], help="more options for the adapting runs"
    )
    args = parser.parse_args()
    COMMON.extend(["--precision", args.precision])
    SOURCE.extend(["--steps", args.source_steps])
    with ThreadPoolExecutor(args.jobs) as pool:
        source = {s: pool.submit(train, args.root / f"source-only-{s}",
                                 ["--strategy", "source-only", "--seed", str(s), *SOURCE]) for s in args.seeds}  # fmt: skip
        first = [source[s].result() for s in args.seeds]
        whole = {"ripu-pa": "40 px an image", "full": "100 %"}  # what reads no --budget runs once
        once = {*whole, *SELF_TRAINING}
        budgets = {m: args.budgets[:1] if m in once else args.budgets for m in args.methods}
        runs = {(m, b): [pool.submit(adapt, args.root, m, b, s, args.extra) for s in args.seeds]
                for m in args.methods for b in budgets[m]}  # fmt: skip
        print(
            "| method | mIoU19 | lowest class | mean of the 5 lowest | class entropy | pixels asked | minutes |"
        )
        print("|---|---|---|---|---|---|---|")
        print(row("source-only", first), flush=True)
        for (method, budget), futures in runs.items():
            label = method
            if method not in SELF_TRAINING:
                label += " " + whole.get(method, f"{100 * budget:g} %")
            print(row(label, [f.result() for f in futures]), flush=True)


if __name__ == "__main__":
    main()
