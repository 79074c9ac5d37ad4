"""The one downstream harness: scratch, linear, fine-tune and nearest neighbours are the same function.

A method reaches this file as a backbone and leaves it as a record. Head, budget, splits and
validation are identical for every method; test cases are seen once. Linear maps are solved
(:mod:`ssl3d.downstream.probe`), fine-tuning is trained.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.config import DownstreamConfig, FinetuneConfig
from ssl3d.downstream import probe
from ssl3d.downstream.features import FeatureStore
from ssl3d.downstream.metrics import auc, dice_per_structure, segmentation_metrics
from ssl3d.downstream.neighbours import NearestNeighbours
from ssl3d.downstream.tasks import Task
from ssl3d.environment import PeakMemory, autocast_dtype, to_device
from ssl3d.errors import ConfigError, TrainingError
from ssl3d.losses import segmentation_loss
from ssl3d.models.factory import Backbone, seeded
from ssl3d.models.heads import PooledLinear, PooledNorm, pool
from ssl3d.optim import make_optimizer
from ssl3d.progress import Track
from ssl3d.rng import BatchRng, derive_seed, numpy_rng
from ssl3d.transforms.supervised import Augmentation

if TYPE_CHECKING:
    from ssl3d.data.prepare import PreparedCohort
    from ssl3d.data.splits import Split

Mode = Literal["linear", "finetune", "knn"]
OnPrediction = Callable[[int, Tensor, Tensor], None]
"""Takes a case's index, its predicted and its true labels (D, H, W)."""
MODES: tuple[Mode, ...] = ("linear", "finetune", "knn")
CONSTANT_PROBABILITY = 0.01
"""Below this standard deviation over the test cases, in every class, a classifier's outputs do not differ."""
CONSTANT_VALUE = 0.01
"""Below this share of the standard deviation of the true values, a regression's outputs do not differ."""
REFERENCES = 32
"""Training cases at most whose features set a readout's centre and scale."""


@dataclass(frozen=True)
class Outcome:
    """What one evaluation yields; the fields go into the record as they are.

    ``constant_output``: a classifier or a regression answers all test cases alike (:data:`CONSTANT_PROBABILITY`,
    :data:`CONSTANT_VALUE`); its score ranks rounding errors.
    """

    score: float
    per_case: list[dict[str, Any]]
    excluded: dict[str, int]
    validation: list[dict[str, float]]
    best_step: int
    seconds: float
    peak_memory_mib: float | None
    parameters_trained: int
    constant_output: bool = False


class Standardize(nn.Module):
    """Fixed centring and scaling of each channel: (x - mean) / std. An affine map.

    A deviation below ``FLOOR`` of the mean is rounding, or nearly: it is not blown up.
    """

    FLOOR = 1e-4
    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)  # (C,)
        self.register_buffer("scale", torch.maximum(std, self.FLOOR * mean.abs()).clamp_min(1e-6))  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.scale.view(shape)


class Whiten(nn.Module):
    """Fixed centring and decorrelation of the channels: (x - mean) C^(-1/2), C the covariance. An affine map.

    The root is the symmetric one, so that each channel stays as near to itself as it can be. ``RIDGE`` of the
    largest eigenvalue is added to all: channels that say nothing are not blown up.
    """

    RIDGE = 1e-5
    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(covariance.double())  # (C,) ascending, (C, C)
        scale = (values.clamp_min(0) + self.RIDGE * values[-1].clamp_min(1e-12)).rsqrt()
        self.register_buffer("mean", mean)  # (C,)
        self.register_buffer("matrix", (vectors * scale @ vectors.T).float())  # (C, C)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.einsum("kc,bc...->bk...", self.matrix, x - self.mean.view(shape))


class LogOdds(nn.Module):
    """Logarithms of two classes' shares (B, 2) -> log odds of the second (B, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 1] - x[:, 0])[:, None]


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated and how; nothing of it depends on the backbone.

    Attributes:
        task: what to predict.
        cohort: the task's prepared cases.
        split: case ids of the three parts.
        mode: ``linear``: the whole backbone frozen; ``finetune``: every parameter trained; ``knn``: the
            backbone frozen and each test sample labelled by its neighbours in feature space.
        config: budget and protocol, the same for every method.
        seed: decides the head's initial weights, the order of the training crops, and which voxels stand for a case.
        device: where to compute.
    """

    task: Task
    cohort: PreparedCohort
    split: Split
    mode: Mode
    config: DownstreamConfig
    seed: int
    device: torch.device


