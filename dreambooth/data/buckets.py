"""Aspect-ratio buckets: the shapes in which photos are learned from, all of about one area."""

from collections.abc import Sequence
from math import log
from pathlib import Path

from dreambooth.data.views import Shape, sides
from dreambooth.files import open_picture


def bucket_shapes(resolution: int, multiple: int, ratio: float) -> list[Shape]:
    """All shapes of at most ``resolution``² pixels whose sides are multiples of ``multiple``, the widest last.

    To each side belongs the largest other one; the long side is at most ``ratio`` times the short one.
    """
    area = resolution**2
    pairs = [
        (side, area // side // multiple * multiple) for side in range(multiple, int(area / multiple) + 1, multiple)
    ]
    found = {pair for a, b in pairs if b and max(a, b) <= ratio * min(a, b) for pair in ((a, b), (b, a))}
    return [width if width == height else (width, height) for width, height in sorted(found)]


def nearest_shape(size: tuple[int, int], shapes: Sequence[Shape]) -> Shape:
    """The shape whose ratio of sides is nearest to that of ``size``, by its logarithm; of equals the larger one."""

    def distance(shape: Shape) -> tuple[float, int]:
        width, height = sides(shape)
        return round(abs(log(width / height) - log(size[0] / size[1])), 9), -width * height

    return min(shapes, key=distance)


def pools(paths: Sequence[Path], shapes: Sequence[Shape]) -> dict[Shape, list[Path]]:
    """The photos by the shape that is nearest to them, in the order of ``shapes``; without the shapes of none."""
    if len(shapes) == 1:
        return {shapes[0]: list(paths)}
    nearest = {path: nearest_shape(open_picture(path).size, shapes) for path in paths}
    found = {shape: [path for path in paths if nearest[path] == shape] for shape in shapes}
    return {shape: those for shape, those in found.items() if those}
