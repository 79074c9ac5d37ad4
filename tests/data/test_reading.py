"""Files that leave a choice: an sform and a qform that disagree, and images with several channels."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ssl3d.bench.sources import pretraining_cohort, task_cohort
from ssl3d.cli import main
from ssl3d.config import load_settings
from ssl3d.data.checks.file import read_labels, read_volume
from ssl3d.data.cohort import Reading
from ssl3d.data.files.volume import write_like
from ssl3d.data.layouts.releases import Folder
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.case import prepare_file
from ssl3d.data.prepared.steps import Intensity, Preparation
from ssl3d.downstream.task_files import load_task
from ssl3d.errors import ConfigError, DataError

SHAPE = (12, 13, 14)
SFORM = np.diag([2.0, 2.0, 2.0, 1.0])
QFORM = np.array([[-2.0, 0, 0, 20], [0, 2, 0, 0], [0, 0, 2, 5], [0, 0, 0, 1]])  # mirrored, and shifted


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "250"})


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def save(path: Path, data: np.ndarray, sform: np.ndarray = SFORM, qform: np.ndarray = SFORM) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(data, sform)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nibabel.save(image, path)
    return path


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """Two volumes whose qform mirrors the first axis."""
    for i in range(2):
        save(tmp_path / "torn" / f"v{i}.nii.gz", volume(i), SFORM, QFORM)
    return tmp_path / "torn"


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Two 4D files of three channels."""
    for i in range(2):
        save(tmp_path / "many" / f"v{i}.nii.gz", volume(i, (*SHAPE, 3)))
    return tmp_path / "many"


def test_the_affine_that_is_chosen_decides_the_orientation(torn: Path) -> None:
    path = torn / "v0.nii.gz"
    with pytest.raises(DataError, match=r"sform and a qform that disagree.*--affine sform or --affine qform"):
        read_volume(path)
    by_sform, by_qform = (read_volume(path, reading=Reading(affine=a)) for a in ("sform", "qform"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(by_sform.data, volume(0))
    np.testing.assert_array_equal(by_qform.data, volume(0)[::-1])
    np.testing.assert_allclose(by_sform.affine, SFORM)
    np.testing.assert_allclose(by_qform.native_affine, QFORM, atol=1e-5)


def test_where_there_is_one_affine_only_it_is_taken(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume(0), SFORM)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "a.nii")
    for choice in ("sform", "qform"):
        read = read_volume(tmp_path / "a.nii", reading=Reading(affine=choice))  # type: ignore[arg-type]
        np.testing.assert_allclose(read.affine, SFORM)


def test_the_channel_that_is_chosen_is_read(many: Path) -> None:
    path = many / "v1.nii.gz"
    with pytest.raises(DataError, match=r"is 4D .*its volumes, 0 to 2"):
        read_volume(path)
    for channel in range(3):
        read = read_volume(path, reading=Reading(channel=channel))
        np.testing.assert_array_equal(read.data, volume(1, (*SHAPE, 3))[..., channel])
    with pytest.raises(DataError, match="has no channel 3. Fix: choose a channel from 0 to 2"):
        read_volume(path, reading=Reading(channel=3))


def test_a_scaled_channel_is_scaled(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume(0, (*SHAPE, 2)), SFORM)
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "a.nii.gz")
    stored = nibabel.load(tmp_path / "a.nii.gz").get_fdata()
    np.testing.assert_allclose(
        read_volume(tmp_path / "a.nii.gz", reading=Reading(channel=1)).data, stored[..., 1]
    )


