"""Clips around the key frames of AVA, with boxes: training batches and evaluation clips.

A clip is every stride-th frame of a span of frames * stride around the key frame (of 64: 1, 5, .. 61, the key frame is the
33rd); past the ends of a video its first and last frames repeat. Training resizes the short side, cuts a square and mirrors,
and the boxes go along and jitter; evaluation keeps whole frames and extends the boxes (VideoMAE's action detection code).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import AvaDataConfig
from ..ops.resize import Window, resize_crop
from ..ops.yuv import Yuv420, frame_size
from . import boxes as geometry
from . import sampling
from .ava import AvaError, KeyFrame, key_frames, read_annotations, read_exclusions, read_person_boxes, unannotated
from .evaluation_loader import EvaluationLoader
from .images import image_files
from .loader import Draw, Finished, Replaced, VideoLoader, pinned
from .manifest import Manifest, Record, Source
from .probing import VIDEO_SUFFIXES, DecodeError, probe
from .sampling import Purpose, counter_rng
from .workers import ClipMemory, Done, Job

_CROPS = 10  # drawn before the window is put on a box


class AvaBatch(NamedTuple):
    """Clips of one step with their boxes."""

    clip: torch.Tensor
    """uint8 [B, T, H, W, C]."""
    boxes: torch.Tensor
    """float32 [n, 5]: clip, x1, y1, x2, y2 in pixels."""
    label: torch.Tensor
    """float32 [n, 80]."""
    paths: tuple[str, ...]
    replaced: list[Replaced]


@dataclass(frozen=True)
class AvaClip:
    """One key frame at evaluation."""

    clip: torch.Tensor
    """uint8 [T, H, W, C], whole frames."""
    boxes: torch.Tensor
    """float32 [n, 4] in pixels, extended: what is pooled."""
    shares: np.ndarray
    """float64 [n, 4], shares of the frame: what is reported."""
    scores: np.ndarray
    """float64 [n], of the person detector; 1 for annotated boxes."""
    frame: KeyFrame


def temporal_crop(raw: int, frames: int, stride: int) -> np.ndarray:
    """Frame ids int64 [frames] of a clip out of a span of `raw` frames; ids beyond it repeat its ends."""
    start = (raw - frames * stride) // 2 + 1
    return np.clip(start + stride * np.arange(frames, dtype=np.int64), 0, raw - 1)


def key_frame_index(path: str, folder: bool, count: int, frame: KeyFrame, data: AvaDataConfig) -> int:
    """Number of the key frame in a video of `count` frames. Raises DecodeError where it lies outside."""
    second = frame.second - data.start_second
    if folder:
        index, length = round(second * data.frame_rate), count / data.frame_rate
    else:
        times = probe(path).seconds
        if times is None:
            raise DecodeError(path, "has no timestamps to find a key frame by; transcode it, or cut it into images")
        index = int(np.abs(times - second).argmin())
        length = float(times[-1]) + (float(times[-1]) / max(count - 1, 1) if count > 1 else 1.0)
    if not 0 <= second <= length or not 0 <= index < count:
        begin, end = data.start_second, data.start_second + length
        raise DecodeError(path, f"key frame at {frame.second:g} s lies outside the video ({begin:g} to {end:.1f} s)")
    return index


def _clip_ids(locate: Callable[[int], int], frames: int, stride: int, count: int) -> np.ndarray:
    span = frames * stride
    return np.clip(locate(count) - span // 2 + temporal_crop(span, frames, stride), 0, count - 1)


class _KeyFrames:
    """Opens annotations and videos as one source whose clips are the key frames that have boxes."""

    key_frames: list[KeyFrame]
    boxless: int
    """Key frames left out for having no boxes."""
    data: Any
    frames: int

    def _open(self, data: AvaDataConfig) -> list[Source]:
        if not data.videos:
            raise AvaError("give data.videos (a folder)")
        if not os.path.isdir(data.videos):
            raise AvaError(f"data.videos: the folder {data.videos} does not exist")
        found = self._find(data)
        self.key_frames = [frame for frame in found if len(frame.boxes)]
        self.boxless = len(found) - len(self.key_frames)
        if not self.key_frames:
            why = " after exclusions" if data.exclusions else ""
            raise AvaError(f"{data.annotations or data.boxes}: no key frame has boxes{why}")
        there = self._videos_of(data)
        totals: dict[str, Record] = {}
        for frame in self.key_frames:
            if frame.video not in totals:
                totals[frame.video] = self._record(frame.video, there, data)
        records = [totals[frame.video] for frame in self.key_frames]
        return [
            Source(
                name="ava", manifest=Manifest.of(records), root=data.videos, weight=1.0, stride=data.stride, template=None,
                classes=None, label_names=None,
            )
        ]  # fmt: skip

    def _find(self, data: AvaDataConfig) -> list[KeyFrame]:
        if not data.annotations:
            raise AvaError("give data.annotations (a file)")
        excluded = read_exclusions(data.exclusions) if data.exclusions else frozenset()
        return key_frames(read_annotations(data.annotations), excluded)

    @staticmethod
    def _videos_of(data: AvaDataConfig) -> dict[str, str]:
        """Name of a video -> its file or folder below `data.videos`."""
        found: dict[str, str] = {}
        for name in sorted(os.listdir(data.videos)):
            stem, ending = os.path.splitext(name)
            folder = os.path.isdir(os.path.join(data.videos, name))
            if folder or ending.lower() in VIDEO_SUFFIXES:
                found.setdefault(name if folder else stem, name)
        return found

    @staticmethod
    def _record(video: str, there: dict[str, str], data: AvaDataConfig) -> Record:
        # AVA-Kinetics cuts carry their times behind the id: ID_000012_000022
        name = there.get(video) or next((there[k] for k in there if k.startswith(f"{video}_") and _cut_name(k, video)), None)
        if name is None:
            named = data.annotations or data.boxes
            raise AvaError(f"{named}: {data.videos} holds no video of {video} (looked for {video}.mp4 or {video}/)")
        path = os.path.join(data.videos, name)
        total = len(image_files(path)) if os.path.isdir(path) else -1
        if total == 0:
            raise AvaError(f"{path}: holds no image")
        return Record(name, 0, total, -1)

    def _choice(self, source: Source, index: int) -> Callable[[int], np.ndarray]:
        """`Job.choose` of a key frame."""
        record, frame = source.manifest[index], self.key_frames[index]
        locate = functools.partial(key_frame_index, source.path(record), record.total >= 0, frame=frame, data=self.data)
        return functools.partial(_clip_ids, locate, self.frames, source.stride)


def _cut_name(name: str, video: str) -> bool:
    return name[len(video) :].replace("_", "").isdigit()


def _cut_training(
    data: AvaDataConfig, size: int, frame: KeyFrame, draw: Draw, video: torch.Tensor | Yuv420, out: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Fill `out` [1, T, size, size, C]; boxes float64 [n, 4] in its pixels, and their labels."""
    height, width = frame_size(video)

    def rng(purpose: Purpose) -> np.random.RandomState:
        return counter_rng(draw.seed, draw.epoch, draw.position, 0, purpose, draw.attempt)

    low, high = data.short_side
    short = max(int(rng(Purpose.SCALE).randint(low, high + 1)), size)
    scaled = sampling.short_side(height, width, short)
    shares, labels, random = frame.boxes, frame.labels, rng(Purpose.BOXES)
    if len(shares) > data.max_boxes:
        kept = np.sort(random.permutation(len(shares))[: data.max_boxes])
        shares, labels = shares[kept], labels[kept]
    pixels = geometry.clip(geometry.from_shares(shares, width, height), width, height)
    pixels = geometry.resize(pixels, (width, height), scaled[::-1])
    top, left = _window(pixels, scaled, size, rng(Purpose.CROP))
    flip = data.flip and rng(Purpose.FLIP).randint(2) == 1
    resize_crop(video, [Window(top, left, size, size, flip, scaled)], size, out=out, threads=1)
    cut = geometry.crop(pixels, left, top, size, size)
    inside = geometry.has_area(cut)
    cut, labels = cut[inside], labels[inside]
    if flip:
        cut = geometry.flip(cut, size)
    uniform = random.uniform(size=(4, len(cut)))
    cut = geometry.jitter(cut, uniform, size, size) if data.box_jitter else geometry.clip(cut, size, size)
    return cut, labels


