# ruff: noqa: E731, SIM905
"""Runs that nothing corrupts: a table of hostile situations, each of which ends in one line, never in a silent wrong result.

A situation is a function of a Place (the miniature world and two prepared runs, to be spoiled at will). It
ends well in one of two ways: status 2 with ONE line that holds the words the table expects, or, where the run can
go on, a line that says so. A table of what was found is printed (pytest -s).
"""

import collections
import contextlib
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alda import (
    InputError,
    acquisition,
    annotation,
    datasets,
    deeplab,
    distributed,
    evaluation,
    loop,
    run,
)
from tests.test_loop import assert_same_bits, round_files

PLAIN = (
    "--net deeplabv2 --backbone resnet18 --init none --steps 6 --batch 1 --lr 0.01 --momentum 0 --source-size 48x24 "
    "--target-size 48x24 --rounds 2 --query-steps 2,4 --workers 0 --log-every 1 --checkpoint-every 3 --device cpu "
    "--pictures 0 --strategy ripu --rules code"
).split()
WORDS = [*PLAIN, "--pseudo", "cbst", "--pseudo-steps", "3"]
LIMIT = 25  # seconds until a situation counts as a hang


class Hang(BaseException):
    """A situation took longer than LIMIT."""


class Stop(BaseException):
    """Where a prepared run is killed."""


class Place:
    """The world, the prepared runs, and an empty folder for one situation."""

    def __init__(self, base: Path, folder: Path, patch):
        self.base, self.folder, self.patch = base, folder, patch
        folder.mkdir()

    def copy(self, name: str) -> Path:
        """A copy of `name` (world, finished, stopped, other); files are links: replace, do not write into them."""
        shutil.copytree(self.base / name, self.folder / name, copy_function=os.link)
        return self.folder / name

    def main(self, *words: str, world=None, out="out", given=WORDS):
        """(status, all that was printed) of a run in out; later words win."""
        root = str(world or self.base / "world")
        return spoken(
            lambda: loop.main([*given, "--root", root, "--out", str(self.folder / out), *words])
        )

    def resume(self, out="stopped", *words: str, world=None):
        return self.main("--resume", *words, out=out, world=world)


def spoken(call):
    """(status, text) of a call: its exit status and output, or 2 and the message of an InputError."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = call()
        except InputError as error:
            return 2, str(error)
        except SystemExit as stop:
            return stop.code, text.getvalue()
    return status if isinstance(status, int) else 0, text.getvalue()


def replace(path: Path, content) -> None:
    """Another content under the same name, never written into a linked file."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# ---------------------------------------------------------------------------------- broken files

BROKEN_JSON = {
    "empty": b"",
    "cut": b'{"settings": {"str',
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "text": b'"x"',
    "binary": bytes(range(256)),
    "another encoding": '{"a": 1}'.encode("utf-16"),
    "nested without end": b"[" * 100_000,
    "an empty object": b"{}",
    "parts of another kind": b'{"settings": 3, "budget": 3, "IoU": 3, "files": 3}',
}


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width, height, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def real_png(dtype=np.uint8, kind="png") -> bytes:
    packed = io.BytesIO()
    Image.fromarray(np.zeros((24, 48), dtype)).save(packed, kind)
    return packed.getvalue()


GOOD = real_png()
DATA = chunk(b"IDAT", zlib.compress(bytes(49 * 24)))
BROKEN_PNG = {
    "empty": b"",
    "text": b"hello",
    "cut": GOOD[: len(GOOD) // 2],
    "cut in the header": GOOD[:20],
    "a bomb": png(60_000, 60_000, DATA),
    "huge sides": png(2**31 - 1, 2**31 - 1, DATA),
    "sides of 0": png(0, 0, DATA),
    "broken deflate": png(48, 24, chunk(b"IDAT", b"nonsense")),
    "a wrong checksum": GOOD[:50] + bytes([GOOD[50] ^ 1]) + GOOD[51:],
    "a chunk longer than the file": GOOD[:33] + struct.pack(">I", 2**31 - 1) + GOOD[37:],
    "a bomb of text": png(48, 24, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27))), DATA),
    "a palette chunk of 1 byte": png(48, 24, chunk(b"PLTE", b"a"), chunk(b"tRNS", b""), DATA[:20]),
}


