"""How good are local features without any training? Measures on voxels of labelled cases.

Every measure takes features f^l of sampled voxels, which are the same voxels for every method (see
:func:`sample_voxels`), and compares standardised features: channels of one method may differ in scale
by orders of magnitude, and no head is there to undo it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.errors import DataError

_CHUNK = 4096
"""Queries compared with all candidates at once: bounds the memory of the similarity matrix."""


@dataclass(frozen=True)
class Correspondence:
    """How often the most similar voxel of another subject lies in the same structure.

    Attributes:
        accuracy: over the foreground queries, in [0, 1].
        chance: the same for a candidate drawn at random.
        balanced: mean over structures of the accuracy within each, in [0, 1].
        balanced_chance: the same for a candidate drawn at random.
        structures: accuracy by label.
        queries: foreground voxels that have their structure among the candidates.
    """

    accuracy: float
    chance: float
    balanced: float
    balanced_chance: float
    structures: dict[int, float]
    queries: int


def standardized(*features: Tensor) -> tuple[Tensor, ...]:
    """Centre and scale each channel over all of ``features``: mean 0, standard deviation 1.

    A channel that is constant up to rounding carries nothing and becomes 0.

    Args:
        features: (N_i, C) each.

    Returns:
        As many tensors of the same shapes, float32 (float64 for float64).
    """
    parts = [f if f.dtype == torch.float64 else f.float() for f in features]
    together = torch.cat(parts)  # (sum of N_i, C)
    mean, std = together.mean(dim=0), together.std(dim=0, correction=0)
    rounding = 10 * torch.finfo(together.dtype).eps * together.abs().amax(dim=0)
    scale = torch.where(std > rounding, 1 / std.clamp_min(torch.finfo(std.dtype).tiny), 0)
    return tuple((part - mean) * scale for part in parts)


def nearest(queries: Tensor, candidates: Tensor) -> Tensor:
    """Return the index (N,) of the candidate (M, C) most similar (cosine) to each query (N, C)."""
    a, b = F.normalize(queries, dim=1), F.normalize(candidates, dim=1)
    return torch.cat([(chunk @ b.T).argmax(dim=1) for chunk in a.split(_CHUNK)])


@torch.no_grad()
def correspondence_accuracy(
    features_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    labels_b: Tensor,
    weights_a: Tensor | None = None,
) -> Correspondence:
    """Return how often the nearest feature in subject B lies in the structure of the voxel of subject A.

    Queries are the foreground voxels of A whose structure B has at all; candidates are all given voxels
    of B, background included. Features are standardised over both subjects and compared by cosine
    similarity, as in :class:`ssl3d.downstream.neighbours.NearestNeighbours`.

    Args:
        features_a: (N, C).
        labels_a: (N,) in {0, ..., K}, 0 is background.
        features_b: (M, C).
        labels_b: (M,).
        weights_a: how many voxels each query stands for (N,); None: one. Changes ``accuracy`` and
            ``chance`` only.

    Raises:
        ValueError: the shapes do not belong together.
        DataError: the two have no structure in common.

    >>> eye, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    >>> found = correspondence_accuracy(eye, labels, eye, labels)
    >>> found.accuracy, found.chance
    (1.0, 0.25)
    """
    for features, labels in ((features_a, labels_a), (features_b, labels_b)):
        if features.dim() != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features {tuple(features.shape)} and labels {tuple(labels.shape)}: give (N, C) and (N,)"
            )
    labels_a, labels_b = labels_a.long().cpu(), labels_b.long().cpu()
    asked = torch.nonzero((labels_a > 0) & torch.isin(labels_a, labels_b))[:, 0]  # (Q,)
    if not len(asked):
        raise DataError("The two subjects have no structure in common, so no voxel has a counterpart.")
    a, b = standardized(features_a, features_b)
    found = labels_b[nearest(a[asked.to(a.device)], b).cpu()]  # (Q,)
    truth = labels_a[asked]
    right = (found == truth).double()
    weights = torch.ones(len(asked)) if weights_a is None else weights_a.cpu()[asked]
    weights = weights.double()

    structures = truth.unique()
    share_b = torch.stack([(labels_b == k).double().mean() for k in structures])  # (K',)
    weight_a = torch.stack([weights[truth == k].sum() for k in structures])  # (K',)
    within = torch.stack([right[truth == k].mean() for k in structures])  # (K',)
    return Correspondence(
        accuracy=float((weights * right).sum() / weights.sum()),
        chance=float((weight_a * share_b).sum() / weight_a.sum()),
        balanced=float(within.mean()),
        balanced_chance=float(share_b.mean()),
        structures=dict(zip(structures.tolist(), within.tolist(), strict=True)),
        queries=len(asked),
    )
