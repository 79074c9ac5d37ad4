"""What a volume is taken for: CT in HU, CT with air at 0, or something else; and the offset between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.findings import Finding
from ssl3d.errors import are, count
from ssl3d.remedies import MODALITY, NO_CT, OFFSET, TWO_CTS, TWO_KINDS

if TYPE_CHECKING:
    from ssl3d.data.files.volume import Volume


HU_AIR_BELOW = -200.0
"""First percentile below which values are taken for CT in HU."""


HU_OFFSET = 1024.0
"""What is added to HU."""


AIR_RANGE = (-300.0, 300.0)
"""Where air must be in a CT after the offset is added."""


TISSUE_RANGE = (700.0, 1700.0)
"""Where soft tissue and contrast-filled blood must be in a CT after the offset is added."""


LEAST_TISSUE = 0.01
"""Smallest part of the voxels in :data:`TISSUE_RANGE` where there is air."""


LEAST_TISSUE_ALONE = 0.8
"""Smallest part of the voxels in :data:`TISSUE_RANGE` where there is none: a volume cut inside the body."""


_SOFT, _FLANK = (
    (900.0, 1150.0),
    (500.0, 800.0),
)  # the peak of soft tissue and fat, and what lies darker than it


@dataclass(frozen=True)
class Fit:
    """How well a volume looks like CT after an offset was added (see :func:`fit_offset`).

    Attributes:
        air: the first percentile, padding left out.
        tissue: the part of the voxels in :data:`TISSUE_RANGE`.
        below: the part of the voxels below 0, which become 0; padding left out.
        by: what fits: "air" (and tissue), "tissue" (there is no air), or "" (nothing).
    """

    air: float
    tissue: float
    below: float
    by: Literal["air", "tissue", ""]


def fit_offset(values: np.ndarray, offset: float) -> Fit:
    """Return whether stored values plus ``offset`` are those of CT with air near 0 and water near 1000.

    Where there is air, the first percentile (without a padding constant below air: scanners write -2000, -2048 or
    -3024 outside their circle) lies in :data:`AIR_RANGE`, and there is soft tissue: at least 1 % of the voxels lie in
    :data:`TISSUE_RANGE`, and as a peak, not as the tail of what is darker (which bone is, in a volume in HU to
    which nothing was added).

    A volume cut inside the body has no air: nearly all of it lies in :data:`TISSUE_RANGE`. Values of which many
    are near the smallest, which is 0, are those of MR with its background; and values that have air and tissue
    where they belong with an offset 1024 smaller are not without air.

    Args:
        values: stored values (N,), for example of :func:`subsample`.
        offset: what is added.
    """
    inside = _without_padding(values, offset)
    shifted = inside + np.float32(offset)
    air, tissue = float(np.percentile(shifted, 1)), _part(shifted, TISSUE_RANGE)
    by: Literal["air", "tissue", ""] = ""
    if AIR_RANGE[0] <= air <= AIR_RANGE[1]:
        peak, flank = (_part(shifted, span) / (span[1] - span[0]) for span in (_SOFT, _FLANK))
        by = "air" if tissue >= LEAST_TISSUE and peak >= 0.5 * flank else ""
    elif air > AIR_RANGE[1] and tissue >= LEAST_TISSUE_ALONE and not _has_dark_background(inside):
        by = "" if fit_offset(values, offset - HU_OFFSET).by == "air" else "tissue"
    return Fit(air, tissue, float((shifted < 0).mean()), by)


def _without_padding(values: np.ndarray, offset: float) -> np.ndarray:
    smallest = values.min()
    outside = values == smallest
    padded = smallest + offset < AIR_RANGE[0] and outside.mean() > 0.005 and not outside.all()
    return values[~outside] if padded else values


def _part(values: np.ndarray, span: tuple[float, float]) -> float:
    return float(((values >= span[0]) & (values <= span[1])).mean())


def _has_dark_background(values: np.ndarray) -> bool:
    """Whether nothing is negative and a tenth of the voxels are near 0: magnitudes with a background, as in MR."""
    return bool(values.min() > -1 and (values <= 0.1 * np.percentile(values, 99)).mean() >= 0.1)


def likely_offset(values: np.ndarray) -> float | None:
    """Return which of the usual offsets, 1024 (stored in HU) and 0 (air at 0), fits; air counts more than tissue."""
    fits = {offset: fit_offset(values, offset).by for offset in (HU_OFFSET, 0.0)}
    return next((offset for by in ("air", "tissue") for offset in fits if fits[offset] == by), None)


def check_offset(image: Volume, dataset: Dataset, offset: float) -> list[Finding]:
    """Check that adding ``offset`` to a CT puts air near 0, if there is any, and tissue near 1000."""
    values = subsample(image.data)
    fit = fit_offset(values, offset)
    if fit.by:
        return []
    problem = (
        f"does not look like CT with offset {offset:g}: after adding it, air (1st percentile) is at "
        f"{fit.air:.0f}, expected {AIR_RANGE[0]:.0f} to {AIR_RANGE[1]:.0f} where there is air, {fit.tissue:.0%} of the "
        f"voxels are soft tissue ({TISSUE_RANGE[0]:.0f} to {TISSUE_RANGE[1]:.0f}), and {fit.below:.0%} would be cut off "
        "below 0"
    )
    likely = likely_offset(values)
    if likely is None:
        return [Finding(image.path, problem, NO_CT())]
    return [Finding(image.path, problem, OFFSET(likely=f"{likely:g}", layout=dataset.name))]


def check_not_hu(image: Volume, dataset: Dataset) -> list[Finding]:
    """Check that an MR is not a CT in HU: magnitudes are not far below zero."""
    darkest = float(np.percentile(subsample(image.data), 1))
    if darkest >= HU_AIR_BELOW:
        return []
    problem = f"does not look like MR: its first percentile is {darkest:.0f}, as in a CT in HU"
    return [Finding(image.path, problem, MODALITY())]


Kind = Literal["CT in HU", "CT with air at 0", "not CT in HU"]


@dataclass(frozen=True)
class Verdict:
    """What one volume was taken for.

    Attributes:
        kind: the kind; None for one that is said to be CT and looks like none.
        darkest: its first percentile, in stored units.
        by: "air" or "tissue", see :class:`Fit`; "" where it is no CT.
    """

    kind: Kind | None
    darkest: float
    by: str


def judge(values: np.ndarray, is_ct: bool) -> Verdict:
    """Say what a volume is, by its values alone.

    Args:
        values: stored values (N,).
        is_ct: the user or the data say that it is CT. If not, one without air is taken for CT in HU only where
            values below 0 show that they have a unit: fat and noise in HU are negative, magnitudes of MR are not.
    """
    darkest = float(np.percentile(values, 1))
    if is_ct:
        likely = likely_offset(values)
        if likely is None:
            return Verdict(None, darkest, "")
        return Verdict(
            "CT in HU" if likely == HU_OFFSET else "CT with air at 0", darkest, fit_offset(values, likely).by
        )
    fit = fit_offset(values, HU_OFFSET)
    # Fat below 0 among values that vary by more than those of a standardised MR, or a corner with some air.
    has_unit = (darkest <= -10 and values.std() >= 8) or (values < HU_AIR_BELOW).mean() >= 1e-4
    if darkest < HU_AIR_BELOW or (fit.by == "tissue" and has_unit):
        return Verdict("CT in HU", darkest, fit.by)
    return Verdict("not CT in HU", darkest, "")


def judge_cohort(verdicts: Mapping[Case, Verdict], is_ct: bool) -> tuple[Kind, dict[Case, list[Finding]]]:
    """Say what a cohort is taken for: what most of its volumes are; the others are findings.

    Args:
        verdicts: of every case that could be read; at least one.
        is_ct: as in :func:`judge`.

    Returns:
        The kind, and the findings of the cases that are of another; the first of them lists which are which.
    """
    kinds: dict[Kind, list[Case]] = {}
    for case, verdict in verdicts.items():
        if verdict.kind is not None:
            kinds.setdefault(verdict.kind, []).append(case)
    order: tuple[Kind, ...] = ("CT in HU", "CT with air at 0", "not CT in HU")
    kind = max(kinds, key=lambda k: (len(kinds[k]), -order.index(k))) if kinds else order[0]
    findings: dict[Case, list[Finding]] = {}
    for case, verdict in verdicts.items():
        if verdict.kind is None:
            problem = (
                f"does not look like CT: its first percentile is {verdict.darkest:.4g}, and neither 1024 nor 0 added "
                "puts air and tissue where they belong"
            )
            findings[case] = [Finding(case.image, problem, NO_CT())]
        elif verdict.kind != kind:
            other = verdicts[kinds[kind][0]]
            problem = (
                f"is {verdict.kind} (first percentile {verdict.darkest:.4g}), but {len(kinds[kind])} of the "
                f"{count(len(verdicts), 'volume')} {are(len(kinds[kind]))} {kind} (for example {kinds[kind][0].image}: "
                f"{other.darkest:.4g})"
            )
            fix = TWO_CTS() if is_ct else TWO_KINDS()
            if len(kinds) > 1 and not findings:
                lists = "; ".join(f"{k}: {_names(kinds[k])}" for k in order if k in kinds)
                problem += f"; two kinds in one cohort: {lists}"
            findings[case] = [Finding(case.image, problem, fix)]
    return kind, findings


def _names(cases: Sequence[Case], limit: int = 50) -> str:
    more = f" and {len(cases) - limit} more" if len(cases) > limit else ""
    return ", ".join(case.image.name for case in cases[:limit]) + more


def subsample(data: np.ndarray, size: int = 1_000_000) -> np.ndarray:
    """Return ``size`` values of the volume, or all if it has no more: (N,); always the same ones."""
    flat = data.ravel(order="K")  # no copy, whatever the order of the axes in memory
    if flat.size <= size:
        return flat
    # Not every n-th: a step that divides the last axis would see a single slice.
    return flat[np.random.default_rng(0).integers(0, flat.size, size)]
