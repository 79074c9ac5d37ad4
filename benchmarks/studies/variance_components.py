"""How much of a score is due to what: variance components of records, for simulations of what a table may conclude.

A score of row m, seed s and case c is taken as a sum of random parts: seed (what a seed does to all rows alike), case,
row x seed (the luck of one training), row x case, seed x case, and the rest. They are estimated from complete blocks
of records by the mean squares of the analysis of variance. An estimate below 0 is written as 0.

For AUC the parts are those of the logits of the probabilities, scaled to a standard deviation of 1 over the cases of each
record; ``row_seed`` and ``seed`` are there the spread of the distance between the means of the two classes.

Usage: ``python benchmarks/studies/variance_components.py FOLDER... > variance-components.json``, each
folder one of records.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("seed", "case", "row_seed", "row_case", "seed_case", "residual")


def mean_squares(values: np.ndarray) -> dict[str, float]:
    """Return the standard deviation of each part of ``values`` (M, S, C), and ``row``, that of the rows' means."""
    m, s, c = values.shape
    grand = values.mean()
    rows, seeds, cases = values.mean((1, 2)), values.mean((0, 2)), values.mean((0, 1))
    ms, mc, sc = values.mean(2), values.mean(1), values.mean(0)
    square = {
        "row": s * c * np.square(rows - grand).sum() / (m - 1),
        "seed": m * c * np.square(seeds - grand).sum() / (s - 1),
        "case": m * s * np.square(cases - grand).sum() / (c - 1),
        "row_seed": c * np.square(ms - rows[:, None] - seeds + grand).sum() / ((m - 1) * (s - 1)),
        "row_case": s * np.square(mc - rows[:, None] - cases + grand).sum() / ((m - 1) * (c - 1)),
        "seed_case": m * np.square(sc - seeds[:, None] - cases + grand).sum() / ((s - 1) * (c - 1)),
    }
    left = values - ms[:, :, None] - mc[:, None] - sc + rows[:, None, None] + seeds[:, None] + cases - grand
    e = np.square(left).sum() / ((m - 1) * (s - 1) * (c - 1))
    variance = {
        "row": (square["row"] - square["row_seed"] - square["row_case"] + e) / (s * c),
        "seed": (square["seed"] - square["row_seed"] - square["seed_case"] + e) / (m * c),
        "case": (square["case"] - square["row_case"] - square["seed_case"] + e) / (m * s),
        "row_seed": (square["row_seed"] - e) / c,
        "row_case": (square["row_case"] - e) / s,
        "seed_case": (square["seed_case"] - e) / m,
        "residual": e,
    }
    return {part: math.sqrt(max(0.0, float(value))) for part, value in variance.items()}


def of_one_row(values: np.ndarray) -> dict[str, float]:
    """Return seed, case and residual of single rows (S, C), the mean variance over the rows of ``values`` (M, S, C)."""
    _, s, c = values.shape
    of_seed, of_case = values.mean(2), values.mean(1)
    grand = values.mean((1, 2))[:, None]
    left = values - of_seed[:, :, None] - of_case[:, None] + grand[:, :, None]
    e = np.square(left).sum((1, 2)) / ((s - 1) * (c - 1))
    seed = (c * of_seed.var(1, ddof=1) - e) / c
    case = (s * of_case.var(1, ddof=1) - e) / s
    return {
        name: math.sqrt(max(0.0, float(v.mean())))
        for name, v in (("seed", seed), ("case", case), ("residual", e))
    }


