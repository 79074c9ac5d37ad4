"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssl3d.commands.bench import bench, table
from ssl3d.commands.cache import cache, doctor
from ssl3d.commands.check import backbones, check
from ssl3d.commands.common import (
    CONTEXT,
    SEED,
    Group,
    Names,
    cache_option,
    device_option,
    json_option,
    keep_freed_memory,
    make_console,
    policy_option,
    preset_option,
    print_conflicts,
    print_json,
    quiet_libraries,
    resumable,
    split_names,
    subject_option,
    text_table,
)  # fmt: skip
from ssl3d.commands.config import config
from ssl3d.commands.data import data
from ssl3d.commands.report import report
from ssl3d.commands.represent import represent
from ssl3d.commands.store import reproduce
from ssl3d.commands.store import store as store_group
from ssl3d.commands.weights import export, finetune, import_, predict

if TYPE_CHECKING:
    from ssl3d.data.prepared.build import Policy


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="ssl3d")
@click.option("--debug", is_flag=True, envvar="SSL3D_DEBUG", help="Show the trace of an error, too.")
def main(debug: bool) -> None:
    """Benchmark self-supervised learning on 3D medical images.

    \b
    ssl3d bench --preset quick                   pretrain, evaluate and print the table
    ssl3d pretrain --method gvsl --data DIR      pretrain on your own volumes
    ssl3d methods                                what can be pretrained
    """


@main.command()
@click.option("--verbose", "-v", is_flag=True, help='Everything that "ssl3d info" says, of every method.')
@click.option("--cost/--no-cost", default=True, help="With --verbose: measure a training step of each.")
@json_option
def methods(verbose: bool, cost: bool, as_json: bool) -> None:
    """List pretext methods and their variants."""
    from rich.markup import escape

    from ssl3d.registry.registry import registry

    if as_json:
        print_json([
            {"name": e.name, "title": e.title, "trains": e.facts.get("trains"), "summary": e.summary, "variant_of": e.base,
             "plugin": e.plugin} for e in registry().methods
        ])  # fmt: skip
        return
    if verbose:
        quiet_libraries()
        for entry in registry().methods:
            if not entry.base:
                _print_info(entry.name, cost)
        return
    table = text_table("Method", "Trains", "What it is", "Plugin")
    for entry in registry().methods:
        name = f"  {entry.name}" if entry.base else entry.name
        table.add_row(
            *(escape(t) for t in (name, str(entry.facts.get("trains", "")), entry.summary, entry.plugin))
        )
    console = make_console()
    console.print(table)
    print_conflicts(console, registry().methods)


@main.command()
@click.argument("method", type=Names("methods"))
@click.option("--cost/--no-cost", default=True, help="Measure a training step.")
def info(method: str, cost: bool) -> None:
    """Show a method's paper, what it trains, its options and the cost of a step."""
    quiet_libraries()
    _print_info(method, cost)


def _print_info(name: str, cost: bool) -> None:
    from rich.markup import escape

    from ssl3d.pretrain.describe import describe, step_cost
    from ssl3d.registry.registry import registry

    entry = registry().methods.get(name)
    facts = describe(name)
    console = make_console()
    console.print(f"[bold]{escape(name)}[/]  {escape(facts.summary)}")
    for label, text in (
        ("paper", facts.paper),
        ("trains", facts.trains),
        ("variant of", entry.base),
        ("plugin", entry.plugin),
    ):
        if text:
            console.print(f"  {label:<11}{escape(text)}", highlight=False)
    if cost and facts.trains != "none":
        measured = step_cost(name)
        console.print(
            f"  {'cost':<11}{measured.ratio:.1f} times a supervised step from scratch "
            f"({measured.seconds * 1000:.0f} ms against {measured.scratch_seconds * 1000:.0f} ms here, "
            f"{measured.batch_size} crops of {measured.edge} voxels)", highlight=False,
        )  # fmt: skip
    if facts.options:
        table = text_table("Option", "Default", "Meaning")
        for option in facts.options:
            table.add_row(*(escape(t) for t in (f"{name}.{option.name}", option.default, option.meaning)))
        console.print(table)
    else:
        console.print()


@main.command("new-method")
@click.argument("name")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder [default: ./ssl3d-NAME]."
)
def new_method(name: str, out: Path | None) -> None:
    """Write a pip-installable package with a method that runs and passes its test."""
    from ssl3d.registry.scaffold import new_method as write

    folder = out or Path(f"ssl3d-{name.replace('_', '-')}")
    for path in write(name, folder):
        click.echo(path)
    click.echo(f"\nNext: pip install -e {folder} && ssl3d check {name}")


@main.command()
@json_option
def tasks(as_json: bool) -> None:
    """List downstream tasks."""
    from rich.markup import escape

    from ssl3d.registry.registry import registry

    if as_json:
        keys = ("name", "title", "kind", "dataset", "metric", "counts", "summary")
        print_json([
            {**{key: getattr(e.load(), key) for key in keys}, "plugin": e.plugin} for e in registry().tasks
        ])  # fmt: skip
        return
    table = text_table("Task", "What it is", "Dataset", "Metric", "Train/val/test")
    for entry in registry().tasks:
        task = entry.load()
        counts = "/".join(map(str, task.counts)) if task.counts else "60/20/20 %"
        table.add_row(
            *(escape(t) for t in (task.name, task.summary, task.dataset, task.metric.upper(), counts))
        )
    console = make_console()
    console.print(table)
    print_conflicts(console, registry().tasks)


