"""What ``ssl3d data verify`` says of a cohort: findings, a fingerprint of the good cases, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl3d.data.checks.case import Examined, examine_cases
from ssl3d.data.checks.intensity import judge_cohort, subsample
from ssl3d.data.checks.scans import KeptScans
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.findings import MAX_BYTES, Finding
from ssl3d.errors import count
from ssl3d.files import write_bytes
from ssl3d.parallel import Progress
from ssl3d.remedies import ABSENT

if TYPE_CHECKING:
    from ssl3d.data.files.volume import Volume

THUMBNAIL = 96
"""Largest edge of the slices that are kept for the picture, in voxels."""

PICTURE_CASES = 24
"""Cases in the picture, evenly spread over the cohort."""


@dataclass(frozen=True, eq=False)
class Facts:
    """Measurements of one good case.

    Attributes:
        shape: (D, H, W) after reorientation to RAS+.
        spacing_mm: along each of these axes.
        intensities: minimum, percentiles 1, 50 and 99, and maximum, in stored units.
        volumes_ml: structure -> volume in millilitres; absent structures are left out.
        slice_image, slice_label: the central axial slice (where there is a label, through its middle):
            (W, H) float32 in [0, 1] and uint8, for the picture.
        slice_mm: (height, width) of the slice.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    intensities: tuple[float, float, float, float, float]
    volumes_ml: dict[str, float]
    slice_image: np.ndarray
    slice_label: np.ndarray
    slice_mm: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """The result of :func:`verify`.

    Attributes:
        dataset: its name.
        examined: every case, with its findings and :class:`Facts`.
        absent: what ought to be there and is no case: entries that cannot be read, fewer cases than the data promise,
            structures and classes that no case has.
        class_names: class -> name, where there are names.
        taken_for: what the volumes were taken for: modality, offset, and how that was decided; "" where no volume
            could be read.
    """

    dataset: str
    examined: list[Examined[Facts]]
    absent: tuple[Finding, ...]
    class_names: Mapping[int, str]
    taken_for: str = ""

    @property
    def findings(self) -> list[Finding]:
        """All findings, by case, those of the whole cohort last; each once."""
        found = [finding for one in self.examined for finding in one.findings]
        return list(dict.fromkeys([*found, *self.absent]))

    @property
    def good(self) -> dict[Case, Facts]:
        """The cases without a finding."""
        return {e.case: e.measured for e in self.examined if not e.findings and e.measured is not None}

    def skipped(self) -> list[dict[str, str]]:
        """Return the bad cases for a record: ``id``, ``path``, ``problem``, ``fix`` of every finding."""
        return [
            {"id": one.case.id, **{k: str(v) for k, v in asdict(finding).items()}}
            for one in self.examined
            for finding in one.findings
        ]

    def fingerprint(self) -> dict[str, Any]:
        """Return the summary of the good cases: ranges and medians of what was measured."""
        facts = list(self.good.values())
        if not facts:
            return {"dataset": self.dataset, "cases": 0}
        names = list(dict.fromkeys(name for f in facts for name in f.volumes_ml))
        structures = {name: [f.volumes_ml[name] for f in facts if name in f.volumes_ml] for name in names}
        classes: dict[str, int] = {}
        for case in self.good:
            for known in _classes(case):
                name = self.class_names.get(known, str(known))
                classes[name] = classes.get(name, 0) + 1
        values = [case.value for case in self.good if case.value is not None]
        return {
            "dataset": self.dataset,
            "taken_for": self.taken_for,
            "cases": len(facts),
            "subjects": len({case.subject for case in self.good}),
            "labelled": sum(case.labelled for case in self.good),
            "subsets": {
                s: n for s in ("train", "val", "test") if (n := sum(c.subset == s for c in self.good))
            },
            "shape": _ranges(np.array([f.shape for f in facts])),
            "spacing_mm": _ranges(np.array([f.spacing_mm for f in facts])),
            "size_mm": _ranges(np.array([np.multiply(f.shape, f.spacing_mm) for f in facts])),
            "intensity": dict(
                zip(
                    ("minimum", "p1", "median", "p99", "maximum"),
                    (_range(column) for column in np.array([f.intensities for f in facts]).T),
                    strict=True,
                )
            ),
            "volume_ml": {name: {"cases": len(v), **_range(np.array(v))} for name, v in structures.items()},
            "classes": dict(sorted(classes.items())),
            "value": _range(np.array(values)) if values else None,
        }


