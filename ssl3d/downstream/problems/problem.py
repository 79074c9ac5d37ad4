"""What all kinds of tasks have in common: frozen or trained features."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ssl3d.config import DownstreamConfig
from ssl3d.device import autocast_dtype
from ssl3d.downstream.problems import probe
from ssl3d.downstream.problems.frozen import FeatureStore
from ssl3d.downstream.problems.neighbours import NearestNeighbours
from ssl3d.downstream.problems.scaling import Standardize, Whiten
from ssl3d.downstream.tasks import Task
from ssl3d.errors import TrainingError
from ssl3d.models.backbone import Backbone
from ssl3d.rng import BatchRng
from ssl3d.transforms.supervised import Augmentation

if TYPE_CHECKING:
    from ssl3d.data.prepared.cohort import PreparedCohort


Mode = Literal["linear", "multiscale", "finetune", "knn"]


OnPrediction = Callable[[int, Tensor, Tensor], None]
"""Takes a case's index, its predicted and its true labels (D, H, W)."""


MODES: tuple[Mode, ...] = ("linear", "multiscale", "finetune", "knn")


CONSTANT_VALUE = 0.01
"""Below this share of the standard deviation of the true values, a regression's outputs do not differ."""


class Problem:
    """What all kinds of tasks have in common: frozen or trained features.

    ``scale``: what turns the values of :meth:`validate` and :meth:`test`, of which the larger is better,
    into the score of the record (percent; -1 for errors, of which the lower is better).
    ``modes``: the modes that the kind has.
    """

    scale = 100.0
    modes: tuple[Mode, ...] = MODES

    on_prediction: OnPrediction | None = None

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        cohort: PreparedCohort,
        mode: Mode,
        config: DownstreamConfig,
        device: torch.device,
    ) -> None:
        self.backbone, self.task, self.cohort, self.mode = backbone, task, cohort, mode
        self.config, self.device = config, device
        self.dtype = autocast_dtype(config.precision, device)
        self.frozen = FeatureStore(self.features, config) if mode != "finetune" else None

    def features(self, case: int) -> Tensor:
        """Return the features (1, C, ...) of one whole case, without gradient."""
        raise NotImplementedError

    def layer(self) -> nn.Module:
        """Return the trainable layer of the head."""
        raise NotImplementedError

    def make_head(self, train: list[int]) -> nn.Module:
        """Return the head of fine-tuning, with random weights."""
        return self.layer()

    def solve(self, train: list[int], val: list[int], seed: int) -> tuple[nn.Module, probe.LinearMap]:
        """Return the head of linear evaluation, and how it was found.

        Args:
            train: cases to fit.
            val: more cases for the choice of a penalty.
            seed: decides which voxels stand for a case.

        Raises:
            TrainingError: a feature is not finite, or there is no solution.
        """
        raise NotImplementedError

    @property
    def cases_per_step(self) -> int:
        """Training cases that a step of fine-tuning sees."""
        return self.config.finetune.batch_size

    @property
    def learning_rate(self) -> float:
        """Of fine-tuning, after warm-up."""
        return self.config.finetune.lr

    def references(self, train: list[int]) -> list[int]:
        """Return the training cases that :meth:`settle` looks at."""
        return []

    def voxels_trained(self, case: int) -> int:
        """Return the voxels of ``case`` that pass the network in a training step."""
        raise NotImplementedError

    def voxels_predicted(self, case: int) -> int:
        """Return the voxels that pass the network for a prediction of ``case``."""
        raise NotImplementedError

    def settle(self, head: nn.Module, train: list[int]) -> None:
        """Set what a head of fine-tuning keeps of the features as they are now: nothing, unless it says otherwise."""

    def constant_output(self, per_case: list[dict[str, Any]]) -> bool:
        """Return whether the outputs for the test cases do not differ."""
        return False

    def empty_head(self) -> nn.Module:
        """Return a head of the names and shapes that the mode gives, to load a stored one into."""
        return self.make_head([]) if self.mode == "finetune" else self._fixed_map(None)

    def _fixed_map(self, found: probe.LinearMap | None, scale: nn.Module | None = None) -> nn.Module:
        """Return ``scale``, then the layer with the solution's weights; None leaves room for stored ones."""
        layer = self.layer()
        if found is not None:
            assert isinstance(layer, nn.Linear | nn.Conv3d) and layer.bias is not None
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(found.weight).view_as(layer.weight))
                layer.bias.copy_(torch.from_numpy(found.bias))
        return nn.Sequential(scale or self._empty_scale(), layer)

    def _empty_scale(self) -> nn.Module:
        """Return a scaling of features that changes nothing."""
        return Standardize(torch.zeros(self.feature_channels), torch.ones(self.feature_channels))

    @property
    def feature_channels(self) -> int:
        """Channels of :meth:`features`."""
        raise NotImplementedError

    def predict(self, head: nn.Module, case: int) -> Tensor:
        """Return what the head says of one case, on the CPU.

        Logits (K + 1, D, H, W) of a segmentation; the probability () of the second of two classes;
        the probabilities (K,) of more; a number () in its unit.
        """
        raise NotImplementedError

    def make_neighbours(self, train: list[int], seed: int) -> nn.Module:
        """Return a classifier that compares with the features of the training cases."""
        raise NotImplementedError

    def loss(self, head: nn.Module, cases: list[int], step: int, seed: int) -> Tensor:
        """Return the scalar training loss of a batch of cases."""
        raise NotImplementedError

    def validate(self, head: nn.Module, cases: list[int]) -> tuple[float, float]:
        """Return (primary metric, tie-breaker); larger is better."""
        raise NotImplementedError

    def test(self, head: nn.Module, cases: list[int]) -> tuple[float, list[dict[str, Any]], dict[str, int]]:
        """Return (primary metric, metrics of each case, counts of what was left out); larger is better."""
        raise NotImplementedError

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def volume(self, case: int) -> Tensor:
        """Return one prepared volume (1, 1, D, H, W)."""
        return torch.from_numpy(np.array(self.cohort.image(case)))[None, None].to(self.device)

    def augmentation(self, x: Tensor, step: int, seed: int) -> Augmentation:
        """Return how a batch ``x`` (B, 1, D, H, W) is augmented."""
        rng = BatchRng(seed, step, range(len(x)), self.device, ("downstream augmentation",))
        return Augmentation(x.shape[2:], rng)

    def _neighbours(self, bank: Tensor, classes: Tensor, num_classes: int, train: list[int]) -> nn.Module:
        """Return a classifier by the neighbours in ``bank`` (N, C), standardised where the budget says so."""
        cfg = self.config.knn
        if not cfg.standardize:
            return NearestNeighbours(bank, classes, num_classes, cfg.neighbours, cfg.temperature)
        scale = self._standardize(train)
        return nn.Sequential(
            scale, NearestNeighbours(scale(bank), classes, num_classes, cfg.neighbours, cfg.temperature)
        )

    def _standardize(self, train: list[int]) -> Standardize:
        """Measure centre and scale of each feature on the training cases."""
        mean, square = self._moments(train, lambda f: f.square().sum(dim=1))  # (C,), (C,)
        std = (square - mean.square()).clamp_min(0).sqrt()
        return Standardize(mean.float(), std.float())

    def _whiten(self, train: list[int]) -> Whiten:
        """Measure centre and covariance of the features on the training cases."""
        mean, square = self._moments(train, lambda f: f @ f.T)  # (C,), (C, C)
        return Whiten(mean.float(), square - torch.outer(mean, mean))

    def _moments(self, train: list[int], second: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the means of features and of their products over the training cases, in float64.

        ``second`` adds the products of features (C, N) up.
        """
        assert self.frozen is not None
        total: Tensor | None = None
        square: Tensor | None = None
        count = 0
        for case in train:
            f = self.frozen[case].double()
            f = f.reshape(f.shape[1], -1)  # (C, voxels)
            count += f.shape[1]
            total = f.sum(dim=1) if total is None else total + f.sum(dim=1)
            square = second(f) if square is None else square + second(f)
        assert total is not None and square is not None
        if not bool(total.isfinite().all() and square.isfinite().all()):
            raise TrainingError(probe.NOT_FINITE)
        return total / count, square / count
