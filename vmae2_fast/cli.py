"""`vmae2 COMMAND`: launch recipes, look at models and machines, use trained weights.

Flags come from function signatures and config dataclasses through tyro. Bad input prints one line and exits with 2;
with `--json` the last line on stdout is the result as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import __version__, backend, cli_ava, cli_classify, cli_data, cli_tad
from .benchmarks import options
from .config import MaskConfig, ModelConfig, Progression, load

_DUAL = MaskConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What `launch` takes beside the recipe's own arguments and values."""

    start: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """First stage of a progression to run."""
    until: str | None = None
    """Last stage of a progression to run."""
    weights: Annotated[str | None, tyro.conf.arg(name="init-weights")] = None
    """Weights the first stage starts from, instead of its own `init`."""
    smoke: bool = False
    """Shrink the recipe to CPU seconds: small model, small clips, few moving scenes, one epoch."""
    restart: bool = False
    """Run the named stages from their start, in place of what is there."""
    dry_run: bool = False
    """Print the plan and stop."""
    check: bool = False
    """Read the lists, train three steps of every stage, write and read their checkpoint, and stop."""
    gpus: int | None = None
    """Processes on this machine, one on each GPU (without GPUs: on the CPU); default all visible GPUs. Under torchrun or
    srun the processes that are there join."""
    restarts: int = 0
    """Times the processes are started again from the last checkpoint when one of them fails."""
    json: bool = False
    """Print the summary as the last line on stdout."""


def launch(arguments: list[str]) -> dict[str, Any]:
    """Run a recipe: one stage or a whole progression.

    Example: vmae2 launch demo:progressive --out runs/demo
    Example: vmae2 launch pretrain:vit_base_hybrid --optim.lr 3e-4 --train.global-batch 256
    """
    from . import recipes_index

    if not arguments or arguments[0].startswith("-"):
        print(launch.__doc__)
        print("Recipes:\n" + recipes_index.listing())
        parse(LaunchOptions, ["--help"], "vmae2 launch RECIPE")
    return _run(*recipes_index.with_options(arguments, LaunchOptions, "vmae2 launch", parse), arguments)


def parse(target: Any, arguments: list[str], prog: str, **options: Any) -> Any:
    """tyro's parser, its help as it is, its errors as one ValueError line."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return tyro.cli(target, args=arguments, prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:
            print(out.getvalue())
            raise
        raise ValueError(_one_line(out.getvalue())) from None


def _one_line(box: str) -> str:
    """The message of tyro's error box: its first part, then the flags it offers instead."""
    lines = [re.sub(r"[-─]{4,}", "", line.strip("│|╭╮╰╯+ ")).strip() for line in box.splitlines()]
    text = re.split("For full helptext|Argument helptext", " ".join(line for line in lines[1:] if line))[0]
    head, offers, rest = text.partition("Perhaps you meant:")
    flags = list(dict.fromkeys(re.findall(r"--[\w.\-]+", rest)))
    return head.strip() + (f"; did you mean {' or '.join(flags[:3])}?" if offers and flags else "")


