"""The recorded pre-training runs again with each list of implementations forced: all must be the official model."""

from __future__ import annotations

import pytest
import torch

from tests.golden.cases import MODELS, distance, gradient_faults, of_kind, recorded_gradients, run, tensors
from tests.golden.test_models import tolerance
from vmae2_fast import backend

OPS = ("dual_mask", "gather_patches", "reconstruction_loss", "decoder_tokens", "attention", "norm_qkv", "norm_mlp")
LISTS = sorted({f"{name},reference" for op in OPS for name in backend.available(op, "cpu")})


@pytest.mark.parametrize("request_", LISTS)
@pytest.mark.parametrize("name", of_kind("pretrain"))
def test_parity_under_a_forced_list(name: str, request_: str) -> None:
    data, entry = tensors("models", name), MODELS[name]
    with backend.use_backend(request_):
        first = request_.split(",")[0]
        served = [op for op in OPS if backend.pick(op, torch.device("cpu")) == first]
        assert served, f"{request_} forces nothing"
        ours, truth = run(name), run(name, "fp64")
    assert ours["loss"] == pytest.approx(entry["loss_fp64"], rel=tolerance(name))
    assert distance(ours["pred"], data["out.pred"]) <= tolerance(name)
    recorded = recorded_gradients(name, "models")
    assert gradient_faults(ours["grads"], truth["grads"], recorded, tolerance(name)) == {}
