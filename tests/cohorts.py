"""In-memory cohorts with labels and targets, for tests of what comes after preparation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ssl3d.data.prepared.arrays import Where
from ssl3d.data.prepared.volumes import ArrayVolumes


@dataclass
class MemoryCase:
    id: str
    subject: str
    subset: str | None
    target: int | None
    shape: tuple[int, int, int]
    spacing_mm: float = 2.0
    classes: tuple[int, ...] | None = None
    value: float | None = None


@dataclass
class MemoryCohort(ArrayVolumes):
    """Volumes, labels and targets held in lists."""

    images: list[np.ndarray]
    labels: list[np.ndarray] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    label_names: list[str] = field(default_factory=list)
    classes: list[tuple[int, ...]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    target_names: dict[int, str] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def cases(self) -> list[MemoryCase]:
        return [
            MemoryCase(
                f"case{i}",
                f"case{i}",
                None,
                self.targets[i] if self.targets else None,
                (image.shape[0], image.shape[1], image.shape[2]),
                classes=self.classes[i] if self.classes else None,
                value=self.values[i] if self.values else None,
            )
            for i, image in enumerate(self.images)
        ]

    @property
    def num_classes(self) -> int:
        return len(self.label_names) + 1

    def label(self, i: int, where: Where = ...) -> np.ndarray:
        return self.labels[i][where]


def noise_cohort(n: int, shape: tuple[int, int, int] = (20, 18, 17), seed: int = 0) -> MemoryCohort:
    rng = np.random.default_rng(seed)
    return MemoryCohort([rng.random(shape, dtype=np.float32) for _ in range(n)])


def sphere_cohort(n: int, edge: int = 16, seed: int = 0) -> MemoryCohort:
    """A bright ball and a dark ball at random places in a grey box; labels 1 and 2, target = size of ball 1."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"))
    images, labels, targets = [], [], []
    for i in range(n):
        label = np.zeros((edge,) * 3, np.uint8)
        big = i % 2
        for k, radius in ((1, 3 + 2 * big), (2, 3)):
            centre = rng.uniform(5, edge - 5, (3, 1, 1, 1))
            label[((grid - centre) ** 2).sum(0) < radius**2] = k
        image = np.choose(label, [0.5, 0.9, 0.1]) + rng.normal(0, 0.03, label.shape)
        images.append(image.astype(np.float32).clip(0, 1))
        labels.append(label)
        targets.append(big)
    return MemoryCohort(images, labels, targets, ["bright", "dark"])
