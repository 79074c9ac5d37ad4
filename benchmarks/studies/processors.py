"""What another kind of processor does to a run: the scores of a store beside those of the same cells, computed elsewhere.

Each row was pretrained and evaluated twice with the same settings, data and seed. What differs is rounding, and what
training makes of it; a row of which nothing is trained shows what the evaluation alone does.

Usage: ``python benchmarks/studies/processors.py --store STORE CSV``; the CSV is an earlier store's
(``ssl3d store export --store EARLIER --out CSV``). Printed: the differences, store minus CSV, in the unit of the scores.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ssl3d.errors import SSL3DError
from ssl3d.registry.registry import registry
from ssl3d.results.results import store
from ssl3d.results.store.record import canonical_json
from ssl3d.results.table.build import called, column_order

CELL = [
    "method", "method_config", "backbone", "pretrain", "pretrain_seed", "seed", "task", "task_data", "mode", "budget",
    "split", "split_cases", "label_fraction",
]  # fmt: skip
"""What two cells have in common: all of the identity of an ordinary one."""
OTHERS = ["weights", "match", "pretrain_step"]
"""What the identity of another than an ordinary cell has; those are left out."""


def differences(here: pd.DataFrame, elsewhere: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method and a column for each mode, task and seed of the cells that both have.

    Args:
        here, elsewhere: a row a record, with the columns :data:`CELL`, title and score.

    Raises:
        ValueError: a column is missing.
    """
    if missing := [name for name in (*CELL, "title", "score") if name not in elsewhere]:
        raise ValueError(f"column {missing[0]} is missing: make the file with ssl3d store export")
    here, elsewhere = (comparable(frame) for frame in (here, elsewhere))
    both = here.merge(elsewhere, on=CELL, suffixes=("", "_elsewhere"), validate="one_to_one")
    both["difference"] = both.score - both.score_elsewhere
    wide = both.pivot(index="title", columns=["mode", "task", "seed"], values="difference")
    return wide[sorted(wide.columns, key=lambda column: (column_order(column[:2]), column[2]))]


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the ordinary cells, with parts of the identity as they stand in a file."""
    ordinary = frame[frame.reindex(columns=OTHERS).isna().all(axis=1)]
    return ordinary.assign(**{name: ordinary[name].map(as_text) for name in CELL})


def as_text(value: Any) -> str:
    return canonical_json(value) if isinstance(value, dict | list) else "" if pd.isna(value) else str(value)


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
        here = store(arguments.store)
        here = replace(here, records=tuple(called(here.records, registry().methods.titles())))
        frame = differences(here.to_dataframe(), pd.read_csv(arguments.csv))
    except (SSL3DError, OSError, ValueError) as error:
        sys.exit(f"Error: {arguments.csv}: {error}")
    if frame.empty:
        sys.exit(f"Error: {arguments.store} and {arguments.csv} have no cell in common.")
    print(markdown(frame))


if __name__ == "__main__":
    main()
