"""How far a mean and a difference can be trusted, from arrays alone.

Two things vary and are crossed: the seed (initialisation, order, crops: the luck of one training) and the case. A
method's luck is its own, so it does not average out over cases: three seeds are three trainings, however many
cases each of them is scored on.

- The mean of one row: variance components of seeds x cases, Satterthwaite's degrees of freedom.
- A difference of two rows: their seeds' variances, what the rows have in common in a seed (initial head, order of
  crops) taken out; plus what differs between the rows from case to case.

Three seeds know a row's own variance poorly, and the mean variance of all rows is wrong for a row with more luck than
most. So the two are averaged, with :data:`PRIOR_DF` degrees of freedom for the mean (as limma does for genes: Smyth,
Statistical Applications in Genetics and Molecular Biology 2004). That, and the correction, were chosen by simulation:
``benchmarks/studies/inference.py`` has the alternatives, and what they err in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ssl3d.results.statistics.samples import Influence
from ssl3d.results.table.model import ALPHA

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

POWER = 0.8
"""Chance of being found that a difference must have to be called one that the table could show."""
LEAST_SEEDS = 3
"""Trainings a row needs before anything is said about its method, and not about the weights at hand."""
PRIOR_DF = 2.0
"""Degrees of freedom that the mean variance of the rows has within the variance of each row."""


# --- One mean --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Variance of an estimate and its degrees of freedom; both NaN where they cannot be computed."""

    variance: float
    df: float

    def half_width(self, level: float) -> float:
        """Return half the width of the interval of Student's t at ``level``."""
        from scipy.stats import t

        return float(t.ppf((1 + level) / 2, self.df)) * math.sqrt(self.variance)


UNKNOWN = Spread(math.nan, math.nan)


def mean_spread(influence: Influence, these_weights: bool = False) -> Spread:
    """Return the spread of a row's mean score over new seeds and new cases.

    With A the variance of the seeds' scores over S, B that of the cases' means over n and R the residual mean
    square over S n, the variance of the mean is A + B - R (one B and one R for each group of cases), at least A and
    at least B. Its degrees of freedom are Satterthwaite's (Biometrics Bulletin 1946).

    Args:
        influence: of the row.
        these_weights: over new cases only, for the networks at hand: B alone.
    """
    import numpy as np

    blocks = [influence.weight * block for block in influence.blocks]
    if not blocks or any(block.shape[1] < 2 for block in blocks):
        return UNKNOWN
    seeds = len(influence.scores)
    of_cases = [
        (float(block.mean(axis=0).var(ddof=1)) / block.shape[1], block.shape[1] - 1) for block in blocks
    ]
    if these_weights:
        return _satterthwaite(of_cases, 1.0)
    of_seeds = [(float(np.var(influence.scores, ddof=1)) / seeds, seeds - 1)]
    left = [
        (_residual(block) / (seeds * block.shape[1]), (seeds - 1) * (block.shape[1] - 1)) for block in blocks
    ]
    a, b, r = (sum(value for value, _ in part) for part in (of_seeds, of_cases, left))
    if a <= r or b <= r:
        return _satterthwaite(of_seeds if a > b else of_cases, 1.0)
    return _satterthwaite([*of_seeds, *of_cases, *left], (a + b - r) / (a + b + r))


def _satterthwaite(parts: Sequence[tuple[float, float]], share: float) -> Spread:
    """Return the spread whose variance is ``share`` of the sum of ``parts`` of (value, degrees of freedom)."""
    variance = share * sum(value for value, _ in parts)
    of_squares = sum(value**2 / df for value, df in parts)
    return Spread(variance, variance**2 / of_squares if of_squares > 0 else 1.0)


def _residual(block: Floats) -> float:
    """Return the mean square that seeds and cases leave in ``block`` (S, n)."""
    import numpy as np

    seeds, cases = block.shape
    left = block - block.mean(axis=1, keepdims=True) - block.mean(axis=0) + block.mean()
    return float(np.square(left).sum()) / ((seeds - 1) * (cases - 1))


