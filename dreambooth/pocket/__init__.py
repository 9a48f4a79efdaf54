"""The embedded default: a small world, its drawn scenes, and the base model trained on them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
SUBJECTS = Path(__file__).parent / "subjects"
