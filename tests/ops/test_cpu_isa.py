"""The C++ kernels on every instruction set of this processor and any number of threads: the same bits, in their own memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import random_index
from vmae2_fast import backend
from vmae2_fast.ops import dual_mask, gather_patches, reconstruction_loss, scatter_patches
from vmae2_fast.ops.masks import DECODER_KINDS
from vmae2_fast.ops.norm import residual_norm

_C: Any = backend.native()
ISAS = [] if _C is None else _C.supported_cpu_isas()
pytestmark = pytest.mark.skipif(_C is None, reason="no native extension")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# grid, patch, tubelet, channels
GEOMETRIES = [
    ((2, 3, 2), 14, 2, 3), ((1, 2, 3), 16, 2, 3), ((2, 2, 2), 7, 1, 3), ((2, 2, 1), 5, 4, 3), ((1, 2, 2), 20, 1, 3),
    ((1, 1, 2), 33, 1, 1), ((2, 2, 2), 14, 1, 1), ((2, 1, 2), 6, 2, 4),
    ((1, 2, 1), 8, 1, 16), ((2, 2, 2), 3, 2, 5), ((1, 1, 1), 1, 2, 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    with backend.use_backend("native"):
        yield
    _C.set_cpu_isa(ISAS[-1])
    torch.set_num_threads(threads)


def make_clip(geometry: tuple, dtype: torch.dtype, batch: int = 2) -> Tensor:
    (t, h, w), patch, tubelet, channels = geometry
    if dtype == torch.uint8:
        return torch.randint(0, 256, (batch, t * tubelet, h * patch, w * patch, channels), dtype=dtype)
    clip = torch.randn(batch, channels, t * tubelet, h * patch, w * patch)
    clip[0, 0, 0, 0, 0], clip[0, 0, -1, -1, -1] = float("inf"), float("nan")
    return clip.to(dtype)


def results(geometry: tuple, clip: Tensor, preds: list[Tensor], index: Tensor) -> list[Tensor]:
    """Everything the kernels compute from a clip: rows in both orders, clips of them, losses and gradients."""
    grid, patch, tubelet, channels = geometry
    cube = {"patch": patch, "tubelet": tubelet}
    colour = {"mean": [0.4 + 0.01 * c for c in range(channels)], "std": [0.2 + 0.01 * c for c in range(channels)]}
    out = []
    for order in ("conv", "pixel"):
        for dtype in FLOATS:
            rows = gather_patches(clip, index, **cube, dtype=dtype, order=order, **colour)
            out += [rows, scatter_patches(rows, index, grid=grid, channels=channels, order=order, **cube)]
    for pred in preds:
        for normalize in (True, False):
            leaf = pred.clone().requires_grad_()
            loss = reconstruction_loss(leaf, clip, index, normalize=normalize, **cube, **colour)
            out += [loss.detach(), *torch.autograd.grad(loss * 3, leaf)]
    return out


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("clip_dtype", [torch.uint8, *FLOATS], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_instruction_set_gives_the_same_bits(geometry: tuple, clip_dtype: torch.dtype) -> None:
    grid, patch, tubelet, channels = geometry
    clip, tokens = make_clip(geometry, clip_dtype), grid[0] * grid[1] * grid[2]
    index = random_index(2, max(1, tokens // 2), tokens, padding=1)
    preds = [torch.randn(*index.shape, channels * tubelet * patch * patch).to(dtype) for dtype in FLOATS]
    for pred in preds:
        pred[:, -1] = float("nan")  # padding
    expected = None
    for isa in ISAS:
        _C.set_cpu_isa(isa)
        got = results(geometry, clip, preds, index)
        expected = expected or got
        assert_same_bits(got, expected)


def test_float_conversions_agree() -> None:
    """Every float16 and bfloat16 value, and float32 values around every rounding boundary, through the copies."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    offsets = (0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0xF000)
    wide = torch.cat([(every.int() << 16) + offset for offset in offsets])
    for source in (every.view(torch.float16), every.view(torch.bfloat16), wide.view(torch.float32)):
        clip, index = source.view(1, 1, 1, 16, -1), torch.arange(source.numel() // 256, dtype=torch.int32)[None]
        for dtype in FLOATS:
            rows = []
            for isa in ISAS:
                _C.set_cpu_isa(isa)
                rows.append(gather_patches(clip, index, patch=16, tubelet=1, dtype=dtype))
                torch.testing.assert_close(rows[-1], rows[0], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(
                rows[0].view(-1, 16, 16).transpose(0, 1).flatten(), source.to(dtype), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("decoder", DECODER_KINDS)
def test_masks_do_not_depend_on_instructions_or_threads(decoder: str) -> None:
    position = torch.arange(600) * 2**33 + 5
    for grid in ((8, 14, 14), (5, 6, 2)):
        arguments = {"grid": grid, "seed": 2**40 + 3, "decoder": decoder}
        with backend.use_backend("reference"):
            expected = dual_mask(position[:20], position[:20] % 3, **arguments)
        whole = None
        for isa in ISAS:
            _C.set_cpu_isa(isa)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                got = dual_mask(position, position % 3, **arguments)
                whole = whole or got
                assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
                assert all(torch.equal(a[:20], b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_patches_and_loss_do_not_depend_on_threads(isa: str) -> None:
    geometry = ((2, 8, 8), 14, 1, 3)
    # So many elements that the kernels do start threads (csrc/cpu/parallel.h).
    clip, index = make_clip(geometry, torch.uint8, batch=32), random_index(32, 120, 128, padding=2)
    pred = [torch.randn(32, 122, 588)]
    _C.set_cpu_isa(isa)
    expected = None
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        for _ in range(2):
            got = results(geometry, clip, pred, index)
            expected = expected or got
            assert_same_bits(got, expected)


def test_moments_of_large_patches_are_exact() -> None:
    """More bytes a lane than float32 adds exactly; white patches, where a lost unit would show as variance."""
    clip = torch.full((1, 4, 96, 96, 3), 255, dtype=torch.uint8)
    index, pred = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 4 * 96 * 96 * 3)
    for isa in ISAS:
        _C.set_cpu_isa(isa)
        assert float(reconstruction_loss(pred, clip, index, patch=96, tubelet=4)) == 0.0


def at_the_end(tensor: Tensor, keep: list[Any]) -> Tensor:
    """A copy that ends where its last page does, with a page behind it that must not be touched."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    keep.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + whole), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_nothing_is_read_behind_a_buffer(geometry: tuple) -> None:
    grid, patch, tubelet, channels = geometry
    tokens, keep = grid[0] * grid[1] * grid[2], []
    index = at_the_end(torch.arange(tokens, dtype=torch.int32).repeat(2, 1), keep)
    for clip_dtype in (torch.uint8, torch.float16):
        clip = make_clip(geometry, clip_dtype)
        pred = torch.randn(2, tokens, channels * tubelet * patch * patch).to(torch.bfloat16)
        for isa in ISAS:
            _C.set_cpu_isa(isa)
            guarded = results(geometry, at_the_end(clip, keep), [at_the_end(pred, keep)], index)
            assert_same_bits(guarded, results(geometry, clip, [pred], index))


def norm_results(tensors: list[Tensor], keep: list[Any] | None = None) -> list[Tensor]:
    """Stream and norm of (x, branch, gamma, drop, weight, bias), with and without the branch, and all gradients, for
    gradients `at_the_end` if there is a list to keep them in."""
    x, branch, gamma, drop, weight, bias = (t.requires_grad_(i != 3) for i, t in enumerate(tensors))
    plain = residual_norm(x, None, None, None, weight, bias, 1e-6)
    full = residual_norm(x, branch, gamma, drop, weight, bias, 1e-6)
    out = [plain[1], *full]
    upstream = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype) for t in out]
    if keep is not None:
        upstream = [at_the_end(t, keep) for t in upstream]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, [x, branch, gamma, weight, bias], upstream)]


def norm_tensors(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    b, _, c = shape
    sizes = (shape, shape, (c,), (b,), (c,), (c,))
    return [torch.randn(size).to(dtype if size == shape else torch.float32) for size in sizes]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
# The first has so many elements that rows, spans and the sum over spans all start threads (csrc/cpu/parallel.h).
@pytest.mark.parametrize("shape", [(2, 600, 1100), (2, 40, 100), (1, 3, 33), (2, 2, 7), (1, 1, 1)], ids=str)
def test_norm_does_not_depend_on_instructions_or_threads(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors, expected = norm_tensors(shape, dtype), None
    for isa in ISAS:
        _C.set_cpu_isa(isa)
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            got = norm_results(tensors)
            expected = expected or got
            assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norm_reads_nothing_behind_a_buffer(dtype: torch.dtype) -> None:
    for columns in (7, 16, 33, 48):
        tensors, keep = norm_tensors((2, 3, columns), dtype), []
        for isa in ISAS:
            _C.set_cpu_isa(isa)
            guarded = norm_results([at_the_end(t.detach(), keep) for t in tensors], keep)
            assert_same_bits(guarded, norm_results(tensors))


def test_an_instruction_set_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set_cpu_isa: sse9 is not supported here; supported: portable"):
        _C.set_cpu_isa("sse9")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forked_child_does_not_wait_for_threads_it_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = torch.randint(0, 256, (2, 16, 112, 112, 3), dtype=torch.uint8)
    index = torch.arange(8 * 49, dtype=torch.int32).expand(2, -1)
    torch.set_num_threads(2)
    want = gather_patches(clip, index, patch=16)  # large enough for two threads, which exist from here on
    # Filling new memory, as the tests have torch do, would hang in torch's own threads.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, bytes([torch.equal(gather_patches(clip, index, patch=16)[:1, :1], want[:1, :1])]))
        os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            assert select.select([pipe], [], [], 60)[0], "the child hangs"
            assert pipe.read() == b"\x01"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
