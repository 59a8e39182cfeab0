"""gather_patches and scatter_patches: index ops, so every comparison is bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.support import assert_within_budget, awkward, backends, cases, compiles, expanded, opcheck, random_index
from vmae2_fast import backend
from vmae2_fast.ops.patches import IMAGENET_MEAN, IMAGENET_STD, gather_patches, scatter_patches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = backends("gather_patches")
# grid, patch, tubelet, channels
GEOMETRIES = [((2, 3, 5), 7, 2, 3), ((1, 1, 1), 16, 2, 3), ((3, 2, 2), 4, 1, 1), ((2, 2, 3), 5, 3, 4), ((2, 2, 3), 14, 2, 3)]
CASES = cases("gather_patches", GEOMETRIES, [((1, 2, 1), 5, 2, 4), ((1, 1, 1), 16, 1, 3)])


def make_clip(
    grid: tuple[int, int, int], patch: int, tubelet: int, channels: int, dtype: torch.dtype, batch: int = 3
) -> Tensor:
    t, h, w = grid[0] * tubelet, grid[1] * patch, grid[2] * patch
    if dtype == torch.uint8:
        return torch.randint(0, 256, (batch, t, h, w, channels), dtype=dtype)
    return torch.randn(batch, channels, t, h, w).to(dtype)


def loop(clip: Tensor, index: Tensor, patch: int, tubelet: int, order: str) -> Tensor:
    """Rows by the definition, one token at a time, values untouched; float64."""
    video = clip.permute(0, 4, 1, 2, 3) if clip.dtype == torch.uint8 else clip
    height, width = video.shape[3] // patch, video.shape[4] // patch
    rows = []
    for b, ids in enumerate(index.tolist()):
        for i in ids:
            t, y, x = max(i, 0) // (height * width), max(i, 0) // width % height, max(i, 0) % width
            block = video[b, :, t * tubelet : (t + 1) * tubelet, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            block = block if order == "conv" else block.permute(1, 2, 3, 0)
            rows.append(block.reshape(-1).double() * (i >= 0))
    return torch.stack(rows).view(*index.shape, -1)


def statistics(channels: int) -> dict:
    return (
        {} if channels == 3 else {"mean": [0.1 * c for c in range(channels)], "std": [0.2 + 0.1 * c for c in range(channels)]}
    )


@pytest.mark.parametrize("order", ["conv", "pixel"])
@pytest.mark.parametrize(("name", "geometry"), CASES, ids=str)
def test_gather_float_copies(name: str, geometry: tuple, order: str) -> None:
    grid, patch, tubelet, _ = geometry
    index = random_index(3, max(1, grid[0] * grid[1] * grid[2] // 2), grid[0] * grid[1] * grid[2], padding=2)
    for source in DTYPES:
        clip = make_clip(*geometry, source)
        exact = loop(clip, index, patch, tubelet, order)
        for dtype in DTYPES:
            with backend.use_backend(name):
                rows = gather_patches(clip, index, patch=patch, tubelet=tubelet, dtype=dtype, order=order)
            assert torch.equal(rows, exact.to(source).to(dtype))


@pytest.mark.parametrize("order", ["conv", "pixel"])
@pytest.mark.parametrize(("name", "geometry"), CASES, ids=str)
def test_gather_uint8_normalises(name: str, geometry: tuple, order: str) -> None:
    """Bit-equal to the reference in every dtype, and within its budget of the float64 formula."""
    grid, patch, tubelet, channels = geometry
    clip = make_clip(*geometry, torch.uint8)
    index = random_index(3, max(1, grid[0] * grid[1] * grid[2] // 2), grid[0] * grid[1] * grid[2], padding=1)
    given = statistics(channels)
    mean, std = (torch.tensor(given.get(k, v)).double() for k, v in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    shape = (-1, tubelet * patch * patch) if order == "conv" else (tubelet * patch * patch, -1)
    mean, std = (
        (v[:, None] if order == "conv" else v).expand(*(s if s > 0 else channels for s in shape)).flatten()
        for v in (mean, std)
    )
    plain = loop(clip, index, patch, tubelet, order)
    truth = torch.where(index[..., None] < 0, 0.0, (plain / 255 - mean) / std)
    for dtype in DTYPES:
        arguments = {"patch": patch, "tubelet": tubelet, "dtype": dtype, "order": order, **given}
        with backend.use_backend(name):
            rows = gather_patches(clip, index, **arguments)
        naive = torch.where(index[..., None] < 0, 0.0, (plain.float() / 255 - mean.float()) / std.float()).to(dtype)
        assert_within_budget(rows, naive, truth)
        with backend.use_backend("reference"):
            assert torch.equal(rows, gather_patches(clip, index, **arguments))


# (clip shape, patch, tubelet, ids): few tokens, for the interpreter, of clips as the published models take them. Patches of
# 14 begin at all distances from a 16-byte boundary; 210 pixels make lines that start on any byte.
PRODUCTION = [
    ((1, 16, 224, 224, 3), 14, 2, [0, 5, 15, 255, 256, 2047, -1]),
    ((1, 4, 224, 224, 3), 16, 2, [0, 13, 195, 391, -1]),
    ((1, 4, 224, 224, 3), 16, 4, [0, 195]),
    ((1, 2, 224, 210, 3), 14, 2, [0, 3, 239]),
    ((1, 2, 32, 32, 16), 16, 1, [0, 7]),
]


@pytest.mark.parametrize("order", ["conv", "pixel"])
@pytest.mark.parametrize(("shape", "patch", "tubelet", "ids"), PRODUCTION, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_gather_of_published_clips(
    name: str, shape: tuple[int, ...], patch: int, tubelet: int, ids: list[int], order: str
) -> None:
    """The values of the float64 formula, and the bits of the reference, in float32 and float16."""
    channels, index = shape[4], torch.tensor([ids], dtype=torch.int32)
    clip, given = torch.randint(0, 256, shape, dtype=torch.uint8), statistics(channels)
    mean, std = (torch.tensor(given.get(k, v)).double() for k, v in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    truth = loop(((clip.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3), index, patch, tubelet, order)
    naive = loop(((clip.float() / 255 - mean.float()) / std.float()).permute(0, 4, 1, 2, 3), index, patch, tubelet, order)
    for dtype in (torch.float32, torch.float16):
        arguments = {"patch": patch, "tubelet": tubelet, "dtype": dtype, "order": order, **given}
        with backend.use_backend(name):
            rows = gather_patches(clip, index, **arguments)
        assert_within_budget(rows, naive.to(dtype), truth)
        with backend.use_backend("reference"):
            assert torch.equal(rows, gather_patches(clip, index, **arguments))


def test_every_byte_rounds_as_torch_rounds() -> None:
    """All 256 values through all float dtypes, and the special values of float16 and bfloat16 through the copies."""
    clip = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1)
    index = torch.zeros(1, 1, dtype=torch.int32)
    inf, nan = float("inf"), float("nan")
    edges = [65504, 65519.9, 65520, 6e-8, 2.9e-8, 2.98e-8, 5.9e-5, 6.1e-5, 1e-40, 3.4e38, 1.00048828125, 1.00146484375, -2049]
    special = torch.tensor([0.0, -0.0, inf, -inf, nan, *edges])
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for name in BACKENDS:
        with backend.use_backend(name):
            for dtype in DTYPES:
                rows = gather_patches(clip, index, patch=16, tubelet=1, mean=[0.3], std=[0.7], dtype=dtype)
                values = (torch.arange(256.0) * (1 / (255 * 0.7)) + -0.3 / 0.7).to(dtype)
                assert torch.equal(rows.flatten(), values)
                some = every[::17][:3840] if name == "triton" else every  # the interpreter takes its time
                sources = [special, some.view(torch.float16).float(), torch.randn(512) * 1e-6, torch.randn(512) * 1e4]
                for source in (*sources, some.view(torch.float16), some.view(torch.bfloat16)):
                    tubelet = min(source.numel(), 256)
                    video, tokens = source.view(1, 1, -1, 1, 1), torch.arange(source.numel() // tubelet)[None]
                    got = gather_patches(video, tokens, patch=1, tubelet=tubelet, dtype=dtype).flatten()
                    torch.testing.assert_close(got, source.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_gather_is_the_patch_embedding_of_the_named_tokens() -> None:
    """Rows times the flattened Conv3d weight are the convolution's outputs at those tokens."""
    grid, patch, tubelet, channels = (2, 3, 4), 6, 2, 3
    clip, weight = make_clip(grid, patch, tubelet, channels, torch.float64), torch.randn(8, 3, 2, 6, 6, dtype=torch.float64)
    index = random_index(3, 7, 24)
    tokens = F.conv3d(clip, weight, stride=(2, 6, 6)).flatten(2).transpose(1, 2)
    rows = gather_patches(clip, index, patch=patch, dtype=torch.float64)
    expected = tokens.gather(1, index.long()[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(rows @ weight.flatten(1).T, expected)


@pytest.mark.parametrize("order", ["conv", "pixel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "geometry"), CASES, ids=str)
def test_scatter_puts_rows_back(name: str, geometry: tuple, dtype: torch.dtype, order: str) -> None:
    grid, patch, tubelet, channels = geometry
    tokens = grid[0] * grid[1] * grid[2]
    index = random_index(3, max(1, tokens // 2), tokens, padding=1)
    rows = torch.randn(*index.shape, channels * tubelet * patch * patch).to(dtype)
    rows[:, -1] = float("nan")  # a padded row's values must not matter
    with backend.use_backend(name):
        clip = scatter_patches(rows, index, grid=grid, patch=patch, tubelet=tubelet, channels=channels, order=order)
        assert clip.dtype == dtype
        assert clip.shape == (3, channels, grid[0] * tubelet, grid[1] * patch, grid[2] * patch)
        assert torch.equal(loop(clip, index, patch, tubelet, order)[:, :-1], rows[:, :-1].double())
        everything = torch.arange(tokens, dtype=torch.int32).expand(3, -1)
        empty = [[i for i in range(tokens) if i not in row] for row in index.tolist()]
        all_rows = gather_patches(clip, everything, patch=patch, tubelet=tubelet, dtype=dtype, order=order)
        assert all(not all_rows[b, ids].any() for b, ids in enumerate(empty))


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_adjoint(name: str) -> None:
    clip, index = make_clip((2, 3, 2), 4, 2, 3, torch.float32).requires_grad_(), random_index(3, 5, 12, padding=1)
    upstream = torch.randn(3, 6, 96)
    with backend.use_backend(name):
        gather_patches(clip, index, patch=4).backward(upstream)
        expected = scatter_patches(upstream, index, grid=(2, 3, 2), patch=4)
        assert torch.equal(clip.grad, expected)
        rows = torch.randn(3, 6, 96, requires_grad=True)
        upstream = torch.randn(expected.shape)
        scatter_patches(rows, index, grid=(2, 3, 2), patch=4, order="pixel").backward(upstream)
        assert torch.equal(rows.grad, gather_patches(upstream, index, patch=4, order="pixel"))


@pytest.mark.parametrize("name", BACKENDS)
def test_gradient_of_an_expanded_upstream(name: str) -> None:
    """sum().backward() hands over a gradient of stride 0."""
    clip, index = make_clip((2, 2, 2), 4, 2, 3, torch.float32).requires_grad_(), random_index(3, 3, 8)
    with backend.use_backend(name):
        gather_patches(clip, index, patch=4).sum().backward()
    assert clip.grad is not None
    assert float(clip.grad.sum()) == 3 * 3 * 96
    assert set(clip.grad.unique().tolist()) == {0.0, 1.0}


def test_gradcheck() -> None:
    index = random_index(2, 2, 8, padding=1)
    clip = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def gather(c: Tensor) -> Tensor:
        return gather_patches(c, index, patch=2, tubelet=1, dtype=torch.float64)

    def scatter(r: Tensor) -> Tensor:
        return scatter_patches(r, index, grid=(2, 2, 2), patch=2, tubelet=1, channels=1)

    for function, argument in ((gather, clip), (scatter, rows)):
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument)


@pytest.mark.parametrize("name", BACKENDS)
def test_memory_layouts(name: str) -> None:
    index = random_index(2, 2, 12)
    with backend.use_backend(name):
        for dtype in (torch.uint8, torch.float32):
            clip = make_clip((2, 2, 3), 4, 2, 3, dtype, batch=2)
            expected = gather_patches(clip, index, patch=4)
            for layout, other in awkward(clip):
                assert torch.equal(gather_patches(other, index, patch=4), expected), layout
            for layout, other in awkward(index):
                assert torch.equal(gather_patches(clip, other, patch=4), expected), layout
            assert torch.equal(gather_patches(clip, index.long(), patch=4), expected)
            same = expanded(clip)
            assert torch.equal(gather_patches(same, index, patch=4), gather_patches(same.contiguous(), index, patch=4))
        rows = torch.randn(2, 2, 96)
        expected = scatter_patches(rows, index, grid=(2, 2, 3), patch=4)
        for layout, other in awkward(rows):
            assert torch.equal(scatter_patches(other, index, grid=(2, 2, 3), patch=4), expected), layout


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_lists(name: str) -> None:
    with backend.use_backend(name):
        none = torch.empty(2, 0, dtype=torch.int32)
        clip = make_clip((1, 2, 2), 4, 2, 3, torch.uint8, batch=2)
        assert gather_patches(clip, none, patch=4).shape == (2, 0, 96)
        assert not scatter_patches(torch.empty(2, 0, 96), none, grid=(1, 2, 2), patch=4).any()
        assert gather_patches(clip[:0], none[:0], patch=4).shape == (0, 0, 96)


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name: str) -> None:
    index, identity = random_index(2, 3, 8, padding=1), ([1.0] * 3, [0.0] * 3)
    with backend.use_backend(name):
        for dtype in (torch.uint8, torch.float32):
            clip = make_clip((2, 2, 2), 2, 2, 3, dtype, batch=2)
            clip.requires_grad_(dtype == torch.float32)
            opcheck(torch.ops.vmae2.gather_patches.default, (clip, index, 2, 2, *identity, torch.float32, "conv", ""))
        rows = torch.randn(2, 4, 24, requires_grad=True)
        opcheck(torch.ops.vmae2.scatter_patches.default, (rows, index, [2, 2, 2], 2, 2, 3, "pixel", ""))


def test_compiles_as_one_graph() -> None:
    index = random_index(2, 3, 8)

    def through(clip: Tensor) -> Tensor:
        rows = gather_patches(clip, index, patch=2) * 2
        return scatter_patches(rows, index, grid=(2, 2, 2), patch=2).square().sum()

    eager, compiled = (make_clip((2, 2, 2), 2, 2, 3, torch.float32, batch=2) for _ in range(2))
    compiled.copy_(eager)
    through(eager.requires_grad_()).backward()
    compiles(through, compiled.requires_grad_()).backward()
    assert torch.equal(eager.grad, compiled.grad)


def test_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        rows = gather_patches(
            torch.empty(2, 4, 8, 8, 3, dtype=torch.uint8), torch.empty(2, 3, dtype=torch.int32), patch=4, dtype=torch.bfloat16
        )
        assert (rows.shape, rows.dtype) == ((2, 3, 96), torch.bfloat16)
        assert scatter_patches(rows, torch.empty(2, 3, dtype=torch.int32), grid=(2, 2, 2), patch=4).shape == (2, 3, 4, 8, 8)


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "emulated"])  # a GPU cannot look: tests/ops/test_cuda_kernels.py
@pytest.mark.parametrize("bad", [-2, 8, 2**31 - 1])
def test_ids_outside_the_grid_raise(name: str, bad: int) -> None:
    index = torch.tensor([[0, 1], [2, bad]], dtype=torch.int32)
    with backend.use_backend(name):
        with pytest.raises(IndexError):
            gather_patches(make_clip((2, 2, 2), 2, 2, 3, torch.uint8, batch=2), index, patch=2)
        with pytest.raises(IndexError):
            scatter_patches(torch.zeros(2, 2, 24), index, grid=(2, 2, 2), patch=2)


@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in ("reference", "emulated")])
def test_kernels_refuse_a_token_named_twice(name: str) -> None:
    with backend.use_backend(name), pytest.raises(ValueError, match=r"index\[1\] holds token 3 twice"):
        scatter_patches(torch.zeros(2, 2, 24), torch.tensor([[0, 3], [3, 3]]), grid=(2, 2, 2), patch=2)


