"""A control: pretraining with nothing to learn."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl3d import Method, MethodConfig
from ssl3d.models.heads import PooledLinear, pool
from ssl3d.rng import BatchRng


class RandomLabelsConfig(MethodConfig):
    """Options of random labels."""

    classes: int = Field(10, ge=2)
    """Classes to draw from; rotation prediction has as many."""


class RandomLabels(Method):
    """Tell classes drawn at random: a control, with nothing to learn.

    Rotation prediction without the rotations. Loss, optimizer, steps and crops are those of any row, but no gradient
    carries information on an image (the loss stays at log(classes)): what this row gains over random weights, any
    training of the encoder gains, and what another row owes to its pretext task is what it gains over this one.
    """

    name = "random_labels"
    title = "Random labels"
    trains = "encoder"
    control = True
    Config = RandomLabelsConfig
    config: RandomLabelsConfig

    def __init__(self, backbone: Any, config: RandomLabelsConfig) -> None:
        super().__init__(backbone, config)
        self.classifier = PooledLinear(backbone.global_channels, config.classes)

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        return {"x": x, "label": rng.integers(0, self.config.classes)}  # (B, 1, D, H, W), (B,)

    def chance(self, views: dict[str, Tensor]) -> float:
        return math.log(self.config.classes)

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = pool(self.backbone.encode(views["x"]))  # (B, C)
        return {"cross_entropy": F.cross_entropy(self.classifier(pooled), views["label"])}
