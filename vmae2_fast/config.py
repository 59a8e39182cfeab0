"""Every value of a run, as frozen dataclasses with JSON in and out.

A recipe returns one stage (`PretrainConfig`, `ClassifyConfig`, `DistillConfig`, `TadConfig`), or a `Progression` of them.
Defaults live here and nowhere else. Command-line flags are made from these classes by tyro (`vmae2 launch RECIPE
--optim.lr 3e-4`). This file imports nothing of the package, so every floor may read it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def divisible(name: str, value: int, by: str, unit: int) -> None:
    """Raise ValueError naming the nearest valid values unless `unit` (of name `by`) divides `value`."""
    if unit < 1 or value % unit:
        below, above = value // max(unit, 1) * unit, (value // max(unit, 1) + 1) * unit
        near = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(f"{name}={value} is not divisible by {by}={unit}; the nearest valid values are {near}")


def _at_least(config: Any, group: str, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= low, f"{group}.{name}={value}: must be at least {low}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model: an official name and what differs from it. None means "as the name says"."""

    name: str
    """`pretrain_videomae_{small,base,large,huge}_patch16_224`, `pretrain_videomae_giant_patch14_224`, `vit_*`."""
    frames: int = 16
    """Frames of a clip (T)."""
    size: int = 224
    """Height and width of a clip in pixels."""
    patch: int | None = None
    tubelet: int = 2
    in_chans: int = 3
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    decoder_mlp_ratio: float | None = None
    """None: as the encoder's, which is what the released code does."""
    decoder_width: int | None = None
    decoder_depth: int = 4
    decoder_heads: int | None = None
    decoder_outputs: int | None = None
    """Values the decoder predicts for a token; None: the pixels of its patch."""
    num_classes: int = 0
    """Classes of the head; 0 gives a trunk without a head. Ignored by pre-training models."""
    pooling: Literal["mean", "first", "attentive"] = "mean"
    """Mean over tokens then fc_norm (the official default), the final norm's first token, or attention of one learned query
    over all tokens, then fc_norm (for an attentive probe)."""
    drop_path: float = 0.0
    """Stochastic depth: probability with which the last block drops a branch of a sample; it grows linearly from 0."""
    drop_path_skip: bool = False
    """Leave dropped samples out of a branch's work, instead of multiplying what they give by 0. Shapes then vary from step to
    step, which no CUDA graph can hold."""
    head_dropout: float = 0.0
    head_init_scale: float = 0.001
    init_std: float = 0.02
    """Deviation of the initial matrices of a classification model; the official 0.02 is small for narrow ones."""
    layer_scale: float = 0.0
    """Initial value of the per-channel branch scales (`gamma_1`, `gamma_2`); 0 leaves them out."""
    cosine_attention: bool = False
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    output_norm_eps: float | None = None
    """Of the norm in front of the head (`decoder.norm`, `fc_norm`); None: `norm_eps`. Hugging Face models have 1e-5."""
    positions: Literal["exact", "official", "interpolate"] = "exact"
    """The sin-cos table of a clip that is not 16x224: built for its own grid, as the official script leaves it (several
    sizes are errors or scrambled there), or the 16x224 table interpolated along t, y, x. See `models.vit.PositionTable`."""
    learnable_positions: bool = False
    """A trained `pos_embed` instead of the sin-cos table; classification models only."""
    pixel_mean: tuple[float, ...] | None = None
    """Per channel, for pixels in [0, 1]; None: ImageNet's, for 3 channels."""
    pixel_std: tuple[float, ...] | None = None
    activation_checkpoint: Literal["none", "mlp", "block"] = "none"
    residual_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Dual masking (paper section 3.2): what the encoder sees and what the decoder reconstructs."""

    encoder_ratio: float = 0.9
    decoder: Literal["running_cell", "none", "frame", "random", "tube"] = "running_cell"
    decoder_ratio: float = 0.5
    """Share of tokens the decoder leaves out; a multiple of 1/4 for the running cell."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of clips in a mixture."""

    name: str
    """A table of `datasets.toml`, or any name when `root` is given."""
    split: str = "train"
    weight: float = 1.0
    """Clips drawn per epoch as a multiple of the source's own size."""
    stride: int | None = None
    """Frames between two sampled frames; None takes the data set's own, then `DataConfig.stride`."""
    root: str | None = None
    """A folder tree (sub-folder or file name = label) or, with `list`, the prefix of its paths."""
    list: str | None = None
    """An official list file, relative to `root` or absolute."""
    template: str | None = None
    """Frame file template of raw-frame sources, for example `img_{:05}.jpg`."""

    def __post_init__(self) -> None:
        _at_least(self, "source", 1, "stride")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What fine-tuning does to clips beside crop and flip: nothing by default, `data.augment.OFFICIAL` as published."""

    randaugment: str | None = None
    """A policy string such as `rand-m7-n4-mstd0.5-inc1`, see `data.randaugment.parse_policy`; None: none."""
    erase: float = 0.0
    """Probability that a rectangle of a view is filled with noise."""

    def __post_init__(self) -> None:
        require(0 <= self.erase <= 1, f"augment.erase={self.erase}: must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Mixing clips, and their labels, with each other: none by default, `data.augment.OFFICIAL_MIX` as published."""

    mixup: float = 0.0
    """Both parameters of the Beta distribution of the shares; 0: no mixup."""
    cutmix: float = 0.0
    """The same of the areas; 0: no cutmix."""
    probability: float = 1.0
    """Of mixing a group of clips at all."""
    switch_probability: float = 0.5
    """Of cutmix where both are on."""
    clips: int = 2
    """Clips (decodes) of a group, which is mixed within itself and in one way; micro-batches hold whole groups. Official:
    all clips of a device."""

    def __post_init__(self) -> None:
        _at_least(self, "mix", 0, "mixup", "cutmix")
        _at_least(self, "mix", 1, "clips")
        for name in ("probability", "switch_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"mix.{name}={value}: must lie in [0, 1]")

    @property
    def enabled(self) -> bool:
        return self.probability > 0 and max(self.mixup, self.cutmix) > 0

    def check(self, run: RunConfig) -> None:
        """Raise ValueError unless every micro-batch of `run` holds whole groups."""
        if self.enabled:
            rows = run.train.micro_batch or run.train.global_batch
            name = "train.global_batch" if run.train.micro_batch is None else "train.micro_batch"
            divisible(name, rows, "mix.clips * data.views", self.clips * run.data.views)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips, and how each is cut out of its video."""

    sources: tuple[SourceConfig, ...] = ()
    datasets: str | None = None
    """Path of `datasets.toml`; None reads VMAE2_DATASETS, then ./datasets.toml."""
    stride: int = 4
    sampling: Literal["pretrain", "dense", "segment"] = "pretrain"
    """Official frame-index rules: pre-training's dense clip, fine-tuning's dense clip, SSv2's segments (TSN)."""
    views: int = 1
    """Views of one decode (`num_sample`): they share frames, crop and masks are drawn anew for each."""
    crop: Literal["multi_scale", "random_resized", "center"] = "multi_scale"
    flip: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    backend: Literal["auto", "pyav", "dali"] = "auto"
    """Decoder. auto: NVIDIA DALI where it is installed, there is a GPU and no cache is kept; else PyAV."""
    pipelines: int = 8
    """DALI pipelines of a GPU; one keeps about one of its decoding engines busy."""
    workers: int = 2
    """PyAV's processes; 0 decodes in a thread of the training process, where `timeout_s` cannot be kept. With DALI they
    decode what it cannot."""
    prefetch: int = 4
    """Batches kept ready."""
    cache_mb: int = 0
    """Keep decoded short videos in memory up to this many MiB; worth it for sets that fit."""
    timeout_s: float = 60.0
    """Seconds a clip may take: then its process is ended and the clip counts as one that cannot be decoded."""
    max_attempts: int = 8
    """Replacements tried for a clip that cannot be decoded."""
    max_bad_rate: float = 0.5
    """Stop when more than this share of the clips had to be replaced."""

    def __post_init__(self) -> None:
        _at_least(self, "data", 1, "stride", "views", "prefetch", "pipelines")
        _at_least(self, "data", 0, "workers", "cache_mb", "max_attempts")
        require(self.timeout_s > 0, f"data.timeout_s={self.timeout_s}: must be above 0")
        require(self.backend != "dali" or not self.cache_mb, f"data.cache_mb={self.cache_mb}: only PyAV's frames are cached; "
                "set it to 0, or data.backend=pyav")  # fmt: skip
        rate = self.max_bad_rate
        require(0 < rate <= 1, f"data.max_bad_rate={rate}: must lie above 0 and be at most 1")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Multi-view test: `segments` clips in time x `crops` in space, softmax averaged."""

    segments: int = 5
    crops: int = 3
    batch: int = 16

    def __post_init__(self) -> None:
        _at_least(self, "views", 1, "segments", "crops", "batch")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, layer-wise decay, linear warm-up then cosine per step."""

    lr: float = 1.5e-4
    """Base learning rate; the real one is lr * global batch / `lr_batch`."""
    lr_batch: int = 256
    """0: `lr` is taken as it is."""
    min_lr: float = 1e-5
    """Scaled like `lr`."""
    warmup_epochs: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    layer_decay: float = 1.0
    clip_grad: float | None = None
    """Global gradient norm above which gradients are scaled down."""
    ema_decay: float | None = None
    """Moving average of the weights, w <- d w + (1 - d) p after every step (official option: 0.9999); None: none. With one,
    validation and the weights written at the end are the average's."""

    def __post_init__(self) -> None:
        names = ("lr", "lr_batch", "min_lr", "warmup_epochs", "eps", "weight_decay", "weight_decay_end")
        _at_least(self, "optim", 0, *names)
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas={self.betas}: both must lie in [0, 1)")
        require(0 < self.layer_decay <= 1, f"optim.layer_decay={self.layer_decay}: must lie above 0 and be at most 1")
        clip = self.clip_grad
        require(clip is None or clip > 0, f"optim.clip_grad={clip}: must be above 0, or None for no clipping")
        ema = self.ema_decay
        require(ema is None or 0 < ema < 1, f"optim.ema_decay={ema}: must lie between 0 and 1, or None for no average")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how large, how exact, how often saved."""

    epochs: int = 1
    global_batch: int = 64
    """Clips (views counted) of one optimiser step over all devices; it belongs to the recipe."""
    micro_batch: int | None = None
    """Clips of one forward on one rank; None: all of its share at once. Times the ranks it must divide the global batch."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """On several ranks: the whole model on each, or parameters, gradients and moments split over them (FSDP2)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast."""
    compile: Literal["none", "blocks", "model"] = "none"
    """What torch.compile gets: every transformer block by itself (fast to compile), or the whole model."""
    cuda_graph: bool = False
    """Replay forward and backward of a micro-batch as one CUDA graph; needs a GPU. See `train.execution`."""
    threads: int | None = None
    """CPU threads of a step; None: torch's own choice. Models of demo size are faster on one than on two."""
    loss_denominator: Literal["code", "paper"] = "code"
    checkpoint_every: int = 500
    """Optimiser steps between two checkpoints; the end of the run always saves."""
    keep_checkpoints: int = 2
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for good; 0: none."""
    max_skipped: int = 100
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run ends with exit code 3."""
    log_every: int = 10
    stuck_after: int = 1800
    """Seconds without a finished step after which every rank writes the stacks of its threads; 0: never."""
    validate_every: int = 0
    """Epochs between two validations; 0: only at the end."""

    def __post_init__(self) -> None:
        names = ("epochs", "global_batch", "micro_batch", "threads", "checkpoint_every", "keep_checkpoints", "log_every")
        _at_least(self, "train", 1, *names, "max_skipped")
        _at_least(self, "train", 0, "validate_every", "keep_every", "stuck_after")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all stages share."""

    name: str
    cites: str = ""
    """The table or script the values come from."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: DataConfig | None = None
    init: str | None = None
    """Weights to start from: a file, a run directory, or `hf:OWNER/NAME[@REV]`."""
    out: str = "runs"
    """Parent folder of the run directory `OUT/NAME`."""
    seed: int = 0

    def __post_init__(self) -> None:
        train = self.train
        divisible("train.global_batch", train.global_batch, "data.views", self.data.views)
        if train.micro_batch is not None:
            divisible("train.global_batch", train.global_batch, "train.micro_batch", train.micro_batch)
            divisible("train.micro_batch", train.micro_batch, "data.views", self.data.views)
        require(
            not (train.cuda_graph and self.model.drop_path_skip),
            "train.cuda_graph and model.drop_path_skip exclude each other: a graph has fixed shapes, and skipping dropped "
            "samples changes them from step to step; turn one of them off",
        )


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
class AvaDataConfig(DataConfig):
    """Clips around the key frames of AVA or AVA-Kinetics; `sources`, `sampling`, `views` and `crop` have no meaning here."""

    videos: str = ""
    """Folder of VIDEO.mp4 (or another ending) or VIDEO/ folders of images."""
    annotations: str = ""
    exclusions: str | None = None
    labels: str | None = None
    """Label map of the actions that count in frame-mAP (.pbtxt); None: all that are annotated."""
    boxes: str | None = None
    """Detected people (.csv, .json, .pkl) for evaluation; None: the annotated boxes."""
    box_images: str | None = None
    """JSON of the images that the boxes of a .json belong to."""
    box_score: float = 0.8
    """Detected boxes below it are left out."""
    box_extension: tuple[float, float] = (0.1, 0.05)
    """Detected boxes grow by these shares of their width and height before they are pooled."""
    box_jitter: bool = True
    """Move the sides of annotated boxes while training."""
    max_boxes: int = 100
    """Boxes of a clip while training; of more a random subset."""
    short_side: tuple[int, int] = (256, 256)
    """Range of the short side a training clip is resized to before its crop; evaluation takes the first, uncropped."""
    start_second: float = 0.0
    """Second of the first frame: 900 for AVA films that were cut from 15:00 on."""
    frame_rate: float = 30.0
    """Of image folders; videos have timestamps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "data", 1, "max_boxes")
        low, high = self.short_side
        require(1 <= low <= high, f"data.short_side={self.short_side}: must be a range of positive sizes")
        require(self.frame_rate > 0, f"data.frame_rate={self.frame_rate}: must be above 0")
        require(self.views == 1, f"data.views={self.views}: key frames have one view")
        require(min(self.box_extension) >= 0, f"data.box_extension={self.box_extension}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class AvaConfig(RunConfig):
    """Action detection in space and time: the actions of people given by boxes (AVA, AVA-Kinetics)."""

    data: AvaDataConfig
    validation: AvaDataConfig | None = None
    style: Literal["videomae", "activitynet", "mmaction2"] = "videomae"
    """Evaluator that frame-mAP is computed as; the ActivityNet one is reported beside it."""
    bins: int = 7
    """RoIAlign bins of a box along an axis."""
    aligned: bool = False
    """RoIAlign's half-pixel shift."""
    norm_from_head: bool = False
    """Start the final norm from the fine-tuned classifier's `fc_norm`; the released script leaves it at its initial values."""
    clips: int = 8
    """Clips of one size in a forward at evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "config", 1, "bins", "clips")


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
        _at_least(self, "detector", 0, "inputs", "embed_layers", "stem_blocks", "layer_scale", "center_radius")
        _at_least(self, "detector", 1, "classes", "width", "heads", "head_layers", "max_length", "initial_normalizer")
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
        _at_least(self, "data", 1, "resize_to")
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
        _at_least(self, "detection", 1, "candidates", "limit", "fused", "fused_classes")
        _at_least(self, "detection", 0, "min_probability", "min_length", "iou_threshold", "min_score")
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
    """Weights of `model`, to take missing features of `data.videos` with before training; None: all must be there."""
    normalize: Literal["none", "imagenet"] = "none"
    """What the trunk is shown: pixels in [0, 1] as the released features, or normalised as it was trained."""
    video_scores: str | None = None
    """JSON of class scores of whole videos (`vmae2 tad scores`) that class-agnostic detections are fused with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "config", 0, "distance_weight")
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


