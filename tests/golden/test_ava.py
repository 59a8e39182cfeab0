"""AVA as the public code has it: boxes on frames, clips of key frames, and mAP in the styles of the evaluators."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tests.golden.support import golden_root
from vmae2_fast.data import boxes
from vmae2_fast.data.ava import read_annotations, read_exclusions, read_label_map, read_results
from vmae2_fast.data.ava_loader import temporal_crop
from vmae2_fast.data.sampling import short_side
from vmae2_fast.tasks.metrics.ava import frame_map

FOLDER = golden_root() / "downstream"
BOXES = FOLDER / "ava_boxes.json"
EXPECTED = FOLDER / "ava" / "expected.json"
METRIC, BOX = 1e-9, 1e-5  # the golden README

# Name of a recorded run -> style, and whether it was given the exclusions.
STYLES = {
    "videomae_action_detection": ("videomae", True),
    "videomae_action_detection_no_exclusion": ("videomae", False),
    "slowfast_input_sorted_by_score": ("videomae", True),
    "activitynet_official": ("activitynet", True),
    "mmaction2": ("mmaction2", True),
}
ORDER_DEPENDENT = {"slowfast"}
RUNS = [run for run in json.loads(EXPECTED.read_text()) if run not in ORDER_DEPENDENT] if EXPECTED.is_file() else []


@pytest.mark.parametrize("run", RUNS)
def test_mean_average_precision(run: str) -> None:
    style, with_exclusions = STYLES[run]
    folder = EXPECTED.parent
    classes = read_label_map(folder / "ava_labelmap_60.pbtxt")
    exclusions = read_exclusions(folder / "excluded_timestamps.csv") if with_exclusions else ()
    truth, results = read_annotations(folder / "gt.csv"), read_results(folder / "det.csv")
    found = frame_map(truth, results, classes, exclusions=exclusions, style=style)
    expected = json.loads(EXPECTED.read_text())[run]
    assert found.mean == pytest.approx(expected["mAP"], abs=METRIC)
    for action, value in expected.get("per_class", {}).items():
        assert found.per_class.get(int(action), math.nan) == pytest.approx(
            math.nan if value is None else value, abs=METRIC, nan_ok=True
        )


def _near(ours: np.ndarray, recorded: list[list[float]], decimals: int) -> None:
    # half a unit of the last recorded decimal, and the tolerance of the README: the public code computes in float32
    np.testing.assert_allclose(ours, recorded, rtol=BOX, atol=0.5 * 10.0**-decimals)


@pytest.mark.skipif(not BOXES.is_file(), reason="no recorded boxes")
def test_boxes_through_the_pipeline() -> None:
    case = json.loads(BOXES.read_text())
    expected, frame = case["expected"], tuple(case["frame_size_wh"])
    pixels = boxes.from_xywh(np.asarray(case["input_xywh"]))
    _near(pixels, expected["xyxy"], 4)
    pixels = boxes.clip(pixels, *frame)
    _near(pixels, expected["clipped"], 4)
    height, width = short_side(frame[1], frame[0], 256)
    assert [width, height] == expected["resized_short256"]["size"]
    resized = boxes.resize(pixels, frame, (width, height))
    _near(resized, expected["resized_short256"]["boxes"], 4)
    left, top, side = (int(v) for v in next(k for k in expected if k.startswith("crop_")).split("_")[1:])
    cut = boxes.crop(resized, left, top, side, side)
    _near(cut, expected[f"crop_{left}_{top}_{side}"], 4)
    mirrored = boxes.flip(cut, side)
    _near(mirrored, expected["then_hflip"], 4)
    x, y = (float(v) for v in next(k for k in expected if k.startswith("test_extend_")).split("_")[2:])
    _near(boxes.extend(resized, width, height, (x, y)), expected[f"test_extend_{x:g}_{y:g}"], 4)
    uniform = np.asarray(expected["train_jitter"]["u"])
    _near(boxes.jitter(mirrored, uniform, side, side), expected["train_jitter"]["boxes"], 3)
    back = boxes.to_shares(boxes.resize(resized, (width, height), frame), *frame)
    _near(back, expected["result_csv_boxes_from_resized"], 5)
    np.testing.assert_allclose(boxes.from_shares(back, *frame), pixels, rtol=0, atol=1e-9)


def _crops() -> list[dict]:
    return json.loads(BOXES.read_text())["temporal_crop_16x4"] if BOXES.is_file() else []


@pytest.mark.parametrize("case", _crops(), ids=lambda case: str(case["raw"]))
def test_frames_of_a_span(case: dict) -> None:
    assert temporal_crop(case["raw"], 16, 4).tolist() == case["idx"]
