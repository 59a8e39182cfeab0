"""Recorded runs of Hugging Face VideoMAE models, their weights read by our loader from a transformers folder."""

from __future__ import annotations

import pytest

from tests.golden.cases import HUGGING_FACE, distance, gradient_distances, gradient_faults, recorded_gradients, run, tensors


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_model(name, tmp_path):
    data, ours = tensors("hf", name), run(name, part="hf", folder=tmp_path)
    truth, recorded = run(name, "fp64", part="hf", folder=tmp_path), recorded_gradients(name, "hf")
    assert set(recorded) <= set(ours["grads"])
    assert distance(ours["pred"], truth["pred"]) <= 1e-6
    assert ours["loss"] == pytest.approx(HUGGING_FACE[name]["loss"], rel=1e-6)
    # The recorded run's own error is not recorded here; one wrong epsilon would make these 4e-6 and more.
    assert distance(data["out.logits"], truth["pred"]) <= 2e-6
    assert gradient_distances(recorded, truth["grads"])[""] <= 2e-6
    assert gradient_faults(ours["grads"], truth["grads"], recorded, 1e-6) == {}
