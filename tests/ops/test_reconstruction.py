"""reconstruction_loss against the float64 formula: loss, gradient, counts, and what it must not depend on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import assert_within_budget, awkward, backends, cases, compiles, expanded, opcheck, random_index
from vmae2_fast import backend
from vmae2_fast.ops.patches import IMAGENET_MEAN, IMAGENET_STD, scatter_patches
from vmae2_fast.ops.reconstruction import patch_statistics, reconstruction_loss, reconstruction_loss_reference

BACKENDS = backends("reconstruction_loss")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# grid, patch, tubelet, channels
GEOMETRIES = [((2, 3, 2), 7, 2, 3), ((1, 1, 1), 16, 2, 3), ((3, 2, 2), 2, 1, 1), ((2, 2, 3), 5, 3, 4), ((1, 2, 3), 14, 2, 3)]
SMALL = ((1, 2, 1), 5, 2, 3)
KINDS = [(g, clip, pred) for g in GEOMETRIES for clip in (torch.uint8, *DTYPES) for pred in DTYPES]
INTERPRETED = [(SMALL, torch.uint8, pred) for pred in DTYPES] + [(GEOMETRIES[1], kind, kind) for kind in DTYPES]


def make(
    geometry: tuple, clip_dtype: torch.dtype, pred_dtype: torch.dtype, *, padding: int = 1
) -> tuple[Tensor, Tensor, Tensor, dict]:
    """(pred, clip, loss_index, options) of a batch of 3."""
    grid, patch, tubelet, channels = geometry
    t, h, w = grid[0] * tubelet, grid[1] * patch, grid[2] * patch
    clip = torch.randint(0, 256, (3, t, h, w, channels), dtype=torch.uint8)
    options = {"patch": patch, "tubelet": tubelet}
    if clip_dtype != torch.uint8:
        clip = torch.randn(3, channels, t, h, w).to(clip_dtype)
        options |= {"mean": [0.4 + 0.02 * c for c in range(channels)], "std": [0.2 + 0.02 * c for c in range(channels)]}
    tokens = grid[0] * grid[1] * grid[2]
    index = random_index(3, max(1, tokens // 2), tokens, padding=padding)
    return torch.randn(*index.shape, channels * tubelet * patch * patch).to(pred_dtype), clip, index, options


def definition(pred: Tensor, clip: Tensor, index: Tensor, options: dict, *, normalize: bool = True) -> Tensor:
    """The loss by its formula in float64, token by token."""
    patch, tubelet = options["patch"], options["tubelet"]
    if clip.dtype == torch.uint8:
        video = clip.permute(0, 4, 1, 2, 3).double() / 255
    else:
        mean, std = (torch.tensor(options[k]).double().view(-1, 1, 1, 1) for k in ("mean", "std"))
        video = clip.double() * std + mean
    height, width = video.shape[3] // patch, video.shape[4] // patch
    losses = []
    for b, ids in enumerate(index.tolist()):
        for k, i in enumerate(ids):
            if i < 0:
                continue
            t, y, x = i // (height * width), i // width % height, i % width
            block = video[b, :, t * tubelet : (t + 1) * tubelet, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            pixels = block.permute(1, 2, 3, 0).flatten(0, 2)
            if normalize:
                pixels = (pixels - pixels.mean(0)) / (pixels.var(0, correction=1).sqrt() + 1e-6)
            losses.append((pred[b, k].double() - pixels.flatten()).square().mean())
    return torch.stack(losses).sum() / len(losses)


def naive(pred: Tensor, clip: Tensor, index: Tensor, options: dict, normalize: bool) -> Tensor:
    """The differentiable plain-torch reference, in the dtypes it is given."""
    channels = clip.shape[-1] if clip.dtype == torch.uint8 else clip.shape[1]
    statistics = [options.get(k, [v] * channels) for k, v in (("mean", 0.0), ("std", 1.0))]
    loss_sum, count = reconstruction_loss_reference(
        pred, clip, index, options["patch"], options["tubelet"], normalize, *statistics
    )
    return loss_sum / count


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(("name", "kind"), cases("reconstruction_loss", KINDS, INTERPRETED), ids=str)
def test_loss_and_gradient(name: str, kind: tuple, normalize: bool) -> None:
    check_loss_and_gradient(name, *make(*kind), normalize)


def check_loss_and_gradient(
    name: str, pred: Tensor, clip: Tensor, index: Tensor, options: dict, normalize: bool, device: str = "cpu"
) -> None:
    results = []
    exact = pred.double().requires_grad_()
    truth = definition(exact, clip, index, options, normalize=normalize)
    (truth * 3.7).backward()
    for run in ("op", "naive"):
        leaf = pred.to(device, copy=True).requires_grad_()
        with backend.use_backend(name):
            if run == "op":
                loss = reconstruction_loss(leaf, clip.to(device), index.to(device), normalize=normalize, **options)
            else:
                loss = naive(leaf, clip.to(device), index.to(device), options, normalize)
            (loss * 3.7).backward()
        results.append((loss.cpu(), leaf.grad.cpu()))
    (loss, grad), (plain, plain_grad) = results
    assert loss.dtype == torch.float32
    assert_within_budget(loss, plain, truth, "loss")
    assert grad.dtype == pred.dtype
    assert_within_budget(grad, plain_grad, exact.grad, "gradient")
    assert not grad[index < 0].any()


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(
    ("frames", "patch", "tubelet", "ids"),
    [
        (16, 14, 2, [0, 5, 15, 255, 256, 2047, -1]),  # begin at all distances from a 16-byte boundary
        (4, 16, 2, [0, 13, 195, 391, -1]),
        (4, 16, 4, [0, 195]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", BACKENDS)
def test_published_clips(name: str, frames: int, patch: int, tubelet: int, ids: list[int], normalize: bool) -> None:
    """A few tokens, for the interpreter, of clips as the published models take them."""
    clip = torch.randint(0, 256, (1, frames, 224, 224, 3), dtype=torch.uint8)
    options = {"patch": patch, "tubelet": tubelet}
    for dtype in (torch.float32, torch.float16):
        pred = torch.randn(1, len(ids), 3 * tubelet * patch * patch).to(dtype)
        check_loss_and_gradient(name, pred, clip, torch.tensor([ids], dtype=torch.int32), options, normalize)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
@pytest.mark.parametrize("clip_dtype", [torch.uint8, torch.float32], ids=str)
def test_triton_takes_a_large_patch_in_tiles(clip_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmae2_fast.ops import _patches_triton, _reconstruction_triton

    monkeypatch.setattr(_patches_triton, "MOST_BYTES", 64)
    monkeypatch.setattr(_reconstruction_triton, "MOST_VALUES", 64)
    pred, clip, index, options = make(SMALL, clip_dtype, torch.float32)
    constants = _reconstruction_triton._inputs(pred, clip, index, 5, 2, [0.0] * 3, [1.0] * 3)[2]
    assert constants["TILES"] == 3
    check_loss_and_gradient("triton", pred, clip, index, options, True)


@pytest.mark.parametrize("name", BACKENDS)
def test_padded_rows_do_not_count(name: str) -> None:
    pred, clip, index, options = make(SMALL, torch.uint8, torch.float32, padding=2)
    dirty = pred.clone()
    dirty[:, -2:] = float("nan")
    with backend.use_backend(name):
        loss = reconstruction_loss(dirty.requires_grad_(), clip, index, **options)
        loss.backward()
        assert torch.equal(loss, reconstruction_loss(pred[:, :-2].contiguous(), clip, index[:, :-2], **options))
        assert torch.isfinite(dirty.grad).all()
        empty = reconstruction_loss(dirty, clip, torch.full_like(index, -1), **options)
    assert float(empty.detach()) == 0.0


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_in_a_loss_token_shows(name: str) -> None:
    pred, clip, index, options = make(SMALL, torch.uint8, torch.float32)
    pred[1, 0, 5] = float("nan")
    with backend.use_backend(name):
        assert torch.isnan(reconstruction_loss(pred, clip, index, **options))


@pytest.mark.parametrize("name", BACKENDS)
def test_denominators_and_sum(name: str) -> None:
    pred, clip, index, options = make(SMALL, torch.uint8, torch.float32, padding=2)
    with backend.use_backend(name):
        mean = reconstruction_loss(pred, clip, index, **options)
        total, count = reconstruction_loss(pred, clip, index, reduction="sum", **options)
        assert int(count) == int((index >= 0).sum()) == 3
        assert torch.equal(mean, total / count)
        paper = reconstruction_loss(pred, clip, index, denominator="paper", decoded=10, **options)
        assert torch.equal(paper, total / 30)
        _, count = reconstruction_loss(pred, clip, index, denominator="paper", decoded=10, reduction="sum", **options)
        assert int(count) == 30


@pytest.mark.parametrize("name", BACKENDS)
def test_constant_patches_are_finite(name: str) -> None:
    """Variance 0: the target is 0, the division by 1e-6 must not blow rounding up."""
    clip = torch.full((1, 2, 4, 4, 3), 77, dtype=torch.uint8)
    pred = torch.zeros(1, 1, 96)
    with backend.use_backend(name):
        loss = reconstruction_loss(pred, clip, torch.zeros(1, 1, dtype=torch.int32), patch=4)
    assert float(loss) == 0.0


@pytest.mark.skipif("native" not in BACKENDS, reason="no native extension")
def test_result_does_not_depend_on_threads() -> None:
    code = """
