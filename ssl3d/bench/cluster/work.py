"""The work of a bench as tasks, a pretraining and then its cells, and what a worker is told of it: plain values only.

A worker builds the bench again from its options, as a process of ``--jobs`` does, and finds its task by a name that stands
for the whole identity. So nothing travels that could be read in another way there, and a worker whose data, splits or
settings differ cannot find the task instead of computing another one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ssl3d.errors import ConfigError

if TYPE_CHECKING:
    from ssl3d.bench.cell import Cell
    from ssl3d.bench.plan import BenchOptions
    from ssl3d.bench.run import Bench

Order = dict[str, Any]
"""What every worker of a bench is told: see :func:`order_of`."""

FOLDER = "cluster"
"""In a store: what workers need while a bench runs; gone afterwards."""


@dataclass(frozen=True)
class Run:
    """A pretraining and the cells that wait for it.

    Attributes:
        name: of the run's folder; of weights that were given, of their row.
        cells: their names, see :func:`cell_name`; those that are to do.
    """

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What a worker has answered.

    Attributes:
        run: name of the pretraining.
        cell: name of the cell; None: it is the pretraining itself.
        answer: of :func:`ssl3d.bench.cluster.worker.pretrain` or :func:`~ssl3d.bench.cluster.worker.evaluate`.
    """

    run: str
    cell: str | None
    answer: dict[str, Any]


class Engine(Protocol):
    """What runs the tasks of a bench somewhere else; a context in which it is connected.

    Attributes:
        name: of the option, for messages.
        device: on which each worker computes: ``cpu`` or ``cuda``.
    """

    name: str
    device: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def jobs(self) -> int:
        """Tasks that run at once, as far as is known."""

    def results(self, order: Order, runs: Sequence[Run]) -> Generator[Result, None, None]:
        """Do the pretrainings and, after each, its cells; yield what the workers answer, as it comes.

        Of a pretraining that has failed the cells need no answer. An answer is ``{"lost": why}`` where workers were lost
        again and again, and ``{"refused": why}`` where one does not fit the bench.

        Raises:
            ConfigError: nodes do not fit the bench; names them all.
        """


# --- What a worker is told ---------------------------------------------------------------------------


def order_of(job: Bench, options: BenchOptions, threads: int, device: str) -> Order:
    """Return what the workers of a bench are told.

    Keys: ``options`` (of the bench, with absolute places), ``release`` and ``code`` (of ssl3d, and hashes of what decides
    the numbers: a worker has the same), ``store``, ``mark`` (a file in it: who sees it shares the file system), ``kept``
    (files of the store that decide cells), ``threads``, ``device``.
    """
    from ssl3d.bench.run import RELATIVE_COST

    root = job.store.root.absolute()
    names = [RELATIVE_COST, *(f"splits/{column.task.name}.json" for column in job.grid.tasks)]
    kept = {name: (root / name).read_text(encoding="utf-8") for name in names if (root / name).is_file()}
    return {
        "options": plain(options), "release": release(), "code": code_of(job), "store": str(root),
        "mark": f"{FOLDER}/{options.session}", "kept": kept, "threads": threads, "device": device,
    }  # fmt: skip


def plain(options: BenchOptions) -> dict[str, Any]:
    """Return the options as plain values, with places that mean the same in any working directory.

    Raises:
        ConfigError: a task that is a Python object, which only this process has.
    """
    from ssl3d.bench.sources import absolute_place
    from ssl3d.config import preset_names
    from ssl3d.downstream.task_files import is_task_file

    def whole(value: Any) -> str:
        return str(Path(value).expanduser().absolute())

    tasks = options.tasks if options.tasks == "all" else list(options.tasks)
    for task in tasks if isinstance(tasks, list) else ():
        if not isinstance(task, str | Path):
            raise ConfigError(
                f'The task "{task.name}" is a Python object, which the workers of a cluster do not have. '
                "Give a task file, or register it by a plugin that is installed on every node."
            )
    named = {field.name: getattr(options, field.name) for field in fields(options)}
    return named | {
        "store": whole(options.store),
        "methods": options.methods if options.methods == "all" else list(options.methods),
        "tasks": [whole(t) if is_task_file(str(t)) else str(t) for t in tasks] if tasks != "all" else "all",
        "modes": list(options.modes),
        "seeds": None if options.seeds is None else list(options.seeds),
        "preset": options.preset if options.preset in preset_names() else whole(options.preset),
        "options": list(options.options),
        "data": absolute_place(options.data),
        "task_data": {name: absolute_place(str(place)) for name, place in options.task_data.items()},
        "checkpoint": {name: whole(run) for name, run in options.checkpoint.items()},
        "label_fractions": list(options.label_fractions),
        "allow_overlap": list(options.allow_overlap),
        "splits_file": {name: whole(file) for name, file in options.splits_file.items()},
        "subject_patterns": list(options.subject_patterns),
        "cache": None if options.cache is None else whole(options.cache),
    }


def options_of(values: Mapping[str, Any]) -> BenchOptions:
    """Return the options that :func:`plain` has made plain values of."""
    from ssl3d.bench.plan import BenchOptions

    places = {
        name: {key: Path(place) for key, place in values[name].items()}
        for name in ("task_data", "checkpoint", "splits_file")
    }
    cache = None if values["cache"] is None else Path(values["cache"])
    return BenchOptions(**{**values, **places, "store": Path(values["store"]), "cache": cache})


def release() -> str:
    """Return the release of ssl3d that is installed here."""
    from ssl3d import __version__

    return __version__


def code_of(job: Bench) -> list[list[str]]:
    """Return what of the code decides the numbers of a bench: ``[stage, name, backbone, hash]`` of each part."""
    from ssl3d.downstream.problems.kinds import problem_class

    backbone = job.settings.backbone.name
    methods = [spec.name for spec in job.grid.methods if spec.name not in job.pretraining.checkpoints]
    problems = {problem_class(column.task).__name__ for column in job.grid.tasks}
    parts = [("pretraining", name) for name in methods] + [("evaluation", name) for name in sorted(problems)]
    return [[stage, name, backbone, code_hash(stage, name, backbone)] for stage, name in parts]


def code_hash(stage: str, name: str, backbone: str) -> str:
    """Return the hash of the code of a pretraining or an evaluation, as it is here."""
    from ssl3d.source_hash import evaluation_code, pretraining_code

    return pretraining_code(name, backbone) if stage == "pretraining" else evaluation_code(name, backbone)


# --- Tasks --------------------------------------------------------------------------------------------


def cell_name(job: Bench, cell: Cell) -> str:
    """Return the name of a cell, as its record's file has it: it ends with the hash of its identity."""
    return job.store.path_for(cell.identity).stem


def run_name(job: Bench, cell: Cell) -> str:
    """Return the name of the pretraining that a cell waits for; it ends with the hash of its identity."""
    given = cell.weights.folder is not None
    return f"given {cell.weights.spec.name}" if given else job.run_folder(cell.weights).name


def runs_of(job: Bench, cells: Iterable[Cell]) -> list[Run]:
    """Return the pretrainings that ``cells`` wait for, each with those of them that wait for it, in their order."""
    waiting: dict[str, list[str]] = {}
    for cell in cells:
        waiting.setdefault(run_name(job, cell), []).append(cell_name(job, cell))
    return [Run(name, tuple(names)) for name, names in waiting.items()]
