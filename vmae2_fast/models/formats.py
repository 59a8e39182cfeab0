"""Reading checkpoints of other people: files, folders and Hugging Face repositories -> tensors under official names.

Pickles are read with `torch.load(weights_only=True)`, with `argparse.Namespace` (the official files keep their
command line) as the only class allowed besides torch's own: a file that asks for anything else is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ModelConfig, from_dict
from .sizes import resolve

WRAPPERS = ("model", "module", "state_dict_ema", "state_dict")
"""Keys under which the official scripts, DeepSpeed and ActionFormer (averaged weights first) keep the state dict."""
PREFIXES = ("module.", "model.", "backbone.")
FOLDER_FILES = ("weights.safetensors", "model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors under official names, and what the file says about them."""

    path: str
    state: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known of the model beyond shapes: norm_eps (inner, output), heads, decoder_heads, grid, hugging_face."""
    metadata: dict[str, str] = field(default_factory=dict)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a file, a folder or `hf:OWNER/NAME[@REV]`. Raises ValueError naming the file for anything that is not a
    readable checkpoint, and for a pickle that holds more than tensors."""
    path = fetch(str(source)[3:]) if str(source).startswith("hf:") else Path(source)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; name a run directory or a weights file (--weights)")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    else:
        state = _read_torch(path)
    state = {_strip(key): tensor for key, tensor in state.items()}
    facts = _own_facts(path, metadata)
    if any(".attention.attention." in key for key in state):
        config_file = path.with_name("config.json")
        facts = _hugging_face_facts(config_file) if config_file.is_file() else {"hugging_face": True}
        state = from_hugging_face(state)
    return Checkpoint(str(path), state, facts, metadata)


def fetch(name: str) -> Path:
    """The local folder of the Hugging Face repository `OWNER/NAME[@REV]`, downloaded once; without a network, the copy
    of an earlier run. Prints the resolved revision to stderr. Raises ValueError if huggingface_hub is not installed or
    the repository cannot be had."""
    repository, _, revision = name.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"hf:{name}: reading from the Hugging Face hub needs `pip install vmae2_fast[hub]`, "
            "or download the repository and give its folder"
        ) from error
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", "*.bin"]
    arguments = {"revision": revision or None, "allow_patterns": wanted}
    try:
        folder = snapshot_download(repository, **arguments)
    except Exception as error:  # the hub's errors and the network's have no common base
        try:
            folder = snapshot_download(repository, local_files_only=True, **arguments)
        except Exception:
            raise ValueError(f"hf:{name}: cannot be downloaded and is not in the local cache: {error}") from error
    print(f"hf:{repository}: revision {Path(folder).name}", file=sys.stderr)
    return Path(folder)


def _file_in(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth", ".pt"))
    if len(found) == 1:
        return found[0]
    if (folder / "model.safetensors.index.json").is_file():
        return folder / "model.safetensors.index.json"
    names = ", ".join(p.name for p in found) or "none"
    kinds = ", ".join(FOLDER_FILES)
    raise ValueError(f"{folder}: needs exactly one checkpoint file ({kinds}, *.safetensors, *.pth); found {names}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".safetensors.index.json"):
        return _read_shards(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's doubts about the pickle protocol: such a file is read or refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        asked = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        what = f" (it asks for {asked[1]})" if asked else ""
        # without torch's own words, also as a cause: they advise to load the file with the safety off
        raise ValueError(
            f"{path}: refused: this pickle holds more than tensors and plain values, and loading it could run "
            f"code{what}; ask for a safetensors file"
        ) from None
    except Exception as error:  # torch.load raises many types for a damaged file
        if "weights_only" in str(error):  # the tar files of torch 0.1, with the same advice
            raise ValueError(f"{path}: refused: a format torch cannot read safely; ask for a safetensors file") from None
        raise ValueError(f"{path}: not a readable checkpoint: {type(error).__name__}: {error}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise ValueError(f"{path}: holds no tensors (looked under {', '.join(WRAPPERS)} and at the top)")
    return state


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = [os.path.basename(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{index}: not an index of safetensors files (`weight_map`: tensor -> file): {reason}") from error
    state: dict[str, Tensor] = {}
    for name in shards:
        state |= _read_safetensors(index.with_name(name))[0]
    return state


def _strip(key: str) -> str:
    """A state-dict key without what compilers and wrappers put around it."""
    key = key.replace("_orig_mod.", "")
    while True:
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        if prefix is None:
            return key
        key = key[len(prefix) :]


def _own_facts(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "config" not in metadata:
        return {}
    try:
        content = json.loads(metadata["config"])
        if isinstance(content, dict) and "name" not in content:  # a temporal detector's: no facts beyond its shapes
            return {}
        config = from_dict(content, ModelConfig)
        spec = resolve(config)
    except ValueError as error:
        raise ValueError(f"{path}: its model configuration cannot be read: {error}") from error
    facts = {"norm_eps": (config.norm_eps, config.output_norm_eps), "heads": spec.encoder.heads, "grid": spec.grid}
    if spec.decoder is not None:
        facts["decoder_heads"] = spec.decoder.heads
    return facts


def _hugging_face_facts(config_file: Path) -> dict[str, Any]:
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{config_file}: not a readable configuration: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file}: not a readable configuration: must be an object, got {type(config).__name__}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{config_file}: hidden_act={config['hidden_act']!r}; these models compute gelu (erf)")
    tubelet, patch = config.get("tubelet_size", 2), config.get("patch_size", 16)
    side = config.get("image_size", 224) // patch
    return {
        # The norms in front of the heads are built without an epsilon there, so they have torch's default.
        "hugging_face": True,
        "norm_eps": (float(config.get("layer_norm_eps", 1e-12)), 1e-5),
        "heads": config.get("num_attention_heads", 12),
        "decoder_heads": config.get("decoder_num_attention_heads", 6),
        "grid": (config.get("num_frames", 16) // tubelet, side, side),
    }


_HUGGING_FACE_NAMES = (
    (r"^videomae\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^encoder\.layer\.", "encoder.blocks."),
    (r"^layernorm\.", "encoder.norm."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"^classifier\.", "head."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.([qv])_bias$", r".attn.\1_bias"),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformers `VideoMAE*` model (or its gradients) under official names: query, key and value
    packed into `attn.qkv.weight`, the encoder under `encoder.` if there is a decoder. Raises ValueError for a key bias,
    which these models do not have."""
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for pattern, replacement in _HUGGING_FACE_NAMES:
            key = re.sub(pattern, replacement, key)
        named[key] = tensor
    out: dict[str, Tensor] = {}
    for key, tensor in named.items():
        stem, _, last = key.rpartition(".attn.")
        if last == "query.weight":
            parts = [f"{stem}.attn.{part}.weight" for part in ("query", "key", "value")]
            if all(part in named for part in parts):
                out[f"{stem}.attn.qkv.weight"] = torch.cat([named[part] for part in parts])
        elif last in ("query.bias", "value.bias"):
            out[f"{stem}.attn.{last[0]}_bias"] = tensor
        elif last == "key.bias":
            if tensor.any():
                raise ValueError(f"{key}: a key bias that is not zero has no place in these models")
        elif last not in ("key.weight", "value.weight"):
            out[key] = tensor
    if not any(key.startswith("decoder.") for key in out):
        out = {key.removeprefix("encoder."): tensor for key, tensor in out.items()}
    return out
