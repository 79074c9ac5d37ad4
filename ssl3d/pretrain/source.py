"""Crops for pretraining: which volumes and which boxes belong to step k is a function of k."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssl3d.device import Copies
from ssl3d.errors import DataError, are, count
from ssl3d.rng import derive_seed, numpy_rng, permuted

if TYPE_CHECKING:
    from ssl3d.data.prepared.volumes import VolumeCase, Volumes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One step's crops.

    Attributes:
        x: (B, 1, D, H, W), or (B, V, 1, D, H, W) for V > 1 volumes an item; float32 in [0, 1].
        items: running number of each item over the whole run (B,).
        volumes: number of each item's (first) volume in the source (B,).
    """

    x: Tensor
    items: list[int]
    volumes: list[int]


HELD_BACK_SHARE = 10
"""One volume of so many is held back from training, to score the pretext task on."""
MOST_HELD_BACK = 16
FEWEST_HELD_BACK = 2


def held_back_volumes(volumes: int) -> list[int]:
    """Return which of ``volumes`` volumes no method trains on; the same for every method and seed.

    A tenth of them, 16 at most. None where that is less than two: too few volumes to do without.
    """
    count = min(MOST_HELD_BACK, volumes // HELD_BACK_SHARE)
    if count < FEWEST_HELD_BACK:
        return []
    return sorted(int(v) for v in numpy_rng(0, "held back", volumes).permutation(volumes)[:count])


def _smaller(shape: Sequence[int], crop: Sequence[int]) -> bool:
    return any(edge < wanted for edge, wanted in zip(shape, crop, strict=True))


def _rounded_down(value: float) -> str:
    """Return a positive number with two significant digits, never more than it is.

    >>> _rounded_down(1.2578), _rounded_down(0.04321), _rounded_down(0.3)
    ('1.2', '0.043', '0.3')
    """
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.floor(value / step + 1e-9) * step:.2g}"


