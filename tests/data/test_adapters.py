"""Layouts: what adapters list, and what they say when the folder is another one."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssl3d.data.cohort import Dataset, natural_key
from ssl3d.data.files.suffixes import image_suffix
from ssl3d.data.layouts.listing import list_cases
from ssl3d.data.layouts.releases import ASOCA, BUILTIN_DATASETS, CANDI, MMWHS, STOIC, Folder
from ssl3d.errors import DataError


def touch(root: Path, *names: str) -> Path:
    """Make files that adapters list; adapters never open them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def mmwhs(root: Path) -> Path:
    train = [
        f"ct_train/ct_train_{i}_{kind}.nii.gz" for i in (1001, 1002, 1010) for kind in ("image", "label")
    ]
    return touch(root, *train, "ct_test/ct_test_2001_image.nii.gz", "mr_train/mr_train_1001_image.nii.gz")


def test_mmwhs(tmp_path: Path) -> None:
    cases = MMWHS().cases(mmwhs(tmp_path))
    assert [case.id for case in cases] == ["ct_test_2001", "ct_train_1001", "ct_train_1002", "ct_train_1010"]
    test, train = cases[0], cases[1]
    assert (test.subset, test.label, test.labelled, test.subject) == ("test", None, False, "2001")
    assert train.subset == "train" and train.labelled and train.subject == "1001"
    assert train.label == tmp_path / "ct_train" / "ct_train_1001_label.nii.gz"
    touch(tmp_path, "ct_test/ct_test_2001_label.nii.gz")  # the phantoms have them
    assert MMWHS().cases(tmp_path)[0].labelled


def test_mmwhs_lists_every_missing_file(tmp_path: Path) -> None:
    root = mmwhs(tmp_path)
    (root / "ct_train/ct_train_1001_label.nii.gz").unlink()
    (root / "ct_train/ct_train_1010_image.nii.gz").unlink()
    with pytest.raises(DataError, match="2 files do not fit together") as caught:
        MMWHS().cases(root)
    text = str(caught.value)
    assert "ct_train_1001_image.nii.gz has no ct_train_1001_label.nii.gz beside it" in text
    assert "ct_train_1010_label.nii.gz has no image beside it" in text and "Fix: copy" in text


def test_asoca(tmp_path: Path) -> None:
    names = [
        f"{group}/{kind}/{group}_{i}.nrrd"
        for group in ("Normal", "Diseased")
        for kind in ("CTCA", "Annotations")
        for i in (1, 2, 10)
    ]
    cases = ASOCA().cases(touch(tmp_path, *names))
    assert [c.id for c in cases] == [
        "Diseased_1", "Diseased_2", "Diseased_10", "Normal_1", "Normal_2", "Normal_10",
    ]  # fmt: skip
    assert all(c.label is not None and c.label.is_file() and c.label.name == c.image.name for c in cases)
    (tmp_path / "Normal/Annotations/Normal_2.nrrd").unlink()
    (tmp_path / "Diseased/CTCA/Diseased_1.nrrd").unlink()
    with pytest.raises(
        DataError, match=r"(?s)Normal_2\.nrrd has no annotation.*Diseased_1\.nrrd has no image"
    ):
        ASOCA().cases(tmp_path)


def test_candi(tmp_path: Path) -> None:
    names = [
        f"{p}/{p}_{k}.nii.gz" for p in ("HC_001", "SS_002", "BPDwithPsy_031") for k in ("procimg", "seg")
    ]
    cases = CANDI().cases(touch(tmp_path, *names, "readme.txt"))
    assert [case.id for case in cases] == ["BPDwithPsy_031", "HC_001", "SS_002"]
    assert all(case.labelled and case.subset is None for case in cases)
    (tmp_path / "HC_001/HC_001_seg.nii.gz").unlink()
    with pytest.raises(DataError, match=r"HC_001_seg\.nii\.gz is missing"):
        CANDI().cases(tmp_path)


def stoic(root: Path, table: str) -> Path:
    touch(root, "data/mha/3.mha", "data/mha/10.mha", "metadata/reference.csv")
    (root / "metadata/reference.csv").write_text(table)
    return root


