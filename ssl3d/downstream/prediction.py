"""What a fine-tuned network says of one image, and what is different about that image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ssl3d.data.files.suffixes import image_suffix
from ssl3d.data.files.volume import Volume, write_like, write_volume
from ssl3d.data.prepared.steps import Intensity
from ssl3d.errors import ConfigError

COARSER = 1.2
"""Voxels are said to be coarser than those of the training from this factor on."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer to one image.

    Attributes:
        path: the image file.
        labels: of a segmentation: array of the file's own shape, with the label values of the training data; else None.
        affine: (4, 4) of the file as stored, voxel index -> RAS+ mm.
        structures: label value -> name, of a segmentation.
        probabilities: of each class, by name (``0`` and ``1`` where they have none); empty for a number.
        prediction: the likeliest class; those from 0.5 on, of classes that do not exclude each other; a number in its
            unit; None of a segmentation.
        notes: what is different about the image from those of the training.
        said_affine: whether the user said which affine of the file is right.
    """

    path: Path
    affine: np.ndarray
    labels: np.ndarray | None = None
    structures: Mapping[int, str] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)
    prediction: str | float | tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    said_affine: bool = False

    def save(self, path: str | Path) -> None:
        """Write a segmentation as an image file; one of the image's own format keeps its header.

        Raises:
            ConfigError: there is no segmentation.
        """
        if self.labels is None:
            raise ConfigError(
                f"{self.path}: the prediction is no segmentation: read prediction and probabilities."
            )
        target = Path(path)
        if image_suffix(self.path) is not None and image_suffix(target) == image_suffix(self.path):
            write_like(target, self.labels, self.path, self.affine if self.said_affine else None)
        else:
            write_volume(target, self.labels, self.affine)


def with_offset(intensity: Intensity, offset: float | None) -> Intensity:
    """Return the intensity with another offset for the stored values of CT; None: as it is.

    Raises:
        ConfigError: the volumes of the training had no unit.
    """
    if offset is None:
        return intensity
    if intensity.scaling != "ct":
        raise ConfigError(
            f"--offset {offset:g}: this predictor was trained on volumes without a unit "
            f"({intensity.scaling}), to which nothing is added. Leave the option out."
        )
    return replace(intensity, offset=offset)


def input_notes(
    volume: Volume, shape: Sequence[int], native_mm: Sequence[float] | None, crop: Sequence[int]
) -> list[str]:
    """Return what is different about an image from those that the weights were trained on.

    Args:
        volume: as it was read.
        shape: (D, H, W) after preparation.
        native_mm: smallest and largest edge of a voxel in the files of the training; None: not known.
        crop: edges of the crops of the training, in voxels; empty: not known.
    """
    notes = []
    if native_mm and max(volume.spacing_mm) > COARSER * native_mm[1]:
        edges = " x ".join(f"{edge:.3g}" for edge in volume.spacing_mm)
        notes.append(
            f"voxels of {edges} mm, coarser than any of the training (at most {native_mm[1]:.3g} mm)"
        )
    if any(edge < part for edge, part in zip(shape, crop, strict=False)):
        edges, crops = (" x ".join(map(str, size)) for size in (shape, crop))
        notes.append(f"{edges} voxels after preparation, smaller than the crops of the training ({crops})")
    return notes
