"""roi_align_max: every implementation and gradient against float64, the border's rules, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support import assert_within_budget, awkward, backends, cases, compiles, expanded, opcheck
from vmae2_fast import backend
from vmae2_fast.ops import roi_align, roi_align_max

BACKENDS = backends("roi_align_max")
# batch, height, width, channels, boxes
SHAPES = [(2, 9, 11, 3, 7), (3, 14, 14, 70, 20), (1, 1, 1, 16, 2), (2, 5, 1, 129, 4), (1, 16, 28, 192, 9)]
OPTIONS = [
    {}, {"aligned": True}, {"size": 2, "sampling": 2}, {"size": 8, "aligned": True}, {"size": 1}, {"sampling": 3, "size": 3},
]  # fmt: skip


def inputs(batch: int, height: int, width: int, channels: int, count: int, *, patch: int = 16, seed: int = 0):
    """Features in float64 and boxes in float32: inside, across every border, empty, and far outside."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, height, width, channels, generator=g, dtype=torch.float64)
    size = torch.tensor([width * patch, height * patch, width * patch, height * patch], dtype=torch.float32)
    corners = (torch.rand(count, 4, generator=g) * 1.6 - 0.3) * size
    low, high = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
    boxes = torch.cat([torch.randint(0, batch, (count, 1), generator=g).float(), low, high], 1)
    boxes[0, 1:] = torch.tensor([5.0, 6.0, 5.0, 6.0])
    if count > 2:
        boxes[1, 1:] = torch.tensor([-900.0, -800.0, -500.0, -400.0])
        boxes[2, 1:] = torch.tensor([-300.0, -200.0, 5 * width * patch, 4 * height * patch])
    return features, boxes


def run(features: Tensor, boxes: Tensor, upstream: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    out = roi_align_max(leaf, boxes, scale=1 / 16, **options)
    (gradient,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
    return out.detach(), gradient


SLOW = "triton" if not torch.cuda.is_available() else ""  # interpreted: few bins, few boxes
RUNS = [(shape, options) for shape in SHAPES for options in OPTIONS]
FEW = [((2, 2, 3, 3, 3), options) for options in ({"size": 2}, {"size": 2, "sampling": 1, "aligned": True})]


@pytest.mark.parametrize(("name", "run_"), cases("roi_align_max", RUNS, FEW if SLOW else RUNS), ids=str)
def test_forward_and_gradient(name: str, run_: tuple[tuple[int, ...], dict]) -> None:
    shape, options = run_
    features, boxes = inputs(*shape)
    upstream = torch.randn(shape[4], shape[3], dtype=torch.float64)
    for dtype in (torch.float32, torch.float16) if name == "triton" else (torch.float32, torch.bfloat16, torch.float16):
        given = features.to(dtype)
        # The same maximum in every precision needs the truth to start from the same numbers.
        truth = run(given.double(), boxes, upstream.to(dtype).double(), **options)
        with backend.use_backend("reference"):
            reference = run(given, boxes, upstream, **options)
        with backend.use_backend(name):
            ours = run(given, boxes, upstream, **options)
        for what, mine, plain, exact in zip(("pooled", "gradient"), ours, reference, truth, strict=True):
            assert_within_budget(mine, plain, exact, f"{what} {dtype}")


def test_gradcheck_of_the_reference() -> None:
    features, boxes = inputs(2, 5, 6, 3, 5)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: roi_align_max(f, boxes, scale=1 / 16), (features,))
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, size=2, scale=1 / 16), (features,))


def test_maximum_of_the_pooled_cells() -> None:
    features, boxes = inputs(2, 9, 11, 5, 8)
    cells = roi_align(features, boxes, scale=1 / 16)
    assert cells.shape == (8, 7, 7, 5)
    assert torch.equal(cells.amax((1, 2)), roi_align_max(features, boxes, scale=1 / 16))


FAST = [name for name in BACKENDS if name != SLOW]


@pytest.mark.parametrize("name", FAST)
def test_what_lies_far_from_the_box_changes_nothing(name: str) -> None:
    features, boxes = inputs(1, 6, 8, 4, 1)
    boxes[0] = torch.tensor([0.0, 36.0, 20.0, 60.0, 44.0])  # cells 2.25..3.75 by 1.25..2.75
    features = features.float()
    far = features.clone()
    far[:, :, :2], far[:, :, 5:], far[:, 4:], far[:, :1] = 1e6, -1e6, 1e6, 1e6
    with backend.use_backend(name):
        assert torch.equal(roi_align_max(features, boxes, scale=1 / 16), roi_align_max(far, boxes, scale=1 / 16))


