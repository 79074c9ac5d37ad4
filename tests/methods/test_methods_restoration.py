"""Denoising, in-painting and Models Genesis: what is damaged, how, and where the loss looks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl3d.errors import ConfigError
from ssl3d.models.heads import RestorationHead
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.spec import resolve_method
from ssl3d.rng import BatchRng
from ssl3d.testing.suite import Suite


def method(name: str, **options: Any) -> Method:
    return Suite(resolve_method(name, {name: options})).method()


def volumes(batch: int = 2, size: tuple[int, ...] = (20, 24, 16)) -> Tensor:
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(0))


# Denoising ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [False, True])
def test_the_noise_is_white_and_as_strong_as_stated(spatial: bool) -> None:
    """Also after a spatial transform: noise that had been interpolated would be weaker and correlated."""
    views = method("denoising", sigma=0.2, spatial=spatial).views(
        x := volumes(2, (32, 32, 32)), BatchRng(0, 0, [0, 1])
    )
    noise = views["noisy"] - views["clean"]
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)
    for axis in (2, 3, 4):
        neighbours = noise.narrow(axis, 0, 31) * noise.narrow(axis, 1, 31)
        assert abs(float(neighbours.mean())) < 0.02 * 0.2**2
    assert torch.equal(views["clean"], x) is not spatial
    clipped = method("denoising", sigma=0.5, clip=True).views(x, BatchRng(0, 0, [0, 1]))["noisy"]
    assert float(clipped.min()) == 0 and float(clipped.max()) == 1


@pytest.mark.parametrize("name", ["denoising", "models_genesis"])
def test_the_loss_is_the_mean_squared_error_of_the_whole_volume(name: str) -> None:
    m = method(name)
    views = m.views(volumes(2, (16, 16, 16)), BatchRng(0, 0, [0, 1]))
    damaged, target = views.values()
    with torch.no_grad():
        restored = m.restoration(m.backbone(damaged)[1]).double().numpy()
        loss = m.training_step(views)["mse"]
    assert float(loss) == pytest.approx(np.mean((restored - target.double().numpy()) ** 2), rel=1e-6)


def test_the_restoration_head_is_gvsls() -> None:
    from ssl3d_methods.gvsl import GVSL

    gvsl = GVSL(method("denoising").backbone, GVSL.Config())
    ours, theirs = RestorationHead(8), gvsl.restoration
    flat = [m for m in theirs.modules() if not list(m.children())]
    assert [repr(m) for m in ours] == [repr(m) for m in flat]


# In-painting ----------------------------------------------------------------------------------


def test_holes_are_filled_as_stated_and_nothing_else_is_touched() -> None:
    x = volumes(2, (32, 32, 32))
    for fill in ("mean", "zero", "noise"):
        views = method("inpainting", fill=fill).views(x, BatchRng(0, 0, [0, 1]))
        cut, holes = views["cut"], views["holes"]
        assert torch.equal(views["whole"], x) and torch.equal(cut[~holes], x[~holes])
        for i in range(2):
            inside = cut[i][holes[i]]
            if fill == "noise":
                assert float(inside.mean()) == pytest.approx(0.5, abs=0.05)
                assert float(inside.std()) == pytest.approx(12**-0.5, abs=0.03)
            else:
                torch.testing.assert_close(
                    inside, (x[i].mean() if fill == "mean" else torch.tensor(0.0)).expand_as(inside)
                )


def test_every_crop_has_a_hole_and_at_most_as_many_as_stated() -> None:
    one = method("inpainting", max_boxes=1, edges=[0.2, 0.2])
    many = method("inpainting", max_boxes=5, next_p=1e-6)
    for step in range(40):
        holes = one.views(volumes(1, (20, 20, 20)), BatchRng(0, step, [0]))["holes"]
        assert int(holes.sum()) == 4**3
        where = holes[0, 0].nonzero()
        assert (where.max(0).values - where.min(0).values + 1).tolist() == [4, 4, 4]
        assert bool(many.views(volumes(1), BatchRng(0, step, [0]))["holes"].any())


def test_the_loss_can_look_at_the_holes_alone() -> None:
    views = method("inpainting").views(volumes(2, (16, 16, 16)), BatchRng(0, 0, [0, 1]))
    for region in ("whole", "holes"):
        m = method("inpainting", loss_over=region)
        with torch.no_grad():
            error = (m.restoration(m.backbone(views["cut"])[1]) - views["whole"]).double() ** 2
            loss = float(m.training_step(views)["mse"])
        expected = error.mean() if region == "whole" else error[views["holes"]].mean()
        assert loss == pytest.approx(float(expected), rel=1e-6)


def test_edges_out_of_range_are_refused() -> None:
    for edges in ([0.0, 0.2], [0.3, 0.2], [0.5, 1.5]):
        with pytest.raises(ConfigError, match="0 < smallest <= largest <= 1"):
            method("inpainting", edges=edges)


# Models Genesis -------------------------------------------------------------------------------


def genesis_by_loops(m: Method, x: np.ndarray, rng: BatchRng) -> tuple[np.ndarray, np.ndarray]:
    """The released code's order and loops, one sample (D, H, W), with the draws of ``rng`` (one sample)."""
    size = x.shape
    flip = rng.fork("flip")
    goes_on, axes = flip.bernoulli(m.config.flip_p, (3,))[0].tolist(), flip.integers(0, 3, (3,))[0].tolist()
    for more, axis in zip(goes_on, axes, strict=True):
        if not more:
            break
        x = np.flip(x, axis)
    target, x = x.copy(), x.copy()

    draws = rng.fork("shuffle")
    if draws.bernoulli(m.config.shuffle_p)[0]:
        starts, edges = (drawn[0] for drawn in m.shuffle.draw_boxes(size, draws))
        keys = draws.uniform(shape=(int(edges.prod(1).sum()),))[0].numpy()
        undamaged, used = x.copy(), 0
        for start, edge in zip(starts.tolist(), edges.tolist(), strict=True):
            box = tuple(slice(s, s + e) for s, e in zip(start, edge, strict=True))
            n = math.prod(edge)
            order = np.argsort(keys[used : used + n], kind="stable")
            used += n
            x[box] = undamaged[box].ravel()[order].reshape(edge)

    draws = rng.fork("nonlinear")
    if draws.bernoulli(m.config.nonlinear_p)[0]:
        (x1, y1), (x2, y2) = draws.uniform(shape=(2, 2))[0].double().numpy()
        t = np.linspace(0, 1, 1000)
        xs = 3 * (1 - t) ** 2 * t * x1 + 3 * (1 - t) * t**2 * x2 + t**3
        ys = 3 * (1 - t) ** 2 * t * y1 + 3 * (1 - t) * t**2 * y2 + t**3
        if draws.bernoulli(m.config.invert_p)[0]:
            ys = 1 - ys
        x = np.interp(x, xs, ys)

    draws = rng.fork("paint")
    paints, outside = draws.bernoulli(m.config.paint_p)[0], draws.bernoulli(m.config.outpaint_p)[0]
    noise = draws.uniform(shape=(1, *size))[0, 0].numpy()
    if paints:
        boxes = draws.fork("out" if outside else "in")
        boxes.bernoulli(1.0)
        # In: each of up to five boxes with 0.95. Out: one, then up to four more with 0.95 each.
        coins = boxes.bernoulli(0.95, (4 if outside else 5,))[0].tolist()
        count = (1 if outside else 0) + next((i for i, c in enumerate(coins) if not c), len(coins))
        low, high = (3 / 7, 4 / 7) if outside else (1 / 6, 1 / 3)
        edge_u, start_u = boxes.uniform(shape=(5, 3))[0].numpy(), boxes.uniform(shape=(5, 3))[0].numpy()
        painted = noise.copy() if outside else x.copy()
        for k in range(count):
            box = []
            for axis, n in enumerate(size):
                least, most = max(1, int(n * low)), max(1, int(n * high))
                edge = least + int(edge_u[k, axis] * (most - least + 1))
                start = int(start_u[k, axis] * (n - edge + 1))
                box.append(slice(start, start + edge))
            painted[tuple(box)] = (x if outside else noise)[tuple(box)]
        x = painted
    return x, target


