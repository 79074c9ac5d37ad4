"""The conformance suite catches planted faults, and passes what is sound."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ssl3d_methods.rotation import Rotation
from torch import Tensor, nn

import ssl3d
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.registry.registry import registry
from ssl3d.testing import check_method
from ssl3d.testing.suite import LEARN_STEPS, Suite


class Sound(ssl3d.Method):
    """A small method with a target network: predicts the target's feature of a noisy copy, and restores."""

    name = "sound"
    title = "Sound"
    untrained = ("target",)
    targets = {"target": "projector"}  # noqa: RUF012

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.restore = nn.Conv3d(backbone.local_channels, 1, 1)
        self.projector = nn.Linear(backbone.global_channels, 8)
        self.target = nn.Linear(backbone.global_channels, 8).requires_grad_(False)
        self.target.load_state_dict(self.projector.state_dict())

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> dict[str, Tensor]:
        return {"noisy": x + 0.1 * rng.normal(x.shape[1:]), "x": x}

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled, local = self.backbone(views["noisy"])
        pooled = pooled.mean((2, 3, 4))
        with torch.no_grad():
            goal = self.target(self.backbone.encode(views["x"])[-1].mean((2, 3, 4)))
        return {
            "mse": F.mse_loss(self.restore(local), views["x"]),
            "pull": F.mse_loss(self.projector(pooled), goal),
        }

    def chance(self, views: dict[str, Tensor]) -> float:
        return float(views["x"].var())

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        with torch.no_grad():
            for t, o in zip(self.target.parameters(), self.projector.parameters(), strict=True):
                t.lerp_(o, 0.05)


class DetachedHead(Sound):
    """The released GVSL's fault: a head rebuilt from detached numbers."""

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        _, local = self.backbone(views["noisy"])
        weight = self.restore.weight.detach() + 0 * self.restore.bias.sum()
        restored = F.conv3d(local, weight) + self.restore.bias.view(1, 1, 1, 1, 1)
        return {
            "mse": F.mse_loss(restored, views["x"]),
            **{k: v for k, v in super().training_step(views).items() if k == "pull"},
        }


class TargetTrains(Sound):
    """The gradient reaches the target network."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.target.requires_grad_(True)

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = self.backbone.encode(views["noisy"])[-1].mean((2, 3, 4))
        return {**super().training_step(views), "t": self.target(pooled).square().mean()}


class FreshTarget(Sound):
    """The target starts from an initialisation of its own."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        nn.init.normal_(self.target.weight)


class TargetJumps(Sound):
    """The target moves, but not by a moving average."""

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        with torch.no_grad():
            for t, o in zip(self.target.parameters(), self.projector.parameters(), strict=True):
                t.copy_(o + 0.01 * torch.ones_like(o))


class IgnoresSeed(Sound):
    """Views from the global generator."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> dict[str, Tensor]:
        return {"noisy": x + 0.1 * torch.randn_like(x), "x": x}


class FixedViews(Sound):
    """Views that never change."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> dict[str, Tensor]:
        return {"noisy": x * 0.9, "x": x}


class Collapses(Sound):
    """Two views pulled together with nothing to keep them apart."""

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        z = [
            F.normalize(self.backbone.encode(v)[-1].mean((2, 3, 4)), dim=1)
            for v in (views["noisy"], views["x"].flip(0))
        ]
        return {**super().training_step(views), "pull": 30 * (z[0] - z[1]).square().sum(1).mean()}


class LeakyStop(Sound):
    """Declares a stop-gradient that passes the gradient on."""

    stop_gradients = ("stop",)

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.stop = nn.Identity()

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        z = self.stop(self.backbone.encode(views["x"])[-1].mean((2, 3, 4)))
        return {**super().training_step(views), "z": z.square().mean()}


class HiddenState(Sound):
    """Keeps something that decides the loss outside of parameters and buffers."""

    scale = 1.0

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        super().on_step_end(progress)
        self.scale *= 1.5

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: self.scale * v for k, v in super().training_step(views).items()}


class NotScalar(Sound):
    """A loss a sample."""

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "mse": (self.backbone(views["noisy"])[1].mean(1, keepdim=True) - views["x"])
            .square()
            .mean((1, 2, 3, 4))
        }


