"""The masked autoencoder: what the loss needs, static shapes, clips of both layouts."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.models.tiny import clips, mask, pretrain
from vmae2_fast.models import PretrainViT, create_model
from vmae2_fast.ops.masks import dual_mask, dual_mask_from_masks
from vmae2_fast.ops.patches import IMAGENET_MEAN, IMAGENET_STD
from vmae2_fast.ops.reconstruction import reconstruction_loss

CAN_COMPILE = any(map(shutil.which, ("c++", "g++", "clang++")))


def loss_of(model: PretrainViT, pred: torch.Tensor, clip: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return reconstruction_loss(pred, clip, index, patch=model.spec.patch, tubelet=model.spec.tubelet)


@pytest.mark.parametrize("options", [{}, {"frames": 6}, {"layer_scale": 0.1, "cosine_attention": True}], ids=str)
def test_decoding_only_loss_tokens_is_exact(options):
    """Loss and every gradient equal those of decoding all tokens and leaving the others out of the loss. With T' = 3 the
    number of loss tokens differs from sample to sample, and the lists are padded."""
    model = pretrain(**options).double()
    clip, masks = clips(3, model.spec.frames), mask(model, 3)
    if "frames" in options:
        assert (masks.loss_index < 0).any()
    grads = []
    for tokens in ("loss", "decode"):
        pred = model(clip, masks, tokens=tokens)
        if tokens == "decode":
            assert pred.shape == (3, masks.decode_index.shape[1], model.spec.patch_values)
            rows = [pred[b, masks.loss_slot[b].long()] for b in range(3)]
            pred = torch.stack(rows)
        loss = loss_of(model, pred, clip, masks.loss_index)
        grads.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for name, a, b in zip(["loss", *(name for name, _ in model.named_parameters())], *grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")
        assert b.norm() > 0, name


def test_uint8_clips_are_normalised_inside():
    model, clip = pretrain(), clips()
    masks = mask(model)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    normalised = ((clip / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()
    torch.testing.assert_close(model(clip, masks), model(normalised, masks), rtol=1e-4, atol=1e-5)


def test_other_channels_with_their_own_statistics():
    model = pretrain(in_chans=1, pixel_mean=(0.3,), pixel_std=(0.5,))
    clip, masks = clips(channels=1), mask(model)
    normalised = ((clip / 255 - 0.3) / 0.5).permute(0, 4, 1, 2, 3).contiguous()
    pred = model(clip, masks)
    assert pred.shape[2] == 2 * 8 * 8
    torch.testing.assert_close(pred, model(normalised, masks), rtol=1e-4, atol=1e-5)


def test_encoder_sees_visible_tokens_only():
    model, clip = pretrain(), clips(1)
    masks = mask(model, 1)
    changed = clip.clone()
    seen = torch.zeros(model.grid, dtype=torch.bool).flatten()
    seen[masks.visible_index[0].long()] = True
    hidden = (~seen).reshape(model.grid).repeat_interleave(2, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    changed[0][hidden] = 255 - changed[0][hidden]
    assert torch.equal(model(clip, masks), model(changed, masks))
    assert not torch.equal(model(clip, masks), model(255 - clip, masks))


def test_any_mask_of_equal_counts():
    model = pretrain()
    hidden = torch.rand(2, 64).argsort(1) >= 10
    undecoded = torch.rand(2, 64).argsort(1) >= 30
    masks = dual_mask_from_masks(hidden, undecoded)
    assert model.encode(clips(), masks.visible_index).shape == (2, 10, 16)
    assert model(clips(), masks, tokens="decode").shape == (2, 30, 384)


@pytest.mark.parametrize("frames", [8, 6])
@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_step_reads_nothing_back_to_the_host(frames, checkpoint):
    """Under fake tensors `.item()`, `nonzero` and boolean indexing raise: none is between the ops, from clip to gradients.
    The bodies of the ops, which fake tensors do not run, have tests of their own in tests/ops/test_no_host_sync.py."""
    with FakeTensorMode():
        model = create_model(
            "pretrain_videomae_small_patch16_224", frames=frames, depth=2, drop_path=0.1, activation_checkpoint=checkpoint
        ).train()
        clip = torch.empty(2, frames, 224, 224, 3, dtype=torch.uint8)
        position = torch.zeros(2, dtype=torch.int64)
        masks = dual_mask(position, position, grid=model.grid, seed=0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, model(clip, masks), clip, masks.loss_index)
        loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("code", [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not CAN_COMPILE, reason="inductor needs a C++ compiler")),
])
def test_compiles_as_one_graph(code):
    """Clip to loss and all gradients, masks drawn inside: one graph, the numbers of eager."""
    model, clip = pretrain(), clips()
    position, view = torch.arange(2), torch.zeros(2, dtype=torch.int64)

    def step(clip: torch.Tensor, position: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        masks = dual_mask(position, view, grid=model.grid, seed=3)
        return loss_of(model, model(clip, masks), clip, masks.loss_index)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=code)):
        loss = function(clip, position, view)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for name, eager, compiled in zip(["loss", *(n for n, _ in model.named_parameters())], *results):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_initial_values_follow_the_official_rules():
    model = create_model(
        "pretrain_videomae_small_patch16_224", depth=1, decoder_depth=1, layer_scale=0.1, cosine_attention=True
    )
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight")) and "patch_embed" not in key:
            bound = (6 / sum(value.shape)) ** 0.5
            assert 0.99 * bound < value.abs().max() <= bound, key
            assert abs(value.std() - bound / 3**0.5) < 0.02 * bound, key
        elif key.endswith("norm.weight") or ".norm1.weight" in key or ".norm2.weight" in key:
            assert (value == 1).all(), key
        elif key.endswith("scale"):
            assert value.allclose(torch.tensor(10.0).log()), key
        elif "gamma" in key:
            assert (value == 0.1).all(), key
        elif key.endswith("bias") and "patch_embed" not in key:
            assert (value == 0).all(), key
    for key, fan_in in (
        ("encoder.patch_embed.proj.weight", 1536),
        ("encoder.patch_embed.proj.bias", 1536),
        ("encoder_to_decoder.weight", 384),
    ):
        assert 0.95 * fan_in**-0.5 < state[key].abs().max() <= fan_in**-0.5, key
    assert 0.015 < state["mask_token"].abs().max() <= 0.02


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(2, 8, 16, 16, 3, dtype=torch.uint8), r"takes uint8 \[B, 8, 32, 32, 3\]"),
        (torch.zeros(2, 8, 3, 32, 32), r"float \[B, 3, 8, 32, 32\]"),
        (torch.zeros(2, 3, 8, 32, 32, dtype=torch.int32), "torch.int32"),
        (torch.zeros(8, 32, 32, 3, dtype=torch.uint8), r"\[8, 32, 32, 3\]"),
    ],
)
def test_clips_of_another_shape_are_named(clip, message):
    model = pretrain()
    with pytest.raises(ValueError, match=message):
        model(clip, mask(model))


def test_unknown_choice_of_tokens():
    model = pretrain()
    with pytest.raises(ValueError, match='"loss" or "decode"'):
        model(clips(), mask(model), tokens="all")


def test_the_wrong_class_for_a_name():
    with pytest.raises(ValueError, match="classification model"):
        PretrainViT(create_model("vit_small_patch16_224", depth=1).config)
