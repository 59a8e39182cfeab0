"""RoIAlign recorded from onnxruntime, and its maximum over the bins, by every implementation."""

from __future__ import annotations

import json

import pytest
import torch

from tests.golden.support import golden_root
from tests.support import backends
from vmae2_fast import backend
from vmae2_fast.ops import roi_align, roi_align_max

FILE = golden_root() / "downstream" / "roi_align.json"
RECORDED = json.loads(FILE.read_text()) if FILE.is_file() else {"cases": []}
TOLERANCE = 1e-5  # the golden README


@pytest.mark.parametrize("number", range(len(RECORDED["cases"])))
@pytest.mark.parametrize("name", [n for n in backends("roi_align_max") if n != "triton" or torch.cuda.is_available()])
def test_recorded_values(name: str, number: int) -> None:
    case = RECORDED["cases"][number]
    features = torch.tensor(RECORDED["input"]).permute(0, 2, 3, 1)
    boxes = torch.tensor(RECORDED["rois"])
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
