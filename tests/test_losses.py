"""Losses against slow, obvious second forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.errors import ConfigError
from ssl3d.losses import ncc_loss, smoothness_loss


def dense_ncc(a: Tensor, b: Tensor, window: int = 9) -> Tensor:
    """The released formulation: five dense convolutions with a cube of ones."""
    ones, n = a.new_ones(1, 1, window, window, window), window**3

    def total(x: Tensor) -> Tensor:
        return F.conv3d(x, ones, padding=window // 2)

    mean_a, mean_b = total(a) / n, total(b) / n
    cross = total(a * b) - mean_b * total(a) - mean_a * total(b) + mean_a * mean_b * n
    var_a = total(a * a) - 2 * mean_a * total(a) + mean_a * mean_a * n
    var_b = total(b * b) - 2 * mean_b * total(b) + mean_b * mean_b * n
    return 1 - (cross * cross / (var_a * var_b + 1e-5)).mean()


def pair(batch: int, size: tuple[int, ...] = (11, 12, 14)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch)
    a, b = torch.rand(2, batch, 1, *size, generator=g, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("window", [3, 9])
def test_ncc_and_its_gradient_equal_the_dense_form(batch: int, window: int) -> None:
    a, b = pair(batch)
    ours, dense = ncc_loss(a, b, window), dense_ncc(a, b, window)
    assert abs(float((ours - dense).detach())) < 1e-12
    for mine, theirs in zip(
        torch.autograd.grad(ours, (a, b)), torch.autograd.grad(dense, (a, b)), strict=True
    ):
        assert float(theirs.abs().max()) > 1e-6
        assert float((mine - theirs).abs().max()) < 1e-9 * float(theirs.abs().max())


def test_ncc_with_a_fixed_volume_has_the_same_gradient() -> None:
    a, b = pair(2)
    with_both, with_one = ncc_loss(a, b), ncc_loss(a, b.detach())
    torch.testing.assert_close(*(torch.autograd.grad(loss, a)[0] for loss in (with_both, with_one)))


def test_ncc_ignores_scale_and_sign_but_not_place() -> None:
    a, _ = pair(1, (30, 30, 30))
    inner = (..., *[slice(10, 20)] * 3)
    mask = torch.zeros_like(a)
    mask[inner] = 1
    a = a.detach() * mask
    assert float(ncc_loss(a, -0.5 * a)) == pytest.approx(float(ncc_loss(a, a)), abs=1e-4)
    shuffled = a[inner].flatten()[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    other = torch.zeros_like(a)
    other[inner] = shuffled.view(10, 10, 10)
    assert float(ncc_loss(a, other)) > float(ncc_loss(a, a)) + 0.05


@pytest.mark.parametrize("seed", range(4))
def test_ncc_survives_flat_regions_in_float32(seed: int) -> None:
    """E[x^2] - E[x]^2 is negative there by rounding; unclamped, gradients of 36 to 960 come out here."""
    noise = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(seed))
    a, b = 0.77 + 6e-5 * noise, 0.5 + 0.03 * noise * torch.linspace(0.3, 2, 32)
    single, double = a.clone().requires_grad_(), a.double().requires_grad_()
    loss, reference = ncc_loss(single, b), ncc_loss(double, b.double())
    (gradient,), (expected,) = torch.autograd.grad(loss, single), torch.autograd.grad(reference, double)
    assert loss.item() == pytest.approx(reference.item(), abs=0.02)
    assert float(gradient.abs().max()) < 2 * float(expected.abs().max())


def test_ncc_is_computed_in_float32_under_autocast() -> None:
    a, b = (x.detach().float() for x in pair(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ncc_loss(a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ncc_loss(a, b))


def test_ncc_does_not_lose_precision_to_fast_matrix_products() -> None:
    a, b = (x.detach().float() for x in pair(2))
    expected = ncc_loss(a, b)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert float(ncc_loss(a, b)) == pytest.approx(float(expected), abs=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)


def test_ncc_refuses_what_it_cannot_compare() -> None:
    x = torch.rand(1, 1, 5, 5, 5)
    with pytest.raises(ConfigError, match="window 8"):
        ncc_loss(x, x, window=8)
    with pytest.raises(ConfigError, match="one shape"):
        ncc_loss(x, x[..., :4])


def slow_smoothness(u: Tensor) -> float:
    per_axis = []
    batch, channels, *size = u.shape
    for axis in range(3):
        squares = []
        for n in range(batch):
            for c in range(channels):
                for p in torch.cartesian_prod(*[torch.arange(s) for s in size]).tolist():
                    q = list(p)
                    q[axis] += 1
                    if q[axis] < size[axis]:
                        squares.append(float(u[n, c, *q] - u[n, c, *p]) ** 2)
        per_axis.append(sum(squares) / len(squares))
    return sum(per_axis) / 3


def test_smoothness_equals_the_loop() -> None:
    u = torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(smoothness_loss(u)) == pytest.approx(slow_smoothness(u), rel=1e-12)


def test_smoothness_of_a_linear_field() -> None:
    u = torch.zeros(1, 3, 4, 5, 6)
    u[:, 1] = 2 * torch.arange(6.0)  # slope 2 along w in one of three channels
    assert float(smoothness_loss(u)) == pytest.approx(4 / 3 / 3)
