"""The user's own script: released weights, a folder of videos, an exported model."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.tiny import official
from vmae2_fast.data.synthetic import write_mp4
from vmae2_fast.inference import classify as classify_video
from vmae2_fast.inference import load_model
from vmae2_fast.models import create_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OPTIONS = {"frames": 8, "size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("finetune_folder")
    sys.modules.pop("finetune_folder")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.RandomState(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, channel in (("red", 0), ("blue", 2)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                video = np.full((16, 48, 48, 3), rng.randint(30, 60), dtype=np.uint8)
                video[..., channel] += rng.randint(80, 120)
                write_mp4(video, root / split / name / f"{number}.mp4")
    return root


def test_official_weights_to_an_exported_model(example, videos, tmp_path):
    """An official K710 file (a pickle with its command line) becomes a model of two classes that knows the unseen clips."""
    torch.manual_seed(0)
    k710 = create_model("vit_base_patch16_224", num_classes=710, init_std=0.1, **OPTIONS)
    official(k710, tmp_path / "k710.pth")
    found = example.finetune(
        str(videos), str(tmp_path / "k710.pth"), str(tmp_path / "actions.pt2"), epochs=12, lr=1e-3, stride=2,
        head_init_scale=1.0, **OPTIONS,
    )  # fmt: skip
    assert found["classes"] == ["blue", "red"]
    assert found["tested_on_training"] is False
    assert found["losses"][-1] < found["losses"][0] - 0.2
    assert found["top1"] == 1.0
    assert found["max_difference"] <= 1e-4
    loaded = load_model(str(tmp_path / "actions.safetensors"))
    best = classify_video(loaded, videos / "val" / "red" / "0.mp4", segments=1, crops=1, stride=2)[0]
    assert best.label == "red"


def test_bad_weights_given_to_the_script(videos, tmp_path):
    command = [sys.executable, str(EXAMPLES / "finetune_folder.py"), str(videos), str(tmp_path / "none.pth")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "none.pth: no such checkpoint" in done.stderr
