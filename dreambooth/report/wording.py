"""Numbers as people read them: the filters of the templates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

NONE = "–"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """``0.683``, with a true minus sign; a dash for what is no number."""
    return f"{value:.{digits}f}".replace("-", "−") if is_number(value) else NONE


def span(interval: Sequence[float] | None) -> str:
    """``0.651 to 0.712``, which a narrow column breaks behind the "to"; empty without an interval."""
    return f"{number(interval[0])}\N{NO-BREAK SPACE}to {number(interval[1])}" if interval else ""


def percent(share: float) -> str:
    """A share as whole percent, ``82 %``, with a narrow space that does not break."""
    return f"{number(share * 100, 0)}\N{NARROW NO-BREAK SPACE}%"


def duration(seconds: Any) -> str:
    """Seconds as ``8.3 s``, ``6 min 12 s`` or ``2 h 05 min``."""
    if not is_number(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(mebibytes: Any) -> str:
    """MiB as ``812 MiB`` or ``1.4 GiB``."""
    if not is_number(mebibytes):
        return NONE
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def count(value: Any) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}") if is_number(value) else NONE


def setting(value: Any) -> str:
    """A value of a config as it is typed: ``null``, ``true``, ``1e-05``, ``[a, b]``; a node by what it makes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return f"{str(value['_target_']).rpartition('.')[2]} …" if "_target_" in value else "{…}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(setting, value))}]"
    return str(value)


FILTERS = {each.__name__: each for each in (number, span, percent, duration, memory, count, setting)}
