"""The heart and what surrounds it in a cardiac CT: four chambers, great vessels, coronary arteries.

Atlas coordinates are RAS millimetres (+x right, +y anterior, +z superior), origin in the middle of
the heart. The positions follow a normal adult heart in levocardia: the long axis points left,
forward and down; the right ventricle wraps around the septum in front; the left atrium lies behind,
before the spine; the pulmonary trunk crosses in front of the ascending aorta to the left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssl3d.data.phantoms import geometry as g

FloatArray = NDArray[np.floating]

# Tissues of the tissue map, in painting order is decided below; 0 is the lung, which is everywhere else.
TISSUES = (
    "lung", "fat", "muscle", "bone", "marrow", "disc", "liver", "esophagus", "epicardial_fat", "wall",
    "myocardium", "lv", "papillary", "rv", "la", "ra", "aorta", "pa", "pulmonary_vein", "svc", "ivc",
    "descending_aorta",
)  # fmt: skip
TISSUE_ID = {name: i for i, name in enumerate(TISSUES)}
BLOOD = ("lv", "rv", "la", "ra", "aorta", "pa", "pulmonary_vein", "svc", "ivc", "descending_aorta")

#: Native label values of the MM-WHS 2017 release, by tissue. Papillary muscles count as left ventricle
#: there. One file of the real release holds 421 in place of 420; the phantoms hold 420 throughout.
MMWHS_VALUES = {
    "lv": 500, "papillary": 500, "rv": 600, "la": 420, "ra": 550, "myocardium": 205, "aorta": 820, "pa": 850,
}  # fmt: skip

# The left ventricle's frame: origin in the mitral plane, axis to the apex, to the septum, to the diaphragm.
LV_BASE = np.array([-8.0, -8.0, 2.0])
LV_AXIS = np.array([-0.576, 0.630, -0.521]) / np.linalg.norm([-0.576, 0.630, -0.521])
_SEPTAL = np.array([0.64, 0.70, 0.14])
LV_SEPTAL = _SEPTAL - (_SEPTAL @ LV_AXIS) * LV_AXIS
LV_SEPTAL /= np.linalg.norm(LV_SEPTAL)
LV_INFERIOR = np.cross(LV_AXIS, LV_SEPTAL)
LV_FRAME = np.stack([LV_AXIS, LV_SEPTAL, LV_INFERIOR])

AORTIC_VALVE, AORTIC_AXIS = np.array([8.0, 6.0, 13.0]), np.array([0.42, 0.35, 0.84])
TRICUSPID, TRICUSPID_AXIS = np.array([25.0, 15.0, -6.0]), np.array([-0.70, 0.65, -0.25])
PULMONARY_VALVE, PULMONARY_AXIS = np.array([-4.0, 37.0, 26.0]), np.array([-0.20, -0.30, 0.93])
RA_CENTRE = np.array([46.0, -3.0, 0.0])
LA_CENTRE = np.array([7.0, -31.0, 14.0])

AORTA_PATH = np.array([[5.0, 3, 7], [9, 7, 16], [14, 12, 27], [20, 15, 44], [21, 10, 62], [17, 0, 84]])
AORTA_RADII = np.array([11.5, 14.5, 14.5, 13.5, 13.5, 13.0])
PA_TRUNK = np.array([[-3.0, 38, 18], [-7, 34, 30], [-12, 22, 44], [-12, 8, 52]])
PA_RADII = np.array([12.0, 12.5, 12.5, 11.0])
PA_RIGHT = np.array([[-11.0, 6, 52], [10, -11, 51], [34, -18, 47], [62, -22, 42]])
PA_LEFT = np.array([[-13.0, 6, 53], [-29, -14, 56], [-44, -30, 50]])
PULMONARY_VEINS = (
    ([22, -30, 20], [44, -31, 26], [72, -26, 34]),
    ([22, -36, 8], [42, -46, 2], [66, -56, -4]),
    ([-10, -28, 24], [-30, -28, 32], [-56, -20, 42]),
    ([-10, -36, 10], [-30, -45, 6], [-56, -55, 0]),
)
SVC_PATH = np.array([[43.0, 4, 86], [43, 3, 55], [44, 0, 18]])
#: The lead of a pacemaker: from the superior vena cava through the right atrium to the apex of the right ventricle.
LEAD_PATH = np.concatenate([
    [[43.0, 4, 86], [43, 3, 55], [44, 0, 18], [40, 6, -4]], [TRICUSPID], [LV_BASE + 52 * LV_AXIS + 24 * LV_SEPTAL],
])  # fmt: skip
IVC_PATH = np.array([[40.0, -16, -90], [41, -12, -45], [43, -8, -20]])


@dataclass(frozen=True)
class HeartShape:
    """A subject's sizes, as factors of the atlas's."""

    lv: float = 1.0
    wall: float = 1.0
    rv: float = 1.0
    la: float = 1.0
    ra: float = 1.0
    aorta: float = 1.0
    pa: float = 1.0
    long_axis: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, spread: float = 1.0) -> HeartShape:
        """Draw the factors; ``spread`` 0 gives the atlas."""

        def factor(range_: float) -> float:
            return float(np.exp(spread * rng.uniform(-range_, range_)))

        return cls(
            lv=factor(0.10), wall=factor(0.20), rv=factor(0.10), la=factor(0.10), ra=factor(0.10),
            aorta=factor(0.10), pa=factor(0.10), long_axis=factor(0.06),
        )  # fmt: skip


def lv_point(along_mm: FloatArray, angle_deg: FloatArray, radius_mm: FloatArray) -> NDArray[np.float64]:
    """Return points of the left ventricle's cylinder coordinates: (M, 3).

    ``angle_deg`` is 0 at the septum, 90 superior (towards the left atrial appendage), 180 lateral,
    -90 or 270 inferior.
    """
    angle = np.deg2rad(angle_deg)
    radial = np.cos(angle)[:, None] * LV_SEPTAL - np.sin(angle)[:, None] * LV_INFERIOR
    return LV_BASE + np.asarray(along_mm)[:, None] * LV_AXIS + np.asarray(radius_mm)[:, None] * radial


def _compete(field: FloatArray, wall_mm: float, *rivals: FloatArray) -> FloatArray:
    """Keep of ``field`` what is deeper in it than in any rival, less a wall of ``wall_mm`` between them."""
    rival = rivals[0]
    for other in rivals[1:]:
        rival = np.minimum(rival, other)
    return np.maximum(field, (field - rival + np.asarray(wall_mm, field.dtype)) / 2)


def _valve(
    p: FloatArray, centre: FloatArray, axis: FloatArray, radius_mm: float
) -> tuple[FloatArray, FloatArray]:
    """Return the signed distance to a valve's plane (positive downstream) and the distance to its disc."""
    plane = g.half_space(p, centre, axis)
    rel = p - centre.astype(p.dtype)[:, None]
    across = np.sqrt(np.maximum(np.einsum("in,in->n", rel, rel) - plane**2, 0))
    return plane, np.hypot(plane, np.maximum(across - radius_mm, 0))


