"""How good are local features without any training? Measures on voxels of labelled cases.

Every measure takes features f^l of sampled voxels, which are the same voxels for every method (see
:func:`sample_voxels`), and compares standardised features: channels of one method may differ in scale
by orders of magnitude, and no head is there to undo it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.device import to_device
from ssl3d.downstream.metrics import dice_per_structure
from ssl3d.downstream.problems.frozen import FeatureStore
from ssl3d.downstream.problems.neighbours import NearestNeighbours
from ssl3d.errors import ConfigError, DataError
from ssl3d.rng import numpy_rng

if TYPE_CHECKING:
    from ssl3d.config import DownstreamConfig, NeighboursConfig
    from ssl3d.data.prepared.cohort import PreparedCohort
    from ssl3d.downstream.tasks import Task
    from ssl3d.models.backbone import Backbone

_CHUNK = 4096
"""Queries compared with all candidates at once: bounds the memory of the similarity matrix."""


@dataclass(frozen=True)
class Correspondence:
    """How often the most similar voxel of another subject lies in the same structure.

    Attributes:
        accuracy: over the foreground queries, in [0, 1].
        chance: the same for a candidate drawn at random.
        balanced: mean over structures of the accuracy within each, in [0, 1].
        balanced_chance: the same for a candidate drawn at random.
        structures: accuracy by label.
        queries: foreground voxels that have their structure among the candidates.
    """

    accuracy: float
    chance: float
    balanced: float
    balanced_chance: float
    structures: dict[int, float]
    queries: int


def centre_and_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return what standardises each channel: (x - centre) * scale has mean 0 and standard deviation 1.

    A channel that is constant up to rounding carries nothing, and is scaled by 0.

    Args:
        features: (N, C) float32 or float64.

    Returns:
        (C,) each.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    rounding = 10 * torch.finfo(features.dtype).eps * features.abs().amax(dim=0)
    return mean, torch.where(std > rounding, 1 / std.clamp_min(torch.finfo(std.dtype).tiny), 0)


def standardized(*features: Tensor) -> tuple[Tensor, ...]:
    """Standardise each channel over all of ``features`` (N_i, C): as many tensors of the same shapes."""
    parts = [f if f.dtype == torch.float64 else f.float() for f in features]
    centre, scale = centre_and_scale(torch.cat(parts))
    return tuple((part - centre) * scale for part in parts)


def nearest(queries: Tensor, candidates: Tensor) -> Tensor:
    """Return the index (N,) of the candidate (M, C) most similar (cosine) to each query (N, C)."""
    a, b = F.normalize(queries, dim=1), F.normalize(candidates, dim=1)
    return torch.cat([(chunk @ b.T).argmax(dim=1) for chunk in a.split(_CHUNK)])


@torch.no_grad()
def correspondence_accuracy(
    features_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    labels_b: Tensor,
    weights_a: Tensor | None = None,
) -> Correspondence:
    """Return how often the nearest feature in subject B lies in the structure of the voxel of subject A.

    Queries are the foreground voxels of A whose structure B has at all; candidates are all given voxels
    of B, background included. Features are standardised over both subjects and compared by cosine
    similarity, as in :class:`ssl3d.downstream.problems.neighbours.NearestNeighbours`.

    Args:
        features_a: (N, C).
        labels_a: (N,) in {0, ..., K}, 0 is background.
        features_b: (M, C).
        labels_b: (M,).
        weights_a: how many voxels each query stands for (N,); None: one. Changes ``accuracy`` and
            ``chance`` only.

    Raises:
        ValueError: the shapes do not belong together.
        DataError: the two have no structure in common.

    >>> eye, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    >>> found = correspondence_accuracy(eye, labels, eye, labels)
    >>> found.accuracy, found.chance
    (1.0, 0.25)
    """
    for features, labels in ((features_a, labels_a), (features_b, labels_b)):
        if features.dim() != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features {tuple(features.shape)} and labels {tuple(labels.shape)}: give (N, C) and (N,)"
            )
    labels_a, labels_b = labels_a.long().cpu(), labels_b.long().cpu()
    asked = torch.nonzero((labels_a > 0) & torch.isin(labels_a, labels_b))[:, 0]  # (Q,)
    if not len(asked):
        raise DataError("The two subjects have no structure in common, so no voxel has a counterpart.")
    a, b = standardized(features_a, features_b)
    found = labels_b[nearest(a[asked.to(a.device)], b).cpu()]  # (Q,)
    truth = labels_a[asked]
    right = (found == truth).double()
    weights = torch.ones(len(asked)) if weights_a is None else weights_a.cpu()[asked]
    weights = weights.double()

    structures = truth.unique()
    share_b = torch.stack([(labels_b == k).double().mean() for k in structures])  # (K',)
    weight_a = torch.stack([weights[truth == k].sum() for k in structures])  # (K',)
    within = torch.stack([right[truth == k].mean() for k in structures])  # (K',)
    return Correspondence(
        accuracy=float((weights * right).sum() / weights.sum()),
        chance=float((weight_a * share_b).sum() / weight_a.sum()),
        balanced=float(within.mean()),
        balanced_chance=float(share_b.mean()),
        structures=dict(zip(structures.tolist(), within.tolist(), strict=True)),
        queries=len(asked),
    )


# --- The same voxels and pairs for every method -----------------------------------------------------


@dataclass(frozen=True)
class Voxels:
    """Voxels drawn from one case, at most so many of each structure.

    Attributes:
        positions: into the flattened volume (N,) int64, by label, in random order within a label.
        labels: (N,) int64, 0 is background.
        weights: how many voxels of the volume each stands for (N,) float64.
    """

    positions: Tensor
    labels: Tensor
    weights: Tensor


def sample_voxels(label: np.ndarray, cap: int, seed: int, *keys: int | str) -> Voxels:
    """Draw ``cap`` voxels of each label without replacement, or all where there are fewer.

    Args:
        label: (D, H, W) of integers, 0 is background.
        cap: voxels of each label.
        seed, keys: decide the draw, and nothing else does.
    """
    flat = np.asarray(label).ravel()  # (DHW,)
    positions, labels, weights = [], [], []
    for value in np.unique(flat):
        where = np.flatnonzero(flat == value)
        chosen = numpy_rng(seed, "representation voxels", *keys, int(value)).permutation(len(where))[:cap]
        positions.append(where[chosen])
        labels.append(np.full(len(chosen), value, np.int64))
        weights.append(np.full(len(chosen), len(where) / len(chosen)))
    return Voxels(*(torch.from_numpy(np.concatenate(part)) for part in (positions, labels, weights)))


def draw_pairs(subjects: Sequence[str], count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return ``count`` ordered pairs of places in ``subjects`` with different subjects, or all there are.

    Raises:
        DataError: all cases are of one subject.
    """
    places = range(len(subjects))
    pairs = [(i, j) for i in places for j in places if subjects[i] != subjects[j]]
    if not pairs:
        raise DataError(f"{len(subjects)} cases of one subject: correspondence needs two subjects at least.")
    chosen = numpy_rng(seed, "matching pairs").permutation(len(pairs))[:count]
    return [pairs[k] for k in chosen]


