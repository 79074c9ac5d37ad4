"""A chest CT: body, lungs with vessels and airways, heart, spine; with or without COVID-19 lesions.

Atlas coordinates are RAS millimetres (+x right, +y anterior, +z superior), origin between the lungs.
Both classes draw lung density, vessels, posture-dependent density and noise from the same
distributions, which vary more than the lesions change the mean; only the peripheral ground-glass
opacities tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssl3d.data.phantoms import geometry as g

FloatArray = NDArray[np.floating]

TISSUES = ("air", "fat", "muscle", "bone", "marrow", "mediastinum", "heart", "liver", "lung", "airway")
TISSUE_ID = {name: i for i, name in enumerate(TISSUES)}


@dataclass(frozen=True)
class ChestShape:
    """What differs between chests besides their deformation.

    Attributes:
        heart: size of the heart's shadow, as a factor of the atlas's.
        diaphragm_mm: (right, left) height of the domes above the atlas's: how deep the breath was.
    """

    heart: float = 1.0
    diaphragm_mm: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def draw(cls, rng: np.random.Generator, spread: float = 1.0) -> ChestShape:
        """Draw a shape; ``spread`` 0 gives the atlas."""
        common = rng.uniform(-14, 14)
        return cls(
            heart=float(np.exp(spread * rng.uniform(-0.12, 0.12))),
            diaphragm_mm=(spread * (common + rng.uniform(-5, 5)), spread * (common + rng.uniform(-5, 5))),
        )


def lung_field(p: FloatArray, form: ChestShape) -> FloatArray:
    """Return the signed distance-like field of both lungs: (3, N) -> (N,), negative inside."""
    right = g.ellipsoid(p, (72, -8, -4), (56, 84, 128))
    left = g.ellipsoid(p, (-74, -8, -4), (54, 84, 128))
    heart = heart_field(p, form)
    domes = np.minimum(
        g.ellipsoid(p, (70, 0, -150 + form.diaphragm_mm[0]), (80, 100, 85)),
        g.ellipsoid(p, (-72, 0, -158 + form.diaphragm_mm[1]), (80, 100, 85)),
    )
    central = g.tube(p, [[2, -2, 160], [4, -4, -160]], 30.0)
    inside = np.maximum(np.minimum(right, left), thorax_field(p) + 5)
    return np.maximum(inside, -np.minimum(np.minimum(heart - 4, domes), central))


def thorax_field(p: FloatArray) -> FloatArray:
    """Return the field of the chest cavity, inside of the ribs."""
    return g.ellipsoid(p, (0, -6, -20), (132, 92, 230))


def heart_field(p: FloatArray, form: ChestShape) -> FloatArray:
    """Return the field of the heart's shadow."""
    return g.ellipsoid(p, (-18, 26, -42), np.multiply(form.heart, (58, 46, 54)))


def paint_chest(p: FloatArray, lungs: FloatArray, form: ChestShape) -> NDArray[np.uint8]:
    """Return the tissue map of atlas points (3, N): (N,) uint8; ``lungs`` is :func:`lung_field`."""
    z, y = p[2], p[1]
    tissue = np.zeros(p.shape[1], dtype=np.uint8)

    def put(name: str, where: NDArray[np.bool_]) -> None:
        tissue[where] = TISSUE_ID[name]

    body = g.ellipsoid(p, (0, -4, 0), (168, 124, 900))
    thorax = thorax_field(p)
    phase = (z - 0.45 * y) / np.asarray(26.0, p.dtype)
    ring = (np.abs(phase - np.round(phase)) - 0.22) * 26
    spine = g.tube(p, [[0, -84, -300], [0, -84, 300]], 21.0)
    put("fat", body < 0)
    put("muscle", body < -14)
    put("mediastinum", thorax < 0)
    put("liver", (thorax < 0) & (z < -60) & (lungs > 3))
    put("heart", heart_field(p, form) < 0)
    put(
        "bone",
        (np.maximum(np.abs(thorax - 6) - 5, ring) < 0)
        | (spine < 0)
        | (g.ellipsoid(p, (0, 92, 0), (20, 7, 120)) < 0),
    )
    put("marrow", spine < -4)
    put("lung", lungs < 0)
    airway = np.minimum(g.tube(p, [[0, -14, 200], [1, -18, 36]], 9.0),
                        np.minimum(g.tube(p, [[1, -18, 36], [34, -16, 8]], (8.0, 6.0)),
                                   g.tube(p, [[1, -18, 36], [-36, -16, 6]], (8.0, 6.0))))  # fmt: skip
    put("mediastinum", airway < 3)
    put("airway", airway < 0)
    return tissue


