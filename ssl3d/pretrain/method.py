"""The contract of a pretext method: the whole of what an author writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from ssl3d.config import MethodConfig, Model
from ssl3d.errors import ConfigError
from ssl3d.models.backbone import Backbone
from ssl3d.rng import BatchRng

if TYPE_CHECKING:
    from ssl3d.pretrain.source import CropSource


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done, 1 after the first one.
        steps: optimizer steps of the whole run.
    """

    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / max(1, self.steps)


class StopGradient(nn.Module):
    """Detaches its input. A module, so that the conformance suite can watch it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Method(nn.Module):
    """A pretext task on the shared backbone.

    Subclasses set ``name``, ``title``, ``trains`` and ``Config`` and write three functions:
    ``__init__``, ``views`` and ``training_step``. Loading, seeding, mixed precision, optimizer,
    logging, checkpoints and the whole downstream evaluation are the framework's.
    """

    name: ClassVar[str] = ""
    """Unique name on the command line."""
    title: ClassVar[str] = ""
    """Name in tables."""
    paper: ClassVar[str] = ""
    """Citation of the paper that the method follows."""
    trains: ClassVar[Literal["encoder+decoder", "encoder", "none"]] = "encoder+decoder"
    """Parts of the backbone that get a gradient; tables mark `encoder`, since such a method meets
    the segmentation tasks with a random decoder."""
    volumes_per_item: ClassVar[int] = 1
    """Volumes that one training item consists of: 2 for methods that compare two patients."""
    views_per_item: int = 1
    """Views of each volume of an item that pass the network in a step: 2 for methods that compare two."""
    view_edge: float = 1.0
    """Edge of such a view over that of the crop. A step has as many items as have the voxels of
    ``pretrain.batch_size`` crops, so that smaller views are more views: at 0.5 eight for each crop."""
    minimum_items: ClassVar[int] = 1
    """Fewest items a step on which the method is defined: 2 for a loss that compares them."""
    splits: bool = False
    """Whether losses and gradient of a batch are the means over its items of what each alone gives, so that
    ``pretrain.accumulate`` may call ``training_step`` with a few items at a time; views then have the items as first
    axis. Not where samples are compared or normalised together: there the backbone alone takes the volumes in turn."""
    control: ClassVar[bool] = False
    """Nothing is there to learn, on purpose: the loss has to stay at :meth:`chance`."""
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named configurations, for example ablations: {name: {option: value}}."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """Prefixes of parameter names that get no gradient on purpose; printed by `ssl3d check`."""
    targets: ClassVar[dict[str, str]] = {}
    """Target networks: {submodule: the online submodule that it follows by a moving average}."""
    stop_gradients: ClassVar[tuple[str, ...]] = ()
    """Submodules (:class:`StopGradient`) whose output must carry no gradient."""
    Config: ClassVar[type[Model]] = MethodConfig

    backbone: Backbone

    def __init__(self, backbone: Backbone, config: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config

    def view_shape(self, crop: Sequence[int]) -> tuple[int, int, int]:
        """Return the edges (D, H, W) of a view of a crop with these edges, in voxels."""
        d, h, w = (max(1, round(self.view_edge * edge)) for edge in crop)
        return d, h, w

    def voxels_per_item(self, crop: Sequence[int]) -> int:
        """Return the voxels that pass the trained network for one item; copies of the network do not count."""
        return self.volumes_per_item * self.views_per_item * math.prod(self.view_shape(crop))

    def items_per_step(self, crop: Sequence[int], batch_size: int) -> int:
        """Return how many items have the voxels of ``batch_size`` crops; every method gets as many voxels a step.

        Raises:
            ConfigError: that is less than ``minimum_items``.
        """
        items = batch_size * math.prod(crop) // self.voxels_per_item(crop)
        if items < self.minimum_items:
            per_item = self.volumes_per_item * self.views_per_item
            wanted = -(-self.minimum_items * self.voxels_per_item(crop) // math.prod(crop))
            raise ConfigError(
                f"{self.name} needs {self.minimum_items} items a step, each with {per_item} views of "
                f"{'x'.join(map(str, self.view_shape(crop)))} voxels, and pretrain.batch_size={batch_size} gives room for "
                f"{items}: use pretrain.batch_size of at least {wanted}."
            )
        return items

    def check(self, crop: Sequence[int], items: int) -> None:
        """Raise ConfigError where the method is not defined; called before any data are read.

        Args:
            crop: edges (D, H, W) of the crops in voxels.
            items: items a step, see :meth:`items_per_step`.
        """

    def setup(self, volumes: CropSource) -> None:
        """Called once before training, and before the state of a resumed run is loaded.

        For buffers whose size depends on the data, and for data on which the method is not defined:
        raise ConfigError or DataError.
        """

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        """Make what ``training_step`` needs from a batch of crops, on the device of ``x``.

        Args:
            x: crops (B, 1, D, H, W) in [0, 1]; (B, V, 1, D, H, W) for a method with
                ``volumes_per_item`` V > 1, all V at the same relative position.
            rng: the only allowed source of randomness.
        """
        raise NotImplementedError

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return named scalar losses, already weighted; the framework minimises their sum."""
        raise NotImplementedError

    def chance(self, views: dict[str, Tensor]) -> float | None:
        """Return the :meth:`pretext_score` of the best output that ignores its input; without gradient.

        The cross-entropy of equal probabilities, the error of the mean image. The framework compares
        with it what the method reaches on held-back volumes, and says so where that is no better.

        Args:
            views: what :meth:`held_back_views` returns.

        Returns:
            The score, or None where there is no such level.
        """
        return None

    def pretext_score(self, views: dict[str, Tensor]) -> float:
        """Return how well the pretext task is solved, the lower, the better; without gradient, in ``eval`` mode.

        Default: the sum of the losses. Another measure where the loss says nothing of learning: that of
        two embeddings pulled together is least after a collapse.
        """
        return sum(float(loss.detach()) for loss in self.training_step(views).values())

    def held_back_views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        """Make the views of held-back crops on which the pretext task is scored.

        Default: :meth:`views`. For a method whose views are not made of ``x`` alone.
        """
        return self.views(x, rng)

    def on_step_end(self, progress: Progress) -> None:
        """Called after every optimizer step, for example to move a target network."""

    def on_epoch_start(self, volumes: CropSource, epoch: int) -> None:
        """Called when a pass over the volumes begins, for example to cluster their features.

        Whatever it computes and later steps need must live in buffers, so that a resumed run
        finds it in the checkpoint.
        """

    def monitor(self, probe: Tensor, rng: BatchRng) -> dict[str, float]:
        """Return further numbers for the log that show whether the method learns; without gradient.

        Every ``pretrain.monitor_every`` steps, with the same crops and randomness each time, so that
        the numbers of a run can be compared.

        Args:
            probe: the central crop of up to 16 volumes (N, 1, D, H, W).
            rng: randomness for N samples.
        """
        return {}
