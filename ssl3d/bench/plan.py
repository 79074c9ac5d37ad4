"""From the options of a bench to the bench itself: everything checked, all data prepared, nothing trained."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ssl3d.bench.given import (
    load_tasks,
    say_differences,
    say_skipped,
    settings_of,
    with_splits_files,
    with_subject_patterns,
    without_tested,
)
from ssl3d.errors import ConfigError

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


@dataclass(frozen=True)
class BenchOptions:
    """What a bench is asked for; the options of ``ssl3d bench`` and of :func:`ssl3d.bench.api.bench`.

    Attributes:
        store: folder of the records.
        methods: rows, in this order; ``all`` is every method, without variants.
        tasks: columns: names, task files, or :class:`ssl3d.Task`; ``all`` is every registered one.
        modes: of ``linear``, ``finetune`` and ``knn``.
        seeds: one seed covers a whole run; None: the preset's.
        preset: a name, or a YAML file.
        options: ``key=value`` over the preset.
        data: volumes for pretraining: ``phantoms``, a folder, or ``LAYOUT=DIR``.
        task_data: task -> its data on disk, a folder or ``LAYOUT=DIR``.
        checkpoint: method -> a run to evaluate instead of pretraining.
        label_fractions: shares of the training subjects; nested, the same for every method.
        match: what the methods' pretrainings have in common: ``steps``, ``voxels`` or ``time``.
        recompute: compute cells again whose code or preset has changed, or is not known.
        allow_overlap: tasks that are evaluated although test images are among those of the training.
        exclude_test: leave everybody who is tested in some split out of the volumes for pretraining.
        splits_file: task -> nnU-Net's ``splits_final.json``.
        subject_patterns: ``[LAYOUT=]REGEX``, takes the person from a case's id.
        policy: what to do about bad files: ``refuse`` or ``skip``.
        keep_predictions: segmented test cases a cell to keep for the report's viewer.
        allow_code_change: go on with an interrupted pretraining although the code has changed since.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        cache: folder of prepared volumes and phantoms; None: ``~/.cache/ssl3d``.
        session: the same for all processes of one call.
        jobs: processes of the call.
    """

    store: Path
    methods: Sequence[str] | Literal["all"] = ("scratch", "gvsl")
    tasks: Sequence[str | Path | Task] | Literal["all"] = ("shc", "sac", "ccc", "sbm")
    modes: Sequence[str] = ("linear", "finetune")
    seeds: Sequence[int] | None = None
    preset: str = "quick"
    options: Sequence[str] = ()
    data: str = "phantoms"
    task_data: Mapping[str, Path] = field(default_factory=dict)
    checkpoint: Mapping[str, Path] = field(default_factory=dict)
    label_fractions: Sequence[float] = (1.0,)
    match: str = "steps"
    recompute: bool = False
    allow_overlap: Sequence[str] = ()
    exclude_test: bool = False
    splits_file: Mapping[str, Path] = field(default_factory=dict)
    subject_patterns: Sequence[str] = ()
    policy: Policy = "refuse"
    keep_predictions: int = 0
    allow_code_change: bool = False
    device: str = "auto"
    cache: Path | None = None
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    jobs: int = 1


@dataclass(frozen=True)
class Plan:
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


def bench_of(options: BenchOptions) -> Bench:
    """Return what the options ask for, all of them checked and all data prepared.

    Raises:
        SSL3DError: something cannot be done; nothing has been trained then.
    """
    from ssl3d.bench.run import Bench, Conduct, Grid, Pretraining
    from ssl3d.bench.sources import absolute_place
    from ssl3d.results.store.store import ResultStore

    plan = plan_of(options)
    settings, columns, unlabelled = _prepared(plan, options)
    grid = Grid(plan.methods, columns, plan.modes, plan.seeds, plan.fractions)
    pretraining = Pretraining(unlabelled, plan.checkpoints, plan.match, absolute_place(options.data))
    conduct = Conduct(
        options.recompute, options.keep_predictions, options.allow_code_change, options.session, options.jobs
    )
    return Bench(grid, pretraining, settings, ResultStore(options.store), plan.device, conduct)


def plan_of(options: BenchOptions) -> Plan:
    """Return what the options ask for; everything that can be known to be wrong without data is said here."""
    from ssl3d.registry.registry import registry

    found = registry()
    chosen_tasks = found.tasks.names() if options.tasks == "all" else options.tasks
    methods = [e.name for e in found.methods if not e.base] if options.methods == "all" else options.methods
    for name in methods:
        found.methods.get(name)
    tasks = load_tasks(chosen_tasks)
    settings = settings_of(options.preset, options.options, tasks)
    seeds = list(settings.seeds if options.seeds is None else options.seeds)
    fractions = tuple(_fraction(fraction) for fraction in options.label_fractions)
    settings = with_subject_patterns(settings, options.subject_patterns)
    settings = with_splits_files(settings, tasks, options.splits_file)
    for option, names in (
        ("--splits-file", options.splits_file), ("--task-data", options.task_data),
        ("--allow-overlap", options.allow_overlap),
    ):  # fmt: skip
        for name in set(names) - {task.name for task in tasks}:
            raise ConfigError(f'{option} names the task "{name}", which --tasks does not.')
    for name in options.checkpoint.keys() - set(methods):
        raise ConfigError(f'--checkpoint names the method "{name}", which --methods does not.')

    from ssl3d.bench.run import check_checkpoints, check_match
    from ssl3d.bench.sources import absolute_place
    from ssl3d.device import check_precision, select_device
    from ssl3d.downstream.problems.kinds import check_mode, check_modes
    from ssl3d.pretrain.loop import check_run
    from ssl3d.pretrain.run_log import check_loggers
    from ssl3d.pretrain.spec import resolve_method

    match = check_match(options.match)
    modes = [check_mode(mode) for mode in options.modes]
    for task in tasks:
        check_modes(task, modes)
    specs = [resolve_method(name, settings.methods) for name in methods]
    device = select_device(options.device)
    places = {name: Path(absolute_place(str(place))) for name, place in options.task_data.items()}
    checkpoints = {name: run.expanduser().absolute() for name, run in options.checkpoint.items()}
    check_loggers(settings.pretrain.loggers)
    for spec in specs:
        if spec.name not in checkpoints:
            check_run(spec, settings, seeds[0])
            if spec.cls.trains != "none":
                check_precision("pretrain.precision", settings.pretrain.precision, device)
    if "finetune" in modes:
        check_precision("downstream.precision", settings.downstream.precision, device)
    check_checkpoints(specs, checkpoints, settings)
    return Plan(specs, tasks, modes, seeds, fractions, settings, places, checkpoints, match, device)


def _fraction(fraction: float) -> float:
    if not 0 < fraction <= 1:
        raise ConfigError(
            f'--label-fractions "{fraction:g}" is not a number in (0, 1]; write --label-fractions 0.1,0.25,1.'
        )
    return float(fraction)


def _prepared(plan: Plan, options: BenchOptions) -> tuple[Settings, list[TaskData], PreparedCohort | None]:
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
        say_skipped(cohort.skipped)
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
        say_skipped(unlabelled.skipped)
    _say_differences(columns, unlabelled, plan.checkpoints)
    seen, allowed = _pretrained_on(plan.checkpoints, unlabelled, cache), set(options.allow_overlap)
    with Tracker() as progress:
        columns = check_within(columns, allowed, progress)
        columns = check_overlap(columns, seen, allowed, progress)
    return settings, columns, unlabelled


def _say_differences(
    columns: Sequence[TaskData], unlabelled: PreparedCohort | None, checkpoints: Mapping[str, Path]
) -> None:
    from ssl3d.data.prepared.facts import preparation_facts
    from ssl3d.models.weights.checkpoint import read_run

    weights = {str(folder): read_run(folder).get("preparation") for folder in checkpoints.values()}
    if unlabelled is not None:
        weights["the volumes for pretraining"] = preparation_facts(unlabelled)
    say_differences([column.task.name for column in columns], [c.cohort for c in columns], weights)


def _pretrained_on(
    checkpoints: Mapping[str, Path], unlabelled: PreparedCohort | None, cache: Path | None
) -> dict[str, PreparedCohort | None]:
    """Return the volumes that the weights have seen or will see, by fingerprint; None: they are not at hand."""
    from ssl3d.bench.sources import cache_folder
    from ssl3d.data.prepared.many import find_prepared
    from ssl3d.models.weights.checkpoint import read_run

    seen: dict[str, PreparedCohort | None] = {}
    for folder in checkpoints.values():
        fingerprint = ((read_run(folder).get("identity") or {}).get("pretrain") or {}).get("data")
        if fingerprint:
            seen[fingerprint] = find_prepared(fingerprint, cache_folder(cache) / "prepared")
    if unlabelled is not None:
        seen[unlabelled.fingerprint] = unlabelled
    return seen
