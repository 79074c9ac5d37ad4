"""Downstream tasks: what is predicted from which dataset, prepared and scored how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["segmentation", "classification", "multilabel", "regression"]
Metric = Literal["dsc", "auc", "macro_auc", "mae"]
Scheme = Literal["auto", "official", "random", "cv", "file"]


@dataclass(frozen=True)
class Task:
    """One column of the tables.

    Attributes:
        name: unique name on the command line.
        title: short title in tables.
        kind: ``segmentation`` (a label per voxel), ``classification`` (one of several classes per
            volume), ``multilabel`` (any of several classes) or ``regression`` (a number per volume).
        dataset: name of the registered dataset that it is evaluated on.
        metric: primary metric: ``dsc`` (mean Dice coefficient), ``auc`` (two classes), ``macro_auc``
            (mean of one class against the rest) or ``mae`` (mean absolute error).
        counts: cases for (training, validation, test) where the release has enough; None: three fifths,
            one fifth and one fifth of all.
        preparation: options of :class:`ssl3d.data.prepared.steps.Preparation`; the preset gives the spacing
            where none is given here.
        summary: one line for the listing.
        place: where the data are, unless ``--task-data`` says otherwise; None: the phantoms.
        facts: facts of the dataset that hold for this task, such as ``label_values``.
        scheme, folds: see :func:`ssl3d.data.splits.make_splits`; folds None: the preset's.
        splits_file: of nnU-Net's form, in place of splits that are made (scheme "file").
        source: text of the task file that it comes from; empty: it is registered.
    """

    name: str
    title: str
    kind: Kind
    dataset: str
    metric: Metric
    counts: tuple[int, int, int] | None
    preparation: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    place: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    scheme: Scheme = "auto"
    folds: int | None = None
    source: str = ""
    splits_file: Path | None = None


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
