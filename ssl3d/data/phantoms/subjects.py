"""One subject: anatomy, deformation and appearance, a pure function of its name and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from ssl3d.data.phantoms import anatomy_heart as heart
from ssl3d.data.phantoms import brain, chest, scanner
from ssl3d.data.phantoms import geometry as g
from ssl3d.errors import ConfigError
from ssl3d.rng import numpy_rng

FloatArray = NDArray[np.floating]
Cohort = Literal["pretrain", "mmwhs", "asoca", "candi", "stoic"]
COHORTS: tuple[Cohort, ...] = ("pretrain", "mmwhs", "asoca", "candi", "stoic")

BRAIN_FOV_MM = (176.0, 176.0, 144.0)


@dataclass(frozen=True)
class PhantomParameters:
    """What decides a subject, besides its cohort and number.

    Attributes:
        edge: edge of cardiac and chest volumes in voxels.
        spacing_mm: spacing of cardiac and brain volumes; the chest's is twice that.
        seed: of the cohorts.
        profile: ``development`` has other subjects, stronger deformation and other anatomy.
        appearance_variance: scale of the differences in appearance between subjects; 0: all alike.
        isodensity: how far neighbours of like tissue (blood pools; grey, white and fluid parts of the
            brain) come to one value: at 0 each has its own, at 1 only context tells them apart.
        texture: amplitude of the texture within the tissues of heart and brain, a factor.
        vessel_width: of the coronary arteries and veins, a factor.
        lesion_size: of the radii of COVID-19 lesions, a factor.
        placement: how far heart and brain are turned and shifted in their volumes, see :func:`placed`.
        shape_modes, variants, protocols, noise, motion, metal, field_of_view, slice_mm, opacities: how patients
            and their scans differ as real ones do, see :class:`ssl3d.config.PhantomConfig`; each at its default
            leaves the cohorts as they were without it.
    """

    edge: int = 64
    spacing_mm: float = 2.4
    seed: int = 0
    profile: Literal["benchmark", "development"] = "benchmark"
    appearance_variance: float = 1.0
    isodensity: float = 0.0
    texture: float = 1.0
    vessel_width: float = 1.0
    lesion_size: float = 1.0
    placement: float = 0.0
    shape_modes: float = 0.0
    variants: float = 0.0
    protocols: float = 0.0
    noise: float = 1.0
    motion: float = 0.0
    metal: float = 0.0
    field_of_view: float = 0.0
    slice_mm: float = 0.0
    opacities: float = 0.0

    def __post_init__(self) -> None:
        if self.edge < 24:
            raise ConfigError(
                f"phantoms.edge = {self.edge}: at least 24 voxels are needed to hold the anatomy."
            )
        if self.spacing_mm <= 0:
            raise ConfigError(f"phantoms.spacing_mm = {self.spacing_mm}: give a positive spacing in mm.")


@dataclass(frozen=True)
class PhantomSubject:
    """One subject in RAS orientation.

    Attributes:
        image: stored values, (D, H, W) int16: HU for CT (HU + 1024 for asoca), arbitrary units for MR.
        labels: the release's label values (D, H, W) uint16; None for pretrain and stoic.
        target: 1 with lesions, 0 without (stoic); for asoca 1 is "Diseased"; else None.
        affine: voxel index -> RAS mm (4, 4).
        deformation: the subject's map to the atlas.
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint16] | None
    target: int | None
    affine: NDArray[np.float64]
    deformation: g.SpatialMap


def generate(cohort: Cohort, index: int, parameters: PhantomParameters) -> PhantomSubject:
    """Make subject ``index`` of ``cohort``.

    Raises:
        ConfigError: no such cohort.
    """
    makers = {"pretrain": _cardiac, "mmwhs": _cardiac, "asoca": _cardiac, "candi": _brain, "stoic": _chest}
    if cohort not in makers:
        raise ConfigError(f'No phantom cohort "{cohort}". Choose from: {", ".join(COHORTS)}.')
    return makers[cohort](cohort, index, parameters)


def deformation(rng: np.random.Generator, profile: str) -> g.SpatialMap:
    """Draw a subject's map: affine, then smooth layers that are invertible by construction."""
    strain = 0.30 if profile == "benchmark" else 0.36
    return g.SpatialMap.draw(rng, strain=strain)


TURN_RAD, SHIFT = np.pi / 4, 0.1
"""Largest angle, and largest shift along an axis as a share of the edge, of ``placement`` 1."""


