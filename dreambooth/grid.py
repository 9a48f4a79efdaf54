"""Labelled grids of pictures, for people to look at."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE, LABEL_WIDTH, GAP, FONT_SIZE = 160, 200, 6, 15


def labelled_grid(rows: Sequence[Sequence[Image.Image | Path]], labels: list[str]) -> Image.Image:
    """One row of equally large pictures, or files of them, a label, the label at its left.

    One file is open at a time: PIL keeps each open until its pixels are read. Small pictures are enlarged by a whole
    factor, pixel by pixel, so that what is seen is what was drawn.
    """
    width, height = _pixels(rows[0][0]).size
    factor = -(-LEAST_SIDE // min(width, height)) if min(width, height) < LEAST_SIDE else 1
    width, height = width * factor, height * factor
    columns = max(len(row) for row in rows)
    size = (LABEL_WIDTH + columns * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    letters = int((LABEL_WIDTH - 2 * GAP) / font.getlength("n"))
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = GAP + number * (height + GAP)
        lines = textwrap.wrap(label, letters)[: height // (FONT_SIZE + 4)]
        pen.multiline_text((GAP, top), "\n".join(lines), fill="black", font=font)
        for column, picture in enumerate(row):
            enlarged = _pixels(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (LABEL_WIDTH + GAP + column * (width + GAP), top))
    return sheet


def _pixels(picture: Image.Image | Path) -> Image.Image:
    """The picture, or the one that a file holds, which is closed."""
    if isinstance(picture, Image.Image):
        return picture
    with Image.open(picture) as file:
        file.load()
    return file
