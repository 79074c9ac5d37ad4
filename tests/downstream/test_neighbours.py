"""k-NN evaluation against scikit-learn, and on features whose neighbours are known."""

import numpy as np
import pytest
import torch
from cohorts import sphere_cohort
from sklearn.neighbors import KNeighborsClassifier
from test_harness import CLS, SEG, config, run

from ssl3d.downstream.problems.neighbours import NearestNeighbours


def test_votes_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    bank, classes, queries = rng.normal(size=(90, 6)), rng.integers(0, 4, 90), rng.normal(size=(50, 6))
    ours = NearestNeighbours(torch.from_numpy(bank), torch.from_numpy(classes), 4, 7, 0.1)
    theirs = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1)).fit(
        bank, classes
    )
    np.testing.assert_allclose(
        ours(torch.from_numpy(queries)).exp(), theirs.predict_proba(queries).clip(1e-6), atol=1e-5
    )


def test_shape_of_volumes_and_a_bank_smaller_than_k() -> None:
    bank, classes = torch.eye(3), torch.tensor([0, 1, 1])
    votes = NearestNeighbours(bank, classes, 2, 20, 0.01)(torch.eye(3).T.reshape(1, 3, 3, 1, 1))
    assert votes.shape == (1, 2, 3, 1, 1)
    assert votes.argmax(1).flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize("task", [SEG, CLS], ids=["segmentation", "classification"])
def test_the_harness_labels_by_neighbours_without_training(task: object) -> None:
    cohort = sphere_cohort(8) if task is SEG else sphere_cohort(24, edge=12)
    outcome = run(task, "knn", cohort, config())  # type: ignore[arg-type]
    again = run(task, "knn", cohort, config())  # type: ignore[arg-type]
    assert outcome.parameters_trained == 0 and outcome.validation == [] and outcome.best_step == 0
    assert outcome.score > (35 if task is SEG else 60)
    assert outcome.score == again.score
