"""What a progression leaves for people: summary.json, loss curves, reconstructions, and one self-contained report.html.

Everything is drawn from the run directories, so `vmae2 report OUT` makes it again at any time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from . import backend
from .config import ClassifyConfig, DistillConfig, PretrainConfig, Progression, Stage
from .pages import embedded, missing, write_page
from .pictures import confusion_picture, pyplot
from .train.log import read_lines
from .train.progression import resolved
from .whole import write_json

_CLIPS_SHOWN = 6
_ROWS = "(rows: original, what the encoder saw, what the decoder predicted, and for comparison the patch means alone)"


def write_report(progression: Progression, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Evaluate what only the whole progression can tell, write summary, pictures and report; returns the summary.

    Without the extra `report` (matplotlib, Jinja2, Pillow) only `summary.json` is written, see `pages.missing`.
    """
    out = Path(progression.out)
    summary = summarise(progression, results)
    write_summary(summary, out)
    if missing():
        return summary
    pictures = {"Loss": _curves(progression, out)}
    for stage in progression.stages:
        if isinstance(stage, PretrainConfig) and stage.name in results:
            pictures |= _reconstructions(resolved(stage, out), out, _judged(summary))  # type: ignore[arg-type]
    if summary.get("finetune", {}).get("confusion"):
        pictures[f"Confusion on {_judged(summary)} (rows: true class)"] = _confusion(summary["finetune"], out)
    _html(summary, pictures, out)
    return summary


