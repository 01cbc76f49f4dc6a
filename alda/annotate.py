"""The page on which people answer the open round, served on this machine alone. How is a query answered?

    python -m alda.annotate RUN            # prints the address; Ctrl-C ends it, nothing is lost
    python -m alda.loop --resume --out RUN # when all is answered: goes on

The page is alda/annotate.html. It asks for the questions once, for photographs by their number, and
sends each answer before it shows the next question: `answers/IMAGE.json` of the open round is written
anew with it, atomically. The file is a Labelme JSON (shapes) with a part "alda": answers by question,
polygons, corrections, seconds, and a digest of the shapes, which tells whether another program changed
them. oracle.py reads the shapes, this module the part.

Who may ask: this machine (the loopback address), who names it in the Host header, and who knows the
random token in the address. What a request says is compared with a few words and numbers; no part of it
ever becomes a file's name. An answer says what the page believed to stand there before: where another
tab was faster, nothing is written and the page is told. One server at a time holds the run's lock.
"""

import argparse
import io
import json
import math
import re
import secrets
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from alda import InputError, run_command
from alda.datasets import CLASSES, NAMES, read_image, read_json, write_atomic
from alda.oracle import ENDINGS, open_round, page_part, shapes_digest
from alda.run import locked, resume_line

PAGE = Path(__file__).with_name("annotate.html")
# a letter of its name for each class, in the order of the classes; d, n, z, + and - are commands
KEYS = dict(zip(NAMES, "rsbwfplgvekoictuamy", strict=True))
LABELS = (*NAMES, "unknown")
KEYS["unknown"] = "x"
PARTS = ("picks", "polygons", "finished", "corrections", "seconds")  # of a state, kept in the file
LONGEST = 120.0  # seconds that one answer can count for: more is a break


class Refused(Exception):
    """A request that is not obeyed: HTTP status, what the page says, and the state of the image where
    the page did not know it."""


