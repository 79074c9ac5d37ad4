"""In-painting: context encoders (Pathak et al., CVPR 2016)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl3d import Method, MethodConfig
from ssl3d.geometry import full_precision
from ssl3d.models.heads import RestorationHead, mean_image_error
from ssl3d.ranks import total
from ssl3d.rng import BatchRng
from ssl3d.transforms import InPainting as Boxes


class InPaintingConfig(MethodConfig):
    """Options of in-painting. The GVSL paper, whose table 1 has this row, does not state its settings."""

    fill: Literal["mean", "zero", "noise"] = "mean"
    """What fills the holes: the crop's mean intensity (Pathak et al.), 0 (air in a CT), or U(0, 1) noise
    in each voxel (GVSL, Models Genesis)."""
    loss_over: Literal["whole", "holes"] = "whole"
    """Where the squared error is averaged: over the whole volume, or over the holes only."""
    max_boxes: int = Field(30, ge=1)
    """Most holes a crop."""
    next_p: float = Field(0.95, gt=0, le=1)
    """Probability of each hole after the first."""
    edges: tuple[float, float] = (1 / 10, 1 / 5)
    """Smallest and largest edge of a hole as fractions of the crop's edge, drawn for each axis."""
    hidden_channels: int = Field(16, ge=1)
    """Width of the restoration head."""

    @model_validator(mode="after")
    def _edges_in_range(self) -> InPaintingConfig:
        low, high = self.edges
        if not 0 < low <= high <= 1:
            raise ValueError(f"edges={self.edges}: use 0 < smallest <= largest <= 1")
        return self


class InPainting(Method):
    """Restore boxes that were cut out of a volume.

    Departures from the paper: no adversarial loss (MSE alone, as for the other restoring methods), many small boxes
    instead of one in the middle, and by default the error counts everywhere.
    """

    name = "inpainting"
    title = "In-painting"
    paper = "Pathak et al., Context Encoders: Feature Learning by Inpainting, CVPR 2016"
    trains = "encoder+decoder"
    Config = InPaintingConfig
    config: InPaintingConfig

    def __init__(self, backbone: Any, config: InPaintingConfig) -> None:
        super().__init__(backbone, config)
        self.splits = config.loss_over == "whole"  # over holes, a crop counts by how many it has
        self.restoration = RestorationHead(backbone.local_channels, config.hidden_channels)

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        cfg = self.config
        first = Boxes(p=1.0, max_boxes=1, next_p=1.0, edges=cfg.edges)
        more = Boxes(p=1.0, max_boxes=cfg.max_boxes - 1, next_p=cfg.next_p, edges=cfg.edges)
        # At least one hole: a whole crop would teach to copy, and has no error in its holes.
        holes = first.holes(x, rng.fork("first")) | more.holes(x, rng.fork("more"))  # (B, 1, D, H, W)
        if cfg.fill == "noise":
            filling = rng.uniform(shape=x.shape[1:])  # (B, 1, D, H, W)
        elif cfg.fill == "mean":
            filling = x.mean((1, 2, 3, 4), keepdim=True)  # (B, 1, 1, 1, 1)
        else:
            filling = x.new_zeros(())
        return {"cut": torch.where(holes, filling, x), "whole": x, "holes": holes}

    def chance(self, views: dict[str, Tensor]) -> float:
        over = views["holes"] if self.config.loss_over == "holes" else None
        return mean_image_error(views["whole"], over)

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        _, local = self.backbone(views["cut"])  # (B, C, D, H, W)
        error = (full_precision(self.restoration(local)) - views["whole"]).square()  # (B, 1, D, H, W)
        if self.config.loss_over == "whole":
            return {"mse": error.mean()}
        # A crop counts by how many holes it has, on whichever device it is.
        return {"mse": total((error * views["holes"]).sum()) / total(views["holes"].sum())}
