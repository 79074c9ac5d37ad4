"""The control: labels that say nothing, and a loss that stays at chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from ssl3d.config import BackboneConfig
from ssl3d.models.factory import build_backbone
from ssl3d.pretrain.spec import resolve_method
from ssl3d.rng import BatchRng


def control(classes: int = 10) -> torch.nn.Module:
    spec = resolve_method("random_labels", {"random_labels": {"classes": classes}})
    return spec.build(build_backbone(BackboneConfig(name="unet3d", channels=[4, 8]), 0), 0)  # type: ignore[call-arg]


def test_labels_are_drawn_whatever_the_crop_and_the_crop_is_left_alone() -> None:
    method, rng = control(), BatchRng(0, 3, range(4))
    x = torch.rand(4, 1, 8, 8, 8)
    views, others = method.views(x, rng), method.views(1 - x, BatchRng(0, 3, range(4)))  # type: ignore[operator]
    assert torch.equal(views["x"], x)
    assert torch.equal(views["label"], others["label"])


def test_all_classes_are_drawn_alike_and_anew_in_every_step() -> None:
    method, x = control(), torch.zeros(2, 1, 8, 8, 8)
    labels = np.array(
        [method.views(x, BatchRng(0, step, range(2)))["label"].tolist() for step in range(1000)]
    )  # type: ignore[operator]
    assert chisquare(np.bincount(labels.ravel(), minlength=10)).pvalue > 0.001
    assert abs(np.corrcoef(labels[:-1, 0], labels[1:, 0])[0, 1]) < 0.1
    assert abs(np.corrcoef(labels.T)[0, 1]) < 0.1


@pytest.mark.parametrize("classes", [2, 10])
def test_a_network_that_ignores_its_input_has_the_loss_of_chance(classes: int) -> None:
    method = control(classes)
    torch.nn.init.zeros_(method.classifier.linear.weight)  # type: ignore[union-attr, arg-type]
    torch.nn.init.zeros_(method.classifier.linear.bias)  # type: ignore[union-attr, arg-type]
    views = method.views(torch.rand(3, 1, 8, 8, 8), BatchRng(0, 0, range(3)))  # type: ignore[operator]
    assert float(method.training_step(views)["cross_entropy"].detach()) == pytest.approx(math.log(classes))  # type: ignore[operator]
