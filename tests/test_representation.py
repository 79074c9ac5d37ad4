"""Measures of local features against obvious second forms, and on features whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl3d.downstream.representation import Correspondence, correspondence_accuracy, standardized
from ssl3d.errors import DataError


def subject(seed: int, n: int = 400, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, 7) that know a little of the labels (n,), and those; channels of all scales."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    features = rng.normal(size=(n, 7)) + 0.5 * np.eye(classes, 7)[labels]
    return features * 10.0 ** np.arange(-3, 4) + 5, labels


def brute_force(
    a: np.ndarray, la: np.ndarray, b: np.ndarray, lb: np.ndarray, w: np.ndarray
) -> Correspondence:
    """One voxel after the other, in float64."""
    both = np.concatenate([a, b])
    mean, std = both.mean(0), both.std(0)
    hits: dict[int, list[float]] = {}
    numerator = denominator = chance = 0.0
    for query, label, weight in zip((a - mean) / std, la, w, strict=True):
        if label == 0 or label not in lb:
            continue
        best, answer = -np.inf, -1
        for candidate, other in zip((b - mean) / std, lb, strict=True):
            similarity = query @ candidate / np.sqrt(query @ query) / np.sqrt(candidate @ candidate)
            if similarity > best:
                best, answer = similarity, other
        hits.setdefault(int(label), []).append(float(answer == label))
        numerator += weight * (answer == label)
        denominator += weight
        chance += weight * np.mean(lb == label)
    structures = {k: float(np.mean(v)) for k, v in sorted(hits.items())}
    return Correspondence(
        numerator / denominator, chance / denominator,
        float(np.mean(list(structures.values()))), float(np.mean([np.mean(lb == k) for k in structures])),
        structures, sum(map(len, hits.values())),
    )  # fmt: skip


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(a) for a in arrays]


def test_correspondence_is_that_of_a_loop_over_voxels() -> None:
    (a, la), (b, lb) = subject(0), subject(1, n=150)
    weights = np.random.default_rng(2).uniform(1, 50, len(a))
    ours = correspondence_accuracy(*tensors(a, la, b, lb, weights))
    theirs = brute_force(a, la, b, lb, weights)
    assert ours.queries == theirs.queries and ours.structures == pytest.approx(theirs.structures)
    for name in ("accuracy", "chance", "balanced", "balanced_chance"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-12)
    assert ours.accuracy > ours.chance


def test_planted_features_find_their_structure_and_noise_finds_it_by_chance() -> None:
    rng = np.random.default_rng(0)
    labels = [rng.choice(6, 3000, p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.05]) for _ in range(2)]
    planted = [np.eye(6)[y] + rng.normal(0, 0.01, (3000, 6)) for y in labels]
    found = correspondence_accuracy(*tensors(planted[0], labels[0], planted[1], labels[1]))
    assert found.accuracy == found.balanced == 1.0
    noise = [rng.normal(size=(3000, 6)) for _ in labels]
    found = correspondence_accuracy(*tensors(noise[0], labels[0], noise[1], labels[1]))
    assert found.accuracy == pytest.approx(found.chance, abs=0.03)
    assert found.balanced == pytest.approx(found.balanced_chance, abs=0.03)
    assert found.balanced_chance == pytest.approx(0.7 / 5, abs=0.01)


def test_scale_of_channels_and_constant_channels_do_not_matter() -> None:
    (a, la), (b, lb) = subject(3), subject(4)
    first = correspondence_accuracy(*tensors(a, la, b, lb))
    scaled = [np.concatenate([1e4 * x - 7, np.full((len(x), 1), 0.1)], axis=1) for x in (a, b)]
    assert correspondence_accuracy(*tensors(scaled[0], la, scaled[1], lb)) == first
    constant = standardized(torch.full((50, 1), 0.1), torch.full((9, 1), 0.1))
    assert all(not part.any() for part in constant)


def test_structures_that_the_other_subject_lacks_are_no_queries() -> None:
    (a, la), (b, lb) = subject(5), subject(6)
    lb[lb == 4] = 0
    found = correspondence_accuracy(*tensors(a, la, b, lb))
    assert 4 not in found.structures and found.queries == int(((la > 0) & (la < 4)).sum())
    with pytest.raises(DataError, match="no structure in common"):
        correspondence_accuracy(*tensors(a, la, b, np.zeros_like(lb)))
    with pytest.raises(ValueError, match="give \\(N, C\\)"):
        correspondence_accuracy(*tensors(a, la[:-1], b, lb))
