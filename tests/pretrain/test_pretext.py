"""Is the pretext task learned? Held-back volumes, chance, and what run.json says."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cohorts import noise_cohort, sphere_cohort
from torch import Tensor, nn

from ssl3d.config import Settings
from ssl3d.errors import TrainingError
from ssl3d.losses import matching_error
from ssl3d.models.heads import mean_image_error
from ssl3d.pretrain.contract import HELD_BACK_SCORE
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.pretext import Score, clearly_below, held_back_score, summary
from ssl3d.pretrain.source import CropSource, held_back_volumes, training_source
from ssl3d.pretrain.spec import resolve_method
from ssl3d.rng import BatchRng
from ssl3d.testing.suite import Suite

CPU = torch.device("cpu")
CONTRASTIVE = ("simclr", "byol", "simsiam")


def method(name: str, **options: Any) -> Method:
    return Suite(resolve_method(name, {name: options})).method()


def source(volumes: int = 24, items: int = 8, per_item: int = 1, seed: int = 0) -> CropSource:
    return training_source(sphere_cohort(volumes), (16, 16, 16), items, per_item, seed, 2)


def views_of(m: Method, **options: Any) -> dict[str, Tensor]:
    s = source(per_item=m.volumes_per_item, **options)
    m.setup(s)
    m.on_epoch_start(s, 0)
    batch = s.held_back[0]
    return m.held_back_views(batch.x, BatchRng(0, 0, batch.items, volumes=batch.volumes))


# Held-back volumes ----------------------------------------------------------------------------


def test_a_tenth_of_the_volumes_is_held_back_where_there_are_enough() -> None:
    assert [len(held_back_volumes(n)) for n in (2, 19, 20, 39, 60, 302, 5000)] == [0, 0, 2, 3, 6, 16, 16]
    assert held_back_volumes(60) == held_back_volumes(60)
    assert all(0 <= v < 60 for v in held_back_volumes(60)) and len(set(held_back_volumes(60))) == 6


@pytest.mark.parametrize("per_item", [1, 2])
def test_no_step_shows_a_volume_that_is_held_back(per_item: int) -> None:
    cohort = noise_cohort(24, (8, 8, 8))  # the crop is the volume, so that every crop names its own
    known = {image.tobytes(): i for i, image in enumerate(cohort.images)}
    s = training_source(cohort, (8, 8, 8), 3, per_item, 0, 4)

    def shown(x: Tensor) -> set[int]:
        return {known[crop.numpy().tobytes()] for crop in x.reshape(-1, 8, 8, 8)}

    trained = set().union(*(shown(s.batch(step).x) for step in range(40)))
    held = set().union(*(shown(batch.x) for batch in s.held_back))
    assert held == set(held_back_volumes(24)) and trained == set(range(24)) - held
    assert s.held_back_is == "2 volumes" and len(s) == 22
    other = training_source(cohort, (8, 8, 8), 3, per_item, 1, 4)
    assert all(torch.equal(a.x, b.x) for a, b in zip(s.held_back, other.held_back, strict=True)), (
        "for all seeds"
    )


def test_few_volumes_are_all_trained_on_and_further_crops_of_them_held_back() -> None:
    s = training_source(noise_cohort(5), (8, 8, 8), 2, 1, 0, 4)
    assert len(s) == 5 and s.held_back_is == "further crops of the training volumes"
    held = torch.cat([batch.x for batch in s.held_back])
    trained = torch.cat([s.batch(step).x for step in range(20)])
    assert not any(torch.equal(a, b) for a in held for b in trained)


# Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTRASTIVE, "rotation", "deepcluster", "denoising"])
def test_scoring_changes_nothing_and_repeats(name: str) -> None:
    m = method(name)
    s = source()
    m.setup(s)
    m.on_epoch_start(s, 0)
    first_part = next(iter(m.backbone.modules()))
    first_part.training = False
    state, modes = copy.deepcopy(m.state_dict()), [part.training for part in m.modules()]
    score = held_back_score(m, s.held_back, CPU)
    assert score == held_back_score(m, s.held_back, CPU)
    assert score.chance is not None and math.isfinite(score.value)
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert modes == [part.training for part in m.modules()]


def test_a_score_that_is_not_finite_ends_the_run() -> None:
    m = method("denoising")
    with torch.no_grad():
        m.restoration[3].bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="denoising: its score on held-back crops is nan"):
        held_back_score(m, source().held_back, CPU)


@pytest.mark.parametrize("name", ["rotation", "random_labels"])
def test_chance_is_the_loss_of_equal_probabilities(name: str) -> None:
    m = method(name)
    nn.init.zeros_(m.classifier.linear.weight)
    nn.init.zeros_(m.classifier.linear.bias)
    views = views_of(m)
    assert m.pretext_score(views) == pytest.approx(m.chance(views), rel=1e-6)


@pytest.mark.parametrize("volumes", [24, 4])
def test_chance_of_simclr_is_the_loss_of_equal_embeddings(volumes: int) -> None:
    m = method("simclr").eval()
    for layer in m.projector:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
    views = views_of(m, volumes=volumes)
    shown = views["volume"].tolist()
    others = [2 * sum(v != w for w in shown) for v in shown]
    assert m.chance(views) == pytest.approx(np.mean([math.log(1 + n) for n in others]))
    # Embeddings of length 0 have no direction, so all cosines are equal.
    assert m.pretext_score(views) == pytest.approx(m.chance(views), rel=1e-5)


def test_chance_of_deepcluster_is_the_loss_of_the_best_constant() -> None:
    m = method("deepcluster", clusters=4, crops_per_volume=2).eval()
    s = source()
    m.setup(s)
    m.on_epoch_start(s, 0)
    nn.init.zeros_(m.classifier.linear.weight)
    share = np.bincount(m.held_back_labels.numpy(), minlength=4) / len(m.held_back_labels)
    with torch.no_grad():
        m.classifier.linear.bias.copy_(torch.from_numpy(np.log(share + 1e-12)))
    score = held_back_score(m, s.held_back, CPU)
    assert score.value == pytest.approx(score.chance, rel=1e-4) and score.chance <= math.log(4)


def test_held_back_crops_of_deepcluster_are_in_the_cluster_that_is_nearest() -> None:
    m = method("deepcluster", clusters=4, crops_per_volume=2)
    s = source()
    m.setup(s)
    # Held-back crops that are labelled crops as well: they have to get the same labels.
    s.held_back[0].x.copy_(torch.stack([m.crop(i) for i in range(8)]))
    m.on_epoch_start(s, 0)
    assert torch.equal(m.held_back_labels[:8], m.labels[:8])
    views = m.held_back_views(s.held_back[1].x, BatchRng(0, 0, s.held_back[1].items))
    assert torch.equal(views["label"], m.held_back_labels[8:16])


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_a_prediction_that_ignores_its_input_and_a_collapse_are_at_chance(name: str) -> None:
    m = method(name).eval()
    views = views_of(m)
    nn.init.zeros_(m.predictor[-1].weight)
    nn.init.normal_(m.predictor[-1].bias)
    assert m.chance(views) == 1
    assert m.pretext_score(views) == pytest.approx(1, abs=0.1), "of 16 views: equal but for sampling"
    m = method(name).eval()
    for layer in m.projector:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
    if name == "byol":
        m.target_projector = copy.deepcopy(m.projector)
    assert m.pretext_score(views) == pytest.approx(1, abs=1e-3)


def test_matching_error_against_loops() -> None:
    rng = torch.Generator().manual_seed(0)
    p, z = (torch.randn(6, 5, generator=rng) for _ in range(2))
    shown = [3, 3, 1] * 2
    own = np.mean([1 - float(F.cosine_similarity(p[i], z[i], dim=0)) for i in range(6)])
    pairs = [(i, j) for i in range(6) for j in range(6) if shown[i] != shown[j]]
    others = np.mean([1 - float(F.cosine_similarity(p[i], z[j], dim=0)) for i, j in pairs])
    assert matching_error(p, z, torch.tensor([3, 3, 1])) == pytest.approx(own / others, rel=1e-4)
    assert matching_error(p, p, torch.tensor([3, 3, 1])) < 1e-3
    assert math.isfinite(matching_error(p, z, torch.tensor([3, 3, 3])))


def test_the_error_of_the_mean_image_is_what_it_costs_on_new_images() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((4, 4, 4))
    images = base + 0.1 * rng.standard_normal((2000, 1, 4, 4, 4))
    few = [mean_image_error(torch.from_numpy(images[i : i + 4])) for i in range(0, 2000, 4)]
    assert np.mean(few) == pytest.approx(0.01, rel=0.02), (
        "the variance about the mean image, whatever the number"
    )
    one = torch.from_numpy(images[:1])
    assert mean_image_error(one) == pytest.approx(float(one.var(correction=0)))
    holes = torch.zeros(4, 1, 4, 4, 4, dtype=torch.bool)
    holes[:, :, 0] = True
    x = torch.from_numpy(images[:4])
    assert mean_image_error(x, holes) == pytest.approx(float(x[:, :, 0].var(0).mean()))


# What a run says ------------------------------------------------------------------------------


def test_learned_is_clearly_below_chance_and_start() -> None:
    m = method("rotation")
    for start, end, learned in ((2.4, 1.0, True), (2.4, 2.25, False), (1.0, 0.99, False), (None, 1.0, True)):
        assert summary(m, start, Score(end, 2.3), "x")["learned"] is learned
    assert summary(m, 2.4, Score(1.0, None), "x")["learned"] is None
    assert summary(method("random_labels"), 2.4, Score(1.0, 2.3), "x")["learned"] is None, "a control"
    assert clearly_below(-1.1, -1.0) and not clearly_below(-1.0, -1.0)


def settings(**options: Any) -> Settings:
    base = {"steps": 6, "batch_size": 2, "crop": 8, "checkpoint_every": 2, "monitor_every": 3, "workers": 0}
    return Settings.model_validate({"backbone": {"channels": [8, 16]}, "pretrain": {**base, **options}})


@pytest.mark.parametrize("name", ["rotation", "simclr"])
def test_run_and_log_keep_the_score_also_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = resolve_method(name, {})

    def run(out: str, resume: bool = False) -> dict[str, Any]:
        return pretrain(spec, noise_cohort(24), settings(), 0, tmp_path / out, CPU, resume=resume)

    whole = run("whole")["pretext"]
    assert whole["held_back"] == "2 volumes" and set(whole) == {
        "chance",
        "start",
        "end",
        "learned",
        "held_back",
    }
    original = spec.cls.training_step

    def stopping(self: Method, views: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.training and (steps := steps_left.pop()) == 0:
            raise KeyboardInterrupt(steps)
        return original(self, views)

    steps_left = list(range(6))
    with monkeypatch.context() as patch:
        patch.setattr(spec.cls, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert run("cut", resume=True)["pretext"] == whole
    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    curve = {line["step"]: line[HELD_BACK_SCORE] for line in log if HELD_BACK_SCORE in line}
    assert list(curve) == [0, 3, 6] and curve[0] == whole["start"] and curve[6] == whole["end"]


def test_voxels_are_the_same_for_every_method(tmp_path: Path) -> None:
    seen = {}
    for name in ("rotation", "simclr", "deepcluster", "gvsl"):
        spec = resolve_method(name, {"deepcluster": {"clusters": 4}})
        record = pretrain(spec, noise_cohort(8), settings(steps=1), 0, tmp_path / name, CPU)
        seen[name] = record["voxels_seen"]
    assert set(seen.values()) == {2 * 8**3}