def situations():
    """Yields (group, name, function of a Place, words expected, status)."""
    yield from broken_files()
    yield from run_folders()
    yield from rounds_on_disk()
    yield from checkpoints()
    yield from data()
    yield from machine()


def broken_files():
    def config(content):
        def call(place):
            replace(place.copy("stopped") / "config.json", content)
            return place.resume()

        return call

    def ledger(content):
        def call(place):
            replace(place.copy("stopped") / "rounds/01/round.json", content)
            return place.resume()

        return call

    def result(name, content):
        def call(place):
            replace(place.copy("finished") / name, content)
            return spoken(lambda: evaluation.main(["compare", str(place.folder / "finished")]))

        return call

    for name, content in BROKEN_JSON.items():
        yield "JSON", f"config.json is {name}, resume", config(content), "config.json", 2
        yield (
            "JSON",
            f"result.json is {name}, compare",
            result("result.json", content),
            "result.json",
            2,
        )
        yield (
            "JSON",
            f"config.json is {name}, compare",
            result("config.json", content),
            "config.json",
            2,
        )
        yield "JSON", f"round.json is {name}, resume", ledger(content), "round.json", 2

    def picture(read):
        def with_content(content):
            def call(place):
                path = place.folder / "x_labelIds.png"
                path.write_bytes(content)
                return spoken(lambda: read(path) is None)

            return call

        return with_content

    readers = {
        "an image": lambda path: datasets.read_image(path),
        "a label": lambda path: datasets.read_label(path, "cityscapes"),
        "a 16-bit label": lambda path: datasets.read_label(path, "synthia"),
        "a map of a round": lambda path: annotation.read_map(path, (24, 48), 255),
    }
    for (what, read), (name, content) in itertools.product(readers.items(), BROKEN_PNG.items()):
        yield "pictures", f"{what}: {name}", picture(read)(content), "x_labelIds.png", 2
    grey = {"16-bit": real_png(np.uint16), "float": real_png(np.float32, "tiff")}
    for name, content in grey.items():
        yield (
            "pictures",
            f"an image of {name} grey",
            picture(readers["an image"])(content),
            "more than 8 bits",
            2,
        )


