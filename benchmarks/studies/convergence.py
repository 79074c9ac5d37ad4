"""Figure 8 of the paper: does the matching converge without the fundament (the restoration loss)?

Pretrains gvsl and gvsl_without_fundament with the same seeds and draws each loss against the steps.

Usage: ``python benchmarks/studies/convergence.py [--preset quick] [--seeds 0 1 2] [--set pretrain.steps=2000]``
Interrupted runs go on; finished ones below --runs are read, not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from figure import save

from ssl3d.bench.sources import pretraining_cohort
from ssl3d.config import load_settings
from ssl3d.device import select_device
from ssl3d.environment import environment
from ssl3d.models.weights.checkpoint import RUN
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry

RESULTS = Path(__file__).parent / "results"
METHODS = {"gvsl": "#0072B2", "gvsl_without_fundament": "#D55E00"}
LOSSES = {"ncc": "NCC loss (1 - NCC)", "smooth": "smoothness", "mse": "restoration MSE"}


def curves(arguments: argparse.Namespace) -> pd.DataFrame:
    """Return the logged losses: columns method, seed, step, and one for each loss."""
    settings = load_settings(arguments.preset, arguments.overrides, registry().methods.names())
    cohort = pretraining_cohort("phantoms", settings, arguments.cache)
    frames = []
    for seed in arguments.seeds:
        for name in METHODS:
            folder = arguments.runs / f"{name}-{arguments.preset}-seed{seed}"
            spec = resolve_method(name, settings.methods)
            pretrain(
                spec, cohort, settings, seed, folder, select_device("auto"), resume=(folder / RUN).is_file()
            )
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            frame = pd.DataFrame([line for line in lines if "ncc" in line])
            frames.append(frame.assign(method=name, seed=seed))
    return pd.concat(frames, ignore_index=True)


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw the losses; single steps are noisy, so a running mean is drawn over them."""
    shown = [loss for loss in LOSSES if loss in frame]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4 * len(shown), 3), layout="constrained", squeeze=False
    )
    for loss, axis in zip(shown, axes[0], strict=True):
        for (name, _seed), part in frame.groupby(["method", "seed"], sort=False):
            part = part.dropna(subset=[loss]).sort_values("step")
            if len(part):
                axis.plot(part.step, part[loss], color=METHODS[name], alpha=0.25, linewidth=0.8)
                mean = part[loss].rolling(max(1, len(part) // 8), min_periods=1).mean()
                axis.plot(
                    part.step, mean, color=METHODS[name], label=name if _seed == frame.seed.min() else None
                )
        axis.set_title(LOSSES[loss], fontsize=9)
        axis.set_xlabel("pretraining steps", fontsize=8)
        axis.set_yscale("log" if loss != "ncc" else "linear")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=7, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    frame = curves(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"convergence-{arguments.preset}.png"
    draw(frame, path)
    # The mean over the last quarter: single steps see two pairs only.
    late = frame[frame.step > 0.75 * frame.step.max()]
    summary = late.groupby(["method", "seed"])[[loss for loss in LOSSES if loss in frame]].mean().round(4)
    print(f"Means over the last quarter of {frame.step.max()} steps\n{summary.to_string()}")
    record = {"overrides": arguments.overrides, "environment": environment(), "curves": frame.to_dict("list")}
    path.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print(f"{path}, {path.with_suffix('.json')}")


if __name__ == "__main__":
    main()
