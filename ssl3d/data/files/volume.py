"""Reading and writing volumes, in one orientation whatever the file.

Arrays are (D, H, W) = the x, y, z axes of the file after reorientation to RAS+: axis 0 runs from
left to right, axis 1 from posterior to anterior, axis 2 from inferior to superior (as closely as
an oblique scan allows: axes are permuted and flipped, never interpolated). Affines map voxel
indices to RAS+ millimetres, as in nibabel; NRRD and MetaImage (LPS+) are converted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data.cohort import ANY_READING, Reading
from ssl3d.data.files import dicom
from ssl3d.data.files.findings import Finding
from ssl3d.data.files.headers import AFFINES, HeaderError, nifti_affine, open_nifti, reason
from ssl3d.data.files.opened import OpenedFile
from ssl3d.data.files.payload import check_payload
from ssl3d.data.files.suffixes import image_suffix
from ssl3d.data.files.volume_file import VolumeFile
from ssl3d.errors import DataError, WriteError
from ssl3d.files import staged
from ssl3d.remedies import EXPORT, INTEGERS


class UnreadableError(Exception):
    """A file that passed the checks of its header and stream and still cannot be read as wanted."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume in RAS+ orientation.

    Attributes:
        data: (D, H, W), float32 for images, int32 for labels; a view in the memory order of the file.
        affine: (4, 4) float64, voxel index -> RAS+ mm.
        path: the file.
        native_affine: (4, 4), the same for the array as the file stores it.
        native_shape: the shape as the file stores it.
    """

    data: np.ndarray
    affine: np.ndarray
    path: Path
    native_affine: np.ndarray
    native_shape: tuple[int, int, int]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each array axis, in mm."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(d), float(h), float(w)


def read_unchecked(
    file: VolumeFile, opened: OpenedFile, *, integers: bool = False, reading: Reading = ANY_READING
) -> Volume:
    """Read a file that the checks have passed (:mod:`ssl3d.data.checks.file`).

    Args:
        file: the file.
        opened: an opening of it.
        integers: return int32 and refuse fractions, instead of float32.
        reading: what to take of a file that leaves a choice.

    Raises:
        UnreadableError: the reader refuses the file, or a label is not integral.
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    path = file.path
    try:
        if file.suffix is None:  # the checks have seen that it is DICOM
            series = dicom.open_series(path)
            data, affine = dicom.read_voxels(series), series.affine
        elif file.is_nifti:
            data, affine = _read_nifti(opened, file.suffix == ".nii.gz", integers, reading)
        else:
            data, affine = _read_itk(path, reading)
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        finding = Finding(path, f"is not a readable image: {reason(error)}", EXPORT())
        raise UnreadableError(finding) from error
    if integers:
        data = _to_integers(data, path)
    else:
        data = data.astype(np.float32, copy=False)
    orientation = io_orientation(affine)
    shape = (int(data.shape[0]), int(data.shape[1]), int(data.shape[2]))
    return Volume(
        data=apply_orientation(data, orientation),  # (D, H, W), RAS+
        affine=affine @ inv_ornt_aff(orientation, shape),
        path=path,
        native_affine=affine,
        native_shape=shape,
    )


LABEL_TOLERANCE = 1e-3
"""Largest distance of a stored label from the integer that it stands for.

Where labels are large, 2^-16 of the largest: a mask of floats that was written through the slope of a 16-bit header
comes back in steps of that size (1 as 1.0000153).
"""


def _to_integers(data: np.ndarray, path: Path) -> np.ndarray:
    if data.dtype.kind in "iub" and data.dtype.itemsize < 4:
        return data.astype(np.int32)
    limits = np.iinfo(np.int32)
    nearest = np.rint(data)
    # A comparison with NaN is false, so NaN counts as not integral.
    fits = (data >= limits.min) & (data <= limits.max)
    largest = float(np.abs(data[fits]).max(initial=0))
    fits &= np.abs(data - nearest) <= max(LABEL_TOLERANCE, largest * 2.0**-16)
    if not fits.all():
        example = data[~fits].flat[0]
        count = int((~fits).sum())
        problem = f"is not a label map: {count} voxels are not integers (for example {example:.8g})"
        raise UnreadableError(Finding(path, problem, INTEGERS()))
    return nearest.astype(np.int32)


