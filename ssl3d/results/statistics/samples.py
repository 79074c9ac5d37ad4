"""From records to arrays: the numbers behind one cell of a table, over seeds and cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssl3d.results.scores import scale
from ssl3d.results.table.model import Cell, Seed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CaseKey = tuple[str, str]
"""(split, case id)"""

WITHOUT_STATISTICS = frozenset({"macro_auc"})
"""Metrics that are neither a mean over cases nor the AUC of two classes."""


@dataclass(frozen=True)
class Influence:
    """A score of each seed, and what each case adds to it.

    Attributes:
        scores: (S,) the score of each seed, in the unit of the metric.
        blocks: independent groups of cases, each (S, n): raising all values of one group by 1 raises the score by
            ``weight``. For a mean over cases there is one group, the cases' own values; for AUC there are two
            a fold, the placement values of its positive and of its negative cases.
        weight: 1, or one over the number of folds.
    """

    scores: Floats
    blocks: tuple[Floats, ...]
    weight: float = 1.0

    def __sub__(self, other: Influence) -> Influence:
        """Return the influence on a difference of scores; both are of the same seeds and cases."""
        blocks = tuple(a - b for a, b in zip(self.blocks, other.blocks, strict=True))
        return Influence(self.scores - other.scores, blocks, self.weight)

    def of(self, seeds: Sequence[int]) -> Influence:
        """Return the influence restricted to the seeds at these places."""
        index = list(seeds)
        return Influence(self.scores[index], tuple(block[index] for block in self.blocks), self.weight)


@dataclass(frozen=True)
class Sample:
    """Numbers behind one cell: ``values`` (S, N) over seeds and cases.

    For DSC and other metrics of single cases the values are that metric in the unit of the score; for AUC they
    are predicted probabilities, with ``targets`` (N,) and the fold of each case.
    """

    cases: tuple[CaseKey, ...]
    values: Floats
    targets: NDArray[np.bool_] | None = None
    seeds: tuple[Seed, ...] = ()

    def on(self, cases: Sequence[CaseKey]) -> Sample:
        """Return the sample restricted to ``cases``, in their order."""
        if tuple(cases) == self.cases:
            return self
        place = {case: i for i, case in enumerate(self.cases)}
        index = [place[case] for case in cases]
        targets = None if self.targets is None else self.targets[index]
        return Sample(tuple(cases), self.values[:, index], targets, self.seeds)

    def folds(self) -> list[list[int]]:
        """Return the places of the cases of each fold."""
        folds: dict[str, list[int]] = {}
        for place, (split, _) in enumerate(self.cases):
            folds.setdefault(split, []).append(place)
        return list(folds.values())

    def influence(self) -> Influence:
        """Return the scores of the seeds and what each case adds to them.

        An AUC is averaged over folds, in percent; it is NaN where a fold has cases of one class only.
        """
        import numpy as np

        if self.targets is None:
            return Influence(self.values.mean(axis=1), (self.values,))
        folds = self.folds()
        blocks: list[Floats] = []
        scores = np.zeros(len(self.values))
        for places in folds:
            targets = self.targets[places]
            if targets.all() or not targets.any():
                return Influence(np.full(len(self.values), np.nan), ())
            sides = placement_values(targets, self.values[:, places])
            positives, negatives = (100 * side for side in sides)  # (S, P), (S, Q)
            scores += positives.mean(axis=1) / len(folds)
            blocks += [positives, negatives]
        return Influence(scores, tuple(blocks), 1 / len(folds))


def sample(cell: Cell, metric: str) -> Sample:
    """Collect the numbers behind ``cell``; cases that some seed could not score are left out."""
    import numpy as np

    field = "probability" if metric == "auc" else metric
    factor = 1.0 if metric == "auc" else scale(metric)
    by_seed: dict[Any, dict[CaseKey, float]] = {seed: {} for seed in cell.seeds}
    targets: dict[CaseKey, bool] = {}
    for record in cell.records:
        identity = record["identity"]
        values = by_seed[identity["seed"], identity.get("pretrain_seed")]
        for case in record["per_case"]:
            if case.get(field) is not None:
                key = (identity["split"], str(case["case"]))
                values[key] = factor * case[field]
                targets[key] = bool(case.get("target"))
    cases = tuple(
        key for key in next(iter(by_seed.values())) if all(key in values for values in by_seed.values())
    )
    matrix = np.array([[values[key] for key in cases] for values in by_seed.values()], dtype=float)  # (S, N)
    of_class = np.array([targets[key] for key in cases], dtype=bool) if metric == "auc" else None
    return Sample(cases, matrix, of_class, tuple(by_seed))


def placement_values(targets: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    """Return the placement values of the positives (..., P) and of the negatives (..., Q).

    That of a positive is the share of negatives with a lower score, that of a negative the share of positives
    with a higher one; ties count one half. The mean of either is the AUC. Computed from midranks in
    O(n log n) (Sun and Xu, IEEE Signal Processing Letters 2014).

    Args:
        targets: (N,) whether a case is positive.
        scores: (..., N), the higher the more positive.
    """
    from scipy.stats import rankdata

    positive, negative = scores[..., targets], scores[..., ~targets]
    ranks = rankdata(scores, axis=-1)
    of_positives = (ranks[..., targets] - rankdata(positive, axis=-1)) / negative.shape[-1]
    of_negatives = 1 - (ranks[..., ~targets] - rankdata(negative, axis=-1)) / positive.shape[-1]
    return of_positives, of_negatives


def pretrainings(seeds: Sequence[Seed]) -> int:
    """Return how many independent trainings stand behind ``seeds``.

    Each seed of a row trains a network of its own, unless the seeds share one checkpoint.

    >>> pretrainings([(0, 0), (1, 1)]), pretrainings([(0, None), (1, None)]), pretrainings([(0, 7), (1, 7)])
    (2, 2, 1)
    """
    return len({seed if pretrain_seed is None else pretrain_seed for seed, pretrain_seed in seeds})
