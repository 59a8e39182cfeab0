"""Several stages in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .ava import AvaConfig
from .checks import at_least, require, unknown
from .clips import ClassifyConfig, DistillConfig, PretrainConfig
from .tad import TadConfig

SceneKind = Literal["moving", "boxes", "untrimmed", "features"]
Stage = PretrainConfig | ClassifyConfig | DistillConfig | AvaConfig | TadConfig


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Data made before the first stage, with `OUT/data/datasets.toml` for the stages to read."""

    folder: str | None = None
    """A folder of labelled videos (file name or sub-folder = label); None writes scenes of ours."""
    scenes: tuple[SceneKind, ...] = ("moving",)
    """Moving scenes with a class each (or `folder`), scenes with several boxes in AVA's formats, untrimmed videos with
    annotations in THUMOS14's style, or features of such."""
    size: int = 64
    """Height and width of a scene; short side of the small copies made of a folder's videos; channels of features."""
    scale: float = 1.0
    """Number of scenes as a multiple of the demo's."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, "prepare", 1, "size")
        require(bool(self.scenes), "prepare.scenes: name at least one kind")
        require(self.scale > 0, f"prepare.scale={self.scale}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Progression:
    """Stages in order; the weights of one are handed on to the next that asks for them with `init="stage:NAME"`."""

    name: str
    cites: str = ""
    prepare: PrepareConfig | None = None
    stages: tuple[Stage, ...]
    out: str = "runs"
    """Folder of the whole progression; stage NAME runs in `OUT/NAME`."""

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(unknown("stage", name, [s.name for s in self.stages]))