def placed(
    mapping: g.SpatialMap, rng: np.random.Generator, placement: float, extent_mm: ArrayLike
) -> g.SpatialMap:
    """Return ``mapping`` of an anatomy that is turned about any axis and shifted in its volume.

    Without it, where a voxel lies tells most of what structure it is in.

    Args:
        mapping: subject to atlas.
        rng: draws axis, angle and shift.
        placement: share of ``TURN_RAD`` and ``SHIFT`` that is reached at most; 0: as it was.
        extent_mm: edges of the volume.
    """
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(
        axis / np.linalg.norm(axis) * rng.uniform(0, placement * TURN_RAD)
    ).as_matrix()
    shift = rng.uniform(-1, 1, 3) * placement * SHIFT * np.asarray(extent_mm)
    matrix = mapping.matrix @ turn
    return replace(mapping, matrix=matrix, offset=mapping.offset + matrix @ shift)


def lesion_count(index: int, parameters: PhantomParameters) -> int:
    """Return how many lesions chest ``index`` has, 0 to 6: none in every other one.

    A shuffled target would leave small cohorts unbalanced.
    """
    fewest, most = chest.LESIONS
    rng = _rng("stoic", index, parameters, "lesion count")
    return int(rng.integers(fewest, most + 1)) if index % 2 else 0


def _spread(parameters: PhantomParameters) -> float:
    """Return how far the shapes of structures vary, as a factor of the benchmark's."""
    return (1.0 if parameters.profile == "benchmark" else 1.4) * (1 + 1.5 * parameters.shape_modes)


def _rng(cohort: Cohort, index: int, parameters: PhantomParameters, stream: str) -> np.random.Generator:
    return numpy_rng(parameters.seed, "phantom", parameters.profile, cohort, index, stream)


def _seen(mapping: g.SpatialMap, rng: np.random.Generator, field_of_view: float) -> g.SpatialMap:
    """Return ``mapping`` of a volume that shows more or less of the body: by up to 1 + ``field_of_view`` either way."""
    zoom = float(np.exp(rng.uniform(-1, 1) * np.log1p(field_of_view)))
    return replace(mapping, matrix=mapping.matrix * zoom)


def _happens(rng: np.random.Generator, probability: float) -> bool:
    """Draw once, whatever the probability, so that later draws do not depend on it."""
    return bool(rng.random() < probability)


def _affine(shape: tuple[int, ...], spacing_mm: float) -> NDArray[np.float64]:
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = [-(n - 1) / 2 * spacing_mm for n in shape]
    return affine


def _to_voxels(points_mm: FloatArray, shape: tuple[int, ...], spacing_mm: float) -> NDArray[np.float64]:
    """Map subject coordinates (3, M) in mm to voxel coordinates (M, 3)."""
    return np.asarray(points_mm, dtype=np.float64).T / spacing_mm + (np.array(shape) - 1) / 2


def _between(rng: np.random.Generator, low: float, high: float, scale: float) -> float:
    """Draw from the range, narrowed around its middle by ``scale`` (never wider than the range)."""
    middle, half = (low + high) / 2, (high - low) / 2
    return middle + min(scale, 1.0) * float(rng.uniform(-half, half))


def _alike(values: Mapping[str, float], groups: Iterable[Iterable[str]], share: float) -> dict[str, float]:
    """Move the values of each group of tissues by ``share`` of the way to the group's mean."""
    moved = dict(values)
    for group in groups:
        names = list(group)
        mean = float(np.mean([values[name] for name in names]))
        moved |= {name: (1 - share) * values[name] + share * mean for name in names}
    return moved


def _degrade(
    image: FloatArray, rng: np.random.Generator, p: FloatArray, *, blur: tuple[float, float], noise: tuple[float, float],
    shading: float, scale: float, louder: float = 1.0,
) -> NDArray[np.float32]:  # fmt: skip
    """Blur (voxels), shade smoothly, and add noise: what the scanner does to the tissue values.

    Args:
        image: (D, H, W).
        rng: the subject's.
        p: voxel centres in mm (3, D*H*W).
        blur: range of the standard deviation in voxels.
        noise: range of the standard deviation in the image's units.
        shading: largest relative (MR) or absolute (CT, in HU) amplitude of the smooth field.
        scale: appearance variance; 0 gives the middle of each range.
        louder: factor of the noise.
    """
    from scipy.ndimage import gaussian_filter

    image = gaussian_filter(image, _between(rng, *blur, scale))
    amplitude = shading * scale * rng.uniform(0.3, 1)
    field = amplitude * g.waves_noise(rng, p, (150, 350), 4).reshape(image.shape)
    image = image * (1 + field) if shading < 1 else image + field
    grain = gaussian_filter(rng.standard_normal(image.shape, dtype=np.float32), 0.5)
    return (image + louder * _between(rng, *noise, scale) * grain / grain.std()).astype(np.float32)


