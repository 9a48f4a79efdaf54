"""A run folder as data. Every part but config.yaml may be missing; a part that is broken is the user's to know."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dreambooth.errors import UserError
from dreambooth.files import distinct_names, pictures_among
from dreambooth.report.wording import is_number
from dreambooth.run_folder import CONFIG, OVERRIDES

SETS = ("before", "after", "real")
Columns = dict[str, list[float | None]]
Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """What lies in a run folder.

    ``steps`` and ``curves`` are the columns of metrics.csv and curves.csv (None for an empty cell), ``scores`` the rows
    of scores.jsonl, ``samples`` the grids in the order of their steps. ``label`` is what the run is called beside
    others, where that is not its folder's name.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    command: str | None
    changed: dict[str, list[Any]] | None
    steps: Columns
    curves: Columns
    summary: dict[str, Any]
    scores: list[Row]
    samples: list[Path]
    label: str = ""

    @property
    def name(self) -> str:
        """The label, else the name of the folder."""
        return self.label or self.folder.name

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key."""
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def means(self, kind: str) -> dict[str, Any]:
        """The mean scores of "before", "after" or "real"; empty where the run was not evaluated."""
        return dict(self.summary.get("metrics", {}).get(kind) or {})

    def interval(self, kind: str, score: str) -> list[float] | None:
        """The 95 % interval of a mean, [low, high]."""
        found = ((self.summary.get("metrics", {}).get("intervals") or {}).get(kind) or {}).get(score)
        return found if isinstance(found, list) and len(found) == 2 and all(map(is_number, found)) else None

    @property
    def last_step(self) -> int | None:
        """The step that the run has reached."""
        reached = self.summary.get("steps") or next((step for step in reversed(self.steps.get("step", []))), None)
        return None if reached is None else int(reached)

    @cached_property
    def photos(self) -> dict[str, Path]:
        """The photos that were learned from, by file name; empty when their folder is not there (any more).

        Of several subjects, by the name of the folder and of the file.
        """
        folders = [entry["instance_dir"] for entry in self.setting("model.data.subjects") or []]
        if len(folders) < 2:
            return _pictures(self.setting("model.data.instance_dir"))
        named = zip(distinct_names(folders), map(_pictures, folders), strict=True)
        return {f"{subject}/{name}": path for subject, found in named for name, path in found.items()}

    @cached_property
    def judges(self) -> dict[str, Path]:
        """The photos that likeness was measured to, which are those that were learned from unless others were named."""
        return _pictures(self.setting("evaluate.photos")) or self.photos

    def picture(self, row: Row) -> Path:
        """The file of a row of ``scores``."""
        return self.folder / "evaluation" / str(row["file"])


def read_run(folder: Path) -> RunData:
    """Read a run folder. Raises UserError when it has no config.yaml, or naming the file that cannot be read."""
    text = _text(folder / CONFIG)
    if text is None:
        raise UserError(f"{folder} holds no {CONFIG}, so it is no run folder: name one with report.runs=FOLDER")
    typed = _yaml(folder / OVERRIDES, _text(folder / OVERRIDES) or "{}")
    return RunData(
        folder=folder,
        config=_yaml(folder / CONFIG, text),
        config_text=text,
        command=typed.get("command"),
        changed=typed.get("changed"),
        steps=_columns(folder / "metrics.csv"),
        curves=_columns(folder / "curves.csv"),
        summary=_summary(folder / "summary.json"),
        scores=_scores(folder / "evaluation" / "scores.jsonl"),
        samples=sorted((folder / "samples").glob("step_*.png")),
    )


def _pictures(where: Any) -> dict[str, Path]:
    folder = Path(str(where)).expanduser()
    found = sorted(folder.glob("[!.]*")) if where and folder.is_dir() else []
    return {each.name: each for each in pictures_among(found)}


def _text(path: Path) -> str | None:
    """The text of a file, None when there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read ({reason}): repair it, or move it away") from None


def _yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): repair it") from None
    if not isinstance(found, dict) or not isinstance(found.get("changed", {}), dict):
        raise UserError(f"{path} does not hold settings: repair it, or name another run folder")
    return found


def _summary(path: Path) -> dict[str, Any]:
    text = _text(path)
    found = {} if text is None else _json(path, text, 1)
    parts = found.get("metrics", {}) if isinstance(found, dict) else None
    nested = [parts.get(name) for name in (*SETS, "intervals", "encoders")] if isinstance(parts, dict) else [0]
    if not all(isinstance(part, dict | None) for part in nested):
        raise UserError(f"{path} is no summary of a run: remove it, and type the training command again")
    return found


def _scores(path: Path) -> list[Row]:
    lines = (_text(path) or "").splitlines()
    rows = [_json(path, line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not all(isinstance(row, dict) and {"set", "file"} <= row.keys() for row in rows):
        raise UserError(f"{path} has a line without set and file: remove it, and run task=evaluate again")
    return rows


def _json(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        at = line + getattr(error, "lineno", 1) - 1
        raise UserError(
            f"{path}, line {at}, is not JSON ({str(error).partition(':')[0]}): repair or remove it"
        ) from None


def _columns(path: Path) -> Columns:
    """The columns of a table of numbers; the line that a killed run has not ended is left out."""
    lines = (_text(path) or "").rpartition("\n")[0].splitlines()
    rows = list(csv.reader(lines))
    columns: Columns = {name: [] for name in (rows[0] if rows else [])}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(columns):
            raise UserError(
                f"{path}, line {number}, has {len(row)} values for {len(columns)} columns: repair or remove it"
            )
        for name, cell in zip(columns, row, strict=True):
            columns[name].append(_number(path, number, cell))
    return columns


def _number(path: Path, line: int, cell: str) -> float | None:
    try:
        return float(cell) if cell.strip() else None
    except ValueError:
        raise UserError(f"{path}, line {line}: {cell!r} is no number: repair or remove it") from None
