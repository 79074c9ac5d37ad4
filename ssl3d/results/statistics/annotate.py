"""Uncertainty, significance, power and rank stability in a table: what ``ssl3d table --with`` adds.

The figures come from :mod:`ssl3d.results.statistics.intervals`, :mod:`ssl3d.results.statistics.comparisons` and
:mod:`ssl3d.results.statistics.ranking`; the arithmetic behind all of them is :mod:`ssl3d.results.statistics.inference`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ssl3d.errors import ConfigError, nearest
from ssl3d.results.scores import in_percent
from ssl3d.results.statistics.comparisons import REFERENCES, Tested, column_data, comparisons
from ssl3d.results.statistics.inference import LEAST_SEEDS, POWER
from ssl3d.results.statistics.intervals import interval
from ssl3d.results.statistics.label_efficiency import label_curves, label_remarks
from ssl3d.results.statistics.ranking import kendall_tau, ranks
from ssl3d.results.statistics.samples import WITHOUT_STATISTICS
from ssl3d.results.table.cost import with_costs
from ssl3d.results.table.model import (
    BASELINE,
    SEEDS_AND_CASES,
    THESE_WEIGHTS,
    Cell,
    Column,
    Comparison,
    Rank,
    Row,
    Table,
    TableModel,
)

CHOICES = ("ci", "p", "power", "rank", "tau", "cost", "labels")
DIFFERENCE = 5.0
"""Points for which ``--with power`` says the seeds, unless another difference is given."""


def with_statistics(
    model: TableModel, choices: Iterable[str], against: str = BASELINE, difference: float = DIFFERENCE
) -> TableModel:
    """Return ``model`` with statistics in its cells, columns and remarks, which the formats then show.

    Args:
        model: from :func:`ssl3d.results.table.build.build_table`.
        choices: of ``ci`` (95 % intervals), ``p`` (tests, and the smallest difference that each column could have
            shown), ``power`` (the same without the tests, and the seeds that ``difference`` needs), ``rank``
            (stability), ``tau`` (agreement of linear and fine-tune ranks), ``cost`` (what each row cost),
            ``labels`` (share of the labels that equals scratch with all of them).
        against: reference of the tests, ``scratch`` or ``best``.
        difference: in points (of an error: in the unit of the values).

    Raises:
        ConfigError: an unknown choice or reference, or a difference that is not above 0.
    """
    chosen = set(choices)
    for choice in sorted(chosen - set(CHOICES)):
        raise ConfigError(f'Unknown statistic "{choice}".{nearest(choice, CHOICES)}')
    if against not in REFERENCES:
        raise ConfigError(f'Unknown reference "{against}".{nearest(against, list(REFERENCES))}')
    if not (difference > 0 and math.isfinite(difference)):
        raise ConfigError(
            f"--difference {difference:g} is not a number above 0; write --difference {DIFFERENCE:g}."
        )
    if "cost" in chosen:
        model = with_costs(model)
    if "labels" in chosen:
        said = tuple(label_remarks(label_curves(model, intervals=False)))
        remarks = said or ("No cell has more than one label fraction, see ssl3d bench --label-fractions",)
        model = replace(model, tables=tuple(replace(t, remarks=(*t.remarks, *remarks)) for t in model.tables))
    tables = tuple(_annotated(table, chosen, against, difference) for table in model.tables)
    return replace(model, tables=tables)


def _annotated(table: Table, chosen: set[str], against: str, difference: float) -> Table:
    tested = comparisons(table, against) if chosen & {"p", "power"} else Tested({}, 0, {})
    shown = tested.comparisons if "p" in chosen else {}
    metrics = {column.key: column.metric for column in table.columns}
    able = [column for column in table.columns if column.metric not in WITHOUT_STATISTICS]
    places = {c.key: ranks(table, c) for c in able} if "rank" in chosen else {}
    rows: list[Row] = []
    for i, row in enumerate(table.rows):
        cells = {
            key: replace(
                cell,
                interval=_interval(cell, metrics[key]) if "ci" in chosen else None,
                comparison=shown.get((i, key)),
                rank=places.get(key, {}).get(i),
            )
            for key, cell in row.cells.items()
        }
        rows.append(replace(row, cells=cells))
    columns = tuple(replace(column, detectable=_detectable(tested, column)) for column in table.columns)
    remarks = [*_interval_remarks(rows, chosen), *_test_remarks(shown, tested.tests, against)]
    if chosen & {"p", "power"}:
        remarks += _power_remarks(table, columns, tested, difference if "power" in chosen else None)
    remarks += _rank_remarks(places)
    if "tau" in chosen:
        remarks += _tau_remarks(table)
    if len(able) < len(table.columns):
        remarks.append(f"no intervals, tests or ranks for {', '.join(sorted(WITHOUT_STATISTICS))}")
    return replace(table, rows=tuple(rows), columns=columns, remarks=(*table.remarks, *remarks))


def _interval(cell: Cell, metric: str) -> Any:
    return interval(cell, metric) if metric not in WITHOUT_STATISTICS and not cell.constant else None


def _interval_remarks(rows: Sequence[Row], chosen: set[str]) -> list[str]:
    cells = [cell for row in rows for cell in row.cells.values()]
    kinds = {cell.interval.over for cell in cells if cell.interval}
    remarks = []
    if SEEDS_AND_CASES in kinds:
        remarks.append(
            "[low, high]: 95 % interval over seeds and cases, crossed random effects with Satterthwaite's degrees of "
            "freedom"
        )
    if THESE_WEIGHTS in kinds:
        where = "where a row has" if SEEDS_AND_CASES in kinds else "[low, high]: 95 % interval;"
        remarks.append(
            f"{where} fewer than {LEAST_SEEDS} trainings, the interval speaks of these weights only, on other "
            "cases, not of the method"
        )
    if "ci" in chosen and any(not cell.interval and not cell.constant for cell in cells):
        remarks.append("no interval: values that do not vary, or a class with one case in a fold")
    return remarks


def _test_remarks(shown: Mapping[Any, Comparison], tests: int, against: str) -> list[str]:
    if not shown:
        return []
    what = "scratch" if against == BASELINE else "the best of the column"
    counted = (
        f"{tests} comparisons"
        if against == BASELINE
        else f"all {tests} pairs of rows, since the best is chosen among them"
    )
    remarks = []
    if tests:
        remarks.append(
            f"p: against {what}, t test over seeds with moderated variances and the choice of the cases, "
            f"Holm-adjusted for {counted}"
        )
    left_out: dict[str, int] = defaultdict(int)
    for comparison in shown.values():
        if comparison.note:
            left_out[comparison.note] += 1
    for note, count in left_out.items():
        remarks.append(
            f"n.p.: {count} of {len(shown)} comparisons have no p and are left out of the correction: {note}"
        )
    floors = sum(c.p_holm <= 0.05 and not c.significant for c in shown.values())
    if floors:
        remarks.append(
            f"{floors} differences are smaller than the luck of rounding, and not bold whatever their p"
        )
    return remarks


def _detectable(tested: Tested, column: Column) -> float | None:
    """Return the smallest difference that ``column`` could have shown; None where it has no tests."""
    data = tested.data.get(column.key)
    if data is None or not tested.tests:
        return None
    found = data.design(tested.tests).detectable()
    return found if math.isfinite(found) else None


def _power_remarks(
    table: Table, columns: Sequence[Column], tested: Tested, difference: float | None
) -> list[str]:
    remarks = []
    if any(column.detectable is not None for column in columns):
        remarks.append(
            f"shows: the smallest difference that this table could have shown, found with {100 * POWER:.0f} % "
            f"probability after the correction; smaller ones may well be there"
        )
    blind = [
        f"{c.group} {c.title}" for c in columns if c.detectable is None and c.metric not in WITHOUT_STATISTICS
    ]
    if blind:
        remarks.append(
            f"No difference could have been shown in {', '.join(blind)}: that takes two rows with {LEAST_SEEDS} "
            "trainings each, the reference among them"
        )
    if difference is not None:
        remarks += _seeds_remarks(table, tested, difference)
    return remarks


def _seeds_remarks(table: Table, tested: Tested, difference: float) -> list[str]:
    """Say with how many seeds each column would show ``difference``; two seeds are enough to plan with."""
    data = {column.key: column_data(table, column, least=2) for column in table.columns}
    tests = tested.tests or sum(len(one.rows) - 1 for one in data.values() if one is not None)
    said: dict[str, list[str]] = defaultdict(list)
    for column in table.columns:
        one = data[column.key]
        unit = "points" if in_percent(column.metric) else "in the unit of the values"
        if one is None or math.isnan(one.of_cases) or not one.spread.mean > 0:
            continue
        design = one.design(tests)
        seeds = design.seeds_for(difference)
        least = design.detectable(1000)
        need = (
            f"{seeds} seeds"
            if seeds
            else f"more than {one.cases} cases (with these, no less than {least:.3g})"
        )
        said[unit].append(f"{column.group} {column.title} {need}")
    lines = [
        f"To show a difference of {difference:g} {unit} with {100 * POWER:.0f} % probability in a table of {tests} "
        f"comparisons takes: {'; '.join(needs)}"
        for unit, needs in said.items()
    ]
    return lines or [
        "No column has two rows with two trainings each, so the seeds that a difference needs are unknown"
    ]


def _rank_remarks(places: Mapping[Any, Mapping[int, Rank]]) -> list[str]:
    found = [rank for of in places.values() for rank in of.values()]
    if not found:
        return []
    if all(rank.low is None for rank in found):
        return [f"#rank; with fewer than {LEAST_SEEDS} trainings a row, nobody knows how firm it is"]
    return ["#rank (95 % range over seeds and cases, by the spreads that the tests use)"]


def _tau_remarks(table: Table) -> list[str]:
    remarks = []
    for task in dict.fromkeys(column.task for column in table.columns):
        agreement = kendall_tau(table, task)
        if agreement:
            tau, p, n = agreement
            remarks.append(
                f"{task.upper()}: linear and fine-tune ranks agree with Kendall's tau = {tau:.2f} "
                f"(p = {p:.3f}, {n} methods)"
            )
    return remarks
