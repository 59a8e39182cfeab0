"""Kills at seeded events and flipped bytes, in numbers: 10 of each in the tests, 100 kills and 50 flips in `make drills`."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from vmae2_fast.train import checkpoint, train

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("VMAE2_DRILLS") == "full"
KILLS, FLIPS = (100, 50) if FULL else (10, 10)

# A server that forks: the imports are paid once, each child is a process of its own that trains and may kill itself.
# It reads "EVENT CLIPS OUT" lines and answers with the exit status; EVENT 0 kills nobody and answers the events counted.
SERVER = """
import os, signal, sys
from pathlib import Path
import torch
from tests import tiny_runs as tiny
from vmae2_fast.train import checkpoint, train
from vmae2_fast.train.optim import Optimizer

torch.set_num_threads(1)

def child(last, clips, out):
    seen = 0

    def counted(function):
        def run(*args, **keywords):
            nonlocal seen
            result = function(*args, **keywords)
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return run

    Optimizer.step = counted(Optimizer.step)
    os.replace, os.fsync, os.open = counted(os.replace), counted(os.fsync), counted(os.open)
    checkpoint.save_file, Path.write_text = counted(checkpoint.save_file), counted(Path.write_text)
    train(tiny.with_train(tiny.pretrain_config(clips, out), checkpoint_every=2))
    (out / "events").open("w").write(str(seen))

for line in sys.stdin:
    last, clips, out = line.split()
    pid = os.fork()
    if not pid:
        try:
            child(int(last), Path(clips), Path(out))
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"))


def test_killed_at_any_event_it_resumes_to_the_same_bits(clips, tmp_path):
    """Events are steps, opened, synced, written and renamed files; every kill is followed by a run that ends."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(last: int, out: Path) -> int:
        server.stdin.write(f"{last} {clips} {out}\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def weights(out: Path) -> dict[str, torch.Tensor]:
        return load_file(out / "tiny_pretrain" / "weights.safetensors")

    try:
        (tmp_path / "whole").mkdir()
        assert run(0, tmp_path / "whole") == 0
        whole, events = weights(tmp_path / "whole"), int((tmp_path / "whole" / "events").read_text())
        rng, kills = random.Random(0), 0
        while kills < KILLS:
            out = tmp_path / f"run{kills}"
            out.mkdir()
            last = rng.randint(1, events)  # of a whole run, then of what is left: several kills in one run
            while (code := run(last, out)) == -signal.SIGKILL:
                kills += 1
                last = 0 if kills >= KILLS else rng.randint(1, events)
            assert code == 0, f"after kill {kills}"
            ended = weights(out)
            assert all(torch.equal(ended[n], whole[n]) for n in whole), f"after kill {kills}"
            shutil.rmtree(out)
        print(f"{kills} kills survived out of {kills}; {events} events in a whole run")
    finally:
        server.stdin.close()
        server.wait()


def test_every_flipped_byte_is_detected_and_the_commit_before_is_used(clips, tmp_path, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = Path(train(tiny.pretrain_config(clips, tmp_path))["directory"]) / "checkpoints"
    torch.set_num_threads(before)
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
