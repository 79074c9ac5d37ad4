"""Ranks of the rows of a column, how firm they are, and whether two modes rank alike."""

from __future__ import annotations

import math

from ssl3d.results.scores import sign
from ssl3d.results.statistics.comparisons import column_data
from ssl3d.results.table.model import Column, Rank, Table

DRAWS = 2000


def ranks(table: Table, column: Column, draws: int = DRAWS, seed: int = 0) -> dict[int, Rank]:
    """Return the rank of each row (by number) in ``column``; without those that lack folds.

    The range comes from drawing the mean of every row from its sampling distribution: Student's t with the variance
    that the comparisons use (what seeds and cases do to all rows alike moves no rank). Where a row has fewer than three
    trainings there is no range for any, since its place decides theirs.
    """
    import numpy as np
    from scipy.stats import rankdata

    rows = [i for i, row in enumerate(table.rows) if column.key in row.cells and row.cells[column.key].ranked]
    if not rows:
        return {}
    order = -sign(column.metric)  # rank 1 goes to the smallest
    means = np.array([table.rows[i].cells[column.key].mean for i in rows])
    size = np.abs(means).max() or 1.0  # equal up to rounding is a tie, in whatever unit
    placed = rankdata(order * np.round(means / size, 9), method="min").astype(int)
    data = column_data(table, column)
    if data is None or data.rows != rows or len(rows) < 2 or math.isnan(data.of_cases):
        return {i: Rank(int(placed[k])) for k, i in enumerate(rows)}
    spread = data.spread
    seeds = (~np.isnan(data.scores)).sum(axis=1)
    sd = np.sqrt(spread.variances / seeds + data.of_cases / 2)  # (M,)
    noise = np.random.default_rng(seed).standard_t(
        np.minimum(spread.df, spread.total_df)[:, None], (len(rows), draws)
    )
    drawn = rankdata(order * (means[:, None] + sd[:, None] * noise), axis=0, method="min")  # (M, draws)
    winners = drawn == 1
    share = (winners / winners.sum(axis=0)).mean(axis=1)  # (M,)
    bounds = np.quantile(drawn, [0.025, 0.975], axis=1, method="nearest")  # (2, M)
    return {
        i: Rank(int(placed[k]), int(bounds[0, k]), int(bounds[1, k]), float(share[k]))
        for k, i in enumerate(rows)
    }


def kendall_tau(table: Table, task: str) -> tuple[float, float, int] | None:
    """Return (tau-b, p, methods): do linear and fine-tune evaluation rank the methods alike?

    None with fewer than three methods in both modes, or when one mode ranks all of them equal.
    """
    from scipy.stats import kendalltau

    keys = ("linear", task), ("finetune", task)
    pairs = [
        [row.cells[key].mean for key in keys]
        for row in table.rows
        if all(key in row.cells and row.cells[key].ranked for key in keys)
    ]
    if len(pairs) < 3:
        return None
    result = kendalltau(*zip(*pairs, strict=True))
    return (
        None if math.isnan(result.statistic) else (float(result.statistic), float(result.pvalue), len(pairs))
    )
