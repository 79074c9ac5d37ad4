"""``ssl3d data verify`` and ``prepare``: every kind of bad file is found at once, and clean data pass."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ssl3d.cli import main
from ssl3d.data.checks.file import check_file
from ssl3d.data.checks.verify import verify
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.layouts.nnunet import NNUNet
from ssl3d.data.layouts.releases import Folder
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.steps import Preparation
from ssl3d.errors import DataError

SHAPE = (20, 22, 24)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "400"})


def heart(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A CT in HU and its label: a body, a ventricle (1) and a wall (2)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    r = ((grid - rng.uniform(-0.1, 0.1, (3, 1, 1, 1))) ** 2).sum(0)
    hu = np.where(r < 0.8, 40, -1000) + np.where(r < 0.15, 300, 0) + rng.normal(0, 10, SHAPE)
    return hu.astype(np.int16), np.where(r < 0.15, 1, np.where(r < 0.3, 2, 0)).astype(np.uint8)


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


def nnunet(root: Path, count: int = 4) -> Path:
    """A clean nnU-Net folder."""
    for i in range(count):
        image, label = heart(i)
        save(root / "imagesTr" / f"h{i}_0000.nii.gz", image)
        save(root / "labelsTr" / f"h{i}.nii.gz", label)
    labels = {"background": 0, "ventricle": 1, "wall": 2}
    facts = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(facts))
    return root


def test_clean_data_pass_with_fingerprint_and_picture(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d")
    result = run("data", "verify", root, "--as", "nnunet", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "4 cases, nothing wrong" in result.output and "ventricle (ml, 4 cases)" in result.output
    summary = json.loads((tmp_path / "out" / "fingerprint.json").read_text())
    assert (summary["cases"], summary["labelled"], summary["subsets"]) == (4, 4, {"train": 4})
    assert summary["spacing_mm"]["median"] == [2, 2, 3] and summary["shape"]["min"] == list(SHAPE)
    volumes = [(heart(i)[1] == 1).sum() * 12 / 1000 for i in range(4)]
    assert summary["volume_ml"]["ventricle"] == {
        "cases": 4, "min": min(volumes), "median": pytest.approx(np.median(volumes)), "max": max(volumes),
    }  # fmt: skip
    images = np.stack([heart(i)[0] for i in range(4)])
    assert summary["intensity"]["minimum"]["min"] == images.min()
    assert (tmp_path / "out" / "mosaic.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "findings.json").read_text())["skipped"] == []


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder in which every kind of fault occurs once; h0 and h1 are good."""
    root = nnunet(tmp_path / "bad", 14)
    images, labels = root / "imagesTr", root / "labelsTr"
    whole = (images / "h2_0000.nii.gz").read_bytes()
    (images / "h2_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (images / "h3_0000.nii.gz").write_bytes(b"no image")
    holed = heart(4)[0].astype(np.float32)
    holed[3, 3, 3] = np.nan
    save(images / "h4_0000.nii.gz", holed)
    save(images / "h5_0000.nii.gz", np.stack([heart(5)[0]] * 2, axis=-1))
    save(labels / "h6.nii.gz", heart(6)[1][:-1])
    save(labels / "h7.nii.gz", heart(7)[1] * 3)
    save(labels / "h8.nii.gz", np.zeros(SHAPE, np.uint8))
    save(images / "h9_0000.nii.gz", heart(0)[0])  # h0 again
    save(labels / "h10.nii.gz", heart(1)[1])  # the label of h1
    save(images / "h11_0000.nii.gz", heart(11)[0] + 3000)
    twisted = nibabel.Nifti1Image(heart(12)[0], AFFINE)
    twisted.set_sform(AFFINE, code=1)
    twisted.set_qform(np.diag([-2.0, 2.0, 3.0, 1.0]), code=1)
    nibabel.save(twisted, images / "h12_0000.nii.gz")
    save(images / "h13_0000.nii.gz", heart(13)[0], np.diag([2.0, 2.0, 90.0, 1.0]))
    return root


FAULTS = {
    "h2_0000": "is truncated", "h3_0000": "is not a readable image", "h4_0000": "has 1 NaN voxels",
    "h5_0000": "is 4D", "labelsTr/h6.": "voxels, but its image", "labelsTr/h7.": "does not know: 3, 6",
    "labelsTr/h8.": "is an empty label", "h9_0000": "has the same voxels as",
    "labelsTr/h10.": "the label of another image", "h11_0000": "does not look like CT",
    "h12_0000": "has an sform and a qform that disagree", "h13_0000": "implausible spacing",
}  # fmt: skip


def test_all_faults_are_found_at_once_in_the_same_words_everywhere(bad: Path, tmp_path: Path) -> None:
    dataset = NNUNet().open(bad)
    report = verify(dataset.cases(bad), dataset)
    assert {case.id for case in report.good} == {"h0", "h1"}
    texts = {str(finding) for finding in report.findings}
    for file, fault in FAULTS.items():
        assert any(file in text and fault in text for text in texts), (file, fault)
    assert len(texts) == len(FAULTS)
    with pytest.raises(DataError) as refused:
        prepare(dataset.cases(bad), dataset, Preparation(spacing_mm=4.0), tmp_path / "cache")
    said = {line.strip() for line in str(refused.value).splitlines()[1:]}
    assert said == texts - {f.__str__() for f in report.absent}


def test_exit_code_and_policy(bad: Path, tmp_path: Path) -> None:
    result = run("data", "verify", bad, "--as", "nnunet", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "12 of 14 cases bad" in result.output, result.output
    assert "Fingerprint" not in result.output and not (tmp_path / "out" / "mosaic.png").exists()
    skipping = run("data", "verify", bad, "--as", "nnunet", "--out", tmp_path / "out", "--policy", "skip")
    assert skipping.exit_code == 1 and "2 cases of 2 subjects, 2 labelled" in skipping.output
    skipped = json.loads((tmp_path / "out" / "findings.json").read_text())["skipped"]
    assert {case["id"] for case in skipped} == {f"h{i}" for i in range(2, 14)}
    assert all(case["fix"] and case["problem"] for case in skipped)
    assert run("data", "verify", bad, "--as", "nnunt").exit_code == 2


def test_prepare_skips_and_records_and_goes_on_where_it_was(bad: Path, tmp_path: Path) -> None:
    arguments = ["data", "prepare", bad, "--as", "nnunet", "--spacing", 4, "--cache", tmp_path / "cache"]
    refused = run(*arguments)
    assert refused.exit_code == 2 and "is truncated" in refused.output
    result = run(*arguments, "--policy", "skip")
    assert result.exit_code == 0 and "2 cases, ct, read as CT in HU (" in result.output, result.output
    assert result.output.count("Left out: ") == len(FAULTS)
    (manifest,) = (tmp_path / "cache").rglob("manifest.json")
    stored = json.loads(manifest.read_text())
    assert [case["id"] for case in stored["cases"]] == ["h0", "h1"]
    assert {case["id"] for case in stored["skipped"]} == {f"h{i}" for i in range(2, 14)}
    before = {path: path.stat().st_mtime_ns for path in manifest.parent.glob("*.b2nd")}
    assert run(*arguments, "--policy", "skip").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in manifest.parent.glob("*.b2nd")} == before
    links = {path.stat().st_nlink for path in before}
    assert links == {2}, "arrays of the first attempt are taken over, not built and stored again"


def test_the_cohort_without_bad_files_is_the_same_as_one_that_never_had_them(
    bad: Path, tmp_path: Path
) -> None:
    dataset = NNUNet().open(bad)
    preparation = Preparation(spacing_mm=4.0)
    cases = dataset.cases(bad)
    skipped = prepare(cases, dataset, preparation, tmp_path / "one", policy="skip")
    good = [case for case in cases if case.id in {"h0", "h1"}]
    clean = prepare(good, dataset, preparation, tmp_path / "two")
    assert skipped.fingerprint == clean.fingerprint and len(skipped.skipped) > 0 and clean.skipped == []
    np.testing.assert_array_equal(skipped.image(1), clean.image(1))
    with pytest.raises(DataError, match="is truncated"):
        prepare(
            [case for case in cases if case.id == "h2"], dataset, preparation, tmp_path / "x", policy="skip"
        )


def test_missing_files_are_skipped_too(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "d" / f"{i}.nii.gz", heart(i)[0])
    cases = [*Folder().cases(tmp_path / "d"), Case("gone", "gone", tmp_path / "d" / "gone.nii.gz")]
    cohort = prepare(cases, Folder(), Preparation(spacing_mm=4.0), tmp_path / "cache", policy="skip")
    assert [case.id for case in cohort.cases] == ["0", "1", "2"]
    assert [case["problem"] for case in cohort.skipped] == ["does not exist"]


def test_sform_and_qform_of_different_spaces_may_differ(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(heart(0)[0], AFFINE)
    image.set_sform(np.diag([-2.0, 2.0, 3.0, 1.0]), code="mni")
    image.set_qform(AFFINE, code="scanner")
    nibabel.save(image, tmp_path / "mni.nii.gz")
    assert check_file(tmp_path / "mni.nii.gz") == []
    rotated = AFFINE.copy()  # 180 degrees about an axis, where a quaternion in 32 bits is least exact
    rotated[:3, :3] = nibabel.eulerangles.euler2mat(3.1415, 0.3, -0.2) @ AFFINE[:3, :3]
    image = nibabel.Nifti1Image(np.zeros((400, 400, 300), np.uint8) + 1, rotated)
    image.set_qform(rotated, code=1)
    image.set_sform(rotated, code=1)
    nibabel.save(image, tmp_path / "same.nii")
    assert check_file(tmp_path / "same.nii") == []


def test_a_person_in_two_parts_and_a_structure_that_nobody_has(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", heart(0)[0])
    save(tmp_path / "b.nii.gz", heart(1)[0])
    save(tmp_path / "m.nii.gz", heart(1)[1])
    (tmp_path / "t.csv").write_text(
        "subject,image,label,split\nanna,a.nii.gz,,train\nanna,b.nii.gz,m.nii.gz,test\n"
    )
    task = tmp_path / "task.yaml"
    task.write_text("name: t\nkind: segmentation\ndataset: csv\nlabels: [ventricle, wall, valve]\n")
    result = run("data", "verify", tmp_path / "t.csv", "--as", "csv", "--task", task)
    assert result.exit_code == 1
    assert "is of subject anna for test, who is also there for train (a.nii.gz)" in result.output
    assert 'holds no label with the structure "valve"' in result.output


def test_ct_among_mr_is_found(tmp_path: Path) -> None:
    class Brains(Dataset):
        name, summary, modality, intensity_offset = "brains", "", "mr", 0.0

    save(tmp_path / "ct.nii.gz", heart(0)[0])
    save(tmp_path / "mr.nii.gz", heart(1)[0] + 1000)
    cases = [Case(name, name, tmp_path / f"{name}.nii.gz") for name in ("ct", "mr")]
    (finding,) = verify(cases, Brains()).findings
    assert finding.path.name == "ct.nii.gz" and "does not look like MR" in finding.problem


def test_crop_to_masks_of_the_user(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "d" / f"p{i}.nii.gz", heart(i)[0])
        mask = np.zeros(SHAPE, np.uint8)
        mask[4:14, 6:16, 9:15] = 1
        save(tmp_path / "masks" / f"p{i}.nii.gz", mask)
    arguments = ["data", "prepare", tmp_path / "d", "--spacing", 2, "--crop", "mask", "--margin", 2,
                 "--cache", tmp_path / "cache"]  # fmt: skip
    assert "belong together" in run(*arguments).output
    result = run(*arguments, "--masks", tmp_path / "masks")
    assert result.exit_code == 0, result.output
    (manifest,) = (tmp_path / "cache").rglob("manifest.json")
    # 10 voxels of 2 mm and 6 of 3 mm, and a margin of one voxel on each side; 7 steps of 3 mm are 10.5 of 2 mm.
    assert {tuple(case["shape"]) for case in json.loads(manifest.read_text())["cases"]} == {(12, 12, 11)}
    save(tmp_path / "masks" / "p1.nii.gz", np.zeros(SHAPE, np.uint8))
    assert "has an empty mask" in run(*arguments, "--masks", tmp_path / "masks").output
    (tmp_path / "masks" / "p0.nii.gz").unlink()
    assert "1 of 2 masks is missing" in run(*arguments, "--masks", tmp_path / "masks").output


def test_z_score_is_that_of_the_foreground(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "d" / f"p{i}.nii.gz", heart(i)[0] + 1000, np.diag([2.0, 2.0, 2.0, 1.0]))
    cohort = prepare(
        Folder().cases(tmp_path / "d"),
        Folder(),
        Preparation(spacing_mm=2.0, scaling="zscore"),
        tmp_path / "cache",
    )
    from skimage.filters import threshold_otsu

    data = (heart(0)[0] + 1000).astype(np.float64)
    bright = data[data > threshold_otsu(data.astype(np.float32))]
    z = (data - bright.mean()) / bright.std()
    np.testing.assert_allclose(cohort.image(0), np.clip((z + 5) / 10, 0, 1), atol=1e-5)
    assert cohort.intensity.scaling == "zscore"


def test_verify_and_pretrain_and_its_run_say_what_the_volumes_were_taken_for(tmp_path: Path) -> None:
    root = tmp_path / "cts"
    for i in range(2):
        save(root / f"h{i}.nii.gz", heart(i)[0])
    checked = run("data", "verify", root, "--out", tmp_path / "out")
    assert "Read as CT in HU (by their values)." in checked.output
    summary = json.loads((tmp_path / "out" / "fingerprint.json").read_text())
    assert summary["taken_for"] == "CT in HU (by their values)"
    result = run(
        "pretrain", "--method", "rotation", "--data", root, "--preset", "smoke", "--out", tmp_path / "run",
        "--set", "pretrain.steps=1", "--set", "data.spacing_mm=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Volumes: 2 cases, read as CT in HU (by the values of 2 files" in result.output
    volumes = json.loads((tmp_path / "run" / "run.json").read_text())["volumes"]
    assert volumes["cases"] == 2 and volumes["taken_for"].startswith("CT in HU (by the values")
    # MR, and a CT that can be taken for one: said with what to do.
    for i in range(2):
        save(tmp_path / "mrs" / f"m{i}.nii.gz", np.clip(heart(i)[0] + 1000, 0, None))
    output = run("data", "verify", tmp_path / "mrs").output
    assert "Read as not CT in HU" in output and "--set data.intensity_offset.folder=1024" in output
    refused = run("data", "verify", tmp_path / "mrs", "--offset", "1024")
    assert refused.exit_code == 1 and "--offset 0 for data verify" in refused.output
    assert run("data", "verify", tmp_path / "mrs", "--offset", "0").exit_code == 0
