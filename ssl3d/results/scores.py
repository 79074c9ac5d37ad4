"""How the scores of a metric are read and written: unit, direction, digits.

Every place that shows, ranks or rounds a score asks here, so that a metric in another unit than percent is
shown, compared and coloured right everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

LOWER_IS_BETTER = frozenset({"mae"})
"""Metrics that are errors, in the unit of what is predicted; every other one is a share, shown in percent."""

SIGNIFICANT = 3
"""Significant digits of the largest score of a column of errors."""


def in_percent(metric: str) -> bool:
    """Whether scores of ``metric`` are in percent, and their differences in percentage points."""
    return metric not in LOWER_IS_BETTER


def of_classes(metric: str) -> bool:
    """Whether ``metric`` is an AUC, which an output that is alike for all cases does not have."""
    return metric in ("auc", "macro_auc")


def scale(metric: str) -> float:
    """Return what turns the value of one case, as records keep it, into the unit of the score."""
    return 100.0 if in_percent(metric) else 1.0


def sign(metric: str) -> int:
    """Return 1 where the larger score is better, else -1."""
    return -1 if metric in LOWER_IS_BETTER else 1


def unit(metric: str) -> str:
    """Return the unit behind a single score: ``%``, or nothing for the unit of the predicted values."""
    return "%" if in_percent(metric) else ""


def digits(metric: str, scores: Iterable[float]) -> int:
    """Return the decimals that ``scores``, which are compared with each other, are shown with.

    One for percentages. Errors have whatever size their unit gives them: three significant digits of the
    largest, for all of them.

    >>> digits("dsc", [81.23]), digits("mae", [0.049, 0.021, 0.046]), digits("mae", [1234.5, 3.1])
    (1, 4, 0)
    """
    if in_percent(metric):
        return 1
    largest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0)
    return 1 if largest == 0 else max(0, SIGNIFICANT - 1 - math.floor(math.log10(largest)))


def written(metric: str, score: float) -> str:
    """Return one score that stands alone, without its unit.

    >>> written("auc", 78.04), written("mae", 0.0214)
    ('78.0', '0.0214')
    """
    return f"{score:.{digits(metric, [score])}f}"
