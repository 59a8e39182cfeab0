"""Killed in the middle of an epoch and run again: the same bits on one rank and two, whatever feeds and compiles the model."""

from __future__ import annotations

import itertools
import random
import signal

import pytest

from tests.drills import ranks
from tests.drills.judge import FULL, done, same_run

COMPILE = """
import torch._dynamo
original_compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **options: original_compile(self, backend="aot_eager", **options)
"""
CELLS = list(itertools.product((1, 2), (0, 2), ("none", "block"), ("none", "blocks")))
SAMPLED = [(1, 2, "block", "none"), (2, 0, "block", "blocks")]


@pytest.fixture(scope="module")
def undisturbed(clips, forks, tmp_path_factory):
    """Summary of the run nothing happened to, decoded in the training process; made once for each of its settings."""
    known = {}

    def get(number, checkpointing, compiled):
        key = number, checkpointing, compiled
        if key not in known:
            out = tmp_path_factory.mktemp("undisturbed")
            options = {"model": {"activation_checkpoint": checkpointing}, "compile": compiled}
            codes, log = forks.run(clips, out, ranks=number, before=COMPILE, checkpoint_every=1, **options)
            assert codes == [0] * number, log
            known[key] = done(out)
        return known[key]

    return get


@pytest.mark.parametrize(("number", "workers", "checkpointing", "compiled"), CELLS if FULL else SAMPLED)
def test_killed_at_a_seeded_step_it_ends_with_the_same_bits(
    clips, forks, undisturbed, tmp_path, number, workers, checkpointing, compiled
):
    """Epochs have two steps: what was saved last before a kill in an even step lies in the middle of one."""
    rng = random.Random(str((number, workers, checkpointing, compiled)))
    step, victim = rng.randrange(2, 11, 2) + 1, rng.randrange(number)
    options = {
        "ranks": number, "data": {"workers": workers}, "model": {"activation_checkpoint": checkpointing},
        "compile": compiled, "checkpoint_every": 1,
    }  # fmt: skip
    kill = ranks.at_step(f"if number == {step} and rank == {victim}: os.kill(os.getpid(), signal.SIGKILL)")
    codes, log = forks.run(clips, tmp_path, before=COMPILE + kill, **options)
    assert codes[victim] == -signal.SIGKILL, log
    assert all(codes), log  # a rank alone does not go on
    left = max((tmp_path / "tiny_pretrain" / "checkpoints").glob("step-*")).name
    assert left in (f"step-{step - 1:08d}", f"step-{step:08d}")  # the last may not have been committed yet
    codes, log = forks.run(clips, tmp_path, before=COMPILE, **options)
    assert codes == [0] * number, log
    assert same_run(done(tmp_path), undisturbed(number, checkpointing, compiled))
