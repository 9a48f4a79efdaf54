"""task=evaluate: the numbers of a run, of any pipeline, or of a folder of pictures."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from dreambooth.config import build
from dreambooth.data import checks
from dreambooth.devices import pick_device
from dreambooth.errors import UserError
from dreambooth.families.base import Family
from dreambooth.files import atomic, list_pictures, open_picture
from dreambooth.generation import find_model
from dreambooth.metrics import measure
from dreambooth.metrics.suite import Row, Suite
from dreambooth.picture_files import draw_through, foreign_picture
from dreambooth.prompts import read_prompts
from dreambooth.run_folder import SUMMARY, is_rank_zero, numbered, settings_in, summary_in
from dreambooth.run_settings import by_untyped_cards, run_of, settings_of_run, words_of

log = logging.getLogger(__name__)
FOLDER, SCORES, METRICS = "evaluation", "scores.jsonl", "metrics.json"
BY = "measured"  # the entry of metrics.json that says by what
PHOTOS = ("model/data", "model.data.instance_dir", "model.data.subjects")  # who types one of these names photos


@dataclass(frozen=True)
class Evaluation:
    """Where the scores lie, and what summary.json calls ``metrics``."""

    folder: Path
    metrics: dict[str, Any]


def evaluate(cfg: DictConfig) -> Evaluation | None:
    """Measure ``infer.model`` by the ``evaluate`` node, or the pictures of ``evaluate.images``; None on other ranks.

    A run folder brings its own photos, prompts and base, whose pictures are the ``before``; of a pipeline folder or hub
    id there is only an ``after``. Pictures that are there with the same settings are kept. Writes ``scores.jsonl`` (a
    row a picture and a photograph) and ``metrics.json`` beside them, and the ``metrics`` of a run into its
    summary.json.

    Raises UserError for an unknown model, an empty folder, prompts and pictures of different number, or an encoder
    that is not there.
    """
    if not is_rank_zero():
        return None
    if cfg.evaluate.out_path is not None:
        checks.writable(Path(cfg.evaluate.out_path).expanduser(), "evaluate.out_path")
    if cfg.evaluate.images is not None:
        return _evaluate_folder(cfg)
    source = find_model(cfg)
    run = run_of(str(cfg.infer.model))
    cfg = cfg if run is None else settings_of_run(cfg, run)
    suite = build(cfg.metrics)  # a missing encoder is said before a model is loaded
    after = source.load(cfg)
    if run is None:
        check_cards(cfg, after.default_resolution, f"infer.model={cfg.infer.model} draws")
        return _measure(cfg, suite, {"after": after}, None, source.resolution)
    # The base as it was before the first step: a new word there meant its initializer already.
    before: Family = build(cfg.model.family)
    with build(cfg.model.tuning)(before).merged():
        return _measure(cfg, suite, {"before": before, "after": after}, run, source.resolution)


def _measure(
    cfg: DictConfig, suite: Suite, models: dict[str, Family], run: Path | None, resolution: int | None
) -> Evaluation:
    """Draw what is missing of each model, and score all of it."""
    subjects = measure.Subject.all_of(cfg)
    suite.move(pick_device(cfg.trainer.accelerator))
    asked = measure.wanted(cfg.evaluate, subjects)
    sets = {name: _pictures(cfg, asked, family, resolution) for name, family in models.items()}
    folder = choose_folder(cfg, run, sets)
    rows = measure.score_photos(suite, subjects)
    for name, family in models.items():
        family.move(pick_device(cfg.trainer.accelerator))
        store = cfg.evaluate.base_dir if name == "before" else None
        draw_through(store, family, folder / name, sets[name], f"drawing the pictures {name}")
        part = measure.picture_rows(folder / name, sets[name], asked)
        rows += measure.score(suite, part, measure.open_all(folder, part), subjects)
        family.move("cpu")
    found = write(folder, suite, rows, subjects, **{**_noted(folder), BY: how_measured(cfg)})
    if run is not None and folder == run / FOLDER:
        _into_summary(run, found.metrics)
    return found


def check_cards(cfg: DictConfig, side: int, what: str) -> None:
    """Raise UserError where pictures would be measured by the scores of model=pocket, or against its cartoons."""
    own = cfg.evaluate.photos is not None or cfg.evaluate.images is not None
    photos = "" if own or not by_untyped_cards(cfg, side, *PHOTOS) else " evaluate.photos=FOLDER_OF_PHOTOS"
    if by_untyped_cards(cfg, side, "metrics"):
        raise UserError(
            f"{what} {side} pixels, and the scores of model=pocket know cartoons of {cfg.model.data.resolution}: type "
            f"metrics=default evaluate=default{photos}, or the model's own card, such as model=sd15"
        )
    if photos:
        data = cfg.model.data
        raise UserError(
            f"{what} {side} pixels, and likeness would be to the cartoons in {data.instance_dir}: type{photos}, and "
            f"model.data.instance_prompt where the subject is not '{data.instance_prompt}'"
        )


def choose_folder(cfg: DictConfig, run: Path | None, sets: dict[str, list[dict[str, Any]]]) -> Path:
    """``evaluate.out_path``, else the first ``evaluation`` folder without other pictures or other measures of them."""
    own = None if run is None else how_measured(settings_in(run))
    how = how_measured(cfg)

    def other(folder: Path) -> Path | None:
        before = _noted(folder).get(BY, own if run is not None and folder == run / FOLDER else how)
        if before != how:
            return folder / METRICS
        return next(
            (path for name, pictures in sets.items() if (path := foreign_picture(folder / name, pictures))), None
        )

    if cfg.evaluate.out_path is None:
        return next(folder for folder in numbered((run or Path(cfg.run_dir)) / FOLDER) if other(folder) is None)
    folder = Path(cfg.evaluate.out_path).expanduser()
    if (path := other(folder)) is not None:
        raise UserError(f"evaluate.out_path: {path} was made with other settings or by others; type another folder")
    return folder


def how_measured(cfg: Any) -> dict[str, Any]:
    """What decides the scores of given pictures: the photos, and the ``metrics`` node."""
    return {"photos": cfg.evaluate.photos, "metrics": OmegaConf.to_container(cfg.metrics, resolve=True)}


def _noted(folder: Path) -> dict[str, Any]:
    """What metrics.json says beside the metrics; nothing without one, or with a damaged one."""
    try:
        noted = json.loads((folder / METRICS).read_text())
        return {name: value for name, value in noted.items() if name != "metrics"}
    except (OSError, ValueError, AttributeError):
        return {}


def write(
    folder: Path, suite: Suite, rows: Sequence[Row], subjects: Sequence[measure.Subject], **more: Any
) -> Evaluation:
    """Write scores.jsonl and metrics.json (with ``more``), and say the table and whose photos likeness is to."""
    metrics = measure.metrics_of(suite, rows)
    measure.write_scores(folder / SCORES, rows)
    with atomic(folder / METRICS) as path:
        path.write_text(json.dumps({"metrics": metrics, **more}, indent=2) + "\n")
    log.info("%s\n%s\n%s", folder, measure.table(metrics), _like_what(subjects))
    return Evaluation(folder, metrics)


def _like_what(subjects: Sequence[measure.Subject]) -> str:
    """Where the photos lie that likeness is to."""
    folders = dict.fromkeys(str(subject.paths[0].parent) for subject in subjects if subject.paths)
    return f"likeness is to the photos in {', '.join(folders)}" if folders else "no photos, so no likeness"


def _pictures(
    cfg: DictConfig, asked: Sequence[measure.Asked], family: Family, resolution: int | None
) -> list[dict[str, Any]]:
    side = resolution or family.default_resolution
    return measure.pictures_of(asked, cfg.evaluate, str(cfg.infer.model), family.fingerprint(fresh=True), side)


def _evaluate_folder(cfg: DictConfig) -> Evaluation:
    """Pictures of unknown origin: one prompt for all, or one each in the order of their names."""
    how, typed = cfg.evaluate, words_of(cfg)
    if typed is not None and not typed & {"evaluate.prompts", "evaluate", "experiment"}:
        raise UserError("evaluate.images: what do they show? Type evaluate.prompts='a photo of a dog', or a text file")
    paths = list_pictures(Path(how.images).expanduser(), "evaluate.images")
    prompts = read_prompts(how.prompts, "evaluate.prompts")
    if len(prompts) not in (1, len(paths)):
        raise UserError(
            f"evaluate.prompts: {len(prompts)} prompts for {len(paths)} pictures in {how.images}; type one for all of "
            "them, or a text file with a line a picture, in the order of their names"
        )
    prompts = prompts * len(paths) if len(prompts) == 1 else prompts
    subjects, suite = measure.Subject.all_of(cfg), build(cfg.metrics)
    suite.move(pick_device(cfg.trainer.accelerator))
    rows: list[Row] = [
        {"set": "after", "file": str(path), "role": "subject", "prompt": prompt, "prompt_index": prompts.index(prompt)}
        | {"picture_index": place}
        for place, (path, prompt) in enumerate(zip(paths, prompts, strict=True))
    ]
    images: list[Image.Image] = [open_picture(path) for path in paths]
    check_cards(cfg, min(images[0].size), f"evaluate.images={how.images} shows")
    by = how_measured(cfg)
    if how.out_path is None:
        folder = next(folder for folder in numbered(Path(cfg.run_dir) / FOLDER) if _free(folder, rows, by))
    elif not _free(folder := Path(how.out_path).expanduser(), rows, by):
        raise UserError(
            f"evaluate.out_path: {folder} has the scores of other pictures or prompts, or by other photos or metrics; "
            "type another folder"
        )
    scored = measure.score(suite, rows, images, subjects)
    return write(folder, suite, [*measure.score_photos(suite, subjects), *scored], subjects, **{BY: by})


def _free(folder: Path, rows: Sequence[Row], by: dict[str, Any]) -> bool:
    """Whether a folder holds no scores, or those of the same pictures and prompts, measured ``by`` the same."""
    if not (folder / SCORES).exists():
        return True
    if _noted(folder).get(BY, by) != by:
        return False
    before = [row for row in measure.read_scores(folder / SCORES) if row["set"] != "real"]
    return [(row["file"], row["prompt"]) for row in before] == [(row["file"], row["prompt"]) for row in rows]


def _into_summary(run: Path, metrics: dict[str, Any]) -> None:
    if (summary := summary_in(run)) is not None:
        with atomic(run / SUMMARY) as temporary:
            temporary.write_text(json.dumps(summary | {"metrics": metrics}, indent=2) + "\n")
