"""Nothing in a folder is left out without a word: links, loops, endings, counts; and who is on which image."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner

from ssl3d.bench.sources import pretraining_cohort, task_cohort, task_splits
from ssl3d.cli import main
from ssl3d.config import load_settings
from ssl3d.data.checks.case import check_cases
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.entries import walk
from ssl3d.data.layouts.bids import BIDS
from ssl3d.data.layouts.csv_table import Table
from ssl3d.data.layouts.listing import list_cases
from ssl3d.data.layouts.msd import MSD
from ssl3d.data.layouts.nnunet import NNUNet
from ssl3d.data.layouts.releases import Folder
from ssl3d.downstream.task_files import parse_task
from ssl3d.errors import DataError


def save(path: Path, seed: int = 0, label: bool = False) -> Path:
    """A body with an organ; as a label the organ alone, which depends on the seed."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 14)] * 3, indexing="ij"))
    organ = ((grid - rng.uniform(-0.2, 0.2, (3, 1, 1, 1))) ** 2).sum(0) < 0.2
    data = organ if label else 100 * ((grid**2).sum(0) < 0.8) + 80 * organ + rng.normal(0, 5, organ.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(
        nibabel.Nifti1Image(data.astype(np.uint8 if label else np.float32), np.diag([2, 2, 2, 1])), path
    )
    return path


def nnunet(root: Path, names: list[str], **facts: object) -> Path:
    """Images and labels of ``names``; two with one label get the same seed from what stands before the first _."""
    for i, name in enumerate(names):
        save(root / "imagesTr" / f"{name}_0000.nii.gz", i)
        save(root / "labelsTr" / f"{name}.nii.gz", i, label=True)
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "organ": 1},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps({**content, "numTraining": len(names), **facts}))
    return root


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


# --- links ----------------------------------------------------------------------------------------


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    store, data = tmp_path / "store", tmp_path / "data"
    for i in range(2):
        save(store / f"s{i}" / "scan.nii.gz", i)
    save(data / "real" / "a.nii.gz", 2)
    (data / "s0").symlink_to(store / "s0", target_is_directory=True)
    (data / "s1").symlink_to(os.path.relpath(store / "s1", data), target_is_directory=True)
    (data / "b.nii.gz").symlink_to(save(store / "b.nii.gz", 3))
    (data / "real" / "up").symlink_to(data, target_is_directory=True)  # a loop
    (data / "top").symlink_to(tmp_path, target_is_directory=True)  # a larger one
    (data / "twice").symlink_to(store / "s0", target_is_directory=True)
    (data / "self").symlink_to("self")
    listing = list_cases(Folder(), data)
    assert [case.id for case in listing.cases] == ["b", "real/a", "s0/scan", "s1/scan"]
    reasons = {entry.path.name: entry.reason for entry in listing.left_out}
    assert set(reasons) == {"up", "top", "twice"}
    assert "which holds it" in reasons["up"] and "which holds it" in reasons["top"]
    assert reasons["twice"] == f"is the same folder as {data / 's0'}, which is read"
    assert [(f.path.name, f.problem) for f in listing.findings] == [
        ("self", "is a link that leads back to itself")
    ]


def test_a_tree_of_links_is_walked_once(tmp_path: Path) -> None:
    """Each of 12 folders holds two links to the next: 4096 ways to the last, which is read once."""
    for i in range(12):
        (tmp_path / "store" / str(i)).mkdir(parents=True)
        for name in "ab" if i < 11 else "":
            (tmp_path / "store" / str(i) / name).symlink_to(tmp_path / "store" / str(i + 1))
    (tmp_path / "store" / "11" / "x.nii").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in").symlink_to(tmp_path / "store" / "0")
    tree = walk(tmp_path / "data")
    assert len(tree.files) == 1 and len(tree.left_out) == 11


