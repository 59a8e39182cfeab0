"""Mutations of video files, and what must hold of each: decoded as planned, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vmae2_fast.data import DecodeError, probe, probing
from vmae2_fast.data.decode import decode_timed

KINDS = ("bit flips", "truncation", "spliced header")


def mutate(files: list[Path], seed: int) -> tuple[bytes, str]:
    """The `seed`-th mutation: bytes, and the name of the file to write them to. A pure function of files and seed."""
    rng = np.random.RandomState(seed)
    source, other = (files[i] for i in rng.permutation(len(files))[:2])
    data = bytearray(source.read_bytes())
    kind = KINDS[seed % len(KINDS)]
    if kind == "bit flips":
        start = 0 if rng.randint(2) else rng.randint(len(data))  # every second one has its header among the damage
        for _ in range(1 + rng.randint(64)):
            data[rng.randint(start, len(data))] ^= 1 << rng.randint(8)
    elif kind == "truncation":
        del data[rng.randint(1, len(data)) :]
    else:
        length = rng.randint(16, 2048)
        data[:length] = other.read_bytes()[:length]
    return bytes(data), f"{seed:05}{source.suffix}"


def examine(path: str) -> str:
    """Decode windows of a file; "exact" or "refused". Raises AssertionError for a wrong shape, timestamp or frame count."""
    try:
        info = probe(path)
        shape = None
        for start, stride in ((0, 1), (info.num_frames // 2, 2), (info.num_frames - 1, 1)):
            ids = np.minimum(start + stride * np.arange(8), info.num_frames - 1)
            decoded = decode_timed(path, ids)
            assert decoded.frames.dtype == np.uint8, decoded.frames.dtype
            assert decoded.frames.shape[0] == len(ids), decoded.frames.shape
            assert decoded.frames.shape[1:] in _sizes(path), decoded.frames.shape
            shape = shape or decoded.frames.shape
            if decoded.pts is not None:
                assert info.pts is not None
                assert decoded.pts.tolist() == info.pts[ids].tolist(), (decoded.pts, info.pts[ids])
    except DecodeError:
        return "refused"
    return "exact"


def _sizes(path: str) -> set[tuple[int, int, int]]:
    """Shapes of the frames that decoding the whole file gives."""
    container, stream = probing.open_stream(path)
    with container:
        frames = [(frame.height, frame.width, frame.rotation) for frame in probing.read_frames(container, stream)]
    return {(h, w, 3) for h, w, _ in frames} | {(w, h, 3) for h, w, turned in frames if turned}
