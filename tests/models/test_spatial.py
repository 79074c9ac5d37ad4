"""Affine maps and warping, against scipy, torch's affine_grid and slow loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from torch import Tensor

from ssl3d.geometry import (
    affine_coords,
    affine_matrix,
    compose,
    filter_axes,
    identity_coords,
    identity_matrix,
    jacobian_determinant,
    transform_coords,
    warp,
)


def values(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random rotation, scaling, shearing and translation in float64."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(batch, 15, generator=g, dtype=torch.float64) * 2 - 1
    return u[:, :3] * math.pi / 9, 1 + u[:, 3:6] / 4, u[:, 6:12] * math.pi / 18, u[:, 12:] * 0.2


def blobs(size: tuple[int, ...], seed: int = 0, sigma: float = 3.0) -> Tensor:
    """A smooth random image (1, 1, D, H, W) in float64 that vanishes towards the border."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
    image = np.zeros(size)
    for _ in range(12):
        centre = [rng.uniform(0.3 * n, 0.7 * n) for n in size]
        distance = sum((grid[k] - centre[k]) ** 2 for k in range(3))
        image += rng.uniform(0.2, 1) * np.exp(-distance / (2 * sigma**2))
    return torch.from_numpy(image)[None, None]


def slow_matrix(rot: np.ndarray, scl: np.ndarray, shr: np.ndarray, tra: np.ndarray, order: str) -> np.ndarray:
    turn = Rotation.from_euler("xyz", rot).as_matrix()  # lower case: extrinsic, so Rz Ry Rx
    xy, xz, yx, yz, zx, zy = np.tan(shr)
    shear = np.array([[1, xy, xz], [yx, 1, yz], [zx, zy, 1]])
    if order == "released":
        return np.column_stack([shear @ np.diag(scl) @ turn, tra])
    homogeneous = np.eye(4)
    for factor in (turn, np.diag(scl), shear):
        block = np.eye(4)
        block[:3, :3] = factor
        homogeneous = homogeneous @ block
    shift = np.eye(4)
    shift[:3, 3] = tra
    return (homogeneous @ shift)[:3]


@pytest.mark.parametrize("order", ["released", "paper"])
def test_affine_matrix_of_known_values(order: str) -> None:
    parameters = values()
    matrix = affine_matrix(*parameters, order=order)
    for i in range(3):
        expected = slow_matrix(*(p[i].numpy() for p in parameters), order)
        np.testing.assert_allclose(matrix[i].numpy(), expected, atol=1e-14)


def test_affine_matrix_is_differentiable() -> None:
    parameters = [p.requires_grad_() for p in values(2)]
    assert torch.autograd.gradcheck(lambda *p: affine_matrix(*p), parameters)
    assert torch.autograd.gradcheck(lambda *p: affine_matrix(*p, order="paper"), parameters)


def test_a_rotation_about_x_turns_y_towards_z() -> None:
    rotation = torch.tensor([[math.pi / 2, 0, 0]])
    matrix = affine_matrix(rotation, torch.ones(1, 3), torch.zeros(1, 6), torch.zeros(1, 3))
    torch.testing.assert_close(matrix[0, :, :3] @ torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 0, 1]))


def test_coords_equal_affine_grid_for_a_cube() -> None:
    matrix = affine_matrix(*values())
    n = 7
    expected = F.affine_grid(matrix, [3, 1, n, n, n], align_corners=False)  # (B, D, H, W, 3), (x, y, z)
    voxels = ((expected + 1) * n - 1) / 2
    torch.testing.assert_close(affine_coords(matrix, (n, n, n)), voxels.flip(-1).movedim(-1, 1))


def test_a_rotation_stays_a_rotation_in_a_volume_that_is_not_a_cube() -> None:
    rotation, one, zero = values()[0], torch.ones(3, 3).double(), torch.zeros(3, 6).double()
    coords = affine_coords(affine_matrix(rotation, one, zero, zero[:, :3]), (6, 9, 14))
    before = identity_coords((6, 9, 14), coords)
    first, last = (0, 0, 0), (5, 8, 13)
    lengths = [(c[:, :, *last] - c[:, :, *first]).norm(dim=1) for c in (coords, before)]
    torch.testing.assert_close(lengths[0], lengths[1].expand(3))
    middle = coords.mean((2, 3, 4))
    torch.testing.assert_close(middle, torch.tensor([2.5, 4, 6.5]).double().expand(3, 3))