def of_classes(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return the parts for AUC of ``logits`` (M, S, C); see the module."""
    scaled = (logits - logits.mean(2, keepdims=True)) / logits.std(2, keepdims=True)
    apart = scaled[:, :, targets].mean(2) - scaled[:, :, ~targets].mean(2)  # (M, S)
    within = [mean_squares(scaled[:, :, side]) for side in (targets, ~targets)]
    parts = {part: math.sqrt(np.mean([side[part] ** 2 for side in within])) for part in PARTS}
    m, s = apart.shape
    left = apart - apart.mean(1, keepdims=True) - apart.mean(0) + apart.mean()
    noise = (1 / targets.sum() + 1 / (~targets).sum()) * parts["residual"] ** 2
    luck = np.square(left).sum() / ((m - 1) * (s - 1)) - noise
    shared = (m * apart.mean(0).var(ddof=1) - luck - noise) / m - parts["seed_case"] ** 2 * noise / parts[
        "residual"
    ] ** 2
    parts |= {"row_seed": math.sqrt(max(0.0, luck)), "seed": math.sqrt(max(0.0, shared))}
    return parts | {"distance": float(apart.mean())}


def blocks(folder: Path) -> list[dict[str, Any]]:
    """Return a summary of each (task, mode) of the records in ``folder``: its largest complete block of rows x seeds."""
    cells: dict[Any, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_bytes())
        identity = record["identity"]
        column = (
            identity["task"],
            identity["mode"],
            record["metric"],
            identity["task_data"],
            json.dumps(identity["budget"]),
        )
        row = json.dumps(
            [identity["method"], identity["method_config"], identity.get("pretrain")], sort_keys=True
        )
        cells[column][row][identity["seed"]] = record
    found = []
    for (task, mode, metric, *_), rows in sorted(cells.items()):
        seeds, names = _largest(rows)
        if len(seeds) < 2 or len(names) < 3:
            continue
        field = "probability" if metric == "auc" else metric
        cases = [c["case"] for c in rows[names[0]][seeds[0]]["per_case"]]
        values = np.array([[_values(rows[n][s], cases, field) for s in seeds] for n in names], dtype=float)
        summary = {
            "task": task,
            "mode": mode,
            "metric": metric,
            "rows": len(names),
            "seeds": len(seeds),
            "cases": len(cases),
        }
        scores = np.array([[rows[n][s]["score"] for s in seeds] for n in names])
        spread = {
            json.loads(n)[0]: round(float(sd), 3) for n, sd in zip(names, scores.std(1, ddof=1), strict=True)
        }
        if metric == "auc":
            targets = np.array([bool(c["target"]) for c in rows[names[0]][seeds[0]]["per_case"]])
            p = np.clip(values, 1e-7, 1 - 1e-7)
            parts, single = of_classes(np.log(p / (1 - p)), targets), None
        else:
            parts, single = mean_squares(100 * values), of_one_row(100 * values)
        found.append(
            summary
            | {"sd": _rounded(parts), "sd_of_one_row": single and _rounded(single), "sd_over_seeds": spread}
        )
    return found


def _rounded(parts: dict[str, float]) -> dict[str, float]:
    return {part: round(value, 3) for part, value in parts.items()}


def _largest(rows: dict[str, dict[int, Any]]) -> tuple[tuple[int, ...], list[str]]:
    """Return the seeds and rows of the complete block with the most degrees of freedom."""
    every = sorted({seed for of in rows.values() for seed in of})
    best: tuple[tuple[int, ...], list[str]] = ((), [])
    for size in range(2, len(every) + 1):
        for seeds in combinations(every, size):
            names = [name for name, of in rows.items() if set(seeds) <= set(of)]
            if (len(names) - 1) * (size - 1) > (len(best[1]) - 1) * (len(best[0]) - 1) or not best[1]:
                best = seeds, names
    return best


def _values(record: dict[str, Any], cases: list[str], field: str) -> list[float]:
    of = {case["case"]: case[field] for case in record["per_case"]}
    return [of[case] for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    sources = []
    for folder in parser.parse_args().folders:
        names = sorted(path.name for path in folder.glob("*.json"))
        sources.append({
            "records": folder.as_posix(), "number": len(names),
            "names_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16], "columns": blocks(folder),
        })  # fmt: skip
    json.dump(
        {
            "command": "python benchmarks/studies/variance_components.py",
            "unit": "points; AUC: standard deviations of the logits",
            "sources": sources,
        },
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
