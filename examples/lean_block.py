"""The memory-lean block in a ViT that is not ours: one line changed, fewer bytes kept from forward to backward.

    python examples/lean_block.py [--width 384] [--depth 6] [--tokens 197]

An image classifier in plain PyTorch is built twice, with its own block and with `vmae2_fast.models.Block`. Printed are the
bytes that autograd keeps of a forward under bfloat16 autocast, and how far the two agree on the same weights.
"""

import argparse
import json

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmae2_fast.models import Block as LeanBlock


class PlainBlock(nn.Module):
    """A pre-norm block the way many people write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ImageClassifier(nn.Module):
    """Somebody's ViT: tokens in, class scores out."""

    def __init__(self, block: type[nn.Module], width: int, depth: int, heads: int, classes: int = 10) -> None:
        super().__init__()
        options = {"qkv_bias": False} if block is LeanBlock else {}
        self.blocks = nn.Sequential(*(block(width, heads, **options) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def to_lean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain model under the names of the lean block."""
    parts = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    renamed = {}
    for key, value in state.items():
        names = key.split(".")
        if names[0] == "blocks":
            names[2] = parts.get(names[2], names[2])
        renamed[".".join(names)] = value
    return renamed


def kept_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Bytes of all storages that autograd keeps of a forward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    return sum(storage.nbytes() for storage in kept.values())


def compare(width: int = 384, depth: int = 6, tokens: int = 197, heads: int = 6, batch: int = 4) -> dict[str, float]:
    """Kept bytes of both models, their ratio, and the largest relative difference of scores in float32."""
    torch.manual_seed(0)
    plain = ImageClassifier(PlainBlock, width, depth, heads)
    lean = ImageClassifier(LeanBlock, width, depth, heads)
    lean.load_state_dict(to_lean(plain.state_dict()))
    x = torch.randn(batch, tokens, width)
    scores, expected = lean(x), plain(x)
    ours, theirs = kept_bytes(lean, x), kept_bytes(plain, x)
    difference = float((scores - expected).detach().abs().max() / expected.detach().abs().max())
    return {"plain_bytes": theirs, "lean_bytes": ours, "ratio": ours / theirs, "difference": difference}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 384), ("depth", 6), ("tokens", 197), ("heads", 6), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    result = compare(**vars(parser.parse_args()))
    print(f"kept for backward: plain {result['plain_bytes'] / 2**20:.1f} MiB, lean {result['lean_bytes'] / 2**20:.1f} MiB")
    print(json.dumps(result))
