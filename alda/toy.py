"""How do I try it without the data? Writes a miniature world in the real folder layouts of GTA5,
SYNTHIA and Cityscapes.

    python -m alda.toy DIR [--seed 0]      # DIR/gta5, DIR/synthia, DIR/cityscapes: 568 pictures of about 256x128
    from alda.toy import ensure, write     # ensure(DIR) writes the world on first use only

A driver's view of streets, drawn back to front by a small painter in true perspective. The three
datasets differ in camera, layout, colours, light and sensor (LOOKS), and every city has its own
style, so that a network trained on a source loses much of its score on the target. Numbers from
these pictures say that code works; they say nothing about a method.

Units: metres in the world (x right of the road's centre line, y up, z ahead of the camera), pixels
in the drawing, which is made at twice the size: the picture is averaged down, of the labels every
second pixel is taken (never mixed).
"""

import argparse
import json
import math
import random
import shutil
import struct
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from alda import InputError, run_command
from alda.datasets import CLASSES

VERSION = 1  # raise it when the same seed gives other files
MARKER = "toy-world.json"  # written last: version, seed, counts
# pictures; train and val are Cityscapes
FULL = {"gta5": 240, "synthia": 160, "train": 120, "val": 48}
SMALL = {"gta5": 8, "synthia": 8, "train": 6, "val": 3}
CITIES = {  # real names, since tools know them; the streets are invented
    "train": ("aachen", "bremen", "cologne", "hamburg", "ulm", "zurich"),
    "val": ("frankfurt", "lindau", "munster"),
}
IDS = {c.name: c.cityscapes_id for c in CLASSES} | {"ego vehicle": 1, "static": 4}
SCALE = 2  # drawing pixels for each pixel of the picture
NEAR, FAR = 1.0, 140.0  # metres of street that are drawn
CIRCLE = tuple((math.cos(a), math.sin(a)) for a in (2 * math.pi * i / 14 for i in range(14)))


# -------------------------------------------------------------------------------------------- looks


@dataclass(frozen=True)
class Look:
    """What tells one dataset from another. Pairs are ranges (low, high)."""

    focal: tuple  # focal length in picture widths
    eye: tuple  # height of the camera
    horizon: tuple  # its row as a share of the picture's height
    road: tuple  # half the road's width
    pavement: tuple  # width of a sidewalk
    height: tuple  # of buildings
    plots: dict  # what stands beside the road: relative frequency
    things: dict  # mean number in a picture; below 1: spread evenly over the dataset
    colours: dict  # class or part: hex colours, one is drawn for each instance
    windows: tuple  # styles of windows, one for each city
    pitched: float  # share of cities with pitched roofs
    spread: float  # of the brightness from instance to instance
    sun: float  # contrast of lit and unlit walls
    shadow: tuple  # strength, softness in pixels
    haze: float  # metres after which 63 % of a colour is haze
    grain: dict  # class: (coarse, fine) strength of its texture
    tint: tuple  # gain of each colour channel, one for each city
    saturation: float
    blur: tuple  # pixels
    noise: float  # of the sensor, in grey levels
    vignette: float
    hood: float  # share of pictures that show the own car


