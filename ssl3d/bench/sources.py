"""From what the user names to prepared cohorts: phantoms, a folder, or a release on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.config import PhantomConfig, Settings, validate
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.suffixes import IMAGE_SUFFIXES
from ssl3d.data.layouts.listing import Listing, list_cases
from ssl3d.data.layouts.recognize import other_layout_named
from ssl3d.data.prepared.build import Policy, prepare
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.index import check_room_for
from ssl3d.data.prepared.many import grown_from, is_prepared, open_prepared
from ssl3d.data.prepared.steps import Preparation
from ssl3d.data.splits import SPLITS_FINAL, Split, make_splits, save_splits, splits_of_file
from ssl3d.errors import ConfigError, DataError, are, count
from ssl3d.progress import Tracker
from ssl3d.registry.registry import registry

if TYPE_CHECKING:
    from ssl3d.downstream.tasks import Task

PHANTOMS = "phantoms"
PHANTOM_COUNTS = ("pretrain", "mmwhs", "asoca", "candi", "stoic")


def cache_folder(given: Path | None) -> Path:
    """Return the folder of prepared volumes and phantoms: ``given``, or ``~/.cache/ssl3d``."""
    return given or Path.home() / ".cache" / "ssl3d"


def absolute_place(text: str) -> str:
    """Return a place of data as a record keeps it, for a reader in any working directory.

    Args:
        text: ``phantoms``, a folder, or ``LAYOUT=DIR``.
    """
    if text == PHANTOMS:
        return text
    name, equals, rest = text.partition("=")
    layout = f"{name}=" if equals and name in registry().datasets else ""
    return layout + str(Path(rest if layout else text).expanduser().absolute())


def make_phantoms(root: Path, config: PhantomConfig) -> None:
    """Write the phantom cohorts to ``root``; files that are there already are kept.

    Raises:
        DataError: ``root`` holds phantoms of other parameters.
    """
    from ssl3d.data.phantoms import PhantomParameters, write_cohorts

    counts = config.model_dump(include=set(PHANTOM_COUNTS))
    parameters = PhantomParameters(**config.model_dump(exclude=set(PHANTOM_COUNTS)))
    with Tracker() as progress:
        write_cohorts(root, parameters, counts, progress=progress)


def phantom_root(config: PhantomConfig, cache: Path | None) -> Path:
    """Return the folder of the phantom cohorts of ``config``, written on first use."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    root = cache_folder(cache) / PHANTOMS / hashlib.sha256(text.encode()).hexdigest()[:12]
    make_phantoms(root, config)
    return root


def open_dataset(
    name: str, root: Path, labels: bool = True, facts: Mapping[str, Any] | None = None
) -> Dataset:
    """Return the adapter called ``name`` for the data at ``root``.

    Args:
        name: of the layout.
        root: the folder.
        labels: whether they will be read.
        facts: what the user or a task says of the data; more than the data's own files say.

    Raises:
        PluginError: no such layout.
        DataError: the folder lacks what the layout must have.
    """
    dataset: Dataset = registry().datasets.get(name).load()
    chosen = {key: value for key, value in (facts or {}).items() if value is not None}
    before = {key: chosen[key] for key in ("affine", "channel", "ignored_label_values") if key in chosen}
    after = {key: value for key, value in chosen.items() if key not in ("affine", "channel")}
    # Names that are said need not be read, and may be said because the data's own file makes no sense.
    named = "label_values" in chosen
    with other_layout_named(root, name):
        opened = dataset.with_facts(**before).open(root, labels and not named)
    return opened.with_facts(**after)


def _given_facts(name: str, settings: Settings, phantoms: bool) -> dict[str, Any]:
    """Return what the settings say of files that leave a choice, and of who is on which image."""
    patterns = settings.data.subject_pattern
    return {
        "affine": settings.data.affine.get(name),
        "channel": settings.data.channel.get(name),
        "subject_pattern": patterns.get(name, None if phantoms else patterns.get("*")),
    }


def with_masks(cases: Sequence[Case], folder: Path) -> list[Case]:
    """Return the cases with the masks of ``folder``: ``<case id><ending of a volume>``.

    Raises:
        DataError: lists every case without a mask.
    """
    found: list[Case] = []
    missing = []
    for case in cases:
        places = [folder / f"{case.id}{suffix}" for suffix in IMAGE_SUFFIXES]
        mask = next((place for place in places if place.is_file()), None)
        if mask is None:
            missing.append(str(places[0]))
        found.append(replace(case, mask=mask))
    if missing:
        raise DataError(
            f"{len(missing)} of {count(len(cases), 'mask')} {are(len(missing))} missing: {', '.join(missing[:10])}"
            f"{', ...' * (len(missing) > 10)}. Fix: add them, or choose another crop."
        )
    return found


