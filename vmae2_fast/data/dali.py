"""Planned frames decoded by NVIDIA DALI: on a GPU by its video and JPEG engines, without one by DALI's own CPU decoders.

The graph is the same on both: encoded bytes and frame numbers in, frames out. What DALI would get wrong without saying so is
kept from it: a file is demuxed first, and one that is cut off, turned, interlaced, deeper than 8 bits, of a codec the chip
lacks or counted differently by different decoders is refused here with a reason, for PyAV to decode (`decode`). What DALI
cannot tell at all are bytes damaged inside a packet: it conceals them, PyAV refuses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .images import is_jpeg, read_jpeg
from .probing import DecodeError, StreamForm, probe, stream_form

INSTALL = "pip install 'vmae2_fast[dali]' (nvidia-dali-cuda130, Linux)"
_CODECS = {"cpu": {"vp8", "vp9", "mjpeg"}, "cuda": {"h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg"}}
_EIGHT_BITS = {
    "cpu": {f"yuv{j}{chroma}p" for j in ("", "j") for chroma in (420, 422, 444)},
    "cuda": {"yuv420p", "yuvj420p"},  # every chip decodes these; the rest differs from generation to generation
}


class UnsupportedError(Exception):
    """A clip that is not for DALI on this device; says why."""


class DaliError(RuntimeError):
    """DALI could not decode a batch. It does not say which clip was to blame."""


class Encoded(NamedTuple):
    """One clip as it is handed to DALI."""

    path: str
    kind: Literal["video", "image"]
    data: tuple[np.ndarray, ...]
    """uint8 [bytes] of each file: the video, or the distinct images in order of `wanted`."""
    ids: np.ndarray
    """Planned frames, int64 [T], any order, repeats allowed."""
    wanted: np.ndarray
    """The distinct ones, ascending."""
    size: tuple[int, int] | None
    """Height and width in pixels of a video's frames."""


