"""What a drill looks at in the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny

FULL = os.environ.get("VMAE2_DRILLS") == "full"
full = pytest.mark.skipif(not FULL, reason="in make drills")


def done(out: Path, name: str = "tiny_pretrain") -> dict[str, Any]:
    """Summary of the finished run OUT/NAME."""
    return json.loads((out / name / "done.json").read_text())


def same_bits(a: str | Path, b: str | Path) -> bool:
    """Whether two files of weights hold the same tensors."""
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def same_run(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two runs ended with the same weights and wrote the same log, whatever it cost them."""
    logs = [tiny.metrics_without_time(Path(summary["directory"]) / "metrics.jsonl") for summary in (ours, theirs)]
    return same_bits(ours["weights"], theirs["weights"]) and logs[0] == logs[1]
