"""Dual masks as index lists (paper section 3.2): which tokens the encoder sees, the decoder reconstructs, the loss counts.

Tokens of a grid (T', H', W') are numbered id = (t*H' + y)*W' + x. The encoder's tube mask hides the same
int(encoder_ratio*H'*W') sites of every frame. The decoder's running cell mask leaves out, of each 2x2 cell of sites, a
share that moves by one place a frame:

    masked(t, y, x) = queue[(2*(y mod 2) + (x mod 2) + phase + 1 + t) mod 4],    queue = [1]*4r + [0]*(4 - 4r)

Random bits are Philox 4x32-10 (Salmon et al., SC 2011): key = (seed low 32 bits, purpose XOR seed high 32 bits), counter
= (position low, position high, view, lane), purpose 1 for the encoder and 2 for the decoder. Item s of a draw (site, frame
or token) owns word s % 4 of lane s // 4; the items with the smallest (word, s) are kept. The running cell's phase is word 0
of lane 0, modulo 4. So masks are a pure function of (seed, position, view), whatever the batch split or the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import backend
from . import _native
from ._register import check, define, kernel, register_backends

ENCODER, DECODER = 1, 2  # purposes: independent streams of one seed
DECODER_KINDS = ("running_cell", "none", "frame", "random", "tube")


class DualMask(NamedTuple):
    """Index lists of a batch, int32, ascending in each row."""

    visible_index: Tensor
    """[B, Nv] tokens the encoder sees."""
    decode_index: Tensor
    """[B, Nd] tokens the decoder reconstructs."""
    loss_index: Tensor
    """[B, Nl] tokens reconstructed and hidden from the encoder, padded at the end with -1."""
    loss_slot: Tensor
    """[B, Nl] position of each loss token inside `decode_index`, 0 where padded."""


class _Plan(NamedTuple):
    """Static numbers behind a mask: what the kernels take."""

    visible_sites: int  # sites a frame that the encoder sees
    kept: int  # decoder items kept: masked places of a cell (running_cell), frames, tokens or sites
    decoded: int  # Nd
    loss: int  # Nl


def _plan(grid: tuple[int, ...], encoder_ratio: float, decoder: str, decoder_ratio: float) -> _Plan:
    check(len(grid) == 3 and min(grid) >= 1, f"dual_mask: grid must be (T', H', W') with positive entries, got {tuple(grid)}")
    frames, height, width = grid
    sites, tokens = height * width, frames * height * width
    check(0 <= encoder_ratio < 1, f"dual_mask: encoder_ratio must be in [0, 1), got {encoder_ratio}")
    check(0 <= decoder_ratio < 1, f"dual_mask: decoder_ratio must be in [0, 1), got {decoder_ratio}")
    visible = sites - int(encoder_ratio * sites)
    check(
        visible >= 1,
        f"dual_mask: encoder_ratio={encoder_ratio} leaves no visible site of {height}x{width}; lower it",
    )
    hidden = frames * (sites - visible)
    if decoder == "running_cell":
        check(
            height % 2 == 0 and width % 2 == 0,
            f"dual_mask: the running cell needs an even grid, got H'xW' = {height}x{width}; "
            "choose a clip size that is a multiple of twice the patch, or another decoder mask",
        )
        masked = round(4 * decoder_ratio)
        check(
            masked == 4 * decoder_ratio,
            f"dual_mask: decoder_ratio of the running cell must be a multiple of 1/4, got {decoder_ratio}; "
            f"nearest valid: {math.floor(4 * decoder_ratio) / 4} or {min(3, math.ceil(4 * decoder_ratio)) / 4}",
        )
        decoded = tokens // 4 * (4 - masked)
        # Over 4 frames every site is decoded equally often, and the tube hides the same sites in all of them.
        loss = hidden // 4 * (4 - masked) if frames % 4 == 0 else min(decoded, hidden)
        return _Plan(visible, masked, decoded, loss)
    if decoder == "none":
        return _Plan(visible, 0, hidden, hidden)
    if decoder == "frame":
        kept = frames - int(decoder_ratio * frames)
        return _Plan(visible, kept, kept * sites, kept * (sites - visible))
    if decoder == "random":
        kept = tokens - int(decoder_ratio * tokens)
        return _Plan(visible, kept, kept, min(kept, hidden))
    check(decoder == "tube", f"dual_mask: decoder must be one of {', '.join(DECODER_KINDS)}, got {decoder!r}")
    kept = sites - int(decoder_ratio * sites)
    return _Plan(visible, kept, frames * kept, min(frames * kept, hidden))


def mask_sizes(
    grid: tuple[int, int, int], *, encoder_ratio: float = 0.9, decoder: str = "running_cell", decoder_ratio: float = 0.5
) -> tuple[int, int, int]:
    """(Nv, Nd, Nl) of `dual_mask` with these arguments. Raises ValueError for a grid or ratio the mask cannot have."""
    plan = _plan(grid, encoder_ratio, decoder, decoder_ratio)
    return grid[0] * plan.visible_sites, plan.decoded, plan.loss


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a*b for 32-bit operands, without leaving int64's range."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & 0xFFFFFFFF


def philox_words(position: Tensor, view: Tensor, *, seed: int, purpose: int, count: int) -> Tensor:
    """The first `count` 32-bit words of each sample's stream: int64 [B, count]."""
    mask = 0xFFFFFFFF
    lanes = torch.arange(-(-count // 4), device=position.device)
    c0 = (position & mask)[:, None].expand(-1, len(lanes))
    c1 = ((position >> 32) & mask)[:, None].expand_as(c0)
    c2 = (view & mask)[:, None].expand_as(c0)
    c3 = lanes.expand_as(c0)
    k0, k1 = seed & mask, purpose ^ ((seed >> 32) & mask)
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :count]


def _smallest(words: Tensor, count: int) -> Tensor:
    """Bool [B, n], True for the `count` smallest (word, index) of each row."""
    n = words.shape[1]
    keys = (words << 31) | torch.arange(n, device=words.device)
    chosen = keys.argsort(dim=1)[:, :count]
    return torch.zeros_like(words, dtype=torch.bool).scatter_(1, chosen, torch.ones_like(chosen, dtype=torch.bool))


def _compact(keep: Tensor, size: int, fill: int) -> Tensor:
    """Indices of the True entries of each row, ascending, then `fill`: int64 [B, size]."""
    n = keep.shape[1]
    ids = torch.arange(n, device=keep.device)
    listed = torch.where(keep, ids, n).sort(dim=1).values[:, :size]
    return torch.where(listed == n, fill, listed)


def _lists(visible: Tensor, decoded: Tensor, sizes: tuple[int, int, int]) -> DualMask:
    """Index lists of bool masks [B, N] whose True means visible / decoded."""
    loss_index = _compact(decoded & ~visible, sizes[2], -1)
    slot = (decoded.cumsum(1) - 1).gather(1, loss_index.clamp(min=0))
    slot = torch.where(loss_index < 0, 0, slot)
    lists = (_compact(visible, sizes[0], -1), _compact(decoded, sizes[1], -1), loss_index, slot)
    return DualMask(*(item.to(torch.int32).contiguous() for item in lists))


def _cell_masked(grid: tuple[int, ...], masked: int, phase: Tensor) -> Tensor:
    """Running cell maps of `phase` [B]: bool [B, N], True = not decoded."""
    t, y, x = (torch.arange(n, device=phase.device) for n in grid)
    place = t[:, None, None] + 2 * (y[:, None] % 2) + x % 2 + 1
    return ((place.flatten() + phase[:, None]) % 4) < masked


def dual_mask_reference(
    position: Tensor, view: Tensor, grid: tuple[int, ...], seed: int, encoder_ratio: float, decoder: str, decoder_ratio: float
) -> DualMask:
    """The specification in plain torch integer arithmetic; runs on any device, with the same bits."""
    plan = _plan(grid, encoder_ratio, decoder, decoder_ratio)
    frames, sites = grid[0], grid[1] * grid[2]
    visible = _smallest(philox_words(position, view, seed=seed, purpose=ENCODER, count=sites), plan.visible_sites)
    visible = visible.repeat(1, frames)

    def draw(count: int) -> Tensor:
        return philox_words(position, view, seed=seed, purpose=DECODER, count=count)

    if decoder == "running_cell":
        decoded = ~_cell_masked(grid, plan.kept, draw(1)[:, 0] & 3)
    elif decoder == "none":
        decoded = ~visible
    elif decoder == "frame":
        decoded = _smallest(draw(frames), plan.kept).repeat_interleave(sites, dim=1, output_size=frames * sites)
    elif decoder == "random":
        decoded = _smallest(draw(frames * sites), plan.kept)
    else:
        decoded = _smallest(draw(sites), plan.kept).repeat(1, frames)
    return _lists(visible, decoded, (frames * plan.visible_sites, plan.decoded, plan.loss))


def _outputs(position: Tensor, grid: Any, encoder_ratio: float, decoder: str, decoder_ratio: float) -> DualMask:
    visible, decoded, loss = mask_sizes(grid, encoder_ratio=encoder_ratio, decoder=decoder, decoder_ratio=decoder_ratio)
    sizes = (visible, decoded, loss, loss)
    return DualMask(*(position.new_empty((position.shape[0], n), dtype=torch.int32) for n in sizes))


def _dual_mask_native(
    position: Tensor, view: Tensor, grid: tuple[int, ...], seed: int, encoder_ratio: float, decoder: str, decoder_ratio: float
) -> DualMask:
    plan = _plan(grid, encoder_ratio, decoder, decoder_ratio)
    out = _outputs(position, grid, encoder_ratio, decoder, decoder_ratio)
    long, int32 = (torch.int64,), (torch.int32,)
    _native.run(
        "dual_mask",
        position.device,
        _native.address(position, long, "dual_mask: position [B]"),
        _native.address(view, long, "dual_mask: view [B]"),
        position.shape[0], *grid, seed, decoder, *plan,
        *(_native.address(item, int32, f"dual_mask: {name}") for name, item in zip(DualMask._fields, out, strict=True)),
    )  # fmt: skip
    return out


register_backends(
    "dual_mask", dual_mask_reference, native=_dual_mask_native, triton=kernel("_masks_triton", "dual_mask")
)


def _body(position: Tensor, view: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    name = backend.pick("dual_mask", position.device)
    return tuple(backend.run("dual_mask", name, position.contiguous(), view.contiguous(), *arguments))


def _fake(position: Tensor, view: Tensor, grid: Any, seed: int, *ratios: Any) -> tuple[Tensor, ...]:
    return tuple(_outputs(position, grid, *ratios))


_dual_mask = define(
    "dual_mask(Tensor position, Tensor view, int[] grid, int seed, float encoder_ratio, str decoder, float decoder_ratio)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _body,
    _fake,
)


def dual_mask(
    position: Tensor,
    view: Tensor,
    *,
    grid: tuple[int, int, int],
    seed: int,
    encoder_ratio: float = 0.9,
    decoder: str = "running_cell",
    decoder_ratio: float = 0.5,
) -> DualMask:
    """Draw the masks of a batch (paper section 3.2, figure 2).

    position: int64 [B], the global consumed position of each clip over all epochs; view: int64 [B], which view of its
    decode. Both may be static device tensors refilled between steps. `grid` is (T', H', W'), `seed` in [0, 2**63).
    `encoder_ratio` is the share of sites hidden from the encoder; `decoder_ratio` the share of tokens (frames, sites)
    that the decoder leaves out; `decoder` one of running_cell, none (decode exactly what the encoder does not see),
    frame, random, tube.

    Returns a `DualMask` on the device of `position`. Its sizes depend on the arguments only (`mask_sizes`); rows of
    `loss_index` are full whenever the count is constant, as it is for the running cell when T' is a multiple of 4.
    Raises ValueError for an odd grid or a ratio that the running cell cannot have.

    Floor: 16 B read and 4*(Nv + Nd + 2*Nl) B written a sample (9.4 kB for a (8, 14, 14) grid, 12.3 kB for (8, 16, 16)), no
    FLOPs. On a GPU it is latency, not bytes.
    """
    for name, tensor in (("position", position), ("view", view)):
        check(
            tensor.ndim == 1 and tensor.dtype in (torch.int32, torch.int64),
            f"dual_mask: {name} must be int64 [B], got {tensor.dtype} {tuple(tensor.shape)}",
        )
    check(position.shape == view.shape, f"dual_mask: position {tuple(position.shape)} and view {tuple(view.shape)} differ")
    check(position.device == view.device, f"dual_mask: position is on {position.device}, view on {view.device}")
    check(0 <= seed < 2**63, f"dual_mask: seed must be in [0, 2**63), got {seed}")
    _plan(grid, encoder_ratio, decoder, decoder_ratio)
    ratios = (float(encoder_ratio), decoder, float(decoder_ratio))
    return DualMask(*_dual_mask(position.long(), view.long(), list(grid), seed, *ratios))


def masks_from_rng(
    rng: Any,
    batch: int,
    *,
    grid: tuple[int, int, int],
    encoder_ratio: float = 0.9,
    decoder: str = "running_cell",
    decoder_ratio: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks drawn on the host from `rng` (numpy's `RandomState`, or `numpy.random` itself), one sample after another.

    Returns (encoder_mask, decoder_mask), bool [batch, N], True = hidden / not decoded. For each sample the tube is drawn
    first (one shuffle of the sites), then the decoder mask (one `randint(4)` for the running cell), in the order and with
    the draws of the official code, so masks recorded under a numpy seed come out again. Errors as in `dual_mask`.
    """
    plan = _plan(grid, encoder_ratio, decoder, decoder_ratio)
    frames, height, width = grid
    sites, tokens = height * width, frames * height * width

    def shuffled(n: int, kept: int) -> np.ndarray:
        mask = np.arange(n) >= kept
        rng.shuffle(mask)
        return mask

    cells = _cell_masked(grid, plan.kept, torch.arange(4)).numpy() if decoder == "running_cell" else None
    encoder_mask, decoder_mask = np.empty((batch, tokens), bool), np.empty((batch, tokens), bool)
    for row in range(batch):
        encoder_mask[row] = np.tile(shuffled(sites, plan.visible_sites), frames)
        if cells is not None:
            decoder_mask[row] = cells[rng.randint(4)]
        elif decoder == "none":
            decoder_mask[row] = ~encoder_mask[row]
        elif decoder == "frame":
            decoder_mask[row] = np.repeat(shuffled(frames, plan.kept), sites)
        elif decoder == "random":
            decoder_mask[row] = shuffled(tokens, plan.kept)
        else:
            decoder_mask[row] = np.tile(shuffled(sites, plan.kept), frames)
    return encoder_mask, decoder_mask


def dual_mask_from_masks(encoder_mask: Any, decoder_mask: Any) -> DualMask:
    """Index lists of boolean masks [B, N] (numpy or torch; True = hidden / not decoded), on the host.

    Visible and decoded counts must be equal in all rows; loss counts may differ and are padded to the longest.
    Raises ValueError otherwise.
    """
    encoder, decoder = (torch.as_tensor(mask).cpu().bool() for mask in (encoder_mask, decoder_mask))
    check(
        encoder.ndim == 2 and encoder.shape == decoder.shape,
        f"dual_mask_from_masks: masks must be bool [B, N] of one shape, got {tuple(encoder.shape)} and {tuple(decoder.shape)}",
    )
    sizes = []
    for name, keep in (("encoder_mask", ~encoder), ("decoder_mask", ~decoder)):
        counts = keep.sum(1).unique().tolist()
        check(
            len(counts) == 1 and counts[0] >= 1,
            f"dual_mask_from_masks: rows of {name} keep {counts} tokens; all must keep the same, at least 1",
        )
        sizes.append(counts[0])
    longest = int((encoder & ~decoder).sum(1).max())
    return _lists(~encoder, ~decoder, (sizes[0], sizes[1], longest))
