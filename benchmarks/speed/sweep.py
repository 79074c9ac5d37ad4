"""How much of N workers does a bench by Ray use, against N benches of one process each that share nothing?

    python benchmarks/speed/sweep.py                     # cells of equal size
    python benchmarks/speed/sweep.py --mix               # pretrainings and cells of many sizes
    python benchmarks/speed/sweep.py --quick             # tiny: a check that it runs

Both do the same cells with one thread a worker. The N benches run at the same time, each with its share of the seeds, so
that they share the machine's memory as the workers do. Printed are two efficiencies. By the clock: the time of the N benches
(mean of their ends, so that none is charged for what another has left) by that of the bench by Ray, its cluster's start and
end included. By work: the seconds that pretrainings and evaluations took, by the seconds that N workers had from the first
task to the last; against the same of the N benches. Something else that is at work on the machine disturbs the first; the
second much less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl3d.process import cores
from ssl3d.progress import duration
from ssl3d.results.store.store import ResultStore

EQUAL = ["--methods", "denoising", "--tasks", "ccc", "--modes", "linear"]
MIX = [
    "--methods",
    "scratch,denoising,rotation,gvsl",
    "--tasks",
    "shc,sac,ccc,sbm",
    "--modes",
    "linear,finetune",
]


@dataclass(frozen=True)
class Ran:
    """What a bench has taken.

    Attributes:
        wall: seconds from its start to its end.
        work: seconds of its pretrainings and evaluations.
        span: seconds from the start of the first of them to its end.
        cells: how many.
    """

    wall: float
    work: float
    span: float
    cells: int


def start(store: Path, seeds: list[int], more: list[str]) -> tuple[float, subprocess.Popen[bytes]]:
    """Start a bench, with one thread a worker."""
    command = [
        sys.executable,
        "-m",
        "ssl3d",
        "bench",
        "--store",
        str(store),
        "--seeds",
        ",".join(map(str, seeds)),
        *more,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("SSL3D_JOBS", None)
    return time.time(), subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def finish(store: Path, started: float, process: subprocess.Popen[bytes]) -> Ran:
    """Wait for a bench and return what it took.

    Raises:
        SystemExit: it failed.
    """
    if process.wait():
        raise SystemExit(f"{process.args} failed")
    ended = time.time()
    records, problems = ResultStore(store).records()
    assert not problems
    pieces = done(store)
    span = max(at for at, _ in pieces) - began(pieces)
    return Ran(ended - started, sum(seconds for _, seconds in pieces), span, len(records))


def done(store: Path) -> list[tuple[float, float]]:
    """Return when each pretraining and evaluation of a store ended, and its seconds: log and record are written then."""
    ended = [
        (path.stat().st_mtime, json.loads(path.with_name("run.json").read_text())["seconds"])
        for path in store.glob("runs/*/log.jsonl")
    ]
    ended += [
        (path.stat().st_mtime, json.loads(path.read_text())["cost"]["downstream_seconds"])
        for path in (store / "records").glob("*.json")
    ]
    return ended


def began(pieces: list[tuple[float, float]]) -> float:
    """Return when the first of what :func:`done` returns began."""
    return min(at - seconds for at, seconds in pieces)


def measure(folder: Path, workers: int, seeds: int, more: list[str]) -> dict[str, Any]:
    """Run the N benches and the one by Ray on the same cells, and return the figures."""
    every = list(range(workers * seeds))
    alone = [folder / f"alone{number}" for number in range(workers)]
    started = [
        start(store, every[number::workers], [*more, "--jobs", "1"]) for number, store in enumerate(alone)
    ]
    singles = [finish(store, *one) for store, one in zip(alone, started, strict=True)]
    ray = finish(folder / "ray", *start(folder / "ray", every, [*more, "--ray"]))
    assert ray.cells == sum(single.cells for single in singles)
    return figures(singles, ray, workers)


def figures(singles: list[Ran], ray: Ran, workers: int) -> dict[str, Any]:
    """Return the efficiencies of a bench by Ray against benches of one process each.

    >>> figures([Ran(10, 8, 9, 2), Ran(12, 9, 9, 2)], Ran(11, 18, 9.5, 4), 2)["by_clock"]
    1.0
    """
    wall = sum(single.wall for single in singles) / len(singles)
    alone = sum(single.work for single in singles) / sum(single.span for single in singles)
    shared = ray.work / (workers * ray.span)
    return {
        "cells": ray.cells, "workers": workers, "seconds_alone": [single.wall for single in singles],
        "seconds_ray": ray.wall, "seconds_outside_of_tasks_ray": ray.wall - ray.span, "work_alone": alone,
        "work_ray": shared, "by_clock": wall / ray.wall, "by_work": shared / alone,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mix", action="store_true", help="pretrainings and cells of many sizes")
    parser.add_argument("--quick", action="store_true", help="tiny")
    parser.add_argument("--seeds", type=int, default=4, help="of each worker (default: 4)")
    parser.add_argument("--steps", type=int, default=300, help="of a pretraining (default: 300)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    asked = parser.parse_args(arguments)
    steps, seeds = (4, 1) if asked.quick else (asked.steps, asked.seeds)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        more = [*(MIX if asked.mix else EQUAL), "--preset", "smoke", "--device", "cpu", "--cache", str(folder / "cache"),
                "--set", f"pretrain.steps={steps}", "--set", "pretrain.checkpoint_every=100000",
                "--set", f"downstream.finetune.steps={max(6, steps // 3)}"]  # fmt: skip
        warm = ["--methods", "denoising", "--modes", "linear", "--set", "pretrain.steps=1", "--jobs", "1"]
        finish(folder / "warm", *start(folder / "warm", [0], [*more, *warm]))  # prepares the data
        workers = cores()
        found = measure(folder, workers, seeds, more)
    print(f"{found['cells']} cells, {workers} workers of one thread")
    print(f"{workers} benches of one process: {', '.join(duration(s) for s in found['seconds_alone'])}")
    outside = duration(found["seconds_outside_of_tasks_ray"])
    print(
        f"one bench by Ray: {duration(found['seconds_ray'])}, of which {outside} before the first task and after the last"
    )
    print(f"at work: {found['work_alone']:.3f} alone, {found['work_ray']:.3f} by Ray")
    print(f"efficiency: {found['by_clock']:.3f} by the clock, {found['by_work']:.3f} by work")
    if asked.out is not None:
        asked.out.write_text(json.dumps({"machine": os.uname().machine, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
