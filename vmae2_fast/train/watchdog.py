"""A thread that notices a step that never ends, and writes down where every thread of this rank stands."""

from __future__ import annotations

import faulthandler
import sys
import threading
from pathlib import Path


class Watchdog:
    """While entered, expects `beat` at least every `seconds` (0: expects nothing).

    When none comes, it says so on stderr, once until the next beat, and appends the stacks of all threads to `path`,
    which names the rank: of several files the one of the rank that stands outside a collective is the culprit's. The
    run itself goes on; ending it is left to the timeout of the process group.
    """

    def __init__(self, seconds: float, path: Path) -> None:
        self.seconds, self.path = seconds, path
        self.step = 0
        self._beats, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="vmae2-watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """Step `step` has ended."""
        self.step = step
        self._beats.set()

    def _watch(self) -> None:
        reported = False
        while not self._closing:
            if self._beats.wait(self.seconds):
                self._beats.clear()
                reported = False
            elif not reported:
                reported = True
                self._report()

    def _report(self) -> None:
        what = f"no step ended for {self.seconds:g} s after step {self.step}"
        try:
            with self.path.open("a") as file:
                print(what, file=file, flush=True)
                faulthandler.dump_traceback(file)
            print(f"WARNING: {what}; stacks in {self.path}", file=sys.stderr, flush=True)
        except OSError as error:
            print(f"WARNING: {what}; cannot write {self.path}: {error}", file=sys.stderr, flush=True)

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing = True
        self._beats.set()
        if self._thread.is_alive():
            self._thread.join()
