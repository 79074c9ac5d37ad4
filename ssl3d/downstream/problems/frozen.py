"""Features of a frozen backbone: computed once a case, kept in memory, on disk, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl3d.config import DownstreamConfig
from ssl3d.files import explained


class FeatureStore:
    """Features by case, with the same values wherever they are kept.

    Features up to ``feature_budget_mib`` stay in memory, the next ``feature_disk_mib`` are
    memory-mapped from a temporary folder, and the rest is computed anew when asked for.

    Args:
        compute: from a case's index to its features, float32, without gradient.
        config: the two budgets, and ``feature_precision``, in which the features are kept.
    """

    def __init__(self, compute: Callable[[int], Tensor], config: DownstreamConfig) -> None:
        self._compute = compute
        self._memory_left = config.feature_budget_mib * 2**20
        self._disk_left = config.feature_disk_mib * 2**20
        self._dtype = torch.bfloat16 if config.feature_precision == "bfloat16" else torch.float32
        self._kept: dict[int, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __getitem__(self, case: int) -> Tensor:
        """Return the features of ``case``, float32 on the CPU."""
        if case in self._kept:
            return self._kept[case].float()
        features = self._compute(case).cpu().contiguous().to(self._dtype)
        size = features.numel() * features.element_size()
        if size <= self._memory_left:
            self._memory_left -= size
            self._kept[case] = features
        elif size <= self._disk_left:
            self._disk_left -= size
            self._kept[case] = self._on_disk(case, features)
        return features.float()

    def _on_disk(self, case: int, features: Tensor) -> Tensor:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="ssl3d-features-")
        path = Path(self._folder.name) / f"{case}.npy"
        with explained(path):
            np.save(
                path, features.view(torch.int16 if self._dtype == torch.bfloat16 else self._dtype).numpy()
            )
        # Copy-on-write: torch wants a writable array, and nothing here writes.
        return torch.from_numpy(np.load(path, mmap_mode="c")).view(self._dtype)


class SharedFeatures:
    """The features of one frozen backbone on one task, for all the evaluations of these that follow each other.

    Folds, shares of the labels, linear maps and neighbours read the same features.

    Example::

        shared = SharedFeatures()
        shared.begin(key)  # before each evaluation; other features than the last one's are let go
        store = shared.of(store)
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._store: FeatureStore | None = None

    def begin(self, key: Hashable) -> None:
        """Keep what there is if it has the same ``key``; None has nothing in common with anything."""
        if key is None or key != self._key:
            self._key, self._store = key, None

    def of(self, store: FeatureStore) -> FeatureStore:
        """Return the kept features, of which ``store`` is the first."""
        self._store = self._store or store
        return self._store
