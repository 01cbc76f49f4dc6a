"""Sheets of panels, a round's picks on the photograph, a run's story. What does it look like?

    from alda.pictures import sheet
    sheet({"image": image, "prediction": prediction}).save("look.png")     # (3,H,W) uint8, (H,W) uint8

Pillow draws everything.
Axes: H rows, W columns. A panel is an RGB image (3,H,W) uint8, a label map (H,W) uint8 (class
colours), a bool map, or a float map (grey, stretched from its minimum to its maximum).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from alda.datasets import CLASSES, IGNORE, NUM_CLASSES, colourise, write_atomic

NOW, EARLIER = (255, 225, 0), (0, 190, 255)  # picks of this round, and of the rounds before
ROUNDS = ((255, 225, 0), (255, 140, 0), (230, 60, 60), (190, 60, 200), (90, 90, 255), (0, 190, 255))
TITLE, GAP, WIDTH = 18, 6, 330  # pixels: a title's height, between panels, of a small panel


def rgb(values: torch.Tensor) -> np.ndarray:
    """A panel as (H,W,3) uint8."""
    values = values.cpu()
    if values.ndim == 3:
        return values.permute(1, 2, 0).numpy()
    if values.dtype == torch.uint8:
        return colourise(values.numpy())
    values = values.float().nan_to_num(0, 0, 0)
    span = (values.max() - values.min()).clamp(min=1e-12)
    grey = ((values - values.min()) / span * 255).to(torch.uint8)
    return np.repeat(grey.numpy()[..., None], 3, axis=2)


def marked(image: torch.Tensor, masks: list[torch.Tensor], colours, size) -> torch.Tensor:
    """The image (3,H,W) uint8 enlarged to `size` (H, W), with masks (H,W) bool painted over it, the
    later over the earlier; a mark is at least three pixels wide, so that single pixels are seen."""
    picture = Image.fromarray(rgb(image)).resize((size[1], size[0]), Image.BICUBIC)
    picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    for mask, colour in zip(masks, colours, strict=False):
        marks = F.adaptive_max_pool2d(mask.cpu()[None, None].float(), size)
        marks = F.max_pool2d(marks, 3, stride=1, padding=1)[0, 0] * 0.85
        picture = picture * (1 - marks) + torch.tensor(colour).view(3, 1, 1) * marks
    return picture.round().to(torch.uint8)


def widened(labels: torch.Tensor) -> torch.Tensor:
    """Answers (H,W) uint8 for a small panel, of the same shape: each label grows over the unlabelled
    pixels beside it until it is some five pixels of the panel wide, so that single pixels are seen."""
    reach = int(2.5 * labels.shape[1] / WIDTH)
    grown = (labels.cpu() + 1)[None, None].float()  # no label is 0: 255 + 1 of uint8
    for side in ((reach, 0), (0, reach)):  # down, then across: one square window would cost more
        window = [2 * length + 1 for length in side]
        grown = F.max_pool2d(grown, window, stride=1, padding=side)
    return torch.where(labels.cpu() == IGNORE, grown[0, 0].to(torch.uint8) - 1, labels.cpu())


def fit(shape, width: int) -> tuple[int, int]:
    """(H, W) of a panel `width` pixels wide, of the proportions of `shape`."""
    return max(1, round(shape[-2] * width / shape[-1])), width


def sheet(panels: dict[str, torch.Tensor | Image.Image]) -> Image.Image:
    """Titled panels in two rows that fit a screen, the first one large over both, with the colours of
    the classes below."""
    first, *others = panels.items()
    height, width = fit(first[1].shape, WIDTH)
    columns = -(-len(others) // 2)
    large = 2 * height + TITLE + GAP, 2 * width + GAP
    total = (large[1] + columns * (width + GAP), large[0] + TITLE + 58)
    picture = Image.new("RGB", total, "white")
    place_panel(picture, first, (0, 0), large)
    for i, panel in enumerate(others):
        at = large[1] + GAP + i // 2 * (width + GAP), i % 2 * (height + TITLE + GAP)
        place_panel(picture, panel, at, (height, width))
    draw_legend(picture, large[0] + TITLE + 6)
    return picture


def place_panel(
    picture: Image.Image, panel: tuple, at: tuple[int, int], size: tuple[int, int]
) -> None:
    """Pastes a (title, panel) at a place (x, y) of the sheet, shown at `size` (H, W)."""
    title, values = panel
    draw = ImageDraw.Draw(picture)
    draw.text((at[0] + 2, at[1] + 1), title, fill="black", font=ImageFont.load_default(12))
    if not isinstance(values, Image.Image):
        values = Image.fromarray(rgb(values))
    values = values.resize((size[1], size[0]), Image.NEAREST)
    picture.paste(values, (at[0], at[1] + TITLE))


def draw_legend(picture: Image.Image, top: int) -> None:
    """The colours of the classes and of no label, in two lines from row `top` on."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    entries = [(c.name, c.colour) for c in CLASSES] + [("no label", (0, 0, 0))]
    step = picture.width // (len(entries) // 2)
    for i, (name, colour) in enumerate(entries):
        x, y = i % (len(entries) // 2) * step, top + i // (len(entries) // 2) * 22
        draw.rectangle((x + 2, y + 2, x + 14, y + 14), fill=colour)
        draw.text((x + 18, y + 1), name, fill="black", font=font)


def save_sheet(panels: dict, path: Path) -> None:
    """Writes a `sheet` of panels as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: sheet(panels).save(file, "PNG"))


def save_round(panels: dict, now: torch.Tensor, before: torch.Tensor, path: Path) -> None:
    """A query round's sheet: `panels` begin with "image"; the pixels asked `now` and `before` (H,W) bool
    are painted on it, enlarged."""
    image, *others = panels.items()
    size = fit(image[1].shape, 2 * WIDTH + GAP)
    title = "asked now (yellow), in earlier rounds (blue)"
    photograph = marked(image[1], [before, now], [EARLIER, NOW], size)
    save_sheet({title: photograph, **dict(others)}, path)


def bars(values: dict[str, int], size: tuple[int, int], wanted: float = 0.0) -> Image.Image:
    """A bar for each class, in its colour, of its share of all `values`, with a black line at the share
    `wanted` of each; `size` is (H, W). In two columns where the names would be crowded in one."""
    picture = Image.new("RGB", (size[1], size[0]), "white")
    draw, total = ImageDraw.Draw(picture), max(1, sum(values.values()))
    largest, font = max(1, wanted * total, *values.values()), ImageFont.load_default(11)
    columns = 1 if size[0] >= 15 * len(values) else 2
    rows, width = -(-len(values) // columns), size[1] // columns
    step, line = (size[0] - 4) / rows, (width - 122) * wanted * total / largest
    for i, (name, value) in enumerate(values.items()):
        x, y = i // rows * width, 2 + i % rows * step
        length = (width - 122) * value / largest
        colour = CLASSES[i].colour if len(values) == NUM_CLASSES else (90, 90, 90)
        draw.text((x + 2, y + step / 2), name, fill="black", font=font, anchor="lm")
        draw.rectangle((x + 76, y + 1, x + 76 + length, y + max(1, step - 3)), fill=colour)
        if wanted:
            draw.rectangle((x + 75 + line, y + 1, x + 76 + line, y + step - 3), fill="black")
        share, after = f"{100 * value / total:.1f} %", x + 80 + max(length, line)
        draw.text((after, y + step / 2), share, fill="black", font=font, anchor="lm")
    return picture


def curve(points: list[tuple[int, float]], size: tuple[int, int], marks=()) -> Image.Image:
    """A line through (step, share) points, with the first and last value; `marks` are the steps of the
    rounds, drawn as upright lines; `size` is (H, W)."""
    picture = Image.new("RGB", (size[1], size[0]), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    left, right, top, bottom = 36, size[1] - 44, 14, size[0] - 22
    last = max(1, *(step for step, _ in points)) if points else 1
    highest = max([0.01, *(value for _, value in points)]) * 1.1

    def place(step: int, value: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * value / highest

    draw.line((left, top, left, bottom, right, bottom), fill="black")
    for step in marks:
        x, _ = place(step, 0)
        draw.line((x, top, x, bottom), fill=(200, 200, 200))
    places = [place(*point) for point in points]
    draw.line([xy for point in places for xy in point], fill=(200, 0, 0), width=2)
    for (_, value), (x, y) in zip(points, places, strict=True):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(200, 0, 0))
        if value in (points[0][1], points[-1][1]):
            draw.text((x + 4, y - 14), f"{100 * value:.1f}", fill="black", font=font)
    draw.text((left, bottom + 4), f"steps 0 to {last}", fill="black", font=font)
    draw.text((2, 1), "mIoU %", fill="black", font=font)
    return picture


def save_story(
    image, masks: list, panels: dict, classes: dict, points: list, marks, path: Path
) -> None:
    """A run on one sheet: the photograph with the picks of each round, predictions before and after,
    the answers, labelled pixels by class, mIoU over the steps.

    `masks` (H,W) bool of each round, `panels` further maps, `classes` {name: pixels}, `points` (step,
    mIoU), `marks` the steps of the rounds.
    """
    size = fit(image.shape, WIDTH)
    title = "photograph"
    if masks:
        title = "picks by round: yellow the first, then orange, red, violet, blue"
    colours = [ROUNDS[min(i, len(ROUNDS) - 1)] for i in range(len(masks))]
    photograph = marked(image, masks, colours, fit(image.shape, 2 * WIDTH + GAP))
    story = {title: photograph, **panels}
    if sum(classes.values()):
        story["labelled pixels by class"] = bars(classes, size)
    if points:
        story["mIoU over the steps (grey: rounds)"] = curve(points, size, marks)
    save_sheet(story, path)


def class_picture(classes: dict[str, int], path: Path, balanced: bool) -> None:
    """Bars of the labelled pixels per class (shares) as a PNG; with `balanced` against CBDA's uniform
    target distribution."""
    picture = Image.new("RGB", (640, 340), "white")
    title = "labelled pixels by class" + balanced * "; black lines: the target distribution"
    ImageDraw.Draw(picture).text((2, 2), title, fill="black", font=ImageFont.load_default(12))
    picture.paste(bars(classes, (320, 640), balanced / NUM_CLASSES), (0, 20))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: picture.save(file, "PNG"))
