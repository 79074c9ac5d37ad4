"""Faulty backbones are named, by the conformance suite and before any training; sound ones pass."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import ssl3d
from ssl3d.cli import main
from ssl3d.config import Model
from ssl3d.errors import ConfigError
from ssl3d.models.backbone import Backbone, Features
from ssl3d.registry.registry import Entry, registry
from ssl3d.testing import check_backbone
from ssl3d.testing.backbones import BackboneChecks
from ssl3d.testing.report import backbone_checks


class Sound(Backbone):
    """Two convolutions, and a batch norm with running statistics."""

    name = "sound_net"

    class Config(Model):
        """Options."""

        width: int = 4
        """Channels."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.global_channels = self.local_channels = config.width
        self.encoder = nn.Sequential(
            nn.Conv3d(1, config.width, 3, stride=2, padding=1), nn.BatchNorm3d(config.width)
        )
        self.decoder = nn.Conv3d(config.width, config.width, 1)

    def encode(self, x: Tensor) -> Features:
        return Features([self.encoder(x)], size=x.shape[2:])

    def decode(self, features: Features) -> Tensor:
        return F.interpolate(self.decoder(features[-1]), features.size, mode="trilinear")


class NoDecoder(Sound):
    """Its decoder has another name."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.up = self.decoder
        del self.decoder

    def decode(self, features: Features) -> Tensor:
        return F.interpolate(self.up(features[-1]), features.size, mode="trilinear")


class NoDecode(Backbone):
    """Lacks decode, so that no object of it can be made."""

    name = "sound_net"
    Config = Sound.Config

    def encode(self, x: Tensor) -> Features:
        raise AssertionError("nobody can call it")


class WrongGlobal(Sound):
    """Says half the channels of f^g."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.global_channels = config.width // 2


class WrongLocal(Sound):
    """Says twice the channels of f^l."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.local_channels = 2 * config.width


class CoarseGrid(Sound):
    """Leaves f^l on the coarse grid."""

    def decode(self, features: Features) -> Tensor:
        return self.decoder(features[-1])


class PlainList(Sound):
    """Returns a list."""

    def encode(self, x: Tensor) -> Any:
        return [self.encoder(x)]


class CoarseFirst(Sound):
    """The coarsest stage first."""

    def encode(self, x: Tensor) -> Features:
        x = self.encoder(x)
        return Features([F.avg_pool3d(x, 2), x], size=(2 * x.shape[2], 2 * x.shape[3], 2 * x.shape[4]))


class Dropout(Sound):
    """Draws from the global generator in training."""

    def encode(self, x: Tensor) -> Features:
        return Features([F.dropout(self.encoder(x), 0.5, self.training)], size=x.shape[2:])


class NumpyWeights(Sound):
    """Initial weights that no seed decides."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        with torch.no_grad():
            self.decoder.weight += float(np.random.standard_normal())  # noqa: NPY002


class PythonState(Sound):
    """Running statistics in an attribute."""

    scale = 1.0

    def encode(self, x: Tensor) -> Features:
        if self.training:
            self.scale = 0.5 * self.scale + float(x.std())
        return Features([self.encoder(x) * self.scale], size=x.shape[2:])


class Tied(Sound):
    """One weight under two names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.decoder.second = nn.Conv3d(config.width, config.width, 1)
        self.decoder.second.weight = self.decoder.weight

    def decode(self, features: Features) -> Tensor:
        x = self.decoder.second(self.decoder(features[-1]))
        return F.interpolate(x, features.size, mode="trilinear")


class StemOutside(Sound):
    """A part of the encoder that is not in it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stem = nn.Conv3d(1, 1, 3, padding=1)

    def encode(self, x: Tensor) -> Features:
        return super().encode(self.stem(x))


class ChangesVolume(Sound):
    """Centres the volume in place."""

    def encode(self, x: Tensor) -> Features:
        return super().encode(x.sub_(0.5))


class PopsFeatures(Sound):
    """Takes f^g out of what it is given."""

    def decode(self, features: Features) -> Tensor:
        return F.interpolate(self.decoder(features.pop()), features.size, mode="trilinear")


class Multiples(Sound):
    """Fails at odd edges without saying so."""

    def decode(self, features: Features) -> Tensor:
        return (
            self.decoder(features[-1]).repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
        )