def _spread(options: LaunchOptions, arguments: list[str]) -> None:
    """Become `torch.distributed.run` of the same command with one process a GPU; returns where one process is enough."""
    import torch

    from .train.parallel import placement

    wanted = torch.cuda.device_count() if options.gpus is None else options.gpus
    present = torch.cuda.device_count()
    if options.gpus is not None and (wanted < 1 or (present and wanted > present)):
        raise ValueError(f"--gpus {wanted}: must be at least 1 and at most {present or 'the cores'} here")
    if options.restarts < 0:
        raise ValueError(f"--restarts {options.restarts}: must be at least 0")
    if placement().size > 1 or "TORCHELASTIC_RUN_ID" in os.environ or (wanted <= 1 and not options.restarts):
        return
    # c10d rendezvous: with a static one a restart after a crash does not come together again.
    agent = ["--nnodes=1", f"--nproc-per-node={max(wanted, 1)}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    agent += [f"--max-restarts={options.restarts}", "--module", "vmae2_fast", "launch"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *agent, *arguments])


def _run(run: Any, options: LaunchOptions, arguments: list[str]) -> dict[str, Any]:
    from .report import missing
    from .train.loop import split_batch
    from .train.parallel import leave, placement
    from .train.progression import check_stage, describe, selected, smoke

    if options.smoke:
        run = smoke(run)
    if isinstance(run, Progression) and missing():
        print(
            f"no pictures and no report: {', '.join(missing())} not installed (pip install 'vmae2_fast[report]')",
            file=sys.stderr,
        )
    stages = selected(run, options.start, options.until) if isinstance(run, Progression) else [run]
    for stage in stages:
        check_stage(stage)
    plan = describe(dataclasses.replace(run, stages=tuple(stages)) if isinstance(run, Progression) else run)
    built = backend.native() is not None
    kernels = "with native kernels" if built else "WITHOUT native kernels (not built): reference implementations, slower"
    print(f"vmae2_fast {__version__} {kernels}; `vmae2 env` tells more", file=sys.stderr)
    world = placement()
    if world.first:
        for line in plan:
            print(line, file=sys.stderr)
    if options.dry_run:
        return {"plan": plan}
    _spread(options, arguments)
    for stage in stages:
        split_batch(stage, world.size)
    try:
        return _check(run, options, stages) if options.check else _train(run, options, stages)
    finally:
        leave()


def _check(run: Any, options: LaunchOptions, stages: list[Any]) -> dict[str, Any]:
    from .train.parallel import join
    from .train.preflight import lines, preflight, standing_alone
    from .train.progression import prepare

    world, _ = join()
    if isinstance(run, Progression):
        world.on_first(lambda: prepare(run))
        stages = [dataclasses.replace(standing_alone(stage), out=run.out) for stage in stages]
    if options.weights:
        stages = [dataclasses.replace(stages[0], init=options.weights), *stages[1:]]
    results = []
    for stage in stages:
        results.append(preflight(stage))
        if world.first:
            print("\n".join(lines(results[-1])), file=sys.stderr)
    return {"check": results}


def _train(run: Any, options: LaunchOptions, stages: list[Any]) -> dict[str, Any]:
    from .report import missing, summarise, write_report, write_summary
    from .train.loop import train
    from .train.parallel import placement
    from .train.progression import run_progression

    first = placement().first
    if not isinstance(run, Progression):
        return train(run, init=options.weights, resume=not options.restart)
    results = run_progression(run, start=options.start, until=options.until, init=options.weights, resume=not options.restart)
    if not first:
        return {}
    if len(stages) < len(run.stages):
        summary = summarise(run, results)
        write_summary(summary, Path(run.out))
        return summary
    summary = write_report(run, results)
    if not missing():
        print(f"report: {Path(run.out) / 'report.html'}", file=sys.stderr)
    return summary


def recipes() -> list[dict[str, str]]:
    """List the recipes with what they reproduce.

    Example: vmae2 recipes
    """
    from . import recipes_index

    print(recipes_index.listing())
    return recipes_index.table()


def env() -> dict[str, Any]:
    """Show what is installed and which implementation of every op runs here, and why not another.

    Example: VMAE2_BACKEND=reference vmae2 env
    """
    from . import ops  # noqa: F401  (registers the ops)

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

    from .inference import load_model, read_views
    from .reconstruct import reconstruct as run
    from .reconstruct import save_gif, save_png, sheet

    loaded = load_model(weights, model, kind="pretrain").model
    frames, size = loaded.config.frames, loaded.config.size
    if video is None:
        import numpy as np

        from .data.synthetic import render_scene

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


def ledger(
    model: tyro.conf.Positional[str],
    *,
    frames: int = 16,
    size: int = 224,
    num_classes: int = 0,
    views: int = 1,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    residual_dtype: Literal["float32", "bfloat16"] = "float32",
    activation_checkpoint: Literal["none", "mlp", "block"] = "none",
    layer_scale: float = 0.0,
    drop_path: float = 0.0,
    mask: MaskConfig = _DUAL,
) -> dict[str, Any]:
    """Print a model's parameters, tokens, multiply-accumulates and bytes before anything runs.

    Example: vmae2 ledger pretrain_videomae_giant_patch14_224
    Example: vmae2 ledger vit_giant_patch14_224 --num-classes 710 --residual-dtype bfloat16
    Example: vmae2 ledger pretrain:vit_giant_hybrid --card a100-80 --gpus 8 --nodes 8 --train.micro-batch 32

    With a recipe: its bytes on every GPU, step time, days, decoding and network for `--card` (rtx4090, a100-40, a100-80, h100,
    h200), `--gpus` of a node, `--nodes`, `--mfu` (share of the card's peak, 0.4) and `--clips` (of an epoch, where the sources
    have no published number); the recipe's values are flags as in `launch` (`vmae2 ledger RECIPE --help`).

    Args:
        model: official name, or a recipe.
        frames: frames of a clip.
        size: height and width in pixels.
        num_classes: classes of the head.
        views: clips of one multi-view test.
        precision: autocast dtype of a step.
        residual_dtype: of the residual stream.
        activation_checkpoint: what is recomputed in the backward.
        layer_scale: initial value of the branch scales; above 0 a block keeps its branches.
        drop_path: of the last block.
        mask: dual masking of pre-training models.
    """
    from .train.ledger import ledger as account
    from .train.ledger import table

    config = ModelConfig(
        name=model, frames=frames, size=size, num_classes=num_classes, residual_dtype=residual_dtype,
        activation_checkpoint=activation_checkpoint, layer_scale=layer_scale, drop_path=drop_path,
    )  # fmt: skip
    result = account(config, mask, precision=precision, views=views)
    print(table(result))
    return result


def recipe_ledger(arguments: list[str]) -> dict[str, Any]:
    """`vmae2 ledger RECIPE [flags]`."""
    from . import recipes_index
    from .train.budget import BudgetOptions, budget, lines
    from .train.progression import check_stage

    run, options = recipes_index.with_options(arguments, BudgetOptions, "vmae2 ledger", parse)
    results = []
    for stage in run.stages if isinstance(run, Progression) else (run,):
        check_stage(stage)
        results.append(budget(stage, options))
        print("\n".join(lines(stage, results[-1])))
    return {"stages": results}


def convert(source: tyro.conf.Positional[str], target: tyro.conf.Positional[str]) -> dict[str, Any]:
    """Rewrite a checkpoint under official names, bit for bit.

    Example: vmae2 convert vit_b_k710.pth vit_b_k710.safetensors

    Args:
        source: an official, Hugging Face or own file, or `hf:OWNER/NAME[@REV]`.
        target: a path ending in .safetensors, .pth or .pt.
    """
    from .models import convert_weights

    written = convert_weights(source, target)
    print(f"wrote {target}: {written['tensors']} tensors, {written['parameters']:,} parameters")
    return written


def report(out: tyro.conf.Positional[str] = "runs/demo") -> dict[str, Any]:
    """Write summary, pictures and report of a finished progression again.

    Example: vmae2 report runs/demo

    Args:
        out: the folder of the progression.
    """
    from .report import missing, write_report
    from .train.progression import PLAN, finished

    plan = Path(out) / PLAN
    if not plan.is_file():
        raise ValueError(f"{plan}: no progression was launched into this folder")
    run = dataclasses.replace(load(plan), out=out)
    summary = write_report(run, finished(run))
    if missing():
        raise ValueError(f"the report needs {', '.join(missing())}: pip install 'vmae2_fast[report]'")
    print(f"wrote {Path(out) / 'report.html'}")
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
    group: {**cli_ava.COMMANDS.get(group, {}), **cli_tad.COMMANDS.get(group, {})}
    for group in (*cli_ava.COMMANDS, *cli_tad.COMMANDS)
}
"""Commands of two words: `vmae2 score ava`."""

