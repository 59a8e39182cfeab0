"""Test views recorded from the official data sets, and the official label maps, on every row."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.golden.support import golden_root
from tests.models.tiny import classify
from vmae2_fast.data import sampling
from vmae2_fast.models import load_weights, save_weights
from vmae2_fast.models.kinetics import class_names, label_map

GOLDEN = golden_root()


def _read(path: str) -> Any:
    file = GOLDEN / path
    return json.loads(file.read_text()) if file.is_file() else {}


VIEWS = _read("downstream/view_sampling.json")
MAPS = _read("parity/meta/label_710_maps.json")


def _found(case: dict[str, Any]) -> tuple[Any, Any]:
    n, kind = case["num_frames"], case["kind"]
    if kind == "dense_val":
        return sampling.dense_indices(n, case["clip_len"], case["rate"]).tolist(), case["indices"]
    if kind == "dense_test":
        views = sampling.dense_test_views(n, case["clip_len"], case["rate"], case["test_num_segment"])
        return views.tolist(), case["views"]
    frames, first = case["num_segment"], case.get("start_idx", 0)
    if kind == "rawframe_val":
        return (sampling.segment_indices(n, frames) + first).tolist(), case["indices"]
    assert kind in ("sparse_test", "rawframe_test"), f"unknown kind of case {kind}"
    return (sampling.segment_test_views(n, frames, case["test_num_segment"]) + first).tolist(), case["views"]


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c['kind']}-{i}") for i, c in enumerate(VIEWS.get("cases", []))])
def test_frames_of_test_views(case):
    found, recorded = _found(case)
    assert found == recorded


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c['h']}x{c['w']}") for c in VIEWS.get("spatial_crops", [])])
def test_places_of_test_crops(case):
    places = sampling.spatial_views(case["h"], case["w"], case["crop"], case["n"])
    along = 0 if case["axis"] == "h" else 1
    assert [place[along] for place in places] == case["starts"]
    assert {place[1 - along] for place in places} == {0}


@pytest.mark.parametrize("classes", sorted(MAPS, key=int))
def test_label_maps_and_the_heads_they_make(classes, tmp_path):
    """Our index file is the official one, and every row of a converted head is the K710 row it names."""
    recorded, ours = MAPS[classes], label_map(int(classes))
    assert list(ours) == recorded
    k710, smaller = classify(num_classes=710), classify(num_classes=int(classes))
    torch.nn.init.normal_(k710.head.bias)
    save_weights(k710, tmp_path / "k710.safetensors")
    load_weights(smaller, tmp_path / "k710.safetensors")
    for row, source in enumerate(recorded):
        assert torch.equal(smaller.head.weight[row], k710.head.weight[source])
        assert smaller.head.bias[row] == k710.head.bias[source]
    features = torch.randn(3, 16)
    torch.testing.assert_close(smaller.head(features), k710.head(features)[:, recorded])


def test_class_names_follow_the_maps():
    names = class_names(710)
    assert names is not None
    assert len(set(names)) == 710
    covered = set()
    for classes in (400, 600, 700):
        part = class_names(classes)
        assert part == tuple(names[row] for row in label_map(classes))
        covered |= set(label_map(classes))
    assert covered == set(range(710))
    assert sorted(label_map(400)) == list(range(400))
    assert class_names(174) is None