def evaluate(
    backbone: Backbone,
    evaluation: Evaluation,
    label: str = "",
    keep: Callable[[nn.Module], None] | None = None,
    on_prediction: OnPrediction | None = None,
) -> Outcome:
    """Solve for a head (linear), train everything (finetune) or nothing (knn) on ``split.train``, choose on
    ``split.val``, test once on ``split.test``.

    Args:
        backbone: pretrained or random weights; changed by fine-tuning.
        evaluation: what is evaluated and how.
        label: what the progress line calls this evaluation.
        keep: called with the head once training is over, before the test; ``backbone`` then holds the
            weights that belong to it.
        on_prediction: called with each segmented test case.

    Raises:
        TrainingError: the loss or a frozen feature is not finite.
    """
    began, memory = time.monotonic(), PeakMemory(evaluation.device)
    task, cohort, mode, seed = evaluation.task, evaluation.cohort, evaluation.mode, evaluation.seed
    to_device(backbone, evaluation.device)
    problem = make_problem(backbone, task, cohort, mode, evaluation.config, evaluation.device)
    problem.on_prediction = on_prediction
    parts = (evaluation.split.train, evaluation.split.val, evaluation.split.test)
    train, val, test = ([cohort.index(case) for case in part] for part in parts)
    backbone.requires_grad_(mode == "finetune")
    backbone.eval()
    label = label or f"{task.name} {mode}"
    if mode == "linear":
        fitted = _solved(problem, train, val, seed, label)
    elif mode == "finetune":
        fitted = _tuned(problem, train, val, seed, label)
    else:
        fitted = _Fitted(problem.make_neighbours(train, seed), [], 0)
    to_device(fitted.head, evaluation.device)
    model = nn.ModuleDict({"head": fitted.head, "backbone": backbone})
    model.eval()
    if keep is not None:
        keep(fitted.head)
    tested, per_case, excluded = problem.test(fitted.head, test)
    return Outcome(
        score=round(problem.scale * tested, 6),
        per_case=per_case,
        excluded=excluded,
        validation=fitted.validation,
        best_step=fitted.step,
        seconds=round(time.monotonic() - began, 3),
        peak_memory_mib=memory.mib(),
        parameters_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        constant_output=problem.constant_output(per_case),
    )


@dataclass(frozen=True)
class _Fitted:
    """A head, its validation curve, and the step whose weights it has."""

    head: nn.Module
    validation: list[dict[str, float]]
    step: int


def _solved(problem: Problem, train: list[int], val: list[int], seed: int, label: str) -> _Fitted:
    """Return the solved head, validated once, after as many steps as the solution took."""
    try:
        head, found = problem.solve(train, val, seed)
    except TrainingError as error:
        raise TrainingError(f"{label}: {error}") from None
    to_device(head, problem.device)
    head.eval()
    score = round(problem.scale * problem.validate(head, val)[0], 4)
    point: dict[str, float] = {"step": found.iterations, "score": score}
    strength = {} if found.strength is None else {"strength": found.strength}
    return _Fitted(head, [point | strength], found.iterations)


def _tuned(problem: Problem, train: list[int], val: list[int], seed: int, label: str) -> _Fitted:
    """Return the head after it and the backbone were trained; both have the weights to test."""
    with seeded(seed, "head", problem.task.name, problem.mode):
        head = problem.make_head(train)
    to_device(head, problem.device)
    model = nn.ModuleDict({"head": head, "backbone": problem.backbone})
    curve, step = _train(problem, model, (train, val), problem.config.finetune, seed, label)
    return _Fitted(head, curve, step)


def _train(
    problem: Problem, model: nn.ModuleDict, parts: tuple[list[int], list[int]], budget: FinetuneConfig, seed: int,
    label: str,
) -> tuple[list[dict[str, float]], int]:  # fmt: skip
    """Train ``model`` on ``parts[0]``, validate on ``parts[1]``; leave it with the weights to test.

    Returns:
        The validation curve and the step of those weights.
    """
    head, (train, val) = model["head"], parts
    optimizer, scheduler = make_optimizer(model, budget)
    trained = [p for p in model.parameters() if p.requires_grad]
    best: tuple[tuple[float, float], int, dict[str, Tensor]] | None = None
    curve: list[dict[str, float]] = []
    problem.settle(head, train)
    model.train()
    with Track(label, budget.steps) as track:
        for step in range(budget.steps):
            scheduler.step_update(step)
            optimizer.zero_grad(set_to_none=True)
            loss = problem.loss(head, _draw(train, budget.batch_size, seed, step), step, seed)
            if not math.isfinite(float(loss.detach())):
                raise TrainingError(
                    f"{label}: loss = {float(loss.detach())} at step {step}. Lower downstream.finetune.lr, or set "
                    "downstream.finetune.clip_grad=1."
                )
            loss.backward()
            if budget.clip_grad is not None:
                nn.utils.clip_grad_norm_(trained, budget.clip_grad)
            optimizer.step()
            done = step + 1
            if done % budget.validate_every == 0 or done == budget.steps:
                running = {key: value.clone() for key, value in head.state_dict().items()}
                model.eval()
                problem.settle(head, train)
                score = problem.validate(head, val)
                curve.append({"step": done, "score": round(problem.scale * score[0], 4)})
                if best is None or score > best[0] or budget.weights == "last":
                    best = (score, done, copy.deepcopy(model.state_dict()))
                head.load_state_dict(running)  # how often is validated changes nothing in training
                model.train()
            track.update(
                done,
                {"loss": float(loss.detach())},
                note=f"validation {problem.scale * best[0][0]:.1f}" if best else "",
            )

    assert best is not None
    model.load_state_dict(best[2])
    return curve, best[1]


