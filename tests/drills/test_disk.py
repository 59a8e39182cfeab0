"""A disk that refuses: one clear error, checkpoints as they were, nothing half-written; the run goes on once it gives way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.drills import ranks
from tests.drills.judge import done, full, same_bits
from vmae2_fast.train import checkpoint

WRITTEN = """
if number == 6 and rank == 0:
    import time
    while not (run / "checkpoints" / "step-00000004").exists():  # written beside the training
        time.sleep(0.01)
"""
FULL_DISK = """
if number == 6 and rank == 0:
    with open(out / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
"""
LIMITED_FILES = """
if number == 6 and rank == 0:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
"""
READ_ONLY = """
if number == 6 and rank == 0:
    os.chmod(run / "checkpoints", 0o555)
"""
NO_LOG = """
if number == 6 and rank == 0:
    os.replace(run / "metrics.jsonl", run / "metrics.kept")
    os.symlink("/dev/full", run / "metrics.jsonl")
"""


def _untouched(run: Path) -> None:
    """The checkpoint of before is all there is, and it is good."""
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    checkpoint.verify(run / "checkpoints" / "step-00000004")
    assert not (run / "done.json").exists()


def _stops(forks: ranks.Forks, clips: Path, out: Path, happens: str, number: int, why: str) -> None:
    codes, log = forks.run(clips, out, ranks=number, before=ranks.at_step(WRITTEN + happens.strip()))
    assert codes == [1] * number, log  # all of them: no rank waits for the one that writes
    assert log.count(why) >= number, log


def _goes_on(forks: ranks.Forks, clips: Path, out: Path, number: int) -> None:
    codes, log = forks.run(clips, out, ranks=number)
    assert codes == [0] * number, log


BOTH = [1, pytest.param(2, marks=full)]


@pytest.fixture(scope="module")
def ended(clips, whole, forks, tmp_path_factory):
    """Weights at the end of an undisturbed run on so many ranks."""

    def get(number):
        if number == 1:
            return whole["weights"]
        out = tmp_path_factory.mktemp("ended")
        _goes_on(forks, clips, out, number)
        return done(out)["weights"]

    return get


@ranks.needs(ranks.mounting(Path("/mnt"), "1m"))
@pytest.mark.parametrize("number", BOTH)
def test_a_full_disk_is_one_error_and_the_run_goes_on_once_there_is_room(clips, ended, tmp_path, number):
    out = tmp_path / "disk"
    out.mkdir()
    with ranks.Forks(ranks.mounting(out, "2m")) as forks:
        _stops(forks, clips, out, FULL_DISK, number, "step-00000008: ")
        seen = forks.root / out.relative_to("/")
        assert shutil.disk_usage(seen).free < 400_000  # what the interrupted save had taken is free again, and no more
        _untouched(seen / "tiny_pretrain")
        (seen / "filler").unlink()
        _goes_on(forks, clips, out, number)
        assert same_bits(seen / "tiny_pretrain" / "weights.safetensors", ended(number))


@pytest.mark.parametrize("number", BOTH)
def test_a_file_that_may_not_grow_is_one_error(clips, ended, forks, tmp_path, number):
    _stops(forks, clips, tmp_path, LIMITED_FILES, number, "the checkpoints before it are untouched")
    _untouched(tmp_path / "tiny_pretrain")
    _goes_on(forks, clips, tmp_path, number)
    assert same_bits(done(tmp_path)["weights"], ended(number))


@ranks.needs(ranks.without_privileges())
@pytest.mark.parametrize("number", BOTH)
def test_a_directory_that_became_read_only_is_one_error(clips, ended, tmp_path, number):
    with ranks.Forks(ranks.without_privileges()) as forks:
        _stops(forks, clips, tmp_path, READ_ONLY, number, "Permission denied")
        _untouched(tmp_path / "tiny_pretrain")
        (tmp_path / "tiny_pretrain" / "checkpoints").chmod(0o755)
        _goes_on(forks, clips, tmp_path, number)
    assert same_bits(done(tmp_path)["weights"], ended(number))


def test_no_room_for_the_log_is_one_error_that_names_it(clips, whole, forks, tmp_path):
    _stops(forks, clips, tmp_path, NO_LOG, 1, "metrics.jsonl: No space left on device; make room")
    run = tmp_path / "tiny_pretrain"
    _untouched(run)
    (run / "metrics.kept").replace(run / "metrics.jsonl")
    _goes_on(forks, clips, tmp_path, 1)
    assert same_bits(done(tmp_path)["weights"], whole["weights"])
