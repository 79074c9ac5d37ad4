"""Crops for pretraining: which volumes and which boxes belong to step k is a function of k."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssl3d.errors import DataError
from ssl3d.rng import numpy_rng

if TYPE_CHECKING:
    from ssl3d.data.prepare import PreparedCohort


@dataclass(frozen=True)
class Batch:
    """One step's crops.

    Attributes:
        x: (B, 1, D, H, W), or (B, V, 1, D, H, W) for V > 1 volumes an item; float32 in [0, 1].
        items: running number of each item over the whole run (B,).
        volumes: index into the cohort of each item's (first) volume (B,).
    """

    x: Tensor
    items: list[int]
    volumes: list[int]


class CropSource:
    """Random crops of a prepared cohort, addressed by step.

    The order of the volumes is a new seeded permutation every epoch. The further volumes of an
    item are drawn uniformly from the others. All volumes of an item are cropped at one relative
    position, so that they show the same part of the body where their fields of view agree.

    Args:
        cohort: prepared volumes.
        crop: edges (D, H, W) in voxels.
        batch_size: items a step.
        volumes_per_item: volumes an item.
        seed: the run's seed.

    Raises:
        DataError: a volume is smaller than the crop, or there are fewer volumes than an item needs;
            all offending files are named.
    """

    def __init__(
        self,
        cohort: PreparedCohort,
        crop: tuple[int, int, int],
        batch_size: int,
        volumes_per_item: int,
        seed: int,
    ) -> None:
        self.cohort, self.crop, self.batch_size = cohort, crop, batch_size
        self.volumes_per_item, self.seed = volumes_per_item, seed
        if len(cohort) < max(1, volumes_per_item):
            raise DataError(
                f"Pretraining needs at least {max(1, volumes_per_item)} volumes, but {cohort.dataset} has "
                f"{len(cohort)}: add more volumes."
            )
        small = [c for c in cohort.cases if any(s < e for s, e in zip(c.shape, crop, strict=True))]
        if small:
            listed = "\n".join(f"  {c.id}: {tuple(c.shape)}" for c in small)
            spacing = cohort.cases[0].spacing_mm
            # The crop must span the shortest edge of the smallest volume, in mm.
            fits = min(s * spacing / e for c in small for s, e in zip(c.shape, crop, strict=True))
            raise DataError(
                f"{len(small)} prepared volumes are smaller than the crop {tuple(crop)} (voxels at {spacing:g} mm):\n"
                f"{listed}\nUse a finer spacing (--set data.spacing_mm={math.floor(fits * 20) / 20:g} fits all), a smaller "
                "pretrain.crop, or leave these volumes out."
            )

    def __len__(self) -> int:
        return len(self.cohort)

    def epoch_of(self, step: int) -> int:
        """Return the pass over the volumes in which the first item of ``step`` lies."""
        return step * self.batch_size // len(self)

    def starts_epoch(self, step: int) -> bool:
        """Whether ``step`` is the first of a pass over the volumes."""
        return step == 0 or self.epoch_of(step) != self.epoch_of(step - 1)

    def batch(self, step: int) -> Batch:
        """Return the crops of ``step``; a pure function of (seed, step)."""
        items = [step * self.batch_size + i for i in range(self.batch_size)]
        volumes = [self._volumes(item) for item in items]
        crops = [self._crops(item, chosen) for item, chosen in zip(items, volumes, strict=True)]
        x = torch.from_numpy(np.stack(crops))  # (B, V, 1, D, H, W)
        return Batch(x if self.volumes_per_item > 1 else x[:, 0], items, [chosen[0] for chosen in volumes])

    def _volumes(self, item: int) -> list[int]:
        epoch, place = divmod(item, len(self))
        first = int(numpy_rng(self.seed, "order", epoch).permutation(len(self))[place])
        others = [v for v in range(len(self)) if v != first]
        more = numpy_rng(self.seed, "partners", item).choice(others, self.volumes_per_item - 1, replace=False)
        return [first, *(int(v) for v in more)] if self.volumes_per_item > 1 else [first]

    def _crops(self, item: int, volumes: list[int]) -> np.ndarray:
        position = numpy_rng(self.seed, "crop", item).random(3)
        return np.stack([self._crop(v, position) for v in volumes])  # (V, 1, D, H, W)

    def _crop(self, volume: int, position: np.ndarray) -> np.ndarray:
        size = self.cohort.cases[volume].shape  # (D, H, W)
        d, h, w = (int(p * (s - e + 1)) for p, s, e in zip(position, size, self.crop, strict=True))
        box = (slice(d, d + self.crop[0]), slice(h, h + self.crop[1]), slice(w, w + self.crop[2]))
        return np.ascontiguousarray(self.cohort.image(volume, box), dtype=np.float32)[None]  # (1, *crop)

    def fixed_crop(self, volume: int, number: int = 0) -> Tensor:
        """Return crop ``number`` of one volume (1, D, H, W); number 0 is the central one.

        Crops do not depend on the step, for features that must be comparable over a run.
        """
        position = np.full(3, 0.5) if number == 0 else numpy_rng(self.seed, "fixed", volume, number).random(3)
        return torch.from_numpy(self._crop(volume, position))

    def batches(self, start: int, stop: int, workers: int) -> Iterator[Batch]:
        """Yield the batches of steps [start, stop), read ahead by ``workers`` threads."""
        if workers == 0:
            yield from (self.batch(step) for step in range(start, stop))
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: list[Future[Batch]] = []
            for step in range(start, min(stop, start + workers)):
                waiting.append(pool.submit(self.batch, step))
            for step in range(start, stop):
                batch = waiting.pop(0).result()
                if step + workers < stop:
                    waiting.append(pool.submit(self.batch, step + workers))
                yield batch
