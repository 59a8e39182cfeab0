"""Pooling, head and initial values of the classification model."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.models.tiny import classify, clips
from vmae2_fast.models import create_model


def test_mean_pooling_norms_the_mean_of_all_tokens():
    model, video = classify(), clips()
    tokens = model.tokens(video)
    assert tokens.shape == (2, 64, 16)
    expected = F.layer_norm(tokens.mean(1), (16,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_features(video), expected)
    torch.testing.assert_close(model(video), F.linear(expected, model.head.weight, model.head.bias))


def test_first_pooling_is_the_normed_first_token():
    model, video = classify(pooling="first"), clips()
    expected = F.layer_norm(model.tokens(video)[:, 0], (16,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_features(video), expected, rtol=1e-5, atol=1e-6)


def test_without_classes_the_features_are_the_output():
    model, video = classify(num_classes=0), clips()
    assert torch.equal(model(video), model.forward_features(video))
    assert not [key for key in model.state_dict() if key.startswith("head")]


def test_learnable_positions_are_a_parameter_that_trains():
    model = classify(learnable_positions=True)
    assert model.pos_embed.shape == (1, 64, 16)
    assert next(iter(model.state_dict())) == "pos_embed"
    model(clips()).sum().backward()
    assert model.pos_embed.grad.norm() > 0


def test_initial_values_follow_the_official_rules():
    model = create_model("vit_small_patch16_224", depth=1, num_classes=400)
    assert abs(model.blocks[0].attn.qkv.weight.std() - 0.02) < 5e-4
    assert abs(model.head.weight.std() - 2e-5) < 5e-7
    assert (model.head.bias == 0).all()


def test_head_dropout_acts_while_training_only():
    model, video = classify(head_dropout=0.5), clips()
    assert not torch.equal(model.train()(video), model(video))
    assert torch.equal(model.eval()(video), model(video))
