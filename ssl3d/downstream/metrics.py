"""Metrics of the downstream tasks, with a stated policy for empty masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def dice_per_structure(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Return the Dice coefficient of each structure, background excluded.

    Empty masks: NaN where both are empty (the case is left out of that structure's mean, and
    counted), 0 where only one is.

    Args:
        prediction: labels (D, H, W), 0 is background.
        truth: labels (D, H, W).
        num_classes: K + 1, background included.

    Returns:
        (K,) float64 in [0, 1] or NaN.
    """
    pairs = truth.reshape(-1).long() * num_classes + prediction.reshape(-1).long()
    confusion = torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).double()
    overlap = confusion.diagonal()
    sizes = confusion.sum(dim=0) + confusion.sum(dim=1)
    return torch.where(sizes > 0, 2 * overlap / sizes, torch.nan)[1:].cpu()


def segmentation_metrics(
    prediction: Tensor, truth: Tensor, names: list[str], spacing_mm: float, tolerance_mm: float
) -> dict[str, Any]:
    """Return the metrics of one case.

    Args:
        prediction: labels (D, H, W), 0 is background.
        truth: labels (D, H, W).
        names: structures 1, ..., K.
        spacing_mm: isotropic voxel spacing.
        tolerance_mm: tolerance of the normalised surface Dice.

    Returns:
        ``dsc``: mean over structures in [0, 1], None if every structure is empty in both;
        ``structures``: per name ``dsc``, ``hd95_mm`` (95th percentile of the symmetric surface
        distance; None if either mask is empty) and ``nsd`` (normalised surface Dice in [0, 1];
        0 if one mask is empty, None if both are).
    """
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    classes = len(names) + 1
    dsc = dice_per_structure(prediction, truth, classes)
    structures: dict[str, Any] = {}
    for k, name in enumerate(names, 1):
        p, t = (prediction == k).cpu(), (truth == k).cpu()
        hd95, nsd = None, None
        if p.any() and t.any():
            one_hot = [_crop_to(m, p | t)[None, None].float() for m in (p, t)]  # (1, 1, d, h, w)
            options: dict[str, Any] = {"include_background": True, "spacing": spacing_mm}
            hd95 = float(compute_hausdorff_distance(*one_hot, percentile=95, **options))
            nsd = float(compute_surface_dice(*one_hot, class_thresholds=[tolerance_mm], **options))
        elif p.any() or t.any():
            nsd = 0.0
        structures[name] = {"dsc": _number(float(dsc[k - 1])), "hd95_mm": _number(hd95), "nsd": _number(nsd)}
    return {"dsc": _number(float(dsc.nanmean())), "structures": structures}


def _crop_to(mask: Tensor, region: Tensor) -> Tensor:
    """Crop ``mask`` to the bounding box of ``region`` plus one voxel, so that edges are seen."""
    box = []
    for axis in range(3):
        hit = region.amax(dim=[a for a in range(3) if a != axis]).nonzero()
        box.append(slice(max(0, int(hit.min()) - 1), int(hit.max()) + 2))
    return mask[tuple(box)]


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def auc(targets: list[int], probabilities: list[float]) -> float:
    """Return the area under the ROC curve in [0, 1]; both classes must occur in ``targets``."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(targets, probabilities))
