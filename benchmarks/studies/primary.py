"""The primary comparisons of docs/study.md: each row against scratch and the control, GVSL against restoration alone.

Differences of means over common seeds with 95 % intervals (new seeds and new cases), and p values with Holm's correction
over all of them together, in every column.

Usage: ``python benchmarks/studies/primary.py --store STORE [--out PNG]``

A difference is bold when its adjusted p is at most 0.05, and no smaller than the floor of its rows. The figure has a panel a
column; intervals that belong to what is significant are filled.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from figure import COLOURS, save
from separation import BASELINES
from stores import largest_table

from ssl3d.errors import SSL3DError
from ssl3d.results.statistics.comparisons import column_data
from ssl3d.results.statistics.inference import contrasts, holm
from ssl3d.results.table.model import Column, Comparison, Table

RESTORATION = "gvsl_without_zmatching"
"""GVSL without its matching."""


@dataclass(frozen=True)
class Pair:
    """A row against a reference, both by method, in one column."""

    column: Column
    method: str
    reference: str
    comparison: Comparison


def pairs_of(table: Table) -> list[tuple[str, str]]:
    """Return (method, reference) of every primary comparison that the table has rows for."""
    methods = [row.method for row in table.rows]
    found = [(m, "scratch") for m in methods if m != "scratch"]
    found += [(m, "random_labels") for m in methods if m not in BASELINES]
    found.append(("gvsl", RESTORATION))
    return [(m, reference) for m, reference in found if {m, reference} <= set(methods)]


def compared(table: Table) -> list[Pair]:
    """Return every primary comparison that has a p value, corrected over all of them."""
    found = list(_compared(table))
    adjusted = holm([pair.comparison.p for pair in found])
    return [
        replace(pair, comparison=replace(pair.comparison, p_holm=p))
        for pair, p in zip(found, adjusted, strict=True)
    ]


def _compared(table: Table) -> Iterator[Pair]:
    methods = [row.method for row in table.rows]
    for column in table.columns:
        data = column_data(table, column)
        if data is None or math.isnan(data.of_cases):
            continue
        place = {methods[row]: i for i, row in enumerate(data.rows)}
        for method, reference in pairs_of(table):
            if not {method, reference} <= place.keys():
                continue
            one = contrasts(data.scores, place[reference], data.of_cases)[place[method]]
            if one is None or math.isnan(one.p):
                continue
            half = one.spread.half_width(0.95)
            low, high = one.difference - half, one.difference + half
            floor = column.floor_of(method, reference)
            comparison = Comparison(
                reference, one.difference, low, high, one.p, seeds=data.seeds, floor=floor
            )
            yield Pair(column, method, reference, comparison)


def markdown(table: Table, pairs: list[Pair]) -> str:
    """Return a table for each reference, a row a method and a column a column."""
    titles = {row.method: row.title for row in table.rows}
    by_place = {(pair.method, pair.reference, pair.column.key): pair.comparison for pair in pairs}
    columns = [column for column in table.columns if any(pair.column.key == column.key for pair in pairs)]
    parts = []
    for reference in dict.fromkeys(pair.reference for pair in pairs):
        lines = [
            f"| Over {titles[reference]} | " + " | ".join(f"{c.group} {c.title}" for c in columns) + " |",
            "|:--|" + "--:|" * len(columns),
        ]
        for method in dict.fromkeys(pair.method for pair in pairs if pair.reference == reference):
            cells = (written(by_place.get((method, reference, c.key)), c.digits) for c in columns)
            lines.append(f"| {titles[method]} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    significant = sum(pair.comparison.significant for pair in pairs)
    parts.append(
        f"Differences of means over seeds [95 % interval over seeds and cases]; bold: adjusted p at most 0.05 (Holm over "
        f"all {len(pairs)} comparisons). {significant} are."
    )
    return "\n\n".join(parts)


def written(comparison: Comparison | None, digits: int) -> str:
    """Return a difference with its interval; nothing where there is none."""
    if comparison is None:
        return ""
    mean = f"{comparison.difference:+.{digits}f}"
    mean = f"**{mean}**" if comparison.significant else mean
    return f"{mean} [{comparison.low:+.{digits}f}, {comparison.high:+.{digits}f}]"


def draw(table: Table, pairs: list[Pair], path: Path) -> None:
    """Draw a panel a column, modes below each other: every row's difference to the two baselines."""
    rows = [row for row in table.rows if row.method != "scratch"]
    modes = list(dict.fromkeys(pair.column.mode for pair in pairs))
    tasks = list(dict.fromkeys(pair.column.task for pair in pairs))
    figure, axes = plt.subplots(
        len(modes), len(tasks), figsize=(2.7 * len(tasks) + 1.6, 0.27 * len(rows) * len(modes) + 1.2),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    colours = dict(zip(BASELINES, COLOURS, strict=False))
    for axis, (mode, task) in zip(axes.ravel(), ((m, t) for m in modes for t in tasks), strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for pair in pairs:
            if pair.column.key != (mode, task) or pair.reference not in colours:
                continue
            height = [row.method for row in rows].index(pair.method)
            one, colour = pair.comparison, colours[pair.reference]
            height += 0.15 if pair.reference == BASELINES[0] else -0.15
            axis.plot([one.low, one.high], [height, height], color=colour, linewidth=1.2)
            axis.plot(
                one.difference,
                height,
                "o",
                ms=4.5,
                color=colour,
                markerfacecolor=colour if one.significant else "white",
            )
        axis.set_title(
            next(f"{c.group} {c.title}" for c in table.columns if c.key == (mode, task)), fontsize=9
        )
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
    axes[0, 0].set_yticks(range(len(rows)), [row.title for row in rows])
    axes[0, 0].invert_yaxis()
    titles = {row.method: row.title for row in table.rows}
    for reference, colour in colours.items():
        axes[0, 0].plot([], [], "o-", ms=4.5, color=colour, label=f"over {titles.get(reference, reference)}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.supxlabel(
        "difference of means in points, 95 % interval; filled: significant after correction", fontsize=8
    )
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    try:
        table = largest_table(arguments.store)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    pairs = compared(table)
    if not pairs:
        sys.exit(f"Error: {arguments.store} has no two rows with three seeds each in a column.")
    if arguments.out:
        draw(table, pairs, arguments.out)
    print(markdown(table, pairs))


if __name__ == "__main__":
    main()
