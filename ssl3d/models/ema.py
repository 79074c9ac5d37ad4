"""A momentum encoder: a copy of a network that follows it by an exponential moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class EMA(nn.Module):
    """A copy of a network that follows it by an exponential moving average (He et al., MoCo, CVPR 2020, equation 2).

    The copy starts with the network's weights, gets no gradient, and is stored and resumed with the method. Declare it in
    the method, so that the conformance suite watches it::

        untrained = ("teacher.",)
        targets = {"teacher.network.encoder": "backbone.encoder"}

        def __init__(self, backbone, config):
            super().__init__(backbone, config)
            self.teacher = ssl3d.EMA(backbone, without=["decoder"])

        def on_step_end(self, progress):
            self.teacher.follow(self.backbone, ssl3d.EMA.cosine(0.996, progress.step - 1, progress.steps))

    Args:
        online: the network to follow.
        without: children that are never used, so neither stored nor moved.

    Attributes:
        network: the copy; call it, or its functions (``teacher.network.encode(x)``), under ``torch.no_grad()``.
    """

    def __init__(self, online: nn.Module, without: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = copy.deepcopy(online)
        for name in without:
            setattr(self.network, name, nn.Identity())
        self.network.requires_grad_(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the copy makes of the arguments, without gradient."""
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def follow(self, online: nn.Module, momentum: float) -> None:
        """Move the copy: parameters to ``momentum`` of themselves and the rest of ``online``; buffers are copied.

        Args:
            online: the network that was copied.
            momentum: in [0, 1]; 1 leaves the parameters where they are.
        """
        for name, parameter in self.network.named_parameters():
            parameter.lerp_(online.get_parameter(name), 1 - momentum)
        for name, buffer in self.network.named_buffers():  # statistics of a norm
            buffer.copy_(online.get_buffer(name))

    @staticmethod
    def cosine(base: float, step: int, steps: int) -> float:
        """Return the momentum of BYOL (Grill et al., NeurIPS 2020): 1 - (1 - base) (cos(pi k / K) + 1) / 2.

        Args:
            base: momentum at k = 0, in [0, 1]; at k = K it is 1.
            step: optimizer steps k done before the update.
            steps: optimizer steps K of the whole run.

        >>> EMA.cosine(0.99, 0, 100), EMA.cosine(0.99, 100, 100)
        (0.99, 1.0)
        """
        return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2
