"""The small copy holds every kind of case, so that no test of this folder is skipped for want of one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "data" / "golden"
FILES = {
    ".": "README.md",
    "parity/models": "models_index.json ft_p14_mean.safetensors pre_p16_cos_gamma.safetensors "
    "trajectory_pre_p16_cos_gamma.safetensors",
    "parity/hf": "hf_index.json hf_pre_p8.safetensors hf_cls_p8_mean.safetensors hf_cls_p8_first.safetensors",
    "parity/meta": "cosine_schedules.json finetune_init.json finetune_init.safetensors label_710_maps.json mask_counts.json "
    "masks.npz model_shapes.json optimizer_groups.json sampling.json sincos_probes.json",
    "downstream": "actionformer_parts.json actionformer_tiny.npz ava_boxes.json distill.json multiview_merge.json nms_1d.json "
    "roi_align.json tad_expected.json tad_fusion_resize.json tad_gt.json tad_pred.json tad_windows.json view_sampling.json",
    "downstream/ava": "ava_labelmap_60.pbtxt det.csv excluded_timestamps.csv expected.json gt.csv",
}


@pytest.mark.parametrize("folder", FILES)
def test_every_file_is_there(folder):
    missing = [name for name in FILES[folder].split() if not (ROOT / folder / name).is_file()]
    assert not missing


@pytest.mark.parametrize(("folder", "index"), [("models", "models_index.json"), ("hf", "hf_index.json")])
def test_every_case_of_an_index_is_there(folder, index):
    cases = json.loads((ROOT / "parity" / folder / index).read_text())
    assert cases
    assert not [case for case in cases if not (ROOT / "parity" / folder / f"{case}.safetensors").is_file()]


@pytest.mark.skipif("VMAE2_GOLDEN" in os.environ, reason="another directory may lack cases")
def test_nothing_of_this_folder_is_skipped(request):
    """An empty list of cases and a missing file both show as a skip."""
    mine = [item for item in request.session.items if item.path.parent == Path(__file__).parent]
    skipped = [
        item.nodeid
        for item in mine
        if item.get_closest_marker("skip") or any(mark.args[0] is True for mark in item.iter_markers("skipif") if mark.args)
    ]
    assert not skipped
