"""The page on which people answer: who may ask, what a request can do, two tabs, and a whole round in a real browser."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alda import annotate, loop, oracle
from alda.annotation import Rounds
from alda.datasets import NAMES, id_map, open_dataset
from alda.run import locked
from tests.test_loop import arguments, assert_same_bits, state_of
from tests.test_oracle import GT, IMAGES, PIXELS, REGIONS, as_files, opened, truth_of

CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def questions(tiny_world, tmp_path_factory):
    """{kind: run folder}: runs on a target without labels whose first round waits."""
    folder = tmp_path_factory.mktemp("questions")
    shutil.copytree(tiny_world, folder / "world")
    shutil.rmtree(folder / "world" / GT)
    for kind, options in {"pixel": PIXELS, "region": REGIONS, "image": IMAGES}.items():
        words = arguments(folder / "world", folder / kind, oracle="files", **options)
        assert loop.main(words) == 3
    return folder


@pytest.fixture
def serve(questions, tmp_path):
    """Starts the page of a copy of a run: (server, `ask`)."""
    with contextlib.ExitStack() as started:

        def start(kind="pixel", out=None):
            if out is None:
                out = tmp_path / kind
                shutil.copytree(questions / kind, out)
            server = started.enter_context(annotate.Server(annotate.OpenRound(out)))
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            started.callback(thread.join)
            started.callback(server.shutdown)
            return server

        yield start


def request(server, method, path, body=None, **headers):
    """(status, bytes) of a request as it stands, no part of it corrected on the way."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    link.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    given = {k.replace("_", "-"): v for k, v in headers.items()}
    given = {"Host": f"localhost:{server.server_port}", **given}
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Content-Length": str(len(body)), **given}
    for name, value in given.items():
        link.putheader(name, value)
    link.endheaders(body)
    reply = link.getresponse()
    return reply.status, reply.read(), reply


def post(server, message, **headers):
    """(status, told) of an answer."""
    status, told, _ = request(server, "POST", f"/{server.token}/answer", message, **headers)
    return status, json.loads(told)


def files_of(out: Path) -> dict:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_what_the_page_gets(serve):
    server = serve("pixel")
    assert server.server_address[0] == "127.0.0.1" and len(server.token) >= 24
    status, page, reply = request(server, "GET", f"/{server.token}/")
    assert status == 200 and page == annotate.PAGE.read_bytes()
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert reply.headers["Cache-Control"] == "no-store"
    status, told, _ = request(server, "GET", f"/{server.token}/questions")
    told = json.loads(told)
    assert [c["name"] for c in told["classes"]] == [*NAMES, "unknown"]
    keys = [c["key"] for c in told["classes"]]
    assert len(set(keys)) == 20 and not set(keys) & set("dnz+-")
    assert all(c["key"] in c["name"] for c in told["classes"][:-1])
    for index, (image, state) in enumerate(zip(told["images"], told["states"], strict=True)):
        assert state["picks"] == [None, None] and image["size"] == [128, 256]
        status, picture, _ = request(server, "GET", f"/{server.token}/photograph/{index}")
        shown = np.array(Image.open(io.BytesIO(picture)))
        path = server.round.record["images"][image["id"]]["photograph"]
        assert status == 200 and (shown == np.array(Image.open(path).convert("RGB"))).all()


def test_a_photograph_that_was_moved_is_told(serve, tmp_path):
    server = serve("pixel")
    server.round.images[0][1]["photograph"] = str(tmp_path / "gone.png")
    status, told, _ = request(server, "GET", f"/{server.token}/photograph/0")
    assert status == 500 and "gone.png: cannot be read as an image" in json.loads(told)["error"]


def test_the_data_may_have_moved(questions, tiny_world, tmp_path, capsys):
    """As the page is started: told at once, and --root finds the photographs again."""
    out = tmp_path / "out"
    shutil.copytree(questions / "pixel", out)
    path = next(out.glob("rounds/*.open/round.json"))
    record = json.loads(path.read_text())
    for question in record["images"].values():
        question["photograph"] = question["photograph"].replace("leftImg8bit", "gone")
    path.write_text(json.dumps(record))
    assert annotate.main([str(out)]) == 2
    assert "the photograph is not there; give --root" in capsys.readouterr().err
    found = annotate.OpenRound(out, tiny_world)
    assert Image.open(io.BytesIO(found.photograph(0))).size == (256, 128)


