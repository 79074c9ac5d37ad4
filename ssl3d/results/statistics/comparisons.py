"""Tests of the rows of a table against a reference, corrected over the table, and what the table could show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ssl3d.errors import ConfigError, nearest
from ssl3d.results.scores import sign
from ssl3d.results.statistics.inference import (
    LEAST_SEEDS,
    Contrast,
    Design,
    SeedSpread,
    case_variance,
    contrasts,
    holm,
    seed_spread,
)
from ssl3d.results.statistics.samples import WITHOUT_STATISTICS, Influence, Sample, pretrainings, sample
from ssl3d.results.table.model import BASELINE, Column, Comparison, Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

REFERENCES = (BASELINE, "best")

Key = tuple[int, tuple[str, str]]
"""(number of the row, (mode, task))"""


@dataclass(frozen=True)
class ColumnData:
    """The rows of a column that can be compared with each other, as arrays.

    Attributes:
        rows: their numbers in the table.
        scores: (M, S) over rows and seeds, on the cases that all rows have; NaN where a row lacks a seed.
        of_cases: part of the variance of a difference of two rows that is due to the choice of the cases, on
            average; NaN where it cannot be computed.
        cases: that all rows have.
    """

    rows: list[int]
    scores: Floats
    of_cases: float
    cases: int

    @cached_property
    def spread(self) -> SeedSpread:
        return seed_spread(self.scores)

    @property
    def seeds(self) -> int:
        """Seeds that most rows have."""
        counts = [sum(not math.isnan(value) for value in row) for row in self.scores]
        return max(set(counts), key=counts.count)

    def design(self, tests: int) -> Design:
        return Design(self.spread.mean, self.of_cases, len(self.rows), self.seeds, tests)


def column_data(table: Table, column: Column, least: int = LEAST_SEEDS) -> ColumnData | None:
    """Return the numbers of a column; None where fewer than two rows have ``least`` trainings.

    Cells that lack folds, or whose outputs do not differ between cases, are left out.
    """
    if column.metric in WITHOUT_STATISTICS:
        return None
    rows = comparable_rows(table, column, least)
    if len(rows) < 2:
        return None
    samples = [by_seed(sample(table.rows[i].cells[column.key], column.metric)) for i in rows]
    shared = set.intersection(*(set(one.cases) for one in samples))
    cases = [case for case in samples[0].cases if case in shared]
    if not cases:
        return None
    influences = [one.on(cases).influence() for one in samples]
    own = [[seed for seed, _ in one.seeds] for one in samples]
    return as_arrays(rows, influences, own, len(cases))


def as_arrays(
    rows: list[int], influences: Sequence[Influence], own: Sequence[Sequence[int]], cases: int
) -> ColumnData:
    """Return the arrays of rows that have ``influences`` on the same cases, each of its ``own`` seeds."""
    import numpy as np

    seeds = sorted({seed for of in own for seed in of})
    scores = np.full((len(rows), len(seeds)), np.nan)
    for place, (of, influence) in enumerate(zip(own, influences, strict=True)):
        scores[place, [seeds.index(seed) for seed in of]] = influence.scores
    return ColumnData(rows, scores, variance_of_cases(influences, own), cases)


def comparable_rows(table: Table, column: Column, least: int = LEAST_SEEDS) -> list[int]:
    """Return the numbers of the rows whose cell is whole, differs between cases, and has ``least`` trainings behind it."""
    return [
        i
        for i, row in enumerate(table.rows)
        if column.key in row.cells
        and row.cells[column.key].ranked
        and pretrainings(list(row.cells[column.key].seeds)) >= least
    ]


def by_seed(one: Sample) -> Sample:
    """Return the sample with one line a seed of the evaluation, averaged over trainings that share it."""
    import numpy as np

    seeds = list(dict.fromkeys(seed for seed, _ in one.seeds))
    if len(seeds) == len(one.seeds):
        return one
    lines = [[k for k, (seed, _) in enumerate(one.seeds) if seed == mine] for mine in seeds]
    values = np.stack([one.values[places].mean(axis=0) for places in lines])
    return Sample(one.cases, values, one.targets, tuple((seed, None) for seed in seeds))


def variance_of_cases(influences: Sequence[Influence], seeds: Sequence[Sequence[int]]) -> float:
    """Return :func:`ssl3d.results.statistics.inference.case_variance` of a difference, pooled over the rows of a column.

    Each row is set against the mean of all, in which what a case does to all rows alike cancels. Twice the variance
    of a row, so found, is that of a difference of two. Without two common seeds, the residual cannot be told apart
    from it, and stays in.
    """
    import numpy as np

    if any(not influence.blocks for influence in influences):
        return math.nan
    common = [seed for seed in seeds[0] if all(seed in own for own in seeds)]
    if len(common) >= 2:
        aligned = [
            i.of([own.index(seed) for seed in common]) for i, own in zip(influences, seeds, strict=True)
        ]
    else:
        aligned = [
            Influence(i.scores[:1], tuple(b.mean(axis=0, keepdims=True) for b in i.blocks), i.weight)
            for i in influences
        ]
    blocks = [np.stack(of) for of in zip(*(one.blocks for one in aligned), strict=True)]  # each (M, S, n)
    return cases_part(blocks, aligned[0].weight)


def cases_part(blocks: Sequence[Floats], weight: float) -> float:
    """Return what :func:`variance_of_cases` does, of groups of cases (M, S, n) each."""
    import numpy as np

    alone = case_variance([block - block.mean(axis=0) for block in blocks], weight)  # (M,)
    # max() would turn NaN into 0.
    return float(np.maximum(0.0, 2 * alone.sum() / (len(alone) - 1)))


@dataclass(frozen=True)
class Tested:
    """The tests of a table.

    Attributes:
        comparisons: by row and column; those without a p say why.
        tests: how many p values the correction counts.
        data: the arrays behind them, by (mode, task).
    """

    comparisons: dict[Key, Comparison]
    tests: int
    data: Mapping[tuple[str, str], ColumnData]


def comparisons(table: Table, against: str = BASELINE) -> Tested:
    """Test every row against ``scratch``, or against the ``best`` of each column; Holm over the table.

    The best is chosen by the scores that it is then compared with, so there the correction counts all pairs of rows.

    Raises:
        ConfigError: ``against`` is neither.
    """
    if against not in REFERENCES:
        raise ConfigError(f'Unknown reference "{against}".{nearest(against, list(REFERENCES))}')
    found: dict[Key, Comparison] = {}
    data: dict[tuple[str, str], ColumnData] = {}
    pairs = 0
    for column in table.columns:
        reference = _reference(table, column, against)
        if column.metric in WITHOUT_STATISTICS or reference is None:
            continue
        one = column_data(table, column)
        if one is not None:
            data[column.key] = one
            pairs += len(one.rows) * (len(one.rows) - 1) // 2
        found |= compared_with(table, column, reference, one)
    computed = sum(not math.isnan(c.p) for c in found.values())
    tests = pairs if against == "best" else computed
    adjusted = holm([c.p for c in found.values()], tests)
    return Tested(
        {key: replace(c, p_holm=p) for (key, c), p in zip(found.items(), adjusted, strict=True)}, tests, data
    )


def _reference(table: Table, column: Column, against: str) -> int | None:
    """Return the number of the row that the others of a column are compared with."""
    rows = {i: row for i, row in enumerate(table.rows) if column.key in row.cells}
    if against == BASELINE:
        return next((i for i, row in rows.items() if row.method == BASELINE), None)
    ranked = {i: row.cells[column.key].mean for i, row in rows.items() if row.cells[column.key].ranked}
    return max(ranked, key=lambda i: sign(column.metric) * ranked[i], default=None)


def compared_with(
    table: Table, column: Column, reference: int, data: ColumnData | None
) -> dict[Key, Comparison]:
    """Compare every row of a column with the row of number ``reference``, not corrected; those without a p say why."""
    title = table.rows[reference].title
    tested: dict[int, Contrast | None] = {}
    if data is not None and reference in data.rows and not math.isnan(data.of_cases):
        of_rows = contrasts(data.scores, data.rows.index(reference), data.of_cases)
        tested = dict(zip(data.rows, of_rows, strict=True))
    found: dict[Key, Comparison] = {}
    for i, row in enumerate(table.rows):
        if i == reference or column.key not in row.cells:
            continue
        contrast = tested.get(i)
        if contrast is None or math.isnan(contrast.p):
            found[i, column.key] = Comparison(title, note=_why_not(table, column, i, reference, data))
            continue
        floor = column.floor_of(row.cells[column.key], table.rows[reference].cells[column.key])
        found[i, column.key] = Comparison(
            title, contrast.difference, *contrast.interval(), contrast.p,
            seeds=(data.seeds if data else 0), floor=floor,
        )  # fmt: skip
    return found


def _why_not(table: Table, column: Column, row: int, reference: int, data: ColumnData | None) -> str:
    """Return why a row of a column has no p."""
    cells = [table.rows[i].cells[column.key] for i in (row, reference)]
    if any(cell.constant for cell in cells):
        return "outputs that do not differ between cases"
    if any(cell.missing_folds for cell in cells):
        return "folds are missing"
    if any(pretrainings(list(cell.seeds)) < LEAST_SEEDS for cell in cells):
        return f"fewer than {LEAST_SEEDS} trainings"
    if data is None:
        return "no case that all rows have"
    if math.isnan(data.of_cases):
        return "a fold with fewer than two cases of a class"
    if (
        row in data.rows
        and contrasts(data.scores, data.rows.index(reference), 0.0)[data.rows.index(row)] is None
    ):
        return f"fewer than {LEAST_SEEDS} seeds in common"
    return "scores that do not vary"
