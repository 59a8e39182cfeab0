"""`vmae2 COMMAND`: launch recipes, look at models and machines, use trained weights.

Flags come from function signatures and config dataclasses through tyro. Bad input prints one line and exits with 2;
with `--json` the last line on stdout is the result as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from .. import backend
from ..benchmarks import options
from ..config import load
from . import ava, classify, tad
from .data import data
from .launch import launch
from .ledger import ledger, names_a_recipe, recipe_ledger
from .parsing import FaultsFoundError, call, usage


def recipes() -> list[dict[str, str]]:
    """List the recipes with what they reproduce.

    Example: vmae2 recipes
    """
    from .. import recipes_index

    print(recipes_index.listing())
    return recipes_index.table()


def env() -> dict[str, Any]:
    """Show what is installed and which implementation of every op runs here, and why not another.

    Example: VMAE2_BACKEND=reference vmae2 env
    """
    from .. import ops  # noqa: F401  (registers the ops)

    report = backend.environment()
    print(f"python {report['python']} on {report['platform']}, {report['threads']} threads")
    print("packages: " + ", ".join(f"{k} {v or 'absent'}" for k, v in report["packages"].items()))
    if report["packages"]["apex"] is None:
        print("  apex (optional; the package of that name on the index is another project), from a checkout of NVIDIA/apex:")
        print("  APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .")
    print(f"native extension: {json.dumps(report['native']) if report['native'] else 'not built: reference and Triton only'}")
    print(f"devices: {', '.join(report['devices'])}")
    print(f"VMAE2_BACKEND={report['request']!r}")
    for op, kinds in report["ops"].items():
        for kind, where in kinds.items():
            refused = "; ".join(f"{n}: {why}" for n, why in where["refused"].items())
            because = f", because {where['because']}" if where["because"] else ""
            print(f"  {op:<22} {kind:<5} runs {where['runs']}{because}" + (f"   (not {refused})" if refused else ""))
    return report


def reconstruct(
    video: tyro.conf.Positional[str | None] = None,
    *,
    weights: str = "runs/demo/pretrain",
    model: str | None = None,
    out: str = "reconstruction",
    stride: int = 2,
    seed: int = 0,
    encoder_ratio: float = 0.9,
) -> dict[str, str]:
    """Mask a video, let a pre-training model fill it in, and write OUT.png and OUT.gif.

    Example: vmae2 reconstruct clip.mp4 --weights runs/demo/pretrain --out clip

    Args:
        video: a video file; without one, a moving scene nobody trained on.
        weights: run directory or weights file of a pre-training model.
        model: official name, where the weights file does not hold it.
        out: path of the pictures without their endings.
        stride: frames between two sampled frames.
        seed: of the mask.
        encoder_ratio: share of patches hidden from the encoder.
    """
    import torch

    from ..inference import load_model, read_views
    from ..tasks.reconstruct import reconstruct as run
    from ..tasks.reconstruct import save_gif, save_png, sheet

    loaded = load_model(weights, model, kind="pretrain").model
    frames, size = loaded.config.frames, loaded.config.size
    if video is None:
        import numpy as np

        from ..data.synthetic import render_scene

        rng = np.random.Generator(np.random.Philox(key=[2**32 + seed, 0]))
        clip = torch.from_numpy(render_scene("turn_left", rng, frames=frames, size=size, step=float(stride)))
    else:
        clip = read_views(video, frames=frames, size=size, stride=stride)[0]
    parts = run(loaded, clip, seed=seed, encoder_ratio=encoder_ratio)
    scale = max(1, 192 // size)
    target = Path(out)
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder for the pictures; make it or choose another --out")
    paths = {"png": f"{out}.png", "gif": f"{out}.gif"}
    save_png(sheet([parts], scale=scale), paths["png"])
    save_gif(parts, paths["gif"], scale=scale)
    print(f"wrote {paths['png']} and {paths['gif']}")
    return paths


def convert(source: tyro.conf.Positional[str], target: tyro.conf.Positional[str]) -> dict[str, Any]:
    """Rewrite a checkpoint under official names, bit for bit.

    Example: vmae2 convert vit_b_k710.pth vit_b_k710.safetensors

    Args:
        source: an official, Hugging Face or own file, or `hf:OWNER/NAME[@REV]`.
        target: a path ending in .safetensors, .pth or .pt.
    """
    from ..models import convert_weights

    written = convert_weights(source, target)
    print(f"wrote {target}: {written['tensors']} tensors, {written['parameters']:,} parameters")
    return written


def report(runs: tyro.conf.Positional[tuple[str, ...]] = ("runs/demo",), *, out: str | None = None) -> dict[str, Any]:
    """Write one HTML page about a run, about two runs side by side, or about a progression.

    Works while a run goes on and after it was killed. Of a progression that has finished it writes summary, pictures and
    report again; of one that has not, the page of every stage that has begun.

    Example: vmae2 report runs/vit_base_hybrid
    Example: vmae2 report runs/lr3e-4 runs/lr6e-4 --out lr.html

    Args:
        runs: a run directory or two, or the folder of a progression.
        out: the page; default report.html in the run, compared-with-NAME.html in the first of two.
    """
    from .. import run_report
    from ..pages import missing
    from ..report import write_report
    from ..train.progression import PLAN, finished

    if not 1 <= len(runs) <= 2:
        raise ValueError(f"name one or two run directories, not {len(runs)}")
    plan = Path(runs[0]) / PLAN
    if len(runs) == 2 or not plan.is_file():
        result = run_report.write_run_report(runs, out)
        print(f"wrote {result['report']}")
        return result
    if out is not None:
        raise ValueError(f"--out is for the page of runs; {runs[0]} is a progression, whose report lies in its folder")
    run = dataclasses.replace(load(plan), out=runs[0])
    if not all((Path(runs[0]) / stage.name / "done.json").exists() for stage in run.stages):
        result = run_report.write_stage_reports(runs[0])
        print("the progression has not finished; wrote " + ", ".join(result["reports"]))
        return result
    summary = write_report(run, finished(run))
    if missing():
        raise ValueError(f"the report needs {', '.join(missing())}: pip install 'vmae2_fast[report]'")
    print(f"wrote {Path(runs[0]) / 'report.html'}")
    return summary


def bench(suite: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[options.Suite]]) -> dict[str, Any]:
    """Measure ours beside the honest alternatives: single ops or whole pre-training steps in turns, or the bytes a step keeps.

    Example: vmae2 bench ops --only gather_vit_b masks
    Example: vmae2 bench step --model vit_base --batch 2 --json
    Example: vmae2 bench memory
    """
    result, table = suite.run()
    print(table)
    return result


GROUPS: dict[str, dict[str, Callable[..., Any]]] = {
    group: {**ava.COMMANDS.get(group, {}), **tad.COMMANDS.get(group, {})}
    for group in (*ava.COMMANDS, *tad.COMMANDS)
}
"""Commands of two words: `vmae2 score ava`."""

COMMANDS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (recipes, env, reconstruct, *classify.COMMANDS, ledger, convert, report, bench)
}


_WITH_OWN_FLAGS: dict[str, Callable[[list[str]], Any]] = {"launch": launch, "data": data}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `vmae2`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        result = _dispatch(arguments)
    except KeyboardInterrupt:
        print("vmae2: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if not _expected(error):
            raise
        print(f"vmae2: error: {error}", file=sys.stderr)
        if as_json:
            found = error.result if isinstance(error, FaultsFoundError) else {}
            _print_json({**found, "error": str(error)})
        sys.exit(2)
    if as_json:
        _print_json(result)


def _print_json(result: Any) -> None:
    if int(os.environ.get("RANK", 0)) == 0:  # one line, however many processes ran
        print(json.dumps(result), flush=True)


def _dispatch(arguments: list[str]) -> Any:
    if arguments and arguments[0] in _WITH_OWN_FLAGS:
        return _WITH_OWN_FLAGS[arguments[0]](arguments[1:])
    arguments = [a for a in arguments if a != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return {}
    from ..config import unknown

    if arguments[0] == "ledger" and names_a_recipe(arguments[1:]):
        return recipe_ledger(arguments[1:])
    name, known = arguments[0], COMMANDS
    if name in GROUPS and (name not in COMMANDS or (arguments[1:2] and arguments[1] in GROUPS[name])):
        _, *arguments = arguments
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage(f"vmae2 {name} COMMAND [--help] [--json] ...", f"The steps of {name}.", GROUPS[name]))
            return {}
        known, name = {f"{name} {what}": command for what, command in GROUPS[name].items()}, f"{name} {arguments[0]}"
    if name not in known:
        there = [*_WITH_OWN_FLAGS, *COMMANDS, *GROUPS] if known is COMMANDS else list(known)
        raise ValueError(unknown("command", name, there))
    return call(known[name], arguments[1:], f"vmae2 {name}")


def _usage() -> str:
    grouped = {f"{group} {what}": command for group, members in GROUPS.items() for what, command in members.items()}
    commands = {**_WITH_OWN_FLAGS, **COMMANDS, **grouped}
    return usage("vmae2 COMMAND [--help] [--json] ...", __doc__.split("\n")[0], commands)


def _expected(error: BaseException) -> bool:
    """Bad input and a full or read-only disk, as against a bug: that keeps its traceback."""
    from ..data.loader import BadDataError
    from ..data.probing import DecodeError

    return isinstance(error, (ValueError, OSError, BadDataError, DecodeError, backend.BackendError))
