from __future__ import annotations

import json

from vmae2_fast.train.log import MetricsLog, progress, read_metrics


def _write(path, steps):
    log = MetricsLog(path)
    for step in steps:
        log.write(kind="train", step=step, loss=1.0 / step)
    return log


def test_lines_after_the_resumed_step_are_cut_and_each_step_stands_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = _write(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 8, "lo')  # killed while writing
    log.cut(5)
    _write(path, range(6, 10))
    assert [e["step"] for e in read_metrics(path)] == list(range(1, 10))
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_validation_done_again_replaces_the_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = _write(path, [1, 2])
    log.write(kind="validation", step=2, top1=0.25)
    log.cut(2, "validation")
    log.write(kind="validation", step=2, top1=0.5)
    assert [e["top1"] for e in read_metrics(path, "validation")] == [0.5]
    assert [e["step"] for e in read_metrics(path)] == [1, 2]


def test_the_bar_is_silent_when_stderr_is_no_terminal(capsys):
    with progress("run", 3, 0) as bar:
        bar.update(2)
        bar.set_postfix(loss=1.0)
    assert capsys.readouterr().err == ""
