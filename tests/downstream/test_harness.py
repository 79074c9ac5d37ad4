"""The downstream harness on small made-up cohorts: one function, both modes, both kinds."""

import numpy as np
import pytest
import scipy.linalg
import torch
from cohorts import MemoryCohort, sphere_cohort

from ssl3d.config import BackboneConfig, DownstreamConfig, FinetuneConfig
from ssl3d.data.splits import Split
from ssl3d.downstream.harness import Evaluation, Outcome, evaluate
from ssl3d.downstream.problems.frozen import FeatureStore
from ssl3d.downstream.problems.scaling import Standardize, Whiten
from ssl3d.downstream.tasks import Task
from ssl3d.errors import TrainingError
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import weights_fingerprint

SEG = Task("seg", "SEG", "segmentation", "memory", "dsc", (4, 2, 2))
CLS = Task("cls", "CLS", "classification", "memory", "auc", (12, 6, 6))
CPU = torch.device("cpu")


def split(n: tuple[int, int, int]) -> Split:
    ids = [f"case{i}" for i in range(sum(n))]
    return Split("test", tuple(ids[: n[0]]), tuple(ids[n[0] : n[0] + n[1]]), tuple(ids[n[0] + n[1] :]))


def config(steps: int = 40, lr: float = 0.01, **options: object) -> DownstreamConfig:
    tuned = FinetuneConfig(
        steps=steps, lr=lr, batch_size=2, volumes=2, validate_every=10, validation_share=100, loss="dice_ce"
    )
    linear = {"loss": "dice_ce", "voxels": 100}
    return DownstreamConfig.model_validate({"crop": 12, "linear": linear, "finetune": tuned, **options})


def backbone(seed: int = 0) -> Backbone:
    return build_backbone(BackboneConfig(channels=[8, 16]), seed)  # type: ignore[call-arg]


def run(task: Task, mode: str, cohort: MemoryCohort, cfg: DownstreamConfig, seed: int = 0) -> Outcome:
    counts = task.counts
    return evaluate(backbone(), Evaluation(task, cohort, split(counts), mode, cfg, seed, CPU))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_segmentation_learns_an_easy_task(mode: str) -> None:
    outcome = run(SEG, mode, sphere_cohort(8), config(80, 0.005))
    # A ball takes a tenth of the box. The linear probe sees eight random features only.
    assert outcome.score > (40 if mode == "linear" else 60)
    assert [c["case"] for c in outcome.per_case] == ["case6", "case7"]
    assert set(outcome.per_case[0]["structures"]) == {"bright", "dark"}
    assert outcome.score == pytest.approx(100 * np.mean([c["dsc"] for c in outcome.per_case]))


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_classification_learns_an_easy_task(mode: str) -> None:
    outcome = run(CLS, mode, sphere_cohort(24, edge=12), config(40, 0.003))
    assert outcome.score > 70 and not outcome.constant_output
    assert all(0 <= c["probability"] <= 1 and c["target"] in (0, 1) for c in outcome.per_case)


def test_linear_leaves_the_backbone_alone_and_trains_only_the_head() -> None:
    net = backbone()
    before = weights_fingerprint(net)
    linear = evaluate(net, Evaluation(SEG, sphere_cohort(8), split((4, 2, 2)), "linear", config(5), 0, CPU))  # type: ignore[arg-type]
    assert weights_fingerprint(net) == before
    assert linear.parameters_trained == 8 * 3 + 3
    tuned = evaluate(net, Evaluation(SEG, sphere_cohort(8), split((4, 2, 2)), "finetune", config(5), 0, CPU))  # type: ignore[arg-type]
    assert weights_fingerprint(net) != before
    assert tuned.parameters_trained > linear.parameters_trained


def test_same_seed_same_result_other_seed_other_result() -> None:
    cohort = sphere_cohort(8)
    first, again, other = (run(SEG, "finetune", cohort, config(6), seed) for seed in (0, 0, 1))
    assert (first.per_case, first.validation) == (again.per_case, again.validation)
    assert first.per_case != other.per_case


def test_features_in_memory_on_disk_and_on_the_fly_give_the_same_result() -> None:
    cohort = sphere_cohort(8)
    results = [
        run(SEG, "linear", cohort, config(12, feature_budget_mib=memory, feature_disk_mib=disk))
        for memory, disk in ((64, 64), (0, 64), (0, 0))
    ]
    assert results[0].per_case == results[1].per_case == results[2].per_case


