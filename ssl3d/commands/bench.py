"""``ssl3d bench`` and ``ssl3d table``: from methods and tasks to records, and from records to a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssl3d.commands.cluster import cluster_options, engine_of
from ssl3d.commands.common import (
    SEED,
    Names,
    cache_option,
    device_option,
    json_option,
    keep_freed_memory,
    policy_option,
    preset_option,
    print_json,
    quiet_libraries,
    resumable,
    set_threads,
    split_names,
    split_pairs,
    subject_option,
)
from ssl3d.errors import ConfigError
from ssl3d.process import cores

if TYPE_CHECKING:
    import torch

    from ssl3d.bench.cluster.work import Engine
    from ssl3d.bench.plan import BenchOptions
    from ssl3d.bench.run import Bench
    from ssl3d.results.store.record import Record

MODES = ("linear", "multiscale", "finetune", "knn")
STATISTICS = ("ci", "p", "power", "rank", "tau", "cost", "labels")
"""As :mod:`ssl3d.downstream.problems.problem` and :mod:`ssl3d.results.statistics.annotate` have them, without an import of
torch for a help text; a test compares."""


@resumable()
@click.command()
@click.option("--methods", default="scratch,gvsl", show_default=True, metavar="A,B|all",
              type=Names("methods", several=True, more=("all",)),
              help='Rows, in this order below scratch; "all" is every method, without variants.')  # fmt: skip
@click.option(
    "--tasks", default="shc,sac,ccc,sbm", show_default=True, metavar="A,B|all",
    type=Names("tasks", several=True, more=("all",)),
    help="Columns: names, or task files (.yaml).",
)  # fmt: skip
@click.option("--modes", default="linear,finetune", show_default=True, metavar=",".join(MODES),
              help="One or several. linear: the backbone is frozen, the head solved; finetune: all is trained; knn: "
              "neighbours of frozen features.")  # fmt: skip
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
@click.option("--dry-run", is_flag=True, help="Say which cells there are, and what they will cost in time, disk and "
              "memory, from a few measured steps; train nothing. The data are prepared.")  # fmt: skip
@cluster_options
@json_option
@device_option
@cache_option
def bench(
    jobs: int | None, threads: int, dry_run: bool, as_json: bool, ray: str | None, slurm: str | None,
    gpus_per_run: float | None, **given: Any,
) -> None:  # fmt: skip
    """Pretrain methods, evaluate them on tasks and print the table.

    The same command, started again in the same store (also on another machine that sees it), shares the cells
    that are left; --jobs starts it several times at once, and --ray and --slurm hand them to a cluster. A cell that fails
    is shown as such and tried again by the next call; the others are computed, and the exit status is 1.
    """
    from ssl3d.bench.plan import bench_of
    from ssl3d.bench.whole import Whole, line
    from ssl3d.errors import CellsFailed
    from ssl3d.progress import say
    from ssl3d.results.results import Results

    quiet_libraries()
    keep_freed_memory()
    set_threads(threads)
    engine = engine_of(ray, slurm, gpus_per_run, threads, given["device"])
    options = _options(given)
    with engine or nullcontext():
        # Prepares the data, so that the other processes find them. Where those have GPUs, this one may have none.
        job = bench_of(options if engine is None else replace(options, device="cpu"))
        cells = [cell.identity for cell in job.cells()]
        devices = _devices(job, jobs, threads, len(cells)) if engine is None else [job.device]
        jobs = min(engine.jobs, len(cells)) if engine is not None else len(devices)
        options = replace(options, jobs=jobs)
        job = replace(job, conduct=replace(job.conduct, jobs=jobs), device=devices[0])
        if dry_run:
            _print_estimate(job, as_json)
            return
        records, failed, whole = [], None, Whole(job)
        with _outcomes(job, options, threads, devices, engine) as found:
            try:
                for record, computed in found:
                    records.append(record)
                    if computed or (jobs == 1 and engine is None):
                        say(line(record, whole.said() if computed else "already in the store"))
            except CellsFailed as error:
                failed = error
    failures = [failure for failure in job.store.sound_failures()[0] if failure["identity"] in cells]
    order = tuple(spec.name for spec in job.grid.methods)
    results = Results(options.store, tuple(records), tuple(failures), order=order)
    click.echo(results.table("json" if as_json else "rich").rstrip("\n"))
    if failed is not None:
        click.echo(str(failed), err=True)
        sys.exit(1)


@contextmanager
def _outcomes(
    job: Bench, options: BenchOptions, threads: int, devices: Sequence[torch.device], engine: Engine | None
) -> Iterator[Iterator[tuple[Record, bool]]]:
    """Yield what yields the cells: computed by this process and one more for each other device, or by an engine."""
    if engine is not None:
        from ssl3d.bench.cluster.driver import run_on

        with closing(run_on(engine, job, options, threads)) as found:
            yield found
        return
    from ssl3d.commands.workers import others

    with others([str(device) for device in devices[1:]], threads, options) as look:
        yield job.run(look)


def _devices(job: Bench, jobs: int | None, threads: int, cells: int) -> list[torch.device]:
    """Return the device of each process."""
    from ssl3d.device import spread

    return spread(job.device, min(jobs or _cores(job.device, threads), cells) or 1)


def _print_estimate(job: Bench, as_json: bool) -> None:
    from ssl3d.bench.estimate import estimate

    found = estimate(job)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo("\n".join(found.lines()))


def _cores(device: torch.device, threads: int) -> int:
    """Return how many processes of ``threads`` threads this machine computes at once: one a GPU, where it has some."""
    if device.type == "cuda":
        from ssl3d.device import visible_gpus

        return visible_gpus() if device.index is None else 1
    return max(1, cores() // threads)


def _options(given: dict[str, Any]) -> BenchOptions:
    """Return what the command line gives, as options."""
    from ssl3d.bench.plan import BenchOptions

    texts = {name: given.pop(name) for name in ("methods", "tasks", "modes", "seeds", "label_fractions")}
    pairs = {name: split_pairs(given.pop(name), f"--{name.replace('_', '-')}")
             for name in ("task_data", "checkpoint", "splits_file")}  # fmt: skip
    seeds = None if texts["seeds"] is None else [_seed(text) for text in split_names(texts["seeds"])]
    named: dict[str, Any] = {
        name: texts[name] if texts[name] == "all" else split_names(texts[name])
        for name in ("methods", "tasks")
    }
    fractions = [_fraction(text) for text in split_names(texts["label_fractions"])]
    asked: dict[str, Any] = {**given, **named, **pairs, "seeds": seeds, "label_fractions": fractions}
    asked |= {"modes": split_names(texts["modes"]), "options": asked.pop("overrides")}
    return BenchOptions(**asked)


def _seed(text: str) -> int:
    try:
        seed: int = SEED(text)
    except click.BadParameter:
        shown = text if len(text) < 60 else f"{text[:60]}..."
        raise ConfigError(
            f'--seeds "{shown}" is not a whole number of 64 bits; write --seeds 0,1,2.'
        ) from None
    return seed


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f'--label-fractions "{text}" is not a number in (0, 1]; write --label-fractions 0.1,0.25,1.'
        ) from None


@click.command()
@click.option("--store", required=True, type=click.Path(path_type=Path), help="Folder of the records.")
@click.option(
    "--format",
    "format_name",
    default="rich",
    show_default=True,
    type=Names("table_formats"),
    help="rich, markdown, latex, html, csv, json, or a plugin's.",
)
@json_option
@click.option("--against", type=click.Choice(["paper"]), help="Put the paper's own figures beside ours.")
@click.option(
    "--with",
    "statistics",
    default="",
    metavar=",".join([*STATISTICS, "all"]),
    help="ci: intervals; p: tests; power: seeds that a difference needs; rank: stability of ranks; tau: agreement of "
    "linear and fine-tune; cost: what each row cost; labels: share of the labels saved; all: every one.",
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
    as_json: bool,
    against: str | None,
    statistics: str,
    reference: str,
    difference: float | None,
) -> None:
    """Render the records of a store in the layout of the paper's table 1."""
    from ssl3d.registry.registry import registry
    from ssl3d.results.results import Results
    from ssl3d.results.store.record import no_garbage_collection
    from ssl3d.results.store.store import ResultStore

    format_name = "json" if as_json else format_name
    registry().table_formats.get(format_name)
    chosen = list(STATISTICS) if statistics == "all" else split_names(statistics) if statistics else []
    if difference is not None and "power" not in chosen:
        raise ConfigError("--difference says nothing without --with power; write --with power.")
    with no_garbage_collection():
        opened = ResultStore(store)
        records, problems = opened.records(lazy=True)
        failures, damaged = opened.sound_failures()
        results = Results(store, tuple(records), tuple(failures))
        text = results.table(format_name, chosen, reference=reference, difference=difference, against=against)
    click.echo(text.rstrip("\n"))
    problems += damaged
    for problem in problems:
        click.echo(f"Left out: {problem}", err=True)
    if problems:
        sys.exit(1)
