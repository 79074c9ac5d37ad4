"""Preparation of one case."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data.checks.case import inspect_case
from ssl3d.data.checks.file import read_checked
from ssl3d.data.checks.intensity import HU_OFFSET, Verdict, judge, judge_cohort, subsample
from ssl3d.data.checks.voxels import check_grids, voxel_digest
from ssl3d.data.cohort import ANY_READING, Case, Dataset, Reading
from ssl3d.data.files.findings import MAX_BYTES, Finding, raise_findings
from ssl3d.data.files.volume import Volume
from ssl3d.data.files.volume_file import VolumeFiles
from ssl3d.data.prepared.arrays import SUFFIX, save_array
from ssl3d.data.prepared.grids import isotropic_grid
from ssl3d.data.prepared.steps import CaseError, Intensity, Preparation, prepare_arrays
from ssl3d.data.prepared.stored import read_note, write_note
from ssl3d.errors import count
from ssl3d.marks import without_effect
from ssl3d.memory import NO_ROOM, Budget, explained
from ssl3d.parallel import Progress, run_parallel
from ssl3d.remedies import GIVE_MASK, RUN_AGAIN


@dataclass(frozen=True)
class _Job:
    """The arguments of :func:`prepare` that stay the same while cases are left out, and the files as far as known."""

    dataset: Dataset
    preparation: Preparation
    cache_dir: Path
    workers: int | None
    progress: Progress | None
    max_bytes: int
    files: VolumeFiles = field(default_factory=VolumeFiles)
    budget: Budget = field(default_factory=Budget)


def _adopt(
    donor: tuple[Path, dict[str, Any]] | None,
    source: dict[str, Any],
    intensity: Intensity,
    folder: Path,
    stem: str,
) -> None:
    """Take over a case that was built in another folder with the same parameters, by hard links."""
    if donor is None or read_note(folder, stem) is not None:
        return
    place, record = donor
    if record["sources"] != source or record["intensity"] != [intensity.scaling, intensity.offset]:
        return
    arrays: dict[str, Any] = {}
    for kind, array in record["arrays"].items():
        arrays[kind] = None
        if array:
            name = f"{stem}.{kind}{Path(array['name']).suffix}"
            temporary = folder / f".{stem}.{kind}.{secrets.token_hex(8)}.tmp"
            try:
                os.link(place / array["name"], temporary)
            except OSError:
                return  # a file system without hard links: it is built again
            temporary.replace(folder / name)
            arrays[kind] = {**array, "name": name}
    write_note(folder, stem, {**record, "arrays": arrays})


def _resolve_intensity(cases: Sequence[Case], job: _Job) -> tuple[Intensity, dict[Case, list[Finding]]]:
    """Decide scaling and offset for a whole cohort (never file by file: they must stay comparable).

    Returns:
        The decision, and the findings of cases that are of another kind than the others.
    """
    dataset, given = job.dataset, job.preparation.intensity_offset
    declared, scaling = dataset.intensity_offset, job.preparation.scaling
    if scaling == "auto" and dataset.modality != "auto":
        scaling = "ct" if dataset.modality == "ct" else "minmax"
    if scaling == "auto" and given is not None:
        scaling = "ct"  # an offset has no meaning for anything else
    said = "MR" if dataset.modality == "mr" else "volumes without a unit"
    if scaling == "minmax":
        return Intensity("minmax", 0.0, False, "each volume from its minimum to its maximum", said), {}
    if scaling == "zscore":
        return Intensity("zscore", 0.0, False, "mean and deviation of each volume's foreground", said), {}
    if given is not None:
        return Intensity("ct", given, True, "offset given by the user", f"CT, offset {given:g}"), {}
    if declared != "auto" and scaling == "ct":
        return Intensity(
            "ct", declared, True, f"offset of the data set {dataset.name}", f"CT, offset {declared:g}"
        ), {}
    return _found_intensity(cases, job, scaling == "ct")


def _found_intensity(
    cases: Sequence[Case], job: _Job, is_ct: bool
) -> tuple[Intensity, dict[Case, list[Finding]]]:
    """Look at the values of every volume; see :func:`_resolve_intensity`."""

    def judge_case(case: Case) -> Verdict | list[Finding]:
        findings, image, _ = inspect_case(case, job.dataset, max_bytes=job.max_bytes, files=job.files)
        return findings if findings or image is None else judge(subsample(image.data), is_ct)

    found = run_parallel(judge_case, cases, job.workers, job.progress, "measuring intensities")
    verdicts = {case: one for case, one in zip(cases, found, strict=True) if isinstance(one, Verdict)}
    if not verdicts:
        raise_findings([finding for findings in found if isinstance(findings, list) for finding in findings])
    kind, odd = judge_cohort(verdicts, is_ct)
    level = float(np.median([verdict.darkest for verdict in verdicts.values()]))
    rule = f"by the values of {count(len(verdicts), 'file')}, median first percentile {level:.4g}"
    if any(verdict.by == "tissue" and verdict.kind == kind for verdict in verdicts.values()):
        rule += ", some without air: by tissue"
    if kind == "not CT in HU":
        return Intensity("minmax", 0.0, False, rule, kind), odd
    return Intensity("ct", HU_OFFSET if kind == "CT in HU" else 0.0, True, rule, kind), odd


def _build_case(
    case: Case,
    source: dict[str, Any],
    job: _Job,
    intensity: Intensity,
    folder: Path,
    stem: str,
) -> dict[str, Any] | list[Finding]:
    """Store one case, unless an earlier build did; return its record, or what is wrong with it."""
    stored = read_note(folder, stem)
    if stored is not None:
        return stored | {"sources": source}
    offset = intensity.offset if intensity.scaling == "ct" else None
    dataset, preparation, max_bytes, files = job.dataset, job.preparation, job.max_bytes, job.files
    findings, image, label = inspect_case(case, dataset, offset=offset, max_bytes=max_bytes, files=files)
    mask: np.ndarray | None = None
    if image is not None and preparation.crop == "mask":
        mask_findings, mask = _read_mask(case, image, job)
        findings += mask_findings
    if findings or image is None:
        return findings
    try:
        indices = None if label is None else _map_labels(label.data, dataset.label_index())
        with job.budget.reserved(_bytes_needed(image, preparation)):
            data, indices, affine = prepare_arrays(image, indices, preparation, intensity, mask, max_bytes)
    except CaseError as error:
        return [Finding(case.image, error.problem, error.fix)]
    for file in filter(None, source.values()):
        if files[Path(file["path"])].stat() != (file["size"], file["mtime_ns"]):
            return [Finding(Path(file["path"]), "changed while it was being prepared", RUN_AGAIN())]
    has_structure = label is not None and bool(label.data.any())
    voxels = {
        "image": voxel_digest(image),
        "label": voxel_digest(label) if label is not None and has_structure else None,
    }
    arrays = {
        "image": save_array(folder / f"{stem}.image{SUFFIX}", data),
        "label": None if indices is None else save_array(folder / f"{stem}.label{SUFFIX}", indices),
    }
    record = {
        "id": case.id, "subject": case.subject, "subset": case.subset, "target": case.target,
        "classes": case.classes and list(case.classes), "value": case.value,
        "sources": source, "arrays": arrays, "intensity": [intensity.scaling, intensity.offset], "voxels": voxels,
        "shape": list(data.shape), "affine": affine.tolist(),
        "native_shape": list(image.native_shape), "native_affine": image.native_affine.tolist(),
    }  # fmt: skip
    write_note(folder, stem, record)  # last: a killed build repeats this case
    return record


@without_effect
def _bytes_needed(image: Volume, preparation: Preparation) -> int:
    """Return about how many bytes a preparation takes at its peak: copies of the volume before and after resampling."""
    grid = isotropic_grid(image.affine, image.data.shape, preparation.spacing_mm)
    target = image.data.size if grid is None else math.prod(grid[1])
    return 4 * (2 * image.data.size + 3 * target)


def _read_mask(case: Case, image: Volume, job: _Job) -> tuple[list[Finding], np.ndarray | None]:
    """Return what is wrong with the mask of a case, and the mask (D, H, W) bool on the image's grid."""
    if case.mask is None:
        return [Finding(case.image, 'has no mask, which crop "mask" needs', GIVE_MASK())], None
    reading = replace(job.dataset.reading(), channel=None)
    findings, mask = read_checked(
        job.files[case.mask], integers=True, max_bytes=job.max_bytes, reading=reading
    )
    if mask is None:
        return findings, None
    return check_grids(image, mask), mask.data != 0


