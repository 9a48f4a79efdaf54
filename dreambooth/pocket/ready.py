"""The ready subjects: individuals in colours without a name, five pictures each, in three of the six places.

Beach, snow and night are never in the pictures, so a run that draws the subject there has composed, not copied.
"""

from pathlib import Path

from dreambooth.noise import seed_of
from dreambooth.pocket.world import Figure, draw, place

MINT, MAGENTA, TEAL, LIME = (150, 240, 200), (226, 40, 150), (30, 150, 150), (190, 230, 60)
NAVY, PEACH, LILAC, OLIVE = (30, 40, 110), (255, 200, 160), (200, 170, 240), (130, 130, 50)
GOLD, SKY, CRIMSON, GRAY = (240, 190, 40), (120, 200, 250), (160, 20, 60), (150, 150, 156)
PHOTOGRAPHED_IN = ("grass", "room", "city", "grass", "room")

SUBJECTS: dict[str, Figure] = {
    "dog": Figure("dog", MINT, "spots", MAGENTA, "scarf", (GOLD, NAVY), 3),
    "dog2": Figure("dog", GRAY, "stripes", LIME, "hat", (CRIMSON, SKY), 5),
    "cat": Figure("cat", TEAL, "stripes", PEACH, "scarf", (CRIMSON, LILAC), 7),
    "cat2": Figure("cat", LILAC, "halves", NAVY, "hat", (LIME, MAGENTA), 9),
    "bird": Figure("bird", PEACH, "halves", TEAL, "hat", (NAVY, GOLD), 11),
    "fish": Figure("fish", LIME, "spots", NAVY, "hat", (MAGENTA, PEACH), 13),
    "teapot": Figure("teapot", SKY, "spots", CRIMSON, "scarf", (OLIVE, PEACH), 15),
    "backpack": Figure("backpack", OLIVE, "stripes", SKY, "scarf", (MAGENTA, MINT), 17),
    "car": Figure("car", MINT, "halves", CRIMSON, "hat", (GOLD, TEAL), 19),
    "robot": Figure("robot", LILAC, "spots", OLIVE, "scarf", (SKY, CRIMSON), 21),
}


def photographs(name: str) -> list:
    """The five pictures of a ready subject."""
    return [
        draw(place(SUBJECTS[name], where, seed_of(name, i, "photograph"))) for i, where in enumerate(PHOTOGRAPHED_IN)
    ]


def write(folder: Path) -> None:
    """Write every subject's pictures as ``<folder>/<name>/<i>.png``."""
    for name in SUBJECTS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(photographs(name)):
            picture.save(folder / name / f"{i}.png")