def test_feature_store_computes_once_unless_over_both_budgets() -> None:
    calls: list[int] = []

    def compute(case: int) -> torch.Tensor:
        calls.append(case)
        return torch.full((1, 2**17), float(case))  # 0.5 MiB

    store = FeatureStore(compute, DownstreamConfig(feature_budget_mib=1, feature_disk_mib=1))
    for _ in range(2):
        for case in range(5):
            assert store[case].unique().tolist() == [case]
    assert calls == [0, 1, 2, 3, 4, 4], "0 and 1 in memory, 2 and 3 on disk, 4 on the fly"


@pytest.mark.parametrize(("weights", "step"), [("best", 10), ("last", 40)])
def test_the_chosen_weights_are_tested_once(monkeypatch: pytest.MonkeyPatch, weights: str, step: int) -> None:
    """The first of two best validations wins, or the last weights do, whatever their validation."""
    from ssl3d.downstream.problems import segmentation as harness

    tests: list[int] = []
    scores = iter([(0.9, 0), (0.1, 0), (0.9, 0), (0.3, 0)])
    kept: list[torch.Tensor] = []

    def validate(self, head, cases):  # type: ignore[no-untyped-def]
        kept.append(head.weight.detach().clone())
        return next(scores)

    original = harness.Segmentation.test

    def spy(self, head, cases):  # type: ignore[no-untyped-def]
        tests.append(len(cases))
        spy.weight = head.weight.detach().clone()
        return original(self, head, cases)

    monkeypatch.setattr(harness.Segmentation, "validate", validate)
    monkeypatch.setattr(harness.Segmentation, "test", spy)
    cfg = config(40)
    cfg = cfg.model_copy(update={"finetune": cfg.finetune.model_copy(update={"weights": weights})})
    outcome = run(SEG, "finetune", sphere_cohort(8), cfg)
    assert outcome.best_step == step and tests == [2]
    assert torch.equal(kept[step // 10 - 1], spy.weight)  # type: ignore[attr-defined]
    assert not torch.equal(kept[0], kept[3])


def test_how_often_is_validated_changes_nothing_in_training() -> None:
    """The readout's statistics are measured anew for a validation, and put back."""
    cohort, ends = sphere_cohort(24, edge=12), []
    for every in (1, 4):
        cfg = config(4)
        cfg = cfg.model_copy(
            update={"finetune": cfg.finetune.model_copy(update={"validate_every": every, "weights": "last"})}
        )
        outcome = run(CLS, "finetune", cohort, cfg)
        ends.append((outcome.per_case, outcome.validation[-1]))
    assert ends[0] == ends[1]


def test_the_gradient_is_clipped_to_the_norm_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain gradient descent at rate 1, a step is as long as the gradient: never above the bound."""
    from ssl3d.downstream.problems import segmentation as harness

    net = backbone()
    places: list[torch.Tensor] = []
    original = harness.Segmentation.loss

    def spy(self, head, cases, step, seed):  # type: ignore[no-untyped-def]
        parameters = [*head.parameters(), *net.parameters()]
        places.append(torch.cat([p.detach().flatten() for p in parameters]))
        return original(self, head, cases, step, seed)

    monkeypatch.setattr(harness.Segmentation, "loss", spy)
    lengths = []
    for bound in (None, 0.01):
        places.clear()
        net.load_state_dict(backbone().state_dict())
        cfg = config(4, lr=1.0)
        tuned = cfg.finetune.model_copy(update={"optimizer": "momentum", "clip_grad": bound})
        cfg = cfg.model_copy(update={"finetune": tuned})
        evaluate(net, Evaluation(SEG, sphere_cohort(8), split((4, 2, 2)), "finetune", cfg, 0, CPU))  # type: ignore[arg-type]
        lengths.append(float((places[1] - places[0]).norm()))
    assert lengths[0] > 0.05 and lengths[1] == pytest.approx(0.01, rel=1e-3)


def test_volumes_smaller_and_larger_than_the_window() -> None:
    big, small = sphere_cohort(4, edge=19), sphere_cohort(4, edge=11)
    mixed = MemoryCohort(big.images + small.images, big.labels + small.labels, [], ["bright", "dark"])
    outcome = run(SEG, "linear", mixed, config(3))
    assert len(outcome.per_case) == 2


def test_a_3x3x3_head_is_available_under_its_own_option() -> None:
    outcome = run(SEG, "linear", sphere_cohort(8), config(2, head_kernel=3))
    assert outcome.parameters_trained == 27 * 8 * 3 + 3


def test_standardize_is_affine_and_exact() -> None:
    x = torch.randn(2, 3, 4, 5, 6) * torch.tensor([1.0, 5, 9]).view(1, 3, 1, 1, 1) + 7
    flat = x.transpose(0, 1).flatten(1)
    y = Standardize(flat.mean(dim=1), flat.std(dim=1, correction=0))(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(dim=1, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_whiten_is_affine_and_removes_correlations() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 4))
    flat = mix @ rng.normal(size=(4, 500)) + rng.normal(size=(4, 1))  # (C, N) float64
    covariance = np.cov(flat, bias=True)
    whiten = Whiten(torch.tensor(flat.mean(axis=1)).float(), torch.tensor(covariance))
    y = whiten(torch.tensor(flat).float().reshape(1, 4, 5, 10, 10))[0].flatten(1).numpy()
    expected = np.linalg.inv(scipy.linalg.sqrtm(covariance)) @ (flat - flat.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(y, expected, atol=0.02)
    np.testing.assert_allclose(np.cov(y, bias=True), np.eye(4), atol=0.01)


def test_whiten_leaves_dead_channels_small() -> None:
    """A channel that is constant up to rounding must not become noise of unit size."""
    flat = torch.cat([torch.randn(2, 1000), 1e-6 * torch.randn(1, 1000)]).double()
    y = Whiten(flat.mean(dim=1).float(), torch.cov(flat, correction=0))(flat.float()[None])[0]
    assert y[2].std() < 0.01
    assert bool((y[:2].std(dim=1) > 0.9).all())


def test_a_probe_learns_from_features_that_hardly_differ() -> None:
    """Two channels that share a large common part: a probe that is trained for some steps crawls along their difference."""

    class Correlated(torch.nn.Module):
        local_channels = 2

        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
            common = torch.sin(7.0 * torch.arange(x.shape[-1])).expand_as(x)
            return None, torch.cat(
                [common + self.share * x, common - self.share * x], dim=1
            )  # (B, 2, D, H, W)

    easy, hard = (
        evaluate(
            Correlated(s), Evaluation(SEG, sphere_cohort(8), split((4, 2, 2)), "linear", config(), 0, CPU)
        ).score  # type: ignore[arg-type]
        for s in (1.0, 0.02)
    )
    assert hard == pytest.approx(easy, abs=3)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_volume_alone_fine_tunes_a_readout(batch: int) -> None:
    """The common part of pooled features is what a bare linear layer follows."""
    cfg = config(60, 0.003)
    cfg = cfg.model_copy(
        update={"finetune": cfg.finetune.model_copy(update={"volumes": batch, "warmup_steps": 10})}
    )
    outcome = run(CLS, "finetune", sphere_cohort(24, edge=12), cfg)
    assert outcome.score > 70 and not outcome.constant_output


class Blind(torch.nn.Module):
    """Its features are the same for every volume."""

    global_channels = local_channels = 4

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ones(len(x), 4, 1, 1, 1) + 0 * x.mean()]

    def minimum_edge(self) -> int:
        return 1


@pytest.mark.parametrize("mode", ["linear", "finetune", "knn"])
def test_outputs_that_do_not_differ_are_marked(mode: str) -> None:
    outcome = evaluate(
        Blind(), Evaluation(CLS, sphere_cohort(24, edge=12), split((12, 6, 6)), mode, config(4), 0, CPU)
    )  # type: ignore[arg-type]
    assert outcome.constant_output
    assert not run(SEG, "linear", sphere_cohort(8), config()).constant_output


def test_a_loss_that_is_not_finite_stops_with_its_name() -> None:
    cohort = sphere_cohort(8)
    cohort.images[0] = np.full_like(cohort.images[0], np.inf)
    with pytest.raises(TrainingError, match=r"seg finetune: loss = nan at step \d.*downstream.finetune.lr"):
        run(SEG, "finetune", cohort, config(4))
