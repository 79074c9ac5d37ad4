"""The measurement of rounding's luck: it changes what it says, resumes, and merges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl3d.config import BackboneConfig
from ssl3d.models.factory import build_backbone

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "studies"


def floor(folder: Path, *more: str) -> str:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "floor.py", "--preset", "smoke", "--tasks", "shc", "--modes", "linear", "finetune",
         "--log", folder / "runs.jsonl", "--out", folder / "floor.json", *more],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runs_are_measured_once_and_merged(tmp_path: Path) -> None:
    out = tmp_path / "floor.json"
    out.write_text(
        '{"quick": {"shc": {"finetune": {"sd": 9, "runs": 3}}}, "smoke": {"sac": {"knn": {"sd": 1, "runs": 2}}}}'
    )
    floor(tmp_path, "--runs", "2")
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(r["mode"], r["run"]) for r in runs] == [
        ("linear", 0),
        ("finetune", 0),
        ("linear", 1),
        ("finetune", 1),
    ]
    found = json.loads(out.read_text())
    for mode in ("linear", "finetune"):
        scores = [r["score"] for r in runs if r["mode"] == mode]
        expected = abs(scores[0] - scores[1]) / np.sqrt(2)
        assert found["smoke"]["shc"][mode] == {"sd": pytest.approx(expected, abs=1e-4), "runs": 2}
    assert found["quick"]["shc"]["finetune"]["sd"] == 9 and found["smoke"]["sac"]["knn"]["sd"] == 1
    # Lines of other code do not count, those of this code are not computed again.
    lines = [json.dumps({**run, "code": "old"} if run["mode"] == "linear" else run) for run in runs]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    floor(tmp_path, "--runs", "2")
    again = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()[4:]]
    assert [(r["mode"], r["run"], r["score"]) for r in again] == [
        (r["mode"], r["run"], r["score"]) for r in runs if r["mode"] == "linear"
    ]


def test_a_pretraining_begins_from_changed_weights_and_has_luck_of_its_own(tmp_path: Path) -> None:
    changes = ("--set", "pretrain.steps=2", "--set", "pretrain.warmup_steps=1")
    done = floor(tmp_path, "--runs", "2", "--methods", "scratch", "denoising", "--modes", "linear", *changes)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(r["method"], r["run"]) for r in runs] == [
        (method, run) for run in (0, 1) for method in ("scratch", "denoising")
    ]
    assert "pretrain_code" in runs[1] and "pretrain_code" not in runs[0]
    scores = [r["score"] for r in runs if r["method"] == "denoising"]
    assert scores[0] != runs[0]["score"], "the weights are pretrained"
    cell = json.loads((tmp_path / "floor.json").read_text())["smoke"]["shc"]["linear"]
    expected = {"sd": pytest.approx(abs(scores[0] - scores[1]) / np.sqrt(2), abs=1e-4), "runs": 2}
    assert cell["pretrained"] == {"denoising": expected} and cell["runs"] == 2
    assert "denoising" in done
    # Another budget of the pretraining is another key, for scratch it is none.
    floor(tmp_path, "--runs", "1", "--methods", "scratch", "denoising", "--modes", "linear", *changes[:2])
    again = (tmp_path / "runs.jsonl").read_text().splitlines()[4:]
    assert [json.loads(line)["method"] for line in again] == ["denoising"]


def test_weights_are_changed_by_a_relative_1e_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from floor import ChangedFeatures, change_weights  # type: ignore[import-not-found]

    def network() -> torch.nn.Module:
        return build_backbone(BackboneConfig(channels=[8, 16]), 0)  # type: ignore[call-arg]

    plain, weights = network(), []
    for run in range(3):
        net = network()
        change_weights(net, run)
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]).double())
    before = torch.cat([p.detach().flatten() for p in plain.parameters()]).double()
    assert torch.equal(weights[0], before) and not torch.equal(weights[1], weights[2])
    relative = ((weights[1] - before) / before)[before != 0]
    assert float(relative.square().mean().sqrt()) == pytest.approx(1e-6, rel=0.1)
    x = torch.rand(1, 1, 8, 8, 8)
    for run, most in ((0, 0.0), (1, 1e-5)):
        same = ChangedFeatures(plain, run)  # type: ignore[arg-type]
        for a, b in zip((same.encode(x)[-1], same(x)[1]), (plain.encode(x)[-1], plain(x)[1]), strict=True):  # type: ignore[operator]
            assert float((a - b).detach().abs().max()) <= most * float(b.detach().abs().max())
            assert bool(run) != torch.equal(a, b)
