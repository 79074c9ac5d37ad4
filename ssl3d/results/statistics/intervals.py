"""Confidence intervals of single cells."""

from __future__ import annotations

import math

from ssl3d.results.scores import in_percent
from ssl3d.results.statistics.inference import LEAST_SEEDS, all_or_nothing, mean_spread
from ssl3d.results.statistics.samples import Sample, pretrainings, sample
from ssl3d.results.table.model import SEEDS_AND_CASES, THESE_WEIGHTS, Cell, Interval


def interval(cell: Cell, metric: str, level: float = 0.95) -> Interval | None:
    """Return the interval of a cell's mean, or None where its spread cannot be computed.

    Student's t on the variance components of seeds x cases (:func:`.inference.mean_spread`), cut at the
    ends of the range. Where all values lie at one end of the range (an AUC of 0 or 1), the components are zero, and
    the bound is that of :func:`ssl3d.results.statistics.inference.all_or_nothing`.

    Args:
        cell: of a table.
        metric: the column's.
        level: nominal coverage.
    """
    one = sample(cell, metric)
    influence = one.influence()
    whole = pretrainings(list(cell.seeds)) >= LEAST_SEEDS
    over = SEEDS_AND_CASES if whole else THESE_WEIGHTS
    if not one.cases or not influence.blocks:
        return None
    mean = float(influence.scores.mean())
    least, most = 0.0, 100.0 if in_percent(metric) else math.inf
    if all((block == block[0, 0]).all() for block in influence.blocks):
        if not in_percent(metric) or mean not in (least, most):
            return None
        width = 100 * all_or_nothing(_independent_cases(one), level)
        return Interval(max(least, mean - width), min(most, mean + width), level, over)
    half = mean_spread(influence, these_weights=not whole).half_width(level)
    if math.isnan(half):
        return None
    return Interval(max(least, mean - half), min(most, mean + half), level, over)


def _independent_cases(one: Sample) -> int:
    """Return how many cases, or pairs of a positive and a negative for AUC, share nothing with each other."""
    if one.targets is None:
        return len(one.cases)
    positives = [sum(bool(one.targets[place]) for place in places) for places in one.folds()]
    return sum(min(p, len(places) - p) for p, places in zip(positives, one.folds(), strict=True))
