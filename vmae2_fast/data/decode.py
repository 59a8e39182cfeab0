"""Exact frames out of any video PyAV opens, and out of folders of images.

A frame's id is its rank in the sorted table of packet timestamps, which is right where `round(time * fps)` is not:
variable frame rates, wrong headers, edit lists. Reading id k seeks to the keyframe before it and is accepted only if
every timestamp is known, the first decoded frame is a keyframe at or before the target, and every wanted frame was
seen; otherwise the file is read from its start. A frame that cannot be had is an error, never a black or a wrong one,
as far as the codec can tell (VP9 has no means to notice damaged bytes).
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VIDEO_SUFFIXES = frozenset(
    (".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
     ".ts", ".vob", ".webm", ".wmv", ".y4m")
)  # fmt: skip
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp"))
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


class Decoded(NamedTuple):
    """Frames of a video and when they are shown."""

    frames: np.ndarray
    """RGB uint8 [T, H, W, 3]."""
    pts: np.ndarray | None
    """int64 [T] in units of the stream's time base, as the decoder gave them; None where frames were counted because
    the file cannot be trusted with timestamps (see `StreamInfo.pts`)."""


def repeated(ids: np.ndarray) -> np.ndarray:
    """Which frames of a clip only fill it up: bool, of the shape of `ids` [..., T], true where an id was there before."""
    ids = np.asarray(ids)
    flags = np.zeros(ids.shape, dtype=bool)
    flags[..., 1:] = ids[..., 1:] == ids[..., :-1]
    return flags


class FrameCache:
    """Decoded videos kept in memory, at most `capacity` bytes, thread-safe.

    Filled and then held: every epoch visits every clip once, an order under which throwing out the least recently used
    would throw out each video just before its turn.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self._lock = threading.Lock()
        self._videos: dict[Any, np.ndarray] = {}

    def get(self, key: Any) -> np.ndarray | None:
        return self._videos.get(key)

    def has_room(self, size: int) -> bool:
        return self.used + size <= self.capacity

    def put(self, key: Any, video: np.ndarray) -> None:
        """Keep a video if there is room for it."""
        with self._lock:
            if key not in self._videos and self.has_room(video.nbytes):
                self.used += video.nbytes
                self._videos[key] = video


_infos: OrderedDict[tuple[str, int, int], StreamInfo] = OrderedDict()
_infos_lock = threading.Lock()
_local = threading.local()


def _av() -> Any:
    import av  # on first use: importing the package needs no decoder

    return av


