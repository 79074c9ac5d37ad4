"""Tiny made-up volumes for the conformance suite."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ssl3d.data.prepared.arrays import Where
from ssl3d.rng import numpy_rng


@dataclass
class _Case:
    id: str
    shape: tuple[int, ...]
    target: int | None = None
    spacing_mm: float = 2.0

    @property
    def subject(self) -> str:
        return self.id


class _Volumes:
    """Procedural volumes with the interface of a prepared cohort: a body with organs that vary.

    Without labels, asking for one raises: no label may reach a method.
    """

    dataset = "conformance"
    fingerprint = "conformance"
    taken_for = "arrays"
    label_names = ("organ", "vessel")
    num_classes = 3

    def __init__(self, n: int, shape: tuple[int, int, int] = (20, 20, 20), labelled: bool = False) -> None:
        self._items = [self._draw(i, shape) for i in range(n)]
        self._labelled = labelled
        self.cases = [_Case(f"c{i}", shape, i % 2 if labelled else None) for i in range(n)]

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

    def __len__(self) -> int:
        return len(self._items)

    def image(self, i: int, where: Where = ...) -> np.ndarray:
        return self._items[i][0][where]

    def label(self, i: int, where: Where = ...) -> np.ndarray:
        if not self._labelled:
            raise AssertionError("the method asked for a label")
        return self._items[i][1][where]

    def index(self, case_id: str) -> int:
        return int(case_id[1:])


class _Hearts(_Volumes):
    """The first volumes of the embedded pretraining cohort, hearts in CT, as small as they can be made."""

    dataset = "phantoms"
    fingerprint = "conformance-hearts"
    edge = 24

    def __init__(self, n: int) -> None:
        super().__init__(n, (self.edge,) * 3)

    @staticmethod
    @functools.cache
    def _draw(i: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        from ssl3d.data.phantoms.subjects import PhantomParameters, generate

        subject = generate("pretrain", i, PhantomParameters(edge=shape[0], spacing_mm=154 / shape[0]))
        # Air, -1000 HU, to 0 and bone to 1.
        return ((subject.image + 1000) / 2000).clip(0, 1).astype(np.float32), np.zeros(shape, np.uint8)
