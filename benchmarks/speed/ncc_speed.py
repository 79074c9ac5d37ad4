"""Time of NCC, forward and backward: ours against MONAI's and against the released dense form.

All compute the same quantity of the same volumes in one process, turn by turn, so that a busy machine disturbs
them alike; medians over rounds, processor time of one thread. MONAI's LocalNormalizedCrossCorrelationLoss has
the same 9^3 window of ones and zeros beyond the border; it divides each variance by eps where ours adds eps to their
product, so the losses differ a little in flat regions. The dense form (five 9^3 convolutions) is timed on small
volumes alone.

Usage: ``python benchmarks/speed/ncc_speed.py [--edge 96 64 32] [--batch 1] [--rounds 7]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gvsl_step import plain_ncc
from torch import Tensor

from ssl3d.commands.common import keep_freed_memory
from ssl3d.environment import environment
from ssl3d.losses import ncc_loss

RESULTS = Path(__file__).parent / "results"
LARGEST_DENSE = 48


def processor_seconds(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """Return the processor time of one forward and backward pass; the gradient goes to ``a`` alone."""
    a = a.clone().requires_grad_()
    began = time.process_time()
    loss(a, b).backward()
    return time.process_time() - began


def measure(edge: int, batch: int, rounds: int) -> dict[str, Any]:
    """Return the times of each loss on random volumes, in ms."""
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    a, b = torch.rand(2, batch, 1, edge, edge, edge, generator=torch.Generator().manual_seed(edge))
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": ncc_loss,
        "MONAI": LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=9),
    }
    if edge <= LARGEST_DENSE:
        losses["dense"] = plain_ncc
    times: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds + 1):  # the first round allocates and chooses algorithms: not counted
        for name, loss in losses.items():
            seconds = processor_seconds(loss, a, b)
            if number:
                times[name].append(1e3 * seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: value / medians["ours"] for name, value in medians.items()}
    return {"edge": edge, "batch": batch, "ms": times, "median_ms": medians, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--edge", type=int, nargs="+", default=[96, 64, 32])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--keep-memory", action="store_true", help="as `ssl3d pretrain` does: freed memory stays"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "ncc_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.keep_memory:
        keep_freed_memory()
    results = []
    for edge in args.edge:
        results.append(measure(edge, args.batch, args.rounds))
        medians, ratios = results[-1]["median_ms"], results[-1]["ratio"]
        peers = "".join(
            f"; {name} {medians[name]:.1f} ms, {ratios[name]:.1f} times ours"
            for name in medians
            if name != "ours"
        )
        print(f"{edge:3}^3, batch {args.batch}: ours {medians['ours']:.1f} ms{peers}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"keep_memory": args.keep_memory, "environment": environment(), "results": results}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
