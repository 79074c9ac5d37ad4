"""Exported weights: the target library computes the same features from the same volume."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from run_facts import finished_run

import ssl3d
from ssl3d.cli import main
from ssl3d.config import BackboneConfig
from ssl3d.errors import CheckpointError, ConfigError
from ssl3d.models.factory import build_backbone
from ssl3d.models.genesis import GenesisUNet3D
from ssl3d.models.weights.checkpoint import save_tensors
from ssl3d.models.weights.hub import HubBackbone
from ssl3d.models.weights.nnunet import NNUNetUNet3D

VOLUME = torch.rand(1, 1, 12, 9, 10, generator=torch.Generator().manual_seed(0))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "140"})


def finished(folder: Path, backbone: list[int] | dict) -> Path:  # type: ignore[type-arg]
    """A finished run, without the pretraining."""
    options = backbone if isinstance(backbone, dict) else {"channels": backbone}
    config = BackboneConfig.model_validate(options)
    save_tensors(folder / "run" / "backbone.safetensors", build_backbone(config, seed=3).state_dict())
    facts = finished_run(backbone=config.model_dump(mode="json"))
    (folder / "run" / "run.json").write_text(json.dumps(facts))
    return folder / "run"


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    return finished(tmp_path, [4, 8])


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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("export", "--checkpoint", pretrained, "--to", target, "--out", tmp_path / "out")
    same_features(HubBackbone.from_pretrained(tmp_path / "out", strict=True), pretrained)


def test_the_torch_file_is_a_plain_state_dict(tmp_path: Path, pretrained: Path) -> None:
    run("export", "--checkpoint", pretrained, "--to", "torch", "--out", tmp_path / "out")
    other = build_backbone(BackboneConfig(channels=[4, 8]), seed=0)  # type: ignore[call-arg]
    other.load_state_dict(torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    same_features(other, pretrained)


# --- nnU-Net and MONAI: the same features in the target library ---------------------------------------

FIVE = [8, 16, 24, 32, 40]
PATCH = torch.rand(2, 1, 32, 16, 16, generator=torch.Generator().manual_seed(1))


def captured(module: torch.nn.Module, found: list[torch.Tensor]) -> None:
    module.register_forward_hook(lambda _, __, output: found.append(output))


def same_stages(model: torch.nn.Module, encoder: list, decoder: list, pretrained: Path) -> torch.Tensor:
    """Compare the output of every stage, and return the last layer's output."""
    found: list[torch.Tensor] = []
    for module in (*encoder, *decoder):
        captured(module, found)
    backbone = ssl3d.create_model(pretrained)
    stages: list[torch.Tensor] = []
    for block in backbone.decoder:  # type: ignore[union-attr]
        captured(block, stages)
    with torch.no_grad():
        output = model.eval()(PATCH)
        features = backbone.encode(PATCH)
        local = backbone.decode(features)
    assert len(found) == len(features) + len(stages)
    for one, other in zip(found, [*features, *stages], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[-1], local, rtol=1e-5, atol=1e-5)
    return output


