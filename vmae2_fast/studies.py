"""Small studies of what the paper claims, on generated video that two CPU cores can learn: `vmae2 study`.

progressive   from scratch, pre-train -> fine-tune, pre-train -> post-pre-train -> fine-tune (section 4.2), and fine-tuning
              on few labels each time
masking       encoder-only against dual masking, decoder masks none, frame, random, running cell (section 4.1)
scaling       three widths x three sizes of the pre-training set

Each is run for several seeds, data and model drawn anew, and written as a table of means and spread with a picture. The
scenes are harder than the demo's: shaking camera, four discs that mean nothing, few labelled clips of the target classes.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from . import backend
from .config import (
    ClassifyConfig,
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    SourceConfig,
    Stage,
    TrainConfig,
    ViewsConfig,
    require,
)
from .data.synthetic import CLASSES, TARGET_CLASSES, SceneSet, write_moving_scenes
from .models.weights import write_whole
from .train.ledger import ledger
from .train.loop import train
from .train.progression import resolved

_CLIP: dict[str, Any] = {"frames": 8, "size": 48, "patch": 8, "init_std": 0.1, "head_init_scale": 1.0}


class Row(NamedTuple):
    """One line of a table: stages whose weights are handed on, and what is read off their summaries."""

    name: str
    stages: tuple[Stage, ...]
    read: Callable[[dict[str, dict[str, Any]]], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lengths:
    """Epochs; `short` keeps a study to seconds, to see it run."""

    pretrain: int = 40
    post_pretrain: int = 15
    finetune: int = 80
    scratch: int = 200


def study(
    name: Literal["progressive", "masking", "scaling"],
    out: str | Path,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    short: bool = False,
) -> dict[str, Any]:
    """Run a study and write `out`/table.json, table.md and, with matplotlib, table.png; returns the table.

    Finished stages are not run again, so a study that was stopped is simply started again; runs lie in `out`/seed-N.
    Raises ValueError for no seeds, or an `out` that holds other scenes.
    """
    require(bool(seeds) and len(set(seeds)) == len(seeds), f"study: needs different seeds, got {list(seeds)}")
    out = Path(out)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        folder = out / f"seed-{seed}"
        _write_scenes(folder, seed, short)
        lengths = _Lengths(pretrain=2, post_pretrain=1, finetune=2, scratch=2) if short else _Lengths()
        rows = {"progressive": progressive, "masking": masking, "scaling": scaling}[name](folder, seed, lengths)
        done: dict[str, dict[str, Any]] = {}
        for row in rows:
            for stage in row.stages:
                if stage.name not in done:
                    print(f"seed {seed}: {stage.name}", flush=True)
                    done[stage.name] = train(resolved(stage, folder))
            found.setdefault(row.name, []).append(row.read({stage.name: done[stage.name] for stage in row.stages}))
    table = {
        "study": name,
        "command": f"vmae2 study {name} --seeds {' '.join(map(str, seeds))}" + (" --short" if short else ""),
        "seeds": list(seeds),
        "short": short,
        "versions": {key: value for key, value in backend.environment()["packages"].items() if value},
        "threads": torch.get_num_threads(),
        "rows": [{"name": row, "runs": runs, **_summary(runs)} for row, runs in found.items()],
    }
    write_whole(out / "table.json", lambda path: path.write_text(json.dumps(table, indent=2) + "\n"))
    write_whole(out / "table.md", lambda path: path.write_text(markdown(table)))
    _picture(table, out / "table.png")
    return table


def _summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    columns = {key: [run[key] for run in runs] for key in runs[0]}
    return {
        "mean": {key: statistics.fmean(values) for key, values in columns.items()},
        "spread": {key: max(values) - min(values) for key, values in columns.items()},
    }


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown: mean and, in brackets, lowest to highest of the seeds."""
    columns = list(table["rows"][0]["mean"])
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in table["rows"]:
        cells = []
        for key in columns:
            values = [run[key] for run in row["runs"]]
            cells.append(f"{row['mean'][key]:.4g} ({min(values):.4g} to {max(values):.4g})")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{table['command']}`, {len(table['seeds'])} seeds: mean (lowest to highest).", ""])


def progressive(out: Path, seed: int, lengths: _Lengths) -> list[Row]:
    """Top-1 on unseen clips of the target classes, each with the same few labels."""
    pretrain = _pretrain(out, seed, lengths, "pretrain")
    post = _classify(
        out, seed, "post_pretrain", len(CLASSES), ("labeled_video", "labeled_frames"), "labeled_video", lengths.post_pretrain,
        init="stage:pretrain",
    )  # fmt: skip

    def finetune(name: str, init: str | None, epochs: int) -> ClassifyConfig:
        return _classify(out, seed, name, len(TARGET_CLASSES), ("target",), "target", epochs, init=init)

    def row(name: str, *stages: Stage) -> Row:
        return Row(name, stages, lambda done: {"top1": done[stages[-1].name]["validation"]["top1"]})

    return [
        row("from scratch", finetune("scratch", None, lengths.scratch)),
        row("pre-train, fine-tune", pretrain, finetune("finetune_direct", "stage:pretrain", lengths.finetune)),
        row(
            "pre-train, post-pre-train, fine-tune", pretrain, post,
            finetune("finetune_progressive", "stage:post_pretrain", lengths.finetune),
        ),
    ]  # fmt: skip


def masking(out: Path, seed: int, lengths: _Lengths) -> list[Row]:
    """Decoder masks: fine-tuned top-1, clips a second of pre-training, and decoder tokens and activation bytes of a clip."""
    rows = []
    for decoder in ("none", "frame", "random", "running_cell"):
        mask = MaskConfig(decoder=decoder)
        pretrain = _pretrain(out, seed, lengths, f"pretrain_{decoder}", mask=mask)
        finetune = _classify(
            out, seed, f"finetune_{decoder}", len(TARGET_CLASSES), ("target",), "target", lengths.finetune,
            init=f"stage:{pretrain.name}",
        )  # fmt: skip
        account = ledger(pretrain.model, mask, precision="float32")
        fixed = {
            "decoder tokens": float(account["tokens"]["sequence"]),
            "activation KiB": account["activation_bytes"]["total"] / 1024,
        }

        def read(
            done: dict[str, dict[str, Any]], first: str = pretrain.name, last: str = finetune.name,
            fixed: dict[str, float] = fixed,
        ) -> dict[str, float]:  # fmt: skip
            return {"top1": done[last]["validation"]["top1"], "clips/s": done[first]["clips_per_s"], **fixed}

        title = "encoder only" if decoder == "none" else f"dual, {decoder.replace('_', ' ')}"
        rows.append(Row(title, (pretrain, finetune), read))
    return rows


def scaling(out: Path, seed: int, lengths: _Lengths) -> list[Row]:
    """Widths x sizes of the pre-training set, the same number of steps: loss on unseen clips and fine-tuned top-1."""
    rows = []
    listed = (out / "data" / "unlabeled_video" / "train.csv").read_text().splitlines()
    for width in (32, 64, 96):
        for share in (4, 2, 1):
            clips = max(len(listed) // share, 1)
            subset = out / "data" / "unlabeled_video" / f"first_{clips}.csv"
            write_whole(subset, lambda path, clips=clips: path.write_text("\n".join(listed[:clips]) + "\n"))  # type: ignore[misc]
            name = f"{width}_{clips}"
            source = SourceConfig(name="subset", root=str(subset.parent), list=subset.name, stride=2)
            pretrain = _pretrain(out, seed, lengths, f"pretrain_{name}", width=width, sources=(source,), repeat=share)
            finetune = _classify(
                out, seed, f"finetune_{name}", len(TARGET_CLASSES), ("target",), "target", lengths.finetune,
                init=f"stage:{pretrain.name}", width=width,
            )  # fmt: skip

            def read(
                done: dict[str, dict[str, Any]], first: str = pretrain.name, last: str = finetune.name
            ) -> dict[str, float]:
                before, after = done[first]["validation"], done[last]["validation"]
                return {"loss / zero predictor": before["ratio_to_zero_predictor"], "top1": after["top1"]}

            rows.append(Row(f"width {width}, {clips} clips", (pretrain, finetune), read))
    return rows


def _write_scenes(folder: Path, seed: int, short: bool) -> None:
    scenes = SceneSet(distractors=4, shake=0.03, target_train=4, target_val=30, seed=seed)
    if short:
        scenes = dataclasses.replace(
            scenes, unlabeled_video=16, unlabeled_frames=4, labeled_video=1, labeled_frames=1, target_train=2, target_val=1,
            labeled_val=1, holdout=2,
        )  # fmt: skip
    try:
        write_moving_scenes(folder / "data", scenes)
    except FileExistsError as error:
        raise ValueError(f"{error}; a study keeps its scenes in its own --out") from error


def _data(out: Path, *sources: str, split: str = "train", sampling: Any = "dense", views: int = 1) -> DataConfig:
    return DataConfig(
        sources=tuple(SourceConfig(name=name, split=split) for name in sources),
        datasets=str(out / "data" / "datasets.toml"), sampling=sampling, views=views, cache_mb=512,
    )  # fmt: skip


def _pretrain(
    out: Path, seed: int, lengths: _Lengths, name: str, *, mask: MaskConfig | None = None, width: int = 64,
    sources: tuple[SourceConfig, ...] = (), repeat: int = 1,
) -> PretrainConfig:  # fmt: skip
    data = _data(out, "unlabeled_video", "unlabeled_frames", sampling="pretrain", views=2)
    return PretrainConfig(
        name=name, out=str(out), seed=seed, mask=mask or MaskConfig(),
        model=ModelConfig(
            name="pretrain_videomae_small_patch16_224", width=width, depth=2, heads=2, decoder_width=96, decoder_depth=2,
            decoder_heads=2, **_CLIP,
        ),
        data=dataclasses.replace(data, sources=sources) if sources else data,
        validation=_data(out, "holdout", split="val", sampling="pretrain"),
        optim=OptimConfig(lr=2e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=2.0 * repeat),
        train=TrainConfig(epochs=lengths.pretrain * repeat, global_batch=16, threads=1, checkpoint_every=500),
    )  # fmt: skip


def _classify(
    out: Path, seed: int, name: str, classes: int, sources: tuple[str, ...], tested: str, epochs: int, *, init: str | None,
    width: int = 64,
) -> ClassifyConfig:  # fmt: skip
    return ClassifyConfig(
        name=name, out=str(out), seed=seed, init=init,
        model=ModelConfig(name="vit_small_patch16_224", num_classes=classes, width=width, depth=2, heads=2, **_CLIP),
        data=_data(out, *sources), validation=_data(out, tested, split="val"),
        optim=OptimConfig(
            lr=2e-3 if init is None else 1e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=min(2.0, epochs / 2), betas=(0.9, 0.999)
        ),
        train=TrainConfig(epochs=epochs, global_batch=8, threads=1, checkpoint_every=500),
        views=ViewsConfig(segments=2, crops=1),
    )  # fmt: skip


def _picture(table: dict[str, Any], path: Path) -> None:
    from .pictures import installed, pyplot

    if not installed():
        return
    plt = pyplot()
    columns = list(table["rows"][0]["mean"])
    names = [row["name"] for row in table["rows"]]
    figure, panels = plt.subplots(1, len(columns), figsize=(2 + 3 * len(columns), 1 + 0.35 * len(names)), squeeze=False)
    for panel, key in zip(panels[0], columns):
        panel.barh(names, [row["mean"][key] for row in table["rows"]], color="tab:blue", alpha=0.6)
        for place, row in enumerate(table["rows"]):
            panel.plot([run[key] for run in row["runs"]], [place] * len(row["runs"]), "k.", markersize=5)
        panel.set_title(key, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.invert_yaxis()
        if panel is not panels[0][0]:
            panel.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
