"""Detection on two ranks: what one process learns and scores, each rank running and evaluating its share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from tests.drills import ranks
from tests.drills.judge import full
from vmae2_fast.data.synthetic_ava import write_ava_scenes
from vmae2_fast.data.synthetic_tad import write_tad_features, write_untrimmed_scenes
from vmae2_fast.models import build_model, save_weights
from vmae2_fast.train import train
from vmae2_fast.train.log import read_metrics

KINDS = {"ava": "toy_ava", "tad": "toy"}


# Drop path is drawn for each rank: without it both ranks together are the one process.
BEFORE = """
import dataclasses
if hasattr(config, "detector"):
    config = dataclasses.replace(config, detector=dataclasses.replace(config.detector, drop_path=0.0))
else:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path=0.0))
"""
# Models that are split are built without memory.
TOLD = """
distribute = loop.distribute
def telling(task, world):
    if all(parameter.is_meta for parameter in task.model.parameters()):
        print("built on meta")
    return distribute(task, world)
loop.distribute = telling
"""
KILL = ranks.at_step("if number == 3: os.kill(os.getpid(), signal.SIGKILL)")


def _alone(kind: str, root: Path, out: Path, **changes: object) -> dict:
    scope = {"config": tiny.with_train(getattr(tiny, f"{kind}_config")(root, out), **changes)}
    exec(BEFORE, scope)
    return train(scope["config"])


@pytest.mark.parametrize(
    ("kind", "mode"), [("ava", "ddp"), pytest.param("tad", "ddp", marks=full), pytest.param("ava", "fsdp", marks=full)]
)
def test_two_ranks_learn_and_score_as_one(kind, mode, forks, tmp_path, one_thread):
    root = tmp_path / "data"
    if kind == "ava":
        write_ava_scenes(root, train=16, val=5)
    else:
        write_tad_features(root, train=16, test=5)
    options = {"epochs": 2, "global_batch": 4, "checkpoint_every": 2, "log_every": 1}
    single = _alone(kind, root, tmp_path / "single", **options)
    # Both ranks are killed on the way; started again, they go on from the checkpoint before.
    options["parallel"] = mode
    codes, log = forks.run(root, tmp_path / "both", ranks=2, kind=kind, before=BEFORE + KILL, **options)
    assert codes == [-9, -9], log
    assert not (tmp_path / "both" / KINDS[kind] / "done.json").exists()
    codes, log = forks.run(root, tmp_path / "both", ranks=2, kind=kind, before=BEFORE + TOLD, **options)
    assert codes == [0, 0], log
    assert ("built on meta" in log) == (mode == "fsdp")
    both = json.loads((tmp_path / "both" / KINDS[kind] / "done.json").read_text())
    losses = [[line["loss"] for line in read_metrics(Path(run["directory"]) / "metrics.jsonl")] for run in (both, single)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = load_file(both["weights"]), load_file(single["weights"])
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-3)) for n in ours)
    assert worst < 1e-2  # eight steps of AdamW amplify the other order of summation
    metric = "frame_map" if kind == "ava" else "average_map"
    scores = both["validation"], single["validation"]
    assert scores[0][metric] == pytest.approx(scores[1][metric], abs=0.02)  # near ties change places
    count = "boxes" if kind == "ava" else "events"
    assert scores[0][count] == scores[1][count] > 0
    assert both["validation"]["left_out"] == single["validation"]["left_out"] == {}


def test_ranks_share_the_features_that_are_missing(forks, tmp_path, one_thread):
    root = tmp_path / "data"
    write_untrimmed_scenes(root, train=4, test=2, size=32)
    torch.manual_seed(0)
    save_weights(build_model(tiny.TAD_TRUNK), tmp_path / "trunk.safetensors")
    videos = BEFORE + f"""
parts = {{n: dataclasses.replace(getattr(config, n), videos={str(root / "videos")!r}) for n in ("data", "validation")}}
config = dataclasses.replace(config, trunk_weights={str(tmp_path / "trunk.safetensors")!r}, **parts)
"""
    codes, log = forks.run(root, tmp_path / "both", ranks=2, kind="tad", before=videos, epochs=2, global_batch=4)
    assert codes == [0, 0], log
    assert len(list((root / "features").glob("*.npy"))) == 6
    names = [json.loads(line)["name"] for line in (root / "features" / "videos.jsonl").read_text().splitlines()]
    assert len(names) == len(set(names)) == 6  # each taken once
