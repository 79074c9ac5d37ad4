"""What commands share: the group that prints errors, common options, and small tables."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ssl3d import signals
from ssl3d.bench.given import load_tasks as load_tasks
from ssl3d.bench.given import read_subject_patterns as read_subject_patterns
from ssl3d.bench.given import say_skipped as say_skipped
from ssl3d.bench.given import settings_of as settings_of
from ssl3d.bench.given import with_splits_files as with_splits_files
from ssl3d.bench.given import with_subject_patterns as with_subject_patterns
from ssl3d.commands.failures import report, survive_any_output
from ssl3d.errors import ConfigError
from ssl3d.process import keep_freed_memory as keep_freed_memory
from ssl3d.process import quiet_libraries as quiet_libraries
from ssl3d.process import set_threads as set_threads

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


SEED = click.IntRange(-(2**63), 2**63 - 1)
"""As records keep it."""

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

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except Exception as error:  # outside of any command, such as at the help, with an output that is full
            sys.exit(report(error, sys.argv[1:], debug=False))

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
        except BaseException as error:  # a plugin may raise what is no Exception
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
    """Return the console of standard output: as wide as the terminal; in a pipe or a file nothing is wrapped."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_UNBOUNDED)
    return console


_UNBOUNDED = 10_000
"""Columns; a table is as wide as it needs to be."""


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


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for other programs.")


def print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, default=str))


class Names(click.ParamType):
    """Names of what plugins register, one or several with commas between them; they complete in the shell.

    Args:
        kind: ``methods``, ``tasks``, ``backbones``, ``datasets`` or ``table_formats`` of the registry; or ``presets``.
        several: whether commas part several.
        more: words besides names, such as ``all``.
    """

    name = "text"

    def __init__(self, kind: str, several: bool = False, more: Sequence[str] = ()) -> None:
        self.kind, self.several, self.more = kind, several, more

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if self.several else ("", "", incomplete)
        chosen = before.split(",")
        return [
            CompletionItem(f"{before}{comma}{name}", help=text)
            for name, text in self._known()
            if name.startswith(last) and name not in chosen
        ]

    def _known(self) -> list[tuple[str, str]]:
        if self.kind == "presets":
            from ssl3d.config import preset_names

            return [(name, "") for name in preset_names()]
        from ssl3d.registry.registry import registry

        found = getattr(registry(), self.kind)
        return [*((entry.name, entry.summary) for entry in found), *((word, "") for word in self.more)]


class DeviceName(click.ParamType):
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""

    name = "device"
    _KNOWN = ("auto", "cpu", "cuda", "cuda:0", "cuda:1")

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, number = value.partition(":")
        if value not in self._KNOWN and not (kind == "cuda" and colon and number.isdecimal()):
            self.fail(f'"{value}" is none of auto, cpu, cuda and cuda:N.', param, ctx)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self._KNOWN if name.startswith(incomplete)]


def set_option(command: Any) -> Any:
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                        help="Override one option: section.option=value or method.option=value.")(command)  # fmt: skip


def preset_option(command: Any) -> Any:
    command = set_option(command)
    return click.option("--preset", default="quick", show_default=True, metavar="NAME|FILE", type=Names("presets"),
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


def affine_option(command: Any) -> Any:
    return click.option("--affine", type=click.Choice(["sform", "qform"]),
                        help="Which is right in NIfTI files where they disagree [default: refuse].")(command)  # fmt: skip


def offset_option(command: Any) -> Any:
    return click.option("--offset", type=float, metavar="N",
                        help="Added to stored CT values so that air is at 0 and water at 1000 [default: the layout's, "
                        "or what the predictor was trained with].")(command)  # fmt: skip


def device_option(command: Any) -> Any:
    return click.option("--device", default="auto", show_default=True, type=DeviceName(), metavar="auto|cpu|cuda|cuda:N",
                        help="Where to compute.")(command)  # fmt: skip