def _map_labels(label: np.ndarray, index: dict[int, int]) -> np.ndarray:
    """Return stored label values as uint8 0..K; every value is a key of ``index`` (checked before)."""
    low, high = min(index), max(index)
    table = np.zeros(high - low + 1, dtype=np.uint8)
    for value, k in index.items():
        table[value - low] = k
    return table[label - low]


def prepare_file(
    path: Path,
    preparation: Preparation,
    intensity: Intensity,
    *,
    reading: Reading = ANY_READING,
    max_bytes: int = MAX_BYTES,
) -> tuple[Volume, np.ndarray, np.ndarray] | list[Finding]:
    """Check, read and prepare one image that belongs to no cohort, as those of the training were.

    Args:
        path: the image file.
        preparation: the parameters; crop "label" cannot be repeated without a label.
        intensity: scaling and offset of the cohort.
        reading: what to take of a file that leaves a choice.
        max_bytes: largest volume allowed, in bytes as float32.

    Returns:
        The volume as read, the prepared image (D, H, W) in [0, 1] and its affine (4, 4); or what is
        wrong with the file.
    """
    from ssl3d.data.layouts.releases import Folder

    offset = intensity.offset if intensity.scaling == "ct" else None
    case = Case(path.name, path.name, path)
    unlike_ct = intensity.taken_for in {"MR", "not CT in HU"}
    dataset = Folder().with_facts(**asdict(reading), modality="mr" if unlike_ct else "auto")
    with explained(f"{path} with its preparation", NO_ROOM):
        findings, image, _ = inspect_case(case, dataset, offset=offset, max_bytes=max_bytes)
        if findings or image is None:
            return findings
        try:
            data, _, affine = prepare_arrays(image, None, preparation, intensity, max_bytes=max_bytes)
        except CaseError as error:
            return [Finding(path, error.problem, error.fix)]
    return image, data, affine