def test_the_page_needs_nothing_from_elsewhere():
    text = annotate.PAGE.read_text()
    assert not re.search(r"https?://|//[a-z]+\.|<link|@import|\bsrc=|eval\(|innerHTML", text)


def test_who_may_ask(serve):
    server = serve("pixel")
    own = f"/{server.token}/"
    port = server.server_port
    others = (f"example.com:{port}", "127.0.0.1.example.com", "localhost:x", "", f"[::1]:{port}")
    for host in others:
        assert request(server, "GET", own, Host=host)[0] == 403, host
        assert post(server, {"image": 0}, Host=host)[0] == 403
    # the last two: an ssh tunnel's
    for host in (f"localhost:{port}", f"127.0.0.1:{port + 1}", "127.0.0.1"):
        assert request(server, "GET", own, Host=host)[0] == 200, host
    other = "A" + server.token[1:] if server.token[0] != "A" else "B" + server.token[1:]
    for path in ("/", "", "x", f"/{other}/", f"/{server.token}", f"/{server.token[:-1]}/"):
        assert request(server, "GET", path or "*")[0] == 404, path
    image = {"image": 0, "pick": 0, "answer": "car", "was": None}
    assert post(server, image, Content_Type="text/plain")[0] == 415
    assert not list((server.round.folder / "answers").iterdir())


