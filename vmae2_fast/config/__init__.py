"""Every value of a run, as frozen dataclasses with JSON in and out.

A recipe returns one stage (`PretrainConfig`, `ClassifyConfig`, `DistillConfig`, `AvaConfig`, `TadConfig`), or a `Progression`
of them. Defaults live here and nowhere else. Command-line flags are made from these classes by tyro (`vmae2 launch RECIPE
--optim.lr 3e-4`). Nothing here imports the rest of the package, so every floor may read it.
"""

from .ava import AvaConfig, AvaDataConfig
from .checks import divisible, require, unknown
from .clips import ClassifyConfig, DistillConfig, ExtractConfig, PretrainConfig
from .codec import KINDS, from_dict, load, save, to_dict
from .progression import PrepareConfig, Progression, SceneKind, Stage
from .run import (
    AugmentConfig,
    DataConfig,
    MaskConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    ViewsConfig,
)
from .tad import ActionFormerConfig, DetectionConfig, TadConfig, TadDataConfig

__all__ = [
    "KINDS", "ActionFormerConfig", "AugmentConfig", "AvaConfig", "AvaDataConfig", "ClassifyConfig", "DataConfig",
    "DetectionConfig", "DistillConfig", "ExtractConfig", "MaskConfig", "MixConfig", "ModelConfig", "OptimConfig",
    "PrepareConfig", "PretrainConfig", "Progression", "RunConfig", "SceneKind", "SourceConfig", "Stage", "TadConfig",
    "TadDataConfig",
    "TrainConfig", "ViewsConfig", "divisible", "from_dict", "load", "require", "save", "to_dict", "unknown",
]  # fmt: skip
