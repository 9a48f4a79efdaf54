"""task=identifier: rare words for a subject, by section 3.2 of the paper, ranked by what the base makes of them."""

import csv
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from dreambooth.config import build
from dreambooth.data import checks
from dreambooth.devices import pick_device
from dreambooth.errors import UserError
from dreambooth.files import atomic
from dreambooth.picture_files import describe, draw_batch
from dreambooth.progress import progress_bar
from dreambooth.prompts import around_identifier
from dreambooth.run_folder import is_rank_zero

log = logging.getLogger(__name__)
SHOWN = 10


@dataclass(frozen=True)
class Identifier:
    """A word, its token, and the reaction to it: 1 - cosine of the pictures with and without it."""

    word: str
    token: int
    reaction: float


def identifier(cfg: DictConfig) -> list[Identifier]:
    """Rank ``identifier.candidates`` rare words; least reaction first. Prints them, and writes ``identifier.out_path``.

    The untouched base draws the instance prompt with each word in the place of its rare one, and without any, from the
    same noise; what is compared are the features of the encoder ``dino`` of the metrics node.

    Raises UserError when the instance prompt has no word that the class prompt lacks, or no candidate is left.
    """
    if not is_rank_zero():
        return []
    how, data = cfg.identifier, cfg.model.data
    if how.out_path is not None:
        checks.writable(Path(how.out_path).expanduser().parent, "identifier.out_path")
    before, after = around_identifier(data.instance_prompt, data.regularization_prompt)
    family, encoder = build(cfg.model.family), build(cfg.metrics).encoders.get("dino")
    if encoder is None:
        raise UserError(
            "metrics.encoders.dino=null: task=identifier looks through it; name one, or type metrics=default"
        )
    words = single_token_words(family.tokenizer, how.max_characters)[: how.candidates]
    if not words:
        raise UserError(
            f"identifier.max_characters={how.max_characters}: the tokenizer has no such word; type a higher number"
        )
    family.move(pick_device(cfg.trainer.accelerator))
    pipeline = family.to_pipeline()
    encoder.model.to(pick_device(cfg.trainer.accelerator))
    counts = {"num_images_per_prompt": how.num_images, "batch_size": None}
    asked = {**data.sampler, "negative_prompt": None, "seed": how.seed, **counts}

    def drawn(word: str) -> list[Image.Image]:
        prompt = " ".join(part for part in (before, word, after) if part)
        return draw_batch(pipeline, describe([(prompt, how.num_images)], asked, "", "", data.resolution))

    plain, found = encoder.images(drawn("")), []
    with progress_bar(len(words), "trying words", "word") as bar:
        for word, token in words:
            reaction = 1 - (encoder.images(drawn(word)) * plain).sum(-1).mean().item()
            found.append(Identifier(word, token, reaction))
            bar.update()
    found.sort(key=lambda one: (one.reaction, one.token))
    _report(found, how.out_path)
    return found


def single_token_words(tokenizer: Any, max_characters: int) -> list[tuple[str, int]]:
    """(word, token) of at most ``max_characters`` letters that is one token and comes back as itself, rarest first.

    A byte-pair vocabulary is in the order of its merges, the most frequent first, so a high number is a rare word. (The
    paper took numbers 5000 to 10000 of T5's, for the same reason.)
    """
    special = set(tokenizer.all_special_ids)
    words = []
    for token in sorted(set(tokenizer.get_vocab().values()) - special, reverse=True):
        word = tokenizer.decode([token]).strip()
        alone = 2 <= len(word) <= max_characters and word.isascii() and word.isalpha() and word.islower()
        if alone and tokenizer(word, add_special_tokens=False).input_ids == [token]:
            words.append((word, token))
    return words


def _report(found: Iterable[Identifier], out_path: str | None) -> None:
    rows = list(found)
    lines = [f"{one.word:>8}{one.token:>8}{one.reaction:>10.4f}" for one in rows[:SHOWN]]
    log.info("%s\n%s", f"{'word':>8}{'token':>8}{'reaction':>10}", "\n".join(lines))
    if out_path is not None:
        with atomic(Path(out_path).expanduser()) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(Identifier.__dataclass_fields__), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(one) for one in rows)
