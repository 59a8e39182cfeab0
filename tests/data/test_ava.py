"""AVA's files: what is read, and which line an error names."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vmae2_fast.config import AvaDataConfig
from vmae2_fast.data import decode_video
from vmae2_fast.data.ava import (
    AvaError,
    key_frames,
    read_annotations,
    read_exclusions,
    read_label_map,
    read_person_boxes,
    read_results,
    write_results,
)
from vmae2_fast.data.ava_loader import AvaEvaluationLoader, AvaLoader, key_frame_index
from vmae2_fast.data.synthetic import write_jpegs
from vmae2_fast.data.synthetic_ava import FRAMES, write_ava_scenes

ROW = "v,0902,0.1,0.2,0.5,0.8,12"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_annotations_of_both_sets(tmp_path: Path) -> None:
    text = f"{ROW},0\n{ROW.replace(',12', ',80')},0\nv,902,0.6,0.2,0.9,0.8,1\nk,12.5\nk,3.0,0,0,1,1,5\n\n"
    rows = read_annotations(written(tmp_path / "gt.csv", text))
    assert rows.frames == ["v,0902", "v,0902", "v,0902", "k,0003"]
    assert rows.empty == {"k,12.5"}
    first, second, empty = key_frames(rows)
    assert (first.video, first.second, second.name, empty.second) == ("v", 902.0, "k,0003", 12.5)
    assert first.boxes.tolist() == [[0.1, 0.2, 0.5, 0.8], [0.6, 0.2, 0.9, 0.8]]
    assert [np.flatnonzero(row).tolist() for row in first.labels] == [[11, 79], [0]]
    assert empty.boxes.shape == (0, 4)
    assert [f.name for f in key_frames(rows, frozenset({"v,0902"}))] == ["k,0003", "k,12.5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ROW},0\nv,0902,0.1\n", "gt.csv:2: expected `video,second,x1,y1,x2,y2,action,person`, got 3 columns"),
        ("v,now,0.1,0.2,0.5,0.8,12,0\n", "gt.csv:1: the second must be numbers, got 'now'"),
        ("v,1,0.1,nan,0.5,0.8,12,0\n", "gt.csv:1: box coordinates must be finite"),
        ("v,1,10,20,50,80,12,0\n", "gt.csv:1: box 10,20,50,80 lies outside the frame"),
        ("v,1,0.1,0.2,0.5,0.8,81,0\n", "gt.csv:1: action '81' is unknown; actions are numbered 1..80"),
        ("v,1,0.1,0.2,0.5,0.8,walk,0\n", "gt.csv:1: action 'walk' is unknown"),
        (",1,0.1,0.2,0.5,0.8,1,0\n", "gt.csv:1: the video's name is empty"),
        ("\n", "gt.csv: holds no annotation"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AvaError, match=message):
        read_annotations(written(tmp_path / "gt.csv", text))


def test_results_exclusions_and_label_map(tmp_path: Path) -> None:
    assert read_results(written(tmp_path / "none.csv", "")).frames == []
    with pytest.raises(AvaError, match=r"det.csv:1: the score must be finite"):
        read_results(written(tmp_path / "det.csv", f"{ROW},inf\n"))
    box = np.asarray([0.123456, 0, 1, 0.5])
    assert write_results(tmp_path / "out.csv", [("v,0902", box, 12, 0.25)]) == 1
    assert (tmp_path / "out.csv").read_text() == "v,0902,0.12346,0.00000,1.00000,0.50000,12,0.25000\n"
    assert read_exclusions(written(tmp_path / "ex.csv", "v,902\n")) == {"v,0902"}
    with pytest.raises(AvaError, match=r"ex\.csv:1: expected `video,second`"):
        read_exclusions(written(tmp_path / "ex.csv", "v\n"))
    blocks = 'item {\n  name: "a {b}"\n  id: 3\n}\nlabel {\n name: "c"\n label_id: 80\n}\n'.replace(" {b}", " b")
    assert read_label_map(written(tmp_path / "l.pbtxt", blocks)) == {3: "a b", 80: "c"}
    for text, message in (
        ('item {\n name: "a"\n}', "needs a name and an id"), ('item {\n name: "a"\n id: 12x\n}', "needs a name and an id"),
        (blocks + 'item {\n name: "d"\n id: 5\n', "a block is not closed"),
        (blocks + blocks, "id 3 is given twice"), ("", "holds no label"),
    ):  # fmt: skip
        with pytest.raises(AvaError, match=message):
            read_label_map(written(tmp_path / "l.pbtxt", text))


def test_person_boxes_of_three_formats(tmp_path: Path) -> None:
    expected = np.asarray([[0.25, 0.5, 0.75, 1.0, 0.9]])
    table = read_person_boxes(written(tmp_path / "p.csv", "v,902,0.25,0.5,0.75,1.0,0.9\n"))
    np.testing.assert_allclose(table["v,0902"], expected)
    table = read_person_boxes(written(tmp_path / "p8.csv", "v,902,0.25,0.5,0.75,1.0,,0.9\n"))
    np.testing.assert_allclose(table["v,0902"], expected)
    images = {"images": [{"id": 7, "movie": "v", "timestamp": 902, "width": 640, "height": 360}]}
    written(tmp_path / "images.json", json.dumps(images))
    boxes = written(tmp_path / "p.json", json.dumps([{"image_id": 7, "bbox": [160, 180, 320, 180], "score": 0.9}]))
    np.testing.assert_allclose(read_person_boxes(boxes, tmp_path / "images.json")["v,0902"], expected)
    with pytest.raises(AvaError, match="needs the JSON of its images"):
        read_person_boxes(boxes)
    written(boxes, json.dumps([{"image_id": 8, "bbox": [1, 1, 2, 2], "score": 0.9}]))
    with pytest.raises(AvaError, match="entry 0 is no box of a known image"):
        read_person_boxes(boxes, tmp_path / "images.json")
    written(boxes, json.dumps([{"image_id": 7, "bbox": [960, 180, 320, 180], "score": 0.9}]))
    with pytest.raises(AvaError, match=r"p\.json: v,0902: a box lies outside the frame"):
        read_person_boxes(boxes, tmp_path / "images.json")
    with pytest.raises(AvaError, match=r"p\.csv: v,0902: the score of a person must lie in 0\.\.1, got 90"):
        read_person_boxes(written(tmp_path / "p.csv", "v,902,0.25,0.5,0.75,1.0,90\n"))
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"v,0902": expected}))
    np.testing.assert_allclose(read_person_boxes(tmp_path / "p.pkl")["v,0902"], expected)


class _Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"v,0902": _Touches(tmp_path / "ran")}))
    with pytest.raises(AvaError, match="not allowed"):
        read_person_boxes(tmp_path / "p.pkl")
    assert not (tmp_path / "ran").exists()


def test_folders_of_images_give_the_clip_of_the_video(tmp_path: Path) -> None:
    root = write_ava_scenes(tmp_path / "scenes", train=2, val=1)
    (tmp_path / "images").mkdir()
    for file in (root / "videos").iterdir():
        write_jpegs(decode_video(str(file), np.arange(FRAMES)), tmp_path / "images" / file.stem)
    data = AvaDataConfig(
        videos=str(root / "videos"), annotations=str(root / "train.csv"), workers=1, short_side=(48, 48), frame_rate=24,
        box_jitter=False,
    )  # fmt: skip
    batches = []
    for videos in (root / "videos", tmp_path / "images"):
        with AvaLoader(dataclasses.replace(data, videos=str(videos)), frames=4, size=48, clips_per_batch=2) as loader:
            batches.append(next(iter(loader)))
    ours, theirs = batches
    assert np.abs(ours.clip.numpy().astype(int) - theirs.clip.numpy().astype(int)).mean() < 6  # JPEG
    assert ours.boxes.equal(theirs.boxes)
    frame = key_frames(read_annotations(root / "train.csv"))[0]
    assert key_frame_index(str(root / "videos" / f"{frame.video}.mp4"), False, FRAMES, frame, data) == 24


def test_a_mirrored_clip_mirrors_its_boxes_and_processes_change_nothing(tmp_path: Path) -> None:
    root = write_ava_scenes(tmp_path / "scenes", train=4, val=1)
    data = AvaDataConfig(
        videos=str(root / "videos"), annotations=str(root / "train.csv"), workers=1, short_side=(48, 48), box_jitter=False
    )
    seen = []
    for flip, workers in ((False, 1), (True, 0), (True, 3)):
        changed = dataclasses.replace(data, flip=flip, workers=workers)
        with AvaLoader(changed, frames=4, size=48, clips_per_batch=4) as loader:
            seen.append(next(iter(loader)))
    plain, mirrored, several = seen
    assert mirrored.clip.equal(several.clip)
    assert mirrored.boxes.equal(several.boxes)
    turned = 0
    for i in range(4):
        a, b = (batch.boxes[batch.boxes[:, 0] == i, 1:] for batch in (plain, mirrored))
        if plain.clip[i].equal(mirrored.clip[i]):
            assert a.equal(b)
        else:
            assert plain.clip[i].flip(2).equal(mirrored.clip[i])
            np.testing.assert_allclose(b[:, 0], 47 - a[:, 2].clip(max=48), atol=1e-4)
            turned += 1
    assert 0 < turned <= 4


def test_evaluation_is_the_same_from_processes_and_leaves_out_what_is_damaged(tmp_path: Path) -> None:
    root = write_ava_scenes(tmp_path / "scenes", train=1, val=3)
    data = AvaDataConfig(
        videos=str(root / "videos"), annotations=str(root / "val.csv"), boxes=str(root / "people.csv"), short_side=(32, 32),
        max_bad_rate=1.0,
    )  # fmt: skip
    frames = key_frames(read_annotations(root / "val.csv"))
    bad = root / "videos" / f"{frames[0].video}.mp4"
    bad.write_bytes(bad.read_bytes()[:200])
    here, there = (
        list(AvaEvaluationLoader(dataclasses.replace(data, workers=workers), frames=4, size=48)) for workers in (0, 2)
    )
    assert [clip.frame.name for clip in here] == [clip.frame.name for clip in there]
    assert {clip.frame.video for clip in here} == {frame.video for frame in frames} - {bad.stem}
    for a, b in zip(here, there):
        assert min(a.clip.shape[1:3]) == 32
        assert a.clip.equal(b.clip)
        assert a.boxes.equal(b.boxes)
        assert np.array_equal(a.shares, b.shares)
        assert np.array_equal(a.scores, b.scores)


def test_evaluation_without_anybody_is_an_error_not_a_score(tmp_path: Path) -> None:
    root = write_ava_scenes(tmp_path / "scenes", train=1, val=2)
    data = AvaDataConfig(
        videos=str(root / "videos"), annotations=str(root / "val.csv"), boxes=str(root / "people.csv"), box_score=0.99
    )
    with pytest.raises(AvaError, match="no key frame has boxes"):
        AvaEvaluationLoader(data, frames=4, size=48)
