"""Signals that end a run after the step it is in."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Interrupt:
    """SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 (a scheduler's warnings) set a flag, so that a step ends and is saved first.

    A second signal ends at once, but not under torchrun: it passes on what it gets itself, so that ranks hear of one that
    was sent to all processes of a job twice."""

    def __init__(self) -> None:
        self.signal = 0
        self.passed_on = "TORCHELASTIC_RUN_ID" in os.environ
        self.deferred = True
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._handle) for n in _SIGNALS}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred or (self.signal and not self.passed_on):
            raise SystemExit(128 + number)
        self.signal = self.signal or number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
