"""Corrupt, truncated, missing and hanging videos in one list: the run ends, and the quarantine names exactly these."""

from __future__ import annotations

import json
import os
import random

from tests.drills.judge import FULL, done, same_bits


def test_the_run_ends_and_the_quarantine_lists_exactly_the_bad_videos(clips, forks, tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    good = sorted(clips.rglob("*.mp4"))
    for number, path in enumerate(good):
        (root / f"good{number}.mp4").write_bytes(path.read_bytes())
    content = good[0].read_bytes()
    (root / "corrupt.mp4").write_bytes(random.Random(0).randbytes(len(content)))
    (root / "truncated.mp4").write_bytes(content[: len(content) // 3])
    os.mkfifo(root / "hanging.mp4")  # nobody writes into it: opening it waits for ever
    bad = [str(root / f"{name}.mp4") for name in ("corrupt", "hanging", "missing", "truncated")]
    names = [f"good{number}.mp4" for number in range(len(good))]
    (root / "list.csv").write_text("\n".join(f"{name} 0" for name in [*names, *bad]))
    source = {"name": "videos", "root": str(root), "list": "list.csv"}
    ended = []
    for workers in (2, 1) if FULL else (2,):
        out = tmp_path / f"out{workers}"
        data = {"sources": [source], "workers": workers, "timeout_s": 5.0}
        codes, log = forks.run(clips, out, data=data, epochs=1)
        assert codes == [0], log
        ended.append(done(out))
        lines = (out / "tiny_pretrain" / "quarantine.jsonl").read_text().splitlines()
        reasons = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
        assert len(lines) == len(reasons)
        assert sorted(reasons) == sorted(ended[-1]["replaced"]) == bad
        assert reasons[bad[1]] == "no result within data.timeout_s=5 seconds"
        assert "No such file" in reasons[bad[2]]
        assert ended[-1]["steps"] == (len(good) + len(bad)) // 4
    # what takes their place does not depend on who decodes
    assert same_bits(ended[0]["weights"], ended[-1]["weights"])
    assert ended[0]["replaced"] == ended[-1]["replaced"]
