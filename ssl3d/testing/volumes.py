"""Tiny made-up volumes for the conformance suite."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ssl3d.data.prepared.arrays import Where
from ssl3d.data.prepared.volumes import ArrayCase, ArrayVolumes
from ssl3d.rng import numpy_rng


@dataclass(frozen=True)
class _Case(ArrayCase):
    target: int | None = None
    classes: tuple[int, ...] | None = None
    value: float | None = None

    @property
    def subject(self) -> str:
        return self.id


class _Volumes(ArrayVolumes):
    """Procedural volumes: a body with organs that vary.

    Without labels, asking for one raises: no label may reach a method.
    """

    name = "conformance"
    label_names = ("organ", "vessel")
    num_classes = 3
    target_names: ClassVar[dict[int, str]] = {0: "even", 1: "odd"}

    def __init__(self, n: int, shape: tuple[int, int, int] = (20, 20, 20), labelled: bool = False) -> None:
        images, self._labels = zip(*(self._draw(i, shape) for i in range(n)), strict=True)
        super().__init__(images, dataset=self.name, fingerprint=self.name)
        truth = [(i % 2, (i % 2,), float(i)) if labelled else (None, None, None) for i in range(n)]
        self._cases = [_Case(f"c{i}", shape, self.spacing_mm, *told) for i, told in enumerate(truth)]
        self._labelled = labelled

    @property
    def cases(self) -> Sequence[_Case]:
        return self._cases

    @staticmethod
    def _draw(i: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        rng = numpy_rng(0, "conformance", i)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, s) for s in shape], indexing="ij"))
        image = 0.3 * ((grid**2).sum(0) < rng.uniform(0.7, 1.3)) + 0.05
        label = np.zeros(shape, np.uint8)
        for k, (size, value) in enumerate([(0.5, 0.35), (0.25, 0.6)], 1):
            centre, radii = rng.uniform(-0.4, 0.4, (3, 1, 1, 1)), size * rng.uniform(0.7, 1.3, (3, 1, 1, 1))
            inside = (((grid - centre) / radii) ** 2).sum(0) < 1
            label[inside] = k
            image[inside] = value * rng.uniform(0.7, 1.3)
        image += 0.02 * rng.standard_normal(shape)
        return image.clip(0, 1).astype(np.float32), label

    def label(self, i: int, where: Where = ...) -> np.ndarray:
        if not self._labelled:
            raise AssertionError("the method asked for a label")
        labels: np.ndarray = self._labels[i]
        return labels[where]


class _Hearts(_Volumes):
    """The first volumes of the embedded pretraining cohort, hearts in CT, as small as they can be made."""

    name = "conformance-hearts"

    def __init__(self, n: int, edge: int = 24) -> None:
        super().__init__(n, (edge,) * 3)

    @staticmethod
    @functools.cache
    def _draw(i: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        from ssl3d.data.phantoms.subjects import PhantomParameters, generate

        subject = generate("pretrain", i, PhantomParameters(edge=shape[0], spacing_mm=154 / shape[0]))
        # Air, -1000 HU, to 0 and bone to 1.
        return ((subject.image + 1000) / 2000).clip(0, 1).astype(np.float32), np.zeros(shape, np.uint8)
