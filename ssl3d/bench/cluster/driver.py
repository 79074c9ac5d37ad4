"""Hands the work of a bench to an engine and writes what comes back to the one store."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.bench.cluster.work import FOLDER, Engine, Result, cell_name, order_of, runs_of
from ssl3d.errors import BusyError, CellsFailed, ConfigError, DataError
from ssl3d.files import write_bytes
from ssl3d.locks import Held, this_process
from ssl3d.results.store.record import Record, decode_record
from ssl3d.results.store.store import failure_of

if TYPE_CHECKING:
    from ssl3d.bench.cell import Cell
    from ssl3d.bench.plan import BenchOptions
    from ssl3d.bench.run import Bench

_PREDICTIONS = "predictions/"


def run_on(
    engine: Engine, job: Bench, options: BenchOptions, threads: int
) -> Generator[tuple[Record, bool], None, None]:
    """Yield (record, computed now) for every cell, as :meth:`ssl3d.bench.run.Bench.run` does, computed by an engine.

    Args:
        engine: connected.
        job: the bench.
        options: that it was made of.
        threads: of each worker.

    Raises:
        BusyError: another cluster writes to the store.
        CellsFailed: after all the others, when cells have failed.
        ConfigError: workers do not fit the bench.
    """
    with _alone(job, options.session):
        todo: dict[str, Cell] = {}
        for cell in job.longest_first():
            if (record := _finished(job, cell)) is not None:
                yield record, False
            else:
                todo[cell_name(job, cell)] = cell
        if not todo:
            return
        order = order_of(job, options, threads, engine.device)
        settle = _Settle(job, todo)
        with closing(engine.results(order, runs_of(job, todo.values()))) as results:
            for result in results:
                yield from settle(result)
        if settle.failed:
            raise CellsFailed(settle.failed)
        if todo:
            raise RuntimeError(f"--{engine.name} has left cells undone: {', '.join(todo)}")


@contextmanager
def _alone(job: Bench, session: str) -> Iterator[None]:
    """Be the only cluster that writes to the store, and leave the mark by which workers know that they see it."""
    root = job.store.root
    lock = Held(root / "locks" / "cluster.lock", wait=False)
    with lock as mine:
        if not mine:
            raise BusyError(
                f"The store {root} belongs to another bench on a cluster: {lock.owner()}. Two must not write to one store "
                "at once. Fix: wait for it, or give another --store."
            )
        write_bytes(root / FOLDER / session, f"{this_process()}\n".encode())
        try:
            yield
        finally:
            shutil.rmtree(root / FOLDER, ignore_errors=True)


def _finished(job: Bench, cell: Cell) -> Record | None:
    """Return the record of a cell that is there and is not to be computed again."""
    with suppress(DataError):
        record = job.store.read(job.store.path_for(cell.identity))
        if job.stands(record):
            return record
    return None


class _Settle:
    """Writes down what workers answer; each cell once.

    Args:
        job: the bench.
        todo: cells by name; those that are settled are taken out.
    """

    def __init__(self, job: Bench, todo: dict[str, Cell]) -> None:
        self.job, self.todo = job, todo
        self.failed: list[str] = []

    def __call__(self, result: Result) -> Iterator[tuple[Record, bool]]:
        """Write an answer down; yield the record, if it is one.

        Raises:
            ConfigError: the worker has refused the work.
        """
        answer = result.answer
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "lost" in answer:
            answer = {"failure": {"error": {"type": "WorkerLost", "message": answer["lost"]}}}
        if result.cell is None:
            self._pretrained(result.run, answer)
        elif "failure" in answer:
            self._fail(result.cell, answer["failure"]["error"], answer["failure"].get("run"))
        elif (cell := self.todo.pop(result.cell, None)) is not None:
            yield self._recorded(cell, answer)

    def _pretrained(self, run: str, answer: Mapping[str, Any]) -> None:
        """Take over a pretraining: its files, where they came along; where it failed, its cells have failed, too."""
        if "failure" in answer:
            for waiting in runs_of(self.job, self.todo.values()):
                for name in waiting.cells if waiting.name == run else ():
                    self._fail(name, answer["failure"]["error"], run)
        elif answer.get("files"):
            from ssl3d.bench.cluster.worker import put_run

            put_run(self.job.store.root / "runs" / run, answer["files"])

    def _fail(self, name: str, error: Mapping[str, Any], run: str | None) -> None:
        cell = self.todo.pop(name, None)
        if cell is None:
            return
        self.job.store.write_failure(failure_of(cell.head, error, self.job.conduct.session, run))
        self.failed.append(f"{cell.label}: {error['type']}: {error['message']}")

    def _recorded(self, cell: Cell, answer: Mapping[str, Any]) -> tuple[Record, bool]:
        """Write the record of a cell into the store, unless another bench has done so meanwhile."""
        store, recompute = self.job.store, self.job.conduct.recompute
        if "there" in answer or (not recompute and store.has(cell.identity)):
            return store.read(store.path_for(cell.identity)), False
        record = decode_record(answer["record"])
        if record["identity"] != cell.identity:
            raise RuntimeError(f"a worker has answered another cell than {cell.label}")
        for name, data in answer["files"].items():
            if not name.startswith(_PREDICTIONS) or ".." in Path(name).parts:
                raise RuntimeError(f"a worker has answered a file that is no prediction: {name}")
            write_bytes(store.root / name, data)
        store.write(record, replace=recompute)
        store.forget_failure(cell.identity)
        return record, True