PATHS = (
    "photograph/../../round.json", "photograph/0/../1", "photograph//etc/passwd", "photograph/-1", "photograph/6",
    "photograph/%2e%2e", "photograph/1e1", "photograph/" + "9" * 4000, "../config.json",
    "answers/x.json", "questions/", "questions?x=../..", "./questions", "\\..\\config.json", "answer",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_no_path_of_a_request_touches_the_disk(path, serve, monkeypatch):
    server = serve("pixel")
    touched = []
    for name in ("open", "read_bytes", "is_file", "read_text"):
        monkeypatch.setattr(Path, name, lambda *a, name=name: touched.append((name, a)))
    status, told, _ = request(server, "GET", f"/{server.token}/" + path)
    assert status == 404 and json.loads(told) == {"error": "not here"} and not touched


BAD = {
    "no JSON": b"{",
    "nested": b"[" * 100_000,
    "a list": [],
    "no image": {"pick": 0, "answer": "car", "was": None},
    "another image": {"image": 6, "pick": 0, "answer": "car", "was": None},
    "image -1": {"image": -1, "pick": 0, "answer": "car", "was": None},
    "image true": {"image": True, "pick": 0, "answer": "car", "was": None},
    "a path for an image": {"image": "../../x", "pick": 0, "answer": "car", "was": None},
    "another pick": {"image": 0, "pick": 2, "answer": "car", "was": None},
    "another class": {"image": 0, "pick": 0, "answer": "cat", "was": None},
    "an object": {"image": 0, "pick": 0, "answer": {"a": 1}, "was": None},
    "a list that is too long": {"image": 0, "pick": 0, "answer": ["car", "car"], "was": None},
    "a polygon on pixels": {
        "image": 0,
        "add": {"label": "car", "points": [[0, 0], [1, 0], [1, 1]]},
    },
    "nothing": {"image": 0},
}


@pytest.mark.parametrize("message", BAD.values(), ids=BAD)
def test_a_wrong_answer_writes_nothing(message, serve):
    server = serve("pixel")
    before = files_of(server.round.out)
    status, told = post(server, message)
    assert status == 400 and told["error"] and files_of(server.round.out) == before


def test_too_long_an_answer_is_not_read(serve):
    server = serve("pixel")
    for length in ("2000001", "-1", "x", ""):
        body = request(server, "POST", f"/{server.token}/answer", b"{}", Content_Length=length)
        assert body[0] == 413


def test_each_answer_is_on_disk_before_the_reply(serve):
    server = serve("pixel")
    name, question = server.round.images[0]
    status, told = post(
        server, {"image": 0, "pick": 1, "answer": "car", "was": None, "seconds": 2.5}
    )
    assert status == 200 and told["state"]["picks"] == [None, "car"]
    path = server.round.folder / "answers" / f"{name}.json"
    content = json.loads(path.read_text())
    row, col = question["picks"][1]
    (shape,) = content["shapes"]
    assert shape["label"] == "car" and shape["points"] == [[col, row], [col + 1, row + 1]]
    assert (content["imageHeight"], content["imageWidth"]) == (128, 256)
    labels, problems, work = oracle.read_answer(path, (128, 256), False)
    assert not problems and work == {"corrections": 0, "seconds": 2.5}
    assert labels[row, col] == NAMES.index("car") and (labels != 254).sum() == 1
    # another server on the same folder, after this one was killed, finds it
    assert serve(out=server.round.out).round.questions()["states"][0] == told["state"]
    post(server, {"image": 0, "pick": 1, "answer": "bus", "was": "car", "seconds": 1e9})
    told = post(server, {"image": 0, "pick": 1, "answer": None, "was": "bus", "seconds": -3})[1]
    assert told["state"]["corrections"] == 2
    assert told["state"]["seconds"] == 2.5 + annotate.LONGEST
    assert told["state"]["picks"] == [None, None]


def test_two_tabs_do_not_overwrite_each_other(serve):
    server = serve("pixel")
    first = {"image": 2, "pick": 0, "answer": "car", "was": None}
    assert post(server, first)[0] == 200
    status, told = post(server, {**first, "answer": "bus"})  # knows nothing of the first
    assert status == 409 and "another tab had answered car: it was kept" in told["error"]
    assert told["state"]["picks"] == ["car", None]
    assert post(server, {**first, "answer": "bus", "was": "car"})[0] == 200
    statuses = []

    def tab(label):
        statuses.append(post(server, {"image": 3, "pick": 1, "answer": label, "was": None})[0])

    tabs = [threading.Thread(target=tab, args=(label,)) for label in NAMES[:12]]
    for thread in tabs:
        thread.start()
    for thread in tabs:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 11


def test_answers_of_another_tool_are_left_alone(serve):
    server = serve("pixel")
    answers = server.round.folder / "answers"
    for (name, _), ending in zip(server.round.images[:2], ("_labelIds.png", ".json"), strict=False):
        (answers / (name + ending)).write_bytes(b'{"shapes": []}')
        before = files_of(answers)
        index = 0 if ending.endswith("png") else 1
        status, told = post(server, {"image": index, "pick": 0, "answer": "car", "was": None})
        assert status == 409 and name + ending in told["error"] and files_of(answers) == before
        assert told["state"]["elsewhere"] == name + ending


@pytest.mark.parametrize(
    "own", [3, {}, {"picks": 3}, {"picks": []}, {"picks": ["cat", None]}, {"polygons": [3]}]
)
def test_an_edited_answer_is_left_alone(own, serve):
    server = serve("pixel")
    path = server.round.path(0)
    shapes = []
    if isinstance(own, dict) and own:
        assert post(server, {"image": 0, "pick": 0, "answer": "car", "was": None})[0] == 200
        content = json.loads(path.read_text())
        own, shapes = content["alda"] | own, content["shapes"]
    path.write_text(json.dumps({"shapes": shapes, "alda": own}))
    assert server.round.state(0)["elsewhere"] == path.name
    assert request(server, "GET", f"/{server.token}/questions")[0] == 200


def edit(path, change):
    """What Labelme does: it changes the shapes, writes their numbers its own way and keeps all else."""
    content = json.loads(path.read_text())
    for shape in content["shapes"]:
        shape["points"] = [[float(x) for x in point] for point in shape["points"]]
    change(content["shapes"])
    path.write_text(json.dumps(content, indent=2))


def test_a_correction_in_another_program_is_not_overwritten(serve):
    server = serve("pixel")
    path, (row, col) = server.round.path(0), server.round.images[0][1]["picks"][0]
    assert post(server, {"image": 0, "pick": 0, "answer": "road", "was": None})[0] == 200
    edit(path, lambda shapes: None)  # saved as it was
    assert server.round.state(0)["picks"] == ["road", None]
    edit(path, lambda shapes: shapes[0].update(label="car"))
    status, told = post(server, {"image": 0, "pick": 1, "answer": "bus", "was": None})
    assert status == 409 and path.name in told["error"]
    labels, problems, work = oracle.read_answer(path, (128, 256), False)
    assert labels[row, col] == NAMES.index("car") and not problems and not work


def test_a_whole_image_finished_in_another_program_is_finished(serve):
    server = serve("image")
    path, square = server.round.path(0), [[10, 20], [30, 20], [30, 50], [10, 50]]
    post(server, {"image": 0, "add": {"label": "car", "points": square}})
    edit(path, lambda shapes: None)
    assert (oracle.read_answer(path, (128, 256), True)[0] == 254).sum() == 128 * 256 - 600
    edit(path, lambda shapes: shapes.append({**shapes[0], "label": "sky", "points": square[:3]}))
    labels, problems, _ = oracle.read_answer(path, (128, 256), True)
    assert not problems and not (labels == 254).any() and (labels == 10).any()


def test_a_full_disk_is_told_and_the_last_answer_kept(serve, monkeypatch):
    server = serve("pixel")
    post(server, {"image": 0, "pick": 0, "answer": "car", "was": None})
    before = files_of(server.round.out)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, told = post(server, {"image": 0, "pick": 1, "answer": "car", "was": None})
    assert status == 500 and "cannot be written" in told["error"]
    assert files_of(server.round.out) == before


def test_regions_whole_and_pixel_by_pixel(serve):
    server = serve("region")
    name, question = server.round.images[0]
    assert post(server, {"image": 0, "pick": 0, "answer": "sky", "was": None})[0] == 200
    cells = server.round.cells(0, 1)
    parts = [None] * len(cells)
    parts[0], parts[-1] = "car", "unknown"
    status, told = post(server, {"image": 0, "pick": 1, "answer": parts, "was": None})
    assert status == 200 and told["state"]["picks"][:2] == ["sky", parts]
    fuller = ["bus", *parts[1:]]  # one changed, none added
    told = post(server, {"image": 0, "pick": 1, "answer": fuller, "was": parts})[1]
    assert told["state"]["corrections"] == 1
    labels, problems, _ = oracle.read_answer(server.round.path(0), (128, 256), False)
    asked = np.array(Image.open(server.round.folder / f"queries/{name}.png")) == 255
    sky = server.round.cells(0, 0)
    assert not problems and all(labels[cell] == 10 for cell in sky)
    assert labels[cells[0]] == 15 and labels[cells[-1]] == 255
    assert (labels != 254).sum() == len(sky) + 2
    every = {cell for pick in range(len(question["picks"])) for cell in server.round.cells(0, pick)}
    assert every == {tuple(cell) for cell in np.argwhere(asked).tolist()}


def test_whole_images_by_polygons(serve):
    server = serve("image")
    square = [[10.5, 20], [30, 20], [30, 50], [10.5, 50]]
    for points in (square[:2], "x", [[1, 2], [3, 4], [5]], [[1, 2], [3, 4], [5, True]], None):
        assert post(server, {"image": 0, "add": {"label": "car", "points": points}})[0] == 400
    assert post(server, {"image": 0, "add": 3})[0] == 400
    for label in ("car", "bus", "sky"):  # from any number of tabs: all are kept
        assert post(server, {"image": 0, "add": {"label": label, "points": square}})[0] == 200
    state = post(server, {"image": 0, "remove": 3})[1]["state"]
    assert [p["label"] for p in state["polygons"]] == ["car", "bus"] and state["corrections"] == 1
    assert post(server, {"image": 0, "remove": 3})[0] == 409
    again = post(server, {"image": 0, "add": {"label": "sky", "points": square}})[1]["state"]
    assert [p["id"] for p in again["polygons"]] == [1, 2, 4]  # 3 is gone for good
    assert post(server, {"image": 0, "remove": 4})[0] == 200
    labels, _, _ = oracle.read_answer(server.round.path(0), (128, 256), True)
    assert (labels == 254).sum() == 128 * 256 - 600  # not finished
    assert post(server, {"image": 0, "finished": True})[1]["state"]["finished"]
    labels, problems, _ = oracle.read_answer(server.round.path(0), (128, 256), True)
    assert (
        not problems
        and (labels == 15).sum() == 30 * 20
        and (labels == 255).sum() == 128 * 256 - 600
    )


def test_the_command_line(questions, tmp_path, capsys):
    shutil.copytree(questions / "pixel", tmp_path / "run")
    for words, text in (
        ([str(tmp_path)], "no run's folder"),
        ([str(tmp_path / "run"), "--port", "99999"], "port"),
    ):
        assert annotate.main(words) == 2
        assert text in capsys.readouterr().err
    with locked(tmp_path / "run"):
        done = subprocess.run(
            [sys.executable, "-m", "alda.annotate", str(tmp_path / "run")],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2 and "another process is running in it" in done.stderr
    shutil.move(tmp_path / "run/rounds", tmp_path / "away")
    assert annotate.main([str(tmp_path / "run")]) == 2
    assert "no round waits for answers" in capsys.readouterr().err


# --------------------------------------------------------------------------------- a real browser


class Browser:
    """Headless Chromium, driven by chromedriver's own protocol (W3C WebDriver) over HTTP."""

    FLAGS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,900",
    )  # fmt: skip

    def __init__(self, folder):
        self.driver = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        line = next(line for line in self.driver.stdout if "started successfully on port" in line)
        self.url = "http://127.0.0.1:" + re.search(r"port (\d+)", line)[1]
        flags = [*self.FLAGS, f"--user-data-dir={folder}"]
        given = {"alwaysMatch": {"goog:chromeOptions": {"args": flags}}}
        self.url += (
            "/session/" + self.call("POST", "/session", {"capabilities": given})["sessionId"]
        )
        self.body = None

    def call(self, method, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        asked = urllib.request.Request(self.url + path, data, method=method)
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return json.loads(reply.read())["value"]

    def open(self, address):
        self.call("POST", "/url", {"url": address})
        self.body = next(
            iter(self.call("POST", "/element", {"using": "css selector", "value": "body"}).values())
        )

    def run(self, script, *words):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(words)})

    def press(self, key):
        self.call("POST", f"/element/{self.body}/value", {"text": key})

    def shown(self):
        """What the page says of the question it shows."""
        return self.run("return {...document.body.dataset}")

    def until(self, condition, *words):
        """Waits until a JavaScript expression is true."""
        end = time.time() + 30
        while not self.run(f"return Boolean({condition})", *words):
            assert time.time() < end, (condition, self.run("return document.body.innerText"))
            time.sleep(0.005)

    def close(self):
        with contextlib.suppress(OSError):
            self.call("DELETE", "")
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture
def browser():
    if CHROMEDRIVER is None:
        pytest.skip("chromedriver is not installed (Debian: chromium chromium-driver)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        started = Browser(folder)
        try:
            yield started
        finally:
            started.close()


ARROW = {"left": "\ue012", "right": "\ue014", "up": "\ue013", "down": "\ue015"}


def key_of(world, image_id, row, col):
    """The key of the class that a pixel truly has."""
    train = id_map("cityscapes")[np.array(Image.open(truth_of(world, image_id)))][row, col]
    return annotate.KEYS["unknown" if train == 255 else NAMES[train]]


def answer_all(browser, world):
    """A person who knows the truth answers every open question by its key; returns how many."""
    count = 0
    browser.until("document.body.dataset.drawn === 'true'")
    while int((seen := browser.shown())["left"]):
        browser.until("document.body.dataset.drawn === 'true'")
        browser.press(key_of(world, seen["image"], int(seen["row"]), int(seen["col"])))
        browser.until("Number(document.body.dataset.left) < arguments[0]", int(seen["left"]))
        count += 1
    return count


@pytest.mark.slow
def test_a_round_answered_in_a_browser_equals_the_ground_truth(
    browser, serve, questions, tiny_world, tmp_path
):
    """All rounds of ripu-pa, by keyboard; the run then has the labels and weights of the truth's."""
    a, b = tmp_path / "truth", tmp_path / "pixel"
    assert loop.main(arguments(tiny_world, a, **PIXELS)) == 0
    words = arguments(questions / "world", b, oracle="files", resume=True, **PIXELS)
    for number in (1, 2):
        server = serve("pixel") if number == 1 else serve(out=b)
        browser.open(server.address)
        assert answer_all(browser, tiny_world) == 12
        assert "All 12 questions are answered" in browser.run("return document.body.innerText")
        assert loop.main(words) == (3 if number == 1 else 0)
    for number in (1, 2):
        maps = [sorted((out / f"rounds/{number:02d}").rglob("*.png")) for out in (a, b)]
        assert [p.name for p in maps[0]] == [p.name for p in maps[1]] and len(maps[0]) == 12
        assert [p.read_bytes() for p in maps[0]] == [p.read_bytes() for p in maps[1]]
    assert_same_bits(state_of(a)["model"], state_of(b)["model"])
    budget = json.loads((b / "result.json").read_text())["budget"]
    assert budget["answers"] == 24 and budget["corrections"] == 0 and budget["seconds"] > 0


@pytest.mark.slow
def test_the_page_by_keyboard(browser, serve):
    """Next and back, undo, the next open one, two tabs, a server that is gone."""
    server = serve("pixel")
    browser.open(server.address)
    browser.until("document.body.dataset.drawn === 'true'")
    first = browser.shown()
    browser.press(ARROW["right"])
    assert browser.shown()["at"] == "1"
    browser.press(ARROW["left"])
    assert browser.shown() == first
    browser.press("c")
    browser.until("document.body.dataset.left === '11'")
    assert browser.shown()["at"] == "1" and server.round.state(0)["picks"] == ["car", None]
    browser.press("z")
    browser.until("document.body.dataset.left === '12'")
    assert browser.shown()["at"] == "0" and server.round.state(0)["picks"] == [None, None]
    assert server.round.state(0)["corrections"] == 1
    # another tab is faster
    assert post(server, {"image": 0, "pick": 0, "answer": "bus", "was": None})[0] == 200
    browser.press("c")
    browser.until("document.querySelector('#message').textContent.includes('another tab')")
    assert server.round.state(0)["picks"] == ["bus", None]
    assert "answer: bus" in browser.run("return document.body.innerText")
    browser.press("n")
    assert browser.shown()["at"] == "1"
    # buttons say names, not colours only
    names = browser.run("return [...document.querySelectorAll('button')].map(b => b.textContent)")
    assert names == [annotate.KEYS[name] + name for name in annotate.LABELS]
    server.shutdown()
    server.server_close()
    browser.press("r")
    browser.until("document.querySelector('#message').textContent.includes('NOT SAVED')")
    assert browser.shown()["at"] == "1" and server.round.state(0)["picks"] == ["bus", None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixel", "region", "image"])
def test_no_answer_to_a_photograph_that_is_not_there(kind, browser, serve, monkeypatch):
    """Neither while it is on its way nor when it cannot be read; once it is there answers are taken."""
    there, read = threading.Event(), annotate.OpenRound.photograph

    def slow(round_, index):
        assert there.wait(60)
        return read(round_, index)

    def gone(round_, index):
        raise annotate.InputError("gone")

    server = serve(kind)
    before = server.round.state(0)
    for photograph in (gone, slow):
        monkeypatch.setattr(annotate.OpenRound, "photograph", photograph)
        browser.open(server.address)
        browser.until("document.body.dataset.drawn === 'false'")
        for key in "c", "d", " ", "\ue007", "c":
            browser.press(key)
        browser.run("document.querySelector('button').click()")
        browser.run("document.querySelector('#photograph').click()")
        assert browser.shown()["drawn"] == "false" and browser.shown()["at"] == "0"
        assert server.round.state(0) == before and not server.round.path(0).exists()
        wrong = browser.run("return document.querySelector('#message').className")
        assert wrong == "wrong", photograph
    there.set()
    browser.until("document.body.dataset.drawn === 'true'")
    assert browser.run("return document.querySelector('#message').textContent") == ""
    for _ in range(3):
        browser.press(" ")
    browser.press("c")
    browser.until("document.querySelector('#message').textContent === 'saved: car'")


@pytest.mark.slow
def test_a_key_that_is_held_answers_once(browser, serve):
    server = serve("pixel")
    browser.open(server.address)
    browser.until("document.body.dataset.drawn === 'true'")
    held = "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], repeat: true}))"
    browser.press("c")
    browser.until("document.body.dataset.left === '11'")
    for key in "c", "z", "Backspace", "n":
        browser.run(held, key)
    browser.run(held, "ArrowRight")
    assert browser.shown()["at"] == "2"
    assert server.round.state(0)["picks"] == ["car", None] and browser.shown()["left"] == "11"


@pytest.mark.slow
def test_an_answer_that_was_not_taken_back_can_be(browser, serve, monkeypatch):
    """An undo that the server refuses, or that comes while an answer is being saved, is no undo."""
    server, answer = serve("pixel"), annotate.OpenRound.answer
    browser.open(server.address)
    browser.until("document.body.dataset.drawn === 'true'")
    for left in ("11", "10"):
        browser.press("c")
        browser.until("document.body.dataset.left === arguments[0]", left)

    def full(round_, message):
        raise annotate.InputError("the disk is full")

    monkeypatch.setattr(annotate.OpenRound, "answer", full)
    browser.press("z")
    browser.until("document.querySelector('#message').textContent.includes('disk is full')")
    there = threading.Event()
    monkeypatch.setattr(annotate.OpenRound, "answer", lambda *a: there.wait(60) and answer(*a))
    browser.press("z")
    browser.press("z")  # the first is not saved yet
    browser.until("document.querySelector('#message').textContent.includes('still being saved')")
    there.set()
    browser.until("document.body.dataset.left === '11'")
    assert server.round.state(0)["picks"] == ["car", None]
    browser.press("z")
    browser.until("document.body.dataset.left === '12'")


@pytest.mark.slow
def test_regions_and_whole_images_by_keyboard(browser, serve):
    server = serve("region")
    browser.open(server.address)
    browser.until("document.body.dataset.drawn === 'true'")
    browser.press("d")
    cells = server.round.cells(0, 0)
    keys = "rsbwfpcxv"[: len(cells)]
    for n, key in enumerate(keys):
        shown = browser.shown()
        assert (int(shown["row"]), int(shown["col"])) == cells[n]
        browser.press(key)
        if n + 1 == len(cells):
            browser.until("document.body.dataset.at === '1'")
        else:
            place = "document.body.dataset.row + ',' + document.body.dataset.col"
            browser.until(f"{place} === arguments[0]", "{},{}".format(*cells[n + 1]))
    names = {key: name for name, key in annotate.KEYS.items()}
    assert server.round.state(0)["picks"][0] == [names[key] for key in keys]
    labels, problems, _ = oracle.read_answer(server.round.path(0), (128, 256), False)
    assert not problems and all(labels[cell] != 254 for cell in cells)

    server = serve("image")
    browser.open(server.address)
    browser.until("document.body.dataset.drawn === 'true'")
    for moves in (("left", 2), ("up", 3), ("right", 5), ("down", 4)):
        for _ in range(moves[1]):
            browser.press(ARROW[moves[0]])
        browser.press(" ")
    browser.press("c")
    browser.until("document.querySelector('#message').textContent === 'saved: car'")
    (polygon,) = server.round.state(0)["polygons"]
    assert polygon["points"] == [[126, 64], [126, 61], [131, 61], [131, 65]]
    browser.press("\ue007")
    browser.until("document.body.dataset.left === '1'")
    assert server.round.state(0)["finished"] and browser.shown()["at"] == "1"


def test_a_scripted_person_needs_no_more_than_the_files(serve, questions, tiny_world):
    """The page's own file and a file of another program give the same labels."""
    server = serve("pixel")
    for index, (name, question) in enumerate(server.round.images):
        truth = id_map("cityscapes")[np.array(Image.open(truth_of(tiny_world, name)))]
        for pick, (row, col) in enumerate(question["picks"]):
            label = "unknown" if truth[row, col] == 255 else NAMES[truth[row, col]]
            assert (
                post(server, {"image": index, "pick": pick, "answer": label, "was": None})[0] == 200
            )
    folder, record = opened(server.round.out)
    files = {path.name: path for path in (folder / "answers").iterdir()}
    ours = [oracle.answer_to(folder, record, name, files) for name in record["images"]]
    for path in files.values():
        path.unlink()
    as_files(tiny_world, folder, record, "ids")
    files = {path.name: path for path in (folder / "answers").iterdir()}
    for name, mine in zip(record["images"], ours, strict=True):
        theirs = oracle.answer_to(folder, record, name, files)
        assert (mine.labels == theirs.labels).all() and not mine.missing and not mine.problems
        assert mine.work["answers"] == theirs.work["answers"] == 2
    target = open_dataset("cityscapes", questions / "world", "train", False)
    assert len(target) == 6 and Rounds(server.round.out / "rounds").complete() == 0