def test_translation_is_in_half_edges_of_the_longest_axis() -> None:
    matrix = identity_matrix(1, torch.zeros(1)).clone()
    matrix[0, :, 3] = torch.tensor([0.5, 0.25, -0.25])  # x (w), y (h), z (d)
    moved = affine_coords(matrix, (4, 8, 16)) - identity_coords((4, 8, 16), matrix)
    torch.testing.assert_close(moved[0, :, 0, 0, 0], torch.tensor([-2.0, 2, 4]))


def test_warp_equals_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.rand(2, 2, 5, 6, 7, generator=g, dtype=torch.float64)
    coords = (
        identity_coords((4, 8, 5), image)
        + 3 * torch.rand(2, 3, 4, 8, 5, generator=g, dtype=torch.float64)
        - 1.5
    )
    for torch_mode, torch_padding, order, scipy_mode in (
        ("bilinear", "zeros", 1, "grid-constant"),
        ("bilinear", "border", 1, "nearest"),
        ("nearest", "border", 0, "nearest"),
    ):
        warped = warp(image, coords, torch_mode, torch_padding)
        assert warped.shape == (2, 2, 4, 8, 5)
        for i, c in itertools.product(range(2), range(2)):
            expected = map_coordinates(image[i, c].numpy(), coords[i].numpy(), order=order, mode=scipy_mode)
            np.testing.assert_allclose(warped[i, c].numpy(), expected, atol=1e-12)


def test_identity_changes_nothing() -> None:
    image = torch.rand(2, 1, 5, 6, 7)
    coords = affine_coords(identity_matrix(2, image), (5, 6, 7))
    torch.testing.assert_close(warp(image, coords), image)
    assert float((jacobian_determinant(coords) - 1).abs().max()) < 1e-5


def test_everything_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        parameters = [p.to(torch.bfloat16) for p in values()]
        matrix = affine_matrix(*parameters)
        coords = compose(matrix, torch.zeros(3, 3, 4, 5, 6, dtype=torch.bfloat16))
        warped = warp(torch.rand(3, 1, 4, 5, 6, dtype=torch.bfloat16), coords)
    assert {t.dtype for t in (matrix, coords, warped)} == {torch.float32}
    torch.testing.assert_close(
        coords, affine_coords(affine_matrix(*(p.float() for p in parameters)), (4, 5, 6))
    )


# Fusion ---------------------------------------------------------------------------------------