@pytest.mark.parametrize("size", [(20, 24, 16), (32, 32, 32)])
def test_models_genesis_equals_the_loops_over_boxes(size: tuple[int, int, int]) -> None:
    m = method("models_genesis", shuffle_boxes=300)
    x = volumes(3, size)
    seen = set()
    for step in range(6):
        views = m.views(x, BatchRng(5, step, [0, 1, 2]))
        for i in range(3):
            damaged, target = genesis_by_loops(m, x[i, 0].numpy(), BatchRng(5, step, [i]))
            np.testing.assert_array_equal(views["target"][i, 0].numpy(), target)
            np.testing.assert_allclose(views["damaged"][i, 0].numpy(), damaged, atol=2e-5)
            seen.add(bool((target == x[i, 0].numpy()).all()))
    assert seen == {True, False}, "some are flipped, some are not"


def test_models_genesis_flips_as_often_as_the_released_code() -> None:
    """No flip with 0.6; two flips along one axis cancel out."""
    flips = method("models_genesis").flips(BatchRng(0, 0, range(2000)))
    # P(none left) = 0.6 + 0.4^2 0.6 / 3 (the second undoes the first); three leave at least one.
    assert float((~flips.any(1)).float().mean()) == pytest.approx(0.6 + 0.16 * 0.6 / 3, abs=0.04)
    assert float(flips.float().mean(0).std()) < 0.03, "every axis equally often"
    always = method("models_genesis", flip_p=1.0).flips(BatchRng(0, 0, range(100)))
    assert bool((always.sum(1) % 2 == 1).all()), "three flips"


def test_models_genesis_defaults_are_the_papers() -> None:
    cfg = method("models_genesis").config
    assert (cfg.nonlinear_p, cfg.invert_p, cfg.shuffle_p, cfg.shuffle_boxes) == (0.9, 0.5, 0.5, 10_000)
    assert (cfg.paint_p, cfg.outpaint_p, cfg.flip_p, cfg.shuffle_fraction) == (0.9, 0.8, 0.4, 0.1)
