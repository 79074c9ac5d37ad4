"""GVSL: gradients, variants, views, and that matching learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from ssl3d_methods.gvsl import GVSL, AffineHead, GVSLConfig, RunningScale, moments
from torch import Tensor

from ssl3d.errors import ConfigError
from ssl3d.geometry import affine_coords, affine_matrix, compose, jacobian_determinant, warp
from ssl3d.losses import ncc_loss, smoothness_loss
from ssl3d.models.factory import seeded
from ssl3d.models.unet import UNet3D
from ssl3d.rng import BatchRng

SIZE = (12, 16, 20)


def build(**options: Any) -> GVSL:
    with seeded(0, "test"):
        method = GVSL(UNet3D(UNet3D.Config(channels=(8, 16, 32))), GVSLConfig(**options))
    return method.to(memory_format=torch.channels_last_3d)


def pairs(batch: int = 2, size: tuple[int, ...] = SIZE) -> Tensor:
    """Smooth random pairs (B, 2, 1, D, H, W) in [0, 1]."""
    noise = torch.rand(2 * batch, 1, 5, 5, 5, generator=torch.Generator().manual_seed(batch))
    return F.interpolate(noise, size, mode="trilinear").unflatten(0, (batch, 2))


def step(method: GVSL, batch: int = 2, size: tuple[int, ...] = SIZE) -> dict[str, Tensor]:
    return method.training_step(method.views(pairs(batch, size), BatchRng(0, 0, range(batch))))


def unreached(method: GVSL) -> set[str]:
    """Names of the parameters that the sum of the losses gives no gradient."""
    torch.stack(list(step(method).values())).sum().backward()
    return {n for n, p in method.named_parameters() if p.grad is None or not bool(p.grad.any())}


@pytest.mark.parametrize("affine_head", ["difference", "conv", "linear"])
@pytest.mark.parametrize("damage", ["both", "a"])
@pytest.mark.parametrize("moving", ["a", "b"])
def test_gradient_reaches_every_parameter(affine_head: str, damage: str, moving: str) -> None:
    method = build(affine_head=affine_head, damage=damage, moving=moving)
    assert sum(n.startswith("matching.affine.") for n, _ in method.named_parameters()) >= 8
    assert unreached(method) == set()
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [v for v in GVSL.variants.values() if v.get("affine_trained", True)])
def test_gradient_reaches_every_parameter_of_the_variants(options: dict[str, bool]) -> None:
    assert unreached(build(**options)) == set()


def test_affine_untrained_cuts_exactly_the_affine_head() -> None:
    method = build(**GVSL.variants["gvsl_affine_untrained"])
    head = {n for n, _ in method.named_parameters() if n.startswith("matching.affine.")}
    assert head and unreached(method) == head
    assert all(not p.requires_grad for n, p in method.named_parameters() if n in head)
    with torch.no_grad():  # its random start is used all the same
        matrix = method.match(*pairs().unbind(1)).matrix
    assert 1e-6 < float((matrix - torch.eye(3, 4)).abs().max()) < 0.1


def test_affine_gradient_equals_finite_differences() -> None:
    """Through matrix, fusion, resampling and NCC, in float64."""
    method = build().double()
    views = {k: v.double() for k, v in method.views(pairs(1, (8, 8, 12)), BatchRng(0, 0, [0])).items()}
    bias = method.matching.affine.rotation.bias
    method.training_step(views)
    method.eval()  # statistics of the pooled features, which carry no gradient, stay where they are

    def loss(value: Tensor) -> Tensor:
        with torch.no_grad():
            bias.copy_(value)
        return method.training_step(views)["ncc"]

    start = torch.tensor([0.05, -0.1, 0.08]).double()
    (gradient,) = torch.autograd.grad(loss(start), bias)
    for axis in range(3):
        shift = torch.zeros(3).double()
        shift[axis] = 1e-5
        with torch.no_grad():
            numerical = (loss(start + shift) - loss(start - shift)).item() / 2e-5
        # Of the whole gradient: a component may be near 0, and interpolation has kinks.
        assert float(gradient[axis]) == pytest.approx(numerical, rel=1e-2, abs=0.02 * float(gradient.norm()))


EXPECTED = {
    "gvsl": {"ncc", "smooth", "mse"},
    "gvsl_without_zmatching": {"mse"},
    "gvsl_without_fundament": {"ncc", "smooth"},
    "gvsl_without_affine": {"ncc", "smooth", "mse"},
    "gvsl_released_head": {"ncc", "smooth", "mse"},
    "gvsl_affine_untrained": {"ncc", "smooth", "mse"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_of_each_variant(name: str) -> None:
    assert EXPECTED.keys() == {"gvsl", *GVSL.variants}
    losses = step(build(**GVSL.variants.get(name, {})))
    assert losses.keys() == EXPECTED[name]
    assert all(v.dim() == 0 and v.dtype == torch.float32 and bool(v.isfinite()) for v in losses.values())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_size_and_shape(batch: int) -> None:
    losses = step(build(), batch, (13, 17, 12))  # not multiples of the U-Net's factor either
    assert 0 < losses["ncc"].item() < 1 and 0 < losses["smooth"].item() < 0.1


def test_a_batch_is_the_mean_of_its_pairs() -> None:
    method = build().eval()
    x = pairs(3)
    whole = method.training_step(method.views(x, BatchRng(0, 0, range(3))))
    parts = [method.training_step(method.views(x[i : i + 1], BatchRng(0, 0, [i]))) for i in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([p[name] for p in parts]).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("damage", ["both", "a"])
@pytest.mark.parametrize("moving", ["a", "b"])
def test_losses_are_those_of_the_paper(moving: str, damage: str) -> None:
    """Two separate passes of the shared network, and each loss written out."""
    method = build(moving=moving, damage=damage, ncc_weight=2.0, smooth_weight=3.0, mse_weight=0.5)
    method.eval()  # the running scale stands still
    method.matching.affine.scale.mean_square.fill_(1e-4)  # so that the affine part counts
    views = method.views(pairs(), BatchRng(0, 0, [0, 1]))
    losses = method.training_step(views)
    global_a, local_a = method.backbone(views["a_seen"])
    global_b, local_b = method.backbone(views.get("b_seen", views["b"]))
    if moving == "a":
        result = method.matching(global_a, global_b, local_a, local_b)
        warped, fixed = warp(views["a"], result.coords), views["b"]
    else:
        result = method.matching(global_b, global_a, local_b, local_a)
        warped, fixed = warp(views["b"], result.coords), views["a"]
    torch.testing.assert_close(losses["ncc"], 2 * ncc_loss(warped, fixed))
    torch.testing.assert_close(losses["smooth"], 3 * smoothness_loss(result.displacement))
    error = (method.restoration(local_a) - views["a"]) ** 2
    if damage == "both":
        error = torch.cat([error, (method.restoration(local_b) - views["b"]) ** 2])
    torch.testing.assert_close(losses["mse"], 0.5 * error.mean())


@pytest.mark.parametrize("name", EXPECTED)
def test_chance_is_the_loss_of_outputs_that_ignore_their_input(name: str) -> None:
    """The identity for every pair, and the mean image of the others for every volume."""
    options = GVSL.variants.get(name, {}) | {"ncc_weight": 2.0, "mse_weight": 3.0}
    method = build(**options)
    views = method.views(pairs(3), BatchRng(0, 0, range(3)))
    level, images = 0.0, [views["a"]]
    if method.config.damage == "both":
        images.append(views["b"])
    if method.config.restoration:
        x = torch.cat(images)
        apart = torch.stack([(x[i] - x[j]) ** 2 for i in range(len(x)) for j in range(len(x)) if i != j])
        level += 3 * float(apart.mean()) / 2
    if method.config.matching:
        level += 2 * float(ncc_loss(views["a"], views["b"]))
    assert method.chance(views) == pytest.approx(level, rel=1e-4)


def test_weights_scale_the_losses() -> None:
    plain, weighted = step(build()), step(build(ncc_weight=2.0, smooth_weight=0.0, mse_weight=0.5))
    for name, factor in (("ncc", 2.0), ("smooth", 0.0), ("mse", 0.5)):
        torch.testing.assert_close(weighted[name], factor * plain[name])


# Head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["released", "eq12"])
def test_coords_are_the_fusion_of_matrix_and_displacement(fusion: str) -> None:
    method = build(fusion=fusion)
    with torch.no_grad():
        method.matching.affine.rotation.bias.fill_(0.5)
        method.matching.flow.bias.fill_(0.7)
        matching = method.match(*pairs().unbind(1))
    torch.testing.assert_close(matching.coords, compose(matching.matrix, matching.displacement, fusion))
    assert matching.coords.shape == (2, 3, *SIZE)


def test_the_head_starts_near_the_identity() -> None:
    with torch.no_grad():
        matching = build().match(*pairs().unbind(1))
    assert float((matching.matrix - torch.eye(3, 4)).abs().max()) < 0.02
    assert float(matching.displacement.abs().max()) < 0.1
    assert bool((jacobian_determinant(matching.coords) > 0.8).all())


def test_the_affine_head_keeps_its_limits_with_gradient_beyond() -> None:
    config = GVSLConfig(translation_limit=0.3, affine_head="conv")
    head = AffineHead(16, config)
    with torch.no_grad():
        for linear in (head.rotation, head.scaling, head.shearing, head.translation):
            linear.bias.copy_(3 * torch.ones_like(linear.bias))
    matrix = head(torch.rand(2, 16, 2, 3, 4), torch.rand(2, 16, 2, 3, 4))
    limit = math.tanh(3)
    one = torch.ones(2, 3)
    expected = affine_matrix(
        one * limit * math.pi / 9,
        1 + one * limit * 0.25,
        torch.ones(2, 6) * limit * math.pi / 18,
        one * limit * 0.3,
    )
    torch.testing.assert_close(matrix, expected, atol=1e-3, rtol=0)
    (matrix * torch.arange(1.0, 13).view(3, 4)).sum().backward()
    for linear in (head.rotation, head.scaling, head.shearing, head.translation):
        assert float(linear.bias.grad.abs().min()) > 1e-3
    unlimited = AffineHead(16, GVSLConfig(affine_head="conv"))
    with torch.no_grad():
        unlimited.translation.bias.fill_(3.0)
    far = unlimited(torch.rand(1, 16, 2, 2, 2), torch.rand(1, 16, 2, 2, 2))
    assert float(far[0, 0, 3].detach()) == pytest.approx(3, abs=0.1)


def test_heads_have_the_papers_widths() -> None:
    method = GVSL(UNet3D(), GVSLConfig(**GVSL.variants["gvsl_released_head"]))
    shapes = {n: tuple(p.shape) for n, p in method.named_parameters()}
    assert shapes["matching.affine.blocks.0.0.weight"] == (256, 1024, 3, 3, 3)
    assert shapes["matching.affine.shearing.weight"] == (6, 256)
    assert shapes["matching.blocks.0.0.weight"] == (16, 64, 3, 3, 3)
    assert shapes["matching.flow.weight"] == (3, 16, 3, 3, 3)
    assert shapes["restoration.0.0.weight"] == (16, 32, 3, 3, 3)
    assert shapes["restoration.1.weight"] == (1, 16, 1, 1, 1)
    assert method.matching.affine.blocks[0][1].num_groups == 32  # C/8, as released
    assert method.restoration[0][1].num_groups == 4  # 4 channels a group, as released


def slow_moments(x: Tensor) -> Tensor:
    """Mean and first moments, voxel by voxel."""
    batch, channels, *size = x.shape
    out = torch.zeros(batch, 4, channels, dtype=x.dtype)
    places = torch.cartesian_prod(*[torch.arange(n) for n in size]).tolist()
    for place in places:
        value = x[:, :, *place]
        out[:, 0] += value
        for axis, (i, n) in enumerate(zip(place, size, strict=True)):
            out[:, 1 + axis] += value * (2 * i / (n - 1) - 1)
    return out.flatten(1) / len(places)


def test_moments_equal_the_loop() -> None:
    x = torch.rand(2, 3, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(moments(x), slow_moments(x))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_running_scale_is_the_root_mean_square_of_what_came(batch: int) -> None:
    scale = RunningScale(4, momentum=0.25)
    x = 3 * torch.randn(9, batch, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor(
        [0, 1.0, 9, 99]
    )
    squares = torch.zeros(4)
    for step, features in enumerate(x, 1):
        weight = 1 / step if step < 4 else 0.25  # the plain mean first
        squares = (1 - weight) * squares + weight * (features**2).mean(0)
        torch.testing.assert_close(scale(features), features / squares.sqrt(), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in scale.named_buffers()} == {"mean_square", "steps"} and int(scale.steps) == 9


def test_the_running_scale_moves_in_training_steps_alone_and_carries_no_gradient() -> None:
    scale, x = RunningScale(4), torch.full((2, 4), 5.0, requires_grad=True)
    scale(x)
    (gradient,) = torch.autograd.grad(scale(x).sum(), x)
    torch.testing.assert_close(gradient, torch.full((2, 4), 0.2))  # of x / 5 with a fixed 5
    before = {k: v.clone() for k, v in scale.state_dict().items()}
    with torch.no_grad():
        scale(7 * x)
    scale.eval()(7 * x)
    assert all(torch.equal(v, before[k]) for k, v in scale.state_dict().items())


def test_looking_at_a_run_does_not_change_it() -> None:
    method = build()
    step(method)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    with torch.no_grad():
        method.monitor(pairs(2).flatten(0, 1), BatchRng(0, 0, range(4)))
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


def test_what_two_volumes_have_in_common_does_not_reach_the_affine_head() -> None:
    g = torch.Generator().manual_seed(0)
    head = AffineHead(8, GVSLConfig()).double().eval()
    with torch.no_grad():
        for linear in (head.rotation, head.scaling, head.shearing, head.translation):
            linear.weight.normal_(generator=g)
    a, b, common = torch.randn(3, 2, 8, 3, 4, 5, generator=g, dtype=torch.float64)
    torch.testing.assert_close(head(a + 100 * common, b + 100 * common), head(a, b))
    torch.testing.assert_close(head(a, a), torch.eye(3, 4, dtype=torch.float64).expand(2, 3, 4))
    torch.testing.assert_close(head.read(a, b), -head.read(b, a))
    assert float((head(a, b) - head(b, a)).detach().abs().max()) > 0.01


def test_answers_of_the_difference_head_have_one_unit_and_keep_their_limits() -> None:
    config = GVSLConfig(translation_limit=0.3)
    head, values = AffineHead(8, config), torch.tensor([-1e3, -1e-3, 0.0, 1e-3, 1e3])
    for limit in (
        config.rotation_limit,
        config.scaling_limit,
        config.shearing_limit,
        config.translation_limit,
    ):
        expected = torch.tensor([-limit, -5e-5, 0.0, 5e-5, limit])
        torch.testing.assert_close(head.limited(values, limit), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(head.limited(values, None), 0.05 * values)


def constant_and_trained(config: GVSLConfig) -> tuple[float, float]:
    """Return the error of the best single answer, and of a head trained on features of an encoder that moves.

    Nearly all of a feature is common to all volumes, and drifts from step to step.
    """
    g = torch.Generator().manual_seed(0)
    common, mixing = 3 * torch.randn(16, 1, 1, 1, generator=g), torch.randn(16, 3, generator=g)

    def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randn(2, n, 3, generator=g)  # of the moving and the fixed volume
        moving, fixed = common + 0.3 * (codes @ mixing.T)[..., None, None, None].tanh()
        return moving, fixed, 0.05 * (codes[0] - codes[1])

    with seeded(0, "test"):
        head = AffineHead(16, config)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(100):
        common += 0.3 * torch.randn(common.shape, generator=g)
        moving, fixed, shift = draw(4)
        error = (head(moving, fixed)[:, :, 3] - shift).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    moving, fixed, shift = draw(200)
    with torch.no_grad():
        found = head.eval()(moving, fixed)[:, :, 3]
    return float(shift.var(0, correction=0).mean()), float((found - shift).square().mean())


def test_the_difference_head_learns_where_nearly_everything_is_common() -> None:
    """The head of figure 12 b follows the common part, and is no better than one answer for all."""
    constant, error = constant_and_trained(GVSLConfig())
    assert error < 0.3 * constant
    constant, error = constant_and_trained(GVSLConfig(affine_head="linear"))
    assert error > 0.8 * constant


def test_geometry_is_float32_under_autocast() -> None:
    method = build()
    views = method.views(pairs(), BatchRng(0, 0, [0, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.training_step(views)
        matching = method.match(views["a"], views["b"])
    assert {v.dtype for v in losses.values()} == {torch.float32}
    assert {t.dtype for t in (matching.coords, matching.matrix, matching.displacement)} == {torch.float32}
    exact = method.training_step(views)
    for name in ("ncc", "mse"):
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.05)


# Views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["both", "a"])
def test_views_share_one_spatial_map_and_are_damaged_apart(damage: str) -> None:
    method, x = build(damage=damage), pairs()
    views = method.views(x, BatchRng(0, 0, [0, 1]))
    assert views.keys() == {"a", "b", "a_seen"} | ({"b_seen"} if damage == "both" else set())
    assert all(
        v.shape == (2, 1, *SIZE) and float(v.min()) >= 0 and float(v.max()) <= 1 for v in views.values()
    )
    assert float((views["a_seen"] - views["a"]).abs().mean()) > 0.01
    assert damage == "a" or not torch.equal(views["b_seen"], views["b"])
    same = method.views(torch.stack([x[:, 0], x[:, 0]], dim=1), BatchRng(0, 0, [0, 1]))
    assert torch.equal(same["a"], same["b"])  # one and the same map
    assert not torch.equal(same["a_seen"], same.get("b_seen", same["b"]))  # other damage, or none
    assert not torch.equal(views["a"], x[:, 0])


def test_views_without_any_transform_are_the_volumes() -> None:
    method, x = build(shuffle_p=0.0, bezier_p=0.0, inpaint_boxes=0, spatial=False), pairs()
    views = method.views(x, BatchRng(0, 0, [0, 1]))
    for name, volume in (("a", x[:, 0]), ("a_seen", x[:, 0]), ("b", x[:, 1]), ("b_seen", x[:, 1])):
        assert torch.equal(views[name], volume)


# Configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matching": False, "restoration": False}, "nothing to train"),
        ({"ncc_window": 8}, "odd"),
        ({"scaling_limit": 1.5}, "less than 1"),
        ({"rotation": 1.0}, "rotation"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GVSLConfig(**options)


def test_every_option_is_documented() -> None:
    assert [name for name, field in GVSLConfig.model_fields.items() if not field.description] == []


def test_match_needs_the_head() -> None:
    with pytest.raises(ConfigError, match="matching=true"):
        build(matching=False).match(*pairs().unbind(1))


@torch.no_grad()
def test_monitor_compares_patients_before_and_after() -> None:
    method, probe = build(), pairs(2).flatten(0, 1)[:3]  # the third has no partner
    measures = method.monitor(probe, BatchRng(0, 0, range(3)))
    assert measures.keys() == {"ncc_before", "ncc_after", "folded_share"}
    four = pairs(2).flatten(0, 1)
    matrices = torch.cat([method.match(a, b).matrix for a, b in (four[:2].split(1), four[2:].split(1))])
    spread = ((matrices[0] - matrices[1]) / 2).square().mul(2).sqrt().mean()  # of two values
    assert method.monitor(four, BatchRng(0, 0, range(4)))["affine_spread"] == pytest.approx(float(spread))
    moving, fixed = probe[:1], probe[1:2]
    assert measures["ncc_before"] == pytest.approx(1 - float(ncc_loss(moving, fixed)), abs=1e-5)
    warped = warp(moving, method.match(moving, fixed).coords)
    assert measures["ncc_after"] == pytest.approx(1 - float(ncc_loss(warped, fixed)), abs=1e-5)
    assert measures["folded_share"] == 0
    assert build(matching=False).monitor(probe, BatchRng(0, 0, range(3))) == {}


# Learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine_head", ["difference", "conv"])
def test_the_affine_head_learns_a_known_map(affine_head: str) -> None:
    """A volume and its turned, shifted copy: NCC by the affine map alone falls, towards that map."""
    size = (16, 16, 16)
    fixed = pairs(1, size)[:, 0]
    truth = affine_matrix(
        torch.tensor([[0.1, -0.2, 0.15]]),
        torch.ones(1, 3),
        torch.zeros(1, 6),
        torch.tensor([[0.1, -0.15, 0.05]]),
    )
    inverse = torch.cat([truth, torch.tensor([[[0, 0, 0, 1.0]]])], dim=1).inverse()[:, :3]
    moving = warp(fixed, affine_coords(inverse, size), padding_mode="border")
    method = build(affine_head=affine_head)
    head = method.matching.affine
    optimizer = torch.optim.Adam([*head.parameters(), *method.backbone.encoder.parameters()], lr=4e-3)
    history, distance = [], []
    for _ in range(30):
        global_m, global_f = method.backbone.encode(torch.cat([moving, fixed]))[-1].chunk(2)
        matrix = head(global_m, global_f)
        loss = ncc_loss(warp(moving, affine_coords(matrix, size), padding_mode="border"), fixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        distance.append((matrix - truth).norm().item())
    assert history[-1] < 0.5 * history[0]
    assert distance[-1] < 0.5 * distance[0]