def field(size: tuple[int, int, int], amplitude: float, seed: int = 1) -> Tensor:
    """A smooth displacement field (1, 3, D, H, W) in float64."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 3, 3, 3, generator=g, dtype=torch.float64) * 2 - 1
    return amplitude * F.interpolate(coarse, size, mode="trilinear", align_corners=True)


def test_one_resampling_equals_two_where_interpolation_is_exact() -> None:
    """Released order: x resampled by psi^g, the result by psi^l; integer shifts interpolate nothing."""
    image = blobs((12, 16, 20))
    matrix = identity_matrix(1, image).clone()
    matrix[0, :, 3] = torch.tensor([2, -1, 3]) / 10  # voxels along (w, h, d): half the longest edge is 10
    shift = torch.zeros(1, 3, 12, 16, 20, dtype=torch.float64)
    shift[:, 0, 4:], shift[:, 1, :, 3:], shift[:, 2, :, :, :7] = 1, -2, 2
    twice = warp(
        warp(image, affine_coords(matrix, (12, 16, 20))), identity_coords((12, 16, 20), image) + shift
    )
    once = warp(image, compose(matrix, shift))
    assert float(once.abs().max()) > 0.5
    torch.testing.assert_close(once, twice, atol=1e-10, rtol=0)


def test_one_resampling_equals_two_up_to_interpolation() -> None:
    size = (32, 36, 40)
    image, matrix, displacement = blobs(size, sigma=4), affine_matrix(*values(1)), field(size, 2.0)
    exact = map_coordinates(image[0, 0], compose(matrix, displacement)[0], order=5, mode="grid-constant")
    twice = warp(warp(image, affine_coords(matrix, size)), identity_coords(size, image) + displacement)
    once = warp(image, compose(matrix, displacement))
    error_once, error_twice = ((w[0, 0] - torch.from_numpy(exact)).abs().mean() for w in (once, twice))
    assert float((once - twice).abs().max()) < 0.05  # of a range of 1
    assert error_once < 0.7 * error_twice, "one resampling must be the sharper one"


def slow_eq12(matrix: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """psi(p) = psi^l(p^) + p^ - p, p^ = psi^g p, voxel by voxel; returns p + psi(p)."""
    size = np.array(displacement.shape[1:])
    centre, half = (size - 1) / 2, size.max() / 2
    out = np.zeros_like(displacement)
    for p in itertools.product(*map(range, size)):
        xyz = ((np.array(p) - centre) / half)[::-1]
        aligned = (matrix[:, :3] @ xyz + matrix[:, 3])[::-1] * half + centre
        inside = np.clip(aligned, 0, size - 1)
        low = np.minimum(np.floor(inside).astype(int), size - 2)
        t = inside - low
        local = np.zeros(3)
        for corner in itertools.product((0, 1), repeat=3):
            weight = np.prod([t[k] if corner[k] else 1 - t[k] for k in range(3)])
            local += weight * displacement[:, *(low + corner)]
        psi = local + aligned - np.array(p)
        out[:, *p] = np.array(p) + psi
    return out


def test_eq12_equals_the_loop_over_voxels() -> None:
    matrix, displacement = affine_matrix(*values(1, seed=3)), field((5, 6, 8), 1.5)
    fused = compose(matrix, displacement, "eq12")
    expected = slow_eq12(matrix[0].numpy(), displacement[0].numpy())
    np.testing.assert_allclose(fused[0].numpy(), expected, atol=1e-12)
    assert float((fused - compose(matrix, displacement)).abs().max()) > 0.05  # the two orders differ


@pytest.mark.parametrize("order", ["released", "eq12"])
def test_compose_is_differentiable(order: str) -> None:
    matrix, displacement = affine_matrix(*values(2)), field((3, 4, 5), 0.7).repeat(2, 1, 1, 1, 1)
    inputs = (matrix.requires_grad_(), displacement.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, u: compose(m, u, order), inputs, fast_mode=True)


def test_a_known_affine_map_and_field_are_undone() -> None:
    """Deform an image analytically by the inverse map; warping by the map recovers it."""
    size = (32, 36, 40)
    image, matrix, displacement = blobs(size, sigma=4), affine_matrix(*values(1)), field(size, 1.5)
    coords = compose(matrix, displacement)  # psi
    # psi^-1 = (1 + u)^-1 o A^-1, the former by fixed-point iteration.
    full = torch.cat([matrix, torch.tensor([[[0, 0, 0, 1.0]]]).double()], dim=1).inverse()[:, :3]
    target = transform_coords(full, identity_coords(size, image))
    inverse = target
    for _ in range(60):
        inverse = target - warp(displacement, inverse, padding_mode="border")
    deformed = torch.from_numpy(map_coordinates(image[0, 0], inverse[0], order=5, mode="nearest"))[None, None]
    recovered = warp(deformed, coords)
    inner = (..., slice(8, -8), slice(8, -8), slice(8, -8))
    before, after = ((x - image)[inner].abs().mean() for x in (deformed, recovered))
    assert before > 0.1
    assert after < 0.02 * image.max()
    assert after < before / 10


def test_jacobian_determinant_of_known_maps() -> None:
    scale = affine_matrix(
        torch.zeros(1, 3), torch.tensor([[2.0, 0.5, 3.0]]), torch.zeros(1, 6), torch.zeros(1, 3)
    )
    determinant = jacobian_determinant(affine_coords(scale, (4, 5, 6)))
    assert determinant.shape == (1, 3, 4, 5)
    torch.testing.assert_close(determinant, torch.full_like(determinant, 3.0))
    coords = identity_coords((4, 5, 6), scale).clone()
    coords[:, 2, :, :, 3] -= 2  # one plane crosses its neighbour: a fold before it
    assert int((jacobian_determinant(coords)[0] <= 0).any(0).any(0).sum()) == 1


def test_filter_axes_equals_einsum() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, 5, 6, generator=g, dtype=torch.float64)
    shared = [torch.rand(n - 1, n, generator=g, dtype=torch.float64) for n in (4, 5, 6)]
    own = [torch.rand(2, n, n, generator=g, dtype=torch.float64) for n in (4, 5, 6)]
    torch.testing.assert_close(filter_axes(x, shared), torch.einsum("bcdhw,id,jh,kw->bcijk", x, *shared))
    torch.testing.assert_close(filter_axes(x, own), torch.einsum("bcdhw,bid,bjh,bkw->bcijk", x, *own))
