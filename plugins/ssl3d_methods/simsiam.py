"""SimSiam (Chen & He, CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssl3d import Method, MethodConfig, StopGradient
from ssl3d.losses import matching_error, negative_cosine
from ssl3d.models.heads import MLP, Norm, check_norm, pool
from ssl3d.pretrain.monitor import view_measures
from ssl3d.rng import BatchRng
from ssl3d.transforms import RandomViews


class SimSiamConfig(MethodConfig):
    """Options of SimSiam."""

    embedding: int = Field(512, ge=1)
    """Width of the projector's three layers; the paper's 2048 is that of a ResNet-50's f^g, this the U-Net's."""
    bottleneck: int = Field(128, ge=1)
    """Width of the predictor's hidden layer: a quarter of the embedding (paper)."""
    norm: Norm = "batch"
    """Norm of the projector and of the predictor's hidden layer: `batch`, over both views of all crops, or
    `layer`, with which small batches collapse."""
    views: RandomViews = RandomViews()
    """Augmentations, shared by all contrastive methods."""


class SimSiam(Method):
    """Predict the embedding of one view from the other's, without gradient into what is predicted.

    Departures from the paper: batch norm over both views at once, since over the two samples of a small
    batch it makes the embeddings each other's negative (see `ssl3d.models.heads.MLP`); Adam instead of
    SGD, and one learning rate for all layers, as for every method here.
    """

    name = "simsiam"
    title = "SimSiam"
    paper = "Chen & He, Exploring Simple Siamese Representation Learning, CVPR 2021"
    trains = "encoder"
    stop_gradients = ("stop_gradient",)
    views_per_item = 2
    Config = SimSiamConfig
    config: SimSiamConfig

    def __init__(self, backbone: Any, config: SimSiamConfig) -> None:
        super().__init__(backbone, config)
        self.view_edge = config.views.edge
        width = config.embedding
        self.projector = MLP((backbone.global_channels, width, width, width), config.norm, last=config.norm)
        self.predictor = MLP((width, config.bottleneck, width), config.norm)
        self.stop_gradient = StopGradient()

    def check(self, crop: Sequence[int], items: int) -> None:
        check_norm(self.name, self.config.norm, items)

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        first, second = self.config.views.pair(x, rng)  # (B, 1, D, H, W) each
        return {"first": first, "second": second, "volume": rng.constant(rng.volumes)}

    def embed(self, views: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return predictions and what they predict (2B, embedding), without gradient: row i's is the other view's."""
        x = torch.cat([views["first"], views["second"]])  # (2B, 1, D, H, W)
        z = self.projector(pool(self.backbone.encode(x)))  # (2B, embedding)
        return self.predictor(z), self.stop_gradient(z).roll(len(z) // 2, 0)

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        (p_first, p_second), (z_second, z_first) = (v.chunk(2) for v in self.embed(views))
        return {
            "first": negative_cosine(p_first, z_second) / 2,
            "second": negative_cosine(p_second, z_first) / 2,
        }

    def pretext_score(self, views: dict[str, Tensor]) -> float:
        """Return 1 - cos over that against the views of other volumes: the loss alone is least after a collapse."""
        return matching_error(*self.embed(views), views["volume"])

    def chance(self, views: dict[str, Tensor]) -> float:
        return 1.0

    def monitor(self, probe: Tensor, rng: BatchRng) -> dict[str, float]:
        return view_measures(self.backbone, self.projector, *self.config.views.pair(probe, rng))
