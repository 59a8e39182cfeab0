"""Files of class names: one a line, in the order of the labels."""

from __future__ import annotations

import os
from pathlib import Path


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Class names of a text file; blank lines at the end are ignored. Raises ValueError naming the file (and line)."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the class names: {error}") from error
    if not lines:
        raise ValueError(f"{path}: holds no class name")
    seen: dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        if not name:
            raise ValueError(f"{path}:{number}: an empty class name between others")
        if name in seen:
            raise ValueError(f"{path}:{number}: class {name!r} is already on line {seen[name]}")
        seen[name] = number
    return tuple(lines)
