"""Acquisition against plain versions written from the definitions: time, bandwidth, peak memory, identical picks.

    python -m tests.benchmarks.acquisition                 # CPU always, GPU where there is one; about 4 minutes on 2 cores
    python -m tests.benchmarks.acquisition --full          # also the dense k=32 at full size: 10 more minutes

Both versions run in one process, in turn; the medians of `--runs` pairs are printed. The plain score is a softmax, a one-hot
of C full planes and a dense convolution with (2k+1)^2 ones; the plain selection takes the maximum of the whole map for each
pick. Peak memory is what a fresh process (CPU) or the allocator (GPU) needs beyond the logits.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from alda import acquisition as A

CLASSES, HEIGHT, WIDTH = 19, 1024, 2048


def dense_score(logits: torch.Tensor, k: int) -> torch.Tensor:
    """RIPU Eqs. (3)-(5) as they are written: (C,H,W) -> (H,W)."""
    classes = logits.shape[0]
    prob = logits.softmax(0)
    entropy = -(prob * (prob + 1e-12).log()).sum(0) / math.log(classes)
    one_hot = F.one_hot(logits.argmax(0), classes).permute(2, 0, 1).float()
    ones = torch.ones(1, 1, 2 * k + 1, 2 * k + 1, device=logits.device)
    area = F.conv2d(torch.ones_like(entropy)[None, None], ones, padding=k)[0, 0]
    share = (
        F.conv2d(one_hot[None], ones.expand(classes, 1, -1, -1), padding=k, groups=classes)[0]
        / area
    )
    impurity = -(share * (share + 1e-12).log()).sum(0) / math.log(classes)
    return impurity * F.conv2d(entropy[None, None], ones, padding=k)[0, 0] / area


def plain_greedy(score: torch.Tensor, count: int, radius: int) -> torch.Tensor:
    """The sequential greedy: two maxima over the map for each pick, smaller column first."""
    score, picks = score.clone(), []
    for _ in range(count):
        by_column, rows = score.max(0)
        column = by_column.argmax().item()
        row = rows[column].item()
        picks.append((row, column))
        score[
            max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1
        ] = -math.inf
    return torch.tensor(picks)


def example(device, height=HEIGHT, width=WIDTH, seed=0) -> torch.Tensor:
    """Logits as a network gives them: smooth, upsampled by 8, (C,H,W) float32."""
    low = 3 * torch.randn(
        1, CLASSES, height // 8, width // 8, generator=torch.Generator().manual_seed(seed)
    )
    return F.interpolate(low, size=(height, width), mode="bilinear", align_corners=True)[0].to(
        device
    )


def seconds(function, device) -> float:
    """Wall time of one call, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def pair(ours, plain, device, runs: int) -> tuple[float, float]:
    """Medians of both, run in turn, after one warm-up of ours."""
    ours()
    times = [(seconds(ours, device), seconds(plain, device)) for _ in range(runs)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def peak_memory(what: str, k: int, device) -> float:
    """GB that one call needs beyond the logits."""
    if device.type == "cuda":
        logits = example(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (dense_score if what == "plain" else A.ripu_score)(logits, k)
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.acquisition",
        "--memory-of",
        what,
        "--k",
        str(k),
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_of(what: str, k: int) -> float:
    """In a fresh process (Linux): the growth of its peak resident size by one call, in GB."""
    logits = example(torch.device("cpu"))
    warm = example(torch.device("cpu"), 64, 64)
    (dense_score if what == "plain" else A.ripu_score)(warm, 1)
    before = peak_resident()
    (dense_score if what == "plain" else A.ripu_score)(logits, k)
    return peak_resident() - before


def peak_resident() -> float:
    """VmHWM in GB: unlike getrusage's maximum it does not start at the parent's size."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024 / 1e9


def run(device: torch.device, runs: int, full: bool) -> None:
    logits = example(device)
    gigabytes = logits.numel() * 4 / 1e9
    floor = statistics.median(seconds(lambda: logits.sum(), device) for _ in range(7))
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{where}, torch {torch.__version__}, logits {CLASSES}x{HEIGHT}x{WIDTH} float32 ({gigabytes:.3f} GB)"
    )
    print(f"reading the logits once: {floor * 1e3:.2f} ms, {gigabytes / floor:.0f} GB/s")
    gap = (A.ripu_score(logits, 1)[0] - dense_score(logits, 1)).abs().max().item()
    ours, plain = pair(
        lambda: A.ripu_score(logits, 1), lambda: dense_score(logits, 1), device, runs
    )
    print(f"score k=1:  ours {ours * 1e3:.1f} ms ({gigabytes / ours:.2f} GB/s, {ours / floor:.0f}x the floor), "
          f"dense {plain * 1e3:.0f} ms, ratio {plain / ours:.1f}, max gap {gap:.1e}, n={runs}")  # fmt: skip
    size = (HEIGHT, WIDTH) if full or device.type == "cuda" else (HEIGHT // 4, WIDTH // 4)
    part, scale = logits[:, : size[0], : size[1]].contiguous(), HEIGHT * WIDTH / (size[0] * size[1])
    ours = statistics.median(seconds(lambda: A.ripu_score(logits, 32), device) for _ in range(runs))
    plain = seconds(lambda: dense_score(part, 32), device) * scale
    note = "" if scale == 1 else f" ({size[1]}x{size[0]} times {scale:.0f})"
    print(
        f"score k=32: ours {ours * 1e3:.1f} ms, dense {plain:.1f} s{note}, ratio {plain / ours:.0f}, n={runs} and 1"
    )
    for k in (1, 32):
        if k == 1 or full:
            ours, plain = peak_memory("ours", k, device), peak_memory("plain", k, device)
            print(
                f"peak memory k={k}: ours {ours:.3f} GB, dense {plain:.3f} GB, ratio {plain / max(ours, 1e-3):.1f}"
            )
    score = A.ripu_score(logits, 1)[0]
    for share in (0.022, 0.05, 0.2):
        count = math.ceil(HEIGHT * WIDTH * share / 5 / 9)
        ours = statistics.median(
            seconds(lambda n=count: A.select_regions(score, n, 2), device) for _ in range(5)
        )
        began = time.perf_counter()
        picks = plain_greedy(score, count, 2)
        plain = time.perf_counter() - began
        same = torch.equal(A.select_regions(score, count, 2).cpu(), picks)
        print(f"picking {100 * share:.1f} %/5 ({count} picks): ours {ours * 1e3:.1f} ms (n=5), sequential {plain:.2f} s (n=1), "
              f"ratio {plain / ours:.0f}, identical picks: {same}")  # fmt: skip
        assert same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--full", action="store_true", help="the dense k=32 on the CPU at full size"
    )
    parser.add_argument("--memory-of", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(args.memory_of, args.k))
        return
    run(torch.device("cpu"), args.runs, args.full)
    if torch.cuda.is_available():
        run(torch.device("cuda"), args.runs, args.full)
    else:
        print("no GPU here: GPU rows are not measured")


if __name__ == "__main__":
    main()
