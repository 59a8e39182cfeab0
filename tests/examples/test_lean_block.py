"""The lean block in somebody else's ViT: the same scores, fewer bytes, from a script that runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "lean_block.py"


def test_same_scores_for_fewer_bytes() -> None:
    command = [sys.executable, str(SCRIPT), "--width", "96", "--depth", "3", "--tokens", "64", "--heads", "3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(printed.splitlines()[-1])
    assert result["difference"] < 1e-5
    assert result["ratio"] < 0.6
