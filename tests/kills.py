"""Kills at random moments: does a run that was killed again and again end with the bits of one that was not?

    python -m tests.kills [KILLS]              # 20 kills (SIGKILL) a strategy, minutes; ends with status 1 where bits differ

Each run is a forked process, so that a kill costs no start of Python. It is killed after a random part of the time that
an uninterrupted run takes, then resumed, until it ends; then the next one begins. Compared: every tensor and value of
last.pt, all files of rounds/ and pseudo/, the log without times, result.json without its time.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from alda import loop, toy
from tests.fingerprints import CBST, QUERY, SHORT, STAL
from tests.test_loop import assert_same_bits, metric_lines, round_files

RUNS = {
    "ripu": f"--strategy ripu {QUERY}",
    "cbda": f"--strategy cbda {QUERY} --net deeplabv3plus",
    "stal": f"--strategy stal {STAL}",
    "cbst": f"--strategy cbst {CBST} --rules code",
    "ripu + cbst": f"--strategy ripu {QUERY} --pseudo cbst --pseudo-steps 3,6 --rules code",
}


def begin(words: list[str]) -> int:
    """Starts a run in a forked process; returns its id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = loop.main(words)
    if status:
        print(text.getvalue(), file=sys.__stderr__, flush=True)
    os._exit(status)


def ended(child: int, seconds: float) -> bool:
    """Whether the process ends within so many seconds; otherwise it is killed."""
    until = time.time() + seconds
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"a run ended with {status}"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def content(out: Path) -> dict:
    """What two equal runs have alike."""
    result = json.loads((out / "result.json").read_text())
    return {
        "state": torch.load(out / "checkpoints/last.pt", weights_only=True),
        "rounds": round_files(out),
        "log": metric_lines(out),
        "result": {k: v for k, v in result.items() if k != "wall_s"},
    }


def kill_often(name: str, options: str, work: Path, kills: int) -> dict:
    """{"kills", "runs", "seconds"} of a strategy; raises AssertionError where a run differs."""
    out = work / "out"  # one path for all: CBST's settings name its folder
    words = [*SHORT.split(), *options.split(), "--root", str(work / "world"), "--out", str(out)]
    began = time.time()
    assert ended(begin(words), 600)
    whole, duration = content(out), time.time() - began
    moments, done, runs = random.Random(name), 0, 0
    while done < kills:
        shutil.rmtree(out)
        runs += 1
        while not ended(
            begin([*words, "--resume"]), moments.uniform(0, duration) if done < kills else 600
        ):
            done += 1
        assert_same_bits(whole, content(out))
    return {"kills": done, "runs": runs, "seconds": round(time.time() - began)}


def main(kills: int) -> None:
    """All of RUNS; prints a line each."""
    work = Path(tempfile.mkdtemp())
    toy.write(work / "world", seed=0, counts=toy.SMALL)
    for name, options in RUNS.items():
        print(f"{name}: {kill_often(name, options, work, kills)}, the same bits", flush=True)
        shutil.rmtree(work / "out")
    shutil.rmtree(work)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
