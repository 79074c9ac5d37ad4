"""Bad files: every kind is planted, and the error names the file and the fix, all files at once."""

from __future__ import annotations

import contextlib
import gzip
import re
import struct
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ssl3d.data.checks.case import check_cases
from ssl3d.data.checks.file import check_file, read_volume
from ssl3d.data.checks.intensity import check_offset, fit_offset, judge, likely_offset, subsample
from ssl3d.data.cohort import Case
from ssl3d.data.files.findings import Finding, raise_findings
from ssl3d.data.files.headers import read_header
from ssl3d.data.layouts.releases import MMWHS, Folder
from ssl3d.errors import DataError
from ssl3d.parallel import run_parallel

SHAPE = (10, 12, 14)


def noise(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Incompressible voxels, so that a cut anywhere in a compressed file loses some."""
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def save_nifti(path: Path, data: np.ndarray | None = None, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(noise() if data is None else data, np.eye(4) if affine is None else affine)
    nibabel.save(image, path)
    return path


def save_itk(path: Path, compress: bool, data: np.ndarray | None = None) -> Path:
    image = sitk.GetImageFromArray(noise() if data is None else data)
    image.SetSpacing((0.5, 0.7, 1.5))
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


def cut(path: Path, keep: float) -> Path:
    """Keep the first part of a file, as an interrupted copy does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def patch(path: Path, offset: int, layout: str, *values: float) -> Path:
    """Overwrite numbers in the header of an uncompressed NIfTI."""
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, *values)
    path.write_bytes(content)
    return path


def flip_byte(path: Path, position: int) -> Path:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    return path


def the_finding(path: Path, **options: int) -> Finding:
    findings = check_file(path, **options)
    assert len(findings) == 1, findings
    assert findings[0].path == path and findings[0].fix
    return findings[0]


# --- good files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_good_nifti_passes(tmp_path: Path, name: str) -> None:
    assert check_file(save_nifti(tmp_path / name)) == []


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
def test_good_itk_file_passes_and_its_header_is_understood(tmp_path: Path, name: str, compress: bool) -> None:
    path = save_itk(tmp_path / name, compress)
    assert check_file(path) == []
    header, volume = read_header(path), read_volume(path)
    assert header.shape == volume.native_shape == SHAPE[::-1]  # ITK's first axis is NumPy's last
    assert header.axes_mm is not None
    np.testing.assert_allclose(header.axes_mm, np.diag([-1, -1, 1]) @ volume.native_affine[:3, :3], atol=1e-9)


def test_hand_written_headers_pass(tmp_path: Path) -> None:
    """Forms that SimpleITK reads but never writes: text encoding, byte skip, offsets from the end."""
    data = np.arange(24, dtype="<i2").reshape(2, 3, 4)  # (z, y, x)
    (tmp_path / "voxels.raw").write_bytes(b"HEAD" + data.tobytes())
    common = "NRRD0004\n# a comment\ntype: short\ndimension: 3\nsizes: 4 3 2\nspacings: 1 1 2\n"
    (tmp_path / "text.nrrd").write_text(
        common + "encoding: text\n\n" + " ".join(map(str, data.ravel())) + "\n"
    )
    (tmp_path / "skip.nhdr").write_text(
        common + "encoding: raw\nendian: little\nbyte skip: 4\ndata file: voxels.raw\n"
    )
    (tmp_path / "last.nhdr").write_text(
        common + "encoding: raw\nendian: little\nbyte skip: -1\ndata file: voxels.raw\n"
    )
    meta = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nDimSize = 4 3 2\n"
    )
    meta += "ElementSpacing = 1 1 2\nElementType = MET_SHORT\n"
    (tmp_path / "skip.mhd").write_text(meta + "HeaderSize = 4\nElementDataFile = voxels.raw\n")
    (tmp_path / "last.mhd").write_text(meta + "HeaderSize = -1\nElementDataFile = voxels.raw\n")
    for name in ("text.nrrd", "skip.nhdr", "last.nhdr", "skip.mhd", "last.mhd"):
        assert check_file(tmp_path / name) == [], name
        volume = read_volume(tmp_path / name)
        assert volume.native_shape == (4, 3, 2), name
        assert sorted(volume.data.ravel().astype(int).tolist()) == list(range(24)), name