@main.command()
@json_option
def datasets(as_json: bool) -> None:
    """List datasets that can be read."""
    from rich.markup import escape

    from ssl3d.registry.registry import registry

    if as_json:
        keys = ("name", "summary", "layout", "modality", "intensity_offset")
        print_json([
            {**{key: getattr(e.load(), key) for key in keys}, "plugin": e.plugin} for e in registry().datasets
        ])  # fmt: skip
        return
    table = text_table("Dataset", "What it is", "Modality", "Offset", "Plugin")
    for entry in registry().datasets:
        d = entry.load()
        table.add_row(
            *(
                escape(str(t))
                for t in (d.name, d.summary, d.modality.upper(), d.intensity_offset, entry.plugin)
            )
        )
    console = make_console()
    console.print(table)
    print_conflicts(console, registry().datasets)


@main.command()
@json_option
def plugins(as_json: bool) -> None:
    """List installed plugins, what each registers, and what is wrong with any."""
    from rich.markup import escape

    from ssl3d.errors import count
    from ssl3d.registry.registry import registry

    found = registry()
    catalogues = found.catalogues
    registered = {
        plugin.name: {kind: sum(e.plugin == plugin.name for e in catalogue) for kind, catalogue in catalogues.items()}
        for plugin in found.plugins.values()
    }  # fmt: skip
    if as_json:
        print_json([
            {"name": p.name, "version": p.version, "registers": registered[p.name], "errors": p.errors,
             "warnings": p.problems} for p in found.plugins.values()
        ])  # fmt: skip
        return
    table = text_table("Plugin", "Version", "Registers", "State")
    for plugin in found.plugins.values():
        counts = registered[plugin.name]
        state = f"[red]broken:[/] {escape(plugin.error)}" if plugin.error else "[green]ok[/]"
        for problem in plugin.problems:
            state += f"\n[yellow]warning:[/] {escape(problem)}"
        registers = ", ".join(count(n, kind) for kind, n in counts.items() if n) or "nothing"
        table.add_row(escape(plugin.name), escape(plugin.version), registers, state)
    console = make_console()
    console.print(table)
    for catalogue in catalogues.values():
        print_conflicts(console, catalogue)


@resumable("--resume")
@main.command()
@click.option(
    "--method",
    "method_name",
    required=True,
    metavar="NAME",
    type=Names("methods"),
    help='See "ssl3d methods".',
)
@click.option("--data", default="phantoms", show_default=True, metavar="NAME_OR_DIR",
              help="Folder of volumes, DATASET=DIR, or phantoms.")  # fmt: skip
@preset_option
@click.option(
    "--seed", default=0, type=SEED, show_default=True, help="Initialisation, order, crops and views."
)
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the run."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option(
    "--allow-code-change",
    is_flag=True,
    help="With --resume: although the code has changed; both hashes are recorded.",
)
@click.option("--exclude-test", metavar="TASK_A,B|FILES",
              help="Leave everybody out who is tested in some split of these tasks.")  # fmt: skip
@subject_option
@policy_option
@device_option
@click.option(
    "--devices",
    default=1,
    show_default=True,
    help="GPUs on each machine, or processes on a CPU; they share each batch.",
)
@click.option("--nodes", default=1, show_default=True, help="Machines.")
@click.option("--strategy", default="ddp", show_default=True, type=click.Choice(["ddp"]),
              help="How devices share the work: each has the whole network.")  # fmt: skip
@cache_option
def pretrain(
    method_name: str, data: str, preset: str, overrides: tuple[str, ...], seed: int, out: Path, resume: bool,
    allow_code_change: bool, exclude_test: str | None, subject_patterns: tuple[str, ...], policy: Policy, device: str,
    devices: int, nodes: int, strategy: str, cache: Path | None,
) -> None:  # fmt: skip
    """Pretrain a backbone with one method."""
    quiet_libraries()
    keep_freed_memory()
    from ssl3d.bench.pretraining import PretrainOptions, run_pretraining
    from ssl3d.progress import duration

    tasks = tuple(split_names(exclude_test)) if exclude_test is not None else ()
    options = PretrainOptions(
        method_name, out, data, preset, overrides, seed, resume, allow_code_change, tasks, subject_patterns, policy, device,
        cache, devices, nodes, strategy,
    )  # fmt: skip
    run = run_pretraining(options)
    if not run:
        return  # one of several processes, of which the first speaks
    losses = ", ".join(f"{name} {value:.4g}" for name, value in run["losses"].items())
    click.echo(
        f"{method_name}: {run['step']} steps in {duration(run['seconds'])}{f', last losses {losses}' if losses else ''}"
    )
    click.echo(f"Backbone: {out / 'backbone.safetensors'}")


main.add_command(check)
main.add_command(backbones)
main.add_command(config)
main.add_command(bench)
main.add_command(cache)
main.add_command(doctor)
main.add_command(table)
main.add_command(data)
main.add_command(store_group)
main.add_command(reproduce)
main.add_command(export)
main.add_command(finetune)
main.add_command(import_)
main.add_command(predict)
main.add_command(report)
main.add_command(represent)

if __name__ == "__main__":
    main()
