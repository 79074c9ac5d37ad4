"""SimCLR (Chen et al., ICML 2020)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssl3d import Method, MethodConfig
from ssl3d.errors import DataError
from ssl3d.losses import nt_xent
from ssl3d.models.heads import MLP, Norm, pool
from ssl3d.pretrain.monitor import view_measures
from ssl3d.pretrain.source import CropSource
from ssl3d.rng import BatchRng
from ssl3d.transforms import RandomViews


class SimCLRConfig(MethodConfig):
    """Options of SimCLR."""

    temperature: float = Field(0.5, gt=0)
    """Temperature of NT-Xent; the paper's best for small images and batches (appendix B.9)."""
    hidden: int = Field(512, ge=1)
    """Width of the projector's hidden layer; the paper's is that of f^g."""
    embedding: int = Field(128, ge=1)
    """Length of the embedding that is compared (paper)."""
    norm: Norm = "batch"
    """Norm after both of the projector's layers: `batch`, over both views of all crops (released code), or `layer`."""
    views: RandomViews = RandomViews()
    """Augmentations, shared by all contrastive methods."""


class SimCLR(Method):
    """Tell the two views of a crop from the views of all other volumes.

    Departures from the paper: crops of one volume that meet in a batch are no negatives of each other
    (the paper's images are all different); Adam instead of LARS, as for every method here.
    """

    name = "simclr"
    title = "SimCLR"
    paper = "Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020"
    trains = "encoder"
    views_per_item = 2
    minimum_items = 2
    Config = SimCLRConfig
    config: SimCLRConfig

    def __init__(self, backbone: Any, config: SimCLRConfig) -> None:
        super().__init__(backbone, config)
        self.view_edge = config.views.edge
        widths = (backbone.global_channels, config.hidden, config.embedding)
        self.projector = MLP(widths, config.norm, last=config.norm, last_scale=True)

    def setup(self, volumes: CropSource) -> None:
        if len(volumes) < 2:
            raise DataError("simclr needs at least 2 volumes: crops of one are no negatives of each other.")

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        first, second = self.config.views.pair(x, rng)  # (B, 1, D, H, W) each
        return {"first": first, "second": second, "volume": rng.constant(rng.volumes)}

    def chance(self, views: dict[str, Tensor]) -> float:
        """Log of the views among which the other one is to be found, itself included."""
        shown = views["volume"].repeat(2)  # (2B,)
        candidates = (shown[:, None] != shown).sum(1) + 1
        return float(candidates.double().log().mean())

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.cat([views["first"], views["second"]])  # (2B, 1, D, H, W)
        pooled = pool(self.backbone.encode(x))  # (2B, C)
        first, second = self.projector(pooled).chunk(2)  # (B, embedding) each
        return {"nt_xent": nt_xent(first, second, self.config.temperature, views["volume"])}

    def monitor(self, probe: Tensor, rng: BatchRng) -> dict[str, float]:
        return view_measures(self.backbone, self.projector, *self.config.views.pair(probe, rng))
