"""``ssl3d data``: make, check and prepare data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssl3d.commands.common import (
    Group,
    affine_option,
    cache_option,
    make_console,
    offset_option,
    policy_option,
    preset_option,
    quiet_libraries,
    read_subject_patterns,
    resumable,
    say_skipped,
    settings_of,
    split_names,
    subject_option,
    text_table,
)  # fmt: skip
from ssl3d.errors import ConfigError, count, printable

if TYPE_CHECKING:
    from ssl3d.data.checks.verify import Report
    from ssl3d.data.cohort import Dataset
    from ssl3d.data.layouts.listing import Listing
    from ssl3d.data.prepared.build import Policy


TWINS_CASES = 300
"""Up to so many cases ``verify`` compares all pairs unasked: some minutes."""


@click.group(cls=Group)
def data() -> None:
    """Make, check and prepare data."""


@resumable()
@data.command()
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to."
)
@preset_option
def phantoms(out: Path, preset: str, overrides: tuple[str, ...]) -> None:
    """Write the phantom cohorts in the layouts of MM-WHS, ASOCA, CANDI and STOIC."""
    quiet_libraries()
    settings = settings_of(preset, overrides, tasks=())
    from ssl3d.bench.sources import make_phantoms

    make_phantoms(out, settings.phantoms)
    click.echo(f"Phantom cohorts: {out}")


def layout_option(command: Any) -> Any:
    return click.option("--as", "layout", default="folder", show_default=True, metavar="LAYOUT",
                        help='Layout of PATH, see "ssl3d datasets".')(command)  # fmt: skip


channel_option = click.option(
    "--channel",
    metavar="N|NAME",
    help="Which to read of images with several channels [default: refuse them].",
)


def _one_pattern(layout: str, patterns: tuple[str, ...]) -> str | None:
    """Return the pattern of ``--subject-pattern`` for the only folder there is; None: the layout knows."""
    said = read_subject_patterns(patterns)
    return said.get(layout, said.get("*"))


def label_options(command: Any) -> Any:
    command = click.option(
        "--labels",
        metavar="1=NAME,2=NAME",
        help="Stored values of a segmentation and their names, without a task file.",
    )(command)
    return click.option("--task", "task_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                        help="Take label names and modality from a task file.")(command)  # fmt: skip


def _facts_of(task_file: Path | None, labels: str | None) -> dict[str, Any]:
    """Return what ``--task`` and ``--labels`` say of the data; the latter counts where both do."""
    facts: dict[str, Any] = {}
    if task_file is not None:
        from ssl3d.downstream.task_files import load_task

        facts |= load_task(task_file).facts
    if labels is not None:
        facts |= {"label_values": _label_values(labels), "label_aliases": {}}
    return facts


def _label_values(text: str) -> dict[int, str]:
    """Return stored value -> name for ``1=liver,2=tumour``, without the background.

    Raises:
        ConfigError: it is not of that form, or names a value or a structure twice.
    """
    names: dict[int, str] = {}
    for part in split_names(text):
        value, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value.isdigit() or int(value) in names or name in names.values():
            raise ConfigError(
                f'--labels "{text}": "{part}" is not VALUE=NAME with a value and a name of its own; write '
                "--labels 1=liver,2=tumour."
            )
        names[int(value)] = name
    names.pop(0, None)
    return names


workers_option = click.option(
    "--workers", type=click.IntRange(1), help="Threads [default: one a core, 4 at most]."
)


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@layout_option
@label_options
@click.option("--out", type=click.Path(file_okay=False, path_type=Path),
              help="Folder for mosaic.png, fingerprint.json, findings.json.")  # fmt: skip
@offset_option
@affine_option
@channel_option
@subject_option
@policy_option
@workers_option
@click.option(
    "--twins/--no-twins",
    default=None,
    help=f"Look for one scan under several subjects [default: up to {TWINS_CASES} cases; some 10 ms a pair].",
)
def verify(
    path: Path, layout: str, task_file: Path | None, labels: str | None, out: Path | None, offset: float | None,
    affine: str | None, channel: str | None, subject_patterns: tuple[str, ...], policy: Policy, workers: int | None,
    twins: bool | None,
) -> None:  # fmt: skip
    """Read every file once and list everything that is wrong; exit with 0 only when nothing is.

    Exits with 1 when there are findings. With --policy skip the summary and the picture are made of
    the good cases nevertheless, and findings.json says which were left out.
    """
    quiet_libraries()
    from ssl3d.bench.sources import open_dataset
    from ssl3d.data.checks.verify import draw_mosaic
    from ssl3d.data.checks.verify import verify as check
    from ssl3d.data.layouts.listing import list_cases, visits_warning
    from ssl3d.files import write_json
    from ssl3d.progress import Tracker

    facts = _facts_of(task_file, labels)
    said: dict[str, Any] = {"affine": affine, "channel": channel, "intensity_offset": offset}
    said["subject_pattern"] = _one_pattern(layout, subject_patterns)
    if offset is not None:
        said["modality"] = "ct"  # for anything else it has no meaning
    dataset = open_dataset(layout, path, facts={**facts, **{k: v for k, v in said.items() if v is not None}})
    listing = _without_unnamed(path, dataset, list_cases(dataset, path))
    few = len(listing.cases) <= TWINS_CASES
    with Tracker() as progress:
        report = check(
            listing.cases, dataset, workers=workers, progress=progress, left_out=listing.findings,
            twins=few if twins is None else twins,
        )  # fmt: skip
    if twins is None and not few:
        click.echo(
            f"{count(len(listing.cases), 'volume')} were not compared for one scan under several subjects, which takes "
            "hours: --twins does it.", err=True,
        )  # fmt: skip
    findings = report.findings
    _print_findings(report)
    if report.taken_for:
        click.echo(f"Read as {report.taken_for}.")
    if out is not None:
        write_json(out / "findings.json", {"dataset": dataset.name, "skipped": report.skipped(),
                                           "cohort": [str(f) for f in report.absent],
                                           "left_out": [f"{entry.path} {entry.reason}" for entry in listing.left_out],
                                           "warnings": [visits_warning(path, listing)] if listing.visits else [],
                                           })  # fmt: skip
    if report.good and (policy == "skip" or not findings):
        summary = report.fingerprint()
        _print_fingerprint(summary)
        if out is not None:
            write_json(out / "fingerprint.json", summary)
            draw_mosaic(report, out / "mosaic.png")
            click.echo(f"Picture: {out / 'mosaic.png'}")
    if findings:
        sys.exit(1)


def _without_unnamed(path: Path, dataset: Dataset, listing: Listing) -> Listing:
    """Return the listing; where nothing says what label values mean, without labels, and with one finding that says so."""
    from dataclasses import replace

    from ssl3d.data.checks.unnamed import unnamed_labels

    unnamed = unnamed_labels(path, listing.cases, dataset)
    if unnamed is None:
        return listing
    cases = [replace(case, label=None) for case in listing.cases]
    return replace(listing, cases=cases, findings=[*listing.findings, unnamed])


def _print_findings(report: Report) -> None:
    from rich.markup import escape

    cases, findings = len(report.examined), report.findings
    console = make_console()
    if not findings:
        console.print(f"[green]{count(cases, 'case')}, nothing wrong.[/]")
        return
    table = text_table("File", "What is wrong", "What to do")
    table.columns[0].no_wrap = False
    for finding in findings:
        table.add_row(
            *(escape(printable(text)) for text in (str(finding.path), finding.problem, finding.fix))
        )
    console.print(table)
    bad = sum(bool(one.findings) for one in report.examined)
    console.print(f"[red]{count(len(findings), 'finding')}; {bad} of {count(cases, 'case')} bad.[/]")


def _print_fingerprint(summary: dict[str, Any]) -> None:
    table = text_table("Fingerprint", "Smallest", "Median", "Largest")

    def text(value: Any) -> str:
        return " x ".join(f"{v:.4g}" for v in value) if isinstance(value, list) else f"{value:.4g}"

    rows = {
        "shape (voxels, R-A-S)": summary["shape"],
        "spacing (mm)": summary["spacing_mm"],
        "size (mm)": summary["size_mm"],
    }
    rows |= {f"intensity: {name}": values for name, values in summary["intensity"].items()}
    rows |= {f"{name} (ml, {count(v['cases'], 'case')})": v for name, v in summary["volume_ml"].items()}
    if summary["value"]:
        rows["value"] = summary["value"]
    for name, row in rows.items():
        table.add_row(name, *(text(row[key]) for key in ("min", "median", "max")))
    console = make_console()
    console.print(table)
    cases, subjects = count(summary["cases"], "case"), count(summary["subjects"], "subject")
    counts = [f"{cases} of {subjects}, {summary['labelled']} labelled"]
    counts += [f"{n} {part}" for part, n in summary["subsets"].items()]
    counts += [f"class {name}: {n}" for name, n in summary["classes"].items()]
    console.print("; ".join(counts) + ".")


@resumable()
@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@layout_option
@label_options
@click.option("--spacing", type=float, default=1.0, show_default=True, help="Isotropic spacing in mm.")
@click.option("--scaling", default="auto", show_default=True, help="auto, ct, minmax or zscore.")
@click.option(
    "--crop", default="none", show_default=True, help="none, foreground, lungs, center, label or mask."
)
@click.option("--margin", type=float, default=10.0, show_default=True, help="Around the box, in mm.")
@click.option("--center", metavar="D,H,W", help="Edges of the central box in mm, for --crop center.")
@click.option("--masks", type=click.Path(file_okay=False, path_type=Path),
              help="Folder of masks named <case id>.nii.gz, for --crop mask.")  # fmt: skip
@click.option("--lungmask", type=click.Path(path_type=Path), metavar="FILE",
              help="Weights of the package lungmask, for --crop lungs [default: air inside the body].")  # fmt: skip
@offset_option
@affine_option
@channel_option
@subject_option
@policy_option
@workers_option
@cache_option
def prepare(
    path: Path, layout: str, task_file: Path | None, labels: str | None, spacing: float, scaling: str, crop: str,
    margin: float, center: str | None, masks: Path | None, lungmask: Path | None, offset: float | None,
    affine: str | None, channel: str | None, subject_patterns: tuple[str, ...], policy: Policy, workers: int | None,
    cache: Path | None,
) -> None:  # fmt: skip
    """Prepare a cohort: read, check, crop, resample, scale and store it in the cache.

    A killed preparation goes on where it stopped, and two at once do no harm. `pretrain` and `bench`
    do the same on their own; this is for doing it beforehand, or with other crops.
    """
    quiet_libraries()
    from ssl3d.bench.sources import cache_folder, open_dataset, with_masks
    from ssl3d.config import validate
    from ssl3d.data.checks.unnamed import unnamed_labels
    from ssl3d.data.files.findings import raise_findings
    from ssl3d.data.layouts.listing import list_cases
    from ssl3d.data.prepared.build import prepare as build
    from ssl3d.data.prepared.index import check_room_for
    from ssl3d.data.prepared.many import grown_from
    from ssl3d.data.prepared.steps import Preparation
    from ssl3d.progress import Tracker

    if (crop == "mask") != (masks is not None):
        raise ConfigError("--crop mask and --masks belong together: give both or none.")
    edges = None
    if center is not None:
        try:
            edges = tuple(float(part) for part in center.split(","))
        except ValueError:
            raise ConfigError(
                f'--center "{center}" is not three numbers; write --center 160,160,128.'
            ) from None
    options = {"spacing_mm": spacing, "scaling": scaling, "crop": crop, "margin_mm": margin,
               "center_mm": edges, "intensity_offset": offset,
               "lungmask": lungmask and lungmask.absolute()}  # fmt: skip
    preparation = validate(Preparation, options, "data prepare")
    said = {"affine": affine, "channel": channel, "subject_pattern": _one_pattern(layout, subject_patterns)}
    given = {key: value for key, value in said.items() if value is not None}
    dataset = open_dataset(layout, path, facts={**_facts_of(task_file, labels), **given})
    listing = list_cases(dataset, path)
    if (unnamed := unnamed_labels(path, listing.cases, dataset)) is not None:
        raise_findings([unnamed])
    cases = listing.cases
    if masks is not None:
        cases = with_masks(cases, masks)
    check_room_for(len(cases))
    folder = cache_folder(cache) / "prepared"
    with Tracker() as progress:
        cohort = build(
            cases, dataset, preparation, folder, workers=workers, progress=progress, policy=policy,
            left_out=listing.findings, built=grown_from(cases, dataset, preparation, folder),
        )  # fmt: skip
    say_skipped(cohort.skipped)
    click.echo(
        f"{count(len(cohort), 'case')}, {cohort.intensity.scaling}, read as {cohort.taken_for}: {cohort.folder}"
    )