def all_or_nothing(cases: int, level: float) -> float:
    """Return how far the mean may lie from the bound that all values are at, as a share of the range.

    ``cases`` independent values within [0, 1] and all at one end: with a mean that far from the end, that happens with
    a probability of (1 - level) / 2 at most (the bound of Clopper and Pearson, which holds for any values within
    the range). An AUC of 1 is such a case with the number of its smaller class, since so many pairs of a positive and a
    negative share no case.

    >>> round(all_or_nothing(12, 0.95), 3)
    0.265
    """
    return 1 - ((1 - level) / 2) ** (1 / cases)


# --- Differences between rows ------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedSpread:
    """What the seeds' luck is in each row of a column.

    Attributes:
        variances: (M,) of one seed's score, the rows' common part in a seed taken out, moderated.
        df: (M,) degrees of freedom of these.
        mean: the variance that the rows have on average.
        total_df: degrees of freedom of the mean.
    """

    variances: Floats
    df: Floats
    mean: float
    total_df: float


def seed_spread(scores: Floats, prior_df: float = PRIOR_DF) -> SeedSpread:
    """Return the variance of a seed's score for each row.

    What a seed does to all rows alike (the same initial head, the same order of crops) is taken out as blocks, as in a
    randomized block design; what is left of a row is divided by the degrees of freedom that its own residuals have.

    Args:
        scores: (M, S) over rows and seeds; NaN where a row lacks a seed.
        prior_df: see :data:`PRIOR_DF`.
    """
    import numpy as np

    left, leverage = _block_residuals(scores)
    own_df = (1 - leverage).sum(axis=1)  # (M,)
    squares = np.square(left).sum(axis=1)
    total_df = float(own_df.sum())
    mean = float(squares.sum()) / total_df if total_df > 0 else math.nan
    return SeedSpread((prior_df * mean + squares) / (prior_df + own_df), prior_df + own_df, mean, total_df)


def _block_residuals(scores: Floats) -> tuple[Floats, Floats]:
    """Return residuals and leverages (M, S) of rows + seeds by least squares; 0 and 1 where there is no score."""
    import numpy as np

    rows, seeds = scores.shape
    there = ~np.isnan(scores)
    if there.all():
        left = scores - scores.mean(axis=1, keepdims=True) - scores.mean(axis=0) + scores.mean()
        return left, np.full((rows, seeds), 1 / rows + 1 / seeds - 1 / (rows * seeds))
    of_row, of_seed = np.nonzero(there)
    design = np.zeros((len(of_row), rows + seeds))
    design[np.arange(len(of_row)), of_row] = 1
    design[np.arange(len(of_row)), rows + of_seed] = 1
    hat = design @ np.linalg.pinv(design)
    left, leverage = np.zeros((rows, seeds)), np.ones((rows, seeds))
    left[there] = scores[there] - hat @ scores[there]
    leverage[there] = np.diag(hat)
    return left, leverage


def case_variance(blocks: Sequence[Floats], weight: float = 1.0) -> Floats:
    """Return the part of the variance of a mean, or of a difference of means, that is due to the choice of the cases.

    An unbiased estimate, so it can be below 0; NaN with a group of one case. With one seed the residual cannot be told
    apart from it, and is part of it.

    Args:
        blocks: as in :class:`ssl3d.results.statistics.samples.Influence`, each (..., S, n).
        weight: the same.

    Returns:
        (...).
    """
    import numpy as np

    total: Any = 0.0
    for block in blocks:
        seeds, cases = block.shape[-2:]
        if cases < 2:
            return np.full(block.shape[:-2], np.nan)
        of_case = block.mean(axis=-2, keepdims=True)
        total = total + weight**2 * of_case[..., 0, :].var(axis=-1, ddof=1) / cases
        if seeds > 1:
            left = (
                block
                - of_case
                - block.mean(axis=-1, keepdims=True)
                + block.mean(axis=(-2, -1), keepdims=True)
            )
            squares = np.square(left).sum(axis=(-2, -1)) / ((seeds - 1) * (cases - 1))
            total = total - weight**2 * squares / (seeds * cases)
    return np.asarray(total)


