"""Kills at seeded events and flipped bytes, in numbers: 10 of each in the tests, 100 kills and 50 flips in `make drills`."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.drills.judge import FULL, done, same_bits
from vmae2_fast.train import checkpoint

KILLS, FLIPS = (25, 50) if FULL else (10, 10)
SEEDS = range(4) if FULL else range(1)

# Events are steps, opened, synced, written and renamed files. At number `last` the process kills itself; 0 kills nobody.
COUNTED = """
seen = 0

def counted(function):
    def run_it(*args, **keywords):
        global seen
        result = function(*args, **keywords)
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return run_it

Optimizer.step = counted(Optimizer.step)
os.replace, os.fsync, os.open = counted(os.replace), counted(os.fsync), counted(os.open)
checkpoint.save_file, Path.write_text = counted(checkpoint.save_file), counted(Path.write_text)

finish = loop.Trainer.finish
def finishing(self):
    result = finish(self)
    (out / "events").open("w").write(str(seen))
    return result
loop.Trainer.finish = finishing
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_any_event_it_resumes_to_the_same_bits(clips, whole, forks, tmp_path, seed):
    """Every kill is followed by another one in the same run, or by the end of the run."""

    def run(last: int, out: Path) -> int:
        (code,), log = forks.run(clips, out, before=f"last = {last}\n{COUNTED}", checkpoint_every=2)
        assert code in (0, -signal.SIGKILL), log
        return code

    assert run(0, tmp_path / "counting") == 0
    events = int((tmp_path / "counting" / "events").read_text())
    rng, kills = random.Random(seed), 0
    while kills < KILLS:
        out = tmp_path / f"run{kills}"
        last = rng.randint(1, events)  # of a whole run, then of what is left: several kills in one run
        while run(last, out):
            kills += 1
            last = 0 if kills >= KILLS else rng.randint(1, events)
        assert same_bits(done(out)["weights"], whole["weights"]), f"after kill {kills}"
        shutil.rmtree(out)
    print(f"{kills} kills survived out of {kills}; {events} events in a whole run")


def test_every_flipped_byte_is_detected_and_the_commit_before_is_used(whole, tmp_path, capsys):
    directory = tmp_path / "checkpoints"
    shutil.copytree(Path(whole["directory"]) / "checkpoints", directory)
    older, newest = checkpoint.committed(directory)
    files = sorted(newest.iterdir())
    rng = random.Random(0)
    for flip in range(FLIPS):
        # every file in turn, and in between a byte anywhere in the checkpoint
        anywhere = rng.choices(files, weights=[f.stat().st_size for f in files])[0]
        victim = anywhere if flip % 2 else files[flip // 2 % len(files)]
        content = bytearray(victim.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        good = victim.read_bytes()
        victim.write_bytes(content)
        assert checkpoint.newest_intact(directory) == older, f"flip {flip} in {victim.name}"
        assert "Falling back" in capsys.readouterr().err
        os.replace(directory / f"damaged-{newest.name}", newest)
        victim.write_bytes(good)
    assert checkpoint.newest_intact(directory) == newest
    print(f"{FLIPS} flips detected out of {FLIPS}")
