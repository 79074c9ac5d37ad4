"""Transforms against plain loops over boxes and voxels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ssl3d.rng
from ssl3d.errors import ConfigError
from ssl3d.geometry import affine_coords, compose, identity_coords, warp
from ssl3d.rng import BatchRng
from ssl3d.transforms import (
    BezierIntensity,
    BrightnessContrast,
    Flip,
    Gamma,
    GaussianBlur,
    GaussianNoise,
    InPainting,
    LocalShuffle,
    OutPainting,
    RandomResizedCrop,
    RandomSpatial,
    shuffling,
)
from ssl3d.transforms.appearance import _union_by_products, _union_by_slices, gaussian_kernel

SIZE = (20, 24, 30)
CPU = torch.device("cpu")


def volumes(batch: int = 3, size: tuple[int, ...] = SIZE, seed: int = 0) -> Tensor:
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(seed))


def rng(indices: tuple[int, ...] = (0, 1, 2), step: int = 0) -> BatchRng:
    return BatchRng(7, step, indices)


EVERY = [
    LocalShuffle(),
    LocalShuffle(p=1.0, boxes=200, fraction=1 / 5, random_size=True),
    BezierIntensity(),
    BezierIntensity(p=1.0, invert_p=0.5),
    InPainting(),
    OutPainting(),
    GaussianNoise(),
    GaussianBlur(p=1.0),
    BrightnessContrast(p=1.0),
    Gamma(p=1.0),
    RandomSpatial(),
    Flip(),
    RandomResizedCrop(SIZE),
]


@pytest.mark.parametrize("transform", EVERY, ids=lambda t: type(t).__name__)
def test_contract(transform) -> None:
    """Shape, range, dtype; input untouched; a pure function of (seed, step, index); samples independent."""
    x = volumes()
    before = x.clone()
    y = transform(x, rng())
    assert torch.equal(x, before)
    assert y.shape == x.shape and y.dtype == torch.float32
    assert float(y.min()) >= -1e-6 and float(y.max()) <= 1 + 1e-6
    assert torch.equal(y, transform(x, rng()))
    assert not torch.equal(y, transform(x, rng(step=1)))
    # The second sample alone: other batch size, other neighbours, the same result.
    alone = transform(x[1:2], rng((1,)))
    torch.testing.assert_close(alone, y[1:2], atol=1e-5, rtol=0)  # sums of other lengths may round otherwise


class Waits(TorchDispatchMode):
    """Refuse copies to a device that the host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", CPU).type == "cuda":
            assert args[0].device.type == "cuda" or kwargs.get("non_blocking"), (
                "the host waits for the device"
            )
        return func(*args, **kwargs)


