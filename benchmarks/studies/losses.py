"""Was the pretext task solved? Every loss of every row, over the first steps and over the last quarter, mean over seeds;
runs with another learning rate or batch stand apart.

Beside it, where there is one, the value that a network reaches which ignores its input.

Usage: ``python benchmarks/studies/losses.py STORE > benchmarks/studies/results/losses.md``
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pandas as pd
from separation import markdown
from stores import finished_runs

from ssl3d.errors import CheckpointError

FIRST_STEPS = 20


def chance(method: str, loss: str, config: dict[str, object], batch_size: int) -> float | None:
    """Return the loss of an output that does not depend on the input; None where that is no single number."""
    if loss == "nt_xent":
        return math.log(2 * batch_size - 1)  # all views alike: each of the others is as likely
    if loss == "cross_entropy" and method in ("rotation", "random_labels"):
        return math.log(int(str(config["classes"])))
    if loss == "cross_entropy" and method == "deepcluster":
        return math.log(int(str(config["clusters"])))  # all drawn equally often
    return None


def rows(store: Path) -> pd.DataFrame:
    """Return one row a run and loss: method, volumes a step, learning rate, seed, loss, first, last, chance."""
    found = []
    for folder, run in finished_runs(store):
        log = folder / "log.jsonl"
        if not log.is_file():
            continue
        lines = pd.DataFrame([json.loads(line) for line in log.read_text().splitlines()])
        identity = run["identity"]
        budget = identity["pretrain"]["budget"]
        for loss in run["losses"]:
            course = lines.dropna(subset=[loss])
            found.append({
                "method": run["title"], "batch": budget["batch_size"], "lr": budget["lr"], "seed": identity["seed"],
                "loss": loss,
                "first": course[course.step <= FIRST_STEPS][loss].mean(),
                "last": course[course.step > 0.75 * run["steps"]][loss].mean(),
                "chance": chance(run["method_name"], loss, identity["method"]["config"], budget["batch_size"]),
            })  # fmt: skip
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    store = parser.parse_args().store
    try:
        frame = rows(store)
    except CheckpointError as error:
        sys.exit(f"Error: {error}")
    if frame.empty:
        sys.exit(
            f"Error: {store}/runs holds no finished run with a log: pretrain with ssl3d bench --store {store}."
        )
    table = frame.groupby(["method", "batch", "lr", "loss"], sort=False).agg(
        Runs=("seed", "size"), first=("first", "mean"), last=("last", "mean"), chance=("chance", "first")
    )
    table = table.rename(
        columns={"first": f"Steps to {FIRST_STEPS}", "last": "Last quarter", "chance": "Chance"}
    )
    for column in table.columns[1:]:
        table[column] = ["" if pd.isna(value) else f"{value:.3g}" for value in table[column]]
    table = table.reset_index().rename(
        columns={"method": "Method", "batch": "Volumes a step", "lr": "Learning rate", "loss": "Loss"}
    )
    print(markdown(table))


if __name__ == "__main__":
    main()