# --- heart ------------------------------------------------------------------------------------------


def _cardiac_values(rng: np.random.Generator, scale: float) -> dict[str, float]:
    """Draw the HU of each tissue: contrast phases overlap, so that no value names a structure."""

    def vary(mean: float, deviation: float) -> float:
        return mean + scale * deviation * float(np.clip(rng.standard_normal(), -2, 2))

    left, right = vary(330, 90), vary(260, 120)  # how much contrast medium has reached either side
    own = {name: vary(0, 45) for name in ("lv", "la", "aorta", "rv", "ra", "pa", "pv", "svc", "ivc", "da")}
    myocardium = vary(125, 45)

    def blood(mean: float) -> float:
        return max(mean, 35.0)  # HU of blood that no contrast medium has reached

    return {
        # Air stays air however much the rest varies: the check of the intensity offset looks at it.
        "lung": vary(-840, 40 / max(scale, 1)), "fat": vary(-100, 12), "muscle": vary(55, 15), "bone": vary(520, 90),
        "marrow": vary(210, 60), "disc": vary(90, 25), "liver": vary(95, 30), "esophagus": vary(40, 20),
        "epicardial_fat": vary(-75, 20), "wall": vary(70, 30), "myocardium": myocardium, "papillary": myocardium,
        "lv": blood(left + own["lv"]), "la": blood(left + own["la"]), "aorta": blood(left + own["aorta"]),
        "pulmonary_vein": blood(left + own["pv"]), "descending_aorta": blood(left + own["da"]),
        "rv": blood(right + own["rv"]), "ra": blood(right + own["ra"]), "pa": blood(right + own["pa"]),
        "svc": blood(right + 60 + own["svc"]), "ivc": blood(right - 60 + own["ivc"]),
    }  # fmt: skip


PHASES = {"arterial": 0.45, "pulmonary": 0.2, "venous": 0.2, "none": 0.15}
"""Contrast phases that reach a cardiac reader besides a well timed coronary angiography, with their shares."""


def _phase(values: dict[str, float], rng: np.random.Generator, protocols: float) -> dict[str, float]:
    """Return the tissue values in the phase of another protocol, with probability ``protocols``.

    Pulmonary: the right side is brighter than the left (300 to 450 HU). Venous: all blood at 130 to 190 HU, myocardium
    at 90 to 130. None: blood at 35 to 50 HU and myocardium at 40 to 55, told apart by fat and form only.
    """
    other = _happens(rng, protocols)
    phase = str(rng.choice(list(PHASES), p=list(PHASES.values())))
    right, venous, plain = rng.uniform(300, 450), rng.uniform(130, 190), rng.uniform(35, 50)
    muscle = {"venous": rng.uniform(90, 130), "none": plain + rng.uniform(-3, 8)}
    jitter = {name: float(rng.uniform(-1, 1)) for name in heart.BLOOD}
    if not other or phase == "arterial":
        return values
    values = dict(values)
    for name in heart.BLOOD:
        on_the_right = name in ("rv", "ra", "pa", "svc", "ivc")
        values[name] = {
            "pulmonary": right + 40 * jitter[name] if on_the_right else 0.6 * values[name],
            "venous": venous + 12 * jitter[name],
            "none": plain + 2 * jitter[name],
        }[phase]
    if phase in muscle:
        values["myocardium"] = values["papillary"] = muscle[phase]
    return values


def _fluid(
    atlas: FloatArray, fields: Mapping[str, FloatArray], tissue: NDArray[np.uint8], rng: np.random.Generator, variants: float
) -> NDArray[np.bool_]:  # fmt: skip
    """Return where fluid lies around the heart (5 to 15 mm, in an eighth of ``variants``) or behind the lungs (a sixth)."""
    pericardial, pleural = _happens(rng, variants / 8), _happens(rng, variants / 6)
    thickness, level = rng.uniform(5, 15), rng.uniform(-62, -35)
    soft = np.isin(tissue, [heart.TISSUE_ID["lung"], heart.TISSUE_ID["epicardial_fat"]])
    around = (np.abs(fields["hull"] - thickness / 2) < thickness / 2) & pericardial
    behind = (atlas[1] < level) & (tissue == heart.TISSUE_ID["lung"]) & pleural
    return soft & (around | behind)


