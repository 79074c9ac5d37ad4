"""Steps of the shared network, and of GVSL on it; the memory of the latter."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from compare import Case, Run, Setting, Value, peer
from ssl3d_methods.gvsl import GVSL, GVSLConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rows.losses import dense_ncc
from ssl3d.device import PeakMemory, to_device
from ssl3d.geometry import affine_coords, identity_coords, warp
from ssl3d.losses import smoothness_loss
from ssl3d.models.conv import Conv3d
from ssl3d.models.factory import seeded
from ssl3d.models.regions import recompute_blocks
from ssl3d.models.unet import UNet3D
from ssl3d.optim import make_optimizer
from ssl3d.rng import BatchRng

CPU = torch.device("cpu")
QUICK, PAPER, TINY = (16, 32, 64, 128), (32, 64, 128, 256, 512), (8, 16, 32)
"""Widths of the presets quick and paper, and of a check."""


class Budget:
    """Adam at 1e-4, as the paper's."""

    steps, optimizer, lr, weight_decay, schedule, warmup_steps = 1000, "adam", 1e-4, 0.0, "constant", 0


def unet_of(channels: tuple[int, ...]) -> UNet3D:
    with seeded(0, "benchmark"):
        return UNet3D(UNet3D.Config(channels=channels))


def plain(module: nn.Module) -> nn.Module:
    """Return a copy as anyone would write it: torch's own convolutions, in torch's own memory format."""
    found = copy.deepcopy(module).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for part in found.modules():
        if isinstance(part, Conv3d):
            part.__class__ = nn.Conv3d
    return found


def operations(run: Run) -> float:
    """Return the floating-point operations of a run, convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


# --- U-Net ------------------------------------------------------------------------------------------


def pass_of(network: Callable[[Tensor], Tensor], x: Tensor, weights: nn.Module) -> Run:
    """Return a run of forward and backward to the mean square of the output."""

    def run() -> None:
        weights.zero_grad(set_to_none=True)
        network(x).square().mean().backward()

    return run


def monai_nets(channels: tuple[int, ...], x: Tensor) -> dict[str, Callable[[], Run]]:
    """Return MONAI's networks of equal widths; BasicUNet has five stages."""

    def dynunet() -> Run:
        from monai.networks.nets import DynUNet

        stages = len(channels)
        net = DynUNet(
            3, 1, channels[0], kernel_size=[3] * stages, strides=[1] + [2] * (stages - 1),
            upsample_kernel_size=[2] * (stages - 1), filters=channels,
        )  # fmt: skip
        return pass_of(net, x, net)

    def basic() -> Run:
        from monai.networks.nets import BasicUNet

        net = BasicUNet(3, 1, channels[0], features=(*channels, channels[0]))
        return pass_of(net, x, net)

    return {"MONAI DynUNet": dynunet} | ({"MONAI BasicUNet": basic} if len(channels) == 5 else {})


def unet(setting: Setting) -> Iterator[Case]:
    """Equal widths, not equal work: both peers up-sample by transposed convolutions, DynUNet halves by strides."""
    for channels, edge, batch in setting.of(((QUICK, 32, 4), (PAPER, 48, 2)), ((TINY, 8, 2),)):
        x = torch.rand(batch, 1, edge, edge, edge, generator=torch.Generator().manual_seed(0))
        net = unet_of(channels)
        to_device(net, CPU)
        run = pass_of(lambda x, net=net: net(x)[1], x, net)  # type: ignore[misc]
        yield Case(
            f"U-Net {channels[0]} to {channels[-1]}, forward and backward, {batch} x {edge}^3",
            run,
            {name: peer(make) for name, make in monai_nets(channels, x).items()},
            flops=operations(run),
            rounds=3 if edge > 32 else 1000,
        )


# --- GVSL -------------------------------------------------------------------------------------------


def released_step(method: GVSL, views: dict[str, Tensor]) -> dict[str, Tensor]:
    """One forward pass as GVSL's released code computes it, its defects repaired (batches, devices, gradients).

    One pass of the network a volume, two resamplings one after the other, NCC by five dense convolutions.
    """
    size = views["a"].shape[2:]
    global_a, local_a = method.backbone(views["a_seen"])
    global_b, local_b = method.backbone(views.get("b_seen", views["b"]))
    matrix = method.matching.affine(global_a, global_b)
    aligned = warp(local_a, affine_coords(matrix, size))
    flow = method.matching.flow(method.matching.blocks(torch.cat([aligned, local_b], dim=1)))
    warped = warp(warp(views["a"], affine_coords(matrix, size)), identity_coords(size, flow) + flow)
    return {
        "ncc": dense_ncc(warped, views["b"]),
        "smooth": smoothness_loss(flow),
        "mse": F.mse_loss(method.restoration(local_a), views["a"]),
    }


