"""Does a factor change what the rows gain? Each row's change from the lowest value of a setting to the highest.

``run.py`` computes a row, a seed and a column at each value of the setting. This takes the change of every seed and case
that a row has at both ends, and tests the changes of two rows against each other as tables test scores: seeds as blocks,
moderated variances, new seeds and new cases, Holm over all of them. No floor is taken into account.

Usage: ``python benchmarks/studies/interaction.py --store STORE --factor phantoms.appearance_variance [--out PNG]``; the
figure has the scores themselves, mean and range of the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from figure import draw
from pairs import Pair, corrected, written
from separation import cells_of
from stores import LEARNED, tables_by, titled, titles_of

from ssl3d.errors import SSL3DError
from ssl3d.results.statistics.comparisons import ColumnData, as_arrays, by_seed, comparable_rows
from ssl3d.results.statistics.inference import LEAST_SEEDS, contrasts, mean_spread
from ssl3d.results.statistics.samples import CaseKey, Influence, Sample, sample
from ssl3d.results.table.model import Column, Comparison, Table


@dataclass(frozen=True)
class Changes:
    """What the factor does to the rows of a column, on the cases that all of them have at its lowest and highest value.

    Attributes:
        methods: (M) the rows; of each, the seeds that it has at both values.
        means: (M, V) of those seeds at each value of the factor; NaN where there is none.
        own: change of each row from the lowest value to the highest and half its 95 % interval, by method.
        data: the changes (M, S) over rows and seeds, and their part that is due to the cases.
    """

    column: Column
    methods: list[str]
    means: np.ndarray
    own: dict[str, tuple[float, float]]
    data: ColumnData


def changes(tables: Mapping[float, Table], column: Column) -> Changes:
    """Return the changes of a column's rows; a row that cannot be compared is named on stderr.

    Args:
        tables: by value of the factor, the lowest first.
        column: of the first table.

    Raises:
        SSL3DError: no two rows can be compared, or the labels of a case differ.
    """
    low, *_, high = tables.values()
    title = titled(column, 1.0)
    ends = [_samples(table, column) for table in (low, high)]
    samples: dict[str, list[Sample]] = {}
    for method in dict.fromkeys(row.method for table in tables.values() for row in table.rows):
        pair = [of[method] for of in ends if method in of]
        if len(pair) == 2 and len(_common_seeds(pair)) >= LEAST_SEEDS:
            samples[method] = pair
        else:
            print(
                f"{title}: {method} is left out, it has no {LEAST_SEEDS} seeds at both values.",
                file=sys.stderr,
            )
    if len(samples) < 2:
        raise SSL3DError(f"{title} has no two rows with {LEAST_SEEDS} seeds at both values.")
    every = [one for pair in samples.values() for one in pair]
    shared = set.intersection(*(set(one.cases) for one in every))
    cases = [case for case in every[0].cases if case in shared]
    labels = [one.on(cases).targets for one in every]
    targets = {None if of is None else tuple(of.tolist()) for of in labels}
    if not cases or len(targets) > 1:
        raise SSL3DError(f"{title}: cases, or their labels, are others at the two values.")
    seeds = {method: _common_seeds(pair) for method, pair in samples.items()}
    apart = {method: _change(pair, cases, seeds[method]) for method, pair in samples.items()}
    return Changes(
        column,
        list(samples),
        np.array(
            [[_mean(table, column, method, seeds[method]) for table in tables.values()] for method in samples]
        ),
        {
            method: (float(one.scores.mean()), mean_spread(one).half_width(0.95))
            for method, one in apart.items()
        },
        as_arrays(list(range(len(samples))), list(apart.values()), list(seeds.values()), len(cases)),
    )


def _samples(table: Table, column: Column) -> dict[str, Sample]:
    """Return the numbers of every row that tables compare, one line a seed, by method."""
    rows = [table.rows[number] for number in comparable_rows(table, column)]
    return {row.method: by_seed(sample(row.cells[column.key], column.metric)) for row in rows}


def _common_seeds(pair: Sequence[Sample]) -> list[int]:
    return sorted(set.intersection(*({seed for seed, _ in one.seeds} for one in pair)))


def _change(pair: Sequence[Sample], cases: Sequence[CaseKey], seeds: Sequence[int]) -> Influence:
    """Return the second sample's influence minus the first's, on these cases and seeds."""
    low, high = (
        one.on(cases).influence().of([[seed for seed, _ in one.seeds].index(seed) for seed in seeds])
        for one in pair
    )
    return high - low


def _mean(table: Table, column: Column, method: str, seeds: Sequence[int]) -> float:
    """Return a row's mean over those of ``seeds`` that it has; NaN where it has none."""
    cell = cells_of(table, column).get(method)
    scores = [score for (seed, _), score in cell.seeds.items() if seed in seeds] if cell else []
    return statistics.fmean(scores) if scores else math.nan


