"""The phantom cohorts: fixed topology, invertible deformation, real layouts, and no shortcut."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ssl3d.data.checks.file import read_labels, read_volume
from ssl3d.data.layouts.releases import ASOCA, CANDI, MMWHS, STOIC, Folder
from ssl3d.data.phantoms import COHORTS, PhantomParameters, PhantomSubject, generate, write, write_cohorts
from ssl3d.data.phantoms.geometry import jacobian_determinant, voxel_centres
from ssl3d.data.phantoms.subjects import Cohort, lesion_count
from ssl3d.downstream.metrics import auc
from ssl3d.errors import ConfigError, DataError, ReadError

SMALL = PhantomParameters(edge=32, spacing_mm=4.8)
COUNTS = {"pretrain": 2, "mmwhs": (2, 1), "asoca": 3, "candi": 3, "stoic": 4}


@cache
def subject(cohort: str, index: int, parameters: PhantomParameters = SMALL) -> PhantomSubject:
    return generate(cohort, index, parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("cohort", COHORTS)
def test_a_subject_is_a_function_of_its_parameters(cohort: str) -> None:
    first, again = subject(cohort, 0), generate(cohort, 0, SMALL)  # type: ignore[arg-type]
    assert np.array_equal(first.image, again.image)
    for other in (
        subject(cohort, 1),
        generate(cohort, 0, PhantomParameters(edge=32, spacing_mm=4.8, seed=1)),  # type: ignore[arg-type]
        generate(cohort, 0, PhantomParameters(edge=32, spacing_mm=4.8, profile="development")),  # type: ignore[arg-type]
    ):
        assert not np.array_equal(first.image, other.image)
    assert first.image.dtype == np.int16


@pytest.mark.parametrize("profile", ["benchmark", "development"])
@pytest.mark.parametrize("cohort", ["mmwhs", "candi", "stoic"])
def test_deformations_are_invertible(cohort: str, profile: str) -> None:
    parameters = PhantomParameters(edge=32, spacing_mm=4.8, profile=profile)  # type: ignore[arg-type]
    points = voxel_centres((12, 12, 12), 13.0).astype(np.float64)
    for index in range(3):
        mapping = subject(cohort, index, parameters).deformation
        assert jacobian_determinant(mapping, points).min() > 0.05
        np.testing.assert_allclose(mapping.to_subject(mapping.to_atlas(points)), points, atol=1e-4)
        shift = mapping.to_atlas(points) - points
        assert shift.std(axis=1).max() > 1, "subjects do differ in shape"


@pytest.mark.parametrize("edge", [32, 48])
def test_every_subject_has_every_structure_in_one_piece(edge: int) -> None:
    parameters = PhantomParameters(edge=edge, spacing_mm=153.6 / edge)
    for index in range(4):
        labels = subject("mmwhs", index, parameters).labels
        assert labels is not None and set(np.unique(labels)) == {0, 205, 420, 500, 550, 600, 820, 850}
        for value in (500, 600, 420, 550, 205, 820, 850):
            parts, _ = ndimage.label(labels == value)
            sizes = np.bincount(parts.ravel())[1:]
            assert sizes.max() > 0.93 * sizes.sum(), f"structure {value} of subject {index} falls apart"


def test_every_brain_has_its_28_structures_on_the_right_sides() -> None:
    parameters = PhantomParameters(edge=40, spacing_mm=3.84)
    targets = set(CANDI.label_values)
    for index in range(4):
        labels = subject("candi", index, parameters).labels
        assert labels is not None and targets <= set(np.unique(labels)) <= targets | {0, 14, 15, 16, 24}
        for left, right in ((2, 41), (17, 53), (12, 51)):
            x_left, x_right = (np.argwhere(labels == v)[:, 0].mean() for v in (left, right))
            assert x_left < x_right, "axis 0 runs from left to right"
            assert 0.6 < (labels == left).sum() / (labels == right).sum() < 1.6


@pytest.mark.parametrize("edge", [32, 64])
def test_coronaries_are_thin_connected_trees(edge: int) -> None:
    parameters = PhantomParameters(edge=edge, spacing_mm=153.6 / edge)
    for index in range(2):
        labels = subject("asoca", index, parameters).labels
        assert labels is not None
        parts, _ = ndimage.label(labels, np.ones((3, 3, 3)))
        sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1]
        assert sizes[:2].sum() > 0.95 * sizes.sum(), "two trees, left and right"
        # The widest ball that fits anywhere has a radius of at most 1.5 voxels, junctions apart.
        depth = ndimage.distance_transform_edt(labels)
        assert depth.max() <= 2.5 and np.quantile(depth[labels > 0], 0.97) < 2
        assert 0.001 < labels.mean() < 0.02


def test_both_classes_occur_and_differ_in_lesions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [subject("stoic", i).target for i in range(4)] == [0, 1, 0, 1]
    # The same positive subject without its lesions: whatever else it draws is that of a negative.
    ill = subject("stoic", 1)
    monkeypatch.setattr("ssl3d.data.phantoms.subjects.lesion_count", lambda index, parameters: 0)
    healthy = generate("stoic", 1, SMALL)
    assert ill.target == 1 and healthy.target == 0
    added = ill.image.astype(int) - healthy.image
    assert added.max() > 150
    # Elsewhere, what little is left is the blur of the lesions' edge; and they lie in the lungs only.
    changed = np.abs(added) > 40
    lungs = ndimage.binary_dilation((healthy.image < -500) & (healthy.image > -970), iterations=2)
    assert 0.002 < changed.mean() < 0.1 and not (changed & ~lungs).any()


def test_severe_patients_have_more_lesions() -> None:
    counts = [lesion_count(i, SMALL) for i in range(400)]
    assert counts[::2] == [0] * 200 and set(counts[1::2]) == {2, 3, 4, 5, 6}


def test_no_variance_of_appearance_leaves_noise_only() -> None:
    flat = PhantomParameters(edge=32, spacing_mm=4.8, appearance_variance=0.0)
    for cohort, region in (("mmwhs", 500), ("candi", 2)):
        means, spreads = [], []
        for index in range(3):
            s = subject(cohort, index, flat)
            assert s.labels is not None
            inside = s.image[ndimage.binary_erosion(s.labels == region)]
            means.append(inside.mean())
            spreads.append(inside.std())
        assert np.ptp(means) < 0.5 * np.mean(spreads), (cohort, means, spreads)


def test_isodense_structures_differ_in_context_only() -> None:
    """At 1, two blood pools have one value, and two grey nuclei; blood and muscle keep theirs."""
    for cohort, alike, unlike in (("mmwhs", (500, 600), 205), ("candi", (10, 11), 2)):
        spreads = []
        for isodensity in (0.0, 1.0):
            differences = []
            for index in range(3):
                s = subject(cohort, index, replace(SMALL, isodensity=isodensity))
                assert s.labels is not None
                first, second, other = (np.median(s.image[s.labels == v]) for v in (*alike, unlike))
                differences.append((abs(first - second), abs(first - other)))
            spreads.append(np.mean(differences, axis=0))
        assert spreads[1][0] < 0.5 * spreads[0][0], (cohort, spreads)
        assert spreads[1][1] > 0.5 * spreads[0][1], (cohort, spreads)


@pytest.mark.parametrize(("cohort", "region"), [("mmwhs", 500), ("candi", 2)])
def test_texture_has_the_amplitude_asked_for(cohort: str, region: int) -> None:
    plain, once, thrice = (subject(cohort, 0, replace(SMALL, texture=t)) for t in (0.0, 1.0, 3.0))
    assert plain.labels is not None and np.array_equal(plain.labels, thrice.labels)
    inside = ndimage.binary_erosion(plain.labels == region)
    first, third = (s.image[inside] - plain.image[inside].astype(float) for s in (once, thrice))
    assert first.std() > 0.01 * plain.image[inside].mean()
    assert third.std() / first.std() == pytest.approx(3, rel=0.1)


def test_wider_vessels_hold_the_narrow_ones() -> None:
    narrow, wide = (subject("asoca", 0, replace(SMALL, vessel_width=width)).labels for width in (1.0, 2.0))
    assert narrow is not None and wide is not None
    assert (wide[narrow > 0] > 0).all()
    assert wide.sum() > 2 * narrow.sum()


def test_placement_turns_and_shifts_an_anatomy_within_its_bounds() -> None:
    """The map changes by a rigid motion of the subject: angle and shift lie in their ranges, and reach far into them."""
    angles, shifts = [], []
    for i in range(40):
        turned = subject("candi", i, replace(SMALL, placement=0.5))
        before, after = subject("candi", i, SMALL).deformation, turned.deformation
        turn = np.linalg.solve(before.matrix, after.matrix)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-9)
        angles.append(np.degrees(Rotation.from_matrix(turn).magnitude()))
        shifts.append(
            np.linalg.solve(after.matrix, after.offset - before.offset) / (4.8 * np.array(turned.image.shape))
        )
    assert max(angles) < 22.5 + 1e-9 and max(angles) > 18 and np.mean(angles) == pytest.approx(11.25, abs=3)
    assert np.abs(shifts).max() < 0.05 and np.abs(shifts).max() > 0.04


@pytest.mark.parametrize("cohort", ["mmwhs", "candi"])
def test_placed_anatomies_stay_in_their_volumes(cohort: Cohort) -> None:
    for i in range(6):
        before, after = (subject(cohort, i, replace(SMALL, placement=value)).labels for value in (0.0, 1.0))
        assert before is not None and after is not None
        (known, counts), (found, kept) = (np.unique(labels, return_counts=True) for labels in (before, after))
        assert known.tolist() == found.tolist()
        # Structures of a few voxels, and thin ones, lose some to the grid or gain some.
        assert np.median(kept / counts) == pytest.approx(1, abs=0.1)
        assert kept[1:].sum() > 0.9 * counts[1:].sum()


def test_unusable_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="edge = 8"):
        PhantomParameters(edge=8)
    with pytest.raises(ConfigError, match='No phantom cohort "liver"'):
        generate("liver", 0, SMALL)  # type: ignore[arg-type]


# --- no shortcut ------------------------------------------------------------------------------------


def _intensity_dice(cohort: str, values: list[int], parameters: PhantomParameters) -> float:
    """Mean test Dice of the best classifier that sees one voxel's intensity: P(label | intensity) from
    histograms of five training subjects, each standardised, tested on three others."""
    bins, index = 128, {v: k for k, v in enumerate(values, 1)}

    def load(i: int) -> tuple[np.ndarray, np.ndarray]:
        s = subject(cohort, i, parameters)
        assert s.labels is not None
        image = s.image.astype(float)
        inside = image > np.quantile(image, 0.3)
        z = (image - image[inside].mean()) / image[inside].std()
        binned = np.clip((z + 3) / 6 * bins, 0, bins - 1).astype(int)
        lookup = np.zeros(int(s.labels.max()) + 1, dtype=int)
        for v, k in index.items():
            if v < len(lookup):
                lookup[v] = k
        return binned.ravel(), lookup[s.labels].ravel()

    counts = np.zeros((len(values) + 1, bins))
    for i in range(5):
        np.add.at(counts, load(i)[::-1], 1)
    frequency = counts.sum(1, keepdims=True)
    best = 0.0
    # Priors as they are, and all classes alike (as a Dice loss would have it): the better one counts.
    for likelihood in (counts, counts / frequency, counts / np.sqrt(frequency)):
        guess = likelihood.argmax(0)
        scores = []
        for i in range(5, 8):
            z, truth = load(i)
            p = guess[z]
            scores.append([2 * ((p == k) & (truth == k)).sum() / max(1, (p == k).sum() + (truth == k).sum())
                           for k in range(1, len(values) + 1)])  # fmt: skip
        best = max(best, float(np.mean(scores)))
    return best


@pytest.mark.parametrize(
    ("cohort", "values", "limit"),
    [
        ("mmwhs", [500, 600, 420, 550, 205, 820, 850], 0.35),
        ("candi", list(CANDI.label_values), 0.25),
        ("asoca", [1], 0.25),
    ],
)
def test_intensity_alone_does_not_solve_segmentation(cohort: str, values: list[int], limit: float) -> None:
    score = _intensity_dice(cohort, values, PhantomParameters(edge=40, spacing_mm=3.84))
    print(f"{cohort}: intensity classifier {100 * score:.1f} DSC")
    assert score < limit


def _density_aucs(parameters: PhantomParameters) -> dict[str, float]:
    """Return the AUC of simple statistics of the lungs' density in 160 subjects (standard error of 0.5: 0.046)."""
    statistics: dict[str, list[float]] = {}
    targets = []
    for i in range(160):
        s = generate("stoic", i, parameters)
        lungs = s.image[(s.image < -300) & (s.image > -960)]
        for name, value in {
            "mean": lungs.mean(), "median": np.median(lungs), "p90": np.quantile(lungs, 0.9), "sd": lungs.std(),
        }.items():  # fmt: skip
            statistics.setdefault(name, []).append(float(value))
        targets.append(int(s.target or 0))
    return {name: auc(targets, values) for name, values in statistics.items()}


