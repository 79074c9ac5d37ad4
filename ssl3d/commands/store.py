"""``ssl3d store``: look into result stores, check, merge and export them; ``ssl3d reproduce``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssl3d.commands.common import (
    Group,
    Names,
    cache_option,
    device_option,
    json_option,
    print_json,
    quiet_libraries,
    set_threads,
)
from ssl3d.errors import are, count
from ssl3d.files import real

if TYPE_CHECKING:
    from ssl3d.results.store.record import Record

store_option = click.option(
    "--store", "folder", required=True, type=click.Path(path_type=Path), help="Folder of the records."
)


@click.group(cls=Group)
def store() -> None:
    """Look into result stores; check, merge and export them."""


@store.command("ls")
@store_option
@click.option("--method", type=Names("methods"), help="Only this method.")
@click.option("--task", type=Names("tasks"), help="Only this task.")
@click.option(
    "--stale", "only_stale", is_flag=True, help="Only records whose code, preset or data have changed."
)
@json_option
def list_records(folder: Path, method: str | None, task: str | None, only_stale: bool, as_json: bool) -> None:
    """List records, and why any is stale."""
    from ssl3d.bench.stale import stale_records
    from ssl3d.results.scores import written
    from ssl3d.results.store.record import identity_hash
    from ssl3d.results.store.store import ResultStore

    records, problems = ResultStore(folder).records(lazy=True, keep=without_cases)
    states = stale_records(records)
    places = [
        place
        for place, record in enumerate(records)
        if method in (None, record["identity"]["method"])
        and task in (None, record["identity"]["task"])
        and (states[place] or not only_stale)
    ]
    if as_json:
        failures = [f for f in ResultStore(folder).failures() if not (method or task or only_stale)]
        print_json(
            {
                "records": [_as_json(records[place], states[place]) for place in places],
                "failures": failures,
                "left_out": problems,
            }
        )
        sys.exit(1 if problems else 0)
    lines = [("Record", "Method", "Task", "Mode", "Seed", "Split", "Labels", "Score", "State")]
    for place in places:
        i, reasons, record = records[place]["identity"], states[place], records[place]
        state = "unknown" if reasons is None else f"stale: {'; '.join(reasons)}" if reasons else "current"
        labels = f"{100 * i.get('label_fraction', 1.0):g} %"
        score = written(record["metric"], record["score"])
        lines.append(
            (
                identity_hash(i)[:8],
                i["method"],
                i["task"],
                i["mode"],
                str(i["seed"]),
                i["split"],
                labels,
                score,
                state,
            )
        )
    click.echo(_aligned(lines))
    shown = len(lines) - 1
    counts = [sum(test(r) for r in states.values()) for test in (bool, lambda r: r is None)]
    click.echo(
        f"{shown} of {count(len(records), 'record')}; {counts[0]} stale, {counts[1]} that cannot tell."
    )
    failures, damaged = ResultStore(folder).sound_failures()
    _list_failures(failures, records, folder)
    if counts[0]:
        click.echo("Compute stale cells again: ssl3d bench --recompute")
    _name(problems + damaged)


def without_cases(record: Record) -> Record:
    """Return a record without the metrics of its cases, which are nearly all of it."""
    return {key: value for key, value in record.items() if key != "per_case"}


def _as_json(record: Record, reasons: list[str] | None) -> dict[str, Any]:
    """Return a record without its cases, as one line of JSON has it; ``stale`` is null where it cannot be told."""
    from ssl3d.results.store.record import identity_hash

    kept = ("identity", "method", "preset", "metric", "score", "scored", "cost", "created", "checkpoint")
    return {"record": identity_hash(record["identity"]), "stale": reasons, **{k: record.get(k) for k in kept}}


def _list_failures(failures: Sequence[Record], records: Sequence[Record], folder: Path) -> None:
    """List the cells that failed, apart those that were computed since with other settings."""
    from ssl3d.results.store.manage import overtaken

    since = overtaken(failures, records)
    left = [failure for place, failure in enumerate(failures) if place not in since]
    if left:
        click.echo(f"{count(len(left), 'cell')} failed; the same ssl3d bench tries again:")
        for failure in left:
            click.echo(f"  {_failure(failure)}")
    if since:
        click.echo(
            f"{count(len(since), 'cell')} failed and {'was' if len(since) == 1 else 'were'} computed since with other "
            f"settings (ssl3d store prune --store {folder} forgets them):"
        )
        for place, changes in since.items():
            click.echo(f"  {_failure(failures[place])} Since: {', '.join(changes)}.")


def _failure(failure: Record) -> str:
    i, error = failure["identity"], failure["error"]
    name = f"{i['method']} {i['task']} {i['mode']} seed {i['seed']} {i['split']}"
    return f"{name}: {error['type']}: {error['message']}"


@store.command()
@store_option
def prune(folder: Path) -> None:
    """Forget failures of cells that were computed since with other settings. Records stay."""
    from ssl3d.results.store.manage import prune as forget
    from ssl3d.results.store.store import ResultStore

    gone = forget(ResultStore(folder))
    for failure in gone:
        click.echo(f"Forgotten: {_failure(failure)}")
    click.echo(f"{folder}: {count(len(gone), 'failure')} forgotten.")


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of texts in columns, the last one as wide as it is, in the colour of what it begins with.

    rich's tables take a millisecond a line, which thousands of records make ten seconds of.
    """
    from ssl3d.results.formats.wording import printable

    shown = [[printable(text) for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    colours = {"current": "green", "stale": "yellow"}
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line[:-1], widths[:-1], strict=True))
        + "  "
        + click.style(line[-1], fg=colours.get(line[-1].partition(":")[0]), bold=line is shown[0])
        for line in shown
    )


