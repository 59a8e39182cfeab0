"""What the CUDA kernels do otherwise than C++, or what only they can get wrong: the emulated kernels here, and a GPU's own.

All other tests of these ops run the emulated kernels as the backend "emulated".
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_emulator import build, emulated
from tests.ops.test_reconstruction import GEOMETRIES, definition, make, naive
from tests.support import assert_within_budget, random_index
from vmae2_fast import backend
from vmae2_fast.ops import _native, dual_mask, gather_patches, mask_sizes, reconstruction_loss, scatter_patches
from vmae2_fast.ops.masks import DECODER_KINDS, ENCODER, philox_words

emulator = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels() -> Any:
    """The emulated kernels chosen as the native backend would be on a GPU."""
    with backend.use_backend("emulated"):
        yield


def reference(function: Any, *arguments: Any, **options: Any) -> Any:
    with backend.use_backend("reference"):
        return function(*arguments, **options)


@emulator
def test_the_emulator_sees_mistakes(tmp_path: Path) -> None:
    program, cxx = tmp_path / "selftest", build.compiler()
    assert cxx is not None
    sources = [str(build.HERE / name) for name in ("selftest.cpp", "emulator.cpp")]
    subprocess.run([*cxx, "-std=c++17", "-O1", f"-I{build.HERE}", *sources, "-o", str(program)], check=True)
    said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert said == [
        "some_threads_at_the_barrier: deadlock in block 0: thread 0 waits at __syncthreads; thread 40 has ended;",
        "lanes_at_different_functions: deadlock in block 0: "
        + " ".join(f"thread {i} waits at {('a shuffle', '__syncwarp')[i % 2]};" for i in range(64)),
        "part_of_a_warp: the emulator knows warp functions of all 32 lanes only",
        "with a barrier: ok",
        "warp_functions: ok",
        "shared memory: ok",
        "shared memory: 49153 bytes of shared memory a block, where 49152 are what a kernel gets without asking",
        "racing 64, waiting 0, wrong 0",  # half of the neighbours in either order
    ]


@emulator
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("decoder", DECODER_KINDS)
def test_masks_of_odd_large_and_tiny_grids(decoder: str) -> None:
    grids = [(1, 2, 2), (3, 34, 40), (2, 2, 514)]
    if decoder != "running_cell":
        grids += [(1, 1, 1), (3, 5, 7), (2, 47, 61), (300, 1, 3)]
    position, view = torch.tensor([3, 2**40 + 1, -1]), torch.tensor([0, 5, 2**32 - 1])
    for grid in grids:
        options = {"grid": grid, "seed": 2**40 + 7, "decoder": decoder, "encoder_ratio": 0.6}
        mask, expected = dual_mask(position, view, **options), reference(dual_mask, position, view, **options)
        assert all(torch.equal(a, b) for a, b in zip(mask, expected, strict=True)), grid
    assert [m.shape[0] for m in dual_mask(position[:0], view[:0], **options)] == [0] * 4


def test_equal_words_at_the_last_kept_item() -> None:
    """Two items of one word, of which the mask keeps the first: the item's number decides on every backend."""
    grid, position, view = (1, 300, 500), torch.tensor([1]), torch.tensor([0])
    words, order = philox_words(position, view, seed=4, purpose=ENCODER, count=150_000)[0].sort(stable=True)
    (ties,) = torch.where(words[1:] == words[:-1])
    kept = int(ties[0]) + 1  # up to the first of two equal words
    options = {"grid": grid, "seed": 4, "decoder": "none", "encoder_ratio": 1 - kept / 150_000}
    assert mask_sizes(grid, encoder_ratio=options["encoder_ratio"], decoder="none")[0] == kept
    expected = order[:kept].sort().values.int()
    assert expected[torch.searchsorted(expected, order[kept - 1].int())] == order[kept - 1]
    assert int(order[kept]) > int(order[kept - 1])
    for name in backend.available("dual_mask", "cpu"):
        if name != "triton":  # minutes in the interpreter
            with backend.use_backend(name):
                assert torch.equal(dual_mask(position, view, **options).visible_index[0], expected), name


