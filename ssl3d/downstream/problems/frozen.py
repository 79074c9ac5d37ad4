"""Features of a frozen backbone: computed once a case, kept in memory, on disk, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
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
        compute: from a case's index to its features, without gradient.
        config: the two budgets.
    """

    def __init__(self, compute: Callable[[int], Tensor], config: DownstreamConfig) -> None:
        self._compute = compute
        self._memory_left = config.feature_budget_mib * 2**20
        self._disk_left = config.feature_disk_mib * 2**20
        self._kept: dict[int, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __getitem__(self, case: int) -> Tensor:
        if case in self._kept:
            return self._kept[case]
        features = self._compute(case).cpu().contiguous()
        size = features.numel() * features.element_size()
        if size <= self._memory_left:
            self._memory_left -= size
            self._kept[case] = features
        elif size <= self._disk_left:
            self._disk_left -= size
            self._kept[case] = self._on_disk(case, features)
        return features

    def _on_disk(self, case: int, features: Tensor) -> Tensor:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="ssl3d-features-")
        path = Path(self._folder.name) / f"{case}.npy"
        with explained(path):
            np.save(path, features.numpy())
        # Copy-on-write: torch wants a writable array, and nothing here writes.
        return torch.from_numpy(np.load(path, mmap_mode="c"))
