"""Files that are there whole or not at all, whatever a kill or a full disk interrupts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` make a file that then takes the place of `path`: the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write JSON, whole or not at all. Raises OSError."""
    write_whole(Path(path), lambda temporary: temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8"))
