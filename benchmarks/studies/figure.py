"""The figure of a study: one panel a mode, score against pretraining steps or against the lever."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TITLES = {
    "linear": "linear", "multiscale": "multi-scale linear", "knn": "k-NN", "finetune": "fine-tune",
    "correspondence": "correspondence",
}  # fmt: skip
# Okabe & Ito's colours, which the colour-blind can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
BASELINES = {"scratch": ("0.35", "--"), "supervised": ("0.0", ":")}


def draw(frame: pd.DataFrame, question: str, lever: str | None, path: Path) -> None:
    """Draw mean over seeds, with the range of the seeds as a band.

    Args:
        frame: columns value, method, task, mode, seed, step, score (percent).
        question: title of the figure.
        lever: title of the lever; None: the x-axis is the pretraining step.
        path: PNG to write.
    """
    steps = frame[~frame.method.isin(BASELINES)].groupby("value")["step"].nunique()
    over_steps = bool((steps > 1).any())  # within one value: the lever may be the number of steps
    ceiling, compared = frame[frame.method == "supervised"], frame[frame.method != "supervised"]
    tasks, modes = list(dict.fromkeys(frame.task)), [m for m in TITLES if (compared["mode"] == m).any()]
    # With curves over steps, each value of the lever is a row of panels; else it is the x-axis.
    values = list(dict.fromkeys(frame.value)) if over_steps else [""]
    # Tasks below each other, modes beside each other; with one mode there is room for the tasks side by side.
    if len(modes) == 1:
        grid = [[(task, value, modes[0]) for task in tasks] for value in values]
    else:
        grid = [[(task, value, mode) for mode in modes] for task in tasks for value in values]
    panel = max(3.6, 0.5 * len(set(compared.value)))  # inches; a label a value
    width = max(panel * len(grid[0]) + 0.4, 4.6)
    figure, axes = plt.subplots(
        len(grid), len(grid[0]), figsize=(width, 2.9 * len(grid) + 0.6), squeeze=False, layout="constrained",
        sharey="row" if len(modes) > 1 else False,
    )  # fmt: skip
    methods = [m for m in dict.fromkeys(frame.method) if m not in BASELINES]
    for (task, value, mode), axis in zip(chain.from_iterable(grid), axes.ravel(), strict=True):
        part = compared[compared["mode"] == mode]
        if mode != "correspondence":  # the supervised upper bound is a score, drawn beside every evaluation
            part = pd.concat([part, ceiling])
        part = part[part.task == task]
        if over_steps:
            part = part[part.value == value]
            _over_steps(axis, part, methods)
        else:
            _over_lever(axis, part, methods)
        title = f"{task.upper()}, {TITLES[mode]}" + (f", {lever} {value}" if over_steps and value else "")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("pretraining steps" if over_steps else lever or "", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for line in axes:
        line[0].set_ylabel("score (%)", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8, frameon=False
    )
    figure.suptitle("\n".join(textwrap.wrap(question, int(13 * width))), fontsize=10)
    save(figure, path)


def panels(bands: Sequence[tuple[Sequence[str], Sequence[str]]]) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel a column, at most four beside each other, and the axes by column.

    Args:
        bands: columns that have the same rows, by title, and the titles of those rows, from the top: at 0, 1, ...
    """
    lines = []
    for columns, rows in bands:
        across = math.ceil(len(columns) / math.ceil(len(columns) / 4))  # 6: three and three
        lines += [(columns[i : i + across], rows) for i in range(0, len(columns), across)]
    heights = [0.27 * len(rows) + 0.6 for _, rows in lines]  # inches
    width = 2.7 * max(len(columns) for columns, _ in lines) + 1.6
    figure = plt.figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
    parts = figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)[:, 0]
    found = {}
    for part, (columns, rows) in zip(parts, lines, strict=True):
        axes = part.subplots(1, len(columns), squeeze=False, sharey=True)[0]
        for axis, column in zip(axes, columns, strict=True):
            axis.set_title(column, fontsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="0.92")
            axis.set_axisbelow(True)
            found[column] = axis
        axes[0].set_yticks(range(len(rows)), rows)
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure, found


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _over_steps(axis: plt.Axes, part: pd.DataFrame, methods: list[str]) -> None:
    for name, (colour, dashes) in BASELINES.items():
        scores = part.loc[part.method == name, "score"]
        if len(scores):
            axis.axhline(scores.mean(), color=colour, linestyle=dashes, label=name)
            axis.axhspan(scores.min(), scores.max(), color=colour, alpha=0.12, linewidth=0)
    for method, (colour, dashes) in _styles(methods).items():
        by_step = part[part.method == method].groupby("step")["score"].agg(["mean", "min", "max"])
        _curve(axis, by_step.index.to_numpy(), by_step, colour, method, dashes)


def _over_lever(axis: plt.Axes, part: pd.DataFrame, methods: list[str]) -> None:
    values = list(dict.fromkeys(part.value))
    try:
        positions, numbers = np.array([float(v) for v in values]), True
    except ValueError:
        positions, numbers = np.arange(len(values), dtype=float), False
    # Values over a wide range were chosen by factors.
    if numbers and positions.min() > 0 and positions.max() / positions.min() >= 4:
        axis.set_xscale("log")
        axis.minorticks_off()
    long = max(map(len, values)) > 10
    axis.set_xticks(positions, values, **({"rotation": 25, "ha": "right"} if long else {}))
    for name, (colour, dashes) in (BASELINES | _styles(methods)).items():
        own = part[part.method == name]
        if len(own):
            by_value = own.groupby("value")["score"].agg(["mean", "min", "max"]).reindex(values)
            has = by_value["mean"].notna().to_numpy()  # a line goes on over a value that a row was not run at
            # Nothing lies between two names.
            _curve(axis, positions[has], by_value[has], colour, name, dashes if numbers else "")


def _styles(methods: list[str]) -> dict[str, tuple[str, str]]:
    """Return each method's (colour, dashes); after the last colour they begin again, dotted and dashed."""
    return {m: (COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "-.") for i, m in enumerate(methods)}


def _curve(
    axis: plt.Axes, x: np.ndarray, by: pd.DataFrame, colour: str, label: str, dashes: str = "-"
) -> None:
    axis.plot(x, by["mean"], color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
    if dashes:
        axis.fill_between(x, by["min"], by["max"], color=colour, alpha=0.15, linewidth=0)
    else:
        axis.vlines(x, by["min"], by["max"], color=colour, alpha=0.4)
