"""The primary comparisons of docs/study.md: each row against scratch and the control, GVSL against restoration alone.

Differences of means over common seeds with 95 % intervals (new seeds and new cases), and p values with Holm's correction
over all of them together, in every column and at every share of the labels.

Usage: ``python benchmarks/studies/primary.py --store STORE [--out PNG]``

A difference is bold when its adjusted p is at most 0.05, and no smaller than the floor of its rows, where one was measured.
Below each table of scratch stands what its columns could have shown. The last line says what a simpler test finds: a paired
t over common seeds, each comparison by its own variance. The figure has a panel a column; dots of what is significant are
filled.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from figure import COLOURS, panels, save
from matplotlib.lines import Line2D
from pairs import Pair, corrected, written
from scipy import stats
from separation import BASELINES
from stores import LEARNED, tables_of, titled, titles_of

from ssl3d.errors import SSL3DError
from ssl3d.results.statistics.comparisons import ColumnData, column_data, compared_with
from ssl3d.results.statistics.inference import holm
from ssl3d.results.table.model import ALPHA, Column, Table

RESTORATION = "gvsl_without_zmatching"
"""GVSL without its matching."""


def pairs_of(table: Table) -> list[tuple[str, str]]:
    """Return (method, reference) of every primary comparison that the table has rows for."""
    methods = [row.method for row in table.rows]
    found = [(m, "scratch") for m in methods if m != "scratch"]
    found += [(m, "random_labels") for m in methods if m not in BASELINES]
    found.append(("gvsl", RESTORATION))
    return [(m, reference) for m, reference in found if {m, reference} <= set(methods)]


class Prepared(NamedTuple):
    """A column at a share of the labels, and its numbers; None where they do not suffice for a comparison."""

    labels: float
    table: Table
    column: Column
    data: ColumnData | None


def prepared(tables: Sequence[tuple[float, Table]]) -> list[Prepared]:
    """Return every column of (share of the labels, table)."""
    return [
        Prepared(labels, table, column, column_data(table, column))
        for labels, table in tables
        for column in table.columns
    ]


def compared(columns: Sequence[Prepared]) -> list[Pair]:
    """Return every primary comparison that has a p value, corrected over all of them."""
    return corrected([pair for column in columns for pair in _compared(*column)])


def _compared(labels: float, table: Table, column: Column, data: ColumnData | None) -> Iterator[Pair]:
    number = {row.method: i for i, row in enumerate(table.rows)}
    pairs = pairs_of(table)
    for reference in dict.fromkeys(reference for _, reference in pairs):
        found = compared_with(table, column, number[reference], data)
        for method in (m for m, other in pairs if other == reference):
            one = found.get((number[method], column.key))
            if one is not None and not math.isnan(one.p):
                mine, other = (table.rows[number[m]].cells[column.key].seeds for m in (method, reference))
                common = tuple(mine[seed] - other[seed] for seed in mine.keys() & other.keys())
                yield Pair(column, labels, method, reference, one, common)


def shows(columns: Sequence[Prepared], tests: int) -> dict[str, float]:
    """Return the smallest difference that each column finds with 80 % probability among so many tests, by title."""
    return {
        titled(column, labels): data.design(tests).detectable()
        for labels, _, column, data in columns
        if data is not None
    }


def by_paired_t(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that a paired t test over common seeds finds, each by its own variance, Holm over all."""
    adjusted = holm([float(stats.ttest_1samp(pair.differences, 0).pvalue) for pair in pairs])
    return [pair for pair, p in zip(pairs, adjusted, strict=True) if p <= ALPHA]


def bands(pairs: Sequence[Pair]) -> list[list[str]]:
    """Return the titles of all columns: the same rows together, then by mode and task."""
    modes, tasks = (list(dict.fromkeys(getattr(p.column, key) for p in pairs)) for key in ("mode", "task"))
    place, rows = {}, defaultdict[str, set[str]](set)
    for pair in pairs:
        title = pair.title
        place[title] = (modes.index(pair.column.mode), tasks.index(pair.column.task), -pair.labels)
        rows[title].add(pair.method)
    found: dict[frozenset[str], list[str]] = {}
    for title in sorted(place, key=lambda title: place[title]):
        found.setdefault(frozenset(rows[title]), []).append(title)
    return list(found.values())


