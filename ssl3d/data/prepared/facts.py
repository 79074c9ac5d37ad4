"""How volumes were prepared, as weights carry it: facts for ``run.json``, exports and records, and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import ValidationError

from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.grids import SPACING_TOLERANCE_MM
from ssl3d.data.prepared.steps import CT_RANGE, Intensity, Preparation
from ssl3d.data.prepared.volumes import Volumes
from ssl3d.errors import CheckpointError
from ssl3d.marks import without_effect

ORIENTATION = "RAS+"
"""Axes of every prepared volume, see :mod:`ssl3d.data.files.volume`."""

_SCALINGS = {
    "ct": "add {offset:g} to the stored values (air at 0, water at 1000), clip to [0, {range:g}], divide by {range:g}",
    "minmax": "each volume from its minimum to its maximum",
    "zscore": "mean and deviation of each volume's foreground (above Otsu's level), -5 deviations to 0 and +5 to 1",
}


@without_effect
def preparation_facts(volumes: Volumes | None) -> dict[str, Any] | None:
    """Return how ``volumes`` were prepared, as JSON values; None for arrays that nobody prepared.

    ``parameters`` are those of :class:`Preparation`, ``intensity`` those of :class:`Intensity`: scaling and offset as
    they were decided for the cohort. ``native_mm`` are the smallest and the largest edge of a voxel in the files.
    """
    if not isinstance(volumes, PreparedCohort):
        return None
    return {
        "orientation": ORIENTATION,
        "parameters": volumes.preparation.model_dump(mode="json"),
        "intensity": asdict(volumes.intensity),
        "native_mm": native_mm(volumes),
    }


@without_effect
def native_mm(cohort: PreparedCohort) -> list[float]:
    """Return the smallest and the largest edge of a voxel in the files of a cohort, in mm."""
    edges = np.array([np.linalg.norm(case.native_affine[:3, :3], axis=0) for case in cohort.cases])
    return [round(float(edges.min()), 4), round(float(edges.max()), 4)]


def read_preparation(facts: Mapping[str, Any] | None, where: str) -> tuple[Preparation, Intensity]:
    """Return the preparation that a run, an export or a user names.

    Args:
        facts: of :func:`preparation_facts`.
        where: file or folder that they come from, for messages.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    if facts is None:
        raise CheckpointError(
            f"{where} does not say how its images were prepared (fresh, imported, or of an earlier version). Fix: say it: "
            'ssl3d.load(..., preparation={"spacing_mm": 1.0, "scaling": "ct", "intensity_offset": 1024}).'
        )
    try:
        return Preparation.model_validate(facts["parameters"]), Intensity(**facts["intensity"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{where}: its preparation is damaged: {error!r}.") from error


def said_preparation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a preparation that a user says in the place of one that is not known.

    Args:
        options: those of :class:`Preparation`; ``scaling`` must be ``ct``, ``minmax`` or ``zscore``, with
            ``intensity_offset`` for ``ct`` (1024 for values in HU).

    Raises:
        ConfigError: an unknown option or a value out of range, or what one volume alone cannot decide.
    """
    from ssl3d.config import validate
    from ssl3d.errors import ConfigError

    parameters = validate(Preparation, dict(options), "preparation")
    if parameters.scaling == "auto" or (parameters.scaling == "ct" and parameters.intensity_offset is None):
        raise ConfigError(
            f'preparation: scaling = "{parameters.scaling}" leaves open what is done to the values of one image. Fix: '
            'give scaling="minmax", "zscore", or "ct" with intensity_offset (1024 for values in HU).'
        )
    offset = parameters.intensity_offset if parameters.scaling == "ct" else 0.0
    intensity = Intensity(parameters.scaling, offset or 0.0, parameters.scaling == "ct", "said by the user")
    return {
        "orientation": ORIENTATION,
        "parameters": parameters.model_dump(mode="json"),
        "intensity": asdict(intensity),
    }


def preparation_in_words(facts: Mapping[str, Any] | None) -> list[str]:
    """Return one line a step, in the order in which they are taken; one that says so where nothing is known."""
    if facts is None:
        return ["not recorded: these weights are fresh, imported, or of an earlier version"]
    p, intensity = facts["parameters"], facts["intensity"]
    scaling = _SCALINGS[intensity["scaling"]].format(offset=intensity["offset"], range=CT_RANGE)
    crop = p["crop"] + (
        f", with {p['margin_mm']:g} mm around it" if p["crop"] not in ("none", "center") else ""
    )
    if p["center_mm"] is not None:
        crop += f", {' x '.join(f'{edge:g}' for edge in p['center_mm'])} mm, zeros outside"
    return [
        f"orientation: {facts['orientation']} (axes permuted and flipped, never interpolated)",
        f"spacing: {p['spacing_mm']:g} mm, isotropic",
        f"crop: {crop}",
        f"values: {scaling}; result in [0, 1]",
        f"read as: {intensity['taken_for'] or 'not known'} ({intensity['rule']})",
    ]


def preparation_differences(seen: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> list[str]:
    """Return in what the volumes that a task or an image gives are prepared otherwise than those the weights saw.

    Spacing, scaling and orientation. An offset is a fact of how a data set is stored, and a crop of what an image shows:
    they differ between data sets without a difference in what a voxel of a given value and size means.

    Args:
        seen: of the pretraining; None: not known, and nothing is said.
        given: of what the weights are used on.
    """
    if seen is None or given is None:
        return []
    found = []
    first, second = (facts["parameters"]["spacing_mm"] for facts in (seen, given))
    if abs(first - second) > SPACING_TOLERANCE_MM:
        found.append(f"voxels of {second:g} mm, pretrained on {first:g} mm")
    first, second = (facts["intensity"]["scaling"] for facts in (seen, given))
    if first != second:
        found.append(f"values scaled by {second}, pretrained on {first}")
    if seen["orientation"] != given["orientation"]:
        found.append(f"axes {given['orientation']}, pretrained on {seen['orientation']}")
    return found
