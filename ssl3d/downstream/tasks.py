"""Downstream tasks: what is predicted from which dataset, prepared and scored how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Task:
    """One column of the tables.

    Attributes:
        name: unique name on the command line.
        title: short title in tables.
        kind: ``segmentation`` (a label per voxel) or ``classification`` (yes or no per volume).
        dataset: name of the registered dataset that it is evaluated on.
        metric: primary metric: ``dsc`` (mean Dice coefficient) or ``auc``.
        counts: cases for (training, validation, test) where the release has enough.
        preparation: options of :class:`ssl3d.data.prepare.Preparation` except the spacing.
        summary: one line for the listing.
    """

    name: str
    title: str
    kind: Literal["segmentation", "classification"]
    dataset: str
    metric: Literal["dsc", "auc"]
    counts: tuple[int, int, int]
    preparation: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


# He et al., CVPR 2023, supplementary material, table 2.
SHC = Task(
    "shc", "SHC", "segmentation", "mmwhs", "dsc", (15, 5, 40), {"scaling": "ct", "crop": "foreground"},
    "Segmentation of seven heart structures on cardiac CT (MM-WHS 2017)",
)  # fmt: skip
SAC = Task(
    "sac", "SAC", "segmentation", "asoca", "dsc", (15, 5, 20), {"scaling": "ct", "crop": "foreground"},
    "Segmentation of the coronary arteries on cardiac CT (ASOCA 2020)",
)  # fmt: skip
CCC = Task(
    "ccc", "CCC", "classification", "stoic", "auc", (1000, 400, 600), {"scaling": "ct", "crop": "lungs"},
    "Classification of COVID-19 on chest CT (STOIC 2021)",
)  # fmt: skip
SBM = Task(
    "sbm", "SBM", "segmentation", "candi", "dsc", (40, 20, 43),
    {"scaling": "minmax", "crop": "center", "center_mm": (160.0, 160.0, 128.0)},
    "Segmentation of 28 brain tissues on T1 MR (CANDI)",
)  # fmt: skip

BUILTIN_TASKS = (SHC, SAC, CCC, SBM)