@pytest.mark.parametrize("name", BACKENDS)
def test_outside_is_zero_empty_is_empty_and_nan_stays(name: str) -> None:
    features, boxes = inputs(2, 4, 4, 3, 3)
    small = {"size": 2, "scale": 1 / 16}
    with backend.use_backend(name):
        outside = roi_align_max(-features.abs().float() - 1, boxes[1:2], **small)
        assert torch.equal(outside, torch.zeros(1, 3))
        assert roi_align_max(features.float(), boxes[:0], **small).shape == (0, 3)
        leaf = features.float().requires_grad_()
        roi_align_max(leaf, boxes[:0], **small).sum().backward()
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
        poisoned = features.float()
        poisoned[..., 1] = float("nan")
        pooled = roi_align_max(poisoned, torch.tensor([[0.0, 3, 3, 60, 60]]), **small)
        assert pooled.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("name", FAST)
def test_memory_layouts(name: str) -> None:
    features, boxes = inputs(2, 3, 4, 5, 4)
    features = features.float()
    with backend.use_backend(name):
        expected = roi_align_max(features, boxes, scale=1 / 16)
        for layout, view in awkward(features):
            assert torch.equal(roi_align_max(view, boxes, scale=1 / 16), expected), layout
        for layout, view in awkward(boxes):
            assert torch.equal(roi_align_max(features, view, scale=1 / 16), expected), layout
        same = roi_align_max(features[:1].expand(2, -1, -1, -1).contiguous(), boxes, scale=1 / 16)
        assert torch.equal(roi_align_max(expanded(features), boxes, scale=1 / 16), same)


@pytest.mark.skipif("native" not in BACKENDS, reason="no native extension")
def test_every_instruction_set_gives_the_same_bits() -> None:
    extension = backend.native()
    assert extension is not None
    features, boxes = inputs(2, 14, 14, 100, 12)
    before = extension.build_info()["cpu_isa"]
    try:
        found = []
        for isa in extension.supported_cpu_isas():
            extension.set_cpu_isa(isa)
            found.append(roi_align_max(features.float(), boxes, scale=1 / 16))
    finally:
        extension.set_cpu_isa(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_opcheck_and_compile() -> None:
    features, boxes = inputs(2, 4, 5, 6, 4)
    leaf = features.float().requires_grad_()
    opcheck(torch.ops.vmae2.roi_align_max.default, (leaf, boxes, 7, 1 / 16, 0, False, "reference"))
    where = torch.zeros(4, 6, dtype=torch.uint8)
    grad = torch.randn(4, 6)
    arguments = (grad, boxes, where, 2, 4, 5, 7, 1 / 16, 0, False, "reference")
    opcheck(torch.ops.vmae2.roi_align_max_backward.default, arguments)

    def head(features: Tensor, boxes: Tensor) -> Tensor:
        return roi_align_max(features, boxes, scale=1 / 16).square().sum()

    (ours,) = torch.autograd.grad(compiles(head, leaf, boxes), leaf)
    (eager,) = torch.autograd.grad(head(leaf, boxes), leaf)
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", BACKENDS)
def test_rejected(name: str) -> None:
    features, boxes = inputs(2, 4, 5, 6, 3)
    features = features.float()
    with backend.use_backend(name):
        for bad in (2.0, -1.0):
            boxes[1, 0] = bad
            with pytest.raises(IndexError, match="roi_align_max: a box names clip"):
                roi_align_max(features, boxes, scale=1 / 16)
    boxes[1, 0] = 0
    boxes[1, 2] = float("nan")
    with pytest.raises(ValueError, match="roi_align_max: box 1 holds a value that is not finite"):
        roi_align_max(features, boxes, scale=1 / 16)
    boxes[1, 2] = 0
    for given, rows, options, message in (
        (features[0], boxes, {}, "features must be floating point"),
        (features.int(), boxes, {}, "features must be floating point"),
        (features, boxes[:, 1:], {}, "boxes must be float32"),
        (features, boxes.long(), {}, "boxes must be float32"),
        (features, boxes, {"size": 17}, "size must lie in 1..16"),
        (features, boxes, {"sampling": -1}, "sampling must not be negative"),
        (features, boxes, {"scale": 0.0}, "scale must be positive"),
    ):
        with pytest.raises(ValueError, match=f"roi_align_max: .*{message}"):
            roi_align_max(given, rows, **{"scale": 1 / 16, **options})
