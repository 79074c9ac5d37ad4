"""``ssl3d finetune``, ``predict``, ``export`` and ``import``: from pretrained weights to something that is used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssl3d.commands.common import (
    SEED,
    Names,
    affine_option,
    cache_option,
    device_option,
    keep_freed_memory,
    load_tasks,
    offset_option,
    policy_option,
    preset_option,
    quiet_libraries,
    say_skipped,
    settings_of,
    subject_option,
    with_splits_files,
    with_subject_patterns,
)
from ssl3d.errors import ConfigError, count, printable

if TYPE_CHECKING:
    from torch import nn

    from ssl3d.data.prepared.build import Policy


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="RUN",
              help='Folder written by "ssl3d pretrain".')  # fmt: skip
@click.option("--task", "task_name", required=True, metavar="NAME|FILE", type=Names("tasks"),
              help='A name (see "ssl3d tasks") or a task file.')  # fmt: skip
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    metavar="[LAYOUT=]DIR",
    help="Its data on disk [default: its file's, or phantoms].",
)
@click.option("--mode", default="finetune", show_default=True, type=click.Choice(["finetune", "linear"]))
@click.option("--split", default=0, show_default=True, help="Number of the split, for cross-validation.")
@click.option("--seed", default=0, type=SEED, show_default=True, help="Head, order and crops.")
@click.option("--splits-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="nnU-Net's splits_final.json, in place of splits that are drawn.")  # fmt: skip
@click.option("--allow-overlap", multiple=True, metavar="TASK",
              help="Go on although test images are among the training images under another subject.")  # fmt: skip
@preset_option
@subject_option
@policy_option
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="New folder.")
@device_option
@cache_option
def finetune(
    checkpoint: Path, task_name: str, task_data: Path | None, mode: str, split: int, seed: int, preset: str,
    overrides: tuple[str, ...], splits_file: Path | None, allow_overlap: tuple[str, ...], subject_patterns: tuple[str, ...],
    policy: Policy, out: Path, device: str, cache: Path | None,
) -> None:  # fmt: skip
    """Train a predictor for a task, as a cell of the bench does, and keep it."""
    quiet_libraries()
    keep_freed_memory()
    (task,) = load_tasks([task_name])
    settings = settings_of(preset, overrides, [task])
    settings = with_subject_patterns(settings, subject_patterns)
    settings = with_splits_files(settings, [task], {task.name: splits_file} if splits_file else {})
    from ssl3d.bench.cell import TaskData
    from ssl3d.bench.given import say_differences
    from ssl3d.bench.leakage import check_within
    from ssl3d.bench.sources import task_cohort, task_splits
    from ssl3d.config import BackboneConfig
    from ssl3d.device import check_precision, select_device
    from ssl3d.downstream.harness import Evaluation, evaluate
    from ssl3d.downstream.predictor import FACTS, check_keepable, save_predictor
    from ssl3d.downstream.problems.kinds import check_mode
    from ssl3d.models.weights.checkpoint import load_backbone, read_run
    from ssl3d.progress import Tracker
    from ssl3d.results.scores import written

    if (out / FACTS).exists():
        raise ConfigError(f"{out} holds a predictor already: choose another folder, or remove it.")
    backbone, run = load_backbone(checkpoint), read_run(checkpoint)
    where, chosen_mode = select_device(device), check_mode(mode)
    if chosen_mode == "finetune":
        check_precision("downstream.precision", settings.downstream.precision, where)
    cohort = task_cohort(task, task_data, settings, cache, policy)
    say_skipped(cohort.skipped)
    check_keepable(task, cohort)
    splits = task_splits(task, cohort, settings)
    if not 0 <= split < len(splits):
        raise ConfigError(f"--split {split}: task {task.name} has splits 0 to {len(splits) - 1}.")
    with Tracker() as progress:
        check_within([TaskData(task, cohort, [splits[split]])], set(allow_overlap), progress)
    downstream = settings.downstream.for_mode(chosen_mode)
    say_differences([task.name], [cohort], {str(checkpoint): run.get("preparation")})
    source = {key: run.get(key) for key in ("method_name", "weights_sha256", "identity", "preparation")}
    evaluation = Evaluation(task, cohort, splits[split], chosen_mode, downstream, seed, where)
    backbone_config = BackboneConfig.model_validate(run["backbone"])

    def keep(head: nn.Module) -> None:
        save_predictor(out, backbone, head, evaluation, backbone_config, {**source, "seed": seed})

    outcome = evaluate(backbone, evaluation, keep=keep)
    click.echo(
        f"{task.title} {task.metric.upper()} {written(task.metric, outcome.score)} on {len(outcome.per_case)} test cases"
    )
    click.echo(f"Predictor: {out}")


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help='Folder written by "ssl3d finetune".')  # fmt: skip
@click.option("--input", "inputs", required=True, multiple=True, type=click.Path(path_type=Path),
              metavar="FILE|DIR", help="A volume, a DICOM series, or a folder of these, at any depth.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder.")
@affine_option
@click.option(
    "--channel", type=click.IntRange(0), help="Which volume to read of 4D files [default: refuse them]."
)
@offset_option
@device_option
def predict(
    checkpoint: Path, inputs: tuple[Path, ...], out: Path, affine: Any, channel: int | None, offset: float | None,
    device: str,
) -> None:  # fmt: skip
    """Predict files: segmentations on the grid of each, or a CSV of probabilities or values.

    Exit status: 0 every file was predicted; 1 some could not be read (they are named, the others are
    predicted); 2 nothing was done.
    """
    quiet_libraries()
    from ssl3d.data.cohort import Reading
    from ssl3d.device import select_device
    from ssl3d.downstream.predictor import NOTES, expand_inputs, load_predictor
    from ssl3d.progress import Track

    predictor = load_predictor(checkpoint)
    files = expand_inputs(inputs, out)
    with Track(f"{predictor.task.title} prediction", len(files), unit="file") as track:
        reading = Reading(affine, channel)
        findings = predictor.predict_files(files, out, select_device(device), track.update, reading, offset)
    bad = {finding.path for finding in findings}
    click.echo(f"{len(files) - len(bad)} of {count(len(files), 'file')} predicted: {out}")
    _print_notes(out / NOTES)
    if findings:
        click.echo("Not predicted:\n" + "\n".join(f"  {finding}" for finding in findings), err=True)
        sys.exit(1)


def _print_notes(path: Path) -> None:
    """Say what is different about the images from those of the training: how many are, and the first of them."""
    if not path.is_file():
        return
    from ssl3d.files import read_json

    notes: dict[str, list[str]] = read_json(path)  # written just now
    click.echo(f"Other than the images of the training: {count(len(notes), 'file')}, see {path}", err=True)
    for file, lines in list(notes.items())[:3]:
        for line in lines:
            click.echo(printable(f"  {file}: {line}"), err=True)


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="RUN",
              help='Folder written by "ssl3d pretrain".')  # fmt: skip
@click.option(
    "--to",
    "target",
    required=True,
    metavar="FORMAT",
    help="safetensors, torch, huggingface, nnunet or monai.",
)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="New folder.")
def export(checkpoint: Path, target: str, out: Path) -> None:
    """Write a pretrained backbone for other tools."""
    quiet_libraries()
    from ssl3d.models.weights.export import export as write

    for path in write(checkpoint, target, out):
        click.echo(path)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--from", "source", metavar="CODE",
    help="Which code saved it, gvsl or models_genesis [default: found out].",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1), help="Optimizer steps it was trained with, for the tables."
)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="New folder.")
def import_(file: Path, source: str | None, steps: int | None, out: Path) -> None:
    """Make a run of a checkpoint of released code, for ssl3d bench --checkpoint."""
    quiet_libraries()
    from ssl3d.config import BackboneConfig
    from ssl3d.models.weights.checkpoint import override_of
    from ssl3d.models.weights.imports import import_checkpoint

    run = import_checkpoint(file, source, out, steps)
    name, backbone = run["method_name"], BackboneConfig.model_validate(run["backbone"])
    click.echo(f"Run: {out} ({name}, backbone {backbone.name})")
    click.echo(
        f"Next: ssl3d bench --methods scratch,{name} --checkpoint {name}={out} {override_of(backbone)} ..."
    )
