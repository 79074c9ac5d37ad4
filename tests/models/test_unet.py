"""The backbone: sizes, the encode/decode split, and seeded initialisation."""

import pytest
import torch

from ssl3d.config import BackboneConfig
from ssl3d.device import to_device
from ssl3d.errors import ConfigError
from ssl3d.models.factory import build_backbone
from ssl3d.models.join import join
from ssl3d.models.padding import pad_to_multiple
from ssl3d.models.unet import UNet3D


def test_paper_width_has_23_5_million_parameters() -> None:
    with torch.device("meta"):
        net = UNet3D()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 23.5
    assert (net.global_channels, net.local_channels) == (512, 32)


@pytest.mark.parametrize("size", [(16, 16, 16), (17, 20, 31), (8, 9, 24)])
def test_any_size_comes_back_on_its_own_grid(size: tuple[int, int, int]) -> None:
    net = UNet3D(UNet3D.Config(channels=(8, 16, 24, 32)))
    features = net.encode(torch.rand(2, 1, *size))
    assert features[-1].shape == (2, 32, *(-(-s // 8) for s in size))
    assert net.decode(features).shape == (2, 8, *size)


def test_padding_is_split_left_and_right_as_released() -> None:
    """Cropping undoes padding: a network of identities returns its input at every odd size."""
    net = UNet3D(UNet3D.Config(channels=(8, 16, 32)))
    x = torch.rand(1, 1, 9, 10, 11)
    features = net.encode(x)
    features[0] = pad_to_multiple(x, net.factor)
    net.decoder = torch.nn.ModuleList([_TakeSkip(), _TakeSkip()])
    assert torch.equal(net.decode(features), x)


class _TakeSkip(torch.nn.Module):
    """Stands in for a decoder block: returns the first channel of the skip."""

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return skip[:, :1]


def test_too_small_a_volume_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"\(16, 16, 7\).*at least 8.*larger crops"):
        UNet3D(UNet3D.Config(channels=(8, 16, 24, 32))).encode(torch.rand(1, 1, 16, 16, 7))


def test_initial_weights_depend_on_the_seed_only() -> None:
    config = BackboneConfig(channels=[8, 16])  # type: ignore[call-arg]
    torch.manual_seed(1)
    first = build_backbone(config, seed=0).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second, other = build_backbone(config, seed=0).state_dict(), build_backbone(config, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state()), "the global generator must come back untouched"
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["encoder.0.0.weight"], other["encoder.0.0.weight"])


def test_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r'unknown key "chanels".*Did you mean "channels"'):
        build_backbone(BackboneConfig(chanels=[8, 16]), seed=0)  # type: ignore[call-arg]


def test_channels_last_does_not_change_the_result() -> None:
    net = UNet3D(UNet3D.Config(channels=(8, 16))).double()
    x = torch.rand(1, 1, 10, 12, 14, dtype=torch.float64)
    plain = net(x)[1]
    to_device(net, torch.device("cpu"))
    assert net.encoder[0][3].weight.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(net(x)[1], plain)


def test_encoder_needs_no_decoder() -> None:
    net = UNet3D(UNet3D.Config(channels=(8, 16)))
    net.encode(torch.rand(1, 1, 8, 8, 8))[-1].sum().backward()
    assert all(p.grad is None for p in net.decoder.parameters())
    assert all(p.grad is not None for p in net.encoder.parameters())


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_join_is_cat_whose_gradients_keep_the_layout(layout: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(0)
    parts = [
        torch.rand(2, c, 3, 4, 5, generator=g).to(memory_format=layout).requires_grad_() for c in (3, 2, 4)
    ]
    weights = torch.rand(2, 9, 3, 4, 5, generator=g).to(memory_format=layout)
    joined, expected = join(*parts), torch.cat(parts, dim=1)
    assert torch.equal(joined, expected) and joined.is_contiguous(memory_format=layout)
    found = torch.autograd.grad(joined, parts, weights)
    for mine, theirs in zip(found, torch.autograd.grad(expected, parts, weights), strict=True):
        assert torch.equal(mine, theirs) and mine.is_contiguous(memory_format=layout)
    frozen = join(parts[0].detach(), parts[1])  # the first needs none
    assert torch.equal(torch.autograd.grad(frozen.sum(), parts[1])[0], torch.ones_like(parts[1]))