def run_folders():
    def foreign(part):
        def call(place):
            shutil.copytree(place.base / "stopped", place.folder / "out", copy_function=os.link)
            for path in (place.folder / "out").iterdir():
                if path.name != part:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            return place.main()

        return call

    for part in ("rounds", "pseudo", "checkpoints", "metrics.jsonl"):
        yield "folder", f"only {part}, no config.json", foreign(part), "no config.json", 2

    def two(place):
        code = "import sys, time\nfrom alda import loop\n"
        code += "loop.run_strategy = lambda *a: (print('on', flush=True), time.sleep(60))\n"
        code += "loop.main(sys.argv[1:])"
        words = [*WORDS, "--root", str(place.base / "world"), "--out", str(place.folder / "out")]
        other = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True
        )
        other.stdout.readline()
        try:
            return place.resume("out")
        finally:
            other.kill()
            other.wait()

    yield "folder", "two processes in one --out", two, "another process", 2

    def removed(again):
        def call(place):
            real = torch.optim.SGD.step

            def step(self, *args, **kwargs):
                shutil.rmtree(place.folder / "out", ignore_errors=True)
                if again:
                    (place.folder / "out").mkdir()
                return real(self, *args, **kwargs)

            place.patch.setattr(torch.optim.SGD, "step", step)
            return place.main()

        return call

    yield "folder", "--out removed during a run", removed(False), "removed or replaced", 2
    yield (
        "folder",
        "--out removed and made again during a run",
        removed(True),
        "removed or replaced",
        2,
    )

    def a_file(place):
        (place.folder / "out").write_text("")
        return place.main()

    yield "folder", "--out is a file", a_file, "--out", 2

    def keeps_config(place):
        out = place.folder / "out"
        out.mkdir()
        shutil.copy(place.base / "stopped/config.json", out)
        status, text = place.resume("out", "--steps", "7")
        return status, text if (out / "config.json").is_file() else "config.json is gone"

    yield "folder", "a failed --resume keeps config.json", keeps_config, "--steps 6 -> 7", 2
    nothing = lambda place: spoken(
        lambda: loop.main(["--resume", "--out", str(place.folder / "no")])
    )
    yield "folder", "--resume alone where nothing is", nothing, "config.json to resume", 2

    def alone(place):
        place.copy("stopped")
        return spoken(lambda: loop.main(["--resume", "--out", str(place.folder / "stopped")]))

    yield "folder", "--resume alone reads config.json", alone, "resumed from step 3", 0

    def unknown_setting(place):
        path = place.copy("stopped") / "config.json"
        record = json.loads(path.read_text())
        record["settings"]["magic"] = 1
        replace(path, json.dumps(record))
        return place.resume()

    yield (
        "folder",
        "config.json with a setting of another version",
        unknown_setting,
        "config.json",
        2,
    )

    def score(place):
        place.copy("stopped")
        return spoken(lambda: evaluation.main(["score", str(place.folder / "stopped")]))

    yield "folder", "score of a run that is not finished", score, "is not finished", 0

    def foreign_commit(place):
        package = place.folder / "repository/env/alda"
        package.mkdir(parents=True)
        git = [
            "git",
            "-C",
            str(place.folder / "repository"),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
        ]
        for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run([*git, *words], check=True)
        place.patch.setattr(run, "__file__", str(package / "run.py"))
        (package / "run.py").write_text("")
        return (0, "none") if run.code_version() is None else (0, "a foreign commit")

    yield "folder", "versions.alda in a foreign repository", foreign_commit, "none", 0


def rounds_on_disk():
    def spoilt(spoil, out="stopped"):
        def call(place):
            spoil(place.copy(out))
            return place.resume(out)

        return call

    def first(part):
        return lambda out: sorted(out.glob(f"{part}/*.png"))[0]

    def another(path):
        same = [
            p for p in sorted(path.parents[2].rglob("*.png")) if p.read_bytes() != path.read_bytes()
        ]
        replace(path, same[0].read_bytes())

    def edited(path):
        values = np.array(Image.open(path))
        values[0, 0] = 3 if values[0, 0] != 3 else 4
        path.unlink()
        Image.fromarray(values).save(path)

    spoils = {
        "deleted": lambda path: path.unlink(),
        "edited": edited,
        "replaced by another picture": another,
        "emptied": lambda path: replace(path, b""),
    }
    parts = {
        "question": "rounds/01/queries",
        "answer": "rounds/01/answers",
        "pseudo-label": "pseudo/01/labels",
    }
    for (name, part), (how, spoil) in itertools.product(parts.items(), spoils.items()):
        call = spoilt(lambda out, part=part, spoil=spoil: spoil(first(part)(out)), "finished")
        yield "rounds", f"a {name} {how}", call, ".png", 2
    added = spoilt(
        lambda out: shutil.copy(first("rounds/01/answers")(out), out / "rounds/01/answers/x.png")
    )
    yield "rounds", "an answer added", added, "was not there", 2
    gone = spoilt(lambda out: shutil.rmtree(out / "rounds/01"))
    yield "rounds", "a round removed", gone, "missing", 2
    yield (
        "rounds",
        "round.json removed",
        spoilt(lambda out: (out / "rounds/01/round.json").unlink()),
        "round.json",
        2,
    )

    def during(remove):
        def call(place):
            real, out = loop.next_batch, place.folder / "out"

            def next_batch(*args):
                if (out / "rounds/01").is_dir():
                    remove(out)
                return real(*args)

            place.patch.setattr(loop, "next_batch", next_batch)
            return place.main(given=PLAIN)

        return call

    answers = lambda out: [path.unlink() for path in out.glob("rounds/01/answers/*.png")]
    yield "rounds", "answers removed during a run", during(answers), "restore", 2
    yield (
        "rounds",
        "a round removed during a run",
        during(lambda out: shutil.rmtree(out / "rounds/01")),
        "rounds",
        2,
    )

    def asked(image_id="a", value=0, shape=(4, 6), dtype=torch.uint8, where=True):
        def call(place):
            question = torch.zeros(4, 6, dtype=torch.bool)
            question[1, 1] = True
            answer = torch.full(shape, 255, dtype=dtype)
            answer[(1, 1) if where else (0, 0)] = value

            def ask():
                with annotation.Rounds(place.folder / "rounds").new(1) as new:
                    new.add(image_id, question, lambda asked: answer, 1, (4, 6))

            status, text = spoken(ask)
            outside = [p for p in place.folder.rglob("*.png") if "rounds" not in p.parts]
            return status, text if not outside else "a file outside"

        return call

    for value in (19, 77, 100, 254):
        yield "answers", f"an answer holds id {value}", asked(value=value), "train ids", 2
    yield "answers", "an answer of another shape", asked(shape=(6, 4)), "expected (4, 6)", 2
    yield "answers", "an answer of another kind", asked(dtype=torch.int64), "torch.uint8", 2
    yield "answers", "an answer where nothing was asked", asked(where=False), "not asked", 2
    for image_id in ("../x", "../../x", "/tmp/hostile-x", "a/b", "..", "", "a\\b", "a\0b", ".x"):
        yield "answers", f"image id {image_id!r}", asked(image_id), "file name", 2


