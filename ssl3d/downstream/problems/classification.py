"""Classification of volumes in two classes, from the pooled global feature f^g."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.downstream.metrics import auc
from ssl3d.downstream.problems import probe
from ssl3d.downstream.problems.problem import Problem
from ssl3d.models.heads import PooledLinear, PooledNorm, pool
from ssl3d.rng import derive_seed

CONSTANT_PROBABILITY = 0.01
"""Below this standard deviation over the test cases, in every class, a classifier's outputs do not differ."""


REFERENCES = 32
"""Training cases at most whose features set a readout's centre and scale."""


class LogOdds(nn.Module):
    """Logarithms of two classes' shares (B, 2) -> log odds of the second (B, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 1] - x[:, 0])[:, None]


class Classification(Problem):
    """One logit a volume, from the pooled global feature f^g.

    Linear evaluation reads it through a linear map, fine-tuning through :class:`~ssl3d.models.heads.PooledLinear`, whose
    centre and scale are those of training cases under the weights of the moment, whatever the size of the batch.
    """

    @property
    def outputs(self) -> int:
        """Numbers that the head gives a volume."""
        return 1

    @property
    def feature_channels(self) -> int:
        return self.backbone.global_channels

    def layer(self) -> nn.Module:
        return nn.Linear(self.backbone.global_channels, self.outputs)

    def make_head(self, train: list[int]) -> nn.Module:
        return PooledLinear(self.backbone.global_channels, self.outputs)

    @property
    def cases_per_step(self) -> int:
        return self.config.finetune.volumes

    @property
    def learning_rate(self) -> float:
        return self.config.finetune.volumes_lr or self.config.finetune.lr

    def references(self, train: list[int]) -> list[int]:
        return train[:: -(-len(train) // REFERENCES)]

    def voxels_trained(self, case: int) -> int:
        return math.prod(self.cohort.cases[case].shape)

    def voxels_predicted(self, case: int) -> int:
        return self.voxels_trained(case)

    @torch.no_grad()
    def settle(self, head: nn.Module, train: list[int]) -> None:
        """Measure centre and scale of the pooled features on training cases, as they are without augmentation."""
        norms = [module for module in head.modules() if isinstance(module, PooledNorm)]
        features = torch.cat([self._pooled(self.volume(case)) for case in self.references(train)])  # (N, C)
        for norm in norms:
            norm.calibrate(features)

    def solve(self, train: list[int], val: list[int], seed: int) -> tuple[nn.Module, probe.LinearMap]:
        assert self.frozen is not None
        scale = self._standardize(train)
        cases = [*train, *val]
        x = scale(torch.cat([self.frozen[case] for case in cases])).double().numpy()  # (N, C)
        subjects = [self.cohort.cases[case].subject for case in cases]
        found = self._fit(x, cases, subjects, len(train))
        return self._fixed_map(found, scale), found

    def _fit(self, x: np.ndarray, cases: list[int], subjects: list[str], train: int) -> probe.LinearMap:
        """Return the map of features (N, C) of ``cases``, fitted to the first ``train`` of them."""
        y = np.array([self._target(case) for case in cases])
        return probe.logistic(x, y, subjects, train)

    def constant_output(self, per_case: list[dict[str, Any]]) -> bool:
        rows = [
            case["probabilities"] if "probabilities" in case else [case["probability"]] for case in per_case
        ]
        return bool((np.std(rows, axis=0) < CONSTANT_PROBABILITY).all())

    def make_neighbours(self, train: list[int], seed: int) -> nn.Module:
        assert self.frozen is not None
        bank = torch.cat([self.frozen[case] for case in train])  # (N, C)
        classes = torch.tensor([self._target(case) for case in train])
        return nn.Sequential(self._neighbours(bank, classes, 2, train), LogOdds())

    @torch.no_grad()
    def features(self, case: int) -> Tensor:
        return self._pooled(self.volume(case))

    def _pooled(self, x: Tensor) -> Tensor:
        """(1, 1, D, H, W) -> (1, C); the smallest volumes are padded to what the backbone needs."""
        least = self.backbone.minimum_edge()
        x = F.pad(x, [n for size in reversed(x.shape[2:]) for n in (0, max(0, least - size))])
        with self.autocast():
            return pool(self.backbone.encode(x))

    def pooled(self, case: int) -> Tensor:
        """Return the pooled feature (1, C) of one case, frozen or with gradient."""
        return (
            self.frozen[case].to(self.device) if self.frozen is not None else self._pooled(self.volume(case))
        )

    def pooled_views(self, cases: list[int], step: int, seed: int) -> Tensor:
        """Return what a training step sees of ``cases``: pooled features (B, C), augmented where the budget says so.

        Volumes differ in size, so they pass one by one; GroupNorm makes that the same as a batch.
        """
        if not self.config.finetune.augment:
            return torch.cat([self.pooled(case) for case in cases])
        volumes = [self.volume(case) for case in cases]
        views = [
            self._pooled(self.augmentation(x, step, derive_seed(seed, place)).image(x))
            for place, x in enumerate(volumes)
        ]
        return torch.cat(views)

    def logit(self, head: nn.Module, case: int) -> Tensor:
        """Return the logit (1,) of one case."""
        return head(self.pooled(case))[:, 0].float()

    def loss(self, head: nn.Module, cases: list[int], step: int, seed: int) -> Tensor:
        logits = head(self.pooled_views(cases, step, seed))[:, 0].float()  # (B,)
        targets = torch.tensor([float(self._target(case)) for case in cases], device=self.device)
        return F.binary_cross_entropy_with_logits(logits, targets)

    def _target(self, case: int) -> int:
        target = self.cohort.cases[case].target
        assert target is not None, "classification cases have targets; the splits check it"
        return target

    @torch.no_grad()
    def predict(self, head: nn.Module, case: int) -> Tensor:
        return torch.sigmoid(self.logit(head, case))[0].cpu()

    def _probabilities(self, head: nn.Module, cases: list[int]) -> list[float]:
        return [float(self.predict(head, case)) for case in cases]

    @torch.no_grad()
    def validate(self, head: nn.Module, cases: list[int]) -> tuple[float, float]:
        # The AUC of a few cases is a step function with many ties: the lower loss decides them.
        logits = torch.cat([self.logit(head, case) for case in cases]).cpu()
        targets = [self._target(case) for case in cases]
        loss = F.binary_cross_entropy_with_logits(logits, torch.tensor(targets, dtype=torch.float32))
        return auc(targets, logits.tolist()), -float(loss)

    def test(self, head: nn.Module, cases: list[int]) -> tuple[float, list[dict[str, Any]], dict[str, int]]:
        targets, probabilities = [self._target(case) for case in cases], self._probabilities(head, cases)
        ids = [self.cohort.cases[case].id for case in cases]
        per_case: list[dict[str, Any]] = [
            {"case": i, "target": t, "probability": p}
            for i, t, p in zip(ids, targets, probabilities, strict=True)
        ]
        return auc(targets, probabilities), per_case, {}
