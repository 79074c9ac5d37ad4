"""Metrics against MONAI and hand-made cases."""

import math

import numpy as np
import pytest
import torch

from ssl3d.downstream.metrics import auc, dice_per_structure, segmentation_metrics


def test_dice_equals_monai() -> None:
    from monai.metrics import compute_dice
    from monai.networks.utils import one_hot

    torch.manual_seed(0)
    p, t = torch.randint(0, 5, (2, 9, 10, 11))
    theirs = compute_dice(one_hot(p[None, None], 5), one_hot(t[None, None], 5), include_background=False)
    torch.testing.assert_close(dice_per_structure(p, t, 5), theirs[0].double(), rtol=1e-6, atol=1e-6)


def test_empty_masks() -> None:
    truth, prediction = torch.zeros(2, 4, 4, 4).long()
    truth[0], prediction[1] = 1, 2
    dsc = dice_per_structure(prediction, truth, 4)
    assert dsc[:2].tolist() == [0, 0] and math.isnan(dsc[2])
    m = segmentation_metrics(prediction, truth, ["a", "b", "c"], 1.0, 2.0)
    assert m["dsc"] == 0
    assert m["structures"]["a"] == {"dsc": 0.0, "hd95_mm": None, "nsd": 0.0}
    assert m["structures"]["c"] == {"dsc": None, "hd95_mm": None, "nsd": None}


def test_surface_distances_are_in_mm() -> None:
    truth, prediction = torch.zeros(2, 20, 20, 20).long()
    truth[5:10, 5:10, 5:10] = 1
    prediction[8:13, 5:10, 5:10] = 1  # the same cube, shifted by 3 voxels
    m = segmentation_metrics(prediction, truth, ["cube"], 2.0, 6.0)["structures"]["cube"]
    assert m["hd95_mm"] == pytest.approx(6.0)
    assert m["nsd"] == pytest.approx(1.0)
    assert m["dsc"] == pytest.approx(2 * 50 / 250)
    strict = segmentation_metrics(prediction, truth, ["cube"], 2.0, 1.0)["structures"]["cube"]
    assert strict["nsd"] < 0.9


def test_auc() -> None:
    assert auc([0, 0, 1, 1], [0.1, 0.6, 0.5, 0.9]) == 0.75


def test_surface_metrics_equal_monai() -> None:
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    for _ in range(4):
        p, t = (torch.from_numpy(gaussian_filter(rng.random((18, 20, 22)), 2) > 0.5) for _ in range(2))
        ours = segmentation_metrics(p.long(), t.long(), ["blob"], 1.7, 3.0)["structures"]["blob"]
        one_hot = [m[None, None].float() for m in (p, t)]
        options = {"include_background": True, "spacing": 1.7}
        hd95 = compute_hausdorff_distance(*one_hot, percentile=95, **options)
        nsd = compute_surface_dice(*one_hot, class_thresholds=[3.0], **options)
        assert ours["hd95_mm"] == pytest.approx(float(hd95), abs=1e-5)
        assert ours["nsd"] == pytest.approx(float(nsd), abs=1e-6)
