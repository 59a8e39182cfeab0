"""Temporal action detection: THUMOS14, FineAction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import at_least, divisible, require
from .run import DataConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class ActionFormerConfig:
    """A temporal detector on features of whole videos; the defaults are the released THUMOS14 configuration's."""

    inputs: int = 0
    """Channels of a feature; 0: the width of the trunk."""
    classes: int = 20
    width: int = 512
    heads: int = 4
    embed_layers: int = 2
    stem_blocks: int = 2
    windows: tuple[int, ...] = (19, 19, 19, 19, 19, 19)
    """Tokens of the attention band on each level, the first for the stem; 0: attention over all."""
    head_layers: int = 3
    positions: bool = False
    """Add a sin-cos table to the embedded features."""
    max_length: int = 2304
    """Features a sequence is padded to, and cut to while training."""
    range_ends: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0, 64.0)
    """Longest distance, in features, that each level but the last is responsible for."""
    center_radius: float = 1.5
    """Points are positive within this many strides of an action's middle."""
    drop_path: float = 0.1
    layer_scale: float = 1e-4
    prior: float = 0.01
    """Probability every class starts with."""
    initial_normalizer: float = 100.0
    """First value of the moving average of positive points that the losses are divided by."""

    def __post_init__(self) -> None:
        at_least(self, "detector", 0, "inputs", "embed_layers", "stem_blocks", "layer_scale", "center_radius")
        at_least(self, "detector", 1, "classes", "width", "heads", "head_layers", "max_length", "initial_normalizer")
        divisible("detector.width", self.width, "detector.heads", self.heads)
        levels, window = len(self.windows), self.windows
        require(levels >= 1, "detector.windows: one for each level, at least one")
        require(
            all(w == 0 or (w >= 3 and w % 2) for w in window), f"detector.windows={window}: each must be 0 or odd from 3 on"
        )
        require(
            len(self.range_ends) == levels - 1 and list(self.range_ends) == sorted(self.range_ends),
            f"detector.range_ends={self.range_ends}: must be {levels - 1} ascending numbers, one less than windows",
        )
        require(0 <= self.drop_path < 1, f"detector.drop_path={self.drop_path}: must lie in [0, 1)")
        require(0 < self.prior < 1, f"detector.prior={self.prior}: must lie between 0 and 1")
        divisible("detector.max_length", self.max_length, "stride of the last level", 2 ** (levels - 1))

    def padded_length(self, length: int) -> int:
        """`max_length`, or for longer sequences the next multiple of what all bands divide (as the released code pads)."""
        unit = max(2**level * max(window - 1, 1) for level, window in enumerate(self.windows))
        return self.max_length if length <= self.max_length else -(-length // unit) * unit


@dataclass(frozen=True, kw_only=True)
class TadDataConfig(DataConfig):
    """Features and annotations of untrimmed videos; `sources`, `sampling`, `views`, `crop`, `flip` have no meaning here.

    `stride` is the number of frames between two features, as `vmae2 tad features` took them."""

    features: str = ""
    """Folder of VIDEO.npy, [windows, channels]."""
    annotations: str = ""
    """ActivityNet-style JSON: THUMOS14's, FineAction's, or one of your own."""
    videos: str | None = None
    """Folder of the videos that features which are not there yet are taken from, with `TadConfig.trunk_weights`."""
    subset: str = "validation"
    """Compared without regard to case."""
    block_list: tuple[str, ...] = ()
    """Videos left out."""
    fps: float | None = None
    """Frames a second of videos whose annotation does not say it."""
    resize_to: int | None = None
    """Stretch every video's features to this many (FineAction: 192)."""
    resize_method: Literal["linear", "roi_align"] = "linear"
    """Interpolate (ActionFormer), or average samples within each new feature (OpenTAD); they differ where it shrinks."""
    class_agnostic: bool = False
    """Look for actions of any class; their classes come from `TadConfig.video_scores`."""
    crop_range: tuple[float, float] | None = None
    """Share of a short video's features that is kept while training, drawn from this range."""
    truncate_threshold: float = 0.5
    """Share of an action that must lie in the part cut out for it to count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "data", 1, "resize_to")
        require(self.views == 1, f"data.views={self.views}: features have one view")
        require(self.fps is None or self.fps > 0, f"data.fps={self.fps}: must be above 0")
        require(0 < self.truncate_threshold <= 1, f"data.truncate_threshold={self.truncate_threshold}: must lie in (0, 1]")
        low, high = self.crop_range or (1.0, 1.0)
        require(0 < low <= high <= 1, f"data.crop_range={self.crop_range}: must be a range within (0, 1]")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """From what the heads say to detections; the defaults are THUMOS14's."""

    min_probability: float = 0.001
    candidates: int = 2000
    """Best points of each level that go on."""
    min_length: float = 0.05
    """In features."""
    method: Literal["hard", "linear", "gaussian"] = "gaussian"
    per_class: bool = True
    iou_threshold: float = 0.1
    sigma: float = 0.5
    min_score: float = 0.001
    limit: int = 200
    """Detections of a video."""
    voting_threshold: float | None = None
    fused: int = 200
    """With `TadConfig.video_scores`: best detections of a video that take a class."""
    fused_classes: int = 2
    """Most likely classes of the video that each of them is repeated for."""

    def __post_init__(self) -> None:
        at_least(self, "detection", 1, "candidates", "limit", "fused", "fused_classes")
        at_least(self, "detection", 0, "min_probability", "min_length", "iou_threshold", "min_score")
        require(self.sigma > 0, f"detection.sigma={self.sigma}: must be above 0")
        vote = self.voting_threshold
        require(vote is None or 0 < vote <= 1, f"detection.voting_threshold={vote}: must lie in (0, 1], or be None")


@dataclass(frozen=True, kw_only=True)
class TadConfig(RunConfig):
    """Temporal action detection: start, end and class of every action in an untrimmed video (THUMOS14, FineAction).

    `model` is the trunk the features come from, which is not trained; `detector` is."""

    detector: ActionFormerConfig = field(default_factory=ActionFormerConfig)
    data: TadDataConfig
    validation: TadDataConfig | None = None
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    benchmark: Literal["thumos14", "fineaction"] = "thumos14"
    """Whose tIoU thresholds mAP is the average over: .3 to .7, or .5 to .95."""
    deduplicate: bool = True
    """Drop repeated annotations from the ground truth of mAP (ActionFormer, OpenTAD), or not (ActivityNet)."""
    distance_loss: Literal["diou", "giou"] = "diou"
    distance_weight: float = 1.0
    """Weight of the regression loss."""
    label_smoothing: float = 0.0
    normalizer_momentum: float = 0.9
    trunk_weights: str | None = None
    """Weights of `model`, to take missing features of `data.videos` with before training; None: all must be there. "random"
    takes a trunk that has learned nothing."""
    normalize: Literal["none", "imagenet"] = "none"
    """What the trunk is shown: pixels in [0, 1] as the released features, or normalised as it was trained."""
    video_scores: str | None = None
    """JSON of class scores of whole videos (`vmae2 tad scores`) that class-agnostic detections are fused with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "config", 0, "distance_weight")
        require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing}: must lie in [0, 1)")
        require(0 <= self.normalizer_momentum < 1, f"normalizer_momentum={self.normalizer_momentum}: must lie in [0, 1)")
        agnostic = self.data.class_agnostic
        require(not agnostic or self.detector.classes == 1, "data.class_agnostic: set detector.classes to 1")
        require(
            self.validation is None or self.validation.class_agnostic == agnostic,
            "data.class_agnostic and validation.class_agnostic must be the same",
        )
        require(
            not agnostic or self.validation is None or self.video_scores is not None,
            "data.class_agnostic: validation needs video_scores, the classes of the videos (vmae2 tad scores)",
        )
        length, wanted = self.detector.max_length, self.data.resize_to
        require(wanted is None or wanted <= length, f"data.resize_to={wanted}: detector.max_length={length} is shorter")
