"""``ssl3d bench`` and ``ssl3d table``: from methods and tasks to records, and from records to a table."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssl3d.commands.common import (
    cache_option,
    device_option,
    keep_freed_memory,
    load_tasks,
    policy_option,
    preset_option,
    print_differences,
    print_skipped,
    quiet_libraries,
    resumable,
    set_threads,
    settings_of,
    split_names,
    split_pairs,
    subject_option,
    with_splits_files,
    with_subject_patterns,
    without_tested,
)
from ssl3d.commands.failures import SOFTWARE, USER, report
from ssl3d.errors import ConfigError, SSL3DError

if TYPE_CHECKING:
    import torch

    from ssl3d.bench.cell import TaskData
    from ssl3d.bench.run import Bench, Match
    from ssl3d.config import Settings
    from ssl3d.data.prepared.build import Policy
    from ssl3d.data.prepared.cohort import PreparedCohort
    from ssl3d.downstream.problems.problem import Mode
    from ssl3d.downstream.tasks import Task
    from ssl3d.pretrain.spec import MethodSpec

_END_S, _WATCH_S = 5.0, 0.5
_FAULTS = (1, USER, SOFTWARE)


@resumable()
@click.command()
@click.option("--methods", "method_names", default="scratch,gvsl", show_default=True, metavar="A,B|all",
              help='Rows; "all" is every method, without variants.')  # fmt: skip
@click.option(
    "--tasks", "task_names", default="shc,sac,ccc,sbm", show_default=True, metavar="A,B|all",
    help="Columns: names, or task files (.yaml).",
)  # fmt: skip
@click.option("--modes", default="linear,finetune", show_default=True, help="linear, finetune, or both.")
@click.option("--seeds", metavar="0,1,2", help="One seed covers a whole run [default: the preset's].")
@preset_option
@click.option(
    "--data", default="phantoms", show_default=True, metavar="NAME_OR_DIR", help="Volumes for pretraining."
)
@click.option(
    "--task-data", multiple=True, metavar="TASK=[LAYOUT=]DIR",
    help="A task's data on disk [default: its file's, or phantoms].",
)  # fmt: skip
@click.option(
    "--checkpoint", multiple=True, metavar="METHOD=RUN", help="Evaluate a run instead of pretraining."
)
@click.option(
    "--label-fractions",
    default="1",
    show_default=True,
    metavar="0.05,0.1,0.25,1",
    help="Shares of the training subjects; nested, the same for every method.",
)
@click.option(
    "--match",
    default="steps",
    show_default=True,
    metavar="steps|voxels|time",
    help="What the methods' pretrainings have in common; the preset's steps are those of supervised training.",
)
@click.option(
    "--recompute", is_flag=True, help="Compute cells again whose code or preset has changed, or is not known."
)
@click.option(
    "--store", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the records."
)
@click.option(
    "--allow-overlap",
    multiple=True,
    metavar="TASK",
    help="Evaluate TASK although test images are among the volumes for pretraining or training; results are marked.",
)
@click.option("--exclude-test", is_flag=True,
              help="Leave everybody who is tested in some split out of the volumes for pretraining.")  # fmt: skip
@click.option("--splits-file", multiple=True, metavar="TASK=FILE",
              help="nnU-Net's splits_final.json, in place of splits that are drawn.")  # fmt: skip
@subject_option
@policy_option
@click.option(
    "--keep-predictions",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Keep N segmented test cases a cell for the report's viewer [default: 0].",
)
@click.option(
    "--allow-code-change", is_flag=True,
    help="Go on with an interrupted pretraining although the code has changed since; both hashes are recorded.",
)  # fmt: skip
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    envvar="SSL3D_JOBS",
    metavar="N",
    help="Processes that share the cells [default: one a core of the CPU; one on a GPU, which has room for several].",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Threads of each process. Other threads round otherwise; a record names them.",
)
@device_option
@cache_option
def bench(jobs: int | None, threads: int, **given: Any) -> None:
    """Pretrain methods, evaluate them on tasks and print the table.

    The same command, started again in the same store (also on another machine that sees it), shares the cells
    that are left; --jobs starts it several times at once. A cell that fails is shown as such and tried again by the
    next call; the others are computed, and the exit status is 1.
    """
    import uuid

    from ssl3d.errors import CellsFailed
    from ssl3d.progress import say

    quiet_libraries()
    keep_freed_memory()
    set_threads(threads)
    options = _Options(**given, session=uuid.uuid4().hex, jobs=1)
    job = _bench_of(options)  # prepares the data, so that the other processes find them
    cells = [cell.identity for cell in job.cells()]
    jobs = min(jobs or _cores(job.device.type, threads), len(cells)) or 1
    options, job = replace(options, jobs=jobs), replace(job, conduct=replace(job.conduct, jobs=jobs))
    records, failed = [], None
    with _others(jobs - 1, threads, options):
        try:
            for record, computed in job.run():
                records.append(record)
                if computed or jobs == 1:
                    say(_line(record, computed))
        except CellsFailed as error:
            failed = error
    failures = [failure for failure in job.store.sound_failures()[0] if failure["identity"] in cells]
    print_table(records, "rich", against=None, statistics=["ci"], failures=failures)
    if failed is not None:
        click.echo(str(failed), err=True)
        sys.exit(1)


def _cores(device: str, threads: int) -> int:
    """Return how many processes of ``threads`` threads this machine computes at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads) if device == "cpu" else 1