def checkpoints():
    def spoilt(spoil, previous=True, out="stopped"):
        def call(place):
            folder = place.copy(out) / "checkpoints"
            if not previous:
                (folder / "previous.pt").unlink(missing_ok=True)
            spoil(folder / "last.pt", place)
            return place.resume(out)

        return call

    def flip(at):
        def call(path, place):
            content = bytearray(path.read_bytes())
            content[int(len(content) * at)] ^= 4
            replace(path, bytes(content))

        return call

    def write(content):
        return lambda path, place: replace(path, content)

    damages = {f"a flipped bit at {at:.0%}": flip(at) for at in (0.1, 0.5, 0.9)}
    damages |= {"cut": lambda path, place: replace(path, path.read_bytes()[:-5000])}
    damages |= {
        "empty": write(b""),
        "text": write(b"hello"),
        "removed": lambda path, place: path.unlink(),
    }
    for name, spoil in damages.items():
        word = "resumed from step" if name == "removed" else "going on from"
        yield "checkpoints", f"last.pt: {name}", spoilt(spoil), word, 0
        if name != "removed":
            yield (
                "checkpoints",
                f"last.pt: {name}, no other",
                spoilt(spoil, previous=False),
                "last.pt",
                2,
            )

    def changed(**changes):
        def call(path, place):
            state = torch.load(path, weights_only=True)
            for key, value in changes.items():
                state.pop(key) if value is None else state.__setitem__(key, value)
            path.unlink()
            torch.save(state, path)

        return call

    for key in ("step", "model", "optimizer", "random", "history", "names"):
        yield (
            "checkpoints",
            f"without {key!r}",
            spoilt(changed(**{key: None})),
            "no checkpoint of this run",
            2,
        )
    kinds = {"step": "3", "model": {}, "optimizer": {}, "random": torch.zeros(3), "history": 3}
    for key, value in kinds.items():
        yield (
            "checkpoints",
            f"{key!r} of another kind",
            spoilt(changed(**{key: value})),
            "no checkpoint of",
            2,
        )
    for step in (-1, 7, True):
        yield (
            "checkpoints",
            f"of step {step}",
            spoilt(changed(step=step)),
            "no checkpoint of this run",
            2,
        )

    def foreign(path, place):
        path.unlink()
        os.link(place.base / "other/checkpoints/last.pt", path)

    yield "checkpoints", "of another run of the same network", spoilt(foreign), "other settings", 2

    def bare(path, place):
        state = torch.load(path, weights_only=True)["model"]
        path.unlink()
        torch.save(state, path)

    yield "checkpoints", "a bare state dict", spoilt(bare), "no checkpoint of this run", 2

    def metrics(content, words):
        def call(place):
            replace(place.copy("stopped") / "metrics.jsonl", content)
            return place.resume()

        return "checkpoints", f"metrics.jsonl: {content[:12]!r}", call, words, 0

    for content in (b"", b"[]\n3\nnull\n", b"{}\n" * 9, bytes(range(128, 256))):
        yield metrics(content, "lines before step 3 are lost")

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(Path(os.environ["HOSTILE"]) / "code-was-run"),)

    def malicious(place):
        os.environ["HOSTILE"] = str(place.folder)
        hub = place.folder / "hub/checkpoints"
        hub.mkdir(parents=True)
        place.patch.setattr(torch.hub, "get_dir", lambda: str(place.folder / "hub"))
        with open(hub / "resnet18-f37072fd.pth", "wb") as file:
            torch.save({"conv1.weight": Code()}, file)
        status, text = spoken(lambda: deeplab.build("deeplabv2", "resnet18", init="imagenet") and 0)
        return status, text if not (place.folder / "code-was-run").exists() else "its code was run"

    def malicious_with_the_right_sum(place):
        if hasattr(deeplab, "check_sum"):
            place.patch.setattr(deeplab, "check_sum", lambda *args: None)
        return malicious(place)

    yield (
        "checkpoints",
        "a stranger's code as the ImageNet file",
        malicious,
        "resnet18-f37072fd.pth",
        2,
    )
    yield (
        "checkpoints",
        "and its sum agrees",
        malicious_with_the_right_sum,
        "resnet18-f37072fd.pth",
        2,
    )

    def init(place):
        os.environ["HOSTILE"] = str(place.folder)
        (place.folder / "x.pt").write_bytes(pickle.dumps({"model": Code()}))
        status, text = place.main("--init", str(place.folder / "x.pt"))
        return status, text if not (place.folder / "code-was-run").exists() else "its code was run"

    yield "checkpoints", "a stranger's code as --init", init, "x.pt", 2


