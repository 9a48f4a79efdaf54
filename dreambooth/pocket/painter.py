"""The painter of one individual: outline, coat, marks and garment, in the pose that it is given."""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from dreambooth.pocket.figures import CLASSES, Outline

RGB = tuple[int, int, int]
OUTLINE = 0.05  # of figure space
DARK, LIGHT = (34, 30, 44), (250, 246, 232)


@dataclass(frozen=True)
class Figure:
    """One individual: everything that stays when it walks into another scene."""

    noun: str
    body: RGB
    marks: str | None = None
    marks_colour: RGB = DARK
    garment: str | None = None
    garment_colours: tuple[RGB, RGB] = (DARK, LIGHT)
    layout: int = 0  # seed of where the spots lie


@dataclass(frozen=True)
class Pose:
    """Where a figure stands, in pixels: its middle, and the scale of each axis (negative x: it looks the other way)."""

    x: float
    y: float
    sx: float
    sy: float

    def points(self, numbers: tuple[float, ...]) -> list[tuple[float, float]]:
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return [(self.x + u * self.sx, self.y + v * self.sy) for u, v in pairs]

    def box(self, x: float, y: float, rx: float, ry: float) -> list[float]:
        cx, cy = self.x + x * self.sx, self.y + y * self.sy
        rx, ry = rx * abs(self.sx), ry * self.sy
        return [cx - rx, cy - ry, cx + rx, cy + ry]


def _primitive(
    pen: ImageDraw.ImageDraw,
    pose: Pose,
    kind: str,
    numbers: tuple[float, ...],
    fill: tuple[int, ...] | int,
    grow: float,
) -> None:
    if kind == "ellipse":
        x, y, rx, ry = numbers
        pen.ellipse(pose.box(x, y, rx + grow, ry + grow), fill=fill)
        return
    points = pose.points(numbers)
    pen.polygon(points, fill=fill)
    if grow:
        pen.line([*points, points[0], points[1]], fill=fill, width=round(2 * grow * pose.sy), joint="curve")


def draw_figure(image: Image.Image, figure: Figure, pose: Pose) -> None:
    """Paint an individual over what the picture shows."""
    outline = CLASSES[figure.noun]
    before = image.copy() if any(role == "hole" for role, *_ in outline.parts) else image
    pen = ImageDraw.Draw(image)
    for role, kind, numbers in outline.parts:
        if role != "hole":
            _primitive(pen, pose, kind, numbers, DARK, OUTLINE)
    coat = _coat(image.size, figure, pose)
    shade = tuple(round(c * 0.72) for c in figure.body)
    for role, kind, numbers in outline.parts:
        if role in ("body", "hole"):
            mask = Image.new("L", image.size)
            _primitive(ImageDraw.Draw(mask), pose, kind, numbers, 255, 0)
            image.paste(coat if role == "body" else before, mask=mask)
        else:
            _primitive(pen, pose, kind, numbers, {"shade": shade, "dark": DARK, "light": LIGHT}[role], 0)
    _dress(pen, figure, outline, pose)


def _coat(size: tuple[int, int], figure: Figure, pose: Pose) -> Image.Image:
    """Body colour and marks over the whole canvas; the body's parts are cut out of it."""
    coat = Image.new("RGB", size, figure.body)
    pen = ImageDraw.Draw(coat)
    if figure.marks == "spots":
        rng = Random(figure.layout)
        for row in range(5):
            for column in range(5):
                x = -0.9 + 0.45 * column + rng.uniform(-0.1, 0.1) + 0.2 * (row % 2)
                pen.ellipse(
                    pose.box(x, -0.8 + 0.4 * row + rng.uniform(-0.06, 0.06), 0.12, 0.12), fill=figure.marks_colour
                )
    elif figure.marks == "stripes":
        for column in range(6):
            x = -1.0 + 0.4 * column
            pen.polygon(pose.points((x, -1.1, x + 0.17, -1.1, x + 0.17, 1.1, x, 1.1)), fill=figure.marks_colour)
    elif figure.marks == "halves":
        pen.polygon(pose.points((-1.1, 0.16, 1.1, 0.16, 1.1, 1.1, -1.1, 1.1)), fill=figure.marks_colour)
    return coat


def _dress(pen: ImageDraw.ImageDraw, figure: Figure, outline: Outline, pose: Pose) -> None:
    first, second = figure.garment_colours
    if figure.garment == "scarf":
        x, y, half = outline.neck
        _primitive(
            pen,
            pose,
            "poly",
            (x - half, y - 0.13, x + half, y - 0.13, x + half, y + 0.13, x - half, y + 0.13),
            DARK,
            OUTLINE,
        )
        step = half / 2
        for stripe in range(4):
            left = x - half + stripe * step
            corners = (left, y - 0.13, left + step, y - 0.13, left + step, y + 0.13, left, y + 0.13)
            pen.polygon(pose.points(corners), fill=(first, second)[stripe % 2])
    elif figure.garment == "hat":
        x, y, half = outline.top
        brim = (x - half, y - 0.04, x + half, y - 0.04, x + half, y + 0.1, x - half, y + 0.1)
        cone = (x - half * 0.8, y - 0.02, x + half * 0.8, y - 0.02, x, y - 0.5)
        for part in (cone, brim):
            _primitive(pen, pose, "poly", part, DARK, OUTLINE)
        pen.polygon(pose.points(cone), fill=first)
        pen.polygon(pose.points(brim), fill=second)
