"""Pictures of results, drawn with matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_NAMED = 64
"""Classes above which a confusion matrix is drawn without names and counts, which nobody could read."""


def installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def confusion_picture(counts: Any, names: Sequence[str], path: str | Path) -> Path:
    """Draw a confusion matrix [C, C] (row: label, column: prediction) and return `path`.

    Up to 64 classes with names and counts; beyond, the share of each row on a logarithmic scale.
    """
    plt = pyplot()
    matrix = np.asarray(counts)
    classes = len(matrix)
    if classes > _NAMED:
        from matplotlib.colors import LogNorm

        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        figure, axes = plt.subplots(figsize=(8, 7))
        image = axes.imshow(np.where(share > 0, share, np.nan), cmap="viridis", norm=LogNorm(1e-3, 1), interpolation="nearest")
        figure.colorbar(image, label="share of the class's videos")
        axes.set_ylabel("class", fontsize=8)
    else:
        figure, axes = plt.subplots(figsize=(1.6 + 0.32 * classes, 1.4 + 0.32 * classes))
        axes.imshow(matrix, cmap="Blues")
        axes.set_xticks(range(classes), names, rotation=90, fontsize=7)
        axes.set_yticks(range(classes), names, fontsize=7)
        for y, x in zip(*matrix.nonzero()):
            colour = "white" if matrix[y, x] > matrix.max() / 2 else "black"
            axes.text(x, y, str(matrix[y, x]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("predicted", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)
