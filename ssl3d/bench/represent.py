"""Maps and measures of the local features of several methods, on the same voxels of the same cases.

Like :mod:`ssl3d.bench.run` it knows both ends: it reads checkpoints (and, for methods that match volumes,
their heads) and hands them to the measures of :mod:`ssl3d.downstream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.bench.sources import task_cohort, task_splits
from ssl3d.config import BackboneConfig, Settings, validate
from ssl3d.device import to_device
from ssl3d.downstream.features.maps import PROJECTIONS, draw, embed
from ssl3d.downstream.features.matching import Matcher, evaluate_matching, matching_means
from ssl3d.downstream.features.measures import make_plan, measure
from ssl3d.downstream.task_files import task_of_record
from ssl3d.downstream.tasks import Task
from ssl3d.environment import environment
from ssl3d.errors import ConfigError, DataError, count
from ssl3d.files import write_bytes, write_json
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import load_backbone, load_method, read_run, weights_fingerprint
from ssl3d.pretrain.spec import resolve_method
from ssl3d.progress import Track
from ssl3d.registry.registry import registry
from ssl3d.results.results import Results
from ssl3d.results.store.record import Record
from ssl3d.results.store.representation import SCHEMA
from ssl3d.results.store.store import ResultStore

if TYPE_CHECKING:
    import torch

    from ssl3d.data.prepared.build import Policy
    from ssl3d.data.prepared.cohort import PreparedCohort
    from ssl3d.data.splits import Split


@dataclass(frozen=True)
class Entry:
    """One panel: a finished run, and what it is called."""

    title: str
    method: str
    folder: Path


@dataclass(frozen=True)
class Job:
    """One task and the runs that are compared on it.

    Attributes:
        task: a segmentation.
        place: its data; None: where the task says, else phantoms.
        settings: the preset that prepares the data.
        split: name of the split whose test cases are used; None: the first.
        entries: at least one.
        task_data: fingerprint that the prepared data must have; None: any.
        left_out: a line for each row that could not be taken.
    """

    task: Task
    place: Path | None
    settings: Settings
    split: str | None
    entries: list[Entry]
    task_data: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Extent:
    """How much is looked at: cases, pairs of them, voxels of a structure in a case, voxels of the map."""

    cases: int = 12
    pairs: int = 12
    voxels: int = 200
    map_voxels: int = 2000


def jobs_of_store(store: ResultStore, tasks: Sequence[str] | None, seed: int | None) -> list[Job]:
    """Return a job for each segmentation of the store: all rows of the table that has the most of them.

    Args:
        store: with the runs that its records name.
        tasks: names; None: every segmentation of the store.
        seed: of the pretraining; None: the lowest in the store.

    Raises:
        DataError: there is nothing to compare; says why.
    """
    records, _ = store.records(lazy=True)
    ended = [r for r in records if "pretrain_step" not in r["identity"] and r["metric"] == "dsc"]
    known = sorted({r["identity"]["task"] for r in ended})
    for name in tasks or ():
        if name not in known:
            raise DataError(
                f'The store {store.root} has no segmentation "{name}"; it has {", ".join(known) or "none"}.'
            )
    if not ended:
        raise DataError(f"The store {store.root} has no record of a segmentation, so no voxel has a label.")
    seed = min(r["identity"]["seed"] for r in ended) if seed is None else seed
    jobs = []
    for name in tasks or known:
        of_task = [r for r in ended if r["identity"]["task"] == name and r["identity"]["seed"] == seed]
        if not of_task:
            raise DataError(f"The store {store.root} has no record of {name} with seed {seed}.")
        jobs.append(_job_of_records(store, of_task, seed))
    return jobs


def _job_of_records(store: ResultStore, records: list[Record], seed: int) -> Job:
    model = Results(store.root, tuple(records)).model(())
    table = max(model.tables, key=lambda t: len(t.rows))
    entries, left_out = [], []
    first: Record | None = None
    for row in table.rows:
        record = next(r for cell in row.cells.values() for r in cell.records)
        folder = store.run_folder(record)
        if folder is None:
            left_out.append(f"{row.title}: its run {record.get('checkpoint')} is not there")
        elif not record.get("run"):
            left_out.append(f"{row.title}: its record is from an older ssl3d and does not hold its settings")
        else:
            first = first or record
            entries.append(Entry(row.title, row.method, folder))
    if first is None:
        raise DataError("No row can be looked at:\n" + "\n".join(f"  {line}" for line in left_out))
    identity, run = first["identity"], first["run"]
    return Job(
        task_of_record(first),
        Path(run["task_data"]) if run["task_data"] else None,
        validate(Settings, run["settings"], "settings of the record"),
        identity["split"],
        entries,
        identity["task_data"],
        tuple(left_out),
    )


def represent(
    job: Job,
    out: Path,
    device: torch.device,
    cache: Path | None = None,
    extent: Extent | None = None,
    seed: int = 0,
    policy: Policy = "refuse",
) -> dict[str, Any]:
    """Measure every run of ``job`` and write ``<task>.json`` and the maps ``<task>-tsne.png``, ``-pca.png``.

    Args:
        job: what to compare.
        out: folder.
        device: where to compute.
        cache: prepared volumes and phantoms.
        extent: how much to look at.
        seed: of the draws of pairs and voxels.
        policy: what happens to bad files.

    Returns:
        What was written to the JSON file.

    Raises:
        DataError: the data are not those of the records.
    """
    extent = extent or Extent()
    task, settings = job.task, job.settings
    cohort, split = _data(job, cache, policy)
    cases = [cohort.index(case) for case in split.test][: extent.cases]
    plan = make_plan(cohort, cases, extent.pairs, extent.voxels, seed)
    methods: list[dict[str, Any]] = []
    clouds = []
    with Track(f"Representation, {task.name}", len(job.entries), unit="method") as track:
        for done, entry in enumerate(job.entries, 1):
            backbone = load_backbone(entry.folder)
            weights = weights_fingerprint(backbone)
            numbers, points, labels = measure(
                backbone, task, cohort, plan, settings.downstream, device, extent.map_voxels
            )
            clouds.append((entry.title, points, labels.numpy()))
            matching, why_not = _matching(entry, cohort, plan.pairs, device)
            methods.append({
                "title": entry.title, "method": entry.method, "run": entry.folder.name, "weights": weights,
                **numbers, "matching": matching, "not_matched": why_not,
            })  # fmt: skip
            track.update(done, note=entry.title)
    pictures = {how: f"{task.name}-{how}.png" for how in PROJECTIONS}
    for how, name in PROJECTIONS.items():
        panels = [(title, embed(points, how, seed), labels) for title, points, labels in clouds]
        heading = f"{name} of the local feature, {task.title}: {len(clouds[0][1])} voxels of {count(len(cases), 'case')}"
        write_bytes(out / pictures[how], draw(panels, cohort.label_names, heading))
    result = {
        "schema": SCHEMA,
        "task": task.name,
        "title": task.title,
        "preset": settings.title,
        "task_data": cohort.fingerprint,
        "split": split.name,
        "seed": seed,
        "cases": [cohort.cases[c].id for c in cases],
        "pairs": [[cohort.cases[a].id, cohort.cases[b].id] for a, b in plan.pairs],
        "voxels_per_structure": extent.voxels,
        "map_voxels": len(clouds[0][1]),
        "structures": list(cohort.label_names),
        "methods": methods,
        "left_out": list(job.left_out),
        "pictures": pictures,
        "environment": environment(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(out / f"{task.name}.json", result)
    return result


def _data(job: Job, cache: Path | None, policy: Policy) -> tuple[PreparedCohort, Split]:
    """Return the cases of ``job`` and the split whose test cases are used.

    Raises:
        DataError: the data are not those of the records.
    """
    cohort = task_cohort(job.task, job.place, job.settings, cache, policy)
    if job.task_data not in (None, cohort.fingerprint):
        raise DataError(
            f"The data of task {job.task.name} are not those of the records (fingerprint {cohort.fingerprint[:12]}, in "
            f"the records {str(job.task_data)[:12]}): they changed, or the code that prepares them did."
        )
    splits = [s for s in task_splits(job.task, cohort, job.settings) if job.split in (None, s.name)]
    if not splits:
        raise DataError(f"Task {job.task.name} has no split {job.split} any more: the data changed.")
    return cohort, splits[0]


def _matching(
    entry: Entry, cohort: PreparedCohort, pairs: Sequence[tuple[int, int]], device: torch.device
) -> tuple[dict[str, Any] | None, str]:
    """Return the means of :func:`evaluate_matching`, or None and why there are none.

    The reason is empty for a method that aligns nothing anyway.
    """
    run = read_run(entry.folder)
    pretraining = (run.get("identity") or {}).get("pretrain")
    if not hasattr(registry().methods.get(entry.method).load(), "match"):
        return None, ""
    if not pretraining:
        return None, "the run was not pretrained by this ssl3d, so its heads are not known"
    spec = resolve_method(entry.method, {entry.method: run["identity"]["method"]["config"]})
    backbone = build_backbone(BackboneConfig.model_validate(run["backbone"]), seed=0)
    method = spec.build(backbone, seed=0)
    if not load_method(entry.folder, method):
        return None, "the run keeps no state with its heads"
    assert isinstance(method, Matcher)
    to_device(method, device)
    method.eval()
    try:
        found = evaluate_matching(method, cohort, pairs, pretraining["budget"]["crop"], device)
    except ConfigError as error:  # a variant without its matching head says so
        return None, str(error)
    return matching_means(found), ""
