"""A T1-weighted brain: 28 structures in left/right pairs, as the CANDI release labels them.

Atlas coordinates are RAS millimetres (+x right, +y anterior, +z superior), origin near the anterior
commissure. Structures are written once, for the right side, and mirrored by taking |x|; the
subject's deformation makes the two sides differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssl3d.data.phantoms import geometry as g

FloatArray = NDArray[np.floating]

#: Structure -> (left, right) label value of FreeSurfer and of the CANDI release; the 28 targets.
PAIRS = {
    "white_matter": (2, 41), "cortex": (3, 42), "lateral_ventricle": (4, 43),
    "inferior_lateral_ventricle": (5, 44), "cerebellum_white_matter": (7, 46), "cerebellum_cortex": (8, 47),
    "thalamus": (10, 49), "caudate": (11, 50), "putamen": (12, 51), "pallidum": (13, 52),
    "hippocampus": (17, 53), "amygdala": (18, 54), "accumbens": (26, 58), "ventral_dc": (28, 60),
}  # fmt: skip
#: Drawn and labelled as in the release, but no targets.
MIDLINE = {"third_ventricle": 14, "fourth_ventricle": 15, "brain_stem": 16, "csf": 24}
#: Around the brain, without a label.
OUTSIDE = ("air", "scalp", "skull", "skull_marrow")

TISSUES = (*OUTSIDE, *MIDLINE, *PAIRS)
TISSUE_ID = {name: i for i, name in enumerate(TISSUES)}

#: Mean T1 intensity relative to white matter, and the deviation of a structure's own mean between subjects.
INTENSITY = {
    "air": 0.02, "scalp": 0.85, "skull": 0.12, "skull_marrow": 0.5, "csf": 0.2, "third_ventricle": 0.2,
    "fourth_ventricle": 0.2, "lateral_ventricle": 0.2, "inferior_lateral_ventricle": 0.22, "brain_stem": 0.88,
    "white_matter": 1.0, "cerebellum_white_matter": 0.95, "cortex": 0.65, "cerebellum_cortex": 0.65,
    "thalamus": 0.8, "caudate": 0.68, "putamen": 0.72, "pallidum": 0.85, "hippocampus": 0.66, "amygdala": 0.64,
    "accumbens": 0.66, "ventral_dc": 0.86,
}  # fmt: skip
LIKE_TISSUES = (
    ("csf", "third_ventricle", "fourth_ventricle", "lateral_ventricle", "inferior_lateral_ventricle"),
    ("brain_stem", "white_matter", "cerebellum_white_matter", "ventral_dc", "pallidum"),
    ("cortex", "cerebellum_cortex", "thalamus", "caudate", "putamen", "hippocampus", "amygdala", "accumbens"),
)
"""Fluid, white and grey matter."""


@dataclass(frozen=True)
class BrainShape:
    """A subject's sizes, as factors of the atlas's.

    Attributes:
        ventricles: radii of the ventricles; a lateral ventricle holds 5 ml in the young, 60 and more in atrophy.
        cortex: thickness of the cortex.
        nuclei: radii of the basal ganglia and the thalamus.
        temporal: radii of hippocampus and amygdala.
        cerebellum: radii of the cerebellum.
        left: width of the left side.
    """

    ventricles: float = 1.0
    cortex: float = 1.0
    nuclei: float = 1.0
    temporal: float = 1.0
    cerebellum: float = 1.0
    left: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, spread: float) -> BrainShape:
        """Draw the factors; ``spread`` 0 gives the atlas."""
        ranges = {"ventricles": (-0.3, 0.55), "cortex": (-0.25, 0.1), "nuclei": (-0.15, 0.15), "temporal": (-0.25, 0.15),
                  "cerebellum": (-0.12, 0.08), "left": (-0.06, 0.06)}  # fmt: skip
        return cls(**{name: float(np.exp(spread * rng.uniform(*r))) for name, r in ranges.items()})

    def sides(self, p: FloatArray) -> FloatArray:
        """Return atlas points (3, N) with the left side (x < 0) stretched."""
        return np.stack([np.where(p[0] < 0, p[0] / np.asarray(self.left, p.dtype), p[0]), p[1], p[2]])


def white_lesions(
    p: FloatArray, tissue: NDArray[np.uint8], rng: np.random.Generator, variants: float
) -> NDArray[np.bool_]:
    """Return where white matter is dark on T1 (small vessel disease), in half of ``variants``: (N,).

    Up to 12 foci with radii of 3 to 9 mm in the white matter around the ventricles; labels stay white matter.
    """
    has, count = rng.random() < variants / 2, int(rng.integers(3, 13))
    white = np.flatnonzero((tissue == TISSUE_ID["white_matter"]) & (np.abs(p[2] - 20) < 25))
    found = np.zeros(p.shape[1], dtype=bool)
    if not has or len(white) == 0:
        return found
    for centre in p[:, rng.choice(white, count)].T:
        found |= g.ellipsoid(p, centre, rng.uniform(3, 9, 3)) < 0
    return found & (tissue == TISSUE_ID["white_matter"])


def paint_brain(
    p: FloatArray, fold_phase: FloatArray, cortex_mm: float, form: BrainShape | None = None
) -> NDArray[np.uint8]:
    """Return the tissue map of atlas points.

    Args:
        p: points (3, N) in mm.
        fold_phase: a smooth random field (N,) that places the gyri.
        cortex_mm: thickness of the cortex.
        form: the subject's sizes (its cortex is in ``cortex_mm``); None: the atlas's.

    Returns:
        (N,) uint8, ids in ``TISSUE_ID``.
    """
    form = form or BrainShape()
    x, y, z = p
    q = np.stack([np.abs(x), y, z])  # mirrored: everything below is the right side
    tissue = np.zeros(p.shape[1], dtype=np.uint8)

    def put(name: str, where: NDArray[np.bool_]) -> None:
        tissue[where] = TISSUE_ID[name]

    # The cerebrum: a hemisphere with a temporal lobe, above the tentorium, folded at its surface.
    hemisphere = g.ellipsoid(q, (14, -6, 12), (52, 82, 55))
    temporal = g.tube(q, [[42, 28, -24], [46, 0, -26], [44, -30, -18]], (14.0, 18.0, 17.0))
    cerebrum = g.smooth_min(10.0, hemisphere, temporal)
    tentorium = g.half_space(q, (0, -30, -12), (0, 0.15, -1))  # positive below it; lower at the back
    cerebrum = np.maximum(cerebrum, np.where(y < -24, tentorium + 2, -1e3))
    gyri = np.sin(fold_phase)  # +1 in the depth of a sulcus, -1 on the crown of a gyrus
    cerebellum = g.smooth_min(
        6.0,
        g.ellipsoid(q, (23, -58, -36), form.cerebellum * np.array((27, 27, 20))),
        g.ellipsoid(q, (0, -60, -34), form.cerebellum * np.array((14, 24, 19))),
    )
    stem = g.tube(q, [[0, -18, -10], [0, -22, -30], [0, -34, -70]], (13.0, 13.0, 9.0))

    # One midline ellipsoid closes the skull over the fissure between the hemispheres.
    hull = g.smooth_min(18.0, g.ellipsoid(p, (0, -6, 12), (65, 82, 55)), cerebrum, cerebellum, stem + 3)
    put("scalp", hull < 19)
    put("skull", hull < 12)
    put("skull_marrow", (hull < 10) & (hull > 7.5))
    put("csf", hull < 5)
    put("cortex", (cerebrum < 0) & (q[0] > 1.2))
    put("csf", (cerebrum > -5) & (gyri > 0.75) & (cerebrum < 0))
    # White matter reaches into the gyri and keeps away from the sulci.
    put("white_matter", (cerebrum < -cortex_mm - 5 * (1 + gyri)) & (q[0] > cortex_mm * 0.8))
    put("white_matter", g.ellipsoid(q, (0, -2, 22), (16, 34, 5)) < 0)  # the corpus callosum
    put("cerebellum_cortex", cerebellum < 0)
    put("cerebellum_white_matter", g.smooth_min(4.0, g.ellipsoid(q, (22, -56, -35), (17, 15, 9)),
                                                g.tube(q, [[18, -50, -34], [6, -36, -30]], (7.0, 6.0))) < 0)  # fmt: skip
    put("brain_stem", stem < 0)
    put("ventral_dc", g.ellipsoid(q, (10, -14, -9), (10, 12, 7)) < 0)
    put("thalamus", g.ellipsoid(q, (11, -16, 6), form.nuclei * np.array((9, 15, 10))) < 0)
    put("pallidum", g.ellipsoid(q, (19, 0, 1), form.nuclei * np.array((6, 10, 7))) < 0)
    put(
        "putamen",
        (g.ellipsoid(q, (27, 4, 3), form.nuclei * np.array((8, 18, 11))) < 0)
        & (g.ellipsoid(q, (17, 0, 1), (8.5, 13, 9)) > 0),
    )
    put(
        "caudate",
        g.tube(
            q,
            [[13, 24, 6], [16, 10, 16], [19, -8, 20], [23, -22, 17]],
            form.nuclei * np.array((7.5, 6.0, 4.5, 4.0)),
        )
        < 0,
    )
    put("accumbens", g.ellipsoid(q, (10, 16, -5), (6.5, 8, 6)) < 0)
    put(
        "lateral_ventricle",
        g.tube(
            q,
            [[6, 32, 8], [7, 10, 17], [9, -14, 19], [18, -32, 14], [22, -52, 8]],
            form.ventricles * np.array((6.0, 5.0, 5.5, 7.0, 5.0)),
        )
        < 0,
    )
    put(
        "hippocampus",
        g.tube(q, [[25, -12, -19], [29, -24, -13], [25, -36, -3]], form.temporal * np.array((7.0, 6.0, 5.0)))
        < 0,
    )
    put("amygdala", g.ellipsoid(q, (23, 0, -19), form.temporal * np.array((8, 8, 8))) < 0)
    put(
        "inferior_lateral_ventricle",
        g.tube(q, [[35, -8, -19], [37, -22, -12], [32, -38, -2]], form.ventricles * np.array((4.2, 4.2, 4.2)))
        < 0,
    )
    put("third_ventricle", g.ellipsoid(q, (0, -10, 3), form.ventricles * np.array((3, 15, 10))) < 0)
    put("fourth_ventricle", g.ellipsoid(q, (0, -42, -33), (6, 6, 9)) < 0)
    return tissue


def label_values(tissue: NDArray[np.uint8], x: FloatArray) -> NDArray[np.uint16]:
    """Return the release's label values of a tissue map (N,); ``x`` (N,) is negative on the left."""
    left = np.zeros(len(TISSUES), dtype=np.uint16)
    right = np.zeros(len(TISSUES), dtype=np.uint16)
    for name, value in MIDLINE.items():
        left[TISSUE_ID[name]] = right[TISSUE_ID[name]] = value
    for name, (left_value, right_value) in PAIRS.items():
        left[TISSUE_ID[name]], right[TISSUE_ID[name]] = left_value, right_value
    return np.where(x < 0, left[tissue], right[tissue])
