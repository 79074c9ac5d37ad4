"""DICOM series: many files, one volume. Read by GDCM through SimpleITK, compressed syntaxes included.

A series is named by any one of its slices, or by its folder where that holds no other. SimpleITK's
own series reader takes the spacing from the first two slices and the orientation of the first, so a
missing slice or a tilted gantry passes in silence, and GDCM drops slices whose files are cut short;
here the slices are put in order by their positions and every one of them is looked at (:func:`check_series` in the words of
:mod:`ssl3d.data.checks.case`). Rescale slope and intercept are applied slice by slice, as the standard
has it (PS3.3 C.11.1), because PET scanners write another slope into every slice.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.remedies import (
    ADD_SLICES,
    COPY_FILE,
    COPY_OR_OUT,
    COPY_SERIES,
    COPY_SLICES,
    DCM2NIIX,
    EQUAL_STEPS,
    EXPORT_SERIES,
    HOLDS_NONE,
    NAME_SERIES,
    NO_SCAN,
    NOT_A_LABEL,
    OF_SCANNER,
    ONE_VOLUME,
    OWN_SERIES,
    STRAIGHTEN,
    TAKE_OUT,
    Fix,
)

TILT_TOLERANCE_DEG = 0.5
"""Angle between the normal of the slices and their line of centres above which a gantry was tilted."""

STEP_TOLERANCE = 0.05
"""Part of the usual step by which steps between slices may differ (positions are rounded when written)."""

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_NOT_SCANS = {
    "1.2.840.10008.1.3.10": "the index of a disc",
    f"{_STORAGE}481.2": "a radiotherapy dose",
    f"{_STORAGE}481.3": "a radiotherapy structure set",
    f"{_STORAGE}481.5": "a radiotherapy plan",
    f"{_STORAGE}481": "a radiotherapy object",
    f"{_STORAGE}66.1": "a registration",
    f"{_STORAGE}66.3": "a registration",
    f"{_STORAGE}66.4": "a segmentation",
    f"{_STORAGE}66.5": "a surface segmentation",
    f"{_STORAGE}66": "raw data",
    f"{_STORAGE}88": "a structured report",
    f"{_STORAGE}11": "a presentation state",
    f"{_STORAGE}104": "a document",
    f"{_STORAGE}9": "a waveform",
}
"""SOP classes (PS3.6, annex A) that are no image of a patient; a class covers those below it."""


class SeriesError(ValueError):
    """A series that cannot be used; the message completes "<path> ..."."""

    def __init__(self, problem: str, fix: Fix) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


@dataclass(frozen=True, eq=False)
class Slice:
    """What the header of one slice says.

    Attributes:
        path: the file.
        shape: (columns, rows).
        frames, samples: more than 1 for multi-frame and colour images.
        spacing_mm: (2,) steps in mm along a row and along a column.
        directions: (2, 3) unit vectors along a row and along a column, LPS+.
        position_mm: (3,) centre of the first voxel, LPS+.
    """

    path: Path
    shape: tuple[int, int]
    frames: int
    samples: int
    spacing_mm: np.ndarray
    directions: np.ndarray
    position_mm: np.ndarray


@dataclass(frozen=True, eq=False)
class Series:
    """Slices in order, with their geometry.

    Attributes:
        slices: sorted along ``normal``.
        affine: (4, 4), index (column, row, slice) -> RAS+ mm.
    """

    slices: tuple[Slice, ...]
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(columns, rows, slices)."""
        return (*self.slices[0].shape, len(self.slices))


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM preamble (PS3.10: "DICM" after 128 bytes)."""
    try:
        if not path.is_file():  # a pipe would wait for ever, a device has no end
            return False
        with path.open("rb") as file:
            file.seek(128)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def not_a_scan(path: Path) -> str | None:
    """Return what a DICOM file is, such as "a radiotherapy dose", or None for images and unknown classes.

    Read from the file meta information, which has one encoding in all files (PS3.10, 7.1: explicit VR,
    little endian), so it is known where GDCM cannot parse the rest.
    """
    with path.open("rb") as file:
        meta = file.read(4096)[132:]  # after preamble and "DICM"
    while len(meta) >= 8:
        group, element = struct.unpack("<HH", meta[:4])
        if group != 2:
            break
        wide = meta[4:6] in {b"OB", b"UN"}  # two bytes are reserved, then 32 bits of length
        start, length = (
            (12, int.from_bytes(meta[8:12], "little")) if wide else (8, int.from_bytes(meta[6:8], "little"))
        )
        if element == 2:
            uid = meta[start : start + length].decode("ascii", "replace").strip(" \0")
            while uid:
                if uid in _NOT_SCANS:
                    return _NOT_SCANS[uid]
                uid = uid.rpartition(".")[0]
        meta = meta[start + length :]
    return None


def series_of(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Return the series whose slices lie in ``folder``: unique id -> files, sorted by name.

    What is no scan (:func:`not_a_scan`) is left out.
    """
    return _series_of(folder.absolute(), folder.stat().st_mtime_ns)


