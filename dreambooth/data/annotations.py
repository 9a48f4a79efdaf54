"""What lies beside photos: the words that describe them and the masks of the subject."""

from dataclasses import dataclass
from pathlib import Path

from dreambooth.data.captions import caption_files, read_captions
from dreambooth.data.masks import Masks, mask_files
from dreambooth.data.regularization import MANIFEST
from dreambooth.data.sources import INSTANCE, Source
from dreambooth.files import list_pictures


@dataclass(frozen=True)
class Annotations:
    """The keys ``captions``, ``caption_template``, ``masks`` and ``mask_floor`` of model.data.

    They are about photos; pictures of a class have the prompt that drew them, and all of their cells count alike.
    """

    captions: str | None
    template: str
    masks: str | None
    floor: float

    def check(self, source: Source, factor: int) -> None:
        """Raise UserError for photos, captions or masks that are missing or cannot be read."""
        paths = list(self.described(source))
        if masks := self.masks_of(source, factor):
            masks.check(paths)

    def pictures(self, source: Source) -> list[Path]:
        """The pictures of a source, without the files that belong to them."""
        known = {MANIFEST}
        if source.role == INSTANCE:
            known = caption_files(source.folder, self.captions) | mask_files(source.folder, self.masks)
        return list_pictures(source.folder, source.key, known)

    def described(self, source: Source) -> dict[Path, str]:
        """The pictures of a source, each with its prompt."""
        paths = self.pictures(source)
        if source.role != INSTANCE:
            return dict.fromkeys(paths, source.prompt)
        return dict(zip(paths, read_captions(paths, self.captions, self.template, source.prompt), strict=True))

    def masks_of(self, source: Source, factor: int) -> Masks | None:
        """How the latent cells of a source's pictures, of ``factor`` pixels, are weighted; None when none is."""
        return Masks(self.masks if source.role == INSTANCE else None, self.floor, factor) if self.masks else None
