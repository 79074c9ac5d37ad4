"""What commands share: the group that prints errors, common options, and small tables."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ssl3d import signals
from ssl3d.commands.failures import report, survive_any_output
from ssl3d.errors import ConfigError, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ssl3d.bench.cell import TaskData
    from ssl3d.config import Settings
    from ssl3d.data.prepared.cohort import PreparedCohort
    from ssl3d.downstream.tasks import Task

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


_ARGUMENTS, _COMMAND, _RESUMES_WITH = "ssl3d.arguments", "ssl3d.command", "resumes_with"
C = TypeVar("C", bound=click.Command)


def resumable(option: str = "") -> Callable[[C], C]:
    """Mark a command that goes on where it was interrupted when started again, with ``option`` added.

    Only what is marked is said to go on.
    """

    def mark(command: C) -> C:
        setattr(command, _RESUMES_WITH, option)
        return command

    return mark


class Group(click.Group):
    """Turns every error into a message and an exit status, see :mod:`ssl3d.commands.failures`."""

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        survive_any_output()
        debug = bool(ctx.params.get("debug"))
        try:
            with signals.handled():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as error:
            ctx.exit(self._interrupted(ctx, error))
        except SystemExit as error:
            from ssl3d.registry.blame import plugin_fault

            fault = plugin_fault(error)
            if fault is None:
                raise  # a command's own
            ctx.exit(report(fault, ctx.meta[_ARGUMENTS], debug))
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # nobody reads the output any more; click ends quietly
            ctx.exit(report(error, ctx.meta[_ARGUMENTS], debug))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta.setdefault(
            _ARGUMENTS, list(args)
        )  # as the user gave them: the outermost group is asked first
        return super().parse_args(ctx, args)

    def _interrupted(self, ctx: click.Context, error: KeyboardInterrupt) -> int:
        """Say how to go on with the command that was interrupted, or that it begins anew; return the exit status."""
        number = error.number if isinstance(error, signals.Stopped) else signal.SIGINT
        name = "Interrupted" if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}"
        option = getattr(ctx.meta.get(_COMMAND), _RESUMES_WITH, None)
        if option is None:
            click.echo(f"\n{name}. Started again, it begins anew.", err=True)
            return 128 + number
        words = ["ssl3d", *ctx.meta[_ARGUMENTS]]
        if option and option not in words:
            words.append(option)
        click.echo(f"\n{name}. It goes on where it stopped with:\n  {shlex.join(words)}", err=True)
        return signals.RESUMABLE

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from ssl3d.errors import nearest

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(f'No command "{args[0]}".{nearest(args[0], self.list_commands(ctx))}', ctx)
        found = super().resolve_command(ctx, args)
        ctx.meta[_COMMAND] = found[1]  # the innermost is asked last
        return found


def split_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("An empty list of names was given; separate names by commas.")
    return list(dict.fromkeys(names))


def split_pairs(items: Iterable[str], option: str) -> dict[str, Path]:
    pairs = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals:
            raise ConfigError(f'{option} "{item}": write {option} NAME=DIR.')
        pairs[name] = Path(path)
    return pairs


def make_console() -> Console:
    from rich.console import Console

    return Console()


def text_table(*headers: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, no_wrap=number == 0, overflow="fold", style="bold" if number == 0 else "")
    return table


def print_conflicts(console: Console, catalogue: Any) -> None:
    from rich.markup import escape

    for name, plugins in catalogue.conflicts.items():
        console.print(f"[red]Refused:[/] {escape(name)} is registered by {escape(' and by '.join(plugins))}")


def print_skipped(skipped: Iterable[dict[str, str]]) -> None:
    """Say which bad cases were left out (the manifest of the prepared cohort keeps the list)."""
    for case in skipped:
        click.echo(printable(f"Left out: {case['path']} {case['problem']}. Fix: {case['fix']}."), err=True)


def print_differences(
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


def load_tasks(names: list[str]) -> list[Task]:
    """Return the tasks that are named, by registered name or by file; each name once."""
    from ssl3d.downstream.task_files import is_task_file, load_task
    from ssl3d.registry.registry import registry

    found = registry().tasks
    tasks: dict[str, Task] = {}
    for name in names:
        if is_task_file(name):
            task = load_task(Path(name))
            registry().datasets.get(task.dataset)
            if task.name in found:
                raise ConfigError(
                    f'{name}: a task "{task.name}" exists already (ssl3d tasks). Choose another name.'
                )
        else:
            task = found.get(name).load()
        if task.name in tasks:
            raise ConfigError(f'Two of the tasks are called "{task.name}". Rename one.')
        tasks[task.name] = task
    return list(tasks.values())


def set_option(command: Any) -> Any:
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                        help="Override one option: section.option=value or method.option=value.")(command)  # fmt: skip


def preset_option(command: Any) -> Any:
    command = set_option(command)
    return click.option("--preset", default="quick", show_default=True, metavar="NAME|FILE",
                        help="demo, smoke, quick, study, paper, or a YAML file.")(command)  # fmt: skip


def _hash_all(ctx: click.Context, _: click.Parameter, verify: bool) -> None:
    if verify:
        from ssl3d.data.prepared.stored import hashing_all_sources

        ctx.with_resource(hashing_all_sources())


def cache_option(command: Any) -> Any:
    command = click.option(
        "--verify-cache", is_flag=True, expose_value=False, callback=_hash_all,
        help="Hash all image files, also those whose size and time say that they have not changed.",
    )(command)  # fmt: skip
    return cache_place_option(command)


def cache_place_option(command: Any) -> Any:
    return click.option(
        "--cache",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="SSL3D_CACHE",
        help="Prepared volumes and phantoms [default: ~/.cache/ssl3d, or $SSL3D_CACHE].",
    )(command)


def policy_option(command: Any) -> Any:
    return click.option("--policy", default="refuse", show_default=True, type=click.Choice(["refuse", "skip"]),
                        help="What to do about bad files: stop, or go on without them.")(command)  # fmt: skip


def subject_option(command: Any) -> Any:
    return click.option(
        "--subject-pattern", "subject_patterns", multiple=True, metavar="[LAYOUT=]REGEX",
        help="Takes the person from a case's id, for example '^(sub-[0-9]+)' [default: the layout's].",
    )(command)  # fmt: skip


def read_subject_patterns(patterns: Iterable[str]) -> dict[str, str]:
    """Return layout -> pattern for the values of ``--subject-pattern``; ``*`` stands for every folder that is given.

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
    """Return the settings with ``--subject-pattern``."""
    said = {**settings.data.subject_pattern, **read_subject_patterns(patterns)}
    return settings.model_copy(update={"data": settings.data.model_copy(update={"subject_pattern": said})})


