"""The ten-stroke cartoons of the pocket world: each class is a list of primitives in figure space.

Figure space is x right, y down, both about [-1, 1]; the figure looks to the right. A primitive is
``(role, kind, numbers)``; roles are ``body`` (takes the body colour and the marks), ``shade`` (a darker body colour),
``dark`` and ``light`` (eyes, wheels, windows). ``neck`` and ``top`` say where a scarf and a hat sit:
(x, y, half width, tilt).
"""

from typing import NamedTuple

Primitive = tuple[str, str, tuple[float, ...]]


class Outline(NamedTuple):
    """What a class looks like."""

    parts: tuple[Primitive, ...]
    neck: tuple[float, float, float]
    top: tuple[float, float, float]


def _ellipse(role: str, x: float, y: float, rx: float, ry: float) -> Primitive:
    return role, "ellipse", (x, y, rx, ry)


def _poly(role: str, *numbers: float) -> Primitive:
    return role, "poly", numbers


DOG = Outline(
    (
        _poly("body", -0.72, 0.02, -1.0, -0.42, -0.86, -0.46, -0.52, -0.08),  # tail
        _poly("body", -0.66, 0.2, -0.4, 0.2, -0.42, 0.92, -0.66, 0.92),  # hind leg
        _poly("body", 0.1, 0.2, 0.36, 0.2, 0.36, 0.92, 0.12, 0.92),  # fore leg
        _ellipse("body", -0.16, 0.14, 0.62, 0.36),
        _poly("body", 0.1, 0.1, 0.2, -0.5, 0.6, -0.4, 0.44, 0.2),  # neck
        _ellipse("body", 0.48, -0.44, 0.36, 0.32),
        _ellipse("body", 0.8, -0.34, 0.22, 0.15),  # snout
        _ellipse("shade", 0.24, -0.4, 0.15, 0.34),  # hanging ear
        _ellipse("dark", 0.96, -0.4, 0.08, 0.07),
        _ellipse("dark", 0.58, -0.52, 0.065, 0.075),
    ),
    neck=(0.34, -0.08, 0.3),
    top=(0.46, -0.72, 0.3),
)

CAT = Outline(
    (
        _poly("body", -0.3, 0.88, -0.8, 0.8, -0.98, 0.36, -0.84, 0.3, -0.68, 0.62, -0.3, 0.66),  # tail
        _ellipse("body", 0.0, 0.46, 0.46, 0.5),
        _poly("body", -0.44, -0.3, -0.5, -0.96, -0.08, -0.6),  # ears
        _poly("body", 0.44, -0.3, 0.5, -0.96, 0.08, -0.6),
        _ellipse("body", 0.0, -0.3, 0.5, 0.42),
        _ellipse("light", -0.2, -0.34, 0.12, 0.13),
        _ellipse("light", 0.2, -0.34, 0.12, 0.13),
        _ellipse("dark", -0.18, -0.34, 0.06, 0.1),
        _ellipse("dark", 0.22, -0.34, 0.06, 0.1),
        _poly("dark", -0.08, -0.14, 0.08, -0.14, 0.0, -0.04),
    ),
    neck=(0.0, 0.12, 0.36),
    top=(0.0, -0.7, 0.3),
)

BIRD = Outline(
    (
        _poly("body", -0.5, 0.0, -1.0, -0.3, -0.96, 0.16, -0.5, 0.3),  # tail
        _poly("dark", -0.1, 0.5, -0.02, 0.5, -0.02, 0.94, -0.1, 0.94),
        _poly("dark", 0.14, 0.5, 0.22, 0.5, 0.22, 0.94, 0.14, 0.94),
        _ellipse("body", 0.0, 0.14, 0.6, 0.46),
        _ellipse("body", 0.42, -0.44, 0.34, 0.32),
        _poly("light", 0.7, -0.56, 1.04, -0.4, 0.7, -0.28),  # beak
        _ellipse("shade", -0.14, 0.12, 0.34, 0.2),  # wing
        _ellipse("dark", 0.52, -0.5, 0.065, 0.075),
    ),
    neck=(0.3, -0.12, 0.34),
    top=(0.4, -0.72, 0.28),
)

FISH = Outline(
    (
        _poly("body", -0.44, 0.0, -1.0, -0.5, -0.9, 0.0, -1.0, 0.5),  # tail fin
        _poly("shade", -0.2, -0.4, 0.06, -0.84, 0.34, -0.4),  # back fin
        _poly("shade", -0.1, 0.4, 0.02, 0.76, 0.26, 0.4),
        _ellipse("body", 0.16, 0.0, 0.78, 0.5),
        _ellipse("light", 0.6, -0.14, 0.12, 0.13),
        _ellipse("dark", 0.63, -0.14, 0.06, 0.08),
        _poly("dark", 0.72, 0.14, 0.94, 0.1, 0.74, 0.2),
    ),
    neck=(0.28, 0.0, 0.46),
    top=(0.3, -0.5, 0.26),
)

