"""Checks of one file: its header, geometry and payload."""

from __future__ import annotations

from pathlib import Path

from ssl3d.data.cohort import ANY_READING, Reading
from ssl3d.data.files.dicom import SeriesError, is_dicom, open_series
from ssl3d.data.files.findings import MAX_BYTES, Finding, raise_findings
from ssl3d.data.files.headers import Header, HeaderError, read_header
from ssl3d.data.files.payload import _check_header, _check_payload, check_place
from ssl3d.data.files.suffixes import IMAGE_SUFFIXES, image_suffix
from ssl3d.data.files.volume import UnreadableError, Volume, read_unchecked
from ssl3d.remedies import CONVERT, COPY_AGAIN, EXPORT


def check_file(path: Path, *, max_bytes: int = MAX_BYTES, reading: Reading = ANY_READING) -> list[Finding]:
    """Check the header of a file, and that all that it promises is there, without allocating its voxels.

    The compressed stream is read to its end, so that its checksum and length are verified.

    Args:
        path: a NIfTI, NRRD or MetaImage file, or a DICOM series (see :mod:`ssl3d.data.files.dicom`).
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


def _check_series(path: Path, max_bytes: int, reading: Reading) -> list[Finding]:
    try:
        series = open_series(path)
    except SeriesError as error:
        return [Finding(path, error.problem, error.fix)]
    header = Header(series.shape, 1, 4, series.affine[:3, :3], path, 0, "raw", origin_mm=series.affine[:3, 3])
    return _check_header(path, header, max_bytes, reading)


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
    raise_findings(check_file(path, max_bytes=max_bytes, reading=reading))
    try:
        return read_unchecked(path, integers=integers, reading=reading)
    except UnreadableError as error:
        raise_findings([error.finding])
        raise  # never reached: there is a finding
