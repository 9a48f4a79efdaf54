"""task=report: write the page of a run anew, or one that compares several."""

import logging
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from omegaconf import DictConfig

from dreambooth.errors import UserError
from dreambooth.nearest import nearest
from dreambooth.report.comparison import comparison_html
from dreambooth.report.page import REPORT, report_html
from dreambooth.report.read import read_run
from dreambooth.report.render import write
from dreambooth.run_folder import CONFIG, is_rank_zero

log = logging.getLogger(__name__)
COMPARISON = "comparison.html"


def report(cfg: DictConfig) -> Path | None:
    """Write report.html of ``report.runs``, and of several runs comparison.html too; the path of the last one written.

    A single page goes to ``report.out_path`` (a folder, or a name that ends with .html), else into the run folder; a
    comparison to ``report.out_path``, else into the current folder. None on other ranks than the first. Raises
    UserError for a folder that does not exist or is no run, and for a file in it that cannot be read.
    """
    if not is_rank_zero():
        return None
    listed = cfg.report.runs
    runs = [read_run(folder) for folder in find_runs([listed] if isinstance(listed, str) else list(listed))]
    out = cfg.report.out_path
    if len(runs) == 1:
        path = write(page_path(out, REPORT) if out else runs[0].folder / REPORT, report_html(runs[0]))
        log.info("report %s", path)
        return path
    for run in runs:
        write(run.folder / REPORT, report_html(run))
    path = page_path(out or ".", COMPARISON)
    write(path, comparison_html(runs, path))
    log.info("%d reports, compared in %s", len(runs), path)
    return path


def find_runs(texts: Sequence[object]) -> list[Path]:
    """The run folders that folders and patterns name, each once. A pattern passes over what is no run."""
    found: dict[Path, None] = {}
    for text in map(str, texts):
        folder = Path(text).expanduser()
        if folder.is_dir():
            found[folder.resolve()] = None
        elif any(sign in text for sign in "*?["):
            matches = [Path(match).resolve() for match in sorted(glob(str(folder)))]
            runs = [match for match in matches if (match / CONFIG).is_file()]
            if not runs:
                raise UserError(f"report.runs={text}: no run folder is called so; try report.runs='outputs/*/*'")
            found |= dict.fromkeys(runs)
        else:
            raise UserError(f"report.runs={text}: there is no such folder{_near(folder)}")
    if not found:
        raise UserError("report.runs is empty; type report.runs=outputs/dreambooth/ID")
    return list(found)


def page_path(out: str, name: str) -> Path:
    """``out`` where it names a page, else the page of that name in the folder ``out``."""
    path = Path(out).expanduser().absolute()
    return path if path.suffix == ".html" else path / name


def _near(folder: Path) -> str:
    """The nearest run beside a folder that does not exist."""
    beside = [path.parent.name for path in folder.parent.glob(f"*/{CONFIG}")]
    return nearest(folder.name, beside) if beside else "; a training ends by printing its run folder"
