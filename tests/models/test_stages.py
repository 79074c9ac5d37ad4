"""All stages of an encoder as one feature: where their voxels lie, and what is read of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cohorts import sphere_cohort
from scipy.ndimage import map_coordinates

from ssl3d.config import BackboneConfig, DownstreamConfig
from ssl3d.data.splits import Split
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.tasks import Task
from ssl3d.models.factory import build_backbone
from ssl3d.models.stages import AllStages, resample, stage_channels

CPU = torch.device("cpu")
BACKBONES = [
    BackboneConfig(name="unet3d", channels=[4, 8, 16]),  # type: ignore[call-arg]
    BackboneConfig(name="genesis_unet3d", width=2),  # type: ignore[call-arg]
]


def test_interpolation_agrees_with_torch_where_the_stage_shares_the_volume_evenly() -> None:
    stage = torch.randn(2, 3, 4, 5, 1, dtype=torch.float64)
    place = np.diag([2.0, 3.0, 4.0, 1.0])
    place[:3, 3] = [0.5, 1.0, 1.5]
    expected = F.interpolate(stage, (8, 15, 4), mode="trilinear", align_corners=False)
    torch.testing.assert_close(resample(stage, place, (8, 15, 4)), expected, rtol=1e-12, atol=1e-12)


def test_interpolation_agrees_with_scipy_where_it_does_not() -> None:
    stage = torch.randn(1, 1, 3, 4, 5, dtype=torch.float64)
    place = np.diag([4.0, 2.5, 3.0, 1.0])
    place[:3, 3] = [-0.5, 0.75, 2.0]
    grid = np.meshgrid(*(np.arange(n) for n in (11, 9, 13)), indexing="ij")
    index = [(g - place[a, 3]) / place[a, a] for a, g in enumerate(grid)]
    expected = map_coordinates(stage[0, 0].numpy(), index, order=1, mode="nearest")
    found = resample(stage, place, (11, 9, 13))[0, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(32, 40, 48), (33, 34, 39)])
@pytest.mark.parametrize("config", BACKBONES, ids=lambda c: c.name)
def test_every_stage_lies_where_the_volume_says(
    config: BackboneConfig, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that pass the first channel on: each stage then holds pooled coordinates, of which it returns the volume's."""

    class Pass(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1]

    backbone = build_backbone(config, 0)
    backbone.encoder = torch.nn.ModuleList(Pass() for _ in backbone.encoder)
    # The mean of a pooled cell is its place; the maximum would be half a cell further on.
    monkeypatch.setattr(F, "max_pool3d", F.avg_pool3d)
    for axis in range(3):
        ramp = torch.arange(size[axis], dtype=torch.float32).view(-1, *[1] * (2 - axis)).expand(size)
        columns = AllStages(backbone)(ramp[None, None])[1][0]  # (stages, D, H, W)
        middle = tuple(slice(n // 2 - 1, n // 2 + 1) for n in size)  # far from the padding's zeros
        for stage in columns:
            torch.testing.assert_close(stage[middle], ramp[middle])
        torch.testing.assert_close(columns[0], ramp)


@pytest.mark.parametrize("config", BACKBONES, ids=lambda c: c.name)
def test_features_are_all_stages(config: BackboneConfig) -> None:
    backbone = build_backbone(config, 0).eval()
    channels = stage_channels(backbone)
    assert channels[-1] == backbone.global_channels and backbone.training is False
    x = torch.randn(1, 1, 32, 32, 32)
    stages = backbone.encode(x)
    f_global, f_local = AllStages(backbone)(x)
    assert f_local.shape == (1, sum(channels), 32, 32, 32) and f_global.shape[2:] == stages[-1].shape[2:]
    torch.testing.assert_close(f_local[:, : channels[0]], stages[0])
    expected = torch.cat([stage.mean((2, 3, 4)) for stage in stages], dim=1)
    torch.testing.assert_close(f_global.mean((2, 3, 4)), expected)


def test_the_decoder_has_no_part_in_it() -> None:
    task = Task("seg", "Seg", "segmentation", "memory", "dsc", None)
    cohort, ids = sphere_cohort(9, edge=12), [f"case{i}" for i in range(9)]
    split = Split("random", tuple(ids[:5]), tuple(ids[5:6]), tuple(ids[6:]))
    config = DownstreamConfig.model_validate({"crop": 12, "multiscale": {"voxels": 50}})

    def scores(seed_of_decoder: int) -> list[float]:
        backbone = build_backbone(BACKBONES[0], 0)
        other = build_backbone(BACKBONES[0], seed_of_decoder)
        backbone.decoder.load_state_dict(other.decoder.state_dict())
        modes = ("multiscale", "linear")
        return [evaluate(backbone, Evaluation(task, cohort, split, m, config, 0, CPU)).score for m in modes]  # type: ignore[arg-type]

    (all_stages, decoded), (same, other) = scores(0), scores(1)
    assert all_stages == same and decoded != other