class Unused(Sound):
    """A layer that nothing uses."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.decoder.spare = nn.Linear(2, 2)


class WrongMinimum(Sound):
    """Says another smallest edge than it refuses."""

    def minimum_edge(self) -> int:
        return 2

    def encode(self, x: Tensor) -> Features:
        if min(x.shape[2:]) < 8:
            raise ConfigError("too small")
        return super().encode(x)


class IgnoresInput(Sound):
    """A norm over what there is one of."""

    def encode(self, x: Tensor) -> Features:
        return super().encode(x - x)


class MixesBatch(Sound):
    """The norm of the batch at hand, in evaluation, too."""

    def encode(self, x: Tensor) -> Features:
        return super().encode(x - x.mean())


class ForgottenBlock(Sound):
    """Blocks that are no modules."""

    def blocks(self) -> Any:
        return [self.encode, self.decode]


class NoDefault(Sound):
    """An option without a default."""

    class Config(Model):
        """Options."""

        width: int


class Spaced(Sound):
    """A name that cannot be typed."""

    name = "my net"


def checks(cls: type[Backbone]) -> BackboneChecks:
    return backbone_checks(cls)


LAST = "it is pretrained evaluated and exported"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["unet3d", "genesis_unet3d", Sound])
def test_sound_backbones_pass(name: Any) -> None:
    options: dict[str, Any] = {"unet3d": {"channels": [4, 8]}, "genesis_unet3d": {"width": 2}}.get(name, {})
    check_backbone(name, **options).assert_passed()


@pytest.mark.parametrize(
    ("cls", "check", "message"),
    [
        (NoDecode, "declarations make sense", "it has no decode"),
        (NoDecoder, "its parts are there", "it has no decoder"),
        (WrongGlobal, "features have the declared shapes", "has 4 channels, and global_channels = 2"),
        (
            WrongLocal,
            "features have the declared shapes",
            "decode returns 4 channels, and local_channels = 8",
        ),
        (CoarseGrid, "features have the declared shapes", "a grid of 8x8x8 for a volume of 16x16x16"),
        (PlainList, "features have the declared shapes", "encode returns list"),
        (
            CoarseFirst,
            "features have the declared shapes",
            r"returns \(2, 4, 8, 8, 8\) after \(2, 4, 4, 4, 4\)",
        ),
        (Dropout, "features depend on the volume only", "encode returns something else .* in train mode"),
        (NumpyWeights, "it can be built", "decoder.weight differ although the seed is the same"),
        (PythonState, "weights are saved and loaded", "after loading, encode returns something else"),
        (Tied, "weights are saved and loaded", "cannot be saved and loaded"),
        (StemOutside, "encoder and decoder hold their own weights", "encode uses stem.bias"),
        (ChangesVolume, "nothing is changed in place", "encode changes the volume"),
        (PopsFeatures, "nothing is changed in place", "decode changes the features"),
        (Multiples, "sizes work or are refused", "a grid of 18x20x14 for a volume of 17x19x13"),
        (Unused, "encoder and decoder hold their own weights", "no feature depends on decoder.spare"),
        (WrongMinimum, "sizes work or are refused", r"2x2x2 is refused, and minimum_edge\(\) = 2"),
        (IgnoresInput, "features depend on the volume only", "the same features of different volumes"),
        (MixesBatch, "features depend on the volume only", "other features when another one is in the batch"),
        (ForgottenBlock, "blocks can be computed again", "something else than a list of modules"),
        (NoDefault, "declarations make sense", "width"),
        (Spaced, "declarations make sense", "'my net' cannot name a backbone"),
    ],
)
def test_faulty_backbones_are_named_once_with_place_and_hint(
    cls: type[Backbone], check: str, message: str
) -> None:
    failed = [c for c in checks(cls).run(skip=[LAST]) if c.failed]
    assert [c.name for c in failed] == [check], [c.told() for c in failed]
    assert re.search(message, failed[0].seen), failed[0].seen
    assert re.search(r"test_backbones\.py:\d+ in ", failed[0].where) and failed[0].hint, failed[0]


@pytest.mark.parametrize("cls", [NoDecoder, NoDecode, WrongLocal, CoarseGrid, PlainList])
def test_a_faulty_backbone_is_named_before_any_training(
    cls: type[Backbone], volume_folder: Path, tmp_path: Path
) -> None:
    entry = Entry(cls.name, "", partial(lambda: cls))
    with registry().backbones.lent(entry):
        result = CliRunner().invoke(
            main,
            ["pretrain", "--method", "denoising", "--data", str(volume_folder), "--preset", "smoke", "--out",
             str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--set", f"backbone={{name: {cls.name}}}"],
        )  # fmt: skip
    assert result.exit_code == 2, result.output
    assert f"The backbone sound_net ({cls.__module__}.{cls.__name__}) cannot be trained" in result.output
    assert "Fix: " in result.output and f"ssl3d check {cls.name}" in result.output
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_sound_backbone_of_a_plugin_is_exported_by_the_same_road() -> None:
    (result,) = checks(Sound).run(only=[LAST])
    assert result.passed, result.told()
    assert "linear dsc" in result.seen and "knn auc" in result.seen
    assert Sound.name not in registry().backbones and issubclass(Sound, ssl3d.Backbone)
