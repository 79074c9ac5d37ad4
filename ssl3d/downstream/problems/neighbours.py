"""k-nearest-neighbour evaluation: nothing is trained, so nothing can fail to converge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NearestNeighbours(nn.Module):
    """Weighted vote of the k training samples with the most similar features.

    Each neighbour votes for its class with exp(cosine similarity / temperature) (Wu et al., CVPR 2018,
    section 3.4; used to compare self-supervised features since Caron et al., ICCV 2021).

    Args:
        features: the training samples (N, C).
        classes: their classes (N,) in {0, ..., K - 1}.
        num_classes: K.
        neighbours: k; at most N are used.
        temperature: of the votes.
    """

    features: Tensor
    classes: Tensor

    def __init__(
        self, features: Tensor, classes: Tensor, num_classes: int, neighbours: int, temperature: float
    ) -> None:
        super().__init__()
        self.register_buffer("features", F.normalize(features.float(), dim=1))  # (N, C)
        self.register_buffer("classes", classes.long())  # (N,)
        self.num_classes = num_classes
        self.neighbours, self.temperature = min(neighbours, len(features)), temperature

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithm of each class's share of the votes.

        Args:
            x: features (B, C) or (B, C, D, H, W).

        Returns:
            (B, K) or (B, K, D, H, W); at least log 1e-6.
        """
        queries = F.normalize(x.movedim(1, -1).reshape(-1, x.shape[1]).float(), dim=1)  # (M, C)
        shares = torch.cat([self._shares(chunk) for chunk in queries.split(8192)])  # (M, K)
        shape = (x.shape[0], *x.shape[2:], self.num_classes)
        return shares.clamp_min(1e-6).log().reshape(shape).movedim(-1, 1)  # (B, K, ...)

    def _shares(self, queries: Tensor) -> Tensor:
        similarity, nearest = (queries @ self.features.T).topk(self.neighbours, dim=1)  # (M, k) each
        votes = torch.softmax(similarity / self.temperature, dim=1)  # (M, k)
        shares = queries.new_zeros(len(queries), self.num_classes)
        return shares.scatter_add_(1, self.classes[nearest], votes)  # (M, K)
