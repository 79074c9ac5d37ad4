"""What a call names, as objects: tasks, settings, and the options that belong to data. For Python and the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.errors import ConfigError, DataError, count, nearest, printable
from ssl3d.files import real

if TYPE_CHECKING:
    from ssl3d.bench.cell import TaskData
    from ssl3d.config import Settings
    from ssl3d.data.prepared.cohort import PreparedCohort
    from ssl3d.downstream.tasks import Task


def load_tasks(names: Iterable[str | Path | Task]) -> list[Task]:
    """Return the tasks that are named, by registered name or by file; each name once.

    Raises:
        ConfigError: a task file that cannot be used, or two tasks of one name.
        PluginError: no such task.
    """
    from ssl3d.downstream.task_files import is_task_file, load_task
    from ssl3d.downstream.tasks import Task
    from ssl3d.registry.registry import registry

    found = registry().tasks
    tasks: dict[str, Task] = {}
    for name in names:
        if isinstance(name, Task):
            task = name
        elif is_task_file(str(name)):
            task = load_task(Path(name))
            registry().datasets.get(task.dataset)
            if task.name in found:
                raise ConfigError(
                    f'{name}: a task "{task.name}" exists already (ssl3d tasks). Choose another name.'
                )
        else:
            task = found.get(str(name)).load()
        if task.name in tasks:
            raise ConfigError(f'Two of the tasks are called "{task.name}". Rename one.')
        tasks[task.name] = task
    return list(tasks.values())


def settings_of(preset: str, overrides: Iterable[str], tasks: Iterable[Task] | None = None) -> Settings:
    """Return the settings of a preset with overrides.

    Args:
        preset: a name or a file.
        overrides: ``key=value``, as on the command line.
        tasks: those at hand. Options of tasks that are neither registered nor among them are refused; None:
            options of tasks are not looked at.

    Raises:
        ConfigError: an option that does not exist, be it of a method that is not run.
    """
    from ssl3d.config import load_settings
    from ssl3d.registry.registry import registry

    found, overrides = registry(), tuple(overrides)
    names = None if tasks is None else [*found.tasks.names(), *(task.name for task in tasks)]
    settings = load_settings(preset, overrides, found.methods.names(), names, found.datasets.names())
    sections = dict.fromkeys(override.partition(".")[0].strip() for override in overrides)
    for name in (name for name in sections if name in settings.methods):
        from ssl3d.pretrain.spec import resolve_method

        resolve_method(name, settings.methods)
    return settings


def read_subject_patterns(patterns: Iterable[str]) -> dict[str, str]:
    """Return layout -> pattern for texts ``[LAYOUT=]REGEX``; ``*`` stands for every folder that is given.

    Raises:
        ConfigError: no regular expression.
    """
    from ssl3d.data.people import check_pattern
    from ssl3d.registry.registry import registry

    said = {}
    for text in patterns:
        name, equals, rest = text.partition("=")
        layout, pattern = (name, rest) if equals and name in registry().datasets else ("*", text)
        said[layout] = check_pattern(pattern)
    return said


def with_subject_patterns(settings: Settings, patterns: Iterable[str]) -> Settings:
    """Return the settings with patterns that take the person from a case's id."""
    said = {**settings.data.subject_pattern, **read_subject_patterns(patterns)}
    return settings.model_copy(update={"data": settings.data.model_copy(update={"subject_pattern": said})})


def with_splits_files(settings: Settings, tasks: Iterable[Task], files: Mapping[str, Path]) -> Settings:
    """Return the settings with files of splits, those that tasks name included, so that records keep where they are."""
    named = {task.name: str(task.splits_file) for task in tasks if task.splits_file is not None}
    said = {name: str(real(path.expanduser())) for name, path in files.items()}
    data = settings.data.model_copy(update={"splits_file": {**named, **settings.data.splits_file, **said}})
    return settings.model_copy(update={"data": data})


def without_tested(
    columns: Sequence[TaskData], unlabelled: PreparedCohort, settings: Settings,
    prepare: Callable[[Settings, PreparedCohort], PreparedCohort],
) -> tuple[Settings, PreparedCohort]:  # fmt: skip
    """Return settings and volumes for pretraining without the people who are tested in some split; says how many.

    Args:
        columns: the tasks with all their splits.
        unlabelled: the volumes for pretraining.
        settings: of the run.
        prepare: returns the volumes for pretraining under other settings, from those that are prepared.

    Raises:
        DataError: nobody is left.
    """
    from ssl3d.bench.leakage import tested_volumes
    from ssl3d.progress import Tracker, say

    with Tracker() as progress:
        tested = tested_volumes(columns, unlabelled, progress)
    if len(tested) == len(unlabelled):
        raise DataError(
            f"--exclude-test leaves no volume for pretraining: all {len(unlabelled)} show people who are tested (with "
            "folds everybody is, once). Fix: give other volumes (--data), or test a part of the people: in the task "
            "file splits: {train: N, val: N, test: N}."
        )
    say(
        f"Left out of pretraining: {count(len(tested), 'volume')} of {len(unlabelled)}, of people who are tested."
    )
    if not tested:
        return settings, unlabelled
    data = settings.data.model_copy(update={"exclude": (*settings.data.exclude, *tested)})
    settings = settings.model_copy(update={"data": data})
    return settings, prepare(settings, unlabelled)


def say_skipped(skipped: Iterable[Mapping[str, str]]) -> None:
    """Say which bad cases were left out (the manifest of the prepared cohort keeps the list)."""
    from ssl3d.progress import say

    for case in skipped:
        say(printable(f"Left out: {case['path']} {case['problem']}. Fix: {case['fix']}."))


def say_differences(
    tasks: Sequence[str], cohorts: Sequence[PreparedCohort], weights: Mapping[str, dict[str, Any] | None]
) -> None:
    """Say in what the volumes of tasks are prepared otherwise than those that weights saw; records keep it.

    Args:
        tasks: names.
        cohorts: their volumes.
        weights: how the volumes of each pretraining were prepared, by what is said of it; None: not known.
    """
    from ssl3d.data.prepared.facts import preparation_differences, preparation_facts
    from ssl3d.progress import say

    for name, cohort in zip(tasks, cohorts, strict=True):
        for place, facts in weights.items():
            if found := preparation_differences(facts, preparation_facts(cohort)):
                say(f"Task {name}: {'; '.join(found)} ({place}). Its records say so.")


def as_overrides(options: Mapping[str, Any] | Iterable[str]) -> tuple[str, ...]:
    """Return options as ``key=value``: ``{"pretrain.steps": 100}``, or such texts as they are.

    >>> as_overrides({"pretrain.steps": 100, "pretrain.crop": (32, 32, 32), "downstream.finetune.augment": True})
    ('pretrain.steps=100', 'pretrain.crop=[32, 32, 32]', 'downstream.finetune.augment=true')
    """
    import json

    if isinstance(options, Mapping):
        return tuple(f"{key}={json.dumps(value, default=str)}" for key, value in options.items())
    if isinstance(options, str):
        raise ConfigError(f'options: give a mapping or a list, not the text "{options}".')
    return tuple(options)


def checked_options(known: Iterable[str], given: Mapping[str, Any], function: str) -> dict[str, Any]:
    """Return keyword arguments of a function of the public API.

    Raises:
        ConfigError: the function has no such argument; names the nearest one.
    """
    names = list(known)
    for name in given:
        if name not in names:
            raise ConfigError(f'{function} has no argument "{name}".{nearest(name, names)}')
    return dict(given)
