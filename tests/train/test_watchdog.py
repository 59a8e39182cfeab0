from __future__ import annotations

import threading

from vmae2_fast.train.watchdog import Watchdog


def test_a_step_that_never_ends_leaves_the_stacks_of_all_threads(tmp_path, monkeypatch):
    reported, release = threading.Event(), threading.Event()
    original = Watchdog._report

    def report(self):
        original(self)
        reported.set()

    monkeypatch.setattr(Watchdog, "_report", report)

    def hangs_here():
        release.wait()

    thread = threading.Thread(target=hangs_here)
    thread.start()
    try:
        with Watchdog(0.01, tmp_path / "stuck-rank1.txt") as watch:
            watch.beat(7)
            assert reported.wait(60)
    finally:
        release.set()
        thread.join()
    text = (tmp_path / "stuck-rank1.txt").read_text()
    assert "no step ended for 0.01 s" in text
    assert "hangs_here" in text


def test_no_limit_starts_no_thread(tmp_path):
    before = threading.active_count()
    with Watchdog(0, tmp_path / "stuck.txt"):
        assert threading.active_count() == before
    assert not (tmp_path / "stuck.txt").exists()
