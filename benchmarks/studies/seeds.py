"""Every seed of every row: a panel a column, a dot a seed, a mark at the mean; the two baselines run through.

Usage: ``python benchmarks/studies/seeds.py STORE --out benchmarks/studies/results/comparison.png``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from figure import COLOURS, panels, save
from separation import BASELINES
from stores import LEARNED, tables_of, titled, titles_of

from ssl3d.errors import SSL3DError
from ssl3d.results.table.model import Column, Row, Table

LINES = dict(zip(BASELINES, (("0.35", "--"), (COLOURS[1], ":")), strict=True))


def draw(tables: Sequence[tuple[float, Table]], path: Path) -> None:
    """Draw the tables of a store, each with its share of the labels, to a PNG."""
    columns = {
        titled(column, labels): (column, table) for labels, table in tables for column in table.columns
    }
    bands: dict[tuple[str, ...], list[str]] = {}
    for title, (column, table) in columns.items():
        bands.setdefault(tuple(row.method for row in rows_of(table, column)), []).append(title)
    named = titles_of(tables)
    figure, axes = panels([
        (titles, [named[row.method] for row in rows_of(columns[titles[0]][1], columns[titles[0]][0])])
        for titles in bands.values()
    ])  # fmt: skip
    for title, (column, table) in columns.items():
        for height, row in enumerate(rows_of(table, column)):
            cell = row.cells[column.key]
            colour, dashes = LINES.get(row.method, (COLOURS[0], ""))
            if dashes:
                axes[title].axvline(cell.mean, color=colour, linestyle=dashes, linewidth=1, zorder=0)
            axes[title].plot(
                list(cell.seeds.values()), [height] * cell.n_seeds, "o", ms=4, color=colour, alpha=0.6
            )
            axes[title].plot(cell.mean, height, "|", ms=12, mew=2, color=colour)
    figure.supxlabel(f"%; a dot a seed, a mark at their mean. {LEARNED}", fontsize=8)
    save(figure, path)


def rows_of(table: Table, column: Column) -> list[Row]:
    """Return the rows that have a cell in ``column``."""
    return [row for row in table.rows if column.key in row.cells]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    try:
        tables = tables_of(arguments.store)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    draw(tables, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
