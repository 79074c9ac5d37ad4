"""How much is a label worth? Scores of fine-tuning over the number of labelled patients, and whether they have converged.

Where a curve is flat, pretraining, which stands in for labels, has no room. The labels are shares of a task's training
patients (``ssl3d bench --label-fractions``); the smaller parts lie within the larger ones.

Usage: ``python benchmarks/studies/learning_curve.py STORE [--methods scratch] [--mode finetune] [--out PNG]``

Printed for each number of patients: the mean over seeds with the seeds, and the validation score before the last and at
the last validation, means over seeds. The figure has a panel a task and a line a method.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from figure import COLOURS, save

from ssl3d.errors import SSL3DError
from ssl3d.results.store.record import canonical_json
from ssl3d.results.store.store import ResultStore

ENDS = [2, 10]
"""Patients between which the gain is printed: few labels, and what releases have."""


def frame_of(store: Path, methods: list[str], mode: str) -> pd.DataFrame:
    """Return a row for each record: task, method, patients, seed, score, and the last two validation scores.

    Raises:
        SSL3DError: a task and method were trained in several ways, or how many patients there were is not known.
    """
    rows = []
    budgets: dict[tuple[str, str], set[str]] = {}
    for record in ResultStore(store).records()[0]:
        identity = record["identity"]
        if identity["method"] not in methods or identity["mode"] != mode:
            continue
        labelled = record["run"]["settings"]["data"]["counts"].get(identity["task"])
        if labelled is None:
            raise SSL3DError(f"data.counts of {identity['task']} are not in the preset of {store}: set them.")
        curve = [point["score"] for point in record["validation"]]
        budgets.setdefault((identity["task"], identity["method"]), set()).add(
            canonical_json(identity["budget"])
        )
        rows.append({
            "task": identity["task"], "method": identity["method"], "seed": identity["seed"],
            "patients": max(1, round(identity["label_fraction"] * labelled[0])), "score": record["score"],
            "before": curve[-2] if len(curve) > 1 else float("nan"), "last": curve[-1],
        })  # fmt: skip
    for (task, method), found in budgets.items():
        if len(found) > 1:
            raise SSL3DError(
                f"{store} has {method} on {task} with {len(found)} budgets of {mode}, which are {len(found)} curves. "
                "Compute them into stores of their own."
            )
    return pd.DataFrame(rows).sort_values(["task", "method", "patients", "seed"]) if rows else pd.DataFrame()


def markdown(frame: pd.DataFrame) -> str:
    """Return the table, and below it what each curve gains between :data:`ENDS`."""
    lines = [
        "| task | method | patients | score, % | seeds | validation before the last, and the last |",
        "|---|---|--:|--:|---|--:|",
    ]
    gains = []
    for (task, method), curve in frame.groupby(["task", "method"], sort=False):
        means = curve.groupby("patients").score.mean()
        for patients, part in curve.groupby("patients"):
            seeds = ", ".join(f"{score:.1f}" for score in part.score)
            lines.append(
                f"| {task} | {method} | {patients} | {part.score.mean():.1f} | {seeds} "
                f"| {part.before.mean():.1f}, {part['last'].mean():.1f} |"
            )
        if set(ENDS) <= set(means.index):
            few, more = (means[n] for n in ENDS)
            gains.append(
                f"- {task}, {method}: {few:.1f} with {ENDS[0]} patients, {more:.1f} with {ENDS[1]}: {more - few:+.1f}"
            )
    return "\n".join([*lines, "", *gains])


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw a panel a task: means over seeds as lines, seeds as dots."""
    tasks = list(dict.fromkeys(frame.task))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(3.4 * len(tasks), 2.9), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for colour, (method, part) in zip(COLOURS, frame[frame.task == task].groupby("method"), strict=False):
            means = part.groupby("patients").score.mean()
            axis.plot(means.index, means, "-", color=colour, label=method)
            axis.plot(part.patients, part.score, "o", ms=4, color=colour, alpha=0.6)
        axis.set_xscale("log")
        ticks = sorted(set(frame.patients))
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.set(title=task, xlabel="labelled patients")
        axis.grid(color="0.92")
    axes[0, 0].set_ylabel("score, %")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--methods", nargs="+", default=["scratch"])
    parser.add_argument("--mode", default="finetune")
    parser.add_argument("--out", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    try:
        frame = frame_of(arguments.store, arguments.methods, arguments.mode)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    if frame.empty:
        sys.exit(
            f"Error: {arguments.store} has no record of {', '.join(arguments.methods)} in mode {arguments.mode}."
        )
    print(markdown(frame))
    if arguments.out:
        draw(frame, arguments.out)


if __name__ == "__main__":
    main()
