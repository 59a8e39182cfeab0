"""Test views against recorded official ones (`downstream/view_sampling.json`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.golden.support import golden_root
from vmae2_fast.data import sampling

FILE = golden_root() / "downstream" / "view_sampling.json"
RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {}

Ids = list[int] | list[list[int]]
RULES: dict[str, Callable[[dict[str, Any]], Ids]] = {
    "dense_val": lambda c: sampling.dense_indices(c["num_frames"], c["clip_len"], c["rate"]).tolist(),
    "dense_test": lambda c: sampling.dense_test_views(
        c["num_frames"], c["clip_len"], c["rate"], c["test_num_segment"]).tolist(),
    "sparse_test": lambda c: sampling.segment_test_views(
        c["num_frames"], c["num_segment"], c["test_num_segment"]).tolist(),
    "rawframe_val": lambda c: (sampling.segment_indices(c["num_frames"], c["num_segment"]) + c["start_idx"]).tolist(),
    "rawframe_test": lambda c: (sampling.segment_test_views(
        c["num_frames"], c["num_segment"], c["test_num_segment"]) + c["start_idx"]).tolist(),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c['kind']}-{i}") for i, c in enumerate(RECORDED.get("cases", []))])
def test_frames(case: dict[str, Any]) -> None:
    assert RULES[case["kind"]](case) == case.get("views", case.get("indices"))


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c['h']}x{c['w']}") for c in RECORDED.get("spatial_crops", [])])
def test_crops(case: dict[str, Any]) -> None:
    places = sampling.spatial_views(case["h"], case["w"], case["crop"], case["n"])
    along = 0 if case["axis"] == "h" else 1
    assert [place[along] for place in places] == case["starts"]
    assert all(place[1 - along] == 0 for place in places)
