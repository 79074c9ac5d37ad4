"""What another kind of processor does to a run: the scores of a store beside those of the same cells, computed elsewhere.

Each row was pretrained and evaluated twice with the same settings, data and seed. What differs is rounding, and what
training makes of it; a row of which nothing is trained shows what the evaluation alone does.

Usage: ``python benchmarks/studies/processors.py --store STORE CSV``; the CSV is an earlier store's
(``ssl3d store export --store EARLIER --out CSV``). Printed: the differences, store minus CSV, in the unit of the scores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from ssl3d.errors import SSL3DError
from ssl3d.results.results import store
from ssl3d.results.table.model import TASKS

CELL = ["method", "task", "mode", "seed", "pretrain_seed", "split", "label_fraction", "task_data"]


def differences(here: pd.DataFrame, elsewhere: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method and a column for each mode, task and seed of the cells that both have.

    Args:
        here, elsewhere: a row a record, with the columns :data:`CELL` and score.
    """
    both = here.merge(elsewhere, on=CELL, suffixes=("", "_elsewhere"))
    both["difference"] = both.score - both.score_elsewhere
    wide = both.pivot_table(index="title", columns=["mode", "task", "seed"], values="difference", sort=False)
    return wide[sorted(wide.columns, key=lambda column: (column[0], place(column[1]), column[2]))]


def place(task: str) -> tuple[int, str]:
    """Return what sorts tasks as tables do."""
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)


def markdown(frame: pd.DataFrame) -> str:
    """Return the table, the rows that move least first."""
    heads = [f"{task.upper()} {mode}, seed {seed}" for mode, task, seed in frame.columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name in frame.abs().max(axis=1).sort_values(kind="stable").index:
        cells = ("" if pd.isna(x) else f"{x:+.1f}".replace("-0.0", "+0.0") for x in frame.loc[name])
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("+0.0", "0.0")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="of an earlier store")
    parser.add_argument("--store", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        here = store(arguments.store).to_dataframe()
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    frame = differences(here, pd.read_csv(arguments.csv))
    if frame.empty:
        sys.exit(f"Error: {arguments.store} and {arguments.csv} have no cell in common.")
    print(markdown(frame))


if __name__ == "__main__":
    main()