def _window(boxes: np.ndarray, scaled: tuple[int, int], size: int, rng: Any) -> tuple[int, int]:
    """(top, left) of a random window that shows a part of some box; at last one on the first box."""
    spare = scaled[0] - size, scaled[1] - size
    for _ in range(_CROPS):
        top, left = (int(rng.randint(n + 1)) for n in spare)
        if geometry.has_area(geometry.crop(boxes, left, top, size, size)).any():
            return top, left
    x, y = (boxes[0, :2] + boxes[0, 2:] - size) / 2
    return int(np.clip(y, 0, spare[0])), int(np.clip(x, 0, spare[1]))


class AvaLoader(_KeyFrames, VideoLoader):
    """Training batches (`AvaBatch`) of annotated key frames. Arguments and errors as those of `VideoLoader`, AvaError for
    annotation files that cannot be used or name videos that are not there."""

    def _work(self, source: Source, index: int, draw: Draw) -> tuple[Callable[..., Any], Callable[..., Any]]:
        cut = functools.partial(_cut_training, self.data, self.size, self.key_frames[index], draw)
        return self._choice(source, index), cut

    def _batch(self, clip: torch.Tensor, finished: list[Finished], failures: list[Replaced]) -> AvaBatch:
        boxes, labels = zip(*(one.done.cut for one in finished))
        rows = [np.concatenate([np.full((len(own), 1), i), own], 1) for i, own in enumerate(boxes)]
        return AvaBatch(
            clip=clip,
            boxes=torch.from_numpy(np.concatenate(rows).astype(np.float32)),
            label=torch.from_numpy(np.concatenate(labels)),
            paths=tuple(one.path for one in finished),
            replaced=failures,
        )


