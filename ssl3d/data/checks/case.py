"""Checks of image files: everything that is wrong with a cohort is found at once, before any training.

A check returns :class:`Finding` objects and raises nothing, so that all bad files are listed
together; :func:`raise_findings` turns them into one error. The words of every problem and its
remedy are here and nowhere else, so they are the same in preparation, verification and training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from ssl3d.data.checks.file import read_checked
from ssl3d.data.checks.intensity import Verdict, check_not_hu, check_offset, judge, judge_cohort, subsample
from ssl3d.data.checks.voxels import check_grids, check_labels, check_voxels, voxel_digest
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.findings import MAX_BYTES, Finding
from ssl3d.data.files.volume_file import VolumeFiles
from ssl3d.data.people import may_be_one_person
from ssl3d.parallel import Progress, run_parallel
from ssl3d.remedies import (
    KEEP_ONE,
    ONE_PART,
    OWN_LABEL,
)

if TYPE_CHECKING:
    from ssl3d.data.files.volume import Volume


M = TypeVar("M")


# --- one file, before its voxels are read ---------------------------------------------------------


# --- voxels ---------------------------------------------------------------------------------------


# --- what a cohort is taken for ---------------------------------------------------------------------


# --- cases ----------------------------------------------------------------------------------------


def inspect_case(
    case: Case,
    dataset: Dataset,
    *,
    offset: float | None = None,
    max_bytes: int = MAX_BYTES,
    files: VolumeFiles | None = None,
) -> tuple[list[Finding], Volume | None, Volume | None]:
    """Read one case and check everything about it.

    Args:
        case: the case.
        dataset: its data set.
        offset: check that it fits the values of a CT; None: do not.
        max_bytes: largest volume allowed, in bytes as float32.
        files: what is known of the files already.

    Returns:
        The findings, the image and the label. Image and label are usable only without findings;
        one that could not be read, or does not exist, is None.
    """
    files = VolumeFiles() if files is None else files
    label: Volume | None = None
    reading = dataset.reading()
    of_label = replace(reading, channel=None)
    findings, image = read_checked(files[case.image], max_bytes=max_bytes, reading=reading)
    if image is not None:
        findings += check_voxels(image)
    if image is not None and not findings:
        if offset is not None:
            findings += check_offset(image, dataset, offset)
        elif dataset.modality == "mr":
            findings += check_not_hu(image, dataset)
    if case.label is not None:
        bad_label, label = read_checked(
            files[case.label], integers=True, max_bytes=max_bytes, reading=of_label
        )
        findings += bad_label if label is None else check_labels(label, dataset)
    if image is not None and label is not None:
        findings += check_grids(image, label)
    return [finding.of_layout(dataset.name) for finding in findings], image, label


@dataclass(frozen=True)
class Examined(Generic[M]):
    """One case after it was read.

    Attributes:
        case: the case.
        findings: what is wrong with it, also in comparison with the others.
        image_digest, label_digest: hashes of the voxels; None where they could not be read.
        verdict: what it was taken for; None where its modality and offset are known.
        measured: what the caller's function returned for the image and label; None with findings.
    """

    case: Case
    findings: tuple[Finding, ...]
    image_digest: str | None = None
    label_digest: str | None = None
    verdict: Verdict | None = None
    measured: M | None = None


def examine_cases(
    cases: Sequence[Case],
    dataset: Dataset,
    measure: Callable[[Volume, Volume | None], M] | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[Examined[M]]:
    """Read every file of ``cases`` once and find everything that is wrong with each and between them.

    Args:
        cases: the cases of one cohort.
        dataset: its adapter: label values, and for CT the intensity offset that is checked.
        measure: called with the image and label of every good case.
        workers: threads; None: one a core, 4 at most.
        progress: told about every case.
        max_bytes: largest volume allowed, in bytes as float32.
    """
    declared, is_ct = dataset.intensity_offset, dataset.modality == "ct"
    offset = declared if is_ct and declared != "auto" else None
    undecided = dataset.modality != "mr" and declared == "auto"

    def examine(case: Case) -> Examined[M]:
        findings, image, label = inspect_case(case, dataset, offset=offset, max_bytes=max_bytes)
        if findings or image is None:
            return Examined(case, tuple(findings))
        return Examined(
            case,
            (),
            voxel_digest(image),
            None if label is None or not label.data.any() else voxel_digest(label),
            judge(subsample(image.data), is_ct) if undecided else None,
            None if measure is None else measure(image, label),
        )

    examined = run_parallel(examine, cases, workers, progress, "checking")
    verdicts = {e.case: e.verdict for e in examined if e.verdict is not None}
    if verdicts:
        _, odd = judge_cohort(verdicts, is_ct)
        examined = [replace(e, findings=e.findings + tuple(odd.get(e.case, ()))) for e in examined]
    between = check_between({e.case: (e.image_digest, e.label_digest) for e in examined})
    return [replace(e, findings=e.findings + tuple(between.get(e.case, ()))) for e in examined]


def check_cases(
    cases: Sequence[Case],
    dataset: Dataset,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[Finding]:
    """Return the findings of :func:`examine_cases`, in the order of the cases."""
    examined: list[Examined[None]] = examine_cases(
        cases, dataset, workers=workers, progress=progress, max_bytes=max_bytes
    )
    return [finding for one in examined for finding in one.findings]


def check_between(
    digests: Mapping[Case, tuple[str | None, str | None]],
) -> dict[Case, list[Finding]]:
    """Compare the cases of a cohort with each other.

    Args:
        digests: case -> hashes of the voxels of image and (not empty) label, None where unknown.

    Returns:
        The findings of every case that has some: an image that another case has too, a label that
        belongs to another image, a subject in two parts of the release. Of a pair the later one.
    """
    findings: dict[Case, list[Finding]] = {}
    images: dict[str, Case] = {}
    labels: dict[str, Case] = {}
    parts: dict[str, Case] = {}
    for case, (image, label) in digests.items():
        found = []
        twin = images.setdefault(image, case) if image else case
        if twin is not case:
            same = twin.image == case.image
            problem = f"is listed as {twin.id} too" if same else f"has the same voxels as {twin.image}"
            found.append(Finding(case.image, problem, KEEP_ONE()))
        owner = labels.setdefault(label, case) if label else case
        shared = owner.label == case.label or owner.subject == case.subject
        if case.label and not shared and not may_be_one_person(owner.id, case.id):
            problem = f"has the same voxels as {owner.label}, the label of another image"
            found.append(Finding(case.label, problem, OWN_LABEL()))
        other = parts.setdefault(case.subject, case) if case.subset else case
        if other.subset != case.subset:
            problem = (
                f"is of subject {case.subject} for {case.subset}, who is also there for {other.subset} "
                f"({other.image.name})"
            )
            found.append(Finding(case.image, problem, ONE_PART()))
        if found:
            findings[case] = found
    return findings
