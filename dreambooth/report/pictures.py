"""Pictures inside the page, as data URIs, all of them together within a budget."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth.files import open_picture

BUDGET = 3_700_000  # characters of all data URIs: with its text and curves a page stays below 5 MB
SMALL = 128  # pixels: pictures up to here keep their size, lossless at the first level, and are enlarged pixel by pixel
LEVELS = ((1.0, 82), (0.75, 78), (0.55, 72), (0.4, 62), (0.25, 50))  # scale and WebP quality, tried in this order


@dataclass
class Shot:
    """A picture of the page; ``src`` is filled in by ``Album.develop``."""

    image: Image.Image
    alt: str
    src: str = ""

    @property
    def width(self) -> int:
        """Pixels of what is shown, which fixes the proportions before it is decoded."""
        return self.image.width

    @property
    def height(self) -> int:
        """As ``width``."""
        return self.image.height

    @property
    def small(self) -> bool:
        """Whether it is enlarged pixel by pixel."""
        return max(self.image.size) <= SMALL


class Album:
    """The pictures of one page."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget, self.shots = budget, list[Shot]()

    def add(self, path: Path, alt: str, side: int = 400) -> Shot | None:
        """A picture of at most ``side`` pixels; None when there is no such file or nobody can read it."""
        try:
            image = open_picture(path)
        except Exception:  # decoders raise whatever they meet, and a page without one picture is still a page
            return None
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        self.shots.append(Shot(image, alt))
        return self.shots[-1]

    def develop(self) -> None:
        """Fill in every ``src``, at the best quality at which all together are within the budget."""
        for scale, quality in LEVELS:
            for shot in self.shots:
                shot.src = _data_uri(shot, scale, quality)
            if sum(len(shot.src) for shot in self.shots) <= self.budget:
                break


def _data_uri(shot: Shot, scale: float, quality: int) -> str:
    image, file = shot.image, io.BytesIO()
    # Neither places and dates of a phone nor colour profiles travel along: the page shows what the training sees.
    if shot.small and scale == 1:
        image.save(file, "WEBP", lossless=True, exif=b"", icc_profile=b"")
    else:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        scaled = image if scale == 1 or shot.small else image.resize(size, Image.Resampling.LANCZOS)
        scaled.save(file, "WEBP", quality=quality, exif=b"", icc_profile=b"")
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
