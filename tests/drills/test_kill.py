"""kill -9 where it hurts most: in a step, in a save, around a commit; the rerun ends with the bits of a whole run."""

from __future__ import annotations

import signal

import pytest

from tests.drills.judge import done, same_run

# The process kills itself without any chance to clean up.
KILL = """
def kill():
    os.kill(os.getpid(), signal.SIGKILL)

step, replace, save_file = Optimizer.step, os.replace, checkpoint.save_file

def stepping(self, number, loss):
    result = step(self, number, loss)
    if where == "step" and number == 9:
        kill()
    return result

def replacing(source, target):
    second = str(target).endswith("step-00000008")
    if where == "before commit" and second:
        kill()
    replace(source, target)
    if where == "after commit" and second:
        kill()

def saving(tensors, path):
    save_file(tensors, path)
    if where == "half a save" and path.name.startswith("optimizer") and list(path.parent.parent.glob("step-*")):
        path.write_bytes(path.read_bytes()[:100])
        kill()

Optimizer.step, os.replace, checkpoint.save_file = stepping, replacing, saving
"""


@pytest.mark.parametrize(
    ("where", "left"),
    # killed in a step, the save before it may still be on its way to the disk
    [("step", (4, 8)), ("half a save", (4,)), ("before commit", (4,)), ("after commit", (8,))],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
def test_killed_and_run_again_ends_with_the_same_bits(clips, whole, forks, tmp_path, where, left):
    codes, log = forks.run(clips, tmp_path, before=f"where = {where!r}\n{KILL}")
    assert codes == [-signal.SIGKILL], log
    run = tmp_path / "tiny_pretrain"
    assert not (run / "done.json").exists()
    assert max(run.glob("checkpoints/step-*")).name in [f"step-{step:08d}" for step in left]
    codes, log = forks.run(clips, tmp_path)
    assert codes == [0], log
    assert same_run(done(tmp_path), whole)
    assert not list((run / "checkpoints").glob(".tmp-*"))
