"""Fine-tuning, inference over whole volumes, and linear evaluation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from compare import Case, Run, Setting, peer
from torch import Tensor, nn

from rows.networks import CPU, QUICK, TINY, Budget, operations, plain, unet_of
from ssl3d.config import DownstreamConfig
from ssl3d.data.prepared.arrays import Where
from ssl3d.data.prepared.volumes import ArrayVolumes
from ssl3d.data.splits import Split
from ssl3d.device import to_device
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.problems.kinds import make_problem
from ssl3d.downstream.tasks import Task
from ssl3d.losses import segmentation_loss
from ssl3d.models.factory import seeded
from ssl3d.optim import make_optimizer

TASK = Task("speed", "Speed", "segmentation", "made-up", "dsc", None)
STRUCTURES = 7
DEMO = (8, 16, 32, 64)


@dataclass
class Labelled(ArrayVolumes):
    """Noise with blocks of labels: volumes in memory, as prepared ones."""

    images: list[np.ndarray]
    labels: list[np.ndarray] = field(default_factory=list)
    label_names: tuple[str, ...] = tuple(f"structure {k}" for k in range(STRUCTURES))
    num_classes: int = STRUCTURES + 1

    def label(self, i: int, where: Where = ...) -> np.ndarray:
        return self.labels[i][where]


def labelled(number: int, edge: int) -> Labelled:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, STRUCTURES + 1, (number, 4, 4, 4)).astype(np.uint8)
    labels = [
        c.repeat(-(-edge // 4), 0).repeat(-(-edge // 4), 1).repeat(-(-edge // 4), 2)[:edge, :edge, :edge]
        for c in coarse
    ]
    images = [(0.1 * label + 0.05 * rng.random(label.shape)).astype(np.float32) for label in labels]
    return Labelled(images, labels)


class Segmenter(nn.Module):
    """Backbone and head as one network (B, 1, D, H, W) -> logits (B, K + 1, D, H, W)."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x)[1])
        return logits


def problem_of(
    channels: tuple[int, ...], edge: int, crop: int, mode: str, cases: int = 1
) -> tuple[Any, nn.Module]:
    """Return our problem on made-up volumes, and its head."""
    backbone = unet_of(channels)
    to_device(backbone, CPU)
    config = DownstreamConfig.model_validate({"crop": crop, "finetune": {"loss": "dice_ce"}})
    problem = make_problem(backbone, TASK, labelled(cases, edge), mode, config, CPU)  # type: ignore[arg-type]
    with seeded(0, "head"):
        head = problem.make_head([0])
    to_device(head, CPU)
    return problem, head


# --- Fine-tuning ------------------------------------------------------------------------------------


