"""Features: right windows, one decode a frame, the same values in any batch, files that appear whole, shares."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from tests import tiny_runs as tiny
from vmae2_fast import cli
from vmae2_fast.config import ExtractConfig
from vmae2_fast.data import decode_video
from vmae2_fast.data.plan import cut_test_views
from vmae2_fast.models import build_model, save_weights
from vmae2_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from vmae2_fast.tasks.features import extract_features, find_videos, video_features


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    tiny.write_clips(root, per_class=1, frames=50)
    shutil.copy(root / "left" / "0.mp4", root / "alone.mp4")
    return root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(tiny.CLASSIFY_MODEL).eval()


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("batch", [1, 4])
def test_clip_level_by_hand(resize, batch, clips, model):
    config = ExtractConfig(stride=2, step=5, batch=batch, resize=resize)
    features, frames, _ = video_features(model, clips / "alone.mp4", config)
    starts = list(range(0, 50 - 16 + 1, 5))
    assert frames.tolist() == [[s, s + 15] for s in starts]
    video = torch.from_numpy(decode_video(str(clips / "alone.mp4"), np.arange(50)))
    if resize == "crop":
        square = cut_test_views(video, segments=1, size=tiny.SIZE, crops=1)[0]
        seen = torch.stack([square[s : s + 16 : 2] for s in starts])
    else:
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = F.interpolate(video.permute(0, 3, 1, 2) / 255, (tiny.SIZE, tiny.SIZE), mode="bilinear")
        seen = torch.stack([((pixels - mean) / std)[s : s + 16 : 2].transpose(0, 1) for s in starts])
    with torch.no_grad():
        expected = model.forward_features(seen)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_frame_level_covers_the_video_once(clips, model):
    features, frames, _ = video_features(model, clips / "alone.mp4", ExtractConfig(level="frame", batch=3))
    assert frames.tolist() == [[k, k + 2] for k in range(0, 50, 2)]
    assert features.shape == (25, 16)
    video = torch.from_numpy(decode_video(str(clips / "alone.mp4"), np.arange(8, 16)))
    square = cut_test_views(video, segments=1, size=tiny.SIZE, crops=1)
    with torch.no_grad():
        tokens = model.fc_norm(model.tokens(square).view(4, 16, -1).mean(1))
    np.testing.assert_allclose(features[4:8], tokens.numpy(), rtol=1e-5, atol=1e-6)


def test_a_short_video_is_one_window(clips, model, tmp_path):
    tiny.write_clips(tmp_path, per_class=1, frames=5)
    features, frames, _ = video_features(model, tmp_path / "left" / "0.mp4", ExtractConfig(step=4))
    assert frames.tolist() == [[0, 5]]
    assert np.isfinite(features).all()
    assert video_features(model, tmp_path / "left" / "0.mp4", ExtractConfig(level="frame"))[1].tolist() == [
        [0, 2], [2, 4], [4, 5]
    ]  # fmt: skip


def _weights(tmp_path: Path, model) -> str:
    save_weights(model, tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def _extract(capsys, *arguments: str) -> dict:
    cli.main(["extract", *arguments, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_files_resume_and_shares(clips, model, tmp_path, capsys):
    weights, out = _weights(tmp_path, model), str(tmp_path / "out")
    common = ["--weights", weights, "--out", out, "--step", "10", "--format", "safetensors"]
    first = _extract(capsys, str(clips), *common, "--shard", "1/2")
    assert first["written"] == 2
    files = {p.relative_to(out) for p in Path(out).rglob("*.safetensors")}
    assert files < {Path("alone.safetensors"), Path("left/0.safetensors"), Path("right/0.safetensors")}
    times = {p: (Path(out) / p).stat().st_mtime_ns for p in files}
    rest = _extract(capsys, str(clips), *common)
    assert (rest["written"], rest["skipped"]) == (1, 2)
    assert times == {p: (Path(out) / p).stat().st_mtime_ns for p in files}
    saved = load_file(Path(out) / "left" / "0.safetensors")
    features, frames, _ = video_features(model, clips / "left" / "0.mp4", ExtractConfig(step=10))
    np.testing.assert_allclose(saved["features"], features, rtol=1e-6)
    assert np.array_equal(saved["frames"], frames)
    with pytest.raises(SystemExit):
        cli.main(["extract", str(clips), *common[:-4], "--step", "5", "--format", "safetensors"])
    assert "features taken in another way (step: 10 there, 5 now)" in capsys.readouterr().err
    for change, told in ((dataclasses.replace(tiny.CLASSIFY_MODEL, num_classes=7), None), (tiny.CLASSIFY_MODEL, "weights: ")):
        other = build_model(change)
        if told is None:  # another head on the same trunk gives the same features
            other.load_state_dict({**other.state_dict(), **{k: v for k, v in model.state_dict().items() if "head" not in k}})
        save_weights(other, tmp_path / "w.safetensors")
        if told is None:
            assert _extract(capsys, str(clips), *common)["skipped"] == 3
        else:
            with pytest.raises(SystemExit):
                cli.main(["extract", str(clips), *common])
            assert told in capsys.readouterr().err


def test_npy_and_pixels_without_normalisation(clips, model, tmp_path, capsys):
    weights = _weights(tmp_path, model)
    video = str(clips / "alone.mp4")
    found = {}
    for normalize in ("imagenet", "none"):
        _extract(capsys, video, "--weights", weights, "--out", str(tmp_path / normalize), "--normalize", normalize)
        found[normalize] = np.load(tmp_path / normalize / "alone.npy", allow_pickle=False)
        assert json.loads((tmp_path / normalize / "features.json").read_text())["normalize"] == normalize
    assert found["imagenet"].shape == (6, 16)
    assert found["imagenet"].dtype == np.float32
    assert not np.allclose(found["imagenet"], found["none"], atol=1e-3)


def test_an_encoder_without_a_head_is_enough(clips, tmp_path, capsys):
    model = build_model(dataclasses.replace(tiny.CLASSIFY_MODEL, num_classes=0))
    found = _extract(capsys, str(clips / "alone.mp4"), "--weights", _weights(tmp_path, model), "--out", str(tmp_path / "o"))
    assert found["rows"] == 6


def test_a_kill_leaves_no_half_written_features(clips, model, tmp_path, monkeypatch):
    videos = find_videos([clips / "alone.mp4"])

    def killed(file, array, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            extract_features(model, videos, tmp_path / "out", ExtractConfig())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["features.json", "videos.jsonl"]
    assert extract_features(model, videos, tmp_path / "out", ExtractConfig())["written"] == 1


def test_names_and_bad_input(clips, tmp_path):
    assert set(find_videos([clips])) == {"alone", "left/0", "right/0"}
    with pytest.raises(ValueError, match="nowhere: no such video"):
        find_videos([tmp_path / "nowhere"])
    assert set(find_videos([clips / "left"], by_stem=True)) == {"0"}
    with pytest.raises(ValueError, match="have the same name 0"):
        find_videos([clips], by_stem=True)
    with pytest.raises(ValueError, match="have the same name 0"):
        find_videos([clips / "left" / "0.mp4", clips / "right" / "0.mp4"])
    with pytest.raises(ValueError, match="no video in it"):
        find_videos([tmp_path])
    with pytest.raises(ValueError, match="step is for clip level"):
        ExtractConfig(level="frame", step=4)
