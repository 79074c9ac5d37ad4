"""Checks of one file: its header, geometry and payload."""

from __future__ import annotations

from pathlib import Path

from ssl3d.data.cohort import ANY_READING, Reading
from ssl3d.data.files.dicom import SeriesError, is_dicom, open_series
from ssl3d.data.files.findings import MAX_BYTES, Finding, raise_findings
from ssl3d.data.files.headers import Header, HeaderError
from ssl3d.data.files.limits import look
from ssl3d.data.files.opened import OpenedFile
from ssl3d.data.files.payload import _check_header, _check_payload, check_place
from ssl3d.data.files.suffixes import IMAGE_SUFFIXES
from ssl3d.data.files.volume import UnreadableError, Volume, read_unchecked
from ssl3d.data.files.volume_file import VolumeFile
from ssl3d.memory import NO_ROOM, explained
from ssl3d.remedies import CONVERT, COPY_AGAIN, EXPORT


def check_file(path: Path, *, max_bytes: int = MAX_BYTES, reading: Reading = ANY_READING) -> list[Finding]:
    """Check the header of a file, and that all that it promises is there, without allocating its voxels.

    The compressed stream is read to its end, so that its checksum and length are verified.

    Args:
        path: a NIfTI, NRRD or MetaImage file, or a DICOM series (see :mod:`ssl3d.data.files.dicom`).
        max_bytes: largest volume allowed, in bytes as float32.
        reading: what to take of a file that leaves a choice.
    """
    with OpenedFile(path) as opened:
        return _check(VolumeFile(path), opened, max_bytes, reading)


def read_checked(
    file: VolumeFile, *, integers: bool = False, max_bytes: int = MAX_BYTES, reading: Reading = ANY_READING
) -> tuple[list[Finding], Volume | None]:
    """Check a file as :func:`check_file` does and read it, in one opening.

    A file that was checked before, and has not changed since, is not checked again.

    Args:
        file: the file.
        integers: return int32 and refuse fractions, instead of float32.
        max_bytes: largest volume allowed, in bytes as float32.
        reading: what to take of a file that leaves a choice.

    Returns:
        What is wrong with it, and the volume; None with findings.
    """
    with OpenedFile(file.path) as opened:
        if findings := _check(file, opened, max_bytes, reading):
            return findings, None
        try:
            with explained(str(file.path), NO_ROOM):
                return [], read_unchecked(file, opened, integers=integers, reading=reading)
        except UnreadableError as error:
            return [error.finding], None


def _check(file: VolumeFile, opened: OpenedFile, max_bytes: int, reading: Reading) -> list[Finding]:
    path = file.path
    if findings := check_place(path):
        return findings
    if path.is_dir() or (file.suffix is None and is_dicom(path)):
        return _check_series(file, max_bytes, reading)
    if path.stat().st_size == 0:
        return [Finding(path, "is empty (0 bytes)", COPY_AGAIN())]
    if file.suffix is None:
        endings = ", ".join(IMAGE_SUFFIXES)
        return [Finding(path, "is not of a format that is read", CONVERT(endings=endings))]
    if file.has_passed(max_bytes, reading):
        return []
    if findings := look(path):
        return findings
    state = file.state()
    try:
        header = file.header(reading.affine, opened)
    except (HeaderError, OSError) as error:
        return [Finding(path, f"is not a readable image: {error}", EXPORT())]
    findings = _check_header(file, header, max_bytes, reading) or _check_payload(opened, header)
    if not findings:
        file.pass_as(state, max_bytes, reading)
    return findings


def _check_series(file: VolumeFile, max_bytes: int, reading: Reading) -> list[Finding]:
    path = file.path
    try:
        series = open_series(path)
    except SeriesError as error:
        return [Finding(path, error.problem, error.fix)]
    header = Header(series.shape, 1, 4, series.affine[:3, :3], path, 0, "raw", origin_mm=series.affine[:3, 3])
    return _check_header(file, header, max_bytes, reading)


def read_volume(path: Path, *, max_bytes: int = MAX_BYTES, reading: Reading = ANY_READING) -> Volume:
    """Read an image as float32, in the stored units (NIfTI slope and intercept applied).

    Args:
        path: a NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr) or MetaImage (.mha, .mhd) file, or a DICOM
            series: its folder or one of its slices.
        max_bytes: largest volume allowed, in bytes as float32.
        reading: what to take of a file that leaves a choice.

    Raises:
        DataError: the file is missing, damaged, not 3D, or too large (see ``integrity.check_file``).
    """
    return _read(Path(path), False, max_bytes, reading)


def read_labels(path: Path, *, max_bytes: int = MAX_BYTES) -> Volume:
    """Read a segmentation as int32, in the stored values.

    Raises:
        DataError: as :func:`read_volume`, or a value that is not an integer.
    """
    return _read(Path(path), True, max_bytes, ANY_READING)


def _read(path: Path, integers: bool, max_bytes: int, reading: Reading) -> Volume:
    findings, volume = read_checked(VolumeFile(path), integers=integers, max_bytes=max_bytes, reading=reading)
    raise_findings(findings)
    assert volume is not None  # there is no finding
    return volume
