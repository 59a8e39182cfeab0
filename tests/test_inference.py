"""One video in, views or a prediction out."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.models.tiny import classify
from vmae2_fast.inference import load_model, read_views
from vmae2_fast.models import save_weights

FRAMES = 40


def write_timed(path: Path) -> Path:
    """40 frames of 64x48: the grey of the middle tells the frame (20 + 5 t), black is left of it and white right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)  # lossless
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        for t in range(FRAMES):
            image = np.full((48, 64, 3), 20 + 5 * t, dtype=np.uint8)
            image[:, :16], image[:, 48:] = 0, 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_views_are_segment_major(tmp_path):
    views = read_views(write_timed(tmp_path / "timed.mkv"), frames=4, size=48, stride=4, segments=2, crops=2).numpy()
    assert views.shape == (4, 4, 48, 48, 3)
    seen = []
    for view in views:
        left = bool(view[:, :, 0].max() < 10)  # this crop begins with the black columns, the other ends with the white ones
        assert left != bool(view[:, :, -1].min() > 245)
        middle = view[:, :, 16:] if left else view[:, :, :32]
        seen.append(("left" if left else "right", [round((frame.mean() - 20) / 5) for frame in middle]))
    first, second = [0, 4, 8, 12], [24, 28, 32, 36]
    assert seen == [("left", first), ("right", first), ("left", second), ("right", second)]


def test_a_trunk_and_a_file_of_something_else_are_told_apart(tmp_path):
    save_weights(classify(num_classes=0), tmp_path / "trunk.safetensors")
    assert load_model(str(tmp_path / "trunk.safetensors"), head_needed=False).model.config.num_classes == 0
    with pytest.raises(ValueError, match=r"trunk\.safetensors holds a trunk without a head; fine-tune it first"):
        load_model(str(tmp_path / "trunk.safetensors"))
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"does not fit vit_small_patch16_224: missing: patch_embed.*unexpected: conv1\.wei"):
        load_model(str(tmp_path / "other.pth"), "vit_small_patch16_224")
