"""What the page shows, as plain data: everything that is computed is computed here, by the code of the tables."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ssl3d.errors import ReadError
from ssl3d.files import read_bytes, real
from ssl3d.results import scores
from ssl3d.results.formats import wording
from ssl3d.results.statistics.annotate import with_statistics
from ssl3d.results.statistics.convergence import best_score, mean_curve, steps_to_reach
from ssl3d.results.statistics.label_efficiency import label_curves
from ssl3d.results.store.record import Record
from ssl3d.results.store.representation import FOLDER, read_results, rows
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.build import build_table, called
from ssl3d.results.table.model import BASELINE, MODES, Cell, Column, Comparison, Row, Table, TableModel

_MOST_LOG_BYTES, _LARGEST = 256 * 2**20, 1e300
CURVE_POINTS = 200
_STATISTICS = ("ci", "p", "rank", "tau", "cost")
_MONITORS = {"lr"}


def report_data(
    store: ResultStore,
    titles: Mapping[str, str] | None = None,
    viewer_cases: int = 1,
    viewer_mib: float = 12.0,
) -> tuple[dict[str, Any], list[str]]:
    """Return (the page's data, a line for each record that was left out).

    Args:
        store: the records, with the runs beside them.
        titles: what methods are called today, from top to bottom.
        viewer_cases: how many cases of each task the 3D viewer gets, the worst first.
        viewer_mib: a bound on the weight of all volumes together.

    Raises:
        DataError: there is no store, or no sound record in it.
    """
    records, problems = store.records()
    failures, damaged = store.sound_failures()
    titles = titles or {}
    records, failures = called(records, titles), called(failures, titles)
    model = with_statistics(build_table(records, list(titles), failures=failures), _STATISTICS)
    used: dict[int, int] = {}
    listed: list[dict[str, Any]] = []
    for record in records:
        used[id(record)] = len(listed)
        listed.append(_provenance(record, store))
    tables = [_table(table, used, failures) for table in model.tables]
    representation, bad = _representation(store)
    problems = problems + damaged + bad
    return {
        "tables": tables,
        "records": listed,
        "labels": _labels(model),
        "runs": _runs(store, records),
        "representation": representation,
        "viewer": _viewer(store, model.tables, viewer_cases, viewer_mib),
        "created": max((str(r.get("created", "")) for r in records), default=""),
        "problems": problems,
    }, problems


def _provenance(record: Record, store: ResultStore) -> dict[str, Any]:
    """Return everything of a record but the long lists, which the page shows elsewhere."""
    short = {k: v for k, v in record.items() if k not in ("per_case", "validation", "predictions")}
    return {"file": store.path_for(record["identity"]).name, **short}


# --- Tables, curves and cases ---------------------------------------------------------------------


def _table(table: Table, places: dict[int, int], failures: Sequence[Record]) -> dict[str, Any]:
    return {
        "caption": table.caption,
        "units": wording.units([column.metric for column in table.columns]),
        "differs": table.differs,
        "footnotes": [list(note) for note in table.footnotes],
        # "#rank" explains a sign of the text formats; the page shows ranks on request.
        "remarks": [
            text for text in (*table.remarks, *wording.floor_remarks(table)) if not text.startswith("#rank")
        ],
        "rows": [
            {
                "method": r.method,
                "title": wording.row_title(r),
                "trains": r.trains,
                "failed": _failed(r, table, failures),
            }
            for r in table.rows
        ],
        "columns": [_column(table, column, places) for column in table.columns],
        "costs": _costs(table),
    }


def _failed(row: Row, table: Table, failures: Sequence[Record]) -> dict[int, list[str]]:
    """Return the reason of each run behind a cell that could not be computed, by the place of its column."""
    found: dict[int, list[str]] = {}
    for place, column in enumerate(table.columns):
        if column.key in row.failed:
            found[place] = [
                f"seed {i['seed']}, {i['split']}: {failure['error']['type']}: {failure['error']['message']}"
                for failure in failures
                if (i := failure["identity"])["method"] == row.method
                and i["method_config"] == row.config
                and (i["mode"], i["task"]) == column.key
            ]
    return found


def _costs(table: Table) -> dict[str, Any] | None:
    """Return the cost of each row as text, and as numbers to sort by."""
    lines = wording.cost_lines(table)
    if not lines:
        return None
    fields = ("pretrain_steps", "voxels_seen", "pretrain_seconds", "downstream_seconds", "peak_memory_mib",
              "pretrain_parameters")  # fmt: skip
    values = [[getattr(row.cost, field, None) for field in fields] for row in table.rows]
    return {"headers": wording.COST_HEADERS[1:], "legend": wording.COST_LEGEND,
            "lines": [line[1:] for line in lines], "values": values}  # fmt: skip


def _column(table: Table, column: Column, places: dict[int, int]) -> dict[str, Any]:
    cells = [row.cells.get(column.key) for row in table.rows]
    baseline = next((c for r, c in zip(table.rows, cells, strict=True) if r.method == BASELINE), None)
    cases = sorted({case for cell in cells if cell for case in _case_values(cell, column)})
    return {
        "mode": column.mode,
        "group": column.group,
        "task": column.task,
        "metric": column.metric,
        "title": column.title,
        "lower": scores.sign(column.metric) < 0,
        "unit": scores.unit(column.metric),
        "digits": column.digits,
        "detectable": None if column.detectable is None else round(column.detectable, column.digits),
        "cases": cases,
        "cells": [cell and _cell(cell, column, cases, baseline, places) for cell in cells],
    }


def _cell(
    cell: Cell, column: Column, cases: Sequence[str], baseline: Cell | None, places: dict[int, int]
) -> dict[str, Any]:
    values = _case_values(cell, column)
    fine, coarse = column.digits + 2, column.digits + 1
    test = cell.comparison
    return {
        "constant": cell.constant,
        "mean": None if wording.unscored(cell, column) else round(cell.mean, fine),
        "sd": None if cell.sd is None or wording.unscored(cell, column) else round(cell.sd, fine),
        "seeds": [[*seed, round(score, fine)] for seed, score in cell.seeds.items()],
        "n": cell.n_cases,
        "interval": cell.interval and [round(cell.interval.low, coarse), round(cell.interval.high, coarse)],
        "over": cell.interval and cell.interval.over,
        "delta": None if cell.delta is None else round(cell.delta, fine),
        "apart": _apart(test, coarse),
        "p": None if test is None or test.note else round(test.p_holm, 4),
        "significant": bool(test and test.significant),
        "note": test and test.note,
        "rank": cell.rank and [cell.rank.rank, cell.rank.low, cell.rank.high],
        "best": cell.best,
        "second": cell.second,
        "marks": cell.marks,
        "records": [places[id(record)] for record in cell.records],
        "cases": [values.get(case) for case in cases],
        "peak": best_score(cell),
        "curve": [[step, round(score, coarse)] for step, score in mean_curve(cell)],
        "reach": steps_to_reach(cell, best_score(baseline) if baseline else None),
    }


def _apart(test: Comparison | None, digits: int) -> list[float] | None:
    """Return the difference that was tested, and its 95 % interval."""
    if test is None or test.note:
        return None
    return [round(value, digits) for value in (test.difference, test.low, test.high)]


def _case_values(cell: Cell, column: Column) -> dict[str, float]:
    """Return a value of each test case, averaged over seeds.

    For DSC and its kind it is the metric in percent, for errors the error itself. AUC has
    no value of a single case: there it is the probability of the true class, in percent.
    """
    metric = column.metric
    values: dict[str, list[float]] = defaultdict(list)
    for record in cell.records:
        for case in record["per_case"]:
            if metric == "auc" and case.get("probability") is not None:
                p = case["probability"]
                values[str(case["case"])].append(p if case["target"] else 1 - p)
            elif case.get(metric) is not None:
                values[str(case["case"])].append(case[metric])
    return {case: round(scores.scale(metric) * fmean(v), column.digits + 1) for case, v in values.items()}


# --- Few labels -----------------------------------------------------------------------------------


def _labels(model: TableModel) -> list[dict[str, Any]]:
    """Return score over share of labels of each method, task and mode that has several shares."""
    shown = []
    for curve in label_curves(model):
        digits = scores.digits(curve.metric, [p.mean for p in curve.points])
        points = []
        for p in curve.points:
            bounds = (
                [round(b, digits + 1) for b in (p.interval.low, p.interval.high)]
                if p.interval
                else [None, None]
            )
            points.append([p.fraction, round(p.mean, digits + 2), *bounds])
        shown.append({
            "mode": curve.mode, "group": MODES.get(curve.mode, curve.mode), "task": curve.task,
            "metric": curve.metric, "method": curve.method, "title": curve.title, "reaches": curve.reaches,
            "points": points,
        })  # fmt: skip
    return shown


# --- Pretraining ----------------------------------------------------------------------------------


def _runs(store: ResultStore, records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return the logged curves of every pretraining behind the records, thinned to what a chart can show."""
    runs = []
    found = {place: r for r in records if (place := store.run_folder(r))}
    for folder, record in found.items():
        log = folder / "log.jsonl"
        curves = read_log(log) if log.is_file() else {}
        if curves:
            identity = record["identity"]
            runs.append({
                "method": identity["method"], "title": record["method"]["title"],
                "seed": identity.get("pretrain_seed"), "pretext": record.get("pretext"),
                "curves": {k: thin(v) for k, v in curves.items()},
            })  # fmt: skip
    return sorted(runs, key=lambda run: (run["title"], run["seed"] is not None, run["seed"] or 0))


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) by name from a run's ``log.jsonl``; a torn last line ends it."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    try:
        text = read_bytes(path, _MOST_LOG_BYTES).decode("utf-8", "replace")
    except ReadError:
        return {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        if type(step) is not int:
            break
        for name, value in entry.items():
            if name == "step" or name in _MONITORS or type(value) not in (int, float):
                continue
            if abs(value) <= _LARGEST:  # neither NaN nor infinite
                curves[name].append((step, float(value)))
    return dict(curves)


def thin(curve: Sequence[tuple[int, float]], points: int = CURVE_POINTS) -> list[list[float]]:
    """Return at most ``points`` points, each the mean of equally many neighbours, so noise averages out."""
    size = max(1, -(-len(curve) // points))
    chunks = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [[chunk[-1][0], float(f"{fmean(value for _, value in chunk):.5g}")] for chunk in chunks]


# --- Representation -------------------------------------------------------------------------------


def _representation(store: ResultStore) -> tuple[list[dict[str, Any]], list[str]]:
    """Return numbers and pictures of ``ssl3d represent`` by task, and a line for each unusable file."""
    shown, problems = [], []
    results, bad = read_results(store.root / FOLDER)
    for result in results:
        pictures = []
        for how, name in result["pictures"].items():
            if not _inside(store, f"{FOLDER}/{name}"):
                problems.append(
                    f"{store.root / FOLDER / name}: no such picture; make it again: ssl3d represent"
                )
                continue
            png = (store.root / FOLDER / name).read_bytes()
            pictures.append({"how": how, "png": base64.b64encode(png).decode()})
        shown.append({
            "task": result["task"], "title": result["title"], "cases": len(result["cases"]),
            "pairs": len(result["pairs"]), "voxels": result["voxels_per_structure"],
            "rows": rows([result]), "pictures": pictures,
            "notes": [*result["left_out"], *(f"{m['title']}: not matched, {m['not_matched']}"
                                             for m in result["methods"] if m["not_matched"])],
        })  # fmt: skip
    return shown, bad + problems


# --- Viewer ---------------------------------------------------------------------------------------


def _viewer(store: ResultStore, tables: Iterable[Table], cases: int, mib: float) -> dict[str, Any]:
    """Return volumes in base64 and the scenes that use them; each task's worst cases first.

    Every file is embedded once. A scene that would pass the bound is left out and counted.
    """
    volumes: dict[str, str] = {}
    scenes: list[dict[str, Any]] = []
    left, left_out = mib * 2**20, 0
    for number, table in enumerate(tables):
        for column in table.columns:
            found = _kept(store, table.rows, column)
            ranked = sorted(found.items(), key=lambda item: fmean(s["score"] for s in item[1]["methods"]))
            for case, scene in ranked[:cases]:
                names = {
                    scene["image"],
                    scene["truth"],
                    *(m["file"] for m in scene["methods"]),
                } - volumes.keys()
                encoded = {n: base64.b64encode((store.root / n).read_bytes()).decode() for n in sorted(names)}
                weight = sum(map(len, encoded.values()))
                if weight > left:
                    left_out += 1
                    continue
                left -= weight
                volumes |= encoded
                scenes.append({"table": number, "task": column.task, "mode": column.mode, "group": column.group,
                               "metric": column.metric, "case": case, **scene})  # fmt: skip
    return {"scenes": scenes, "volumes": volumes, "left_out": left_out}


def _kept(store: ResultStore, rows: Iterable[Row], column: Column) -> dict[str, dict[str, Any]]:
    """Return the kept segmentations of a column by case; of each row those of its first seed."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        shown: set[str] = set()
        for record in row.cells[column.key].records if column.key in row.cells else ():
            scores = {str(c["case"]): c.get(column.metric) for c in record["per_case"]}
            for kept in record.get("predictions") or ():
                case = str(kept["case"])
                paths = [_inside(store, kept[kind]) for kind in ("prediction", "image", "truth")]
                if case in shown or not all(paths):
                    continue
                shown.add(case)
                scene = found.setdefault(
                    case, {"image": kept["image"], "truth": kept["truth"], "methods": []}
                )
                scene["methods"].append({
                    "title": row.title, "seed": record["identity"]["seed"], "file": kept["prediction"],
                    "score": round(100 * (scores.get(case) or 0.0), 1),
                })  # fmt: skip
    return found


def _inside(store: ResultStore, name: str) -> bool:
    """Whether ``name`` is a file of the store: a record from elsewhere must not embed other files."""
    path = real(store.root / name)
    return path.is_file() and path.is_relative_to(real(store.root))
