"""Does a factor change what the rows gain? Each row's change from the lowest value of a setting to the highest.

``run.py`` computes a row, a seed and a column at each value of the setting; of those that the rows have in common this
takes the change of every seed and case, and tests the changes of two rows against each other as tables test scores: seeds
as blocks, moderated variances, new seeds and new cases, Holm over all of them.

Usage: ``python benchmarks/studies/interaction.py --store STORE --factor phantoms.appearance_variance [--out PNG]``; the
figure has the scores themselves, mean and range of the seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from figure import draw
from stores import LEARNED, tables_by, titled, titles_of

from ssl3d.errors import SSL3DError
from ssl3d.results.statistics.comparisons import ColumnData, cases_part
from ssl3d.results.statistics.inference import LEAST_SEEDS, contrasts, holm, mean_spread
from ssl3d.results.statistics.samples import Influence, sample
from ssl3d.results.table.model import ALPHA, Column, Table


@dataclass(frozen=True)
class Changes:
    """What the factor does to the rows of a column, on the seeds and cases that all of them have at both values.

    Attributes:
        methods: (M) the rows.
        means: (M, V) of each row at each value of the factor, over those seeds.
        own: change of each row from the first value to the last and half its 95 % interval, by method.
        data: the changes (M, S) over rows and seeds, and their part that is due to the cases.
    """

    column: Column
    methods: list[str]
    means: np.ndarray
    own: dict[str, tuple[float, float]]
    data: ColumnData


@dataclass(frozen=True)
class Apart:
    """The change of a row minus that of another: (low, high) is its 95 % interval."""

    column: Column
    method: str
    reference: str
    difference: float
    low: float
    high: float
    p: float


def changes(tables: Mapping[float, Table], column: Column) -> Changes | None:
    """Return the changes of a column's rows; None where no two rows have :data:`LEAST_SEEDS` seeds in common.

    Args:
        tables: by value of the factor, the lowest first.
        column: of the first table.
    """
    cells = [
        {row.method: row.cells[column.key] for row in table.rows if column.key in row.cells}
        for table in tables.values()
    ]
    methods = [method for method in cells[0] if all(method in of for of in cells)]
    samples = [[sample(of[method], column.metric) for method in methods] for of in cells]  # V of M
    every = [one for of_value in samples for one in of_value]
    if len(methods) < 2:
        return None
    seeds = sorted(set.intersection(*({seed for seed, _ in one.seeds} for one in every)))
    shared = set.intersection(*(set(one.cases) for one in every))
    if len(seeds) < LEAST_SEEDS or not shared:
        return None
    cases = [case for case in every[0].cases if case in shared]

    def influence(place: int, row: int) -> Influence:
        one = samples[place][row].on(cases)
        own = [seed for seed, _ in one.seeds]
        return one.influence().of([own.index(seed) for seed in seeds])

    of_values = [[influence(place, row) for row in range(len(methods))] for place in range(len(cells))]
    apart = [high - low for low, high in zip(of_values[0], of_values[-1], strict=True)]  # M
    scores = np.stack([one.scores for one in apart])  # (M, S)
    blocks = [np.stack(of) for of in zip(*(one.blocks for one in apart), strict=True)]  # each (M, S, n)
    return Changes(
        column,
        methods,
        np.array([[one.scores.mean() for one in of_row] for of_row in zip(*of_values, strict=True)]),
        {
            method: (float(one.scores.mean()), mean_spread(one).half_width(0.95))
            for method, one in zip(methods, apart, strict=True)
        },
        ColumnData(list(range(len(methods))), scores, cases_part(blocks, apart[0].weight), len(cases)),
    )


def tested(found: Sequence[Changes], references: Sequence[str]) -> list[Apart]:
    """Test the changes of all rows against those of each reference, no two rows twice; p corrected over all."""
    apart = []
    for of in found:
        for place, reference in enumerate(references):
            if reference not in of.methods:
                continue
            tests = contrasts(of.data.scores, of.methods.index(reference), of.data.of_cases)
            for method, one in zip(of.methods, tests, strict=True):
                if one is None or method in references[:place]:
                    continue
                half = one.spread.half_width(0.95)
                low, high = one.difference - half, one.difference + half
                apart.append(Apart(of.column, method, reference, one.difference, low, high, one.p))
    adjusted = holm([one.p for one in apart])
    return [replace(one, p=p) for one, p in zip(apart, adjusted, strict=True)]


def markdown(
    tables: Mapping[float, Table], found: Sequence[Changes], apart: Sequence[Apart], references: Sequence[str]
) -> str:
    """Return a line for each column and row, and what can be said of them."""
    titles = titles_of((1.0, table) for table in tables.values())
    by_place = {(one.column.key, one.method, one.reference): one for one in apart}
    references = [reference for reference in references if any(reference in of.methods for of in found)]
    against = "".join(f" minus that of {titles[reference]} |" for reference in references)
    lines = [
        f"| Column | Row | {' | '.join(f'{value:g}' for value in tables)} | change |{against}",
        "|:--|:--|" + "--:|" * (len(tables) + 1 + len(references)),
    ]
    for of in found:
        digits = of.column.digits
        for method, means in zip(of.methods, of.means, strict=True):
            change, half = of.own[method]
            compared = [by_place.get((of.column.key, method, reference)) for reference in references]
            cells = [
                titled(of.column, 1.0), titles[method], *(f"{mean:.{digits}f}" for mean in means),
                between(change, change - half, change + half, digits),
                *(between(a.difference, a.low, a.high, digits, a.p) if a else "" for a in compared),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted({of.data.scores.shape[1] for of in found})
    could = (f"{titled(of.column, 1.0)} {of.data.design(len(apart)).detectable():.1f}" for of in found)
    significant = sum(one.p <= ALPHA for one in apart)
    return "\n".join([
        *lines,
        "",
        f"Means over {' or '.join(map(str, seeds))} seeds [95 % interval over seeds and cases]; bold: adjusted p at most "
        f"0.05 (Holm over all {len(apart)} comparisons of two changes). {significant} are. What a comparison finds with "
        f"80 % probability: {', '.join(could)}. {LEARNED}",
    ])  # fmt: skip


def between(value: float, low: float, high: float, digits: int, p: float = math.nan) -> str:
    """Return a value with its interval, bold where its p is small enough."""
    text = f"{value:+.{digits}f}"
    return f"{f'**{text}**' if p <= ALPHA else text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def frame_of(tables: Mapping[float, Table]) -> pd.DataFrame:
    """Return a row for each score of a seed, as :func:`figure.draw` takes them."""
    return pd.DataFrame([
        {
            "value": f"{value:g}", "method": row.method, "task": task, "mode": mode, "seed": seed, "step": 0,
            "score": score,
        }
        for value, table in tables.items()
        for row in table.rows
        for (mode, task), cell in row.cells.items()
        for (seed, _), score in cell.seeds.items()
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--factor", required=True, metavar="SETTING", help="number that differs between runs")
    parser.add_argument(
        "--against",
        nargs="+",
        default=["scratch"],
        metavar="METHOD",
        help="rows to compare others with [scratch]",
    )
    parser.add_argument("--out", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    try:
        tables = tables_by(arguments.store, arguments.factor)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    first = next(iter(tables.values()))
    found = [of for of in (changes(tables, column) for column in first.columns) if of is not None]
    apart = tested(found, arguments.against)
    if not apart:
        sys.exit(
            f"Error: {arguments.store}: no row of {', '.join(arguments.against)} has {LEAST_SEEDS} seeds in common with "
            f"another at every value of {arguments.factor}."
        )
    print(markdown(tables, found, apart, arguments.against))
    if arguments.out:
        factor = arguments.factor.rpartition(".")[2].replace("_", " ")
        draw(frame_of(tables), f"Scores over {factor}: mean and range of the seeds", factor, arguments.out)


if __name__ == "__main__":
    main()
