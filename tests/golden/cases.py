"""Recorded cases of `parity/models` and `parity/hf`: run ours on the recorded inputs, measure the distance.

Every case comes from the index files of the golden directory; nothing here knows a case by name. The tests assert the
distances, `python -m tests.golden.report` tabulates them.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.golden.support import golden_root
from vmae2_fast.config import ModelConfig
from vmae2_fast.models import build_model, load_weights
from vmae2_fast.models.formats import from_hugging_face
from vmae2_fast.ops.masks import DualMask, dual_mask_from_masks
from vmae2_fast.ops.reconstruction import reconstruction_loss


def index(part: str, name: str) -> dict[str, Any]:
    """The entries of an index file whose data file is there too; empty if the index is missing."""
    file = golden_root() / "parity" / part / name
    entries = json.loads(file.read_text()) if file.is_file() else {}
    return {case: entry for case, entry in entries.items() if file.with_name(f"{case}.safetensors").is_file()}


MODELS = index("models", "models_index.json")
HUGGING_FACE = index("hf", "hf_index.json")


def of_kind(kind: str) -> list[str]:
    return [name for name, entry in MODELS.items() if entry["kind"] == kind]


@functools.lru_cache(maxsize=2)
def tensors(part: str, name: str) -> dict[str, Tensor]:
    return load_file(golden_root() / "parity" / part / f"{name}.safetensors")


def named(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.float() for key, value in data.items() if key.startswith(prefix)}


def gated_in_bf16(name: str) -> bool:
    """The golden README: cosine attention and raw targets are ill-conditioned in bf16."""
    config = MODELS[name]["config"]
    return not config["cos"] and config.get("norm", True)


def pretrain_model(name: str) -> torch.nn.Module:
    c = MODELS[name]["config"]
    config = ModelConfig(
        name="pretrain_videomae_base_patch16_224",
        frames=c["T"],
        size=c["img"],
        patch=c["patch"],
        width=c["ew"],
        heads=c["eh"],
        depth=c["ed"],
        decoder_width=c["dw"],
        decoder_heads=c["dh"],
        decoder_depth=c["dd"],
        mlp_ratio=c["mlp"],
        layer_scale=c["init"],
        cosine_attention=c["cos"],
        tubelet=c.get("tub", 2),
    )
    model = build_model(config)
    model.load_state_dict(named(tensors("models", name), "param."))
    return model


def finetune_model(name: str) -> torch.nn.Module:
    c = MODELS[name]["config"]
    config = ModelConfig(
        name="vit_base_patch16_224",
        frames=c["T"],
        size=c["img"],
        patch=c["patch"],
        width=c["w"],
        heads=c["h"],
        depth=c["d"],
        mlp_ratio=c["mlp"],
        layer_scale=c["init"],
        cosine_attention=c["cos"],
        tubelet=c.get("tub", 2),
        num_classes=c["K"],
        pooling="mean" if c["mean"] else "first",
    )
    model = build_model(config)
    model.load_state_dict(named(tensors("models", name), "param."))
    return model


def hugging_face_model(name: str, folder: Path) -> torch.nn.Module:
    """Through the loader: the recorded parameters written as a transformers folder."""
    c = HUGGING_FACE[name]["config"]
    save_file(
        {k.removeprefix("param."): v for k, v in tensors("hf", name).items() if k.startswith("param.")},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "videomae", **c}))
    pretrain = HUGGING_FACE[name]["kind"] == "VideoMAEForPreTraining"
    common = {
        "frames": c["num_frames"],
        "size": c["image_size"],
        "patch": c["patch_size"],
        "tubelet": c.get("tubelet_size", 2),
        "width": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "depth": c["num_hidden_layers"],
        "mlp_ratio": c["intermediate_size"] / c["hidden_size"],
        "qkv_bias": c["qkv_bias"],
    }
    if pretrain:
        config = ModelConfig(
            name="pretrain_videomae_base_patch16_224",
            decoder_width=c["decoder_hidden_size"],
            decoder_heads=c["decoder_num_attention_heads"],
            decoder_depth=c["decoder_num_hidden_layers"],
            decoder_mlp_ratio=c["decoder_intermediate_size"] / c["decoder_hidden_size"],
            **common,
        )
    else:
        config = ModelConfig(
            name="vit_base_patch16_224",
            num_classes=c["num_labels"],
            pooling="mean" if c["use_mean_pooling"] else "first",
            **common,
        )
    with torch.device("meta"):
        model = build_model(config)
    load_weights(model, folder)
    return model


def masks(data: dict[str, Tensor]) -> DualMask:
    if "input.bool_masked_pos" in data:
        hidden = data["input.bool_masked_pos"].bool()
        return dual_mask_from_masks(hidden, ~hidden)
    return dual_mask_from_masks(data["input.encoder_mask"].bool(), data["input.decoder_mask"].bool())


def pretrain_loss(model: Any, clip: Tensor, mask: DualMask, normalize: bool) -> Tensor:
    pred = model(clip, mask)
    return reconstruction_loss(
        pred, clip, mask.loss_index, patch=model.spec.patch, tubelet=model.spec.tubelet, normalize=normalize
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.detach() for key, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def precision(name: str) -> Any:
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
        yield


def run(name: str, kind: str = "fp32", part: str = "models", folder: Path | None = None) -> dict[str, Any]:
    """Our outputs, loss and gradients on the inputs of a case, in "fp32", "bf16" (autocast) or "fp64"."""
    data = tensors(part, name)
    if part == "hf":
        assert folder is not None
        model = hugging_face_model(name, folder)
        clip = data["input.pixel_values_f16"].float().transpose(1, 2).contiguous()
        normalize = HUGGING_FACE[name]["config"].get("norm_pix_loss", True)
        pretrain = "input.bool_masked_pos" in data
    else:
        pretrain = MODELS[name]["kind"] == "pretrain"
        model = pretrain_model(name) if pretrain else finetune_model(name)
        clip, normalize = data["input.video_f16"].float(), MODELS[name]["config"].get("norm", True)
    if kind == "fp64":
        model, clip = model.double(), clip.double()
    out: dict[str, Any] = {"model": model}
    with precision(kind):
        if pretrain:
            mask = masks(data)
            with torch.no_grad():
                out["tokens"] = model.encode(clip, mask.visible_index)
                out["pred"] = model(clip, mask, tokens="decode")
            loss = pretrain_loss(model, clip, mask, normalize)
        else:
            with torch.no_grad():
                out["features"] = model.forward_features(clip)
            out["pred"] = model(clip)
            labels = data["input.target" if part == "models" else "input.labels"]
            loss = F.cross_entropy(out["pred"].float() if kind != "fp64" else out["pred"], labels)
    loss.backward()
    return out | {"loss": loss.item(), "grads": gradients(model)}


def recorded_gradients(name: str, part: str) -> dict[str, Tensor]:
    found = named(tensors(part, name), "grad.")
    if part == "hf":
        found = {
            {"classifier.weight": "head.weight", "patch_embed.weight": "patch_embed.proj.weight"}.get(k, k): v
            for k, v in found.items()
        }
        found = from_hugging_face(found)
    return found


def distance(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """Relative L2, the denominator not below `floor`."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / max(float(theirs.norm()), floor, 1e-300))