@dataclass(frozen=True)
class Plan:
    """What every method is measured on.

    Attributes:
        cases: places in the cohort.
        pairs: ordered pairs of ``cases`` of different subjects: (query or moving, reference or fixed).
        voxels: the sampled voxels of each case.
    """

    cases: list[int]
    pairs: list[tuple[int, int]]
    voxels: dict[int, Voxels]


def make_plan(
    cohort: PreparedCohort, cases: Sequence[int], pairs: int = 12, cap: int = 200, seed: int = 0
) -> Plan:
    """Draw pairs and voxels of ``cases``, which are segmented.

    Args:
        cohort: of the task.
        cases: places in it, for example of the test cases.
        pairs: how many.
        cap: voxels of each structure of each case.
        seed: of the draws; not that of any method.
    """
    drawn = draw_pairs([cohort.cases[case].subject for case in cases], pairs, seed)
    voxels = {c: sample_voxels(cohort.label(c), cap, seed, cohort.cases[c].id) for c in cases}
    return Plan(list(cases), [(cases[i], cases[j]) for i, j in drawn], voxels)


# --- Measures ---------------------------------------------------------------------------------------


def local_features(
    backbone: Backbone, task: Task, cohort: PreparedCohort, config: DownstreamConfig, device: torch.device
) -> FeatureStore:
    """Return the frozen f^l (1, C, D, H, W) of each case, as the linear evaluation sees them.

    Raises:
        ConfigError: the task is no segmentation.
    """
    from ssl3d.downstream.problems.segmentation import Segmentation

    if task.kind != "segmentation":
        raise ConfigError(
            f"The task {task.name} ({task.kind}) has no label at each voxel; choose a segmentation."
        )
    to_device(backbone, device)
    backbone.eval().requires_grad_(False)
    store = Segmentation(backbone, task, cohort, "linear", config, device).frozen
    assert store is not None
    return store


