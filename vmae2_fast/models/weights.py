"""Weights into models and out of them: `load_weights`, `save_weights`, `convert_weights`.

What fits without a word: the same model; a pre-training checkpoint into a classification model (decoder dropped, the
encoder's final norm kept only for `pooling="first"`, head and `fc_norm` at their initial values); a head of another
number of classes (dropped, or turned from K710 to K400/K600/K700 by the official row maps); a checkpoint of another
clip size (sin-cos tables are not stored, `ModelConfig.positions` decides; a trained `pos_embed` is resized). Every one
of these is in the `LoadReport`. Anything else is a surprise and raises before a single value has changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import to_dict
from ..whole import write_whole
from .classify import VisionTransformer
from .detect import Detector
from .formats import Checkpoint, read_checkpoint
from .kinetics import MERGED, PARTS, label_map
from .positions import resize_table
from .pretrain import PretrainViT
from .sizes import NATIVE_FRAMES
from .vit import fill

PRETRAIN_ONLY = ("decoder.", "mask_token", "encoder_to_decoder.")
Model = PretrainViT | VisionTransformer


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did. `str(report)` is one line."""

    source: str
    loaded: dict[str, str]
    """Model key -> checkpoint key."""
    dropped: tuple[str, ...]
    """Checkpoint keys not used."""
    initialised: tuple[str, ...]
    """Model keys the checkpoint does not have: left at, or set to, their initial values."""
    notes: tuple[str, ...] = ()
    """What was changed on the way: heads converted or dropped, positions resized, epsilon taken over."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.dropped:
            parts.append(f"{len(self.dropped)} dropped ({_some(self.dropped, 3)})")
        if self.initialised:
            parts.append(f"{len(self.initialised)} initialised ({_some(self.initialised, 3)})")
        return f"{self.source}: {'; '.join([*parts, *self.notes])}"


@dataclass
class _Plan:
    """Which tensor goes where; made and checked before the model is touched."""

    source: dict[str, str] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, source: str, value: Tensor) -> None:
        self.source[key], self.values[key] = source, value


def load_weights(
    model: Model,
    source: str | Path,
    *,
    head: Literal["auto", "drop"] | Sequence[int] = "auto",
    checkpoint_grid: tuple[int, int, int] | None = None,
) -> LoadReport:
    """Load a checkpoint into `model` (built on the meta device: it is materialised on the default device).

    source: an official file (`model`, `module` or bare, with or without `_orig_mod.`, `backbone.`, `encoder.`), one of
    ours (safetensors), a Hugging Face VideoMAE folder or file, `hf:OWNER/NAME[@REV]`.
    head: "auto" loads a head of the same size, converts K710 to 400/600/700 classes and drops any other; a sequence gives
    for each class of the model its row in the checkpoint's head; "drop" keeps the initial head.
    checkpoint_grid: (T', H', W') of a trained `pos_embed` of another size; None: known from our own files and Hugging
    Face's, otherwise taken for a square of 16-frame clips, else of the model's number of frames.
    Raises ValueError naming the file and keys for missing, unexpected or misshapen tensors, another number of heads, a
    pickle that holds more than tensors. The model is unchanged then."""
    checkpoint = read_checkpoint(source)
    plan = _plan(model, checkpoint, head, checkpoint_grid)
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=torch.get_default_device())
        model.init_weights(only=plan.initialised)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in plan.values:
                fill(parameter, plan.values[key])
    eps = checkpoint.facts.get("norm_eps")
    if eps is not None and eps != (model.config.norm_eps, model.config.output_norm_eps):
        before_head = f", {eps[1]:g} before the head" if eps[1] else ""
        plan.notes.append(f"norm_eps {model.config.norm_eps:g} -> {eps[0]:g}{before_head}")
        model.set_norm_eps(*eps)
    return LoadReport(checkpoint.path, plan.source, tuple(plan.dropped), tuple(plan.initialised), tuple(plan.notes))


def _plan(model: Model, checkpoint: Checkpoint, head: Any, checkpoint_grid: tuple[int, int, int] | None) -> _Plan:
    plan, wanted = _Plan(), {key: p.shape for key, p in model.named_parameters()}
    state = {key: (key, value) for key, value in checkpoint.state.items()}
    hints: list[str] = []
    if isinstance(model, VisionTransformer):
        pretrained = any(key.startswith((*PRETRAIN_ONLY, "encoder.")) for key in state)
        state = {key.removeprefix("encoder."): item for key, item in state.items()}
        unused = (*PRETRAIN_ONLY, "norm.") if pretrained and model.config.pooling != "first" else PRETRAIN_ONLY
        for key in [k for k in state if k.startswith(unused)]:
            plan.dropped.append(state.pop(key)[0])
        if isinstance(model, Detector) and "norm.weight" not in state:
            _plan_norm(plan, state, wanted, model.norm_from_head)
        has_head = "head.weight" in state
        if has_head:
            _plan_head(plan, state, wanted, head)
        allowed = ("head.", "fc_norm.", "pool.") if pretrained or not has_head else ("head.", "pool.")
        plan.initialised += [k for k in wanted if k.startswith(allowed) and k not in state and k not in plan.values]
        if "pos_embed" in state and "pos_embed" in wanted:
            _plan_positions(plan, state, model, checkpoint, checkpoint_grid)
        elif "pos_embed" in state:
            hints.append("the checkpoint has a trained pos_embed: build the model with learnable_positions=True")
        if model.config.pooling != "attentive" and any(key.startswith("pool.") for key in state):
            hints.append('the checkpoint has an attentive head: build the model with pooling="attentive"')
        if ("fc_norm.weight" if model.config.pooling == "first" else "norm.weight") in state:
            hints.append(f'the checkpoint pools otherwise than pooling="{model.config.pooling}"')
    elif model.config.decoder_outputs is not None and _other_target(state, wanted):
        plan.dropped += [state.pop(key)[0] for key in _DECODER_HEAD]
        plan.initialised += _DECODER_HEAD
        plan.notes.append("decoder.head: that of another target dropped")
    elif "encoder.norm.weight" not in state and checkpoint.facts.get("hugging_face"):
        hints.append("use_mean_pooling=True leaves out the encoder's final norm; save it with use_mean_pooling=False")
    elif not any(key.startswith("decoder.") for key in state):
        hints.append("the checkpoint has no decoder; pre-training weights with one are needed to go on pre-training")

    shapes: dict[str, str] = {}
    for key in [k for k in state if k in wanted]:
        original, value = state.pop(key)
        if value.shape == wanted[key]:
            plan.put(key, original, value)
        else:
            shapes[key] = f"{original} {list(value.shape)} (the model has {list(wanted[key])})"
    missing = [k for k in wanted if not (k in plan.values or k in plan.initialised or k in shapes)]
    surprises = {
        "missing": missing,
        "unexpected": [original for original, _ in state.values()],
        "other shape": list(shapes.values()),
        "other number of heads": _heads_differ(model, checkpoint.facts),
    }
    faults = [f"{name}: {_some(keys, 8)}" for name, keys in surprises.items() if keys]
    if faults:
        raise ValueError(f"{checkpoint.path} does not fit {model.config.name}: {'; '.join([*faults, *hints])}")
    return plan


_DECODER_HEAD = ("decoder.head.weight", "decoder.head.bias")


def _other_target(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(key in state and state[key][1].shape != wanted[key] for key in _DECODER_HEAD)


def _plan_norm(plan: _Plan, state: dict[str, tuple[str, Tensor]], wanted: Mapping[str, Any], from_head: bool) -> None:
    """A detector's norm of every token, out of a classifier that has one of the pooled features only."""
    for name in ("weight", "bias"):
        given = state.pop(f"fc_norm.{name}", None)
        if given is not None and from_head and given[1].shape == wanted[f"norm.{name}"]:
            plan.put(f"norm.{name}", *given)
        else:
            plan.dropped += [given[0]] if given is not None else []
            plan.initialised.append(f"norm.{name}")


def _plan_head(plan: _Plan, state: dict[str, tuple[str, Tensor]], wanted: Mapping[str, Any], head: Any) -> None:
    original, weight = state["head.weight"]
    has, wants = weight.shape[0], wanted["head.weight"][0] if "head.weight" in wanted else 0
    rows: Sequence[int] | None = None
    if not isinstance(head, str):
        rows = list(head)
        if len(rows) != wants or not all(0 <= row < has for row in rows):
            span = f"{min(rows, default=0)}..{max(rows, default=0)}"
            raise ValueError(f"head: needs {wants} row numbers below {has}, got {len(rows)} in {span}")
    elif head == "auto" and has == wants:
        return
    elif head == "auto" and has == MERGED and wants in PARTS:
        rows = label_map(wants)
    for key in ("head.weight", "head.bias"):
        if key in state and rows is not None:
            original, value = state.pop(key)
            plan.put(key, original, value[torch.tensor(rows)])
        elif key in state:
            plan.dropped.append(state.pop(key)[0])
    plan.notes.append(f"head: {has} classes dropped" if rows is None else f"head: {has} classes converted to {wants}")


def _plan_positions(
    plan: _Plan,
    state: dict[str, tuple[str, Tensor]],
    model: VisionTransformer,
    checkpoint: Checkpoint,
    grid: tuple[int, int, int] | None,
) -> None:
    original, value = state["pos_embed"]
    count, new = value.shape[1], model.grid
    old = grid or checkpoint.facts.get("grid")
    if old is None:
        steps = [t for t in (new[0], NATIVE_FRAMES // model.spec.tubelet) if math.isqrt(count // t) ** 2 * t == count]
        # A table that is exactly the model's needs no guess; otherwise official checkpoints are of 16 frames.
        old = new if count == math.prod(new) else (steps[-1], *[math.isqrt(count // steps[-1])] * 2) if steps else None
    if old is None or math.prod(old) != count or value.shape[2] != model.spec.encoder.width:
        return  # the shape check names it
    if old != new:
        state.pop("pos_embed")
        table = resize_table(value[0].float().numpy(), old, new, "cubic")
        plan.put("pos_embed", original, torch.from_numpy(table)[None])
        plan.notes.append(f"pos_embed: resized from {'x'.join(map(str, old))} to {'x'.join(map(str, new))}")


def _heads_differ(model: Model, facts: Mapping[str, Any]) -> list[str]:
    """Shapes do not tell the number of heads, so it is compared where the file states it."""
    spec = model.spec
    pairs = [("heads", spec.encoder.heads)] + ([("decoder_heads", spec.decoder.heads)] if spec.decoder is not None else [])
    return [f"{key} {facts[key]} (the model has {value})" for key, value in pairs if facts.get(key, value) != value]


def _some(keys: Sequence[str], count: int) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def save_weights(
    model: nn.Module, path: str | Path, meta: Mapping[str, Any] | None = None, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the state dict under official keys as safetensors, with the model's configuration and `meta` (JSON values) in
    the header. `state`: its whole tensors, where the model itself holds slices only. Atomic: `path` holds the old content
    or the new, never a part. Raises OSError if it cannot be written."""
    header = {"format": "pt", "meta": json.dumps(dict(meta or {}))}
    if hasattr(model, "config"):
        header["config"] = json.dumps(to_dict(model.config))
    _write_safetensors(dict(model.state_dict() if state is None else state), Path(path), header)


def _write_safetensors(state: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    seen: set[int] = set()
    tensors = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        # A view or an alias would carry its whole storage, which the format refuses: it gets its own copy.
        if value.untyped_storage().nbytes() != value.nbytes or value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        tensors[key] = value

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, header)
        _sort_header(temporary)

    try:
        write_whole(path, write)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def _sort_header(path: Path) -> None:
    """Put what stands beside the tensors in order: safetensors shuffles it, and the same weights are to be the same file."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def weights_digest(model: nn.Module, *, without: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names and values of a model's state; without: beginnings of names that are left out."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith(without):
            continue
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def convert_weights(source: str | Path, target: str | Path) -> dict[str, Any]:
    """Rewrite a checkpoint under official names: `target` ending in .safetensors, or in .pth or .pt (an official file
    again, the tensors under `model`). Values and dtypes stay bit for bit. Returns what was written. Raises ValueError
    for an unreadable source, another ending, or a target in a folder that does not exist."""
    target = Path(target)
    if target.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{target}: the target must end in .safetensors, .pth or .pt")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: the folder {target.parent} does not exist; make it first")
    checkpoint = read_checkpoint(source)
    if target.suffix == ".safetensors":
        _write_safetensors(checkpoint.state, target, {"format": "pt", **checkpoint.metadata})
    else:
        write_whole(target, lambda temporary: torch.save({"model": checkpoint.state}, temporary))
    tensors = checkpoint.state.values()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return {
        "source": checkpoint.path,
        "target": str(target),
        "tensors": len(checkpoint.state),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": dtypes,
    }
