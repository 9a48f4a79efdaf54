"""report.html: the run on one page."""

import logging
from pathlib import Path

import pytorch_lightning as pl

from dreambooth.report.page import write_report

log = logging.getLogger(__name__)


class Report(pl.Callback):
    """Write report.html when the fit ends, from the files that the callbacks before this one left."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        try:
            log.info("report %s", write_report(folder))
        except Exception as error:  # the model is trained and saved: a page that can be written later fails nothing
            log.warning("no report.html (%s): task=report report.runs=%s tries again", error, folder)
