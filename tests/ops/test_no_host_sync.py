"""On CUDA nothing in an op's body or launcher reads a value back to the host.

A fake tensor never runs the body of an op that is called through the dispatcher, so the bodies are called here. They run
on fake CUDA tensors, where `.item()`, `nonzero` and boolean indexing raise; only the compiled kernels are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vmae2_fast import backend
from vmae2_fast.ops import _native, _triton_launch, masks, patches, reconstruction
from vmae2_fast.ops.decoder_tokens import _body as decoder_tokens_body

GRID, PATCH, TUBELET = (4, 4, 4), 6, 2
WIDTH = 3 * TUBELET * PATCH * PATCH
FORMATS = {"uint8": ((2, 8, 24, 24, 3), torch.uint8), "floats": ((2, 3, 8, 24, 24), torch.bfloat16)}


@pytest.fixture(params=["native", "triton"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The launches of the backend that `pick` is made to choose, which take the place of kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(backend, "pick", lambda op, *_: request.param)
    monkeypatch.setattr(_native, "address", lambda tensor, dtypes, name: 0)
    with _triton_launch._recorded() as launches, FakeTensorMode():
        monkeypatch.setattr(_native, "run", lambda op, *_: launches.append(op))
        yield launches


def cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def ids(count: int) -> Tensor:
    return cuda(2, count, dtype=torch.int32)


@pytest.mark.parametrize("decoder", masks.DECODER_KINDS)
def test_dual_mask(launched: list[object], decoder: str) -> None:
    position = cuda(2, dtype=torch.int64)
    lists = masks._body(position, position, GRID, 1, 0.75, decoder, 0.5)
    assert len(launched) == 1
    assert all(item.device.type == "cuda" for item in lists)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("order", patches.ORDERS)
def test_gather_and_scatter(launched: list[object], form: str, order: str) -> None:
    shape, dtype = FORMATS[form]
    identity = [1.0] * 3, [0.0] * 3
    rows = patches._gather_body(
        cuda(*shape, dtype=dtype), ids(8), PATCH, TUBELET, *identity, torch.bfloat16, order, backend.pick("gather_patches")
    )
    clip = patches._scatter_body(rows, ids(8), GRID, PATCH, TUBELET, 3, order, backend.pick("scatter_patches"))
    assert len(launched) == 2
    assert clip.shape == FORMATS["floats"][0]


@pytest.mark.parametrize("form", FORMATS)
def test_reconstruction_loss(launched: list[object], form: str) -> None:
    shape, dtype = FORMATS[form]
    pred, clip, statistics = cuda(2, 8, WIDTH), cuda(*shape, dtype=dtype), ([0.5] * 3, [0.25] * 3)
    loss, count, kept = reconstruction._body(pred, clip, ids(8), PATCH, TUBELET, True, 0, *statistics, "")
    forward = len(launched)
    name = backend.pick("reconstruction_loss")
    grad = reconstruction._backward_body(loss, pred, clip, ids(8), kept, count, PATCH, TUBELET, 0, *statistics, name)
    assert 0 < forward < len(launched)
    assert grad.shape == pred.shape


@pytest.mark.parametrize("launched", ["triton"], indirect=True)
def test_decoder_tokens(launched: list[object]) -> None:
    out = decoder_tokens_body(cuda(2, 8, 16), cuda(1, 1, 16), cuda(64, 16), ids(8), ids(24), "")
    total = backend.run("decoder_tokens_backward", backend.pick("decoder_tokens_backward"), out, 8)
    assert len(launched) == 3
    assert total.shape == (1, 1, 16)