def pretraining_cohort(
    data: str,
    settings: Settings,
    cache: Path | None,
    policy: Policy = "refuse",
    built: PreparedCohort | None = None,
) -> PreparedCohort:
    """Return the prepared volumes to pretrain on; labels, where there are any, are not read.

    Cases in ``data.exclude`` are left out.

    Args:
        data: ``phantoms``, a folder of volumes, ``DATASET=DIR`` for a registered dataset, or the folder of a prepared
            cohort, which is taken as it is: no image file is looked for.
        settings: the preset.
        cache: where prepared volumes are kept.
        policy: what happens to bad files.
        built: the same volumes and more, prepared.

    Raises:
        DataError: the data cannot be used; every bad file is listed.
    """
    name, equals, place = data.partition("=")
    if data == PHANTOMS:
        name, root = "folder", phantom_root(settings.phantoms, cache) / "pretrain"
    elif equals:
        root = Path(place)
    else:
        name, root = "folder", Path(data)
        if is_prepared(root):
            return _as_prepared(root, settings)
        if not root.exists():
            raise DataError(
                f'--data {data}: no such folder. Give a folder of volumes, DATASET=DIR, or "phantoms".'
            )
    facts = _given_facts(name, settings, phantoms=data == PHANTOMS)
    dataset = open_dataset(name, root, labels=False, facts=facts)
    options: dict[str, Any] = {"spacing_mm": settings.data.spacing_mm}
    listing = list_cases(dataset, root)
    excluded = set(settings.data.exclude)
    if unknown := sorted(excluded - {case.id for case in listing.cases}):
        raise DataError(
            f"data.exclude names {count(len(unknown), 'case')} that {root} does not have: {', '.join(unknown[:10])}. "
            "Fix: correct the names, which are those of the files without their endings."
        )
    cases = [
        Case(id=case.id, subject=case.subject, image=case.image)
        for case in listing.cases
        if case.id not in excluded
    ]
    return _prepared(dataset, replace(listing, cases=cases), options, settings, cache, policy, built)


def _as_prepared(folder: Path, settings: Settings) -> PreparedCohort:
    """Return a cohort that the user names by its folder.

    Raises:
        DataError: it is not complete.
        ConfigError: it is of another spacing than the preset's, was cropped by its labels, or cases are to be left out.
    """
    cohort = open_prepared(folder)
    if cohort.preparation.uses_labels:
        raise ConfigError(
            f"--data {folder} was cropped by its labels, which pretraining must not see. Fix: prepare it with another "
            "--crop, or give the folder of the images."
        )
    spacing = cohort.preparation.spacing_mm
    if spacing != settings.data.spacing_mm:
        raise ConfigError(
            f"--data {folder} was prepared at {spacing:g} mm, and data.spacing_mm is {settings.data.spacing_mm:g}. "
            f"Fix: --set data.spacing_mm={spacing:g}, or give the folder of the images."
        )
    if settings.data.exclude:
        raise ConfigError(
            f"--data {folder} is prepared, and {count(len(settings.data.exclude), 'case')} cannot be left out of it "
            "(data.exclude, --exclude-test). Fix: give the folder of the images."
        )
    return cohort


def task_cohort(
    task: Task, place: Path | None, settings: Settings, cache: Path | None, policy: Policy = "refuse"
) -> PreparedCohort:
    """Return the prepared cases of ``task``.

    Args:
        task: the task.
        place: root of the release on disk, or ``LAYOUT=DIR`` where it has another layout than the
            task's; None: where the task says, else the phantom cohort in that release's layout.
        settings: the preset.
        cache: where prepared volumes are kept.
        policy: what happens to bad files.

    Raises:
        DataError: the data cannot be used; every bad file is listed.
    """
    place, layout = place or task.place, task.dataset
    if place is None:
        root = phantom_root(settings.phantoms, cache) / task.dataset
        if not root.is_dir():
            raise DataError(
                f"There is no phantom cohort for the dataset {task.dataset} of task {task.name}: "
                f"give its release with --task-data {task.name}=DIR."
            )
    else:
        name, equals, rest = str(place).partition("=")
        layout, root = (name, Path(rest)) if equals and name in registry().datasets else (layout, place)
    given = _given_facts(layout, settings, phantoms=place is None)
    said = {key: value for key, value in given.items() if value is not None}
    dataset = open_dataset(layout, root, facts={**task.facts, **said})
    default = task.preparation.get("spacing_mm", settings.data.spacing_mm)
    spacing = settings.data.task_spacing_mm.get(task.name, default)
    listing = list_cases(dataset, root)
    cases = [_truth_only(case, task) for case in listing.cases]
    _check_task(task, dataset, cases)
    options = {**task.preparation, "spacing_mm": spacing}
    return _prepared(dataset, replace(listing, cases=cases), options, settings, cache, policy)