def _coronary_variant(rng: np.random.Generator, variants: float) -> frozenset[str]:
    """Draw what is missing of the coronary tree, and whether the left side is dominant (a tenth of ``variants``)."""
    shares = {"left dominant": 0.1, "no D2": 0.3, "no OM2": 0.3, "no AM": 0.2}
    return frozenset(name for name, share in shares.items() if _happens(rng, variants * share))


def _louder(rng: np.random.Generator, noise: float) -> float:
    """Draw the factor of a patient's noise, log-uniform from 1 to ``noise``."""
    return float(np.exp(rng.uniform(0, 1) * np.log(noise)))


def _scanned_ct(
    image: FloatArray, rng: np.random.Generator, mapping: g.SpatialMap, parameters: PhantomParameters
) -> FloatArray:
    """Return a cardiac CT (D, H, W) with motion, thick slices and the lead of a pacemaker, as the parameters say."""
    spacing = parameters.spacing_mm
    moves, has_lead = _happens(rng, parameters.motion), _happens(rng, parameters.metal)
    thickness = rng.uniform(0, 1) * parameters.slice_mm
    if moves:
        image = scanner.double_contour(image, rng, 12 / spacing)
    image = scanner.thick_slices(image, thickness, spacing)
    if has_lead:
        lead = _to_voxels(mapping.to_subject(g.spline(heart.LEAD_PATH, spacing / 2).T), image.shape, spacing)
        image = scanner.metal_streaks(image, lead, rng, spacing)
    return image


def _cardiac(cohort: Cohort, index: int, parameters: PhantomParameters) -> PhantomSubject:
    shape = (parameters.edge,) * 3
    anatomy, look = (_rng(cohort, index, parameters, stream) for stream in ("anatomy", "appearance"))
    patient = _rng(cohort, index, parameters, "patient")
    spacing = parameters.spacing_mm
    p = g.voxel_centres(shape, spacing)  # (3, D*H*W)
    mapping = deformation(anatomy, parameters.profile)
    where = _rng(cohort, index, parameters, "placement")
    mapping = placed(mapping, where, parameters.placement, np.multiply(shape, spacing))
    mapping = _seen(mapping, patient, parameters.field_of_view)
    atlas = mapping.to_atlas(p)
    form = heart.HeartShape.draw(anatomy, _spread(parameters))
    tissue, fields = heart.paint_heart(atlas, form, wall_mm=max(3.0, spacing))
    fluid = _fluid(atlas, fields, tissue, patient, parameters.variants).reshape(shape)
    tissue = tissue.reshape(shape)

    values = _cardiac_values(look, parameters.appearance_variance)
    values = _phase(values, patient, parameters.protocols)
    values = _alike(values, [heart.BLOOD], parameters.isodensity)
    image = np.array([values[name] for name in heart.TISSUES], dtype=np.float32)[tissue]
    texture = g.waves_noise(look, atlas.astype(np.float32), (8, 25), 12).reshape(shape)
    image += 14 * parameters.appearance_variance * parameters.texture * texture * (image > -300)
    image[fluid] = patient.uniform(0, 25)

    vein = heart.cardiac_vein(form)
    diseased = int(anatomy.random() < 0.5) if cohort != "asoca" else index % 2
    lumen = np.zeros(shape, dtype=bool)
    bright = values["aorta"] - 25 + 30 * parameters.appearance_variance * float(look.uniform(-1, 1))
    tree = heart.coronary_tree(form, anatomy, _coronary_variant(patient, parameters.variants))
    for vessel in [vein, *tree]:
        path, radii = g.densify(vessel.path, vessel.radii, spacing / 4)
        centres = _to_voxels(mapping.to_subject(path.T), shape, spacing)
        # One to three voxels wide (times the factor) whatever the grid: a thinner tube would fall between the voxels.
        wide = parameters.vessel_width * np.clip(radii / spacing, 0.75, 1.45)
        calcium = None
        if diseased and vessel is not vein and len(path) > 12:
            at = int(anatomy.integers(4, len(path) - 4))
            near = np.abs(np.arange(len(path)) - at) < 6
            wide = np.where(near, np.maximum(0.75, 0.7 * wide), wide)
            calcium = g.paint(shape, centres[at : at + 2], np.array([0.7, 0.7]), 1.5) < 0
        inside = g.paint(shape, centres, wide, 2.0) < 0
        image[inside] = values["rv"] - 40 if vessel is vein else bright
        if vessel is not vein:
            lumen |= inside
        if calcium is not None:
            image[calcium] = 750
    image = _scanned_ct(image, patient, mapping, parameters)
    labels = None
    if cohort == "mmwhs":
        table = np.array([heart.MMWHS_VALUES.get(name, 0) for name in heart.TISSUES], dtype=np.uint16)
        labels = table[tissue]
    elif cohort == "asoca":
        labels = lumen.astype(np.uint16)
    image = _degrade(
        image,
        look,
        p,
        blur=(0.4, 0.7),
        noise=(12.0, 30.0),
        shading=25.0,
        scale=parameters.appearance_variance,
        louder=_louder(patient, parameters.noise),
    )
    stored = np.clip(np.rint(image), -1024, 2500)
    if cohort == "asoca":  # this release is stored with air at 0
        stored = stored + 1024
    target = diseased if cohort == "asoca" else None
    return PhantomSubject(stored.astype(np.int16), labels, target, _affine(shape, spacing), mapping)