Stage = PretrainConfig | ClassifyConfig | DistillConfig | AvaConfig | TadConfig


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Data made before the first stage, with `OUT/data/datasets.toml` for the stages to read."""

    folder: str | None = None
    """A folder of labelled videos (file name or sub-folder = label); None writes scenes of ours."""
    scenes: Literal["moving", "boxes", "features"] = "moving"
    """Moving scenes with a class each, scenes with several boxes in AVA's formats, or features of untrimmed videos with
    annotations in THUMOS14's style."""
    size: int = 64
    """Height and width of a scene; short side of the small copies made of a folder's videos."""
    scale: float = 1.0
    """Number of scenes as a multiple of the demo's."""
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, "prepare", 1, "size")
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
    format: Literal["npy", "safetensors"] = "npy"
    """npy: float32 [N, D]; safetensors: `features` and `frames` int64 [N, 2], first frame and one past the last."""
    batch: int = 16
    """Windows of one forward."""
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("stride", "batch"):
            require(getattr(self, name) >= 1, f"extract: {name}={getattr(self, name)} must be at least 1")
        require(self.step is None or self.step >= 1, f"extract: step={self.step} must be at least 1")
        require(self.level == "clip" or self.step is None, "extract: step is for clip level; frames follow one another")


KINDS: dict[str, type] = {
    c.__name__: c for c in (PretrainConfig, ClassifyConfig, DistillConfig, AvaConfig, TadConfig, Progression)
}


