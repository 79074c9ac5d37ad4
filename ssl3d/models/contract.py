"""The contract of backbones, looked at on one small volume before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.config import Model
from ssl3d.errors import ConfigError, PluginError
from ssl3d.models.backbone import Backbone, Features
from ssl3d.registry.registry import registry

__without_effect__ = "it looks at networks and changes none"


class Breach(PluginError):
    """Something that a backbone does otherwise than the contract says.

    Args:
        what: what was found, in one sentence.
        at: name of the attribute that is at fault.
        fix: what to do.
    """

    def __init__(self, what: str, at: str, fix: str) -> None:
        super().__init__(what)
        self.at, self.fix = at, fix


def _demand(holds: bool, what: str, at: str, fix: str) -> None:
    if not holds:
        raise Breach(what, at, fix)


def check_parts(backbone: Any) -> None:
    """Raise :class:`Breach` unless the parts and numbers that the framework uses are there."""
    for part, use in (("encoder", "encode"), ("decoder", "decode")):
        _demand(
            isinstance(getattr(backbone, part, None), nn.Module), f"it has no {part}", "__init__",
            f"self.{part} = ...: the module that holds what {use} alone trains; methods freeze and copy it by this name",
        )  # fmt: skip
    for name, what in (
        ("global_channels", "f^g, the last feature of encode"),
        ("local_channels", "f^l of decode"),
    ):
        value = getattr(backbone, name, None)
        _demand(isinstance(value, int) and value > 0, f"{name} = {value!r}", "__init__",
                f"self.{name} = the channels of {what}")  # fmt: skip


def check_shapes(backbone: Backbone, x: Tensor) -> None:
    """Raise :class:`Breach` unless ``encode`` and ``decode`` return what the contract says.

    Args:
        backbone: with sound parts.
        x: volumes (B, 1, D, H, W) that it accepts.
    """
    grid, told = tuple(x.shape[2:]), "x".join(map(str, x.shape[2:]))
    with torch.no_grad():
        features = backbone.encode(x.clone())
    _demand(isinstance(features, Features) and len(features) > 0, f"encode returns {type(features).__name__}", "encode",
            "return Features([finest, ..., coarsest], size=x.shape[2:]) (ssl3d.models.backbone)")  # fmt: skip
    _demand(features.size == grid, f"encode returns features of size {features.size} for a volume of {told}", "encode",
            "return Features([...], size=x.shape[2:])")  # fmt: skip
    for number, feature in enumerate(features):
        _demand(isinstance(feature, Tensor) and feature.dim() == 5 and len(feature) == len(x),
                f"feature {number} of encode is {_shape(feature)}", "encode",
                f"features are ({len(x)}, channels, d, h, w)")  # fmt: skip
    for fine, coarse in pairwise(features):
        _demand(all(a >= b for a, b in zip(fine.shape[2:], coarse.shape[2:], strict=True)),
                f"encode returns {_shape(coarse)} after {_shape(fine)}", "encode",
                "order the features from the finest to the coarsest")  # fmt: skip
    last = features[-1]
    found = last.shape[1]
    _demand(found == backbone.global_channels,
            f"the last feature of encode has {found} channels, and global_channels = {backbone.global_channels}",
            "encode", f"self.global_channels = {found}, or put f^g last")  # fmt: skip
    with torch.no_grad():
        local = backbone.decode(features)
    _demand(isinstance(local, Tensor) and local.dim() == 5 and len(local) == len(x), f"decode returns {_shape(local)}",
            "decode", f"return f^l ({len(x)}, local_channels, D, H, W)")  # fmt: skip
    _demand(local.shape[1] == backbone.local_channels,
            f"decode returns {local.shape[1]} channels, and local_channels = {backbone.local_channels}", "decode",
            f"self.local_channels = {local.shape[1]}")  # fmt: skip
    _demand(
        tuple(local.shape[2:]) == grid,
        f"decode returns a grid of {'x'.join(map(str, local.shape[2:]))} for a volume of {told}", "decode",
        "interpolate f^l to features.size: it is compared with the volume voxel by voxel",
    )  # fmt: skip
    for feature, function in ((last, "encode"), (local, "decode")):
        _demand(bool(feature.isfinite().all()), f"{function} returns values that are not finite", function,
                "look at its initial weights and norms")  # fmt: skip


WRITE_BOTH = "write them: docs/plugins.md shows both"


def missing_functions(cls: Any) -> str:
    """Return which functions of :class:`Backbone` a class lacks, as "it has no decode"; "" where it has all."""
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    return f"it has no {' and no '.join(missing)}" if missing else ""


def check_class(name: str) -> None:
    """Raise PluginError for a backbone of which no object can be made: it lacks ``encode``, ``decode`` or ``Config``."""
    cls = registry().backbones.get(name).load()
    if missing := missing_functions(cls):
        raise PluginError(_told(cls, f"{missing}. Fix: {WRITE_BOTH}"))
    options = getattr(cls, "Config", None)
    if not (isinstance(options, type) and issubclass(options, Model)):
        fix = "write class Config(ssl3d.Model) with its options, which may be none"
        raise PluginError(_told(cls, f"it has no Config. Fix: {fix}"))


def check_contract(backbone: Backbone, crop: Sequence[int] | None = None) -> None:
    """Raise PluginError for a backbone that methods could not train or tasks not evaluate.

    Args:
        backbone: the network, on the CPU; it stays as it is.
        crop: edges (D, H, W) of the volumes that it is meant for, at least its minimum; None: only its parts are
            looked at.
    """
    try:
        check_parts(backbone)
        if crop is None:
            return
        training = backbone.training
        try:
            _look(backbone.eval(), crop)
        finally:
            backbone.train(training)
    except Breach as breach:
        raise PluginError(_told(type(backbone), f"{breach}. Fix: {breach.fix}")) from None
    except ConfigError:
        raise
    except Exception as error:
        raise PluginError(_told(type(backbone), f"{type(error).__name__}: {error}")) from error


def _told(cls: type[Backbone], problem: str) -> str:
    return (
        f"The backbone {cls.name} ({cls.__module__}.{cls.__qualname__}) cannot be trained: {problem}\n"
        f"Everything that is wrong with it: ssl3d check {cls.name}"
    )


def _look(backbone: Backbone, crop: Sequence[int]) -> None:
    """Look at one volume, smaller than the crop where the backbone takes other sizes as well."""
    small = [min(edge, 2 * max(8, backbone.minimum_edge())) for edge in crop]
    values = torch.linspace(0, 1, small[0] * small[1] * small[2])
    try:
        check_shapes(backbone, values.reshape(1, 1, *small))
    except Breach:
        raise
    except Exception:
        if list(crop) == small:
            raise
        check_shapes(backbone, torch.zeros(1, 1, *crop))


def _shape(value: Any) -> str:
    """Return the shape of a tensor, or what else it is.

    >>> _shape(torch.zeros(2, 3)), _shape([1])
    ('(2, 3)', 'a list')
    """
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