def chambers(p: FloatArray, shape: HeartShape, wall_mm: float = 3.0) -> dict[str, FloatArray]:
    """Evaluate the heart's implicit functions at atlas points.

    Args:
        p: (3, N) mm.
        shape: the subject's sizes.
        wall_mm: thickness of the walls between cavities that no valve joins.

    Returns:
        Name -> (N,), negative inside; ``valves`` is the distance to the nearest valve's disc.
    """
    local = LV_FRAME.astype(p.dtype) @ (p - LV_BASE.astype(p.dtype)[:, None])  # (3, N)
    along, mitral_disc = _valve(p, LV_BASE - 3 * LV_SEPTAL, LV_AXIS, 17.0)
    past_aortic, aortic_disc = _valve(p, AORTIC_VALVE, AORTIC_AXIS, 13.0)
    past_tricuspid, tricuspid_disc = _valve(p, TRICUSPID, TRICUSPID_AXIS, 18.0)
    past_pulmonary, pulmonary_disc = _valve(p, PULMONARY_VALVE, PULMONARY_AXIS, 14.0)

    # Left ventricle: an ellipsoid cut by the mitral plane, plus the outflow tract to the aortic valve.
    radius, length, muscle = 22.5 * shape.lv, 50.0 * shape.long_axis, 10.0 * shape.wall
    cavity = g.ellipsoid(local, (20.0, 0, 0), (length, radius, radius))
    outer = g.ellipsoid(local, (20.0, 0, 0), (length + muscle, radius + muscle, radius + muscle))
    lvot = g.tube(p, [LV_BASE + 14 * LV_AXIS + 4 * LV_SEPTAL, AORTIC_VALVE + 6 * AORTIC_AXIS], (13.0, 11.0))
    lvot = np.maximum(lvot, past_aortic)
    lv_outer = np.maximum(outer, -along - 3)
    aorta = np.maximum(g.tube(p, AORTA_PATH, AORTA_RADII * shape.aorta), -past_aortic)
    root = np.minimum(lvot, aorta)

    trunk = g.tube(p, PA_TRUNK, PA_RADII * shape.pa)
    branches = np.minimum(
        g.tube(p, PA_RIGHT, np.array([10.5, 10, 9, 8]) * shape.pa),
        g.tube(p, PA_LEFT, np.array([10.5, 10, 8]) * shape.pa),
    )
    pa = np.maximum(g.smooth_min(4.0, trunk, branches), -past_pulmonary)

    veins = g.tube(p, PULMONARY_VEINS[0], (8.0, 6.5, 6.0))
    for path in PULMONARY_VEINS[1:]:
        veins = np.minimum(veins, g.tube(p, path, (8.0, 6.5, 6.0)))
    la = g.smooth_min(
        6.0,
        g.ellipsoid(p, LA_CENTRE, np.array([28.0, 18.5, 21.0]) * shape.la),
        g.tube(p, [LA_CENTRE, LV_BASE - 3 * LV_SEPTAL + 6 * LV_AXIS], (17.0, 16.0)),
        g.tube(p, [[-12, -16, 22], [-25, -3, 28], [-33, 9, 27]], (9.0, 8.0, 5.0)),  # the appendage
    )
    la = np.maximum(la, along)

    ra = g.smooth_min(
        6.0,
        g.ellipsoid(p, RA_CENTRE, np.array([19.0, 23.0, 28.0]) * shape.ra),
        g.tube(p, [RA_CENTRE, TRICUSPID + 6 * TRICUSPID_AXIS], (18.0, 16.0)),
        g.tube(p, [RA_CENTRE + np.array([-4.0, 14, 16]), [30.0, 29, 22]], (10.0, 6.0)),  # the appendage
    )
    ra = np.maximum(ra, past_tricuspid)
    svc, ivc = g.tube(p, SVC_PATH, 9.0), g.tube(p, IVC_PATH, 11.0)

    body = g.ellipsoid(
        p,
        LV_BASE + 22 * LV_AXIS + 29 * LV_SEPTAL + 3 * LV_INFERIOR,
        np.array([46.0, 29.0, 35.0]) * shape.rv,
        LV_FRAME,
    )
    rv = g.smooth_min(
        8.0, body, g.tube(p, [[6.0, 38, -4], PULMONARY_VALVE + 6 * PULMONARY_AXIS], (17.0, 12.5))
    )
    rv = np.maximum(rv, np.maximum(-past_tricuspid, -lv_outer))
    rv = np.maximum(rv, np.where(pulmonary_disc < 8, past_pulmonary, wall_mm - pa))

    return {
        "lv": np.minimum(np.maximum(cavity, -along), _compete(lvot, wall_mm, la, ra)),
        "lv_outer": lv_outer,
        "rv": _compete(np.maximum(rv, wall_mm - root), wall_mm, la, ra),
        "la": _compete(la, wall_mm, root, pa, ra, svc),
        "ra": _compete(ra, wall_mm, root, pa, la, veins, lv_outer),
        "aorta": _compete(aorta, wall_mm, pa, la, ra),
        "pa": _compete(pa, wall_mm, aorta, la, veins, svc),
        "veins": veins, "svc": svc, "ivc": ivc, "root": root,
        "valves": np.minimum(np.minimum(mitral_disc, aortic_disc), np.minimum(tricuspid_disc, pulmonary_disc)),
    }  # fmt: skip


