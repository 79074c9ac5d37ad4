"""DICOM series: slices written by pydicom, read by GDCM; order, geometry, rescale, and what is refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ssl3d.data.checks.file import check_file, read_volume
from ssl3d.data.cohort import Case
from ssl3d.data.files.dicom import is_dicom, not_a_scan, series_of
from ssl3d.data.layouts.listing import list_cases
from ssl3d.data.layouts.releases import Folder
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.steps import Preparation
from ssl3d.errors import DataError

pydicom = pytest.importorskip("pydicom", reason='pip install "ssl3d[dev]"')

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid  # noqa: E402

SHAPE = (7, 6, 5)  # columns, rows, slices
SPACING = (0.8, 0.7, 2.5)


def voxels(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2000, shape).astype(np.int16)


def write_series(
    folder: Path,
    data: np.ndarray | None = None,
    *,
    step: Sequence[float] = (0, 0, SPACING[2]),
    spacing: Sequence[float] = SPACING[:2],
    directions: Sequence[float] = (1, 0, 0, 0, 1, 0),
    origin: Sequence[float] = (-10, 20, 30),
    slope: float = 1.0,
    intercept: float = -1024.0,
    keep: list[int] | None = None,
    prefix: str = "IM",
    compress: bool = False,
    slopes: list[float] | None = None,
) -> list[Path]:
    """Write (columns, rows, slices) as slices, axial ones by default, files not in the order of position.

    ``step`` is from slice to slice, ``spacing`` within one, ``directions`` along a row and along a column;
    all LPS+, in mm.
    """
    data = voxels() if data is None else data
    uid, paths = generate_uid(), []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(data.shape[2]) if keep is None else keep:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        one.SeriesInstanceUID, one.StudyInstanceUID, one.Modality = uid, generate_uid(), "CT"
        one.Columns, one.Rows = data.shape[:2]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, 1
        one.PixelSpacing = [round(float(mm), 6) for mm in (spacing[1], spacing[0])]  # rows first
        one.ImageOrientationPatient = [round(float(d), 8) for d in directions]
        one.ImagePositionPatient = [round(float(p), 4) for p in np.array(origin) + k * np.array(step)]
        one.RescaleSlope, one.RescaleIntercept = slopes[k] if slopes else slope, intercept
        one.PixelData = np.ascontiguousarray(data[:, :, k].T).tobytes()
        if compress:
            one.compress(RLELossless, encoding_plugin="pydicom")
        path = folder / f"{prefix}{k ^ 1:04d}"  # not in the order of the positions
        one.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def problem(path: Path) -> str:
    (finding,) = check_file(path)
    assert finding.path == path and finding.fix
    return finding.problem


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("by", ["folder", "slice"])
def test_a_series_is_read_in_order_with_rescale_and_geometry(tmp_path: Path, by: str, compress: bool) -> None:
    data = voxels((40, 36, 5))  # GDCM cannot decode RLE of a handful of voxels
    paths = write_series(tmp_path / "s", data, slope=2.0, compress=compress)
    path = tmp_path / "s" if by == "folder" else paths[2]
    assert check_file(path) == []
    volume = read_volume(path)
    # LPS+ -> RAS+: columns and rows run the other way.
    np.testing.assert_array_equal(volume.data, data[::-1, ::-1].astype(np.float32) * 2 - 1024)
    np.testing.assert_allclose(volume.spacing_mm, SPACING, rtol=1e-5)
    np.testing.assert_allclose(
        volume.native_affine, [[-0.8, 0, 0, 10], [0, -0.7, 0, -20], [0, 0, 2.5, 30], [0, 0, 0, 1]], atol=1e-5
    )


def test_it_agrees_with_the_series_reader_of_simpleitk(tmp_path: Path) -> None:
    import SimpleITK as sitk

    write_series(tmp_path / "s")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "s"))
    image = sitk.ReadImage(names)
    volume = read_volume(tmp_path / "s")
    native = volume.data[::-1, ::-1]
    np.testing.assert_array_equal(native, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    lps = np.diag([-1, -1, 1, 1]) @ volume.native_affine
    for index in ((0, 0, 0), (6, 5, 4), (1, 2, 3)):
        here = (lps @ [*index, 1])[:3]
        np.testing.assert_allclose(here, image.TransformIndexToPhysicalPoint(index), atol=1e-4)


def test_every_slice_has_its_own_slope(tmp_path: Path) -> None:
    """As PET scanners write them."""
    data, slopes = voxels(), [0.5, 1.0, 1.5, 2.0, 2.5]
    write_series(tmp_path / "s", data, slopes=slopes, intercept=0.0)
    expected = data.astype(np.float32) * np.array(slopes, np.float32)
    np.testing.assert_allclose(read_volume(tmp_path / "s").data, expected[::-1, ::-1], rtol=1e-6)


def test_several_series_in_one_folder_are_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = voxels(seed=1), voxels((4, 4, 3), seed=2)
    write_series(tmp_path / "d" / "patient", first, prefix="A")
    write_series(tmp_path / "d" / "patient", second, prefix="B")
    write_series(tmp_path / "d" / "other", voxels(seed=3))
    (tmp_path / "d" / "patient" / "notes.txt").write_text("hello")
    assert len(series_of(tmp_path / "d" / "patient")) == 2
    assert problem(tmp_path / "d" / "patient").startswith(
        "holds 2 DICOM series, one of each starting at: A0000"
    )
    with caplog.at_level(logging.WARNING):
        cases = list_cases(Folder(), tmp_path / "d").cases
    assert [case.id for case in cases] == ["other", "patient/series1", "patient/series2"]
    assert (
        "1 entry left out: is not of a format that is read (notes.txt)" in caplog.text
        and "notes.txt" in caplog.text
    )
    assert read_volume(cases[1].image).data.shape == first.shape
    np.testing.assert_array_equal(
        read_volume(cases[2].image).data, second[::-1, ::-1].astype(np.float32) - 1024
    )


def test_one_slice_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "s", keep=[2])
    assert problem(tmp_path / "s") == "is a single slice (7 x 6), not a 3D volume"
    with pytest.raises(DataError, match="is a single slice"):
        read_volume(tmp_path / "s")


def test_a_missing_slice_is_reported_and_simpleitk_ignores_it(tmp_path: Path) -> None:
    import SimpleITK as sitk

    write_series(tmp_path / "s", keep=[0, 1, 3, 4])
    text = problem(tmp_path / "s")
    assert text.startswith("misses about 1 slice: 5 mm between IM0000 and IM0002, elsewhere 2.5 mm")
    sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "s")))  # no error: our reason


def test_gantry_tilt_is_reported(tmp_path: Path) -> None:
    write_series(tmp_path / "s", step=(0, 2.5 * np.tan(np.radians(12)), 2.5))
    assert problem(tmp_path / "s").startswith("was scanned with a gantry tilt of 12.0 degrees")
    write_series(tmp_path / "straight", step=(0, 0.001, 2.5))  # rounding is no tilt
    assert check_file(tmp_path / "straight") == []


def test_other_series_that_make_no_volume(tmp_path: Path) -> None:
    write_series(tmp_path / "twice", step=(0, 0, 0))
    assert "slices at one position" in problem(tmp_path / "twice")

    def altered(name: str, **values: object) -> str:
        paths = write_series(tmp_path / name)
        one = pydicom.dcmread(paths[1])
        for key, value in values.items():
            setattr(one, key, value)
        one.save_as(paths[1])
        return problem(tmp_path / name)

    assert "different orientation" in altered("turned", ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    assert "different pixel spacing" in altered("zoomed", PixelSpacing=[1.0, 1.0])
    cropped = altered("cropped", Rows=5, PixelData=voxels()[:, :5, 0].T.tobytes())
    assert "mixes slices of 7 x 6 and 7 x 5" in cropped or "mixes slices of 7 x 5 and 7 x 6" in cropped
    assert "without Image Position (Patient)" in altered("lost", ImagePositionPatient=None)
    frames = voxels((7, 6, 2)).T.tobytes()
    assert problem_of_enhanced(tmp_path, frames) == "is a multi-frame DICOM"


def problem_of_enhanced(tmp_path: Path, frames: bytes) -> str:
    (path,) = write_series(tmp_path / "frames", keep=[0])
    one = pydicom.dcmread(path)
    one.NumberOfFrames, one.PixelData = 2, frames
    one.save_as(path)
    return problem(tmp_path / "frames")


@pytest.mark.parametrize("lost", [1, 2500, 3600])
def test_a_truncated_last_slice_is_found_and_gdcm_drops_it(tmp_path: Path, lost: int) -> None:
    paths = write_series(tmp_path / "s", voxels((40, 40, 4)))
    whole = paths[3].read_bytes()
    paths[3].write_bytes(whole[: len(whole) - lost])
    assert [len(files) for files in series_of(tmp_path / "s").values()] == [3]  # no gap is left to be seen
    for path in (tmp_path / "s", paths[0]):
        assert problem(path) == f"may lack a slice: {paths[3].name} in its folder is damaged or truncated"


@pytest.mark.parametrize("name", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit"])
def test_transfer_syntaxes_of_real_scans(tmp_path: Path, name: str) -> None:
    """One slice that comes with pydicom in several syntaxes, made a series by other positions."""
    from pydicom.data import get_testdata_file

    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array.T  # (rows, columns) -> (x, y)
    for k in range(3):
        one = pydicom.dcmread(get_testdata_file(f"MR_small_{name}.dcm"))
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        one.ImagePositionPatient, one.ImageOrientationPatient = [0, 0, 3 * k], [1, 0, 0, 0, 1, 0]
        one.save_as(tmp_path / f"{k}.dcm")
    volume = read_volume(tmp_path)
    for k in range(3):
        np.testing.assert_array_equal(volume.data[::-1, ::-1, k], expected)


def test_not_dicom(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no DICOM series" in problem(tmp_path / "empty")
    (tmp_path / "x.dcm").write_bytes(b"x" * 300)
    assert not is_dicom(tmp_path / "x.dcm")


def test_a_prepared_series_depends_on_all_its_slices(tmp_path: Path) -> None:
    data = np.where(np.indices((24, 24, 24)).sum(0) % 24 < 12, 1064, 24).astype(np.int16)
    data += voxels(data.shape) // 200
    paths = write_series(tmp_path / "s", data, step=(0, 0, 0.75))
    dataset, cases = Folder(), [Case("a", "a", tmp_path / "s")]
    first = prepare(cases, dataset, Preparation(spacing_mm=1.5), tmp_path / "cache")
    assert first.intensity.offset == 1024 and first.image(0).max() > 0.4
    one = pydicom.dcmread(paths[5])
    one.PixelData = bytes(len(one.PixelData))
    one.save_as(paths[5])
    again = prepare(cases, dataset, Preparation(spacing_mm=1.5), tmp_path / "cache")
    assert again.fingerprint != first.fingerprint


def test_a_file_that_stops_gdcms_scan_does_not_hide_the_series(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    before = series_of(tmp_path)
    whole = paths[2].read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    shutil.copy(shipped("rtdose_1frame.dcm"), tmp_path / "dose.dcm")  # GDCM refuses the whole folder
    assert {uid: series_of(tmp_path)[uid] for uid in before} == before
    (case,) = Folder().cases(tmp_path)
    assert case.image in paths
    assert problem(case.image) == "may lack a slice: cut in its folder is damaged or truncated"
    assert problem(tmp_path / "cut") == "is damaged or truncated: its DICOM data cannot be parsed"


def shipped(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rtdose_1frame.dcm", "a radiotherapy dose"),
        ("rtdose.dcm", "a radiotherapy dose"),
        ("rtplan.dcm", "a radiotherapy plan"),
        ("reportsi.dcm", "a structured report"),
        ("test-SR.dcm", "a structured report"),
        ("waveform_ecg.dcm", "a waveform"),
        ("liver_1frame.dcm", "a segmentation"),
        ("DICOMDIR", "the index of a disc"),
    ],
)
def test_what_is_no_scan_is_named_and_does_not_disturb_the_scan(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = voxels()
    paths = write_series(tmp_path / "s", data)
    shutil.copy(shipped(name), tmp_path / "s" / name)
    assert problem(tmp_path / "s" / name) == f"is {kind}, not a scan"
    for path in (tmp_path / "s", paths[0]):
        assert check_file(path) == []
        np.testing.assert_array_equal(read_volume(path).data, data[::-1, ::-1].astype(np.float32) - 1024)
    with caplog.at_level(logging.WARNING):
        assert len(list_cases(Folder(), tmp_path).cases) == 1
    assert f"1 entry left out: is {kind}, not a scan ({name})" in caplog.text
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(shipped(name), alone / name)
    with pytest.raises(DataError, match=f"is {kind}, not a scan"):
        Folder().cases(alone)


def test_images_are_scans(tmp_path: Path) -> None:
    for name in ("CT_small.dcm", "MR_small_jp2klossless.dcm", "meta_missing_tsyntax.dcm"):
        assert not_a_scan(shipped(name)) is None
    (tmp_path / "short").write_bytes(bytes(128) + b"DICM" + b"\2\0\2\0UI")
    assert not_a_scan(tmp_path / "short") is None
