"""Linear evaluation is a minimum: against slow second forms, and under rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cohorts import MemoryCohort, sphere_cohort
from scipy.optimize import minimize
from test_harness import CLS, CPU, SEG, backbone, config, split
from test_task_files import several_balls
from torch import Tensor, nn

from ssl3d.data.splits import Split
from ssl3d.downstream.harness import Evaluation, Outcome, evaluate
from ssl3d.downstream.problems import probe
from ssl3d.downstream.tasks import Task
from ssl3d.errors import TrainingError
from ssl3d.losses import segmentation_loss
from ssl3d.models.backbone import Features


def cases(n: int = 60, f: int = 5, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return rng.normal(size=(n, f)) + 0.7 * np.eye(classes, f)[y], y


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_the_minimum_it_says(classes: int) -> None:
    x, y = cases(classes=classes)
    rows = 1 if classes == 2 else classes

    def objective(theta: np.ndarray) -> float:
        w = theta.reshape(rows, x.shape[1] + 1)
        z = x @ w[:, :-1].T + w[:, -1]
        z = np.hstack([np.zeros((len(z), 1)), z]) if rows == 1 else z
        return float(
            np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]) + 0.05 / 2 * (w[:, :-1] ** 2).sum()
        )

    found = probe.fit_logistic(x, y, 0.05)
    slow = minimize(objective, np.zeros(rows * (x.shape[1] + 1)), method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found.weight, slow.x.reshape(rows, -1)[:, :-1], atol=1e-4)


def test_ridge_regression_is_the_normal_equation() -> None:
    x, _ = cases()
    y = x[:, 0] + 3
    centred = x - x.mean(0)
    expected = np.linalg.solve(
        centred.T @ centred / len(x) + 0.2 * np.eye(x.shape[1]), centred.T @ (y - y.mean()) / len(x)
    )
    found = probe.fit_ridge(x, y, 0.2)
    np.testing.assert_allclose(found.weight[0], expected, atol=1e-10)
    assert found.bias[0] == pytest.approx(y.mean() - x.mean(0) @ expected)


def test_the_penalty_is_strong_for_noise_and_weak_for_signal() -> None:
    x, y = cases(f=30)
    subjects = [str(i) for i in range(len(y))]
    noise = np.random.default_rng(1).integers(0, 2, len(y))
    chosen = [probe.logistic(x, t, subjects, len(y)).strength for t in (noise, (x[:, 0] > 0.35).astype(int))]
    assert chosen[0] == probe.LOGISTIC[-1] and chosen[1] < 0.1  # type: ignore[operator]


def test_no_subject_is_on_both_sides_of_a_fold() -> None:
    """Each subject has a feature of its own that tells its class: only between subjects is it worth nothing."""
    rng = np.random.default_rng(0)
    target = rng.permutation(np.repeat([0, 1], 12))
    person = np.repeat(np.arange(24), 3)
    x, y = 10 * np.eye(24)[person] + 0.1 * rng.normal(size=(72, 24)), target[person]
    for known, left in probe._folds(y, [str(p) for p in person]):
        assert not set(person[known]) & set(person[left])
    apart = probe.logistic(x, y, [str(p) for p in person], 72).strength
    mixed = probe.logistic(x, y, [str(i) for i in range(72)], 72).strength
    assert apart == probe.LOGISTIC[-1] and mixed is not None and mixed < 0.01


def test_too_few_subjects_for_a_choice_and_a_single_class() -> None:
    x, y = np.eye(4), np.array([0, 0, 0, 1])
    assert probe.logistic(x, y, list("abcd"), 4).strength == probe.LOGISTIC[len(probe.LOGISTIC) // 2]
    alone = probe.logistic(x, y, list("abcd"), 3)
    assert not alone.weight.any() and 1 / (1 + np.exp(-alone.bias[0])) == pytest.approx(1 / 5)


def test_voxels_stand_for_their_class() -> None:
    label = (np.random.default_rng(0).random((9, 8, 7)) * 3).astype(int)
    label[label == 2] = 0
    places, weights = probe.choose_voxels(label, 4, 50, np.random.default_rng(1))
    drawn = label.ravel()[places]
    assert len(set(places.tolist())) == len(places)
    assert [(drawn == k).sum() for k in range(4)] == [150, 50, 0, 0]
    for k in range(4):
        assert weights[drawn == k].sum() == pytest.approx((label == k).sum())


@pytest.mark.parametrize("kernel", [1, 3])
def test_gathered_features_are_what_a_convolution_sees(kernel: int) -> None:
    features, places = torch.randn(1, 4, 5, 6, 7), np.array([0, 17, 100, 209])
    conv = nn.Conv3d(4, 3, kernel, padding=kernel // 2)
    seen = probe.gather(features, places, kernel)
    expected = conv(features)[0].flatten(1)[:, places].T
    torch.testing.assert_close(seen @ conv.weight.flatten(1).T + conv.bias, expected)


@pytest.mark.parametrize("loss", ["dice", "dice_ce"])
def test_weighted_voxels_give_the_loss_of_the_voxels_they_stand_for(loss: str) -> None:
    logits, labels = torch.randn(2, 3, 5, 1, 1).double(), torch.randint(0, 3, (2, 1, 5, 1, 1))
    times = torch.tensor([1, 3, 2, 1, 4])
    weights = times.double().expand(2, 1, 5)[..., None, None]
    repeated = [x.repeat_interleave(times, dim=2) for x in (logits, labels)]
    expected = segmentation_loss(loss, *repeated)
    torch.testing.assert_close(segmentation_loss(loss, logits, labels, weights), expected)


@pytest.mark.parametrize("loss", ["dice", "dice_ce"])
def test_the_gradient_of_the_voxel_probe_is_that_of_its_loss(loss: str) -> None:
    """Against automatic differentiation of the loss itself; cases differ in voxels, and one lacks a class."""
    torch.manual_seed(0)
    classes, size, penalty = 4, 5, 0.1
    cases = [
        probe.Voxels(
            torch.randn(n, size).double(),
            np.random.default_rng(n).integers(0, most, n),
            np.linspace(0.5, 3, n),
        )
        for n, most in ((30, 4), (7, 3), (12, 4))
    ]
    theta = torch.randn(classes, size + 1, dtype=torch.float64, requires_grad=True)
    padded = [torch.zeros(3, *shape, dtype=torch.float64) for shape in ((classes, 30), (1, 30), (1, 30))]
    for b, case in enumerate(cases):
        parts = (theta[:, :size] @ case.features.T + theta[:, size:], case.labels, case.weights)
        for whole, part in zip(padded, parts, strict=True):
            whole[b, :, : len(case.labels)] = torch.as_tensor(part)  # what is filled has weight 0
    logits, labels, weights = (x[..., None, None] for x in padded)
    expected = (
        segmentation_loss(loss, logits, labels.long(), weights) + penalty / 2 * theta[:, :size].square().sum()
    )
    (slope,) = torch.autograd.grad(expected, theta)
    value, found = probe.VoxelObjective(cases, classes, loss, penalty)(theta.detach().numpy().ravel())
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    np.testing.assert_allclose(found, slope.numpy().ravel(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", ["dice", "dice_ce"])
def test_the_voxel_probe_is_a_minimum(loss: str) -> None:
    """No gradient is left, by differences of a loss that is computed anew; the start is not the end."""
    torch.manual_seed(0)
    y = [torch.randint(0, 3, (40,)).numpy() for _ in range(3)]
    x = [F.one_hot(torch.from_numpy(k), 3).double() + torch.randn(40, 3).double() for k in y]
    w = [np.full(40, 2.0), np.full(40, 1.0), np.full(40, 1.0)]
    found = probe.fit_voxels([probe.Voxels(*case) for case in zip(x, y, w, strict=True)], 3, loss, 1e-3)

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        total, entropy, count = 0.0, 0.0, 0.0
        for features, labels, weights in zip(x, y, w, strict=True):
            z = features.numpy() @ weight.T + bias
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            for k in range(3):
                both = (weights * p[:, k] * (labels == k)).sum()
                both_sizes = (weights * (labels == k)).sum() + (weights * p[:, k] ** 2).sum()
                total += 1 - (2 * both + 1) / (both_sizes + 1)
            entropy -= (weights * np.log(p[np.arange(40), labels])).sum()
            count += weights.sum()
        return total / 9 + (entropy / count if loss == "dice_ce" else 0) + 1e-3 / 2 * (weight**2).sum()

    at = objective(found.weight, found.bias)
    for i in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[i] = 1e-4
        slope = (
            objective(found.weight + step, found.bias) - objective(found.weight - step, found.bias)
        ) / 2e-4
        assert abs(slope) < 1e-5
    assert at < objective(np.zeros((3, 3)), np.zeros(3)) - 0.1


def test_features_that_are_not_finite_stop_with_their_name() -> None:
    cohort = sphere_cohort(8)
    cohort.images[0] = np.full_like(cohort.images[0], np.inf)
    with pytest.raises(TrainingError, match="seg linear: the frozen features are not finite"):
        evaluate(backbone(), Evaluation(SEG, cohort, split((4, 2, 2)), "linear", config(), 0, CPU))  # type: ignore[arg-type]


class Rounded(nn.Module):
    """A frozen backbone whose features differ by a relative 1e-6 from those of another ``luck``."""

    def __init__(self, luck: int) -> None:
        super().__init__()
        self.net, self.generator = backbone(), torch.Generator().manual_seed(luck)
        self.local_channels, self.global_channels = self.net.local_channels, self.net.global_channels

    def _rounded(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-6 * torch.randn(x.shape, generator=self.generator))

    def encode(self, x: Tensor) -> Features:
        return Features([self._rounded(f) for f in self.net.encode(x)], x.shape[2:])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x)[0], self._rounded(self.net(x)[1])

    def minimum_edge(self) -> int:
        return self.net.minimum_edge()


TASKS = {
    "segmentation": (SEG, sphere_cohort(8)),
    "two classes": (CLS, sphere_cohort(24, edge=12)),
    "classes": (Task("c", "C", "classification", "memory", "macro_auc", None), several_balls(36)),
    "number": (Task("n", "N", "regression", "memory", "mae", None), several_balls(36)),
}


@pytest.mark.parametrize("name", TASKS)
def test_rounding_moves_no_linear_score(name: str) -> None:
    """At most 0.3 points, 1 % of the error of a number, under a relative change of the features of 1e-6."""
    task, cohort = TASKS[name]
    scores = [_score(task, cohort, luck).score for luck in range(3)]
    most = 0.01 * scores[0] if name == "number" else 0.3
    assert max(scores) - min(scores) <= most


def _score(task: Task, cohort: MemoryCohort, luck: int) -> Outcome:
    ids = [case.id for case in cohort.cases]
    parts = Split("test", tuple(ids[: len(ids) // 2]), tuple(ids[len(ids) // 2 : -6]), tuple(ids[-6:]))
    parts = split(task.counts) if task is SEG else parts  # type: ignore[arg-type]
    return evaluate(Rounded(luck), Evaluation(task, cohort, parts, "linear", config(), 0, CPU))  # type: ignore[arg-type]