def data():
    def world(spoil, *words, given=WORDS):
        def call(place):
            spoil(place.copy("world"))
            return place.main(*words, world=place.folder / "world", given=given)

        return call

    def resumed(spoil):
        def call(place):
            spoil(place.copy("world"))
            place.copy("stopped")
            return place.resume(world=place.folder / "world")

        return call

    def labels(root, pattern):
        return sorted(root.glob(pattern))

    def no_truth(pattern):
        def spoil(root):
            for path in labels(root, pattern):
                size = Image.open(path).size[::-1]
                path.unlink()
                Image.fromarray(np.full(size, 255, np.uint8)).save(path)

        return spoil

    source, validation = "gta5/labels/*.png", "cityscapes/gtFine/val/*/*_labelIds.png"
    stal = "--strategy stal --head ripu --crop 48x24 --budget 0.5 --bank 40 --protocol ripu --pseudo none".split()
    cbst = "--strategy cbst --crop 48x24 --test-size 48x24 --source-steps 1 --source-portion 0.3 --pseudo none".split()
    for name, words in {
        "balanced": (),
        "uniform": ("--source-sampling", "uniform"),
        "stal": stal,
        "cbst": cbst,
    }.items():
        yield (
            "data",
            f"all source labels are 255, {name}",
            world(no_truth(source), *words),
            "no pixel of",
            2,
        )
    yield "data", "no validation truth", world(no_truth(validation)), "no pixel of", 2
    order = lambda place: spoken(
        lambda: datasets.balanced_order(np.zeros((3, 19), bool), np.random.default_rng(0)) is None
    )
    yield "data", "balanced sampler without classes", order, "no source image holds a class", 2
    empty = lambda place: spoken(lambda: next(iter(datasets.EndlessSampler(0, 0))) is None)
    yield "data", "sampler without images", empty, "no images", 2

    def fewer(root):
        for path in sorted(root.glob("gta5/*/*.png"))[::8]:
            path.unlink()

    def other_bytes(root):
        path = sorted(root.glob("cityscapes/leftImg8bit/train/*/*.png"))[0]
        picture = Image.open(path).convert("RGB").transpose(Image.FLIP_LEFT_RIGHT)
        path.unlink()
        picture.save(path)

    def swapped(root):
        a, b = sorted(root.glob("gta5/labels/*.png"))[:2]
        first, second = a.read_bytes(), b.read_bytes()
        replace(a, second)
        replace(b, first)

    yield "data", "--resume with fewer images", resumed(fewer), "other data", 2
    yield (
        "data",
        "--resume with another image",
        resumed(other_bytes),
        "photographs of the target",
        0,
    )
    yield "data", "--resume with two labels swapped", resumed(swapped), "other data", 2

    def same_id(root):
        image = sorted(root.glob("cityscapes/leftImg8bit/train/*/*.png"))[0]
        city, other = (
            image.parent.name,
            sorted(root.glob("cityscapes/leftImg8bit/train/*"))[-1].name,
        )
        for path in root.glob(
            f"cityscapes/*/train/{city}/{image.name.removesuffix('_leftImg8bit.png')}*"
        ):
            os.link(path, path.parent.parent / other / path.name)

    yield "data", "the same id in two cities", world(same_id), "same id", 2

    def acdc(absent):
        def call(place):
            for condition in {"fog", "night", "rain", "snow"} - {absent}:
                for kind in (
                    "rgb_anon/{}/train/a/{}_rgb_anon.png",
                    "gt/{}/train/a/{}_gt_labelIds.png",
                ):
                    path = place.folder / "acdc" / kind.format(condition, condition)
                    path.parent.mkdir(parents=True)
                    shape = (4, 6, 3) if "rgb" in kind else (4, 6)
                    Image.fromarray(np.zeros(shape, np.uint8)).save(path)
            return spoken(lambda: len(datasets.open_dataset("acdc", place.folder)) and 0)

        return call

    for condition in ("fog", "night", "rain", "snow"):
        yield "data", f"ACDC without {condition}", acdc(condition), condition, 2

    def seeds(a, b):
        same = lambda place: (
            0,
            "same" if datasets.mix_seed(*a) == datasets.mix_seed(*b) else "different",
        )
        return "data", f"seeds {a} and {b}", same, "different", 0

    for a, b in (
        ((2**32,), (0,)),
        ((-1,), (2**32 - 1,)),
        ((2**32, 5), (0, 1, 5)),
        ((2**40, 1), (2**41, 1)),
    ):
        yield seeds(a, b)