def vessel_tree(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return centres (M, 3) and radii (M,) in atlas mm of balls along the lungs' branching vessels."""
    centres, radii = [], []
    for side in (1, -1):
        hilum = np.array([34.0 * side, -14.0, 4.0])
        for _ in range(9):
            direction = rng.normal(size=3) * (0.7, 1.0, 1.3) + (0.9 * side, 0, 0)
            direction /= np.linalg.norm(direction)
            end = hilum + direction * rng.uniform(45, 75)
            for start, stop, r0, r1 in [(hilum, end, 5.0, 3.2), *(
                (end, end + rng.normal(size=3) * 16 + direction * rng.uniform(18, 40), 3.0, 1.6) for _ in range(3)
            )]:  # fmt: skip
                path = g.spline(np.stack([start, (start + stop) / 2 + rng.normal(size=3) * 5, stop]), 2.0)
                centres.append(path)
                radii.append(np.linspace(r0, r1, len(path)))
    return np.concatenate(centres), np.concatenate(radii)


#: Fewest and most lesions of a positive patient.
LESIONS = (2, 6)


def lesion_field(
    p: FloatArray, lungs: FloatArray, count: int, rng: np.random.Generator, size: float = 1.0
) -> FloatArray:
    """Return the opacity in [0, 1] of ``count`` subpleural lesions of varying size: (N,).

    ``size`` is a factor of their radii, which are some 10 to 35 mm.
    """
    opacity = np.zeros(p.shape[1], dtype=p.dtype)
    peripheral = np.flatnonzero((lungs < -2) & (lungs > -14) & (np.abs(p[0]) > 55))
    for _ in range(count):
        centre = p[:, rng.choice(peripheral)]
        radii = size * rng.uniform(12, 30) * np.exp(rng.uniform(-0.25, 0.25, 3))
        field = g.ellipsoid(p, centre, radii) + 3 * g.waves_noise(rng, p, (15, 35), 6)
        opacity = np.maximum(opacity, 1 / (1 + np.exp(np.clip(field / 2.5, -30, 30))))
    return np.where(lungs < 0, opacity, 0)


OTHER_OPACITIES = ("lobar", "effusion", "oedema")
"""What clouds a lung besides COVID-19: lobar pneumonia, pleural effusion, oedema of the lung."""
BURDEN = (0.04, 0.3)
"""Share of the lungs that opacities fill, log-uniform, the same for every kind: amount and density tell no kind."""


def opacity(kind: str, p: FloatArray, lungs: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Return the opacity in [0, 1] of one patient, zero outside the lungs: (N,).

    Kinds differ in place and form only. ``covid``: 4 to 9 rounded foci at the periphery of both lungs, more of them low
    and at the back (Simpson et al., RSNA consensus 2020: "typical"). ``lobar``: one confluent region of one side, from
    the hilum to the pleura. ``effusion``: the dependent back of one or both sides, with a level. ``oedema``: around both
    hila, sparing the periphery.

    Args:
        kind: one of these.
        p: atlas points (3, N) in mm.
        lungs: :func:`lung_field` at them.
        rng: of the patient.

    Raises:
        ValueError: no such kind.
    """
    burden = float(np.exp(rng.uniform(*np.log(BURDEN))))
    wave = g.waves_noise(rng, p, (15, 40), 6)
    inside = lungs < 0
    if kind == "covid":
        rim = inside & (lungs > -16) & (np.abs(p[0]) > 45)
        field = np.full(p.shape[1], np.inf, dtype=p.dtype)
        for number in range(int(rng.integers(4, 10))):
            side = rim & (p[0] > 0 if number % 2 else p[0] < 0)  # both lungs
            weight = np.exp(-(p[1] + p[2] / 2)[side] / 60)
            centre = p[:, side][:, rng.choice(int(side.sum()), p=weight / weight.sum())]
            field = np.minimum(
                field, g.ellipsoid(p, centre, rng.uniform(12, 24) * np.exp(rng.uniform(-0.25, 0.25, 3)))
            )
        field = field + 3 * wave
    elif kind == "lobar":
        right, high = rng.choice([-1, 1]), rng.choice([-1, 1])
        lobe = (right * rng.uniform(60, 75), rng.uniform(-30, 20), high * rng.uniform(30, 60))
        field = g.ellipsoid(p, lobe, rng.uniform(0.8, 1.2, 3) * (40, 50, 45)) + 4 * wave
    elif kind == "effusion":
        tilt = rng.uniform(0.1, 0.4)
        field = p[1] + tilt * p[2] + wave  # the back, and the base more than the top
        if rng.random() < 0.5:  # one side only
            field = field + np.where(p[0] * rng.choice([-1, 1]) > 0, 0, 400).astype(p.dtype)
    elif kind == "oedema":
        hila = [g.ellipsoid(p, (x, -14, 4), rng.uniform(0.85, 1.15, 3) * (34, 42, 52)) for x in (44, -46)]
        field = np.minimum(*hila) + 5 * wave
    else:
        raise ValueError(f'no opacity "{kind}": choose from covid, {", ".join(OTHER_OPACITIES)}')
    level = np.quantile(field[inside], burden)  # as much of the lungs as was drawn, whatever the kind
    return np.where(inside, 1 / (1 + np.exp(np.clip((field - level) / 2.5, -30, 30))), 0)
