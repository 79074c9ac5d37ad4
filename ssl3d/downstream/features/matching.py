"""Quality of a matching between patients: labels warped by the predicted field, against simpler maps.

For methods that predict a spatial map between two volumes, such as GVSL. The moving volume's label map
is warped onto the fixed volume, which the method has never seen labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ssl3d.downstream.metrics import dice_per_structure
from ssl3d.geometry import affine_coords, identity_coords, jacobian_determinant, warp
from ssl3d.losses import ncc_loss

if TYPE_CHECKING:
    from ssl3d.data.prepared.cohort import PreparedCohort

NOT_ALIGNED, AFFINE_ONLY, PREDICTED = "not aligned", "affine only", "predicted"


class Match(Protocol):
    """A predicted map.

    Attributes:
        coords: where the moving volume is sampled for each voxel of the fixed one (1, 3, D, H, W).
        matrix: its affine part (1, 3, 4), see :mod:`ssl3d.geometry`.
    """

    coords: Tensor
    matrix: Tensor


@runtime_checkable
class Matcher(Protocol):
    """A method that aligns ``moving`` to ``fixed``, both (1, 1, D, H, W)."""

    def match(self, moving: Tensor, fixed: Tensor) -> Match: ...


def central(volume: np.ndarray, edges: Sequence[int]) -> Tensor:
    """Return the central box of ``volume`` (D, H, W), zeros where it is smaller: (1, 1, *edges)."""
    out = np.zeros(tuple(edges), np.float32)
    source, target = [], []
    for have, want in zip(volume.shape, edges, strict=True):
        n = min(have, want)
        source.append(slice((have - n) // 2, (have - n) // 2 + n))
        target.append(slice((want - n) // 2, (want - n) // 2 + n))
    out[tuple(target)] = volume[tuple(source)]
    return torch.from_numpy(out)[None, None]


@torch.no_grad()
def score(coords: Tensor, moving: tuple[Tensor, Tensor], fixed: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return NCC, mean Dice over structures and the share of folded voxels of one map.

    Args:
        coords: sampling positions (1, 3, D, H, W).
        moving, fixed: (image, label), (1, 1, D, H, W) each.

    Returns:
        ``ncc`` in [-1, 1]; ``dice`` in [0, 1]; ``folded``: share of voxels whose Jacobian determinant
        is not positive, in [0, 1].
    """
    label = warp(moving[1], coords, mode="nearest").round().long()[0, 0]
    truth = fixed[1].long()[0, 0]
    classes = int(max(label.max(), truth.max())) + 1
    return {
        "ncc": 1 - float(ncc_loss(warp(moving[0], coords), fixed[0])),
        "dice": float(dice_per_structure(label, truth, classes).nanmean()),
        "folded": float((jacobian_determinant(coords) <= 0).float().mean()),
    }


@torch.no_grad()
def evaluate_matching(
    matcher: Matcher,
    cohort: PreparedCohort,
    pairs: Sequence[tuple[int, int]],
    edges: Sequence[int],
    device: torch.device,
) -> dict[str, list[dict[str, float]]]:
    """Return :func:`score` of every pair (moving, fixed) for the identity, the affine part and the whole map.

    Args:
        matcher: on ``device``.
        cohort: segmented cases.
        pairs: places in the cohort.
        edges: the central box that is matched, in voxels; that of the pretraining is what the method knows.
        device: where to compute.
    """

    def load(case: int) -> tuple[Tensor, Tensor]:
        image, label = (
            central(np.array(v), edges).to(device) for v in (cohort.image(case), cohort.label(case))
        )
        return image, label

    rows: dict[str, list[dict[str, float]]] = {NOT_ALIGNED: [], AFFINE_ONLY: [], PREDICTED: []}
    for i, j in pairs:
        moving, fixed = load(i), load(j)
        found = matcher.match(moving[0], fixed[0])
        for name, coords in (
            (NOT_ALIGNED, identity_coords(edges, fixed[0])),
            (AFFINE_ONLY, affine_coords(found.matrix, edges)),
            (PREDICTED, found.coords),
        ):
            rows[name].append(score(coords, moving, fixed))
    return rows


def matching_means(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the mean over pairs of each score, by map."""
    return {
        name: {key: float(np.mean([s[key] for s in scores])) for key in scores[0]}
        for name, scores in rows.items()
    }