def epicardium(p: FloatArray, shape: HeartShape) -> FloatArray:
    """Distance-like field of the heart's outer surface, walls included: (3, N) -> (N,)."""
    c = chambers(p, shape)
    thin = np.minimum(np.minimum(c["rv"], c["ra"]), np.minimum(c["la"], np.minimum(c["aorta"], c["pa"])))
    return np.minimum(c["lv_outer"], thin - 3)


# --------------------------------------------------------------------------------------------------
# coronary arteries


@dataclass(frozen=True)
class Vessel:
    """A centreline in atlas mm (M, 3) with the lumen's radius in mm at each point (M,)."""

    name: str
    path: NDArray[np.float64]
    radii: NDArray[np.float64]


def _lay_on(
    surface: Callable[[NDArray[np.float64]], NDArray[np.float64]], path: NDArray[np.float64], height_mm: float
) -> NDArray[np.float64]:
    """Move a path (M, 3) along the field's gradient until it runs ``height_mm`` above the surface."""
    p = path.T.copy()  # (3, M)
    steps = np.concatenate([np.zeros((3, 1)), np.eye(3)], axis=1)  # the point itself and 1 mm along each axis
    for _ in range(6):
        values = surface((p[:, None, :] + steps[:, :, None]).reshape(3, -1)).reshape(4, -1)  # (4, M)
        gradient = values[1:] - values[:1]  # (3, M)
        move = (height_mm - values[0]) / np.maximum((gradient**2).sum(0), 0.3)
        p += np.clip(move, -4, 4) * gradient
        p[:, 1:-1] = (
            0.25 * p[:, :-2] + 0.5 * p[:, 1:-1] + 0.25 * p[:, 2:]
        )  # the field has creases; the artery none
    return p.T


