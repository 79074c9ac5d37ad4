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

from ssl3d.data import dicom
from ssl3d.data.adapters import image_suffix
from ssl3d.data.cohort import ANY_READING, Reading
from ssl3d.data.headers import HeaderError, reason
from ssl3d.data.integrity import MAX_BYTES, Finding, check_file, check_payload, raise_findings
from ssl3d.errors import DataError, WriteError
from ssl3d.files import staged


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


def read_unchecked(path: Path, *, integers: bool = False, reading: Reading = ANY_READING) -> Volume:
    """Read a file that ``integrity.check_file`` has passed.

    Args:
        path: the file.
        integers: return int32 and refuse fractions, instead of float32.
        reading: what to take of a file that leaves a choice.

    Raises:
        UnreadableError: the reader refuses the file, or a label is not integral.
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    try:
        suffix = image_suffix(path)
        if suffix is None:  # the checks have seen that it is DICOM
            series = dicom.open_series(path)
            data, affine = dicom.read_voxels(series), series.affine
        else:
            nifti = suffix in {".nii", ".nii.gz"}
            data, affine = _read_nifti(path, integers, reading) if nifti else _read_itk(path)
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        fix = "export it again as a 3D scalar volume in one file, or take it out of the folder"
        raise UnreadableError(Finding(path, f"is not a readable image: {reason(error)}", fix)) from error
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


def _to_integers(data: np.ndarray, path: Path) -> np.ndarray:
    if data.dtype.kind in "iub" and data.dtype.itemsize < 4:
        return data.astype(np.int32)
    limits = np.iinfo(np.int32)
    # A comparison with NaN is false, so NaN counts as not integral.
    fits = (data >= limits.min) & (data <= limits.max) & (data == np.rint(data))
    if not fits.all():
        example = data[~fits].flat[0]
        count = int((~fits).sum())
        problem = f"is not a label map: {count} voxels are not integers (for example {example:g})"
        raise UnreadableError(Finding(path, problem, "save the segmentation with one integer a structure"))
    return data.astype(np.int32)


def _read_nifti(path: Path, exact: bool, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and affine (RAS+) as stored; ``exact``: scale in float64, if there is a scale."""
    import nibabel

    image = nibabel.load(path)
    dtype = None if exact else np.float32
    if math.prod(image.shape[3:]) > 1:  # (x, y, z, channels)
        data = np.asanyarray(image.dataobj[:, :, :, reading.channel], dtype=dtype)
    else:
        data = np.asanyarray(image.dataobj, dtype=dtype)
    data = data.reshape(data.shape[:3])  # (x, y, z, 1, ...) -> (x, y, z)
    affine = image.affine
    if reading.affine == "qform" and image.header["qform_code"]:
        affine = image.header.get_qform()
    return data, np.asarray(affine, dtype=np.float64)


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels, x axis first, and affine (LPS+ -> RAS+) as stored."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), affine  # (z, y, x) -> (x, y, z)


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


def write_like(path: Path, data: np.ndarray, source: Path) -> None:
    """Write an array on the grid and in the format of an image file: orientation, spacing and origin kept.

    Args:
        path: has the ending of ``source``.
        data: the shape of ``source`` as stored (``Volume.native_shape``); an integer type.
        source: a NIfTI, NRRD or MetaImage file.

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
        with staged(path) as temporary:
            nibabel.save(type(image)(data, None, header), temporary)
            _check_written(temporary, path)
        return
    import SimpleITK as sitk

    reference = sitk.ReadImage(str(source))
    result = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))  # (x, y, z) -> (z, y, x)
    result.SetSpacing(reference.GetSpacing())
    result.SetOrigin(reference.GetOrigin())
    result.SetDirection(reference.GetDirection())
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
