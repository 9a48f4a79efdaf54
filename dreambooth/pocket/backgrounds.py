"""The places of the pocket world: one painter a context, with a random horizon and a few random props."""

from random import Random

from PIL import Image, ImageDraw

CONTEXTS: dict[str, str] = {
    "grass": "on the grass",
    "snow": "in the snow",
    "beach": "on the beach",
    "night": "at night",
    "room": "in a room",
    "city": "in the city",
}


def paint(image: Image.Image, context: str, rng: Random) -> None:
    """Fill ``image`` with the context's scenery."""
    side = image.width
    _PAINTERS[context](ImageDraw.Draw(image), side, round(side * rng.uniform(0.5, 0.66)), rng)


def _dots(
    pen: ImageDraw.ImageDraw,
    rng: Random,
    count: int,
    box: tuple[int, int, int, int],
    radius: float,
    fill: tuple[int, int, int],
) -> None:
    for _ in range(count):
        x, y = rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3])
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _grass(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: Random) -> None:
    pen.rectangle((0, 0, side, horizon), fill=(150, 208, 246))
    pen.rectangle((0, horizon, side, side), fill=(110, 188, 78))
    x, y = rng.uniform(0.1, 0.7) * side, rng.uniform(0.06, 0.16) * side
    for offset in (0, 0.09, 0.18):
        pen.ellipse((x + offset * side, y, x + (offset + 0.16) * side, y + 0.11 * side), fill=(238, 246, 252))
    for _ in range(7):
        x, y = rng.uniform(0, side), rng.uniform(horizon + 0.06 * side, side)
        pen.polygon((x, y, x + 0.05 * side, y, x + 0.025 * side, y - 0.09 * side), fill=(66, 140, 50))


def _snow(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: Random) -> None:
    pen.rectangle((0, 0, side, side), fill=(176, 194, 214))
    x = rng.uniform(-0.2, 0.4) * side
    pen.ellipse((x - 0.3 * side, horizon - 0.06 * side, x + 0.7 * side, horizon + 0.4 * side), fill=(232, 238, 246))
    pen.rectangle((0, horizon + 0.03 * side, side, side), fill=(242, 246, 252))
    _dots(pen, rng, 12, (0, 0, side, horizon), 0.022 * side, (252, 253, 255))


def _beach(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: Random) -> None:
    pen.rectangle((0, 0, side, horizon), fill=(142, 214, 238))
    pen.rectangle((0, horizon - 0.16 * side, side, horizon), fill=(36, 130, 190))
    pen.rectangle((0, horizon, side, side), fill=(240, 214, 148))
    x = rng.choice((0.06, 0.74)) * side + rng.uniform(-0.03, 0.03) * side
    pen.ellipse((x, 0.05 * side, x + 0.2 * side, 0.25 * side), fill=(255, 232, 104))


def _night(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: Random) -> None:
    pen.rectangle((0, 0, side, horizon), fill=(22, 26, 66))
    pen.rectangle((0, horizon, side, side), fill=(38, 46, 62))
    _dots(pen, rng, 9, (0, 0, side, horizon), 0.014 * side, (240, 240, 200))
    x = rng.choice((0.08, 0.74)) * side + rng.uniform(-0.03, 0.03) * side
    pen.ellipse((x, 0.06 * side, x + 0.18 * side, 0.24 * side), fill=(244, 240, 208))
    pen.ellipse((x + 0.06 * side, 0.04 * side, x + 0.22 * side, 0.2 * side), fill=(22, 26, 66))


def _room(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: Random) -> None:
    floor = max(horizon, round(0.62 * side))
    pen.rectangle((0, 0, side, floor), fill=(224, 200, 186))
    pen.rectangle((0, floor, side, side), fill=(160, 106, 74))
    pen.rectangle((0, floor, side, floor + 0.03 * side), fill=(112, 70, 48))
    x = rng.choice((0.06, 0.66)) * side + rng.uniform(-0.03, 0.03) * side
    pen.rectangle((x, 0.08 * side, x + 0.28 * side, 0.38 * side), fill=(250, 250, 244))
    pen.rectangle((x + 0.03 * side, 0.11 * side, x + 0.25 * side, 0.35 * side), fill=(120, 180, 216))
    pen.rectangle((x + 0.125 * side, 0.11 * side, x + 0.155 * side, 0.35 * side), fill=(250, 250, 244))


def _city(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: Random) -> None:
    pen.rectangle((0, 0, side, side), fill=(206, 206, 200))
    x = -rng.uniform(0, 0.12) * side
    while x < side:
        width, roof = rng.uniform(0.16, 0.24) * side, rng.uniform(0.06, 0.34) * side
        pen.rectangle(
            (x, roof, x + width, horizon), fill=rng.choice(((110, 112, 124), (140, 120, 116), (92, 104, 118)))
        )
        for row in range(int((horizon - roof) / (0.1 * side))):
            top = roof + 0.03 * side + row * 0.1 * side
            pen.rectangle((x + 0.03 * side, top, x + width - 0.03 * side, top + 0.04 * side), fill=(236, 222, 150))
        x += width + 0.02 * side
    pen.rectangle((0, horizon, side, side), fill=(84, 86, 92))
    for start in range(-1, 4):
        left = (start * 0.3 + rng.uniform(0, 0.02)) * side
        pen.rectangle((left, 0.92 * side, left + 0.16 * side, 0.95 * side), fill=(226, 226, 214))


_PAINTERS = {"grass": _grass, "snow": _snow, "beach": _beach, "night": _night, "room": _room, "city": _city}
