"""``ssl3d check``: does a plugin keep its contract? And ``ssl3d backbones``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ssl3d.commands.common import (
    Names,
    json_option,
    make_console,
    print_conflicts,
    print_json,
    quiet_libraries,
    set_option,
    text_table,
)
from ssl3d.errors import ConfigError, PluginError, count, nearest

if TYPE_CHECKING:
    from ssl3d.testing.checks import Check, Checks

CATALOGUES = {
    "method": "methods", "backbone": "backbones", "dataset": "datasets", "task": "tasks", "format": "table_formats",
    "logger": "loggers",
}  # fmt: skip
"""What can be checked -> the catalogue of the registry."""
KINDS = tuple(CATALOGUES)
WITH_DATA = ("dataset", "task")
WITHOUT_OPTIONS = {"format": "table format", "logger": "logger"}


class _Plugins(Names):
    """Names of all that can be checked."""

    def __init__(self) -> None:
        super().__init__("plugins")

    def _known(self) -> list[tuple[str, str]]:
        return [known for kind in CATALOGUES.values() for known in Names(kind)._known()]


@click.command()
@click.argument("name", type=_Plugins())
@click.option("--kind", type=click.Choice(KINDS), help="What NAME is, where it names several things.")
@click.option("--data", metavar="DIR",
              help='Data of a dataset or a task: a folder in its layout; for a task "phantoms", too.')  # fmt: skip
@click.option("--skip", multiple=True, metavar="CHECK", help="Leave out the check of this name.")
@set_option
def check(
    name: str, kind: str | None, data: str | None, skip: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    """Run the conformance suite on a method, backbone, dataset, task (or task file), table format or logger."""
    quiet_libraries()
    kinds = _kinds(name, kind)
    if data is not None and not set(kinds) & set(WITH_DATA):
        raise ConfigError(f"--data {data}: a {kinds[0]} is checked without data. Leave it out.")
    if overrides and set(kinds) <= WITHOUT_OPTIONS.keys():
        raise ConfigError(
            f"--set {overrides[0]}: a {WITHOUT_OPTIONS[kinds[0]]} has no options. Leave it out."
        )
    from ssl3d.progress import quiet

    suites = [_suite(name, kind, data, overrides) for kind in kinds]
    known = [known for suite in suites for known in suite.names()]
    for unknown in set(skip) - set(known):
        raise ConfigError(f'--skip "{unknown}": there is no such check.{nearest(unknown, known)}')
    failed = 0
    for suite in suites:
        if len(suites) > 1:
            click.echo(f"The {suite.kind} {name}:")
        with quiet():
            for result in suite.run(skip=set(skip) & set(suite.names())):
                _print(result)
                failed += result.failed
    if data is None and set(kinds) & set(WITH_DATA):
        click.echo("Its data were not looked at: give some with --data DIR.")
    console = make_console()
    if failed:
        console.print(f"[red]{name} fails {count(failed, 'check')}.[/]", highlight=False, soft_wrap=True)
        sys.exit(1)
    console.print(f"[green]{name} passes.[/]", highlight=False, soft_wrap=True)


def _kinds(name: str, kind: str | None) -> list[str]:
    """Return what ``name`` names.

    Raises:
        PluginError: nothing, or it is claimed by two plugins.
    """
    from ssl3d.downstream.task_files import is_task_file
    from ssl3d.registry.registry import registry

    if is_task_file(name) and kind in (None, "task"):
        return ["task"]
    found = registry()
    catalogues: dict[str, Any] = {k: getattr(found, attribute) for k, attribute in CATALOGUES.items()}
    if kind is not None:
        catalogues[kind].get(name)
        return [kind]
    kinds = [k for k, catalogue in catalogues.items() if name in catalogue or name in catalogue.conflicts]
    for one in kinds:
        catalogues[one].get(name)
    if not kinds:
        names = [n for catalogue in catalogues.values() for n in catalogue.names()]
        broken = "".join(
            f"\nThe plugin {plugin.name} is broken and may be meant to provide it: {plugin.error}"
            for plugin in found.broken()
        )
        raise PluginError(
            f'"{name}" is no method, backbone, dataset, task, table format or logger.{nearest(name, names)}{broken}'
        )
    return kinds


def _suite(name: str, kind: str, data: str | None, overrides: Sequence[str]) -> Checks:
    from ssl3d.testing import report

    if kind == "method":
        return report.method_suite(name, overrides)
    if kind == "backbone":
        return report.backbone_checks(name, overrides)
    if kind == "dataset":
        return report.dataset_checks(name, data, overrides)
    if kind == "task":
        return report.task_checks(name, data, overrides)
    if kind == "logger":
        return report.logger_checks(name)
    return report.format_checks(name)


def _print(result: Check) -> None:
    from rich.markup import escape

    mark = "[green]pass[/]" if result.passed else "[red]FAIL[/]" if result.failed else " [dim]--[/] "
    first, *more = result.told().splitlines() or [""]
    console = make_console()
    console.print(f"{mark}  {result.name}  [dim]{escape(first)}[/]", highlight=False, soft_wrap=True)
    for line in more:
        console.print(f"      {escape(line)}", highlight=False, soft_wrap=True)


@click.command()
@json_option
def backbones(as_json: bool) -> None:
    """List backbones."""
    from rich.markup import escape

    from ssl3d.registry.registry import registry

    if as_json:
        print_json([{"name": e.name, "summary": e.summary, "plugin": e.plugin} for e in registry().backbones])
        return
    table = text_table("Backbone", "What it is", "Plugin")
    for entry in registry().backbones:
        table.add_row(*(escape(text) for text in (entry.name, entry.summary, entry.plugin)))
    console = make_console()
    console.print(table)
    print_conflicts(console, registry().backbones)
