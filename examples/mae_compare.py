"""How much faster the three changed lines make the loop: both loops side by side, a step of each in turn.

    python examples/mae_compare.py
    python examples/mae_compare.py --steps 30 --batch 16 --videos DIR

The last line is JSON: the losses of both, the median milliseconds of a step of each, and the median of the ratios.
"""

import argparse
import json
import random
from statistics import median

import mae_fused
import mae_plain
import torch


def compare(steps: int, batch: int, videos: str | None = None) -> dict:
    """Losses and milliseconds of a step of each loop. Both start from the same weights and see the same clips and masks; which
    one has the first turn changes at random, so that what slows the machine down slows both. The first step is not timed."""
    loops = {"plain": mae_plain.steps(batch, videos), "fused": mae_fused.steps(batch, videos)}
    order, history = list(loops), {name: [] for name in loops}
    state = dict.fromkeys(loops)
    for _ in range(steps + 1):
        random.shuffle(order)
        for name in order:
            if state[name] is not None:
                torch.set_rng_state(state[name])
            history[name].append(next(loops[name]))
            state[name] = torch.get_rng_state()
    losses = {name: [loss for loss, _ in done] for name, done in history.items()}
    times = {name: [1e3 * seconds for _, seconds in done[1:]] for name, done in history.items()}
    ratio = median(p / f for p, f in zip(times["plain"], times["fused"]))
    medians = {name: median(values) for name, values in times.items()}
    return {"losses": losses, "median_step_ms": medians, "times_faster": ratio, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--videos", help="folder of video files")
    given = parser.parse_args()
    print(json.dumps(compare(given.steps, given.batch, given.videos)))
