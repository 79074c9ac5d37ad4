"""Exported weights: the target library computes the same features from the same volume."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import ssl3d
from ssl3d.cli import main
from ssl3d.config import BackboneConfig
from ssl3d.errors import CheckpointError
from ssl3d.models.checkpoint import save_tensors
from ssl3d.models.factory import build_backbone

VOLUME = torch.rand(1, 1, 12, 9, 10, generator=torch.Generator().manual_seed(0))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "140"})


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A finished run, without the pretraining."""
    config = BackboneConfig(channels=[4, 8])  # type: ignore[call-arg]
    save_tensors(tmp_path / "run" / "backbone.safetensors", build_backbone(config, seed=3).state_dict())
    facts = {"status": "finished", "backbone": config.model_dump(mode="json"), "method_name": "gvsl"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    return tmp_path / "run"


def same_features(model: torch.nn.Module, pretrained: Path) -> None:
    with torch.no_grad():
        for found, expected in zip(model(VOLUME), ssl3d.create_model(pretrained)(VOLUME), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["safetensors", "torch", "huggingface"])
def test_create_model_reads_every_exported_folder(tmp_path: Path, pretrained: Path, target: str) -> None:
    result = run("export", "--checkpoint", pretrained, "--to", target, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    same_features(ssl3d.create_model(tmp_path / "out"), pretrained)


@pytest.mark.parametrize("target", ["safetensors", "huggingface"])
def test_the_hub_mixin_loads_the_folder_offline(
    tmp_path: Path, pretrained: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssl3d.models.hub import HubBackbone

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("export", "--checkpoint", pretrained, "--to", target, "--out", tmp_path / "out")
    same_features(HubBackbone.from_pretrained(tmp_path / "out", strict=True), pretrained)


def test_the_torch_file_is_a_plain_state_dict(tmp_path: Path, pretrained: Path) -> None:
    run("export", "--checkpoint", pretrained, "--to", "torch", "--out", tmp_path / "out")
    other = build_backbone(BackboneConfig(channels=[4, 8]), seed=0)  # type: ignore[call-arg]
    other.load_state_dict(torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    same_features(other, pretrained)


@pytest.mark.parametrize("target", ["nnunet", "monai"])
def test_a_target_without_this_architecture_is_refused_with_the_reason(
    tmp_path: Path, pretrained: Path, target: str
) -> None:
    result = run("export", "--checkpoint", pretrained, "--to", target, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "other features" in result.output and "safetensors" in result.output
    assert not (tmp_path / "out").exists()


def test_unknown_targets_and_folders_in_use_are_refused(tmp_path: Path, pretrained: Path) -> None:
    result = run("export", "--checkpoint", pretrained, "--to", "safetensor", "--out", tmp_path / "out")
    assert result.exit_code == 2 and 'Did you mean "safetensors"?' in result.output
    run("export", "--checkpoint", pretrained, "--to", "torch", "--out", tmp_path / "out")
    result = run("export", "--checkpoint", pretrained, "--to", "safetensors", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "already" in result.output


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(
    tmp_path: Path, pretrained: Path, writer: str
) -> None:
    run("export", "--checkpoint", pretrained, "--to", "torch", "--out", tmp_path / "out")
    harm, file = tmp_path / "harm", tmp_path / "out" / "model.pt"
    if writer == "pickle":
        file.write_bytes(pickle.dumps({"a": Malicious(harm)}))
    else:
        torch.save({"a": Malicious(harm)}, file)
    with pytest.raises(CheckpointError, match="Nothing of it was run"):
        ssl3d.create_model(tmp_path / "out")
    assert not harm.exists()
    torch.load(file, weights_only=False) if writer == "torch" else pickle.loads(file.read_bytes())
    assert harm.exists(), "the file would have done harm"