def _draw(cases: list[int], batch_size: int, seed: int, step: int) -> list[int]:
    """Return the cases of ``step``: seeded permutations of the training cases, end to end."""
    chosen = []
    for number in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(number, len(cases))
        chosen.append(cases[int(numpy_rng(seed, "downstream order", epoch).permutation(len(cases))[place])])
    return chosen


def problem_class(task: Task) -> type[Problem]:
    """Return what knows head, loss and metric of a task's kind."""
    if task.kind == "segmentation":
        return Segmentation
    if task.kind == "classification" and task.metric == "auc":
        return Classification
    from ssl3d.downstream.volume_tasks import MultiClass, MultiLabel, Regression

    return {"classification": MultiClass, "multilabel": MultiLabel, "regression": Regression}[task.kind]


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


class Segmentation(Problem):
    """A softmax over structures at every voxel, from the local feature f^l."""

    @property
    def classes(self) -> int:
        return self.cohort.num_classes

    @property
    def feature_channels(self) -> int:
        return self.backbone.local_channels

    def layer(self) -> nn.Module:
        kernel = self.config.head_kernel
        return nn.Conv3d(self.backbone.local_channels, self.classes, kernel, padding=kernel // 2)

    def _empty_scale(self) -> nn.Module:
        return Whiten(torch.zeros(self.feature_channels), torch.eye(self.feature_channels))

    def solve(self, train: list[int], val: list[int], seed: int) -> tuple[nn.Module, probe.LinearMap]:
        assert self.frozen is not None
        cfg, scale = self.config.linear, self._whiten(train)
        features, labels, weights = [], [], []
        for case in train:
            label = np.array(self.cohort.label(case))
            rng = numpy_rng(seed, "probe", self.cohort.cases[case].id)
            places, standing_for = probe.choose_voxels(label, self.classes, cfg.voxels, rng)
            features.append(probe.gather(scale(self.frozen[case]), places, self.config.head_kernel))
            labels.append(label.ravel()[places])
            weights.append(standing_for)
        voxels = probe.collate(features, labels, weights)
        found = probe.fit_voxels(voxels, self.classes, cfg.loss, cfg.penalty)
        return self._fixed_map(found, scale), found

    def make_neighbours(self, train: list[int], seed: int) -> nn.Module:
        cfg, frozen = self.config.knn, self.frozen
        assert frozen is not None
        bank, classes = [], []
        for case in train:
            features = frozen[case][0].flatten(1).T  # (voxels, C)
            labels = np.array(self.cohort.label(case)).ravel()  # (voxels,)
            for k in range(self.classes):
                where = np.flatnonzero(labels == k)
                chosen = numpy_rng(seed, "neighbours", case, k).permutation(len(where))[: cfg.voxels]
                bank.append(features[torch.from_numpy(where[np.sort(chosen)])])
                classes.append(torch.full((len(chosen),), k))
        return self._neighbours(torch.cat(bank), torch.cat(classes), self.classes, train)

    @torch.no_grad()
    def features(self, case: int) -> Tensor:
        return self._windows(self.volume(case), lambda x: self.backbone(x)[1].float())  # (1, C, D, H, W)

    def _windows(self, x: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Run ``network`` over overlapping windows of a whole volume and blend (MONAI)."""
        from monai.inferers import sliding_window_inference

        with self.autocast():
            result = sliding_window_inference(
                x, self.config.crop, 1, network, overlap=self.config.overlap, mode="gaussian"
            )
        assert isinstance(result, Tensor)
        return result.float()

    def logits(self, head: nn.Module, case: int) -> Tensor:
        """Return logits (1, K + 1, D, H, W) of a whole case."""
        if self.frozen is not None:
            return head(self.frozen[case].to(self.device))
        return self._windows(self.volume(case), lambda x: head(self.backbone(x)[1]).float())

    def loss(self, head: nn.Module, cases: list[int], step: int, seed: int) -> Tensor:
        inputs, labels = [], []
        for place, case in enumerate(cases):
            size = self.cohort.cases[case].shape
            position = numpy_rng(seed, "downstream crop", step, place).random(3)
            starts = [
                int(p * (max(s, e) - e + 1)) for p, s, e in zip(position, size, self.config.crop, strict=True)
            ]
            d, h, w = (slice(a, a + e) for a, e in zip(starts, self.config.crop, strict=True))
            pads = [
                n for s, e in zip(size[::-1], self.config.crop[::-1], strict=True) for n in (0, max(0, e - s))
            ]
            x = torch.from_numpy(np.array(self.cohort.image(case, (d, h, w))))[None, None]  # (1, 1, d, h, w)
            y = torch.from_numpy(np.array(self.cohort.label(case, (d, h, w))))[None, None]
            inputs.append(F.pad(x, pads))  # (1, 1, *crop)
            labels.append(F.pad(y, pads))  # (1, 1, *crop)
        x = torch.cat(inputs).to(self.device)
        y = torch.cat(labels).long().to(self.device)
        cfg = self.config.finetune
        if cfg.augment:
            augmentation = self.augmentation(x, step, seed)
            x, y = augmentation.image(x), augmentation.labels(y)
        with self.autocast():
            logits = head(self.backbone(x)[1])  # (B, K + 1, *crop)
        return segmentation_loss(cfg.loss, logits, y)

    @torch.no_grad()
    def predict(self, head: nn.Module, case: int) -> Tensor:
        return self.logits(head, case)[0].cpu()

    def compare(self, head: nn.Module, case: int) -> tuple[Tensor, Tensor]:
        """Return (prediction, truth) of one case, labels (D, H, W)."""
        prediction = self.predict(head, case).argmax(dim=0)
        return prediction, torch.from_numpy(np.array(self.cohort.label(case)))

    def validate(self, head: nn.Module, cases: list[int]) -> tuple[float, float]:
        scores = [dice_per_structure(*self.compare(head, case), self.classes).nanmean() for case in cases]
        return float(torch.stack(scores).nanmean().nan_to_num()), 0.0

    def test(self, head: nn.Module, cases: list[int]) -> tuple[float, list[dict[str, Any]], dict[str, int]]:
        per_case = []
        for case in cases:
            names = list(self.cohort.label_names)
            spacing = self.cohort.cases[case].spacing_mm
            prediction, truth = self.compare(head, case)
            if self.on_prediction:
                self.on_prediction(case, prediction, truth)
            metrics = segmentation_metrics(
                prediction, truth, names, spacing, self.config.surface_tolerance_mm
            )
            per_case.append({"case": self.cohort.cases[case].id, **metrics})
        scores = [c["dsc"] for c in per_case if c["dsc"] is not None]
        empty = sum(s["dsc"] is None for c in per_case for s in c["structures"].values())
        return float(np.mean(scores)), per_case, {"structures_empty_in_both": empty}


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

    @torch.no_grad()
    def settle(self, head: nn.Module, train: list[int]) -> None:
        """Measure centre and scale of the pooled features on training cases, as they are without augmentation."""
        few = train[:: -(-len(train) // REFERENCES)]
        norms = [module for module in head.modules() if isinstance(module, PooledNorm)]
        features = torch.cat([self._pooled(self.volume(case)) for case in few])  # (N, C)
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


def check_modes(task: Task, modes: list[Mode]) -> None:
    """Raise ConfigError for a mode that the kind of ``task`` does not have."""
    possible = problem_class(task).modes
    for mode in modes:
        if mode not in possible:
            raise ConfigError(
                f"The task {task.name} ({task.kind}) has no mode {mode}; it has {' and '.join(possible)}. "
                "Fix: give these with --modes, or leave the task out."
            )


def make_problem(
    backbone: Backbone,
    task: Task,
    cohort: PreparedCohort,
    mode: Mode,
    config: DownstreamConfig,
    device: torch.device,
) -> Problem:
    """Return what evaluates ``task``; ``backbone`` is on ``device``."""
    return problem_class(task)(backbone, task, cohort, mode, config, device)


def check_mode(mode: str) -> Mode:
    """Return ``mode`` if the harness has it.

    Raises:
        ConfigError: it has not.
    """
    from ssl3d.errors import nearest

    for known in MODES:
        if mode == known:
            return known
    raise ConfigError(f'Unknown mode "{mode}".{nearest(mode, MODES)}')