def test_concatenated_gzip_members_pass(tmp_path: Path) -> None:
    plain = save_nifti(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(plain[:1000]) + gzip.compress(plain[1000:]))
    assert check_file(path) == []


# --- truncated and damaged ------------------------------------------------------------------------


def test_simpleitk_reads_a_truncated_file_without_an_error(tmp_path: Path) -> None:
    """The reason for reading streams ourselves; if this fails, SimpleITK has become careful."""
    path = cut(save_nifti(tmp_path / "a.nii.gz", noise(shape=(40, 40, 40))), 0.6)
    silent = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert (silent[-5:] == 0).all()
    with pytest.raises(DataError, match=r"a\.nii\.gz is truncated"):
        read_volume(path)


@pytest.mark.parametrize("keep", [0.001, 0.02, 0.5, 0.9, 0.9999])
def test_truncated_nii_gz(tmp_path: Path, keep: float) -> None:
    path = cut(save_nifti(tmp_path / "scan.nii.gz", noise(shape=(40, 40, 40))), keep)
    finding = the_finding(path)
    assert "is truncated" in finding.problem or "ends within its header" in finding.problem
    if keep >= 0.02:
        assert "is truncated" in finding.problem and "copy or export" in finding.fix
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_volume(path)


def test_nii_gz_that_lacks_only_its_checksum(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "scan.nii.gz")
    path.write_bytes(path.read_bytes()[:-4])
    assert the_finding(path).problem == "is truncated: its compressed data stop before their checksum"


def test_nii_gz_whose_stream_is_whole_but_shorter_than_the_header_promises(tmp_path: Path) -> None:
    plain = save_nifti(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(plain[:-100]))
    promised = 352 + 2 * np.prod(SHAPE)
    assert the_finding(path).problem == f"is truncated: {promised - 100} of {promised} bytes are there"


def test_nii_gz_with_a_wrong_checksum(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "scan.nii.gz")
    flip_byte(path, -8)  # CRC-32, the first four of the last eight bytes
    assert "is damaged: its compressed data cannot be read" in the_finding(path).problem


def test_nii_gz_that_decompresses_to_far_more_than_it_says(tmp_path: Path) -> None:
    plain = save_nifti(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(plain + bytes(100 * 2**20), compresslevel=1))
    assert "decompresses to more than" in the_finding(path).problem


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_truncated_nii(tmp_path: Path, keep: float) -> None:
    path = cut(save_nifti(tmp_path / "scan.nii"), keep)
    assert "is truncated" in the_finding(path).problem


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["scan.nrrd", "scan.mha"])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_truncated_nrrd_and_mha(tmp_path: Path, name: str, compress: bool, keep: float) -> None:
    path = cut(save_itk(tmp_path / name, compress), keep)
    assert "is truncated" in the_finding(path).problem


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["scan.nhdr", "scan.mhd"])
def test_detached_voxels_that_are_truncated_or_missing(tmp_path: Path, name: str, compress: bool) -> None:
    path = save_itk(tmp_path / name, compress)
    (voxels,) = (p for p in tmp_path.iterdir() if p != path)
    cut(voxels, 0.7)
    assert "is truncated" in the_finding(path).problem
    voxels.unlink()
    finding = the_finding(path)
    assert voxels.name in finding.problem and "missing" in finding.problem and "both files" in finding.fix


def test_voxels_spread_over_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "scan.mhd"
    path.write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 3 2\nElementType = MET_SHORT\nElementDataFile = LIST\n"
    )
    assert "spread over several files" in the_finding(path).problem


