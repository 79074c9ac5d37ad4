"""Losses of the contrastive methods, and the two quantities that say whether they learn.

Everything is computed in float32 at least, also under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.errors import ConfigError
from ssl3d.geometry import full_precision, no_autocast
from ssl3d.ranks import gather, mine


def nt_xent(a: Tensor, b: Tensor, temperature: float, identity: Tensor | None = None) -> Tensor:
    """Return the normalised temperature-scaled cross-entropy (Chen et al., ICML 2020, eq. 1).

    With the 2N unit vectors z of both views, s their dot products and p(i) the other view of i::

        loss = 1 / 2N sum_i -log( exp(s(i, p(i)) / t) / sum_{k in K(i)} exp(s(i, k) / t) )

    K(i) is every k but i itself. With ``identity``, other samples of i's own volume are no negatives
    of it and leave K(i) too; a sample all of whose batch shows one volume has no negatives, and a
    loss of 0.

    On several devices the negatives come from all of them, with gradient (:mod:`ssl3d.ranks`); each process
    returns the mean over its own samples.

    Args:
        a: embeddings of the first views (B, C), any length.
        b: of the second views (B, C).
        temperature: t > 0.
        identity: which volume each sample shows (B,) int64.

    Raises:
        ConfigError: the batch over all devices has one sample: loss and gradient would be 0.
    """
    with no_autocast(a):
        z_a, z_b = (F.normalize(full_precision(z), dim=1) for z in (a, b))
        others = torch.cat([gather(z_a), gather(z_b)])  # (2N, C), N over all processes
        n = len(others) // 2
        if n < 2:
            raise ConfigError(
                "NT-Xent of one sample is 0, whatever the network does: use a batch of at least 2."
            )
        logits = torch.cat([z_a, z_b]) @ others.T / temperature  # (2B, 2N)
        first = mine(torch.arange(n, device=a.device))  # (B,) columns of the own first views
        itself, positive = torch.cat([first, first + n]), torch.cat([first + n, first])  # (2B,) each
        shown = torch.arange(n, device=a.device) if identity is None else gather(identity)  # (N,)
        # The same volume is no negative: the sample itself, and other crops of its volume.
        same = shown[first].repeat(2)[:, None] == shown.repeat(2)  # (2B, 2N)
        same = same.scatter(1, positive[:, None], False).scatter(1, itself[:, None], True)
        return F.cross_entropy(logits.masked_fill(same, -torch.inf), positive)


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of 2 - 2 cos, the squared distance of the unit vectors, in [0, 4].

    BYOL's loss (Grill et al., NeurIPS 2020, eq. 2). It has the gradient of twice the negative cosine.

    Args:
        prediction: (B, C).
        target: (B, C).
    """
    return 2 + 2 * negative_cosine(prediction, target)


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of -cos, in [-1, 1]: SimSiam's loss (Chen & He, CVPR 2021, eq. 1).

    Args:
        prediction: (B, C).
        target: (B, C).
    """
    with no_autocast(prediction):
        return -F.cosine_similarity(full_precision(prediction), full_precision(target), dim=1).mean()


def matching_error(prediction: Tensor, target: Tensor, identity: Tensor) -> float:
    """Return mean 1 - cos of matching rows over that of rows of different volumes; without gradient.

    0 is perfect. A prediction that ignores its input is as far from the others' targets as from its own,
    so it is at 1, and so are collapsed embeddings. (1 - cos itself is least, 0, after a collapse.)

    Args:
        prediction: of the first view of B volumes, then of the second (2B, C).
        target: what each should be (2B, C).
        identity: which volume each shows (B,). Where all show one, different crops stand for volumes.
    """
    p, z = (F.normalize(full_precision(v.detach()), dim=1) for v in (prediction, target))
    distance = 1 - p @ z.T  # (2B, 2B)
    shown = identity.repeat(2)
    if len(identity.unique()) == 1:
        shown = torch.arange(len(identity), device=identity.device).repeat(2)
    others = distance[shown[:, None] != shown]
    tiny = 1e-6  # about the error of 1 - cos in float32: a complete collapse is 0 / 0
    return float((distance.diagonal().mean() + tiny) / (others.mean() + tiny))


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared distance of two views' unit vectors, in [0, 4]; 0 is perfect.

    Wang & Isola, ICML 2020, section 4.1.1, with alpha = 2.

    Args:
        a: features of the first views (N, C), any length.
        b: of the second views (N, C).
    """
    a, b = F.normalize(full_precision(a), dim=1), F.normalize(full_precision(b), dim=1)
    return (a - b).square().sum(1).mean()


def uniformity(features: Tensor) -> Tensor:
    """Return log of the mean of exp(-2 d^2) over all pairs of unit vectors, in [-8, 0].

    0 after a complete collapse; the more evenly the features cover the sphere, the lower
    (Wang & Isola, ICML 2020, section 4.1.2, with t = 2).

    Args:
        features: (N, C), N >= 2, any length.
    """
    unit = F.normalize(full_precision(features), dim=1)
    return torch.pdist(unit).square().mul(-2).exp().mean().log()
