"""Collapse made visible: how much the features of different volumes differ."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.losses.contrastive import alignment, uniformity
from ssl3d.models.backbone import Backbone


def feature_deviation(features: Tensor) -> float:
    """Return the mean deviation of unit-length features over samples, times sqrt(C).

    About 1 for features spread evenly over the sphere, 0 after a complete collapse
    (Chen & He, CVPR 2021, section 4.1).

    Args:
        features: one feature vector a sample (N, C).
    """
    unit = F.normalize(features.double(), dim=1)  # (N, C)
    return float(unit.std(dim=0).mean() * features.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values, in [1, min(N - 1, C)].

    Roy & Vetterli, EUSIPCO 2007; features are centred first, so that a constant feature counts
    as collapse. Identical features have rank 0.

    Args:
        features: one feature vector a sample (N, C).
    """
    centred = features.double() - features.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    if float(values.sum()) <= 1e-12:
        return 0.0
    p = values / values.sum()
    return float(torch.exp(torch.special.entr(p).sum()))


@torch.no_grad()
def collapse_measures(backbone: Backbone, probe: Tensor) -> dict[str, float]:
    """Measure the pooled global feature on a fixed set of crops.

    Args:
        backbone: the network in training.
        probe: crops (N, 1, D, H, W), N >= 2.

    Returns:
        ``feature_std`` (see :func:`feature_deviation`) and ``effective_rank``.
    """
    pooled = pooled_features(backbone, probe)
    return {"feature_std": feature_deviation(pooled), "effective_rank": effective_rank(pooled)}


@torch.no_grad()
def view_measures(
    backbone: Backbone, projector: nn.Module, first: Tensor, second: Tensor
) -> dict[str, float]:
    """Measure how near the features of two views of a crop are, and how far apart those of all crops.

    Args:
        backbone: the network in training.
        projector: pooled global feature (2N, C) -> embedding (2N, E).
        first: one view of each crop (N, 1, D, H, W), N >= 2.
        second: another view of each.

    Returns:
        ``alignment`` and ``uniformity`` of the pooled global feature (see
        :mod:`ssl3d.losses.contrastive`), the lower, the better, both; and ``embedding_std``, the
        :func:`feature_deviation` of what the loss compares, where a collapse shows first.
    """
    a, b = pooled_features(backbone, first), pooled_features(backbone, second)
    # As in training; a copy, so that measuring moves no statistics of a batch norm.
    embedding = copy.deepcopy(projector)(torch.cat([a, b]))[: len(a)]  # (N, E)
    return {
        "alignment": float(alignment(a, b)),
        "uniformity": float(uniformity(a)),
        "embedding_std": feature_deviation(embedding),
    }


@torch.no_grad()
def pooled_features(backbone: Backbone, crops: Tensor) -> Tensor:
    """Return the mean over voxels of each crop's f^g (N, C) in float32, one crop at a time.

    Args:
        backbone: the network.
        crops: (N, 1, D, H, W).
    """
    return torch.cat([backbone.encode(x[None])[-1].float().mean(dim=(2, 3, 4)) for x in crops])