def methods_of(pairs: Sequence[Pair], columns: Collection[str]) -> list[str]:
    """Return the methods that are compared in ``columns``."""
    return list(dict.fromkeys(p.method for p in pairs if p.title in columns))


def markdown(titles: Mapping[str, str], pairs: Sequence[Pair], could: Mapping[str, float]) -> str:
    """Return a table for each band of columns and reference, a row a method.

    Args:
        titles: of the methods.
        pairs: all comparisons.
        could: what each column could have shown, see :func:`shows`.
    """
    by_place = {(p.method, p.reference, p.title): p for p in pairs}
    parts = []
    for columns in bands(pairs):
        for reference in dict.fromkeys(pair.reference for pair in pairs):
            compared_here = [pair for pair in pairs if pair.reference == reference]
            lines = [
                f"| Over {titles[reference]} | " + " | ".join(columns) + " |",
                "|:--|" + "--:|" * len(columns),
            ]
            for method in methods_of(compared_here, columns):
                pairs_here = (by_place.get((method, reference, column)) for column in columns)
                cells = (written(p.comparison, p.column.digits) if p else "" for p in pairs_here)
                lines.append(f"| {titles[method]} | " + " | ".join(cells) + " |")
            if reference == BASELINES[0]:
                least = (f"{could[column]:.1f}" if column in could else "" for column in columns)
                lines.append("| *could have shown* | " + " | ".join(least) + " |")
            parts.append("\n".join(lines))
    significant = sum(pair.comparison.significant for pair in pairs)
    parts.append(
        "Differences of means over seeds [95 % interval over seeds and cases]; bold: adjusted p at most 0.05 (Holm over "
        f"all {len(pairs)} comparisons) and no smaller than the floor, where one was measured. {significant} are. Could "
        f"have shown: what is found with 80 % probability in a table of so many comparisons. {LEARNED}"
    )
    plain = [f"{titles[p.method]} over {titles[p.reference]} in {p.title}" for p in by_paired_t(pairs)]
    parts.append(
        "A plain paired t test over common seeds, each comparison by its own variance, with the same correction, finds "
        f"{len(plain)}: {'; '.join(plain) or 'none'}."
    )
    return "\n\n".join(parts)


def draw(titles: Mapping[str, str], pairs: Sequence[Pair], path: Path) -> None:
    """Draw a panel a column: every row's difference to each reference."""
    parts = [(columns, methods_of(pairs, columns)) for columns in bands(pairs)]
    rows = {column: methods for columns, methods in parts for column in columns}
    figure, axes = panels([(columns, [titles[m] for m in methods]) for columns, methods in parts])
    references = list(dict.fromkeys(pair.reference for pair in pairs))
    colours = dict(zip(references, COLOURS, strict=False))
    for axis in axes.values():
        axis.axvline(0, color="0.6", linewidth=1)
    for pair in pairs:
        column, one, colour = pair.title, pair.comparison, colours[pair.reference]
        height = rows[column].index(pair.method) + 0.25 * (references.index(pair.reference) - 1)
        axes[column].plot([one.low, one.high], [height, height], color=colour, linewidth=1.2)
        face = colour if one.significant else "white"
        axes[column].plot(one.difference, height, "o", ms=5.5, color=colour, markerfacecolor=face)
    handles = [
        Line2D([], [], marker="o", ms=5.5, color=colour, label=f"over {titles.get(reference, reference)}")
        for reference, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.supxlabel(
        f"difference in points, 95 % interval; filled: significant after correction. {LEARNED}", fontsize=8
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
        tables = tables_of(arguments.store)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    columns = prepared(tables)
    pairs = compared(columns)
    if not pairs:
        sys.exit(f"Error: {arguments.store} has no two rows with three seeds each in a column.")
    titles = titles_of(tables)
    print(markdown(titles, pairs, shows(columns, len(pairs))))
    if arguments.out:
        draw(titles, pairs, arguments.out)


if __name__ == "__main__":
    main()
