"""dual_mask in Triton: one launch, one program a sample. See masks.py for the definition of every bit.

The `count` smallest of n random words are found without sorting: 32 steps of bisection give the count-th smallest word,
each step one count over the words in registers; equal words are kept in order of their index. That needs no more registers
for thousands of words than for hundreds, where a sort spills. Words beyond the first `BLOCK` are drawn again in each step.
Lists are written front to back, frame by frame, at positions from a prefix sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_launch import Configuration, configurations, launch, operand
from .masks import DECODER, ENCODER, DualMask, _outputs, _plan

KINDS = {"running_cell": 0, "none": 1, "frame": 2, "random": 3, "tube": 4}
RUNNING_CELL, NONE, FRAME, RANDOM, TUBE = (tl.constexpr(v) for v in KINDS.values())
_ENCODER, _DECODER = tl.constexpr(ENCODER), tl.constexpr(DECODER)
MOST_WORDS = 8192  # in registers at once: 32 a thread of 8 warps


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10 on uint32 counters and keys."""
    for _ in tl.static_range(10):
        p0, p2 = c0, c2
        c0 = tl.umulhi(p2, 0xCD9E8D57) ^ c1 ^ k0
        c2 = tl.umulhi(p0, 0xD2511F53) ^ c3 ^ k1
        c1 = p2 * 0xCD9E8D57
        c3 = p0 * 0xD2511F53
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _lane(lane, position, view, seed_low, seed_high, purpose: tl.constexpr):
    """The four words of each `lane` of a sample's stream."""
    zero = lane.to(tl.uint32) * 0
    return _philox(
        zero + position.to(tl.uint32),
        zero + (position >> 32).to(tl.uint32),
        zero + view.to(tl.uint32),
        lane.to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32) ^ purpose,
    )


