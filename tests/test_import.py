"""Checkpoints of the released GVSL code: names, features, refusals, and the way into the bench."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor, nn

import ssl3d
from ssl3d.cli import main
from ssl3d.models.imports import import_checkpoint

WIDTHS = (8, 16, 32)


def convolutions(c_in: int, c_out: int) -> nn.Module:
    holder = nn.Module()
    holder.double_conv = nn.Sequential(*(
        layer for c in (c_in, c_out)
        for layer in (nn.Conv3d(c, c_out, 3, padding=1), nn.GroupNorm(c_out // 8, c_out), nn.LeakyReLU(0.2))
    ))  # fmt: skip
    return holder


class Released(nn.Module):
    """A network with the names of the released one, written from its published state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Module()
        self.unet.inc = convolutions(1, WIDTHS[0])
        for stage in (1, 2):
            down, up = nn.Module(), nn.Module()
            down.maxpool_conv = nn.Sequential(nn.MaxPool3d(2), convolutions(WIDTHS[stage - 1], WIDTHS[stage]))
            coarse, fine = WIDTHS[-stage], WIDTHS[-stage - 1]
            up.conv = convolutions(coarse + fine, fine)
            setattr(self.unet, f"down{stage}", down)
            setattr(self.unet, f"up{stage}", up)
        self.f_conv = convolutions(2 * WIDTHS[-1], 16)
        self.fc_rot = nn.Linear(16, 3)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1 = self.unet.inc.double_conv(x)
        x2 = self.unet.down1.maxpool_conv[1].double_conv(F.max_pool3d(x1, 2))
        x3 = self.unet.down2.maxpool_conv[1].double_conv(F.max_pool3d(x2, 2))
        up = F.interpolate(x3, scale_factor=2, mode="trilinear", align_corners=True)
        y = self.unet.up1.conv.double_conv(torch.cat([x2, up], 1))
        up = F.interpolate(y, scale_factor=2, mode="trilinear", align_corners=True)
        return x3, self.unet.up2.conv.double_conv(torch.cat([x1, up], 1))


@pytest.fixture
def released(tmp_path: Path) -> tuple[Released, Path]:
    torch.manual_seed(0)
    model, path = Released(), tmp_path / "GVSL_epoch_1000.pth"
    torch.save(model.state_dict(), path)
    return model, path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def test_an_imported_backbone_has_the_features_of_the_released_network(
    released: tuple[Released, Path], tmp_path: Path
) -> None:
    model, path = released
    assert run("import", path, "--out", tmp_path / "run", "--steps", "200000").exit_code == 0
    backbone = ssl3d.create_model(str(tmp_path / "run"))
    x = torch.rand(2, 1, 12, 8, 16)
    with torch.no_grad():
        for ours, theirs in zip(backbone(x), model.features(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    assert provenance["steps"] == 200_000 and provenance["seconds"] is None


def test_a_file_of_several_processes_is_read_too(released: tuple[Released, Path], tmp_path: Path) -> None:
    model, path = released
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, path)
    assert import_checkpoint(path, "gvsl", tmp_path / "run")["backbone"]["channels"] == list(WIDTHS)


def test_an_imported_run_is_benched(released: tuple[Released, Path], tmp_path: Path) -> None:
    run("import", released[1], "--out", tmp_path / "run")
    result = run(
        "bench", "--preset", "smoke", "--methods", "gvsl", "--tasks", "ccc", "--modes", "linear", "--checkpoint",
        f"gvsl={tmp_path / 'run'}", "--store", tmp_path / "store", "--cache", tmp_path / "cache",
        "--set", "backbone.channels=8,16,32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (record,) = (json.loads(p.read_text()) for p in (tmp_path / "store" / "records").glob("*.json"))
    assert (
        record["cost"]["pretrain_steps"] is None
        and record["identity"]["pretrain"]["imported"]["source"] == "gvsl"
    )
    table = run("table", "--store", tmp_path / "store", "--with", "cost")
    assert table.exit_code == 0 and "GVSL" in table.output


def test_what_is_no_released_checkpoint_is_refused(released: tuple[Released, Path], tmp_path: Path) -> None:
    model, path = released
    state = model.state_dict()
    for change, words in (
        ({"weight": torch.zeros(2)}, "no released GVSL network"),
        ({**state, "out_conv.weight": torch.zeros(2)}, "fine-tuned on a task"),
        ({k: v for k, v in state.items() if "up2" not in k}, "another architecture"),
    ):
        torch.save(change, path)
        result = run("import", path, "--out", tmp_path / "run")
        assert result.exit_code == 2 and words in result.output, result.output
        assert not (tmp_path / "run").exists()
    assert "no such file" in run("import", tmp_path / "x.pth", "--out", tmp_path / "run").output
    assert 'Did you mean "gvsl"' in run("import", path, "--from", "gvls", "--out", tmp_path / "run").output


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_file_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    torch.save({"unet.inc.double_conv.0.weight": Malicious(tmp_path / "harm")}, tmp_path / "evil.pth")
    result = run("import", tmp_path / "evil.pth", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "Nothing of it was run" in result.output
    assert not (tmp_path / "harm").exists()
