"""Preparation: from checked files to volumes in [0, 1] with one orientation and one spacing, stored once.

Steps (GVSL, He et al., CVPR 2023, table 2): read, check, reorient to RAS+, add the intensity offset
and clip (CT), crop, resample to isotropic spacing, scale to [0, 1], central box. CT is clipped before
it is resampled, so that padding of -3024 HU beside air, or metal, does not bleed into its neighbours.

A prepared cohort is a folder named by its fingerprint, which is a hash of the contents of the source
files, the adapter's facts and the parameters; so a changed file or parameter makes another folder,
and nothing stored is ever stale. ``manifest.json`` is written last: without it a folder is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl3d import __version__
from ssl3d.data.adapters import image_suffix
from ssl3d.data.arrays import SUFFIX, Where, read_array, save_array
from ssl3d.data.cohort import ANY_READING, Case, Dataset, Reading, Subset
from ssl3d.data.dicom import SeriesError, series_files
from ssl3d.data.headers import payload_of
from ssl3d.data.integrity import (
    HU_OFFSET,
    MAX_BYTES,
    Finding,
    Progress,
    Verdict,
    check_between,
    check_cases,
    check_file,
    check_grids,
    check_place,
    inspect_case,
    judge,
    judge_cohort,
    raise_findings,
    run_parallel,
    subsample,
    voxel_digest,
)
from ssl3d.data.lungs import load_lungmask, weights_digest
from ssl3d.data.steps import CaseError, Intensity, Preparation, prepare_arrays
from ssl3d.data.volume import UnreadableError, Volume, read_unchecked
from ssl3d.errors import ConfigError, DataError, count, nearest
from ssl3d.files import remove_leftovers, write_json
from ssl3d.remedies import GIVE_MASK, RUN_AGAIN

logger = logging.getLogger(__name__)

PREPARATION_VERSION = 1
"""Part of every fingerprint; raised when a change of the code changes prepared voxels."""

Policy = Literal["refuse", "skip"]
"""What happens to bad cases: an error that lists all of them, or the others are used without them."""


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """One prepared case.

    Attributes:
        id, subject, subset, target, classes, value: as in :class:`ssl3d.data.cohort.Case`.
        has_label: whether a segmentation is stored.
        shape: (D, H, W) of the prepared volume.
        affine: (4, 4), prepared voxel index -> RAS+ mm.
        spacing_mm: isotropic spacing.
        source: the image file it was made from.
        native_shape, native_affine: grid of that file, as stored (see :func:`to_native_grid`).
    """

    id: str
    subject: str
    subset: Subset | None
    target: int | None
    has_label: bool
    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing_mm: float
    source: Path
    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    classes: tuple[int, ...] | None = None
    value: float | None = None

    @property
    def labelled(self) -> bool:
        """Whether a segmentation, a class or a number is known."""
        return self.has_label or any(known is not None for known in (self.target, self.classes, self.value))


class PreparedCohort:
    """A cohort of prepared volumes on disk, compressed (see :mod:`ssl3d.data.arrays`).

    Args:
        folder: made by :func:`prepare`.

    Attributes:
        folder: where it is.
        dataset: name of the data set.
        label_names: names of the structures; label value k is ``label_names[k - 1]``, 0 is background.
        label_values: what the source files hold for each of them.
        cases: the cases, in the order of the arrays.
        fingerprint: hash of source contents and parameters (64 hexadecimal digits); the same on
            every machine and wherever the files lie.
        preparation: the parameters.
        intensity: the scaling and offset that were applied.
        skipped: cases left out by the policy "skip": ``id``, ``path``, ``problem`` and ``fix`` of each.
        target_names: class -> name, for classification.
        records: what the manifest says of each case.

    Raises:
        DataError: the folder is not a complete prepared cohort.
    """

    def __init__(self, folder: Path) -> None:
        manifest = _read_manifest(folder)
        if manifest is None:
            raise DataError(f"{folder} is not a complete prepared cohort. Fix: prepare it again.")
        self.folder = folder
        self.dataset: str = manifest["dataset"]
        self.label_names: tuple[str, ...] = tuple(manifest["label_names"])
        self.label_values: tuple[int, ...] = tuple(manifest["label_values"])
        self.fingerprint: str = manifest["fingerprint"]
        self.preparation = Preparation.model_validate(manifest["preparation"])
        self.intensity = Intensity(**manifest["intensity"])
        self.skipped: list[dict[str, str]] = manifest.get("skipped", [])
        self.target_names = {int(k): str(v) for k, v in manifest.get("target_names", {}).items()}
        self.cases = [_prepared_case(record, self.preparation.spacing_mm) for record in manifest["cases"]]
        self.records: list[dict[str, Any]] = manifest["cases"]
        self._index = {case.id: i for i, case in enumerate(self.cases)}

    @property
    def num_classes(self) -> int:
        """Structures and background: the channels of a segmentation head."""
        return len(self.label_names) + 1

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def taken_for(self) -> str:
        """What the volumes were taken for, and how that was decided."""
        return f"{self.intensity.taken_for or self.intensity.scaling} ({self.intensity.rule})"

    def source_digests(self, i: int) -> tuple[str, str]:
        """Return hashes of the image file of case ``i`` and of its voxels (as they were in the file)."""
        record = self.records[i]
        return record["sources"]["image"]["sha256"], record["voxels"]["image"]

    def index(self, case_id: str) -> int:
        """Return the position of a case.

        Raises:
            DataError: no such case.
        """
        if case_id not in self._index:
            raise DataError(f'{self.dataset} has no case "{case_id}".{nearest(case_id, self._index)}')
        return self._index[case_id]

    def image(self, i: int, where: Where = ...) -> np.ndarray:
        """Return the image of case ``i``, or a box of it: (D, H, W) float32 in [0, 1]."""
        return read_array(self.folder / self.records[i]["arrays"]["image"]["name"], where)

    def label(self, i: int, where: Where = ...) -> np.ndarray:
        """Return the label of case ``i``, or a box of it: (D, H, W) uint8 in 0..K.

        Raises:
            DataError: the case has no label.
        """
        if not self.cases[i].has_label:
            raise DataError(
                f"Case {self.cases[i].id} of {self.dataset} has no label ({self.cases[i].source})."
            )
        return read_array(self.folder / self.records[i]["arrays"]["label"]["name"], where)


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
        left_out: what is wrong with entries that are no case (:func:`ssl3d.data.listing.list_cases`); as bad cases.
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


@dataclass(frozen=True)
class _Job:
    """The arguments of :func:`prepare` that stay the same while cases are left out."""

    dataset: Dataset
    preparation: Preparation
    cache_dir: Path
    workers: int | None
    progress: Progress | None
    max_bytes: int


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
    workers, progress, max_bytes = job.workers, job.progress, job.max_bytes
    sources = _identify(cases, job.cache_dir, workers, progress)
    fingerprint = _fingerprint(cases, sources, dataset, preparation)
    folder = job.cache_dir / f"{dataset.name}-{fingerprint[:16]}"
    manifest = _read_manifest(folder)
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
            return _build_case(case, source, dataset, preparation, intensity, folder, stem, max_bytes)

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
        write_json(folder / "manifest.json", manifest)
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
            write_json(folder / "manifest.json", manifest)
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
    manifest = _read_manifest(folder)
    if manifest is not None and manifest.get("skipped", []) != notes:
        write_json(folder / "manifest.json", {**manifest, "skipped": notes})


def _adopt(
    donor: tuple[Path, dict[str, Any]] | None,
    source: dict[str, Any],
    intensity: Intensity,
    folder: Path,
    stem: str,
) -> None:
    """Take over a case that was built in another folder with the same parameters, by hard links."""
    if donor is None or (folder / f"{stem}.json").is_file():
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
    write_json(folder / f"{stem}.json", {**record, "arrays": arrays})


def find_prepared(fingerprint: str, cache_dir: Path) -> PreparedCohort | None:
    """Return the stored cohort with this fingerprint, or None."""
    for folder in sorted(cache_dir.glob(f"*-{fingerprint[:16]}")):
        manifest = _read_manifest(folder)
        if manifest is not None and manifest["fingerprint"] == fingerprint:
            return PreparedCohort(folder)
    return None


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


def _identify(
    cases: Sequence[Case], cache_dir: Path, workers: int | None, progress: Progress | None
) -> list[dict[str, Any]]:
    """Return path, size, time and SHA-256 of the image and label of every case.

    A hash is taken from an earlier manifest where path, size and modification time are unchanged.
    """
    known: dict[tuple[str, int, int], str] = {}
    for path in cache_dir.glob("*/manifest.json"):
        try:
            records = json.loads(path.read_text(encoding="utf-8"))["cases"]
            files = [file for record in records for file in record["sources"].values() if file]
            known |= {(file["path"], file["size"], file["mtime_ns"]): file["sha256"] for file in files}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%s); its cohort is not reused", path, error)

    def identify(path: Path | None) -> dict[str, Any] | None:
        if path is None:
            return None
        size, mtime_ns = _stat(path)
        digest = known.get((str(path), size, mtime_ns)) or _digest(path)
        return {"path": str(path), "size": size, "mtime_ns": mtime_ns, "sha256": digest}

    def identify_case(case: Case) -> dict[str, Any]:
        files = {"image": identify(case.image), "label": identify(case.label)}
        return files if case.mask is None else {**files, "mask": identify(case.mask)}

    return run_parallel(identify_case, cases, workers, progress, "hashing")


def _files(path: Path) -> tuple[Path, ...]:
    """Return every file that a volume is made of: the slices of a series, a header and its voxels."""
    if path.is_dir() or image_suffix(path) is None:
        try:
            return series_files(path)
        except SeriesError:
            return (path,)  # the checks say what is wrong with it
    return tuple(dict.fromkeys((path, payload_of(path))))


def _stat(path: Path) -> tuple[int, int]:
    """Return bytes and time of the last change of all files of a volume."""
    status = [file.stat() for file in _files(path) if file.exists()]
    return sum(s.st_size for s in status), max((s.st_mtime_ns for s in status), default=0)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the SHA-256 of all files of a volume."""
    digests = []
    for part in _files(path):
        if part.is_file():
            with part.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _fingerprint(
    cases: Sequence[Case], sources: Sequence[dict[str, Any]], dataset: Dataset, preparation: Preparation
) -> str:
    parameters = preparation.model_dump(mode="json")
    if preparation.lungmask is not None:
        parameters["lungmask"] = weights_digest(preparation.lungmask)  # wherever the file lies
    identity = {
        "format": PREPARATION_VERSION,
        "dataset": [dataset.name, dataset.modality, dataset.intensity_offset],
        "labels": [sorted(dataset.label_index().items()), dataset.label_names()],
        "preparation": parameters,
        **({"reading": asdict(dataset.reading())} if dataset.reading() != ANY_READING else {}),
        "cases": [
            [case.id, case.subject, case.subset, case.target, *(f and f["sha256"] for f in source.values())]
            + [known for known in (case.classes, case.value) if known is not None]
            for case, source in zip(cases, sources, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a complete cohort: its arrays are there and as long as they were written."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = manifest["format"] == PREPARATION_VERSION and all(
            "voxels" in record and _arrays_exist(folder, record) for record in manifest["cases"]
        )
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); its cohort is built again", path, error)
        return None
    if not complete:
        logger.warning(
            "%s is of an earlier version, or arrays are missing or cut short; it is built again", path
        )
        return None
    return manifest


def _arrays_exist(folder: Path, record: dict[str, Any]) -> bool:
    files = [(folder / array["name"], array["bytes"]) for array in record["arrays"].values() if array]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def _prepared_case(record: dict[str, Any], spacing_mm: float) -> PreparedCase:
    return PreparedCase(
        id=record["id"], subject=record["subject"], subset=record["subset"], target=record["target"],
        has_label=record["arrays"]["label"] is not None, shape=tuple(record["shape"]),
        affine=np.array(record["affine"]), spacing_mm=spacing_mm,
        source=Path(record["sources"]["image"]["path"]),
        native_shape=tuple(record["native_shape"]), native_affine=np.array(record["native_affine"]),
        classes=None if record["classes"] is None else tuple(record["classes"]), value=record["value"],
    )  # fmt: skip


# --- intensity ------------------------------------------------------------------------------------


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
        findings, image, _ = inspect_case(case, job.dataset, max_bytes=job.max_bytes)
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


# --- one case -------------------------------------------------------------------------------------


def _build_case(
    case: Case,
    source: dict[str, Any],
    dataset: Dataset,
    preparation: Preparation,
    intensity: Intensity,
    folder: Path,
    stem: str,
    max_bytes: int,
) -> dict[str, Any] | list[Finding]:
    """Store one case, unless an earlier build did; return its record, or what is wrong with it."""
    note = folder / f"{stem}.json"
    if note.is_file():
        record = json.loads(note.read_text(encoding="utf-8"))
        if "voxels" in record and _arrays_exist(folder, record):
            return record | {"sources": source}
    offset = intensity.offset if intensity.scaling == "ct" else None
    findings, image, label = inspect_case(case, dataset, offset=offset, max_bytes=max_bytes)
    mask: np.ndarray | None = None
    if image is not None and preparation.crop == "mask":
        mask_findings, mask = _read_mask(case, image, replace(dataset.reading(), channel=None), max_bytes)
        findings += mask_findings
    if findings or image is None:
        return findings
    try:
        indices = None if label is None else _map_labels(label.data, dataset.label_index())
        data, indices, affine = prepare_arrays(image, indices, preparation, intensity, mask, max_bytes)
    except CaseError as error:
        return [Finding(case.image, error.problem, error.fix)]
    for file in filter(None, source.values()):
        if _stat(Path(file["path"])) != (file["size"], file["mtime_ns"]):
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
    write_json(note, record)  # last: a killed build repeats this case
    return record


def _read_mask(
    case: Case, image: Volume, reading: Reading, max_bytes: int
) -> tuple[list[Finding], np.ndarray | None]:
    """Return what is wrong with the mask of a case, and the mask (D, H, W) bool on the image's grid."""
    if case.mask is None:
        return [Finding(case.image, 'has no mask, which crop "mask" needs', GIVE_MASK())], None
    findings = check_file(case.mask, max_bytes=max_bytes, reading=reading)
    if findings:
        return findings, None
    try:
        mask = read_unchecked(case.mask, integers=True, reading=reading)
    except UnreadableError as error:
        return [error.finding], None
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
    from ssl3d.data.adapters import Folder

    offset = intensity.offset if intensity.scaling == "ct" else None
    case = Case(path.name, path.name, path)
    unlike_ct = intensity.taken_for in {"MR", "not CT in HU"}
    dataset = Folder().with_facts(**asdict(reading), modality="mr" if unlike_ct else "auto")
    findings, image, _ = inspect_case(case, dataset, offset=offset, max_bytes=max_bytes)
    if findings or image is None:
        return findings
    try:
        data, _, affine = prepare_arrays(image, None, preparation, intensity, max_bytes=max_bytes)
    except CaseError as error:
        return [Finding(path, error.problem, error.fix)]
    return image, data, affine
