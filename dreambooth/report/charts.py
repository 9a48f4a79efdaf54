"""Line charts as the numbers that an inline SVG is drawn from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

import numpy as np

SIZE, WIDE = (460, 250), (620, 290)
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 14, 26  # room for the numbers at the axes
MOST_POINTS = 240
Value = float | None


class Line(NamedTuple):
    """One curve: its name in the legend, the style class, its points, and how it is drawn."""

    name: str
    style: str
    x: Sequence[Value]
    y: Sequence[Value]
    dots: bool = False
    faint: bool = False  # behind the others, and not in the legend


class Tick(NamedTuple):
    """A mark at an axis: its place in the SVG and its text."""

    at: float
    text: str


@dataclass
class Curve:
    """A line in coordinates of the SVG."""

    name: str
    style: str
    path: str
    dots: list[tuple[float, float]]
    faint: bool


@dataclass
class Chart:
    """What the template draws; ``described`` says in words what a reader would see."""

    key: str
    title: str
    described: str
    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[tuple[float, str]] = field(default_factory=list)  # upright lines, and what they mean
    levels: list[tuple[float, str]] = field(default_factory=list)  # level lines, and what they mean
    box: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, right, bottom of where the curves are
    size: tuple[int, int] = SIZE


def chart(
    key: str,
    title: str,
    lines: Sequence[Line],
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    size: tuple[int, int] = SIZE,
) -> Chart | None:
    """A chart over steps; None when no line has two points. ``marks`` are steps, ``levels`` values, each named."""
    lines = [line for line in lines if len(_defined(line)) > 1]
    if not lines:
        return None
    points = [point for line in lines for point in _defined(line)]
    tidy = [point for line in lines if not line.faint for point in _defined(line)] or points
    xs = min(x for x, _ in points), max(x for x, _ in points)
    xs = (0.0 if 0 < xs[0] <= 0.05 * xs[1] else xs[0]), xs[1]  # a run begins at 0, its first loss is that of step 1
    ys = _padded([y for _, y in tidy] + [value for value, _ in levels])

    box = (LEFT, TOP, size[0] - RIGHT, size[1] - BOTTOM)

    def place(x: float, y: float) -> tuple[float, float]:
        return round(_map(x, xs, box[0], box[2]), 1), round(_map(y, ys, box[3], box[1]), 1)

    return Chart(
        key=key,
        title=title,
        described="; ".join(_described(line) for line in lines if not line.faint),
        curves=[_curve(line, place) for line in lines],
        x_ticks=[Tick(place(at, ys[0])[0], text) for at, text in ticks(*xs, 5, least=1)],
        y_ticks=[Tick(place(xs[0], at)[1], text) for at, text in ticks(*ys, 6)],
        marks=[(place(at, ys[0])[0], name) for at, name in marks if xs[0] <= at <= xs[1]],
        levels=[(place(xs[0], at)[1], name) for at, name in levels],
        box=box,
        size=size,
    )


def smooth(values: Sequence[Value], window: int | None = None) -> list[Value]:
    """The centred moving mean over ``window`` values (default: a twentieth of them), gaps left out of it."""
    if not values:
        return []
    y = np.array([math.nan if value is None else value for value in values], dtype=float)
    window = window or min(max(1, len(y) // 20), 400)
    good, kernel = np.isfinite(y), np.ones(window)
    total = np.convolve(np.where(good, y, 0.0), kernel, "same")[: len(y)]
    known = np.convolve(good.astype(float), kernel, "same")[: len(y)]
    return [float(a / b) if b > 0.5 else None for a, b in zip(total, known, strict=True)]


def thinned(x: Sequence[Value], y: Sequence[Value], most: int = MOST_POINTS) -> tuple[list[Value], list[Value]]:
    """At most ``most`` points, each the mean of its neighbours, so that a page does not grow with the steps."""
    if len(x) <= most:
        return list(x), list(y)
    parts = np.array_split(np.arange(len(x)), most)
    places = [_mean([x[i] for i in part]) for part in parts]
    return [x[0], *places[1:-1], x[-1]], [_mean([y[i] for i in part]) for part in parts]


def ticks(low: float, high: float, about: int, least: float = 0.0) -> list[tuple[float, str]]:
    """Round numbers within [low, high], about so many, at least ``least`` apart, and their text."""
    step = 10.0 ** math.floor(math.log10((high - low) / about)) if high > low else 1.0
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= about), 10)
    step = max(step, least)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    places = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(at, f"{at:.{digits}f}".replace("-", "−")) for at in places]


def _defined(line: Line) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(line.x, line.y, strict=True) if _finite(x) and _finite(y)]


def _finite(value: Value) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[Value]) -> Value:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _map(value: float, bounds: tuple[float, float], start: float, end: float) -> float:
    low, high = bounds
    return start if high == low else start + (value - low) / (high - low) * (end - start)


def _curve(line: Line, place: Callable[[float, float], tuple[float, float]]) -> Curve:
    """The path of a line, broken where a value is missing."""
    path, dots, pen = [], [], "M"
    for x, y in zip(line.x, line.y, strict=True):
        if not (_finite(x) and _finite(y)):
            pen = "M"
            continue
        left, top = place(x, y)
        path.append(f"{pen}{left:g} {top:g}")
        dots.append((left, top))
        pen = "L"
    return Curve(line.name, line.style, "".join(path), dots if line.dots and len(dots) <= 40 else [], line.faint)


def _described(line: Line) -> str:
    (first, begin), (last, end) = (_defined(line)[place] for place in (0, -1))
    return f"{line.name} from {begin:.3g} at step {first:.0f} to {end:.3g} at step {last:.0f}"