@store.command()
@click.argument("record")
@click.option(
    "--store", "folder", type=click.Path(path_type=Path), default=Path(), help="Folder of the records."
)
@click.option("--cases", is_flag=True, help="With the metrics of each case.")
def show(record: str, folder: Path, cases: bool) -> None:
    """Print RECORD: a file, its name, or the start of its hash in --store."""
    import json

    from ssl3d.bench.stale import stale

    path, found = _found(record, folder)
    if not cases:
        found = {**found, "per_case": f"{count(len(found['per_case']), 'case')} (--cases shows them)"}
    click.echo(json.dumps(found, indent=2))
    reasons = stale(found)
    state = "unknown, the record does not tell" if reasons is None else "; ".join(reasons) or "none"
    click.echo(f"{path}\nChanged since: {state}.", err=True)


@store.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
def merge(target: Path, sources: tuple[Path, ...]) -> None:
    """Copy the records of SOURCES into TARGET; two results for one identity are named, not merged."""
    from ssl3d.results.store.manage import merge as merge_stores
    from ssl3d.results.store.store import ResultStore

    merged = merge_stores(ResultStore(target), [ResultStore(source) for source in sources])
    click.echo(f"{target}: {count(merged.copied, 'record')} copied, {merged.known} there already.")
    for line in merged.conflicts:
        click.echo(f"Conflict: {line}", err=True)
    _name(merged.problems, bad=bool(merged.conflicts))


@store.command()
@store_option
def verify(folder: Path) -> None:
    """Check every record: whole, unaltered, under the name of its identity."""
    from ssl3d.results.store.store import ResultStore

    opened = ResultStore(folder)
    records, problems = opened.records()
    click.echo(
        f"{count(len(records), 'record')} {are(len(records))} sound, {len(problems)} {are(len(problems))} not."
    )
    for path in sorted(opened.folder.glob("*.damaged")):
        click.echo(f"Kept as evidence, not part of the store: {path}", err=True)
    _name(problems)


@store.command()
@store_option
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="File to write: .csv or .parquet."
)
@click.option("--what", default="records", show_default=True, metavar="records|cases",
              help="A row a record, or a row a case.")  # fmt: skip
def export(folder: Path, out: Path, what: str) -> None:
    """Write the records as CSV or Parquet."""
    from ssl3d.results.store.manage import export as write
    from ssl3d.results.store.store import ResultStore

    records, problems = ResultStore(folder).records()
    click.echo(f"{out}: {count(write(records, out, what), 'row')}.")
    _name(problems)


@click.command()
@click.argument("record")
@click.option(
    "--store", "folder", type=click.Path(path_type=Path), default=Path(), help="Folder of the records."
)
@click.option("--tolerance", type=click.FloatRange(min=0), metavar="POINTS",
              help="Largest difference of the score that still counts as the same: percentage points, or percent of "
                   "an error (MAE) [default: none on an equal machine, else what rounding luck allows].")  # fmt: skip
@click.option(
    "--checkpoint", is_flag=True, help="Evaluate the record's own checkpoint instead of pretraining again."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path),
              help="Keep the new record and run here [default: deleted].")  # fmt: skip
@device_option
@cache_option
def reproduce(
    record: str,
    folder: Path,
    tolerance: float | None,
    checkpoint: bool,
    out: Path | None,
    device: str,
    cache: Path | None,
) -> None:
    """Compute RECORD again, and say whether its number comes back.

    RECORD is a file, its name, or the start of its hash in --store. It is computed with the record's number of threads.
    Where those, the kind of processor and the versions are the record's, the number must come back bit for bit.
    """
    quiet_libraries()
    path, found = _found(record, folder)
    set_threads((found.get("environment") or {}).get("threads") or 1)
    from ssl3d.bench.reproduce import reproduce as again
    from ssl3d.device import select_device
    from ssl3d.results.store.store import ResultStore

    own = ResultStore(real(path).parent.parent) if checkpoint else None
    verdict = again(found, tolerance, select_device(device), cache, out, own)
    for line in verdict.lines:
        click.echo(line)
    sys.exit(0 if verdict.reproduced else 1)


def _found(text: str, folder: Path) -> tuple[Path, Record]:
    from ssl3d.results.store.manage import find
    from ssl3d.results.store.store import ResultStore

    opened = ResultStore(folder)
    path = find(opened, text)
    return path, opened.read(path)


def _name(problems: list[str], bad: Any = False) -> None:
    """Name the records that were left out; exit with status 1 when there are any."""
    for problem in problems:
        click.echo(f"Left out: {problem}", err=True)
    if problems or bad:
        sys.exit(1)
