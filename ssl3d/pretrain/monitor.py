"""Collapse made visible: how much the features of different volumes differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.models.factory import Backbone


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
    pooled = torch.cat([backbone.encode(x[None])[-1].float().mean(dim=(2, 3, 4)) for x in probe])  # (N, C)
    return {"feature_std": feature_deviation(pooled), "effective_rank": effective_rank(pooled)}
