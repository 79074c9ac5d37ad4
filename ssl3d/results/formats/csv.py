"""Tables in CSV: one line a cell."""

from __future__ import annotations

import math
from typing import Any

from ssl3d.results.formats import wording
from ssl3d.results.formats.terminal import _csv_head
from ssl3d.results.formats.wording import printable
from ssl3d.results.statistics.convergence import best_score, steps_to_reach
from ssl3d.results.table.build import pretext_learned
from ssl3d.results.table.cost import cost_of
from ssl3d.results.table.model import BASELINE, Cell, Column, Row, Table, TableModel
from ssl3d.spreadsheet import csv_text

CSV_FIELDS = (
    "table", "preset", "method", "title", "method_config", "trains", "label_fraction",
    "mode", "task", "metric", "unit",
    "mean", "sd", "delta", "n_seeds", "n_cases", "best", "second", "notes", "missing_folds", "paper",
    "constant_output", "pretext_learned", "ci_low", "ci_high", "ci_over", "difference", "difference_low",
    "difference_high", "p", "p_holm", "no_p", "floor", "detectable", "rank", "rank_low", "rank_high", "rank_first",
    "steps_to_scratch_best", "pretrain_steps", "voxels_seen", "pretrain_seconds", "downstream_seconds",
    "peak_memory_mib", "pretrain_parameters", "devices",
)  # fmt: skip


def render_csv(model: TableModel) -> str:
    """Return one line for each method, mode and task (tidy), unrounded, with a header.

    Figures are in the ``unit`` of their line: ``%`` (sd and delta in percentage points), or ``value`` for
    errors in the unit of what is predicted. An empty field is "does not exist".
    """
    return csv_text(CSV_FIELDS, csv_lines(model))


def csv_lines(model: TableModel) -> list[dict[str, Any]]:
    """Return the lines of :func:`render_csv` as values, by field."""
    lines = []
    for number, table in enumerate(model.tables, 1):
        scratch = next((row.cells for row in table.rows if row.method == BASELINE), {})
        targets = {key: best_score(cell) for key, cell in scratch.items()}
        for row in table.rows:
            for column in table.columns:
                if column.key in row.cells:
                    target = targets.get(column.key)
                    lines.append(_csv_line(number, table, row, column, row.cells[column.key], target))
                elif column.key in row.failed:
                    lines.append({**_csv_head(number, table, row, column), "notes": "failed"})
    return lines


def _csv_line(
    number: int, table: Table, row: Row, column: Column, cell: Cell, target: float | None
) -> dict[str, Any]:
    cost = cost_of(cell.records)
    unscored = wording.unscored(cell, column)
    notes = [printable(text) for mark, text in table.footnotes if mark in cell.marks + row.marks]

    def finite(name: str) -> float | None:
        value = getattr(cell.comparison, name, math.nan)
        return None if math.isnan(value) else value

    return {
        **_csv_head(number, table, row, column),
        "mean": None if unscored else cell.mean, "sd": None if unscored else cell.sd, "delta": cell.delta,
        "n_seeds": cell.n_seeds, "n_cases": cell.n_cases, "best": int(cell.best), "second": int(cell.second),
        "notes": "; ".join(notes), "missing_folds": " ".join(cell.missing_folds), "paper": cell.paper,
        "constant_output": int(cell.constant), "pretext_learned": pretext_learned(cell.records),
        **{f"ci_{side}": getattr(cell.interval, side, None) for side in ("low", "high", "over")},
        "difference": finite("difference"), "difference_low": finite("low"), "difference_high": finite("high"),
        "p": finite("p"), "p_holm": finite("p_holm"), "no_p": getattr(cell.comparison, "note", None),
        "floor": None if column.floor is cell.floor is None else column.floor_of(cell),
        "detectable": column.detectable,
        "rank": getattr(cell.rank, "rank", None),
        **{f"rank_{name}": getattr(cell.rank, name, None) for name in ("low", "high", "first")},
        "steps_to_scratch_best": steps_to_reach(cell, target),
        **{name: getattr(cost, name, None) for name in _COST_FIELDS},
        "devices": printable("; ".join(cost.devices)) if cost else None,
    }  # fmt: skip


_COST_FIELDS = CSV_FIELDS[CSV_FIELDS.index("pretrain_steps") : -1]