# --- not images, wrong shapes, wrong headers ------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
@pytest.mark.parametrize(
    "content", [b"<html>404 not found</html>\n" * 30, bytes(2000), b"\x1f\x8b\x08"], ids=str
)
def test_file_that_is_not_an_image(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert "is not a readable image" in the_finding(path).problem


def test_relatives_of_nifti_that_are_not_volumes(tmp_path: Path) -> None:
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "not numbers" in the_finding(save_nifti(tmp_path / "rgb.nii", rgb)).problem
    assert (
        "not numbers" in the_finding(save_nifti(tmp_path / "complex.nii", np.zeros(SHAPE, complex))).problem
    )
    path = tmp_path / "surface.dtseries.nii"
    nibabel.save(nibabel.Nifti2Image(noise(), np.eye(4)), path)
    patch(path, 504, "<i", 3002)  # intent code: a CIFTI time series, of which the extension is missing
    assert "is not a readable image" in the_finding(path).problem


def test_headers_with_random_damage_raise_nothing(tmp_path: Path) -> None:
    """Whatever a header says, the answer is a finding or a volume, never a traceback."""
    rng = np.random.default_rng(0)
    paths = [save_nifti(tmp_path / "a.nii"), save_nifti(tmp_path / "b.nii.gz")]
    paths += [
        save_itk(tmp_path / f"c{i}{e}", i % 2 == 0) for i, e in enumerate((".nrrd", ".nrrd", ".mha", ".mha"))
    ]
    found = 0
    for path in paths:
        whole = path.read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            for position in rng.integers(0, 400, rng.integers(1, 4)):
                content[position] = rng.integers(0, 256)
            path.write_bytes(content)
            if check_file(path):
                found += 1
                continue
            with contextlib.suppress(DataError):
                read_volume(path)
    assert 60 < found < 360


def test_missing_empty_folder_and_unknown_ending(tmp_path: Path) -> None:
    assert the_finding(tmp_path / "gone.nii").problem == "does not exist"
    assert "folder" in the_finding(tmp_path).problem
    (tmp_path / "empty.nii").touch()
    assert "0 bytes" in the_finding(tmp_path / "empty.nii").problem
    (tmp_path / "slide.tiff").write_bytes(b"II*\0")
    assert ".nii.gz" in the_finding(tmp_path / "slide.tiff").fix


def test_4d(tmp_path: Path) -> None:
    finding = the_finding(save_nifti(tmp_path / "bold.nii.gz", noise(shape=(4, 5, 6, 7))))
    assert (
        finding.problem == "is 4D (4 x 5 x 6 x 7), not one 3D volume" and "its volumes, 0 to 6" in finding.fix
    )
    rgb = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    for name in ("rgb.mha", "rgb.nrrd"):
        sitk.WriteImage(rgb, str(tmp_path / name))
        assert "not one 3D volume" in the_finding(tmp_path / name).problem


def test_single_slice(tmp_path: Path) -> None:
    for name, shape in (("one.nii", (5, 6, 1)), ("flat.nii.gz", (5, 6))):
        assert "is a single slice" in the_finding(save_nifti(tmp_path / name, noise(shape=shape))).problem


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_spacing_of_zero_or_nan(tmp_path: Path, value: float) -> None:
    for image, offset, number in (
        (nibabel.Nifti1Image(noise(), None), 84, "<f"),  # where pixdim[2] is; neither sform nor qform is set
        (nibabel.Nifti2Image(noise(), None), 120, "<d"),
    ):
        image.header.set_zooms((1, 1, 1))
        path = tmp_path / "scan.nii"
        nibabel.save(image, path)
        assert check_file(path) == []
        patch(path, offset, number, value)
        assert ("zero spacing" if value == 0 else "NaN") in the_finding(path).problem


@pytest.mark.parametrize("text", ["0.5 0 1.5", "0.5 nan 1.5"])
def test_spacing_of_zero_or_nan_in_itk_files(tmp_path: Path, text: str) -> None:
    mha = save_itk(tmp_path / "a.mha", compress=False)
    content = re.sub(rb"ElementSpacing = [^\n]*", b"ElementSpacing = " + text.encode(), mha.read_bytes())
    mha.write_bytes(content)
    nrrd = save_itk(tmp_path / "a.nrrd", compress=False)
    d, h, w = text.split()
    axes = f"space directions: ({d},0,0) (0,{h},0) (0,0,{w})".encode()
    nrrd.write_bytes(re.sub(rb"space directions: [^\n]*", axes, nrrd.read_bytes()))
    for path in (mha, nrrd):
        assert ("NaN" if "nan" in text else "zero spacing") in the_finding(path).problem


def test_singular_affine_and_implausible_spacing(tmp_path: Path) -> None:
    singular = np.eye(4)
    singular[:3, 1] = singular[:3, 0]
    path = save_nifti(tmp_path / "singular.nii")
    patch(path, 280, "<12f", *singular[:3].ravel())  # srow_x, srow_y, srow_z
    assert "singular affine" in the_finding(path).problem
    path = save_nifti(tmp_path / "metres.nii", affine=np.diag([0.001, 0.001, 0.001, 1]))
    assert "implausible spacing of 0.001 x 0.001 x 0.001 mm" in the_finding(path).problem


def test_promise_beyond_the_budget_is_refused_before_allocation(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "huge.nii")
    patch(path, 40, "<4h", 3, 30000, 30000, 30000)  # dim: 100 TiB as float32
    start = time.perf_counter()
    finding = the_finding(path)
    assert time.perf_counter() - start < 1
    assert "promises 30000 x 30000 x 30000 voxels" in finding.problem and "limit 4 GiB" in finding.problem
    small = save_nifti(tmp_path / "small.nii")
    assert "limit" in the_finding(small, max_bytes=1000).problem
    assert check_file(small, max_bytes=4 * int(np.prod(SHAPE))) == []


def test_shape_of_nothing(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "scan.nii")
    patch(path, 44, "<h", 0)  # dim[2]
    assert "size" in the_finding(path).problem


# --- voxels, labels, grids ------------------------------------------------------------------------


def heart(path: Path, air: float = -1000.0, seed: int = 0) -> Path:
    """A CT-like file in HU: air around a block of tissue."""
    data = np.full(SHAPE, air) + np.random.default_rng(seed).normal(0, 10, SHAPE)
    data[2:8, 2:10, 2:12] += 1050
    return save_nifti(path, data.astype(np.float32))


def heart_label(path: Path, shape: tuple[int, ...] = SHAPE, affine: np.ndarray | None = None) -> Path:
    data = np.zeros(shape, np.int16)
    data[3:5, 3:5, 3:5] = 500
    return save_nifti(path, data, affine)


def test_all_bad_files_of_a_cohort_are_listed_at_once(tmp_path: Path) -> None:
    """Every item of the list of bad input, in one cohort; the good case is not named."""
    shifted = np.eye(4)
    shifted[2, 3] = 0.4
    fractions = np.zeros(SHAPE)
    fractions[0, 0, 0] = 0.5
    unknown = np.zeros(SHAPE, np.int16)
    unknown[0, 0, :2] = (7, 421)
    nan = noise().astype(np.float32)
    nan[0, 0, :3] = (np.nan, np.nan, np.inf)
    image, label = tmp_path / "images", tmp_path / "labels"
    (image / "not_an_image.nii.gz").parent.mkdir()
    (image / "not_an_image.nii.gz").write_text("not found")
    cases = [
        Case("good", "0", heart(image / "good.nii.gz"), heart_label(label / "good.nii.gz")),
        Case("text", "1", image / "not_an_image.nii.gz"),
        Case("cut", "2", cut(heart(image / "cut.nii.gz"), 0.8)),
        Case("nan", "3", save_nifti(image / "nan.nii.gz", nan)),
        Case("4d", "4", save_nifti(image / "4d.nii.gz", noise(shape=(4, 4, 4, 3)))),
        Case("shape", "5", heart(image / "e.nii.gz"), heart_label(label / "shape.nii.gz", (10, 12, 13))),
        Case("moved", "6", heart(image / "f.nii.gz"), heart_label(label / "moved.nii.gz", affine=shifted)),
        Case("value", "7", heart(image / "g.nii.gz"), save_nifti(label / "value.nii.gz", unknown)),
        Case("half", "8", heart(image / "h.nii.gz"), save_nifti(label / "half.nii.gz", fractions)),
        Case("flat", "9", save_nifti(image / "flat.nii.gz", np.zeros(SHAPE, np.int16))),
        Case("both", "10", cut(heart(image / "x.nii.gz"), 0.5), cut(heart_label(label / "y.nii.gz"), 0.5)),
        Case("gone", "11", image / "gone.nii.gz"),
    ]
    with pytest.raises(DataError) as caught:
        raise_findings(check_cases(cases, MMWHS(), workers=2))
    text = str(caught.value)
    expected = {
        image / "not_an_image.nii.gz": "is not a readable image",
        image / "cut.nii.gz": "is truncated",
        image / "nan.nii.gz": "has 2 NaN and 1 infinite voxels",
        image / "4d.nii.gz": "is 4D",
        label / "shape.nii.gz": "has 10 x 12 x 13 voxels, but its image e.nii.gz has 10 x 12 x 14",
        label
        / "moved.nii.gz": "lies on another grid than its image f.nii.gz: corners are up to 0.4 mm apart",
        label / "value.nii.gz": "holds label values that mmwhs does not know: 7 (known: 0, 205,",
        label / "half.nii.gz": "is not a label map: 1 voxels are not integers",
        image / "flat.nii.gz": "is constant: every voxel is 0",
        image / "x.nii.gz": "is truncated",
        label / "y.nii.gz": "is not a readable image: it ends within its header",
        image / "gone.nii.gz": "does not exist",
    }
    lines = {line.strip().split(" ", 1)[0]: line for line in text.splitlines()[1:]}
    assert text.splitlines()[0] == "12 problems in 12 files:"
    assert lines.keys() == {str(path) for path in expected}
    for path, problem in expected.items():
        assert f"{path} {problem}" in text
        assert ". Fix: " in lines[str(path)]


def test_label_in_another_orientation_on_the_same_grid_is_good(tmp_path: Path) -> None:
    image = heart(tmp_path / "image.nii.gz")
    data = np.zeros(SHAPE, np.int16)
    data[3:5] = 500
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    flipped[0, 3] = SHAPE[0] - 1
    label = save_nifti(tmp_path / "label.nii.gz", data[::-1], flipped)
    assert check_cases([Case("a", "a", image, label)], MMWHS()) == []


@pytest.mark.parametrize(
    ("air", "padding", "offset", "good"),
    [
        (-1000, None, 1024, True),
        (-1000, -2048, 1024, True),  # scanners pad outside their circle
        (-1000, -3024, 1024, True),
        (0, None, 0, True),
        (0, None, 1024, False),  # stored with air at 0, read as HU
        (-1000, None, 0, False),  # HU, read as stored with air at 0
        (-1024, -1024, 0, False),
        (-1000, -2048, 0, False),
    ],
)
def test_offset_is_checked(
    tmp_path: Path, air: float, padding: float | None, offset: float, good: bool
) -> None:
    path = heart(tmp_path / "scan.nii.gz", air)
    if padding is not None:
        data = nibabel.load(path).get_fdata()
        data[:, 0] = padding
        save_nifti(path, data.astype(np.float32))
    findings = check_offset(read_volume(path), MMWHS(), offset)
    assert (findings == []) == good
    if not good:
        assert "data.intensity_offset.mmwhs" in findings[0].fix and str(path) == str(findings[0].path)


def test_masked_ct_in_hu_does_not_pass_for_one_with_air_at_zero(tmp_path: Path) -> None:
    """Soft tissue in HU lies near 0 too: without the second criterion it would pass for air."""
    data = np.random.default_rng(0).normal(40, 20, SHAPE).astype(np.float32)
    data[:, :3] = -1024
    path = save_nifti(tmp_path / "scan.nii.gz", data)
    assert check_offset(read_volume(path), MMWHS(), 0.0)
    assert check_offset(read_volume(path), MMWHS(), 1024.0) == []


def scan(kind: str, seed: int) -> np.ndarray:
    """Values (20,000,) of CTs and MRs, in HU unless the name says otherwise."""
    rng = np.random.default_rng(seed)
    n = 20_000
    soft = rng.normal(rng.choice([-90, 40, 60], n, p=[0.2, 0.4, 0.4]), 25)  # fat and organs
    air = rng.normal(-1000, 15, n)
    lung = rng.gamma(4, 40, n) - 950

    def mixed(*parts: tuple[float, np.ndarray]) -> np.ndarray:
        chosen = rng.choice(len(parts), n, p=[share for share, _ in parts])
        return np.choose(chosen, [values for _, values in parts])

    bone = 150 + rng.exponential(250, n)
    made = {
        "abdomen": mixed((0.5, air), (0.45, soft), (0.05, bone)),
        "chest": mixed((0.45, air), (0.3, soft), (0.2, lung), (0.05, bone)),
        "contrast": mixed((0.3, air), (0.5, soft), (0.2, rng.normal(400, 60, n))),
        "wide field": mixed((0.95, air), (0.05, soft)),
        "lungs only": mixed((0.9, np.full(n, -1024.0)), (0.08, lung), (0.02, soft)),
        "organ": soft,
        "organ, no fat": rng.normal(60, 15, n),
        "spine": mixed((0.7, soft), (0.3, bone)),
        "windowed": np.clip(soft, -100, 240),
        "skull-stripped, 0 outside": mixed((0.6, np.zeros(n)), (0.4, rng.normal(35, 12, n))),
    }
    if kind.startswith("mr"):
        scale = float(kind.split()[1])
        tissue = rng.normal(rng.choice([0.4, 0.6, 0.9], n), 0.05)
        return np.round(scale * mixed((0.4, np.abs(rng.normal(0, 0.02, n))), (0.6, tissue)))
    return np.round(made[kind])


CTS = ("abdomen", "chest", "contrast", "wide field", "lungs only", "organ", "organ, no fat", "spine", "windowed",
       "skull-stripped, 0 outside")  # fmt: skip


@pytest.mark.parametrize("kind", CTS)
def test_the_offset_of_a_ct_is_found_with_air_and_without(kind: str) -> None:
    """In HU, and stored with air at 0; every other offset of the two, and of twice that, is refused."""
    for seed in range(3):
        values = scan(kind, seed)
        stored = values + 1024
        assert likely_offset(values) == 1024 and likely_offset(stored) == 0
        assert fit_offset(values, 1024).by and fit_offset(stored, 0).by
        assert not fit_offset(values, 0).by and not fit_offset(values, 2048).by
        assert not fit_offset(stored, 1024).by and not fit_offset(stored, -1024).by


@pytest.mark.parametrize("scale", [100, 255, 500, 1000, 4095])
def test_mr_with_its_background_is_no_ct(scale: int) -> None:
    for seed in range(3):
        values = scan(f"mr {scale}", seed)
        assert judge(values, is_ct=False).kind == "not CT in HU"
        standardised = (values - values.mean()) / values.std()
        assert judge(standardised, is_ct=False).kind == "not CT in HU"
        assert not fit_offset(values, 1024).by  # a cohort of CT in HU


@pytest.mark.parametrize("kind", CTS)
def test_what_has_values_below_0_is_taken_for_ct_without_being_told(kind: str) -> None:
    expected = "not CT in HU" if kind in {"organ, no fat", "skull-stripped, 0 outside"} else "CT in HU"
    assert judge(scan(kind, 0), is_ct=False).kind == expected  # those two can be MR as well; verify says so


def test_wrong_offset_is_found_with_everything_else(tmp_path: Path) -> None:
    cases = [Case("a", "a", heart(tmp_path / "a.nii.gz", air=0)), Case("b", "b", tmp_path / "gone.nii.gz")]
    findings = check_cases(cases, MMWHS())
    assert [finding.path.name for finding in findings] == ["a.nii.gz", "gone.nii.gz"]
    assert "seems to be 0 here (--offset 0" in findings[0].fix
    assert check_cases(cases[:1], Folder()) == []  # its offset is found from the values


# --- reporting ------------------------------------------------------------------------------------


def test_long_lists_are_shortened_but_every_file_is_named() -> None:
    findings = [Finding(Path(f"scan{i:03d}.nii"), "is bad", "mend it") for i in range(30)]
    with pytest.raises(DataError) as caught:
        raise_findings([*findings, findings[0]])
    text = str(caught.value)
    assert text.startswith("30 problems in 30 files:")
    assert text.count("Fix: mend it.") == 20 and "and 10 more" in text
    assert all(str(finding.path) in text for finding in findings)
    with pytest.raises(DataError) as caught:
        raise_findings(findings, limit=None)
    assert str(caught.value).count("Fix: mend it.") == 30
    raise_findings([])  # nothing wrong, nothing raised


def test_parallel_results_are_in_order_and_errors_stop_the_rest() -> None:
    calls: list[tuple[int, int, str]] = []

    def slow_first(i: int) -> int:
        time.sleep(0.02 * (i == 0))
        return i * i

    assert run_parallel(slow_first, range(5), 3, lambda *call: calls.append(call), "x") == [0, 1, 4, 9, 16]
    assert calls == [(i, 5, "x") for i in range(1, 6)]
    started: list[int] = []

    def broken(i: int) -> None:
        started.append(i)
        raise ValueError(str(i))

    with pytest.raises(ValueError, match="0"):
        run_parallel(broken, range(1000), 1)
    assert len(started) < 1000


def test_subsample_sees_the_whole_volume() -> None:
    data = np.zeros((50, 50, 100), np.float32)
    data[..., 50:] = 1  # every 100th value in order would see one slice only
    assert subsample(data, 2500).mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(subsample(data, 2500), subsample(data, 2500))
    assert subsample(data).size == data.size