def _identity(path: str) -> tuple[str, int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    return path, stat.st_size, stat.st_mtime_ns


def _open(path: str) -> tuple[Any, Any]:
    """Container and its first real video stream (cover art skipped), one decoding thread."""
    if os.path.isdir(path):
        raise DecodeError(path, "is a folder, not a video file")
    av = _av()
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
    except (_av().FFmpegError, IndexError):  # PyAV's own, where damage makes a stream appear that was not announced
        return


def _frames(container: Any, stream: Any) -> Any:
    """Sound frames in order of presentation.

    A packet that fails takes with it what may refer to it: frames are left out up to the next keyframe after it.
    """
    av = _av()
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


def probe(path: str) -> StreamInfo:
    """Number of frames and their timestamps from one pass over the packets (cached per file).

    Raises DecodeError for a file that cannot be opened or holds no video frame.
    """
    key = _identity(path)
    with _infos_lock:
        info = _infos.get(key)
    if info is None:
        info = _guarded(path, _probe)
        with _infos_lock:
            _infos[key] = info
            while len(_infos) > _INFO_ENTRIES:
                _infos.popitem(last=False)
    return info


def _probe(path: str) -> StreamInfo:
    container, stream = _open(path)
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
    container, stream = _open(path)
    with container:
        count = sum(1 for _ in _frames(container, stream))
    if not count:
        raise DecodeError(path, "holds no decodable video frame")
    return StreamInfo(count, None, None)


def stream_form(path: str) -> StreamForm:
    """What the video of a file is, from its first sound frame. Raises DecodeError."""
    return _guarded(path, _stream_form)


def _stream_form(path: str) -> StreamForm:
    container, stream = _open(path)
    with container:
        frame = next(_frames(container, stream), None)
        if frame is None:
            raise DecodeError(path, "holds no decodable video frame")
        codec = stream.codec_context.codec.canonical_name
        return StreamForm(codec, frame.format.name, frame.height, frame.width, round(frame.rotation),
                          bool(frame.interlaced_frame), len(container.streams.video))  # fmt: skip


def frame_rate(path: str) -> float:
    """Frames a second, the mean over the file. Raises DecodeError where the file does not tell."""
    return _guarded(path, _frame_rate)


def _frame_rate(path: str) -> float:
    container, stream = _open(path)
    with container:
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise DecodeError(path, "tells no frame rate")
    return float(rate)


def _guarded(path: str, function: Any, *arguments: Any) -> Any:
    """Call `function`, turning whatever the file makes FFmpeg raise into one DecodeError. Other errors are faults of this
    program and stay what they are: a clip must not be counted as corrupt for them."""
    av = _av()
    try:
        return function(path, *arguments)
    except DecodeError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(path, error.strerror or type(error).__name__) from error
    except ValueError as error:
        raise DecodeError(path, f"{type(error).__name__}: {error}") from error


def sound_frames(path: str) -> Iterator[Any]:
    """Every sound frame of a video in order of presentation, as PyAV gives it. Raises DecodeError."""
    container, stream = _guarded(path, _open)
    with container:
        empty = True
        for frame in _frames(container, stream):
            empty = False
            frame.time_base = stream.time_base  # frames the decoder held back at the end have none
            yield frame
    if empty:
        raise DecodeError(path, "holds no decodable video frame")


def decode_video(path: str, ids: np.ndarray) -> np.ndarray:
    """Frames `ids` (int, any order, repeats allowed) of a video file as RGB uint8 [len(ids), H, W, 3].

    Rotation metadata is applied. Raises DecodeError where a frame is missing or damaged.
    """
    return decode_timed(path, ids).frames


def decode_timed(path: str, ids: np.ndarray) -> Decoded:
    """`decode_video` with the timestamp of every frame: those of `probe(path).pts[ids]`, or the file is refused."""
    ids = np.asarray(ids, dtype=np.int64)
    wanted, place = np.unique(ids, return_inverse=True)
    found, timed = _guarded(path, _find_frames, wanted)
    unique = rgb_frames(path, found)
    pts = np.array([frame.pts for frame in found], dtype=np.int64) if timed else None
    if np.array_equal(wanted, ids):
        return Decoded(unique, pts)
    return Decoded(unique[place], None if pts is None else pts[place])


def find_frames(path: str, wanted: np.ndarray) -> list[Any]:
    """Frames `wanted` (ascending ids) of a video file as PyAV gives them: not converted, not rotated. Raises DecodeError."""
    return _guarded(path, _find_frames, wanted)[0]


def rgb_frames(path: str, found: list[Any]) -> np.ndarray:
    """PyAV's frames as RGB uint8 [len(found), H, W, 3], rotated as they are to be shown. Raises DecodeError."""
    return _guarded(path, _rgb_frames, found)


def _find_frames(path: str, wanted: np.ndarray) -> tuple[list[Any], bool]:
    """The frames, and whether they were found by their timestamps."""
    info = probe(path)
    if wanted[0] < 0 or wanted[-1] >= info.num_frames:
        raise DecodeError(path, f"frame {wanted[-1]} was asked for, the video has {info.num_frames}")
    found = None
    if info.pts is not None:
        found = _by_time(path, info.pts, wanted, seek=wanted[0] > 0)
        if found is None and wanted[0] > 0:
            found = _by_time(path, info.pts, wanted, seek=False)
    timed = found is not None
    return (_by_count(path, info, wanted) if found is None else found), timed


def _rgb_frames(path: str, found: list[Any]) -> np.ndarray:
    first = _to_rgb(found[0])
    unique = np.empty((len(found), *first.shape), dtype=np.uint8)
    unique[0] = first
    for i in range(1, len(found)):
        unique[i] = _to_rgb(found[i], like=found[0])
    turns = round(found[0].rotation / 90) % 4
    if turns:
        unique = np.ascontiguousarray(np.rot90(unique, turns, axes=(1, 2)))
    return unique


def stream_video(path: str, chunk: int = 32) -> Iterator[np.ndarray]:
    """All frames of a video in order, RGB uint8 [<= chunk, H, W, 3] at a time; each is decoded once.

    Memory does not grow with the length of the video. Raises DecodeError where a frame is missing or damaged; what came
    before is right.
    """
    stream = _stream(path, chunk)
    while (frames := _guarded(path, lambda _: next(stream, None))) is not None:
        yield frames


def _stream(path: str, chunk: int) -> Iterator[np.ndarray]:
    info = probe(path)
    known = None if info.pts is None else {int(t): k for k, t in enumerate(info.pts)}
    container, stream = _open(path)
    rows: list[np.ndarray] = []
    first: Any = None
    count = 0
    with container:
        for frame in _frames(container, stream):
            number = count if known is None else known.get(frame.pts)
            if number is None:  # sent before the first frame that is shown
                continue
            if number != count:
                break
            first = first or frame
            rows.append(np.rot90(_to_rgb(frame, like=first), round(first.rotation / 90) % 4))
            count += 1
            if len(rows) == chunk:
                yield np.stack(rows)
                rows = []
    if rows:
        yield np.stack(rows)
    if count != info.num_frames:
        raise DecodeError(path, f"damaged or cut off: frame {count} of {info.num_frames} cannot be decoded")


def _by_time(path: str, table: np.ndarray, wanted: np.ndarray, *, seek: bool) -> list[Any] | None:
    """The wanted frames by timestamp, or None where they were not all seen or the seek cannot be trusted."""
    times = {int(table[k]): i for i, k in enumerate(wanted)}
    target, last = int(table[wanted[0]]), int(table[wanted[-1]])
    found: list[Any] = [None] * len(wanted)
    missing = len(wanted)
    container, stream = _open(path)
    with container:
        if seek:
            container.seek(target, stream=stream, backward=True, any_frame=False)
        first = True
        for frame in _frames(container, stream):
            if first and seek and not (frame.key_frame and frame.pts is not None and frame.pts <= target):
                return None
            first = False
            slot = times.get(frame.pts)
            if slot is not None and found[slot] is None:
                found[slot] = frame
                missing -= 1
                if not missing:
                    return found
            if frame.pts is not None and frame.pts > last:
                return None
    return None


def _by_count(path: str, info: StreamInfo, wanted: np.ndarray) -> list[Any]:
    """The wanted frames by their number in decoding order; only where timestamps cannot be used and nothing is missing."""
    slots = {int(k): i for i, k in enumerate(wanted)}
    found: list[Any] = [None] * len(wanted)
    known = set() if info.pts is None else set(info.pts.tolist())
    strangers = info.pts is None
    count = 0
    container, stream = _open(path)
    with container:
        for frame in _frames(container, stream):
            slot = slots.get(count)
            if slot is not None:
                found[slot] = frame
            strangers = strangers or frame.pts not in known
            count += 1
            if info.pts is None and count > wanted[-1]:
                return found
    # counting is right only if no frame was lost on the way: a table of foreign timestamps but of the right length
    if strangers and count == info.num_frames:
        return found
    raise DecodeError(path, f"damaged or cut off: {count} of {info.num_frames} frames can be decoded, planned ones not")


def _to_rgb(frame: Any, like: Any | None = None) -> np.ndarray:
    """uint8 [H, W, 3]; of the size of the frame `like`, where a stream changes its size midway."""
    from av.video.reformatter import VideoReformatter

    if not hasattr(_local, "reformatter"):
        # one scaling context per thread: building one per frame costs as much as the conversion; PyAV 17 made the
        # conversion multi-threaded by default, which the loader's own processes leave no room for
        _local.reformatter = VideoReformatter()
        _local.options = {"threads": 1} if int(_av().__version__.split(".")[0]) >= 17 else {}
    size = {}
    if like is not None and (frame.width, frame.height) != (like.width, like.height):
        size = {"width": like.width, "height": like.height}
    return _local.reformatter.reformat(frame, format="rgb24", **size, **_local.options).to_ndarray()


def image_files(folder: str) -> list[str]:
    """The image files of a folder, sorted by name."""
    try:
        names = sorted(n for n in os.listdir(folder) if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES and n[0] != ".")
    except OSError as error:
        raise DecodeError(folder, error.strerror or str(error)) from error
    return [os.path.join(folder, name) for name in names]


def is_jpeg(path: str) -> bool:
    return path.lower().endswith((".jpg", ".jpeg"))


def read_jpeg(path: str) -> bytes:
    """A JPEG file that is all there. Raises DecodeError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    # FFmpeg fills what a cut file lacks with grey; a whole JPEG has its end marker near its end
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-4096:]:
        raise DecodeError(path, "damaged or cut-off JPEG")
    return data


def decode_image(path: str) -> np.ndarray:
    """One image as RGB uint8 [H, W, 3]. Raises DecodeError."""
    return _guarded(path, _decode_image)


def _decode_image(path: str) -> np.ndarray:
    av = _av()
    if is_jpeg(path):
        data = read_jpeg(path)
        codec = getattr(_local, "jpeg", None)
        if codec is None:
            codec = _local.jpeg = av.CodecContext.create("mjpeg", "r")
        frames = codec.decode(av.Packet(data))
    else:
        container, stream = _open(path)
        with container:
            frames = list(_frames(container, stream))
    if not frames or frames[0].is_corrupt:
        raise DecodeError(path, "damaged image")
    return _to_rgb(frames[0])


def decode_images(folder: str, files: list[str], ids: np.ndarray) -> np.ndarray:
    """Frames `ids` of a clip kept as one image per frame, RGB uint8 [len(ids), H, W, 3].

    `files` are the paths of frame 0, 1, ... Raises DecodeError for a missing or damaged one or differing sizes.
    """
    wanted, inverse = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    images = [decode_image(files[k]) for k in wanted]
    for image, k in zip(images, wanted):
        if image.shape != images[0].shape:
            raise DecodeError(folder, f"{files[k]} is {image.shape[1]}x{image.shape[0]}, "
                                      f"the first frame {images[0].shape[1]}x{images[0].shape[0]}")  # fmt: skip
    return np.stack(images)[inverse]


def natural_key(name: str) -> list[Any]:
    """Sort key under which `frame10` follows `frame9`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