PARTS = {  # colours that all datasets share
    "black": "202022", "white": "e8e8e2", "red": "c8202a", "blue": "2350b4", "yellow": "f0be2e", "green": "46f082",
    "steel": "9a9c9e", "rear": "c81c1c", "glow": "faf5d8", "screen": "28303a", "helmet": "e8e8e2 202022 a83030 30509a",
}  # fmt: skip
LOOKS = {
    "gta5": Look(
        focal=(0.85, 1.05), eye=(1.4, 2.1), horizon=(0.40, 0.50), road=(5.0, 8.0), pavement=(2.5, 5.0), height=(6, 24),
        plots={"building": 5, "wall": 1.0, "fence": 0.9, "hedge": 0.5, "garden": 0.8, "park": 1.8},
        things={"truck": 0.22, "bus": 0.12, "train": 0.10, "motorcycle": 0.18, "motorcyclist": 0.18, "bicycle": 0.5,
                "cyclist": 0.25, "signal": 1.2, "sign": 1.4, "lamp": 2.5, "parked": 2.0, "car": 1.8, "person": 4.0, "tree": 3.0,
                "bin": 0.4},
        colours={
            "road": "6f6a63 77716a 67655f", "mark": "f0ead2 f2d25a", "sidewalk": "c2b59b b8a78c cdbfa6", "roof": "8a5a3c",
            "building": "d9a066 c8794e e8d5a8 e6b89c b5562f f0e2c8 9fb7c9 d98c8c", "glass": "3f6d94 5b93b8 2c4a66",
            "wall": "c9b48a d8c7a0 b98f63", "fence": "4f7a58 9aa39a 7f8f99", "pole": "8f8a80 6d7c74 a39a8a",
            "signal": "d9a520 c79a1a", "vegetation": "3f8f2a 5a9638 2f7a2f 7ca048 55702e", "trunk": "7a5230",
            "terrain": "a8b04a 8fae3c b9a95a", "sky": "3f86d8 5f9fe0 8cb6e0 b4cbdc", "haze": "b9d6ee d5e2ea f0dcc0",
            "skin": "e0ac82 8d5a3a f1c9a5", "cloth": "e23b3b 3b6fe2 f2c230 f5f5f5 2f9c60 d27bc0 38302c 2c3440 6a6258",
            "car": "d62424 f0b41e 2a5fd0 f2f2f2 1c1c1c e06a1a 2f9e5a 8c9298", "truck": "e8e8e8 d9622b 3d77c2",
            "bus": "e8e2d0 2f6fb5 c94f2c", "train": "b8bec4 c23c3c 8fa6b5", "motorcycle": "d02020 202020 2048c0",
            "bicycle": "c84040 3090c8 303034",
        },
        windows=("grid", "band"), pitched=0.0, spread=0.18, sun=0.26, shadow=(0.45, 0.4), haze=260,
        grain={"vegetation": (0.14, 0.10), "terrain": (0.10, 0.05), "building": (0.05, 0.01), "road": (0.05, 0.02)},
        tint=(0.88, 1.08), saturation=1.05, blur=(0, 0), noise=0, vignette=0.0, hood=0.0,
    ),
    "synthia": Look(
        focal=(0.62, 0.8), eye=(1.6, 5.5), horizon=(0.22, 0.42), road=(5.0, 8.0), pavement=(2.5, 5.0), height=(8, 22),
        plots={"building": 6, "wall": 0.5, "fence": 0.7, "hedge": 0.4, "garden": 0.3, "park": 1.0},
        things={"bus": 0.25, "motorcycle": 0.25, "motorcyclist": 0.3, "bicycle": 0.6, "cyclist": 0.35, "signal": 1.0,
                "sign": 1.0, "lamp": 3.5, "parked": 2.5, "car": 2.5, "person": 7.0, "tree": 3.0, "bin": 0.4},
        colours={
            "road": "4a4a52 55565c 5c5a5a", "mark": "ffffff", "sidewalk": "a8705c 9a8a80 b58a74", "roof": "6f747a",
            "building": "dfe3e6 b9c2c9 a7b7a0 d8cfc0 c7a9a0 8f9fae", "glass": "7fb2c9 4f8199 a9d3df",
            "wall": "b5b5ad 9c8f86", "fence": "3a3f46 6a5a4a", "pole": "3c4a45 55555f 2f3338", "signal": "2f3a2f 3a3a3a",
            "vegetation": "2f7a5a 3f8f6a 4fa05f 256648", "trunk": "5a4a3f", "terrain": "6fae6f 5f9f5a",
            "sky": "8fb6d6 a9c4da 7fa3c9", "haze": "dfe8ee e6e3dc", "skin": "d9a58a 7a4f3a",
            "cloth": "6a4fc2 e0e0e0 c24f6a 3f8f9f 2a2a35 d9a53f", "car": "9fd0d9 c9c9d9 6f1f2f 2f2f6f e0e0e0 5f7f2f",
            "bus": "c92f2f e0a52f 2f9f8f", "motorcycle": "3f3f3f 9f2f2f 2f6f9f", "bicycle": "9f9f9f 2f2f2f c96f2f",
        },
        windows=("band", "grid"), pitched=0.0, spread=0.10, sun=0.18, shadow=(0.35, 0.8), haze=170,
        grain={"vegetation": (0.10, 0.14), "road": (0.03, 0.04), "sidewalk": (0.02, 0.07), "building": (0.03, 0.02)},
        tint=(0.92, 1.06), saturation=0.95, blur=(0, 0.3), noise=1.0, vignette=0.0, hood=0.0,
    ),
    "cityscapes": Look(
        focal=(1.02, 1.12), eye=(1.2, 1.35), horizon=(0.40, 0.47), road=(3.4, 6.0), pavement=(2.2, 4.5), height=(8, 20),
        plots={"building": 5, "wall": 1.1, "fence": 1.0, "hedge": 0.5, "garden": 0.8, "park": 1.6},
        things={"truck": 0.08, "bus": 0.09, "train": 0.09, "motorcycle": 0.11, "motorcyclist": 0.14, "bicycle": 0.65,
                "cyclist": 0.34, "signal": 0.8, "sign": 1.7, "lamp": 2.3, "parked": 2.3, "car": 1.0, "person": 4.0, "tree": 4.0,
                "bin": 0.3},
        colours={
            "road": "6a6e72 777a7b 5e646c", "mark": "c9cccd b9bdc0", "sidewalk": "8f8f92 9c9892 868d95", "roof": "5a3f3a 45484e",
            "building": "a39e94 b8b2a6 8a6a60 7c8086 c6bda2 9c8272 a8acb0 88846a", "glass": "363c42 5c6670 9aa4ac",
            "wall": "7e7468 8f8678 6c5e54", "fence": "5a5248 84888a 464c44", "pole": "6a6f72 8a8d8e 545858",
            "signal": "23282a 2c3230", "vegetation": "485a36 56683c 6a6e3c 38503c 7a6640", "trunk": "463e37",
            "terrain": "66724a 7d7856 5a6c4a", "sky": "d6dde2 e2e8ec bccfe2 a6c0de", "haze": "dde2e4 e8e6e0",
            "skin": "c0a28e 7a5c4a d0b4a6", "cloth": "23262e 3a3f4a 5a3f3f 6a6a6a 9a8f80 2f3f5a b0b0b0",
            "car": "17191c 8f9498 c4c7c8 2a3548 4a1f22 5f6468 30403a", "truck": "c9c9c4 3f5a7a 8a3030 6f7a50",
            "bus": "b8a040 8a2a2a c9c6bc 3f6a5a", "train": "a89a50 c0c0ba 3f5f80 8a3a34", "motorcycle": "1c1c1e 5a2024 30384a",
            "bicycle": "24262a 5a5f64 3a4a5a",
        },
        windows=("tall", "grid"), pitched=0.7, spread=0.18, sun=0.07, shadow=(0.40, 2.0), haze=180,
        grain={"vegetation": (0.16, 0.26), "terrain": (0.12, 0.13), "building": (0.05, 0.045), "wall": (0.10, 0.06),
               "road": (0.06, 0.04), "sidewalk": (0.05, 0.07), "fence": (0.08, 0.05), "sky": (0.025, 0.0)},
        tint=(1.0, 1.16), saturation=0.85, blur=(0.35, 0.6), noise=3.0, vignette=0.10, hood=0.6,
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------- geometry


class Scene:
    """One street: a camera, a random state, and three canvases that are painted together (picture,
    label ids, shade)."""

    def __init__(self, look: Look, size: tuple[int, int], rng: random.Random, city: random.Random):
        self.look, self.size, self.rng = look, size, rng
        width, height = size[0] * SCALE, size[1] * SCALE
        self.focal, self.eye = rng.uniform(*look.focal) * width, rng.uniform(*look.eye)
        self.centre = rng.uniform(0.4, 0.6) * width
        self.horizon = rng.uniform(*look.horizon) * height
        # metres sideways at 1 m, growing with z squared
        self.bend = rng.choice((0, 0, rng.uniform(-0.0018, 0.0018)))
        self.road, self.pavement = rng.uniform(*look.road), rng.uniform(*look.pavement)
        self.eye_x = self.road * rng.uniform(0.30, 0.55)  # we drive on the right
        self.sun = rng.choice((-1, 1))  # it stands on this side
        # distance of a crossing street, 9 m wide
        self.junction = rng.choice((rng.uniform(14, 38), math.inf))
        self.taken = []  # ground taken by things: (x, z, half width, length)
        self.colours = {part: text.split() for part, text in (PARTS | look.colours).items()}
        for part in ("building", "vegetation", "roof", "sidewalk", "haze"):
            self.colours[part] = city.sample(self.colours[part], min(3, len(self.colours[part])))
        self.windows, self.pitched = city.choice(look.windows), city.random() < look.pitched
        self.tint = np.float32([city.uniform(*look.tint) for _ in range(3)]) * np.float32(
            city.uniform(0.92, 1.08)
        )
        self.haze = self.colour("haze")
        self.picture, self.labels = (
            Image.new("RGB", (width, height)),
            Image.new("L", (width, height), IDS["sky"]),
        )
        self.shade = Image.new("L", (width, height), 255)
        self.pens = tuple(
            ImageDraw.Draw(canvas) for canvas in (self.picture, self.labels, self.shade)
        )

    def colour(self, part: str, gain: float = 1.0) -> tuple:
        """A colour of the part (RGB, 0..255), another for each instance."""
        text = self.rng.choice(self.colours[part])
        gain = gain * (1 + self.look.spread * self.rng.uniform(-1, 1))
        return tuple(
            int(text[i : i + 2], 16) * gain * self.rng.uniform(0.95, 1.05) for i in (0, 2, 4)
        )

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        scale = self.focal / z
        column = self.centre + scale * (x - self.eye_x + self.bend * z * z)
        return column, self.horizon + scale * (self.eye - y)

    def paint(self, points: list, colour: tuple | None, cls: str | None, z: float = NEAR) -> None:
        """Fills a polygon of drawing pixels; without a class only the picture changes, without a
        colour only the labels."""
        if colour is not None:
            haze = 1 - math.exp(-z / self.look.haze)
            mixed = [
                min(255, int(c * (1 - haze) + h * haze))
                for c, h in zip(colour, self.haze, strict=True)
            ]
            self.pens[0].polygon(points, tuple(mixed))
        if cls is not None:
            self.pens[1].polygon(points, IDS[cls])
            self.pens[2].polygon(points, 255)

    def ground(
        self, x0: float, x1: float, z0: float, z1: float, colour: tuple, cls: str | None = None
    ) -> None:
        """A strip of ground along the street."""
        z0 = max(z0, NEAR)
        steps = [z0 * (z1 / z0) ** (i / 8) for i in range(9)]
        points = [self.project(x0, 0, z) for z in steps] + [
            self.project(x1, 0, z) for z in reversed(steps)
        ]
        self.paint(points, colour, cls, math.sqrt(z0 * z1))

    def cast(self, x0: float, x1: float, z0: float, z1: float) -> None:
        """A shadow on the ground; what is painted later covers it."""
        points = [
            self.project(x, 0, max(z, NEAR)) for x, z in ((x0, z0), (x1, z0), (x1, z1), (x0, z1))
        ]
        self.pens[2].polygon(points, int(255 * (1 - self.look.shadow[0])))

    def metric(self, x: float, z: float) -> "Panel":
        """An upright plane that faces the camera: its s and t are metres right of x and above the
        ground."""
        return Panel(self, ((x, 0, z), (x + 1, 0, z), (x + 1, 1, z), (x, 1, z)))

    def box(
        self, x: tuple, y: tuple, z: tuple, colour: tuple, cls: str, inset=(0, 0, 0, 0)
    ) -> tuple:
        """A block, its top smaller by `inset` (left, right, near, far). Gives its near face and its
        flank (None: not seen)."""
        (x0, x1), (y0, y1), (z0, z1) = x, y, z
        u0, u1, w0, w1 = x0 + inset[0], x1 - inset[1], z0 + inset[2], z1 - inset[3]
        top = Panel(
            self, ((u0, y1, w0), (u1, y1, w0), (u1, y1, w1), (u0, y1, w1)), 1 + self.look.sun
        )
        front = Panel(self, ((x0, y0, z0), (x1, y0, z0), (u1, y1, w0), (u0, y1, w0)), 0.95)
        side = int(x0 > self.eye_x) or -int(x1 < self.eye_x)
        foot, head = (x0, u0) if side == 1 else (x1, u1)
        corners = ((foot, y0, z0), (foot, y0, z1), (head, y1, w1), (head, y1, w0))
        flank = Panel(self, corners, 1 - side * self.sun * self.look.sun) if side else None
        for panel in (top, flank, front):
            if panel is not None:
                panel.fill(colour, cls=cls)
        return front, flank


class Panel(NamedTuple):
    """A flat four-sided face in the world, painted in its own coordinates: s from left (or near) to
    right, t upwards."""

    scene: Scene
    corners: tuple  # (x, y, z) at (s, t) = (0, 0), (1, 0), (1, 1), (0, 1)
    light: float = 1.0

    def point(self, s: float, t: float) -> tuple[float, float]:
        """Where (s, t) lies in the drawing, in pixels."""
        a, b, c, d = self.corners
        wa, wb, wc, wd = (1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t
        x = wa * a[0] + wb * b[0] + wc * c[0] + wd * d[0]
        y = wa * a[1] + wb * b[1] + wc * c[1] + wd * d[1]
        return self.scene.project(x, y, wa * a[2] + wb * b[2] + wc * c[2] + wd * d[2])

    def fill(
        self, colour: tuple | None, outline=((0, 0), (1, 0), (1, 1), (0, 1)), cls: str | None = None
    ) -> None:
        z = (self.corners[0][2] + self.corners[1][2]) / 2
        self.scene.paint(
            [self.point(*p) for p in outline], colour and lit(colour, self.light), cls, z
        )

    def rect(
        self, colour: tuple, s0: float, t0: float, s1: float, t1: float, cls: str | None = None
    ) -> None:
        self.fill(colour, ((s0, t0), (s1, t0), (s1, t1), (s0, t1)), cls)

    def disc(
        self, colour: tuple, s: float, t: float, radius: tuple, cls: str | None = None
    ) -> None:
        self.fill(colour, [(s + radius[0] * c, t + radius[1] * d) for c, d in CIRCLE], cls)

    def bar(
        self, colour: tuple, start: tuple, end: tuple, width: float, cls: str | None = None
    ) -> None:
        """A straight bar on a metric panel, never thinner than 1.5 pixels (2.2 if it is upright) of
        the picture."""
        length = math.hypot(end[0] - start[0], end[1] - start[1])
        least = (2.2 if start[0] == end[0] else 1.5) * SCALE * self.corners[0][2] / self.scene.focal
        half = max(width, least) / 2 / length
        ds, dt = -(end[1] - start[1]) * half, (end[0] - start[0]) * half
        ends = ((start, 1), (end, 1), (end, -1), (start, -1))
        self.fill(colour, [(s + i * ds, t + i * dt) for (s, t), i in ends], cls)


def lit(colour: tuple, gain: float) -> tuple:
    """The colour brighter or darker."""
    return tuple(c * gain for c in colour)


# ---------------------------------------------------------------------- what stands beside the road


def backdrop(scene: Scene) -> None:
    """Sky, and houses and trees at the far end of the street."""
    width, height = scene.picture.size
    share = np.minimum(1, np.arange(height)[:, None] / scene.horizon) ** 1.5
    rows = np.array(scene.colour("sky")) * (1 - share) + np.array(scene.haze) * share
    scene.picture.paste(
        Image.fromarray(rows.clip(0, 255).astype(np.uint8)[:, None]).resize((width, height))
    )
    x = -150.0
    while x < 150:
        step, tall = scene.rng.uniform(8, 20), scene.rng.uniform(4, 16)
        far = scene.metric(x - scene.bend * FAR * FAR, FAR)
        if scene.rng.random() < 0.6:
            far.rect(scene.colour("building"), 0, -1, step + 0.5, tall, "building")
        else:
            far.disc(
                scene.colour("vegetation"), step / 2, 0, (step * 0.7, tall * 0.8), "vegetation"
            )
        x += step


def street_floor(scene: Scene) -> None:
    """Paving everywhere, then perhaps a green verge, the road with its markings, and perhaps a
    crossing street."""
    rng, half, mark, road = scene.rng, scene.road, scene.colour("mark"), scene.colour("road")
    paving = scene.colour("sidewalk")
    scene.ground(-200, 200, NEAR, FAR, paving, "sidewalk")
    for side in (-1, 1):
        if rng.random() < 0.3:
            verge = side * (half + 0.4 * scene.pavement)
            scene.ground(side * half, verge, NEAR, FAR, scene.colour("terrain"), "terrain")
        scene.ground(side * half, side * (half + 0.18), NEAR, FAR, lit(paving, 1.15), "sidewalk")
    scene.ground(-half, half, NEAR, FAR, road, "road")
    for side in (-1, 1):
        if rng.random() < 0.5:
            scene.ground(side * (half - 2.3), side * (half - 2.45), NEAR, 60, mark)
    for i in range(14):
        scene.ground(-0.08, 0.08, 2 + 6 * i, 5 + 6 * i, mark)
    if scene.junction < FAR:
        scene.ground(-200, 200, scene.junction, scene.junction + 9, road, "road")
        for i in range(int(half * 2 / 1.2)):
            scene.ground(
                -half + 0.3 + 1.2 * i,
                -half + 0.9 + 1.2 * i,
                scene.junction - 4,
                scene.junction - 1.2,
                mark,
            )


def plots(scene: Scene) -> list[tuple]:
    """What stands along both sides of the road, the crossing street left out: (z, painter, kind,
    side, z0, z1)."""
    rng, found = scene.rng, []
    kinds, weights = zip(*scene.look.plots.items(), strict=True)
    for side in (-1, 1):
        z0 = NEAR + rng.uniform(0, 3)
        while z0 < 100:
            z1 = z0 + rng.uniform(7, 20)
            if z0 < scene.junction + 9 and z1 > scene.junction:
                z1 = max(z0 + 1, scene.junction)
            found.append((z0, plot, rng.choices(kinds, weights)[0], side, z0, z1))
            z0 = z1 + (9 if z1 >= scene.junction > z0 else rng.choice((0, 0, 0, 3)))
    return found


def plot(scene: Scene, kind: str, side: int, z0: float, z1: float) -> None:
    """A house at the sidewalk, or a green with trees or a house behind a wall, a fence, a hedge or
    nothing."""
    rng, x = scene.rng, side * (scene.road + scene.pavement)
    if kind == "building":
        return house(scene, side, x, z0, z1)
    scene.ground(x, x + side * 60, z0, z1, scene.colour("terrain"), "terrain")
    if kind == "garden" or (kind != "park" and rng.random() < 0.4):
        house(scene, side, x + side * rng.uniform(4, 8), z0, z1)
    for z in sorted((rng.uniform(z0, z1) for _ in range(1 + int(z1 - z0) // 4)), reverse=True):
        plant(
            scene,
            x + side * (3 + (11 * rng.random() ** 1.5 if kind == "park" else 0)),
            z,
            bush=rng.random() < 0.4,
        )
    if kind in ("wall", "fence", "hedge"):
        barrier(scene, kind, side, x, z0, z1)


def house(scene: Scene, side: int, x: float, z0: float, z1: float) -> None:
    """A building of its own height and colour, with windows, a ground floor and a roof."""
    tall, colour, glass = (
        scene.rng.uniform(*scene.look.height),
        scene.colour("building"),
        scene.colour("glass"),
    )
    width = (min(x, x + side * 14), max(x, x + side * 14))
    front, flank = scene.box(width, (0, tall), (z0, z1), colour, "building")
    if side == scene.sun:
        scene.cast(x, x - side * tall * 0.5, z0, z1)
    for panel, length in ((front, 14), (flank, z1 - z0)):
        if panel is not None and z0 < 70:
            facade(scene, panel, length, tall, colour, glass)
    if scene.pitched:
        scene.box(width, (tall, tall + 4), (z0, z1), scene.colour("roof"), "building", (4, 4, 0, 0))


def facade(
    scene: Scene, panel: Panel, length: float, tall: float, colour: tuple, glass: tuple
) -> None:
    """Windows in the city's style, and a ground floor with a shop window and a door."""
    rng, floors, (spacing, wide, low) = scene.rng, max(2, int(tall / 3.2)), WINDOWS[scene.windows]
    columns, frame = max(1, int(length / spacing)), lit(colour, rng.uniform(1.1, 1.3))
    panel.rect(rng.choice((lit(colour, 0.75), scene.colour("building"))), 0, 0, 1, 0.85 / floors)
    panel.rect(lit(glass, 0.8), 0.08, 0.12 / floors, 0.62, 0.7 / floors)
    panel.rect(lit(colour, 0.4), 0.72, 0, 0.72 + 1.2 / length, 0.7 / floors)
    for t, s in (
        (floor / floors, (c + 0.5) / columns) for floor in range(1, floors) for c in range(columns)
    ):
        if scene.windows == "tall":
            panel.rect(
                frame, s - 0.34 / columns, t + 0.1 / floors, s + 0.34 / columns, t + 0.88 / floors
            )
        pane = lit(glass, rng.choice((0.8, 1.0, 1.3)))
        panel.rect(pane, s - wide / columns, t + low / floors, s + wide / columns, t + 0.8 / floors)


# spacing, half width, sill
WINDOWS = {"grid": (2.9, 0.31, 0.25), "tall": (2.2, 0.24, 0.15), "band": (99, 0.47, 0.3)}


def barrier(scene: Scene, kind: str, side: int, x: float, z0: float, z1: float) -> None:
    """A wall with a coping, a hedge, or a fence one can look through (the labels take a fence as a
    whole)."""
    cls = "vegetation" if kind == "hedge" else kind
    tall, colour = scene.rng.uniform(1.2, 2.2) * (1.5 if kind == "wall" else 1), scene.colour(cls)
    if kind != "fence":
        _, flank = scene.box(
            (min(x, x + side * 0.5), max(x, x + side * 0.5)), (0, tall), (z0, z1), colour, cls
        )
        for t in (0.2, 0.4, 0.6, 0.8, 0.93) if kind == "wall" and flank is not None else ():
            flank.rect(lit(colour, 0.75), 0, t, 1, t + 0.05)
        return
    panel = Panel(scene, ((x, 0, z0), (x, 0, z1), (x, tall, z1), (x, tall, z0)))
    panel.fill(None, cls="fence")
    for t in (0.06, 0.5, 0.92):
        panel.rect(colour, 0, t, 1, t + 0.08)
    bars = int((z1 - z0) / 0.45) + 1
    for i in range(bars):
        panel.rect(colour, i / bars, 0, (i + (0.5 if i % 5 else 0.75)) / bars, 1)


def plant(scene: Scene, x: float, z: float, bush: bool = False) -> None:
    """A trunk and a crown of leaves, lit from the sun's side; a conifer; or a bush."""
    rng, panel, leaf = scene.rng, scene.metric(x, z), scene.colour("vegetation")
    tall = 0.8 if bush else rng.uniform(5, 11)
    crown = rng.uniform(0.6, 1.2) if bush else rng.uniform(1.3, 2.6)
    scene.cast(x - crown * 0.8, x + crown * 0.8 - scene.sun * 2, z - 1.2, z + 1.2)
    if not bush:
        panel.bar(scene.colour("trunk"), (0, 0), (0, tall * 0.6), 0.35, "vegetation")
    if not bush and rng.random() < 0.2:
        for i in range(4):
            base, wide = 1.2 + i * tall * 0.2, crown * (1 - i * 0.22)
            panel.fill(
                lit(leaf, 0.75 + 0.1 * i),
                ((-wide, base), (wide, base), (0, base + tall * 0.38)),
                "vegetation",
            )
        return
    for gain, size, count in ((0.7, 0.62, 6), (0.95, 0.5, 6), (1.25, 0.3, 5)):
        for _ in range(count):
            lean = 0.3 * crown * (gain - 0.7)
            s, t = (
                rng.gauss(0, 0.42) * crown + scene.sun * lean,
                tall * 0.68 + rng.gauss(0, 0.36) * crown + lean,
            )
            panel.disc(lit(leaf, gain), s, t, (size * crown, size * crown), "vegetation")


# ------------------------------------------------------------------------------------------ figures

# Class, then shapes in painting order: colour, its brightness, size, points in metres (right of the
# foot, above it). One point makes a disc (size: its radius), two make a bar (size: its width), more
# make a polygon.
FIGURES = {
    "person": ("person", ("cloth 2", 0.7, 0.19, (-0.04, 0.9), (-0.15, 0)), ("cloth 2", 0.7, 0.19, (0.04, 0.9), (0.15, 0)),
        ("cloth", 0.8, 0.12, (-0.2, 1.42), (-0.3, 0.85)), ("cloth", 0.8, 0.12, (0.2, 1.42), (0.3, 0.85)),
        ("cloth", 1, 0, (-0.2, 0.8), (0.2, 0.8), (0.26, 1.46), (-0.26, 1.46)), ("skin", 1, 0.15, (0, 1.62)),
        ("trunk", 0.6, 0, (-0.14, 1.66), (0.14, 1.66), (0.1, 1.79), (-0.1, 1.79))),
    "rider sideways": ("rider", ("cloth 2", 0.7, 0.2, (-0.18, 0.98), (0.15, 0.7)),
        ("cloth 2", 0.7, 0.16, (0.15, 0.72), (0, 0.3)), ("cloth", 1, 0.36, (-0.2, 0.95), (0.15, 1.5)),
        ("cloth", 0.8, 0.13, (0.12, 1.42), (0.45, 1.08)), ("skin", 1, 0.15, (0.26, 1.7)),
        ("helmet", 1, 0, (0.1, 1.74), (0.42, 1.74), (0.36, 1.88), (0.16, 1.88))),
    "bicycle": ("bicycle", ("black", 1, 0.11, (0, 0), (0, 0.7)), ("bicycle", 1, 0.1, (0, 0.5), (0, 1.05)),
        ("black", 1, 0.08, (-0.3, 1.02), (0.3, 1.02))),
    "bicycle sideways": ("bicycle", ("black", 1, 0.36, (-0.54, 0.36)), ("road", 1, 0.27, (-0.54, 0.36)),
        ("black", 1, 0.36, (0.54, 0.36)), ("road", 1, 0.27, (0.54, 0.36)), ("bicycle", 1, 0.07, (-0.54, 0.36), (-0.15, 0.85)),
        ("bicycle", 1, 0.07, (-0.15, 0.82), (0.38, 0.82)), ("bicycle", 1, 0.07, (0.38, 0.8), (-0.05, 0.36)),
        ("bicycle", 1, 0.07, (-0.05, 0.36), (-0.15, 0.85)), ("bicycle", 1, 0.07, (0.54, 0.36), (0.38, 1.05)),
        ("black", 1, 0.09, (-0.3, 0.92), (0, 0.92))),
    "motorcycle": ("motorcycle", ("black", 1, 0.2, (0, 0), (0, 0.7)), ("black", 1, 0.09, (-0.45, 1.1), (0.45, 1.1)),
        ("motorcycle", 1, 0, (-0.2, 0.4), (0.2, 0.4), (0.36, 0.9), (0.2, 1.2), (-0.2, 1.2), (-0.36, 0.9)),
        ("glow", 1, 0.13, (0, 0.9))),
    "motorcycle sideways": ("motorcycle", ("black", 1, 0.34, (-0.7, 0.34)), ("steel", 0.8, 0.15, (-0.7, 0.34)),
        ("black", 1, 0.34, (0.7, 0.34)), ("steel", 0.8, 0.15, (0.7, 0.34)), ("steel", 0.8, 0.09, (0.72, 0.33), (0.45, 1.15)),
        ("motorcycle", 1, 0, (-0.95, 0.8), (-0.6, 0.4), (0.3, 0.3), (0.6, 0.75), (0.4, 1.1), (0.05, 0.98), (-0.8, 0.95)),
        ("black", 1, 0, (-0.85, 0.98), (-0.1, 0.85), (0, 0.75), (-0.8, 0.85)), ("steel", 1.1, 0.1, (-0.8, 0.38), (0.1, 0.33))),
    "lamp": ("pole", ("pole", 1, 0.16, (0, 0), (0, 6.5)), ("pole", 1, 0.12, (0, 6.5), (1.8, 6.8)),
        ("pole", 1.3, 0.2, (1.4, 6.8), (2.2, 6.8))),
    "mast": ("pole", ("pole", 1, 0.2, (0, 0), (0, 5.5))),
    "post": ("pole", ("pole", 1, 0.12, (0, 0), (0, 2.6))),
    "signal": ("traffic light", ("signal", 1, 0, (-0.28, 2.6), (0.28, 2.6), (0.28, 3.95), (-0.28, 3.95)),
        ("black", 0.6, 0, (-0.21, 2.67), (0.21, 2.67), (0.21, 3.88), (-0.21, 3.88))),
    "sign 0": ("traffic sign", ("red", 1, 0.45, (0, 2.5)), ("white", 1, 0.3, (0, 2.5)),
        ("black", 1, 0.12, (-0.2, 2.5), (0.2, 2.5))),
    "sign 1": ("traffic sign", ("red", 1, 0.45, (0, 2.5)), ("white", 1, 0.16, (-0.28, 2.5), (0.28, 2.5))),
    "sign 2": ("traffic sign", ("blue", 1, 0.43, (0, 2.5)), ("white", 1, 0.14, (0, 2.25), (0, 2.75))),
    "sign 3": ("traffic sign", ("red", 1, 0, (-0.52, 2.1), (0.52, 2.1), (0, 3)),
        ("white", 1, 0, (-0.3, 2.22), (0.3, 2.22), (0, 2.74))),
    "sign 4": ("traffic sign", ("white", 1, 0, (0, 2), (0.5, 2.5), (0, 3), (-0.5, 2.5)),
        ("yellow", 1, 0, (0, 2.17), (0.33, 2.5), (0, 2.83), (-0.33, 2.5))),
    "sign 5": ("traffic sign", ("blue", 1, 0, (-0.9, 2.3), (0.9, 2.3), (0.9, 3.2), (-0.9, 3.2)),
        ("white", 1, 0.2, (-0.6, 2.75), (0.6, 2.75))),
    "bin": ("static", ("fence", 1, 0, (-0.3, 0), (0.3, 0), (0.33, 1), (-0.33, 1)),
        ("fence", 0.6, 0.1, (-0.35, 1), (0.35, 1))),
}  # fmt: skip
FIGURES["rider"] = ["rider"]  # a person lifted onto the saddle, a helmet for hair
for _part, _gain, _size, *_points in FIGURES["person"][1:]:
    _part, _points = (
        "helmet" if _part == "trunk" else _part,
        [(1.1 * s, 0.32 + 0.83 * t) for s, t in _points],
    )
    FIGURES["rider"].append((_part, _gain, _size, *_points))
CYCLES = {
    "bicycle": "bicycle",
    "cyclist": "bicycle",
    "motorcycle": "motorcycle",
    "motorcyclist": "motorcycle",
}


def figure(scene: Scene, name: str, x: float, z: float) -> None:
    """A person, a two-wheeler with or without its rider, or street furniture."""
    rng, panel, colours, layers = scene.rng, scene.metric(x, z), {}, [name]
    wide, tall = rng.choice((-1, 1)), rng.uniform(0.92, 1.12)
    if name == "person":
        wide, tall = wide * rng.uniform(0.75, 1.3), tall * rng.choice((1, 1, 1, 0.95, 0.7))
    elif name == "lamp":
        wide, layers = -math.copysign(1, x), [rng.choice(("lamp", "lamp", "mast"))]
    elif name in ("sign", "signal"):
        board = f"sign {rng.randrange(6)}" if name == "sign" else name
        layers = ["post", board]
    elif name in CYCLES:
        ridden = name.endswith("cyclist")
        chance = 0.55 if ridden else 0.7
        view = " sideways" if rng.random() < chance else ""
        layers = [CYCLES[name] + view] + ["rider" + view] * ridden
    if name == "person" or name in CYCLES:
        scene.cast(x - 0.5, x + 0.5 - scene.sun * 0.5, z - 0.3, z + 0.3)
    shapes = [(FIGURES[layer][0], shape) for layer in layers for shape in FIGURES[layer][1:]]
    for cls, shape in shapes:
        part, gain, size, *points = shape
        # "cloth 2": another piece of cloth
        colour = lit(colours.setdefault(part, scene.colour(part.split()[0])), gain)
        points = [(wide * s, tall * t) for s, t in points]
        if len(points) == 1:
            panel.disc(colour, *points[0], (abs(wide) * size, tall * size), cls)
        elif len(points) == 2:
            panel.bar(colour, *points, size, cls)
        else:
            panel.fill(colour, points, cls)
    if name == "signal":
        on = rng.randrange(3)
        for i, lamp in enumerate(("green", "yellow", "red")):
            panel.disc(
                scene.colour(lamp, 1.1 if i == on else 0.2),
                0,
                tall * (2.88 + 0.4 * i),
                (0.17, 0.17 * tall),
            )


# ----------------------------------------------------------------------------------------- vehicles


class Block(NamedTuple):
    """A part of a vehicle."""

    nose: float  # where it begins and ends, metres behind the foremost point
    tail: float
    low: float
    high: float
    inset: tuple  # metres by which its top is smaller: sides, nose, tail
    panes: int = 0  # windows in the flank
    glass: tuple = (0, 0)  # their lower and upper edge, share of the height
    paint: float = 1.0


VEHICLES = {  # width, blocks from low to high
    "car": (1.8, (Block(0, 4.3, 0.16, 0.88, (0.04, 0.15, 0.08)),
                  Block(0.95, 4.1, 0.88, 1.46, (0.2, 0.75, 0.45), 2, (0.1, 0.88)))),
    "van": (1.9, (Block(0, 5, 0.18, 1.1, (0.04, 0.2, 0)), Block(0.5, 5, 1.1, 2.1, (0.12, 0.8, 0.1), 3, (0.15, 0.8)))),
    "truck": (2.5, (Block(0, 8.5, 0.25, 0.95, (0, 0, 0), paint=0.3),
                    Block(0.1, 2.0, 0.6, 2.8, (0.08, 0.25, 0), 1, (0.5, 0.88), 0.8),
                    Block(2.4, 8.5, 0.95, 3.6, (0, 0, 0)))),
    "bus": (2.5, (Block(0, 11, 0.25, 3.1, (0.05, 0.12, 0.05), 7, (0.45, 0.85)),)),
    "train": (2.6, (Block(0, 11.5, 0.2, 3.4, (0.15, 0.9, 0), 6, (0.42, 0.78)),
                    Block(12, 24, 0.2, 3.4, (0.15, 0, 0.9), 6, (0.42, 0.78)))),
}  # fmt: skip


def vehicle(
    scene: Scene, kind: str, x: float, z: float, heading: int = 1, across: bool = False
) -> None:
    """A vehicle with its nearest point at z. `heading`: 1 drives away (or to the right), -1 towards
    us (or to the left)."""
    (width, blocks), cls = VEHICLES[kind], "car" if kind == "van" else kind
    length, colour = max(b.tail for b in blocks), scene.colour(cls)
    wide, deep = (length / 2, width) if across else (width / 2, length)
    scene.cast(
        x - wide - 0.2 - max(0, scene.sun), x + wide + 0.2 + max(0, -scene.sun), z - 0.2, z + deep
    )
    for rail in (-0.72, 0.72) if kind == "train" and not across else ():
        scene.ground(x + rail, x + rail + 0.1, NEAR, z, scene.colour("steel"))
    # chassis first, then the far parts
    for block in sorted(blocks, key=lambda b: (b.low > 0.5, -heading * b.nose)):
        side, first, last = block.inset if heading < 0 else (block.inset[0], *block.inset[:0:-1])
        a, b = block.nose, block.tail
        if heading > 0:
            a, b = length - b, length - a
        paint, ys = lit(colour, block.paint), (block.low, block.high)
        if across:
            inset, nose = (first, last, side, side), (x > scene.eye_x) == (heading < 0)
            flank, end = scene.box(
                (x - wide + a, x - wide + b), ys, (z, z + width), paint, cls, inset
            )
        else:
            inset, nose = (side, side, first, last), heading < 0
            end, flank = scene.box((x - wide, x + wide), ys, (z + a, z + b), paint, cls, inset)
        dress(scene, kind, block, paint, flank, end, nose)


def dress(scene: Scene, kind: str, block: Block, paint: tuple, flank, end, nose: bool) -> None:
    """Windows, wheels, lights and the like on the faces of a block (None: not seen); `nose`: the
    end is its front."""
    glass, black, (low, high) = scene.colour("screen"), scene.colour("black"), block.glass
    cls = "car" if kind == "van" else kind
    length, tall, large = block.tail - block.nose, block.high - block.low, kind in ("bus", "train")
    for panel in (flank, end) if large else ():
        if panel is not None:
            panel.rect(lit(paint, 0.6), 0, 0.14, 1, 0.25)
    if flank is not None:
        for i in range(block.panes):
            flank.rect(glass, (i + 0.1) / block.panes, low, (i + 0.92) / block.panes, high)
        for s in (0.17, 0.55) if large else ():  # doors
            flank.rect(lit(glass, 0.7), s, 0.05, s + 0.09, 0.85)
        radius = 0.5 if kind in ("truck", "bus") else 0.34
        for s in (0.18, 0.82) if block.low < 0.5 else ():  # wheels
            flank.disc(black, s, 0.05, (radius / length, radius / tall), cls)
            flank.disc(
                scene.colour("steel"), s, 0.05, (radius * 0.45 / length, radius * 0.45 / tall)
            )
    if end is None:
        return
    if block.panes and (nose or kind != "truck"):
        end.rect(glass, 0.09, low if nose else low + 0.1, 0.91, high)
    if large:  # destination
        end.rect(black, 0.2, 0.87, 0.8, 0.97)
        end.rect(scene.colour("yellow"), 0.3, 0.9, 0.7, 0.95)
    if kind == "truck" and not nose and block.low > 0.9:  # doors of the load
        end.rect(lit(paint, 0.6), 0.49, 0.03, 0.51, 0.97)
    if block.low < 0.5:
        light, base, rise = (
            scene.colour("glow" if nose else "rear"),
            *((0.08, 0.06) if tall > 2 else (0.55, 0.22)),
        )
        for s in (0.04, 0.78):
            end.rect(light, s, base, s + 0.18, base + rise)
            end.rect(black, s, -block.low / tall, s + 0.16, 0.08, cls)
        if tall < 2:  # number plate and bumper
            end.rect(scene.colour("white"), 0.38, 0.25, 0.62, 0.42)
            end.rect(lit(paint, 0.5), 0.02, 0.0, 0.98, 0.14)


# ------------------------------------------------------------------------------------------- layout

PLACES = {  # nearest and farthest distance, where, half width and length of the ground it takes
    "lamp": (8, 45, "kerb", 0.3, 0.5), "signal": (8, 24, "kerb", 0.3, 0.5), "sign": (8, 26, "kerb", 0.3, 0.5),
    "tree": (8, 50, "kerb", 0.3, 0.5), "bin": (8, 20, "kerb", 0.3, 0.5), "person": (7, 36, "walk", 0.25, 0.4),
    "bicycle": (6.5, 20, "walk", 0.8, 0.6), "motorcycle": (6.5, 20, "gutter", 0.8, 0.6), "cyclist": (8, 22, "lane", 0.8, 1),
    "motorcyclist": (8, 22, "lane", 0.8, 1), "parked": (6.5, 45, "gutter", 0.95, 5), "car": (9, 50, "lane", 1.2, 4.5),
    "truck": (13, 28, "lane", 1.4, 9), "bus": (14, 28, "lane", 1.4, 11), "train": (15, 30, "lane", 1.4, 24),
}  # fmt: skip


def place(scene: Scene, name: str) -> tuple | None:
    """One thing of the kind `name` at a free place: (z, painter, its arguments), or None if none
    was found."""
    rng, half, (near, far, where, wide, length) = scene.rng, scene.road, PLACES[name]
    for _ in range(6):
        side, z, across = rng.choice((-1, 1)), near * (far / near) ** rng.random(), False
        if name == "person" and rng.random() < 0.15:
            where = "lane"
        x = side * {"kerb": half + rng.uniform(0.3, 0.7), "walk": half + rng.uniform(0.6, max(0.8, scene.pavement - 0.4)),
                    "gutter": half - 1.05, "lane": half * rng.uniform(0.4, 0.6)}[where]  # fmt: skip
        # on the crossing street
        if name in VEHICLES and scene.junction < FAR and rng.random() < 0.35:
            across, z = True, scene.junction + rng.choice((1.5, 5))
            x = scene.eye_x + rng.uniform(-12, 12)
        half_x, deep = (length / 2, 2.6) if across else (wide, length)
        # it would stand on the crossing street
        off_kerb = not across and abs(x) > half and -1 < z - scene.junction < 9
        clash = any(
            abs(x - tx) < half_x + tw and tz < z + deep and z < tz + td
            for tx, tz, tw, td in scene.taken
        )
        if off_kerb or clash:
            continue
        scene.taken.append((x, z, half_x, deep))
        if name == "tree":
            return z, plant, x, z
        if name == "parked":
            return (
                z,
                vehicle,
                rng.choice(("car", "car", "car", "van")),
                x,
                z,
                side * rng.choice((1, 1, -1)),
            )
        if name in VEHICLES:
            return z, vehicle, name, x, z, rng.choice((-1, 1)) if across else side, across
        return z, figure, name, x, z
    return None


def own_car(scene: Scene) -> None:
    """The hood at the lower edge: ignored in training and scoring."""
    (width, height), top = scene.picture.size, scene.picture.height * scene.rng.uniform(0.90, 0.93)
    for shift, gain in ((0, 1.0), (4, 1.8), (10, 1.3)):
        curve = [
            (width * (i / 20), top + shift + height * 0.13 * abs(i / 10 - 1) ** 2.2)
            for i in range(21)
        ]
        scene.paint([*curve, (width, height), (0, height)], lit((26, 28, 32), gain), "ego vehicle")


def picture(
    name: str, seed: int, index: int, size: tuple[int, int], city: str
) -> tuple[np.ndarray, np.ndarray]:
    """Street number `index` of dataset `name`, in the style of `city`; `size` is (W,H).

    Gives the picture (H,W,3) uint8 and its Cityscapes label ids (H,W) uint8. Nothing else than the
    arguments matters.
    """
    style = f"{seed} {name} {city}"
    scene, things = (
        Scene(LOOKS[name], size, random.Random(f"{style} {index}"), random.Random(style)),
        [],
    )
    for thing, rate in LOOKS[
        name
    ].things.items():  # large and rare ones first, before the places are taken
        start = random.Random(f"{seed} {name} {thing}").random()
        evenly = math.floor((index + 1) * rate + start) - math.floor(index * rate + start)
        count = evenly if rate < 1 else int(rate * scene.rng.uniform(0.2, 1.8) + scene.rng.random())
        things += [place(scene, thing) for _ in range(count)]
    backdrop(scene)
    street_floor(scene)
    for layer in (plots(scene), [thing for thing in things if thing is not None]):
        for _, painter, *arguments in sorted(layer, key=lambda item: -item[0]):
            painter(scene, *arguments)
    if scene.rng.random() < scene.look.hood:
        own_car(scene)
    return develop(scene)


def develop(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """From the drawing to what a sensor gives: texture, shade, vignette, tint, blur and noise."""
    look, (width, height) = scene.look, scene.size
    rng = np.random.default_rng(scene.rng.getrandbits(64))
    ids = np.asarray(scene.labels)[1::SCALE, 1::SCALE].copy()
    image = np.asarray(scene.picture.resize(scene.size, Image.Resampling.BOX)).astype(np.float32)
    strength = np.full((256, 2), (0.02, 0.0), np.float32)
    for cls, pair in look.grain.items():
        strength[IDS[cls]] = pair
    small = Image.fromarray(rng.standard_normal((height // 4, width // 8), np.float32))
    coarse = np.asarray(small.resize(scene.size, Image.Resampling.BICUBIC))
    fine = rng.standard_normal((height, width), np.float32)
    shade = scene.shade.resize(scene.size, Image.Resampling.BOX).filter(
        ImageFilter.GaussianBlur(look.shadow[1])
    )
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    gain = 1 + strength[ids, 0] * coarse + strength[ids, 1] * fine
    gain *= np.asarray(shade, np.float32) / 255 * (1 - look.vignette * (x * x + y * y))
    image *= gain[..., None]
    grey = image.mean(2, keepdims=True)
    image = ((grey + look.saturation * (image - grey)) * scene.tint).clip(0, 255).astype(np.uint8)
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(scene.rng.uniform(*look.blur)))
    noisy = np.asarray(blurred) + look.noise * rng.standard_normal((height, width, 3), np.float32)
    return noisy.round().clip(0, 255).astype(np.uint8), ids


# -------------------------------------------------------------------------------------------- files


def write_png16(path: Path, channels: np.ndarray) -> None:
    """Writes (H,W,3) uint16 as a 16-bit RGB PNG, as SYNTHIA's labels are: Pillow can neither write
    nor read them."""
    height, width, _ = channels.shape
    rows = channels.astype(">u2").reshape(height, -1).view(np.uint8)
    # before each row its filter, 0: none
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)  # 16 bits, colour type 2: RGB
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")):
            file.write(
                struct.pack(">I", len(data))
                + kind
                + data
                + struct.pack(">I", zlib.crc32(kind + data))
            )


def _write_pictures(base: Path, seed: int, counts: dict[str, int]) -> None:
    """All pictures and labels, in the three layouts."""
    palette, synthia = np.zeros((256, 3), np.uint8), np.zeros(256, np.uint16)
    palette[[c.cityscapes_id for c in CLASSES]] = [c.colour for c in CLASSES]
    synthia[[c.cityscapes_id for c in CLASSES]] = [c.synthia_id or 0 for c in CLASSES]
    synthia[IDS["terrain"]] = 16  # SYNTHIA's own id, which the 16-class setting ignores
    for i in range(counts["gta5"]):
        size = (240, 136) if i % 5 == 3 else (256, 144)  # the real pictures have several sizes too
        image, ids = picture("gta5", seed, i, size, f"district {i // 8}")
        _save(base / f"gta5/images/{i + 1:05d}.png", image)
        _save(base / f"gta5/labels/{i + 1:05d}.png", ids, palette)
    for i in range(counts["synthia"]):
        image, ids = picture("synthia", seed, i, (256, 152), f"district {i // 8}")
        _save(base / f"synthia/RGB/{i:07d}.png", image)
        # stand for the instance ids
        runs = (np.diff(ids, axis=1, prepend=0) != 0).cumsum(1).astype(np.uint16)
        channels = np.stack([synthia[ids], runs, np.zeros_like(runs)], 2)
        write_png16(base / f"synthia/GT/LABELS/{i:07d}.png", channels)
    for split, cities in CITIES.items():
        for i in range(counts[split]):
            city = cities[i * len(cities) // counts[split]]
            image, ids = picture("cityscapes", seed, i, (256, 128), city)
            # from 0 in each city
            number = i - -(-cities.index(city) * counts[split] // len(cities))
            stem = f"{split}/{city}/{city}_{number:06d}_000019"
            _save(base / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png", image)
            _save(base / f"cityscapes/gtFine/{stem}_gtFine_labelIds.png", ids)


def _save(path: Path, array: np.ndarray, palette: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path, compress_level=3)


def write(root: str | Path, seed: int = 0, counts: dict[str, int] = FULL) -> Path:
    """Writes a new world below `root`, which must not exist yet or be an empty folder; gives the
    absolute path.

    `counts` says how many pictures of each kind (FULL, SMALL for tests). The files depend on the
    seed and the counts alone, bit for bit. All is written under a temporary name (`.NAME-...`)
    beside `root` and renamed when complete; a killed run leaves that hidden folder and nothing
    else. Raises InputError where something is in the way.
    """
    root = Path(root).absolute()
    if root.exists() and not _is_empty(root):
        raise InputError(
            f"{root}: is not an empty folder; the miniature world is never written over other files"
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise InputError(
            f"{root}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    try:
        _write_pictures(partial, seed, counts)
        (partial / MARKER).write_text(
            json.dumps({"version": VERSION, "seed": seed, "counts": counts}) + "\n"
        )
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.replace(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def is_toy(root: str | Path) -> bool:
    """Whether a data folder is the miniature world, by whatever name: every report of it says so."""
    return (Path(root) / MARKER).is_file()


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def ensure(root: str | Path, seed: int = 0, counts: dict[str, int] = FULL) -> Path:
    """The world below `root`, written on first use; gives the absolute path. Several processes may
    call it at once.

    Nothing that exists is ever changed. Raises InputError naming the folder to remove where `root`
    holds a world of another version, seed or size, a world with files missing, or something else.
    """
    root = Path(root).absolute()
    if not root.exists() or _is_empty(root):
        try:
            return write(root, seed, counts)
        except (OSError, InputError):  # if another process was faster, its world is checked below
            if not (root / MARKER).is_file():
                raise
    try:
        found = json.loads((root / MARKER).read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{root}: is no miniature world (no {MARKER}); choose a new or an empty folder"
        ) from None
    wanted = {"version": VERSION, "seed": seed, "counts": counts}
    if found != wanted:
        raise InputError(
            f"{root}: holds the miniature world {found}, not {wanted}; remove this folder and run again"
        )
    complete, files = 2 * sum(counts.values()), sum(1 for _ in root.rglob("*.png"))
    if files < complete:
        raise InputError(
            f"{root}: holds {files} of {complete} pictures and labels; remove this folder and run again"
        )
    return root


def main() -> int:
    """The command line: writes the world, or finds it complete."""
    parser = argparse.ArgumentParser(
        prog="python -m alda.toy", description="Write the miniature world (568 pictures)."
    )
    parser.add_argument(
        "dir", help="new or empty folder; a complete world of this seed is left as it is"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same files (default 0)"
    )
    options = parser.parse_args()
    try:
        print(f"miniature world: {ensure(options.dir, options.seed)}")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
