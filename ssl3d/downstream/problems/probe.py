"""Linear evaluation, solved: what a frozen feature tells a linear map, whatever an optimizer makes of it.

A probe that is stopped after some steps compares how fast features let an optimizer be, and one that is chosen among
noisy validations carries luck that rounding decides. Here each linear map is the minimum of a loss with a penalty on
its weights, found in float64 to a stated tolerance, so that a change in the last digits of the features is one in the
last digits of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.errors import TrainingError
from ssl3d.losses.dice import SMOOTH, has_entropy

LOGISTIC = tuple(float(10.0**e) for e in np.arange(-4, 0.01, 0.5))
RIDGE = tuple(float(10.0**e) for e in np.arange(-4, 2.01, 0.5))
"""Penalties, strongest last, of which cross-validation takes one for logistic and one for ridge regression."""
FOLDS = 5
"""Of the cross-validation, fewer where a class has fewer subjects."""
TOLERANCE = 1e-6
"""A voxel probe is solved once no component of the gradient is larger."""
MAX_ITERATIONS = 5000
NOT_FINITE = "the frozen features are not finite. Look at the volumes, and at the pretrained weights."


@dataclass(frozen=True)
class LinearMap:
    """y = W x + b, and how it was found.

    Attributes:
        weight: W (K, F), float64.
        bias: b (K,), float64.
        strength: penalty by case that cross-validation took; None where it is the configuration's.
        iterations: of the minimisation; 0 where the solution is a formula.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float | None = None
    iterations: int = 0


Fit = Callable[[np.ndarray, np.ndarray, float], LinearMap]
"""From features (N, F), targets (N, ...) and a penalty by case to a map."""


def fit_logistic(x: np.ndarray, y: np.ndarray, strength: float) -> LinearMap:
    """Minimise mean cross-entropy + strength / 2 * |W|^2.

    Args:
        x: features (N, F).
        y: class of each case (N,), integers.
        strength: penalty by case.

    Returns:
        One row for two classes 0 and 1, the log odds of the second; else one row for each of 0, ..., max(y).
        A single class leaves W = 0 and the log odds of N + 1 cases against one.
    """
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(y)
    if len(classes) == 1:
        sign = 1.0 if classes[0] else -1.0
        return LinearMap(np.zeros((1, x.shape[1])), np.array([sign * np.log(len(y) + 1)]), strength)
    # scikit-learn sums over cases: C = 1 / (N strength).
    model = LogisticRegression(C=1 / (len(y) * strength), tol=1e-9, max_iter=MAX_ITERATIONS)
    model.fit(x, y)
    return LinearMap(model.coef_, model.intercept_, strength, int(np.max(model.n_iter_)))


def fit_ridge(x: np.ndarray, y: np.ndarray, strength: float) -> LinearMap:
    """Minimise half the mean squared error + strength / 2 * |w|^2, by singular values.

    Args:
        x: features (N, F).
        y: numbers (N,).
        strength: penalty by case.
    """
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=len(y) * strength, solver="svd").fit(x, y)
    return LinearMap(np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_), strength)


