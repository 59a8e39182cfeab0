"""The eight labelled sets of the paper: how each is listed, sampled and tested.

Sources: paper sections 4.1 and 4.3 and its tables of results (views); the released `docs/DATASET.md` (list formats, frame
names) and fine-tuning scripts (sampling rates). SSv1 has no branch in the released code: raw frames named as its authors
ship them, the rest as SSv2. UCF101 and HMDB51 have three official splits; the paper does not say which it tests, v1 of
the method used the first.

Where the files lie is a table of the set's name in `datasets.toml`; `toml_table()` gives one to fill in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import DataConfig, SourceConfig, unknown
from .augment import OFFICIAL


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """One data set, and how a fine-tuned model is trained and tested on it."""

    name: str
    """Its table in `datasets.toml`."""
    title: str
    classes: int
    sampling: Literal["dense", "segment"]
    """Dense clips of frames `stride` apart, or one frame of each of T segments (TSN)."""
    segments: int
    """Test clips in time, x `crops` in space."""
    crops: int = 3
    stride: int = 4
    flip: bool = True
    """Not where left and right are what the classes tell apart."""
    template: str | None = None
    """Of raw frames numbered from 1; None: video files."""

    @property
    def list_format(self) -> str:
        return "path label" if self.template is None else "path total label"

    def source(self, split: str) -> SourceConfig:
        return SourceConfig(name=self.name, split=split, stride=self.stride, template=self.template)

    def training(self, *, views: int = 2, workers: int = 8) -> DataConfig:
        """Clips for fine-tuning: random resized crops, the official augmentations, `views` of one decode (repeated
        augmentation: 2)."""
        return DataConfig(
            sources=(self.source("train"),), stride=self.stride, sampling=self.sampling, views=views, crop="random_resized",
            flip=self.flip, workers=workers, augment=OFFICIAL,
        )  # fmt: skip

    def testing(self, split: str = "val", *, workers: int = 8) -> DataConfig:
        """Clips for testing: the official scripts test on the validation list."""
        return DataConfig(
            sources=(self.source(split),), stride=self.stride, sampling=self.sampling, crop="center", workers=workers
        )

    def toml_table(self) -> str:
        """A table for `datasets.toml`, to be given its root."""
        lines = [
            f"[{self.name}]  # {self.title}: lists of lines `{self.list_format}`", 'root = "/path/to/videos"',
            'train = "train.csv"', 'val = "val.csv"', f'kind = "{"video" if self.template is None else "frames"}"',
        ]  # fmt: skip
        if self.template is not None:
            lines += [f'template = "{self.template}"', 'format = "frames"']
        return "\n".join([*lines, f"stride = {self.stride}", f"classes = {self.classes}"]) + "\n"


PUBLISHED_CLIPS = {
    "k710": 658_340, "k400": 240_436, "k600": 366_006, "ssv2": 168_913, "ava": 21_000, "webvid": 250_000, "own_web": 250_000,
}  # fmt: skip
"""Training clips of the sources the paper counts (its tables of data sets)."""


def _kinetics(classes: int) -> LabelledSet:
    return LabelledSet(name=f"k{classes}", title=f"Kinetics-{classes}", classes=classes, sampling="dense", segments=5)


_SETS = (
    *(_kinetics(classes) for classes in (400, 600, 700, 710)),
    LabelledSet(
        name="ssv1", title="Something-Something V1", classes=174, sampling="segment", segments=2, stride=2, flip=False,
        template="{:05d}.jpg",
    ),
    LabelledSet(
        name="ssv2", title="Something-Something V2", classes=174, sampling="segment", segments=2, stride=2, flip=False,
        template="img_{:05}.jpg",
    ),
    LabelledSet(name="ucf101", title="UCF101", classes=101, sampling="dense", segments=5),
    LabelledSet(name="hmdb51", title="HMDB51", classes=51, sampling="dense", segments=5, stride=2),
)  # fmt: skip
LABELLED_SETS = {s.name: s for s in _SETS}


def labelled_set(name: str) -> LabelledSet:
    """A set by its name. Raises ValueError with close matches."""
    if name not in LABELLED_SETS:
        raise ValueError(unknown("labelled set", name, list(LABELLED_SETS)))
    return LABELLED_SETS[name]