def _line(record: dict[str, Any], computed: bool = True) -> str:
    """Return the line of a finished cell."""
    from ssl3d.results.scores import written

    i = record["identity"]
    labels = "" if i["label_fraction"] == 1 else f" {100 * i['label_fraction']:g} % of the labels"
    return (
        f"{i['method']:>24}  {i['task']} {i['mode']:<8} seed {i['seed']} {i['split']}{labels}: "
        f"{written(record['metric'], record['score'])}{'' if computed else '  (already in the store)'}"
    )


@contextmanager
def _others(count: int, threads: int, options: _Options) -> Iterator[None]:
    """Run ``count`` more processes of this bench while the block runs, and show the progress of all in one place.

    One that dies leaves its cell to the others, which is said. When this process is asked to stop, so are they. None is
    left when the block ends: they have the grace of :mod:`ssl3d.signals` to save what they have, and are killed then.
    """
    if not count:
        yield
        return
    from ssl3d import signals
    from ssl3d.progress import Board, sending

    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_work, args=(options, threads, sender), daemon=True) for _, sender in pipes
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()  # here; so that the other end tells when the process has ended
    ending = threading.Event()
    watcher = threading.Thread(target=_say_who_died, args=(processes, ending), daemon=True)
    try:
        pids = [process.pid for process in processes if process.pid is not None]
        with (
            Board([receiver for receiver, _ in pipes]) as board,
            sending(board.mine),
            signals.passed_on(pids),
        ):
            watcher.start()
            yield
    finally:  # daemons would go with this process only, which in a test lives on
        ending.set()
        _end(processes, signals.GRACE_S if signals.asked() else _END_S)


