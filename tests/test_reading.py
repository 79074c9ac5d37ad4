"""Files that leave a choice: an sform and a qform that disagree, and images with several channels."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ssl3d.cli import main
from ssl3d.config import load_settings
from ssl3d.data.adapters import Folder
from ssl3d.data.cohort import Reading
from ssl3d.data.prepare import prepare, prepare_file
from ssl3d.data.sources import pretraining_cohort, task_cohort
from ssl3d.data.steps import Intensity, Preparation
from ssl3d.data.volume import read_volume
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
    with pytest.raises(DataError, match=r"sform and a qform that disagree.*--affine sform\|qform"):
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
    with pytest.raises(DataError, match=r"is 4D .*channel 0 to 2"):
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
