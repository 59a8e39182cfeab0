"""The moving scenes: real files, official lists, labels that only motion tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data import VideoLoader, decode_video, open_sources, probe
from vmae2_fast.data.synthetic import CLASSES, TARGET_CLASSES, SceneSet, render_scene, write_moving_scenes

SMALL = SceneSet(
    unlabeled_video=3,
    unlabeled_frames=2,
    labeled_video=1,
    labeled_frames=1,
    target_train=1,
    target_val=1,
    labeled_val=1,
    holdout=2,
)


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moving_scenes(tmp_path_factory.mktemp("data") / "scenes", SMALL)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


def test_files_decode_to_the_rendered_scene(toml: Path) -> None:
    path = str(toml.parent / "unlabeled_video" / "train_00000.mp4")
    assert probe(path).num_frames == SMALL.frames
    video = decode_video(path, np.arange(SMALL.frames))
    scene = render_scene(CLASSES[0], np.random.Generator(np.random.Philox(key=[SMALL.seed, 0])), frames=24, size=64)
    assert np.abs(video.astype(int) - scene).mean() < 6  # H.264 and 4:2:0 chroma


def test_all_sources_open_with_their_classes_and_strides(toml: Path) -> None:
    def source(name: str, split: str = "train", sampling: str = "dense"):
        (opened,) = open_sources(
            DataConfig(sources=(SourceConfig(name=name, split=split),), datasets=str(toml), sampling=sampling)
        )
        return opened

    assert [len(source(n, sampling="pretrain").manifest) for n in ("unlabeled_video", "unlabeled_frames")] == [3, 2]
    assert (source("labeled_video").stride, source("labeled_frames").stride) == (2, 1)
    assert source("labeled_frames").label_names == CLASSES
    assert source("target", "val").label_names == TARGET_CLASSES


def test_both_kinds_of_source_feed_one_loader(toml: Path) -> None:
    data = DataConfig(
        sources=tuple(SourceConfig(name=n) for n in ("labeled_video", "labeled_frames")), datasets=str(toml), sampling="dense"
    )
    with VideoLoader(data, frames=8, size=48, clips_per_batch=24, steps=1) as loader:
        (batch,) = loader
    assert batch.clip.shape == (24, 8, 48, 48, 3)
    assert sorted(batch.label.tolist()) == sorted([*range(12)] * 2)
    assert {Path(p).suffix for p in batch.paths} == {".mp4", ""}


def test_opposite_drifts_are_the_same_scene_backwards() -> None:
    # A wave of direction a drifting forward is, frame by frame, one of direction a drifting backward: only time tells.
    for a, b in (("turn_left", "turn_right"), ("red_then_blue", "blue_then_red")):
        first, second = (render_scene(kind, rng(5), frames=9, size=32) for kind in (a, b))
        assert not np.array_equal(first, second)
    forward, backward = (render_scene(kind, rng(5), frames=9, size=32) for kind in ("turn_left", "turn_right"))
    assert np.array_equal(forward[4], backward[4])  # the middle frame is the same picture


def test_writing_is_idempotent_and_refuses_another_set(toml: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in toml.parent.rglob("*")}
    assert write_moving_scenes(toml.parent, SMALL) == toml
    assert before == {p: p.stat().st_mtime_ns for p in toml.parent.rglob("*")}
    with pytest.raises(FileExistsError, match="holds another data set"):
        write_moving_scenes(toml.parent, SceneSet(seed=1))


def test_an_interrupted_write_leaves_nothing_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vmae2_fast.data.synthetic.source_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            write_moving_scenes(tmp_path / "scenes", SMALL)
    assert not (tmp_path / "scenes").exists()
    assert write_moving_scenes(tmp_path / "scenes", SMALL).is_file()
