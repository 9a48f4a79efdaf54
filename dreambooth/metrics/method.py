"""By what scores were measured, in words: numbers of another encoder, text or order of averaging are not comparable."""

from collections.abc import Iterable, Mapping
from typing import Any


def how_measured(metrics: Mapping[str, Any]) -> str:
    """The choices that the paper leaves open, of a ``metrics`` of summary.json; empty where no encoder was asked."""
    by = "; ".join(f"{name}: {what}" for name, what in (metrics.get("encoders") or {}).items())
    if not by:
        return ""
    rare = "without" if metrics.get("text") == "class" else "with"
    once = "prompt (the mean of its pictures)" if metrics.get("average") == "prompts" else "picture"
    return f"measured by {by}; clip_t's prompt is taken {rare} the rare word; means count every {once} once"


def ways(found: Iterable[Mapping[str, Any]]) -> str:
    """How several runs were measured, each way once, as a sentence; empty where none says."""
    said = "; or ".join(dict.fromkeys(filter(None, map(how_measured, found))))
    return f"{said[:1].upper()}{said[1:]}." if said else ""
