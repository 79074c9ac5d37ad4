"""The layout of BIDS."""

from __future__ import annotations

import re
from pathlib import Path

from ssl3d.data.cohort import Case, Dataset, layout_error, open_root, read_table
from ssl3d.data.files.entries import walk
from ssl3d.data.layouts.common import _by_id
from ssl3d.errors import DataError


class BIDS(Dataset):
    """Anatomical MR in the Brain Imaging Data Structure (bids-specification.readthedocs.io).

    Every ``anat`` image of a known suffix is a case, the person its subject. A segmentation is
    ``<same entities>_dseg``, with or without a ``desc``, beside the image or in
    ``derivatives/<pipeline>``; it belongs to the first contrast of a session in the order of
    :attr:`suffixes`. Names of its values are read from ``*_dseg.tsv`` (columns ``index``, ``name``).
    """

    name = "bids"
    subjects_known = True
    summary = "BIDS: anatomical MR (T1w and friends), dseg segmentations"
    layout = "sub-<id>/[ses-<id>/]anat/sub-<id>_T1w.nii.gz, derivatives/<pipeline>/sub-<id>/anat/sub-<id>_dseg.nii.gz"
    modality = "mr"
    suffixes = ("T1w", "T2w", "FLAIR", "PDw", "T2starw", "inplaneT1", "inplaneT2", "UNIT1", "T1map", "T2map")

    def open(self, root: Path, labels: bool = True) -> Dataset:
        root = open_root(root, self.layout)
        below = walk(root / "derivatives").files if labels and (root / "derivatives").is_dir() else []
        tables = sorted({*root.glob("*dseg.tsv"), *(p for p in below if p.name.endswith("dseg.tsv"))})
        if not tables or not labels:
            return self
        names: dict[int, str] = {}
        for line, row in enumerate(read_table(tables[0], "\t")[1], start=2):
            try:
                names[int(row["index"])] = row["name"]
            except (KeyError, TypeError, ValueError):
                fix = "give the columns index (whole number) and name"
                raise DataError(f"{tables[0]}, line {line}: no index or name. Fix: {fix}.") from None
        names.pop(0, None)
        return self.with_facts(label_values=dict(sorted(names.items())))

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        ending = re.compile(rf"_({'|'.join(self.suffixes)})(?i:\.nii(\.gz)?)$")
        images = [path for pattern in ("sub-*/anat/*", "sub-*/ses-*/anat/*") for path in root.glob(pattern)]
        images = sorted(path for path in images if ending.search(path.name))
        if not images:
            raise layout_error(root, self, "there is no anatomical image below sub-*/.")
        cases, given = [], set()
        for image in sorted(images, key=lambda path: self.suffixes.index(ending.search(path.name)[1])):  # type: ignore[index]
            entities = ending.sub("", image.name)
            label = self._dseg(root, image.parent.relative_to(root), entities)
            if label in given:
                label = None  # it lies on the grid of the first contrast
            elif label:
                given.add(label)
            case_id = ending.sub(r"_\1", image.name)
            cases.append(Case(id=case_id, subject=image.relative_to(root).parts[0], image=image, label=label))
        return _by_id(cases)

    def _dseg(self, root: Path, folder: Path, entities: str) -> Path | None:
        pattern = re.compile(rf"{re.escape(entities)}(_desc-[^_]+)?_dseg(?i:\.nii(\.gz)?)$")
        places = [root / folder, *sorted(path / folder for path in root.glob("derivatives/*"))]
        found = sorted(
            path for place in places for path in place.glob("*_dseg.*") if pattern.match(path.name)
        )
        if len(found) > 1:
            raise DataError(
                f"{entities} has {len(found)} segmentations: {', '.join(map(str, found))}. Fix: keep one of them."
            )
        return found[0] if found else None
