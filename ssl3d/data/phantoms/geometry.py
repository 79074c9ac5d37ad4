"""Coordinates, invertible deformations, implicit shapes and painted tubes.

Everything here works on points given as float arrays of shape (3, N): x, y, z in millimetres, with
x to the patient's right -> left... as RAS has it: +x right, +y anterior, +z superior.

Structures are implicit functions ("distance-like": negative inside, about 1 mm a millimetre near
the surface) on the coordinates of a common atlas. A subject is made by evaluating them at the
inversely deformed coordinates of its own voxels, so no label is ever resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float32]


def voxel_centres(shape: Sequence[int], spacing_mm: float) -> Array:
    """Return the voxel centres of a grid centred on the origin, in mm: (3, D*H*W) float32, C order."""
    axes = [((np.arange(n) - (n - 1) / 2) * spacing_mm).astype(np.float32) for n in shape]
    return np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")])  # (3, D*H*W)


def rotation(angles: ArrayLike) -> NDArray[np.float64]:
    """Return Rz Ry Rx for the three angles (x, y, z) in radians: (3, 3)."""
    ax, ay, az = np.asarray(angles, dtype=np.float64)
    cx, cy, cz = np.cos([ax, ay, az])
    sx, sy, sz = np.sin([ax, ay, az])
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rz @ ry @ rx


# --------------------------------------------------------------------------------------------------
# deformation


@dataclass(frozen=True)
class WaveLayer:
    """One smooth map y = x + sum_k a_k sin(w_k . x + phi_k), invertible by construction.

    A wave's gradient a_k w_k^T cos(.) has spectral norm at most |a_k| |w_k|. The amplitudes are
    scaled so that these sum to ``strain`` < 1; then x -> y - sum(...) is a contraction, the map is
    one to one onto R^3 (Banach), and det J >= (1 - strain)^3 > 0 everywhere.
    """

    amplitudes: NDArray[np.float64]  # (K, 3) mm
    wave_vectors: NDArray[np.float64]  # (K, 3) rad/mm
    phases: NDArray[np.float64]  # (K,)

    @classmethod
    def draw(
        cls, rng: np.random.Generator, strain: float, wavelengths_mm: tuple[float, float], waves: int
    ) -> WaveLayer:
        """Draw ``waves`` random waves whose strains sum to ``strain`` (0 <= strain < 1)."""
        direction = rng.normal(size=(waves, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        wave_vectors = direction * (2 * np.pi / rng.uniform(*wavelengths_mm, size=(waves, 1)))
        amplitudes = rng.normal(size=(waves, 3))
        bound = (np.linalg.norm(amplitudes, axis=1) * np.linalg.norm(wave_vectors, axis=1)).sum()
        return cls(amplitudes * (strain / bound), wave_vectors, rng.uniform(0, 2 * np.pi, waves))

    def displacement(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the displacement at ``x``, both (3, N), in ``x``'s dtype."""
        arguments = self.wave_vectors.astype(x.dtype) @ x + self.phases.astype(x.dtype)[:, None]  # (K, N)
        return self.amplitudes.astype(x.dtype).T @ np.sin(arguments)  # (3, N)

    def invert(self, y: NDArray[np.float64], tolerance_mm: float = 1e-6) -> NDArray[np.float64]:
        """Return x with x + displacement(x) = y, by fixed-point iteration (a contraction)."""
        x = y.copy()
        for _ in range(200):  # strain^200 is far below the tolerance for every strain allowed here
            x_next = y - self.displacement(x)
            if np.abs(x_next - x).max() < tolerance_mm:
                return x_next
            x = x_next
        raise ArithmeticError("a wave layer did not invert: its strain must be below 1")


