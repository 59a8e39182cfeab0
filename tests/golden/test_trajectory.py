"""A recorded run of several AdamW steps: losses, gradient norms and the final parameters."""

from __future__ import annotations

import pytest
import torch

from tests.golden.cases import MODELS, distance, masks, named, of_kind, pretrain_loss, pretrain_model, tensors
from vmae2_fast.ops.masks import DualMask
from vmae2_fast.train.optim import parameter_groups

CASES = [name for name in of_kind("trajectory") if MODELS[name]["start"] in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_trajectory(name):
    entry = MODELS[name]
    data, config = tensors("models", entry["start"]), MODELS[entry["start"]]["config"]
    model, mask, video = pretrain_model(entry["start"]), masks(data), data["input.video_f16"].float()
    optimizer = torch.optim.AdamW(parameter_groups(model, entry["wd"][0]), betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(entry["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = entry["lr"][step] * group["lr_scale"]
            if group["weight_decay"] > 0:
                group["weight_decay"] = entry["wd"][step]
        clip = video.roll(step, 2)
        loss = pretrain_loss(model, clip, DualMask(*(part.roll(step, 0) for part in mask)), config["norm"])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), entry["clip"]).item())
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(entry["losses"], rel=1e-5)
    assert norms == pytest.approx(entry["grad_norms_before_clip"], rel=1e-4)
    final = named(tensors("models", name), "final.")
    assert set(final) == {key for key, _ in model.named_parameters()}
    floor = 1e-6 * max(float(value.norm()) for value in final.values())
    worst = {key: d for key, value in model.named_parameters() if (d := distance(value.detach(), final[key], floor)) > 1e-4}
    assert not worst