# --- brain ------------------------------------------------------------------------------------------


def _sequence(rng: np.random.Generator, protocols: float) -> tuple[float, float]:
    """Draw the contrast of grey and white matter (0.55 to 1.1 of the atlas's) and the shading (a factor of 1 to 2.5)."""
    other = _happens(rng, protocols)
    flat, uneven = rng.uniform(0.55, 1.1), rng.uniform(1, 2.5)
    return (float(flat), float(uneven)) if other else (1.0, 1.0)


def _scanned_mr(image: FloatArray, rng: np.random.Generator, parameters: PhantomParameters) -> FloatArray:
    """Return a brain MR (D, H, W) with ghosts of motion, thick slices and a void by dental metal, as the parameters say."""
    moves, has_metal = _happens(rng, parameters.motion), _happens(rng, parameters.metal)
    thickness = rng.uniform(0, 1) * parameters.slice_mm
    if moves:
        image = scanner.ghosts(image, rng)
    image = scanner.thick_slices(image, thickness, parameters.spacing_mm)
    return scanner.signal_void(image, rng, parameters.spacing_mm) if has_metal else image


def _brain(cohort: Cohort, index: int, parameters: PhantomParameters) -> PhantomSubject:
    anatomy, look = (_rng(cohort, index, parameters, stream) for stream in ("anatomy", "appearance"))
    patient = _rng(cohort, index, parameters, "patient")
    spacing = parameters.spacing_mm
    shape = tuple(round(fov / spacing) for fov in BRAIN_FOV_MM)
    p = g.voxel_centres(shape, spacing)
    mapping = deformation(anatomy, parameters.profile)
    # Brains differ less in pose and size than hearts do.
    mapping = replace(
        mapping, layers=tuple(replace(a, amplitudes=0.6 * a.amplitudes) for a in mapping.layers)
    )
    where = _rng(cohort, index, parameters, "placement")
    mapping = placed(mapping, where, parameters.placement, np.multiply(shape, spacing))
    mapping = _seen(mapping, patient, parameters.field_of_view)
    form = brain.BrainShape.draw(patient, parameters.shape_modes)
    atlas = form.sides(mapping.to_atlas(p))
    # Gyri run along level lines of a random field, finer in the development profile.
    length = (28.0, 45.0) if parameters.profile == "benchmark" else (24.0, 38.0)
    folds = 3 * g.waves_noise(anatomy, atlas, length, 8)
    tissue = brain.paint_brain(atlas, folds, cortex_mm=form.cortex * max(4.5, 1.2 * spacing), form=form)
    labels = brain.label_values(tissue, atlas[0]).reshape(shape)

    scale = parameters.appearance_variance
    contrast = float(np.exp(scale * look.uniform(-0.45, 0.45)))  # one curve for all tissues: the sequence
    flat, uneven = _sequence(patient, parameters.protocols)
    values = {}
    for name, mean in brain.INTENSITY.items():
        own = mean + scale * (0.07 if name in brain.PAIRS else 0.03) * float(
            np.clip(look.standard_normal(), -2, 2)
        )
        values[name] = max(0.01, own) ** contrast
    # Towards white matter: sequences differ in how far grey and white are apart.
    values = {n: v if n in brain.OUTSIDE else 1 + flat * (v - 1) for n, v in values.items()}
    values = _alike(values, brain.LIKE_TISSUES, parameters.isodensity)
    image = np.array([values[name] for name in brain.TISSUES], dtype=np.float32)[tissue].reshape(shape)
    texture = g.waves_noise(look, atlas.astype(np.float32), (8, 25), 12).reshape(shape)
    image = image * (1 + 0.03 * scale * parameters.texture * texture)
    image = np.where(
        brain.white_lesions(atlas, tissue, patient, parameters.variants).reshape(shape), 0.72 * image, image
    )
    image = _scanned_mr(image, patient, parameters)
    image = _degrade(
        image, look, p, blur=(0.4, 0.7), noise=(0.02, 0.05), shading=0.18 * uneven, scale=scale,
        louder=_louder(patient, parameters.noise),
    )  # fmt: skip
    stored = np.clip(np.rint(image * _between(look, 300, 900, scale)), 0, 30000)
    return PhantomSubject(stored.astype(np.int16), labels, None, _affine(shape, spacing), mapping)