def test_intensity_alone_does_not_solve_classification() -> None:
    """Neither mean nor percentiles of the lungs' density tell the classes well apart."""
    scores = _density_aucs(SMALL)
    print(scores)
    assert all(0.25 < score < 0.75 for score in scores.values()), scores


def test_lesions_twice_as_large_are_told_by_their_density() -> None:
    scores = _density_aucs(replace(SMALL, lesion_size=2.0))
    print(scores)
    assert scores["sd"] > 0.65, scores
    healthy, ill = (
        [subject("stoic", i, replace(SMALL, lesion_size=size)).image for size in (1.0, 2.0)] for i in (0, 1)
    )
    assert np.array_equal(*healthy)
    assert (ill[1] > ill[0] + 100).sum() > 50
    assert (ill[1] < ill[0] - 100).sum() < 5


# --- files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_cohorts(folder, SMALL, COUNTS)
    return folder


def test_the_official_adapters_read_the_phantoms(root: Path) -> None:
    found = {
        d.name: d.cases(root / ("pretrain" if d.name == "folder" else d.name))
        for d in (MMWHS(), ASOCA(), CANDI(), STOIC(), Folder())
    }
    assert {name: len(cases) for name, cases in found.items()} == {
        "mmwhs": 3,
        "asoca": 3,
        "candi": 3,
        "stoic": 4,
        "folder": 2,
    }
    assert sorted(str(c.subset) for c in found["mmwhs"]) == ["test", "train", "train"]
    assert sorted(c.target for c in found["stoic"]) == [0, 0, 1, 1]  # type: ignore[type-var]
    with (root / "stoic/metadata/reference.csv").open() as file:
        assert list(csv.reader(file))[:2] == [["PatientID", "probCOVID", "probSevere"], ["1001", "0", "0"]]


