"""What another kind of processor does to a run: the scores of a store beside those of the same cells, computed elsewhere.

Each row was pretrained and evaluated twice with the same settings, data and seed. What differs is rounding, and what
training makes of it; a row of which nothing is trained shows what the evaluation alone does.

Usage: ``python benchmarks/studies/processors.py --store STORE OTHER``, another store or its CSV (``ssl3d store export``).
Printed: the differences, store minus other, in the unit of the scores; with ``--over-seeds`` how far rounding alone moves a
run, beside how far a seed does.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import chi2

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


def paired(here: pd.DataFrame, elsewhere: pd.DataFrame) -> pd.DataFrame:
    """Return the ordinary cells that both have, with both scores and their difference.

    Args:
        here, elsewhere: a row a record, with the columns :data:`CELL`, title and score.

    Raises:
        ValueError: a column is missing, or two studies are mixed: a row, column and seed has several cells.
    """
    for frame in (here, elsewhere):
        if missing := [name for name in (*CELL, "title", "score") if name not in frame]:
            raise ValueError(f"column {missing[0]} is missing: make the file with ssl3d store export")
    here, elsewhere = (comparable(frame) for frame in (here, elsewhere))
    both = here.merge(elsewhere, on=CELL, suffixes=("", "_elsewhere"), validate="one_to_one")
    repeated = both[both.duplicated(["title", "mode", "task", "seed"])]
    if len(repeated):
        cell = repeated.iloc[0]
        what = f"{cell.title}, {cell.task} {cell['mode']}, seed {cell.seed}"
        raise ValueError(
            f"{what}: both have several such cells; give the records of one study, and of one split"
        )
    return both.assign(difference=both.score - both.score_elsewhere)


def differences(both: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method and a column for each mode, task and seed of :func:`paired` cells."""
    wide = both.pivot(index="title", columns=["mode", "task", "seed"], values="difference")
    return wide[sorted(wide.columns, key=lambda column: (column_order(column[:2]), column[2]))]


def luck(both: pd.DataFrame) -> pd.DataFrame:
    """Return what rounding and what a seed do to a score, for each row and column with two seeds or more.

    Two runs that differ by rounding alone have a difference of twice the variance of one, so the standard deviation
    ``rounding`` is the root mean square of the differences over the root of two; ``seed`` is that between seeds (n - 1) of
    both stores, in which the luck of rounding is contained; ``seeds`` is their number.
    """
    rows = []
    for (title, mode, task), part in both.groupby(["title", "mode", "task"], sort=False):
        if len(part) > 1:
            rounding = math.sqrt(float(part.difference.pow(2).mean()) / 2)
            seed = math.sqrt((float(part.score.var()) + float(part.score_elsewhere.var())) / 2)
            rows.append((title, mode, task, rounding, seed, len(part)))
    return pd.DataFrame(rows, columns=["title", "mode", "task", "rounding", "seed", "seeds"])


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


def summary(frame: pd.DataFrame) -> str:
    """Return :func:`luck` as a table, the rows that rounding moves least first."""
    columns = sorted(set(zip(frame["mode"], frame.task, strict=True)), key=column_order)
    cells = {
        (row.title, row.mode, row.task): f"{row.rounding:.1f} of {row.seed:.1f}" for row in frame.itertuples()
    }
    order = frame.groupby("title").rounding.max().sort_values(kind="stable").index
    lines = [
        "| | " + " | ".join(f"{task.upper()} {mode}" for mode, task in columns) + " |",
        "|---|" + "--:|" * len(columns),
        *(
            f"| {title} | " + " | ".join(cells.get((title, *column), "") for column in columns) + " |"
            for title in order
        ),
    ]
    counts = sorted(set(frame.seeds))
    low, high = (math.sqrt(counts[0] / chi2.ppf(q, counts[0])) for q in (0.975, 0.025))
    lines += [
        "",
        f"Standard deviation by rounding alone, of that between seeds (which contains it), in points; "
        f"{' or '.join(map(str, counts))} seeds. With {counts[0]} the first is known to a factor of {low:.1f} to {high:.1f} "
        "(95 %).",
    ]
    return "\n".join(lines)


def records_of(source: Path) -> pd.DataFrame:
    """Return the records of a store, or of a CSV of it, a row each.

    Raises:
        ValueError: there is none, or it cannot be read; the message begins with ``source``.
    """
    try:
        if source.is_file():
            return pd.read_csv(source)
        found = store(source)
        return replace(
            found, records=tuple(called(found.records, registry().methods.titles()))
        ).to_dataframe()
    except (SSL3DError, OSError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="another store, or its CSV")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--over-seeds", action="store_true", help="the luck of rounding beside that of seeds")
    arguments = parser.parse_args()
    names = f"{arguments.store} and {arguments.other}"
    try:
        frames = [records_of(source) for source in (arguments.store, arguments.other)]
    except ValueError as error:
        sys.exit(f"Error: {error}")
    try:
        both = paired(*frames)
    except ValueError as error:
        sys.exit(f"Error: {names}: {error}.")
    if both.empty:
        sys.exit(f"Error: {names} have no cell in common.")
    if not arguments.over_seeds:
        print(markdown(differences(both)))
        return
    found = luck(both)
    if found.empty:
        sys.exit(f"Error: {names} have no two seeds of a row in common.")
    print(summary(found))


if __name__ == "__main__":
    main()