def why_not_dali() -> str | None:
    """Why DALI cannot be used, with the way out, or None."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"NVIDIA DALI is not installed ({error}): {INSTALL}"
    return None


def why_unsupported(form: StreamForm, device: torch.device) -> str | None:
    """Why DALI on `device` must not decode a video of this form, or None."""
    codecs = _CODECS[device.type] | ({"av1"} if device.type == "cuda" and _decodes_av1(device) else set())
    if form.codec not in codecs:
        return f"codec {form.codec} is not decoded by DALI on this {device.type} device"
    if form.pix_fmt not in _EIGHT_BITS[device.type]:
        return f"pixel format {form.pix_fmt} is not decoded by DALI on this {device.type} device"
    if form.rotation % 360:
        return f"turned by {form.rotation} degrees, which DALI does not apply"
    if form.interlaced:
        return "interlaced"
    if form.streams > 1:
        return f"{form.streams} video streams"
    return None


def _decodes_av1(device: torch.device) -> bool:
    # NVDEC support matrix: GA10x and Ada, and Blackwell, but neither GA100 (8.0) nor Hopper (9.0)
    major, minor = torch.cuda.get_device_capability(device)
    return (major, minor) >= (8, 6) and major != 9


def read_video(path: str, choose: Callable[[int], np.ndarray], device: torch.device) -> Encoded:
    """The bytes of a video and the frames `choose` names, given the number of frames.

    Raises DecodeError for a file nothing can decode, UnsupportedError for one that is not for DALI.
    """
    info = probe(path)
    if not info.plain:
        raise UnsupportedError("decoders may count its frames differently")
    form = stream_form(path)
    why = why_unsupported(form, device)
    if why is not None:
        raise UnsupportedError(why)
    ids = np.asarray(choose(info.num_frames), dtype=np.int64)
    wanted = np.unique(ids)
    if wanted[0] < 0 or wanted[-1] >= info.num_frames:
        raise DecodeError(path, f"frame {wanted[-1]} was asked for, the video has {info.num_frames}")
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    return Encoded(path, "video", (data,), ids, wanted, (form.height, form.width))


def read_images(folder: str, files: list[str], ids: np.ndarray) -> Encoded:
    """The JPEG files of the frames `ids` of a clip kept as one image per frame; `files` are those of frame 0, 1, ...

    Raises DecodeError for a missing or cut-off one, UnsupportedError for other formats.
    """
    ids = np.asarray(ids, dtype=np.int64)
    wanted = np.unique(ids)
    if not all(is_jpeg(files[k]) for k in wanted):
        raise UnsupportedError("images other than JPEG")
    data = tuple(np.frombuffer(read_jpeg(files[k]), dtype=np.uint8) for k in wanted)
    return Encoded(folder, "image", data, ids, wanted, None)


class DaliDecoder:
    """One DALI pipeline for videos and one for JPEG files, built when first needed; for use by one thread.

    Several decoders side by side fill the engines of a GPU: a pipeline alone drives about one.

    Args:
        device: "cuda" (engines of that GPU, frames stay there) or "cpu".
        batch: clips of a batch to make room for at first; more are no error.
        threads: CPU threads of a pipeline, which parse files and decode on the CPU.

    Raises ImportError, saying how to get it, where DALI is not installed.
    """

    def __init__(self, device: torch.device | str, *, batch: int = 8, threads: int = 2) -> None:
        why = why_not_dali()
        if why is not None:
            raise ImportError(why)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._threads = threads
        self._room = {"video": batch, "image": 16 * batch}
        self._pipelines: dict[str, Any] = {}

    @contextlib.contextmanager
    def decode(self, clips: Sequence[Encoded]) -> Iterator[list[torch.Tensor]]:
        """Frames of clips of one kind, each RGB uint8 [T, H, W, 3], on the current stream of the device.

        They belong to DALI and are gone after the block, whose end waits for all that stream does with them.
        Raises DaliError, after which the decoder can be used again; RuntimeError where this machine lacks what DALI needs.
        """
        kinds = {clip.kind for clip in clips}
        if len(kinds) != 1:
            raise ValueError(f"decode: clips of one kind, got {sorted(kinds) or 'none'}")
        kind = kinds.pop()
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        pipeline = self._pipeline(kind, sum(len(clip.data) for clip in clips))
        try:
            pipeline.feed_input("encoded", [data for clip in clips for data in clip.data])
            if kind == "video":
                pipeline.feed_input("frames", [clip.wanted.astype(np.int32) for clip in clips])
            pipeline.schedule_run()
            # bound to our stream: DALI makes it wait for the frames
            (output,) = pipeline.share_outputs() if stream is None else pipeline.share_outputs(cuda_stream=stream)
            samples = iter([torch.from_dlpack(output[i]) for i in range(len(output))])
            frames = [self._frames(clip, samples) for clip in clips]
        except RuntimeError as error:
            self._pipelines.pop(kind, None)  # a pipeline that failed calls itself invalid
            raise DaliError(_reason(error)) from error
        try:
            yield frames
        finally:
            frames.clear()
            if stream is not None:
                stream.record_event().synchronize()
            pipeline.release_outputs()

    def _frames(self, clip: Encoded, samples: Iterator[torch.Tensor]) -> torch.Tensor:
        """The planned frames of a clip, whose distinct ones are the next of `samples`."""
        if clip.kind == "video":
            frames = next(samples)
            expected = (len(clip.wanted), *(clip.size or ()), 3)
            if tuple(frames.shape) != expected:
                raise DaliError(f"{clip.path}: frames of shape {tuple(frames.shape)} instead of {expected}")
        else:
            images = [next(samples) for _ in clip.data]
            if len({image.shape for image in images}) != 1:
                raise DaliError(f"{clip.path}: images of different sizes")
            frames = torch.stack(images)
        if np.array_equal(clip.wanted, clip.ids):
            return frames
        return frames[torch.from_numpy(np.searchsorted(clip.wanted, clip.ids)).to(frames.device)]

    def _pipeline(self, kind: str, samples: int) -> Any:
        if kind not in self._pipelines or samples > self._room[kind]:
            self._room[kind] = max(samples, self._room[kind])
            try:
                self._pipelines[kind] = _build(kind, self.device, self._room[kind], self._threads)
            except RuntimeError as error:  # no clip's fault, so not a DaliError
                raise RuntimeError(f"DALI cannot decode any {kind} on {self.device}: {_reason(error)}") from error
        return self._pipelines[kind]


def _build(kind: str, device: torch.device, batch: int, threads: int) -> Any:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.types import DALIDataType, DALIImageType

    # one run at a time: with more of them on the way, a bad file would take the next batch down with its own
    number, backend = (device.index, "mixed") if device.type == "cuda" else (None, "cpu")
    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=number, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=DALIDataType.UINT8, no_copy=True)
        if kind == "video":
            numbers = fn.external_source(name="frames", ndim=1, dtype=DALIDataType.INT32)
            # by default a frame beyond the end would come back black
            output = fn.decoders.video(encoded, frames=numbers, device=backend, pad_mode="none")
        else:
            output = fn.decoders.image(encoded, device=backend, output_type=DALIImageType.RGB, adjust_orientation=False)
        pipeline.set_outputs(output)
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """The reason in DALI's many lines of an error."""
    text = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