def test_files_hold_the_subject_whatever_their_orientation(root: Path) -> None:
    import nibabel

    codes = set()
    for cohort, adapter in (("mmwhs", MMWHS()), ("asoca", ASOCA()), ("candi", CANDI())):
        for case in adapter.cases(root / cohort):
            volume, labels = read_volume(case.image), read_labels(case.label)  # type: ignore[arg-type]
            np.testing.assert_allclose(volume.affine, labels.affine, atol=1e-4)
            np.testing.assert_allclose(volume.spacing_mm, 4.8, atol=1e-4)
            if case.image.name.endswith(".nii.gz"):
                codes.add("".join(nibabel.aff2axcodes(nibabel.load(case.image).affine)))
    assert len(codes) > 2, "orientations vary"
    first = subject("mmwhs", 0)
    stored = read_volume(root / "mmwhs/ct_train/ct_train_1001_image.nii.gz")
    np.testing.assert_array_equal(stored.data, first.image)
    candi = read_labels(CANDI().cases(root / "candi")[0].label)  # type: ignore[arg-type]
    left, right = (np.argwhere(candi.data == v).mean(axis=0) for v in (17, 53))
    x = [float((candi.affine @ [*point, 1])[0]) for point in (left, right)]
    assert x[0] < x[1], "in RAS mm, left is negative"


