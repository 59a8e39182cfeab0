"""The two training loops of `examples/`: three lines apart, the same losses."""

from __future__ import annotations

import difflib
import importlib
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.support import assert_within_budget

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def loops(monkeypatch):
    """The modules mae_plain and mae_fused, imported as the scripts import each other."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("mae_data", "mae_ops", "mae_plain", "mae_fused")
    modules = [importlib.import_module(name) for name in names]
    yield modules[2:]
    for name in names:
        sys.modules.pop(name)


def test_three_lines_differ() -> None:
    plain, fused = ((EXAMPLES / f"mae_{name}.py").read_text().splitlines() for name in ("plain", "fused"))
    changed = [line for line in difflib.ndiff(plain, fused) if line.startswith(("- ", "+ "))]
    assert [line[0] for line in changed].count("-") == 3
    assert [line[0] for line in changed].count("+") == 3
    added = "".join(line for line in changed if line.startswith("+"))
    assert all(name in added for name in ("from vmae2_fast.ops import", "gather_patches(clip", "reconstruction_loss(model("))
    assert not any("import" in line and "vmae2_fast" in line for line in plain)


def test_equal_losses(loops) -> None:
    """Three optimiser steps: no further from the float64 loop than twice what the plain loop is."""
    plain, fused = loops
    losses = [
        torch.tensor([loss for loss, _ in islice(module.steps(2, dtype=dtype), 3)], dtype=dtype)
        for module, dtype in ((fused, torch.float32), (plain, torch.float32), (plain, torch.float64))
    ]
    assert_within_budget(*losses, "losses")
    assert len(set(losses[0].tolist())) == 3


def test_runs_as_a_script_on_encoded_videos(tmp_path) -> None:
    """A folder with one good and one broken file; the last line is JSON with the losses."""
    import json

    from vmae2_fast.data.synthetic import write_mp4

    write_mp4(torch.randint(0, 256, (20, 64, 96, 3), dtype=torch.uint8).numpy(), tmp_path / "good.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    command = [sys.executable, str(EXAMPLES / "mae_fused.py"), "--steps", "1", "--batch", "1", "--videos", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len(json.loads(printed.splitlines()[-1])["losses"]) == 1


def test_both_loops_in_turns() -> None:
    """The comparison runs the same steps of both and says how long they took; the times themselves are the machine's."""
    import json

    command = [sys.executable, str(EXAMPLES / "mae_compare.py"), "--steps", "2", "--batch", "2"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(printed.splitlines()[-1])
    losses = {name: torch.tensor(values) for name, values in result["losses"].items()}
    assert losses["plain"].shape == (3,)
    torch.testing.assert_close(losses["fused"], losses["plain"], rtol=1e-4, atol=0)
    assert set(result["median_step_ms"]) == {"plain", "fused"}
    assert min(result["median_step_ms"].values()) > 0
    assert result["times_faster"] > 0