class OpenRound:
    """The questions of the round that waits in a run's folder, and the answers given on the page.

    The state of an image is {"picks": [answer of each pick], "polygons": [{"id", "label", "points"}],
    "finished": bool, "corrections": int, "seconds": float, "elsewhere": file or None}. An answer is a
    label, None, or for a region a list with a label or None for each of its pixels. "elsewhere": another
    program answered the image, the page leaves it alone.
    """

    def __init__(self, out: Path, root: Path | None = None):
        found = open_round(out)
        if found is None:
            raise InputError(
                f"{out}: no round waits for answers; a run with --oracle files that asks ends with "
                "exit status 3"
            )
        self.out, (self.number, self.folder, self.record) = out, found
        self.images = list(self.record["images"].items())
        self.lock, self.root = threading.Lock(), root
        if not (first := self.photograph_path(0)).is_file():
            raise InputError(
                f"{first}: the photograph is not there; give --root, the data's folder"
            )

    def questions(self) -> dict:
        """All that the page shows but the photographs."""
        unit, radius = self.record["unit"], self.record["radius"]
        with self.lock:
            states = [self.state(index) for index in range(len(self.images))]
        colours = {c.name: "#" + bytes(c.colour).hex() for c in CLASSES} | {"unknown": "#000000"}
        return {
            "number": self.number,
            "unit": unit,
            "radius": radius,
            "longest": LONGEST,
            "resume": resume_line(self.out),
            "classes": [{"name": n, "key": KEYS[n], "colour": colours[n]} for n in LABELS],
            "images": [
                {"id": name, "size": q["size"], "picks": q["picks"]} for name, q in self.images
            ],
            "states": states,
        }

    def photograph(self, index: int) -> bytes:
        """The photograph of image `index` as the network sees it, a PNG without loss."""
        pixels = read_image(self.photograph_path(index)).permute(1, 2, 0)
        packed = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(packed, "png", compress_level=1)
        return packed.getvalue()

    def photograph_path(self, index: int) -> Path:
        """Where image `index` lies: below `root` where one was given, else where it was asked."""
        question = self.images[index][1]
        below = question.get("below_root") if self.root else None
        return self.root / below if below else Path(question["photograph"])

    def path(self, index: int) -> Path:
        return self.folder / "answers" / f"{self.images[index][0]}.json"

    def state(self, index: int) -> dict:
        """What is on disk for image `index`, see the class."""
        name, question = self.images[index]
        state = {"picks": [None] * len(question["picks"]), "polygons": [], "finished": False}
        state |= {"corrections": 0, "seconds": 0.0, "elsewhere": None}
        paths = [self.folder / "answers" / (name + ending) for ending in ENDINGS]
        others = [path.name for path in paths if path.is_file() and path != self.path(index)]
        if self.path(index).is_file():
            own = self.own_part(index, state)
            others += [self.path(index).name] if own is None else []
            state |= own or {}
        state["elsewhere"] = others[0] if others else None
        return state

    def own_part(self, index: int, blank: dict) -> dict | None:
        """What the page wrote into answers/IMAGE.json; None for a file of another program, or one that
        was edited: its answers are not the page's to replace."""
        try:
            own = page_part(read_json(self.path(index)))
            kinds = [type(own[key]) is type(blank[key]) for key in PARTS]
            picks = enumerate(own["picks"])
            fine = [parts_of(answer, len(self.cells(index, i))) is not None for i, answer in picks]
            fine += [p["label"] in LABELS and all_points(p["points"]) for p in own["polygons"]]
            count = len(own["picks"]) == len(blank["picks"])
            return {key: own[key] for key in PARTS} if all(kinds + fine) and count else None
        except (InputError, LookupError, TypeError):
            return None

    def answer(self, message) -> dict:
        """Writes what a page says about an image; returns the image's state.

        A message has "image", "seconds", and one of: "pick" and "answer" with "was" (the answer that the
        page replaces), "add" (a polygon), "remove" (a polygon's id), "finished". Raises Refused.
        """
        index = message.get("image") if isinstance(message, dict) else None
        if type(index) is not int or not 0 <= index < len(self.images):
            raise Refused(400, "no such image")
        with self.lock:
            state = self.state(index)
            if state["elsewhere"]:
                raise Refused(409, f"answered in the file {state['elsewhere']}: it was kept", state)
            if "pick" in message:
                self.answer_pick(index, state, message)
            elif self.record["unit"] == "image":
                self.change_polygons(state, message)
            else:
                raise Refused(400, "no such question")
            state["seconds"] = round(state["seconds"] + seconds_of(message), 2)
            self.write(index, state)
        return state

    def answer_pick(self, index: int, state: dict, message: dict) -> None:
        """Takes over the answer to a pick where the page knew what stood there."""
        pick, answer, was = (message.get(key) for key in ("pick", "answer", "was"))
        picks = state["picks"]
        if type(pick) is not int or not 0 <= pick < len(picks):
            raise Refused(400, "no such question")
        count = len(self.cells(index, pick))
        parts, before = parts_of(answer, count), parts_of(picks[pick], count)
        if parts is None:
            raise Refused(400, "no such class")
        if picks[pick] != was:
            text = f"another tab had answered {said(picks[pick])}: it was kept"
            raise Refused(409, text, state)
        pairs = zip(before, parts, strict=True)
        state["corrections"] += any(old is not None and old != new for old, new in pairs)
        picks[pick] = answer if any(part is not None for part in parts) else None

    def change_polygons(self, state: dict, message: dict) -> None:
        """Adds or removes a polygon of a whole image, or says that the image is finished."""
        if "add" in message:
            new = message["add"] if isinstance(message["add"], dict) else {}
            label, points = new.get("label"), new.get("points")
            if label not in LABELS or not all_points(points) or len(points) < 3:
                raise Refused(400, "a polygon has a class and three points or more")
            # how many were ever drawn: a removed polygon's id never comes back
            drawn = len(state["polygons"]) + state["corrections"]
            state["polygons"].append({"id": drawn + 1, "label": label, "points": points})
        elif "remove" in message:
            kept = [polygon for polygon in state["polygons"] if polygon["id"] != message["remove"]]
            if len(kept) == len(state["polygons"]):
                raise Refused(409, "another tab had removed this polygon", state)
            state["polygons"], state["corrections"] = kept, state["corrections"] + 1
        elif type(message.get("finished")) is bool:
            state["finished"] = message["finished"]
        else:
            raise Refused(400, "no such question")

    def cells(self, index: int, pick: int) -> list[tuple[int, int]]:
        """The (row, col) of the pixels that a pick asks, in reading order."""
        question, k = self.images[index][1], self.record["radius"]
        (row, col), (height, width) = question["picks"][pick], question["size"]
        rows = range(max(0, row - k), min(height, row + k + 1))
        cols = range(max(0, col - k), min(width, col + k + 1))
        return [(r, c) for r in rows for c in cols]

    def write(self, index: int, state: dict) -> None:
        """Writes answers/IMAGE.json; raises InputError where it cannot be written."""
        shapes = [shape(p["label"], "polygon", p["points"]) for p in state["polygons"]]
        for pick, answer in enumerate(state["picks"]):
            cells = self.cells(index, pick)
            if isinstance(answer, str):
                (top, left), (bottom, right) = cells[0], cells[-1]
                corners = [[left, top], [right + 1, bottom + 1]]
                shapes.append(shape(answer, "rectangle", corners))
            parts = answer if isinstance(answer, list) else []
            for (row, col), part in zip(cells, parts, strict=False):
                if part is not None:
                    shapes.append(shape(part, "point", [[col + 0.5, row + 0.5]]))
        question = self.images[index][1]
        content = {"version": "5.0.0", "flags": {}, "shapes": shapes, "imageData": None}
        content |= {"imagePath": question["photograph"], "imageHeight": question["size"][0]}
        own = {key: state[key] for key in PARTS} | {"shapes": shapes_digest(shapes)}
        content |= {"imageWidth": question["size"][1], "alda": own}
        write_atomic(self.path(index), json.dumps(content))


