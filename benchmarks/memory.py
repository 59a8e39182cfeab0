"""Bytes a training step keeps for its backward, a clip: ours beside the official way in fp32 eager (`vmae2 bench memory`).

Counted, not timed: models of real size under FakeTensorMode, every distinct storage that autograd saves, less parameters and
buffers. No memory is allocated, so any machine counts ViT-g in seconds. Plain materialises the attention matrix and keeps what
torch's modules keep; where it selects tokens by boolean masks, whose sizes fake tensors do not know, index lists of the same
length stand for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vmae2_fast.config import ModelConfig
from vmae2_fast.models import build_model
from vmae2_fast.models.sizes import resolve
from vmae2_fast.ops.masks import dual_mask, mask_sizes
from vmae2_fast.ops.reconstruction import reconstruction_loss
from vmae2_fast.train.ledger import ledger, saved_bytes

from . import baselines

CLASSES = 710  # of the label-mixed K710 that ViT-g is fine-tuned on
VARIANTS: dict[str, dict[str, Any]] = {
    "ours bf16, fp32 residual": {"residual_dtype": "float32"},
    "ours bf16, bf16 residual": {"residual_dtype": "bfloat16"},
    "ours bf16, bf16 residual, checkpointed MLP": {"residual_dtype": "bfloat16", "activation_checkpoint": "mlp"},
    "ours bf16, bf16 residual, checkpointed block": {"residual_dtype": "bfloat16", "activation_checkpoint": "block"},
}


def ours(config: ModelConfig) -> tuple[Callable[[], Tensor], nn.Module]:
    """A training forward of our model under bf16 autocast on one clip, and the model."""
    model: Any = build_model(config).train()
    spec = model.spec

    def run() -> Tensor:
        clip = torch.zeros(1, spec.frames, spec.size, spec.size, spec.channels, dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16):
            if spec.decoder is None:
                return model(clip)
            position = torch.arange(1)
            mask = dual_mask(position, torch.zeros_like(position), grid=spec.grid, seed=0)
            loss = reconstruction_loss(
                model(clip, mask), clip, mask.loss_index, patch=spec.patch, tubelet=spec.tubelet, reduction="sum"
            )
            return loss[0]

    return run, model


def plain(config: ModelConfig) -> tuple[Callable[[], Tensor], nn.Module]:
    """The same of the official way in fp32."""
    spec = resolve(config)

    def video() -> Tensor:
        return torch.zeros(1, spec.channels, spec.frames, spec.size, spec.size)

    if spec.decoder is None:
        classifier = baselines.PlainClassifier(config)
        return lambda: classifier(video()), classifier
    model = baselines.Plain(config)
    visible, decoded, _ = mask_sizes(spec.grid)

    def take(x: Tensor, count: int) -> Tensor:
        return x[:, torch.zeros(count, dtype=torch.int64)]

    def run() -> Tensor:
        x = take(model.encoder.patch_embed(video()) + model.enc_positions, visible)
        x = model.encoder_to_decoder(model.encoder.norm(model.encoder.run(x, False)))
        x = torch.cat([x + take(model.dec_positions, visible), model.mask_token + take(model.dec_positions, decoded)], dim=1)
        pred = model.decoder.head(model.decoder.norm(model.decoder.run(x, False)[:, visible:]))
        return F.mse_loss(pred, torch.zeros_like(pred))

    return run, model


def bench_memory(models: tuple[str, ...]) -> dict[str, Any]:
    """Saved bytes a clip of each official model name and variant, as shares of plain's; `ledger` is what the ledger says.

    Raises ValueError for an unknown name, RuntimeError where a count differs from the ledger.
    """
    rows: list[dict[str, Any]] = []
    for name in models:
        base = ModelConfig(name=name, num_classes=0 if name.startswith("pretrain") else CLASSES)
        with FakeTensorMode(allow_non_fake_inputs=True):
            reference = saved_bytes(*plain(base))
            rows.append({"model": name, "variant": "plain fp32", "bytes": reference, "share": 1.0})
            for variant, options in VARIANTS.items():
                config = ModelConfig(name=name, num_classes=base.num_classes, **options)
                counted, predicted = saved_bytes(*ours(config)), ledger(config)["activation_bytes"]["total"]
                if counted != predicted:
                    raise RuntimeError(f"{name}, {variant}: autograd keeps {counted} bytes, the ledger says {predicted}")
                rows.append({"model": name, "variant": variant, "bytes": counted, "share": counted / reference})
    return {"kind": "memory", "torch": torch.__version__, "clip": "16x224x224, patches and masks of the paper", "rows": rows}
