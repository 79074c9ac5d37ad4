"""One small volume on the CPU passes through oneDNN, with the values of torch's own convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssl3d.models.conv import SMALL, Conv3d
from ssl3d.models.unet import UNet3D


def loops(compute, *inputs: Tensor) -> list[str]:  # type: ignore[no-untyped-def]
    """Return torch's plain loops that are run in ``compute``."""
    with torch.profiler.profile() as profile:
        compute(*inputs)
    return sorted({event.key for event in profile.key_averages() if "slow_conv3d" in event.key})


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 4, 3), (2, 3, 5), (7, 6, 5), (8, 4, 9)])
@pytest.mark.parametrize("channels", [(1, 8), (5, 3)])
def test_values_and_gradients_are_those_of_torch_in_float64(
    size: tuple[int, ...], channels: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    ours = Conv3d(*channels, 3, padding=1)
    exact = nn.Conv3d(*channels, 3, padding=1).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(1, channels[0], *size, requires_grad=True)
    y = x.detach().double().requires_grad_()
    assert ours._is_slow(x)
    towards = torch.randn(1, channels[1], *size)
    (ours(x) * towards).sum().backward()
    (exact(y) * towards).sum().backward()
    torch.testing.assert_close(ours(x).double(), exact(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-4)


def test_what_torch_does_well_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv3d, "_in_slabs", lambda self, x: pytest.fail("in slabs"))
    conv = Conv3d(4, 4, 3, padding=1)
    conv(torch.rand(2, 4, 8, 8, 8))
    conv(torch.rand(1, 4, SMALL // 64 + 1, 16, 2))
    conv.double()(torch.rand(1, 4, 8, 8, 8, dtype=torch.float64))
    for other in (
        Conv3d(4, 4, 1),
        Conv3d(4, 4, 3, padding=1, stride=2),
        Conv3d(4, 4, 3, padding=1, groups=2),
    ):
        other(torch.rand(1, 4, 8, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Conv3d(4, 4, 3, padding=1)(torch.rand(1, 4, 8, 8, 8))


def test_the_border_is_torch_s() -> None:
    """Torch's own choice turns over where ours does; if this fails, torch has changed its rule."""
    conv = nn.Conv3d(4, 4, 3, padding=1)
    edge = SMALL // (4 * 16)
    assert loops(conv, torch.rand(1, 4, edge, 16, 2))
    assert not loops(conv, torch.rand(1, 4, edge + 1, 16, 2))
    assert not loops(conv, torch.rand(2, 4, edge, 16, 2))


@pytest.mark.parametrize("size", [(16, 16, 16), (9, 14, 11)])
def test_the_unet_takes_no_plain_loop_on_one_volume(size: tuple[int, ...]) -> None:
    net = UNet3D(UNet3D.Config(channels=(8, 16, 32))).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    assert not loops(lambda x: net(x)[1].square().sum().backward(), torch.rand(1, 1, *size))