def _end(processes: Sequence[BaseProcess], grace: float) -> None:
    """End processes: ask them to, and kill those that are there after the grace, such as a suspended one."""
    for process in processes:
        process.terminate()
    last = time.monotonic() + grace
    for process in processes:
        process.join(max(0.0, last - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _say_who_died(processes: Sequence[BaseProcess], ending: threading.Event) -> None:
    """Say of each process that ends by a signal or a fault, before it is told to, that others take over."""
    from ssl3d.progress import say

    left = {process.sentinel: process for process in processes}
    while left and not ending.is_set():
        for sentinel in wait(list(left), timeout=_WATCH_S):
            process = left.pop(sentinel)  # type: ignore[call-overload]
            code = process.exitcode or 0
            if code < 0 and not ending.is_set():
                name = signal.Signals(-code).name
                say(
                    f"Process {process.pid} was killed by {name}; the cell that it was at work on is left to the others."
                )
            elif code in _FAULTS and not ending.is_set():
                say(
                    f"Process {process.pid} ended by a fault (status {code}); its cell is left to the others."
                )


def _work(options: _Options, threads: int, sender: Connection) -> None:
    """Compute cells of the bench with ``options`` until there are none left, or the process that started this one is."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    quiet_libraries()
    keep_freed_memory()
    set_threads(threads)
    from ssl3d import signals
    from ssl3d.errors import CellsFailed
    from ssl3d.progress import say, sending

    with sending(sender.send), signals.handled():
        try:
            with redirect_stderr(io.StringIO()):  # what there is to say of the data has been said
                job = _bench_of(options)
            for record, computed in job.run():
                if computed:
                    say(_line(record))
        except CellsFailed:
            pass  # written down; the process that prints the table says so
        except SSL3DError as error:
            say(f"Process {os.getpid()} stopped: {error}")
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(signals.RESUMABLE)
        except Exception as error:
            status = report(error, ("bench",), debug=bool(os.environ.get("SSL3D_DEBUG")))
            say(f"Process {os.getpid()} stopped by an error: {type(error).__name__}")
            sys.exit(status)


def _leave_with_parent() -> None:
    """End this process when its parent has ended, however that did: a killed one tells nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # at once: cells, checkpoints and locks are made for that


@dataclass(frozen=True)
class _Options:
    """The options of ``ssl3d bench`` as they were given, but for those of the processes.

    ``session`` and ``jobs`` are the same for all processes of one call.
    """

    method_names: str
    task_names: str
    modes: str
    seeds: str | None
    preset: str
    overrides: tuple[str, ...]
    data: str
    task_data: tuple[str, ...]
    checkpoint: tuple[str, ...]
    label_fractions: str
    match: str
    recompute: bool
    store: Path
    allow_overlap: tuple[str, ...]
    exclude_test: bool
    splits_file: tuple[str, ...]
    subject_patterns: tuple[str, ...]
    policy: Policy
    device: str
    cache: Path | None
    keep_predictions: int
    allow_code_change: bool
    session: str
    jobs: int


@dataclass(frozen=True)
class _Plan:
    """What the options ask for, before any data are read.

    Attributes:
        methods, tasks, modes, seeds, fractions: what is run over.
        settings: the preset with all that was given.
        places: where the data of tasks are, by name.
        checkpoints: runs to evaluate, by method.
        match: what pretrainings have in common.
        device: where to compute.
    """

    methods: list[MethodSpec]
    tasks: list[Task]
    modes: list[Mode]
    seeds: list[int]
    fractions: tuple[float, ...]
    settings: Settings
    places: dict[str, Path]
    checkpoints: dict[str, Path]
    match: Match
    device: torch.device


def _bench_of(options: _Options) -> Bench:
    """Return what the options ask for, all of them checked and all data prepared.

    Raises:
        SSL3DError: something cannot be done; nothing has been trained then.
    """
    from ssl3d.bench.run import Bench, Conduct, Grid, Pretraining
    from ssl3d.bench.sources import absolute_place
    from ssl3d.results.store.store import ResultStore

    plan = _plan(options)
    settings, columns, unlabelled = _prepared(plan, options)
    grid = Grid(plan.methods, columns, plan.modes, plan.seeds, plan.fractions)
    pretraining = Pretraining(unlabelled, plan.checkpoints, plan.match, absolute_place(options.data))
    conduct = Conduct(
        options.recompute,
        options.keep_predictions,
        options.allow_code_change,
        options.session,
        options.jobs,
    )
    return Bench(grid, pretraining, settings, ResultStore(options.store), plan.device, conduct)


def _plan(options: _Options) -> _Plan:
    """Return what the options ask for; everything that can be known to be wrong without data is said here."""
    from ssl3d.bench.sources import absolute_place
    from ssl3d.registry.registry import registry

    found = registry()
    chosen_tasks = found.tasks.names() if options.task_names == "all" else split_names(options.task_names)
    chosen_methods = (
        [e.name for e in found.methods if not e.base]
        if options.method_names == "all"
        else split_names(options.method_names)
    )
    for name in chosen_methods:
        found.methods.get(name)
    tasks = load_tasks(chosen_tasks)
    settings = settings_of(options.preset, options.overrides, tasks)
    seeds = list(settings.seeds) if options.seeds is None else [_seed(s) for s in split_names(options.seeds)]
    fractions = tuple(_fraction(text) for text in split_names(options.label_fractions))
    places = {
        name: Path(absolute_place(str(place)))
        for name, place in split_pairs(options.task_data, "--task-data").items()
    }
    checkpoints = {
        name: run.expanduser().absolute()
        for name, run in split_pairs(options.checkpoint, "--checkpoint").items()
    }
    files = split_pairs(options.splits_file, "--splits-file")
    settings = with_splits_files(with_subject_patterns(settings, options.subject_patterns), tasks, files)
    for option, names in (
        ("--splits-file", files), ("--task-data", places), ("--allow-overlap", options.allow_overlap),
    ):  # fmt: skip
        for name in set(names) - {task.name for task in tasks}:
            raise ConfigError(f'{option} names the task "{name}", which --tasks does not.')
    for name in checkpoints.keys() - set(chosen_methods):
        raise ConfigError(f'--checkpoint names the method "{name}", which --methods does not.')

    from ssl3d.bench.run import check_checkpoints, check_match
    from ssl3d.device import select_device
    from ssl3d.downstream.problems.kinds import check_mode, check_modes
    from ssl3d.pretrain.loop import check_run
    from ssl3d.pretrain.spec import resolve_method

    match = check_match(options.match)
    modes = [check_mode(mode) for mode in split_names(options.modes)]
    for task in tasks:
        check_modes(task, modes)
    specs = [resolve_method(name, settings.methods) for name in chosen_methods]
    device = select_device(options.device)
    for spec in specs:
        if spec.name not in checkpoints:
            check_run(spec, settings, seeds[0])
    check_checkpoints(specs, checkpoints, settings)
    return _Plan(specs, tasks, modes, seeds, fractions, settings, places, checkpoints, match, device)


def _prepared(plan: _Plan, options: _Options) -> tuple[Settings, list[TaskData], PreparedCohort | None]:
    """Return settings, tasks with their data, and volumes for pretraining (None: no method needs any).

    All data are prepared, and everything wrong with them said, before any training starts.
    """
    from ssl3d.bench.cell import TaskData
    from ssl3d.bench.leakage import check_overlap, check_within
    from ssl3d.bench.sources import pretraining_cohort, task_cohort, task_splits
    from ssl3d.progress import Tracker

    settings, cache, policy = plan.settings, options.cache, options.policy
    needs_data = any(s.cls.trains != "none" and s.name not in plan.checkpoints for s in plan.methods)
    unlabelled = pretraining_cohort(options.data, settings, cache, policy) if needs_data else None
    columns = []
    for task in plan.tasks:
        place = plan.places.get(task.name)
        cohort = task_cohort(task, place, settings, cache, policy)
        print_skipped(cohort.skipped)
        splits = task_splits(task, cohort, settings, options.store / "splits" / f"{task.name}.json")
        columns.append(TaskData(task, cohort, splits, place or task.place))
        for split in splits:
            for fraction in plan.fractions:
                columns[-1].split_for(split, fraction, settings)
    if unlabelled is not None and options.exclude_test:
        settings, unlabelled = without_tested(
            columns, unlabelled, settings,
            lambda settings, built: pretraining_cohort(options.data, settings, cache, policy, built),
        )  # fmt: skip
    if unlabelled is not None:
        print_skipped(unlabelled.skipped)
    _say_differences(columns, unlabelled, plan.checkpoints)
    seen, allowed = _pretrained_on(plan.checkpoints, unlabelled, cache), set(options.allow_overlap)
    with Tracker() as progress:
        columns = check_within(columns, allowed, progress)
        columns = check_overlap(columns, seen, allowed, progress)
    return settings, columns, unlabelled


def _say_differences(
    columns: Sequence[TaskData], unlabelled: PreparedCohort | None, checkpoints: dict[str, Path]
) -> None:
    from ssl3d.data.prepared.facts import preparation_facts
    from ssl3d.models.weights.checkpoint import read_run

    weights = {str(folder): read_run(folder).get("preparation") for folder in checkpoints.values()}
    if unlabelled is not None:
        weights["the volumes for pretraining"] = preparation_facts(unlabelled)
    print_differences([column.task.name for column in columns], [c.cohort for c in columns], weights)


def _pretrained_on(
    checkpoints: dict[str, Path], unlabelled: PreparedCohort | None, cache: Path | None
) -> dict[str, PreparedCohort | None]:
    """Return the volumes that the weights have seen or will see, by fingerprint; None: they are not at hand."""
    from ssl3d.bench.sources import cache_folder
    from ssl3d.data.prepared.cohort import find_prepared
    from ssl3d.models.weights.checkpoint import read_run

    seen: dict[str, PreparedCohort | None] = {}
    for folder in checkpoints.values():
        fingerprint = ((read_run(folder).get("identity") or {}).get("pretrain") or {}).get("data")
        if fingerprint:
            seen[fingerprint] = find_prepared(fingerprint, cache_folder(cache) / "prepared")
    if unlabelled is not None:
        seen[unlabelled.fingerprint] = unlabelled
    return seen


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f'--seeds "{text}" is not a whole number; write --seeds 0,1,2.') from None


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise ConfigError(
            f'--label-fractions "{text}" is not a number in (0, 1]; write --label-fractions 0.1,0.25,1.'
        )
    return fraction


def print_table(
    records: list[dict[str, Any]], format_name: str, against: str | None, statistics: list[str] | None = None,
    reference: str = "scratch", difference: float | None = None, failures: Sequence[dict[str, Any]] = (),
) -> None:  # fmt: skip
    from ssl3d.registry.registry import registry
    from ssl3d.results.table.build import build_table

    table_format = registry().table_formats.get(format_name).load()
    order = registry().methods.names()
    table = build_table(records, method_order=order, against=against, failures=failures)
    if statistics:
        from ssl3d.results.statistics.annotate import DIFFERENCE, with_statistics

        table = with_statistics(
            table, statistics, reference, DIFFERENCE if difference is None else difference
        )
    click.echo(table_format.render(table).rstrip("\n"))


@click.command()
@click.option("--store", required=True, type=click.Path(path_type=Path), help="Folder of the records.")
@click.option(
    "--format",
    "format_name",
    default="rich",
    show_default=True,
    help="rich, markdown, latex, html, csv, or a plugin's.",
)
@click.option("--against", type=click.Choice(["paper"]), help="Put the paper's own figures beside ours.")
@click.option(
    "--with",
    "statistics",
    default="",
    metavar="ci,p,power,rank,tau,cost,labels",
    help="Intervals, tests, seeds that a difference needs, ranks, agreement of modes, cost, labels saved.",
)
@click.option(
    "--reference", default="scratch", show_default=True, type=click.Choice(["scratch", "best"]),
    help="What --with p compares with: scratch, or the best method of each column.",
)  # fmt: skip
@click.option(
    "--difference", type=float, metavar="POINTS",
    help="The difference for which --with power says how many seeds it needs (default: 5).",
)  # fmt: skip
def table(
    store: Path,
    format_name: str,
    against: str | None,
    statistics: str,
    reference: str,
    difference: float | None,
) -> None:
    """Render the records of a store in the layout of the paper's table 1."""
    from ssl3d.registry.registry import registry
    from ssl3d.results.store.record import no_garbage_collection
    from ssl3d.results.store.store import ResultStore

    registry().table_formats.get(format_name)
    chosen = split_names(statistics) if statistics else None
    if difference is not None and "power" not in (chosen or ()):
        raise ConfigError("--difference says nothing without --with power; write --with power.")
    with no_garbage_collection():
        opened = ResultStore(store)
        records, problems = opened.records(lazy=True)
        failures, damaged = opened.sound_failures()
        print_table(records, format_name, against, chosen, reference, difference, failures)
        problems += damaged
    for problem in problems:
        click.echo(f"Left out: {problem}", err=True)
    if problems:
        sys.exit(1)
