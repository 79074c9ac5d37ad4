"""Layouts of researchers' own data: what is listed, the facts that stand in files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssl3d.bench.sources import open_dataset
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.layouts.bids import BIDS
from ssl3d.data.layouts.bundled import LAYOUTS
from ssl3d.data.layouts.csv_table import Table
from ssl3d.data.layouts.listing import list_cases
from ssl3d.data.layouts.msd import MSD
from ssl3d.data.layouts.nnssl import NNSSL
from ssl3d.data.layouts.nnunet import NNUNet
from ssl3d.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def listed(dataset: Dataset, root: Path) -> tuple[Dataset, list[Case]]:
    opened = dataset.open(root)
    return opened, opened.cases(root)


V2 = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "file_ending": ".nrrd",
}


def test_nnunet_version_2(tmp_path: Path) -> None:
    write(tmp_path / "dataset.json", V2)
    touch(tmp_path, "imagesTr/a_2_0000.nrrd", "imagesTr/a_10_0000.nrrd", "imagesTr/a_2_0001.nrrd",
          "labelsTr/a_2.nrrd", "labelsTr/a_10.nrrd", "imagesTs/b_0000.nrrd")  # fmt: skip
    dataset, cases = listed(NNUNet(), tmp_path)
    assert (dataset.modality, dataset.intensity_offset) == ("ct", "auto")
    assert dataset.label_values == {1: "liver", 2: "tumour"} and not NNUNet().label_values
    assert [(c.id, c.subset, c.label and c.label.name) for c in cases] == [
        ("a_2", "train", "a_2.nrrd"), ("a_10", "train", "a_10.nrrd"), ("b", "test", None),
    ]  # fmt: skip


def test_nnunet_version_1_and_several_channels(tmp_path: Path) -> None:
    write(
        tmp_path / "dataset.json",
        {"modality": {"0": "FLAIR", "1": "T1"}, "labels": {"0": "background", "1": "a"}},
    )
    touch(tmp_path, "imagesTr/x_0000.nii.gz", "imagesTr/x_0001.nii.gz", "labelsTr/x.nii.gz")
    with pytest.raises(
        DataError, match=r"2 channels \(0: FLAIR, 1: T1\).*--channel 0 for .*--set data.channel.nnunet=0 for"
    ):
        NNUNet().open(tmp_path)
    with pytest.raises(DataError, match=r"no channel T2. Fix: choose one of 0: FLAIR, 1: T1"):
        NNUNet().with_facts(channel="T2").open(tmp_path)
    for choice, name in (("T1", "x_0001.nii.gz"), (1, "x_0001.nii.gz"), ("0", "x_0000.nii.gz")):
        dataset, cases = listed(NNUNet().with_facts(channel=choice), tmp_path)
        assert dataset.modality == "mr" and dataset.label_values == {1: "a"}
        assert [(case.id, case.image.name) for case in cases] == [("x", name)]
        assert dataset.reading().channel is None, "each file is 3D"


def test_a_decathlon_is_no_nnunet(tmp_path: Path) -> None:
    """Its images have no ``_0000``: that is said, not that every label lacks its image."""
    write(tmp_path / "dataset.json", {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}})
    touch(tmp_path, "imagesTr/x.nii.gz", "labelsTr/x.nii.gz")
    with pytest.raises(DataError, match=r"layout of nnunet: there is no image \.\.\._0000 in imagesTr"):
        NNUNet().cases(tmp_path)


def test_a_folder_of_another_layout_is_said_to_be_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decathlon, nnunet, bids = (tmp_path / name for name in ("d", "n", "b"))
    entry = {"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"}
    for root, facts in ((decathlon, {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}, "training": [entry]}),
                        (nnunet, {**V2, "file_ending": ".nii.gz"})):  # fmt: skip
        write(root / "dataset.json", facts)
    touch(decathlon, "imagesTr/x.nii.gz", "labelsTr/x.nii.gz")
    touch(nnunet, "imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz")
    write(bids / "dataset_description.json", {"Name": "b", "BIDSVersion": "1.8"})
    touch(bids, "sub-1/anat/sub-1_T1w.nii.gz")
    layouts = {"msd": decathlon, "nnunet": nnunet, "bids": bids}
    for right, root in layouts.items():
        for tried in layouts.keys() - {right}:
            with pytest.raises(
                DataError, match=rf"is that of the layout {right}: write {right}={root} for --data"
            ):
                list_cases(open_dataset(tried, root), root)
        caplog.clear()
        assert list_cases(open_dataset(right, root), root).cases and "is that of" not in caplog.text
        assert list_cases(open_dataset("folder", root), root).cases
        assert (
            f"is that of the layout {right}" in caplog.text and "read with the layout folder" in caplog.text
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image;subject;class\na.nii;b;c\n", 'no column "image".*Fix: .*separated by commas'),
        ("image,subject\na.nii,Müller\n".encode("cp1252"), "not a table in UTF-8 .*CSV UTF-8"),
        (bytes([0x1F, 0x8B, 0x80, 0]) * 9, "not a table in UTF-8"),
        (b"", "its columns are none"),
        (b"image\n", "has no rows"),
    ],
    ids=["semicolons", "windows", "binary", "empty", "header only"],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Table().open(tmp_path / "t.csv")


def test_nnunet_that_lists_its_files(tmp_path: Path) -> None:
    files = {"k": {"images": ["../x/k.nii.gz"], "label": "../y/k.nii.gz"}}
    write(tmp_path / "dataset.json", V2 | {"dataset": files})
    _, (case,) = listed(NNUNet(), tmp_path)
    assert case.image == tmp_path / "../x/k.nii.gz" and case.label == tmp_path / "../y/k.nii.gz"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, 'label "whole" is a region'),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "cannot be scored"),
        ({"labels": {"a": "one"}}, "no whole number"),
        ({"labels": {}}, 'has no "labels"'),
        ({"file_ending": ".png"}, 'end in ".png" cannot be read'),
    ],
)
def test_nnunet_facts_that_make_no_sense(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "dataset.json", V2 | change)
    with pytest.raises(DataError, match=message):
        listed(NNUNet(), touch(tmp_path, "imagesTr/a_0000.nrrd", "labelsTr/a.nrrd"))


def test_regions_do_not_matter_where_labels_are_not_read(tmp_path: Path) -> None:
    """BraTS has them, and is what people pretrain on."""
    write(tmp_path / "dataset.json", V2 | {"labels": {"background": 0, "whole": [1, 2]}})
    dataset = NNUNet().open(touch(tmp_path, "imagesTr/a_0000.nrrd", "labelsTr/a.nrrd"), labels=False)
    assert (dataset.modality, len(dataset.cases(tmp_path))) == ("ct", 1)


def test_nnunet_lists_every_missing_file(tmp_path: Path) -> None:
    write(tmp_path / "dataset.json", V2)
    touch(tmp_path, "imagesTr/a_0000.nrrd", "labelsTr/b.nrrd", "labelsTs/c.nrrd")
    with pytest.raises(
        DataError, match=r"(?s)3 files.*a_0000\.nrrd has no label.*b\.nrrd has no image.*c\.nrrd"
    ):
        NNUNet().cases(tmp_path)


def test_decathlon(tmp_path: Path) -> None:
    facts = {
        "modality": {"0": "CT"}, "labels": {"0": "background", "1": "pancreas", "2": "cancer"},
        "training": [{"image": "./imagesTr/p_1.nii.gz", "label": "./labelsTr/p_1.nii.gz"}],
        "test": ["./imagesTs/p_2.nii.gz"],
    }  # fmt: skip
    write(tmp_path / "dataset.json", facts)
    touch(tmp_path, "imagesTr/p_1.nii.gz", "labelsTr/p_1.nii.gz", "imagesTs/p_2.nii.gz")
    dataset, cases = listed(MSD(), tmp_path)
    assert dataset.modality == "ct" and dataset.label_values == {1: "pancreas", 2: "cancer"}
    assert [(c.id, c.subset, c.labelled) for c in cases] == [("p_1", "train", True), ("p_2", "test", False)]
    (tmp_path / "labelsTr/p_1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"labelsTr/p_1\.nii\.gz is listed and missing"):
        MSD().cases(tmp_path)


def test_bids(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz", "sub-01/anat/sub-01_T1w.json",
          "sub-02/ses-a/anat/sub-02_ses-a_FLAIR.nii", "sub-02/ses-a/func/sub-02_ses-a_task-x_bold.nii.gz",
          "derivatives/fs/sub-01/anat/sub-01_desc-aseg_dseg.nii.gz")  # fmt: skip
    write(tmp_path / "derivatives/fs/desc-aseg_dseg.tsv", "index\tname\n0\tnothing\n17\tleft hippocampus\n")
    dataset, cases = listed(BIDS(), tmp_path)
    assert dataset.label_values == {17: "left hippocampus"}
    assert [(c.id, c.subject, c.labelled) for c in cases] == [
        ("sub-01_T1w", "sub-01", True), ("sub-01_T2w", "sub-01", False), ("sub-02_ses-a_FLAIR", "sub-02", False),
    ]  # fmt: skip
    touch(tmp_path, "derivatives/other/sub-01/anat/sub-01_dseg.nii.gz")
    with pytest.raises(DataError, match="sub-01 has 2 segmentations"):
        BIDS().cases(tmp_path)


def nnssl(paths: list[str]) -> dict[str, Any]:
    images = [{"name": p, "modality": "T1w", "image_path": p, "associated_masks": None} for p in paths]
    sessions = {"ses-DEFAULT": {"session_id": "ses-DEFAULT", "images": images}}
    return {"collection_index": 1, "datasets": {"D1": {"subjects": {"s1": {"sessions": sessions}}}}}


def test_nnssl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "Dataset001_X"
    monkeypatch.setenv("SCANS", "/far")
    paths = ["/abs/a.nii.gz", "b.nii.gz", "$SCANS/c.nii.gz", "$Dataset001_X/d.nii.gz", "$Dataset002/e.nii.gz"]
    write(root / "pretrain_data.json", nnssl(paths))
    cases = NNSSL().cases(root)
    assert {c.subject for c in cases} == {"D1/s1"}
    assert {str(c.image) for c in cases} == {
        "/abs/a.nii.gz", str(root / "b.nii.gz"), "/far/c.nii.gz", str(root / "d.nii.gz"),
        str(tmp_path / "Dataset002/e.nii.gz"),
    }  # fmt: skip
    write(root / "pretrain_data.json", {"datasets": {"D1": {}}})
    with pytest.raises(DataError, match="lacks 'subjects'"):
        NNSSL().cases(root)


def test_csv_with_classes_and_splits(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.mha", "m.nii.gz")
    table = write(tmp_path / "t.csv", "Subject,Image,Class,Split,note\n1,a.nii.gz,ill,train,\n1,b.nii.gz,well,VAL,\n"
                                      f"2,{tmp_path / 'c.mha'},ill,test,x\n")  # fmt: skip
    for place in (table, tmp_path):
        dataset, cases = listed(Table(), place)
        assert dataset.target_names == {0: "ill", 1: "well"}
        assert [(c.id, c.subject, c.target, c.subset) for c in cases] == [
            ("a", "1", 0, "train"), ("b", "1", 1, "val"), (str(tmp_path / "c").strip("/"), "2", 0, "test"),
        ]  # fmt: skip
    named = dataset.with_facts(target_names={0: "well", 1: "ill"})
    assert {c.id: c.target for c in named.cases(table)}["a"] == 1, (
        "a task file decides which class is positive"
    )
    with pytest.raises(DataError, match='class "ill" is not one of well, sick'):
        dataset.with_facts(target_names={0: "well", 1: "sick"}).cases(table)


def test_csv_with_labels_values_and_several_classes(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "m.nii.gz")
    table = write(
        tmp_path / "t.csv", "image,label,class,value,id\na.nii.gz,m.nii.gz,x;y,3.5,k1\nb.nii.gz,,none,4,k2\n"
    )
    dataset, (first, second) = listed(Table(), table)
    assert dataset.target_names == {0: "x", 1: "y"}
    assert (first.id, first.subject, first.label, first.value) == ("k1", "k1", tmp_path / "m.nii.gz", 3.5)
    assert (first.classes, second.classes, first.target, second.label) == ((0, 1), (), None, None)


def test_csv_lists_every_bad_row(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    table = write(tmp_path / "t.csv", "image,label,split,value\ngone.nii.gz,,,\na.nii.gz,no.nii.gz,dev,x\n")
    with pytest.raises(DataError, match="4 problems") as caught:
        Table().cases(table)
    for part in ("line 2: image gone.nii.gz", "line 3: label no.nii.gz", 'split is "dev"', 'value is "x"'):
        assert part in str(caught.value)
    with pytest.raises(DataError, match='no column "image"; its columns are file'):
        Table().cases(write(tmp_path / "u.csv", "file\nx\n"))
    with pytest.raises(DataError, match="there are 2 .csv files"):
        Table().cases(tmp_path)
    with pytest.raises(DataError, match="has no rows"):
        Table().cases(write(tmp_path / "v.csv", "image\n"))


@pytest.mark.parametrize("dataset", LAYOUTS, ids=lambda dataset: dataset.name)
def test_missing_folders_and_damaged_files(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone does not exist"):
        listed(dataset, tmp_path / "gone")
    touch(tmp_path, "holiday.jpg")
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        listed(dataset, tmp_path)
    for name in ("dataset.json", "pretrain_data.json"):
        write(tmp_path / name, "{")
    if dataset.name in {"nnunet", "msd", "nnssl"}:
        with pytest.raises(DataError, match="is not valid JSON"):
            listed(dataset, tmp_path)