TEAPOT = Outline(
    (
        _poly("body", 0.5, 0.3, 1.0, -0.34, 0.86, -0.42, 0.4, -0.1),  # spout
        _ellipse("shade", -0.66, 0.08, 0.36, 0.36),  # handle: a ring, its hole drawn below
        _ellipse("hole", -0.7, 0.08, 0.2, 0.22),
        _ellipse("body", 0.0, 0.2, 0.64, 0.54),
        _poly("shade", -0.36, -0.26, 0.36, -0.26, 0.24, -0.46, -0.24, -0.46),  # lid
        _ellipse("shade", 0.0, -0.54, 0.11, 0.11),
        _poly("shade", -0.4, 0.66, 0.4, 0.66, 0.46, 0.8, -0.46, 0.8),
    ),
    neck=(0.0, -0.16, 0.54),
    top=(0.0, -0.56, 0.28),
)

BACKPACK = Outline(
    (
        _poly("dark", -0.2, -0.6, -0.2, -0.94, 0.2, -0.94, 0.2, -0.6, 0.1, -0.6, 0.1, -0.82, -0.1, -0.82, -0.1, -0.6),
        _ellipse("shade", -0.6, 0.4, 0.2, 0.36),
        _ellipse("shade", 0.6, 0.4, 0.2, 0.36),
        _ellipse("body", 0.0, -0.3, 0.56, 0.46),
        _poly("body", -0.56, -0.3, 0.56, -0.3, 0.6, 0.86, -0.6, 0.86),
        _poly("shade", -0.38, 0.24, 0.38, 0.24, 0.38, 0.7, -0.38, 0.7),  # pocket
        _poly("light", -0.3, 0.32, 0.3, 0.32, 0.3, 0.4, -0.3, 0.4),
    ),
    neck=(0.0, -0.02, 0.58),
    top=(0.0, -0.7, 0.3),
)

CAR = Outline(
    (
        _poly("body", -0.56, 0.04, -0.36, -0.46, 0.28, -0.46, 0.56, 0.04),  # cabin
        _poly("body", -0.96, 0.0, 0.86, 0.0, 1.0, 0.16, 1.0, 0.5, -0.96, 0.5),
        _poly("light", -0.4, 0.0, -0.26, -0.34, -0.06, -0.34, -0.06, 0.0),
        _poly("light", 0.04, 0.0, 0.04, -0.34, 0.22, -0.34, 0.4, 0.0),
        _ellipse("dark", -0.54, 0.52, 0.24, 0.24),
        _ellipse("dark", 0.56, 0.52, 0.24, 0.24),
        _ellipse("light", -0.54, 0.52, 0.1, 0.1),
        _ellipse("light", 0.56, 0.52, 0.1, 0.1),
        _ellipse("light", 0.92, 0.18, 0.08, 0.08),
    ),
    neck=(0.0, 0.14, 0.9),
    top=(-0.04, -0.44, 0.28),
)

ROBOT = Outline(
    (
        _poly("dark", -0.04, -0.6, 0.04, -0.6, 0.04, -0.96, -0.04, -0.96),  # aerial
        _poly("shade", -0.86, 0.0, -0.62, -0.04, -0.62, 0.5, -0.86, 0.5),  # arms
        _poly("shade", 0.86, 0.0, 0.62, -0.04, 0.62, 0.5, 0.86, 0.5),
        _poly("shade", -0.4, 0.5, -0.12, 0.5, -0.12, 0.94, -0.4, 0.94),
        _poly("shade", 0.4, 0.5, 0.12, 0.5, 0.12, 0.94, 0.4, 0.94),
        _poly("body", -0.54, -0.06, 0.54, -0.06, 0.54, 0.64, -0.54, 0.64),
        _poly("body", -0.42, -0.74, 0.42, -0.74, 0.42, -0.16, -0.42, -0.16),
        _ellipse("light", -0.18, -0.48, 0.13, 0.13),
        _ellipse("light", 0.18, -0.48, 0.13, 0.13),
        _ellipse("dark", -0.16, -0.48, 0.06, 0.07),
        _ellipse("dark", 0.2, -0.48, 0.06, 0.07),
        _poly("dark", -0.2, -0.28, 0.2, -0.28, 0.2, -0.22, -0.2, -0.22),
    ),
    neck=(0.0, -0.1, 0.44),
    top=(0.0, -0.74, 0.28),
)

CLASSES: dict[str, Outline] = {
    "dog": DOG,
    "cat": CAT,
    "bird": BIRD,
    "fish": FISH,
    "teapot": TEAPOT,
    "backpack": BACKPACK,
    "car": CAR,
    "robot": ROBOT,
}
