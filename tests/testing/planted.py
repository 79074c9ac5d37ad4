"""Methods with one mistake each, as authors make them, and one without."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import ssl3d
from ssl3d.errors import ConfigError
from ssl3d.models.heads import PooledLinear, pool

Views = dict[str, Tensor]


class Sound(ssl3d.Method):
    """Restore a volume from a noisy copy, and tell which half of it is brighter."""

    name = "planted"
    title = "Planted"

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.head = nn.Conv3d(backbone.local_channels, 1, 1)
        self.classifier = PooledLinear(backbone.global_channels, 2)

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        half = x.shape[2] // 2
        side = (x[:, :, :half].mean((1, 2, 3, 4)) > x[:, :, half:].mean((1, 2, 3, 4))).long()
        return {"noisy": x + 0.1 * rng.normal(x.shape[1:]), "x": x, "side": side}

    def training_step(self, views: Views) -> Views:
        features = self.backbone.encode(views["noisy"])
        restored = self.head(self.backbone.decode(features))
        return {
            "mse": F.mse_loss(restored, views["x"]),
            "side": 0.1 * F.cross_entropy(self.classifier(pool(features)), views["side"]),
        }

    def chance(self, views: Views) -> float:
        return float(views["x"].var()) + 0.1 * float(torch.log(torch.tensor(2.0)))


class MAE(ssl3d.Method):
    """A healthy masked autoencoder: restore the patches that were taken out."""

    name = "planted_mae"
    title = "Planted MAE"

    class Config(ssl3d.MethodConfig):
        """Options."""

        patch: int = Field(8, ge=1)
        """Edge of a patch in voxels."""
        ratio: float = Field(0.6, gt=0, lt=1)
        """Share of the patches that is taken out."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.head = nn.Conv3d(backbone.local_channels, 1, 1)

    def check(self, crop: Any, items: int) -> None:
        if any(edge % self.config.patch for edge in crop):
            raise ConfigError(
                f"pretrain.crop = {crop} is no multiple of planted_mae.patch = {self.config.patch}."
            )

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        patch = self.config.patch
        grid = [edge // patch for edge in x.shape[2:]]
        out = rng.bernoulli(self.config.ratio, (1, *grid))  # (B, 1, d, h, w)
        for axis in (2, 3, 4):
            out = out.repeat_interleave(patch, axis)  # (B, 1, D, H, W)
        return {"seen": x * ~out, "out": out, "x": x}

    def training_step(self, views: Views) -> Views:
        _, local = self.backbone(views["seen"])
        error = (self.head(local) - views["x"]).square() * views["out"]
        return {"mse": error.sum() / views["out"].sum().clamp(min=1)}

    def chance(self, views: Views) -> float:
        return float(views["x"][views["out"]].var())


# --- Declarations ------------------------------------------------------------------------------------


class SpacedName(Sound):
    """A name that no list can hold."""

    name = "my method"


class SectionName(Sound):
    """A name that --set takes for a section."""

    name = "data"


class SameTitle(Sound):
    """Two rows of one title."""

    title = "gvsl"


class NoSuchPart(Sound):
    """Trains what there is not."""

    trains = "backbone"  # type: ignore[assignment]


class NoConfig(Sound):
    """Options that nobody checks."""

    Config = dict  # type: ignore[assignment]


class WrongVariant(Sound):
    """A variant with an option that does not exist."""

    variants: ClassVar[dict[str, dict[str, Any]]] = {"planted_more": {"nosuch": 1}}


class NoComma(Sound):
    """A tuple that is a text."""

    untrained = "head"  # type: ignore[assignment]


class NoRng(Sound):
    """views without what it is called with."""

    def views(self, x: Tensor) -> Views:  # type: ignore[override]
        return {"noisy": x, "x": x.clone()}


class NoStep(ssl3d.Method):
    """Half a method."""

    name, title = "planted", "Planted"

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        return {"x": x}


class Misspelt(Sound):
    """A hook that nothing calls."""

    def on_step_ends(self, progress: ssl3d.Progress) -> None: ...


class TrainsNothing(Sound):
    """Steps that are never done."""

    trains = "none"


# --- Construction ------------------------------------------------------------------------------------


class NoSuper(Sound):
    """Forgets super().__init__."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        self.head = nn.Conv3d(backbone.local_channels, 1, 1)


class NumpyWeights(Sound):
    """Weights that no seed decides."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        nn.init.constant_(self.head.weight, float(np.random.standard_normal()))  # noqa: NPY002


class NoSuchModule(Sound):
    """Declares a part that is not there."""

    stop_gradients = ("stop",)


class NothingUntrained(Sound):
    """Declares parameters that are not there."""

    untrained = ("teacher.",)


class OtherBackbone(Sound):
    """Adds a head to the backbone, whose weights are all that is kept."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.backbone.extra = nn.Linear(2, 2)


# --- Views -------------------------------------------------------------------------------------------


class ListViews(Sound):
    """Views in a list."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Any:
        return list(super().views(x, rng).values())


class TupleViews(Sound):
    """Views in a tuple."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Any:
        return tuple(super().views(x, rng).values())


class NumpyViews(Sound):
    """An array among the views."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Any:
        return {**super().views(x, rng), "array": x.numpy()}


class DoubleViews(Sound):
    """A view in float64."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        return {**super().views(x, rng), "noisy": x.double() + 0.1 * rng.normal(x.shape[1:])}


class InfiniteViews(Sound):
    """A logarithm of air."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        return {**super().views(x, rng), "noisy": torch.log(x - x.amin()) + rng.normal(x.shape[1:])}


class SharedViews(Sound):
    """The mask is cut out of the target, too."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        views = super().views(x.clone(), rng)
        views["x"] += 0.1 * rng.fork("more").normal(x.shape[1:])
        return {**views, "noisy": views["x"]}


class ChangesCrops(Sound):
    """Noise is added to the crops themselves."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        return super().views(x.add_(0.1), rng)


class ChangesViews(Sound):
    """A step that changes what it is given."""

    def training_step(self, views: Views) -> Views:
        views["noisy"].clamp_(0, 0.5)
        return super().training_step(views)


class PopsViews(Sound):
    """A step that empties what it is given."""

    def training_step(self, views: Views) -> Views:
        side = views.pop("side")
        return super().training_step({**views, "side": side})


class ReseedsTorch(Sound):
    """Seeds the generator of everybody."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        torch.manual_seed(rng.step)
        return super().views(x, rng)


class FreshGenerator(Sound):
    """Draws from a generator that nobody seeds."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        noise = torch.from_numpy(np.random.default_rng().standard_normal(x.shape, dtype=np.float32))
        return {**super().views(x, rng), "noisy": x + 0.1 * noise}


class CountsCalls(Sound):
    """Views of the number of calls."""

    calls = 0

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        self.calls += 1
        views = super().views(x, rng)
        return {**views, "noisy": views["noisy"] * (1 + 0.1 * self.calls)}


# --- Steps -------------------------------------------------------------------------------------------


class NotANumber(Sound):
    """0 / 0."""

    def training_step(self, views: Views) -> Views:
        losses = super().training_step(views)
        return {**losses, "mse": losses["mse"] * 0 / (0 * losses["mse"])}


class PlainFloat(Sound):
    """A loss without a graph."""

    def training_step(self, views: Views) -> Any:
        return {name: loss.item() for name, loss in super().training_step(views).items()}


class OneTensor(Sound):
    """The sum in place of the losses."""

    def training_step(self, views: Views) -> Any:
        return sum(super().training_step(views).values())


class RandomStep(Sound):
    """Dropout, which draws from the global generator."""

    def training_step(self, views: Views) -> Views:
        return super().training_step({**views, "noisy": F.dropout(views["noisy"], 0.2, self.training)})


class BackwardInside(Sound):
    """Calls backward itself."""

    def training_step(self, views: Views) -> Views:
        losses = super().training_step(views)
        losses["mse"].backward(retain_graph=True)
        return losses


class MovesInside(Sound):
    """Moves a momentum copy in the step, which scoring calls, too."""

    untrained = ("slow.",)

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.slow = nn.Conv3d(backbone.local_channels, 1, 1).requires_grad_(False)

    def training_step(self, views: Views) -> Views:
        with torch.no_grad():
            self.slow.weight.lerp_(self.head.weight, 0.1)
        return super().training_step(views)


class Detached(Sound):
    """No way for a gradient."""

    def training_step(self, views: Views) -> Views:
        return {name: loss.detach() for name, loss in super().training_step(views).items()}


class EncoderAlone(Sound):
    """Says that the decoder is trained, and does not use it."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        del self.head

    def training_step(self, views: Views) -> Views:
        pooled = pool(self.backbone.encode(views["noisy"]))
        return {"side": F.cross_entropy(self.classifier(pooled), views["side"])}


class ReservedName(Sound):
    """A loss with a name that the log has already."""

    def training_step(self, views: Views) -> Views:
        return {"lr": super().training_step(views)["mse"]}


class ComparesItems(Sound):
    """Says that a batch may be taken in parts, and compares its items."""

    splits = True

    def training_step(self, views: Views) -> Views:
        z = F.normalize(pool(self.backbone.encode(views["noisy"])), dim=1)
        return {**super().training_step(views), "spread": (z @ z.T).square().sum()}

    views_per_item = 2


class DecoderToo(Sound):
    """Says that the encoder alone is trained, and uses the random decoder."""

    trains = "encoder"


class TwiceTheVoxels(Sound):
    """Passes two views where one is declared."""

    def training_step(self, views: Views) -> Views:
        second = self.head(self.backbone(views["noisy"].flip(2))[1])
        return {**super().training_step(views), "flipped": F.mse_loss(second, views["x"].flip(2))}


class QueueInScoring(Sound):
    """A queue that the score moves, too."""

    queue: Tensor

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.register_buffer("queue", torch.zeros(8, backbone.global_channels))

    def training_step(self, views: Views) -> Views:
        with torch.no_grad():
            pooled = pool(self.backbone.encode(views["noisy"]))[:8]
            self.queue.copy_(torch.cat([pooled, self.queue])[:8])
        return super().training_step(views)


class NoChance(Sound):
    """A level that is no number."""

    def chance(self, views: Views) -> float:
        return float("nan")


class WrongMonitor(Sound):
    """Whole volumes in the log."""

    def monitor(self, probe: Tensor, rng: ssl3d.BatchRng) -> Any:
        return {"mean": probe}


class Ascends(Sound):
    """A similarity that is minimised."""

    def training_step(self, views: Views) -> Views:
        return {
            name: torch.exp(-loss) + loss.detach() * 2 for name, loss in super().training_step(views).items()
        }


# --- State -------------------------------------------------------------------------------------------


class Undeclared(Sound):
    """A momentum copy that nothing declares."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.slow = nn.Conv3d(backbone.local_channels, 1, 1).requires_grad_(False)
        self.slow.load_state_dict(self.head.state_dict())

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        with torch.no_grad():
            self.slow.weight.lerp_(self.head.weight, 0.1)


class NotACopy(Sound):
    """A target that is the network itself."""

    targets: ClassVar[dict[str, str]] = {"slow": "head"}

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.slow = self.head


class ListState(Sound):
    """The last loss in an attribute."""

    last = None

    def training_step(self, views: Views) -> Views:
        losses = super().training_step(views)
        return {**losses, "more": losses["mse"] * (self.last or 1)}

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        self.last = progress.step


class EpochState(Sound):
    """Weights of classes that an epoch's start leaves in an attribute."""

    weight = 1.0

    def on_epoch_start(self, volumes: Any, epoch: int) -> None:
        self.weight = 1.0 + epoch

    def training_step(self, views: Views) -> Views:
        return {name: loss * self.weight for name, loss in super().training_step(views).items()}


class NotSaved(Sound):
    """A buffer that is not saved."""

    scale: Tensor

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def training_step(self, views: Views) -> Views:
        return {name: loss * self.scale for name, loss in super().training_step(views).items()}

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        self.scale *= 1.1


class KeepsGraph(Sound):
    """Compares with the features of the last step, graph included."""

    last: Any = None

    def training_step(self, views: Views) -> Views:
        pooled = pool(self.backbone.encode(views["noisy"]))
        losses = super().training_step(views)
        if self.last is not None and self.training:
            losses["drift"] = F.mse_loss(pooled, self.last)
        self.last = pooled
        return losses

    views_per_item = 2


# --- Elsewhere ---------------------------------------------------------------------------------------


class OneWidth(Sound):
    """A head for the 8 channels of one backbone."""

    def __init__(self, backbone: ssl3d.Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.classifier = PooledLinear(8, 2)


class TwoStages(Sound):
    """Takes a second stage for granted."""

    def training_step(self, views: Views) -> Views:
        stage = self.backbone.encode(views["noisy"])[-2]
        return {**super().training_step(views), "stage": 0 * stage.mean()}

    views_per_item = 2


class NoAir(Sound):
    """Divides by the brightest voxel."""

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> Views:
        return super().views(x / x.amax((1, 2, 3, 4), keepdim=True), rng)


class UnrefusedPatches(MAE):
    """Patches that need not fit."""

    def check(self, crop: Any, items: int) -> None: ...


PLANTED: list[tuple[type[ssl3d.Method], str, str]] = [
    (SpacedName, "declarations make sense", "'my method' cannot name a method"),
    (SectionName, "declarations make sense", 'the name "data" is that of a section'),
    (SameTitle, "declarations make sense", 'the title "gvsl" is that of the method "gvsl" too'),
    (NoSuchPart, "declarations make sense", "trains = 'backbone' does not exist"),
    (NoConfig, "declarations make sense", "no subclass of ssl3d.MethodConfig"),
    (WrongVariant, "declarations make sense", 'planted_more: unknown key "nosuch"'),
    (NoComma, "declarations make sense", "untrained = 'head' is no tuple"),
    (NoRng, "its functions can be called", "views cannot be called: too many positional arguments"),
    (NoStep, "its functions can be called", "it has no training_step"),
    (Misspelt, "its functions can be called", "nothing calls on_step_ends"),
    (TrainsNothing, "its functions can be called", "would never be called"),
    (NoSuper, "it can be built", "cannot assign module before Module.__init__"),
    (NumpyWeights, "it can be built", "head.weight differ although the seed is the same"),
    (NoSuchModule, "it can be built", 'there is no module "stop"'),
    (NothingUntrained, "it can be built", 'no parameter begins with the declared "teacher."'),
    (OtherBackbone, "it can be built", "changes the parts of the backbone: extra.bias"),
    (ListViews, "views are a dictionary of tensors", "views returns a list"),
    (TupleViews, "views are a dictionary of tensors", "views returns a tuple"),
    (NumpyViews, "views are a dictionary of tensors", "the view 'array' is a ndarray"),
    (DoubleViews, "views are a dictionary of tensors", "the view noisy is float64"),
    (InfiniteViews, "views are a dictionary of tensors", "the view noisy has values that are not finite"),
    (SharedViews, "nothing is changed in place", 'the views "noisy" and "x" share memory'),
    (ChangesCrops, "nothing is changed in place", "views changes the crops"),
    (ChangesViews, "nothing is changed in place", r"changes the views \['noisy'\]"),
    (PopsViews, "nothing is changed in place", "adds or removes views"),
    (ReseedsTorch, "views depend on seed and step only", "draws from or seeds torch's global generator"),
    (FreshGenerator, "views depend on seed and step only", r"\['noisy'\] change although"),
    (CountsCalls, "views depend on seed and step only", r"\['noisy'\] change although"),
    (NotANumber, "losses are finite scalars", "mse = nan"),
    (PlainFloat, "losses are finite scalars", "mse is no scalar tensor"),
    (OneTensor, "losses are finite scalars", "must return a dict of named losses, not a Tensor"),
    (
        RandomStep,
        "a step depends on weights and views only",
        "losses .* differ although weights and views are equal",
    ),
    (BackwardInside, "a step depends on weights and views only", "calls backward"),
    (MovesInside, "a step depends on weights and views only", "training_step moves slow.weight"),
    (Detached, "gradient reaches every trainable parameter", "no loss has a gradient"),
    (EncoderAlone, "gradient reaches every trainable parameter", "no gradient in backbone.decoder"),
    (ReservedName, "losses are finite scalars", "a loss is called 'lr'"),
    (ComparesItems, "parts of a batch give its gradient", "in two parts, the loss is"),
    (DecoderToo, "the network is used as declared", "calls the decoder"),
    (TwiceTheVoxels, "the network is used as declared", "1024 voxels of an item pass .* 512 are declared"),
    (QueueInScoring, "scoring changes nothing", "scoring the pretext task changes queue"),
    (NoChance, "scoring changes nothing", "chance returned nan"),
    (WrongMonitor, "scoring changes nothing", "monitor"),
    (Ascends, "one batch can be overfitted", "the loss went from"),
    (
        Undeclared,
        "target networks follow by momentum",
        "moves slow, a copy of head, which no `targets` declares",
    ),
    (NotACopy, "target networks follow by momentum", "no parameter below the declared target"),
    (ListState, "a checkpoint gives the same next step", "losses differ"),
    (EpochState, "a checkpoint gives the same next step", "losses differ"),
    (NotSaved, "a checkpoint gives the same next step", "losses differ"),
    (KeepsGraph, "one batch can be overfitted", "backward stops: .* modified by an inplace operation"),
    (OneWidth, "any backbone will do", "RuntimeError"),
    (TwoStages, "any backbone will do", "IndexError"),
    (NoAir, "a crop of air gives finite losses", "not finite"),
    (UnrefusedPatches, "sizes work or are refused", "8x10x6: RuntimeError"),
]
"""(method, the one check that tells of its mistake, what it says)."""