@dataclass(frozen=True)
class SpatialMap:
    """A subject's map: its own coordinates -> the atlas's, an affine map after wave layers."""

    matrix: NDArray[np.float64] = field(default_factory=lambda: np.eye(3))  # (3, 3)
    offset: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # (3,) mm
    layers: tuple[WaveLayer, ...] = ()

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        *,
        rotation_rad: float = 0.12,
        scaling: float = 0.1,
        anisotropy: float = 0.05,
        shear: float = 0.05,
        translation_mm: float = 4.0,
        strain: float = 0.35,
        wavelengths_mm: tuple[float, float] = (70.0, 180.0),
        layers: int = 3,
        waves: int = 4,
    ) -> SpatialMap:
        """Draw an affine map (each range symmetric and uniform) and ``layers`` wave layers."""
        scale = np.exp(rng.uniform(-scaling, scaling) + rng.uniform(-anisotropy, anisotropy, 3))
        shears = np.eye(3)
        shears[np.triu_indices(3, 1)] = rng.uniform(-shear, shear, 3)
        matrix = rotation(rng.uniform(-rotation_rad, rotation_rad, 3)) @ np.diag(scale) @ shears
        offset = rng.uniform(-translation_mm, translation_mm, 3)
        return cls(
            matrix, offset, tuple(WaveLayer.draw(rng, strain, wavelengths_mm, waves) for _ in range(layers))
        )

    def to_atlas(self, points: NDArray[np.floating]) -> NDArray[np.floating]:
        """Map subject coordinates to the atlas, both (3, N) mm."""
        for layer in self.layers:
            points = points + layer.displacement(points)
        return self.matrix.astype(points.dtype) @ points + self.offset.astype(points.dtype)[:, None]

    def to_subject(self, points: ArrayLike) -> NDArray[np.float64]:
        """Map atlas coordinates to the subject, both (3, N) mm; the inverse of :meth:`to_atlas`."""
        centred = np.asarray(points, dtype=np.float64) - self.offset[:, None]
        y: NDArray[np.float64] = np.asarray(np.linalg.solve(self.matrix, centred), dtype=np.float64)
        for layer in reversed(self.layers):
            y = layer.invert(y)
        return y


def jacobian_determinant(
    spatial_map: SpatialMap, points: NDArray[np.float64], step_mm: float = 1e-3
) -> NDArray[np.float64]:
    """Return det d(atlas)/d(subject) at ``points`` (3, N) by central differences: (N,)."""
    columns = []
    for axis in range(3):
        step = np.zeros((3, 1))
        step[axis] = step_mm
        columns.append(
            (spatial_map.to_atlas(points + step) - spatial_map.to_atlas(points - step)) / (2 * step_mm)
        )
    return np.linalg.det(np.stack(columns, axis=-1).transpose(1, 0, 2))  # (N, 3, 3) -> (N,)


# --------------------------------------------------------------------------------------------------
# implicit shapes: (3, N) -> (N,), negative inside, in mm


def _column(v: ArrayLike, dtype: np.dtype) -> NDArray[np.floating]:
    return np.asarray(v, dtype=dtype).reshape(3, 1)


def ellipsoid(
    p: NDArray[np.floating], centre: ArrayLike, radii: ArrayLike, axes: ArrayLike | None = None
) -> NDArray[np.floating]:
    """Approximate signed distance to an ellipsoid.

    First-order estimate |q| (|q| - 1) / |q / r| with q = (p - c) / r: exact on the surface and for
    spheres, of the right sign everywhere.

    Args:
        p: points (3, N).
        centre: (3,) mm.
        radii: (3,) mm, along ``axes``.
        axes: (3, 3), the unit axes in its rows; the coordinate axes when None.
    """
    q = p - _column(centre, p.dtype)
    if axes is not None:
        q = np.asarray(axes, dtype=p.dtype) @ q
    r = _column(radii, p.dtype)
    q = q / r
    k0 = np.sqrt(np.einsum("in,in->n", q, q))
    q = q / r
    k1 = np.sqrt(np.einsum("in,in->n", q, q))
    return k0 * (k0 - 1) / np.maximum(k1, np.asarray(1e-6, p.dtype))


def tube(p: NDArray[np.floating], path: ArrayLike, radii: ArrayLike) -> NDArray[np.floating]:
    """Distance to a chain of round cones with spherical ends: ``path`` (M, 3), ``radii`` (M,) or scalar."""
    points = np.asarray(path, dtype=p.dtype)
    r = np.broadcast_to(np.asarray(radii, dtype=p.dtype), (len(points),))
    distance: NDArray[np.floating] | None = None
    for a, b, ra, rb in zip(points[:-1], points[1:], r[:-1], r[1:], strict=True):
        ab = b - a
        rel = p - a[:, None]
        t = np.clip((ab @ rel) / (ab @ ab), 0, 1)
        rel -= ab[:, None] * t
        d = np.sqrt(np.einsum("in,in->n", rel, rel)) - (ra + (rb - ra) * t)
        distance = d if distance is None else np.minimum(distance, d)
    if distance is None:
        raise ValueError(f"a tube needs two points or more, not {len(points)}")
    return distance


