"""How long does a table of 10,000 records take? Made-up records in a temporary store.

    python benchmarks/speed/table_speed.py --records 10000 --out benchmarks/speed/results/table_speed.json

Prints the time for reading the store (every record's hash checked), for arranging the table, and
for each format.
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssl3d.files import write_json
from ssl3d.results.formats.format import BUILTIN_FORMATS
from ssl3d.results.store.record import SCHEMA, encode_record
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.build import build_table

TASKS = {"shc": 7, "sac": 1, "ccc": 0, "sbm": 28}
"""Structures of each task; 0 is a classification."""
SECONDS: dict[str, dict[str, float]] = {}
"""Wall and processor time of what was timed."""


def made_up_records(count: int, cases: int) -> Iterator[dict[str, Any]]:
    """Yield ``count`` records in the order of methods, tasks, modes and five seeds."""
    rng = random.Random(0)
    for number in range(count):
        cell, seed = divmod(number, 5)
        cell, mode = divmod(cell, 2)
        method, task = divmod(cell, len(TASKS))
        name, structures = list(TASKS.items())[task]
        yield made_up_record(
            rng, f"method_{method:03d}" if method else "scratch", name, structures, mode, seed, cases
        )


def made_up_record(
    rng: random.Random, method: str, task: str, structures: int, mode: int, seed: int, cases: int
) -> dict[str, Any]:
    score, pretrained = rng.random(), method != "scratch"

    def case(index: int) -> dict[str, Any]:
        if not structures:
            return {"case": str(index), "target": index % 2, "probability": rng.random()}
        one = {"dsc": score, "hd95_mm": 10 * rng.random(), "nsd": rng.random()}
        return {
            "case": str(index),
            "dsc": score,
            "structures": {f"structure {k}": one for k in range(structures)},
        }

    return {
        "schema": SCHEMA,
        "identity": {
            "method": method, "method_config": {"weight": 1.0, "momentum": 0.99},
            "backbone": {"name": "unet3d", "channels": [32, 64, 128, 256, 512]},
            "pretrain": {"data": "f" * 64, "budget": {"steps": 1000, "lr": 1e-4}} if pretrained else None,
            "pretrain_seed": seed if pretrained else None,
            "task": task, "task_data": "0" * 64, "split": "test", "split_cases": "0" * 12,
            "mode": ("linear", "finetune")[mode], "seed": seed, "label_fraction": 1.0,
            "budget": {"steps": 300, "lr": 1e-3, "batch_size": 1, "crop": [128, 128, 128]},
        },
        "method": {"title": method, "trains": "encoder+decoder", "notes": []},
        "preset": "made-up",
        "metric": "dsc" if structures else "auc",
        "score": 100 * score,
        "per_case": [case(index) for index in range(cases)],
        "scored": cases,
        "excluded": {},
        "validation": [{"step": 200 * k, "score": 100 * score} for k in range(20)],
        "created": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--cases", type=int, default=12, help="test cases of each record")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = ResultStore(folder)
        store.folder.mkdir()
        size = 0
        for record in made_up_records(options.records, options.cases):
            data = encode_record(record)
            size += len(data)
            # Not by store.write, which waits for the disk after each record.
            store.path_for(record["identity"]).write_bytes(data)
        print(f"{options.records} made-up records, {size / 2**20:.0f} MiB, {options.cases} cases each")
        with timed("read and verify"):
            records, problems = store.records(lazy=True)
        assert len(records) == options.records and not problems
    with timed("arrange"):
        model = build_table(records, against="paper")
    for table_format in BUILTIN_FORMATS:
        with timed(table_format.name):
            table_format.render(model)
    if options.out:
        what = {"records": options.records, "cases": options.cases, "mib": round(size / 2**20)}
        write_json(
            options.out, {**what, "processor": platform.processor() or platform.machine(), "seconds": SECONDS}
        )


@contextmanager
def timed(what: str) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    SECONDS[what] = {"wall": round(wall, 3), "processor": round(processor, 3)}
    print(f"{what:>16} {wall:6.2f} s, {processor:5.2f} s of processor time")


if __name__ == "__main__":
    main()
