"""What evaluation costs: windows by the batch, features kept once, validations within a share of training."""

from __future__ import annotations

from typing import Any

import monai.inferers
import numpy as np
import pytest
import torch
from cohorts import MemoryCohort, noise_cohort, sphere_cohort

from ssl3d.bench.cell import TaskData
from ssl3d.bench.run import Bench, Grid, Pretraining
from ssl3d.config import BackboneConfig, DownstreamConfig, FinetuneConfig, Settings
from ssl3d.data.splits import Split
from ssl3d.downstream.harness import Evaluation, evaluate, validation_interval
from ssl3d.downstream.problems.classification import Classification
from ssl3d.downstream.problems.frozen import FeatureStore
from ssl3d.downstream.problems.kinds import make_problem
from ssl3d.downstream.problems.segmentation import Segmentation
from ssl3d.downstream.tasks import Task
from ssl3d.models.factory import build_backbone
from ssl3d.pretrain.spec import resolve_method
from ssl3d.results.store.store import ResultStore

SEG = Task("seg", "SEG", "segmentation", "memory", "dsc", (4, 2, 2))
CLS = Task("cls", "CLS", "classification", "memory", "auc", (12, 6, 6))
CPU = torch.device("cpu")
NET = BackboneConfig(channels=[8, 16])  # type: ignore[call-arg]


def problem(task: Task, cohort: MemoryCohort, mode: str = "linear", **options: Any) -> Any:
    config = DownstreamConfig.model_validate({"crop": 12, **options})
    return make_problem(build_backbone(NET, 0), task, cohort, mode, config, CPU)  # type: ignore[arg-type]


# --- Windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
def test_voxels_of_a_prediction_are_those_that_pass_the_network(
    monkeypatch: pytest.MonkeyPatch, overlap: float
) -> None:
    cohort = MemoryCohort(
        [np.zeros(s, np.float32) for s in ((12, 12, 12), (13, 24, 25), (4, 40, 18))], label_names=["a"]
    )
    found = problem(SEG, cohort, overlap=overlap)
    passed: list[int] = []
    monkeypatch.setattr(
        found.backbone, "forward", lambda x: (passed.append(x.numel()), (None, x.repeat(1, 8, 1, 1, 1)))[1]
    )
    for case in range(3):
        passed.clear()
        found.features(case)
        assert sum(passed) == found.voxels_predicted(case)


@pytest.mark.parametrize("windows", [2, 3, 100, "auto"])
def test_windows_together_give_what_they_give_one_by_one(windows: int | str) -> None:
    cohort = noise_cohort(1, (20, 18, 17))
    one, many = (problem(SEG, cohort, windows=number) for number in (1, windows))
    torch.testing.assert_close(one.features(0), many.features(0), rtol=1e-5, atol=1e-5)


def test_auto_takes_as_many_windows_as_the_device_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(x: torch.Tensor, roi: Any, together: int, *more: Any, **options: Any) -> torch.Tensor:
        seen.append(together)
        return x

    monkeypatch.setattr(monai.inferers, "sliding_window_inference", spy)
    for crop in (16, 40, 128):
        problem(SEG, noise_cohort(1), crop=crop).features(0)
    assert seen == [31, 2, 1]


# --- Features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budgets", [(64, 64), (0, 64), (0, 0)])
def test_features_in_bfloat16_are_rounded_alike_wherever_they_are_kept(budgets: tuple[int, int]) -> None:
    exact = torch.rand(1, 5, 4, 3, 2)
    options = dict(zip(("feature_budget_mib", "feature_disk_mib"), budgets, strict=True))
    store = FeatureStore(lambda _: exact, DownstreamConfig(feature_precision="bfloat16", **options))  # type: ignore[arg-type]
    for _ in range(2):
        assert store[0].dtype == torch.float32 and torch.equal(store[0], exact.bfloat16().float())


def test_bfloat16_halves_what_a_budget_is_spent_on() -> None:
    calls: list[int] = []

    def compute(case: int) -> torch.Tensor:
        calls.append(case)
        return torch.zeros(1, 2**17)  # 0.5 MiB in float32

    for precision, kept in (("float32", 2), ("bfloat16", 4)):
        calls.clear()
        store = FeatureStore(
            compute, DownstreamConfig(feature_budget_mib=1, feature_disk_mib=0, feature_precision=precision)  # type: ignore[arg-type]
        )  # fmt: skip
        for case in [*range(6), *range(6)]:
            _ = store[case]
        assert len(calls) == 12 - kept


