"""Does a benchmark tell methods apart? One row a column of the table.

- the best row against scratch: the difference, with a 95 % interval from a bootstrap that resamples seeds
  and cases crossed, the same cases for both;
- all rows against each other: one-way analysis of variance over the scores of the seeds (F: variance between
  methods over variance between seeds of one method).

Usage: ``python benchmarks/study/separation.py STORE > benchmarks/results/studies/separation.md``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import f_oneway

from ssl3d.errors import SSL3DError
from ssl3d.plugins import registry
from ssl3d.results.statistics import bootstrap_scores, draw_cases, sample
from ssl3d.results.store import ResultStore
from ssl3d.results.table import Cell, Table, build_table


def difference(cell: Cell, reference: Cell, metric: str, seed: int = 0) -> tuple[float, float, float]:
    """Return the difference of two cells in percentage points, and its 95 % interval."""
    rng = np.random.default_rng(seed)
    ours, theirs = sample(cell, metric), sample(reference, metric)
    counts = draw_cases(ours, rng)  # (B, N)
    drawn = bootstrap_scores(ours, rng, counts) - bootstrap_scores(theirs.on(ours.cases), rng, counts)  # (B,)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return cell.mean - reference.mean, float(low), float(high)


def separation(table: Table) -> pd.DataFrame:
    """Return one row a column in which scratch and another method have two seeds at least."""
    rows = []
    for column in table.columns:
        cells = {row.title: row.cells[column.key] for row in table.rows if column.key in row.cells}
        cells = {title: cell for title, cell in cells.items() if cell.n_seeds > 1}
        scratch = next(
            (cells[r.title] for r in table.rows if r.method == "scratch" and r.title in cells), None
        )
        if scratch is None or len(cells) < 2:
            continue
        best = max(
            (title for title in cells if cells[title] is not scratch), key=lambda title: cells[title].mean
        )
        apart, low, high = difference(cells[best], scratch, column.metric)
        test = f_oneway(*(list(cell.seeds.values()) for cell in cells.values()))
        rows.append({
            "Column": f"{column.group} {column.title}", "Methods": len(cells), "Seeds": scratch.n_seeds,
            "Scratch": f"{scratch.mean:.1f}", "Best": f"{best} {cells[best].mean:.1f}",
            "Difference [95 %]": f"{apart:+.1f} [{low:+.1f}, {high:+.1f}]",
            "F": f"{test.statistic:.1f}", "p": f"{test.pvalue:.2g}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    try:
        records, _ = ResultStore(parser.parse_args().store).records()
        model = build_table(records, registry().methods.names())
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    frame = separation(max(model.tables, key=lambda table: len(table.rows)))
    if frame.empty:
        sys.exit(
            "Error: no column has scratch and another method with two seeds each: bench with --seeds 0,1,2."
        )
    print("| " + " | ".join(frame.columns) + " |\n" + "|:--" * len(frame.columns) + "|")
    for row in frame.itertuples(index=False):
        print("| " + " | ".join(str(value) for value in row) + " |")


if __name__ == "__main__":
    main()
