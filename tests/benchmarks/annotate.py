"""How long do 40 pixels of one image take on the page, and what does it look like?

    python -m tests.benchmarks.annotate annotate.png      # needs Chromium and chromedriver

Runs ripu-pa on one training image of the miniature world with --oracle files, answers its 40 pixels in a real
browser by script (one key each, no pause to think), and takes the screenshot at the 13th question.
"""

import base64
import io
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image

from alda import annotate, loop, toy
from tests.test_annotate import Browser, answer_all, key_of
from tests.test_loop import arguments


def one_image_world(folder: Path) -> tuple[Path, Path]:
    """(world, the same without labels of the target): one training image."""
    toy.write(folder / "truth", seed=0, counts=toy.SMALL)
    for path in sorted((folder / "truth/cityscapes").glob("*/train/*/*"))[::-1]:
        if "aachen_000000_000019" not in path.name:
            path.unlink()
    shutil.copytree(folder / "truth", folder / "world")
    shutil.rmtree(folder / "world/cityscapes/gtFine/train")
    return folder / "truth", folder / "world"


def main(picture: Path) -> None:
    """Prints the time; writes the screenshot."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        truth, world = one_image_world(folder)
        options = {
            "strategy": "ripu-pa",
            "radius": 10,
            "pixels": 40,
            "rounds": 1,
            "query_steps": "2",
            "steps": 4,
        }
        words = arguments(world, folder / "out", oracle="files", **options)
        assert loop.main(words) == 3
        server = annotate.Server(annotate.OpenRound(folder / "out"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(folder / "profile")
        try:
            browser.open(server.address)
            browser.until("document.body.dataset.drawn === 'true'")
            began = time.time()
            for _ in range(12):
                seen = browser.shown()
                browser.until("document.body.dataset.drawn === 'true'")
                browser.press(key_of(truth, seen["image"], int(seen["row"]), int(seen["col"])))
                browser.until(
                    "Number(document.body.dataset.left) < arguments[0]", int(seen["left"])
                )
            seconds = time.time() - began
            shown = base64.b64decode(browser.call("GET", "/screenshot"))
            began = time.time()
            count = answer_all(browser, truth)
            seconds += time.time() - began
        finally:
            browser.close()
            server.shutdown()
        shown = Image.open(io.BytesIO(shown)).convert("RGB")
        shown.quantize(256, Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)
        told = server.round.state(0)["seconds"]
        assert loop.main([*words, "--resume"]) == 0
        print(f"by script: {12 + count} pixels of one image in {seconds:.1f} s ({seconds / 60:.2f} min); "
              f"the page counted {told:.1f} s; {picture}: {picture.stat().st_size:,} bytes")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