def _read_nifti(
    opened: OpenedFile, compressed: bool, exact: bool, reading: Reading
) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and affine (RAS+) as stored; ``exact``: scale in float64, if there is a scale."""
    _, image = open_nifti(opened, compressed)
    dtype = None if exact else np.float32
    if math.prod(image.shape[3:]) > 1:  # (x, y, z, frames), or (x, y, z, 1, frames)
        chosen = tuple(reading.channel if edge > 1 else 0 for edge in image.shape[3:])
        data = np.asanyarray(image.dataobj[(slice(None),) * 3 + chosen], dtype=dtype)
    else:
        data = np.asanyarray(image.dataobj, dtype=dtype)
    data = data.reshape(data.shape[:3])  # (x, y, z, 1, ...) -> (x, y, z)
    return data, nifti_affine(image, reading.affine)


def _read_itk(path: Path, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels of one frame, x axis first, and affine (LPS+ -> RAS+) as stored."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    dimension, frame = image.GetDimension(), reading.channel or 0
    affine = np.eye(4)
    axes = np.reshape(image.GetDirection(), (dimension, dimension)) * np.array(image.GetSpacing())
    affine[:3, :3] = axes[:3, :3]
    affine[:3, 3] = image.GetOrigin()[:3]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = array[..., frame]  # ([t,] z, y, x, components) -> ([t,] z, y, x)
    while array.ndim > 3:  # (t, z, y, x) -> (z, y, x); of two axes of frames one has a single entry
        array = array[frame if len(array) > 1 else 0]
    return array.transpose(2, 1, 0), affine  # (z, y, x) -> (x, y, z)


def write_volume(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume as NIfTI.

    Args:
        path: ends in .nii or .nii.gz.
        data: (D, H, W); the type is kept, except bool (stored as uint8) and 64-bit integers (as int32).
        affine: (4, 4), voxel index -> RAS+ mm.

    Raises:
        DataError: another ending, or data that are not 3D.
    """
    import nibabel

    path = Path(path)
    if image_suffix(path) not in {".nii", ".nii.gz"}:
        raise DataError(f"Cannot write {path}: the format is NIfTI. Fix: end the name in .nii.gz or .nii.")
    if data.ndim != 3:
        raise DataError(f"Cannot write {path}: the array has shape {data.shape}. Fix: give one 3D volume.")
    if data.dtype == bool:
        data = data.astype(np.uint8)
    elif data.dtype.kind in "iu" and data.dtype.itemsize == 8:
        data = data.astype(np.int32)
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    with staged(path) as temporary:
        nibabel.save(image, temporary)
        _check_written(temporary, path)


def write_like(path: Path, data: np.ndarray, source: Path, affine: np.ndarray | None = None) -> None:
    """Write an array on the grid and in the format of an image file: orientation, spacing and origin kept.

    Args:
        path: has the ending of ``source``.
        data: the shape of ``source`` as stored (``Volume.native_shape``); an integer type.
        source: a NIfTI, NRRD or MetaImage file; of several frames the grid of one.
        affine: (4, 4) of a NIfTI whose sform and qform disagree, the right one: both become it.

    Raises:
        DataError: another ending than that of ``source``.
    """
    suffix = image_suffix(source)
    if image_suffix(path) != suffix:
        raise DataError(f"Cannot write {path}: {source} is {suffix}. Fix: give the name the same ending.")
    if suffix in {".nii", ".nii.gz"}:
        import nibabel

        image = nibabel.load(source)
        header = image.header.copy()  # sform, qform and their codes
        header.set_data_dtype(data.dtype)
        header["cal_min"] = header["cal_max"] = 0  # the display range of the image
        result = type(image)(data, None, header)
        if affine is not None:
            for name in AFFINES:
                code = int(header[f"{name}_code"])
                getattr(result, f"set_{name}")(affine, code or 1)
        with staged(path) as temporary:
            nibabel.save(result, temporary)
            _check_written(temporary, path)
        return
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(source))
    reader.ReadImageInformation()
    dimension = reader.GetDimension()
    result = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))  # (x, y, z) -> (z, y, x)
    result.SetSpacing(reader.GetSpacing()[:3])
    result.SetOrigin(reader.GetOrigin()[:3])
    result.SetDirection(np.reshape(reader.GetDirection(), (dimension, dimension))[:3, :3].ravel().tolist())
    write_itk(path, result)


def write_itk(path: Path, image: Any) -> None:
    """Write a SimpleITK image, compressed, and make sure that all of it is there.

    SimpleITK returns without an error when the disk is full.

    Raises:
        WriteError: it cannot be written.
    """
    import SimpleITK as sitk

    with staged(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise WriteError(
                f"{path} cannot be written: {reason(error)}. Fix: choose another place."
            ) from error
        _check_written(temporary, path)


def _check_written(temporary: Path, path: Path) -> None:
    """Read the file just written to its end.

    Raises:
        WriteError: not all of it is there.
    """
    try:
        findings = check_payload(temporary)
        problem = findings[0].problem if findings else None
    except HeaderError as error:
        problem = f"is not a readable image: {error}"
    if problem is not None:
        raise WriteError(f"{path} was not written whole (it {problem}). Fix: make room on its disk.")
