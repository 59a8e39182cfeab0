"""Kinetics-710 and its three parts: the official index maps and the class names.

Class c of K400, K600 or K700 is class `label_map(classes)[c]` of K710 (paper section 4.1; files in `label_maps/`), so
logits of the smaller set are `logits_710[:, label_map]` and rows of its head the same rows of the K710 head.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

MERGED = 710
PARTS = (400, 600, 700)
_FILES = Path(__file__).parent / "label_maps"


@functools.cache
def label_map(classes: int) -> tuple[int, ...]:
    """For each of K400's, K600's or K700's classes, its index among K710's. Raises ValueError for another number."""
    if classes not in PARTS:
        raise ValueError(f"there are K710 maps for {', '.join(map(str, PARTS))} classes, not {classes}")
    return tuple(json.loads((_FILES / f"k710_to_k{classes}.json").read_text()))


@functools.cache
def class_names(classes: int) -> tuple[str, ...] | None:
    """The class names of K400, K600, K700 or K710 by number of classes (merged spelling); None for another number."""
    if classes not in (MERGED, *PARTS):
        return None
    names = (_FILES / "k710.txt").read_text(encoding="utf-8").splitlines()
    return tuple(names if classes == MERGED else [names[row] for row in label_map(classes)])


def read_label_map(given: str, outputs: int) -> tuple[int, ...]:
    """For each class wanted, its index among a model's `outputs` classes.

    given: k400, k600 or k700 (the official maps; the model has K710's classes), or a JSON file with a list of indices.
    Raises ValueError naming what does not fit: an unknown name, an unreadable file, an index out of range or twice.
    """
    if given in {f"k{part}" for part in PARTS}:
        if outputs != MERGED:
            raise ValueError(f"label map {given} takes the {MERGED} classes of Kinetics-710, the model has {outputs}")
        return label_map(int(given[1:]))
    try:
        rows = json.loads(Path(given).read_text())
    except (OSError, ValueError) as error:
        known = ", ".join(f"k{part}" for part in PARTS)
        raise ValueError(f"label map {given}: neither one of {known} nor a readable JSON list: {error}") from error
    check_label_map(rows, outputs, given)
    return tuple(rows)


def check_label_map(rows: Sequence[int], outputs: int, name: str) -> None:
    """Raise ValueError unless `rows` are distinct indices below `outputs`."""
    if not isinstance(rows, Sequence) or not rows or not all(type(row) is int for row in rows):
        raise ValueError(f"label map {name}: must be a JSON list of class numbers")
    for place, row in enumerate(rows):
        if not 0 <= row < outputs:
            raise ValueError(f"label map {name}: entry {place} is {row}, the model has classes 0..{outputs - 1}")
    if len(set(rows)) != len(rows):
        twice = next(row for row in rows if list(rows).count(row) > 1)
        raise ValueError(f"label map {name}: class {twice} of the model stands for two classes")
