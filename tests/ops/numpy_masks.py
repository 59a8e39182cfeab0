"""dual_mask written a second time, from the head of `vmae2_fast/ops/masks.py` alone: numpy, sample by sample, no torch."""

from __future__ import annotations

import numpy as np

ENCODER, DECODER = 1, 2
LOW = np.uint64(0xFFFFFFFF)


def philox(counter: tuple[np.ndarray | int, ...], key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10 of counters given as four words (numbers or arrays): uint64 [..., 4]."""
    c = [np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter)]
    half = np.uint64(32)
    for turn in range(10):
        k = [np.uint64((start + turn * step) % 2**32) for start, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]  # 32 x 32 bits fit uint64
        c = [(q >> half) ^ c[1] ^ k[0], q & LOW, (p >> half) ^ c[3] ^ k[1], p & LOW]
    return np.stack(c, axis=-1)


def numpy_dual_mask(
    position: int, view: int, grid: tuple[int, int, int], seed: int, encoder_ratio: float, decoder: str, decoder_ratio: float
) -> tuple[np.ndarray, ...]:
    """(visible_index, decode_index, loss_index, loss_slot) of one sample."""
    frames, height, width = grid
    sites, tokens = height * width, frames * height * width

    def words(purpose: int, count: int) -> np.ndarray:
        lanes = np.arange((count + 3) // 4)
        key = seed % 2**32, purpose ^ seed >> 32
        return philox((position % 2**32, position >> 32, view, lanes), key).ravel()[:count]

    def drawn(purpose: int, count: int, kept: int) -> np.ndarray:
        word, keep = words(purpose, count), np.zeros(count, bool)
        keep[np.lexsort((np.arange(count), word))[:kept]] = True
        return keep

    visible_sites = sites - int(encoder_ratio * sites)
    visible = np.tile(drawn(ENCODER, sites, visible_sites), frames)
    if decoder == "running_cell":
        places = round(4 * decoder_ratio)
        queue, phase = [1] * places + [0] * (4 - places), int(words(DECODER, 1)[0] % 4)
        where = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
        decoded = np.array([not queue[(2 * (y % 2) + x % 2 + phase + 1 + t) % 4] for t, y, x in where])
    elif decoder == "none":
        decoded = ~visible
    elif decoder == "frame":
        decoded = np.repeat(drawn(DECODER, frames, frames - int(decoder_ratio * frames)), sites)
    elif decoder == "random":
        decoded = drawn(DECODER, tokens, tokens - int(decoder_ratio * tokens))
    else:
        decoded = np.tile(drawn(DECODER, sites, sites - int(decoder_ratio * sites)), frames)
    decode_index = np.flatnonzero(decoded)
    loss_index = np.flatnonzero(decoded & ~visible)
    loss_slot = np.searchsorted(decode_index, loss_index)
    constant = decoder in ("none", "frame") or (decoder == "running_cell" and frames % 4 == 0)
    size = len(loss_index) if constant else min(len(decode_index), frames * (sites - visible_sites))
    padding = (0, size - len(loss_index))
    return (
        np.flatnonzero(visible),
        decode_index,
        np.pad(loss_index, padding, constant_values=-1),
        np.pad(loss_slot, padding, constant_values=0),
    )