def unknown(what: str, name: str, known: list[str]) -> str:
    """The message for a name nobody knows: close matches first, else what there is."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(sorted(known))}"
    return f"unknown {what} {name!r}; {hint}"


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, its class under `kind`."""
    out: dict[str, Any] = {"kind": type(config).__name__} if type(config).__name__ in KINDS else {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in value]
        out[f.name] = value
    return out


def from_dict(data: Any, cls: type | None = None) -> Any:
    """The inverse of `to_dict`. Raises ValueError naming an unknown or missing key, or one with a value of another type."""
    where = "a configuration" if cls is None else cls.__name__
    require(isinstance(data, dict), f"{where} must be an object, got {data!r}")
    data = dict(data)
    kind = data.pop("kind", None)
    if kind is not None:
        require(isinstance(kind, str) and kind in KINDS, unknown("config kind", str(kind), list(KINDS)))
        require(cls is None or cls is KINDS[kind], f"kind: {where} was expected, got {kind!r}")
        cls = KINDS[kind]
    if cls is None:
        raise ValueError(f"missing key 'kind'; there are: {', '.join(sorted(KINDS))}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        require(key in fields, f"{cls.__name__}: {unknown('key', str(key), list(fields))}")
    for key, f in fields.items():
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        require(optional or key in data, f"{cls.__name__}: missing key {key!r}")
    return cls(**{key: _decode(f"{cls.__name__}.{key}", value, hints[key]) for key, value in data.items()})


_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
}