def machine():
    full = "an unwritable disk: "

    def disk(during):
        def call(place):
            real = os.fsync

            def fsync(descriptor):
                name = os.readlink(f"/proc/self/fd/{descriptor}")
                if during in name:
                    raise OSError(28, "No space left on device")
                return real(descriptor)

            place.patch.setattr(os, "fsync", fsync)
            return place.main()

        return call

    for part in (
        "checkpoints/",
        "queries/",
        "answers/",
        "round.json",
        "labels/",
        "result.json",
        "config.json",
    ):
        yield "machine", full + part, disk(part), "cannot be written", 2

    def limited(place):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            return place.main()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield (
        "machine",
        "a disk that is full in the middle of a checkpoint",
        limited,
        "cannot be written",
        2,
    )

    def worker(act):
        def call(place):
            parent, real = os.getpid(), datasets.read_image

            def read(path):
                if os.getpid() != parent:
                    act()
                return real(path)

            place.patch.setattr(datasets, "read_image", read)
            return place.main("--workers", "1")

        return call

    def no_room():
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

    yield (
        "machine",
        "a loading process killed",
        worker(lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "--workers",
        2,
    )
    yield (
        "machine",
        "a loading process with a bus error",
        worker(lambda: os.kill(os.getpid(), signal.SIGBUS)),
        "--workers",
        2,
    )
    yield "machine", "/dev/shm is full", worker(no_room), "--workers", 2

    def raising(error):
        def call(place):
            def step(*args, **kwargs):
                raise error

            place.patch.setattr(torch.optim.SGD, "step", step)
            return place.main()

        return call

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 9"
        ),
        MemoryError(),
    ):
        yield (
            "machine",
            f"out of memory: {type(error).__name__}",
            raising(error),
            "out of memory",
            2,
        )
    lost = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    yield "machine", "torch tells of a lost process in a step", raising(lost), "loading process", 2

    def size(option, value):
        return (
            "machine",
            f"{option} {value}",
            lambda place: place.main(f"{option}={value}"),
            "size is WIDTHxHEIGHT",
            2,
        )

    for option, value in itertools.product(
        ("--source-size", "--target-size", "--crop"),
        ("0x8", "-1x8", "1000000x1000000", "x", "8", "1e9x1"),
    ):
        yield size(option, value)

    def radius(unit, words):
        many = ["--unit", unit, "--radius", str(10**9), "--budget", "0.1"]
        call = lambda place: place.main(*many, given=PLAIN)
        return "machine", f"--radius of 10^9, {unit}", call, words, 0 if unit == "pixel" else 2

    yield radius("pixel", "round 2/2")
    yield radius("region", "less than one region")

    def environment(**variables):
        def call(place):
            for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
                place.patch.delenv(name, raising=False)
            for name, value in variables.items():
                place.patch.setenv(name, value)
            place.patch.setattr(distributed, "JOINING", 1, raising=False)
            return place.main(
                *"--strategy stal --head ripu --crop 48x24 --budget 0.5 --pseudo none".split()
            )

        text = " ".join(f"{k}={v}" for k, v in variables.items())
        return "machine", f"torchrun by hand: {text}", call, "WORLD_SIZE", 2

    complete = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29713",
    }
    for changes in (
        {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-2"}, {"WORLD_SIZE": ""},
        {"RANK": "2"}, {"RANK": ""}, {"LOCAL_RANK": ""}, {"MASTER_PORT": "99999"}, {"MASTER_ADDR": ""}, {"MASTER_PORT": "x"}, {},
    ):  # fmt: skip
        yield environment(**complete | changes)


# ---------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def base(tiny_world, tmp_path_factory):
    """world, and the runs `finished`, `stopped` (killed after step 4, checkpoints of steps 2 and 3), `other` (another seed)."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(tiny_world, folder / "world")
    runs = {"finished": (), "other": ("--seed", "1")}
    for name, words in runs.items():
        assert (
            spoken(
                lambda n=name, w=words: loop.main(
                    [*WORDS, *w, "--root", str(folder / "world"), "--out", str(folder / n)]
                )
            )[0]
            == 0
        )
    real, seen = torch.optim.SGD.step, [0]

    def step(self, *args, **kwargs):
        seen[0] += 1
        if seen[0] > 3:
            raise Stop
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch.optim.SGD, "step", step)
        spoken(
            lambda: loop.main(
                [*WORDS, "--root", str(folder / "world"), "--out", str(folder / "stopped")]
            )
        )
    return folder


def verdict(call, place, words, status) -> str:
    """How a situation ended: "one line", "said" (the run went on, with a line), "silent", "hang", "traceback ..."."""

    def alarm(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(LIMIT)
    try:
        found, text = call(place)
    except Hang:
        return "hang"
    except Exception as error:
        return f"traceback {type(error).__name__}: {str(error)[:80]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    errors = [line for line in text.splitlines() if "Traceback" in line]
    if errors or words not in text or found != status:
        return "silent" if found == 0 else f"status {found}: {text[-200:]}"
    last = text.strip().splitlines()[-1]
    if status == 2:
        return "one line" if words in last else f"not in the last line: {last[:120]}"
    return "said"


def test_hostile_situations_end_in_one_line(base, tmp_path, capsys):
    found = []
    for number, (group, name, call, words, status) in enumerate(situations()):
        with pytest.MonkeyPatch.context() as patch:
            place = Place(base, tmp_path / str(number), patch)
            found.append((group, name, verdict(call, place, words, status)))
        shutil.rmtree(place.folder)
    kinds = ("one line", "said", "silent", "traceback", "hang", "other")
    table = collections.defaultdict(collections.Counter)
    for group, _, how in found:
        kind = next((kind for kind in kinds if how.startswith(kind)), "other")
        table[group][kind] += 1
    bad = [row for row in found if row[2] not in ("one line", "said")]
    with capsys.disabled():
        print("\n" + "".join(f"{word:>12}" for word in ("situations", *kinds)))
        for group, row in [*table.items(), ("all", sum(table.values(), collections.Counter()))]:
            print(f"{row.total():12}" + "".join(f"{row[kind]:12}" for kind in kinds) + f"  {group}")
        print(*(f"  {group}: {name}: {how}" for group, name, how in bad), sep="\n")
    assert len(found) >= 100 and len({row[:2] for row in found}) == len(found)
    assert not bad


# ---------------------------------------------------------------------------------- signals


def equal_runs(a: Path, b: Path) -> None:
    """Two runs ended with the same bits: checkpoint, rounds, pseudo-labels."""
    states = [torch.load(out / "checkpoints/last.pt", weights_only=True) for out in (a, b)]
    assert_same_bits(*states)
    assert round_files(a) == round_files(b)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("seam", ["step", "scored"])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    name, seam, base, tmp_path, monkeypatch
):
    """In step 5, which has no checkpoint of its own; and while round 2 is being asked."""
    place = Place(base, tmp_path / "place", monkeypatch)
    where, attribute, calls = {
        "step": (torch.optim.SGD, "step", 5),
        "scored": (acquisition, "select_regions", 8),
    }[seam]
    real, seen = getattr(where, attribute), [0]

    def counted(*args, **kwargs):
        seen[0] += 1
        if seen[0] == calls:
            os.kill(os.getpid(), getattr(signal, name))
        return real(*args, **kwargs)

    monkeypatch.setattr(where, attribute, counted)
    before = signal.getsignal(getattr(signal, name))
    status, text = place.main()
    monkeypatch.undo()
    out = place.folder / "out"
    assert status == 143 and f"--resume --out {out} goes on" in text.splitlines()[-1]
    assert (
        torch.load(out / "checkpoints/last.pt", weights_only=True)["step"]
        == {"step": 5, "scored": 4}[seam]
    )
    assert len(list((out / "rounds").glob("0?"))) == {"step": 2, "scored": 1}[seam]
    assert signal.getsignal(getattr(signal, name)) is before
    assert spoken(lambda: loop.main(["--resume", "--out", str(out)]))[0] == 0
    equal_runs(base / "finished", out)


@pytest.mark.parametrize("name,status,workers", [("SIGINT", 130, "0"), ("SIGTERM", 143, "2")])
def test_the_exit_status_of_a_stopped_process(name, status, workers, base, tmp_path):
    """A signal to the whole job, loading processes too, as schedulers send it."""
    out = tmp_path / "out"
    words = [
        *WORDS,
        "--root",
        str(base / "world"),
        "--out",
        str(out),
        "--steps",
        "4000",
        "--workers",
        workers,
    ]
    words = [*words, "--checkpoint-every", "3000", "--threads", "1"]
    job = subprocess.Popen(
        [sys.executable, "-m", "alda.loop", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    line = next(line for line in job.stdout if line.startswith("step 6/"))
    os.killpg(job.pid, getattr(signal, name))
    rest, errors = job.communicate(timeout=60)
    assert job.returncode == status, (line, rest, errors)
    assert (
        f"python -m alda.loop --resume --out {out} goes on" in errors and "Traceback" not in errors
    )
    step = torch.load(out / "checkpoints/last.pt", weights_only=True)["step"]
    assert step >= 6 if name == "SIGTERM" else step == 4
