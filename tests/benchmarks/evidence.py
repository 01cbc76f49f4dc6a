"""Do the methods gain, as the papers say? Tables of RESULTS.md: rows, seeds, paired differences. Resumable.

    python -m tests.benchmarks.evidence --world real --root DATA --init mobilenet_v2_imagenet.pth --rows random@0.005 ripu@0.005
    python -m tests.benchmarks.evidence --world toy --init mobilenet_v2_imagenet.pth --rows full full:twice --seeds 0 1 2
    python -m tests.benchmarks.evidence ... --only-table     # what is finished, nothing is run
    python -m tests.benchmarks.evidence ... --only-table --record tests/benchmarks/evidence-toy.jsonl   # tables of RESULTS.md

A row is STRATEGY[:VARIANT...][+PSEUDO][@BUDGET]: `ripu@0.022`, `cbda:balance@0.05`,
`ripu+cbst@0.022`, `ripu:teacher@0.005`, `stal:random@0.05`, `cbst`, `full`, `full:twice` (twice the
steps), `ripu-pa` and `random:pa` (40 single pixels an image), `cbda:both:source:long@0.005`
(VARIANTS and cbda_target.py). Every row starts from its seed's source-trained MobileNetV2
(`source-only`, trained once, kept in RUNS) and has the same steps, rates and images: one recipe,
WORLDS below, chosen on `source-only` and `full`, the miniature world's rate on `random` (CBST and
its kin: a fifth of the rate, as in the miniature world's defaults). A run that is finished is not
run again, one that was stopped goes on; with --record FILE a run that stands in FILE is not run
again either (but for what others start from: `source-only`, and STRONG of `:strong` rows), and what
is finished is added to it. Differences are paired by seed: a row minus the row of `--against` (as
many as one likes) with the same budget and variant, mean +- standard error over the seeds.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


class World(NamedTuple):
    """The recipe of all rows: image size; (steps, rate) of the source-trained start, 4 images a step,
    and of what follows it, 2 + 2 images."""

    size: str
    start: tuple[int, float]
    adapt: tuple[int, float]


WORLDS = {
    "real": World("240x180", (300, 0.0025), (250, 0.01)),  # half of the labels is left at this size
    "real-160": World("160x120", (300, 0.0025), (250, 0.01)),  # a quarter
    "toy": World("128x64", (600, 0.01), (1000, 0.005)),
    "toy-256": World("256x128", (600, 0.01), (1000, 0.005)),  # twice as large: the labels' own size
}
# when labels are asked for, as shares of the steps
QUERIES = {
    "": (0, 0.08, 0.16, 0.24, 0.32),
    "long": (0, 0.1, 0.2, 0.3, 0.4),
    "late": (0.25, 0.3, 0.35, 0.4, 0.45),  # RIPU's published schedule
}
LENGTHS = {"half": 0.5, "twice": 2, "long": 4}  # times the steps
RATES = {"cbst:rate": 0.25, "*:low-rate": 0.25, "*:high-rate": 4}  # times the rate
# less than 1 % of Cityscapes' training pixels each
RARE = ("wall", "fence", "traffic light", "traffic sign", "rider", "truck", "bus", "train")
RARE += ("motorcycle", "bicycle")
STRONG = "ripu@0.005"
SELF_TRAINING = ("st", "cbst", "cbst-sp")
VARIANTS = {  # STRATEGY:VARIANT and what it adds; * is every strategy
    # the rows of STAL's ablation; images are drawn at random but for plain `stal`
    "stal:supervised": ["--unlabelled", "0", "--contrast", "0", "--image-queries", "random"],
    "stal:unlabelled": ["--contrast", "0", "--image-queries", "random"],
    "stal:random": ["--image-queries", "random"],
    # why something does not reproduce
    "stal:drop50": ["--drop", "0.5"],
    "stal:quick": ["--confidence-momentum", "0.98"],  # 50 steps of a loop's 333, not 1,000
    "stal:restart": ["--restart"],  # each loop from the source-trained start
    "stal:no-scale": ["--scale", "1,1"],  # images as they are, not from half to twice their size
    "stal:no-cutmix": ["--no-cutmix"],
    "stal:no-keep": ["--no-class-keep"],
    "stal:code": ["--rules", "code"],  # L_u as the official code has it
    "cbst:no-mirror": ["--no-label-flip"],
    "cbst:full-size": ["--label-scale", "1"],
    "cbst:source": ["--source-portion", "1", "--source-portion-max", "1"],
    "*:teacher": ["--teacher"],
    "*:strong": [],  # from the network of a finished run of STRONG
    "*:light": ["--unlabelled", "0.1"],
    "*:mixed": ["--unlabelled", "0"],  # CutMix and the teacher's average, no pseudo-label
    "*:sure": ["--drop", "0.8"],
    "*:slow": ["--ema", "0.999"],
    "*:pa": ["--unit", "pixel", "--pixels", "40"],  # single pixels, as many as ripu-pa's
    "*:keep": ["--keep-labels"],
}


def train(folder: Path, options: list[str], module: tuple[str, ...] = ("alda.loop",)) -> dict:
    """Runs, resumes or only reads one run of `module`; its result.json."""
    result = folder / "result.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", *module, "--resume", "--out", str(folder), *options]
        with open(folder / "log.txt", "a") as log:
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, stdout=log, stderr=log, check=True, env=one_thread)
    return json.loads(result.read_text())


def split(row: str) -> tuple[str, list[str], str, str]:
    """ "cbda:both:long+cbst@0.05" -> ("cbda", ["both", "long"], "cbst", "0.05")."""
    text, _, budget = row.partition("@")
    text, _, pseudo = text.partition("+")
    strategy, *variants = text.split(":")
    return strategy, variants, pseudo, budget


def folder_of(args, row: str, seed: int) -> Path:
    return args.runs / f"{row.replace(':', '-').replace('@', '-')}-{seed}"


def adapt(args, common: list[str], row: str, seed: int) -> dict:
    """One row from the seed's source-trained network."""
    strategy, variants, pseudo, budget = split(row)
    world = WORLDS[args.world]
    steps, rate = world.adapt
    start = folder_of(args, STRONG if "strong" in variants else "source-only", seed)
    options = [*common, "--strategy", strategy, "--seed", str(seed)]
    options += ["--init", str(start / "checkpoints/last.pt")]
    if strategy == "stal":
        options += ["--head", "ripu", "--crop", world.size, "--ohem-threshold", "1"]
        options += ["--bank", "3000", "--source-images", "0", "--protocol", "ripu"]
    elif strategy in SELF_TRAINING:
        options += ["--rounds", "4", "--crop", world.size, "--test-size", world.size]
        rate /= 5
    module, schedule = ("alda.loop",), QUERIES[""]
    for variant in variants:
        name, for_all = f"{strategy}:{variant}", f"*:{variant}"
        if name in RATES or for_all in RATES:
            rate *= RATES.get(name) or RATES[for_all]
        elif variant in LENGTHS or variant in QUERIES:
            steps = round(steps * LENGTHS.get(variant, 1))
            schedule = QUERIES.get(variant, schedule)
        elif strategy == "cbda" and variant in ("dynamic", "balance", "both"):
            options += ["--cbda", variant]
        elif strategy == "cbda" and variant in ("source", "prediction"):  # towards those classes
            module = ("tests.benchmarks.cbda_target", variant)
        else:
            options += VARIANTS[name if name in VARIANTS else for_all]
    options += ["--steps", str(steps), "--batch", "2", "--lr", f"{rate:g}"]
    if strategy not in (*SELF_TRAINING, "stal"):
        options += ["--poly-steps", str(steps)]
        if strategy != "full":
            options += ["--query-steps", ",".join(str(round(x * steps)) for x in schedule)]
    options += ["--budget", budget] if budget else []
    options += ["--pseudo", pseudo] if pseudo else []
    return train(folder_of(args, row, seed), options + args.extra, module)


