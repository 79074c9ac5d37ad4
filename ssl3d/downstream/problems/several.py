"""Kinds of tasks with one prediction a volume, besides yes or no: several classes, or a number.

Each differs from :class:`ssl3d.downstream.problems.classification.Classification` in the outputs of its head, the
loss and the metric; budget, features and validation are the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.downstream.metrics import macro_auc
from ssl3d.downstream.problems import probe
from ssl3d.downstream.problems.classification import Classification
from ssl3d.downstream.problems.problem import CONSTANT_VALUE


class SeveralOutputs(Classification):
    """A head with :attr:`outputs` numbers a volume, from the pooled global feature f^g."""

    def raw(self, head: nn.Module, cases: list[int]) -> Tensor:
        """Return the head's outputs (B, K); volumes differ in size, so they pass one by one."""
        return torch.cat([head(self.pooled(case)).float() for case in cases])

    def targets(self, cases: list[int]) -> Tensor:
        """Return what :meth:`criterion` compares the outputs with."""
        raise NotImplementedError

    def criterion(self, raw: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar loss."""
        raise NotImplementedError

    def loss(self, head: nn.Module, cases: list[int], step: int, seed: int) -> Tensor:
        raw = head(self.pooled_views(cases, step, seed)).float()  # (B, K)
        return self.criterion(raw, self.targets(cases).to(self.device))


class _ByClass(SeveralOutputs):
    """Scored by the mean over classes of the AUC of one class against the rest."""

    @property
    def outputs(self) -> int:
        return len(self.cohort.target_names)

    def probabilities(self, raw: Tensor) -> Tensor:
        """Return (B, K) in [0, 1]."""
        raise NotImplementedError

    def truth(self, cases: list[int]) -> np.ndarray:
        """Return whether each class applies: (N, K) int."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, head: nn.Module, case: int) -> Tensor:
        return self.probabilities(self.raw(head, [case]))[0].cpu()  # (K,)

    @torch.no_grad()
    def validate(self, head: nn.Module, cases: list[int]) -> tuple[float, float]:
        raw = self.raw(head, cases).cpu()
        score = macro_auc(self.truth(cases), self.probabilities(raw).numpy())
        return score, -float(self.criterion(raw, self.targets(cases)))  # the lower loss decides ties

    @torch.no_grad()
    def test(self, head: nn.Module, cases: list[int]) -> tuple[float, list[dict[str, Any]], dict[str, int]]:
        probabilities, truth = self.probabilities(self.raw(head, cases)).cpu().numpy(), self.truth(cases)
        per_case: list[dict[str, Any]] = [
            {
                "case": self.cohort.cases[case].id,
                "classes": [int(k) for k in np.flatnonzero(applies)],
                "probabilities": [float(p) for p in row],
            }
            for case, applies, row in zip(cases, truth, probabilities, strict=True)
        ]
        return macro_auc(truth, probabilities), per_case, {}


class MultiClass(_ByClass):
    """One of several classes: softmax and cross-entropy."""

    def _fit(self, x: np.ndarray, cases: list[int], subjects: list[str], train: int) -> probe.LinearMap:
        found = super()._fit(x, cases, subjects, train)
        if self.outputs != 2:
            return found
        # Log odds of the second class as two outputs, the first of which is 0.
        weight, bias = np.vstack([0 * found.weight, found.weight]), np.append(0, found.bias)
        return replace(found, weight=weight, bias=bias)

    def make_neighbours(self, train: list[int], seed: int) -> nn.Module:
        bank = torch.cat([self.pooled(case) for case in train]).cpu()  # (N, C)
        return self._neighbours(bank, self.targets(train), self.outputs, train)

    def targets(self, cases: list[int]) -> Tensor:
        return torch.tensor([self._target(case) for case in cases])

    def criterion(self, raw: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(raw, targets)

    def probabilities(self, raw: Tensor) -> Tensor:
        return raw.softmax(dim=1)

    def truth(self, cases: list[int]) -> np.ndarray:
        return np.eye(self.outputs, dtype=int)[[self._target(case) for case in cases]]


class MultiLabel(_ByClass):
    """Any of several classes: a sigmoid and binary cross-entropy for each."""

    modes = ("linear", "multiscale", "finetune")  # neighbours vote for one class

    def _fit(self, x: np.ndarray, cases: list[int], subjects: list[str], train: int) -> probe.LinearMap:
        """Return a regression for each class, with a penalty of its own."""
        each = [probe.logistic(x, y, subjects, train) for y in self.truth(cases).T]
        weight, bias = np.concatenate([f.weight for f in each]), np.concatenate([f.bias for f in each])
        return probe.LinearMap(weight, bias, iterations=max(f.iterations for f in each))

    def truth(self, cases: list[int]) -> np.ndarray:
        table = np.zeros((len(cases), self.outputs), dtype=int)
        for row, case in enumerate(cases):
            table[row, list(self.cohort.cases[case].classes or ())] = 1
        return table

    def targets(self, cases: list[int]) -> Tensor:
        return torch.from_numpy(self.truth(cases)).float()

    def criterion(self, raw: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(raw, targets)

    def probabilities(self, raw: Tensor) -> Tensor:
        return raw.sigmoid()


class Deviations(nn.Module):
    """A head that predicts in deviations from a mean, with the two numbers that make values of them.

    Args:
        head: (B, C) -> (B, 1).
        mean, deviation: of the training cases, in the unit of the values.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, head: nn.Module, mean: float, deviation: float) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)  # (B, 1)
        return y


class Regression(SeveralOutputs):
    """A number: the head predicts deviations from the mean of the training cases; fine-tuning by a Huber loss.

    Scored by the mean absolute error in the unit of the numbers; lower is better.
    """

    scale = -1.0
    modes = ("linear", "multiscale", "finetune")

    def make_head(self, train: list[int]) -> nn.Module:
        self._measure(train)
        return Deviations(super().make_head(train), self.mean, self.deviation)

    def solve(self, train: list[int], val: list[int], seed: int) -> tuple[nn.Module, probe.LinearMap]:
        self._measure(train)
        head, found = super().solve(train, val, seed)
        return Deviations(head, self.mean, self.deviation), found

    def _fit(self, x: np.ndarray, cases: list[int], subjects: list[str], train: int) -> probe.LinearMap:
        y = np.array([self._value(case) for case in cases])
        return probe.ridge(x, (y - self.mean) / self.deviation, subjects, train)

    def _measure(self, train: list[int]) -> None:
        values = [self._value(case) for case in train]
        self.mean, self.deviation = float(np.mean(values)), float(np.std(values)) or 1.0

    def empty_head(self) -> nn.Module:
        head = super().make_head([]) if self.mode == "finetune" else self._fixed_map(None)
        return Deviations(head, 0.0, 1.0)

    def constant_output(self, per_case: list[dict[str, Any]]) -> bool:
        values, predicted = ([case[key] for case in per_case] for key in ("value", "prediction"))
        return bool(np.std(predicted) < CONSTANT_VALUE * np.std(values))

    @torch.no_grad()
    def predict(self, head: nn.Module, case: int) -> Tensor:
        assert isinstance(head, Deviations)
        return (self.raw(head, [case])[0, 0] * head.deviation + head.mean).cpu()

    def _value(self, case: int) -> float:
        value = self.cohort.cases[case].value
        assert value is not None, "regression cases have values; the preparation checks it"
        return value

    def targets(self, cases: list[int]) -> Tensor:
        values = torch.tensor([self._value(case) for case in cases])
        return ((values - self.mean) / self.deviation)[:, None]  # (B, 1)

    def criterion(self, raw: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(raw, targets)

    @torch.no_grad()
    def _errors(self, head: nn.Module, cases: list[int]) -> tuple[list[float], list[float]]:
        predicted = (self.raw(head, cases)[:, 0].cpu() * self.deviation + self.mean).tolist()
        return predicted, [abs(p - self._value(c)) for p, c in zip(predicted, cases, strict=True)]

    def validate(self, head: nn.Module, cases: list[int]) -> tuple[float, float]:
        return -float(np.mean(self._errors(head, cases)[1])), 0.0

    def test(self, head: nn.Module, cases: list[int]) -> tuple[float, list[dict[str, Any]], dict[str, int]]:
        predicted, errors = self._errors(head, cases)
        per_case: list[dict[str, Any]] = [
            {"case": self.cohort.cases[c].id, "value": self._value(c), "prediction": p, "mae": e}
            for c, p, e in zip(cases, predicted, errors, strict=True)
        ]
        return -float(np.mean(errors)), per_case, {}
