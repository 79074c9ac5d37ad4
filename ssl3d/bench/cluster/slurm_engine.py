"""A bench by Slurm, through submitit: every pretraining is a job, and its cells are jobs of one array once it is done.

A job that is told that its time is over, or that it is preempted, saves a checkpoint and is queued again. Workers see the
driver's store: Slurm's machines share a file system.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ssl3d import signals
from ssl3d.bench.cluster.work import FOLDER, Order, Result, Run
from ssl3d.errors import ConfigError, nearest
from ssl3d.process import cores
from ssl3d.progress import say

RETRIES = 3
"""How often a job is submitted again that ended without an answer."""

REQUEUES = 100
"""How often a job may be queued again because its time was over."""

CLUSTERS = ("slurm", "local")
"""``cluster=local`` runs the jobs as processes of this machine, to try things out."""

_POLL_S = 1.0
_OWN = ("cluster", "time", "parallel")
_EXAMPLE = "write --slurm partition=gpu,time=4:00:00"


def parse(text: str) -> dict[str, str]:
    """Return the settings in ``key=value,key=value``.

    Raises:
        ConfigError: it is malformed, or a key is given twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ConfigError(f'--slurm "{text}": "{part}" is no KEY=VALUE; {_EXAMPLE}.')
        if key in found:
            raise ConfigError(f'--slurm "{text}" has {key} twice; {_EXAMPLE}.')
        found[key] = value
    return found