COMMANDS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (recipes, env, reconstruct, *cli_classify.COMMANDS, ledger, convert, report, bench)
}


_WITH_OWN_FLAGS: dict[str, Callable[[list[str]], Any]] = {"launch": launch, "data": cli_data.data}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `vmae2`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        result = _dispatch(arguments)
    except Exception as error:
        if not _expected(error):
            raise
        print(f"vmae2: error: {error}", file=sys.stderr)
        sys.exit(2)
    if as_json and int(os.environ.get("RANK", 0)) == 0:  # one line, however many processes ran
        print(json.dumps(result), flush=True)


def _dispatch(arguments: list[str]) -> Any:
    if arguments and arguments[0] in _WITH_OWN_FLAGS:
        return _WITH_OWN_FLAGS[arguments[0]](arguments[1:])
    arguments = [a for a in arguments if a != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return {}
    from .config import unknown

    if arguments[0] == "ledger" and _names_a_recipe(arguments[1:]):
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


def _names_a_recipe(arguments: list[str]) -> bool:
    from . import recipes_index

    first = arguments[0] if arguments else ""
    return ":" in first or any(name.partition(":")[2] == first for name in recipes_index.all_recipes())


def call(command: Callable[..., Any], arguments: list[str], prog: str) -> Any:
    """Run a command whose flags are its arguments."""

    @functools.wraps(command)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(command, *args, **kwargs)  # parsed first, run after: only parsing is captured

    return parse(bound, arguments, prog)()


def _usage() -> str:
    grouped = {f"{group} {what}": command for group, members in GROUPS.items() for what, command in members.items()}
    commands = {**_WITH_OWN_FLAGS, **COMMANDS, **grouped}
    return usage("vmae2 COMMAND [--help] [--json] ...", __doc__.split("\n")[0], commands)


def usage(form: str, about: str, commands: dict[str, Callable[..., Any]]) -> str:
    """What a command of commands offers."""
    lines = [f"  {name:<12} {(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
    return "\n".join([f"usage: {form}", "", about, "", *lines])


def _expected(error: BaseException) -> bool:
    """Bad input and a full or read-only disk, as against a bug: that keeps its traceback."""
    from .data.decode import DecodeError
    from .data.loader import BadDataError

    return isinstance(error, (ValueError, OSError, BadDataError, DecodeError, backend.BackendError))