def shape(label: str, kind: str, points: list) -> dict:
    """A shape as Labelme writes it."""
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, "flags": {}}


def parts_of(answer, count: int) -> list | None:
    """The answer to each of the `count` pixels of a pick, a label or None; None where it is no
    answer."""
    parts = answer if isinstance(answer, list) else [answer] * count
    fine = len(parts) == count and all(part is None or part in LABELS for part in parts)
    return parts if fine else None


def said(answer) -> str:
    """An answer for people."""
    return "pixel by pixel" if isinstance(answer, list) else f"{answer or 'nothing'}"


def seconds_of(message: dict) -> float:
    """How long the page says that it took, 0 to LONGEST."""
    value = message.get("seconds")
    fine = type(value) in (int, float) and math.isfinite(value)
    return min(max(float(value), 0.0), LONGEST) if fine else 0.0


def all_points(points) -> bool:
    """Whether this is a list of pairs of numbers that an image may have."""
    pairs = isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)
    numbers = [x for p in points for x in p] if pairs else [None]
    return all(type(x) in (int, float) and abs(x) < 1e6 for x in numbers)


# ------------------------------------------------------------------------------------------ the server


class Server(ThreadingHTTPServer):
    """The page of one open round on the loopback address; `address` is where it is to be found."""

    daemon_threads = True

    def __init__(self, round_: OpenRound, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.round, self.token = round_, secrets.token_urlsafe(18)
        self.address = f"http://127.0.0.1:{self.server_port}/{self.token}/"


class Handler(BaseHTTPRequestHandler):
    """A request: `/TOKEN/` is the page, `/TOKEN/questions`, `/TOKEN/photograph/NUMBER`, and POST
    `/TOKEN/answer`. Everything else is refused."""

    timeout = 60
    server: Server

    def do_GET(self) -> None:
        with self.refusals():
            what = self.asked()
            number = re.fullmatch(r"photograph/([0-9]{1,9})", what)
            if what == "":
                self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
            elif what == "questions":
                self.reply(200, self.server.round.questions())
            elif number and int(number[1]) < len(self.server.round.images):
                self.reply(200, self.server.round.photograph(int(number[1])), "image/png")
            else:
                raise Refused(404, "not here")

    def do_POST(self) -> None:
        with self.refusals():
            length = self.headers.get("Content-Length", "")
            if self.asked() != "answer":
                raise Refused(404, "not here")
            if self.headers.get("Content-Type") != "application/json":
                raise Refused(415, "expected JSON")
            if not re.fullmatch("[0-9]{1,7}", length) or int(length) > 2_000_000:
                raise Refused(413, "expected an answer of at most 2 MB")
            try:
                message = json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                raise Refused(400, "expected JSON") from None
            self.reply(200, {"state": self.server.round.answer(message)})

    def asked(self) -> str:
        """What follows the token in the address. Raises Refused for another machine's name, and for
        another token. The port may be another one: of the near end of an ssh tunnel."""
        host = self.headers.get("Host") or ""
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", host):
            raise Refused(403, "only this machine")
        own = f"/{self.server.token}/"
        if not secrets.compare_digest(self.path[: len(own)].encode(), own.encode()):
            raise Refused(404, "not here")
        return self.path[len(own) :]

    @contextmanager
    def refusals(self):
        """Inside, what is refused becomes a reply; a page that left is nobody's trouble."""
        try:
            yield
        except Refused as refused:
            status, text, *state = refused.args
            self.reply(status, {"error": text, **({"state": state[0]} if state else {})})
        except InputError as error:  # a full disk, a photograph that is gone
            self.reply(500, {"error": str(error)})
        except (ConnectionError, TimeoutError):
            pass

    def reply(self, status: int, content, kind: str = "application/json") -> None:
        """Sends bytes, or an object as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        own = "default-src 'none'; img-src 'self'; connect-src 'self'; frame-ancestors 'none'; "
        own += "base-uri 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": own,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Says nothing of each request."""


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m alda.annotate",
        description="Serves the round that waits for answers as a page, on this machine alone.",
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="the run's folder (--out of alda.loop)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=0,
        help="[0: a free one]; from elsewhere: ssh -L PORT:127.0.0.1:PORT",
    )
    parser.add_argument("--root", type=Path, help="the data's folder [where the run found it]")
    args = parser.parse_args(argv)
    try:
        if not (args.run / "config.json").is_file():
            raise InputError(f"{args.run}: is no run's folder (no config.json)")
        with locked(args.run), Server(OpenRound(args.run, args.root), args.port) as server:
            print(f"round {server.round.number}: open {server.address}", flush=True)
            print("every answer is saved at once; Ctrl-C ends the server", flush=True)
            server.serve_forever()
    except (InputError, OSError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; when all is answered: {resume_line(args.run)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