def test_offsets_are_those_of_the_adapters(root: Path) -> None:
    for adapter in (MMWHS(), ASOCA(), STOIC()):
        volume = read_volume(adapter.cases(root / adapter.name)[0].image)
        air = float(np.quantile(volume.data, 0.01)) + float(adapter.intensity_offset)
        assert -120 < air < 260, f"{adapter.name}: air at {air}"


def test_writing_goes_on_where_it_was_killed_and_gives_the_same_files(root: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cohorts(tmp_path, SMALL, COUNTS, workers=1, progress=stop)
    assert not (tmp_path / "phantoms.json").exists()
    write_cohorts(tmp_path, SMALL, COUNTS, workers=1)
    first, second = (json.loads((p / "phantoms.json").read_text()) for p in (root, tmp_path))
    assert first == second and len(first["sha256"]) == 2 + 6 + 6 + 6 + 4
    with pytest.raises(DataError, match="other parameters"):
        write_cohorts(tmp_path, PhantomParameters(edge=32, spacing_mm=4.8, seed=1), COUNTS)
    (tmp_path / "phantoms.json").unlink()
    with pytest.raises(DataError, match="not empty"):
        write_cohorts(tmp_path, SMALL, COUNTS)


def test_two_processes_may_write_the_same_phantoms(root: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from ssl3d.data.phantoms import PhantomParameters, write_cohorts\n"
        f"write_cohorts(Path(sys.argv[1]), PhantomParameters(edge=32, spacing_mm=4.8), {COUNTS!r})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "both"]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    alone, both = (json.loads((where / "phantoms.json").read_text()) for where in (root, tmp_path / "both"))
    assert alone == both
    assert not list((tmp_path / "both").glob("*started*"))


def test_phantoms_that_are_finished_while_one_looks_are_found(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process writes the manifest, and deletes the mark of its start, right after the first look."""
    looked: list[str] = []
    read = write.read_json

    def late(path: Path) -> Any:
        looked.append(path.name)
        if looked == ["phantoms.json"]:
            raise ReadError("not there") from FileNotFoundError()
        return read(path)

    monkeypatch.setattr(write, "read_json", late)
    write_cohorts(root, SMALL, COUNTS)
    assert looked == ["phantoms.json", "phantoms.started.json", "phantoms.json"]
