"""RoIAlign recorded from onnxruntime, and its maximum over the bins, by every implementation."""

from __future__ import annotations

import json

import pytest
import torch

from tests.golden.support import golden_root
from tests.support import backends
from vmae2_fast import backend
from vmae2_fast.ops import roi_align, roi_align_max

FILES = [json.loads(file.read_text()) for file in sorted((golden_root() / "downstream").glob("roi_align*.json"))]
CASES = [(recorded, case) for recorded in FILES for case in recorded["cases"]]
TOLERANCE = 1e-5  # the golden README


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("name", [n for n in backends("roi_align_max") if n != "triton" or torch.cuda.is_available()])
def test_recorded_values(name: str, number: int) -> None:
    recorded, case = CASES[number]
    features = torch.tensor(recorded["input"]).permute(0, 2, 3, 1)
    boxes = torch.tensor(recorded["rois"])
    options = {
        "size": case["output_size"], "scale": case["spatial_scale"], "sampling": case["sampling_ratio"],
        "aligned": case["aligned"],
    }  # fmt: skip
    with backend.use_backend(name):
        largest = roi_align_max(features, boxes, **options)
    cells = roi_align(features, boxes, **options)
    pairs = {"expected_max": largest, "expected_mean": cells.mean((1, 2)), "expected": cells.permute(0, 3, 1, 2)}
    for key, ours in pairs.items():
        if key in case:
            torch.testing.assert_close(ours, torch.tensor(case[key]), rtol=0, atol=TOLERANCE, msg=key.__add__(": differs"))
