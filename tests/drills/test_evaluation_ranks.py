"""Validation on two ranks: each looks at its share of the videos, and both know what one process finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny_runs as tiny
from tests.drills.judge import full
from vmae2_fast.train.log import read_metrics

# Nothing is learned, so that the weights are those of one process to the bit. Every rank notes what it is given.
BEFORE = """
import dataclasses
from tests import tiny_runs as tiny
from vmae2_fast.data.evaluation_loader import EvaluationLoader

kind = {kind!r}
clips = config.data.sources[0].root
if kind in ("distill", "features"):
    config = tiny.with_train(tiny.distill_config(clips, out, "random"), parallel=config.train.parallel)
if kind == "features":
    student = dataclasses.replace(tiny.PRETRAIN_MODEL, decoder_outputs=None)
    config = dataclasses.replace(config, objective="features", model=student)
if kind == "pretrain":
    config = dataclasses.replace(config, validation=tiny.data(clips))
config = tiny.with_train(config, epochs=1)
config = dataclasses.replace(config, name="run", optim=dataclasses.replace(config.optim, lr=0.0, min_lr=0.0))

views = EvaluationLoader._views
def noting(self, index, *others):
    with (out / f"looked-at-{{rank}}").open("a") as file:
        file.write(f"{{index}}\\n")
    return views(self, index, *others)
EvaluationLoader._views = noting
"""


@pytest.fixture(scope="module")
def seven_clips(tmp_path_factory) -> Path:
    """Eight videos of which one cannot be decoded."""
    root = tiny.write_clips(tmp_path_factory.mktemp("seven"))
    (root / "left" / "1.mp4").write_bytes(b"no video")
    return root


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("classify", "ddp"), ("pretrain", "ddp"), ("distill", "ddp"), ("features", "ddp"),
        pytest.param("classify", "fsdp", marks=full), pytest.param("pretrain", "fsdp", marks=full),
    ],
)  # fmt: skip
def test_two_ranks_find_what_one_finds(kind, mode, seven_clips, forks, tmp_path):
    found = {}
    for name, count in (("one", 1), ("two", 2)):
        codes, log = forks.run(
            seven_clips, tmp_path / name, ranks=count, kind="pretrain" if kind == "pretrain" else "classify",
            before=BEFORE.format(kind=kind), parallel=mode,
        )  # fmt: skip
        assert codes == [0] * count, log
        found[name] = json.loads((tmp_path / name / "run" / "done.json").read_text())["validation"]
        assert [e["step"] for e in read_metrics(tmp_path / name / "run" / "metrics.jsonl", "validation")] == [2]
    assert found["one"].keys() == found["two"].keys()
    for key, value in found["one"].items():
        # sums of losses depend on what is in a batch, by their rounding alone; counts and shares do not
        assert found["two"][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
    assert found["two"]["left_out"] == {str(seven_clips / "left" / "1.mp4"): 1}
    shares = [sorted(map(int, (tmp_path / "two" / f"looked-at-{r}").read_text().split())) for r in range(2)]
    assert shares == ([[0, 2, 4, 6], [3, 5, 7]] if mode == "ddp" else [[0, 2, 3, 4, 5, 6, 7]] * 2)


def test_a_rank_without_a_video_learns_what_the_others_found(forks, tmp_path):
    root = tiny.write_clips(tmp_path / "clips", per_class=2)
    only = BEFORE.format(kind="classify") + """
from vmae2_fast.tasks.classify import ClassifyTask
original = ClassifyTask.validation_views
def first(self, quarantine=None):
    loader = original(self, quarantine)
    loader._numbers = [n for n in loader._numbers if n == 0]
    return loader
ClassifyTask.validation_views = first
"""
    codes, log = forks.run(root, tmp_path / "two", ranks=2, kind="classify", before=only)
    assert codes == [0, 0], log
    assert json.loads((tmp_path / "two" / "run" / "done.json").read_text())["validation"]["videos"] == 1