def cross_validated(
    x: np.ndarray, y: np.ndarray, subjects: Sequence[str], fit: Fit, loss: Callable[[np.ndarray, np.ndarray], float],
    strengths: Sequence[float],
) -> float:  # fmt: skip
    """Return the penalty of ``strengths`` with the lowest mean loss on subjects that were left out.

    Args:
        x: features (N, F).
        y: targets (N,), integers for classes.
        subjects: whose case each is; no subject is in two folds.
        fit: the map of a part of the cases.
        loss: from outputs (N, K) and targets (N,) to the sum of a smooth loss.
        strengths: to choose from.

    Returns:
        The middle one where too few subjects leave nothing to compare.
    """
    folds = [(a, b) for a, b in _folds(y, subjects) if y.dtype.kind == "f" or set(y[b]) <= set(y[a])]
    if not folds:
        return strengths[len(strengths) // 2]
    losses = []
    for strength in strengths:
        total = 0.0
        for known, left in folds:
            found = fit(x[known], y[known], strength)
            total += loss(x[left] @ found.weight.T + found.bias, y[left])
        losses.append(total)
    return strengths[int(np.argmin(losses))]


def logistic(x: np.ndarray, y: np.ndarray, subjects: Sequence[str], train: int) -> LinearMap:
    """Return the logistic regression of the first ``train`` cases, its penalty cross-validated over all.

    Args:
        x: features (N, F).
        y: classes (N,).
        subjects: whose case each is.
        train: the others only help to choose the penalty.
    """
    strength = cross_validated(x, y, subjects, fit_logistic, log_loss, LOGISTIC)
    return fit_logistic(x[:train], y[:train], strength)


def ridge(x: np.ndarray, y: np.ndarray, subjects: Sequence[str], train: int) -> LinearMap:
    """Return the ridge regression of numbers ``y`` (N,); else as :func:`logistic`."""
    strength = cross_validated(x, y, subjects, fit_ridge, squared_error, RIDGE)
    return fit_ridge(x[:train], y[:train], strength)


def _folds(y: np.ndarray, subjects: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the cases (known, left out) of each fold; none where one subject alone has a class."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    groups = np.unique(np.asarray(subjects), return_inverse=True)[1]
    if y.dtype.kind == "f":
        number = min(FOLDS, len(np.unique(groups)))
        return list(GroupKFold(number).split(y, y, groups)) if number > 1 else []
    number = min(FOLDS, *(len(np.unique(groups[y == k])) for k in np.unique(y)))
    if number < 2:
        return []
    folds = StratifiedGroupKFold(number, shuffle=True, random_state=0)
    return list(folds.split(y, y, groups))


def log_loss(outputs: np.ndarray, y: np.ndarray) -> float:
    """Return the sum of cross-entropies of outputs (N, K), or (N, 1) for log odds, and classes (N,)."""
    z = np.hstack([np.zeros_like(outputs), outputs]) if outputs.shape[1] == 1 else outputs
    return float((np.logaddexp.reduce(z, axis=1) - z[np.arange(len(y)), y]).sum())


def squared_error(outputs: np.ndarray, y: np.ndarray) -> float:
    """Return the sum of squared errors of outputs (N, 1) and numbers (N,)."""
    return float(((outputs[:, 0] - y) ** 2).sum())


@dataclass(frozen=True)
class Voxels:
    """Voxels of one case, each standing for as many as its weight says.

    Attributes:
        features: (n, F).
        labels: (n,) integers.
        weights: (n,), not negative.
    """

    features: Tensor
    labels: np.ndarray
    weights: np.ndarray


def choose_voxels(
    label: np.ndarray, classes: int, most: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw voxels of a case: up to ``most`` of each structure, of the background as many as of all structures may be.

    Args:
        label: (D, H, W), 0 for background.
        classes: structures and background.
        most: voxels of a structure.
        rng: decides which.

    Returns:
        (places in the flattened volume, weights): a class's weights add up to its voxels in the volume.
    """
    flat, places, weights = label.ravel(), [], []
    for k in range(classes):
        where = np.flatnonzero(flat == k)
        number = min(len(where), most if k else most * (classes - 1))
        chosen = np.sort(rng.permutation(len(where))[:number])
        places.append(where[chosen])
        weights.append(np.full(number, len(where) / max(1, number)))
    return np.concatenate(places), np.concatenate(weights)


def gather(features: Tensor, places: np.ndarray, kernel: int) -> Tensor:
    """Return what a convolution sees at ``places``: (n, C * kernel^3), in the order of its weights.

    Args:
        features: (1, C, D, H, W).
        places: in the flattened volume (n,).
        kernel: edge of the convolution, odd; beyond the border it sees zeros.
    """
    d, h, w = features.shape[2:]
    pad = kernel // 2
    padded = F.pad(features[0], [pad] * 6)  # (C, D + 2 pad, ...)
    at = [torch.from_numpy(i) for i in np.unravel_index(places, (d, h, w))]
    offsets = range(kernel)
    seen = [padded[:, at[0] + i, at[1] + j, at[2] + k] for i in offsets for j in offsets for k in offsets]
    return torch.stack(seen, dim=1).flatten(0, 1).T.contiguous()  # (n, C * kernel^3)


def fit_voxels(cases: Sequence[Voxels], classes: int, loss: str, penalty: float) -> LinearMap:
    """Minimise ``loss`` over whole cases, as their voxels stand for them, + penalty / 2 * |W|^2, by L-BFGS from W = 0.

    Args:
        cases: the training cases, their features scaled alike.
        classes: K + 1.
        loss: see :func:`~ssl3d.losses.segmentation_loss`.
        penalty: on the weights, not on the biases.

    Raises:
        TrainingError: a feature is not finite, or the minimum is not reached.
    """
    from scipy.optimize import minimize

    size = cases[0].features.shape[1]
    if not all(bool(case.features.isfinite().all()) for case in cases):
        raise TrainingError(NOT_FINITE)
    objective = VoxelObjective(cases, classes, loss, penalty)
    options = {
        "maxiter": MAX_ITERATIONS,
        "maxfun": 2 * MAX_ITERATIONS,
        "gtol": TOLERANCE,
        "ftol": 0.0,
        "maxcor": 30,
    }
    start = np.zeros(classes * (size + 1))
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    if not result.success and np.abs(result.jac).max() > 100 * TOLERANCE:
        raise TrainingError(
            f"the linear probe is not solved after {result.nit} iterations (gradient {np.abs(result.jac).max():.1e}). "
            "Raise its penalty, downstream.linear.penalty or downstream.multiscale.penalty."
        )
    theta = result.x.reshape(classes, size + 1)
    return LinearMap(theta[:, :size], theta[:, size], iterations=int(result.nit))


class VoxelObjective:
    """:func:`~ssl3d.losses.segmentation_loss` of linear maps over whole cases, + penalty / 2 * |W|^2, with its gradient.

    The gradient is written out, and cases pass one by one, so that what lies between the two matrix products of a case
    stays in the cache: automatic differentiation took two and a half times as long for 20 cases of 28 classes.
    """

    def __init__(self, cases: Sequence[Voxels], classes: int, loss: str, penalty: float) -> None:
        self.classes, self.penalty = classes, penalty
        total = sum(float(case.weights.sum()) for case in cases)
        self.entropy = 1 / total if has_entropy(loss) else 0.0  # of each voxel's cross-entropy in the loss
        self.dice = 1 / (len(cases) * classes)  # of each case's and class's soft Dice
        self.cases = [
            (
                torch.cat(
                    [case.features.double(), torch.ones(len(case.labels), 1)], 1
                ).T.contiguous(),  # (F + 1, n)
                torch.from_numpy(case.labels.astype(np.int64)),
                torch.from_numpy(case.weights).double(),
            )
            for case in cases
        ]

    def __call__(self, parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient at ``parameters``: W and b side by side, (K + 1) * (F + 1) numbers."""
        theta = torch.from_numpy(parameters).view(self.classes, -1)  # (K + 1, F + 1)
        slope = self.penalty * theta
        slope[:, -1] = 0
        value = self.penalty / 2 * float(theta[:, :-1].square().sum())
        for features, labels, weights in self.cases:
            loss, by_logits = self._of_case(theta @ features, labels, weights)  # (), (K + 1, n)
            value += loss
            slope.addmm_(by_logits, features.T)
        return value, slope.numpy().ravel()

    def _of_case(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, Tensor]:
        """Return what a case adds to the loss, and the derivatives of that by its logits (K + 1, n)."""
        log_p = logits.log_softmax(0)
        p, at = log_p.exp(), (labels, torch.arange(len(labels)))
        both = weights.new_zeros(self.classes).index_add_(0, labels, weights * p[at])  # (K + 1,)
        true = weights.new_zeros(self.classes).index_add_(0, labels, weights)
        sizes = true + p.square() @ weights + SMOOTH
        overlap = (2 * both + SMOOTH) / sizes
        loss = self.dice * float((1 - overlap).sum()) - self.entropy * float(weights @ log_p[at])
        # By p: the class of the voxel wants more of it, every class less of its square. Then through the softmax.
        by_p = (2 * self.dice * overlap / sizes)[:, None] * p
        by_p[at] -= (2 * self.dice / sizes)[labels]
        by_logits = p * (by_p + (self.entropy - (p * by_p).sum(0)))
        by_logits[at] -= self.entropy
        return loss, by_logits * weights
