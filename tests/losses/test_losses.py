"""Losses against slow, obvious second forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.errors import ConfigError
from ssl3d.losses import ncc_loss, segmentation_loss, smoothness_loss, soft_dice_loss


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
@pytest.mark.parametrize("window", [3, 5, 7, 9, 13])
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


@pytest.mark.parametrize("cached", [1, 700, 2**20])
def test_ncc_does_not_depend_on_the_pieces_it_is_computed_in(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair(2)
    expected = dense_ncc(a, b)
    gradients = torch.autograd.grad(expected, (a, b))
    monkeypatch.setattr("ssl3d.losses.ncc._CACHED", cached)
    loss = ncc_loss(a, b)
    assert abs(float((loss - expected).detach())) < 1e-12
    for mine, theirs in zip(torch.autograd.grad(3 * loss, (a, b)), gradients, strict=True):
        torch.testing.assert_close(mine, 3 * theirs, rtol=1e-9, atol=1e-12)


def test_ncc_of_volumes_that_are_not_contiguous_and_smaller_than_the_window() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 6, 7, 5, 1, 2, generator=g, dtype=torch.float64).permute(0, 5, 4, 3, 2, 1)
    assert a.shape == (2, 1, 5, 7, 6) and not a.is_contiguous()
    x, y = a.clone().requires_grad_(), a.contiguous().requires_grad_()
    ours, dense = ncc_loss(x, b), dense_ncc(y, b.contiguous())
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(dense, y)[0])


def test_ncc_without_a_gradient_is_the_same_number() -> None:
    a, b = pair(2)
    with torch.no_grad():
        loss = ncc_loss(a, b)
    assert not loss.requires_grad and torch.equal(loss, ncc_loss(a, b).detach())
    (gradient,) = torch.autograd.grad(ncc_loss(a.detach(), b), b)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense_ncc(a.detach(), b), b)[0])


def test_ncc_refuses_what_it_cannot_compare() -> None:
    x = torch.rand(1, 1, 5, 5, 5)
    with pytest.raises(ConfigError, match="window 8"):
        ncc_loss(x, x, window=8)
    with pytest.raises(ConfigError, match="window 1: use an odd number of voxels from 3 on"):
        ncc_loss(x, x, window=1)
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


# Soft Dice ------------------------------------------------------------------------------------


def voxels_of(seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Logits (2, K, 3, 4, 5) in float64 and labels, one class absent from the second sample."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 3, 4, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (2, 1, 3, 4, 5), generator=g)
    labels[1][labels[1] == classes - 1] = 0
    return logits, labels


def slow_dice(logits: Tensor, labels: Tensor) -> float:
    """1 - (2 sum(y p) + 1) / (sum y^2 + sum p^2 + 1), voxel by voxel; the mean over samples and classes."""
    losses = []
    for sample, truth in zip(logits, labels[:, 0], strict=True):
        for k in range(len(sample)):
            both = ys = ps = 0.0
            for place in torch.cartesian_prod(*[torch.arange(n) for n in truth.shape]).tolist():
                exp = [math.exp(float(sample[c, *place])) for c in range(len(sample))]
                p, y = exp[k] / sum(exp), float(truth[*place] == k)
                both, ys, ps = both + y * p, ys + y * y, ps + p * p
            losses.append(1 - (2 * both + 1) / (ys + ps + 1))
    return sum(losses) / len(losses)


def slow_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    chosen = logits.softmax(1).gather(1, labels)
    return float(-chosen.log().mean())


@pytest.mark.parametrize("classes", [2, 3])
def test_soft_dice_equals_the_loop(classes: int) -> None:
    logits, labels = voxels_of(classes=classes)
    dice, entropy = slow_dice(logits, labels), slow_cross_entropy(logits, labels)
    assert float(soft_dice_loss(logits.softmax(1), labels)) == pytest.approx(dice, rel=1e-12)
    assert float(segmentation_loss("dice", logits, labels)) == pytest.approx(dice, rel=1e-12)
    assert float(segmentation_loss("dice_ce", logits, labels)) == pytest.approx(dice + entropy, rel=1e-12)


@pytest.mark.parametrize("name", ["dice", "dice_ce"])
def test_gradient_of_the_segmentation_losses_equals_finite_differences(name: str) -> None:
    logits, labels = voxels_of()
    small, truth = logits[:1, :, :2, :2, :2].clone().requires_grad_(), labels[:1, :, :2, :2, :2]
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(name, x, truth), small)


def test_soft_dice_of_right_and_wrong_answers() -> None:
    labels = torch.arange(8).view(1, 1, 2, 2, 2) % 2  # 4 voxels of each of two classes
    right = torch.stack([labels[:, 0] == 0, labels[:, 0] == 1], dim=1).float()
    assert float(soft_dice_loss(right, labels)) == pytest.approx(0)
    assert float(soft_dice_loss(1 - right, labels)) == pytest.approx(1 - 1 / 9)
    absent = torch.zeros_like(labels)  # the second class has no voxel: predicted empty, it costs nothing
    assert (
        float(soft_dice_loss(torch.cat([torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)], 1), absent))
        == 0
    )


def test_segmentation_losses_are_computed_in_float32_under_autocast() -> None:
    logits, labels = voxels_of()
    with torch.autocast("cpu", torch.bfloat16):
        loss = segmentation_loss("dice_ce", logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(
        float(segmentation_loss("dice_ce", logits.bfloat16().double(), labels)), rel=1e-5
    )


def test_segmentation_losses_refuse_what_does_not_fit() -> None:
    logits, labels = voxels_of()
    with pytest.raises(ConfigError, match='"tversky": use dice or dice_ce'):
        segmentation_loss("tversky", logits, labels)
    for wrong in (labels[:1], labels[..., :2], labels.expand(-1, 2, -1, -1, -1)):
        with pytest.raises(ConfigError, match="use \\(B, K, D, H, W\\) and \\(B, 1, D, H, W\\)"):
            soft_dice_loss(logits.softmax(1), wrong)