class CropSource:
    """Random crops of a prepared cohort, addressed by step.

    The order of the volumes is a new seeded permutation every epoch (:func:`ssl3d.rng.permuted`). The further volumes of an
    item are drawn uniformly from the others. All volumes of an item are cropped at one relative
    position, so that they show the same part of the body where their fields of view agree.

    A volume smaller than the crop along some axis is never left out: its crops hold the whole of that axis, at the
    relative position, and zeros (the darkest value: air) around it. Such volumes are named in a warning and in
    :attr:`padded`.

    The cost of a batch does not depend on the number of volumes.

    Args:
        cohort: prepared volumes.
        crop: edges (D, H, W) in voxels.
        batch_size: items a step.
        volumes_per_item: volumes an item.
        seed: the run's seed.
        volumes: which volumes of the cohort; default: all. Volumes are numbered by their place in this list.

    Raises:
        DataError: there are fewer volumes than an item needs.
    """

    def __init__(
        self,
        cohort: Volumes,
        crop: tuple[int, int, int],
        batch_size: int,
        volumes_per_item: int,
        seed: int,
        volumes: Sequence[int] | None = None,
    ) -> None:
        self.held_back: list[Batch] = []
        """Crops on which the pretext task is scored; see :func:`training_source`."""
        self.held_back_is = "nothing"
        """What these are, in words."""
        self.own = slice(None)
        """Which items of each step :meth:`batches` yields: with several devices, those of this process."""
        self.places = list(range(len(cohort)) if volumes is None else volumes)
        self.cohort, self.crop, self.batch_size = cohort, crop, batch_size
        self.volumes_per_item, self.seed = volumes_per_item, seed
        if len(self) < max(1, volumes_per_item):
            raise DataError(
                f"Pretraining needs at least {count(max(1, volumes_per_item), 'volume')}, but {cohort.dataset} has "
                f"{len(self)}: add more volumes."
            )
        self.padded = [c.id for c in self._cases() if _smaller(c.shape, crop)]
        if self.padded:
            logger.warning(self._padding_note())

    def _padding_note(self) -> str:
        """Return which volumes are padded, and what would spare it."""
        small = [c for c in self._cases() if _smaller(c.shape, self.crop)]
        listed = "\n".join(f"  {c.id}: {tuple(c.shape)}" for c in small[:20])
        more = f"\n  and {len(small) - 20} more" if len(small) > 20 else ""
        spacing = small[0].spacing_mm
        # The crop must span the shortest edge of the smallest volume, in mm.
        fits = min(s * spacing / e for c in small for s, e in zip(c.shape, self.crop, strict=True))
        return (
            f"{len(small)} of {count(len(self), 'prepared volume')} {are(len(small))} smaller than the crop {self.crop} "
            f"(voxels at {spacing:g} mm) and {are(len(small))} padded with zeros (air):\n{listed}{more}\nNone would be with "
            f"a finer spacing (data.spacing_mm={_rounded_down(fits)}) or a smaller pretrain.crop."
        )

    def _cases(self) -> list[VolumeCase]:
        return [self.cohort.cases[place] for place in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def epoch_of(self, step: int) -> int:
        """Return the pass over the volumes in which the first item of ``step`` lies."""
        return step * self.batch_size // len(self)

    def starts_epoch(self, step: int) -> bool:
        """Whether ``step`` is the first of a pass over the volumes."""
        return step == 0 or self.epoch_of(step) != self.epoch_of(step - 1)

    def batch(self, step: int, own: slice = slice(None)) -> Batch:
        """Return the crops of ``step``, or its ``own`` items of them; a pure function of (seed, step)."""
        items = [step * self.batch_size + i for i in range(self.batch_size)][own]
        volumes = [self._volumes(item) for item in items]
        crops = [self._crops(item, chosen) for item, chosen in zip(items, volumes, strict=True)]
        x = torch.from_numpy(np.stack(crops))  # (B, V, 1, D, H, W)
        return Batch(x if self.volumes_per_item > 1 else x[:, 0], items, [chosen[0] for chosen in volumes])

    def _volumes(self, item: int) -> list[int]:
        epoch, place = divmod(item, len(self))
        first = permuted(place, len(self), self.seed, "order", epoch)
        if self.volumes_per_item == 1:
            return [first]
        rng = numpy_rng(self.seed, "partners", item)
        more = rng.choice(len(self) - 1, self.volumes_per_item - 1, replace=False)  # of all but the first
        return [first, *(int(v) + (v >= first) for v in more)]

    def _crops(self, item: int, volumes: list[int]) -> np.ndarray:
        position = numpy_rng(self.seed, "crop", item).random(3)
        return np.stack([self._crop(v, position) for v in volumes])  # (V, 1, D, H, W)

    def _crop(self, volume: int, position: np.ndarray) -> np.ndarray:
        """Return the crop at a relative position in [0, 1) along each axis: (1, D, H, W) float32."""
        place = self.places[volume]
        size = self.cohort.cases[place].shape  # (D, H, W)
        # Where the crop begins in the volume, or where the volume begins in the crop, which holds it then.
        starts = [int(p * (abs(s - e) + 1)) for p, s, e in zip(position, size, self.crop, strict=True)]
        read, write = [], []
        for start, edge, wanted in zip(starts, size, self.crop, strict=True):
            read.append(slice(start, start + wanted) if edge >= wanted else slice(0, edge))
            write.append(slice(0, wanted) if edge >= wanted else slice(start, start + edge))
        voxels = self.cohort.image(place, (read[0], read[1], read[2]))
        if not _smaller(size, self.crop):
            return np.ascontiguousarray(voxels, dtype=np.float32)[None]
        padded = np.zeros(self.crop, dtype=np.float32)
        padded[tuple(write)] = voxels
        return padded[None]

    def fixed_crop(self, volume: int, number: int = 0) -> Tensor:
        """Return crop ``number`` of one volume (1, D, H, W); number 0 is the central one.

        Crops do not depend on the step, for features that must be comparable over a run.
        """
        position = np.full(3, 0.5) if number == 0 else numpy_rng(self.seed, "fixed", volume, number).random(3)
        return torch.from_numpy(self._crop(volume, position))

    def batches(
        self, start: int, stop: int, workers: int, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """Yield the batches of steps [start, stop) on ``device``, read and copied ahead by ``workers`` threads."""
        copies = Copies(torch.device(device))

        def read(step: int) -> tuple[Batch, Any]:
            batch = self.batch(step, self.own)
            return batch, copies.send(batch.x)

        def received(batch: Batch, sent: Any) -> Batch:
            return replace(batch, x=copies.receive(sent))

        if workers == 0:
            yield from (received(*read(step)) for step in range(start, stop))
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: list[Future[tuple[Batch, Any]]] = []
            for step in range(start, min(stop, start + workers)):
                waiting.append(pool.submit(read, step))
            for step in range(start, stop):
                ready = waiting.pop(0).result()
                if step + workers < stop:
                    waiting.append(pool.submit(read, step + workers))
                yield received(*ready)


def training_source(
    cohort: Volumes,
    crop: tuple[int, int, int],
    items: int,
    volumes_per_item: int,
    seed: int,
    held_back_batches: int,
) -> CropSource:
    """Return the crops to train on, with those that are held back.

    Held-back crops are the same for every seed, and come from volumes that are never trained on. Where
    there are too few volumes for that (see :func:`held_back_volumes`), they are further crops of the
    training volumes.

    Args:
        cohort, crop, volumes_per_item, seed: see :class:`CropSource`.
        items: items a step.
        held_back_batches: held-back batches, of ``items`` items each.
    """
    held = held_back_volumes(len(cohort))
    train = [v for v in range(len(cohort)) if v not in held]
    source = CropSource(cohort, crop, items, volumes_per_item, seed, train)
    fixed = derive_seed(0, "held back")
    if held:
        other = CropSource(cohort, crop, items, volumes_per_item, fixed, held)
    else:
        other = copy.copy(source)  # of which padded volumes have been named
        other.seed = fixed
    source.held_back = [other.batch(number) for number in range(held_back_batches)]
    source.held_back_is = count(len(held), "volume") if held else "further crops of the training volumes"
    return source