class NeedsCubes(Sound):
    """Fails on other shapes without saying so."""

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        x = views["x"]
        return {**super().training_step(views), "t": 0 * (x + x.transpose(2, 4)).mean()}


class WantsLabels(Sound):
    """Looks at a label when an epoch starts."""

    def on_epoch_start(self, volumes: Any, epoch: int) -> None:
        volumes.cohort.label(0)


class BareHead(Rotation):
    """A linear layer on the mean-pooled f^g, without the norm: its features are nearly one vector."""

    name = "bare_head"

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.classifier = nn.Linear(backbone.global_channels, len(self.rotations))  # type: ignore[assignment]


class FrozenEncoder(Rotation):
    """Its head learns what it can from random features."""

    name = "frozen_encoder"

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            pooled = self.backbone.encode(views["rotated"])[-1].mean((2, 3, 4))
        return {"cross_entropy": F.cross_entropy(self.classifier(pooled), views["label"])}


class NoLevel(Sound):
    """Does not say what an output that ignores its input scores."""

    def chance(self, views: dict[str, Tensor]) -> float | None:
        return None


class ControlThatLearns(Sound):
    """Calls itself a control, and restores."""

    control = True


def results(cls: type[ssl3d.Method], *names: str) -> dict[str, Any]:
    suite = Suite(MethodSpec(cls.name, cls, cls.Config(), cls.title))
    return {c.name: c for c in suite.run(only=names)}


def test_a_sound_method_passes() -> None:
    report = check_method(Sound, learn_steps=30)
    report.assert_passed()
    seen = {c.name: c.seen for c in report.checks}
    assert seen["target networks follow by momentum"] == "momentum 0.9500"
    assert "declared without: target" in seen["gradient reaches every trainable parameter"]


@pytest.mark.parametrize(
    ("cls", "check", "message"),
    [
        (DetachedHead, "gradient reaches every trainable parameter", "restore.weight"),
        (TargetTrains, "target networks follow by momentum", "a gradient reaches the target network"),
        (FreshTarget, "target networks follow by momentum", "does not start as a copy"),
        (TargetJumps, "target networks follow by momentum", "no moving average"),
        (
            IgnoresSeed,
            "views depend on seed and step only",
            r"\['noisy'\] change although seed and step do not",
        ),
        (FixedViews, "views depend on seed and step only", "no view changes with the seed"),
        (Collapses, "features do not collapse", "collapsed"),
        (LeakyStop, "stop gradients stop", "a gradient passes stop"),
        (HiddenState, "a checkpoint gives the same next step", "losses differ"),
        (NotScalar, "losses are finite scalars", "mse is no scalar"),
        (NeedsCubes, "sizes work or are refused", "16x20x12"),
        (WantsLabels, "no label reaches the method", "asked for a label"),
    ],
)
def test_planted_faults_are_caught(cls: type[ssl3d.Method], check: str, message: str) -> None:
    (result,) = results(cls, check).values()
    assert not result.passed
    assert re.search(message, result.seen), result.seen


@pytest.mark.parametrize("name", registry().methods.names())
def test_bundled_methods_keep_the_contract(name: str) -> None:
    """The registry writes the list of tests; only the slow looks at learning are left to `ssl3d check`."""
    slow = ("one batch can be overfitted", "features do not collapse", "the backbone loads into the harness")
    entry = registry().methods.get(name)
    # That each one learns is shown by benchmarks/studies/pretext.py, at a budget where it means something.
    check_method(name, skip=("learns", *(() if not entry.base and name != "gvsl" else slow))).assert_passed()


@pytest.mark.parametrize(
    ("cls", "steps", "message"),
    [
        (Rotation, LEARN_STEPS, None),
        (BareHead, LEARN_STEPS, r"held-back score .*\. A head on pooled features needs a norm"),
        (FrozenEncoder, 2, "no weight of the encoder moves"),
        (NoLevel, 2, r"define chance\(views\)"),
        (ControlThatLearns, 30, "a control has something to learn after all"),
    ],
)
def test_the_suite_tells_what_learns_from_what_cannot(
    cls: type[ssl3d.Method], steps: int, message: str | None
) -> None:
    suite = Suite(MethodSpec(cls.name, cls, cls.Config(), cls.title), learn_steps=steps)
    (result,) = suite.run(only=["learns"])
    assert result.passed is (message is None), result.seen
    assert re.search(message or "held-back score", result.seen), result.seen
