"""Does a benchmark tell methods apart? Two tables: every score, mean ± standard deviation over seeds; and, a row for each
column of it:

- the best row against scratch, and against the control (random_labels) where there is one: the difference, with the 95 %
  interval that the tables' tests rest on (new seeds and cases; not corrected for choosing the best), where both have
  three seeds;
- all rows against each other, in an analysis of variance over the scores of the seeds. A seed decides the head's
  initial weights and the order of the training crops, the same for every row, so seeds are blocks: F compares the
  variance between methods with what is left of it within a method once the seeds' own means are taken out. Beside
  it, the p without the two baselines, and the p of the analysis that does not take the seeds out. Rows that lack a
  seed of scratch are left out.

Usage: ``python benchmarks/studies/separation.py STORE [--seeds 0 1] > benchmarks/studies/results/separation.md``
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import f, f_oneway
from stores import LEARNED, tables_of, titled, titles_of

from ssl3d.errors import SSL3DError
from ssl3d.results.statistics.comparisons import column_data
from ssl3d.results.statistics.inference import contrasts
from ssl3d.results.table.model import MODES, Cell, Column, Table

BASELINES = ("scratch", "random_labels")
"""Rows that no pretext task has taught anything."""


def difference(table: Table, column: Column, method: str, baseline: str) -> str:
    """Return the difference of two rows of a column, with its 95 % interval where there is one."""
    places = {row.method: i for i, row in enumerate(table.rows)}
    mine, other = (table.rows[places[name]].cells[column.key] for name in (method, baseline))
    data = column_data(table, column)
    if data is not None and {places[method], places[baseline]} <= set(data.rows):
        found = contrasts(data.scores, data.rows.index(places[baseline]), data.of_cases)
        contrast = found[data.rows.index(places[method])]
        if contrast is not None:
            low, high = contrast.interval()
            return f"{contrast.difference:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{mine.mean - other.mean:+.1f}"


def blocked_anova(scores: np.ndarray) -> tuple[float, float]:
    """Return F and p of the methods in a randomized complete block design (two-way, one score a cell).

    Args:
        scores: (methods, seeds).
    """
    methods, seeds = scores.shape
    of_method, of_seed = scores.mean(axis=1, keepdims=True), scores.mean(axis=0, keepdims=True)
    left = scores - of_method - of_seed + scores.mean()
    between = seeds * np.square(of_method - scores.mean()).sum() / (methods - 1)
    within = np.square(left).sum() / ((methods - 1) * (seeds - 1))
    statistic = float(between / within)
    return statistic, float(f.sf(statistic, methods - 1, (methods - 1) * (seeds - 1)))


def cells_of(table: Table, column: Column) -> dict[str, Cell]:
    """Return the cells of a column by method."""
    return {row.method: row.cells[column.key] for row in table.rows if column.key in row.cells}


def separation(table: Table, labels: float = 1.0) -> pd.DataFrame:
    """Return one row a column in which scratch has two seeds at least, and another method all of them.

    Args:
        labels: share of them that the table's evaluations saw.
    """
    rows = []
    for column in table.columns:
        cells = cells_of(table, column)
        titles = {row.method: row.title for row in table.rows}
        scratch = cells.get("scratch")
        if scratch is None or scratch.n_seeds < 2:
            continue
        cells = {method: cell for method, cell in cells.items() if cell.seeds.keys() >= scratch.seeds.keys()}
        pretrained = {method: cell for method, cell in cells.items() if method not in BASELINES}
        if not pretrained:
            continue
        best = max(pretrained, key=lambda method: pretrained[method].mean)
        of_seeds = np.array([[cell.seeds[seed] for seed in scratch.seeds] for cell in cells.values()])
        statistic, p = blocked_anova(of_seeds)
        alone = of_seeds[[method in pretrained for method in cells]]
        row = {
            "Column": titled(column, labels), "Rows": len(cells), "Seeds": scratch.n_seeds,
            "Best": f"{titles[best]} {cells[best].mean:.1f}",
        }  # fmt: skip
        for baseline in BASELINES:
            if baseline in cells:
                row[f"Over {titles[baseline].lower()} [95 %]"] = difference(table, column, best, baseline)
        row |= {
            "F": f"{statistic:.1f}", "p": f"{p:.2g}",
            "p, no baselines": f"{blocked_anova(alone)[1]:.2g}" if len(alone) > 1 else "",
            "p, seeds not taken out": f"{f_oneway(*of_seeds).pvalue:.2g}",
        }  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def scores(tables: Iterable[tuple[float, Table]]) -> pd.DataFrame:
    """Return every row's mean over seeds, ± their standard deviation, and their number where it is not the column's.

    Args:
        tables: share of the labels and table.
    """
    tables = list(tables)
    titles = titles_of(tables)
    columns: dict[str, dict[str, str]] = {}
    for labels, table in tables:
        for column in table.columns:
            cells = cells_of(table, column)
            best = max(cell.mean for cell in cells.values())
            usual = statistics.mode(cell.n_seeds for cell in cells.values())
            columns[titled(column, labels)] = {
                method: _score(cell, cell.mean == best, usual) for method, cell in cells.items()
            }
    found = {name: [columns[name].get(method, "") for method in titles] for name in columns}
    return pd.DataFrame({"Method": list(titles.values()), **found})


def _of_modes(table: Table, modes: Collection[str]) -> Table:
    """Return the columns of these modes, and the rows that have one."""
    columns = tuple(column for column in table.columns if column.mode in modes)
    keys = {column.key for column in columns}
    return replace(
        table, columns=columns, rows=tuple(row for row in table.rows if not keys.isdisjoint(row.cells))
    )


def _score(cell: Cell, best: bool, usual: int) -> str:
    mean = f"**{cell.mean:.1f}**" if best else f"{cell.mean:.1f}"
    spread = f" ± {statistics.stdev(cell.seeds.values()):.1f}" if cell.n_seeds > 1 else ""
    return f"{mean}{spread}" + (f" ({cell.n_seeds})" if cell.n_seeds != usual else "")


def markdown(frame: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    lines = [list(frame.columns), [":--", *["--:"] * (len(frame.columns) - 1)], *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="look at these only [all]")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="columns of these only [all]"
    )
    parser.add_argument("--part", choices=("scores", "methods"), help="print one of the two tables [both]")
    arguments = parser.parse_args()
    try:
        tables = tables_of(arguments.store, arguments.seeds)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    tables = [(labels, _of_modes(table, arguments.modes)) for labels, table in tables]
    frame = pd.concat([separation(table, labels) for labels, table in tables]).fillna("")
    if frame.empty:
        sys.exit(
            "Error: no column has scratch and another method with two seeds each: bench with --seeds 0,1,2."
        )
    note = (
        "Bold: the highest. In parentheses: seeds, where they are not as many as elsewhere in the column; a comparison is "
        f"over the seeds of both rows, and is not the difference of these means. {LEARNED}"
    )
    parts = {"scores": [markdown(scores(tables)), note], "methods": [markdown(frame)]}
    chosen = [arguments.part] if arguments.part else list(parts)
    print("\n\n".join(line for part in chosen for line in parts[part]))


if __name__ == "__main__":
    main()
