"""Every seed of every row: a panel a column of the table, a dot a seed, a mark at the mean; the two baselines run through.

Usage: ``python benchmarks/studies/seeds.py STORE --out benchmarks/studies/results/comparison.png``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from figure import COLOURS, save
from separation import BASELINES
from stores import largest_table

from ssl3d.errors import SSL3DError
from ssl3d.results.table.model import Table

LINES = dict(zip(BASELINES, (("0.35", "--"), (COLOURS[1], ":")), strict=True))


def draw(table: Table, path: Path) -> None:
    """Draw ``table`` to a PNG."""
    rows = table.rows
    figure, axes = plt.subplots(
        1, len(table.columns), figsize=(2.6 * len(table.columns) + 1, 0.26 * len(rows) + 1),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, column in zip(axes[0], table.columns, strict=True):
        for height, row in enumerate(rows):
            if column.key not in row.cells:
                continue
            cell = row.cells[column.key]
            colour, dashes = LINES.get(row.method, (COLOURS[0], ""))
            if dashes:
                axis.axvline(cell.mean, color=colour, linestyle=dashes, linewidth=1, zorder=0)
            axis.plot(list(cell.seeds.values()), [height] * cell.n_seeds, "o", ms=4, color=colour, alpha=0.6)
            axis.plot(cell.mean, height, "|", ms=12, mew=2, color=colour)
        axis.set_title(f"{column.title}, {column.group.lower()}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
    axes[0, 0].set_yticks(range(len(rows)), [row.title for row in rows])
    axes[0, 0].invert_yaxis()
    figure.supxlabel("%; a dot a seed, a mark at their mean", fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    try:
        table = largest_table(arguments.store)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    draw(table, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
