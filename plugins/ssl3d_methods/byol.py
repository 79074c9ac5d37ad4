"""BYOL: Bootstrap Your Own Latent (Grill et al., NeurIPS 2020)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl3d import Method, MethodConfig, Progress
from ssl3d.losses import cosine_distance, matching_error
from ssl3d.models.heads import MLP, Norm, check_norm, pool
from ssl3d.optim import follow
from ssl3d.pretrain.monitor import view_measures
from ssl3d.rng import BatchRng
from ssl3d.transforms import RandomViews


def momentum(step: int, steps: int, base: float) -> float:
    """Return tau_k = 1 - (1 - base) (cos(pi k / K) + 1) / 2, from ``base`` at k = 0 to 1 at k = K.

    Args:
        step: optimizer steps k done before the update.
        steps: optimizer steps K of the whole run.
        base: tau_0 in [0, 1].
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


class BYOLConfig(MethodConfig):
    """Options of BYOL."""

    base_momentum: float = Field(0.996, ge=0, le=1)
    """Momentum of the target at the first step; it rises to 1 on a cosine over all steps. The paper's
    value is for 100,000s of steps: a short run needs a smaller one, or the target stays random."""
    hidden: int = Field(1024, ge=1)
    """Width of the hidden layers; the paper's 4096 is twice a ResNet-50's f^g, this twice the U-Net's."""
    embedding: int = Field(256, ge=1)
    """Length of the embedding (paper)."""
    norm: Norm = "batch"
    """Norm of the hidden layers: `batch`, over both views of all crops, or `layer`, with which small
    batches collapse."""
    views: RandomViews = RandomViews()
    """Augmentations, shared by all contrastive methods."""


class BYOL(Method):
    """Predict, from one view, what a slowly moving copy of the network makes of the other.

    Departures from the paper: batch norm over both views at once, since batches are small (see
    `ssl3d.models.heads.MLP`); Adam instead of LARS, as for every method here; one distribution of
    augmentations for both views.
    """

    name = "byol"
    title = "BYOL"
    paper = (
        "Grill et al., Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, NeurIPS 2020"
    )
    trains = "encoder"
    untrained = ("target.", "target_projector.")
    targets = {  # noqa: RUF012 - a literal, as everything that listings read
        "target.encoder": "backbone.encoder",
        "target_projector": "projector",
    }
    views_per_item = 2
    Config = BYOLConfig
    config: BYOLConfig

    def __init__(self, backbone: Any, config: BYOLConfig) -> None:
        super().__init__(backbone, config)
        self.view_edge = config.views.edge
        self.projector = MLP((backbone.global_channels, config.hidden, config.embedding), config.norm)
        self.predictor = MLP((config.embedding, config.hidden, config.embedding), config.norm)
        # Copies, not networks with an initialisation of their own.
        self.target = copy.deepcopy(backbone)
        self.target.decoder = nn.Identity()  # never used, so neither stored nor moved
        self.target_projector = copy.deepcopy(self.projector)
        self.target.requires_grad_(False)
        self.target_projector.requires_grad_(False)

    def check(self, crop: Sequence[int], items: int) -> None:
        check_norm(self.name, self.config.norm, items)

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        first, second = self.config.views.pair(x, rng)  # (B, 1, D, H, W) each
        return {"first": first, "second": second, "volume": rng.constant(rng.volumes)}

    @property
    def heads(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.projector, self.predictor, self.target_projector

    def embed(
        self,
        views: dict[str, Tensor],
        projector: nn.Module,
        predictor: nn.Module,
        target_projector: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        """Return predictions and targets (2B, embedding): row i predicts what the target makes of the other view."""
        x = torch.cat([views["first"], views["second"]])  # (2B, 1, D, H, W)
        q = predictor(projector(pool(self.backbone.encode(x))))  # (2B, embedding)
        with torch.no_grad():
            z = target_projector(pool(self.target.encode(x)))  # (2B, embedding)
        return q, z.roll(len(z) // 2, 0)

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        (q_first, q_second), (z_second, z_first) = (v.chunk(2) for v in self.embed(views, *self.heads))
        return {"first": cosine_distance(q_first, z_second), "second": cosine_distance(q_second, z_first)}

    def pretext_score(self, views: dict[str, Tensor]) -> float:
        """Return the loss over that against the views of other volumes: the loss alone is least after a collapse.

        Normalised over the views, as in training: the target's stored statistics are copies of the online
        network's, which do not fit its features.
        """
        heads = [copy.deepcopy(head).train() for head in self.heads]
        return matching_error(*self.embed(views, *heads), views["volume"])

    def chance(self, views: dict[str, Tensor]) -> float:
        return 1.0

    @torch.no_grad()
    def on_step_end(self, progress: Progress) -> None:
        tau = momentum(progress.step - 1, progress.steps, self.config.base_momentum)
        for target, online in ((self.target, self.backbone), (self.target_projector, self.projector)):
            follow(target, online, 1 - tau)

    def monitor(self, probe: Tensor, rng: BatchRng) -> dict[str, float]:
        return view_measures(self.backbone, self.projector, *self.config.views.pair(probe, rng))
