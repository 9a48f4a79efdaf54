"""Folders of pictures: whose they are, what they show, and where what the networks say of them is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config import slug
from dreambooth.errors import UserError
from dreambooth.prompts import rephrase

INSTANCE, REGULARIZATION = "instance", "regularization"
CACHE_KEYS = {INSTANCE: "model.data.cached_instance_dir", REGULARIZATION: "model.data.cached_reg_dir"}


@dataclass(frozen=True)
class Source:
    """A folder of one role's pictures, the config ``key`` that names it, their prompt, and the folder of their cache.

    ``number`` tells the folders of one role apart in the order that they were named in.
    """

    role: str
    folder: Path
    key: str
    prompt: str
    cache: Path
    number: int = 0

    @property
    def name(self) -> str:
        """What the order of its pictures is drawn by."""
        return f"{self.role} {self.number}" if self.number else self.role

    @property
    def cache_key(self) -> str:
        """The config key that names the cache."""
        return CACHE_KEYS[self.role]


def prompts_of_each(prompts: Sequence[str], subjects: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The prompts, and after them those of the first subject or its class in the words of each other one."""
    if not subjects:
        return list(prompts)
    more = [_in_words_of(other, prompt, subjects[0]) for other in subjects[1:] for prompt in prompts]
    return list(dict.fromkeys([*prompts, *more]))


def _in_words_of(other: Mapping[str, Any], prompt: str, first: Mapping[str, Any]) -> str:
    for key in ("instance_prompt", "regularization_prompt"):
        found = rephrase(prompt, first[key], other.get(key) or first[key]) if first.get(key) else None
        if found is not None:
            return found
    return prompt


def sources_of(data: Mapping[str, Any], prior: bool) -> list[list[Source]]:
    """The instance source of each subject and, with the prior, that of its class, which subjects may share.

    ``data`` has the keys of ``model.data``: ``subjects``, or one subject in its place. A subject that names no
    ``regularization_dir`` has the folder of its class prompt in that of ``data``.

    Raises UserError when two subjects have one folder of photos, or two class prompts one folder.
    """
    one = {key: data[key] for key in ("instance_dir", "instance_prompt", "regularization_dir", "regularization_prompt")}
    entries = [("model.data", one)]
    if data["subjects"]:
        entries = [(f"model.data.subjects[{number}]", entry) for number, entry in enumerate(data["subjects"])]
    subjects: list[list[Source]] = []
    for place, entry in entries:
        found = [subject[0] for subject in subjects]
        roles = [_source(INSTANCE, f"{place}.instance_dir", entry, entry["instance_dir"], data, found)]
        if any(roles[0] is other for other in found):
            raise UserError(
                f"{place}.instance_dir: {roles[0].folder} is another subject's; type the folder of this one"
            )
        if prior:
            known = [subject[1] for subject in subjects]
            folder = entry.get("regularization_dir") or Path(data["regularization_dir"]) / slug(
                entry["regularization_prompt"]
            )
            roles.append(_source(REGULARIZATION, f"{place}.regularization_dir", entry, folder, data, known))
        subjects.append(roles)
    return subjects


def class_prompts(data: Mapping[str, Any]) -> list[str]:
    """The class prompt of each subject, in their order."""
    return [entry["regularization_prompt"] or "" for entry in data["subjects"] or [data]]


def _source(
    role: str, key: str, entry: Mapping[str, Any], folder: str | Path, data: Mapping[str, Any], known: Sequence[Source]
) -> Source:
    """The source of a folder, the same object as before for one that is ``known``."""
    folder, prompt = Path(folder).expanduser(), entry[f"{role}_prompt"] or ""
    for other in known:
        if other.folder.resolve() == folder.resolve():
            if other.prompt != prompt and role == REGULARIZATION:
                raise UserError(f"{key}: {folder} holds pictures of '{other.prompt}'; type another for '{prompt}'")
            return other
    cache = data[CACHE_KEYS[role].rpartition(".")[2]] or f"{folder}_cached"
    return Source(role, folder, key, prompt, Path(cache).expanduser(), len({id(other) for other in known}))
