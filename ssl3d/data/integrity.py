"""Checks of image files: everything that is wrong with a cohort is found at once, before any training.

A check returns :class:`Finding` objects and raises nothing, so that all bad files are listed
together; :func:`raise_findings` turns them into one error. The words of every problem and its
remedy are here and nowhere else, so they are the same in preparation, verification and training.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np

from ssl3d.data.adapters import IMAGE_SUFFIXES, image_suffix
from ssl3d.data.cohort import ANY_READING, Case, Dataset, Reading
from ssl3d.data.dicom import SeriesError, is_dicom, open_series
from ssl3d.data.entries import leads_nowhere, not_a_file
from ssl3d.data.headers import Header, HeaderError, read_header
from ssl3d.data.people import may_be_one_person
from ssl3d.errors import DataError, count, printable
from ssl3d.remedies import (
    AFFINE,
    CHANNEL,
    CHANNEL_RANGE,
    CHECK_PATH,
    CONVERT,
    COPY_AGAIN,
    COPY_BOTH,
    EMPTY_LABEL,
    EXPORT,
    FETCH,
    GEOMETRY,
    KEEP_ONE,
    LABEL_GRID,
    LABEL_VALUES,
    LOOK_AFTER,
    MODALITY,
    NO_CT,
    OFFSET,
    ONE_PART,
    ORIGIN,
    OWN_LABEL,
    PUT_FILE,
    QFORM,
    REPLACE,
    SHRINK,
    SPLIT,
    STACK,
    TWO_CTS,
    TWO_KINDS,
    Fix,
)

if TYPE_CHECKING:
    from ssl3d.data.volume import Volume

MAX_BYTES = 4 * 2**30
"""Largest volume that is read by default, in bytes as float32."""

PLAUSIBLE_SPACING_MM = (0.01, 50.0)
"""Spacings outside are taken for an error of the header."""

GRID_TOLERANCE = 0.1
"""Largest distance between corresponding corners of an image and its label, in voxels."""

XFORM_TOLERANCE = 0.5
"""Largest distance between a corner under sform and under qform, in voxels (a quaternion of 32 bits
is good to about 0.0003 rad)."""

HU_AIR_BELOW = -200.0
"""First percentile below which values are taken for CT in HU."""

HU_OFFSET = 1024.0
"""What is added to HU."""

AIR_RANGE = (-300.0, 300.0)
"""Where air must be in a CT after the offset is added."""

TISSUE_RANGE = (700.0, 1700.0)
"""Where soft tissue and contrast-filled blood must be in a CT after the offset is added."""

LEAST_TISSUE = 0.01
"""Smallest part of the voxels in :data:`TISSUE_RANGE` where there is air."""

LEAST_TISSUE_ALONE = 0.8
"""Smallest part of the voxels in :data:`TISSUE_RANGE` where there is none: a volume cut inside the body."""

_SOFT, _FLANK = (
    (900.0, 1150.0),
    (500.0, 800.0),
)  # the peak of soft tissue and fat, and what lies darker than it

_CHUNK = 1 << 16

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what was done last)."""

T = TypeVar("T")
R = TypeVar("R")
M = TypeVar("M")


@dataclass(frozen=True, order=True)
class Finding:
    """One problem of one file.

    Attributes:
        path: the file.
        problem: what is wrong, completing "<path> ...".
        fix: what to do about it; made by a remedy, whose promise is tested.
    """

    path: Path
    problem: str
    fix: Fix

    def __str__(self) -> str:
        return printable(f"{self.path} {self.problem}. Fix: {self.fix}.")


