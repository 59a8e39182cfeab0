"""Tasks: batch -> loss, and metrics. `create_task` picks the one a config is for."""

from __future__ import annotations

from typing import Any

import torch

from ..config import AvaConfig, ClassifyConfig, DistillConfig, PretrainConfig, Stage, TadConfig
from .ava import AvaTask
from .base import Task
from .classify import ClassifyTask
from .distill import DistillTask
from .pretrain import PretrainTask
from .tad import TadTask

__all__ = ["AvaTask", "ClassifyTask", "DistillTask", "PretrainTask", "TadTask", "Task", "create_task"]


def create_task(config: Stage, device: torch.device | str = "cpu", *, on_meta: bool = False) -> Task[Any]:
    """The task of a stage's config, its model on `device`. on_meta: or, of pre-training, classification and AVA, whose
    models are the large ones, on the meta device (`Task.on_meta`). Raises ValueError for values that do not fit together."""
    if isinstance(config, PretrainConfig):
        return PretrainTask(config, device, on_meta=on_meta)
    if isinstance(config, ClassifyConfig):
        return ClassifyTask(config, device, on_meta=on_meta)
    if isinstance(config, DistillConfig):
        return DistillTask(config, device)
    if isinstance(config, AvaConfig):
        return AvaTask(config, device, on_meta=on_meta)
    if isinstance(config, TadConfig):
        return TadTask(config, device)
    raise ValueError(f"no task for a {type(config).__name__}")