def test_links_that_lead_nowhere_are_findings_everywhere(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i in range(2):
        save(data / f"here{i}.nii.gz", i)
        (data / f"gone{i}.nii.gz").symlink_to(tmp_path / "annex" / f"object{i}")
    (data / "series").mkdir()
    (data / "series" / "IM0001").symlink_to(tmp_path / "annex" / "slice")
    (data / "notes.txt").symlink_to(tmp_path / "annex" / "notes")  # no image, whatever it is
    code, said = run("data", "verify", data, "--out", tmp_path / "report")
    assert code == 1 and "3 findings" in said
    report = json.loads((tmp_path / "report" / "findings.json").read_text())
    assert [case["id"] for case in report["skipped"]] == ["gone0", "gone1"] and "IM0001" in report["cohort"][
        0
    ]
    assert "notes.txt" in report["left_out"][0]
    settings = load_settings("smoke")
    with pytest.raises(DataError, match="3 problems in 3 files") as refused:
        pretraining_cohort(str(data), settings, tmp_path / "cache")
    assert "which is not there. Fix: fetch or copy what it points to" in str(refused.value)
    cohort = pretraining_cohort(str(data), settings, tmp_path / "cache", "skip")
    assert [case.id for case in cohort.cases] == ["here0", "here1"]
    assert sorted(case["id"] for case in cohort.skipped) == ["IM0001", "gone0", "gone1"]
    (tmp_path / "annex").mkdir()
    for name in ("object0", "object1"):  # the remedy
        save(tmp_path / "x.nii.gz", 7 + int(name[-1])).rename(tmp_path / "annex" / name)
    (data / "series" / "IM0001").unlink()
    assert run("data", "verify", data)[0] == 0


def test_a_folder_that_may_not_be_read_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.nii.gz")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: Path) -> object:  # root may read everything
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("ssl3d.data.files.entries.os.scandir", refuse)
    (found,) = list_cases(Folder(), tmp_path).findings
    assert found.path.name == "locked" and found.problem == "cannot be opened (Permission denied)"


# --- what a layout has no place for ---------------------------------------------------------------


def test_every_entry_of_an_nnunet_folder_is_read_or_named(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", [f"c{i}" for i in range(6)], numTraining=8)
    for name in ("imagesTr/c1_0000", "labelsTr/c1"):
        (root / f"{name}.nii.gz").rename(root / f"{name}.NII.GZ")
    for name in ("imagesTr/c2_0000", "labelsTr/c2"):
        (root / f"{name}.nii.gz").rename(root / f"{name}.nii.g")
        (root / f"{name}.nii.g").rename(root / f"{name}.nii")
    (root / "imagesTr" / "c3_0000.nii.gz").rename(root / "imagesTr" / "c3.nii.gz")
    save(root / "imagesTr" / "c0_0001.nii.gz", 9)
    save(root / "elsewhere" / "x.nii.gz", 10)
    (root / "imagesTr" / "readme.txt").write_text("hello")
    dataset = NNUNet().open(root)
    listing = list_cases(dataset, root)
    assert [case.id for case in listing.cases] == ["c0", "c1", "c4", "c5"]
    assert {(f.path.name, f.problem.split(",")[0]) for f in listing.findings} == {
        ("c2_0000.nii", "ends in .nii"), ("c2.nii", "ends in .nii"),
        ("dataset.json", "promises 8 training cases (numTraining)"),
        ("c3.nii.gz", "has no number of a channel (_0000) before its ending"),
    }  # fmt: skip
    assert {entry.path.name: entry.reason for entry in listing.left_out} == {
        "c0_0001.nii.gz": "is another channel than 0000", "readme.txt": "is not of a format that is read",
        "x.nii.gz": "has no place in the layout nnunet",
        "c3.nii.gz": "belongs to an image of imagesTr that is left out",
    }  # fmt: skip
    every = {path for path in root.rglob("*.*") if path.name != "dataset.json"}
    told = {case.image for case in listing.cases} | {case.label for case in listing.cases}
    assert every == told | {e.path for e in (*listing.left_out, *listing.findings)} - {root / "dataset.json"}
    code, said = run("data", "verify", root, "--as", "nnunet")
    assert code == 1 and "4 findings" in said


def test_promises_of_a_decathlon(tmp_path: Path) -> None:
    entry = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    facts = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "training": [entry]}
    for name in entry.values():
        save(tmp_path / name, 0, label="labels" in name)
    save(tmp_path / "imagesTr" / "unlisted.nii.gz", 1)
    for promised, problems in ((1, []), (3, ["promises 3 training cases (numTraining), and 1 is there"])):
        (tmp_path / "dataset.json").write_text(json.dumps({**facts, "numTraining": promised}))
        listing = list_cases(MSD().open(tmp_path), tmp_path)
        assert [finding.problem for finding in listing.findings] == problems
        assert [entry.path.name for entry in listing.left_out] == ["unlisted.nii.gz"]


def test_a_plugins_adapter_leaves_nothing_out_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(Dataset):
        name, summary, layout = "own", "", "a*.nii"

        def cases(self, root: Path) -> list[Case]:
            return [Case(p.stem, p.stem, p) for p in sorted(root.glob("a*.nii"))]

    for name in ("a1.nii", "b1.nii", "sub/a2.nii"):
        save(tmp_path / name)
    (tmp_path / "sub" / "lost.nii").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        listing = list_cases(Own(), tmp_path)
    assert [entry.path.name for entry in listing.left_out] == ["b1.nii", "a2.nii"]
    assert "2 entries left out: has no place in the layout own (b1.nii, a2.nii)" in caplog.text
    assert [finding.path.name for finding in listing.findings] == ["lost.nii"]


def test_bids_through_links_and_in_capitals(tmp_path: Path) -> None:
    save(tmp_path / "store" / "anat" / "sub-01_T1w.nii.gz", 0)
    (tmp_path / "store" / "anat" / "sub-01_T1w.nii.gz").rename(
        tmp_path / "store" / "anat" / "sub-01_T1w.NII.GZ"
    )
    save(tmp_path / "d" / "derivatives" / "p" / "sub-01" / "anat" / "sub-01_dseg.nii.gz", 0, label=True)
    save(tmp_path / "d" / "sub-01x" / "anat" / "sub-01x_bold.nii.gz", 1)
    (tmp_path / "d" / "sub-01").symlink_to(tmp_path / "store")
    listing = list_cases(BIDS(), tmp_path / "d")
    assert [(c.id, c.subject, c.label is not None) for c in listing.cases] == [("sub-01_T1w", "sub-01", True)]
    assert [entry.path.name for entry in listing.left_out] == ["sub-01x_bold.nii.gz"]


# --- who is on which image ------------------------------------------------------------------------

VISITS = [f"study_{person:02d}{visit:02d}" for person in range(8) for visit in range(3)]


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nnunet(tmp_path_factory.mktemp("visits") / "d", VISITS)


def people_in(splits: list, person: slice) -> list[tuple[set[str], ...]]:
    return [tuple({case[person] for case in part} for part in (s.train, s.val, s.test)) for s in splits]


def test_names_that_look_like_visits_lead_to_a_warning_whose_remedy_works(
    visits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = f"{{name: v, kind: segmentation, dataset: nnunet, data: {visits}%s}}"
    settings, cache = load_settings("smoke", ["data.spacing_mm=4"]), tmp_path / "cache"
    with caplog.at_level(logging.WARNING):
        plain = parse_task(task % "", tmp_path / "v.yaml")
        cohort = task_cohort(plain, None, settings, cache)
    assert "names look like several images of one person (study_0000, study_0001, study_0002)" in caplog.text
    ((train, _, test),) = people_in(task_splits(plain, cohort, settings), slice(6, 8))
    assert train & test, "without the pattern people are in two parts: this is what the warning is about"
    pattern = caplog.text.split("--subject-pattern '")[1].split("'")[0]
    assert f"subject: '{pattern}'" in caplog.text and "8 people on 24 images" in caplog.text
    caplog.clear()
    said = parse_task(task % f", subject: '{pattern}'", tmp_path / "v.yaml")
    folds = parse_task(task % f", subject: '{pattern}', splits: {{folds: 4}}", tmp_path / "v.yaml")
    for one in (said, folds):
        cohort = task_cohort(one, None, settings, cache)
        for parts in people_in(task_splits(one, cohort, settings), slice(6, 8)):
            assert all(parts) and sum(map(len, parts)) == 8 == len(set.union(*parts))
    assert "WARNING" not in caplog.text
    code, text = run("data", "verify", visits, "--as", "nnunet", "--subject-pattern", pattern)
    assert code == 0 and "24 cases of 8 subjects" in text
    code, text = run("data", "verify", visits, "--as", "nnunet", "--subject-pattern", f"nnunet={pattern}")
    assert code == 0 and "24 cases of 8 subjects" in text
    code, text = run("data", "verify", visits, "--as", "nnunet", "--subject-pattern", ".+")
    assert code == 0 and "24 cases of 24 subjects" in text
    code, text = run("data", "verify", visits, "--as", "nnunet", "--subject-pattern", "(p")
    assert code == 2 and "is not a regular expression" in text


def test_contrasts_that_share_a_mask_are_one_person(tmp_path: Path) -> None:
    """As copies of one file in nnU-Net's layout, as one file in a table, and as a plain mistake."""
    root = nnunet(tmp_path / "n", ["p1_T1", "p1_T2", "p2_T1", "p2_T2"])
    for person in ("p1", "p2"):
        (root / "labelsTr" / f"{person}_T2.nii.gz").write_bytes(
            (root / "labelsTr" / f"{person}_T1.nii.gz").read_bytes()
        )
    assert run("data", "verify", root, "--as", "nnunet")[0] == 0
    (root / "labelsTr" / "p2_T1.nii.gz").write_bytes((root / "labelsTr" / "p1_T1.nii.gz").read_bytes())
    dataset = NNUNet().open(root)
    (found,) = check_cases(list_cases(dataset, root).cases, dataset)
    assert found.path.name == "p2_T1.nii.gz" and found.problem.endswith("the label of another image")
    cured = list_cases(dataset.with_facts(subject_pattern="(p)"), root).cases
    assert check_cases(cured, dataset) == [], "one person, if the user says so"
    pairs = [f"imagesTr/p1_{contrast}_0000.nii.gz,labelsTr/p1_T1.nii.gz" for contrast in ("T1", "T2")]
    rows = "\n".join(["image,label", *pairs])
    (root / "t.csv").write_text(rows)
    listing = list_cases(Table().open(root / "t.csv"), root / "t.csv")
    assert len(listing.cases) == 2 and len({case.subject for case in listing.cases}) == 1


# --- splits of nnU-Net ----------------------------------------------------------------------------


def test_splits_final_is_honoured(visits: Path, tmp_path: Path) -> None:
    folds = [
        {"train": VISITS[:k] + VISITS[k + 6 :], "val": VISITS[k : k + 6]}
        for k in (0, 6, 12)  # two people a fold
    ]
    file = tmp_path / "deep" / "splits_final.json"
    file.parent.mkdir()
    file.write_text(json.dumps(folds))
    text = (
        f"{{name: v, kind: segmentation, dataset: nnunet, data: {visits}, subject: '^(.*)..$', splits: %s}}"
    )
    settings, cache = load_settings("smoke", ["data.spacing_mm=4"]), tmp_path / "cache"
    named = parse_task(text % "{file: deep/splits_final.json}", tmp_path / "v.yaml")
    cohort = task_cohort(named, None, settings, cache)
    splits = task_splits(named, cohort, settings)
    assert [split.name for split in splits] == ["fold0", "fold1", "fold2"]
    for split, fold in zip(splits, folds, strict=True):
        assert sorted(split.test) == fold["val"] and sorted(split.train + split.val) == fold["train"]
    assert all(sum(map(len, parts)) == 8 for parts in people_in(splits, slice(6, 8)))
    # Beside dataset.json, without a name; and as --splits-file says it.
    beside = parse_task(text % "file", tmp_path / "v.yaml")
    with pytest.raises(DataError, match=r"there is none at .*d/splits_final\.json.*--splits-file"):
        task_splits(beside, cohort, settings)
    (visits / "splits_final.json").write_text(json.dumps(folds[:1]))
    assert task_splits(beside, cohort, settings)[0].test == splits[0].test
    (visits / "splits_final.json").unlink()
    data = settings.data.model_copy(update={"splits_file": {"v": str(file)}})
    assert task_splits(beside, cohort, settings.model_copy(update={"data": data})) == splits
    for content, message in (
        ("{", "not valid JSON"), ('[{"train": ["a"]}]', "not a list of folds"),
        (json.dumps([{"train": ["nobody"], "val": ["study_0000"]}]), "1 case that the data do not have.*nobody"),
        (json.dumps([{"train": VISITS[1:], "val": VISITS[:1]}]), r"1 image of a person who is in another part"),
        (json.dumps([{"train": VISITS[:3], "val": []}]), "needs|has no case|cannot be split"),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            task_splits(named, cohort, settings)
