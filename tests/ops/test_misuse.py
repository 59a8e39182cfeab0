"""What no op can do ends in one clear error, whatever implementation runs: no crash, no silently wrong number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import backends
from vmae2_fast import backend
from vmae2_fast.ops import (
    Window,
    attention,
    decoder_tokens,
    dual_mask,
    gather_patches,
    norm_mlp,
    norm_qkv,
    reconstruction_loss,
    residual_norm,
    resize_crop,
    scatter_patches,
)

INDEX = torch.tensor([[0, 1, 2], [1, 2, 5]], dtype=torch.int32)
BYTES = torch.arange(2 * 4 * 8 * 8 * 3).remainder(251).to(torch.uint8).view(2, 4, 8, 8, 3)


NORM = torch.ones(8), torch.zeros(8), 1e-6


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


# Name of an op -> (function of one differentiable tensor, that tensor).
DIFFERENTIABLE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "gather_patches": (lambda clip: gather_patches(clip, INDEX, patch=4), leaf(2, 3, 4, 8, 8)),
    "scatter_patches": (lambda rows: scatter_patches(rows, INDEX, grid=(2, 2, 2), patch=4), leaf(2, 3, 96)),
    "reconstruction_loss": (lambda pred: reconstruction_loss(pred, BYTES, INDEX, patch=4), leaf(2, 3, 96)),
    "decoder_tokens": (
        lambda tokens: decoder_tokens(tokens, torch.zeros(1, 1, 8), torch.ones(9, 8), INDEX, INDEX), leaf(2, 3, 8),
    ),
    "attention": (attention, leaf(1, 5, 3, 2, 8)),
    "residual_norm": (lambda x: residual_norm(x, x * 2, None, None, *NORM)[1], leaf(2, 3, 8)),
    "norm_qkv": (lambda x: norm_qkv(x, None, None, None, *NORM, torch.eye(8).repeat(3, 1), None, None)[1], leaf(2, 3, 8)),
    "norm_mlp": (lambda x: norm_mlp(x, None, None, None, *NORM, torch.eye(8), None, torch.eye(8), None)[1], leaf(2, 3, 8)),
}  # fmt: skip
LINEAR = ("gather_patches", "scatter_patches", "decoder_tokens")  # a gradient of theirs is one of them again


def runs() -> list[Any]:
    return [pytest.param(op, name, id=f"{op}-{name}") for op in DIFFERENTIABLE for name in backends(op)]


@pytest.mark.parametrize(("op", "name"), runs())
def test_double_backward(op: str, name: str) -> None:
    """Linear ops have it; the others refuse, where torch without a rule would return a gradient that misses a term."""
    function, x = DIFFERENTIABLE[op]
    with backend.use_backend(f"{op}={name}"):
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        if op not in LINEAR:
            with pytest.raises(RuntimeError, match=f"vmae2::{op}_backward has no gradient of its own: double backward"):
                torch.autograd.grad(grad.square().sum(), x)
            return
        (ours,) = torch.autograd.grad(grad.square().sum(), x)
    # f is affine with Jacobian J: the gradient of |f|^2 has the Hessian 2 J'J, so that of its square is 4 J'J times it.
    through = function(x + grad) - function(x)
    (expected,) = torch.autograd.grad(function(x), x, 4 * through.detach())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("op", "name"), runs())
def test_backward_runs_what_the_forward_chose(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice ends with its `with` block; the backward, outside of it and in another thread, keeps to it."""
    function, x = DIFFERENTIABLE[op]
    ran: list[tuple[str, str]] = []
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda which, how, *args: (ran.append((which, how)), run(which, how, *args))[1])
    with backend.use_backend(f"{op}={name}"):
        out = function(x).square().sum()
    (grad,) = torch.autograd.grad(out, x)
    assert ran
    assert {how for _, how in ran} == {name}
    with backend.use_backend("reference"):
        (expected,) = torch.autograd.grad(function(x).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_functorch_transforms_are_refused(op: str) -> None:
    function, x = DIFFERENTIABLE[op]
    x = x.detach()
    message = f"vmae2::{op} does not run under torch.func transforms.*fold a mapped dimension into the batch"
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(function)(x[None].expand(3, *x.shape))
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda value: function(value).sum())(x)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(function, (x,), (x,))


def test_masks_refuse_functorch_too() -> None:
    with pytest.raises(RuntimeError, match=r"vmae2::dual_mask does not run under torch.func"):
        torch.vmap(lambda p: dual_mask(p, p, grid=(4, 4, 4), seed=1)[0])(torch.arange(6).view(3, 2))