def test_a_probe_on_bfloat16_features_is_nearly_that_on_float32() -> None:
    scores = []
    for precision in ("float32", "bfloat16"):
        config = DownstreamConfig.model_validate(
            {"crop": 12, "linear": {"voxels": 100}, "feature_precision": precision}
        )
        ids = [f"case{i}" for i in range(8)]
        split = Split("test", tuple(ids[:4]), tuple(ids[4:6]), tuple(ids[6:]))
        found = evaluate(
            build_backbone(NET, 0), Evaluation(SEG, sphere_cohort(8), split, "linear", config, 0, CPU)
        )  # type: ignore[arg-type]
        scores.append(found.score)
    assert scores[0] == pytest.approx(scores[1], abs=1) and scores[0] != scores[1]


class _Named(MemoryCohort):
    """With what a cell asks of a prepared cohort."""

    fingerprint, skipped = "made-up", ()

    class preparation:
        uses_labels = False


@pytest.mark.parametrize(("task", "kind"), [(SEG, Segmentation), (CLS, Classification)])
def test_cells_of_one_backbone_and_task_share_its_features(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, smoke: Settings, task: Task, kind: type
) -> None:
    """Folds and modes read what one of them computed, fine-tuning nothing; scores are those of cells alone."""
    made = sphere_cohort(12)
    cohort = _Named(made.images, made.labels, made.targets, made.label_names)
    ids = [f"case{i}" for i in range(12)]
    turned = [ids[k:] + ids[:k] for k in (0, 2)]
    folds = [Split(f"fold{k}", tuple(i[:6]), tuple(i[6:8]), tuple(i[8:])) for k, i in enumerate(turned)]
    settings = smoke.model_copy(update={"backbone": NET})
    computed: list[int] = []
    original = kind.features  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "features", lambda self, case: (computed.append(case), original(self, case))[1])

    def scores(store: str, splits: list[Split], modes: list[Any]) -> list[float]:
        grid = Grid([resolve_method("scratch", {})], [TaskData(task, cohort, splits)], modes, [0])  # type: ignore[arg-type]
        bench = Bench(grid, Pretraining(None), settings, ResultStore(tmp_path / store), CPU)
        return [record["score"] for record, _ in bench.run()]

    together = scores("together", folds, ["linear", "knn"])
    assert sorted(computed) == list(range(12))
    alone = [
        scores(f"{mode}{k}", [fold], [mode]) for mode in ("linear", "knn") for k, fold in enumerate(folds)
    ]
    assert together == [score for (score,) in alone]
    computed.clear()
    stages = scores("stages", folds[:1], ["linear", "multiscale"])
    assert len(computed) == 24, "all stages of the encoder are other features"
    assert stages == [together[0], *scores("stages alone", folds[:1], ["multiscale"])]
    computed.clear()
    scores("tuned", folds[:1], ["linear", "finetune", "knn"])
    assert len(computed) > 12, "fine-tuning lets the features go"


# --- Validations -----------------------------------------------------------------------------------


def tuned(task: Task, cohort: MemoryCohort, **budget: Any) -> tuple[Any, int]:
    found = problem(task, cohort, "finetune", finetune=FinetuneConfig(**budget))
    train, val = list(range(4)), [4, 5]
    return found, validation_interval(found, train, val)


def test_validations_cost_at_most_their_share_of_training() -> None:
    """Of CLS, two validation and four reference cases against three passes of a step's case."""
    cohort = sphere_cohort(6, edge=12)
    assert tuned(CLS, cohort, validate_every=1)[1] == 20  # 6 / (3 * 0.1)
    assert tuned(CLS, cohort, validate_every=8)[1] == 24, "a multiple of what was asked for"
    assert tuned(CLS, cohort, validate_every=50)[1] == 50
    assert tuned(CLS, cohort, validate_every=1, volumes=4)[1] == 5
    assert tuned(CLS, cohort, validate_every=1, validation_share=100)[1] == 1
    assert tuned(SEG, cohort, validate_every=1)[1] == 7  # two cases of one window
    assert tuned(SEG, sphere_cohort(6, edge=13), validate_every=1)[1] == 54  # and of eight


def test_fine_tuning_validates_at_the_interval_and_at_the_end() -> None:
    config = DownstreamConfig(crop=(12, 12, 12), finetune=FinetuneConfig(steps=50, validate_every=8))
    ids = [f"case{i}" for i in range(8)]
    split = Split("test", tuple(ids[:4]), tuple(ids[4:6]), tuple(ids[6:]))
    cohort = sphere_cohort(8, edge=12)
    found = evaluate(build_backbone(NET, 0), Evaluation(CLS, cohort, split, "finetune", config, 0, CPU))  # type: ignore[arg-type]
    assert [point["step"] for point in found.validation] == [24, 48, 50]
