"""The layouts that ssl3d reads: four official releases and a plain folder of volumes.

The phantom cohorts are written in these very layouts, so that they take the road of real data.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ssl3d.data.cohort import (
    Case,
    Dataset,
    Subset,
    incomplete_error,
    layout_error,
    natural_key,
    open_root,
    read_table,
)
from ssl3d.data.files.dicom import is_dicom, not_a_scan, series_of
from ssl3d.data.files.entries import LeftOut, leads_nowhere, walk
from ssl3d.data.files.suffixes import IMAGE_SUFFIXES, image_suffix
from ssl3d.errors import DataError, count
from ssl3d.remedies import FETCH

logger = logging.getLogger(__name__)

_DETACHED_SUFFIXES = (".raw", ".zraw", ".raw.gz")  # voxels that an .mhd or .nhdr header points to
_LABEL_FOLDERS = {"labelstr", "labelsts", "labelsva"}  # of nnU-Net and the Decathlon, in lower case
_LABEL_NAME = re.compile(r"(^|[_.-])(d?seg|segmentation|labels?|masks?)$", re.IGNORECASE)


def _folders(path: Path, root: Path) -> list[str]:
    """Return the names of the folders of a file below ``root``, in lower case."""
    return [part.lower() for part in path.relative_to(root).parts[:-1]]


def _by_id(cases: list[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: natural_key(case.id))


class MMWHS(Dataset):
    """MM-WHS 2017, the CT half (Zhuang et al., Medical Image Analysis 2019): 20 + 40 cardiac CTs.

    Values are HU. The labels of the test images are not public; where a file exists it is used.
    """

    name = "mmwhs"
    subjects_known = True
    summary = "MM-WHS 2017: cardiac CT, 7 heart structures"
    layout = (
        "ct_train/ct_train_1001_image.nii.gz, ct_train/ct_train_1001_label.nii.gz, "
        "ct_test/ct_test_2001_image.nii.gz"
    )
    modality = "ct"
    intensity_offset = 1024.0
    label_values: ClassVar[Mapping[int, str]] = {
        500: "left ventricle",
        600: "right ventricle",
        420: "left atrium",
        550: "right atrium",
        205: "myocardium",
        820: "aorta",
        850: "pulmonary artery",
    }
    label_aliases: ClassVar[Mapping[int, int]] = {421: 420}  # one file of the release holds 421 for 420

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        cases, problems = [], []
        subsets: tuple[Subset, ...] = ("train", "test")
        for subset in subsets:
            folder = root / f"ct_{subset}"
            images = sorted(folder.glob(f"ct_{subset}_*_image.nii.gz"))
            for image in images:
                case_id = image.name.removesuffix("_image.nii.gz")
                label = folder / f"{case_id}_label.nii.gz"
                if subset == "train" and not label.is_file():
                    problems.append(f"{image} has no {label.name} beside it")
                cases.append(Case(
                    id=case_id, subject=case_id.rsplit("_", 1)[1], image=image,
                    label=label if label.is_file() else None, subset=subset,
                ))  # fmt: skip
            known = {image.name.replace("_image", "_label") for image in images}
            orphans = sorted(p for p in folder.glob(f"ct_{subset}_*_label.nii.gz") if p.name not in known)
            problems += [f"{orphan} has no image beside it" for orphan in orphans]
        if not any(case.subset == "train" for case in cases):
            raise layout_error(root, self, "there is no image in ct_train/.")
        if problems:
            raise incomplete_error(self, problems, "copy the missing files, or remove the ones left alone.")
        return _by_id(cases)


class ASOCA(Dataset):
    """ASOCA 2020 (Gharleghi et al., 2022): coronary arteries in 40 cardiac CT angiographies.

    Values are stored with air at 0, so nothing is added.
    """

    name = "asoca"
    subjects_known = True
    summary = "ASOCA 2020: cardiac CT angiography, coronary arteries"
    layout = "Normal/CTCA/Normal_1.nrrd, Normal/Annotations/Normal_1.nrrd, and the same in Diseased/"
    modality = "ct"
    intensity_offset = 0.0
    label_values: ClassVar[Mapping[int, str]] = {1: "coronary arteries"}

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        cases, problems = [], []
        for group in ("Normal", "Diseased"):
            images = sorted((root / group / "CTCA").glob(f"{group}_*.nrrd"))
            for image in images:
                label = root / group / "Annotations" / image.name
                if not label.is_file():
                    problems.append(f"{image} has no annotation {label}")
                cases.append(Case(id=image.stem, subject=image.stem, image=image, label=label))
            known = {image.name for image in images}
            annotations = sorted((root / group / "Annotations").glob("[!.]*.nrrd"))
            orphans = [label for label in annotations if label.name not in known]
            problems += [f"{orphan} has no image in {group}/CTCA" for orphan in orphans]
        if not cases:
            raise layout_error(root, self, "there is no image in Normal/CTCA/ or Diseased/CTCA/.")
        if problems:
            raise incomplete_error(self, problems, "copy the missing files, or remove the ones left alone.")
        return _by_id(cases)


_STRUCTURES = {
    "cerebral white matter": (2, 41),
    "cerebral cortex": (3, 42),
    "lateral ventricle": (4, 43),
    "inferior lateral ventricle": (5, 44),
    "cerebellum white matter": (7, 46),
    "cerebellum cortex": (8, 47),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "accumbens": (26, 58),
    "ventral diencephalon": (28, 60),
}
_LEFT = {left: f"left {name}" for name, (left, _) in _STRUCTURES.items()}
_RIGHT = {right: f"right {name}" for name, (_, right) in _STRUCTURES.items()}


class CANDI(Dataset):
    """CANDI Share (Kennedy et al., Neuroinformatics 2012): 103 T1 MRs of children.

    28 of the structures are targets, in 14 left/right pairs; every other value of the CMA colour
    table (below 86: third and fourth ventricle 14, 15, brain stem 16, CSF 24, ...) is background.
    """

    name = "candi"
    subjects_known = True
    summary = "CANDI: T1 brain MR, 28 structures in left/right pairs"
    layout = "HC_001/HC_001_procimg.nii.gz, HC_001/HC_001_seg.nii.gz (BPDwithPsy, BPDwithoutPsy, HC, SS)"
    modality = "mr"
    intensity_offset = 0.0
    label_values = _LEFT | _RIGHT
    ignored_label_values = frozenset(range(1, 86)) - frozenset(_LEFT) - frozenset(_RIGHT)
    groups = ("BPDwithPsy", "BPDwithoutPsy", "HC", "SS")

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        cases, problems = [], []
        for group in self.groups:
            for folder in sorted(path for path in root.glob(f"{group}_*") if path.is_dir()):
                image, label = (folder / f"{folder.name}_{kind}.nii.gz" for kind in ("procimg", "seg"))
                problems += [f"{path} is missing" for path in (image, label) if not path.is_file()]
                cases.append(Case(id=folder.name, subject=folder.name, image=image, label=label))
        if not cases:
            raise layout_error(root, self, "there is no folder <group>_<id>.")
        if problems:
            raise incomplete_error(self, problems, "copy the missing files, or remove these folders.")
        return _by_id(cases)


class STOIC(Dataset):
    """STOIC 2021 (Revel et al., Radiology 2021): 2,000 public chest CTs, COVID-19 yes or no.

    Values are HU. The target is ``probCOVID``; ``probSevere`` is not used.
    """

    name = "stoic"
    subjects_known = True
    summary = "STOIC 2021: chest CT, COVID-19 yes/no"
    layout = "data/mha/<PatientID>.mha, metadata/reference.csv (PatientID, probCOVID, probSevere)"
    modality = "ct"
    intensity_offset = 1024.0
    target_names: ClassVar[Mapping[int, str]] = {0: "no COVID-19", 1: "COVID-19"}

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        images = sorted((root / "data" / "mha").glob("[!.]*.mha"))
        table = root / "metadata" / "reference.csv"
        if not images:
            raise layout_error(root, self, "there is no .mha file in data/mha/.")
        if not table.is_file():
            raise layout_error(root, self, "metadata/reference.csv is missing.")
        targets = self._targets(table)
        problems = [f"{image} has no row in {table}" for image in images if image.stem not in targets]
        if problems:
            raise incomplete_error(self, problems, "add the rows, or remove the images.")
        without_image = len(targets.keys() - {image.stem for image in images})
        if without_image:
            logger.warning("stoic: %d rows of %s have no image and are left out", without_image, table)
        return _by_id([Case(id=i.stem, subject=i.stem, image=i, target=targets[i.stem]) for i in images])

    def _targets(self, table: Path) -> dict[str, int]:
        """Read PatientID -> probCOVID.

        Raises:
            DataError: a missing column, a value that is not 0 or 1, or a patient listed twice.
        """
        targets: dict[str, int] = {}
        columns, rows = read_table(table)
        missing = {"PatientID", "probCOVID"} - set(columns)
        if missing:
            raise DataError(
                f"{table} has no column {' and '.join(sorted(missing))}; "
                f"its columns are {', '.join(columns)}. Fix: use the release's own file."
            )
        for line, row in enumerate(rows, start=2):
            patient, text = (row["PatientID"] or "").strip(), (row["probCOVID"] or "").strip()
            if text not in {"0", "1", "0.0", "1.0"}:
                raise DataError(f"{table}, line {line}: probCOVID is {text!r}. Fix: write 0 or 1.")
            if patient in targets:
                raise DataError(f"{table}, line {line}: {patient} is listed twice. Fix: keep one row.")
            targets[patient] = int(float(text))
        return targets


class Folder(Dataset):
    """Any folder of volumes, for pretraining: every NIfTI, NRRD, MetaImage and DICOM series is a case.

    Links are followed. Each file or series is a subject of its own, unless there is a subject pattern; several series
    in one folder are told apart by their unique ids. Left out, and named: files of other kinds, hidden files, and files
    whose name says that they are segmentations (``..._seg``, ``..._label``, ``..._mask``). A file with an image's
    ending that cannot be read, or a link that leads nowhere, is an error.

    Modality and offset are found from the values when the cohort is prepared: CT in HU where the
    median over the files of the first percentile is below -200 (then 1024 is added), else each
    volume is scaled from its minimum to its maximum. Which one it was is in the manifest.
    """

    name = "folder"
    summary = "any folder of NIfTI, NRRD, MetaImage or DICOM volumes, for pretraining"
    layout = f"volumes that end in {', '.join(IMAGE_SUFFIXES)}, or DICOM series, at any depth"
    modality = "auto"
    intensity_offset = "auto"

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        images, series, left_out = self.sort_out(root)
        if not images and not series:
            raise self._nothing_error(root, left_out)
        cases: dict[str, Case] = {}
        for path in images:
            name = path.relative_to(root).as_posix()
            case_id = name[: -len(image_suffix(path) or "")]
            if case_id in cases:
                raise DataError(
                    f"{cases[case_id].image} and {path} have the same name. "
                    "Fix: keep one of them, or rename one if they are different images."
                )
            cases[case_id] = Case(id=case_id, subject=case_id, image=path)
        for case_id, path in series.items():
            cases[case_id] = Case(id=case_id, subject=case_id, image=path)
        return _by_id(list(cases.values()))

    def left_out(self, root: Path) -> list[LeftOut]:
        return self.sort_out(open_root(root, self.layout))[2]

    def _nothing_error(self, root: Path, left_out: Sequence[LeftOut]) -> DataError:
        paths = [entry.path for entry in left_out]
        endings = sorted({image_suffix(path) or path.suffix or path.name for path in paths})
        found = (
            f"{count(len(paths), 'entry', 'entries')} ending in {', '.join(endings[:8])}"
            if paths
            else "empty folders"
        )
        headless = [
            path for path in paths if path.suffix.lower() == ".dcm" and path.is_file() and not is_dicom(path)
        ]
        hint = " The .dcm files have no DICOM header: convert them with dcm2niix." * bool(headless)
        if any(image_suffix(path) for path in paths):
            hint += (
                " Hidden files are left out, and ..._seg, ..._label, ..._mask and labelsTr as segmentations."
            )
        reasons = list(dict.fromkeys(f"{entry.path.name} {entry.reason}" for entry in left_out))
        hint += f" ({'; '.join(reasons[:5])}{'; ...' * (len(reasons) > 5)})" * bool(reasons)
        return DataError(
            f"{root} holds no volume: found {found}. Fix: give a folder with {self.layout}.{hint}"
        )

    @staticmethod
    def sort_out(root: Path) -> tuple[list[Path], dict[str, Path], list[LeftOut]]:
        """Return images (and links to some that are not there), DICOM series (id -> first slice), and the rest.

        Voxel files of detached headers and the other slices of a series are none of these.
        """
        tree = walk(root)
        images: list[Path] = []
        others: list[LeftOut] = list(tree.left_out)
        slices: set[Path] = set()
        for path in (*tree.files, *tree.dangling):
            suffix, lost = image_suffix(path), leads_nowhere(path)
            if path.name.startswith("."):
                others.append(LeftOut(path, "is a hidden file"))
            elif suffix is not None and _LABEL_NAME.search(path.name[: -len(suffix)]):
                others.append(LeftOut(path, "is named as a segmentation"))
            elif suffix is not None and not lost and _LABEL_FOLDERS & set(_folders(path, root)):
                others.append(
                    LeftOut(path, "lies in a folder of segmentations; nnunet and msd read such layouts")
                )
            elif suffix is not None:
                images.append(path)
            elif lost:
                others.append(LeftOut(path, lost, FETCH() if _may_be_dicom(path) else None))
            elif is_dicom(path):
                slices.add(path)
            else:
                others.append(LeftOut(path, "is not of a format that is read"))
        if any(image_suffix(path) in {".mhd", ".nhdr"} for path in images):
            others = [left for left in others if not left.path.name.lower().endswith(_DETACHED_SUFFIXES)]
        series: dict[str, Path] = {}
        for folder in sorted({path.parent for path in slices}):
            found = list(series_of(folder).values())
            slices -= {path for files in found for path in files}
            name = folder.relative_to(root).as_posix() if folder != root else root.name
            for number, files in enumerate(found, start=1):
                series[name if len(found) == 1 else f"{name}/series{number}"] = files[0]
        for path in slices:  # what has the preamble but belongs to no series
            kind = not_a_scan(path)
            others.append(
                LeftOut(path, f"is {kind}, not a scan" if kind else "is DICOM, but no slice of a series")
            )
        return sorted(images), series, sorted(others)


def _may_be_dicom(path: Path) -> bool:
    """Whether a file that is not there may have been a slice: by its ending, or because it has none."""
    return path.suffix.lower() in {"", ".dcm", ".dicom", ".ima"} or path.suffix[1:].isdigit()


BUILTIN_DATASETS: tuple[Dataset, ...] = (MMWHS(), ASOCA(), CANDI(), STOIC(), Folder())
