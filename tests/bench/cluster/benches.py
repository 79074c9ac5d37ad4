"""A bench of a few seconds, and what two stores of it must have in common."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Self

from ssl3d.bench.cluster import worker
from ssl3d.bench.cluster.work import Order, Result, Run
from ssl3d.bench.plan import BenchOptions
from ssl3d.results.store.record import decode_record

TINY = ("downstream.linear.voxels=50", "pretrain.steps=4")


def options(store: Path, cache: Path, **more: Any) -> BenchOptions:
    """Return the options of a bench of four cells: two methods, one task, two modes."""
    asked: dict[str, Any] = {
        "methods": ("scratch", "denoising"), "tasks": ("ccc",), "modes": ("linear", "knn"), "seeds": (0,),
        "preset": "smoke", "options": TINY, "device": "cpu", "cache": cache,
    }  # fmt: skip
    return BenchOptions(store, **{**asked, **more})


def words(store: Path, cache: Path, *more: object) -> list[str]:
    """Return the same bench as a command."""
    settings = [word for option in TINY for word in ("--set", option)]
    return [
        "bench", "--preset", "smoke", "--methods", "scratch,denoising", "--tasks", "ccc", "--modes", "linear,knn",
        "--seeds", "0", *settings, "--device", "cpu", "--store", str(store), "--cache", str(cache), *map(str, more),
    ]  # fmt: skip


def outcome(store: Path) -> dict[str, Any]:
    """Return what decides and what came out of each cell of a store, by file name."""
    found = {}
    for path in (store / "records").glob("*.json"):
        record = decode_record(path.read_bytes())
        kept = ("identity", "score", "per_case", "fingerprint_of_weights", "checkpoint", "code", "validation")
        found[path.name] = {key: record[key] for key in kept}
    return found


class Inline:
    """An engine that does the work in this process; ``change`` may tell the worker something else."""

    name, device, jobs = "inline", "cpu", 1

    def __init__(self, change: Any = None, **answers: dict[str, Any]) -> None:
        self.change, self.answers = change, answers
        self.done: list[tuple[str, str | None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def results(self, order: Order, runs: Sequence[Run]) -> Generator[Result, None, None]:
        worker._built = None  # of the bench before
        if self.change is not None:
            order = self.change(order)
        for run in runs:
            self.done.append((run.name, None))
            first = self.answers.get(run.name.partition("-")[0]) or worker.pretrain(order, run.name)
            yield Result(run.name, None, first)
            for cell in run.cells if "run" in first else ():
                self.done.append((run.name, cell))
                yield Result(run.name, cell, worker.evaluate(order, cell, first.get("files")))
