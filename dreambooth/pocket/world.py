"""The pocket world: scenes of one cartoon figure in one place, drawn from nothing but a random generator.

A scene is a `Figure` (class, body colour, marks, garment) in a context. Captions name class, colour and context, all,
some or none of them; marks, garments and colours off the palette are drawn but never named, so a subject made of them
is something that the base model cannot be asked for in words.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from PIL import Image

from dreambooth.pocket.backgrounds import CONTEXTS, paint
from dreambooth.pocket.figures import CLASSES
from dreambooth.pocket.painter import RGB, Figure, Pose, draw_figure

SIZE = 64  # pixels a side
SUPERSAMPLE = 4  # drawn at 256 and box-filtered down, for soft edges
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
    """How often a random figure has a colour with a name, marks, and a garment, and where it is seen.

    ``places`` gives the weights of ``CONTEXTS`` for a class; None: all are as likely.
    """

    named: float = 0.8
    marks: float = 0.35
    garment: float = 0.3
    places: Callable[[str], Sequence[float]] | None = None


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
    figure, places = random_figure(rng, colour=colour, odds=odds), tuple(CONTEXTS)
    (where,) = rng.choices(places, odds.places(figure.noun)) if odds.places else (rng.choice(places),)
    return Scene(figure, where, colour, rng.randrange(1 << 31))


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of SIZE x SIZE."""
    rng = Random(scene.seed)
    side = SIZE * SUPERSAMPLE
    image = Image.new("RGB", (side, side))
    paint(image, scene.context, rng)
    scale = side * rng.uniform(0.36, 0.44)
    pose = Pose(
        side * rng.uniform(0.44, 0.56),
        side * rng.uniform(0.5, 0.58),
        scale * rng.choice((-1, 1)),
        scale,
    )
    draw_figure(image, scene.figure, pose)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def place(figure: Figure, context: str, seed: int) -> Scene:
    """A given individual in a given place (subjects, whose colours have no names)."""
    return Scene(replace(figure), context, None, seed)
