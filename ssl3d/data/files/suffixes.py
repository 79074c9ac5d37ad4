"""Suffixes of volume files."""

from __future__ import annotations

from pathlib import Path

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
"""Endings of the files that are read as volumes (lower case)."""


def image_suffix(path: Path) -> str | None:
    """Return which of :data:`IMAGE_SUFFIXES` the name ends in, or None.

    >>> image_suffix(Path("a/b.NII.gz"))
    '.nii.gz'
    """
    name = path.name.lower()
    return next((suffix for suffix in IMAGE_SUFFIXES if name.endswith(suffix)), None)