@lru_cache(maxsize=4096)
def _series_of(folder: Path, changed_ns: int) -> dict[str, tuple[Path, ...]]:
    sitk = _sitk()
    try:
        ids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        names = {i: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), i) for i in ids}
        series = {i: tuple(sorted(Path(name) for name in files)) for i, files in names.items()}
    except RuntimeError:  # one file (a dose of a single frame) can stop GDCM's scan of the whole folder
        series = _series_by_file(folder)
    series = {uid: files for uid, files in series.items() if not_a_scan(files[0]) is None}
    return dict(sorted(series.items(), key=lambda item: item[1][0]))


def _series_by_file(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Do what GDCM's scan does, file by file, leaving out those whose header GDCM cannot read."""
    reader = _sitk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    series: dict[str, tuple[Path, ...]] = {}
    for file in sorted(folder.iterdir()):
        if not file.is_file() or not is_dicom(file):
            continue
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            continue
        uid = reader.GetMetaData("0020|000e").strip(" \0") if reader.HasMetaDataKey("0020|000e") else ""
        series[uid] = (*series.get(uid, ()), file)
    return series


def unreadable_in(folder: Path) -> list[Path]:
    """Return the DICOM files in ``folder`` that may be slices but belong to no series: GDCM cannot parse them."""
    known = {file for files in series_of(folder).values() for file in files}
    files = (file for file in sorted(folder.absolute().iterdir()) if file.is_file() and file not in known)
    return [file for file in files if is_dicom(file) and not_a_scan(file) is None]


def series_files(path: Path) -> tuple[Path, ...]:
    """Return the slices of the series that ``path`` names.

    Args:
        path: a slice, or a folder with the slices of one series.

    Raises:
        SeriesError: not DICOM, or a folder with several series.
    """
    if not path.is_dir():
        for files in series_of(path.parent).values():
            if path.absolute() in files:
                return files
        kind = not_a_scan(path) if is_dicom(path) else None
        if kind is not None:
            raise SeriesError(f"is {kind}, not a scan", NOT_A_LABEL())
        raise SeriesError("is not a readable image: it is not DICOM", TAKE_OUT())
    series = series_of(path)
    if not series:
        raise SeriesError("is a folder, not an image, and holds no DICOM series", HOLDS_NONE())
    if len(series) > 1:
        counts = ", ".join(f"{files[0].name} ({len(files)} slices)" for files in series.values())
        raise SeriesError(
            f"holds {len(series)} DICOM series, one of each starting at: {counts}",
            NAME_SERIES(),
        )
    return next(iter(series.values()))


def open_series(path: Path) -> Series:
    """Read the headers of a series and put its slices in order.

    Args:
        path: a slice, or a folder with the slices of one series.

    Raises:
        SeriesError: the slices do not make one volume: says which and why.
    """
    again = EXPORT_SERIES()
    damaged = unreadable_in(path if path.is_dir() else path.parent)
    if path.absolute() in damaged:
        raise SeriesError("is damaged or truncated: its DICOM data cannot be parsed", COPY_FILE())
    if damaged:
        raise SeriesError(
            f"may lack a slice: {', '.join(file.name for file in damaged[:5])} in its folder is damaged or truncated",
            COPY_OR_OUT(),
        )
    slices = [_read_slice(file) for file in series_files(path)]
    first = slices[0]
    if max(s.frames for s in slices) > 1:
        raise SeriesError("is a multi-frame DICOM", DCM2NIIX())
    if max(s.samples for s in slices) > 1:
        raise SeriesError(f"has {first.samples} values a voxel (colour)", NO_SCAN())
    if len(slices) == 1:
        raise SeriesError(
            f"is a single slice ({first.shape[0]} x {first.shape[1]}), not a 3D volume",
            ADD_SLICES(),
        )
    for other in slices[1:]:
        if other.shape != first.shape:
            sizes = " and ".join("{} x {}".format(*s.shape) for s in (first, other))
            raise SeriesError(f"mixes slices of {sizes} ({first.path.name}, {other.path.name})", again)
        if np.abs(other.directions - first.directions).max() > 1e-3:
            raise SeriesError(
                f"mixes slices of different orientation ({first.path.name}, {other.path.name})",
                OWN_SERIES(),
            )
        if np.abs(other.spacing_mm - first.spacing_mm).max() > 1e-3:
            raise SeriesError(
                f"mixes slices of different pixel spacing ({first.path.name}, {other.path.name})", again
            )
    normal = np.cross(*first.directions)
    slices.sort(key=lambda s: float(s.position_mm @ normal))
    positions = np.stack([s.position_mm for s in slices])  # (N, 3)
    depths = positions @ normal  # (N,)
    steps = np.diff(depths)
    usual = float(np.median(steps))
    twice = int((steps < STEP_TOLERANCE * max(usual, 1e-6)).sum())
    if usual <= 0 or twice:
        pair = int(np.argmin(steps))
        raise SeriesError(
            f"has {twice + 1} or more slices at one position ({slices[pair].path.name}, "
            f"{slices[pair + 1].path.name}): time points, echoes or a copy",
            ONE_VOLUME(),
        )
    gaps = np.flatnonzero(steps > (1 + STEP_TOLERANCE) * usual)
    if len(gaps):
        missing = int(sum(max(1, round(steps[g] / usual) - 1) for g in gaps))
        g = int(gaps[0])
        raise SeriesError(
            f"misses about {missing} slice{'s' * (missing > 1)}: {steps[g]:.4g} mm between {slices[g].path.name} and "
            f"{slices[g + 1].path.name}, elsewhere {usual:.4g} mm",
            COPY_SLICES(),
        )
    if (steps < (1 - STEP_TOLERANCE) * usual).any():
        raise SeriesError(
            f"has steps of {steps.min():.4g} to {steps.max():.4g} mm between its slices",
            EQUAL_STEPS(),
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > TILT_TOLERANCE_DEG:
        raise SeriesError(
            f"was scanned with a gantry tilt of {tilt:.1f} degrees: its slices are sheared",
            STRAIGHTEN(),
        )
    affine = np.eye(4)
    affine[:3, :2] = (first.directions * first.spacing_mm[:, None]).T
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return Series(tuple(slices), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)  # LPS+ -> RAS+


def read_voxels(series: Series) -> np.ndarray:
    """Return the voxels (columns, rows, slices) float32, each slice rescaled by its own slope.

    Raises:
        RuntimeError: GDCM cannot decode a slice.
    """
    sitk = _sitk()
    data = np.empty(series.shape, dtype=np.float32)
    for k, one in enumerate(series.slices):
        image = sitk.ReadImage(str(one.path), sitk.sitkFloat32, imageIO="GDCMImageIO")
        data[:, :, k] = sitk.GetArrayFromImage(image).reshape(one.shape[::-1]).T  # (rows, columns) -> (x, y)
    return data


def _read_slice(path: Path) -> Slice:
    sitk = _sitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    broken = COPY_SERIES()
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise SeriesError(f"has a slice whose header cannot be read ({path.name})", broken) from None

    def value(tag: str) -> str:
        return str(reader.GetMetaData(tag)).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int, name: str) -> np.ndarray:
        parts = value(tag).split("\\")
        try:
            found = np.array([float(part) for part in parts])
        except ValueError:
            found = np.empty(0)
        if found.shape != (count,) or not np.isfinite(found).all():
            raise SeriesError(f"has a slice without {name} ({path.name})", OF_SCANNER())
        return found

    frames = int(value("0028|0008") or 1)
    samples = int(value("0028|0002") or 1)
    rows, columns = (int(value(tag) or 0) for tag in ("0028|0010", "0028|0011"))
    spacing, directions = np.ones(2), np.eye(3)[:2]
    position = np.zeros(3)
    if frames == 1 and samples == 1:
        row_step, column_step = numbers("0028|0030", 2, "Pixel Spacing")
        spacing = np.array([column_step, row_step])  # the standard names the distance of rows first
        directions = numbers("0020|0037", 6, "Image Orientation (Patient)").reshape(2, 3)
        position = numbers("0020|0032", 3, "Image Position (Patient)")
    return Slice(path, (columns, rows), frames, samples, spacing, directions, position)


def _sitk() -> Any:
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()  # GDCM would print about every file that is not DICOM
    return sitk
