"""``ssl3d represent``: maps and measures of local features, for the runs of a store or for single runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssl3d.commands.common import (
    cache_option,
    device_option,
    load_tasks,
    make_console,
    policy_option,
    preset_option,
    quiet_libraries,
    settings_of,
    split_names,
    split_pairs,
    text_table,
)
from ssl3d.errors import ConfigError

if TYPE_CHECKING:
    from ssl3d.bench.represent import Job
    from ssl3d.data.prepared.build import Policy
    from ssl3d.downstream.tasks import Task


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tasks", "task_names", metavar="A,B",
              help="Segmentations [default: all of the store; shc for runs].")  # fmt: skip
@click.option("--seed", type=int, help="Seed of the store's runs [default: the lowest].")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path),
              help="Folder [default: representation in the store, where ssl3d report finds it].")  # fmt: skip
@click.option(
    "--cases", type=click.IntRange(min=2), default=12, show_default=True, help="Test cases, at most."
)
@click.option(
    "--pairs", type=click.IntRange(min=1), default=12, show_default=True, help="Pairs of them, at most."
)
@click.option("--voxels", type=click.IntRange(min=1), default=200, show_default=True,
              help="Voxels of each structure of a case.")  # fmt: skip
@click.option("--map-voxels", type=click.IntRange(min=10), default=2000, show_default=True,
              help="Points of a map, about.")  # fmt: skip
@click.option("--task-data", multiple=True, metavar="TASK=[LAYOUT=]DIR",
              help="For runs: a task's data on disk [default: its file's, or phantoms].")  # fmt: skip
@preset_option
@policy_option
@device_option
@cache_option
def represent(
    sources: tuple[Path, ...], task_names: str | None, seed: int | None, out: Path | None, cases: int, pairs: int,
    voxels: int, map_voxels: int, task_data: tuple[str, ...], preset: str, overrides: tuple[str, ...],
    policy: Policy, device: str, cache: Path | None,
) -> None:  # fmt: skip
    """Compare the local features of methods: maps by structure, correspondence, label transfer.

    SOURCES is one store, or run folders written by "ssl3d pretrain". A store brings the settings of its
    records; runs take those of --preset and --set.
    """
    quiet_libraries()
    from ssl3d.bench.represent import Extent
    from ssl3d.bench.represent import represent as compare
    from ssl3d.device import select_device
    from ssl3d.results.store.representation import FOLDER, write_csv

    names = split_names(task_names) if task_names else None
    if len(sources) == 1 and (sources[0] / "records").is_dir():
        from ssl3d.bench.represent import jobs_of_store
        from ssl3d.results.store.store import ResultStore

        if task_data or overrides:
            raise ConfigError("A store brings its own settings and data: leave --set and --task-data out.")
        jobs, folder = jobs_of_store(ResultStore(sources[0]), names, seed), out or sources[0] / FOLDER
    else:
        if out is None:
            raise ConfigError("Give --out: the numbers and pictures of single runs belong to no store.")
        tasks = load_tasks(names or ["shc"])
        settings = settings_of(preset, overrides, tasks)
        jobs, folder = _jobs_of_runs(sources, tasks, settings, task_data), out
    extent = Extent(cases, pairs, voxels, map_voxels)
    where = select_device(device)
    results = []
    for job in jobs:
        for line in job.left_out:
            click.echo(f"Left out: {line}.", err=True)
        results.append(compare(job, folder, where, cache, extent, policy=policy))
    write_csv(folder / "representation.csv", results)
    _print(results)
    click.echo(f"Numbers and maps: {folder}")


def _jobs_of_runs(
    folders: tuple[Path, ...], tasks: list[Task], settings: Any, task_data: tuple[str, ...]
) -> list[Job]:
    from ssl3d.bench.represent import Entry, Job
    from ssl3d.models.weights.checkpoint import read_run

    places = split_pairs(task_data, "--task-data")
    for name in places.keys() - {task.name for task in tasks}:
        raise ConfigError(f'--task-data names the task "{name}", which --tasks does not.')
    entries: list[Entry] = []
    for folder in folders:
        run = read_run(folder)
        title = str(run.get("title") or run["method_name"])
        # Two runs of one method are told apart by their folders.
        if any(entry.title == title for entry in entries):
            title = f"{title} ({folder.name})"
        entries.append(Entry(title, run["method_name"], folder))
    return [Job(task, places.get(task.name), settings, None, entries) for task in tasks]


def _print(results: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    from ssl3d.results.store.representation import rows

    def percent(row: dict[str, Any], key: str) -> str:
        if row.get(key) is None:
            return "–"
        sd = row.get(f"{key}_sd")
        return f"{100 * row[key]:.1f}" + (f" ± {100 * sd:.1f}" if sd is not None else "")

    found = rows(results)
    features = text_table("Method", "Task", "Found", "Balanced", "Chance", "Transfer", "Silhouette")
    for row in found:
        features.add_row(
            escape(row["title"]), row["task"], percent(row, "correspondence"),
            percent(row, "correspondence_balanced"), percent(row, "chance_balanced"),
            percent(row, "transfer_dice"), "–" if row["silhouette"] is None else f"{row['silhouette']:+.3f}",
        )  # fmt: skip
    console = make_console()
    console.print(features)
    console.print(
        "Found: voxels (%) whose nearest feature in another subject lies in the same structure; balanced: mean "
        "over structures, with its chance level. Transfer: Dice (%) of labels that one subject gives another.",
        style="dim",
    )
    matched = [row for row in found if "dice_predicted" in row]
    if matched:
        table = text_table("Method", "Task", "Not aligned", "Affine only", "Predicted", "Folded")
        for row in matched:
            table.add_row(
                escape(row["title"]), row["task"],
                *(percent(row, f"dice_{k}") for k in ("not_aligned", "affine_only", "predicted")),
                f"{100 * row['folded_predicted']:.3f}",
            )  # fmt: skip
        console.print(table)
        console.print(
            "Dice (%) of labels warped by the method's map; folded: voxels (%) with a Jacobian <= 0.",
            style="dim",
        )