@pytest.fixture
def pretended() -> Iterator[None]:
    """A CUDA device that computes shapes only: whatever would read a value back raises."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(ssl3d.rng, "_has_philox", lambda device: True)
        # Not known to pretended tensors; it copies on the host, and waits for no device.
        patch.setattr(torch.Tensor, "pin_memory", lambda x: x)
        ssl3d.rng._normal_table.cache_clear()
        ssl3d.rng._normal_table(torch.device("cuda:0"))  # waits, once a process
        with Waits():
            yield
    ssl3d.rng._normal_table.cache_clear()


@pytest.mark.parametrize("transform", EVERY, ids=lambda t: type(t).__name__)
def test_no_transform_waits_for_the_device(transform, pretended: None) -> None:
    x = torch.empty(3, 1, *SIZE, device="cuda")
    y = transform(x, BatchRng(7, 0, (0, 1, 2), "cuda"))
    assert y.shape == x.shape and y.device.type == "cuda"


def test_the_pretended_device_notices_waiting(pretended: None) -> None:
    x = torch.empty(3, device="cuda")
    noticed = AssertionError, DataDependentOutputException, DynamicOutputShapeException
    for wait in (x.tolist, lambda: bool(x[0] > 0), x.nonzero, lambda: torch.tensor([1.0], device="cuda")):
        with pytest.raises(noticed):
            wait()


@pytest.mark.parametrize(
    "transform",
    [LocalShuffle(p=0.5), BezierIntensity(p=0.5), GaussianNoise(p=0.5), GaussianBlur(p=0.5),
     BrightnessContrast(p=0.5), Gamma(p=0.5), InPainting(p=0.5), OutPainting(p=0.5)],
    ids=lambda t: type(t).__name__,
)  # fmt: skip
def test_probability_is_per_volume(transform) -> None:
    x = volumes(40, (8, 8, 8))
    y = transform(x, BatchRng(0, 0, range(40)))
    changed = (y != x).flatten(1).any(1)
    assert 10 <= int(changed.sum()) <= 30  # 20 +- 3.2 standard deviations


# Local shuffling ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fraction": 0.2}, {"fraction": 0.3, "random_size": True}])
@pytest.mark.parametrize("size", [(20, 24, 30), (9, 20, 11)])
def test_local_shuffle_equals_the_loop_over_boxes(options: dict, size: tuple[int, int, int]) -> None:
    """Each box reads the undamaged volume; the last box wins; within a box, a permutation."""
    transform = LocalShuffle(boxes=300, **options)
    total = math.prod(size)
    source = transform.source_voxels(size, rng())[1].numpy()
    starts, edges = (drawn[1] for drawn in transform.draw_boxes(size, rng()))
    assert bool((starts >= 0).all()) and bool((starts + edges <= torch.tensor(size)).all())
    owner = np.full(size, -1)
    for box, (start, edge) in enumerate(zip(starts.tolist(), edges.tolist(), strict=True)):
        owner[tuple(slice(s, s + e) for s, e in zip(start, edge, strict=True))] = box
    untouched = owner.ravel() < 0
    assert 0 < untouched.sum() < total
    np.testing.assert_array_equal(source[untouched], np.arange(total)[untouched])
    indices = np.arange(total).reshape(size)
    whole = 0
    for box, (start, edge) in enumerate(zip(starts.tolist(), edges.tolist(), strict=True)):
        inside = indices[tuple(slice(s, s + e) for s, e in zip(start, edge, strict=True))].ravel()
        mine = inside[owner.ravel()[inside] == box]
        assert np.isin(source[mine], inside).all()
        assert len(set(source[mine])) == len(mine)  # no voxel is read twice by one box
        if len(mine) == len(inside):
            whole += 1
            assert sorted(source[mine]) == sorted(inside)
    assert whole > 0


def test_local_shuffle_gives_each_box_its_own_uniform_permutation() -> None:
    transform = LocalShuffle(p=1.0, boxes=1, fraction=1 / 2)
    size = (4, 4, 4)
    counts = np.zeros((8, 8))
    draws = BatchRng(0, 0, range(1600))
    sources = transform.source_voxels(size, draws).view(-1, *size)
    starts, edges = transform.draw_boxes(size, BatchRng(0, 0, range(1600)))
    for source, (start,), (edge,) in zip(sources, starts.tolist(), edges.tolist(), strict=True):
        box = tuple(slice(s, s + e) for s, e in zip(start, edge, strict=True))
        inside = torch.arange(64).view(size)[box].ravel()
        rank = torch.searchsorted(inside, source[box].ravel())
        counts[np.arange(8), rank] += 1
    assert counts.sum() == 1600 * 8
    assert abs(counts - 200).max() < 5 * math.sqrt(200)  # every voxel goes everywhere equally often


def test_local_shuffle_counts_and_sizes_of_boxes() -> None:
    starts, edges = LocalShuffle().draw_boxes((64, 128, 160), rng())
    assert starts.shape == (3, 5000, 3) and edges.flatten(0, 1).unique(dim=0).tolist() == [[3, 6, 8]]
    starts, edges = LocalShuffle().draw_boxes((32, 32, 32), rng())
    # 1.6 voxels became 2, so fewer boxes cover the same share of the volume.
    assert edges.unique().tolist() == [2] and starts.shape[1] == round(5000 * 0.8**3)
    _, edges = LocalShuffle(boxes=10_000, fraction=1 / 10, random_size=True).draw_boxes((64, 64, 64), rng())
    assert sorted(edges.unique().tolist()) == [1, 2, 3, 4, 5, 6]


def test_local_shuffle_applies_its_source_voxels() -> None:
    x = volumes(2)
    y = LocalShuffle(p=1.0)(x, rng((0, 1)))
    draws = rng((0, 1))
    draws.bernoulli(1.0)
    for i, source in enumerate(LocalShuffle(p=1.0).source_voxels(SIZE, draws)):
        assert torch.equal(y[i].ravel(), x[i].ravel()[source])
    assert 0.3 < float((y != x).float().mean()) < 0.95


@pytest.mark.parametrize("random_size", [False, True])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6])
def test_the_forms_of_local_shuffle_for_devices_give_the_same(fraction: float, random_size: bool) -> None:
    transform = LocalShuffle(boxes=200, fraction=fraction, random_size=random_size)
    largest = transform.largest(SIZE)

    def source(shuffle: Callable[..., Tensor]) -> Tensor:
        draws = rng()
        return shuffle(SIZE, *transform.draw_boxes(SIZE, draws), largest, draws)

    chosen, packed, padded = map(
        source, (shuffling.source_voxels, shuffling.boxes_packed, shuffling.boxes_padded)
    )
    assert torch.equal(packed, padded) and torch.equal(chosen, packed)
    if not random_size and math.prod(largest) <= 2**16:
        assert torch.equal(source(shuffling.boxes_alike), packed)


def test_the_forms_of_painting_for_devices_give_the_same() -> None:
    draws = BatchRng(0, 0, range(4))
    start = draws.integers(0, 20, (9, 3))
    end = start + draws.integers(1, 12, (9, 3))
    count = torch.tensor([0, 1, 5, 9])
    masks = [union((25, 31, 18), start, end, count) for union in (_union_by_slices, _union_by_products)]
    assert torch.equal(*masks) and not masks[0][0].any() and 0 < masks[0][1].sum() < masks[0][3].sum()


# Intensity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("invert_p", [0.0, 1.0])
def test_bezier_equals_numpy_interpolation_of_the_curve(invert_p: float) -> None:
    x = volumes()
    x[0, 0, 0, 0, :3] = torch.tensor([0.0, 1.0, 0.5])
    transform = BezierIntensity(p=1.0, invert_p=invert_p)
    y = transform(x, rng())
    draws = rng()
    draws.bernoulli(1.0)
    points = draws.uniform(shape=(2, 2)).double().numpy()
    for i in range(3):
        t = np.linspace(0, 1, transform.points)
        first, second = points[i]
        curve = [3 * (1 - t) ** 2 * t * first[k] + 3 * (1 - t) * t**2 * second[k] + t**3 for k in (0, 1)]
        assert (np.diff(curve[0]) >= 0).all() and (np.diff(curve[1]) >= 0).all()
        expected = np.interp(x[i].numpy(), *curve)
        np.testing.assert_allclose(y[i], 1 - expected if invert_p else expected, atol=2e-5)


def test_bezier_is_monotonic_and_keeps_the_ends() -> None:
    ramp = torch.linspace(0, 1, 4096).view(1, 1, 16, 16, 16).expand(200, 1, 16, 16, 16)
    y = BezierIntensity(p=1.0, invert_p=0.5)(ramp, BatchRng(0, 0, range(200))).flatten(1)
    rising = y[:, 0] < 0.5
    assert 70 < int(rising.sum()) < 130
    ends = y[:, [0, -1]]
    torch.testing.assert_close(ends[rising], torch.tensor([[0.0, 1.0]]).expand(int(rising.sum()), 2))
    torch.testing.assert_close(ends[~rising], torch.tensor([[1.0, 0.0]]).expand(int((~rising).sum()), 2))
    steps = y.diff(dim=1)
    assert float(steps[rising].min()) >= -1e-6 and float(steps[~rising].max()) <= 1e-6


def test_gaussian_noise_has_the_stated_deviation() -> None:
    x = torch.full((2, 1, 32, 32, 32), 0.5)
    residual = GaussianNoise(sigma=(0.1, 0.1), clip=False)(x, rng((0, 1))) - x
    assert float(residual.std()) == pytest.approx(0.1, rel=0.02) and abs(float(residual.mean())) < 2e-3
    assert float((GaussianNoise(sigma=(0.5, 0.5), clip=False)(x, rng((0, 1)))).max()) > 1


def test_brightness_contrast_and_gamma_formulas() -> None:
    x = volumes(1) * 0.2 + 0.4
    y = BrightnessContrast(p=1.0, brightness=(0.1, 0.1), contrast=(0.5, 0.5))(x, rng((0,)))
    torch.testing.assert_close(y, x.mean() + 0.5 * (x - x.mean()) + 0.1)
    torch.testing.assert_close(Gamma(p=1.0, gamma=(2.0, 2.0))(x, rng((0,))), x**2)
    exponents = [
        float(Gamma(p=1.0, gamma=(0.5, 2.0))(x, rng((i,))).log().mean() / x.log().mean()) for i in range(60)
    ]
    assert 0.5 <= min(exponents) < 0.8 and 1.25 < max(exponents) <= 2.001
    assert 18 < sum(e < 1 for e in exponents) < 42  # 1 is the middle of the logarithms


def test_gaussian_blur_is_the_mean_of_what_lies_inside() -> None:
    x = volumes(1, (7, 8, 9))
    y = GaussianBlur(p=1.0, sigma=(1.2, 1.2))(x, rng((0,)))
    inside = np.ones((7, 8, 9))
    mass = gaussian_filter(inside, 1.2, mode="constant", truncate=4.0)  # what the border leaves of the kernel
    expected = gaussian_filter(x[0, 0].double().numpy(), 1.2, mode="constant", truncate=4.0) / mass
    np.testing.assert_allclose(y[0, 0].numpy(), expected, atol=1e-6)


def test_gaussian_kernel_equals_scipy_with_zeros_outside() -> None:
    x = np.random.default_rng(0).random((20, 24, 30))
    kernels = [gaussian_kernel(n, torch.tensor([2.3]), 2.3)[0].double().numpy() for n in x.shape]
    ours = np.einsum("dhw,id,jh,kw->ijk", x, *kernels)
    np.testing.assert_allclose(ours, gaussian_filter(x, 2.3, mode="constant", truncate=4.0), atol=1e-6)


# Painting -------------------------------------------------------------------------------------


def test_in_painting_fills_boxes_with_uniform_noise_and_nothing_else() -> None:
    x = torch.full((3, 1, 40, 40, 40), 2.0)  # a value that the noise cannot have
    transform = InPainting()
    y = transform(x, rng())
    holes = transform.holes(x, rng())
    assert torch.equal(y[~holes], x[~holes])
    noise = y[holes]
    assert float(noise.max()) < 1 and float(noise.min()) >= 0
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(noise.var()) == pytest.approx(1 / 12, abs=0.01)


def test_in_painting_boxes_have_the_stated_number_and_edges() -> None:
    one = InPainting(max_boxes=1, next_p=1.0, edges=(1 / 10, 1 / 5))
    seen = set()
    for (holes,) in one.holes(torch.zeros(80, 1, 30, 40, 10), BatchRng(0, 0, range(80))):
        where = holes.nonzero()
        edges = tuple((where.max(0).values - where.min(0).values + 1).tolist())
        assert math.prod(edges) == int(holes.sum())  # a solid box
        seen.add(edges)
    assert {e[0] for e in seen} == {3, 4, 5, 6} and {e[1] for e in seen} == set(range(4, 9))
    assert {e[2] for e in seen} == {1, 2}
    # The number of boxes is geometric with next_p, cut at max_boxes: mean p (1 - p^n) / (1 - p).
    tiny = InPainting(max_boxes=4, next_p=0.5, edges=(1e-3, 1e-3))
    draws = BatchRng(0, 0, range(300))
    counts = tiny.holes(torch.zeros(300, 1, 20, 20, 20), draws).flatten(1).sum(1).numpy()
    assert counts.max() == 4 and counts.min() == 0
    assert counts.mean() == pytest.approx(0.9375, abs=0.2)


def test_out_painting_keeps_boxes_only() -> None:
    x = torch.full((3, 1, 35, 35, 35), 2.0)
    transform = OutPainting(max_boxes=1)
    y, holes = transform(x, rng()), transform.holes(x, rng())
    assert torch.equal(y[~holes], x[~holes]) and float(y[holes].max()) < 1
    for kept in ~holes[:, 0]:
        where = kept.nonzero()
        edges = where.max(0).values - where.min(0).values + 1
        assert int(edges.prod()) == int(kept.sum()) and all(15 <= e <= 20 for e in edges.tolist())
    assert (~OutPainting().holes(x, rng())).float().mean() > (~holes).float().mean()


# Spatial --------------------------------------------------------------------------------------


def test_random_spatial_is_one_resampling_by_its_parameters() -> None:
    transform, x = RandomSpatial(), volumes()
    parameters = transform.sample(SIZE, rng())
    assert parameters.displacement is not None
    torch.testing.assert_close(parameters.coords, compose(parameters.matrix, parameters.displacement))
    y = transform(x, rng())
    expected = np.stack(
        [map_coordinates(x[i, 0], parameters.coords[i], order=1, mode="grid-constant") for i in range(3)]
    )
    np.testing.assert_allclose(y[:, 0], expected, atol=1e-4)
    both = transform.apply(torch.cat([x, x], dim=1), parameters)
    assert torch.equal(both[:, :1], both[:, 1:])  # volumes that share the parameters move alike


def test_random_spatial_stays_in_its_limits() -> None:
    size = (16, 16, 16)
    draws = BatchRng(0, 0, range(400))
    only = {"rotation": 0.0, "scale": (1.0, 1.0), "translation": 0.0, "shear": 0.0, "alpha": (0.0, 0.0)}
    shift = RandomSpatial(**{**only, "translation": 0.1}).sample(size, draws)  # type: ignore[arg-type]
    assert shift.displacement is None
    moved = (shift.coords - affine_coords(torch.eye(3, 4)[None], size))[:, :, 0, 0, 0]
    assert 1.5 < float(moved.max()) <= 1.6001 and -1.6001 <= float(moved.min()) < -1.5  # 10 % of 16 voxels
    scale = RandomSpatial(**{**only, "scale": (0.75, 1.25)}).sample(size, draws).matrix  # type: ignore[arg-type]
    diagonal = scale[:, range(3), range(3)]
    assert 0.75 <= float(diagonal.min()) < 0.76 and 1.24 < float(diagonal.max()) <= 1.25
    shear = RandomSpatial(**{**only, "shear": 0.1}).sample(size, draws).matrix[:, 0, 1]  # type: ignore[arg-type]
    assert 0.095 < float(shear.atan().max()) <= 0.1001
    turn = RandomSpatial(**{**only, "rotation": 0.3}).sample(size, draws).matrix  # type: ignore[arg-type]
    about_z = torch.atan2(turn[:, 1, 0], turn[:, 0, 0])
    assert 0.28 < float(about_z.max()) <= 0.3001
    torch.testing.assert_close(turn[:, :, :3] @ turn[:, :, :3].mT, torch.eye(3).expand(400, 3, 3))


def test_elastic_field_equals_scipy_and_scales_with_the_volume() -> None:
    size = (20, 24, 30)
    transform = RandomSpatial(
        alpha=(100.0, 100.0), sigma=(1.5, 1.5), reference_edge=None
    )  # noise in each voxel
    field = transform.elastic(size, rng((0,)))
    draws = rng((0,))
    draws.uniform(shape=(1, 1, 1, 1))
    draws.uniform()
    noise = draws.uniform(-1, 1, (3, *size))
    for axis in range(3):
        expected = 100 * gaussian_filter(noise[0, axis].double(), 1.5, mode="constant", truncate=4.0)
        np.testing.assert_allclose(field[0, axis], expected, atol=1e-3)
    # Half the reference edge: half the displacement, in voxels.
    deviations = [
        float(RandomSpatial(alpha=(512.0, 512.0), sigma=(6.0, 6.0), reference_edge=64)
              .elastic((n, n, n), BatchRng(0, 0, range(6))).std())
        for n in (64, 32)
    ]  # fmt: skip
    assert deviations[0] / deviations[1] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(
    ("n", "sigma", "nodes"), [(128, 10.0, 20), (128, 13.0, 20), (40, 3.125, 20), (32, 3.25, 20)]
)
def test_noise_at_nodes_has_the_covariance_of_noise_in_every_voxel(n: int, sigma: float, nodes: int) -> None:
    smooth = [gaussian_kernel(n, torch.tensor([sigma]).double(), sigma, m)[0] for m in (n, nodes)]
    fine, coarse = (matrix @ matrix.T for matrix in smooth)
    error = (coarse - fine).abs() / fine.max()
    inside = slice(n // 4, -n // 4)
    assert float(error[inside, inside].max()) < 3e-4 and float(error.max()) < 0.015


def test_elastic_field_has_the_stated_deviation_and_is_gaussian() -> None:
    transform = RandomSpatial(alpha=(512.0, 512.0), sigma=(10.0, 10.0))
    field = transform.elastic((40, 40, 40), BatchRng(0, 0, range(150)))[:, :, 18:22:3, 18:22:3, 18:22:3]
    # White noise of variance 1/3, smoothed: 1 / (2 sigma sqrt(pi)) of it an axis; in proportion to the edge.
    s = 40 / 128
    expected = 512 * s**2.5 * math.sqrt(1 / 3 / (2 * 10 * s * math.sqrt(math.pi)) ** 3)
    assert float(field.std()) == pytest.approx(expected, rel=0.05)
    assert abs(float(((field / field.std()) ** 4).mean()) - 3) < 0.4


def test_flip_mirrors_the_target_too() -> None:
    x = volumes(8)
    flips = Flip().sample(BatchRng(0, 0, range(8)))
    assert 4 < int(flips.sum()) < 20
    y = Flip().apply(x, flips)
    for i in range(8):
        axes = [a + 1 for a in range(3) if flips[i, a]]
        assert torch.equal(y[i], x[i].flip(axes))
    assert torch.equal(Flip()(x, BatchRng(0, 0, range(8))), y)


def test_random_resized_crop_samples_voxel_centres_of_its_box() -> None:
    ramp = identity_coords(SIZE, torch.zeros(1))  # three channels: the voxel's own position
    crop = RandomResizedCrop((5, 6, 7), scale=(0.4, 0.6))
    boxes = crop.sample(SIZE, rng((0,)))
    values = crop.apply(ramp, boxes)[0]
    first, edges = boxes[0].double()
    for axis, n in enumerate((5, 6, 7)):
        expected = first[axis] + (torch.arange(n, dtype=torch.float64) + 0.5) * edges[axis] / n - 0.5
        got = values[axis].double().movedim(axis, 0).flatten(1)
        torch.testing.assert_close(got, expected[:, None].expand_as(got), atol=1e-4, rtol=0)


def test_random_resized_crop_stays_inside_in_the_right_proportion() -> None:
    boxes = RandomResizedCrop((8, 8, 8), scale=(0.3, 1.0)).sample((20, 40, 30), BatchRng(0, 0, range(200)))
    first, edges = boxes.unbind(1)
    assert float(first.min()) >= 0 and bool((first + edges <= torch.tensor([20.001, 40.001, 30.001])).all())
    torch.testing.assert_close(edges[:, 0], edges[:, 2])  # a cube, as the result is
    assert 6 <= float(edges.min()) < 6.5 and 19 < float(edges.max()) <= 20
    whole = RandomResizedCrop(SIZE, scale=(1.0, 1.0))
    x = volumes(1)
    torch.testing.assert_close(whole(x, rng((0,))), x)
    with pytest.raises(ConfigError, match="scale"):
        RandomResizedCrop((8, 8, 8), scale=(0.5, 1.5))


def test_nearest_keeps_labels() -> None:
    labels = (volumes(1) * 5).floor()
    transform = RandomSpatial()
    moved = transform.apply(labels, transform.sample(SIZE, rng((0,))), mode="nearest")
    assert set(moved.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert torch.equal(moved, warp(labels, transform.sample(SIZE, rng((0,))).coords, "nearest"))
