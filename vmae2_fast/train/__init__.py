"""Training: `train(config)` runs one stage to its end, resumably."""

from __future__ import annotations

from .loop import train

__all__ = ["train"]