def _classes(case: Case) -> tuple[int, ...]:
    if case.classes is not None:
        return case.classes
    return () if case.target is None else (case.target,)


def _range(values: np.ndarray) -> dict[str, float]:
    low, middle, high = (float(np.round(v, 4)) for v in np.quantile(values, (0, 0.5, 1)))
    return {"min": low, "median": middle, "max": high}


def _ranges(rows: np.ndarray) -> dict[str, list[float]]:
    """Return minimum, median and maximum of every column of (N, 3)."""
    low, middle, high = np.round(np.quantile(rows, (0, 0.5, 1), axis=0), 4).tolist()
    return {"min": low, "median": middle, "max": high}


def verify(
    cases: Sequence[Case],
    dataset: Dataset,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    max_bytes: int = MAX_BYTES,
    left_out: Sequence[Finding] = (),
    twins: bool = True,
) -> Report:
    """Read every file once, in parallel, and say everything that is wrong.

    Args:
        cases: the cases of one cohort.
        dataset: its adapter.
        workers: threads; None: one a core, 4 at most.
        progress: told about every case.
        max_bytes: largest volume allowed, in bytes as float32.
        left_out: what is wrong with entries that are no case (:func:`ssl3d.data.layouts.listing.list_cases`).
        twins: also look for one scan under several subjects, resampled or changed in its values.
    """
    with TemporaryDirectory(prefix="ssl3d-scans-") as folder:
        kept = KeptScans(Path(folder))

        def measure(image: Volume, label: Volume | None) -> Facts:
            if twins:
                kept.keep(image)
            return _measure(image, label, dataset)

        examined = examine_cases(
            cases, dataset, measure, workers=workers, progress=progress, max_bytes=max_bytes
        )
        found = kept.find([one.case for one in examined if not one.findings], progress)
    examined = [replace(one, findings=one.findings + tuple(found.get(one.case, ()))) for one in examined]
    absent = (*left_out, *_absent(examined, dataset))
    return Report(dataset.name, examined, absent, dataset.target_names, _taken_for(examined, dataset))


def _taken_for(examined: Sequence[Examined[Facts]], dataset: Dataset) -> str:
    """Return what the preparation will take the volumes for; see ``Intensity.taken_for``."""
    if dataset.modality == "mr":
        return "MR (as the data set says): each volume is scaled from its minimum to its maximum"
    declared, is_ct = dataset.intensity_offset, dataset.modality == "ct"
    if is_ct and declared != "auto":
        return f"CT, offset {declared:g} (as the data set or the user says)"
    verdicts = {one.case: one.verdict for one in examined if one.verdict is not None}
    if not verdicts:
        return ""
    kind, _ = judge_cohort(verdicts, is_ct)
    alone = sum(verdict.by == "tissue" and verdict.kind == kind for verdict in verdicts.values())
    by = f"by their values; {count(alone, 'volume')} without air, by tissue" if alone else "by their values"
    if kind != "not CT in HU":
        return f"{kind} ({by})"
    return (
        f"{kind} ({by}): each volume is scaled from its minimum to its maximum; if they are CT without air, say so "
        f"(--offset 1024 if they are in HU, --set data.intensity_offset.{dataset.name}=1024 for pretrain and bench)"
    )


