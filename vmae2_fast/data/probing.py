"""What a video file is: its packets, sound frames, number of frames and their timestamps.

A frame's id is its rank in the sorted table of packet timestamps, which is right where `round(time * fps)` is not: variable
frame rates, wrong headers, edit lists.
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

VIDEO_SUFFIXES = frozenset(
    (".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
     ".ts", ".vob", ".webm", ".wmv", ".y4m")
)  # fmt: skip
_INFO_ENTRIES = 16384


class DecodeError(Exception):
    """A clip that cannot be decoded; names the file and the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:  # between processes
        return type(self), (self.path, self.reason)


class StreamInfo(NamedTuple):
    """What one pass over a file's packets tells."""

    num_frames: int
    pts: np.ndarray | None
    """Sorted timestamps int64 [num_frames] in units of the stream's time base, or None where the file cannot be trusted
    with them (missing or doubled, or packed B-frames possible): frames are then counted in decoding order."""
    seconds: np.ndarray | None
    """The same as float64 seconds from the first frame on."""
    plain: bool = False
    """Whether any decoder must count the frames as we do: trusted timestamps, every packet is shown, the first one is a
    keyframe and nothing is shown before it."""


class StreamForm(NamedTuple):
    """What a decoder must be able to do with a video, from its first sound frame."""

    codec: str
    """FFmpeg's name of the format, such as h264 or av1, whatever decodes it here."""
    pix_fmt: str
    height: int
    width: int
    rotation: int
    """Degrees its metadata asks for."""
    interlaced: bool
    streams: int
    """Video streams of the file, cover art included."""


_infos: OrderedDict[tuple[str, int, int], StreamInfo] = OrderedDict()
_infos_lock = threading.Lock()


def av_module() -> Any:
    import av  # on first use: importing the package needs no decoder

    return av


def _identity(path: str) -> tuple[str, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    if stat.S_ISREG(found.st_mode) and not found.st_size:
        raise DecodeError(path, "is empty")
    return path, found.st_size, found.st_mtime_ns


def open_stream(path: str) -> tuple[Any, Any]:
    """Container and its first real video stream (cover art skipped), one decoding thread."""
    if os.path.isdir(path):
        raise DecodeError(path, "is a folder, not a video file")
    av = av_module()
    container = av.open(path, metadata_errors="ignore")
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                container.close()
                raise DecodeError(path, "this FFmpeg has no decoder for its video stream")
            # the loader runs one clip per process: threads inside a clip would only get in each other's way
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            return container, stream
    container.close()
    raise DecodeError(path, "holds no video stream")


def _packets(container: Any, stream: Any) -> Any:
    """Packets up to the end of the file or the first place that cannot be demuxed; empty ones hold no frame."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av_module().FFmpegError, IndexError):  # PyAV's own, where damage makes a stream appear that was not announced
        return


def read_frames(container: Any, stream: Any) -> Any:
    """Sound frames in order of presentation.

    A packet that fails takes with it what may refer to it: frames are left out up to the next keyframe after it.
    """
    av = av_module()
    damaged_at: int | None = None
    for packet in itertools.chain(_packets(container, stream), (None,)):  # None: what the decoder still holds
        try:
            frames = stream.decode(packet)
        except av.FFmpegError:
            damaged_at = _later(damaged_at, packet.pts if packet is not None else None)
            continue
        for frame in frames:
            # frames come out later than their packets go in: a keyframe sent before the damage mends nothing
            if frame.is_corrupt:
                damaged_at = _later(damaged_at, frame.pts)
            elif damaged_at is not None and frame.key_frame and frame.pts is not None and frame.pts > damaged_at:
                damaged_at = None
            if damaged_at is None:
                yield frame


def _later(known: int | None, pts: int | None) -> int:
    # without a timestamp there is no telling when the damage ends
    return max(known if known is not None else -(1 << 62), pts if pts is not None else 1 << 62)


def guarded(path: str, function: Any, *arguments: Any) -> Any:
    """Call `function`, turning whatever the file makes FFmpeg raise into one DecodeError. Other errors are faults of this
    program and stay what they are: a clip must not be counted as corrupt for them."""
    av = av_module()
    try:
        return function(path, *arguments)
    except DecodeError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(path, error.strerror or type(error).__name__) from error
    except ValueError as error:
        raise DecodeError(path, f"{type(error).__name__}: {error}") from error


def probe(path: str) -> StreamInfo:
    """Number of frames and their timestamps from one pass over the packets (cached per file).

    Raises DecodeError for a file that cannot be opened or holds no video frame.
    """
    key = _identity(path)
    with _infos_lock:
        info = _infos.get(key)
    if info is None:
        info = guarded(path, _probe)
        with _infos_lock:
            _infos[key] = info
            while len(_infos) > _INFO_ENTRIES:
                _infos.popitem(last=False)
    return info


def _probe(path: str) -> StreamInfo:
    container, stream = open_stream(path)
    with container:
        everything = list(_packets(container, stream))
        packets = [packet for packet in everything if not packet.is_discard]
        times = [packet.pts for packet in packets]
        # AVI stores no presentation times; with MPEG-4's packed B-frames the made-up ones differ from the frames' own
        unit = stream.time_base
        packed = container.format.name == "avi" and stream.codec_context.name == "mpeg4"
    if times and not packed and None not in times and len(set(times)) == len(times):
        table = np.sort(np.asarray(times, dtype=np.int64))
        plain = len(everything) == len(packets) and packets[0].is_keyframe and times[0] == table[0]
        return StreamInfo(len(times), table, (table - table[0]) * float(unit), plain)
    container, stream = open_stream(path)
    with container:
        count = sum(1 for _ in read_frames(container, stream))
    if not count:
        raise DecodeError(path, "holds no decodable video frame")
    return StreamInfo(count, None, None)


def stream_form(path: str) -> StreamForm:
    """What the video of a file is, from its first sound frame. Raises DecodeError."""
    return guarded(path, _stream_form)


def _stream_form(path: str) -> StreamForm:
    container, stream = open_stream(path)
    with container:
        frame = next(read_frames(container, stream), None)
        if frame is None:
            raise DecodeError(path, "holds no decodable video frame")
        codec = stream.codec_context.codec.canonical_name
        return StreamForm(codec, frame.format.name, frame.height, frame.width, round(frame.rotation),
                          bool(frame.interlaced_frame), len(container.streams.video))  # fmt: skip


def frame_rate(path: str) -> float:
    """Frames a second, the mean over the file. Raises DecodeError where the file does not tell."""
    return guarded(path, _frame_rate)


def _frame_rate(path: str) -> float:
    container, stream = open_stream(path)
    with container:
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise DecodeError(path, "tells no frame rate")
    return float(rate)
