"""Mutated files: no crash, no hang, nothing silently wrong. VMAE2_FUZZ=500 (`make fuzz`) is the long form."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from pebble import ProcessExpired, ProcessPool

from tests.data.fuzz import KINDS, examine, mutate
from vmae2_fast.data.workers import decoder_context

COUNT = int(os.environ.get("VMAE2_FUZZ", "60"))
CLIPS = ("gop12.mp4", "open_gop.mkv", "vp9.webm", "mpeg4.avi", "stream.ts")
HANGS_AFTER_S = 120  # of a machine that may stand still for a while


def test_mutated_files(clips, tmp_path, capsys):
    files = [clips / "good" / name for name in CLIPS]
    paths = []
    for seed in range(COUNT):
        data, name = mutate(files, seed)
        (tmp_path / name).write_bytes(data)
        paths.append(tmp_path / name)
    outcomes: Counter[tuple[str, str]] = Counter()
    faults = []
    with ProcessPool(2, context=decoder_context()) as pool:
        futures = [pool.schedule(examine, args=(str(path),), timeout=HANGS_AFTER_S) for path in paths]
        for seed, (path, future) in enumerate(zip(paths, futures)):
            try:
                outcomes[KINDS[seed % len(KINDS)], future.result()] += 1
            except TimeoutError:
                faults.append(f"{path.name}: hangs")
            except ProcessExpired as error:
                faults.append(f"{path.name}: crashes ({error.exitcode})")
            except Exception as error:
                faults.append(f"{path.name}: {type(error).__name__}: {error}")
    with capsys.disabled():
        print(f"\n{COUNT} mutations: " + ", ".join(f"{kind} {how} {n}" for (kind, how), n in sorted(outcomes.items())))
    if faults:
        pytest.fail(f"seeds make these files again: {faults}")
    assert {how for _, how in outcomes} == {"exact", "refused"}
