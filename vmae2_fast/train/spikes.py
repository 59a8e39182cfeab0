"""Steps with an unusual loss, and the clips that were in them: RUN/spikes.jsonl.

A step is written down when its loss is not finite or above `train.spike_factor` times the median of the finite losses of up
to `WINDOW` steps before it. Losses are the ones the loop reads for its log anyway, so nothing waits for the device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from .log import MetricsLog
from .run_directory import RunDirectory

WINDOW = 100
_JUDGED_AFTER = 16
"""Losses from which on there is a median to compare with."""


class SpikeLog:
    """Remembers which clips each step since the last judgement had; one on every rank, the first one writes.

    clips: decodes of a micro-batch; micro_batches, rank, ranks: as the loader cuts positions, see `VideoLoader`.
    """

    def __init__(
        self, run: RunDirectory, factor: float, *, clips: int, micro_batches: int, rank: int, ranks: int
    ) -> None:
        self.log = MetricsLog(run.spikes, enabled=rank == 0)
        self.factor, self.clips, self.micro_batches, self.rank, self.ranks = factor, clips, micro_batches, rank, ranks
        self._paths: list[list[str]] = []

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, remembered."""
        for batch in batches:
            self._paths.append([str(path) for path in batch.paths])
            yield batch

    def judge(self, losses: list[float], recent: list[float]) -> dict[int, float | None]:
        """Which of the steps just read are unusual: number among them -> median before it (None: too few losses yet).

        recent: finite losses before these. Every rank gives the same answer, as the losses are sums over ranks.
        """
        unusual: dict[int, float | None] = {}
        window = recent[-WINDOW:]
        for number, loss in enumerate(losses):
            median = statistics.median(window) if len(window) >= _JUDGED_AFTER else None
            if not math.isfinite(loss) or (self.factor and median is not None and loss > self.factor * median):
                unusual[number] = median
            if math.isfinite(loss):
                window = [*window, loss][-WINDOW:]
        return unusual

    def batches(self, unusual: dict[int, float | None], position: int) -> dict[int, list[dict[str, Any]]]:
        """What this rank had in the unusual steps of those since `position`; forgets all of them.

        One {"rank", "micro_batch", "positions": [first, last], "paths": of its decodes in order} a micro-batch."""
        found: dict[int, list[dict[str, Any]]] = {number: [] for number in unusual}
        for number, micro in ((n, m) for n in unusual for m in range(self.micro_batches)):
            batch = number * self.micro_batches + micro
            first = position + (batch * self.ranks + self.rank) * self.clips
            paths = self._paths[batch][:: max(1, len(self._paths[batch]) // self.clips)]  # views of a clip share its path
            found[number].append(
                {"rank": self.rank, "micro_batch": micro, "positions": [first, first + self.clips - 1], "paths": paths}
            )
        self._paths.clear()
        return found

    def write(
        self, unusual: dict[int, float | None], step: int, table: list[dict[str, float]],
        batches: list[dict[int, list[dict[str, Any]]]],
    ) -> None:  # fmt: skip
        """Write the unusual steps of those after `step`. table: loss, grad_norm, skipped of all; batches: of every rank."""
        for number, median in unusual.items():
            row = table[number]
            loss, norm = (row[name] if math.isfinite(row[name]) else None for name in ("loss", "grad_norm"))
            self.log.write(
                step=step + 1 + number, loss=loss, median=median, grad_norm=norm, skipped=bool(row["skipped"]),
                batches=[batch for of_rank in batches for batch in of_rank.get(number, [])],
            )  # fmt: skip
