"""How far a bench is as a whole, whichever process computes: cells done of all, and the time that is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ssl3d.errors import DataError, ReadError
from ssl3d.files import read_json
from ssl3d.models.weights.checkpoint import RUN
from ssl3d.progress import duration

if TYPE_CHECKING:
    from ssl3d.bench.run import Bench

Costs = Mapping[str, float]
"""Seconds by what is alike: a task and mode, or a method."""


class Whole:
    """Progress of all cells of a bench, read from its store.

    The time that is left is what cells of the same task and mode, and pretrainings of the same method, have taken in this
    store; where there is none of them yet, the mean of the others.

    Args:
        bench: with the number of its processes.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._cells = {bench.store.path_for(cell.identity): cell for cell in bench.cells()}
        self._known: dict[Path, float] = {}

    def said(self) -> str:
        """Return ``cell 7 of 96, 1 h 02 min left``; without a time before anything was measured."""
        done, failed = self._done(), self._failed()
        text = f"cell {len(done | failed)} of {len(self._cells)}"
        left = self.seconds_left(done | failed)
        return text if left is None or not left else f"{text}, {duration(left)} left"

    def _done(self) -> set[Path]:
        return {path for path in self._cells if path.is_file()}

    def _failed(self) -> set[Path]:
        session = self._bench.conduct.session
        failures = (f for f in self._bench.store.sound_failures()[0] if f["session"] == session)
        return {self._bench.store.path_for(failure["identity"]) for failure in failures} & set(self._cells)

    def seconds_left(self, done: set[Path]) -> float | None:
        """Return the seconds that all processes together need for the cells not ``done``; None: nothing is measured."""
        cells: defaultdict[str, list[float]] = defaultdict(list)
        for path in done:
            if (seconds := self._seconds(path)) is not None:
                cells[self._kind(path)].append(seconds)
        runs: defaultdict[str, list[float]] = defaultdict(list)
        waiting: dict[Path, str] = {}
        for path, cell in self._cells.items():
            if cell.weights.folder is not None or cell.weights.spec.cls.trains == "none":
                continue
            folder, method = self._bench.run_folder(cell.weights), cell.weights.spec.name
            run = run_facts(folder)
            if run.get("status") == "finished":
                runs[method].append(float(run.get("seconds") or 0))
            elif path not in done:
                waiting[folder] = method
        evaluation = _expected([self._kind(path) for path in self._cells if path not in done], cells)
        pretraining = _expected(waiting.values(), runs)
        if evaluation is None or pretraining is None:
            return None
        return (evaluation + pretraining) / max(1, self._bench.conduct.jobs)

    def _kind(self, path: Path) -> str:
        cell = self._cells[path]
        return f"{cell.data.task.name} {cell.mode}"

    def _seconds(self, path: Path) -> float | None:
        """Return what the evaluation of a finished cell took; None where its record cannot be read."""
        if path not in self._known:
            try:
                cost = self._bench.store.read(path, lazy=True).get("cost") or {}
            except DataError:  # said by those who need it
                return None
            self._known[path] = float(cost.get("downstream_seconds") or 0)
        return self._known[path]


def run_facts(folder: Path) -> dict[str, Any]:
    """Return the ``run.json`` of a folder; {} where there is none yet."""
    try:
        run = read_json(folder / RUN)
    except ReadError:  # not there yet, or being replaced
        return {}
    return run if isinstance(run, dict) else {}


def _expected(kinds: Iterable[str], known: Mapping[str, list[float]]) -> float | None:
    """Return the sum of what is expected of each, 0 of none; None where nothing is known."""
    kinds = list(kinds)
    if not kinds:
        return 0.0
    every = [seconds for some in known.values() for seconds in some]
    if not every:
        return None
    return sum(fmean(known[kind]) if known.get(kind) else fmean(every) for kind in kinds)


def line(record: dict[str, Any], where: str) -> str:
    """Return the line of a finished cell; ``where`` says how far the whole is."""
    from ssl3d.results.scores import written

    i = record["identity"]
    labels = "" if i["label_fraction"] == 1 else f" {100 * i['label_fraction']:g} % of the labels"
    return (
        f"{i['method']:>24}  {i['task']} {i['mode']:<8} seed {i['seed']} {i['split']}{labels}: "
        f"{written(record['metric'], record['score'])}  ({where})"
    )