_TRUTHS: dict[str, tuple[str, str]] = {
    "segmentation": ("label", "a segmentation"),
    "classification": ("target", "a class"),
    "multilabel": ("classes", "a list of classes (separated by ; in the column class of a CSV)"),
    "regression": ("value", "a number (the column value of a CSV)"),
}
"""Kind of a task -> the field of a case that it needs, and what that is called."""


def _truth_only(case: Case, task: Task) -> Case:
    """Return the case with what the task predicts (and what it is cropped to) and nothing else."""
    needed = {_TRUTHS[task.kind][0]} | ({"label"} if task.preparation.get("crop") == "label" else set())
    fields = {field for field, _ in _TRUTHS.values()} - needed
    return replace(case, **dict.fromkeys(fields))  # type: ignore[arg-type]


def _check_task(task: Task, dataset: Dataset, cases: Sequence[Case]) -> None:
    """Raise DataError if no case has what the task predicts, or if nothing says what it is called."""
    field, name = _TRUTHS[task.kind]
    if all(getattr(case, field) is None for case in cases):
        raise DataError(
            f"The task {task.name} ({task.kind}) needs {name} for every case, and none of {len(cases)} has one. "
            "Fix: add them, or correct the task's kind."
        )
    if task.kind == "segmentation" and not dataset.label_values:
        raise DataError(f"The task {task.name} has no names of structures. Fix: give labels in its file.")
    classes = len(dataset.target_names)
    if task.metric == "auc" and classes > 2:
        raise DataError(
            f"{task.name} has {classes} classes, but auc is for two. Fix: write metric: macro_auc."
        )


def task_splits(
    task: Task, cohort: PreparedCohort, settings: Settings, record: Path | None = None
) -> list[Split]:
    """Return the splits of ``task``, the same for every method and seed; also written to ``record``."""
    counts, seed = settings.data.counts.get(task.name, task.counts), settings.data.split_seed
    file = splits_file(task, cohort, settings)
    try:
        if file is not None:
            skipped = {case["id"] for case in cohort.skipped}
            splits = splits_of_file(cohort.cases, file, counts, seed, cohort.target_names, skipped)
        else:
            splits = make_splits(
                cohort.cases,
                counts,
                seed,
                task.scheme,
                task.folds or settings.data.folds,
                cohort.target_names,
            )
    except DataError as error:
        raise DataError(f"Task {task.name}: {error}") from None
    if record is not None:
        save_splits(record, splits)
    return splits


def splits_file(task: Task, cohort: PreparedCohort, settings: Settings) -> Path | None:
    """Return the file that the splits of ``task`` are read from; None: they are made.

    Named by the settings, or by the task; where that has the scheme "file" and names none, ``splits_final.json``
    beside or above the images.

    Raises:
        DataError: there is none.
    """
    if task.name in settings.data.splits_file:
        return Path(settings.data.splits_file[task.name])
    if task.splits_file is not None or task.scheme != "file":
        return task.splits_file
    folder = cohort.cases[0].source.parent
    places = [place / SPLITS_FINAL for place in (folder.parent, folder)]
    for place in places:
        if place.is_file():
            return place
    raise DataError(
        f"Task {task.name} takes its splits from {SPLITS_FINAL}, and there is none at {' or '.join(map(str, places))}. "
        f"Fix: copy it there (nnU-Net keeps it in nnUNet_preprocessed/DATASET), or name it: --splits-file FILE, or in "
        f"the task file splits: {{file: FILE}}."
    )


def _prepared(
    dataset: Dataset,
    listing: Listing,
    options: dict[str, Any],
    settings: Settings,
    cache: Path | None,
    policy: Policy,
    built: PreparedCohort | None = None,
) -> PreparedCohort:
    offset = settings.data.intensity_offset.get(dataset.name)
    options = {**options, "intensity_offset": offset}
    preparation = validate(Preparation, options, f"preparation of {dataset.name}")
    folder = cache_folder(cache) / "prepared"
    check_room_for(len(listing.cases))
    if built is None:
        built = grown_from(listing.cases, dataset, preparation, folder)
    with Tracker() as progress:
        return prepare(
            listing.cases, dataset, preparation, folder, progress=progress, policy=policy,
            left_out=listing.findings, built=built,
        )  # fmt: skip