def raise_findings(findings: Sequence[Finding], limit: int | None = 20) -> None:
    """Raise one error that lists every bad file; return if there is none.

    Args:
        findings: in any order; duplicates are listed once.
        limit: findings described in full; the files of the others are still named. None: all.

    Raises:
        DataError: if there is a finding.
    """
    unique = list(dict.fromkeys(findings))
    if not unique:
        return
    files = len({finding.path for finding in unique})
    shown = unique if limit is None else unique[:limit]
    lines = [f"{count(len(unique), 'problem')} in {count(files, 'file')}:"]
    lines += [f"  {finding}" for finding in shown]
    rest = list(dict.fromkeys(str(finding.path) for finding in unique[len(shown) :]))
    if rest:
        lines += [f"  and {len(unique) - len(shown)} more, in:", *(f"    {path}" for path in rest)]
    raise DataError("\n".join(lines))


# --- one file, before its voxels are read ---------------------------------------------------------


def check_file(path: Path, *, max_bytes: int = MAX_BYTES, reading: Reading = ANY_READING) -> list[Finding]:
    """Check the header of a file, and that all that it promises is there, without allocating its voxels.

    The compressed stream is read to its end, so that its checksum and length are verified.

    Args:
        path: a NIfTI, NRRD or MetaImage file, or a DICOM series (see :mod:`ssl3d.data.dicom`).
        max_bytes: largest volume allowed, in bytes as float32.
        reading: what to take of a file that leaves a choice.
    """
    if findings := check_place(path):
        return findings
    if path.is_dir() or (image_suffix(path) is None and is_dicom(path)):
        return _check_series(path, max_bytes, reading)
    if path.stat().st_size == 0:
        return [Finding(path, "is empty (0 bytes)", COPY_AGAIN())]
    if image_suffix(path) is None:
        endings = ", ".join(IMAGE_SUFFIXES)
        return [Finding(path, "is not of a format that is read", CONVERT(endings=endings))]
    try:
        header = read_header(path, reading.affine)
    except (HeaderError, OSError) as error:
        return [Finding(path, f"is not a readable image: {error}", EXPORT())]
    findings = _check_header(path, header, max_bytes, reading)
    return findings or _check_payload(path, header)


