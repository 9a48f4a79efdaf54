"""The charts of a run: its losses, and its scores over the steps."""

from dreambooth.report.charts import Chart, Line, chart, smooth, thinned
from dreambooth.report.read import RunData
from dreambooth.report.wording import is_number

LOSSES = (("instance_loss", "photos", "one"), ("prior_loss", "class pictures", "two"))


def charts(run: RunData) -> list[Chart]:
    """Loss, likeness and drift, prompt fidelity, and the trade-off that chose the step: those there are numbers for."""
    marks = [(float(run.summary["best_step"]), "exported step")] if is_number(run.summary.get("best_step")) else []
    real = run.means("real").get("dino")
    levels = [(float(real), "photos among themselves")] if is_number(real) else []
    likeness = [_scores(run, "dino", "subject (DINO)", "one"), _scores(run, "pres", "plain class (PRES)", "two")]
    found = [
        chart("loss", "Loss", loss_lines(run), marks),
        chart("likeness", "Likeness to the photos", likeness, marks, levels),
        chart("prompt", "Prompt fidelity (CLIP-T)", [_scores(run, "clip_t", "CLIP-T", "three")], marks),
        chart("tradeoff", "Likeness won, less drift", [_scores(run, "score", "trade-off", "four")], marks),
    ]
    return [each for each in found if each]


def loss_lines(run: RunData) -> list[Line]:
    """The losses of both roles, smoothed, the single steps faintly behind; one loss where no prior is used."""
    steps = run.steps.get("step", [])
    known = [(name, words, style) for name, words, style in LOSSES if any(map(is_number, run.steps.get(name, [])))]
    if len(known) < 2:
        known = [("loss", "loss", "one")]
    lines: list[Line] = []
    for name, words, style in known:
        values = run.steps.get(name, [])
        lines.insert(0, Line(words, style, *thinned(steps, values), faint=True))
        lines.append(Line(words, style, *thinned(steps, smooth(values))))
    return lines


def _scores(run: RunData, name: str, words: str, style: str) -> Line:
    return Line(words, style, run.curves.get("step", []), run.curves.get(name, []), dots=True)