def _absent(examined: Sequence[Examined[Facts]], dataset: Dataset) -> list[Finding]:
    """Return a finding for every structure that no good label holds, and every class without a case."""
    labelled = [one for one in examined if one.case.label is not None and one.measured is not None]
    seen = {name for one in labelled if one.measured for name in one.measured.volumes_ml}
    targets = {known for one in examined for known in _classes(one.case)}
    missing = [n for n in dict.fromkeys(dataset.label_values.values()) if labelled and n not in seen]
    empty = [n for k, n in dataset.target_names.items() if k not in targets]
    root = Path(*_common(examined))
    fix = ABSENT()
    return [Finding(root, f'holds no label with the structure "{name}"', fix) for name in missing] + [
        Finding(root, f'holds no case of the class "{name}"', fix) for name in empty
    ]


def _common(examined: Sequence[Examined[Facts]]) -> list[str]:
    """Return the parts of the folder that all images lie in."""
    folders = [one.case.image.parent.parts for one in examined]
    return [parts[0] for parts in zip(*folders, strict=False) if len(set(parts)) == 1]


def _measure(image: Volume, label: Volume | None, dataset: Dataset) -> Facts:
    values = subsample(image.data)
    low, middle, high = (float(v) for v in np.percentile(values, (1, 50, 99)))
    volumes: dict[str, float] = {}
    d, h, w = image.spacing_mm
    depth, labels = image.data.shape[2] // 2, None
    if label is not None:
        index, names = dataset.label_index(), dataset.label_names()
        found, counts = np.unique(label.data, return_counts=True)
        for value, voxels in zip(found.tolist(), counts.tolist(), strict=True):
            if index[value]:
                name = names[index[value] - 1]
                volumes[name] = volumes.get(name, 0.0) + voxels * d * h * w / 1000
        planes = np.flatnonzero(label.data.any(axis=(0, 1)))
        depth = int(planes[len(planes) // 2]) if len(planes) else depth
        labels = np.vectorize(index.__getitem__, otypes=[np.uint8])(label.data[:, :, depth])
    plane = image.data[:, :, depth]  # (D, H): left to right, back to front
    step = max(1, -(-max(plane.shape) // THUMBNAIL))
    grey = np.clip((plane[::step, ::step] - low) / max(high - low, 1e-6), 0, 1)
    marked = np.zeros(grey.shape, np.uint8) if labels is None else labels[::step, ::step]
    return Facts(
        (image.data.shape[0], image.data.shape[1], image.data.shape[2]),
        image.spacing_mm,
        (float(image.data.min()), low, middle, high, float(image.data.max())),
        volumes,
        grey.T[::-1, ::-1].astype(np.float32),  # front above, the patient's right on the left
        marked.T[::-1, ::-1],
        (plane.shape[1] * h, plane.shape[0] * d),
    )


def draw_mosaic(report: Report, path: Path) -> None:
    """Draw central axial slices of the good cases as PNG, labels in colour, in equal scale within a slice.

    Args:
        report: with at least one good case.
        path: where to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = list(report.good.items())
    chosen = [good[i] for i in np.unique(np.linspace(0, len(good) - 1, PICTURE_CASES).astype(int))]
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    structures = max((int(f.slice_label.max()) for _, f in chosen), default=0)
    for place, (case, facts) in enumerate(chosen, start=1):
        axes = figure.add_subplot(rows, columns, place)
        height, width = facts.slice_mm
        extent = (0.0, width, 0.0, height)  # in mm, so that anisotropic voxels keep their shape
        axes.imshow(facts.slice_image, cmap="gray", vmin=0, vmax=1, extent=extent)
        if facts.slice_label.any():
            marked = np.ma.masked_equal(facts.slice_label, 0)
            axes.imshow(
                marked,
                cmap="hsv",
                vmin=1,
                vmax=structures + 1,
                alpha=0.45,
                extent=extent,
                interpolation="none",
            )
        axes.set_title(case.id[-28:], fontsize=6)
        axes.axis("off")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())
