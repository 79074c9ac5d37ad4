"""Patients and scans that differ as real ones do: what each parameter changes, and what it must not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl3d.config import PhantomConfig
from ssl3d.data.phantoms import PhantomParameters, generate, scanner
from ssl3d.data.phantoms import anatomy_heart as heart
from ssl3d.data.phantoms.brain import PAIRS
from ssl3d.data.phantoms.subjects import _phase
from ssl3d.downstream.metrics import auc
from ssl3d.rng import numpy_rng

BASE = PhantomParameters(edge=40, spacing_mm=3.84)
EXTREME = replace(
    BASE, placement=1.0, shape_modes=1.0, variants=1.0, protocols=1.0, noise=3.0, motion=1.0, metal=1.0,
    field_of_view=0.15, slice_mm=6.0, opacities=1.0,
)  # fmt: skip
OF_THE_PATIENT = (
    "shape_modes",
    "variants",
    "protocols",
    "motion",
    "metal",
    "field_of_view",
    "slice_mm",
    "noise",
)


def test_parameters_of_configuration_and_generator_have_the_same_defaults() -> None:
    config, parameters = PhantomConfig().model_dump(), PhantomParameters()
    for name in (*OF_THE_PATIENT, "opacities"):
        assert config[name] == getattr(parameters, name) in (0.0, 1.0), name


@pytest.mark.parametrize("name", OF_THE_PATIENT)
def test_each_parameter_changes_images_by_itself(name: str) -> None:
    changed = replace(BASE, **{name: getattr(EXTREME, name)})
    for cohort in ("mmwhs", "candi"):
        differ = [
            not np.array_equal(generate(cohort, i, BASE).image, generate(cohort, i, changed).image)  # type: ignore[arg-type]
            for i in range(4)
        ]
        # Variants, other protocols and slices thicker than a voxel happen to a part of the patients.
        assert any(differ) if name in ("variants", "protocols", "slice_mm") else all(differ), (
            name,
            cohort,
            differ,
        )


@pytest.mark.parametrize("name", ["variants", "protocols", "motion", "metal", "slice_mm", "noise"])
def test_what_a_scanner_does_leaves_the_labels(name: str) -> None:
    changed = replace(BASE, **{name: getattr(EXTREME, name)})
    for cohort in ("mmwhs", "candi"):
        before, after = (generate(cohort, 1, p).labels for p in (BASE, changed))  # type: ignore[arg-type]
        assert before is not None and np.array_equal(before, after)


def test_extreme_patients_have_every_structure_in_one_piece() -> None:
    brain = {value for pair in PAIRS.values() for value in pair}
    for index in range(6):
        labels = generate("mmwhs", index, EXTREME).labels
        assert labels is not None
        for value in (500, 600, 420, 550, 205, 820, 850):
            sizes = np.bincount(ndimage.label(labels == value, np.ones((3, 3, 3)))[0].ravel())[1:]
            assert len(sizes) and sizes.max() > 0.9 * sizes.sum(), (index, value, sizes)
        found = generate("candi", index, EXTREME).labels
        assert found is not None and brain <= set(np.unique(found)), index


def test_dominance_moves_the_posterior_descending_artery_to_the_circumflex() -> None:
    shape = heart.HeartShape()
    usual = {v.name: v for v in heart.coronary_tree(shape, numpy_rng(0, "tree"))}
    left = {v.name: v for v in heart.coronary_tree(shape, numpy_rng(0, "tree"), {"left dominant", "no D2"})}
    assert set(usual) - set(left) == {"D2", "PLV"}
    assert len(left["RCA"].path) < len(usual["RCA"].path)
    np.testing.assert_array_equal(left["PDA"].path[0], left["LCX"].path[-1])
    np.testing.assert_array_equal(usual["LAD"].path, left["LAD"].path)


def test_without_contrast_medium_blood_is_no_brighter_than_muscle() -> None:
    values = dict.fromkeys(heart.BLOOD, 300.0) | {"myocardium": 120.0, "papillary": 120.0}
    drawn = [_phase(values, numpy_rng(i, "phase"), 1.0) for i in range(60)]
    plain = [v for v in drawn if v["lv"] < 60]
    pulmonary = [v for v in drawn if v["rv"] > v["lv"] + 80]
    assert 3 <= len(plain) <= 18 and 5 <= len(pulmonary) <= 22  # 15 and 20 %
    assert all(abs(v["myocardium"] - v["lv"]) < 12 for v in plain)
    assert all(_phase(values, numpy_rng(i, "phase"), 0.0) == values for i in range(20))


def test_thick_slices_are_means_of_what_lies_in_them() -> None:
    image = np.random.default_rng(0).normal(size=(3, 4, 12))
    np.testing.assert_array_equal(scanner.thick_slices(image, 2.0, 3.84), image)
    thick = scanner.thick_slices(image, 3.0, 1.0)  # four slices of three voxels
    means = image.reshape(3, 4, 4, 3).mean(-1)
    np.testing.assert_allclose(thick[..., [1, 4, 7, 10]], means)  # their centres
    np.testing.assert_allclose(thick[..., 2], (2 * means[..., 0] + means[..., 1]) / 3)


def test_streaks_fade_with_the_distance_and_metal_is_the_brightest() -> None:
    image = np.zeros((40, 40, 6), dtype=np.float32)
    path = np.array([[20.0, 20.0, z] for z in range(2, 5)])
    out = scanner.metal_streaks(image, path, np.random.default_rng(0), 3.84)
    assert (out[20, 20, 2:5] == scanner.METAL_HU).all()
    assert not out[..., 0].any() and not out[..., 5].any()
    near, far = np.abs(out[16:25, 16:25, 3]), np.abs(out[:4, :4, 3])
    assert np.median(near[near < scanner.METAL_HU]) > 5 * np.median(far)


def test_amount_and_density_of_opacities_do_not_tell_covid() -> None:
    """With other opacities, ten quantiles and three volumes of density together stay near chance."""
    features, targets = [], []
    for i in range(200):
        s = generate("stoic", i, replace(BASE, edge=24, spacing_mm=6.4, opacities=1.0))
        lungs = s.image[(s.image < -100) & (s.image > -960)]
        features.append(
            [
                *np.quantile(lungs, np.linspace(0.05, 0.95, 10)),
                *(float((lungs > t).mean()) for t in (-600, -450, -300)),
            ]
        )
        targets.append(int(s.target or 0))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000))
    scores = cross_val_predict(model, np.array(features), targets, cv=10, method="predict_proba")[:, 1]
    together = auc(targets, scores.tolist())
    print(f"statistics of density: AUC {together:.3f}")
    assert together < 0.66  # 0.60 and a standard error and a half of 200 cases
