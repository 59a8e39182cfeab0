"""Stages over single clips: pre-training, classification, distillation; and how features of videos are taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import require
from .run import MaskConfig, MixConfig, ModelConfig, RunConfig, ViewsConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Dual-masked pre-training."""

    mask: MaskConfig = field(default_factory=MaskConfig)
    normalize_target: bool = True


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunConfig):
    """Post-pre-training and fine-tuning."""

    label_smoothing: float = 0.1
    frozen: bool = False
    """Train only what follows the blocks: a linear probe, with `model.pooling="attentive"` an attentive one."""
    mix: MixConfig = field(default_factory=MixConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen:
            decay, drop = self.optim.layer_decay, self.model.drop_path
            require(decay == 1, f"frozen: optim.layer_decay={decay} has no layers to act on; set it to 1")
            require(drop == 0, f"frozen: model.drop_path={drop} must be 0, the blocks stand still")
        require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing}: must lie in [0, 1)")
        self.mix.check(self)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """A small student learns from a frozen teacher (paper, appendix on distillation)."""

    teacher: ModelConfig
    teacher_weights: str | None = None
    objective: Literal["kl", "soft_ce", "deit_soft", "deit_hard", "features"] = "kl"
    """What the student matches, see `tasks.distill`: the teacher's distribution (kl: the paper's choice), or, as a
    pretrain_videomae_* model, its features at hidden tokens."""
    temperature: float = 3.0
    label_weight: float = 0.0
    """Weight of the cross-entropy with the true label beside the kl and soft_ce terms."""
    alpha: float = 0.5
    """Share of the teacher's term in the deit objectives, beside the label's."""
    normalize_features: bool = True
    """features: bring each of the teacher's tokens to mean 0 and variance 1 first."""
    feature_distance: Literal["smooth_l1", "l2"] = "smooth_l1"
    """features: what is minimised between the student's and the teacher's tokens."""
    mask: MaskConfig = field(default_factory=lambda: MaskConfig(decoder="none"))
    """features: what is hidden from the student."""
    teacher_precision: Literal["float32", "bfloat16"] = "bfloat16"
    teacher_cache: str | None = None
    """Folder of the teacher's logits by position and view: those in it are read, others are computed and added."""
    mix: MixConfig = field(default_factory=MixConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"temperature={self.temperature}: must be above 0")
        require(self.label_weight >= 0, f"label_weight={self.label_weight}: must be at least 0")
        require(0 <= self.alpha <= 1, f"alpha={self.alpha}: must lie in [0, 1]")
        if self.objective == "features":
            require(self.teacher_cache is None, "teacher_cache: holds logits, which objective=features does not use")
        self.mix.check(self)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """How features are taken."""

    level: Literal["clip", "frame"] = "clip"
    stride: int = 1
    """Frames between two sampled frames."""
    step: int | None = None
    """Frames between the starts of two windows; None: a whole window. Clip level only."""
    resize: Literal["crop", "squash"] = "crop"
    """The centre square, or the whole frame without its aspect ratio (released features for temporal detection)."""
    normalize: Literal["imagenet", "none"] = "imagenet"
    """What the model is shown: pixels by its own mean and deviation (ImageNet's), or just in [0, 1], as for the released
    features for temporal detection."""
    format: Literal["npy", "safetensors"] = "npy"
    """npy: float32 [N, D]; safetensors: `features` and `frames` int64 [N, 2], first frame and one past the last."""
    batch: int = 16
    """Windows of one forward."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("stride", "batch"):
            require(getattr(self, name) >= 1, f"extract: {name}={getattr(self, name)} must be at least 1")
        require(self.step is None or self.step >= 1, f"extract: step={self.step} must be at least 1")
        require(self.level == "clip" or self.step is None, "extract: step is for clip level; frames follow one another")