def step_of(
    method: nn.Module, forward: Callable[[dict[str, Tensor]], dict[str, Tensor]], views: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Run:  # fmt: skip
    """Return a run of one step (Adam), which gives its first loss."""
    optimizer, _ = make_optimizer(method, Budget)  # type: ignore[arg-type]
    device = next(iter(views.values())).device

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            losses = forward(views)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        optimizer.step()
        return next(iter(losses.values())).detach()

    return step


def smooth_pairs(batch: int, edge: int, device: torch.device = CPU) -> Tensor:
    """Return smooth random pairs (B, 2, 1, edge, edge, edge) in [0, 1]."""
    coarse = torch.rand(2 * batch, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (edge,) * 3, mode="trilinear").unflatten(0, (batch, 2)).to(device)


def gvsl_pair(
    channels: tuple[int, ...], edge: int, batch: int, device: torch.device = CPU
) -> tuple[GVSL, GVSL, dict[str, Tensor]]:
    """Return ours and a plain copy, both with the released head and damage so that they do the same work; and views."""
    with seeded(0, "benchmark"):
        released = GVSLConfig.model_validate(GVSL.variants["gvsl_released_head"])
        ours = GVSL(UNet3D(UNet3D.Config(channels=channels)), released)
    copied: GVSL = plain(ours).to(device)  # type: ignore[assignment]
    to_device(ours, device)
    return ours, copied, ours.views(smooth_pairs(batch, edge, device), BatchRng(0, 0, range(batch), device))


def gvsl(setting: Setting) -> Iterator[Case]:
    """Two thirds of the step are the network, which both have: 2.2 is about the most that there can be in float32."""
    for channels, edge, batch in setting.of(((QUICK, 32, 2), (PAPER, 48, 1)), ((TINY, 16, 1),)):
        ours, copied, views = gvsl_pair(channels, edge, batch)
        run = step_of(ours, ours.training_step, views)
        yield Case(
            f"GVSL step, U-Net {channels[0]} to {channels[-1]}, {batch} x 2 x {edge}^3",
            run,
            {"released form": step_of(copied, lambda v, method=copied: released_step(method, v), views)},  # type: ignore[misc]
            flops=operations(
                lambda method=ours, views=views: sum(method.training_step(views).values()).backward()
            ),  # type: ignore[misc]
            rounds=3 if edge > 32 else 1000,
            same=("released form",),
            close=2e-3,  # theirs resamples twice
        )


# --- Memory -----------------------------------------------------------------------------------------


def peak_of_step(form: str, channels: tuple[int, ...], edge: int, batch: int) -> float:
    """Return by how many MiB the process grows in GVSL steps, over what it holds before the first."""
    ours, copied, views = gvsl_pair(channels, edge, batch)
    if form == "recomputed":
        recompute_blocks(ours.backbone)
    step = (
        step_of(copied, lambda v: released_step(copied, v), views)
        if form == "released"
        else step_of(ours, ours.training_step, views)
    )
    peak = PeakMemory(CPU)  # gives back what was freed before
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    step()
    step()  # with the optimizer's state
    return (peak.mib() or math.nan) - held


def alone(form: str, channels: tuple[int, ...], edge: int, batch: int) -> float:
    """Return :func:`peak_of_step` in a copy of this process, so that no measurement leaves its memory here."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: sender.send(peak_of_step(form, channels, edge, batch))
    )
    child.start()
    sender.close()
    found = float(receiver.recv())
    child.join()
    return found


def memory(setting: Setting) -> Iterator[Case]:
    """The peak of a step over what the process held before; the exponent is that of the edge between two rows."""
    before: tuple[int, float] | None = None
    channels = setting.of(PAPER, TINY)
    for edge in setting.of((32, 48, 64), (8, 16)):
        found = {form: alone(form, channels, edge, 2) for form in ("ours", "recomputed", "released")}
        grown = (
            ""
            if before is None
            else f", edge^{math.log(found['ours'] / before[1]) / math.log(edge / before[0]):.1f}"
        )
        before = edge, found["ours"]
        runs = {name: (lambda value=value: Value(value)) for name, value in found.items()}
        yield Case(
            f"memory of a GVSL step, 2 x 2 x {edge}^3{grown}",
            runs["ours"],
            {"released form": runs["released"], "ours, pretrain.checkpoint_activations": runs["recomputed"]},
            unit="MiB",
            rounds=1,
        )
