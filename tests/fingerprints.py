"""Do results move? Short runs of every strategy on a miniature world, and the sha256 of what each leaves.

    python -m tests.fingerprints before.txt          # at the commit before a change, then at the one after it:
    python -m tests.fingerprints after.txt && diff before.txt after.txt

A line a run and part: the network (and the teacher), rounds/, pseudo/, metrics.jsonl and result.json without times and memory.
The sums hold for one machine and one version of torch; on one CPU thread two runs of the same code agree.
"""

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from alda import loop, toy

SHORT = (
    "--net deeplabv2 --backbone resnet18 --init none --steps 8 --batch 2 --lr 0.01 --source-size 64x32 --target-size 64x32 "
    "--rounds 2 --workers 0 --threads 1 --log-every 2 --checkpoint-every 3 --device cpu --pictures 1"
)
QUERY = "--query-steps 2,5"
STAL = "--head ripu --crop 48x24 --budget 0.5 --ohem-pixels 300 --bank 40 --protocol ripu"
CBST = "--crop 48x24 --test-size 64x32 --source-steps 2 --source-portion 0.3"
RUNS = {
    "source-only": "",
    "full": "--precision bfloat16",
    **{name: QUERY for name in ("random", "entropy", "margin", "ripu", "cbda")},
    "ripu-pa": f"{QUERY} --radius 3",
    "ripu --rules code": f"{QUERY} --rules code --source-sampling uniform --eval-every 4",
    "ripu --net deeplabv3plus": f"{QUERY} --net deeplabv3plus --keep-labels",
    "ripu --source-free": "--query-steps 0,3 --batch-norm live",
    "cbda --cbda dynamic": f"{QUERY} --unit pixel --budget 0.2",
    "cbda --cbda balance": QUERY,
    "ripu --pseudo cbst": f"{QUERY} --pseudo-steps 3,6 --rules code",
    "cbda --pseudo cbst-sp": f"{QUERY} --pseudo-steps 3,6 --pseudo-weight 0.5",
    "st": f"{CBST} --rules code",
    "cbst": f"{CBST} --rules code",
    "cbst-sp": f"{CBST} --eval-every 4",
    "stal": STAL,
    "stal --rules code": f"{STAL} --net deeplabv3plus --head stal --restart",
    "stal --no-cutmix": f"{STAL} --no-copy-paste --no-cutmix --no-class-keep --auxiliary 0 --image-queries random",
    "stal --unlabelled 0": f"{STAL} --contrast 0",
    "stal --src synthia": f"{STAL} --contrast-start 0 --drop 0.3 --src synthia",
}


def tensors(state: dict) -> str:
    """The sha256 of a state dict: names and bytes, in order."""
    total = hashlib.sha256()
    for name, value in state.items():
        total.update(name.encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def files(folder: Path) -> str:
    """The sha256 of all files below a folder: paths and bytes."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.name == "round.json":  # without the sums of the files, which are read here too
            record = json.loads(content)
            record.pop("files", None)
            content = json.dumps(record, indent=1).encode()
        total.update(str(path.relative_to(folder)).encode() + content)
    return total.hexdigest()[:16]


def lines(text: str) -> str:
    """The sha256 of JSON lines without what depends on the clock and on the machine's memory."""
    total = hashlib.sha256()
    for line in text.splitlines():
        kept = {
            k: v
            for k, v in json.loads(line).items()
            if k not in ("steps_per_s", "memory_GB", "wall_s")
        }
        total.update(json.dumps(kept).encode())
    return total.hexdigest()[:16]


def fingerprint(out: Path) -> dict[str, str]:
    """What a finished run left, a sum for each part."""
    state = torch.load(out / "checkpoints/last.pt", weights_only=True)
    sums = {part: tensors(state[part]) for part in ("model", "teacher") if part in state}
    sums |= {part: files(out / part) for part in ("rounds", "pseudo") if (out / part).is_dir()}
    sums["metrics"] = lines((out / "metrics.jsonl").read_text())
    sums["result"] = lines(json.dumps(json.loads((out / "result.json").read_text())))
    return sums


def main(path: str) -> None:
    """Runs all of RUNS and writes their sums to `path`."""
    work = Path(tempfile.mkdtemp())
    toy.write(work / "world", seed=0, counts=toy.SMALL)
    found = []
    for name, options in RUNS.items():
        out = work / name.replace(" ", "")
        words = f"--strategy {name}".split() + SHORT.split() + options.split()
        if "--source-free" in words:
            checkpoint = str(work / "source-only/checkpoints/last.pt")
            words[words.index("--source-free") + 1 : words.index("--source-free") + 1] = [
                checkpoint
            ]
            words[words.index("none")] = checkpoint
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as errors,
        ):
            status = loop.main([*words, "--root", str(work / "world"), "--out", str(out)])
        if status:
            raise SystemExit(f"{name}: status {status}: {errors.getvalue()}")
        found += [f"{name}: {part} {value}" for part, value in fingerprint(out).items()]
        print(*found[-6:], sep="\n", flush=True)
    Path(path).write_text("\n".join(found) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main(sys.argv[1])
