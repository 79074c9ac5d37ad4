"""GVSL: geometric visual similarity learning (He et al., CVPR 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl3d import Method, MethodConfig
from ssl3d.errors import ConfigError
from ssl3d.geometry import (
    affine_coords,
    affine_matrix,
    compose,
    full_precision,
    identity_coords,
    identity_matrix,
    jacobian_determinant,
    no_autocast,
    warp,
)
from ssl3d.losses import ncc_loss, smoothness_loss
from ssl3d.models.heads import mean_image_error
from ssl3d.models.join import join
from ssl3d.ranks import gather
from ssl3d.rng import BatchRng
from ssl3d.transforms import BezierIntensity, InPainting, LocalShuffle, RandomSpatial


class GVSLConfig(MethodConfig):
    """Options of GVSL; the defaults are the paper's, and the released code's where the paper is silent."""

    matching: bool = True
    """Train Z-Matching: NCC and smoothness. Off: the row "w/o Z-Matching" of the paper's table 1."""
    restoration: bool = True
    """Train the fundamental task: restore the undamaged volume. Off: the row "w/o fundament"."""
    affine: bool = True
    """Use the affine head. Off: the row "w/o affine head"."""
    affine_trained: bool = True
    """Let the gradient reach the affine head. Off: a defect of the released code, which rebuilds the
    matrix from detached numbers, so that the affine head keeps its random start."""
    moving: Literal["a", "b"] = "a"
    """Which volume is warped onto the other: A (paper), or B (released code). Both NCC inputs are undamaged in either
    case."""
    damage: Literal["both", "a"] = "both"
    """Volumes that the network sees damaged, and restores. `a`: A alone (paper); what damage does to the features is then
    in every difference between A and B, and hides from the affine head what tells the pairs apart."""

    affine_head: Literal["difference", "conv", "linear"] = "difference"
    """What the 15 values are read from, see :class:`AffineHead`. `difference`: scaled differences of pooled features;
    `conv`: two 3x3x3 convolution blocks before the global average pooling (released code); `linear`: linear layers on
    pooled features (figure 12 b). With the last two the head answers every pair with nearly one matrix."""
    affine_order: Literal["released", "paper"] = "released"
    """Order of the affine product, see `ssl3d.geometry.affine_matrix`."""
    fusion: Literal["released", "eq12"] = "released"
    """Order of affine map and displacement, see `ssl3d.geometry.compose`; one resampling each."""
    rotation_limit: float = Field(math.pi / 9, gt=0, le=math.pi)
    """Largest predicted |angle| in radians."""
    scaling_limit: float = Field(0.25, gt=0, lt=1)
    """Largest predicted |factor - 1|."""
    shearing_limit: float = Field(math.pi / 18, gt=0, lt=math.pi / 2)
    """Largest predicted |shear angle| in radians."""
    translation_limit: float | None = Field(None, gt=0)
    """Largest predicted |translation| in half edges; None: not limited (paper)."""
    hidden_channels: int = Field(16, ge=1)
    """Width of the deformable head and of the restoration head."""

    ncc_window: int = Field(9, ge=3)
    """Edge of the NCC window in voxels; odd."""
    ncc_weight: float = Field(1.0, ge=0)
    """Weight of 1 - NCC."""
    smooth_weight: float = Field(1.0, ge=0)
    """Weight of the smoothness of the displacement."""
    mse_weight: float = Field(1.0, ge=0)
    """Weight of the restoration error."""

    shuffle_p: float = Field(0.8, ge=0, le=1)
    """Probability of local shuffling."""
    shuffle_boxes: int = Field(5000, ge=1)
    """Boxes whose voxels are shuffled."""
    shuffle_fraction: float = Field(1 / 20, gt=0, le=1)
    """Edge of such a box as a fraction of the volume's edge."""
    bezier_p: float = Field(0.9, ge=0, le=1)
    """Probability of the non-linear intensity curve."""
    inpaint_boxes: int = Field(30, ge=0)
    """Most boxes filled with noise."""
    inpaint_next_p: float = Field(0.95, ge=0, le=1)
    """Probability of each further box."""
    spatial: bool = True
    """Deform A, B and their damaged copies by one random map."""
    spatial_rotation: float = Field(math.pi / 9, ge=0, le=math.pi)
    """Largest |angle| of that map in radians."""
    spatial_scale: tuple[float, float] = (0.75, 1.25)
    """Its smallest and largest factor along an axis."""
    spatial_translation: float = Field(0.1, ge=0, le=1)
    """Its largest |shift| as a fraction of the longest edge."""
    spatial_shear: float = Field(math.pi / 18, ge=0, lt=math.pi / 2)
    """Its largest |shear angle| in radians."""
    elastic_alpha: tuple[float, float] = (0.0, 512.0)
    """Range of the elastic field's amplitude."""
    elastic_sigma: tuple[float, float] = (10.0, 13.0)
    """Range of the elastic field's smoothing in voxels."""
    elastic_reference_edge: int | None = Field(128, ge=1)
    """Edge for which the two above are meant; smaller crops are bent in proportion. None: in voxels
    whatever the crop (released code)."""

    @model_validator(mode="after")
    def _trains_something(self) -> GVSLConfig:
        if not (self.matching or self.restoration):
            raise ValueError("matching=false and restoration=false leave nothing to train; switch one on")
        if self.ncc_window % 2 == 0:
            raise ValueError(f"ncc_window={self.ncc_window} has no centre; use an odd number")
        return self