def check_place(path: Path) -> list[Finding]:
    """Check that a path leads to a file or folder; nothing is opened, so that nothing can wait for ever."""
    try:
        problem = not_a_file(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG and path.is_symlink():
            return [Finding(path, leads_nowhere(path) or "cannot be opened", FETCH())]
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return [Finding(path, "does not exist", CHECK_PATH())]
        return [
            Finding(
                path,
                f"cannot be opened: {error.strerror}",
                LOOK_AFTER(),
            )
        ]
    return [] if problem is None else [Finding(path, problem, PUT_FILE())]


def _check_series(path: Path, max_bytes: int, reading: Reading) -> list[Finding]:
    try:
        series = open_series(path)
    except SeriesError as error:
        return [Finding(path, error.problem, error.fix)]
    header = Header(series.shape, 1, 4, series.affine[:3, :3], path, 0, "raw", origin_mm=series.affine[:3, 3])
    return _check_header(path, header, max_bytes, reading)


def _check_header(
    path: Path, header: Header, max_bytes: int, reading: Reading = ANY_READING
) -> list[Finding]:
    size = " x ".join(map(str, header.shape))
    if min(header.shape, default=0) < 1:
        return [Finding(path, f"has a header that says its size is {size or 'nothing'}", COPY_AGAIN())]
    # Of a NIfTI one frame can be read without the others.
    alone = header.frames > 1 and image_suffix(path) in {".nii", ".nii.gz"}
    promised = header.voxels * 4 // (header.frames if alone else 1)
    if promised > max_bytes:
        problem = f"promises {size} voxels, {promised / 2**30:.3g} GiB (limit {max_bytes / 2**30:.3g} GiB)"
        return [Finding(path, problem, SHRINK())]
    if sum(edge > 1 for edge in (*header.shape[3:], header.channels)) > 1:
        per_voxel = f" with {header.channels} values a voxel" if header.channels > 1 else ""
        problem = f"is {len(header.shape)}D ({size}{per_voxel}), not one 3D volume"
        return [Finding(path, problem, SPLIT())]
    if header.frames > 1 and reading.channel is None:
        what = (
            f"is {len(header.shape)}D ({size})"
            if header.channels == 1
            else (f"has {header.channels} values a voxel ({size})")
        )
        return [Finding(path, f"{what}, not one 3D volume", CHANNEL(last=header.frames - 1))]
    if reading.channel is not None and reading.channel >= header.frames:
        problem = f"is {len(header.shape)}D ({size}), so it has no channel {reading.channel}"
        return [Finding(path, problem, CHANNEL_RANGE(last=header.frames - 1))]
    if len(header.shape) < 3 or min(header.shape[:3]) < 2:
        problem = f"is a single slice ({size}), not a 3D volume"
        return [Finding(path, problem, STACK())]
    assert header.axes_mm is not None  # it has three axes
    assert header.origin_mm is not None
    findings = _check_geometry(path, header.axes_mm, header.origin_mm)
    other = header.other_affine
    if findings and other is not None and reading.affine is None:
        # One of two affines is broken and the other one is whole: no need to write a header.
        if not _check_geometry(path, other[:3, :3], other[:3, 3]):
            problem = f"{findings[0].problem} under its sform, but not under its qform"
            findings = [Finding(path, problem, QFORM())]
    elif not findings and header.xform_gap > XFORM_TOLERANCE and reading.affine is None:
        problem = f"has an sform and a qform that disagree, by up to {header.xform_gap:.3g} voxels"
        findings = [Finding(path, problem, AFFINE())]
    return findings


def _check_geometry(path: Path, axes_mm: np.ndarray, origin_mm: np.ndarray) -> list[Finding]:
    """Check the (3, 3) steps in mm a voxel and the (3,) place of the first one."""
    fix = GEOMETRY()
    if not np.isfinite(axes_mm).all():
        return [Finding(path, "has NaN or infinite spacing or orientation in its header", fix)]
    if not np.isfinite(origin_mm).all():
        place = ", ".join(f"{value:g}" for value in origin_mm)
        fix = ORIGIN()
        return [Finding(path, f"has a NaN or infinite origin in its header ({place} mm)", fix)]
    spacing = np.linalg.norm(axes_mm, axis=0)  # (3,)
    text = " x ".join(f"{value:.4g}" for value in spacing)
    if (spacing == 0).any():
        return [Finding(path, f"has zero spacing in its header ({text} mm)", fix)]
    if abs(np.linalg.det(axes_mm / spacing)) < 1e-3:
        return [Finding(path, "has a singular affine: two of its axes point in the same direction", fix)]
    low, high = PLAUSIBLE_SPACING_MM
    if (spacing < low).any() or (spacing > high).any():
        return [Finding(path, f"has an implausible spacing of {text} mm (expected {low:g} to {high:g})", fix)]
    return []


def check_payload(path: Path) -> list[Finding]:
    """Check that all the voxels that a header promises are there, whatever else the header says.

    Raises:
        HeaderError: it has no header that can be read.
    """
    return _check_payload(path, read_header(path))


def _check_payload(path: Path, header: Header) -> list[Finding]:
    """Compare what is there with what the header promises."""
    promised = header.payload_bytes
    if (at_payload := check_place(header.payload)) and header.payload.is_symlink():
        return at_payload
    if not header.payload.is_file():
        problem = f"needs the file {header.payload.name}, which is missing"
        return [Finding(path, problem, COPY_BOTH())]
    if header.encoding == "raw":
        there = max(header.payload.stat().st_size - header.offset, 0)
        return [_truncated(path, there, promised, "bytes")] if there < promised else []
    if header.encoding == "text":
        with header.payload.open("rb") as file:
            file.seek(header.offset)
            words = sum(len(line.split()) for line in file)
        return [_truncated(path, words, header.voxels, "values")] if words < header.voxels else []
    # Some slack, for a file may carry data behind its voxels. Much more is not what the header describes.
    limit = 2 * promised + 64 * 2**20
    try:
        there, complete = _drain(header, limit)
    except (zlib.error, OSError) as error:
        return [Finding(path, f"is damaged: its compressed data cannot be read ({error})", COPY_AGAIN())]
    if there > limit:
        problem = f"decompresses to more than {limit} bytes, but its header promises {promised}"
        return [Finding(path, problem, COPY_AGAIN())]
    return [] if complete and there >= promised else [_truncated(path, there, promised, "bytes")]


def _truncated(path: Path, there: int, promised: int, unit: str) -> Finding:
    if there >= promised:
        return Finding(path, "is truncated: its compressed data stop before their checksum", COPY_AGAIN())
    return Finding(path, f"is truncated: {there} of {promised} {unit} are there", COPY_AGAIN())


def _drain(header: Header, limit: int) -> tuple[int, bool]:
    """Decompress a gzip or zlib stream to its end, or past ``limit``.

    Returns:
        The number of decompressed bytes, and whether the stream came to its proper end.

    Raises:
        zlib.error: it is damaged (checksum or length do not fit), or not such a stream.
    """
    total = 0
    with header.payload.open("rb") as file:
        file.seek(header.offset)
        data = file.read(_CHUNK)
        while True:  # one turn a member: gzip files may be concatenated
            member = zlib.decompressobj(32 + zlib.MAX_WBITS)  # 32: gzip or zlib, by the first bytes
            while not member.eof:
                if not data or total > limit:
                    return total, False
                total += len(member.decompress(data))  # at most 1032 times the chunk, whatever the file says
                data = b"" if member.eof else file.read(_CHUNK)
            data = member.unused_data + file.read(_CHUNK)
            if not data.startswith(b"\x1f\x8b"):  # the end of the file, or bytes that belong to nothing
                return total, True


# --- voxels ---------------------------------------------------------------------------------------


def check_voxels(image: Volume) -> list[Finding]:
    """Check the values of an image: finite, and not all the same."""
    bad = image.data.size - int(np.isfinite(image.data).sum())
    if bad:
        nan = int(np.isnan(image.data).sum())
        kinds = " and ".join(f"{n} {name}" for n, name in ((nan, "NaN"), (bad - nan, "infinite")) if n)
        return [Finding(image.path, f"has {kinds} voxels", REPLACE())]
    if image.data.min() == image.data.max():
        return [Finding(image.path, f"is constant: every voxel is {image.data.flat[0]:g}", COPY_AGAIN())]
    return []


@dataclass(frozen=True)
class Fit:
    """How well a volume looks like CT after an offset was added (see :func:`fit_offset`).

    Attributes:
        air: the first percentile, padding left out.
        tissue: the part of the voxels in :data:`TISSUE_RANGE`.
        below: the part of the voxels below 0, which become 0; padding left out.
        by: what fits: "air" (and tissue), "tissue" (there is no air), or "" (nothing).
    """

    air: float
    tissue: float
    below: float
    by: Literal["air", "tissue", ""]


def fit_offset(values: np.ndarray, offset: float) -> Fit:
    """Return whether stored values plus ``offset`` are those of CT with air near 0 and water near 1000.

    Where there is air, the first percentile (without a padding constant below air: scanners write -2000, -2048 or
    -3024 outside their circle) lies in :data:`AIR_RANGE`, and there is soft tissue: at least 1 % of the voxels lie in
    :data:`TISSUE_RANGE`, and as a peak, not as the tail of what is darker (which bone is, in a volume in HU to
    which nothing was added).

    A volume cut inside the body has no air: nearly all of it lies in :data:`TISSUE_RANGE`. Values of which many
    are near the smallest, which is 0, are those of MR with its background; and values that have air and tissue
    where they belong with an offset 1024 smaller are not without air.

    Args:
        values: stored values (N,), for example of :func:`subsample`.
        offset: what is added.
    """
    inside = _without_padding(values, offset)
    shifted = inside + np.float32(offset)
    air, tissue = float(np.percentile(shifted, 1)), _part(shifted, TISSUE_RANGE)
    by: Literal["air", "tissue", ""] = ""
    if AIR_RANGE[0] <= air <= AIR_RANGE[1]:
        peak, flank = (_part(shifted, span) / (span[1] - span[0]) for span in (_SOFT, _FLANK))
        by = "air" if tissue >= LEAST_TISSUE and peak >= 0.5 * flank else ""
    elif air > AIR_RANGE[1] and tissue >= LEAST_TISSUE_ALONE and not _has_dark_background(inside):
        by = "" if fit_offset(values, offset - HU_OFFSET).by == "air" else "tissue"
    return Fit(air, tissue, float((shifted < 0).mean()), by)


def _without_padding(values: np.ndarray, offset: float) -> np.ndarray:
    smallest = values.min()
    outside = values == smallest
    padded = smallest + offset < AIR_RANGE[0] and outside.mean() > 0.005 and not outside.all()
    return values[~outside] if padded else values


def _part(values: np.ndarray, span: tuple[float, float]) -> float:
    return float(((values >= span[0]) & (values <= span[1])).mean())


def _has_dark_background(values: np.ndarray) -> bool:
    """Whether nothing is negative and a tenth of the voxels are near 0: magnitudes with a background, as in MR."""
    return bool(values.min() > -1 and (values <= 0.1 * np.percentile(values, 99)).mean() >= 0.1)


def likely_offset(values: np.ndarray) -> float | None:
    """Return which of the usual offsets, 1024 (stored in HU) and 0 (air at 0), fits; air counts more than tissue."""
    fits = {offset: fit_offset(values, offset).by for offset in (HU_OFFSET, 0.0)}
    return next((offset for by in ("air", "tissue") for offset in fits if fits[offset] == by), None)


def check_offset(image: Volume, dataset: Dataset, offset: float) -> list[Finding]:
    """Check that adding ``offset`` to a CT puts air near 0, if there is any, and tissue near 1000."""
    values = subsample(image.data)
    fit = fit_offset(values, offset)
    if fit.by:
        return []
    problem = (
        f"does not look like CT with offset {offset:g}: after adding it, air (1st percentile) is at "
        f"{fit.air:.0f}, expected {AIR_RANGE[0]:.0f} to {AIR_RANGE[1]:.0f} where there is air, {fit.tissue:.0%} of the "
        f"voxels are soft tissue ({TISSUE_RANGE[0]:.0f} to {TISSUE_RANGE[1]:.0f}), and {fit.below:.0%} would be cut off "
        "below 0"
    )
    likely = likely_offset(values)
    if likely is None:
        return [Finding(image.path, problem, NO_CT())]
    return [Finding(image.path, problem, OFFSET(likely=f"{likely:g}", layout=dataset.name))]


def check_not_hu(image: Volume, dataset: Dataset) -> list[Finding]:
    """Check that an MR is not a CT in HU: magnitudes are not far below zero."""
    darkest = float(np.percentile(subsample(image.data), 1))
    if darkest >= HU_AIR_BELOW:
        return []
    problem = f"does not look like MR: its first percentile is {darkest:.0f}, as in a CT in HU"
    return [Finding(image.path, problem, MODALITY())]


# --- what a cohort is taken for ---------------------------------------------------------------------

Kind = Literal["CT in HU", "CT with air at 0", "not CT in HU"]


@dataclass(frozen=True)
class Verdict:
    """What one volume was taken for.

    Attributes:
        kind: the kind; None for one that is said to be CT and looks like none.
        darkest: its first percentile, in stored units.
        by: "air" or "tissue", see :class:`Fit`; "" where it is no CT.
    """

    kind: Kind | None
    darkest: float
    by: str


def judge(values: np.ndarray, is_ct: bool) -> Verdict:
    """Say what a volume is, by its values alone.

    Args:
        values: stored values (N,).
        is_ct: the user or the data say that it is CT. If not, one without air is taken for CT in HU only where
            values below 0 show that they have a unit: fat and noise in HU are negative, magnitudes of MR are not.
    """
    darkest = float(np.percentile(values, 1))
    if is_ct:
        likely = likely_offset(values)
        if likely is None:
            return Verdict(None, darkest, "")
        return Verdict(
            "CT in HU" if likely == HU_OFFSET else "CT with air at 0", darkest, fit_offset(values, likely).by
        )
    fit = fit_offset(values, HU_OFFSET)
    # Fat below 0 among values that vary by more than those of a standardised MR, or a corner with some air.
    has_unit = (darkest <= -10 and values.std() >= 8) or (values < HU_AIR_BELOW).mean() >= 1e-4
    if darkest < HU_AIR_BELOW or (fit.by == "tissue" and has_unit):
        return Verdict("CT in HU", darkest, fit.by)
    return Verdict("not CT in HU", darkest, "")


def judge_cohort(verdicts: Mapping[Case, Verdict], is_ct: bool) -> tuple[Kind, dict[Case, list[Finding]]]:
    """Say what a cohort is taken for: what most of its volumes are; the others are findings.

    Args:
        verdicts: of every case that could be read; at least one.
        is_ct: as in :func:`judge`.

    Returns:
        The kind, and the findings of the cases that are of another; the first of them lists which are which.
    """
    kinds: dict[Kind, list[Case]] = {}
    for case, verdict in verdicts.items():
        if verdict.kind is not None:
            kinds.setdefault(verdict.kind, []).append(case)
    order: tuple[Kind, ...] = ("CT in HU", "CT with air at 0", "not CT in HU")
    kind = max(kinds, key=lambda k: (len(kinds[k]), -order.index(k))) if kinds else order[0]
    findings: dict[Case, list[Finding]] = {}
    for case, verdict in verdicts.items():
        if verdict.kind is None:
            problem = (
                f"does not look like CT: its first percentile is {verdict.darkest:.4g}, and neither 1024 nor 0 added "
                "puts air and tissue where they belong"
            )
            findings[case] = [Finding(case.image, problem, NO_CT())]
        elif verdict.kind != kind:
            other = verdicts[kinds[kind][0]]
            problem = (
                f"is {verdict.kind} (first percentile {verdict.darkest:.4g}), but {len(kinds[kind])} of the "
                f"{len(verdicts)} volumes are {kind} (for example {kinds[kind][0].image}: {other.darkest:.4g})"
            )
            fix = TWO_CTS() if is_ct else TWO_KINDS()
            if len(kinds) > 1 and not findings:
                lists = "; ".join(f"{k}: {_names(kinds[k])}" for k in order if k in kinds)
                problem += f"; two kinds in one cohort: {lists}"
            findings[case] = [Finding(case.image, problem, fix)]
    return kind, findings


def _names(cases: Sequence[Case], limit: int = 50) -> str:
    more = f" and {len(cases) - limit} more" if len(cases) > limit else ""
    return ", ".join(case.image.name for case in cases[:limit]) + more


def subsample(data: np.ndarray, size: int = 1_000_000) -> np.ndarray:
    """Return ``size`` values of the volume, or all if it has no more: (N,); always the same ones."""
    flat = data.ravel(order="K")  # no copy, whatever the order of the axes in memory
    if flat.size <= size:
        return flat
    # Not every n-th: a step that divides the last axis would see a single slice.
    return flat[np.random.default_rng(0).integers(0, flat.size, size)]


def check_labels(label: Volume, dataset: Dataset) -> list[Finding]:
    """Check that a label holds no value unknown to ``dataset``, and something besides background."""
    known = dataset.label_index()
    values = set(np.unique(label.data).tolist())
    unknown = sorted(values - known.keys())
    if not unknown:
        if dataset.empty_labels or any(known[value] for value in values):
            return []
        problem = "is an empty label: it holds no structure, only background"
        return [Finding(label.path, problem, EMPTY_LABEL())]
    names = ", ".join(map(str, unknown[:10])) + ", ..." * (len(unknown) > 10)
    wanted = ", ".join(map(str, sorted({0, *dataset.label_values, *dataset.label_aliases})))
    problem = f"holds label values that {dataset.name} does not know: {names} (known: {wanted})"
    return [Finding(label.path, problem, LABEL_VALUES())]


def check_grids(image: Volume, label: Volume) -> list[Finding]:
    """Check that an image and its label lie on the same grid, within :data:`GRID_TOLERANCE` voxels."""
    name = image.path.name
    fix = LABEL_GRID(image=name)
    if image.data.shape != label.data.shape:
        ours, theirs = (" x ".join(map(str, volume.data.shape)) for volume in (label, image))
        return [Finding(label.path, f"has {ours} voxels, but its image {name} has {theirs}", fix)]
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)], dtype=float)
    corners[:, :3] *= np.array(image.data.shape) - 1  # (8, 4)
    apart_mm = float(np.linalg.norm(corners @ (image.affine - label.affine).T, axis=1).max())
    if apart_mm <= GRID_TOLERANCE * min(image.spacing_mm):
        return []
    problem = f"lies on another grid than its image {name}: corners are up to {apart_mm:.3g} mm apart"
    return [Finding(label.path, problem, fix)]