def summarise(progression: Progression, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Stage summaries as nested keys, with the test of the fine-tuned model on shuffled frames beside the plain one."""
    out = Path(progression.out)
    environment = backend.environment()
    summary: dict[str, Any] = {
        "name": progression.name,
        "data": results["data"],
        "versions": {k: v for k, v in environment["packages"].items() if v} | {"python": environment["python"]},
        "backend": {op: {kind: where["runs"] for kind, where in kinds.items()} for op, kinds in environment["ops"].items()},
        "threads": environment["threads"],
    }
    for stage in progression.stages:
        if stage.name not in results:
            continue
        flat = dict(results[stage.name])
        flat = {**(flat.pop("validation", None) or {}), **flat}
        if isinstance(stage, ClassifyConfig | DistillConfig):
            summary["chance"] = 1.0 / stage.model.num_classes
        if stage.name == "finetune" and "top1" in flat:
            flat["top1_shuffled"] = _shuffled_top1(resolved(stage, out))
        summary[stage.name] = flat
    summary["replaced_clips"] = {
        path: f"replaced {times} times in {name}"
        for name in results
        if name != "data"
        for path, times in results[name].get("replaced", {}).items()
    }
    summary["seconds"] = round(sum(r.get("seconds", 0.0) for n, r in results.items() if n != "data"), 1)
    return summary


def write_summary(summary: dict[str, Any], out: Path) -> None:
    write_json(out / "summary.json", summary, indent=2)


def _shuffled_top1(stage: Stage) -> float:
    """Top-1 of a finished stage when the frames of every test clip are shuffled: what single frames give away."""
    from .models.weights import load_weights
    from .tasks import create_task

    task: Any = create_task(dataclasses.replace(stage, init=None))
    load_weights(task.model, Path(stage.out) / stage.name / "weights.safetensors")
    return float(task.evaluate(task.validation_views(), shuffled=True)["top1"])


def _metrics(stage: Stage, out: Path) -> list[dict[str, Any]]:
    return read_lines(out / stage.name / "metrics.jsonl")


def _curves(progression: Progression, out: Path) -> Path:
    """Training loss of every stage over its steps, one panel each."""
    plt = pyplot()
    stages = [s for s in progression.stages if _metrics(s, out)]
    figure, panels = plt.subplots(1, max(1, len(stages)), figsize=(3.2 * max(1, len(stages)), 2.8), squeeze=False)
    for panel, stage in zip(panels[0], stages):
        lines = [m for m in _metrics(stage, out) if "loss" in m and "step" in m and "lr" in m]
        panel.plot([m["step"] for m in lines], [m["loss"] for m in lines], linewidth=1.2)
        panel.set_title(stage.name.replace("_", "-"), fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("training loss", fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)
    return out / "curves.png"


def _reconstructions(stage: PretrainConfig, out: Path, judged: str) -> dict[str, Path]:
    from .data.evaluation_loader import EvaluationLoader
    from .models import build_model
    from .models.weights import load_weights
    from .tasks.reconstruct import reconstruct, save_gif, save_png, sheet

    if stage.validation is None:
        return {}
    model: Any = build_model(stage.model)
    load_weights(model, Path(stage.out) / stage.name / "weights.safetensors")
    parts = []
    for video in EvaluationLoader(stage.validation, frames=stage.model.frames, size=stage.model.size, segments=1, crops=1):
        clip = video.clips[0].cpu()  # where the weights are
        parts.append(reconstruct(model, clip, seed=video.index, encoder_ratio=stage.mask.encoder_ratio))
        if len(parts) == _CLIPS_SHOWN:
            break
    png, gif = out / "reconstructions.png", out / "reconstruction.gif"
    scale = max(1, 96 // stage.model.size)
    save_png(sheet(parts, scale=scale), png)
    save_gif(parts[0], gif, scale=2 * scale)
    return {
        f"Reconstruction of {judged} {_ROWS}": png,
        "The first of them in motion": gif,
    }


def _confusion(metrics: dict[str, Any], out: Path) -> Path:
    matrix = metrics["confusion"]
    return confusion_picture(matrix, metrics.get("classes") or [str(i) for i in range(len(matrix))], out / "confusion.png")


def _html(summary: dict[str, Any], pictures: dict[str, Path], out: Path) -> None:
    write_page(
        out / "report.html", "report.html.j2", summary=summary, findings=findings(summary), num=_number, pct=_percent,
        pictures=[(title, embedded(path)) for title, path in pictures.items()],
        problems=[*summary["data"].get("skipped", {}).items(), *summary["replaced_clips"].items()],
        stages=[(k, v) for k, v in summary.items() if isinstance(v, dict) and "first_loss" in v],
    )  # fmt: skip


def _judged(summary: dict[str, Any]) -> str:
    return "the clips it was trained on" if summary["data"].get("train_is_test") else "clips not trained on"


def findings(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures worth reading, as (what, value)."""
    rows = []
    judged = _judged(summary)
    pretrain, finetune = summary.get("pretrain", {}), summary.get("finetune", {})
    scratch, distill = summary.get("scratch", {}), summary.get("distill", {})
    if "ratio_to_zero_predictor" in pretrain:
        rows.append(
            (
                f"Pre-training loss on {judged}, as a share of predicting zero",
                _number(pretrain["ratio_to_zero_predictor"]),
            )
        )
        rows.append(("... as a share of copying the nearest visible patch", _number(pretrain["ratio_to_copy_nearest"])))
    if "top1" in finetune:
        rows += [
            ("Chance", _percent(summary["chance"])),
            (f"Progressive training, top-1 on {judged}", _percent(finetune["top1"])),
            ("... with the frames of each clip shuffled", _percent(finetune["top1_shuffled"])),
        ]
    if "top1" in scratch:
        rows.append(("From scratch, same model, same number of labelled steps", _percent(scratch["top1"])))
    if "agreement" in distill:
        rows.append(("Distilled student: top-1", _percent(distill["top1"])))
        rows.append(("... agreement with its teacher", _percent(distill["agreement"])))
    return rows


def _number(value: Any, digits: int = 3) -> str:
    return "" if value is None or isinstance(value, str) else f"{value:.{digits}f}"


def _percent(value: Any) -> str:
    return "" if value is None or isinstance(value, str) else f"{100 * value:.1f} %"