def tested(found: Sequence[Changes], references: Sequence[str]) -> list[Pair]:
    """Test the changes of all rows against those of each reference, no two rows twice; p corrected over all.

    Raises:
        SSL3DError: there is no column, or none has one of the references.
    """
    if not found:
        raise SSL3DError("no column can be compared")
    references = list(dict.fromkeys(references))
    for reference in references:
        if not any(reference in of.methods for of in found):
            rows = ", ".join(dict.fromkeys(method for of in found for method in of.methods))
            raise SSL3DError(f"--against {reference}: no such row. There are: {rows}.")
    apart = []
    for of in found:
        for place, reference in enumerate(references):
            if reference not in of.methods:
                continue
            tests = contrasts(of.data.scores, of.methods.index(reference), of.data.of_cases)
            for method, one in zip(of.methods, tests, strict=True):
                if method in references[: place + 1]:
                    continue
                if one is None or math.isnan(one.p):
                    why = f"too few common seeds or cases to compare {method} with {reference}"
                    print(f"{titled(of.column, 1.0)}: {why}.", file=sys.stderr)
                    continue
                comparison = Comparison(reference, one.difference, *one.interval(), one.p)
                apart.append(Pair(of.column, 1.0, method, reference, comparison))
    return corrected(apart)


def markdown(
    tables: Mapping[float, Table], found: Sequence[Changes], apart: Sequence[Pair], references: Sequence[str]
) -> str:
    """Return a line for each column and row, and what can be said of them."""
    titles = titles_of((1.0, table) for table in tables.values())
    by_place = {(pair.column.key, pair.method, pair.reference): pair for pair in apart}
    references = list(dict.fromkeys(references))
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
                titled(of.column, 1.0), titles[method],
                *("" if math.isnan(mean) else f"{mean:.{digits}f}" for mean in means),
                written(Comparison("", change, change - half, change + half), digits),
                *(written(pair.comparison, digits) if pair else "" for pair in compared),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted({int((~np.isnan(row)).sum()) for of in found for row in of.data.scores})
    could = (
        f"{titled(of.column, 1.0)} {of.data.design(len(apart)).detectable():.{of.column.digits}f}"
        for of in found
    )
    significant = sum(pair.comparison.significant for pair in apart)
    return "\n".join([
        *lines,
        "",
        f"Means over {' or '.join(map(str, seeds))} seeds [95 % interval over seeds and cases]; bold: adjusted p at most "
        f"0.05 (Holm over all {len(apart)} comparisons of two changes). {significant} are. What a comparison finds with "
        f"80 % probability: {', '.join(could)}. {LEARNED}",
    ])  # fmt: skip


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
    found: list[Changes] = []
    try:
        tables = tables_by(arguments.store, arguments.factor)
        for column in next(iter(tables.values())).columns:
            try:
                found.append(changes(tables, column))
            except SSL3DError as error:
                print(f"Left out: {error}", file=sys.stderr)
        apart = tested(found, arguments.against)
    except SSL3DError as error:
        sys.exit(f"Error: {arguments.store}: {error}")
    print(markdown(tables, found, apart, arguments.against))
    if arguments.out:
        factor = arguments.factor.rpartition(".")[2].replace("_", " ")
        draw(frame_of(tables), f"Scores over {factor}: mean and range of the seeds", factor, arguments.out)


if __name__ == "__main__":
    main()