# --- chest ------------------------------------------------------------------------------------------


def _chest(cohort: Cohort, index: int, parameters: PhantomParameters) -> PhantomSubject:
    anatomy, look = (_rng(cohort, index, parameters, stream) for stream in ("anatomy", "appearance"))
    spacing, scale = 2 * parameters.spacing_mm, parameters.appearance_variance
    shape = (parameters.edge,) * 3
    p = g.voxel_centres(shape, spacing)
    mapping = deformation(anatomy, parameters.profile)
    # The atlas is made for a 307 mm field of view; other grids see a scaled chest.
    fit = 1.1 * 307.2 / (parameters.edge * spacing)
    mapping = replace(mapping, matrix=mapping.matrix * fit)
    mapping = _seen(mapping, _rng(cohort, index, parameters, "field of view"), parameters.field_of_view)
    atlas = mapping.to_atlas(p)
    form = chest.ChestShape.draw(anatomy, _spread(parameters))
    lungs = chest.lung_field(atlas, form)
    tissue = chest.paint_chest(atlas, lungs, form)

    def vary(mean: float, deviation: float) -> float:
        return mean + scale * deviation * float(np.clip(look.standard_normal(), -2, 2))

    values = {
        "air": -1000, "fat": vary(-100, 12), "muscle": vary(55, 15), "bone": vary(450, 90), "marrow": vary(200, 60),
        "mediastinum": vary(30, 30), "heart": vary(120, 80), "liver": vary(90, 30), "lung": vary(-820, 45),
        "airway": vary(-980, 8),
    }  # fmt: skip
    image = np.array([values[name] for name in chest.TISSUES], dtype=np.float32)[tissue]
    # Gravity: the back of the lungs is denser, more in some patients than in others.
    inside = tissue == chest.TISSUE_ID["lung"]
    gravity = scale * look.uniform(0, 130) * np.clip(-atlas[1] / 80, 0, 1) ** 2
    patchy = scale * look.uniform(10, 45) * g.waves_noise(look, atlas, (40, 110), 8)
    image[inside] += (gravity + patchy)[inside]
    density = look.uniform(320, 520)  # drawn for both classes, so that their streams stay equal
    lesions = lesion_count(index, parameters)
    patient = _rng(cohort, index, parameters, "patient")
    other = _happens(patient, parameters.opacities)
    if parameters.opacities:
        if lesions or other:
            kind = "covid" if lesions else str(patient.choice(chest.OTHER_OPACITIES))
            opacity = chest.opacity(kind, atlas, lungs, patient)
            image += (opacity * density).astype(np.float32)
    elif lesions:
        stream = _rng(cohort, index, parameters, "lesions")
        opacity = chest.lesion_field(atlas, lungs, lesions, stream, parameters.lesion_size)
        image += (opacity * density).astype(np.float32)
    centres, radii = chest.vessel_tree(anatomy)
    centres = _to_voxels(mapping.to_subject(centres.T), shape, spacing)
    vessels = (g.paint(shape, centres, np.clip(radii / spacing, 0.3, 3), 1.5).ravel() < 0) & inside
    image[vessels] = np.maximum(image[vessels], vary(-150, 60))
    scanned = scanner.thick_slices(image.reshape(shape), patient.uniform(0, 1) * parameters.slice_mm, spacing)
    image = _degrade(
        scanned, look, p, blur=(0.4, 0.7), noise=(12.0, 35.0), shading=20.0, scale=scale,
        louder=_louder(patient, parameters.noise),
    )  # fmt: skip
    stored = np.clip(np.rint(image), -1024, 2500)
    return PhantomSubject(stored.astype(np.int16), None, int(lesions > 0), _affine(shape, spacing), mapping)
