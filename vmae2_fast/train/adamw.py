"""Who computes AdamW: torch's fused kernel, NVIDIA apex or torchao with moments of 8 bits, behind one form.

All of them have torch's `param_groups` and `state`, and `update(scale, skipped)`: one step on gradients divided by `scale`
(None: as they are), or none at all where `skipped` is 1. `saved(p)` is a parameter's state as checkpoints hold it: `step`,
`exp_avg`, `exp_avg_sq` and whatever the caller put into `state[p]`, plain tensors; `restore` takes it back. A run may go on
with another implementation than it began with.

A bfloat16 copy of the weights written in the same pass would save a forward its casts; it is not kept, see docs/kernels.md.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import OptimConfig

Groups = list[dict[str, Any]]


class AdamW(Protocol):
    """What `Optimizer` uses of an implementation."""

    param_groups: Groups
    state: Any

    def set_lr(self, group: dict[str, Any], lr: float) -> None: ...
    def update(self, scale: Tensor | None, skipped: Tensor) -> None: ...
    def saved(self, p: nn.Parameter) -> dict[str, Tensor]: ...
    def restore(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None: ...


def make_adamw(groups: Groups, config: OptimConfig, lr: float) -> AdamW:
    """`config.implementation` over parameter groups. Raises ValueError if it is not installed or cannot run there."""
    if config.implementation == "torch":
        return _Torch(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)
    if config.implementation == "apex":
        return _apex(groups, config, lr)
    return _torchao(groups, config, lr)


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
    which waits for the device. A checkpoint holds its moments in float32, and loading rounds them to 8 bits once more: a
    resumed run is not the same to the bit. Compiled by torch at the first step."""
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
            state = self.state.get(p, {})
            return {key: value.dequantize() if type(value) is not Tensor else value for key, value in state.items()}

        def restore(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
            self.state.clear()
            for p, kept in state.items():
                mine = dict(kept, step=kept["step"].to("cpu"))
                for key in ("exp_avg", "exp_avg_sq"):
                    mine[key] = self._new_buffer(p, key == "exp_avg").copy_(kept[key])
                self.state[p] = mine

    own = [{**g, "lr": torch.tensor(lr)} for g in groups]  # without one of its own all groups would share a rate
    made: AdamW = Torchao(own, lr=lr, betas=config.betas, eps=config.eps)
    return made