ELSEWHERE = INDEX.to("meta")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather_patches(BYTES, ELSEWHERE, patch=4), "gather_patches: index is on meta"),
        (lambda: scatter_patches(leaf(2, 3, 96), ELSEWHERE, grid=(2, 2, 2), patch=4), "scatter_patches: index is on meta"),
        (lambda: reconstruction_loss(leaf(2, 3, 96), BYTES, ELSEWHERE, patch=4), "loss_index is on meta"),
        (lambda: reconstruction_loss(leaf(2, 3, 96), BYTES.to("meta"), INDEX, patch=4), "pred is on cpu, clip on meta"),
        (
            lambda: decoder_tokens(leaf(2, 3, 8), leaf(1, 1, 8), leaf(9, 8).to("meta"), INDEX, INDEX),
            "position_table is on meta",
        ),
        (lambda: decoder_tokens(leaf(2, 3, 8), leaf(1, 1, 8), leaf(9, 8), INDEX, ELSEWHERE), "decode_index is on meta"),
        (
            lambda: residual_norm(leaf(2, 3, 8), None, None, None, NORM[0].to("meta"), *NORM[1:]),
            "residual_norm: norm weight is torch.float32 on meta; it must be real and on cpu",
        ),
        (
            lambda: norm_qkv(leaf(2, 3, 8), leaf(2, 3, 8).to("meta"), None, None, *NORM, leaf(24, 8), None, None),
            "norm_qkv: branch is torch.float32 on meta",
        ),
        (
            lambda: dual_mask(torch.arange(2), torch.arange(2, device="meta"), grid=(4, 4, 4), seed=0),
            "position is on cpu, view on meta",
        ),
    ],
)
def test_mixed_devices_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", [Tensor.tolist, Tensor.numpy])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda kind: gather_patches(kind(BYTES), INDEX, patch=4), "gather_patches: clip"),
        (lambda kind: gather_patches(BYTES, kind(INDEX), patch=4), "gather_patches: index"),
        (lambda kind: scatter_patches(kind(torch.zeros(2, 3, 96)), INDEX, grid=(2, 2, 2), patch=4), "scatter_patches: rows"),
        (lambda kind: reconstruction_loss(kind(torch.zeros(2, 3, 96)), BYTES, INDEX, patch=4), "reconstruction_loss: pred"),
        (lambda kind: reconstruction_loss(leaf(2, 3, 96), BYTES, kind(INDEX), patch=4), "loss: loss_index"),
        (lambda kind: resize_crop([kind(BYTES[0])], [[Window(0, 0, 8, 8)]], 4), "resize_crop: frames"),
    ],
)
def test_what_is_no_tensor_is_named(call: Callable[[Any], Any], kind: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"{message} must be a torch.Tensor .*, got (list|ndarray)"):
        call(kind)


@pytest.mark.parametrize("name", backends("gather_patches"))
@pytest.mark.parametrize("far", [2**31, 2**32, 2**32 + 3, 2**33, -(2**32) + 1])
def test_ids_beyond_int32_do_not_wrap_around(name: str, far: int) -> None:
    index = INDEX.long().index_fill(1, torch.tensor([1]), far)
    with backend.use_backend(f"gather_patches={name}"):
        if name == "emulated":  # a GPU cannot look at ids: they show in the result
            rows = gather_patches(BYTES, index, patch=4)
            assert rows[:, 1].isnan().all()
            assert rows[:, ::2].isfinite().all()
            return
        with pytest.raises(IndexError):
            gather_patches(BYTES, index, patch=4)


@pytest.mark.skipif("native" not in backends("gather_patches"), reason="no native extension")
def test_dtypes_no_kernel_takes_are_named() -> None:
    float8 = torch.float8_e4m3fn
    with pytest.raises(TypeError, match=r"reconstruction_loss: pred.*float8_e4m3fn"):
        reconstruction_loss(leaf(2, 3, 96).to(float8), BYTES, INDEX, patch=4)
    with pytest.raises(TypeError, match=r"gather_patches: rows.*float8_e4m3fn"):
        gather_patches(BYTES, INDEX, patch=4, dtype=float8)
    with pytest.raises(TypeError, match=r"gather_patches: clip.*float8_e4m3fn"):
        gather_patches(leaf(2, 3, 4, 8, 8).to(float8), INDEX, patch=4)