@dataclass(frozen=True)
class Matching:
    """A correspondence between two volumes.

    Attributes:
        coords: where the moving volume is sampled for each voxel of the fixed one, in voxels
            (B, 3, D, H, W); ``ssl3d.geometry.warp(moving, coords)`` aligns it.
        matrix: the affine part psi^g (B, 3, 4); the identity without an affine head.
        displacement: the deformable part psi^l in voxels (B, 3, D, H, W).
    """

    coords: Tensor
    matrix: Tensor
    displacement: Tensor


class ConvNormAct(nn.Sequential):
    """3x3x3 convolution, GroupNorm with C/8 groups unless given, LeakyReLU 0.2."""

    def __init__(self, c_in: int, c_out: int, groups: int | None = None) -> None:
        limit = groups or max(1, c_out // 8)
        groups = max(g for g in range(1, limit + 1) if c_out % g == 0)
        super().__init__(nn.Conv3d(c_in, c_out, 3, padding=1), nn.GroupNorm(groups, c_out), nn.LeakyReLU(0.2))


def moments(x: Tensor) -> Tensor:
    """Return the mean over the grid and the first moments along its axes: (B, C, D, H, W) -> (B, 4 C), float32 at least.

    A first moment is the mean of the feature times the position, -1 at the first and 1 at the last voxel of an axis: what
    lies on the other side has the other sign.
    """
    x = full_precision(x)
    parts = [x.mean((2, 3, 4))]  # (B, C)
    for axis in (2, 3, 4):
        n = x.shape[axis]
        profile = x.mean([other for other in (2, 3, 4) if other != axis])  # (B, C, n)
        parts.append(profile @ torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) / n)  # (B, C)
    return torch.cat(parts, dim=1)


