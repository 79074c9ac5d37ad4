"""Figures of results as matplotlib axes: ``ssl3d.plot.forest(store)``, ``.curves(store)``, ``.losses(runs)``.

The numbers are those of ``ssl3d table``; every function draws into ``ax`` where one is given, and returns the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ssl3d.errors import ConfigError, DataError
from ssl3d.files import parse_json, read_bytes, read_json
from ssl3d.results.results import Results, store
from ssl3d.results.table.model import Column, Row, TableModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["curves", "forest", "losses"]

Source = str | Path | Results
LOG = "log.jsonl"
_WORSE, _BETTER, _EQUAL = "#b2182b", "#2166ac", "#555555"


def forest(
    source: Source, *, task: str | None = None, mode: str | None = None, reference: str = "scratch",
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:  # fmt: skip
    """Draw every row's difference to a reference with its 95 % interval: one panel a column of the table.

    Filled: different at the 5 % level after Holm's correction over the table. The unit is that of the scores, percentage
    points or that of an error; the better side is named below.

    Args:
        source: a store, or what ``ssl3d.bench`` returned.
        task, mode: only these columns.
        reference: ``scratch``, or ``best``: the best row of each column.
        axes: one for each panel; None: a new figure.

    Raises:
        DataError: there is no record, or nothing to compare.
    """
    model = _results(source).model(("p",), reference=reference)
    panels = [
        (column, rows)
        for table in model.tables
        for column in table.columns
        if task in (None, column.task) and mode in (None, column.mode)
        if (rows := [row for row in table.rows if _compared(row, column)])
    ]
    if not panels:
        raise DataError(
            f"{_place(source)} has no row with three seeds or more and the cases of its reference, {reference}: "
            "nothing to compare."
        )
    drawn = _axes(len(panels), max(len(rows) for _, rows in panels), axes)
    for ax, (column, rows) in zip(drawn, panels, strict=True):
        _forest(ax, column, rows, reference)
    return drawn


def _compared(row: Row, column: Column) -> bool:
    cell = row.cells.get(column.key)
    return cell is not None and cell.comparison is not None and np.isfinite(cell.comparison.difference)


def _forest(ax: Axes, column: Column, rows: Sequence[Row], reference: str) -> None:
    for place, row in enumerate(reversed(rows)):
        comparison = row.cells[column.key].comparison
        assert comparison is not None
        better = comparison.difference > 0 if _larger_is_better(column) else comparison.difference < 0
        colour = (_BETTER if better else _WORSE) if comparison.significant else _EQUAL
        if np.isfinite([comparison.low, comparison.high]).all():
            ax.plot([comparison.low, comparison.high], [place, place], color=colour, linewidth=1.5)
        face = colour if comparison.significant else "white"
        ax.plot(comparison.difference, place, "o", color=colour, markerfacecolor=face)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [row.title for row in reversed(rows)])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    side = "right" if _larger_is_better(column) else "left"
    against = "scratch" if reference == "scratch" else "the best row"
    ax.set_xlabel(f"difference to {against}, better to the {side}")
    ax.set_title(f"{column.title}, {column.group.lower()}")


def curves(
    source: Source, *, task: str | None = None, mode: str | None = None, x: Literal["labels", "steps"] = "labels",
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:  # fmt: skip
    """Draw scores over the share of labels, or over the steps of pretraining: one panel a task and mode.

    Points are means over seeds, bars the 95 % intervals of the tables.

    Args:
        source: a store, or what ``ssl3d.bench`` returned.
        task, mode: only these columns.
        x: ``labels`` (``--label-fractions``) or ``steps`` (weights kept on the way, ``pretrain.keep_checkpoints``).
        axes: one for each panel; None: a new figure.

    Raises:
        DataError: there is no record, or no method with two points.
        ConfigError: another ``x``.
    """
    if x not in ("labels", "steps"):
        raise ConfigError(f'x="{x}": curves are over "labels" or "steps".')
    model = _results(source).model(("ci",))
    lines = _label_lines(model) if x == "labels" else _step_lines(model)
    panels: dict[tuple[str, str, str], dict[str, list[tuple[float, Any]]]] = {}
    for (title, *key), points in lines.items():
        wanted = task in (None, key[1]) and mode in (None, key[0])
        if wanted and len(points) > 1:
            panels.setdefault((key[0], key[1], key[2]), {})[title] = sorted(points, key=lambda p: p[0])
    if not panels:
        how = "--label-fractions 0.1,0.25,1" if x == "labels" else "--set pretrain.keep_checkpoints=true"
        raise DataError(
            f"{_place(source)} has no method with two points over {x}. Fix: ssl3d bench {how} ..."
        )
    drawn = _axes(len(panels), 5, axes)
    for ax, ((mode_, task_, metric), methods) in zip(drawn, panels.items(), strict=True):
        column = Column(mode_, task_, metric, (0, 0))
        for title, points in methods.items():
            places, means = [place for place, _ in points], [cell.mean for _, cell in points]
            low, high = np.array([_bounds(cell) for _, cell in points]).T
            bars = np.abs(np.stack([np.array(means) - low, high - np.array(means)]))
            ax.errorbar(places, means, yerr=bars, marker="o", capsize=3, label=title)
        ax.set_xlabel("share of the labels" if x == "labels" else "steps of pretraining")
        ax.set_ylabel(column.title.split()[-1])
        ax.set_title(f"{column.title}, {column.group.lower()}")
        ax.legend(frameon=False)
    return drawn


def _label_lines(model: TableModel) -> dict[tuple[str, str, str, str], list[tuple[float, Any]]]:
    from ssl3d.results.statistics.label_efficiency import label_curves

    return {
        (c.title, c.mode, c.task, c.metric): [(point.fraction, point) for point in c.points]
        for c in label_curves(model)
    }


def _step_lines(model: TableModel) -> dict[tuple[str, str, str, str], list[tuple[float, Any]]]:
    lines: dict[tuple[str, str, str, str], dict[float, Any]] = {}
    for table in model.tables:
        for row in table.rows:
            for column in table.columns:
                cell = row.cells.get(column.key)
                identity = cell.records[0]["identity"] if cell else {}
                if cell is None or not identity.get("pretrain"):
                    continue
                steps = identity.get("pretrain_step") or (cell.records[0].get("cost") or {}).get(
                    "pretrain_steps"
                )
                if steps is not None:
                    key = (row.title, column.mode, column.task, column.metric)
                    lines.setdefault(key, {})[float(steps)] = cell
    return {key: list(points.items()) for key, points in lines.items()}


def _bounds(point: Any) -> tuple[float, float]:
    return (point.interval.low, point.interval.high) if point.interval else (point.mean, point.mean)


def losses(
    runs: str | Path | Sequence[str | Path] | Mapping[str, str | Path], *, names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Draw the course of pretrainings, as their logs have it.

    Args:
        runs: folders written by ``ssl3d pretrain``; with their names in the legend where it is a mapping.
        names: what to draw, such as ``loss`` or ``held_back``; None: the losses of the runs.
        ax: where to draw; None: a new figure.

    Raises:
        DataError: a folder has no log, or no such number.
    """
    if isinstance(runs, str | Path):
        runs = [runs]
    named = dict(runs) if isinstance(runs, Mapping) else {Path(run).name: run for run in runs}
    ax = ax or _axes(1, 8, None)[0]
    for label, folder in named.items():
        lines = _log(Path(folder))
        chosen = list(names) if names is not None else _losses_of(Path(folder))
        for name in chosen:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if not points:
                known = ", ".join(sorted({key for line in lines for key in line} - {"step"}))
                raise DataError(f'{Path(folder) / LOG} has no "{name}" (it has {known}).')
            steps, values = zip(*points, strict=True)
            ax.plot(steps, values, label=f"{label}: {name}" if len(chosen) > 1 or names else label)
    ax.set_xlabel("step")
    ax.set_ylabel("loss" if names is None else ", ".join(names))
    ax.legend(frameon=False)
    return ax