@triton.jit
def _words(first, position, view, seed_low, seed_high, purpose: tl.constexpr, BLOCK: tl.constexpr):
    """Words of items first .. first + BLOCK (a multiple of 4 each), drawn four at a time."""
    a, b, c, d = _lane(first // 4 + tl.arange(0, BLOCK // 4), position, view, seed_low, seed_high, purpose)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _threshold(
    words, items, count, position, view, seed_low, seed_high, purpose: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    """The count-th smallest of the stream's first `items` words, and how many words equal to it are among the smallest.

    `words` are the first BLOCK of them.
    """
    item = tl.arange(0, BLOCK)
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    equals = count
    for _ in range(32):
        candidate = threshold | bit
        below = tl.sum(((words < candidate) & (item < items)).to(tl.int32))
        for chunk in range(1, CHUNKS):
            more = _words(chunk * BLOCK, position, view, seed_low, seed_high, purpose, BLOCK)
            below += tl.sum(((more < candidate) & (chunk * BLOCK + item < items)).to(tl.int32))
        equals = tl.where(below < count, count - below, equals)
        threshold = tl.where(below < count, candidate, threshold)
        bit = bit >> 1
    return threshold, equals


@triton.jit
def _keep(words, inside, threshold, equals):
    """True for words below the threshold and for the first `equals` that are equal to it; how many are equal."""
    equal = ((words == threshold) & inside).to(tl.int32)
    return ((words < threshold) & inside) | ((equal > 0) & (tl.cumsum(equal, 0) <= equals)), tl.sum(equal)


@triton.jit
def _smallest(items, count, position, view, seed_low, seed_high, purpose: tl.constexpr, BLOCK: tl.constexpr):
    """Bool [BLOCK]: the `count` smallest of `items` <= BLOCK words."""
    words = _words(0, position, view, seed_low, seed_high, purpose, BLOCK)
    threshold, equals = _threshold(words, items, count, position, view, seed_low, seed_high, purpose, BLOCK, 1)
    return _keep(words, tl.arange(0, BLOCK) < items, threshold, equals)[0]


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _dual_mask_kernel(
    position_ptr, view_ptr, visible_ptr, decode_ptr, loss_ptr, slot_ptr, seed_low, seed_high,
    frames, height, width, visible_sites, kept, decoded_tokens, loss_tokens,
    KIND: tl.constexpr, SITES: tl.constexpr, ITEMS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + sample)
    view = tl.load(view_ptr + sample)
    sites = height * width
    site = tl.arange(0, SITES)
    on_grid = site < sites
    visible = _smallest(sites, visible_sites, position, view, seed_low, seed_high, _ENCODER, SITES)
    visible_rank = tl.cumsum(visible.to(tl.int32), 0) - 1

    decoded = on_grid & (visible == 0)
    if KIND == TUBE:
        decoded = _smallest(sites, kept, position, view, seed_low, seed_high, _DECODER, SITES)
    if KIND == FRAME:
        kept_frames = _smallest(frames, kept, position, view, seed_low, seed_high, _DECODER, ITEMS)
    if KIND == RUNNING_CELL:
        phase = _lane(tl.full((), 0, tl.int32), position, view, seed_low, seed_high, _DECODER)[0].to(tl.int32) & 3
        place = 2 * (site // width % 2) + site % width % 2 + phase + 1
    if KIND == RANDOM:
        tokens = frames * sites
        words = _words(0, position, view, seed_low, seed_high, _DECODER, ITEMS)
        threshold, equals = _threshold(words, tokens, kept, position, view, seed_low, seed_high, _DECODER, ITEMS, CHUNKS)

    visible_ptr += sample * frames * visible_sites
    decode_ptr += sample * decoded_tokens
    loss_ptr += sample * loss_tokens
    slot_ptr += sample * loss_tokens
    decode_count = 0
    loss_count = 0
    for t in range(frames):
        if KIND == FRAME:
            decoded = on_grid & (tl.sum((kept_frames & (tl.arange(0, ITEMS) == t)).to(tl.int32)) > 0)
        if KIND == RUNNING_CELL:
            decoded = on_grid & ((place + t) % 4 >= kept)
        if KIND == RANDOM:
            item = t * sites + site
            a, b, c, d = _lane(item // 4, position, view, seed_low, seed_high, _DECODER)
            word = tl.where(item % 4 < 2, tl.where(item % 4 == 0, a, b), tl.where(item % 4 == 2, c, d))
            decoded, equal = _keep(word, on_grid, threshold, equals)
            equals -= equal
        token = t * sites + site
        tl.store(visible_ptr + t * visible_sites + visible_rank, token, mask=visible)
        slot = decode_count + tl.cumsum(decoded.to(tl.int32), 0) - 1
        tl.store(decode_ptr + slot, token, mask=decoded)
        in_loss = decoded & (visible == 0)
        rank = loss_count + tl.cumsum(in_loss.to(tl.int32), 0) - 1
        tl.store(loss_ptr + rank, token, mask=in_loss)
        tl.store(slot_ptr + rank, slot, mask=in_loss)
        decode_count += tl.sum(decoded.to(tl.int32))
        loss_count += tl.sum(in_loss.to(tl.int32))
    for start in range(0, loss_tokens, SITES):
        rank = start + site
        padding = (rank >= loss_count) & (rank < loss_tokens)
        tl.store(loss_ptr + rank, rank * 0 - 1, mask=padding)
        tl.store(slot_ptr + rank, rank * 0, mask=padding)


def _signed(word: int) -> int:
    # Always an int32 to Triton: a larger value would be another type, and another compilation.
    return word - 2**32 if word >= 2**31 else word


def dual_mask(
    position: Tensor, view: Tensor, grid: tuple[int, ...], seed: int, encoder_ratio: float, decoder: str, decoder_ratio: float
) -> DualMask:
    """Launch for `masks.dual_mask`: position and view are read from device memory, so a captured graph draws anew."""
    plan = _plan(grid, encoder_ratio, decoder, decoder_ratio)
    position = operand(position, (torch.int64,), "dual_mask: position [B]")
    view = operand(view, (torch.int64,), "dual_mask: view [B]")
    out = _outputs(position, grid, encoder_ratio, decoder, decoder_ratio)
    frames, height, width = grid
    sites = max(8, triton.next_power_of_2(height * width))
    items = {"frame": frames, "random": frames * height * width}.get(decoder, 1)
    block = min(MOST_WORDS, max(8, triton.next_power_of_2(items)))
    launch(
        _dual_mask_kernel, position.shape[0], position, view, *out, _signed(seed & 0xFFFFFFFF), _signed(seed >> 32),
        frames, height, width, *plan, KIND=KINDS[decoder], SITES=sites, ITEMS=block, CHUNKS=-(-items // block),
        warps=4 if max(sites, block) <= 2048 else 8,
    )  # fmt: skip
    return out


def aot_configurations() -> list[Configuration]:
    """The launches of the published models: all five decoder masks of patch 14, the default one of patch 16, a large grid."""
    found = []
    position = torch.zeros(1, dtype=torch.int64)
    wanted = [((8, 14, 14), "running_cell"), *(((8, 16, 16), kind) for kind in KINDS)]
    for grid, decoder in [*wanted, ((8, 24, 24), "running_cell"), ((8, 24, 24), "random")]:
        name = f"dual_mask {decoder} {'x'.join(map(str, grid))}"
        found += configurations(name, dual_mask, position, position, grid, 1, 0.9, decoder, 0.5)
    return found
