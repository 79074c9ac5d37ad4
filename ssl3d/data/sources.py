"""From what the user names to prepared cohorts: phantoms, a folder, or a release on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.config import PhantomConfig, Settings, validate
from ssl3d.data.cohort import Dataset
from ssl3d.data.prepare import Preparation, PreparedCohort, prepare
from ssl3d.data.splits import Split, make_splits, save_splits
from ssl3d.errors import DataError
from ssl3d.plugins import registry
from ssl3d.progress import Track

if TYPE_CHECKING:
    from ssl3d.downstream.tasks import Task

PHANTOMS = "phantoms"
PHANTOM_COUNTS = ("pretrain", "mmwhs", "asoca", "candi", "stoic")


def cache_folder(given: Path | None) -> Path:
    """Return the folder of prepared volumes and phantoms: ``given``, or ``~/.cache/ssl3d``."""
    return given or Path.home() / ".cache" / "ssl3d"


def make_phantoms(root: Path, config: PhantomConfig) -> None:
    """Write the phantom cohorts to ``root``; files that are there already are kept.

    Raises:
        DataError: ``root`` holds phantoms of other parameters.
    """
    from ssl3d.data.phantoms import PhantomParameters, write_cohorts

    counts = config.model_dump(include=set(PHANTOM_COUNTS))
    parameters = PhantomParameters(**config.model_dump(exclude=set(PHANTOM_COUNTS)))
    with _Tracker() as progress:
        write_cohorts(root, parameters, counts, progress=progress)


def phantom_root(config: PhantomConfig, cache: Path | None) -> Path:
    """Return the folder of the phantom cohorts of ``config``, written on first use."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    root = cache_folder(cache) / PHANTOMS / hashlib.sha256(text.encode()).hexdigest()[:12]
    make_phantoms(root, config)
    return root


def pretraining_cohort(data: str, settings: Settings, cache: Path | None) -> PreparedCohort:
    """Return the prepared volumes to pretrain on.

    Args:
        data: ``phantoms``, a folder of volumes, or ``DATASET=DIR`` for a registered dataset.
        settings: the preset.
        cache: where prepared volumes are kept.

    Raises:
        DataError: the data cannot be used; every bad file is listed.
    """
    name, equals, place = data.partition("=")
    if data == PHANTOMS:
        dataset, root = (
            registry().datasets.get("folder").load(),
            phantom_root(settings.phantoms, cache) / "pretrain",
        )
    elif equals:
        dataset, root = registry().datasets.get(name).load(), Path(place)
    else:
        dataset, root = registry().datasets.get("folder").load(), Path(data)
        if not root.exists():
            raise DataError(
                f'--data {data}: no such folder. Give a folder of volumes, DATASET=DIR, or "phantoms".'
            )
    options: dict[str, Any] = {"spacing_mm": settings.data.spacing_mm}
    return _prepared(dataset, root, options, settings, cache)


def task_cohort(task: Task, place: Path | None, settings: Settings, cache: Path | None) -> PreparedCohort:
    """Return the prepared cases of ``task``.

    Args:
        task: the task.
        place: root of the release on disk; None: the phantom cohort in that release's layout.
        settings: the preset.
        cache: where prepared volumes are kept.

    Raises:
        DataError: the data cannot be used; every bad file is listed.
    """
    dataset = registry().datasets.get(task.dataset).load()
    if place is None:
        root = phantom_root(settings.phantoms, cache) / task.dataset
        if not root.is_dir():
            raise DataError(
                f"There is no phantom cohort for the dataset {task.dataset} of task {task.name}: "
                f"give its release with --task-data {task.name}=DIR."
            )
    else:
        root = place
    spacing = settings.data.task_spacing_mm.get(task.name, settings.data.spacing_mm)
    return _prepared(dataset, root, {**task.preparation, "spacing_mm": spacing}, settings, cache)


def task_splits(
    task: Task, cohort: PreparedCohort, settings: Settings, record: Path | None = None
) -> list[Split]:
    """Return the splits of ``task``, the same for every method and seed; also written to ``record``."""
    counts = settings.data.counts.get(task.name, task.counts)
    splits = make_splits(cohort.cases, counts, seed=settings.data.split_seed, folds=settings.data.folds)
    if record is not None:
        save_splits(record, splits)
    return splits


def _prepared(
    dataset: Dataset, root: Path, options: dict[str, Any], settings: Settings, cache: Path | None
) -> PreparedCohort:
    offset = settings.data.intensity_offset.get(dataset.name)
    options = {**options, "intensity_offset": offset}
    preparation = validate(Preparation, options, f"preparation of {dataset.name}")
    with _Tracker() as progress:
        return prepare(
            dataset.cases(root), dataset, preparation, cache_folder(cache) / "prepared", progress=progress
        )


class _Tracker:
    """Adapts (done, total, what) callbacks of the data layer to one progress display per job."""

    def __enter__(self) -> Callable[[int, int, str], None]:
        self._track: Track | None = None
        return self._report

    def _report(self, done: int, total: int, what: str) -> None:
        if self._track is None or self._track.title != what or self._track.total != total:
            self.__exit__()
            self._track = Track(what, total, unit="file")
            self._track.__enter__()
        self._track.update(done)

    def __exit__(self, *exc: Any) -> None:
        if self._track is not None:
            failed = exc and exc[0] is not None
            self._track.__exit__(exc[0] if failed else None, None, None)
            self._track = None
