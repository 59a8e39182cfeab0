"""What the stages of every task share: model, masks, data, optimiser, loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import at_least, divisible, require


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
    decoder_fp32: bool = False
    """Projection, decoder and prediction in float32 whatever the precision of the encoder (paper, section on architecture; the
    released code runs them under autocast too). Pre-training models only."""


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
        at_least(self, "source", 1, "stride")


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
        at_least(self, "mix", 0, "mixup", "cutmix")
        at_least(self, "mix", 1, "clips")
        for name in ("probability", "switch_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"mix.{name}={value}: must lie in [0, 1]")

    @property
    def enabled(self) -> bool:
        return self.probability > 0 and max(self.mixup, self.cutmix) > 0

    def check(self, run: RunConfig) -> None:
        """Raise ValueError unless every micro-batch of `run` holds whole groups."""
        if self.enabled:
            rows = run.train.micro_batch or run.train.global_batch  # of all ranks: `train.batch` looks at the share of each
            name = "train.micro_batch" if run.train.micro_batch else "train.global_batch"
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
        at_least(self, "data", 1, "stride", "views", "prefetch", "pipelines")
        at_least(self, "data", 0, "workers", "cache_mb", "max_attempts")
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
        at_least(self, "views", 1, "segments", "crops", "batch")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, layer-wise decay, linear warm-up then cosine per step."""

    implementation: Literal["auto", "vmae2", "torch", "apex", "torchao8bit"] = "auto"
    """Who computes AdamW: our one-pass kernel (CPU), torch's fused one, NVIDIA apex's FusedAdam (GPU), or torchao's with
    moments of 8 bits. auto: vmae2 on a CPU where the native kernels were built, else torch."""
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
        at_least(self, "optim", 0, *names)
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
    """Clips of one forward on one rank; None: all of its share at once; 0: as many as fit its memory, chosen before the first
    step. Times the ranks it must divide the global batch."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """On several ranks: the whole model on each, or parameters, gradients and moments split over all of them (FSDP2), or over
    those of a machine, with a copy on each machine (hybrid)."""
    shard_within: int | None = None
    """Ranks that share one copy with parallel=hsdp; None: those of a machine."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16, float16: autocast, parameters and moments in float32; float16 with a loss scale that adapts itself. On a CPU
    without bfloat16 instructions bfloat16 becomes float32; float16 is emulated, which is slow."""
    float8: bool = False
    """Products of the transformer blocks in float8 through torchao, all else in bfloat16, which precision must be; needs a GPU
    of compute capability 8.9. They are fast only compiled: with compile=blocks. See `train.float8`."""
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
    async_checkpoint: bool = True
    """Train on while a checkpoint is written: rank 0 keeps a copy of it in host memory."""
    max_skipped: int = 100
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run goes back, or ends with exit code
    3."""
    max_rollbacks: int = 0
    """Times a run may go back to its last checkpoint from before such steps, and on with the clips behind them, before it
    ends; 0: it ends at once."""
    log_every: int = 10
    stuck_after: int = 1800
    """Seconds without a finished step after which every rank writes the stacks of its threads; 0: never."""
    validate_every: int = 0
    """Epochs between two validations; 0: only at the end."""
    picture_every: int | None = None
    """Steps between two sets of pictures in RUN/pictures; None: with every checkpoint, 0: none. Needs the extra `report`."""
    tensorboard: bool = False
    """Write the numbers of metrics.jsonl to RUN/tensorboard as well; needs the package tensorboard."""
    spike_factor: float = 2.0
    """A step whose loss is above this times the median of the last 100 is written to RUN/spikes.jsonl with the clips it saw;
    0: only steps whose loss is not finite."""

    def __post_init__(self) -> None:
        names = ("epochs", "global_batch", "shard_within", "threads", "checkpoint_every", "keep_checkpoints", "log_every")
        at_least(self, "train", 1, *names, "max_skipped")
        at_least(self, "train", 0, "max_rollbacks")
        mixed = not self.float8 or self.precision == "bfloat16"
        require(mixed, f"train.float8: all else is in bfloat16, but train.precision={self.precision}; set it to bfloat16")
        whole = ("micro_batch", "validate_every", "keep_every", "stuck_after", "picture_every", "spike_factor")
        at_least(self, "train", 0, *whole)


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
        if train.micro_batch:
            divisible("train.global_batch", train.global_batch, "train.micro_batch", train.micro_batch)
            divisible("train.micro_batch", train.micro_batch, "data.views", self.data.views)
        require(
            not (train.cuda_graph and self.model.drop_path_skip),
            "train.cuda_graph and model.drop_path_skip exclude each other: a graph has fixed shapes, and skipping dropped "
            "samples changes them from step to step; turn one of them off",
        )
