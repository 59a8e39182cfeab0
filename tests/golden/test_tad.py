"""Temporal detection: recorded from ActionFormer, OpenTAD, ActivityNet's evaluator and the released extraction script."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden.support import golden_root
from vmae2_fast import backend
from vmae2_fast.config import ActionFormerConfig, DetectionConfig, ExtractConfig, TadConfig, TadDataConfig
from vmae2_fast.data.tad import Detections, choose_subset, read_annotations, read_detections
from vmae2_fast.data.tad_loader import Grid, Sequence, TadBatch, pad, resize_features
from vmae2_fast.data.tad_points import label_points, make_points
from vmae2_fast.data.windows import window_frames
from vmae2_fast.models.actionformer import ActionFormer
from vmae2_fast.models.actionformer_weights import from_released
from vmae2_fast.ops import nms_1d
from vmae2_fast.tasks.metrics.tad import Segments, detection_map, thresholds
from vmae2_fast.tasks.tad import TadTask
from vmae2_fast.tasks.tad_detect import detect, fuse
from vmae2_fast.tasks.tad_losses import distance_loss, focal_loss, smooth

ROOT = golden_root() / "downstream"


def recorded(name: str) -> Any:
    file = ROOT / name
    return json.loads(file.read_text()) if file.is_file() else None


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    ours, theirs = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


EXPECTED = recorded("tad_expected.json") or {}
NMS = [(file, case) for path in sorted(ROOT.glob("nms_1d*.json")) for file in [recorded(path.name)] for case in file["cases"]]
PARTS = recorded("actionformer_parts.json") or {}
FUSION = recorded("tad_fusion_resize.json") or {}
WINDOWS = recorded("tad_windows.json") or []
TINY = ROOT / "actionformer_tiny.npz"


@pytest.mark.parametrize("name", EXPECTED)
def test_map_equals_the_public_evaluators(name):
    expected = EXPECTED[name]
    videos = choose_subset(read_annotations(ROOT / "tad_gt.json"), "test")
    truth = {k: Segments(v.segments, v.labels) for k, v in videos.items()}
    found = {k: Segments(*d) for k, d in read_detections(ROOT / "tad_pred.json").items()}
    tious = thresholds(name.partition("_")[0].replace("thumos", "thumos14"))
    score = detection_map(truth, found, tious, deduplicate="no_dedup" not in name)
    close(tious, expected["tiou"], 1e-12)
    close(score.mean, expected["mAP"], 1e-9)
    close(score.average, expected["average"], 1e-9)
    if "ap" in expected:
        close(score.ap, expected["ap"], 1e-9)
        close(score.recall, expected["recall_at_1x_5x"], 1e-9)
        assert score.events == expected["num_gt_after_dedup"]


@pytest.mark.parametrize("name", backend.available("nms_1d", "cpu"))
@pytest.mark.parametrize(("file", "case"), [pytest.param(*both, id=both[1]["name"]) for both in NMS])
def test_nms_equals_the_compiled_one(file, case, name):
    arguments = case["args"]
    labels = torch.tensor(file["labels"])
    several = arguments["multiclass"]
    with backend.use_backend(name):
        segments, scores, index = nms_1d(
            torch.tensor(file["segments"]), torch.tensor(file["scores"]), labels if several else None,
            method="gaussian" if arguments["use_soft_nms"] else "hard", iou_threshold=arguments["iou_threshold"],
            sigma=arguments.get("sigma", 0.5), min_score=arguments["min_score"], limit=arguments["max_seg_num"],
            voting_threshold=None if several else arguments.get("voting_thresh", 0.75) or None,
        )  # fmt: skip
    close(scores, case["scores"])
    close(segments, case["segments"])
    assert labels[index].tolist() == case["labels"]


@pytest.mark.skipif("focal" not in PARTS, reason="no recorded losses")
def test_losses_equal_the_recorded_ones():
    focal, logits, targets = PARTS["focal"], torch.tensor(PARTS["focal"]["logits"]), torch.tensor(PARTS["focal"]["targets"])
    close(focal_loss(logits, targets), focal["none"])
    close(focal_loss(logits, targets).sum(), focal["sum"])
    smoothed = torch.tensor(focal["targets_smoothed"])
    amount = float(smoothed[targets == 0].min()) * (targets.shape[1] + 1)  # 0 becomes amount / (classes + 1)
    close(smooth(targets, amount), focal["targets_smoothed"])
    close(focal_loss(logits, smooth(targets, amount)).sum(), focal["sum_smoothed"])
    predicted, true = torch.tensor(PARTS["diou"]["pred"]), torch.tensor(PARTS["diou"]["target"])
    close(distance_loss(predicted, true), PARTS["diou"]["none"])
    close(distance_loss(predicted, true).sum(), PARTS["diou"]["sum"])
    close(distance_loss(predicted, true, "giou"), PARTS["giou"]["none"])


@pytest.mark.skipif("label_points" not in PARTS, reason="no recorded labels")
def test_points_are_labelled_as_recorded():
    case = PARTS["label_points"]
    config = ActionFormerConfig(
        windows=(3,) * len(case["strides"]), range_ends=tuple(float(r[1]) for r in case["regression_range"][:-1]),
        max_length=case["max_seq_len"],
    )  # fmt: skip
    points = make_points(config, case["max_seq_len"])
    for stride, first in zip(case["strides"], case["points_first3_per_level"]):
        level = points.stride == stride
        close(torch.stack([column[level][:3] for column in points], 1), first, 1e-12)
    segments, labels = torch.tensor(case["gt_segments"]), torch.tensor(case["gt_labels"])
    targets = label_points(points, segments, labels, case["num_classes"], case["center_sample_radius"])
    assert targets.classes.nonzero().tolist() == case["cls_targets_nonzero"]
    positive = targets.classes.any(1).nonzero().squeeze(1)
    assert positive.tolist() == case["positives"]
    close(targets.distances[positive], case["reg_targets_of_positives"])


class Tiny:
    """The recorded tiny model with our names."""

    def __init__(self) -> None:
        recorded_model = PARTS["tiny_model"]
        c, t = recorded_model["model_cfg"], recorded_model["train_cfg"]
        self.data = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(TINY).items()}
        self.videos, self.losses, self.test = recorded_model["videos"], recorded_model["losses"], recorded_model["test_cfg"]
        self.weight, self.smoothing = t["loss_weight"], t["label_smoothing"]
        # Options of the released code that our model does not have: a recording of others would be of another model.
        assert (c["fpn_type"], t["center_sample"], t["dropout"], t["head_empty_cls"]) == ("identity", "radius", 0, [])
        assert [c[key] for key in ("fpn_with_ln", "head_with_ln", "embd_with_ln", "use_rel_pe")] == [True, True, True, False]
        self.config = ActionFormerConfig(
            inputs=c["input_dim"], classes=c["num_classes"], width=c["embd_dim"], heads=c["n_head"],
            embed_layers=c["backbone_arch"][0], stem_blocks=c["backbone_arch"][1],
            windows=(c["n_mha_win_size"],) * (c["backbone_arch"][2] + 1), head_layers=c["head_num_layers"],
            positions=c["use_abs_pe"], max_length=c["max_seq_len"], center_radius=t["center_sample_radius"],
            range_ends=tuple(float(r[1]) for r in c["regression_range"][:-1]), drop_path=t["droppath"],
            layer_scale=1e-4 if t["droppath"] else 0.0, initial_normalizer=t["init_loss_norm"],
        )  # fmt: skip
        self.model = ActionFormer(self.config)
        missing, unexpected = self.model.load_state_dict(from_released(self.named("sd.")), strict=False)
        assert (missing, unexpected) == (["normalizer"], [])
        self.features = [self.data[f"in.feats{i}"].T.contiguous() for i in range(len(self.videos))]

    def named(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.data.items() if key.startswith(prefix)}


needs_tiny = pytest.mark.skipif("tiny_model" not in PARTS or not TINY.is_file(), reason="no recorded model")


@needs_tiny
def test_tiny_model_gives_the_recorded_outputs():
    tiny = Tiny()
    levels = tiny.model(*pad(tiny.features, tiny.config.max_length))
    assert len(levels) == sum(key.startswith("out.mask") for key in tiny.data)
    for i, level in enumerate(levels):
        close(level.logits.detach().transpose(1, 2), tiny.data[f"out.cls_logits{i}"], 1e-4)
        close(level.distances.detach().transpose(1, 2), tiny.data[f"out.offsets{i}"], 1e-4)
        assert torch.equal(level.valid, tiny.data[f"out.mask{i}"][:, 0])


@needs_tiny
def test_tiny_model_gives_the_recorded_losses_and_gradients():
    """Through the task: labels, both losses, the moving average they are divided by, one backward."""
    tiny = Tiny()
    task = TadTask.__new__(TadTask)
    task.config = TadConfig(
        name="tiny", model=None, data=TadDataConfig(), detector=tiny.config, distance_weight=tiny.weight,  # type: ignore[arg-type]
        label_smoothing=tiny.smoothing,
    )  # fmt: skip
    task.model, task.device, task.dtype = tiny.model, torch.device("cpu"), None
    features, valid = pad(tiny.features, tiny.config.max_length)
    points = make_points(tiny.config, tiny.config.max_length)
    targets = [
        label_points(points, torch.tensor(v["segments"]), torch.tensor(v["labels"]), tiny.config.classes,
                     tiny.config.center_radius)
        for v in tiny.videos
    ]  # fmt: skip
    batch = TadBatch(
        features, valid, torch.stack([t.classes for t in targets]), torch.stack([t.distances for t in targets]), ("", ""), []
    )
    normalizer = task.denominator(task.count([batch]))
    out = task.loss(batch)
    close((out["class_loss"] / normalizer).detach(), tiny.losses["cls_loss"])
    close((out["distance_loss"] / normalizer).detach(), tiny.losses["reg_loss"])
    loss = out["loss_sum"] / normalizer
    close(loss.detach(), tiny.losses["final_loss"])
    loss.backward()
    gradients = {name: p.grad for name, p in tiny.model.named_parameters()}
    wanted = from_released(tiny.named("grad."))
    assert wanted
    for name, gradient in wanted.items():
        close(gradients[name], gradient, 1e-4)


@needs_tiny
def test_tiny_model_detects_what_was_recorded():
    tiny = Tiny()
    video, options = tiny.videos[0], tiny.test
    grid = Grid(video["fps"], video["feat_stride"], video["feat_num_frames"], video["duration"])
    sequence = Sequence("", tiny.features[0], torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), grid)
    config = DetectionConfig(
        min_probability=options["pre_nms_thresh"], candidates=options["pre_nms_topk"], min_length=options["duration_thresh"],
        method="gaussian" if options["nms_method"] == "soft" else "hard", per_class=options["multiclass_nms"],
        iou_threshold=options["iou_threshold"], sigma=options["nms_sigma"], min_score=options["min_score"],
        limit=options["max_seg_num"], voting_threshold=None if options["multiclass_nms"] else options["voting_thresh"],
    )  # fmt: skip
    names = [str(i) for i in range(tiny.config.classes)]
    found = detect(tiny.model.eval(), sequence, config, names)
    close(found.scores, tiny.data["inf.scores"], 1e-4)
    close(found.segments, tiny.data["inf.segments"], 1e-4)
    assert [int(label) for label in found.labels] == tiny.data["inf.labels"].tolist()


@pytest.mark.skipif("fusion" not in FUSION, reason="no recorded fusion")
def test_fusion_equals_the_recorded_one():
    case = FUSION["fusion"]
    given, expected = case["input"], case["expected"]
    rows = []
    for video in dict.fromkeys(given["video-id"]):
        own = [i for i, name in enumerate(given["video-id"]) if name == video]
        segments = np.array([[given["t-start"][i], given["t-end"][i]] for i in own])
        found = Detections(segments, ("action",) * len(own), np.array([given["score"][i] for i in own]))
        scores = np.array(case["ext_scores"][video])
        fused = fuse(found, scores, [str(c) for c in range(len(scores))], keep=case["num_pred"], top=case["topk"])
        rows += [(video, *segment, int(label), score) for segment, label, score in zip(*fused)]
    assert [row[0] for row in rows] == expected["video-id"]
    assert [row[3] for row in rows] == expected["label"]
    close([row[1:3] for row in rows], list(zip(expected["t-start"], expected["t-end"])))
    close([row[4] for row in rows], expected["score"])


@pytest.mark.skipif("resize" not in FUSION, reason="no recorded features")
def test_resized_features_and_the_grid_equal_the_recorded_ones():
    case = FUSION["resize"]
    features = torch.tensor(case["feats"]).T
    for method, key in (("linear", "actionformer_interpolate"), ("roi_align", "opentad_roi_align_1d")):
        close(resize_features(features, case["target_len"], method).T, case[key])
    stride = ((len(features) - 1) * case["feat_stride"] + case["num_frames"]) / case["target_len"]
    close(stride, case["actionformer_new_stride_frames"])
    grid = FUSION["grid"]
    ours = Grid(grid["fps"], grid["stride"], grid["num_frames"], max(grid["seconds"]))
    close(ours.to_features(np.array(grid["seconds"])), grid["grid"])
    close(ours.to_seconds(np.array(grid["grid"])), grid["seconds"])


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: f"{case['dataset']}-{case['num_frames']}")
def test_windows_start_where_the_released_script_starts_them(case):
    step = {"THUMOS14": 4, "FINEACTION": 16}[case["dataset"]]
    starts = window_frames(case["num_frames"], 16, ExtractConfig(step=step))[:, 0]
    if case["count"] == 0:  # where the script fails: one window, its last frame repeated
        assert starts.tolist() == [0]
        return
    assert (len(starts), starts[:3].tolist(), int(starts[-1])) == (case["count"], case["first3"], case["last"])
