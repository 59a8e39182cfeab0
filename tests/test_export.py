"""Exported programs and ONNX files give what the model gives, for any batch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests import tiny_runs as tiny
from tests.models.tiny import classify, clips
from vmae2_fast import cli, export
from vmae2_fast.export import TOLERANCE, export_model
from vmae2_fast.models import build_model, save_weights


def _difference(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_program_with_our_ops(pooling, batch, tmp_path):
    model = classify(pooling=pooling, head_init_scale=1.0, drop_path=0.3, head_dropout=0.5)
    written = export_model(model, tmp_path / "model.pt2")
    assert written["max_difference"] <= TOLERANCE
    assert model.training
    model.eval()
    clip = clips(batch)
    assert _difference(torch.export.load(tmp_path / "model.pt2").module()(clip), model(clip)) <= TOLERANCE


def test_portable_program_runs_without_the_package(tmp_path):
    """All the variants of a block in one model; loaded by a process that never imports vmae2_fast."""
    model = classify(pooling="attentive", head_init_scale=1.0, layer_scale=0.1, cosine_attention=True).eval()
    export_model(model, tmp_path / "model.pt2", portable=True, classes=list("abcde"))
    clip = clips(3)
    torch.save(clip, tmp_path / "clip.pt")
    script = (
        "import sys, torch\nprogram = torch.export.load('model.pt2', extra_files=(names := {'classes.json': ''}))\n"
        "torch.save(program.module()(torch.load('clip.pt')), 'out.pt')\nassert 'vmae2_fast' not in sys.modules\n"
        "print(names['classes.json'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list("abcde")
    assert _difference(torch.load(tmp_path / "out.pt"), model(clip)) <= TOLERANCE


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 9])], ids=["whole", "lengths"])
@pytest.mark.parametrize("window", [None, 2])
def test_portable_attention_keeps_to_window_and_lengths(window, lengths):
    qkv, op = torch.randn(2, 9, 3, 2, 8), torch.ops.vmae2.attention.default
    arguments = (qkv, 0.3, window, lengths, "", "")
    torch.testing.assert_close(export._decompositions()[op](*arguments)[0], op(*arguments)[0])


def test_onnx(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build_model(tiny.CLASSIFY_MODEL)
    save_weights(model, tmp_path / "w.safetensors", {"classes": ["left", "right"]})
    cli.main(["export", str(tmp_path / "w.safetensors"), str(tmp_path / "model.onnx"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_difference"] <= TOLERANCE
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    clip = torch.randint(0, 256, (5, tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8)
    (found,) = session.run(["scores"], {"clip": clip.numpy()})
    assert _difference(torch.from_numpy(found), model.eval()(clip)) <= TOLERANCE
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["left", "right"]


def test_without_onnx_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_missing", lambda *names: list(names))
    with pytest.raises(ValueError, match=r"ONNX needs onnx and onnxscript: pip install 'vmae2_fast\[export\]'"):
        export_model(classify(), tmp_path / "model.onnx")


def test_a_model_that_comes_out_otherwise_is_not_written(tmp_path, monkeypatch):
    model = classify(head_init_scale=1.0)

    def damaged(model, portable, program=export.export_program):
        made = program(model, portable=portable)
        made.state_dict["head.bias"] = torch.nn.Parameter(made.state_dict["head.bias"] + 1)
        return made

    monkeypatch.setattr(export, "export_program", damaged)
    with pytest.raises(RuntimeError, match="differs from the eager one"):
        export_model(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("target", "message"), [("model.bin", r"must end in .pt2"), ("no/model.pt2", "does not exist")])
def test_bad_targets_are_named(target, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(classify(), tmp_path / target)
