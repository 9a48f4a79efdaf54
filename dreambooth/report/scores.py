"""What the scores mean: their names, which way is better, and what four of them say of a run in plain words."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from dreambooth.report.read import RunData
from dreambooth.report.wording import is_number, number, percent


class Score(NamedTuple):
    """A score of summary.json: its key, its name in the paper, what it measures, and which way is better."""

    key: str
    name: str
    title: str
    meaning: str
    better: str


SCORES = (
    Score("dino", "DINO", "Subject fidelity", "likeness of the pictures and the photos", "high"),
    Score("clip_i", "CLIP-I", "Subject fidelity", "the same, seen by CLIP, background included", "high"),
    Score("clip_t", "CLIP-T", "Prompt fidelity", "how well a picture shows what its prompt says", "high"),
    Score("pres", "PRES", "Class drift", "likeness of pictures of the plain class and the photos", "low"),
    Score("div", "DIV", "Diversity", "difference between pictures of one prompt", "high"),
    Score("copy", "copy", "Copying", "likeness of a picture and the photo nearest to it", "low"),
)
# Shares of the way to the photos, as in docs/pocket.md (0.70 is its goal) and callbacks.evaluate.max_drift (0.5), and
# the likeness to a photo above that between photos (0.05 is the goal there).
LEARNED, PARTLY = 0.7, 0.4
HELD, DRIFTED = 0.2, 0.5
OWN, CLOSE = 0.05, 0.1


@dataclass(frozen=True)
class Verdict:
    """One card of the headline. ``grade`` is good, fair, poor or empty (nothing to compare with)."""

    score: Score
    before: float | None
    after: float
    real: float | None
    interval: list[float] | None
    grade: str
    word: str
    sentence: str

    @property
    def track(self) -> dict[str, float]:
        """Places of before, after, real, low and high on a scale from 0 to 100, for those that are known."""
        low, high = self.interval or (None, None)
        known = {"before": self.before, "after": self.after, "real": self.real, "low": low, "high": high}
        values = {name: value for name, value in known.items() if value is not None}
        least, most = min(values.values()), max(values.values())
        room = (most - least) * 0.08 or 0.1
        least, most = least - room, most + room
        return {name: round(100 * (value - least) / (most - least), 1) for name, value in values.items()}


def known_scores(run: RunData) -> list[Score]:
    """The scores that a run has, those that this page has no words for last."""
    keys = {key for kind in ("before", "after", "real") for key, value in run.means(kind).items() if is_number(value)}
    named = [score for score in SCORES if score.key in keys]
    others = sorted(keys - {score.key for score in SCORES})
    return [*named, *(Score(key, key, key, "", "") for key in others)]


def verdicts(run: RunData) -> list[Verdict]:
    """The headline: likeness, prompts, drift and copying, those of them that were measured after the training."""
    judged = (("dino", _likeness), ("clip_t", _prompts), ("pres", _drift), ("copy", _copying))
    made = []
    for score in SCORES:
        judge = dict(judged).get(score.key)
        before, after = (_value(run, kind, score.key) for kind in ("before", "after"))
        if judge is None or after is None:
            continue
        real = _value(run, "real", "dino" if score.key == "pres" else score.key)
        grade, word, sentence = judge(before, after, real)
        made.append(Verdict(score, before, after, real, run.interval("after", score.key), grade, word, sentence))
    return made


def _value(run: RunData, kind: str, key: str) -> float | None:
    value: Any = run.means(kind).get(key)
    return value if is_number(value) else None


def _share(before: float | None, after: float, real: float | None) -> float | None:
    """How far ``after`` has gone from ``before`` to ``real``; None where that is no way."""
    if before is None or real is None or real - before < 1e-6:
        return None
    return (after - before) / (real - before)


def _likeness(before: float | None, after: float, real: float | None) -> tuple[str, str, str]:
    share = _share(before, after, real)
    if share is None:
        return "", "", f"The pictures' likeness to the photos{_than(before, after)}. Higher is better."
    covered = f"{percent(share)} of the way from the untouched model to real photos of the subject. Higher is better."
    if share >= LEARNED:
        return "good", "Learned", covered
    return ("fair", "Partly learned", covered) if share >= PARTLY else ("poor", "Hardly learned", covered)


def _prompts(before: float | None, after: float, real: float | None) -> tuple[str, str, str]:
    """No grade: of prompts there is no photograph to compare with, and how far CLIP's likeness goes is the model's."""
    return "", "", f"How well the pictures show what their prompts say{_than(before, after)}. Higher is better."


def _drift(before: float | None, after: float, real: float | None) -> tuple[str, str, str]:
    share = _share(before, after, real)
    if share is None:
        return "", "", f"Likeness of the plain class to the photos{_than(before, after)}. Lower is better."
    if share < 0.01:
        return "good", "Class kept", "The plain class looks no more like the subject than before. Lower is better."
    gone = f"The plain class has gone {percent(share)} of the way to the subject. Lower is better."
    if share <= HELD:
        return "good", "Class kept", gone
    return ("fair", "Some drift", gone) if share <= DRIFTED else ("poor", "Class lost", gone)


def _copying(before: float | None, after: float, real: float | None) -> tuple[str, str, str]:
    if real is None:
        return "", "", f"Likeness to the nearest photo{_than(before, after)}. Lower is better."
    above = after - real
    where = "above" if above > 0 else "below"
    said = f"Likeness to the nearest photo is {number(abs(above))} {where} that between the photos themselves."
    if above <= OWN:
        return "good", "No copies", f"{said} Lower is better."
    said += " Well above it, a picture repeats a photo."
    return ("fair", "Close to photos", said) if above <= CLOSE else ("poor", "Copies photos", said)


def _than(before: float | None, after: float) -> str:
    if before is None:
        return ""
    word = "rose" if after > before else "fell"
    return f" {word} by {number(abs(after - before))}"
