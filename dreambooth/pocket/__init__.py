"""The embedded default: a small world, its drawn scenes, and the base model trained on them."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
WEIGHTS = _HERE / "weights" / "base"  # a diffusers folder
ENCODERS = _HERE / "weights" / "encoders"  # what measures its pictures
SUBJECTS = _HERE / "subjects"  # one folder of five pictures a ready subject
