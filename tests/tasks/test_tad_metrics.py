"""Detection mAP: what must be 1, what must be 0, what counts as what; fusion and file scoring."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vmae2_fast.config import DetectionConfig
from vmae2_fast.data.tad import Detections, TadError, VideoScores, write_detections
from vmae2_fast.tasks.metrics.tad import Segments, detection_map, thresholds, tiou, without_duplicates
from vmae2_fast.tasks.tad_detect import fuse_all
from vmae2_fast.temporal_detection import score_files

TRUTH = {
    "v": Segments(np.array([[0.0, 4.0], [3.0, 9.0], [20.0, 21.0]]), ["a", "b", "a"]),
    "w": Segments(np.array([[5.0, 6.0]]), ["b"]),
    "silent": Segments(np.zeros((0, 2)), []),
}
NOTHING = Segments(np.zeros((0, 2)), [], np.zeros(0))


def as_detections(truth):
    return {v: Segments(e.segments, e.labels, np.linspace(0.9, 0.5, len(e.labels))) for v, e in truth.items()}


@pytest.mark.parametrize("name", ["thumos14", "fineaction"])
def test_ground_truth_scores_one_and_nothing_scores_zero(name):
    tious = thresholds(name)
    perfect = detection_map(TRUTH, as_detections(TRUTH), tious)
    assert perfect.mean.tolist() == [1.0] * len(tious)
    assert perfect.recall.min() == 1
    assert perfect.left_out == {}
    for found in ({}, {"v": NOTHING, "w": NOTHING}):
        empty = detection_map(TRUTH, found, tious)
        assert empty.average == 0
        assert empty.recall.max() == 0
    assert detection_map({}, as_detections(TRUTH), tious).average == 0


def test_an_event_is_found_once_and_the_next_best_may_be_taken():
    truth = {"v": Segments(np.array([[0.0, 10.0], [1.0, 11.0]]), ["a", "a"])}
    twice = {"v": Segments(np.array([[0.0, 10.0]] * 3), ["a"] * 3, np.array([0.9, 0.8, 0.7]))}
    score = detection_map(truth, twice, np.array([0.5, 0.9]))
    # At .5 the second detection takes the neighbour and the third is wrong; at .9 only one event is within reach.
    assert score.ap[:, 0].tolist() == pytest.approx([1.0, 0.5])


def test_false_alarms_before_hits_cost_precision_wherever_they_are():
    found = as_detections(TRUTH)
    wrong = Segments(np.array([[0.0, 1.0]]), ["a"], np.array([0.99]))
    here = detection_map(TRUTH, {**found, "silent": wrong}, np.array([0.5]))
    elsewhere = detection_map(TRUTH, {**found, "unknown video": wrong}, np.array([0.5]))
    assert here.ap.tolist() == elsewhere.ap.tolist() == [[pytest.approx(2 / 3), 1.0]]
    assert here.left_out == {}
    assert elsewhere.left_out == {"detections on videos without annotations, counted as wrong": 1}


def test_unknown_labels_do_not_count_and_are_counted():
    found = as_detections(TRUTH)
    more = Segments(np.array([[0.0, 4.0]]), ["flying"], np.array([0.99]))
    score = detection_map(TRUTH, {**found, "silent": more}, np.array([0.5]))
    assert score.average == 1
    assert score.left_out == {"detections with a label that no event has": 1}


def test_duplicates_are_a_choice():
    events = Segments(np.array([[0.0, 1.0], [0.0005, 1.0], [0.0, 1.0], [3.0, 3.0005]]), ["a", "a", "b", "a"])
    kept = without_duplicates(events)
    assert (kept.segments.tolist(), kept.labels) == ([[0, 1], [0, 1]], ["a", "b"])
    found = {"v": Segments(kept.segments, kept.labels, np.array([0.9, 0.8]))}
    assert detection_map({"v": events}, found, np.array([0.5])).average == 1
    raw = detection_map({"v": events}, found, np.array([0.5]), deduplicate=False)
    assert raw.ap.tolist() == [[pytest.approx(1 / 3), 1.0]]
    assert (raw.events, raw.left_out) == (4, {})


def test_empty_segments_overlap_nothing():
    assert tiou(np.array([[1.0, 1.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [1.0, 3.0]])).tolist() == [[0, 0], [0, 1 / 3]]


def test_thresholds_are_the_evaluators_own():
    assert thresholds("thumos14").tolist() == np.linspace(0.3, 0.7, 5).tolist()
    assert thresholds("fineaction").tolist() == np.linspace(0.5, 0.95, 10).tolist()
    with pytest.raises(ValueError, match="unknown benchmark 'ava'; there are: thumos14, fineaction"):
        thresholds("ava")


def test_fusion_needs_scores_of_every_video():
    found = {"v": Detections(np.array([[0.0, 1.0], [2.0, 3.0]]), ("action",) * 2, np.array([0.25, 0.64]))}
    scores = VideoScores(("a", "b", "c"), {"v": np.array([0.01, 0.81, 0.18])})
    fused = fuse_all(found, scores, DetectionConfig(fused=1, fused_classes=2))["v"]
    assert fused.labels == ("b", "c")
    assert fused.segments.tolist() == [[2, 3], [2, 3]]
    assert fused.scores == pytest.approx([0.72, np.sqrt(0.18 * 0.64)])
    with pytest.raises(TadError, match="w has no class scores"):
        fuse_all({"w": found["v"]}, scores, DetectionConfig())


def test_files_are_scored_and_what_did_not_count_is_told(tmp_path):
    database = {
        name: {"subset": "test" if name != "x" else "training", "duration": 30.0, "fps": 25.0, "annotations": [
            {"label": label, "segment": segment} for segment, label in zip(TRUTH["v"].segments.tolist(), TRUTH["v"].labels)
        ]}
        for name in ("v", "w", "x")
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps({"database": database}))
    found = {"v": Detections(TRUTH["v"].segments, tuple(TRUTH["v"].labels), np.array([0.9, 0.8, 0.7]))}
    write_detections(tmp_path / "found.json", found)
    half = score_files(tmp_path / "truth.json", tmp_path / "found.json", subset="Test", benchmark="thumos14")
    assert half["average_map"] == pytest.approx(0.5)
    assert half["not_counted"] == {"videos without any detection": 1}
    whole = score_files(
        tmp_path / "truth.json", tmp_path / "found.json", subset="test", benchmark="thumos14", block_list=["w"]
    )
    assert (whole["average_map"], whole["events"], whole["videos"]) == (1.0, 3, 1)
    database["w"]["annotations"] = []
    (tmp_path / "odd.json").write_text(json.dumps({"database": database}))
    late = {**found, "w": Detections(np.array([[2.0, 40.0]]), tuple(TRUTH["v"].labels[:1]), np.array([0.95]))}
    write_detections(tmp_path / "late.json", late)
    odd = score_files(tmp_path / "odd.json", tmp_path / "late.json", subset="test", benchmark="thumos14")
    assert odd["average_map"] < 1
    assert odd["not_counted"] == {
        "videos in which nothing is annotated (detections on them are wrong)": 1,
        "detections reaching out of their video by more than a second (they count)": 1,
    }
    (tmp_path / "twice.json").write_text('{"results": {"v": [], "v": []}}')
    with pytest.raises(TadError, match=r"twice\.json: 'v' is named twice"):
        score_files(tmp_path / "odd.json", tmp_path / "twice.json", subset="test", benchmark="thumos14")
    for entry in database.values():
        entry["annotations"] = []
    (tmp_path / "empty.json").write_text(json.dumps({"database": database}))
    with pytest.raises(TadError, match="has no annotations: there is nothing to score against"):
        score_files(tmp_path / "empty.json", tmp_path / "found.json", subset="test", benchmark="thumos14")
