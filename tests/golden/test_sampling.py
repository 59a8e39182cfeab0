"""Frame and crop rules against recorded official draws (`meta/sampling.json`)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.golden.support import golden_root
from vmae2_fast.data import sampling

FILE = golden_root() / "parity" / "meta" / "sampling.json"
RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {}


def _rng(case: dict[str, Any]) -> np.random.RandomState | None:
    return np.random.RandomState(case["seed"]) if case["mode"] == "train" else None


def _pretrain(case: dict[str, Any]) -> tuple[list[int], list[int]]:
    rng = np.random.RandomState(case["seed"])
    n, frames, stride = case["num_frames"], case["new_length"], case["new_step"]
    ids = sampling.pretrain_indices(n, frames, stride, rng, jitter=case["temporal_jitter"])
    return ids.tolist(), case["frame_ids"]


def _multi_scale(case: dict[str, Any]) -> tuple[list[int], list[int]]:
    found = sampling.multi_scale_crop(case["h"], case["w"], 224, random.Random(case["seed"]))
    return list(found), [case["offset_h"], case["offset_w"], case["crop_h"], case["crop_w"]]


def _resized(case: dict[str, Any]) -> tuple[list[int], list[int]]:
    found = sampling.random_resized_crop(case["height"], case["width"], random.Random(case["seed"]))
    return list(found), [case["top"], case["left"], case["crop_h"], case["crop_w"]]


def _video(case: dict[str, Any]) -> tuple[list[int], list[int]]:
    n, frames, stride = case["num_frames"], case["clip_len"], case["frame_sample_rate"]
    if case["mode"] != "test":
        return sampling.dense_indices(n, frames, stride, _rng(case), segments=case["num_segment"]).tolist(), case["frames"]
    if case["sparse_sample"]:
        views = sampling.segment_test_views(n, case["num_segment"], case["test_num_segment"])
    else:
        views = sampling.dense_test_views(n, frames, stride, case["test_num_segment"])
    return _with_crop(case, views[case["chunk"]]), [*case["frames"], case["crop_y0"], case["crop_x0"]]


def _raw_frames(case: dict[str, Any]) -> tuple[list[int], list[int]]:
    n, segments, first = case["num_frames"], case["num_segment"], case["start_idx"]
    if case["mode"] != "test":
        return (sampling.segment_indices(n, segments, _rng(case)) + first).tolist(), case["frame_numbers"]
    views = sampling.segment_test_views(n, segments, case["test_num_segment"])
    return _with_crop(case, views[case["chunk"]] + first), [*case["frame_numbers"], case["crop_y0"], case["crop_x0"]]


def _with_crop(case: dict[str, Any], ids: np.ndarray) -> list[int]:
    places = sampling.spatial_views(case["height"], case["width"], case["short_side_size"], case["test_num_crop"])
    return [*ids.tolist(), *places[case["split"]]]


RULES: dict[str, Callable[[dict[str, Any]], tuple[list[int], list[int]]]] = {
    "pretrain_HybridVideoMAE": _pretrain,
    "pretrain_GroupMultiScaleCrop_224": _multi_scale,
    "finetune_random_resized_crop": _resized,
    "finetune_VideoClsDataset": _video,
    "finetune_RawFrameClsDataset": _raw_frames,
}
CASES = [(rule, i, case) for rule, cases in RECORDED.items() if rule in RULES for i, case in enumerate(cases)]
WINDOWS = [(name, cases) for name, cases in RECORDED.get("tad_window_starts", {}).items()]


@pytest.mark.parametrize(("rule", "case"), [pytest.param(rule, case, id=f"{rule}-{i}") for rule, i, case in CASES])
def test_official_draws(rule: str, case: dict[str, Any]) -> None:
    found, recorded = RULES[rule](case)
    assert found == recorded


@pytest.mark.parametrize(("name", "cases"), [pytest.param(name, cases, id=name) for name, cases in WINDOWS])
def test_window_starts_of_feature_extraction(name: str, cases: dict[str, list[int]]) -> None:
    step = {"THUMOS14": 4, "FINEACTION": 16}[name]
    assert {n: sampling.tad_window_starts(int(n), step).tolist() for n in cases} == cases
