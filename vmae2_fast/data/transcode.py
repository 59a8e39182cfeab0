"""Videos made cheap to decode: one short side, key frames close together, one codec.

Every file appears under its final name only when it is complete and was read back; a run that was stopped goes on where it
was, and shards of one list may run side by side.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..whole import write_json, write_whole
from .decode import decode_timed
from .files import Listed, in_processes, shard_of
from .probing import DecodeError, probe
from .streaming import sound_frames

_RECORD = "transcode.json"
"""Beside the new files: the `Recoding` they were made by."""
_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9"}


@dataclass(frozen=True, kw_only=True)
class Recoding:
    """What videos become."""

    short_side: int = 256
    """Pixels; smaller videos keep their size."""
    gop: int = 12
    """Frames from one key frame to the next."""
    codec: Literal["h264", "hevc", "vp9"] = "h264"
    crf: int = 20
    """Quality of the codec: lower is better and larger."""

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.gop < 1 or not 0 <= self.crf <= 63:
            raise ValueError(
                f"short_side={self.short_side}, gop={self.gop}, crf={self.crf}: at least 16, at least 1, and 0 to 63"
            )


def transcode_file(path: str, target: str, recoding: Recoding) -> int:
    """Write `path` anew as `target` (MP4, frames and their times kept, rotation applied) and return its number of frames.

    Raises DecodeError for a file that is damaged, or whose copy does not read back; nothing is left of it.
    """
    import av

    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    partial = f"{target}.{os.getpid()}.partial"
    try:
        with av.open(partial, "w", format="mp4") as out:
            count = _encode(path, out, recoding)
        if count != probe(path).num_frames:
            raise DecodeError(path, f"damaged: {count} of {probe(path).num_frames} frames can be decoded")
        if probe(partial).num_frames != count:
            raise DecodeError(path, f"its copy has {probe(partial).num_frames} frames instead of {count}")
        decode_timed(partial, np.array([0, count // 2, count - 1]))
        os.replace(partial, target)
        return count
    except av.FFmpegError as error:
        raise DecodeError(path, f"cannot be encoded: {error.strerror or error}") from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _encode(path: str, out: Any, recoding: Recoding) -> int:
    import av

    frames = sound_frames(path)
    first = next(frames)
    turns = round(first.rotation / 90) % 4
    height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
    scale = min(1.0, recoding.short_side / min(height, width))
    height, width = (max(2 * round(side * scale / 2), 2) for side in (height, width))
    options = {"crf": str(recoding.crf), "g": str(recoding.gop), "threads": "1"}
    if recoding.codec == "hevc":
        options["x265-params"] = "log-level=none:pools=none:frame-threads=1"
    stream = out.add_stream(_ENCODERS[recoding.codec], options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.codec_context.time_base = first.time_base
    count = 0
    for frame in itertools.chain((first,), frames):
        picture = frame
        if frame.pts is None:
            raise DecodeError(path, "holds frames without timestamps")
        if turns:
            picture = av.VideoFrame.from_ndarray(np.rot90(frame.to_ndarray(format="rgb24", threads=1), turns).copy(), "rgb24")
        picture = picture.reformat(width=width, height=height, format="yuv420p", interpolation="AREA", threads=1)
        picture.pts, picture.time_base = frame.pts, frame.time_base
        picture.pict_type = 0
        out.mux(stream.encode(picture))
        count += 1
    out.mux(stream.encode())
    return count


def transcode(
    listed: Listed, out: str, recoding: Recoding, *, shard: str = "0/1", workers: int = 2, timeout_s: float = 600.0
) -> dict[str, Any]:
    """Write every video of a list anew under `out`, with the same relative path and ending .mp4, and a list of them.

    Returns files, done (now), skipped (there before), bad (number), reasons and the path of the list, which holds what is
    there so far: the last shard to end completes it. Raises ValueError for raw frames, absolute or colliding paths, and an
    `out` whose files were made otherwise.
    """
    source = listed.source
    if (source.manifest.totals >= 0).any():
        raise ValueError(f"{source.name}: lists raw frames; transcode takes video files")
    targets: dict[str, int] = {}
    for number in range(len(source.manifest)):
        relative = source.manifest[number].path
        name = _target(relative)
        if os.path.isabs(relative) or ".." in Path(relative).parts:
            raise ValueError(f"{source.name}: {relative} lies outside the root; give --root and relative paths")
        before = targets.setdefault(name, number)
        if source.manifest[before].path != relative:
            raise ValueError(f"{source.name}: {relative} and {source.manifest[before].path} would both become {name}")
    numbers = [n for n in shard_of(shard, len(source.manifest)) if targets[_target(source.manifest[n].path)] == n]
    todo = [n for n in numbers if not os.path.exists(os.path.join(out, _target(source.manifest[n].path)))]
    _claim(Path(out), recoding, next((name for name in targets if os.path.exists(os.path.join(out, name))), None))
    jobs = [
        (source.path(source.manifest[n]), os.path.join(out, _target(source.manifest[n].path)), recoding) for n in todo
    ]
    reasons: dict[str, list[str]] = {}
    unfinished = {os.path.normpath(target) for _, target, _ in jobs}
    _sweep(out, unfinished)  # of a run that was killed
    try:
        for number, result in in_processes(transcode_file, jobs, workers=workers, timeout_s=timeout_s, what="transcoding"):
            if isinstance(result, DecodeError):
                reasons.setdefault(result.reason, []).append(jobs[number][0])
    finally:
        _sweep(out, unfinished)  # of processes ended at their time limit, or with this run
    bad = sum(map(len, reasons.values()))
    return {
        "files": len(numbers), "done": len(jobs) - bad, "skipped": len(numbers) - len(jobs), "bad": bad,
        "reasons": dict(sorted(reasons.items())), "list": _write_list(listed, out),
    }  # fmt: skip


def _claim(out: Path, recoding: Recoding, there: str | None) -> None:
    """Write down what the files of `out` become, of which `there` is one already. Raises ValueError where they differ."""
    path, wanted = out / _RECORD, dataclasses.asdict(recoding)
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); choose another --out") from error
    if there is not None and before is None:
        raise ValueError(f"{out} holds {there}, which transcode did not write; choose another --out")
    if there is not None and before is not None and before != wanted:
        made = ", ".join(f"{name} {value}" for name, value in before.items() if value != wanted.get(name))
        raise ValueError(f"{out} holds files made with {made} ({path}); give the same values, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _sweep(out: str, targets: set[str]) -> None:
    """Remove what processes that were killed had begun of `targets`."""
    for folder, _, names in os.walk(out):
        for name in names:
            match = re.fullmatch(r"(.+)\.\d+\.partial", name)
            if match and os.path.normpath(os.path.join(folder, match[1])) in targets:
                Path(folder, name).unlink(missing_ok=True)


def _target(relative: str) -> str:
    return os.path.splitext(relative)[0] + ".mp4"


def _write_list(listed: Listed, out: str) -> str:
    manifest = listed.source.manifest
    lines = []
    for number in range(len(manifest)):
        record = manifest[number]
        if os.path.exists(os.path.join(out, _target(record.path))):
            numbers = f"{record.start} {record.total}" if listed.format == "pretrain" else str(record.label)
            lines.append(f"{_target(record.path)} {numbers}\n")
    name = "list.csv" if os.path.isdir(listed.source.name) else os.path.basename(listed.source.name)
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, name)
    write_whole(Path(path), lambda temporary: temporary.write_text("".join(lines)))
    return path
