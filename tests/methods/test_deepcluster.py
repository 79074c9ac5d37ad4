"""DeepCluster: planted clusters, emptied ones, sampling, and a run that goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohorts import noise_cohort, sphere_cohort
from sklearn.metrics import adjusted_rand_score
from ssl3d_methods.deepcluster import DeepCluster, cluster, fill_empty

from ssl3d.config import Settings
from ssl3d.errors import ConfigError
from ssl3d.models.weights.checkpoint import load_tensors
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.method import Progress
from ssl3d.pretrain.source import CropSource
from ssl3d.pretrain.spec import resolve_method
from ssl3d.rng import BatchRng
from ssl3d.testing.suite import Suite

CPU = torch.device("cpu")


def planted(sizes: tuple[int, ...], channels: int = 12, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Points around random centres, with one channel that is large and means nothing."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    points = rng.standard_normal((len(sizes), channels))[truth] + noise * rng.standard_normal(
        (len(truth), channels)
    )
    points[:, 0] = 1000.0
    return points, truth


def test_planted_clusters_are_found_whatever_their_sizes() -> None:
    points, truth = planted((40, 10, 25, 5))
    others, belong = points[::3] + 0.01, truth[::3]
    labels, placed = cluster(points, others, 4, 3, seed=0)
    assert adjusted_rand_score(truth, labels) == 1
    assert np.array_equal(placed, labels[::3]), "points that decide nothing are in the cluster they lie in"
    assert np.array_equal(np.unique(belong), np.arange(4))
    assert np.array_equal(labels, cluster(points, others[:0], 4, 3, seed=0)[0])


def test_features_are_whitened_so_that_a_strong_channel_does_not_decide_alone() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 40)
    weak = np.where(truth == 0, -1, 1) * 0.1 + 0.005 * rng.standard_normal(80)
    points = np.stack([weak, rng.uniform(-100, 100, 80)], axis=1)
    assert adjusted_rand_score(truth, cluster(points, points[:0], 2, 2, seed=0)[0]) > 0.5
    from sklearn.cluster import KMeans

    assert adjusted_rand_score(truth, KMeans(2, n_init=5, random_state=0).fit_predict(points)) < 0.1


def test_an_emptied_cluster_gets_a_part_of_the_largest() -> None:
    points, truth = planted((30, 8, 20, 6))
    labels = truth.copy()
    labels[truth == 3] = 1  # cluster 3 is emptied
    filled = fill_empty(points, labels, 4, seed=0)
    counts = np.bincount(filled, minlength=4)
    assert (counts > 0).all()
    assert np.array_equal(filled[labels != 0], labels[labels != 0]), "only the largest, cluster 0, is split"
    assert counts[0] + counts[3] == 30 and min(counts[0], counts[3]) >= 5
    # It is split by a plane: some direction separates the two parts.
    mine = points[labels == 0] - points[labels == 0].mean(0)
    side = filled[labels == 0] == 3
    weights, *_ = np.linalg.lstsq(np.c_[mine, np.ones(30)], side * 2.0 - 1, rcond=None)
    assert ((np.c_[mine, np.ones(30)] @ weights > 0) == side).mean() > 0.9
    assert np.array_equal(filled, fill_empty(points, labels, 4, seed=0))
    assert np.array_equal(fill_empty(points, truth, 4, 0), truth), "nothing is empty, nothing changes"


@pytest.mark.parametrize("seed", range(20))
def test_repeated_features_leave_no_cluster_empty(seed: int) -> None:
    """The mean of equal points is not always that point: the rest may put all of them on one side."""
    rng = np.random.default_rng(seed)
    distinct = rng.normal(size=(int(rng.integers(1, 4)), 5))
    points = distinct[rng.integers(0, len(distinct), 13)]
    assert np.bincount(fill_empty(points, np.zeros(13, int), 9, seed), minlength=9).min() >= 1


def test_several_empty_clusters_and_points_that_are_all_the_same() -> None:
    same = np.ones((12, 5))
    assert np.bincount(fill_empty(same, np.zeros(12, int), 5, 0), minlength=5).min() >= 1
    labels, _ = cluster(same, same[:0], 5, 3, seed=1)  # k-means itself finds one cluster only
    assert np.bincount(labels, minlength=5).min() >= 1


def method(**options: Any) -> tuple[DeepCluster, CropSource]:
    suite = Suite(resolve_method("deepcluster", {"deepcluster": {"clusters": 4, **options}}))
    m = suite.method()
    source = CropSource(sphere_cohort(6), (12, 12, 12), 2, 1, 0)
    m.setup(source)
    assert isinstance(m, DeepCluster)
    return m, source


def test_every_cluster_is_drawn_equally_often_and_every_crop_has_its_label() -> None:
    m, source = method()
    m.on_epoch_start(source, 0)
    m.labels.copy_(torch.tensor([0] * 18 + [1] * 3 + [2] * 2 + [3]))  # 24 crops, clusters of unequal size
    plain = {
        "edge": 1.0,
        "box": (1.0, 1.0),
        "flip_p": 0.0,
        "contrast_p": 0.0,
        "gamma_p": 0.0,
        "blur_p": 0.0,
        "noise_p": 0.0,
    }
    object.__setattr__(
        m, "config", m.config.model_copy(update={"views": m.config.views.model_copy(update=plain)})
    )
    crops = torch.stack([source.fixed_crop(v, j) for v in range(6) for j in range(4)])
    views = m.views(torch.zeros(800, 1, 12, 12, 12), BatchRng(0, 0, range(800)))
    drawn = []
    for view, label in zip(views["view"], views["label"].tolist(), strict=True):
        (index,) = (crops - view).abs().flatten(1).amax(1).lt(1e-4).nonzero()[:, 0].tolist()
        assert m.labels[index] == label
        drawn.append(index)
    counts = np.bincount(m.labels[drawn].numpy())
    assert counts.min() > 160 and counts.max() < 240, (
        "200 each, although the clusters have 18, 3, 2 and 1 crops"
    )
    assert set(drawn) == set(range(24)), "every crop of a cluster"


def test_a_classifier_has_time_to_learn_its_clusters() -> None:
    m, source = method()  # 2 crops a step of 6 volumes: 100 steps are 34 passes
    m.on_epoch_start(source, 0)
    m.on_epoch_start(source, 33)
    assert int(m.clustered) == 0
    m.on_step_end(Progress(61, 100))
    m.on_epoch_start(source, 34)
    assert int(m.clustered) == 0, "the last clusters stay for the rest of the run"
    m.on_step_end(Progress(59, 100))
    m.on_epoch_start(source, 34)
    assert int(m.clustered) == 34


def test_clustering_resets_the_classifier_and_normalises_the_features() -> None:
    m, source = method(recluster_every=4)
    m.on_epoch_start(source, 0)
    first = m.classifier.linear.weight.detach().clone()
    assert 0.005 < float(first.std()) < 0.02 and not m.classifier.linear.bias.any()
    halved = [torch.nn.functional.avg_pool3d(m.crop(i)[None], 2) for i in range(24)]  # the size of a view
    features = torch.cat([m.backbone.encode(x)[-1].mean((2, 3, 4)) for x in halved]).detach()
    torch.testing.assert_close(m.classifier.norm.mean, features.mean(0))
    labels = m.labels.clone()
    # Four passes over the volumes are one over the crops, of which there are four a volume.
    with torch.no_grad():
        m.classifier.linear.weight.fill_(7.0)
    for epoch in (1, 2, 3):
        m.on_epoch_start(source, epoch)
        assert bool((m.classifier.linear.weight == 7).all())
    m.on_epoch_start(source, 4)
    assert (
        not torch.equal(m.classifier.linear.weight, first)
        and float(m.classifier.linear.weight.detach().std()) < 0.02
    )
    # The network did not change, so the clusters are the same up to their order.
    assert float(m.stability) > 0.3 and len(m.labels.unique()) == len(labels.unique()) == 4
    often, _ = method(recluster_every=1)
    often.on_epoch_start(source, 0)
    often.on_epoch_start(source, 1)
    assert int(often.clustered) == 1


def test_more_clusters_than_crops_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"clusters = 25, but there are 24 crops .*6 volumes x .* = 4.*clusters=3"
    ):
        method(clusters=25)
    method(clusters=24)
    settings = Settings.model_validate(
        {"backbone": {"channels": [8, 16]}, "pretrain": {"crop": 8, "steps": 2}}
    )
    spec = resolve_method("deepcluster", {})
    with pytest.raises(ConfigError, match="clusters = 16, but there are 12 crops"):
        pretrain(spec, noise_cohort(3), settings, 0, tmp_path / "r", CPU)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_resumed_run_has_the_same_clusters_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Stopped before, between and after clusterings (steps 0, 3, 6): the labels come from the checkpoint."""
    spec = resolve_method(
        "deepcluster",
        {"deepcluster": {"clusters": 3, "crops_per_volume": 2, "recluster_every": 1, "cluster_until": 1.0}},
    )
    options = {
        "crop": 8,
        "batch_size": 2,
        "steps": 9,
        "lr": 1e-3,
        "checkpoint_every": 1,
        "monitor_every": 3,
        "log_every": 1,
    }
    settings = Settings.model_validate(
        {"backbone": {"channels": [8, 16]}, "pretrain": {**options, "workers": 0}}
    )

    def run(out: str, resume: bool = False) -> None:
        pretrain(spec, noise_cohort(6), settings, 0, tmp_path / out, CPU, resume=resume)

    run("whole")
    original = DeepCluster.views

    def stopping(self: DeepCluster, x: torch.Tensor, rng: BatchRng) -> dict[str, torch.Tensor]:
        if rng.step == stop:
            raise KeyboardInterrupt
        return original(self, x, rng)

    with monkeypatch.context() as patch:
        patch.setattr(DeepCluster, "views", stopping)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    run("cut", resume=True)
    whole, cut = (max((tmp_path / name).glob("state-*.safetensors")) for name in ("whole", "cut"))
    a, b = load_tensors(whole), load_tensors(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert any(0 < entry.get("cluster_stability", 0) <= 1 for entry in log)
