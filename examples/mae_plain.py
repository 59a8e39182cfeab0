"""A video masked autoencoder: one model, one loop.

    python examples/mae_plain.py                    # plain PyTorch, the way many people write it
    python examples/mae_fused.py                    # the same with three lines changed to the ops of vmae2_fast
    python examples/mae_fused.py --videos DIR       # on your own video files instead of moving textures (needs PyAV)
    python examples/mae_compare.py                  # both in turns: how many times faster

Both print the same losses (in float32 they differ in the last digit or two) and the median time of a step.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice

import torch
from mae_data import GRID, PATCH, TUBELET, from_videos, moving_textures, tube_mask
from mae_ops import embed_visible, pixel_loss
from torch import Tensor, nn


class Mae(nn.Module):
    """Encoder over the visible tokens, decoder over all; predicts the pixels of the hidden ones."""

    def __init__(self, width: int = 192, depth: int = 4, decoder_width: int = 96) -> None:
        super().__init__()
        tokens, values = GRID[0] * GRID[1] * GRID[2], TUBELET * PATCH * PATCH * 3
        self.embed = nn.Conv3d(3, width, (TUBELET, PATCH, PATCH), stride=(TUBELET, PATCH, PATCH))
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.decoder_position = nn.Parameter(torch.randn(tokens, decoder_width) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))

        def blocks(width: int, depth: int) -> nn.Module:
            layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

        self.encoder, self.decoder = blocks(width, depth), blocks(decoder_width, 1)
        self.project, self.head = nn.Linear(width, decoder_width), nn.Linear(decoder_width, values)

    def forward(self, clip: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        x = embed_visible(clip, visible, self.embed)
        x = self.project(self.encoder(x + self.position[visible]))
        x = torch.cat([x + self.decoder_position[visible], self.mask_token + self.decoder_position[hidden]], dim=1)
        return self.head(self.decoder(x)[:, visible.shape[1] :])


def steps(batch: int, videos: str | None = None, dtype: torch.dtype = torch.float32) -> Iterator[tuple[float, float]]:
    """(loss, seconds) of one step after the other."""
    torch.manual_seed(0)
    model = Mae().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    while True:
        clip = moving_textures(batch) if videos is None else from_videos(videos, batch)
        visible, hidden = tube_mask(batch)
        begin = time.perf_counter()
        loss = pixel_loss(model(clip, visible, hidden), clip, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), time.perf_counter() - begin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--videos", help="folder of video files")
    given = parser.parse_args()
    losses, seconds = zip(*islice(steps(given.batch, given.videos), given.steps))
    print(json.dumps({"losses": losses, "median_step_ms": 1e3 * sorted(seconds)[len(seconds) // 2]}))