def test_stoic(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = stoic(tmp_path, "PatientID,probCOVID,probSevere\n10,1,0\n3,0.0,0\n11,1,1\n")
    cases = STOIC().cases(root)
    assert [(case.id, case.target, case.label) for case in cases] == [("3", 0, None), ("10", 1, None)]
    assert all(case.labelled for case in cases)
    assert "1 rows" in caplog.text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("PatientID,COVID\n3,1\n10,0\n", "has no column probCOVID; its columns are PatientID, COVID"),
        ("PatientID,probCOVID\n3,1\n", r"10\.mha has no row"),
        ("PatientID,probCOVID\n3,1\n10,yes\n", "line 3: probCOVID is 'yes'. Fix: write 0 or 1"),
        ("PatientID,probCOVID\n3,1\n10,0\n3,0\n", "line 4: 3 is listed twice"),
        ("", "has no column PatientID and probCOVID"),
    ],
)
def test_stoic_table_errors(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        STOIC().cases(stoic(tmp_path, table))


def test_stoic_without_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reference\.csv is missing"):
        STOIC().cases(touch(tmp_path, "data/mha/3.mha"))


def test_folder_takes_volumes_and_reports_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(
        tmp_path, "a/scan10.nii.gz", "a/scan2.NII", "b/c/x.nrrd", "m.mha", "d.mhd", "d.zraw", "e.nhdr",
        "e.raw.gz",
        "notes.txt", ".hidden.nii", "._a.nii.gz", "a/scan2_seg.nii.gz", "a/label.nii", "x_Mask.nrrd", "y.dcm",
        "segment.nii",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        cases = list_cases(Folder(), tmp_path).cases
    assert [case.id for case in cases] == ["a/scan2", "a/scan10", "b/c/x", "d", "e", "m", "segment"]
    assert all(case.subject == case.id and not case.labelled for case in cases)
    left_out = {entry.path.name for entry in Folder().left_out(tmp_path)}
    assert left_out == {
        "notes.txt", ".hidden.nii", "._a.nii.gz", "scan2_seg.nii.gz", "label.nii", "x_Mask.nrrd", "y.dcm",
    }  # fmt: skip
    assert "2 entries left out: is a hidden file (._a.nii.gz, .hidden.nii)" in caplog.text
    assert "3 entries left out: is named as a segmentation" in caplog.text


@pytest.mark.parametrize("folder", ["labelsTr", "a/LabelsTs", "labelsTr/deeper"])
def test_folder_takes_no_masks_of_other_layouts(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An nnU-Net folder without --as would pretrain on its masks."""
    root = tmp_path / "labelsTr"  # the name of what the user gave says nothing
    touch(root, "imagesTr/x_0000.nii.gz", f"{folder}/x.nii.gz")
    with caplog.at_level(logging.WARNING):
        assert [case.id for case in list_cases(Folder(), root).cases] == ["imagesTr/x_0000"]
    assert (
        "1 entry left out: lies in a folder of segmentations; nnunet and msd read such layouts (x.nii.gz)"
        in (caplog.text)
    )


def test_folder_without_volumes(tmp_path: Path) -> None:
    touch(tmp_path, "IM0001.dcm", "readme.txt")
    with pytest.raises(DataError, match=r"holds no volume: found 2 entries ending in \.dcm, \.txt.*dcm2niix"):
        Folder().cases(tmp_path)


def test_folder_refuses_one_name_twice(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "a.mha")
    with pytest.raises(DataError, match=r"a\.mha and .*a\.nii have the same name"):
        Folder().cases(tmp_path)


@pytest.mark.parametrize("dataset", BUILTIN_DATASETS, ids=lambda dataset: dataset.name)
def test_missing_empty_and_wrong_folders(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=re.escape(f"{tmp_path / 'gone'} does not exist. Give a folder that holds")
    ):
        dataset.cases(tmp_path / "gone")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        DataError, match=re.escape(f"{empty} is empty. Give a folder that holds {dataset.layout}")
    ):
        dataset.cases(empty)
    wrong = touch(tmp_path / "wrong", "holiday.jpg", "more/cat.png")
    with pytest.raises(DataError, match=r"holiday|\.jpg") as caught:  # what was found
        dataset.cases(wrong)
    assert str(wrong) in str(caught.value) and dataset.layout in str(caught.value)
    with pytest.raises(DataError, match="is a file, not a folder"):
        dataset.cases(wrong / "holiday.jpg")


@pytest.mark.parametrize("dataset", BUILTIN_DATASETS, ids=lambda dataset: dataset.name)
def test_declared_facts_are_consistent(dataset: Dataset) -> None:
    index = dataset.label_index()
    count = len(dataset.label_values)
    assert sorted(set(index.values())) == list(range(count + 1))
    assert [index[value] for value in dataset.label_values] == list(range(1, count + 1))
    assert all(index[value] == 0 for value in dataset.ignored_label_values)
    assert not dataset.ignored_label_values & set(dataset.label_values)
    assert len(set(dataset.label_names())) == count
    assert dataset.modality in {"ct", "mr", "auto"} and dataset.summary and dataset.layout


def test_label_values_are_those_of_the_releases() -> None:
    assert MMWHS().label_index() == {
        0: 0, 500: 1, 600: 2, 420: 3, 550: 4, 205: 5, 820: 6, 850: 7, 421: 3,
    }  # fmt: skip
    candi = CANDI()
    assert len(candi.label_values) == 28
    assert {2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 17, 18, 26, 28} < set(candi.label_values)
    assert {41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60} < set(candi.label_values)
    assert {14, 15, 16, 24, 29, 30, 61, 62, 72, 77, 85} <= candi.ignored_label_values
    names = candi.label_names()
    assert [n.replace("left", "right") for n in names[:14]] == list(names[14:])  # pairs, in the same order


def test_names() -> None:
    assert image_suffix(Path("A.NII.GZ")) == ".nii.gz" and image_suffix(Path("a.nii.bz2")) is None
    assert sorted(["b", "a10", "a9", "10", "9"], key=natural_key) == ["9", "10", "a9", "a10", "b"]


@pytest.mark.parametrize("module", ["cohort", "layouts.bundled", "layouts.listing", "splits"])
def test_listing_imports_nothing_heavy(module: str) -> None:
    heavy = ["torch", "monai", "nibabel", "SimpleITK", "scipy", "pandas", "skimage"]
    code = f"import sys, ssl3d.data.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
