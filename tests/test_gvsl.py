"""GVSL: gradients, variants, views, and that matching learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from ssl3d_methods.gvsl import GVSL, AffineHead, GVSLConfig
from torch import Tensor

from ssl3d.errors import ConfigError
from ssl3d.losses import ncc_loss, smoothness_loss
from ssl3d.models.factory import seeded
from ssl3d.models.spatial import affine_coords, affine_matrix, compose, jacobian_determinant, warp
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


@pytest.mark.parametrize("affine_head", ["conv", "linear"])
@pytest.mark.parametrize("moving", ["damaged", "clean"])
def test_gradient_reaches_every_parameter(affine_head: str, moving: str) -> None:
    method = build(affine_head=affine_head, moving=moving)
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
        assert float(gradient[axis]) == pytest.approx(numerical, rel=1e-2)


EXPECTED = {
    "gvsl": {"ncc", "smooth", "mse"},
    "gvsl_without_zmatching": {"mse"},
    "gvsl_without_fundament": {"ncc", "smooth"},
    "gvsl_without_affine": {"ncc", "smooth", "mse"},
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


@pytest.mark.parametrize("moving", ["damaged", "clean"])
def test_losses_are_those_of_the_paper(moving: str) -> None:
    """Two separate passes of the shared network, and each loss written out."""
    method = build(moving=moving, ncc_weight=2.0, smooth_weight=3.0, mse_weight=0.5)
    views = method.views(pairs(), BatchRng(0, 0, [0, 1]))
    losses = method.training_step(views)
    global_a, local_a = method.backbone(views["a_damaged"])
    global_b, local_b = method.backbone(views["b"])
    if moving == "damaged":
        result = method.matching(global_a, global_b, local_a, local_b)
        warped, fixed = warp(views["a"], result.coords), views["b"]
    else:
        result = method.matching(global_b, global_a, local_b, local_a)
        warped, fixed = warp(views["b"], result.coords), views["a"]
    torch.testing.assert_close(losses["ncc"], 2 * ncc_loss(warped, fixed))
    torch.testing.assert_close(losses["smooth"], 3 * smoothness_loss(result.displacement))
    restored = method.restoration(local_a)
    torch.testing.assert_close(losses["mse"], 0.5 * ((restored - views["a"]) ** 2).mean())


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
    config = GVSLConfig(translation_limit=0.3)
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
    unlimited = AffineHead(16, GVSLConfig())
    with torch.no_grad():
        unlimited.translation.bias.fill_(3.0)
    far = unlimited(torch.rand(1, 16, 2, 2, 2), torch.rand(1, 16, 2, 2, 2))
    assert float(far[0, 0, 3].detach()) == pytest.approx(3, abs=0.1)


def test_heads_have_the_papers_widths() -> None:
    method = GVSL(UNet3D(), GVSLConfig())
    shapes = {n: tuple(p.shape) for n, p in method.named_parameters()}
    assert shapes["matching.affine.blocks.0.0.weight"] == (256, 1024, 3, 3, 3)
    assert shapes["matching.affine.shearing.weight"] == (6, 256)
    assert shapes["matching.blocks.0.0.weight"] == (16, 64, 3, 3, 3)
    assert shapes["matching.flow.weight"] == (3, 16, 3, 3, 3)
    assert shapes["restoration.0.0.weight"] == (16, 32, 3, 3, 3)
    assert shapes["restoration.1.weight"] == (1, 16, 1, 1, 1)
    assert method.matching.affine.blocks[0][1].num_groups == 32  # C/8, as released
    assert method.restoration[0][1].num_groups == 4  # 4 channels a group, as released


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


def test_views_share_one_spatial_map_and_damage_only_one() -> None:
    method, x = build(), pairs()
    views = method.views(x, BatchRng(0, 0, [0, 1]))
    assert views.keys() == {"a", "a_damaged", "b"}
    assert all(
        v.shape == (2, 1, *SIZE) and float(v.min()) >= 0 and float(v.max()) <= 1 for v in views.values()
    )
    assert float((views["a_damaged"] - views["a"]).abs().mean()) > 0.01
    same = method.views(torch.stack([x[:, 0], x[:, 0]], dim=1), BatchRng(0, 0, [0, 1]))
    assert torch.equal(same["a"], same["b"])  # one and the same map
    assert not torch.equal(views["a"], x[:, 0])


def test_views_without_any_transform_are_the_volumes() -> None:
    method, x = build(shuffle_p=0.0, bezier_p=0.0, inpaint_boxes=0, spatial=False), pairs()
    views = method.views(x, BatchRng(0, 0, [0, 1]))
    for name, volume in (("a", x[:, 0]), ("a_damaged", x[:, 0]), ("b", x[:, 1])):
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
    moving, fixed = probe[:1], probe[1:2]
    assert measures["ncc_before"] == pytest.approx(1 - float(ncc_loss(moving, fixed)), abs=1e-5)
    warped = warp(moving, method.match(moving, fixed).coords)
    assert measures["ncc_after"] == pytest.approx(1 - float(ncc_loss(warped, fixed)), abs=1e-5)
    assert measures["folded_share"] == 0
    assert build(matching=False).monitor(probe, BatchRng(0, 0, range(3))) == {}


# Learning -------------------------------------------------------------------------------------


def test_the_affine_head_learns_a_known_map() -> None:
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
    method = build()
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
