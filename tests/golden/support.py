"""Where the recorded cases are: `VMAE2_GOLDEN`, else the small copy in `tests/data/golden`."""

from __future__ import annotations

import os
from pathlib import Path


def golden_root() -> Path:
    """The directory that holds `parity/`. Raises if VMAE2_GOLDEN names a directory without it."""
    given = os.environ.get("VMAE2_GOLDEN")
    root = Path(given) if given else Path(__file__).parents[1] / "data" / "golden"
    if not (root / "parity").is_dir():
        raise FileNotFoundError(f"{root} has no folder parity/")
    return root
