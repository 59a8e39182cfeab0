"""Which attention backend was measured fastest: `attention_table.json`, read by the dispatcher, written by `make gpu-check`.

One entry for each architecture, head dim, range of lengths, dtype and direction:

    {"arch": "sm_90", "head_dim": 88, "upto": 2048, "dtype": "bfloat16", "direction": "backward",
     "order": ["flash3", "triton", "sdpa"], "seconds": {"flash3": .., ..}, "shape": [B, N, 3, H, D], "wrong": {},
     "device": "..", "versions": {"torch": "..", ..}, "commit": "..", "date": "..", "command": ".."}

`upto` is the end of the range that the measured length lies in (null beyond the last, see `length_range`), `order` the
backends that were present and right, the fastest first. A GPU without an entry keeps the documented order.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from .. import backend

PATH = Path(__file__).with_name("attention_table.json")
LENGTHS = (1, 256, 1024, 2048, 4096)
"""Up to how many tokens a range of lengths goes that shares one choice; longer sequences share the last one."""
KEY = ("arch", "head_dim", "upto", "dtype", "direction")
PRIOR = "ATen's flash attention first, ours for what that refuses (windows, lengths, float32)"


def length_range(n: int) -> int | None:
    """The upper end of the range that `n` tokens lie in, None beyond the last."""
    for upto in LENGTHS:
        if n <= upto:
            return upto
    return None


def architecture(device: torch.device) -> str | None:
    """`sm_90` for compute capability 9.0; None for what is no GPU that is there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def read(path: Path | None = None) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The entries by `KEY`, of the package's table if no other is named. Raises ValueError naming the file and what is wrong
    with it."""
    return _read(path or PATH)


@functools.cache
def _read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable table of attention backends: {error}") from error
    if not isinstance(table, dict) or table.get("format") != 1 or not isinstance(table.get("entries"), list):
        raise ValueError(f"{path}: not a table of attention backends of format 1; measure again with `make gpu-check`")
    for i, entry in enumerate(table["entries"]):
        if not isinstance(entry, dict) or any(key not in entry for key in (*KEY, "order")):
            raise ValueError(f"{path}: entry {i} must have {', '.join(KEY)} and order; measure again with `make gpu-check`")
    return {tuple(entry[key] for key in KEY): entry for entry in table["entries"]}


def write(measured: list[dict[str, Any]], path: Path | None = None) -> None:
    """Put entries into the table in place of those of the same key."""
    path = path or PATH
    entries = dict(read(path)) if path.exists() else {}
    entries |= {tuple(entry[key] for key in KEY): entry for entry in measured}
    ordered = [entries[key] for key in sorted(entries, key=str)]
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"format": 1, "entries": ordered}, indent=2) + "\n")
    temporary.replace(path)
    _read.cache_clear()
    backend.forget_choices()


def measured_order(
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    lengths: bool = False,
    upto: int | None = None,
    direction: str = "forward",
) -> tuple[str, ...] | None:
    """The backends measured for such an input, the fastest first; None where none was. Windows and lengths never were."""
    arch = architecture(device)
    if arch is None or dtype is None or window is not None or lengths:
        return None
    entry = read().get((arch, head_dim, upto, str(dtype).removeprefix("torch."), direction))
    return None if entry is None else tuple(entry["order"])


def explanation() -> str:
    """What the order on the first GPU rests on, for the report of `vmae2 env`."""
    arch = architecture(torch.device("cuda"))
    entries = [entry for entry in read().values() if entry["arch"] == arch]
    if not entries:
        what = "no GPU has been measured yet" if not read() else f"{arch} is not in {PATH.name}"
        return f"{what}: {PRIOR}"
    orders = "; ".join(
        f"{e['dtype']} head dim {e['head_dim']} {'any longer' if e['upto'] is None else 'up to ' + str(e['upto'])} tokens "
        f"{e['direction']}: {' > '.join(e['order'])}"
        for e in entries
    )
    return f"measured on {entries[0].get('device', arch)} ({PATH.name}): {orders}; else {PRIOR}"