class RunningScale(nn.Module):
    """Divide each feature by its running root mean square, (B, C) -> (B, C); the mean stays.

    The statistics are those of all training steps up to this one, the newest with a weight of ``momentum`` at least;
    they carry no gradient, so one sample a step is enough. They live in buffers: a resumed run finds them in the
    checkpoint. Passes without gradient (validation, monitor) do not move them.

    Args:
        features: C.
        momentum: smallest weight of the newest step, in (0, 1].
    """

    mean_square: Tensor
    steps: Tensor

    def __init__(self, features: int, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean_square", torch.ones(features))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.steps += 1
                weight = (1 / self.steps).clamp(min=self.momentum)
                self.mean_square.lerp_(gather(x).square().mean(0), weight)
        return x / (self.mean_square + 1e-8).sqrt()


class AffineHead(nn.Module):
    """15 values from two bottlenecks, composed to a matrix psi^g (section 3.2.1, figure 12 b).

    As drawn or as released the head starves: it answers every pair with one matrix, because nearly all of a pooled
    feature is common to all volumes (GroupNorm fixes the mean of every group of channels), because the encoder moves
    faster than the common part can be learned, and because a step of Adam at 1e-3 on weights of this fan-in is large
    beside the answers, which are about 0.05. Three departures from the paper (``affine_head="difference"``):

    - Means and first moments over the grid are subtracted, those of the fixed volume from those of the moving one. What
      volumes have in common cancels, wherever the encoder moves it. Moments tell where two volumes differ.
    - The differences are scaled by their running root mean square (:class:`RunningScale`).
    - Outputs are in units of 0.05 (``UNIT``).

    In all heads tanh keeps the values in their limits; the released code's hard clamps stop the gradient there.

    Args:
        channels: C^g of the bottleneck.
        config: ``affine_head``, ``affine_order`` and the limits.
    """

    UNIT = 0.05

    def __init__(self, channels: int, config: GVSLConfig) -> None:
        super().__init__()
        self.config = config
        # `conv`: 1024 -> 256 at the paper's width of the bottleneck, 512.
        hidden = {"difference": 4 * channels, "conv": max(1, channels // 2), "linear": 2 * channels}[
            config.affine_head
        ]
        if config.affine_head == "conv":
            self.blocks = nn.Sequential(ConvNormAct(2 * channels, hidden), ConvNormAct(hidden, hidden))
        elif config.affine_head == "difference":
            self.scale = RunningScale(hidden)
        self.rotation = nn.Linear(hidden, 3)
        self.scaling = nn.Linear(hidden, 3)
        self.translation = nn.Linear(hidden, 3)
        self.shearing = nn.Linear(hidden, 6)
        # Near the identity, but not at it: zero weights would stop the gradient into the encoder.
        for linear in (self.rotation, self.scaling, self.translation, self.shearing):
            nn.init.normal_(linear.weight, std=1e-2 / math.sqrt(hidden))
            nn.init.zeros_(linear.bias)

    def read(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Return the features of a pair (B, hidden) from two bottlenecks (B, C, D/16, H/16, W/16)."""
        if self.config.affine_head == "difference":
            with no_autocast(moving):
                scaled: Tensor = self.scale(moments(moving) - moments(fixed))  # (B, 4 C)
                return scaled
        x = torch.cat([moving, fixed], dim=1)  # (B, 2 C, D/16, H/16, W/16)
        if self.config.affine_head == "conv":
            x = self.blocks(x)  # (B, hidden, D/16, H/16, W/16)
        return full_precision(x).mean((2, 3, 4))

    def limited(self, values: Tensor, limit: float | None) -> Tensor:
        """Return ``values`` within [-limit, limit]."""
        unit = 1.0
        if self.config.affine_head == "difference":
            unit = (
                self.UNIT if limit is None else self.UNIT / limit
            )  # the slope at 0 is UNIT for each of the 15
        values = unit * values
        return values if limit is None else limit * torch.tanh(values)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Return psi^g (B, 3, 4) from the bottlenecks of the moving and the fixed volume (B, C, D/16, H/16, W/16)."""
        cfg = self.config
        x = self.read(moving, fixed)  # (B, hidden)
        with no_autocast(x):
            return affine_matrix(
                self.limited(self.rotation(x), cfg.rotation_limit),
                1 + self.limited(self.scaling(x), cfg.scaling_limit),
                self.limited(self.shearing(x), cfg.shearing_limit),
                self.limited(self.translation(x), cfg.translation_limit),
                cfg.affine_order,
            )


class ZMatching(nn.Module):
    """The Z-Matching head: affine on the global features, deformable on the local ones."""

    def __init__(self, global_channels: int, local_channels: int, config: GVSLConfig) -> None:
        super().__init__()
        self.config = config
        self.affine = AffineHead(global_channels, config) if config.affine else None
        if self.affine is not None and not config.affine_trained:
            self.affine.requires_grad_(False)
        hidden = config.hidden_channels
        self.blocks = nn.Sequential(ConvNormAct(2 * local_channels, hidden), ConvNormAct(hidden, hidden))
        self.flow = nn.Conv3d(hidden, 3, 3, padding=1)
        nn.init.normal_(self.flow.weight, std=1e-3)
        nn.init.zeros_(self.flow.get_parameter("bias"))

    def forward(self, global_m: Tensor, global_f: Tensor, local_m: Tensor, local_f: Tensor) -> Matching:
        """Match a moving volume to a fixed one.

        Args:
            global_m, global_f: f^g of both (B, C^g, D/16, H/16, W/16).
            local_m, local_f: f^l of both (B, C^l, D, H, W).
        """
        size = local_f.shape[2:]
        if self.affine is None:
            matrix = identity_matrix(len(local_f), local_f)
        else:
            matrix = self.affine(global_m, global_f)
            if not self.config.affine_trained:
                matrix = matrix.detach()  # nor does any gradient reach f^g through it
            local_m = warp(local_m, affine_coords(matrix, size))
        x = self.blocks(join(local_m.to(local_f.dtype), local_f))  # (B, hidden, D, H, W)
        displacement = full_precision(self.flow(x))  # (B, 3, D, H, W), voxels
        if self.affine is None:
            coords = identity_coords(size, displacement) + displacement
        else:
            coords = compose(matrix, displacement, self.config.fusion)
        return Matching(coords, matrix, displacement)


class GVSL(Method):
    """Match two patients' volumes by an affine and a deformable map, and restore a damaged one."""

    name = "gvsl"
    title = "GVSL"
    paper = (
        "He et al., Geometric Visual Similarity Learning in 3D Medical Image Self-supervised Pre-training, "
        "CVPR 2023"
    )
    trains = "encoder+decoder"
    volumes_per_item = 2
    variants = {  # noqa: RUF012 - a literal that listings read without importing torch
        "gvsl_without_zmatching": {"matching": False},
        "gvsl_without_fundament": {"restoration": False},
        "gvsl_without_affine": {"affine": False},
        "gvsl_released_head": {"affine_head": "conv", "damage": "a"},
        "gvsl_affine_untrained": {"affine_head": "conv", "damage": "a", "affine_trained": False},
    }
    Config = GVSLConfig
    config: GVSLConfig

    def __init__(self, backbone: Any, config: GVSLConfig) -> None:
        super().__init__(backbone, config)
        # The scale of the head's differences is that of all pairs of a step.
        self.splits = not (config.matching and config.affine and config.affine_head == "difference")
        if config.matching:
            self.matching = ZMatching(backbone.global_channels, backbone.local_channels, config)
        if config.restoration:
            hidden = config.hidden_channels
            # Released: 4 channels a group here.
            block = ConvNormAct(backbone.local_channels, hidden, groups=max(1, hidden // 4))
            self.restoration = nn.Sequential(block, nn.Conv3d(hidden, 1, 1))
        self.appearance = (
            LocalShuffle(config.shuffle_p, config.shuffle_boxes, config.shuffle_fraction),
            BezierIntensity(config.bezier_p),
            InPainting(1.0, config.inpaint_boxes, config.inpaint_next_p),
        )
        self.spatial = RandomSpatial(
            rotation=config.spatial_rotation,
            scale=config.spatial_scale,
            translation=config.spatial_translation,
            shear=config.spatial_shear,
            alpha=config.elastic_alpha,
            sigma=config.elastic_sigma,
            reference_edge=config.elastic_reference_edge,
        )

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        """Return x_A and x_B (``a``, ``b``) and what the network sees of them (``a_seen``, ``b_seen``), all (B, 1, D, H, W).

        t(x_A) and, with ``damage="both"``, t'(x_B); else it sees ``b`` itself, and there is no ``b_seen``. All are deformed
        by one random map.

        Args:
            x: pairs (B, 2, 1, D, H, W).
            rng: the step's randomness.
        """
        a, b = x.unbind(1)  # (B, 1, D, H, W) each
        volumes = {"a": a, "b": b, "a_seen": self.damaged(a, rng)}
        if self.config.damage == "both":
            volumes["b_seen"] = self.damaged(b, rng.fork("b"))
        if self.config.spatial:
            moved = self.spatial(torch.cat(list(volumes.values()), dim=1), rng)  # all in one resampling
            volumes = dict(zip(volumes, moved.split(1, dim=1), strict=True))
        return volumes

    def damaged(self, x: Tensor, rng: BatchRng) -> Tensor:
        """Return ``x`` (B, 1, D, H, W) in another appearance."""
        for damage in self.appearance:
            x = damage(x, rng)
        return x

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        cfg = self.config
        a, b = views["a"], views["b"]  # (B, 1, D, H, W) each
        both = torch.cat([views["a_seen"], views.get("b_seen", b)])  # (2B, 1, D, H, W)
        restored_from = len(both) if cfg.damage == "both" else len(a)  # those that are damaged come first
        # Without matching, only what is restored is seen.
        features = self.backbone.encode(both if cfg.matching else both[:restored_from])
        local = self.backbone.decode(features)  # f^l (2B or B, C^l, D, H, W): the shared network runs once
        losses = {}
        if cfg.matching:
            (global_a, global_b), (local_a, local_b) = features[-1].chunk(2), local.chunk(2)
            if cfg.moving == "a":
                matching = self.matching(global_a, global_b, local_a, local_b)
                moving, fixed = a, b
            else:
                matching = self.matching(global_b, global_a, local_b, local_a)
                moving, fixed = b, a
            warped = warp(moving, matching.coords)  # (B, 1, D, H, W)
            losses["ncc"] = cfg.ncc_weight * ncc_loss(warped, fixed, cfg.ncc_window)
            losses["smooth"] = cfg.smooth_weight * smoothness_loss(matching.displacement)
        if cfg.restoration:
            restored = self.restoration(local[:restored_from])  # (2B or B, 1, D, H, W)
            truth = torch.cat([a, b])[:restored_from]
            losses["mse"] = cfg.mse_weight * F.mse_loss(full_precision(restored), truth)
        return losses

    def chance(self, views: dict[str, Tensor]) -> float:
        """Return the losses of the identity for every pair (no smoothness to pay), and of the mean image."""
        cfg, level = self.config, 0.0
        if cfg.matching:
            level += cfg.ncc_weight * float(ncc_loss(views["a"], views["b"], cfg.ncc_window))
        if cfg.restoration:
            targets = torch.cat([views["a"], views["b"]]) if cfg.damage == "both" else views["a"]
            level += cfg.mse_weight * mean_image_error(targets)
        return level

    def monitor(self, probe: Tensor, rng: BatchRng) -> dict[str, float]:
        """Return NCC between patients before and after matching, and the share of folded voxels.

        Also the spread of psi^g over pairs, the standard deviation of its entries: 0 for a head that answers alike.
        """
        if not self.config.matching:
            return {}
        before, after, folded, matrices = [], [], [], []
        # Pair by pair: the memory of a training step must suffice.
        for moving, fixed in zip(probe[:-1:2].split(1), probe[1::2].split(1), strict=True):
            matching = self.match(moving, fixed)
            coords = matching.coords
            matrices.append(matching.matrix)
            before.append(1 - ncc_loss(moving, fixed, self.config.ncc_window))
            after.append(1 - ncc_loss(warp(moving, coords), fixed, self.config.ncc_window))
            folded.append((jacobian_determinant(coords) <= 0).float().mean())
        measures = {"ncc_before": before, "ncc_after": after, "folded_share": folded}
        found = {name: float(torch.stack(values).mean()) for name, values in measures.items()}
        if self.config.affine and len(matrices) > 1:
            found["affine_spread"] = float(torch.cat(matrices).std(0).mean())
        return found

    def match(self, moving: Tensor, fixed: Tensor) -> Matching:
        """Return the map that aligns ``moving`` to ``fixed``, both (B, 1, D, H, W) and undamaged.

        Raises:
            ConfigError: the method was built with ``matching=false``.
        """
        if not self.config.matching:
            raise ConfigError(
                "This GVSL has no Z-Matching head (matching=false): pretrain with matching=true."
            )
        features = self.backbone.encode(torch.cat([moving, fixed]))
        global_m, global_f = features[-1].chunk(2)
        local_m, local_f = self.backbone.decode(features).chunk(2)
        matching: Matching = self.matching(global_m, global_f, local_m, local_f)
        return matching