def gradient_distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 of each tensor that both have, norms floored at 1e-6 of the largest gradient's; key "" is all of them
    as one vector."""
    keys = ours.keys() & theirs.keys()
    floor = 1e-6 * max(float(theirs[key].double().norm()) for key in keys)
    out = {key: distance(ours[key], theirs[key], floor) for key in sorted(keys)}
    both = [torch.cat([grads[key].double().flatten() for key in sorted(keys)]) for grads in (ours, theirs)]
    return out | {"": distance(both[0], both[1])}


SCALE_NOISE = 1e-4
"""Relative error an fp32 gradient of a cosine attention's scale may have. It is one number a head, the sum of terms over
all pairs of tokens that cancel almost wholly: over perturbed copies of the recorded cases plain torch in fp32 is 1.1e-5 to
5e-5 from float64 in the mean and up to 6e-5 (5e-4 for raw targets), and up to 6e-5 with the attention itself in float64."""


def gradient_faults(
    ours: dict[str, Tensor], truth: dict[str, Tensor], recorded: dict[str, Tensor], tolerance: float
) -> dict[str, str]:
    """Tensors whose fp32 gradient is farther from the float64 one than `tolerance` and than twice the recorded run is.

    The recorded gradients are fp32 too: in single tensors they are up to 1.2e-6 (2e-5 with cosine attention) away from
    float64 themselves, so a distance to them says little below that. `truth` is our model in float64; that it stands for
    the official one in float64 is asserted beside every use of this."""
    mine, theirs = gradient_distances(ours, truth), gradient_distances(recorded, truth)

    def limit(key: str) -> float:
        return max(SCALE_NOISE if key.endswith("attn.scale") else tolerance, 2 * theirs[key], 2 * theirs[""])

    return {key: f"{mine[key]:.2e}, recorded {theirs[key]:.2e}" for key in theirs if mine[key] > limit(key)}