def minutes(text: str) -> int:
    """Return a time as Slurm writes it, in whole minutes.

    Raises:
        ConfigError: it is none.

    >>> minutes("90"), minutes("4:00:00"), minutes("1-12"), minutes("0:30:01")
    (90, 240, 2160, 31)
    """
    days, dash, rest = text.rpartition("-")
    pieces = rest.split(":")
    if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}", text):
        raise ConfigError(
            f'--slurm time="{text}" is no time; write time=90 (minutes), time=4:00:00 or time=1-12:00:00.'
        )
    numbers = [int(piece) for piece in pieces]
    if dash:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, mins, seconds = 0, numbers[0], numbers[1] if len(numbers) == 2 else 0
    total = (int(days or 0) * 24 + hours) * 60 + mins + -(-seconds // 60)
    if not total:
        raise ConfigError(f'--slurm time="{text}" leaves no time; {_EXAMPLE}.')
    return total


class SlurmEngine:
    """Submits jobs while the block runs.

    Args:
        text: of ``--slurm``: ``partition``, ``time`` (needed) and any other parameter of sbatch that submitit knows;
            ``cluster=local``; ``parallel``, the number of jobs at once.
        gpus: of each job, whole ones.
        threads: CPU cores of each job.
        device: as ``--device`` has it.

    Raises:
        ConfigError: the text is malformed, or has a key or value that cannot be used.
    """

    name = "slurm"

    def __init__(self, text: str, gpus: float | None, threads: int, device: str) -> None:
        given = parse(text)
        self.cluster = given.get("cluster", "slurm")
        if self.cluster not in CLUSTERS:
            raise ConfigError(f'--slurm cluster="{self.cluster}".{nearest(self.cluster, CLUSTERS)}')
        if "time" not in given:
            raise ConfigError(
                f"--slurm {text}: without time=, Slurm ends a job when its default is over; {_EXAMPLE}."
            )
        self._minutes = minutes(given["time"])
        if gpus is not None and gpus != int(gpus):
            raise ConfigError(
                f"--gpus-per-run {gpus:g}: Slurm hands out whole GPUs; write --gpus-per-run {max(1, round(gpus))}."
            )
        if gpus is None:
            gpus = 0 if device == "cpu" or self.cluster == "local" else 1
        self._gpus, self._threads = int(gpus), threads
        self.device = "cuda" if gpus else "cpu"
        default = max(1, cores() // threads) if self.cluster == "local" else 0
        self._parallel = _whole("parallel", given["parallel"]) if "parallel" in given else default
        self._given = {key: value for key, value in given.items() if key not in _OWN}

    def __enter__(self) -> Self:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(f"--slurm needs submitit ({error}): pip install 'ssl3d[slurm]'") from None
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError(
                "--slurm: there is no sbatch on this machine. Start bench where jobs are submitted, or write "
                "--slurm cluster=local,time=60 to try it out here."
            )
        known = submitit.SlurmExecutor._valid_parameters()
        for key in self._given:
            if key not in known:
                raise ConfigError(f'--slurm "{key}" is no parameter.{nearest(key, [*known, *_OWN])}')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @property
    def jobs(self) -> int:
        """Jobs at once where a limit is known; else one, since a queue tells nothing of the time."""
        return self._parallel or 1

    def results(self, order: Order, runs: Sequence[Run]) -> Generator[Result, None, None]:
        """See :class:`ssl3d.bench.cluster.work.Engine`."""
        executor = self._executor(Path(order["store"]) / FOLDER / "jobs")
        cells = {run.name: run.cells for run in runs}
        waiting: deque[tuple[str, str | None, int]] = deque((run.name, None, 0) for run in runs)
        running: dict[Any, tuple[str, str | None, int]] = {}
        try:
            while waiting or running:
                self._submit(executor, order, waiting, running)
                time.sleep(_POLL_S)
                for job in [job for job in running if job.done()]:
                    run, cell, tries = running.pop(job)
                    answer = _answer(job)
                    if "lost" in answer and tries < RETRIES:
                        say(
                            f"Job {job.job_id} ended without an answer and is submitted again ({answer['lost']})."
                        )
                        waiting.appendleft((run, cell, tries + 1))
                        continue
                    yield Result(run, cell, answer)
                    if cell is None and "run" in answer:
                        waiting.extend((run, name, 0) for name in cells[run])
        finally:
            for job in running:
                job.cancel(check=False)
            _ended(list(running))

    def _submit(self, executor: Any, order: Order, waiting: deque[Any], running: dict[Any, Any]) -> None:
        """Submit what is waiting, as far as the limit allows; together, as one array."""
        room = self._parallel - len(running) if self._parallel else len(waiting)
        chosen = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        with executor.batch() if chosen else nullcontext():
            jobs = [executor.submit(Job(order, run, cell)) for run, cell, _ in chosen]
        running.update(zip(jobs, chosen, strict=True))

    def _executor(self, folder: Path) -> Any:
        """Return submitit's executor with our parameters.

        Raises:
            ConfigError: a value cannot be used.
        """
        import submitit

        limits: dict[str, Any] = {f"{kind}_max_num_timeout": REQUEUES for kind in CLUSTERS}
        executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster, **limits)
        own: dict[str, Any] = {
            "name": "ssl3d", "timeout_min": self._minutes, "cpus_per_task": self._threads, "gpus_per_node": self._gpus,
        }  # fmt: skip
        own |= {f"slurm_{key}": _number(value) for key, value in self._given.items()}
        try:
            executor.update_parameters(**own)
        except (TypeError, ValueError, NameError) as error:
            raise ConfigError(f"--slurm: {error}") from None
        return executor


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _whole(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f'--slurm {key}="{text}" is no whole number above 0; write {key}=8.')
    return int(text)


def _answer(job: Any) -> dict[str, Any]:
    """Return a job's answer; of one that ended without, that."""
    import submitit

    try:
        answer: dict[str, Any] = job.result()
    except (submitit.core.utils.UncompletedJobError, OSError, EOFError) as error:
        reason = next(
            (line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__
        )
        return {"lost": f"job {job.job_id}, {job.state}: {reason.strip()[:300]}"}
    return answer


def _ended(jobs: Sequence[Any]) -> None:
    """Wait until jobs that were cancelled have ended, as long as they may take to save a checkpoint."""
    last = time.monotonic() + signals.GRACE_S
    while time.monotonic() < last and any(not job.done() for job in jobs):
        time.sleep(_POLL_S / 4)


class Job:
    """What a job runs: a pretraining, or a cell.

    Told by SIGUSR1, or by what submitit sends before the time is over, it saves a checkpoint, and submitit has it queued
    again. Told by SIGTERM it saves a checkpoint and ends without an answer: Slurm queues it again where that is how it
    preempts, and else the driver submits it again.

    Args:
        order: see :func:`ssl3d.bench.cluster.work.order_of`.
        run: name of the pretraining.
        cell: name of the cell; None: the pretraining.
    """

    def __init__(self, order: Order, run: str, cell: str | None) -> None:
        self.order, self.run, self.cell = order, run, cell

    def __call__(self) -> dict[str, Any]:
        """Do the work and return the answer of :mod:`ssl3d.bench.cluster.worker`."""
        from ssl3d.bench.cluster import worker

        if not worker.sees_store(self.order):
            return {
                "refused": f"{worker.here()} does not see the store {self.order['store']}. Put it on a shared file system."
            }
        try:
            with signals.handled(started=True):
                if self.cell is None:
                    return worker.pretrain(self.order, self.run)
                return worker.evaluate(self.order, self.cell)
        except signals.Stopped as stopped:
            _queue_again(stopped.number)
            raise

    def checkpoint(self) -> Any:
        """Return what submitit runs when the job is queued again: the same, which goes on from its own checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _queue_again(number: int) -> None:
    """Have submitit queue this job again, unless it was told to end for good."""
    from submitit.core.job_environment import JobEnvironment

    handler = signal.getsignal(JobEnvironment._usr_sig())
    if number not in (signal.SIGTERM, signal.SIGINT) and callable(handler):
        handler(number, None)  # ends this process
