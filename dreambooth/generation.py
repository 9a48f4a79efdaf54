"""task=generate: numbered pictures of prompts, each with the settings that drew it, and a labelled grid."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dreambooth.adapters import Adapter, find_adapter
from dreambooth.config import build
from dreambooth.data import checks
from dreambooth.devices import pick_device
from dreambooth.errors import UserError, about
from dreambooth.families.base import Family
from dreambooth.grid import labelled_grid
from dreambooth.picture_files import (
    describe,
    draw_missing,
    foreign_picture,
    missing,
    numbered_paths,
    read_settings,
    write_picture,
)
from dreambooth.prompts import read_prompts
from dreambooth.run_folder import is_rank_zero, numbered, settings_in
from dreambooth.run_settings import by_untyped_cards, run_of, settings_of_run

log = logging.getLogger(__name__)

GRID, GRID_ROWS = "grid.png", 50


def generate(cfg: DictConfig) -> list[Path]:
    """Draw ``infer.num_images_per_prompt`` pictures of each of ``infer.prompts`` with ``infer.model``; their paths.

    Picture k of prompt p is number p * num_images_per_prompt + k, as in ``00012.png``. Its noise is a function of
    (infer.seed, p, k); its last bits depend on the size of its batch, which is the pictures of its prompt. Pictures
    that are there with the same settings are kept, and none is ever overwritten: where others are, an explicit
    ``infer.out_path`` is refused, and the default, ``generated`` in the run folder, is numbered on (``generated-2``).
    grid.png shows the first 50 prompts; an explicit folder with one that somebody else made is refused, too.

    Raises UserError for an unknown or unfinished model, or no prompt.
    """
    run = run_of(str(cfg.infer.model))
    cfg = cfg if run is None else settings_of_run(cfg, run)
    infer = cfg.infer
    prompts = read_prompts(infer.prompts)
    found = find_model(cfg)
    if not is_rank_zero():
        return []
    family = found.load(cfg)
    size = infer.num_images_per_prompt
    resolution = found.resolution or family.default_resolution
    if run is None and by_untyped_cards(cfg, resolution, "infer.unconditional_guidance_scale", "evaluate"):
        log.warning(
            "drawn at guidance %s, that of model=pocket: with another model type its card, such as model=sd15, or "
            "infer.unconditional_guidance_scale=7.5",
            infer.unconditional_guidance_scale,
        )
    wanted = [(prompt, size) for prompt in prompts]
    pictures = describe(wanted, infer, str(infer.model), family.fingerprint(), resolution)
    folder = choose_folder(cfg, pictures)
    if missing(folder, pictures):
        family.move(pick_device(cfg.trainer.accelerator))
    new = draw_missing(family, folder, pictures, "drawing pictures")
    paths = numbered_paths(folder, pictures)
    rows = [slice(first, first + size) for first in range(0, len(paths), size)]
    shown = rows[:GRID_ROWS]
    sheet = labelled_grid([paths[row] for row in shown], prompts[: len(shown)])
    write_picture(folder / GRID, sheet, {"prompts": prompts[: len(shown)]})
    log.info("%d pictures, %d of them new, in %s", len(paths), new, folder)
    return paths


@dataclass(frozen=True)
class Model:
    """What ``infer.model`` and ``infer.adapter`` mean: a pipeline folder or hub id, and what is merged into it.

    ``resolution`` is what its run trained at; None: not a run folder.
    """

    source: str
    resolution: int | None = None
    adapter: Adapter | None = None
    revision: str | None = None
    variant: str | None = None

    def load(self, cfg: DictConfig) -> Family:
        """The networks, of the family of ``cfg``."""
        names = {"from_pretrained": self.source, "revision": self.revision, "variant": self.variant}
        with about("infer.model" if self.source == str(cfg.infer.model) else "model.from_pretrained"):
            family: Family = build(cfg.model.family, **names)
        if self.adapter is not None:
            self.adapter.merge(family)
        return family


def find_model(cfg: DictConfig) -> Model:
    """What to draw with. A run without ``pipeline/`` is its base and its ``adapter/``.

    Raises UserError for a name that is nothing here and no hub id, and for a run that has not ended.
    """
    infer, source = cfg.infer, str(cfg.infer.model)
    folder = Path(source).expanduser()

    def adapter_in(path: str | Path) -> Adapter:
        how: dict[str, Any] = {"denoiser": infer.adapter_denoiser, "text_encoder": infer.adapter_text_encoder}
        how |= find_adapter(str(path))
        return Adapter(**how, scale=infer.adapter_scale)

    given = adapter_in(infer.adapter) if infer.adapter is not None else None
    of_command = Model(cfg.model.from_pretrained, None, given, cfg.model.revision, cfg.model.variant)
    if source == of_command.source or (given and source == cfg.run_dir and not (folder / "config.yaml").exists()):
        return of_command
    if (folder / "model_index.json").exists():
        return Model(str(folder), adapter=given)
    if (folder / "config.yaml").exists():
        model, own = settings_in(folder).model, folder / "adapter"
        whole = (folder / "pipeline" / "model_index.json").exists()
        beside = given or (adapter_in(own) if own.is_dir() else None)
        if given is None and beside is not None and not (whole and beside.whole):
            base = {name: model.get(name) for name in ("revision", "variant")}
            return Model(model.from_pretrained, model.data.resolution, beside, **base)
        if whole:
            return Model(str(folder / "pipeline"), model.data.resolution, given)
        if own.is_dir():
            raise UserError(
                f"infer.adapter: infer.model={source} has an adapter of its own; type "
                f"infer.model={model.from_pretrained}, or leave one of the two out"
            )
        raise UserError(
            f"infer.model={source} is a run without pipeline/ or adapter/: let its training end, "
            "the same command goes on"
        )
    inside = len(folder.parts) > 1 and Path(folder.parts[0]).is_dir()  # outputs/name/id is none of a hub's ids
    if folder.is_dir() or folder.is_absolute() or inside:
        raise UserError(
            f"infer.model={source} is no run or pipeline folder: train first, or name another one or a hub id"
        )
    return Model(source, adapter=given)


def choose_folder(cfg: DictConfig, pictures: list[dict[str, Any]]) -> Path:
    """The folder for these pictures: ``infer.out_path``, else the first ``generated`` folder that holds no others."""
    if cfg.infer.out_path is not None:
        folder = Path(cfg.infer.out_path).expanduser()
        checks.writable(folder, "infer.out_path")
        if (other := foreign_picture(folder, pictures)) is not None:
            raise UserError(f"infer.out_path: {other} was drawn with other settings or by others; type another folder")
        ours = any(path.exists() for path in numbered_paths(folder, pictures))  # and so is their grid
        if not ours and (folder / GRID).exists() and not read_settings(folder / GRID):
            raise UserError(f"infer.out_path: {folder / GRID} is of others; rename it, or type another folder")
        return folder
    model = Path(str(cfg.infer.model)).expanduser()
    run = model if (model / "config.yaml").exists() else Path(cfg.run_dir)
    return next(folder for folder in numbered(run / "generated") if foreign_picture(folder, pictures) is None)
