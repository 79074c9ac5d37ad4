"""Checkpoints of released code: names, features, refusals, and the way into the bench."""

from __future__ import annotations

import itertools
import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor, nn

import ssl3d
from ssl3d.cli import main
from ssl3d.errors import ConfigError
from ssl3d.models.weights.imports import import_checkpoint

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
    assert import_checkpoint(path, None, tmp_path / "run")["backbone"]["channels"] == list(WIDTHS)


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
        ({"weight": torch.zeros(2)}, "no released network"),
        ({**state, "out_conv.weight": torch.zeros(2)}, "fine-tuned on a task"),
        ({k: v for k, v in state.items() if "up2" not in k}, "another architecture"),
    ):
        torch.save(change, path)
        result = run("import", path, "--out", tmp_path / "run")
        assert result.exit_code == 2 and words in result.output, result.output
        assert not (tmp_path / "run").exists()
    assert "no such file" in run("import", tmp_path / "x.pth", "--out", tmp_path / "run").output
    assert 'Did you mean "gvsl"' in run("import", path, "--from", "gvls", "--out", tmp_path / "run").output


# --- Models Genesis --------------------------------------------------------------------------------


def genesis_state(width: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the released file, ``width`` 32 being the released one."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def layer(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(*shape, generator=generator) / 4
        state[f"{name}.bias"] = torch.randn(shape[1 if "up_conv" in name else 0], generator=generator)

    def pair(name: str, *widths: int) -> None:
        for i in range(2):
            layer(f"{name}.ops.{i}.conv1", widths[i + 1], widths[i], 3, 3, 3)
            layer(f"{name}.ops.{i}.bn1", widths[i + 1])
            state[f"{name}.ops.{i}.bn1.running_mean"] = torch.randn(widths[i + 1], generator=generator)
            state[f"{name}.ops.{i}.bn1.running_var"] = torch.rand(widths[i + 1], generator=generator)
            state[f"{name}.ops.{i}.bn1.num_batches_tracked"] = torch.tensor(7)

    c = width
    for name, c_in in (("64", 1), ("128", 2 * c), ("256", 4 * c), ("512", 8 * c)):
        pair(f"down_tr{name}", c_in, *((c, 2 * c) if c_in == 1 else (c_in, 2 * c_in)))
    for name, coarse in (("256", 16 * c), ("128", 8 * c), ("64", 4 * c)):
        layer(f"up_tr{name}.up_conv", coarse, coarse, 2, 2, 2)
        pair(f"up_tr{name}", coarse + coarse // 2, coarse // 2, coarse // 2)
    layer("out_tr.final_conv", 1, 2 * c, 1, 1, 1)
    return {f"module.{name}": tensor for name, tensor in state.items()}


def genesis_features(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The released network, slow and obvious: every operation written out, from the state dict alone."""

    def conv(name: str, x: Tensor) -> Tensor:
        """A 3x3x3 convolution as a sum over the 27 places of its kernel."""
        weight, bias = state[f"module.{name}.weight"], state[f"module.{name}.bias"]
        d, h, w = x.shape[2:]
        padded = torch.zeros(*x.shape[:2], d + 2, h + 2, w + 2, dtype=x.dtype)
        padded[:, :, 1:-1, 1:-1, 1:-1] = x
        y = bias.view(1, -1, 1, 1, 1).expand(len(x), -1, d, h, w)
        for i, j, k in itertools.product(range(3), repeat=3):
            y = y + torch.einsum(
                "oc,bcdhw->bodhw", weight[:, :, i, j, k], padded[:, :, i : i + d, j : j + h, k : k + w]
            )
        return y  # fmt: skip

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = (state[f"module.{name}.{kind}"].view(1, -1, 1, 1, 1) for kind in ("weight", "bias"))
        mean = x.mean(dim=(0, 2, 3, 4), keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=(0, 2, 3, 4), keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def pair(name: str, x: Tensor) -> Tensor:
        for i in range(2):
            x = norm(f"{name}.ops.{i}.bn1", conv(f"{name}.ops.{i}.conv1", x)).clamp_min(0)
        return x

    def halved(x: Tensor) -> Tensor:
        corners = [x[:, :, i::2, j::2, k::2] for i, j, k in itertools.product(range(2), repeat=3)]
        return torch.stack(corners).amax(dim=0)

    def doubled(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"module.{name}.up_conv.weight"], state[f"module.{name}.up_conv.bias"]
        y = torch.zeros(len(x), weight.shape[1], *(2 * n for n in x.shape[2:]), dtype=x.dtype)
        for i, j, k in itertools.product(range(2), repeat=3):
            y[:, :, i::2, j::2, k::2] = torch.einsum("co,bcdhw->bodhw", weight[:, :, i, j, k], x)
        return y + bias.view(1, -1, 1, 1, 1)

    skips = []
    for name in ("64", "128", "256"):
        skips.append(pair(f"down_tr{name}", x))
        x = halved(skips[-1])
    deepest = y = pair("down_tr512", x)
    for name, skip in zip(("256", "128", "64"), reversed(skips), strict=True):
        y = pair(f"up_tr{name}", torch.cat([doubled(f"up_tr{name}", y), skip], dim=1))
    return deepest, y


def genesis_file(path: Path, legacy: bool = False, **changes: Tensor) -> dict[str, Tensor]:
    state = {**genesis_state(), **changes}
    optimizer = {
        "state": {0: {"momentum_buffer": torch.zeros(3)}},
        "param_groups": [{"lr": 1.0, "params": [0]}],
    }
    content = {"epoch": 12, "state_dict": OrderedDict(state), "optimizer_state_dict": optimizer}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return state


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-torch-1.6"])
def test_an_imported_models_genesis_has_the_features_of_the_released_network(
    tmp_path: Path, legacy: bool
) -> None:
    state = genesis_file(tmp_path / "Genesis_Chest_CT.pt", legacy)
    result = run("import", tmp_path / "Genesis_Chest_CT.pt", "--out", tmp_path / "run")
    assert result.exit_code == 0 and "genesis_unet3d" in result.output, result.output
    backbone = ssl3d.create_model(tmp_path / "run").double().eval()
    assert (backbone.global_channels, backbone.local_channels) == (64, 8)
    x = torch.rand(2, 1, 16, 24, 16, dtype=torch.float64)
    double = {name: tensor.double() for name, tensor in state.items()}
    with torch.no_grad():
        for mode in (True, False):  # the released norm takes the batch's statistics in both
            for ours, theirs in zip(backbone.train(mode)(x), genesis_features(double, x), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_released_width_has_the_released_channels() -> None:
    backbone = ssl3d.create_model("genesis_unet3d")
    assert (backbone.global_channels, backbone.local_channels) == (512, 64)
    assert backbone(torch.rand(1, 1, 17, 16, 19))[1].shape == (1, 64, 17, 16, 19)
    with pytest.raises(ConfigError, match="edges of at least 16"):
        backbone(torch.rand(1, 1, 8, 16, 16))


def test_an_imported_models_genesis_is_benched_in_both_modes(tmp_path: Path) -> None:
    genesis_file(tmp_path / "g.pt")
    imported = run("import", tmp_path / "g.pt", "--from", "models_genesis", "--out", tmp_path / "run")
    backbone = imported.output.split("--set '")[1].split("'")[0]  # as the command says
    result = run(
        "bench", "--preset", "smoke", "--methods", "scratch,models_genesis", "--tasks", "ccc,sac", "--checkpoint",
        f"models_genesis={tmp_path / 'run'}", "--store", tmp_path / "store", "--cache", tmp_path / "cache",
        "--set", backbone, "--set", "downstream.finetune.steps=2", "--set", "downstream.linear.voxels=50",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    records = [json.loads(p.read_text()) for p in (tmp_path / "store" / "records").glob("*.json")]
    cells = {(r["identity"]["method"], r["identity"]["task"], r["identity"]["mode"]) for r in records}
    assert len(cells) == 8 and all(r["identity"]["backbone"]["name"] == "genesis_unet3d" for r in records)
    table = run("table", "--store", tmp_path / "store", "--with", "cost")
    assert table.exit_code == 0 and "Models Genesis" in table.output
    wrong = run("bench", "--preset", "smoke", "--methods", "models_genesis", "--tasks", "ccc", "--checkpoint",
                f"models_genesis={tmp_path / 'run'}", "--store", tmp_path / "store")  # fmt: skip
    assert wrong.exit_code == 2 and "--set 'backbone=" in wrong.output


def test_other_networks_than_the_released_models_genesis_are_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "g.pt", tmp_path / "run"
    for change, words in (
        ({"module.down_tr64.ops.0.activation.weight": torch.ones(4)}, "activation.weight: unknown"),
        ({"module.up_tr64.ops.0.conv1.weight": torch.zeros(8, 8, 3, 3, 3)}, "another architecture"),
        ({"module.down_tr64.ops.0.conv1.weight": torch.tensor(1.0)}, "holds no released network"),
    ):
        genesis_file(path, **change)
        result = run("import", path, "--out", out)
        assert result.exit_code == 2 and words in result.output, result.output
    genesis_file(path)
    result = run("import", path, "--from", "gvsl", "--out", out)
    assert result.exit_code == 2 and "(gvsl)" in result.output
    assert not out.exists()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize("place", ["state dict", "beside it"])
@pytest.mark.parametrize("source", ["gvsl", "models_genesis"])
def test_a_malicious_file_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, source: str, place: str, legacy: bool
) -> None:
    harm, path = Malicious(tmp_path / "harm"), tmp_path / "evil.pth"
    state = (
        genesis_state() if source == "models_genesis" else {"unet.inc.double_conv.0.weight": torch.ones(1)}
    )
    content = (
        {"state_dict": {**state, "x": harm}} if place == "state dict" else {"state_dict": state, "x": harm}
    )
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    result = run("import", path, "--from", source, "--out", tmp_path / "run")
    assert result.exit_code == 2 and "Nothing of it was run" in result.output
    assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "harm").exists(), "the file would have done harm"