def _cut_whole(short: int, video: torch.Tensor | Yuv420, _: None) -> tuple[np.ndarray, tuple[int, int]]:
    """The clip uint8 [T, H, W, C] with its short side resized to `short`, and height and width it had."""
    height, width = frame_size(video)
    scaled = sampling.short_side(height, width, short)
    return resize_crop(video, [Window(0, 0, *scaled, scaled=scaled)], scaled, threads=1)[0].cpu().numpy(), (height, width)


class AvaEvaluationLoader(_KeyFrames, EvaluationLoader):
    """Every key frame once (`AvaClip`), with the detected people of `data.boxes`, or the annotated ones. Without annotations
    the key frames are those of `data.boxes`.

    `boxless`: key frames on which nobody was detected; annotated ones count as missed.
    """

    def _find(self, data: AvaDataConfig) -> list[KeyFrame]:
        self._people: dict[str, np.ndarray] | None = None
        if data.boxes is None:
            return super()._find(data)
        people = read_person_boxes(data.boxes, data.box_images)
        self._people = {name: rows[rows[:, 4] >= data.box_score] for name, rows in people.items()}
        frames = super()._find(data) if data.annotations else unannotated(people)
        empty = np.zeros((0, 5))
        unlabelled = np.zeros((0, 0), dtype=np.float32)
        return [frame._replace(boxes=self._people.get(frame.name, empty)[:, :4], labels=unlabelled) for frame in frames]

    def _job(self, index: int, memory: ClipMemory) -> tuple[Job, None]:
        source = self.sources[0]
        record = source.manifest[index]
        cut = functools.partial(_cut_whole, self.data.short_side[0])
        # no place: how large a whole frame becomes is known only once the video is open
        job = Job(source=source.alone(record), record=record, choose=self._choice(source, index), cut=cut, place=None)
        return job, None

    def _views(self, index: int, job: Job, out: torch.Tensor | None, done: Done) -> AvaClip:
        frame, (clip, (height, width)) = self.key_frames[index], done.cut
        scaled = clip.shape[1:3]
        pixels = geometry.clip(geometry.from_shares(frame.boxes, width, height), width, height)
        pixels = geometry.resize(pixels, (width, height), scaled[::-1])
        scores = np.ones(len(pixels))
        if self._people is not None:
            scores = self._people[frame.name][:, 4]
            pixels = geometry.extend(pixels, scaled[1], scaled[0], self.data.box_extension)
        boxes = torch.from_numpy(pixels.astype(np.float32))
        return AvaClip(pinned(torch.from_numpy(clip)), boxes, frame.boxes, scores, frame)
