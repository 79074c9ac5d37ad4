"""``ssl3d cache``: the prepared volumes on the disk. ``ssl3d doctor``: all that may be wrong, in one screen."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssl3d.commands.common import (
    Group,
    cache_place_option,
    json_option,
    make_console,
    print_json,
    quiet_libraries,
    text_table,
)
from ssl3d.errors import SSL3DError, count, printable
from ssl3d.process import cores

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.group(cls=Group)
def cache() -> None:
    """Look after the prepared volumes on the disk."""


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"


def _age(when: float) -> str:
    days = (time.time() - when) / 86_400
    return "today" if days < 1 else f"{count(int(days), 'day')} ago"


@cache.command("ls")
@cache_place_option
@json_option
def list_cohorts(cache: Path | None, as_json: bool) -> None:
    """List prepared cohorts with their size and when they were last used."""
    from rich.markup import escape

    from ssl3d.bench.sources import cache_folder
    from ssl3d.data.prepared.cache import stored

    if as_json:
        print_json([
            {"dataset": one.dataset, "cases": one.cases, "bytes": one.size, "used": one.used, "folder": str(one.folder),
             "leftovers": len(one.leftovers)} for one in stored(cache_folder(cache))
        ])  # fmt: skip
        return
    table = text_table("Data set", "Cases", "Size", "Last used", "Folder")
    total = 0
    for one in stored(cache_folder(cache)):
        total += one.size
        cases = "not complete" if one.cases is None else str(one.cases)
        if one.leftovers:
            cases += f" (+ {count(len(one.leftovers), 'leftover')})"
        table.add_row(
            *(
                escape(printable(t))
                for t in (one.dataset, cases, _mib(one.size), _age(one.used), one.folder.name)
            )
        )
    console = make_console()
    if table.row_count:
        console.print(table)
    console.print(f"{cache_folder(cache)}: {_mib(total)}", highlight=False, soft_wrap=True)


@cache.command()
@cache_place_option
def verify(cache: Path | None) -> None:
    """Read every stored array and compare it with its checksum; exit with 1 when any is damaged."""
    from ssl3d.bench.sources import cache_folder
    from ssl3d.data.prepared.cache import stored
    from ssl3d.data.prepared.cache import verify as check
    from ssl3d.progress import Tracker

    with Tracker() as progress:
        found = check(list(stored(cache_folder(cache))), progress)
    for problem in found.problems:
        click.echo(printable(problem), err=True)
    unknown = f", {found.unknown} of an earlier version without a checksum" if found.unknown else ""
    click.echo(f"{count(found.sound, 'array')} sound{unknown}, {count(len(found.problems), 'problem')}.")
    if found.problems:
        sys.exit(1)


@cache.command()
@cache_place_option
@click.option(
    "--days", type=click.FloatRange(0), default=30, show_default=True, help="Keep what was used since."
)
@click.option("--yes", is_flag=True, help="Remove it; without, it is only listed.")
def prune(cache: Path | None, days: float, yes: bool) -> None:
    """Remove cohorts that were not used for some days, and leftovers of killed builds.

    What is removed is prepared again when it is needed. Do not prune what is being trained on.
    """
    from ssl3d.bench.sources import cache_folder
    from ssl3d.data.prepared.cache import prune as remove
    from ssl3d.data.prepared.cache import stored

    gone = remove(list(stored(cache_folder(cache))), days, yes)
    for path, size in gone:
        click.echo(printable(f"{'Removed' if yes else 'Would remove'}: {path} ({_mib(size)})"))
    total = _mib(sum(size for _, size in gone))
    if not gone:
        click.echo(f"Nothing in {cache_folder(cache)} was not used for {days:g} days.")
    else:
        click.echo(f"{total}{' removed.' if yes else '; with --yes it is removed.'}")


@click.command()
@cache_place_option
@click.option("--store", type=click.Path(path_type=Path), help="Look into this store, too.")
def doctor(cache: Path | None, store: Path | None) -> None:
    """Show versions, devices, memory, plugins, cache and store in one screen; exit with 1 when anything is wrong."""
    quiet_libraries()
    from rich.markup import escape

    console, wrong = make_console(), 0
    for name, state, bad in _findings(cache, store):
        wrong += bad
        console.print(
            f"{'[red]!![/]' if bad else '[green]ok[/]'}  [bold]{escape(name):<10}[/] {escape(printable(state))}",
            highlight=False,
            soft_wrap=True,
        )
    if wrong:
        sys.exit(1)


def _findings(cache: Path | None, store: Path | None) -> Iterator[tuple[str, str, bool]]:
    """Yield (what, how it is, whether that is wrong)."""
    yield from _machine()
    yield from _plugins()
    yield from _cache(cache)
    if store is not None:
        yield from _store(store)


def _machine() -> Iterator[tuple[str, str, bool]]:
    import platform

    import torch

    from ssl3d.environment import environment
    from ssl3d.memory import available

    known = environment()
    missing = [name for name, version in known["versions"].items() if version is None]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    yield "versions", versions, bool(missing)
    supported = sys.platform.startswith("linux") or sys.platform == "darwin"
    system = f"Python {platform.python_version()}, {platform.platform()}"
    yield (
        "system",
        system if supported else f"{system}: not supported; use Linux, macOS or WSL",
        not supported,
    )
    free = available()
    memory = "memory not known" if free is None else f"{_mib(free)} of memory free"
    yield "CPU", f"{known['cpu']}, {count(cores(), 'core')}, {memory}", free is not None and free < 2**30
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            left, total = torch.cuda.mem_get_info(number)
            yield "GPU", f"{torch.cuda.get_device_name(number)}, {_mib(left)} of {_mib(total)} free", False
    else:
        yield "GPU", "none that torch sees (pretraining at full size takes weeks on a CPU)", False


def _plugins() -> Iterator[tuple[str, str, bool]]:
    from ssl3d.registry.registry import registry

    found = registry()
    catalogues = found.catalogues.values()
    counts = ", ".join(f"{len(one)} {one.kind}s" for one in catalogues)
    yield "plugins", f"{count(len(found.plugins), 'plugin')}: {counts}", False
    for plugin in found.plugins.values():
        if plugin.error:
            yield "plugin", f"{plugin.name} is broken: {plugin.error}", True
        for problem in plugin.problems:
            yield "plugin", f"{plugin.name}: {problem}", True
    for catalogue in catalogues:
        for name, plugins in catalogue.conflicts.items():
            yield "plugin", f"{catalogue.kind} {name} is registered by {' and by '.join(plugins)}", True


def _cache(cache: Path | None) -> Iterator[tuple[str, str, bool]]:
    from ssl3d.bench.sources import cache_folder
    from ssl3d.data.prepared.cache import stored

    place = cache_folder(cache)
    cohorts = list(stored(place))
    whole = sum(one.cases is not None for one in cohorts)
    size = _mib(sum(one.size for one in cohorts))
    damaged = [path.name for one in cohorts for path in one.leftovers if ".damaged" in path.name]
    state = f"{place}: {whole} of {count(len(cohorts), 'cohort')} complete, {size}"
    if damaged:
        state += f"; set aside as damaged: {', '.join(damaged[:3])}{', ...' * (len(damaged) > 3)}"
    yield "cache", state, bool(damaged)
    there = next((one for one in (place, *place.parents) if one.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    yield (
        "disk",
        f"{_mib(free)} free{'' if writable else f'; {there} cannot be written to'}",
        free < 2**30 or not writable,
    )


def _store(store: Path) -> Iterator[tuple[str, str, bool]]:
    from ssl3d.results.store.store import ResultStore

    opened = ResultStore(store)
    try:
        records, problems = opened.records(lazy=True)
    except SSL3DError as error:
        yield "store", str(error), True
        return
    failures, damaged = opened.sound_failures()
    state = f"{store}: {count(len(records), 'sound record')}, {count(len(failures), 'failed cell')}"
    yield "store", state, False
    for problem in [*problems, *damaged]:
        yield "store", problem, True
