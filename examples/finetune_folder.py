"""Fine-tune released weights on your own folder of labelled videos, in a training loop of your own, and export the model.

    python examples/finetune_folder.py VIDEOS vit_b_k710_dl_from_giant.pth --out actions.onnx

VIDEOS/LABEL/*.mp4, or VIDEOS/train/LABEL/*.mp4 and VIDEOS/val/LABEL/*.mp4. The weights may be official files, Hugging Face
folders or `hf:OWNER/NAME`. Without onnx installed, choose --out actions.pt2.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import vmae2_fast as vf
from vmae2_fast.config import DataConfig, SourceConfig


def finetune(
    videos: str, weights: str, out: str, *, model: str = "vit_base_patch16_224", epochs: int = 10, batch: int = 8,
    lr: float = 5e-4, stride: int = 4, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Returns {"classes", "losses", "top1", "path", "max_difference", ...}; `options` are fields of `ModelConfig`."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    split = Path(videos, "train").is_dir()
    data = DataConfig(
        sources=(SourceConfig(name="videos", root=videos),), stride=stride, sampling="dense", crop="random_resized", flip=True
    )
    size = {key: options.get(key, default) for key, default in (("frames", 16), ("size", 224))}
    with vf.VideoLoader(data, clips_per_batch=batch, **size) as loader:
        classes = loader.label_names
        net = vf.create_model(model, weights=weights, num_classes=len(classes), drop_path=0.1, **options).to(device)
        # The head is new: it learns ten times as fast as what the weights know already.
        head = [p for name, p in net.named_parameters() if name.startswith("head.")]
        trunk = [p for name, p in net.named_parameters() if not name.startswith("head.")]
        optimizer = torch.optim.AdamW([{"params": trunk}, {"params": head, "lr": 10 * lr}], lr=lr, weight_decay=0.05)
        loader.steps = max(epochs * loader.num_clips // batch, 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, loader.steps)
        losses = []
        for clips in loader:  # uint8 [B, T, H, W, 3]: the model normalises them itself
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = net(clips.clip.to(device))
            loss = F.cross_entropy(logits.float(), clips.label.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())

    net.eval()
    source = SourceConfig(name="videos", root=videos, split="val" if split else "train")
    tested = DataConfig(sources=(source,), stride=stride, sampling="dense", crop="center")
    right = []
    with torch.no_grad(), vf.EvaluationLoader(tested, segments=2, crops=3, **size) as loader:
        for video in loader:  # one decode, all views
            scores = net(video.clips.to(device)).softmax(-1).mean(0)
            right.append(int(scores.argmax()) == video.label)
    vf.save_weights(net, Path(out).with_suffix(".safetensors"), {"classes": list(classes)})
    written = vf.export_model(net, out, classes=classes)
    top1 = sum(right) / len(right)
    return {"classes": list(classes), "losses": losses, "top1": top1, "tested_on_training": not split, **written}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos")
    parser.add_argument("weights")
    parser.add_argument("--out", default="actions.pt2", help="file to export to, .pt2 or .onnx")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    print(json.dumps(finetune(**vars(parser.parse_args()))))