def _lv_path(along: list[float], angle: list[float], radius: list[float]) -> NDArray[np.float64]:
    return lv_point(np.array(along), np.array(angle), np.array(radius))


def coronary_tree(shape: HeartShape, rng: np.random.Generator, variant: Collection[str] = ()) -> list[Vessel]:
    """Return the coronary arteries of a heart of this shape, on its surface, roots first.

    Left main from the left aortic sinus, dividing into the left anterior descending artery (in the
    anterior interventricular groove, with two diagonals) and the circumflex (in the left
    atrioventricular groove, with two marginals); the right coronary artery from the right sinus, in
    the right atrioventricular groove, with an acute marginal, ending as posterior descending and
    posterolateral artery. ``rng`` varies courses and calibres, never the branching.

    ``variant``: "left dominant" (the posterior descending artery comes from the circumflex, 8 to 10 % of
    people; the right artery ends at its acute marginal), "no D2", "no OM2", "no AM".
    """

    def surface(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(epicardium(p, shape))

    def vary(path: NDArray[np.float64], mm: float = 2.5) -> NDArray[np.float64]:
        moved = path + rng.uniform(-mm, mm, path.shape)
        moved[0] = path[0]
        return moved

    vessels: list[Vessel] = []
    calibre = float(np.exp(rng.uniform(-0.12, 0.12)))

    def add(name: str, path: NDArray[np.float64], radii: tuple[float, float], ostium: bool = False) -> Vessel:
        fine = g.spline(path, 3.0)
        laid = _lay_on(surface, fine, 2.5)
        blend = np.clip(np.arange(len(fine)) / 4, 0, 1)[:, None]  # the root stays where its parent is
        laid = blend * laid + (1 - blend) * fine
        vessel = Vessel(name, laid, np.linspace(*radii, len(laid)) * calibre)
        vessels.append(vessel)
        return vessel

    def at(parent: Vessel, fraction: float) -> NDArray[np.float64]:
        return parent.path[round(fraction * (len(parent.path) - 1))][None]

    aortic_wall = 14.0 * shape.aorta
    left_ostium = np.array([[9.0, 8, 20]]) + aortic_wall * np.array([[-0.93, 0.36, 0.06]])
    right_ostium = np.array([[9.0, 8, 20]]) + aortic_wall * np.array([[0.55, 0.83, 0.05]])

    main = add("LM", np.concatenate([left_ostium, [[-9, 15, 21.5], [-15, 18.5, 21]]]), (2.4, 2.2))
    lad = add(
        "LAD",
        np.concatenate(
            [at(main, 1), vary(_lv_path([14, 28, 42, 56, 68], [57, 54, 50, 44, 30], [34, 34, 31, 24, 12]))]
        ),
        (2.0, 1.0),
    )
    add(
        "D1",
        np.concatenate([at(lad, 0.22), vary(_lv_path([24, 34, 44], [78, 98, 112], [34, 33, 29]))]),
        (1.4, 0.9),
    )
    add(
        "D2",
        np.concatenate([at(lad, 0.45), vary(_lv_path([42, 52, 60], [72, 90, 100], [30, 25, 18]))]),
        (1.3, 0.9),
    )
    lcx = add(
        "LCX",
        np.concatenate([at(main, 1), vary(_lv_path([4, 2, 1, 1, 2], [84, 112, 142, 172, 205], [34] * 5))]),
        (1.9, 1.1),
    )
    add(
        "OM1",
        np.concatenate([at(lcx, 0.45), vary(_lv_path([14, 28, 42], [128, 134, 138], [35, 34, 30]))]),
        (1.5, 0.9),
    )
    add(
        "OM2",
        np.concatenate([at(lcx, 0.75), vary(_lv_path([12, 26, 38], [172, 176, 178], [35, 34, 31]))]),
        (1.4, 0.9),
    )

    rca_path = np.array(
        [[24.0, 27, 17], [34, 36, 4], [38, 38, -12], [33, 28, -28], [22, 12, -36], [10, -2, -35]]
    )
    rca = add("RCA", np.concatenate([right_ostium, vary(rca_path)]), (2.2, 1.4))
    add(
        "AM",
        np.concatenate([at(rca, 0.5), vary(np.array([[26.0, 50, -26], [8, 60, -34], [-10, 62, -38]]))]),
        (1.3, 0.9),
    )
    add(
        "PDA",
        np.concatenate([at(rca, 1), vary(_lv_path([16, 30, 44], [-62, -60, -56], [34, 34, 31]))]),
        (1.5, 0.9),
    )
    add(
        "PLV",
        np.concatenate([at(rca, 1), vary(_lv_path([10, 22, 34], [-92, -104, -110], [35, 34, 33]))]),
        (1.4, 0.9),
    )
    if "left dominant" in variant:
        half = len(rca.path) // 2 + 1
        short = Vessel("RCA", rca.path[:half], rca.radii[:half])
        vessels = [short if v is rca else v for v in vessels if v.name not in ("PDA", "PLV")]
        inferior = _lv_path([3, 6, 9, 16, 30, 44], [225, 250, 280, 298, 300, 304], [34, 34, 34, 34, 34, 31])
        add("PDA", np.concatenate([at(lcx, 1), inferior]), (1.2, 0.9))
    return [v for v in vessels if f"no {v.name}" not in variant]


def cardiac_vein(shape: HeartShape) -> Vessel:
    """Return the great cardiac vein and coronary sinus: beside the LAD, around the left groove, to the right atrium."""

    def surface(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(epicardium(p, shape))

    path = np.concatenate([
        _lv_path([58, 44, 28, 12], [56, 60, 64, 68], [24, 31, 34, 34]),
        _lv_path([-3, -5, -6, -6], [110, 150, 190, 230], [33, 33, 33, 33]),
        [[26.0, -14, -22], [36, -10, -18]],
    ])  # fmt: skip
    laid = _lay_on(surface, g.spline(path, 4.0), 3.5)
    return Vessel("vein", laid, np.linspace(1.0, 3.8, len(laid)))


# --------------------------------------------------------------------------------------------------
# the chest around the heart


def surroundings(p: FloatArray) -> dict[str, FloatArray]:
    """Implicit functions of chest wall, spine, sternum, liver, oesophagus and descending aorta: name -> (N,)."""
    _, y, z = p
    dtype = p.dtype
    thorax = g.ellipsoid(p, (16, 0, -10), (118, 72, 190))  # inside: the chest cavity
    # Ribs: oblique rings in a 9 mm shell, falling forwards as ribs do.
    phase = (z - 0.45 * y) / np.asarray(23.0, dtype)
    ring = (np.abs(phase - np.round(phase)) - 0.2) * 23
    spine = g.tube(p, [[19, -80, -200], [19, -80, 200]], 19.0)
    level = (z + 7) / np.asarray(30.0, dtype)
    dome = g.ellipsoid(p, (48, 0, -128), (82, 74, 80))
    return {
        "thorax": thorax,
        "ribs": np.maximum(np.abs(thorax - 8) - 4, ring),
        "sternum": g.ellipsoid(p, (17, 76, 0), (19, 6, 150)),
        "spine": spine,
        "disc": np.maximum(spine, (np.abs(level - np.round(level)) - 0.1) * 30),
        "liver": np.minimum(dome, g.ellipsoid(p, (-20, 5, -112), (70, 62, 58))),
        "esophagus": g.tube(p, [[8, -55, 90], [6, -56, 20], [-2, -54, -90]], 6.0),
        "descending_aorta": g.tube(p, [[-6, -62, 90], [-3, -66, 10], [4, -67, -90]], 11.0),
        "mediastinum": np.minimum(
            g.ellipsoid(p, (14, -2, 70), (38, 62, 70)), g.ellipsoid(p, (8, -56, 0), (26, 20, 160))
        ),
    }


def paint_heart(
    p: FloatArray, shape: HeartShape, wall_mm: float
) -> tuple[NDArray[np.uint8], Mapping[str, FloatArray]]:
    """Return the tissue map (N,) uint8 (ids: ``TISSUE_ID``) and the fields it was painted from."""
    c, s = chambers(p, shape, wall_mm), surroundings(p)
    tissue = np.zeros(p.shape[1], dtype=np.uint8)

    def put(name: str, where: NDArray[np.bool_]) -> None:
        tissue[where] = TISSUE_ID[name]

    cavities = np.minimum(np.minimum(c["rv"], c["ra"]), np.minimum(c["la"], np.minimum(c["root"], c["pa"])))
    hull = g.smooth_min(22.0, c["lv_outer"], c["rv"] - 3, c["ra"] - 3, c["la"] - 3, c["root"] - 2) - 2.5

    put("epicardial_fat", (s["mediastinum"] < 0) | (hull < 0))
    put("liver", (s["liver"] < 0) & (hull > 1.5))
    put("muscle", s["thorax"] > 0)
    put("fat", s["thorax"] > 14)
    put("bone", (s["ribs"] < 0) | (s["sternum"] < 0) | (s["spine"] < 0))
    put("marrow", (s["sternum"] < -2.5) | (s["spine"] < -3))
    put("disc", s["disc"] < 0)
    put("esophagus", s["esophagus"] < 0)
    put("wall", (cavities < wall_mm * 0.8) & (hull < 3))
    put("svc", c["svc"] < 0)
    put("ivc", c["ivc"] < 0)
    put("pulmonary_vein", c["veins"] < 0)
    put("descending_aorta", s["descending_aorta"] < 0)
    put("pa", c["pa"] < 0)
    put("aorta", c["aorta"] < 0)
    put("ra", c["ra"] < 0)
    put("la", c["la"] < 0)
    put("rv", c["rv"] < 0)
    put("myocardium", (c["lv_outer"] < 0) & ~np.isin(tissue, [TISSUE_ID[n] for n in ("aorta", "la", "ra")]))
    put("lv", c["lv"] < 0)
    apical = [LV_BASE + 52 * LV_AXIS + 14 * (np.cos(a) * LV_SEPTAL - np.sin(a) * LV_INFERIOR)
              for a in np.deg2rad([130.0, 230.0])]  # fmt: skip
    basal = [LV_BASE + 24 * LV_AXIS + 11 * (np.cos(a) * LV_SEPTAL - np.sin(a) * LV_INFERIOR)
             for a in np.deg2rad([140.0, 220.0])]  # fmt: skip
    muscles = np.minimum(
        g.tube(p, [apical[0], basal[0]], (5.0, 3.5)), g.tube(p, [apical[1], basal[1]], (5.0, 3.5))
    )
    put("papillary", (muscles < 0) & (c["lv"] < 0))
    return tissue, {**c, **s, "hull": hull}