@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in ("reference", "emulated")])
def test_gradient_of_a_token_named_twice_is_left_to_the_reference(name: str) -> None:
    clip, index = make_clip((2, 2, 2), 2, 2, 3, torch.float32, batch=2).requires_grad_(), torch.tensor([[0, 3], [3, 3]])
    with backend.use_backend(name):
        rows = gather_patches(clip, index, patch=2)
    with pytest.raises(ValueError, match=r"gradient of gather_patches: .*index\[1\] holds token 3 twice.*=reference"):
        rows.sum().backward()
    with backend.use_backend("gather_patches=reference"):
        gather_patches(clip, index, patch=2).sum().backward()
    assert clip.grad is not None
    assert clip.grad.sum((1, 2, 3, 4)).tolist() == [48, 48]
    assert clip.grad[1].unique().tolist() == [0, 2]


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
@pytest.mark.parametrize("order", ["conv", "pixel"])
def test_triton_takes_a_large_patch_in_tiles(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmae2_fast.ops import _patches_triton

    monkeypatch.setattr(_patches_triton, "MOST_BYTES", 128)
    clip, index = make_clip((1, 2, 2), 7, 2, 3, torch.uint8, batch=1), random_index(1, 2, 4, padding=1)
    assert _patches_triton.tiles(clip, 7, 2)["TILES"] == 4
    with backend.use_backend("triton"):
        rows = gather_patches(clip, index, patch=7, order=order)
    assert torch.equal(rows, gather_patches(clip, index, patch=7, order=order))


@pytest.mark.parametrize(
    ("clip", "index", "options", "message"),
    [
        ((2, 4, 8, 8, 3), (2, 3), {"patch": 3}, "multiples of tubelet 2 and patch 3"),
        ((2, 3, 8, 8, 3), (2, 3), {"patch": 4}, "T, H, W = 3, 8, 8"),
        ((2, 4, 8, 8), (2, 3), {"patch": 4}, "clip must be uint8"),
        ((2, 4, 8, 8, 3), (3, 3), {"patch": 4}, r"index must be int32 \[B, K\] with B = 2"),
        ((2, 4, 8, 8, 4), (2, 3), {"patch": 4}, "both be given for 4 channels"),
        ((2, 4, 8, 8, 4), (2, 3), {"patch": 4, "mean": [0] * 3, "std": [1] * 3}, "4 values each"),
        ((2, 4, 8, 8, 3), (2, 3), {"patch": 4, "mean": [0] * 3, "std": [0.1, float("nan"), 0.1]}, "std positive"),
        ((2, 4, 8, 8, 3), (2, 3), {"patch": 4, "mean": [0] * 3, "std": [0.1, 0, 0.1]}, "std positive"),
        ((2, 4, 8, 8, 3), (2, 3), {"patch": 4, "mean": [0, float("inf"), 0], "std": [1] * 3}, "all finite"),
        ((2, 4, 8, 8, 0), (2, 3), {"patch": 4}, "at least one channel"),
        ((2, 4, 8, 8, 3), (2, 3), {"patch": 4, "order": "tyxc"}, "order must be one of conv, pixel"),
        ((2, 4, 8, 8, 3), (2, 3), {"patch": 4, "dtype": torch.int32}, "floating point"),
    ],
)
def test_gather_rejects(clip: tuple, index: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_patches(torch.zeros(clip, dtype=torch.uint8), torch.zeros(index, dtype=torch.int32), **options)


@pytest.mark.parametrize(
    ("rows", "index", "options", "message"),
    [
        ((2, 3, 95), (2, 3), {}, r"\[B, K, 96\]"),
        ((2, 3, 96), (2, 4), {}, "3 rows but 4 indices"),
        ((2, 3, 96), (2, 3), {"grid": (2, 2)}, "grid"),
        ((2, 3, 96), (2, 3), {"order": "x"}, "order"),
        ((2, 3, 96), (2, 3), {"patch": -4}, "must be at least 1, got -4, 2 and 3"),
        ((2, 3, 96), (2, 3), {"channels": 0}, "must be at least 1, got 4, 2 and 0"),
    ],
)
def test_scatter_rejects(rows: tuple, index: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scatter_patches(torch.zeros(rows), torch.zeros(index, dtype=torch.int32), **{"grid": (2, 2, 2), "patch": 4, **options})


@pytest.mark.cuda
@pytest.mark.parametrize("order", ["conv", "pixel"])
@pytest.mark.parametrize("geometry", [*GEOMETRIES, ((4, 14, 14), 16, 2, 3), ((4, 16, 16), 14, 2, 3)], ids=str)
@pytest.mark.parametrize("name", backends("gather_patches", "cuda"))
def test_cuda_has_the_cpu_bits(name: str, geometry: tuple, order: str) -> None:
    grid, patch, tubelet, channels = geometry
    tokens = grid[0] * grid[1] * grid[2]
    index = random_index(3, max(1, tokens // 2), tokens, padding=1)
    for source in (torch.uint8, *DTYPES):
        clip = make_clip(*geometry, source)
        for dtype in DTYPES:
            row = {"patch": patch, "tubelet": tubelet, "order": order}
            normalised, place = {"dtype": dtype, **statistics(channels)}, {"grid": grid, "channels": channels}
            with backend.use_backend(name):
                rows = gather_patches(clip.cuda(), index.cuda(), **row, **normalised)
                back = scatter_patches(rows, index.cuda(), **row, **place)
            assert torch.equal(rows.cpu(), gather_patches(clip, index, **row, **normalised))
            assert torch.equal(back.cpu(), scatter_patches(rows.cpu(), index, **row, **place))


@pytest.mark.cuda
@pytest.mark.parametrize("name", [n for n in backends("gather_patches", "cuda") if n != "reference"])
def test_cuda_marks_ids_outside_the_grid(name: str) -> None:
    """No illegal access and no synchronisation: NaN rows, and rows left out."""
    index = torch.tensor([[0, 8, -2, 2**31 - 1]], dtype=torch.int32).cuda()
    with backend.use_backend(name):
        rows = gather_patches(make_clip((2, 2, 2), 4, 2, 3, torch.uint8, batch=1).cuda(), index, patch=4)
        assert torch.isfinite(rows[0, 0]).all()
        assert rows[0, 1:].isnan().all()
        clip = scatter_patches(torch.ones(1, 4, 96).cuda(), index, grid=(2, 2, 2), patch=4)
    assert int(clip.sum()) == 96
