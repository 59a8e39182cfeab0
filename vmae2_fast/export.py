"""A trained classifier as one file that other programs run: `torch.export` programs and ONNX.

    clip uint8 [B, T, H, W, C] -> class scores [B, num_classes] (features [B, width] of a model without a head)

The batch is dynamic. A `.pt2` file keeps the fused ops, so whoever loads it imports vmae2_fast first; with
`portable=True`, and always in ONNX, every op of ours is replaced by its formula in plain torch operations and the patch
embedding by the convolution it stands for.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models import VisionTransformer
from .ops.patches import IMAGENET_MEAN, IMAGENET_STD

TOLERANCE = 1e-4
"""Largest difference from the eager model, relative to the largest output, that `export_model` accepts."""


class _ConvEmbed(nn.Module):
    """`PatchEmbed` for all tokens as a Conv3d."""

    scale: Tensor
    shift: Tensor

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.proj = embed.proj
        mean, std = (torch.tensor(v or d) for v, d in ((embed.mean, IMAGENET_MEAN), (embed.std, IMAGENET_STD)))
        self.register_buffer("scale", (1 / (255 * std)).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(-1, 1, 1, 1), persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        pixels = clip.permute(0, 4, 1, 2, 3).float() * self.scale + self.shift
        return F.conv3d(pixels, self.proj.weight, self.proj.bias, self.proj.stride).flatten(2).transpose(1, 2)


def export_program(model: VisionTransformer, *, portable: bool = False) -> torch.export.ExportedProgram:
    """The model in evaluation mode as an exported program with a dynamic batch."""
    with _evaluating(model):
        wrapped = _plain(model) if portable else model
        program = torch.export.export(wrapped, (_random_clip(model),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    if portable:
        program = program.run_decompositions(_decompositions())
    return program


def export_model(
    model: VisionTransformer, path: str | Path, *, portable: bool = False, classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write `path` (.pt2 or .onnx) and check it against the eager model; returns path, format, bytes and max_difference.

    max_difference is relative to the largest output, on two random clips, and at most `TOLERANCE`; None where
    onnxruntime is not installed to run the ONNX file. classes: names kept in the file (`classes.json` of a .pt2,
    metadata "classes" of ONNX, a JSON list). ONNX weights above 2 GB lie in a second file, `path`.data.
    Raises ValueError for another ending, a folder that does not exist, or ONNX packages that are missing; RuntimeError
    if the exported model differs. Nothing is written then.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path}: the file must end in .pt2 (torch.export) or .onnx")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; make it first")
    onnx = path.suffix == ".onnx"
    if onnx and (missing := _missing("onnx", "onnxscript")):
        raise ValueError(f"{path}: ONNX needs {' and '.join(missing)}: pip install 'vmae2_fast[export]'")
    clip = _random_clip(model)
    with _evaluating(model), torch.no_grad():
        eager = model(clip)
    names = json.dumps(None if classes is None else list(classes))
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder, _quiet():
        program = export_program(model, portable=portable or onnx)
        temporary = Path(folder) / path.name
        if onnx:
            _write_onnx(program, temporary, names)
            found = None if _missing("onnxruntime") else _run_onnx(temporary, clip)
        else:
            torch.export.save(program, temporary, extra_files={"classes.json": names})
            found = torch.export.load(temporary).module()(clip)
        difference = None if found is None else float((found - eager).abs().max() / eager.abs().max())
        if difference is not None and not difference <= TOLERANCE:
            raise RuntimeError(f"{path}: the exported model differs from the eager one by {difference:.1e}, relative")
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == temporary):  # the model behind its data
            os.replace(file, path.parent / file.name)
    kind = "onnx" if onnx else "torch.export"
    return {"path": str(path), "format": kind, "bytes": size, "max_difference": difference}


def _random_clip(model: VisionTransformer) -> Tensor:
    spec = model.spec
    shape = (2, spec.frames, spec.size, spec.size, spec.channels)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(_device(model))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own insides and on packages nobody asked for."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, classes: str) -> None:
    exported = torch.onnx.export(program, dynamo=True, input_names=["clip"], output_names=["scores"], verbose=False)
    assert exported is not None
    exported.model.metadata_props["classes"] = classes
    exported.save(str(path))


def _run_onnx(path: Path, clip: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: clip.cpu().numpy()})[0]).to(clip.device)


def _plain(model: VisionTransformer) -> VisionTransformer:
    """A shallow copy, the parameters shared, with the convolution in place of the gathered patch embedding."""
    plain = copy.copy(model)
    plain._modules = dict(model._modules)
    plain._modules["patch_embed"] = _ConvEmbed(model.patch_embed).to(_device(model))
    return plain


def _stream(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """x + gamma * drop * branch, and its LayerNorm."""
    x, branch = given["x"], given["branch"]
    if branch is not None:
        for factor in (given["gamma"], None if given["drop"] is None else given["drop"][:, None, None]):
            branch = branch if factor is None else branch * factor
        x = x + branch.to(x.dtype)
    return x, F.layer_norm(x, x.shape[-1:], given["norm_weight"], given["norm_bias"], given["eps"])


def _residual_norm(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return _stream(given)


def _norm_qkv(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    x, h = _stream(given)
    q, v = given["q_bias"], given["v_bias"]
    return x, F.linear(h, given["qkv_weight"], None if q is None else torch.cat((q, torch.zeros_like(q), v)))


def _norm_mlp(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    x, h = _stream(given)
    hidden = F.gelu(F.linear(h, given["fc1_weight"], given["fc1_bias"]))
    return x, F.linear(hidden, given["fc2_weight"], given["fc2_bias"])


def _attention(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    q, k, v = given["qkv"].transpose(1, 3).unbind(2)
    window, lengths = given["window"], given["lengths"]
    token = torch.arange(q.shape[2], device=q.device)
    seen = None if window is None else (token[:, None] - token).abs() <= window
    if lengths is None:
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=given["scale"]).transpose(1, 2),)
    inside = (token < lengths[:, None])[:, None, :, None]  # [B, 1, N, 1]
    near = inside.mT if seen is None else inside.mT & seen
    near = near | (token[:, None] == token)  # a query of padding sees itself: its softmax is finite
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=given["scale"])
    return (torch.where(inside, out, 0).transpose(1, 2),)


def _linear(a: Mapping[str, Any]) -> tuple[Tensor, ...]:
    x, weight, bias = (None if t is None else t.to(a["dtype"]) for t in (a["x"], a["weight"], a["bias"]))
    return (F.linear(x, weight, bias),)  # type: ignore[arg-type]


_PLAIN = {
    "attention": _attention, "linear": _linear, "norm_qkv": _norm_qkv, "norm_mlp": _norm_mlp, "residual_norm": _residual_norm,
}  # fmt: skip


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """What each op of ours computes in evaluation, in plain functional torch: its formula, from the op's own arguments."""

    def make(op: Any, plain: Callable[[Mapping[str, Any]], tuple[Tensor, ...]]) -> Callable[..., Any]:
        names = [argument.name for argument in op._schema.arguments]
        outputs = len(op._schema.returns)

        def run(*arguments: Any) -> Any:
            found = plain(dict(zip(names, arguments)))
            if outputs == 1:
                return found[0]
            return (*found, *found[:1] * (outputs - len(found)))  # statistics for the backward: nobody reads them

        return run

    return {op: make(op, plain) for name, plain in _PLAIN.items() for op in [getattr(torch.ops.vmae2, name).default]}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]