def _decode(name: str, value: Any, hint: Any) -> Any:
    """A JSON value as the type `hint` asks for: a union of dataclasses or X | None, Literal, tuple, dataclass, plain."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        options = [a for a in arguments if a is not type(None)]
        if value is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return _decode(name, value, options[0])
        require(isinstance(value, dict), f"{name}: must be an object, got {value!r}")
        decoded = from_dict(value)
        kinds = [option.__name__ for option in options]
        require(type(decoded) in options, f"{name}: must be one of {', '.join(kinds)}, got {type(decoded).__name__}")
        return decoded
    if origin is Literal:
        require(value in arguments, f"{name}: must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{name}: must be a list, got {value!r}")
        count = None if arguments[-1] is Ellipsis else len(arguments)
        require(count is None or len(value) == count, f"{name}: must be a list of {count}, got {value!r}")
        return tuple(_decode(name, item, arguments[0 if count is None else i]) for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{name}: must be an object, got {value!r}")
        return from_dict(value, hint)  # type: ignore[arg-type]
    allowed, words = _PLAIN[hint]
    # by exact type: a bool is an int to Python, not to whoever writes a configuration
    require(type(value) in allowed, f"{name}: must be {words}, got {value!r}")
    return value


def save(config: Any, path: str | Path) -> None:
    Path(path).write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(path: str | Path) -> Any:
    """Read a config written by `save`. Raises ValueError naming the file."""
    try:
        return from_dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a run configuration: {error}") from error