@emulator
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("patch", [14, 16, 6])
@pytest.mark.parametrize("clip_dtype", [torch.uint8, torch.bfloat16], ids=str)
def test_gather_shows_ids_outside_the_grid(clip_dtype: torch.dtype, patch: int) -> None:
    shape = (2, 4, 2 * patch, 3 * patch, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8)
    if clip_dtype != torch.uint8:
        clip = clip.permute(0, 4, 1, 2, 3).to(clip_dtype)
    index = torch.tensor([[12, 3, -2, -1, 11], [2**31 - 1, -1, 0, -(2**31), 5]], dtype=torch.int32)
    inside = (index >= 0) & (index < 12)
    for dtype in DTYPES:
        rows = gather_patches(clip, index, patch=patch, dtype=dtype)
        expected = reference(gather_patches, clip, torch.where(inside, index, -1), patch=patch, dtype=dtype)
        assert torch.equal(rows[inside], expected[inside])
        assert not rows[index == -1].any()
        assert rows[~inside & (index != -1)].isnan().all()


@emulator
@pytest.mark.usefixtures("kernels")
def test_gather_takes_a_clip_at_any_address() -> None:
    """Models' tokens are read in wide words; a clip that starts between them goes another way, with the same rows."""
    for patch in (14, 16):
        clip = torch.randint(0, 256, (2, 4, 2 * patch, 3 * patch, 3), dtype=torch.uint8)
        index = random_index(2, 7, 12)
        expected = reference(gather_patches, clip, index, patch=patch)
        for shift in (1, 2, 4, 8):
            moved = clip.new_empty(clip.numel() + shift)[shift:].view(clip.shape).copy_(clip)
            assert torch.equal(gather_patches(moved, index, patch=patch), expected)


@emulator
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("order", ["conv", "pixel"])
def test_scatter_leaves_out_ids_outside_and_keeps_the_last_row(order: str) -> None:
    index = torch.tensor([[3, 8, 3, -5, 3], [-1, 0, 2**31 - 1, 0, 7]], dtype=torch.int32)
    rows = torch.randn(2, 5, 96)
    winners = torch.tensor([[-1, -1, -1, -1, 3], [-1, -1, -1, 0, 7]], dtype=torch.int32)
    options = {"grid": (2, 2, 2), "patch": 4, "order": order}
    assert torch.equal(scatter_patches(rows, index, **options), reference(scatter_patches, rows, winners, **options))