def half_space(p: NDArray[np.floating], point: ArrayLike, normal: ArrayLike) -> NDArray[np.floating]:
    """Signed distance to a plane, positive on the side that ``normal`` points to."""
    n = np.asarray(normal, dtype=p.dtype)
    n = n / np.linalg.norm(n)
    return n @ (p - _column(point, p.dtype))


def smooth_min(k_mm: float, *fields: NDArray[np.floating]) -> NDArray[np.floating]:
    """Union whose seams are rounded over ``k_mm`` (quadratic smooth minimum, applied in turn)."""
    out = fields[0]
    for other in fields[1:]:
        h = np.maximum(k_mm - np.abs(out - other), 0) / k_mm
        out = np.minimum(out, other) - h * h * (k_mm / 4)
    return out


def waves_noise(
    rng: np.random.Generator, p: NDArray[np.floating], wavelengths_mm: tuple[float, float], waves: int
) -> NDArray[np.floating]:
    """Smooth random field of about zero mean and unit variance: (3, N) -> (N,)."""
    direction = rng.normal(size=(waves, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    w = (direction * (2 * np.pi / rng.uniform(*wavelengths_mm, size=(waves, 1)))).astype(p.dtype)
    phases = rng.uniform(0, 2 * np.pi, (waves, 1)).astype(p.dtype)
    return np.sin(w @ p + phases).sum(0) * np.asarray(np.sqrt(2 / waves), p.dtype)


# --------------------------------------------------------------------------------------------------
# curves and thin tubes, painted voxel by voxel


def spline(points: ArrayLike, step_mm: float) -> NDArray[np.float64]:
    """Return points every ``step_mm`` or closer on the Catmull-Rom spline through ``points``: (M, 3)."""
    p = np.asarray(points, dtype=np.float64)
    padded = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    pieces = []
    for a, b, c, d in zip(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], strict=True):
        n = max(int(np.ceil(np.linalg.norm(c - b) * 1.3 / step_mm)), 1)
        t = (np.arange(n) / n)[:, None]
        pieces.append(
            0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        )
    return np.concatenate([*pieces, p[-1:]])


def densify(
    path: NDArray[np.float64], values: NDArray[np.float64], step_mm: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Resample a polyline (M, 3) and values on it (M,) linearly, ``step_mm`` apart or closer."""
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    at = np.linspace(0, length[-1], max(int(np.ceil(length[-1] / step_mm)), 1) + 1)
    return np.stack([np.interp(at, length, c) for c in path.T], axis=1), np.interp(at, length, values)


def paint(
    shape: Sequence[int], centres_vox: NDArray[np.float64], radii_vox: NDArray[np.float64], reach_vox: float
) -> Array:
    """Return each voxel's distance to a union of balls, in voxels; +reach beyond ``reach_vox``.

    Args:
        shape: the grid.
        centres_vox: ball centres in voxel coordinates (N, 3); those outside the grid are allowed.
        radii_vox: (N,).
        reach_vox: distances above it are not computed.
    """
    out = np.full(int(np.prod(shape)), reach_vox, dtype=np.float32)
    if len(centres_vox) == 0:
        return out.reshape(shape)
    half = int(np.ceil(radii_vox.max() + reach_vox))
    offsets = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    offsets = offsets[(offsets**2).sum(1) <= (half + 1) ** 2]
    nearest = np.rint(centres_vox).astype(np.int64)
    voxels = nearest[:, None, :] + offsets[None]  # (N, K, 3)
    distance = np.linalg.norm(voxels - centres_vox[:, None, :], axis=-1) - radii_vox[:, None]  # (N, K)
    keep = ((voxels >= 0) & (voxels < np.asarray(shape))).all(-1) & (distance < reach_vox)
    flat = np.ravel_multi_index(tuple(voxels[keep].T), tuple(shape))
    np.minimum.at(out, flat, distance[keep].astype(np.float32))
    return out.reshape(shape)
