"""What a run on two ranks shows: the clips of unusual steps, whoever had them, and reconstructions by a model in slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny_runs as tiny
from tests.drills.judge import done, full, same_bits
from vmae2_fast.data.loader import VideoLoader
from vmae2_fast.train.log import read_lines

# The sixth step has no finite loss on rank 1, the nineteenth thirty times its loss on rank 0.
UNUSUAL = """
original_loss = Task.loss
def disturbed(self, batch):
    found = original_loss(self, batch)
    step, first = divmod(int(batch.position[0]), 4)
    if step == 5 and rank == 1:
        found["loss_sum"] = found["loss_sum"] * float("nan")
    if step == 18 and rank == 0:
        found["loss_sum"] = found["loss_sum"] * 30
    return found
Task.loss = disturbed
"""


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=full)])
def test_spikes_name_the_clips_of_both_ranks(mode, clips, forks, tmp_path):
    codes, log = forks.run(clips, tmp_path, ranks=2, parallel=mode, micro_batch=1, before=UNUSUAL, epochs=11, log_every=4)
    assert codes == [0, 0], log
    spikes = read_lines(tmp_path / "tiny_pretrain" / "spikes.jsonl")
    assert [(s["step"], s["loss"] is None, s["skipped"]) for s in spikes] == [(6, True, True), (19, False, False)]
    assert spikes[1]["loss"] > 10 * spikes[1]["median"]
    config = tiny.pretrain_config(clips, tmp_path)
    loader = VideoLoader(config.data, frames=tiny.FRAMES, size=tiny.SIZE, clips_per_batch=1, seed=config.seed, steps=88)
    with loader:
        paths = [batch.paths[0] for batch in loader]
    for spike in spikes:
        assert sorted((b["rank"], b["micro_batch"]) for b in spike["batches"]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        positions = [b["positions"] for b in spike["batches"]]
        assert sorted(positions) == [[p, p] for p in range(4 * (spike["step"] - 1), 4 * spike["step"])]
        assert [b["paths"] for b in spike["batches"]] == [[paths[first]] for first, _ in positions]
        assert all(position[0] % 2 == b["rank"] for position, b in zip(positions, spike["batches"]))


# Without dropped branches both runs have the same random numbers; a moving average of the weights is what is validated.
LOOKING = """
import dataclasses
from tests import tiny_runs as tiny
validation = tiny.data(config.data.sources[0].root)
config = dataclasses.replace(config, validation=validation, optim=dataclasses.replace(config.optim, ema_decay=0.5))
"""
STILL = LOOKING + "config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.0, min_lr=0.0))\n"


def _pictures(out: Path) -> dict[str, np.ndarray]:
    found = (out / "tiny_pretrain" / "pictures").glob("reconstruction-*.png")
    return {path.name: np.asarray(Image.open(path)) for path in found}


def test_pictures_and_validations_of_a_sharded_model_change_nothing(clips, forks, tmp_path):
    """A forward without a backward leaves parameters gathered, which the next step must not take for its own."""
    looks: dict[str, dict] = {"not": {}, "often": {"validate_every": 1, "picture_every": 6}}
    for name, changes in looks.items():
        codes, log = forks.run(clips, tmp_path / name, ranks=2, parallel="fsdp", before=LOOKING, **changes)
        assert codes == [0, 0], log
        assert "no pictures" not in log
    assert sorted(_pictures(tmp_path / "often")) == [f"reconstruction-{step:08d}.png" for step in (6, 12)]
    seen, unseen = done(tmp_path / "often"), done(tmp_path / "not")
    assert same_bits(seen["weights"], unseen["weights"])
    assert (seen["last_loss"], seen["validation"]) == (unseen["last_loss"], unseen["validation"])


@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_a_sharded_model_draws_what_a_whole_one_draws(mode, clips, forks, tmp_path):
    options = {"before": STILL, "epochs": 1, "picture_every": 2}
    for name, changes in (("whole", {}), ("sharded", {"ranks": 2, "parallel": mode, "shard_within": 2})):
        codes, log = forks.run(clips, tmp_path / name, **options, **changes)
        assert set(codes) == {0}, log
    ((name, whole),) = _pictures(tmp_path / "whole").items()
    assert np.array_equal(_pictures(tmp_path / "sharded")[name], whole)
