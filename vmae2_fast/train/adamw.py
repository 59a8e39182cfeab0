"""Who computes AdamW: our own kernel, torch's fused one, NVIDIA apex or torchao with moments of 8 bits, behind one form.

All of them have torch's `param_groups` and `state`, and `update(scale, skipped)`: one step on gradients divided by `scale`
(None: as they are), or none at all where `skipped` is 1. `saved(p)` is a parameter's state as checkpoints hold it: `step`,
`exp_avg`, `exp_avg_sq` and whatever the caller put into `state[p]`, plain tensors; `restore` takes it back. A run may go on
with another implementation than it began with, and goes on to the bit with the same one.

A moment of 8 bits is three tensors: its codes (`exp_avg`, uint8), a factor for each block of them (`exp_avg_scale`) and the
values of the 256 codes (`exp_avg_map`).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import backend
from ..config import OptimConfig
from ..ops.optim import adamw

Groups = list[dict[str, Any]]
BLOCK = 256  # codes of torchao that share a factor
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE, MAP = "_scale", "_map"


class AdamW(Protocol):
    """What `Optimizer` uses of an implementation."""

    param_groups: Groups
    state: Any

    def set_lr(self, group: dict[str, Any], lr: float) -> None: ...
    def update(self, scale: Tensor | None, skipped: Tensor) -> None: ...
    def saved(self, p: nn.Parameter) -> dict[str, Tensor]: ...
    def restore(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None: ...


def make_adamw(groups: Groups, config: OptimConfig, lr: float, shadowed: Iterable[Tensor] = ()) -> AdamW:
    """`config.implementation` over parameter groups; `shadowed` parameters get a bfloat16 copy where it is ours that runs.

    Raises ValueError if it is not installed or cannot run there.
    """
    chosen = resolved(config.implementation, (p for g in groups for p in g["params"]))
    if chosen == "vmae2":
        return _Ours(groups, config, lr, shadowed)
    if chosen == "torch":
        return _Torch(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)
    if chosen == "apex":
        return _apex(groups, config, lr)
    return _torchao(groups, config, lr)


def resolved(implementation: str, parameters: Iterable[Tensor]) -> str:
    """Who "auto" is for these parameters: ours for float32 on a CPU with the native kernels, else torch."""
    if implementation != "auto":
        return implementation
    kinds = {(p.device.type, p.dtype) for p in parameters}
    ours = kinds == {("cpu", torch.float32)} and backend.pick("adamw", torch.device("cpu"), torch.float32) == "native"
    return "vmae2" if ours else "torch"


def moment_bytes(implementation: str, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of both moments of float32 parameters of these shapes."""
    counts = [math.prod(shape) for shape in shapes]
    # torchao keeps in float32 what is small or no whole number of blocks; the others have a factor a block and a table each.
    codes = [n for n in counts if implementation == "torchao8bit" and n >= 4096 and n % BLOCK == 0]
    return 8 * (sum(counts) - sum(codes)) + sum(2 * (n + 4 * (n // BLOCK) + 4 * 256) for n in codes)


def values(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's saved state with moments of 8 bits as the float32 values they stand for. Raises ValueError for codes
    without their factors or values."""
    out = {key: value for key, value in kept.items() if not key.endswith((SCALE, MAP))}
    for key in MOMENTS:
        codes = out.get(key)
        if codes is None or codes.dtype != torch.uint8:
            continue
        scale, table = kept.get(key + SCALE), kept.get(key + MAP)
        if scale is None or table is None or table.numel() != 256 or codes.numel() % max(1, scale.numel()):
            raise ValueError(f"{key} is of 8 bits, but {key}{SCALE} or {key}{MAP} is missing or does not fit")
        out[key] = (table[codes.int()].view(scale.numel(), -1) * scale.view(-1, 1)).view(codes.shape)
    return out


@dataclasses.dataclass
class _Row:
    param: nn.Parameter
    shadow: Tensor | None
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class _Ours:
    """`ops.adamw`, and the shadows it writes."""

    def __init__(self, groups: Groups, config: OptimConfig, lr: float, shadowed: Iterable[Tensor]) -> None:
        devices = {p.device.type for g in groups for p in g["params"]}
        if devices - {"cpu"}:
            raise ValueError(
                f"optim.implementation=vmae2 runs on the cpu only, not on {', '.join(sorted(devices))}: "
                "use optim.implementation=auto"
            )
        self.betas, self.eps = config.betas, config.eps
        self.param_groups = [{**group, "lr": lr} for group in groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        copied = {p: torch.empty(p.shape, dtype=torch.bfloat16) for p in shadowed}
        # Beside each parameter what belongs to it: looking hundreds of them up by hash would take a millisecond a step.
        self._rows = [[_Row(p, copied.get(p)) for p in group["params"]] for group in groups]

    def set_lr(self, group: dict[str, Any], lr: float) -> None:
        group["lr"] = lr

    def update(self, scale: Tensor | None, skipped: Tensor) -> None:
        for group, rows in zip(self.param_groups, self._rows, strict=True):
            ready = [row for row in rows if row.param.grad is not None]
            grads = [row.param.grad for row in ready if row.param.grad is not None]
            for row in ready:
                if not row.state:
                    p = row.param
                    row.state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                    self.state[p] = row.state
            params, states = [row.param for row in ready], [row.state for row in ready]
            lists = [[state[key] for state in states] for key in (*MOMENTS, "step")]
            adamw(
                params, grads, *lists, lr=group["lr"], betas=self.betas, eps=self.eps,
                weight_decay=group["weight_decay"], scale=scale, skipped=skipped, shadows=[row.shadow for row in ready],
            )  # fmt: skip

    def saved(self, p: nn.Parameter) -> dict[str, Tensor]:
        return dict(self.state.get(p, {}))

    def restore(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        self.state = state
        for row in [row for rows in self._rows for row in rows]:
            row.state = state.get(row.param, {})


class _Torch(torch.optim.AdamW):
    """The fused kernel is the one that takes found_inf, which lets the device decide to skip a step."""

    def set_lr(self, group: dict[str, Any], lr: float) -> None:
        group["lr"] = lr

    def update(self, scale: Tensor | None, skipped: Tensor) -> None:
        self.grad_scale, self.found_inf = scale, skipped  # gradients are divided while they are read: clipping costs no pass
        self.step()

    def saved(self, p: nn.Parameter) -> dict[str, Tensor]:
        return dict(self.state.get(p, {}))

    def restore(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        self.state.clear()
        self.state.update(state)  # type: ignore[arg-type]


class _Scaler:
    """What apex asks of a gradient scaler."""

    def __init__(self, scale: Tensor, skipped: Tensor) -> None:
        self.scale, self.skipped = scale.reshape(1), skipped.reshape(1)

    def _get_scale_async(self) -> Tensor:
        return self.scale

    def _check_inf_per_device(self, optimizer: Any) -> dict[torch.device, Tensor]:
        return {optimizer.param_groups[0]["params"][0].device: self.skipped}


def _library(implementation: str, module: str, way_out: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # of any kind: absent, or built for another torch
        raise ValueError(f"optim.implementation={implementation}: {module} cannot be imported ({error}); {way_out}") from error


def why_not_apex(device: torch.device) -> str | None:
    """The reason apex's kernels cannot update parameters on `device`."""
    return None if device.type == "cuda" else f"runs on cuda only, not on {device.type}"


def _apex(groups: Groups, config: OptimConfig, lr: float) -> AdamW:
    """apex's FusedAdam in its capturable form: rate, count of steps and the decision to skip are on the device."""
    way_out = "build it from a checkout of NVIDIA/apex (`vmae2 env` shows the command) or use optim.implementation=torch"
    base = _library("apex", "apex.optimizers", way_out).FusedAdam
    device = groups[0]["params"][0].device
    if reason := why_not_apex(device):
        raise ValueError(f"optim.implementation=apex {reason}: use optim.implementation=torch")

    class Apex(base):  # type: ignore[misc, valid-type]
        def set_lr(self, group: dict[str, Any], lr: float) -> None:
            group["lr"].fill_(lr)

        def update(self, scale: Tensor | None, skipped: Tensor) -> None:
            # Its count looks at the flag of the step before; with today's in place it counts what it does.
            self._dummy_overflow_buf.copy_(skipped)
            self.step(grad_scaler=_Scaler(torch.ones_like(skipped) if scale is None else scale, skipped))

        def saved(self, p: nn.Parameter) -> dict[str, Tensor]:
            if p not in self.state:
                return {}
            step = next(g["step"] for g in self.param_groups if any(p is q for q in g["params"]))
            return {**self.state[p], "step": step.float().reshape(())}

        def restore(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
            self.state.clear()
            for group in self.param_groups:
                for p in [p for p in group["params"] if p in state]:
                    kept = dict(state[p])
                    group["step"] = kept.pop("step").reshape(1).to(device, torch.int32)
                    self.state[p] = kept

    own = [{**g, "lr": torch.tensor(lr), "step": torch.zeros(1, dtype=torch.int32, device=device)} for g in groups]
    made: AdamW = Apex(own, lr=lr, betas=config.betas, eps=config.eps, adam_w_mode=True, capturable=True)
    return made


def _torchao(groups: Groups, config: OptimConfig, lr: float) -> AdamW:
    """torchao's AdamW8bit: 2 bytes a parameter of moments instead of 8. It knows no skipped step: the host looks at the flag,
    which waits for the device. Compiled by torch at the first step. Its codes are saved as they are: made of values once more
    they would be others, since no code stands for -1 and a block whose largest value is negative would shrink."""
    way_out = "pip install 'vmae2_fast[adam8bit]', or use optim.implementation=torch"
    base = _library("torchao8bit", "torchao.optim", way_out).AdamW8bit

    class Torchao(base):  # type: ignore[misc, valid-type]
        def set_lr(self, group: dict[str, Any], lr: float) -> None:
            group["lr"].fill_(lr)

        def update(self, scale: Tensor | None, skipped: Tensor) -> None:
            if bool(skipped):
                return
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            if scale is not None:
                torch._foreach_div_(grads, scale)
            self.step()

        def saved(self, p: nn.Parameter) -> dict[str, Tensor]:
            out: dict[str, Tensor] = {}
            for key, value in self.state.get(p, {}).items():
                parts = value if type(value) is not Tensor else None
                out[key] = value if parts is None else parts.codes
                if parts is not None:
                    out |= {key + SCALE: parts.scale, key + MAP: parts.qmap}
            return out

        def restore(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
            self.state.clear()
            for p, kept in state.items():
                mine = {key: value for key, value in kept.items() if not key.endswith((SCALE, MAP))}
                mine["step"] = mine["step"].to("cpu")
                for key in MOMENTS:
                    moment = self._new_buffer(p, key == "exp_avg")
                    if type(moment) is not Tensor and key + SCALE in kept:
                        pairs = ((moment.codes, key), (moment.scale, key + SCALE), (moment.qmap, key + MAP))
                        for target, name in pairs:
                            target.copy_(kept[name])
                    else:
                        moment.copy_(values(kept)[key])
                    mine[key] = moment
                self.state[p] = mine

    own = [{**g, "lr": torch.tensor(lr)} for g in groups]  # without one of its own all groups would share a rate
    made: AdamW = Torchao(own, lr=lr, betas=config.betas, eps=config.eps)
    return made