def finetune(setting: Setting) -> Iterator[Case]:
    """The same network, as nnU-Net's trainer takes it: torch's convolutions, its loss and optimizer."""
    channels, edge = setting.of((QUICK, 40), (TINY, 12))
    problem, head = problem_of(channels, edge, edge, "finetune")
    model = nn.ModuleDict({"head": head, "backbone": problem.backbone})
    copied: Any = plain(model)
    optimizer, _ = make_optimizer(model, Budget)  # type: ignore[arg-type]

    def ours() -> None:
        optimizer.zero_grad(set_to_none=True)
        problem.loss(head, [0], 0, 0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()

    def nnunet() -> Run:
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        network = Segmenter(copied["backbone"], copied["head"])
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        sgd = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
        x = torch.from_numpy(problem.cohort.images[0])[None, None]
        y = torch.from_numpy(problem.cohort.labels[0])[None, None]

        def step() -> None:
            sgd.zero_grad(set_to_none=True)
            loss(network(x), y).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            sgd.step()

        return step

    yield Case(
        f"fine-tuning step, U-Net {channels[0]} to {channels[-1]}, 1 x {edge}^3",
        ours, {"nnU-Net's training step, equal network": peer(nnunet)}, flops=operations(ours),
    )  # fmt: skip


# --- Inference --------------------------------------------------------------------------------------


def nnunet_predictor(network: nn.Module, crop: int, x: Tensor) -> Run:
    """Return nnU-Net's predictor on a network that is no nnU-Net's: half-overlapping Gaussian windows, no mirroring."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(0.5, use_mirroring=False, device=CPU, allow_tqdm=False)
    predictor.network = network
    predictor.configuration_manager = SimpleNamespace(patch_size=(crop,) * 3)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=STRUCTURES + 1)
    return lambda: middle(predictor.predict_sliding_window_return_logits(x))


def middle(logits: Tensor) -> Tensor:
    """Return the mean logit of each class in the middle of (K, D, H, W), to compare: nnU-Net adds up in half precision."""
    inside = logits[(slice(None), *(slice(n // 4, n - n // 4) for n in logits.shape[1:]))]
    return inside.float().mean((1, 2, 3))  # (K,)


def inference(setting: Setting) -> Iterator[Case]:
    """The same windows, Gaussian weights; of these MONAI bounds the smallest, and nnU-Net adds up in half precision.

    Edges are whole numbers of half windows: else MONAI moves the last one back and nnU-Net all of them.
    """
    for channels, edge, crop in setting.of(((QUICK, 80, 40), (DEMO, 48, 32)), ((TINY, 18, 12),)):
        problem, head = problem_of(channels, edge, crop, "finetune")
        head.eval()
        problem.backbone.eval()
        network = Segmenter(plain(problem.backbone), plain(head))
        x = torch.from_numpy(problem.cohort.images[0])[None]

        def ours(problem: Any = problem, head: nn.Module = head) -> Tensor:
            return middle(problem.predict(head, 0))

        yield Case(
            f"inference, U-Net {channels[0]} to {channels[-1]}, {edge}^3 by windows of {crop}^3",
            ours,
            {"nnU-Net's predictor, equal network": peer(lambda: nnunet_predictor(network, crop, x))},  # noqa: B023
            flops=operations(ours),
            same=("nnU-Net's predictor, equal network",),
            close=0.05,
        )


# --- Linear evaluation --------------------------------------------------------------------------------


def linear(setting: Setting) -> Iterator[Case]:
    """Ours solves for the map; the released code trains it for as many steps as it fine-tunes, the backbone in each."""
    channels, edge, steps, voxels = setting.of((DEMO, 32, 60, 1000), (TINY, 12, 2, 50))
    cohort = labelled(8, edge)
    config = DownstreamConfig.model_validate({"crop": edge, "linear": {"voxels": voxels}})
    split = Split(
        "test", tuple(cohort.cases[i].id for i in range(4)), (cohort.cases[4].id,), (cohort.cases[5].id,)
    )
    evaluation = Evaluation(TASK, cohort, split, "linear", config, 0, CPU)  # type: ignore[arg-type]
    backbone = unet_of(channels)
    to_device(backbone, CPU)
    network: Any = plain(backbone)

    def trained() -> None:
        probe = nn.Conv3d(channels[0], STRUCTURES + 1, 1)
        adam = torch.optim.Adam(probe.parameters(), 1e-3)
        for step in range(steps):
            x, y = (torch.from_numpy(a[step % 4])[None, None] for a in (cohort.images, cohort.labels))
            with torch.no_grad():
                features = network(x)[1]
            adam.zero_grad(set_to_none=True)
            segmentation_loss("dice", probe(features), y.long()).backward()
            adam.step()
        with torch.no_grad():
            for case in (4, 5):
                probe(network(torch.from_numpy(cohort.images[case])[None, None])[1]).argmax(1)

    def passes() -> None:
        with torch.no_grad():
            for case in range(6):
                backbone(torch.from_numpy(cohort.images[case])[None, None])

    yield Case(
        f"linear evaluation, U-Net {channels[0]} to {channels[-1]}, 6 cases of {edge}^3",
        lambda: evaluate(backbone, evaluation, "speed"),
        {f"backbone in each of {steps} steps": trained},
        bound=("one pass of each case", passes),
        rounds=3,
    )
