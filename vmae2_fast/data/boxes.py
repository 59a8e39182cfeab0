"""Boxes on frames: the conventions of the public AVA code, as pure functions on numpy arrays [n, 4].

Files hold shares of the frame (0..1). Pixel boxes are (x1, y1, x2, y2) with the last pixel *inside* (width = x2 - x1 + 1), so
a share 1.0 is pixel W - 1 and gets its 1 back on the way out.
"""

from __future__ import annotations

import numpy as np

JITTER_X, JITTER_Y = (0.2, 0.1), (0.1, 0.05)
"""How far a side may move out and in while training, as shares of the box."""
EXTENSION = (0.1, 0.05)
"""By how much of its width and height a detected box grows at test, half on each side."""


def from_xywh(boxes: np.ndarray) -> np.ndarray:
    """Pixel boxes (x, y, width, height), as in COCO files."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - 1], axis=1)


def from_shares(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pixel boxes on a frame of `width` x `height`; the inverse of `to_shares`."""
    return boxes * (width, height, width, height) - (0, 0, 1, 1)


def to_shares(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pixel boxes as shares of the frame, as result files hold them."""
    return (boxes + np.array((0, 0, 1, 1))) / (width, height, width, height)


def clip(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Every side moved onto the frame: 0 .. width - 1, 0 .. height - 1."""
    return np.clip(boxes, 0, (width - 1, height - 1, width - 1, height - 1))


def resize(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Boxes of a frame of (width, height) `old` on the frame resized to `new`."""
    x, y = new[0] / old[0], new[1] / old[1]
    return boxes * (x, y, x, y)


def crop(boxes: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    """Boxes on a window of the frame, cut at its edges (0 .. width, 0 .. height)."""
    return np.clip(boxes - (left, top, left, top), 0, (width, height, width, height))


def flip(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes on the mirrored frame: x -> width - x - 1."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([width - x2 - 1, y1, width - x1 - 1, y2], axis=1)


def jitter(boxes: np.ndarray, uniform: np.ndarray, width: int, height: int) -> np.ndarray:
    """Every side moved at random, then `clip`. uniform: [4, n] draws in [0, 1) for x1, y1, x2, y2."""
    w, h = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
    u = np.asarray(uniform)
    x_span, y_span = sum(JITTER_X), sum(JITTER_Y)
    moves = [
        (u[0] * x_span - JITTER_X[0]) * w,
        (u[1] * y_span - JITTER_Y[0]) * h,
        (u[2] * x_span - JITTER_X[1]) * w,
        (u[3] * y_span - JITTER_Y[1]) * h,
    ]
    return clip(boxes + np.stack(moves, axis=1), width, height)


def extend(boxes: np.ndarray, width: int, height: int, by: tuple[float, float] = EXTENSION) -> np.ndarray:
    """Boxes grown by shares `by` of their width and height, then `clip`."""
    x = by[0] / 2 * (boxes[:, 2] - boxes[:, 0] + 1)
    y = by[1] / 2 * (boxes[:, 3] - boxes[:, 1] + 1)
    return clip(boxes + np.stack([-x, -y, x, y], axis=1), width, height)


def has_area(boxes: np.ndarray) -> np.ndarray:
    """bool [n]: whether a box is more than a line."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
