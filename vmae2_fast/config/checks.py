"""What every value is checked with, one message each."""

from __future__ import annotations

import difflib
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def divisible(name: str, value: int, by: str, unit: int) -> None:
    """Raise ValueError naming the nearest valid values unless `unit` (of name `by`) divides `value`."""
    if unit < 1 or value % unit:
        below, above = value // max(unit, 1) * unit, (value // max(unit, 1) + 1) * unit
        near = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(f"{name}={value} is not divisible by {by}={unit}; the nearest valid values of {name} are {near}")


def at_least(config: Any, group: str, low: int, *names: str) -> None:
    """Raise ValueError unless every field of `names` that is not None is at least `low`; `group` is their prefix."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= low, f"{group}.{name}={value}: must be at least {low}")


def unknown(what: str, name: str, known: list[str]) -> str:
    """The message for a name nobody knows: close matches first, else what there is."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(sorted(known))}"
    return f"unknown {what} {name!r}; {hint}"