def read_record(path: Path | None) -> dict[tuple[str, int], dict]:
    """The runs of a record, a line of JSON each, by (row, seed)."""
    if path is None or not path.is_file():
        return {}
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    return {(run["row"], run["seed"]): run for run in runs}


def add_to_record(path: Path, results: dict[str, dict[int, dict]]) -> None:
    """Adds the runs of `results` that are not in the record: the scores, not the run."""
    record = read_record(path)
    for row, runs in results.items():
        for seed, result in runs.items():
            scores = {
                "mIoU19": round(result["mIoU19"], 5),
                "IoU": {k: v if v is None else round(v, 4) for k, v in result["IoU"].items()},
                "budget": {"asked": result["budget"]["asked"]},
                "wall_s": round(result["wall_s"]),
            }
            if "student" in result:
                scores["student"] = {"mIoU19": round(result["student"]["mIoU19"], 5)}
            if "pseudo_rounds" in result:  # the accuracy of CBST's labels, round by round
                scores["accuracy"] = [round(r["accuracy"], 4) for r in result["pseudo_rounds"]]
            record.setdefault((row, seed), {"row": row, "seed": seed, **scores})
    text = "".join(json.dumps(record[key]) + "\n" for key in sorted(record))
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def spread(values: list[float]) -> str:
    """Mean +- standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def mean_and_error(gaps: list[float]) -> tuple[float, float]:
    """The mean of at least two differences and its standard error."""
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def paired(mine: dict, other: dict) -> str:
    """The mean difference by seed +- its standard error, and the difference of each seed."""
    gaps = [mine[seed] - other[seed] for seed in mine if seed in other]
    if len(gaps) < 2:
        return ""
    mean, error = mean_and_error(gaps)
    each = ", ".join(f"{gap:+.1f}" for gap in gaps)
    return f"{mean:+.1f} ± {error:.1f} ({each})"


def compared_with(row: str, against: str, rows) -> str:
    """The one of `rows` that `row` is measured against: of the same budget, or pixels an image, or with
    none (`full`), and of the same variants (twice the steps, say), as many of its last ones as there is
    another row for."""
    strategy, variants, _, budget = split(row)
    variants = ["pa", *variants] if strategy == "ripu-pa" else variants
    budget = f"@{budget}" if budget else ""
    for i in range(len(variants) + 1):
        name = ":".join([against, *variants[i:]])
        for alike in (name + budget, name):
            if alike in rows and alike != row:
                return alike
    return against + budget


def rare(result: dict) -> float:
    """The mean IoU, in percent, of the rare classes that occur."""
    return 100 * statistics.mean(v for k, v in result["IoU"].items() if k in RARE and v is not None)


def print_table(results: dict[str, dict[int, dict]], against: list[str]) -> None:
    """A line a row: n, the mean over the classes that occur, what was asked, the differences from each
    row of `against`; the same of the rare classes, from the first."""
    scores = {
        row: {seed: 100 * r["mIoU19"] for seed, r in runs.items()} for row, runs in results.items()
    }
    rares = {row: {seed: rare(r) for seed, r in runs.items()} for row, runs in results.items()}
    minus = [f"minus {x}" for x in against]
    head = ["row", "n", "mIoU", "asked", *minus, "rare classes", minus[0], "minutes"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row, runs in results.items():
        if not runs:
            continue
        asked = f"{statistics.mean(r['budget']['asked'] for r in runs.values()):,.0f}"
        asked = "all" if row.startswith("full") else asked
        minutes = statistics.mean(r["wall_s"] for r in runs.values()) / 60
        others = [compared_with(row, x, scores) for x in against]
        gaps = [paired(scores[row], scores.get(x, {})) if x != row else "" for x in others]
        rare_gap = paired(rares[row], rares.get(others[0], {})) if others[0] != row else ""
        cells = [row, str(len(runs)), spread([*scores[row].values()]), asked, *gaps]
        cells += [spread([*rares[row].values()]), rare_gap, f"{minutes:.1f}"]
        print(f"| {' | '.join(cells)} |")


def print_classes(results: dict[str, dict[int, dict]]) -> None:
    """A line a row: the mean IoU of each class that occurs."""
    runs = next(iter(runs for runs in results.values() if runs), {})
    names = [name for r in [*runs.values()][:1] for name, v in r["IoU"].items() if v is not None]
    print(f"\n| mean IoU | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for row, runs in results.items():
        if runs:
            means = [statistics.mean(100 * r["IoU"][name] for r in runs.values()) for name in names]
            print(f"| {row} | {' | '.join(f'{mean:.1f}' for mean in means)} |")


def draw(results: dict[str, dict[int, dict]], path: Path, world: str) -> None:
    """The picture of `alda.evaluation compare --plot`, from a record: mIoU over the share of pixels
    asked, a line a row without its budget, bands of +- the standard deviation over the seeds."""
    from alda import evaluation  # here: it brings torch, which no table needs

    figure, axes = evaluation.new_figure()
    lines: dict[str, dict[str, list]] = {}
    for row, runs in results.items():
        name, _, budget = row.partition("@")
        points = [(100 * float(budget or 0), 100 * r["mIoU19"]) for r in runs.values()]
        if points:
            lines.setdefault(name, {})[budget] = [*zip(*points, strict=True)]
    for number, (name, places) in enumerate(lines.items()):
        groups = sorted(places.values())
        evaluation.draw_curve(axes, name, groups, level="" in places, color=f"C{number}")
    axes.set_xlim(left=0)
    axes.set_xlabel("target pixels asked [%]")
    axes.set_ylabel(f"mIoU19 [%], world: {world}")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--root", default="", help="data folder [toy]")
    parser.add_argument("--init", help="ImageNet weights of MobileNetV2, for all that is run")
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--against", nargs="+", default=["random"], help="rows to subtract")
    parser.add_argument("--classes", action="store_true", help="print the IoU of each class, too")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=None, help="[runs/evidence-WORLD]")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--plot", type=Path, default=None, help="draw the rows (needs matplotlib)")
    parser.add_argument("--record", type=Path, default=None, help="file of finished runs")
    parser.add_argument(
        "--extra", nargs=argparse.REMAINDER, default=[], help="more options, of all rows"
    )
    args = parser.parse_args()
    if not (args.init or args.only_table):
        parser.error("what is to be run needs --init: ImageNet weights of MobileNetV2")
    if args.world.startswith("real") and not (args.root or args.only_table):
        parser.error(f"--world {args.world} needs --root: the folder of the photographs")
    args.runs = args.runs or Path(f"runs/evidence-{args.world}")
    world = WORLDS[args.world]
    common = ["--source-size", world.size, "--target-size", world.size]
    common += ["--root", args.root or "toy"]
    common += ["--net", "deeplabv3plus", "--backbone", "mobilenet_v2", "--threads", "1"]
    common += ["--pictures", "0", "--workers", "0"]
    results: dict[str, dict[int, dict]] = {row: {} for row in ("source-only", *args.rows)}
    starts = ["source-only"] + [STRONG] * any("strong" in split(row)[1] for row in args.rows)

    recorded = read_record(args.record)

    def run(job):
        row, seed = job
        if job in recorded and (args.only_table or row not in starts):
            return recorded[job]
        if args.only_table:
            path = folder_of(args, row, seed) / "result.json"
            return json.loads(path.read_text()) if path.is_file() else None
        if row != "source-only":
            return adapt(args, common, row, seed)
        options = ["--strategy", row, "--init", args.init, "--seed", str(seed), "--batch", "4"]
        options += ["--steps", str(world.start[0]), "--lr", str(world.start[1])]
        return train(folder_of(args, row, seed), common + options)

    for rows in (*([start] for start in starts), args.rows):  # every row needs its start
        part = [(row, seed) for row in rows for seed in args.seeds]
        with ThreadPoolExecutor(args.jobs) as pool:
            for (row, seed), result in zip(part, pool.map(run, part), strict=True):
                if result is not None and row in results:
                    results[row][seed] = result
    if args.record:
        add_to_record(args.record, results)
    if args.plot:
        draw(results, args.plot, args.world)
    print_table(results, args.against)
    if args.classes:
        print_classes(results)


if __name__ == "__main__":
    main()