def test_a_channel_of_a_3d_file_is_0_or_an_error(torn: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", volume(0))
    np.testing.assert_array_equal(read_volume(path, reading=Reading(channel=0)).data, volume(0))
    with pytest.raises(DataError, match="so it has no channel 1"):
        read_volume(path, reading=Reading(channel=1))


def test_a_name_of_a_channel_needs_a_layout_with_names(many: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout folder has no names of channels"):
        Folder().with_facts(channel="T1").reading()
    result = run("data", "verify", many, "--channel", "T1")
    assert result.exit_code == 2 and "has no names of channels" in result.output


def test_verify_and_prepare_take_the_choice(torn: Path, many: Path, tmp_path: Path) -> None:
    refused = run("data", "verify", torn)
    assert refused.exit_code == 1 and "disagree" in refused.output and "--affine" in refused.output
    assert run("data", "verify", torn, "--affine", "qform").exit_code == 0
    assert run("data", "verify", many).exit_code == 1
    assert run("data", "verify", many, "--channel", "2").exit_code == 0
    for folder, option in ((torn, ("--affine", "qform")), (many, ("--channel", "1"))):
        result = run("data", "prepare", folder, *option, "--spacing", "2", "--cache", tmp_path / "cache")
        assert result.exit_code == 0, result.output
    manifests = [json.loads(p.read_text()) for p in (tmp_path / "cache").rglob("manifest.json")]
    chosen = sorted((m["reading"]["affine"] or "", m["reading"]["channel"]) for m in manifests)
    assert chosen == [("", 1), ("qform", None)]


def test_a_file_to_be_predicted_is_read_as_chosen(torn: Path, many: Path) -> None:
    values = Preparation(spacing_mm=2), Intensity("minmax", 0.0, False, "")
    assert isinstance(prepare_file(torn / "v0.nii.gz", *values), list), "findings"
    chosen = prepare_file(torn / "v0.nii.gz", *values, reading=Reading(affine="qform"))
    assert not isinstance(chosen, list)
    np.testing.assert_array_equal(chosen[0].data, volume(0)[::-1])
    chosen = prepare_file(many / "v0.nii.gz", *values, reading=Reading(channel=2))
    assert not isinstance(chosen, list)
    np.testing.assert_array_equal(chosen[0].data, volume(0, (*SHAPE, 3))[..., 2])


def test_settings_and_task_files_take_the_choice(many: Path, tmp_path: Path) -> None:
    settings = load_settings("smoke", ["data.channel.folder=2", "data.spacing_mm=2"])
    cohort = pretraining_cohort(str(many), settings, tmp_path / "cache")
    expected = volume(1, (*SHAPE, 3))[..., 2].astype(np.float32)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(cohort.image(1), expected, atol=1e-6)

    rows = "subject,image,value\n" + "".join(f"s{i},many/v{i}.nii.gz,{i}\n" for i in range(2))
    (tmp_path / "cohort.csv").write_text(rows)
    file = tmp_path / "age.yaml"
    file.write_text("name: age\nkind: regression\ndataset: csv\ndata: cohort.csv\nchannel: 2\n")
    settings = load_settings("smoke", ["data.spacing_mm=2"])
    cohort = task_cohort(load_task(file), None, settings, tmp_path / "cache")
    np.testing.assert_allclose(cohort.image(1), expected, atol=1e-6)


def test_msd_channels_are_chosen_by_name(many: Path, tmp_path: Path) -> None:
    root = tmp_path / "Task05"
    for i in range(2):
        save(root / "imagesTr" / f"p_{i}.nii.gz", volume(i, (*SHAPE, 2)))
        save(root / "labelsTr" / f"p_{i}.nii.gz", (volume(i + 5) > 500).astype(np.uint8))
    facts = {
        "modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "zone"},
        "training": [{"image": f"./imagesTr/p_{i}.nii.gz", "label": f"./labelsTr/p_{i}.nii.gz"} for i in range(2)],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(facts))
    refused = run("data", "verify", root, "--as", "msd")
    assert refused.exit_code == 2 and "2 channels (0: T2, 1: ADC)" in refused.output
    assert run("data", "verify", root, "--as", "msd", "--channel", "ADC").exit_code == 0


def test_data_without_a_choice_keep_their_fingerprint(tmp_path: Path) -> None:
    """Caches and records of earlier versions stay valid."""
    save(tmp_path / "data" / "a.nii", volume(0))
    save(tmp_path / "data" / "b.nii", volume(1))
    prints = []
    for facts in ({}, {"affine": "sform"}, {"affine": "qform"}, {"channel": 0}):
        dataset = Folder().with_facts(**facts)
        cohort = prepare(
            dataset.cases(tmp_path / "data"), dataset, Preparation(spacing_mm=2), tmp_path / "cache"
        )
        prints.append(cohort.fingerprint)
    assert len(set(prints)) == 4
    assert prints[0] == "b195c85a05ae577282df7a5c7bd9bd3b46c629f71fe40df2991208f95946071a"


@pytest.mark.parametrize("factor", [0.0, 1e-3])
def test_a_broken_sform_beside_a_whole_qform(tmp_path: Path, factor: float) -> None:
    """As some converters leave it: rows of zeros, or metres for millimetres."""
    path = save(tmp_path / "a.nii", volume(0))
    raw = bytearray(path.read_bytes())
    rows = np.frombuffer(bytes(raw[280:328]), "<f4") * factor  # srow_x, srow_y, srow_z
    raw[280:328] = rows.astype("<f4").tobytes()
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"under its sform, but not under its qform.*--affine") as raised:
        read_volume(path)
    assert "spacing" in str(raised.value)
    with pytest.raises(DataError, match="spacing"):
        read_volume(path, reading=Reading(affine="sform"))  # that one is still broken
    read = read_volume(path, reading=Reading(affine="qform"))
    np.testing.assert_allclose(read.native_affine, SFORM, atol=1e-6)
    # A prediction on its grid can be read by everybody: both affines are the right one.
    write_like(tmp_path / "out.nii", np.ones(SHAPE, np.uint8), path, read.native_affine)
    np.testing.assert_allclose(read_volume(tmp_path / "out.nii").native_affine, SFORM, atol=1e-6)


def test_a_broken_qform_beside_a_whole_sform(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", volume(0))
    raw = bytearray(path.read_bytes())
    raw[256:268] = np.array([3, 4, 5], "<f4").tobytes()  # a quaternion longer than 1
    path.write_bytes(bytes(raw))
    read = read_volume(path, reading=Reading(affine="sform"))
    np.testing.assert_allclose(read.native_affine, SFORM, atol=1e-6)
    with pytest.raises(DataError, match="NaN"):
        read_volume(path, reading=Reading(affine="qform"))


def write_frames(folder: Path, name: str, frames: np.ndarray) -> Path:
    """Write (frames, x, y, z) int16 in one of the ways in which formats hold several volumes."""
    import SimpleITK as sitk

    ending, way = name.split(" ")
    path = folder / f"{way}.{ending}"
    itk = np.ascontiguousarray(frames.transpose(0, 3, 2, 1))  # (t, z, y, x)
    count, (x, y, z) = len(frames), frames.shape[1:]
    if ending == "nii.gz":
        moved = np.moveaxis(frames, 0, -1)
        save(path, moved if way == "4d" else moved[:, :, :, None])
    elif way in {"4d", "vector"}:
        image = itk if way == "4d" else np.ascontiguousarray(np.moveaxis(itk, 0, -1))
        sitk.WriteImage(sitk.GetImageFromArray(image, isVector=way == "vector"), str(path))
    else:  # as 3D Slicer writes sequences: a list, first or last
        directions = ["(1,0,0)", "(0,1,0)", "(0,0,1)"]
        place = 0 if way == "list-first" else 3
        sizes, kinds = [x, y, z], ["domain"] * 3
        for row, item in ((sizes, count), (kinds, "list"), (directions, "none")):
            row.insert(place, item)
        data = np.moveaxis(itk, 0, -1) if place == 0 else itk
        header = (
            "NRRD0004\ntype: int16\ndimension: 4\nspace: left-posterior-superior\n"
            f"sizes: {' '.join(map(str, sizes))}\nspace directions: {' '.join(directions)}\n"
            f"kinds: {' '.join(kinds)}\nendian: little\nencoding: raw\nspace origin: (0,0,0)\n\n"
        )
        path.write_bytes(header.encode() + np.ascontiguousarray(data).astype("<i2").tobytes())
    return path


WAYS = [
    "nii.gz 4d", "nii.gz 5d", "nrrd 4d", "nrrd vector", "nrrd list-first", "nrrd list-last", "mha 4d",
    "mha vector", "mhd 4d", "nhdr 4d",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_frames_are_counted_and_chosen_in_every_format(tmp_path: Path, way: str) -> None:
    frames = np.random.default_rng(0).integers(-99, 99, (3, 7, 6, 5)).astype(np.int16)  # x, y, z = 7, 6, 5
    path = write_frames(tmp_path, way, frames)
    with pytest.raises(DataError, match=r"its volumes, 0 to 2 \(the first: --channel 0 for"):
        read_volume(path)
    with pytest.raises(DataError, match="has no channel 3. Fix: choose a channel from 0 to 2"):
        read_volume(path, reading=Reading(channel=3))
    for channel in range(3):
        read = read_volume(path, reading=Reading(channel=channel))
        stored = frames[channel] if way.startswith("nii") else frames[channel, ::-1, ::-1]  # LPS -> RAS
        np.testing.assert_array_equal(read.data, stored)
    # A segmentation goes onto the grid of one frame.
    write_like(tmp_path / "out" / path.name, np.ones((7, 6, 5), np.uint8), path)
    out = read_volume(tmp_path / "out" / path.name)
    assert out.data.shape == (7, 6, 5)
    np.testing.assert_allclose(out.affine, read.affine, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_one_frame_is_read_as_3d_in_every_format(tmp_path: Path, way: str) -> None:
    frames = np.random.default_rng(0).integers(-99, 99, (1, 7, 6, 5)).astype(np.int16)
    if "vector" in way:
        return  # no format stores a vector of one component
    read = read_volume(write_frames(tmp_path, way, frames))
    assert read.data.shape == (7, 6, 5) and set(read.data.ravel()) == set(frames.ravel())


def test_a_dicom_series_and_a_colour_image_have_their_own_number_of_channels(tmp_path: Path) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.zeros((5, 6, 7, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "rgb.mha"))
    with pytest.raises(DataError, match=r"has 3 values a voxel \(7 x 6 x 5\)"):
        read_volume(tmp_path / "rgb.mha")


@pytest.mark.parametrize(("largest", "value"), [(2, 1.0000153), (2, 1 + 9e-4), (2000, 1999.98)])
def test_labels_through_the_slope_of_a_header_are_the_integers_they_were(
    tmp_path: Path, largest: int, value: float
) -> None:
    """Within LABEL_TOLERANCE, or a step of 2^-16 of the largest."""
    data = np.zeros(SHAPE, np.float64)
    data[:2], data[2] = largest, value
    path = save(tmp_path / "label.nii.gz", data)
    assert set(np.unique(read_labels(path).data)) == {0, largest, round(value)}
    for bad in (1.3, 1 + 2e-3 if largest < 10 else largest - 0.1, np.nan):
        data[3] = bad
        with pytest.raises(DataError, match=f"for example {bad:.6g}"):
            read_labels(save(tmp_path / "bad.nii.gz", data))


def test_float_labels_written_with_an_int16_header(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype("int16")
    labels = np.random.default_rng(0).integers(0, 3, SHAPE)
    nibabel.save(nibabel.Nifti1Image(labels.astype("f4"), SFORM, header), tmp_path / "a.nii.gz")
    stored = np.unique(np.asanyarray(nibabel.load(tmp_path / "a.nii.gz").dataobj))
    assert not np.isin(1.0, stored)  # 1.0000153
    np.testing.assert_array_equal(
        read_labels(tmp_path / "a.nii.gz").data, nibabel.as_closest_canonical(
            nibabel.Nifti1Image(labels.astype(np.int16), SFORM)).dataobj
    )  # fmt: skip
