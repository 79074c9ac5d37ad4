"""Preparation: from checked files to volumes in [0, 1] with one orientation and one spacing, stored once.

Steps (GVSL, He et al., CVPR 2023, table 2): read, check, reorient to RAS+, add the intensity offset
and clip (CT), crop, resample to isotropic spacing, scale to [0, 1], central box. CT is clipped before
it is resampled, so that padding of -3024 HU beside air, or metal, does not bleed into its neighbours.

A prepared cohort is a folder named by its fingerprint, which is a hash of the contents of the source
files, the adapter's facts and the parameters; so a changed file or parameter makes another folder,
and nothing stored is ever stale. ``manifest.json`` is written last: without it a folder is not used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ssl3d import __version__
from ssl3d.data.checks.case import check_between, check_cases
from ssl3d.data.checks.file import check_file
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.findings import MAX_BYTES, Finding, raise_findings
from ssl3d.data.files.payload import check_place
from ssl3d.data.prepared.case import _adopt, _build_case, _Job, _resolve_intensity
from ssl3d.data.prepared.cohort import PREPARATION_VERSION, PreparedCohort
from ssl3d.data.prepared.identity import _fingerprint, _identify
from ssl3d.data.prepared.lungs import load_lungmask
from ssl3d.data.prepared.steps import Preparation
from ssl3d.data.prepared.stored import read_manifest, write_manifest
from ssl3d.errors import ConfigError, DataError, WriteError
from ssl3d.files import remove_leftovers
from ssl3d.memory import NO_ROOM, explained
from ssl3d.parallel import Progress, run_parallel

Policy = Literal["refuse", "skip"]
"""What happens to bad cases: an error that lists all of them, or the others are used without them."""


def prepare(
    cases: Sequence[Case],
    dataset: Dataset,
    preparation: Preparation,
    cache_dir: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    max_bytes: int = MAX_BYTES,
    policy: Policy = "refuse",
    left_out: Sequence[Finding] = (),
    built: PreparedCohort | None = None,
) -> PreparedCohort:
    """Prepare a cohort, or return the one that is stored already.

    A killed build goes on with the cases that are missing. Two processes that build the same cohort
    write the same bytes under temporary names, so neither harms the other.

    Args:
        cases: what ``dataset.cases(root)`` returned.
        dataset: the adapter.
        preparation: the parameters.
        cache_dir: where prepared cohorts are kept, one folder each.
        workers: threads; None: one a core, 4 at most.
        progress: called with (done, total, what) in each pass.
        max_bytes: largest source volume allowed, in bytes as float32.
        policy: "refuse" bad cases with an error, or "skip" them; the manifest then says which and why.
        left_out: what is wrong with entries that are no case (:func:`ssl3d.data.layouts.listing.list_cases`); as bad cases.
        built: a cohort of more of the same cases, whose volumes are taken over where nothing else has changed.

    Raises:
        DataError: lists every bad file at once, each with the fix.
        ConfigError: parameters that do not fit the data set.
    """
    job = _Job(dataset, preparation, cache_dir, workers, progress, max_bytes)
    skipped: dict[Case, list[Finding]] = {}
    if left_out and policy == "refuse":
        found = check_cases(cases, dataset, workers=workers, progress=progress, max_bytes=max_bytes)
        raise_findings([*left_out, *found])
    donors: dict[str, tuple[Path, dict[str, Any]]] = {}
    if built is not None and built.preparation == preparation:
        donors = {record["id"]: (built.folder, record) for record in built.records}
    while True:  # comes round again without the bad cases, and copies what the last turn has built
        _check_cohort(cases, dataset, preparation)
        bad = _unidentifiable(cases)
        if not bad:
            prepared = _prepare(cases, job, donors)
            if isinstance(prepared, Path):
                _note_skipped(prepared, skipped, left_out)
                return PreparedCohort(prepared)
            bad = prepared
        elif policy == "refuse":  # no fingerprint without contents: list these with whatever else is wrong
            raise_findings(
                check_cases(cases, dataset, workers=workers, progress=progress, max_bytes=max_bytes)
            )
        if policy == "refuse" or len(bad) == len(cases):
            raise_findings([finding for findings in bad.values() for finding in findings])
        skipped |= bad
        cases = [case for case in cases if case not in bad]


def _prepare(
    cases: Sequence[Case], job: _Job, donors: dict[str, tuple[Path, dict[str, Any]]]
) -> Path | dict[Case, list[Finding]]:
    """Return the folder of the finished cohort, or the findings of every bad case.

    Args:
        cases: files that exist.
        job: the parameters.
        donors: case id -> folder and record of a case that is built already; filled for the next turn.
    """
    dataset, preparation = job.dataset, job.preparation
    workers, progress = job.workers, job.progress
    sources = _identify(cases, job.cache_dir, workers, progress, job.files)
    fingerprint = _fingerprint(cases, sources, dataset, preparation)
    folder = job.cache_dir / f"{dataset.name}-{fingerprint[:16]}"
    manifest = read_manifest(folder, PREPARATION_VERSION)
    if manifest is None:
        intensity, odd = _resolve_intensity(cases, job)
        if preparation.lungmask is not None:
            load_lungmask(preparation.lungmask)  # what is wrong with it is wrong for every case
        folder.mkdir(parents=True, exist_ok=True)

        def build(position: int) -> dict[str, Any] | list[Finding]:
            case, source = cases[position], sources[position]
            if case in odd:
                return odd[case]
            stem = f"{position:05d}-{re.sub('[^A-Za-z0-9._-]', '_', case.id)[:80]}"
            _adopt(donors.get(case.id), source, intensity, folder, stem)
            with explained(f"{case.image} with its preparation", NO_ROOM):
                return _build_case(case, source, job, intensity, folder, stem)

        built = run_parallel(build, range(len(cases)), workers, progress, f"preparing {dataset.name}")
        bad = _bad_cases(cases, built)
        records = [record for record in built if isinstance(record, dict)]
        if bad:
            donors |= {record["id"]: (folder, record) for record in records}
            return bad
        manifest = {
            "format": PREPARATION_VERSION, "ssl3d": __version__, "fingerprint": fingerprint,
            "dataset": dataset.name, "label_names": list(dataset.label_names()),
            "label_values": list(dataset.label_values), "preparation": preparation.model_dump(mode="json"),
            "target_names": {str(k): name for k, name in dataset.target_names.items()},
            "uses_labels": preparation.uses_labels, "intensity": asdict(intensity), "cases": records,
            "reading": asdict(dataset.reading()),
        }  # fmt: skip
        write_manifest(folder, manifest)
        remove_leftovers(folder)
    else:
        bad = _bad_cases(cases, manifest["cases"])
        if bad:
            donors |= {record["id"]: (folder, record) for record in manifest["cases"]}
            return bad
        if [record["sources"] for record in manifest["cases"]] != sources:
            # The same contents elsewhere, or touched: note where and when, to spare the next hashing.
            for record, source in zip(manifest["cases"], sources, strict=True):
                record["sources"] = source
            with suppress(WriteError):  # a cache that is read-only
                write_manifest(folder, manifest)
    return folder


def _bad_cases(
    cases: Sequence[Case], built: Sequence[dict[str, Any] | list[Finding]]
) -> dict[Case, list[Finding]]:
    """Return the findings of every case that was not built, or that repeats another."""
    good = {c: record for c, record in zip(cases, built, strict=True) if isinstance(record, dict)}
    between = check_between({c: (r["voxels"]["image"], r["voxels"]["label"]) for c, r in good.items()})
    bad = {}
    for case, result in zip(cases, built, strict=True):
        if isinstance(result, dict):
            found = between.get(case, [])
        else:
            found = list(result)
        if found:
            bad[case] = found
    return bad


def _unidentifiable(cases: Sequence[Case]) -> dict[Case, list[Finding]]:
    """Return the findings of cases that have a file that does not exist, or a folder that is no series."""
    bad: dict[Case, list[Finding]] = {}
    for case in cases:
        for path in filter(None, (case.image, case.label, case.mask)):
            if (check_place(path) or path.is_dir()) and (found := check_file(path)):
                bad.setdefault(case, []).extend(found)
    return bad


def _note_skipped(folder: Path, skipped: dict[Case, list[Finding]], left_out: Sequence[Finding]) -> None:
    """Write into a manifest which cases and other entries were left out, and why."""
    named = [(finding.path.name, finding) for finding in left_out]
    named += [(case.id, finding) for case, findings in skipped.items() for finding in findings]
    notes = [
        {"id": name, "path": str(finding.path), "problem": finding.problem, "fix": finding.fix}
        for name, finding in named
    ]
    manifest = read_manifest(folder, PREPARATION_VERSION)
    if manifest is not None and manifest.get("skipped", []) != notes:
        write_manifest(folder, {**manifest, "skipped": notes})


def _check_cohort(cases: Sequence[Case], dataset: Dataset, preparation: Preparation) -> None:
    if not cases:
        raise DataError(f"{dataset.name} has no case. Fix: give a folder that holds {dataset.layout}.")
    ids = [case.id for case in cases]
    twice = sorted({case_id for case_id in ids if ids.count(case_id) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise DataError(
            f"{dataset.name} lists {', '.join(twice[:5])} more than once. Fix: its adapter's ids."
        )
    if preparation.crop == "lungs" and dataset.modality == "mr":
        raise ConfigError(
            f'crop "lungs" needs CT, but {dataset.name} is MR. Choose "foreground" or "center".'
        )
    if len(dataset.label_values) > 255:
        raise DataError(
            f"{dataset.name} has {len(dataset.label_values)} structures; at most 255 can be stored."
        )


# --- identity -------------------------------------------------------------------------------------


# --- intensity ------------------------------------------------------------------------------------


# --- one case -------------------------------------------------------------------------------------
