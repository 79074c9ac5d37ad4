"""Time of one GVSL training step: ours against a plain version of the released formulation.

Both have the same network, heads, losses, data and optimizer and run in the same process, turn by
turn, so that a busy machine disturbs both alike. The plain version is what the released code
computes, with its defects repaired (any batch size, gradient into the affine head, any device):

               ours                                   plain
    layout     channels_last_3d                       contiguous
    precision  bfloat16 where the hardware has it     float32
    network    both volumes in one pass               one pass a volume
    warping    one resampling at psi^g(p + psi^l(p))  two, one after the other
    NCC        separable sums, clamped variances      five dense 9x9x9 convolutions

Both with the released head and damage on A alone (the variant gvsl_released_head), so that they do the same work; the
default GVSL is timed beside them.

Usage: ``python benchmarks/speed/gvsl_step.py [--edge 64] [--batch 1 2] [--repeats 5] [--device auto]``
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ssl3d_methods.gvsl import GVSL, GVSLConfig
from torch import Tensor

from ssl3d.device import autocast_dtype, select_device, to_device
from ssl3d.environment import device_name, environment
from ssl3d.geometry import affine_coords, identity_coords, warp
from ssl3d.losses import smoothness_loss
from ssl3d.models.factory import seeded
from ssl3d.models.unet import UNet3D
from ssl3d.rng import BatchRng

RESULTS = Path(__file__).parent / "results"


def plain_ncc(a: Tensor, b: Tensor, window: int = 9) -> Tensor:
    """Local NCC by dense convolutions, as released."""
    ones, n = a.new_ones(1, 1, window, window, window), window**3
    sum_a, sum_b, sum_aa, sum_bb, sum_ab = (
        F.conv3d(x, ones, padding=window // 2) for x in (a, b, a * a, b * b, a * b)
    )
    mean_a, mean_b = sum_a / n, sum_b / n
    cross = sum_ab - mean_b * sum_a - mean_a * sum_b + mean_a * mean_b * n
    var_a = sum_aa - 2 * mean_a * sum_a + mean_a * mean_a * n
    var_b = sum_bb - 2 * mean_b * sum_b + mean_b * mean_b * n
    return 1 - (cross * cross / (var_a * var_b + 1e-5)).mean()


def plain_step(method: GVSL, views: dict[str, Tensor]) -> dict[str, Tensor]:
    """One forward pass in the released formulation."""
    size = views["a"].shape[2:]
    global_a, local_a = method.backbone(views["a_seen"])
    global_b, local_b = method.backbone(views["b_seen"])
    matrix = method.matching.affine(global_a, global_b)
    aligned = warp(local_a, affine_coords(matrix, size))
    flow = method.matching.flow(method.matching.blocks(torch.cat([aligned, local_b], dim=1)))
    warped = warp(warp(views["a"], affine_coords(matrix, size)), identity_coords(size, flow) + flow)
    return {
        "ncc": plain_ncc(warped, views["b"]),
        "smooth": smoothness_loss(flow),
        "mse": F.mse_loss(method.restoration(local_a), views["a"]),
    }


def step_of(
    method: GVSL, forward: Callable[[dict[str, Tensor]], dict[str, Tensor]], dtype: torch.dtype | None
) -> Callable[[dict[str, Tensor]], dict[str, float]]:
    """Return a function that does one optimizer step (Adam 1e-4) and returns the losses."""
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-4)

    def step(views: dict[str, Tensor]) -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(views["a"].device.type, dtype=dtype, enabled=dtype is not None):
            losses = forward(views)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}  # waits for the device

    return step


def smooth_pairs(batch: int, edge: int, device: torch.device) -> Tensor:
    """Return smooth random pairs (B, 2, 1, edge, edge, edge) in [0, 1]."""
    coarse = torch.rand(2 * batch, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (edge,) * 3, mode="trilinear").unflatten(0, (batch, 2)).to(device)


def measure(
    edge: int, batch: int, repeats: int, device: torch.device, channels: tuple[int, ...]
) -> dict[str, Any]:
    """Time both versions turn by turn; seconds a step."""
    with seeded(0, "benchmark"):
        released = GVSLConfig.model_validate(GVSL.variants["gvsl_released_head"])
        ours = GVSL(UNet3D(UNet3D.Config(channels=channels)), released)
        default = GVSL(UNet3D(UNet3D.Config(channels=channels)), GVSLConfig.model_validate({}))
    plain = copy.deepcopy(ours).to(device)
    to_device(ours, device)
    to_device(default, device)
    dtype = autocast_dtype("auto", device)
    x = smooth_pairs(batch, edge, device)
    began = time.perf_counter()
    views = ours.views(x, BatchRng(0, 0, range(batch), device))
    float(views["a"].sum())
    views_s = time.perf_counter() - began
    steps = {
        "ours": step_of(ours, ours.training_step, dtype),
        "plain": step_of(plain, lambda v: plain_step(plain, v), None),
        "default": step_of(default, default.training_step, dtype),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    first: dict[str, dict[str, float]] = {}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            losses = step(views)
            if repeat == 0:  # the first step allocates and chooses algorithms: not counted
                first[name] = losses
            else:
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "edge": edge,
        "batch": batch,
        "channels": channels,
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "seconds": times,
        "median_s": medians,
        "ratio": medians["plain"] / medians["ours"],
        "views_s": views_s,
        "first_losses": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--edge", type=int, default=64, help="edge of the crops in voxels")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 1], help="pairs a step")
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each version")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "gvsl_step.json")
    args = parser.parse_args()
    device = select_device(args.device)
    results = []
    print(f"{device_name(device, 'auto')}, crops of {args.edge}^3, U-Net {tuple(args.channels)}")
    for batch in args.batch:
        result = measure(args.edge, batch, args.repeats, device, tuple(args.channels))
        results.append(result)
        medians, losses = result["median_s"], result["first_losses"]
        print(
            f"batch {batch}: ours {medians['ours']:.3f} s in {result['dtype']}, "
            f"plain {medians['plain']:.3f} s, default GVSL {medians['default']:.3f} s, "
            f"ratio {result['ratio']:.2f}; making the views {result['views_s']:.3f} s"
        )
        for name, values in losses.items():
            print(f"  first losses, {name}: " + ", ".join(f"{k} {v:.5f}" for k, v in values.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