def sampled(features: FeatureStore, plan: Plan) -> dict[int, Tensor]:
    """Return the features (N, C) of the sampled voxels of each case."""
    return {case: features[case][0].flatten(1).T[plan.voxels[case].positions] for case in plan.cases}


def correspondences(samples: Mapping[int, Tensor], plan: Plan) -> list[Correspondence]:
    """Return :func:`correspondence_accuracy` of every pair."""
    return [
        correspondence_accuracy(
            samples[a], plan.voxels[a].labels, samples[b], plan.voxels[b].labels, plan.voxels[a].weights
        )
        for a, b in plan.pairs
    ]


@torch.no_grad()
def label_transfer(
    features: FeatureStore,
    samples: Mapping[int, Tensor],
    plan: Plan,
    cohort: PreparedCohort,
    config: NeighboursConfig,
) -> list[float]:
    """Return the Dice of every pair when one labelled subject labels the other through features alone.

    The sampled voxels of the second case of a pair, whose labels are known, vote for every voxel of
    the first. The standardisation is that of the labelled subject.

    Returns:
        For each pair the mean Dice over structures in [0, 1], over the whole volume.
    """
    scores = []
    for a, b in plan.pairs:
        bank = samples[b]
        centre, scale = centre_and_scale(bank)
        voters = NearestNeighbours(
            (bank - centre) * scale, plan.voxels[b].labels, cohort.num_classes,
            config.neighbours, config.temperature,
        )  # fmt: skip
        shape = (1, -1, 1, 1, 1)
        votes = voters((features[a] - centre.view(shape)) * scale.view(shape))  # (1, K + 1, D, H, W)
        truth = torch.from_numpy(np.array(cohort.label(a)))
        scores.append(float(dice_per_structure(votes[0].argmax(0), truth, cohort.num_classes).nanmean()))
    return scores


def map_sample(samples: Mapping[int, Tensor], plan: Plan, most: int) -> tuple[Tensor, Tensor]:
    """Return about ``most`` foreground voxels of all cases together, equally many of each structure.

    Returns:
        Standardised features (N, C) and labels (N,).
    """
    labels = torch.cat([plan.voxels[case].labels for case in plan.cases])
    structures = int((labels.unique() > 0).sum())
    each = max(1, most // max(1, structures * len(plan.cases)))
    kept, kept_labels = [], []
    for case in plan.cases:
        of_case = plan.voxels[case].labels
        for value in of_case.unique():
            if value > 0:
                places = torch.nonzero(of_case == value)[:each, 0]
                kept.append(samples[case][places])
                kept_labels.append(of_case[places])
    return standardized(torch.cat(kept))[0], torch.cat(kept_labels)


def silhouette(features: Tensor, labels: Tensor) -> float | None:
    """Return the mean silhouette (Rousseeuw 1987) in [-1, 1] of features (N, C) grouped by labels (N,).

    None where there is one structure only, so that there is nothing to be apart from.
    """
    from sklearn.metrics import silhouette_score

    if len(labels.unique()) < 2:
        return None
    return float(silhouette_score(features.numpy(), labels.numpy()))


def measure(
    backbone: Backbone,
    task: Task,
    cohort: PreparedCohort,
    plan: Plan,
    config: DownstreamConfig,
    device: torch.device,
    map_voxels: int = 2000,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return every number of one backbone, and the voxels of its map.

    Returns:
        ``silhouette``; ``transfer_dice`` of each pair; ``correspondence`` of each pair (the fields of
        :class:`Correspondence`); and (N, C), (N,) of :func:`map_sample`.
    """
    features = local_features(backbone, task, cohort, config, device)
    samples = sampled(features, plan)
    points, labels = map_sample(samples, plan, map_voxels)
    names = ("accuracy", "chance", "balanced", "balanced_chance", "queries")
    numbers = {
        "silhouette": silhouette(points, labels),
        "transfer_dice": label_transfer(features, samples, plan, cohort, config.knn),
        "correspondence": [
            {name: getattr(c, name) for name in names} for c in correspondences(samples, plan)
        ],
    }
    return numbers, points, labels
