"""Action detection in space and time: AVA, AVA-Kinetics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import at_least, require
from .run import DataConfig, RunConfig


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
        at_least(self, "data", 1, "max_boxes")
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
        at_least(self, "config", 1, "bins", "clips")
