"""What ``ssl3d represent`` keeps beside the records: numbers and pictures of local features, one task a file.

STORE/representation/<task>.json              numbers of every method, by pair of cases
STORE/representation/<task>-tsne.png, -pca.png
STORE/representation/representation.csv       means over pairs
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ssl3d.errors import ReadError
from ssl3d.files import read_json, write_bytes
from ssl3d.results.store.model import REPRESENTATION, problem_of
from ssl3d.spreadsheet import csv_text

SCHEMA = 1
FOLDER = "representation"

COLUMNS = (
    "task", "title", "method", "silhouette", "transfer_dice", "transfer_dice_sd", "correspondence",
    "correspondence_sd", "chance", "correspondence_balanced", "correspondence_balanced_sd", "chance_balanced",
    "dice_not_aligned", "dice_affine_only", "dice_predicted", "folded_affine_only", "folded_predicted", "pairs",
)  # fmt: skip


def rows(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one flat row a task and method: means (and standard deviations) over pairs, in [0, 1]."""
    found = []
    for result in results:
        for of in result["methods"]:
            row: dict[str, Any] = {
                "task": result["task"], "title": of["title"], "method": of["method"],
                "silhouette": of["silhouette"], "pairs": len(result["pairs"]),
            }  # fmt: skip
            columns: dict[str, list[float]] = {"transfer_dice": of["transfer_dice"]}
            for name, key in (("", "accuracy"), ("_balanced", "balanced")):
                columns[f"correspondence{name}"] = [c[key] for c in of["correspondence"]]
            for name, values in columns.items():
                row[name] = fmean(values)
                row[f"{name}_sd"] = stdev(values) if len(values) > 1 else None
            row["chance"] = fmean(c["chance"] for c in of["correspondence"])
            row["chance_balanced"] = fmean(c["balanced_chance"] for c in of["correspondence"])
            for kind, scores in (of["matching"] or {}).items():
                row[f"dice_{kind.replace(' ', '_')}"] = scores["dice"]
                if kind != "not aligned":
                    row[f"folded_{kind.replace(' ', '_')}"] = scores["folded"]
            found.append(row)
    return found


def write_csv(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write :func:`rows` to ``path``; an empty field is "does not exist"."""
    write_bytes(path, csv_text(COLUMNS, rows(results)).encode())


def read_results(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what ``folder`` holds, by task, and a line for each file that cannot be used."""
    results, problems = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            result = read_json(path)
            if result["schema"] != SCHEMA:
                raise ValueError(f"schema {result['schema']!r}, but this ssl3d reads {SCHEMA}")
            if (problem := problem_of(REPRESENTATION, result)) is not None:
                raise ValueError(problem)
            rows([result])
        except (ReadError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            problems.append(f"{path}: {type(error).__name__}: {error}; make it again: ssl3d represent")
            continue
        results.append(result)
    return results, problems