def _log(run: Path) -> list[dict[str, Any]]:
    if not (run / LOG).is_file():
        raise DataError(f"{run} has no {LOG}: give a folder written by ssl3d pretrain.")
    lines = read_bytes(run / LOG).decode("utf-8", "replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            if type(entry["step"]) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # torn by a process that was killed
                break
            raise DataError(f"{run / LOG} is damaged: line {number} is none of a log's.") from error
        found.append(entry)
    return found


def _losses_of(run: Path) -> list[str]:
    facts = read_json(run / "run.json")
    losses = facts.get("losses") if isinstance(facts, dict) else None
    if not isinstance(losses, dict | None):
        raise DataError(f"{run / 'run.json'} is damaged: its losses are no names with values.")
    return list(losses or {})


def _results(source: Source) -> Results:
    return source if isinstance(source, Results) else store(source)


def _place(source: Source) -> str:
    return str(source.folder if isinstance(source, Results) else source)


def _larger_is_better(column: Column) -> bool:
    from ssl3d.results.scores import sign

    return sign(column.metric) > 0


def _axes(panels: int, rows: int, given: Sequence[Axes] | None) -> list[Axes]:
    """Return one axes a panel: those given, or those of a new figure, four side by side at most."""
    if given is not None:
        if len(given) != panels:
            raise ConfigError(f"axes: {len(given)} given, and there are {panels} panels.")
        return list(given)
    import matplotlib.pyplot as plt

    across = min(panels, 4)
    down = -(-panels // across)
    size = (1.0 + 3.6 * across, down * (1.4 + 0.32 * rows))
    _, grid = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    flat = list(grid.flat)
    for unused in flat[panels:]:
        unused.set_axis_off()
    return flat[:panels]
