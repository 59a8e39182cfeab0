"""A training run in bfloat16 stays as close to float32 as plain torch's own does."""

from __future__ import annotations

import pytest
import torch

from benchmarks import baselines
from tests.models.tiny import clips, mask, pretrain
from vmae2_fast.ops.reconstruction import reconstruction_loss

STEPS = 20


def curve(kind: str, bf16: bool, **options) -> torch.Tensor:
    """Losses of 20 AdamW steps on the same clips from the same weights."""
    torch.manual_seed(0)
    model = pretrain(width=32, depth=3, heads=2, decoder_width=32, **options)
    lists, video = mask(model, 4), clips(4)
    spec = model.spec
    if kind == "strong":
        plain = baselines.Strong(model.config)
        plain.load_state_dict(model.state_dict())
        parameters = plain.parameters()
    else:
        parameters = model.parameters()
    optimizer, losses = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95)), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if kind == "strong":
                loss = plain.loss(video, *lists)
            else:
                cube = {"patch": spec.patch, "tubelet": spec.tubelet}
                loss = reconstruction_loss(model(video, lists), video, lists.loss_index, **cube)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"residual_dtype": "bfloat16"}, {"activation_checkpoint": "block"}], ids=str)
def test_loss_curve_in_bfloat16_stays_in_the_band_of_plain_bfloat16(options) -> None:
    exact = curve("strong", bf16=False)
    band = (curve("strong", bf16=True) - exact).abs()
    assert exact[-1] < 0.95 * exact[0]
    ours = (curve("ours", bf16=True, **options) - exact).abs()
    print(f"{options}: ours {ours.max():.2e} plain {band.max():.2e} of {exact[0]:.3f} -> {exact[-1]:.3f}")
    assert ours.max() <= 2 * band.max()
    assert ours.mean() <= 2 * band.mean()


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_a_float32_decoder_sees_nothing_of_autocast(monkeypatch, residual) -> None:
    torch.manual_seed(0)
    model = pretrain(width=32, depth=2, heads=2, decoder_width=32, decoder_fp32=True, residual_dtype=residual)
    lists, video = mask(model, 2), clips(2)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(video, lists)
        encoded = model.encode(video, lists.visible_index)
    assert (encoded.dtype, predicted.dtype) == (torch.bfloat16, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", lambda *_: encoded)
        assert torch.equal(predicted, model(video, lists))  # the same bits without autocast
    predicted.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
