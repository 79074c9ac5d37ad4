"""Label efficiency: scores over the share of labels, and the share that equals scratch with all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssl3d.results.scores import sign
from ssl3d.results.store.record import canonical_json
from ssl3d.results.table.model import BASELINE, Cell, Row, TableModel

if TYPE_CHECKING:
    from ssl3d.results.table.model import Interval


@dataclass(frozen=True)
class LabelPoint:
    """A method's score with a share of the labels.

    Attributes:
        fraction: of the training subjects, in (0, 1].
        mean: over seeds, in the unit of the metric.
        interval: 95 %, see :func:`ssl3d.results.statistics.intervals.interval`; None when not asked for.
        n_seeds, n_cases: behind the mean.
    """

    fraction: float
    mean: float
    interval: Interval | None
    n_seeds: int
    n_cases: int


@dataclass(frozen=True)
class LabelCurve:
    """The points of one method on one task in one mode, from few labels to many.

    Attributes:
        method, title: as in the table's rows.
        mode, task, metric: as in its columns.
        points: by fraction.
        reaches: fraction of the labels at which the method reaches the score of scratch with all
            labels; at most, where it does so with the fewest labels tried; None where it never does,
            or scratch with all labels is missing.
    """

    method: str
    title: str
    mode: str
    task: str
    metric: str
    points: tuple[LabelPoint, ...]
    reaches: float | None

    @property
    def saved(self) -> float | None:
        """Share of the labels that the method saves, in [0, 1)."""
        return None if self.reaches is None else 1 - self.reaches


def label_curves(model: TableModel, intervals: bool = True) -> list[LabelCurve]:
    """Return the curves of every method, task and mode with more than one label fraction.

    Points are of one curve when they agree in everything but labels and seeds; that includes the
    budget, the pretraining and the data.

    Args:
        model: from :func:`ssl3d.results.table.build.build_table`; one table for each fraction.
        intervals: compute an interval for each point.
    """
    found: dict[str, dict[float, tuple[Row, Cell, str]]] = {}
    baselines: dict[str, float] = {}
    for table in model.tables:
        metrics = {column.key: column.metric for column in table.columns}
        for row in table.rows:
            for key, cell in row.cells.items():
                identity = cell.records[0]["identity"]
                fraction = float(identity.get("label_fraction", 1.0))
                # The same records of scratch stand in several tables.
                found.setdefault(_own(identity), {}).setdefault(fraction, (row, cell, metrics[key]))
                if row.method == BASELINE and fraction == 1:
                    baselines[_shared(identity)] = cell.mean
    curves = []
    for cells in found.values():
        if len(cells) < 2:
            continue
        row, cell, metric = next(iter(cells.values()))
        identity = cell.records[0]["identity"]
        points = tuple(_point(f, c, metric, intervals) for f, (_, c, _) in sorted(cells.items()))
        target, direction = baselines.get(_shared(identity)), sign(metric)
        rising = [(p.fraction, direction * p.mean) for p in points]
        reaches = None if target is None else fraction_reaching(rising, direction * target)
        curves.append(
            LabelCurve(row.method, row.title, identity["mode"], identity["task"], metric, points, reaches)
        )
    return curves


def _shared(identity: Mapping[str, Any]) -> str:
    """Return what a curve shares with the curve of scratch that it is measured against."""
    keys = ("backbone", "task", "task_data", "mode", "budget")
    return canonical_json({key: identity.get(key) for key in keys})


def _own(identity: Mapping[str, Any]) -> str:
    own = {
        key: identity.get(key) for key in ("method", "method_config", "pretrain", "match", "pretrain_step")
    }
    return canonical_json(own) + _shared(identity)


def _point(fraction: float, cell: Cell, metric: str, intervals: bool) -> LabelPoint:
    bounds = None
    if intervals:
        from ssl3d.results.statistics.intervals import interval

        bounds = interval(cell, metric)
    return LabelPoint(fraction, cell.mean, bounds, cell.n_seeds, cell.n_cases)


def fraction_reaching(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the smallest fraction at which ``points`` reach ``target``, None where they never do.

    Between two measured fractions the score is taken to be linear in the fraction's logarithm.

    >>> fraction_reaching([(0.01, 50.0), (0.1, 60.0), (1.0, 70.0)], 60.0)
    0.1
    >>> round(fraction_reaching([(0.01, 50.0), (1.0, 70.0)], 60.0), 6)
    0.1

    Args:
        points: (fraction, score), by fraction; the larger score is better.
        target: score.
    """
    before: tuple[float, float] | None = None
    for fraction, score in points:
        if score >= target:
            if before is None or score == target:
                return fraction
            share = (target - before[1]) / (score - before[1])
            return math.exp(math.log(before[0]) + share * (math.log(fraction) - math.log(before[0])))
        before = fraction, score
    return None


def label_remarks(curves: Sequence[LabelCurve]) -> list[str]:
    """Return one sentence a method, task and mode on the labels that it saves."""
    remarks = []
    for curve in curves:
        if curve.method == BASELINE:
            continue
        where = f"{curve.task.upper()} {curve.mode}: {curve.title}"
        if curve.reaches is None:
            remarks.append(
                f"{where} does not reach scratch's score with all labels, or that score is missing"
            )
        else:
            most = "at most " if curve.reaches == curve.points[0].fraction else ""
            remarks.append(
                f"{where} reaches scratch's score with all labels at {most}{100 * curve.reaches:.3g} % of them"
            )
    return remarks