def with_splits_files(settings: Settings, tasks: Iterable[Task], files: Mapping[str, Path]) -> Settings:
    """Return the settings with ``--splits-file`` and the files that tasks name, so that records keep where they are."""
    named = {task.name: str(task.splits_file) for task in tasks if task.splits_file is not None}
    said = {name: str(path.expanduser().resolve()) for name, path in files.items()}
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
    from ssl3d.errors import DataError, count
    from ssl3d.progress import Tracker

    with Tracker() as progress:
        tested = tested_volumes(columns, unlabelled, progress)
    if len(tested) == len(unlabelled):
        raise DataError(
            f"--exclude-test leaves no volume for pretraining: all {len(unlabelled)} show people who are tested (with "
            "folds everybody is, once). Fix: give other volumes (--data), or test a part of the people: in the task "
            "file splits: {train: N, val: N, test: N}."
        )
    click.echo(
        f"Left out of pretraining: {count(len(tested), 'volume')} of {len(unlabelled)}, of people who are tested.",
        err=True,
    )
    if not tested:
        return settings, unlabelled
    data = settings.data.model_copy(update={"exclude": (*settings.data.exclude, *tested)})
    settings = settings.model_copy(update={"data": data})
    return settings, prepare(settings, unlabelled)


def affine_option(command: Any) -> Any:
    return click.option("--affine", type=click.Choice(["sform", "qform"]),
                        help="Which is right in NIfTI files where they disagree [default: refuse].")(command)  # fmt: skip


def offset_option(command: Any) -> Any:
    return click.option("--offset", type=float, metavar="N",
                        help="Added to stored CT values so that air is at 0 and water at 1000 [default: the layout's, "
                        "or what the predictor was trained with].")(command)  # fmt: skip


def device_option(command: Any) -> Any:
    return click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]),
                        help="Where to compute.")(command)  # fmt: skip


def quiet_libraries() -> None:
    """Keep the terminal for progress: third-party chatter that a user can do nothing about."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("nibabel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="monai.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.*")


def keep_freed_memory() -> None:
    """Let the C library keep up to 1 GiB of what torch frees on a CPU, for the next step.

    glibc gives blocks above 32 MiB back at once, as a convolution's work space is, and the kernel clears them anew
    in every step: a quarter of the time of a training step at 32 voxels.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc; musl has none
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes


def settings_of(preset: str, overrides: tuple[str, ...], tasks: Iterable[Task] | None = None) -> Any:
    """Return the settings of --preset and --set.

    Args:
        preset, overrides: as on the command line.
        tasks: those at hand. Options of tasks that are neither registered nor among them are refused; None:
            options of tasks are not looked at.
    """
    from ssl3d.config import load_settings
    from ssl3d.registry.registry import registry

    found = registry()
    names = None if tasks is None else [*found.tasks.names(), *(task.name for task in tasks)]
    return load_settings(preset, overrides, found.methods.names(), names, found.datasets.names())


def set_threads(threads: int) -> None:
    """Let torch and the linear algebra of numpy and scikit-learn compute with ``threads`` threads.

    Another number of threads adds in another order, and rounds otherwise.
    """
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)