import sys, torch
from vmae2_fast.ops.reconstruction import reconstruction_loss
torch.manual_seed(0)
clip = torch.randint(0, 256, (4, 16, 64, 64, 3), dtype=torch.uint8)
pred = torch.randn(4, 100, 1536)
index = torch.arange(100, dtype=torch.int32).expand(4, -1)
for threads in map(int, sys.argv[1:]):
    torch.set_num_threads(threads)
    leaf = pred.clone().requires_grad_()
    loss = reconstruction_loss(leaf, clip, index, patch=16)
    loss.backward()
    print(loss.item().hex(), leaf.grad.double().sum().item().hex())
"""
    printed = subprocess.run(
        [sys.executable, "-c", code, "1", "2", "3", "7"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(printed) == 4
    assert len(set(printed)) == 1


@pytest.mark.parametrize("name", BACKENDS)
def test_memory_layouts(name: str) -> None:
    for clip_dtype in (torch.uint8, torch.float32):
        pred, clip, index, options = make(SMALL, clip_dtype, torch.float32)
        with backend.use_backend(name):
            expected = reconstruction_loss(pred, clip, index, **options)
            for layout, other in awkward(pred):
                assert torch.equal(reconstruction_loss(other, clip, index, **options), expected), layout
            for layout, other in awkward(clip):
                assert torch.equal(reconstruction_loss(pred, other, index, **options), expected), layout
            assert torch.equal(reconstruction_loss(pred, clip, index.long(), **options), expected)
            leaf, copy = expanded(pred).requires_grad_(), expanded(pred).contiguous().requires_grad_()
            losses = [reconstruction_loss(p, expanded(clip), index, **options) for p in (leaf, copy)]
            grads = [torch.autograd.grad(loss, p)[0] for loss, p in zip(losses, (leaf, copy), strict=True)]
            assert torch.equal(*losses)
            assert torch.equal(*grads)


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_changes_nothing(name: str) -> None:
    for pred_dtype in (torch.float32, torch.bfloat16):
        pred, clip, index, options = make(SMALL, torch.uint8, pred_dtype)
        results = []
        for enabled in (False, True):
            leaf = pred.clone().requires_grad_()
            with backend.use_backend(name), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = reconstruction_loss(leaf, clip, index, **options)
            assert loss.dtype == torch.float32
            loss.backward()
            results.append((loss, leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_gradcheck() -> None:
    pred, clip, index, options = make(GEOMETRIES[2], torch.uint8, torch.float64)
    assert torch.autograd.gradcheck(lambda p: reconstruction_loss(p, clip, index, **options), pred.requires_grad_())


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name: str) -> None:
    for clip_dtype in (torch.uint8, torch.float32):
        pred, clip, index, options = make(((1, 2, 1), 2, 1, 1), clip_dtype, torch.float32)
        statistics = options.get("mean", [0.0]), options.get("std", [1.0])
        with backend.use_backend(name):
            for divisor in (0, 7):
                shape = options["patch"], options["tubelet"]
                arguments = (pred.requires_grad_(), clip, index, *shape, True, divisor, *statistics)
                opcheck(torch.ops.vmae2.reconstruction_loss.default, (*arguments, ""))
                _, count, kept = torch.ops.vmae2.reconstruction_loss.default(*arguments, "")
                arguments = (torch.tensor(2.0), pred.detach(), clip, index, kept, count, *shape, divisor, *statistics)
                opcheck(torch.ops.vmae2.reconstruction_loss_backward.default, (*arguments, name))


def test_compiles_as_one_graph() -> None:
    pred, clip, index, options = make(GEOMETRIES[0], torch.uint8, torch.float32)

    def loss(p: Tensor) -> Tensor:
        return reconstruction_loss(p * 2, clip, index, **options)

    leaves = [pred.clone().requires_grad_() for _ in range(2)]
    losses = [loss(leaves[0]), compiles(loss, leaves[1])]
    for item in losses:
        item.backward()
    assert torch.equal(*losses)
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_clip_to_loss_reads_no_value_on_the_host() -> None:
    """Around the ops of masks, rows and loss under FakeTensorMode, where .item(), nonzero and boolean indexing raise; inside
    them: test_no_host_sync.py."""
    from vmae2_fast.ops import dual_mask, gather_patches

    with FakeTensorMode():
        position = torch.empty(2, dtype=torch.int64)
        mask = dual_mask(position, position, grid=(4, 4, 4), seed=1)
        clip = torch.empty(2, 8, 32, 32, 3, dtype=torch.uint8)
        rows = gather_patches(clip, mask.visible_index, patch=8)
        pred = torch.empty(2, mask.loss_index.shape[1], 384, requires_grad=True)
        loss = reconstruction_loss(pred, clip, mask.loss_index, patch=8)
        loss.backward()
        assert rows.shape == (2, 8, 384)
        assert pred.grad is not None
        assert pred.grad.shape == pred.shape


@pytest.mark.parametrize("clip_dtype", [torch.uint8, torch.float32], ids=str)
def test_statistics_turn_a_perfect_prediction_into_pixels(clip_dtype: torch.dtype) -> None:
    geometry = ((2, 2, 2), 4, 2, 3)
    _, clip, _, options = make(geometry, clip_dtype, torch.float32)
    everything = torch.arange(8, dtype=torch.int32).expand(3, -1)
    leaf = torch.zeros(3, 8, 96, dtype=torch.float64, requires_grad=True)
    reconstruction_loss(leaf, clip, everything, reduction="sum", **options)[0].backward()
    target = leaf.grad * (-96 / 2)
    mean, std = patch_statistics(clip, everything, **options)
    assert mean.shape == std.shape == (3, 8, 1, 3)
    pixels = (target.unflatten(2, (-1, 3)) * std + mean).flatten(2)
    video = scatter_patches(pixels, everything, grid=(2, 2, 2), patch=4, order="pixel")
    if clip_dtype == torch.uint8:
        expected = clip.permute(0, 4, 1, 2, 3).double() / 255
    else:
        scale, shift = (torch.tensor(options[k]).double().view(-1, 1, 1, 1) for k in ("std", "mean"))
        expected = clip.double() * scale + shift
    # float32 statistics of pixels in [0, 1], a hundred of them a patch: a few roundings.
    torch.testing.assert_close(video, expected, rtol=0, atol=16 * torch.finfo(torch.float32).eps)


def test_imagenet_is_the_default_for_float_clips() -> None:
    pred, clip, index, options = make(GEOMETRIES[0], torch.float32, torch.float32)
    given = reconstruction_loss(pred, clip, index, patch=7, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert torch.equal(given, reconstruction_loss(pred, clip, index, patch=7))
    assert not torch.equal(given, reconstruction_loss(pred, clip, index, normalize=False, **options))


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "emulated"])  # a GPU cannot look: tests/ops/test_cuda_kernels.py
def test_ids_outside_the_grid_raise(name: str) -> None:
    pred, clip, index, options = make(GEOMETRIES[0], torch.uint8, torch.float32)
    for bad in (-2, 12):
        wrong = index.clone()
        wrong[2, 0] = bad
        with backend.use_backend(name), pytest.raises(IndexError):
            reconstruction_loss(pred, clip, wrong, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(3, 7, 95)}, r"pred must be floating point \[3, L, 294\].*patch 7"),
        ({"pred": torch.zeros(2, 7, 294)}, r"\[3, L, 294\]"),
        ({"loss_index": torch.zeros(3, 6, dtype=torch.int32)}, "pred has 7 tokens a sample, loss_index 6"),
        ({"loss_index": torch.zeros(3, 7)}, "loss_index must be int32"),
        ({"denominator": "mean"}, "code or paper"),
        ({"denominator": "paper"}, "decoded="),
        ({"denominator": "paper", "decoded": 1.3}, "decoded=.* got 1.3"),
        ({"denominator": "paper", "decoded": 0}, "decoded=.* got 0"),
        ({"clip": torch.zeros(3, 0, 4, 14, 21)}, "at least one channel"),
        ({"reduction": "none"}, "mean or sum"),
        ({"patch": 5}, "multiples of tubelet 2 and patch 5"),
        ({"patch": 1, "tubelet": 1, "pred": torch.zeros(3, 7, 3)}, "no variance"),
    ],
)
def test_rejects(change: dict, message: str) -> None:
    pred, clip, index, options = make(GEOMETRIES[0], torch.uint8, torch.float32)
    with pytest.raises(ValueError, match=message):
        reconstruction_loss(**{"pred": pred, "clip": clip, "loss_index": index, **options, **change})


@pytest.mark.cuda
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("kind", [*KINDS, (((4, 14, 14), 16, 2, 3), torch.uint8, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", backends("reconstruction_loss", "cuda"))
def test_cuda_loss_and_gradient(name: str, kind: tuple, normalize: bool) -> None:
    check_loss_and_gradient(name, *make(*kind), normalize, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("name", [n for n in backends("reconstruction_loss", "cuda") if n != "reference"])
def test_cuda_marks_ids_outside_the_grid(name: str) -> None:
    """No illegal access and no synchronisation: the loss and the token's gradient are NaN."""
    pred, clip, index, options = make(GEOMETRIES[0], torch.uint8, torch.float32)
    for bad in (-2, 12):
        index[2, 0] = bad
        leaf = pred.cuda().requires_grad_()
        with backend.use_backend(name):
            loss = reconstruction_loss(leaf, clip.cuda(), index.cuda(), **options)
            loss.backward()
        assert loss.isnan()
        assert leaf.grad[2, 0].isnan().all()
        assert torch.isfinite(leaf.grad[:2]).all()
