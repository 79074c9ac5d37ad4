"""The pretraining loop: resume to the same bits, abort on bad losses, provenance."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import noise_cohort
from torch import nn

import ssl3d
from ssl3d.config import Settings
from ssl3d.errors import CheckpointError, ConfigError, TrainingError
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import load_backbone, load_tensors, load_weights
from ssl3d.pretrain.loop import check_run, pretrain
from ssl3d.pretrain.monitor import effective_rank, feature_deviation
from ssl3d.pretrain.spec import MethodSpec

CPU = torch.device("cpu")


class Restore(ssl3d.Method):
    """Restore noisy crops; with knobs for the faults that the loop must notice."""

    name = "restore"
    title = "Restore"
    nan_at: int | None = None
    stop_at: int | None = None

    class Config(ssl3d.MethodConfig):
        """Options."""

        sigma: float = 0.1
        """Noise."""

    def __init__(self, backbone: ssl3d.Method, config: Config) -> None:
        super().__init__(backbone, config)  # type: ignore[arg-type]
        self.head = nn.Conv3d(self.backbone.local_channels, 1, 1)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.long))

    def views(self, x: torch.Tensor, rng: ssl3d.BatchRng) -> dict[str, torch.Tensor]:
        if rng.step == self.stop_at:
            raise KeyboardInterrupt
        return {"noisy": x + self.config.sigma * rng.normal(x.shape[1:]), "x": x}

    def training_step(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss = (self.head(self.backbone(views["noisy"])[1]) - views["x"]).square().mean()
        if self.training and self.nan_at is not None and int(self.steps_seen) == self.nan_at:
            loss = loss * torch.nan
        return {"mse": loss, "zero": 0 * loss}

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        self.steps_seen += 1


def settings(**pretrain_options: object) -> Settings:
    options = {
        "steps": 7,
        "batch_size": 2,
        "crop": 8,
        "lr": 1e-3,
        "checkpoint_every": 3,
        "monitor_every": 2,
        "log_every": 1,
    }
    return Settings.model_validate(
        {"backbone": {"channels": [8, 16]}, "pretrain": {**options, **pretrain_options}}
    )


def spec(cls: type[ssl3d.Method] = Restore) -> MethodSpec:
    return MethodSpec(cls.name, cls, cls.Config(), cls.title)


def run(
    out: Path, cls: type[ssl3d.Method] = Restore, seed: int = 0, resume: bool = False, **options: object
) -> dict:  # type: ignore[type-arg]
    return pretrain(  # a class that stops is other code
        spec(cls),
        noise_cohort(5),
        settings(**options),
        seed,
        out,
        CPU,
        resume=resume,
        allow_code_change=resume,  # type: ignore[arg-type]
    )


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_tensors(p / "backbone.safetensors") for p in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def lines(out: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, stop: int, optimizer: str) -> None:
    class Stopped(Restore):
        stop_at = stop

    run(tmp_path / "whole", optimizer=optimizer, schedule="cosine", warmup_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Stopped, optimizer=optimizer, schedule="cosine", warmup_steps=2)
    run(tmp_path / "cut", resume=True, optimizer=optimizer, schedule="cosine", warmup_steps=2)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_workers_and_logging_do_not_change_the_weights(tmp_path: Path) -> None:
    run(tmp_path / "a", workers=0)
    run(tmp_path / "b", workers=3, log_every=3, monitor_every=1, checkpoint_every=1)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "c", seed=1)
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_provenance_and_log(tmp_path: Path) -> None:
    run(tmp_path / "r")
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["status"] == "finished" and record["step"] == 7
    assert record["voxels_seen"] == 7 * 2 * 8**3
    assert record["identity"]["pretrain"]["data"] == "memory"
    assert record["environment"]["versions"]["torch"]
    assert record["peak_memory_mib"] is None or record["peak_memory_mib"] > 0
    assert set(record["losses"]) == {"mse", "zero"}
    log = lines(tmp_path / "r")
    assert [entry["step"] for entry in log if "mse" in entry] == list(range(1, 8))
    assert [entry["step"] for entry in log if "feature_std" in entry] == [2, 4, 6, 7]
    assert list((tmp_path / "r" / "tensorboard").iterdir())
    kept = [path.name for path in sorted((tmp_path / "r").glob("state-*.safetensors"))]
    assert kept == ["state-00000006.safetensors", "state-00000007.safetensors"], "the newest two are kept"


def test_a_loss_that_is_not_finite_names_method_and_loss_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Explodes(Restore):
        nan_at = 4

    with pytest.raises(TrainingError, match=r"restore: loss mse = nan, zero = nan at step 4.*pretrain.lr"):
        run(tmp_path / "r", Explodes)
    assert [p.name for p in (tmp_path / "r").glob("state-*.safetensors")] == ["state-00000003.safetensors"]
    run(tmp_path / "r", resume=True)


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    run(tmp_path / "r")
    with pytest.raises(CheckpointError, match="already holds a run at step 7: add --resume"):
        run(tmp_path / "r")
    with pytest.raises(CheckpointError, match=r"pretrain.budget.lr was 0.001, is 0.002"):
        run(tmp_path / "r", resume=True, lr=2e-3)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("...")
    with pytest.raises(CheckpointError, match="not empty and holds no run"):
        run(other)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "r")
    wider = settings().backbone.model_copy(update={"channels": [16, 32]})
    with pytest.raises(CheckpointError, match=r"another architecture.*\[8, 16\].*\[16, 32\]"):
        load_backbone(tmp_path / "r", expected=wider)
    file = tmp_path / "r" / "backbone.safetensors"
    with pytest.raises(
        CheckpointError, match=r"encoder.0.0.weight: \(8, 1, 3, 3, 3\) in the file, \(16, 1, 3, 3, 3\)"
    ):
        load_weights(build_backbone(wider, 0), load_tensors(file), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="backbone.safetensors is damaged: its SHA-256"):
        load_backbone(tmp_path / "r")
    (tmp_path / "r" / "backbone.safetensors.sha256").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(tmp_path / "r")
    with pytest.raises(CheckpointError, match="holds no run.json"):
        load_backbone(tmp_path)


def test_create_model_returns_the_pretrained_backbone(tmp_path: Path) -> None:
    run(tmp_path / "r")
    model = ssl3d.create_model(tmp_path / "r")
    expected = load_tensors(tmp_path / "r" / "backbone.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_what_can_be_known_before_data_are_read_is_checked() -> None:
    with pytest.raises(ConfigError, match=r'Unknown optimizer "adm". Did you mean'):
        check_run(spec(), settings(optimizer="adm"), 0)
    with pytest.raises(ConfigError, match=r"pretrain.crop = \(8, 1, 8\) is too small.*at least 2"):
        check_run(spec(), settings(crop=(8, 1, 8)), 0)

    class Pairs(Restore):
        minimum_items = 2

    with pytest.raises(
        ConfigError, match="restore needs 2 items a step, .* pretrain.batch_size of at least 2"
    ):
        check_run(spec(Pairs), settings(batch_size=1), 0)


def test_encoder_only_methods_leave_the_decoder_at_its_start(tmp_path: Path) -> None:
    class Encoder(Restore):
        trains = "encoder"

        def training_step(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"l": self.backbone.encode(views["noisy"])[-1].square().mean()}

    run(tmp_path / "r", Encoder)
    trained, fresh = (
        load_tensors(tmp_path / "r" / "backbone.safetensors"),
        build_backbone(settings().backbone, 0).state_dict(),
    )
    changed = {k.split(".")[0] for k in fresh if not torch.equal(fresh[k], trained[k])}
    assert changed == {"encoder"}


def test_collapse_measures() -> None:
    torch.manual_seed(0)
    spread = torch.randn(256, 32)
    assert feature_deviation(spread) == pytest.approx(1, abs=0.05)
    assert effective_rank(spread) > 28
    assert feature_deviation(torch.ones(8, 32)) == effective_rank(torch.ones(8, 32)) == 0
    line = torch.linspace(-1, 1, 9)[:, None] * torch.randn(1, 32) + torch.randn(1, 32)
    assert effective_rank(line) == pytest.approx(1, abs=1e-4)
    two = np.zeros((4, 8))
    two[[0, 1], 0], two[[2, 3], 1] = (1, -1), (1, -1)
    assert effective_rank(torch.from_numpy(two)) == pytest.approx(2)


def test_killed_with_sigkill_and_resumed_ends_with_the_same_bits(tmp_path: Path, volume_folder: Path) -> None:
    """The whole road: command line, files, preparation, GVSL."""
    command = [
        sys.executable, "-m", "ssl3d.cli", "pretrain", "--method", "gvsl", "--data", str(volume_folder), "--preset", "smoke",
        "--set", "pretrain.steps=24", "--set", "pretrain.checkpoint_every=2", "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, "--out", str(tmp_path / "cut")])
    while not (tmp_path / "cut" / "run.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "running"
    subprocess.run([*command, "--out", str(tmp_path / "cut"), "--resume"], check=True)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_names_what_it_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    assert run(tmp_path / "asked", steps=1, precision=precision)["device"].endswith(f", {precision})")
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: precision == "bfloat16")
    assert run(tmp_path / "auto", steps=1, precision="auto")["device"].endswith(f", {precision})")
    assert same_weights(tmp_path / "asked", tmp_path / "auto")


def test_training_in_bfloat16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ``auto`` means it; its gradients of convolutions are wrong there."""
    from ssl3d.device import check_precision

    for native in (False, True):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda native=native: native)
        for precision in ("auto", "float32", "bfloat16"):
            refused = precision == "bfloat16" or (precision == "auto" and native)
            with pytest.raises(ConfigError, match="--set x.precision=float32") if refused else nullcontext():
                check_precision("x.precision", precision, CPU)
    check_precision("x.precision", "bfloat16", torch.device("cuda"))
