"""The pocket world: scenes of one cartoon figure in one place, drawn from nothing but a random generator.

A scene is a `Figure` (class, body colour, marks, garment) in a context. Captions name class, colour and context, all,
some or none of them; marks, garments and colours off the palette are drawn but never named, so a subject made of them
is something that the base model cannot be asked for in words.
"""

import colorsys
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

from dreambooth.pocket.backgrounds import CONTEXTS, paint
from dreambooth.pocket.figures import CLASSES, Outline

SIZE = 64  # pixels a side
SUPERSAMPLE = 4  # drawn at 256 and box-filtered down, for soft edges
OUTLINE = 0.05  # of figure space
DARK, LIGHT = (34, 30, 44), (250, 246, 232)

RGB = tuple[int, int, int]
COLOURS: dict[str, RGB] = {
    "red": (214, 42, 42),
    "orange": (244, 138, 32),
    "yellow": (246, 218, 60),
    "green": (52, 160, 66),
    "blue": (48, 98, 214),
    "purple": (130, 62, 184),
    "pink": (250, 150, 190),
    "brown": (122, 76, 44),
    "white": (244, 244, 244),
}
MARKS = ("spots", "stripes", "halves")
GARMENTS = ("scarf", "hat")
CAPTION_HEADS = ("a photo of a", "a picture of a", "a drawing of a", "a")
FILLERS = (
    "zup",
    "qio",
    "vex",
    "jax",
    "kuv",
    "wob",
    "fyx",
    "nyz",
)  # words without a meaning, so that one can be ignored


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
class Scene:
    """A figure in a place. ``colour`` is the palette name of the body, None when it is off the palette."""

    figure: Figure
    context: str
    colour: str | None
    seed: int  # of the background and the pose

    def caption(self, rng: Random) -> str:
        """A caption that names the class and, each three times in four, the colour and the context.

        One in ten has a word without a meaning: the base learns that a word it does not know changes nothing.
        """
        words = [rng.choice(CAPTION_HEADS)]
        if rng.random() < 0.1:
            words.append(rng.choice(FILLERS))
        if self.colour and rng.random() < 0.75:
            words.append(self.colour)
        words.append(self.figure.noun)
        if rng.random() < 0.75:
            words.append(CONTEXTS[self.context])
        return " ".join(words)

    def full_caption(self) -> str:
        """The caption that names all there is a word for."""
        colour = f"{self.colour} " if self.colour else ""
        return f"a {colour}{self.figure.noun} {CONTEXTS[self.context]}"


def random_colour(rng: Random) -> RGB:
    """Any vivid colour, most of them between the palette's names."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.25, 0.95), rng.uniform(0.5, 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


def _near(colour: RGB, rng: Random) -> RGB:
    """A colour that still deserves the name: each channel within 14 of 255."""
    return tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in colour)  # type: ignore[return-value]


@dataclass(frozen=True)
class Odds:
    """How often a random figure has a colour with a name, marks, and a garment."""

    named: float = 0.8
    marks: float = 0.35
    garment: float = 0.3


PLAIN, RICH = Odds(), Odds(named=0.5, marks=0.7, garment=0.65)


def random_figure(rng: Random, noun: str | None = None, colour: str | None = None, odds: Odds = PLAIN) -> Figure:
    """An individual; by the plain odds half of them have neither marks nor a garment."""
    body = _near(COLOURS[colour], rng) if colour else random_colour(rng)
    marks = rng.choice(MARKS) if rng.random() < odds.marks else None
    garment = rng.choice(GARMENTS) if rng.random() < odds.garment else None
    return Figure(
        noun or rng.choice(tuple(CLASSES)),
        body,
        marks,
        random_colour(rng),
        garment,
        (random_colour(rng), random_colour(rng)),
        rng.randrange(1 << 16),
    )


def random_scene(rng: Random, odds: Odds = PLAIN) -> Scene:
    """A scene for the base model's training; by the plain odds one figure in five has a colour without a name."""
    colour = rng.choice(tuple(COLOURS)) if rng.random() < odds.named else None
    return Scene(
        random_figure(rng, colour=colour, odds=odds), rng.choice(tuple(CONTEXTS)), colour, rng.randrange(1 << 31)
    )


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of SIZE x SIZE."""
    rng = Random(scene.seed)
    side = SIZE * SUPERSAMPLE
    image = Image.new("RGB", (side, side))
    paint(image, scene.context, rng)
    scale = side * rng.uniform(0.36, 0.44)
    pose = _Pose(
        side * rng.uniform(0.44, 0.56),
        side * rng.uniform(0.5, 0.58),
        scale * rng.choice((-1, 1)),
        scale,
    )
    _draw_figure(image, scene.figure, pose)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


@dataclass(frozen=True)
class _Pose:
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
    pose: _Pose,
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


def _draw_figure(image: Image.Image, figure: Figure, pose: _Pose) -> None:
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


def _coat(size: tuple[int, int], figure: Figure, pose: _Pose) -> Image.Image:
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


def _dress(pen: ImageDraw.ImageDraw, figure: Figure, outline: Outline, pose: _Pose) -> None:
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


def place(figure: Figure, context: str, seed: int) -> Scene:
    """A given individual in a given place (subjects, whose colours have no names)."""
    return Scene(replace(figure), context, None, seed)