@dataclass(frozen=True)
class Contrast:
    """A row against the reference: difference, spread, two-sided p (NaN where it cannot be computed)."""

    difference: float
    spread: Spread
    p: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return both ends of the interval of the difference at ``level``."""
        half = self.spread.half_width(level)
        return self.difference - half, self.difference + half


def contrasts(
    scores: Floats, reference: int, of_cases: float, prior_df: float = PRIOR_DF
) -> list[Contrast | None]:
    """Test each row of a column against one of them; None for the reference and for too few common seeds.

    Args:
        scores: (M, S) over rows and seeds; NaN where a row lacks a seed.
        reference: number of the row that the others are compared with.
        of_cases: :func:`case_variance` of the column.
        prior_df: see :data:`PRIOR_DF`.
    """
    import numpy as np
    from scipy.stats import t

    spread = seed_spread(scores, prior_df)
    apart = scores - scores[reference]
    seeds = (~np.isnan(apart)).sum(axis=1)  # (M,)
    rows = [row for row in range(len(scores)) if row != reference and seeds[row] >= LEAST_SEEDS]
    difference = np.nanmean(apart[rows], axis=1)
    a, b = spread.variances[rows], spread.variances[reference]
    of_squares = a**2 / spread.df[rows] + b**2 / spread.df[reference]
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.fmin((a + b) ** 2 / of_squares, spread.total_df)  # (rows,)
        variance = (a + b) / seeds[rows] + of_cases
        p = 2 * t.sf(np.abs(difference) / np.sqrt(variance), df)
    p[(variance == 0) & (difference == 0)] = 1.0
    p[(variance == 0) & (difference != 0)] = math.nan
    found: list[Contrast | None] = [None] * len(scores)
    for place, row in enumerate(rows):
        found[row] = Contrast(
            float(difference[place]), Spread(float(variance[place]), float(df[place])), float(p[place])
        )
    return found


def holm(p_values: Sequence[float], total: int | None = None) -> list[float]:
    """Return Holm's adjusted p values (Scandinavian Journal of Statistics 1979).

    A NaN is no test: it stays one, and does not count.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    >>> [round(p, 3) for p in holm([math.nan, 1e-4, 0.02])]
    [nan, 0.0, 0.02]

    Args:
        p_values: of the tests.
        total: how many tests they were chosen from; their number when None.
    """
    places = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    total = len(places) if total is None else total
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for place, index in enumerate(places):
        largest = max(largest, min(1.0, (total - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# --- Power -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """What a column could show: its spreads, its size, and the number of tests that it shares a correction with.

    Attributes:
        of_seeds: variance of one seed's score in a row, on average.
        of_cases: part of the variance of a difference that is due to the cases.
        rows: rows with that column, the reference included.
        seeds: of each row.
        tests: in the table.
    """

    of_seeds: float
    of_cases: float
    rows: int
    seeds: int
    tests: int

    def spread(self, seeds: int) -> Spread:
        """Return the spread of a difference with so many seeds and the same cases."""
        own = (seeds - 1) * (1 - 1 / self.rows)
        df = min(2 * (PRIOR_DF + own), (self.rows - 1) * (seeds - 1))
        return Spread(2 * self.of_seeds / seeds + self.of_cases, df)

    def detectable(self, seeds: int | None = None, power: float = POWER) -> float:
        """Return the smallest difference that is found with probability ``power``, after the correction.

        The correction is that of Holm's first step, which the smallest p of a table has to pass.
        """
        of = self.spread(seeds or self.seeds)
        return _noncentrality(round(of.df, 6), self.tests, power) * math.sqrt(of.variance)

    def seeds_for(self, difference: float, power: float = POWER, most: int = 1000) -> int | None:
        """Return the fewest seeds with which ``difference`` is found; None where the cases are too few for it."""
        if self.detectable(most, power) > difference:
            return None
        low, high = LEAST_SEEDS, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.detectable(middle, power) <= difference else (middle + 1, high)
        return low


@lru_cache(maxsize=4096)
def _noncentrality(df: float, tests: int, power: float) -> float:
    """Return the difference, in standard errors, that a two-sided t test finds with probability ``power``."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    threshold = float(t.isf(ALPHA / (2 * tests), df))

    def missing(shift: float) -> Any:
        return nct.sf(threshold, df, shift) - power

    return float(brentq(missing, 0.0, 3 * threshold + 10, xtol=1e-6))