@emulator
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("geometry", [((1, 2, 3), 14, 2, 3), ((2, 3, 2), 7, 2, 3)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_loss_shows_ids_outside_the_grid(geometry: tuple, normalize: bool) -> None:
    pred, clip, index, options = make(geometry, torch.uint8, torch.float32)
    wrong = index.clone()
    wrong[1, 0], wrong[2, 1] = 2**31 - 1, -7
    leaf = pred.requires_grad_()
    loss, count = reconstruction_loss(leaf, clip, wrong, normalize=normalize, reduction="sum", **options)
    assert loss.isnan()
    assert int(count) == int((wrong != -1).sum())
    loss.backward()
    assert leaf.grad is not None
    outside = (wrong < -1) | (wrong > 11)
    assert leaf.grad[outside].isnan().all()
    assert leaf.grad[~outside].isfinite().all()


@emulator
@pytest.mark.usefixtures("kernels")
def test_loss_of_many_blocks_repeats_bit_for_bit() -> None:
    """Nineteen tokens: blocks of eight that are not full; the result does not depend on the order of the blocks' threads."""
    pred, clip, _, options = make(((2, 2, 5), 16, 2, 3), torch.uint8, torch.float32)
    index = torch.arange(19, dtype=torch.int32).expand(3, -1).contiguous()
    pred = torch.randn(3, 19, 1536)
    exact = pred.double().requires_grad_()
    truth = definition(exact, clip, index, options)
    losses = [reconstruction_loss(pred, clip, index, **options) for _ in range(2)]
    assert torch.equal(*losses)
    assert_within_budget(losses[0], reference(naive, pred, clip, index, options, True), truth)


@emulator
@pytest.mark.usefixtures("kernels")
def test_more_channels_than_the_kernels_take() -> None:
    clip, index = torch.zeros(1, 17, 2, 4, 4), torch.zeros(1, 1, dtype=torch.int32)
    identity = {"mean": [0.0] * 17, "std": [1.0] * 17}
    with pytest.raises(ValueError, match=r"gather_patches: CUDA kernels take at most 16 channels, got 17; use_backend"):
        gather_patches(clip, index, patch=4, **identity)
    with pytest.raises(ValueError, match="scatter_patches: CUDA kernels take at most 16 channels"):
        scatter_patches(torch.zeros(1, 1, 544), index, grid=(1, 1, 1), patch=4, channels=17)
    with pytest.raises(ValueError, match="reconstruction_loss: CUDA kernels take at most 16 channels"):
        reconstruction_loss(torch.zeros(1, 1, 544), clip, index, patch=4, **identity)


@emulator
def test_a_launch_that_fails_names_the_op_and_the_reason() -> None:
    with pytest.raises(RuntimeError, match="dual_mask: invalid device ordinal"):
        emulated.module().dual_mask_cuda(0, 0, 1, 1, 2, 2, 0, "none", 1, 0, 3, 3, 0, 0, 0, 0, (1, 0))


def test_native_runs_cuda_kernels_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Extension:
        def toy_cuda(self, *arguments: Any) -> None:
            calls.append(arguments)

        def toy(self, *arguments: Any) -> None:
            calls.append(arguments)

    monkeypatch.setattr(_native, "extension", Extension)
    monkeypatch.setattr(_native, "queue", lambda device: (device.index, 77))
    _native.run("toy", torch.device("cuda", 3), 1, 2)
    _native.run("toy", torch.device("cpu"), 1, 2)
    assert calls == [(1, 2, (3, 77)), (1, 2, torch.get_num_threads())]


# ---- On a GPU.


def _native_or_skip() -> None:
    if reason := backend.why_not_native(torch.device("cuda")):
        pytest.skip(reason)


def _clip(patch: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, (2, 4, 2 * patch, 3 * patch, 3), dtype=dtype)
    return torch.randn(2, 3, 4, 2 * patch, 3 * patch).to(dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("decoder", DECODER_KINDS)
def test_cuda_masks_have_the_reference_bits(decoder: str) -> None:
    _native_or_skip()
    position, view = torch.tensor([0, 1, 2**32 + 5, 2**62 + 3]), torch.tensor([0, 1, 2, 2**31])
    for grid in [(8, 14, 14), (8, 16, 16), (2, 40, 60), (1, 2, 2)]:
        options = {"grid": grid, "seed": 2**63 - 1, "decoder": decoder, "encoder_ratio": 0.75}
        with backend.use_backend("native"):
            mask = dual_mask(position.cuda(), view.cuda(), **options)
        expected = reference(dual_mask, position, view, **options)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(mask, expected, strict=True)), grid


@pytest.mark.cuda
@pytest.mark.parametrize("patch", [14, 16, 6])
@pytest.mark.parametrize("clip_dtype", [torch.uint8, *DTYPES], ids=str)
def test_cuda_patches_have_the_reference_bits(clip_dtype: torch.dtype, patch: int) -> None:
    _native_or_skip()
    clip, index = _clip(patch, clip_dtype), random_index(2, 7, 12, padding=2)
    for dtype in DTYPES:
        for order in ("conv", "pixel"):
            with backend.use_backend("native"):
                rows = gather_patches(clip.cuda(), index.cuda(), patch=patch, dtype=dtype, order=order)
                video = scatter_patches(rows, index.cuda(), grid=(2, 2, 3), patch=patch, order=order)
            expected = reference(gather_patches, clip, index, patch=patch, dtype=dtype, order=order)
            assert torch.equal(rows.cpu(), expected)
            whole = reference(scatter_patches, expected, index, grid=(2, 2, 3), patch=patch, order=order)
            assert torch.equal(video.cpu(), whole)


@pytest.mark.cuda
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pred_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip_dtype", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_cuda_loss_is_within_the_references_budget(
    geometry: tuple, clip_dtype: torch.dtype, pred_dtype: torch.dtype, normalize: bool
) -> None:
    _native_or_skip()
    pred, clip, index, options = make(geometry, clip_dtype, pred_dtype)
    exact = pred.double().requires_grad_()
    truth = definition(exact, clip, index, options, normalize=normalize)
    truth.backward()
    plain = pred.clone().requires_grad_()
    plain_loss = reference(naive, plain, clip, index, options, normalize)
    plain_loss.backward()
    ours = pred.cuda().requires_grad_()
    with backend.use_backend("native"):
        loss = reconstruction_loss(ours, clip.cuda(), index.cuda(), normalize=normalize, **options)
        again = reconstruction_loss(ours, clip.cuda(), index.cuda(), normalize=normalize, **options)
    loss.backward()
    assert torch.equal(loss, again)
    assert ours.grad is not None
    assert_within_budget(loss.cpu(), plain_loss, truth, "loss")
    assert_within_budget(ours.grad.cpu(), plain.grad, exact.grad, "gradient")


@pytest.mark.cuda
def test_cuda_ids_outside_the_grid_show_and_harm_nothing() -> None:
    _native_or_skip()
    clip = _clip(16).cuda()
    index = torch.tensor([[12, 3, -2, -1, 11]] * 2, dtype=torch.int32, device="cuda")
    with backend.use_backend("native"):
        rows = gather_patches(clip, index, patch=16)
        loss = reconstruction_loss(torch.zeros_like(rows), clip, index, patch=16)
        scatter_patches(rows, index, grid=(2, 2, 3), patch=16)
    torch.cuda.synchronize()
    assert rows[:, (0, 2)].isnan().all()
    assert rows[:, (1, 4)].isfinite().all()
    assert loss.isnan()


def _from_clip_to_loss(position: Tensor, view: Tensor, clip: Tensor, pred: Tensor) -> tuple[Tensor, ...]:
    mask = dual_mask(position, view, grid=(4, 4, 4), seed=3, encoder_ratio=0.75)
    rows = gather_patches(clip, mask.visible_index, patch=16, dtype=torch.bfloat16)
    leaf = pred.detach().requires_grad_()
    loss = reconstruction_loss(leaf, clip, mask.loss_index, patch=16)
    return *mask, rows, loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _step_inputs(device: str) -> tuple[Tensor, ...]:
    loss_tokens = mask_sizes((4, 4, 4), encoder_ratio=0.75)[2]
    clip = torch.randint(0, 256, (3, 8, 64, 64, 3), dtype=torch.uint8)
    pred = torch.randn(3, loss_tokens, 1536).bfloat16()
    return tuple(t.to(device) for t in (torch.arange(3), torch.zeros(3, dtype=torch.int64), clip, pred))


@pytest.mark.cuda
def test_cuda_step_waits_for_nothing_on_any_stream() -> None:
    _native_or_skip()
    device = f"cuda:{torch.cuda.device_count() - 1}"  # the last, where there are several: not the current one
    inputs = _step_inputs(device)
    with backend.use_backend("native"):
        expected = _from_clip_to_loss(*inputs)
        torch.cuda.synchronize(device)
        current = torch.cuda.current_device()
        torch.cuda.set_sync_debug_mode("error")
        try:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                results = _from_clip_to_loss(*inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.current_device() == current
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.cuda
def test_cuda_graph_draws_fresh_masks_at_every_replay() -> None:
    _native_or_skip()
    position, view, clip, pred = _step_inputs("cuda")
    with backend.use_backend("native"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _from_clip_to_loss(position, view, clip, pred)  # what is made once is made before the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _from_clip_to_loss(position, view, clip, pred)
        seen = []
        for start in (100, 200):
            position.copy_(torch.arange(start, start + 3))
            graph.replay()
            results = [t.clone() for t in captured]
            fresh = _from_clip_to_loss(position, view, clip, pred)
            assert all(torch.equal(a, b) for a, b in zip(results, fresh, strict=True))
            seen.append(results[0])
    assert not torch.equal(*seen)