# --- cases ----------------------------------------------------------------------------------------


def inspect_case(
    case: Case, dataset: Dataset, *, offset: float | None = None, max_bytes: int = MAX_BYTES
) -> tuple[list[Finding], Volume | None, Volume | None]:
    """Read one case and check everything about it.

    Args:
        case: the case.
        dataset: its data set.
        offset: check that it fits the values of a CT; None: do not.
        max_bytes: largest volume allowed, in bytes as float32.

    Returns:
        The findings, the image and the label. Image and label are usable only without findings;
        one that could not be read, or does not exist, is None.
    """
    from ssl3d.data import volume  # volume builds on the checks of this module

    image: Volume | None = None
    label: Volume | None = None
    reading = dataset.reading()
    of_label = replace(reading, channel=None)
    findings = check_file(case.image, max_bytes=max_bytes, reading=reading)
    if not findings:
        try:
            image = volume.read_unchecked(case.image, reading=reading)
            findings += check_voxels(image)
        except volume.UnreadableError as error:
            findings.append(error.finding)
    if image is not None and not findings:
        if offset is not None:
            findings += check_offset(image, dataset, offset)
        elif dataset.modality == "mr":
            findings += check_not_hu(image, dataset)
    if case.label is not None:
        bad_label = check_file(case.label, max_bytes=max_bytes, reading=of_label)
        if not bad_label:
            try:
                label = volume.read_unchecked(case.label, integers=True, reading=of_label)
                bad_label = check_labels(label, dataset)
            except volume.UnreadableError as error:
                bad_label = [error.finding]
        findings += bad_label
    if image is not None and label is not None:
        findings += check_grids(image, label)
    return findings, image, label


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


def voxel_digest(volume: Volume) -> str:
    """Return a hash of shape and voxels in RAS+ orientation, the same for every file format."""
    data = np.ascontiguousarray(volume.data)
    digest = hashlib.blake2b(str((data.shape, data.dtype.str)).encode(), digest_size=16)
    digest.update(data.data)
    return digest.hexdigest()


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


def run_parallel(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int | None = None,
    progress: Progress | None = None,
    message: str = "",
) -> list[R]:
    """Apply ``function`` to every item in threads; results come in the order of the items.

    Threads are enough: decompression, filtering and interpolation release the interpreter's lock.
    An exception stops what has not started and is raised.
    """
    results: list[R] = []
    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in futures:
                results.append(future.result())
                if progress is not None:
                    progress(len(results), len(items), message)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results