def nnunet_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch, channels: int = 1):  # type: ignore[no-untyped-def]
    """nnU-Net's own trainer with the exported architecture in its plans."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(folder / name))
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    names = {str(i): "CT" for i in range(channels)}
    dataset = {"channel_names": names, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [32, 16, 16], "spacing": [1, 1, 1], "normalization_schemes": ["NoNormalization"] * channels,
        "use_mask_for_norm": [False] * channels, "batch_dice": False,
        "architecture": json.loads((folder / "out" / "architecture.json").read_text()),
    }  # fmt: skip
    plans = {
        "dataset_name": "Dataset001_Test", "plans_name": "nnUNetPlans", "configurations": {"3d_fullres": full},
        "label_manager": "LabelManager", "continue_training": False,
    }  # fmt: skip
    data = folder / "nnUNet_preprocessed" / "Dataset001_Test" / full["data_identifier"]
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()  # by its ending nnU-Net knows how to read what it prepared
    return nnUNetTrainer(plans, "3d_fullres", 0, dataset, device=torch.device("cpu"))


def test_nnunet_loads_the_weights_and_computes_the_features_of_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.run.run_training import maybe_load_checkpoint

    pretrained = finished(tmp_path, FIVE)
    result = run("export", "--checkpoint", pretrained, "--to", "nnunet", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "architecture.json" in result.output, result.output
    trainer = nnunet_trainer(tmp_path, monkeypatch)
    maybe_load_checkpoint(trainer, False, False, str(tmp_path / "out" / "nnunet.pth"))  # -pretrained_weights
    network = trainer.network
    logits = same_stages(network, list(network.encoder), list(network.decoder.stages), pretrained)
    assert [tuple(x.shape[1:]) for x in logits] == [(3, 32 >> s, 16 >> s, 16 >> s) for s in range(4)]
    # nnU-Net's loss takes them: one step of its training changes the weights.
    before = network.encoder[0][0].weight.detach().clone()
    targets = [torch.randint(0, 3, (2, 1, *x.shape[2:]), dtype=torch.int16) for x in logits]
    loss = trainer.train_step({"data": PATCH, "target": targets})["loss"]
    assert loss == loss and not torch.equal(network.encoder[0][0].weight, before)
    trainer.set_deep_supervision_enabled(False)  # as in its inference
    assert network(PATCH).shape == (2, 3, 32, 16, 16)


def test_nnunet_is_told_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    run("export", "--checkpoint", finished(tmp_path, FIVE), "--to", "nnunet", "--out", tmp_path / "out")
    trainer = nnunet_trainer(tmp_path, monkeypatch, channels=2)
    trainer.initialize()
    with pytest.raises(AssertionError, match="shape"):
        load_pretrained_weights(trainer.network, str(tmp_path / "out" / "nnunet.pth"))
    with pytest.raises(ConfigError, match="multiples of 16"):
        trainer.network(torch.zeros(1, 2, 24, 16, 16))
    with pytest.raises(ConfigError, match="halves every axis"):
        NNUNetUNet3D(1, 3, FIVE, [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]])


def test_monai_builds_the_network_from_the_folder_alone(tmp_path: Path) -> None:
    from monai.networks.nets import BasicUNet

    pretrained = finished(tmp_path, FIVE)
    result = run("export", "--checkpoint", pretrained, "--to", "monai", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    code = (tmp_path / "out" / "network.py").read_text()
    assert "import ssl3d" not in code and "from ssl3d" not in code
    loaded: dict = {"__name__": "network"}
    exec(compile(code, "network.py", "exec"), loaded)
    model = loaded["load"](tmp_path / "out" / "monai.pt", out_channels=4)
    assert type(model) is BasicUNet
    encoder = [model.conv_0, model.down_1, model.down_2, model.down_3, model.down_4]
    decoder = [model.upcat_4, model.upcat_3, model.upcat_2, model.upcat_1]
    assert same_stages(model, encoder, decoder, pretrained).shape == (2, 4, 32, 16, 16)


def test_backbones_that_a_target_cannot_hold_are_refused(tmp_path: Path, pretrained: Path) -> None:
    result = run("export", "--checkpoint", pretrained, "--to", "monai", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "has 5 stages, and this backbone has 2" in result.output
    other = finished(tmp_path / "other", {"name": "genesis_unet3d", "width": 2})
    for target in ("nnunet", "monai"):
        result = run("export", "--checkpoint", other, "--to", target, "--out", tmp_path / "out")
        assert result.exit_code == 2 and "this is genesis_unet3d" in result.output, result.output
    assert not (tmp_path / "out").exists()
    result = run("export", "--checkpoint", other, "--to", "safetensors", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    x = torch.rand(1, 1, 16, 16, 16)
    for model in (
        ssl3d.create_model(tmp_path / "out"),
        HubBackbone.from_pretrained(tmp_path / "out", strict=True),
    ):
        with torch.no_grad():
            for found, expected in zip(model(x), ssl3d.create_model(other)(x), strict=True):
                assert torch.equal(found, expected)


def test_the_hub_mixin_refuses_a_backbone_whose_weights_it_would_not_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaled(GenesisUNet3D):
        def __init__(self) -> None:
            super().__init__(GenesisUNet3D.Config(width=1))
            self.scale = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr("ssl3d.models.weights.hub.build_backbone", lambda *_, **__: Scaled())
    with pytest.raises(CheckpointError, match=r"scaled.*\(scale\)"):
        HubBackbone({"name": "scaled"})


# --- ssl3d.create_model ----------------------------------------------------------------------------


def test_create_model_takes_the_name_of_a_backbone_and_says_what_it_knows() -> None:
    first, again, other = (ssl3d.create_model("unet3d", seed=seed) for seed in (1, 1, 2))
    weights = [next(model.parameters()) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(CheckpointError, match=r"neither a folder nor a registered backbone \(.*unet3d"):
        ssl3d.create_model("unet2d")


def test_create_model_reads_the_cache_of_the_hub_offline(
    tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--me--heart"
    run(
        "export", "--checkpoint", pretrained, "--to", "huggingface", "--out", cache / "snapshots" / ("0" * 40)
    )
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same_features(ssl3d.create_model("hf-hub:me/heart"), pretrained)
    with pytest.raises(CheckpointError, match="hf-hub:me/liver cannot be read"):
        ssl3d.create_model("hf-hub:me/liver")


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
    with pytest.raises(
        CheckpointError, match="(which is code|more than tensors .*)[.] Nothing of it was run"
    ):
        ssl3d.create_model(tmp_path / "out")
    assert not harm.exists()
    torch.load(file, weights_only=False) if writer == "torch" else pickle.loads(file.read_bytes())
    assert harm.exists(), "the file would have done harm"
