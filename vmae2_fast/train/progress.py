"""What a run remembers beside tensors, and what becomes of it when the run goes back to an earlier checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

_SPENT = ("position", "seconds", "skipped", "replaced", "best", "rollbacks")


@dataclasses.dataclass
class Progress:
    """What a checkpoint remembers beside tensors; plain JSON values."""

    epoch_clips: int
    """Clips of an epoch: another number means that the data changed."""
    step: int = 0
    position: int = 0
    """Decodes consumed: where the data schedule goes on."""
    seconds: float = 0.0
    first_loss: float | None = None
    recent: list[float] = dataclasses.field(default_factory=list)
    """The last finite losses: as many as the log's mean and the spike log's median look at."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    replaced: dict[str, int] = dataclasses.field(default_factory=dict)
    best: float | None = None
    """Highest value so far of the metric the task keeps its best weights by."""
    sound: int | None = None
    """Step of the newest checkpoint that no skipped step ends at: where a run goes back to, so it is not deleted."""
    rollbacks: int = 0

    def count(self, rows: Iterable[Mapping[str, float]], keep: int) -> None:
        """Take note of "loss" and "skipped" of steps, in their order; of finite losses the last `keep` are remembered."""
        for row in rows:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if row["skipped"] else 0
            self.skipped += bool(row["skipped"])
            if math.isfinite(row["loss"]):
                self.first_loss = row["loss"] if self.first_loss is None else self.first_loss
                self.recent = [*self.recent, row["loss"]][-keep:]

    def go_back(self, before: Progress) -> None:
        """Be what a checkpoint remembers, but for what was spent since: clips, which are not read again, time, and what went
        wrong."""
        for field in dataclasses.fields(self):
            if field.name not in _SPENT:
                setattr(self, field.name, getattr(before, field.name))
        self.rollbacks += 1
