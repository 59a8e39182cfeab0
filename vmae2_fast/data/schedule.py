"""The order of clips: a pure function of (seed, position), whatever the number of workers or devices.

Each source is an endless stream of permutations of its own clips; an epoch takes from every source its share by weight
and interleaves them at random. Shares are the divisor method of Webster on exact fractions over all epochs so far, so a
weight of 0.3 on 5 clips is met in the long run although every epoch has the same whole number of clips, and with weight 1
every epoch holds every clip exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .sampling import Purpose, permutation


class Mixture:
    """Weighted sources as one endless sequence of clips.

    Args:
        sizes: clips of each source.
        weights: clips drawn per epoch as multiples of the sizes.
        seed: of the run.

    `len(mixture)` clips make an epoch: position p lies in epoch p // len.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        weights = [1.0] * len(sizes) if weights is None else weights
        if not sizes or len(weights) != len(sizes) or min(sizes) < 1 or min(weights) <= 0:
            given = f"{list(sizes)}, {list(weights)}"
            raise ValueError(f"a mixture needs non-empty sources and a positive weight for each, got {given}")
        self.sizes, self.seed = tuple(sizes), seed
        drawn = [Fraction(str(weight)) * size for weight, size in zip(weights, sizes)]
        self._length = max(round(sum(drawn)), 1)
        self._shares = [share / sum(drawn) for share in drawn]
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._length

    def _consumed(self, clips: int) -> list[int]:
        """Clips of each source among the first `clips`: next goes the source with the smallest (count + 1/2) / share."""
        counts = [max(int(share * clips) - len(self.sizes), 0) for share in self._shares]
        for _ in range(clips - sum(counts)):
            due = min(range(len(counts)), key=lambda i: (Fraction(2 * counts[i] + 1) / self._shares[i], i))
            counts[due] += 1
        return counts

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and index within it of every clip of an epoch, int32 and int64 [len]."""
        order = self._epochs.get(epoch)
        if order is None:
            before, after = self._consumed(epoch * self._length), self._consumed((epoch + 1) * self._length)
            sources = np.repeat(np.arange(len(self.sizes), dtype=np.int32), np.subtract(after, before))
            indices = np.concatenate([self._stream(i, *span) for i, span in enumerate(zip(before, after))])
            mixed = permutation(self.seed, Purpose.INTERLEAVE, 0, epoch, self._length)
            order = sources[mixed], indices[mixed]
            # workers may be reading the epoch before this one: drop only older ones
            self._epochs = {**{e: o for e, o in self._epochs.items() if abs(e - epoch) <= 1}, epoch: order}
        return order

    def _stream(self, source: int, first: int, last: int) -> np.ndarray:
        """Draws first..last-1 of a source's endless stream of permutations, int64."""
        size = self.sizes[source]
        passes = [
            permutation(self.seed, Purpose.SHUFFLE, source, number, size)[max(first - number * size, 0):last - number * size]
            for number in range(first // size, -(-last // size))
        ]
        return np.concatenate(passes) if passes else np.empty(0, dtype=np.int64)

    def record(self, position: int) -> tuple[int, int]:
        """(source, index within it) of the clip at a position over all epochs."""
        sources, indices = self.order(position // self._length)
        place = position % self._length
        return int(sources[place]), int(indices[place])
