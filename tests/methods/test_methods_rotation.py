"""Rotation labels against numpy.rot90."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ssl3d_methods.rotation import ROTATIONS_10, ROTATIONS_24, rotate

from ssl3d.config import Settings
from ssl3d.errors import ConfigError
from ssl3d.pretrain.loop import check_run
from ssl3d.pretrain.spec import resolve_method
from ssl3d.rng import BatchRng
from ssl3d.testing.suite import Suite

VOLUME = np.arange(4**3).reshape(4, 4, 4)  # no two rotations of it are equal

# What each of the ten classes must be, written out: 90 degrees about axis 0 turn the plane of axes 1, 2.
EXPECTED = {
    0: VOLUME,
    **{0 + k: np.rot90(VOLUME, k, (1, 2)) for k in (1, 2, 3)},
    **{3 + k: np.rot90(VOLUME, k, (2, 0)) for k in (1, 2, 3)},
    **{6 + k: np.rot90(VOLUME, k, (0, 1)) for k in (1, 2, 3)},
}


def test_the_ten_classes_are_numpys_rotations() -> None:
    assert len(ROTATIONS_10) == len(EXPECTED) == 10
    for label, turns in enumerate(ROTATIONS_10):
        np.testing.assert_array_equal(rotate(torch.from_numpy(VOLUME), turns).numpy(), EXPECTED[label])


def test_the_24_classes_are_the_rotations_of_the_cube() -> None:
    """A signed permutation of the axes is a rotation if its determinant is 1; there are 24 of them."""
    proper = set()
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            if np.linalg.det(matrix) > 0:
                moved = VOLUME.transpose(order)
                proper.add(np.flip(moved, [a for a in range(3) if signs[a] < 0]).tobytes())
    assert len(proper) == 24
    ours = {rotate(torch.from_numpy(VOLUME), turns).numpy().tobytes() for turns in ROTATIONS_24}
    assert ours == proper
    assert {v.tobytes() for v in EXPECTED.values()} < proper


@pytest.mark.parametrize("classes", [10, 24])
def test_views_carry_the_label_of_their_rotation(classes: int) -> None:
    method = Suite(resolve_method("rotation", {"rotation": {"classes": classes}})).method()
    x = torch.from_numpy(VOLUME).float().expand(400, 1, 4, 4, 4)
    views = method.views(x, BatchRng(0, 0, range(400)))
    table = (
        EXPECTED
        if classes == 10
        else dict(enumerate(rotate(torch.from_numpy(VOLUME), t).numpy() for t in ROTATIONS_24))
    )
    for volume, label in zip(views["rotated"], views["label"].tolist(), strict=True):
        np.testing.assert_array_equal(volume[0].numpy(), table[label])
    counts = np.bincount(views["label"].numpy(), minlength=classes)
    assert len(counts) == classes and counts.min() > 0.3 * 400 / classes


def test_the_loss_is_the_cross_entropy_of_the_label() -> None:
    suite = Suite(resolve_method("rotation", {}))
    method, source = suite.started()
    views = suite.views(method, source)
    with torch.no_grad():
        logits = method.classifier(method.backbone.encode(views["rotated"])[-1].flatten(2).mean(2)).double()
        expected = np.mean(
            [float(row.logsumexp(0) - row[y]) for row, y in zip(logits, views["label"], strict=True)]
        )
        assert float(method.training_step(views)["cross_entropy"]) == pytest.approx(expected, rel=1e-5)


def test_crops_that_are_no_cubes_are_refused_before_any_data_are_read() -> None:
    settings = Settings.model_validate(
        {"backbone": {"channels": [8, 16]}, "pretrain": {"crop": [16, 20, 16]}}
    )
    with pytest.raises(
        ConfigError, match=r"cubic crops, not pretrain.crop = \(16, 20, 16\).*pretrain.crop=16"
    ):
        check_run(resolve_method("rotation", {}), settings, 0)
