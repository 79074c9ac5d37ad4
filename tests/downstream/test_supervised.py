"""The augmentation of fine-tuning: labels follow their image, and it is what it says and nothing else."""

import pytest
import torch
from cohorts import MemoryCohort, sphere_cohort
from test_harness import CLS, CPU, SEG, backbone, config, run
from torch import Tensor

from ssl3d.config import DownstreamConfig, load_settings
from ssl3d.downstream.problems.kinds import make_problem
from ssl3d.downstream.tasks import Task
from ssl3d.errors import ConfigError
from ssl3d.rng import BatchRng
from ssl3d.transforms.supervised import Augmentation


def ball(edge: int = 32) -> Tensor:
    """Return a ball off the centre, (1, 1, D, H, W) int64."""
    d, h, w = torch.meshgrid(*[torch.arange(edge, dtype=torch.float32)] * 3, indexing="ij")
    inside = (d - 0.4 * edge) ** 2 + (h - 0.5 * edge) ** 2 + (w - 0.6 * edge) ** 2 < (edge / 4) ** 2
    return inside[None, None].long()


def rng(step: int, size: int = 1) -> BatchRng:
    return BatchRng(0, step, range(size))


def augmenting(cfg: DownstreamConfig) -> DownstreamConfig:
    return cfg.model_copy(update={"finetune": cfg.finetune.model_copy(update={"augment": True})})


@pytest.mark.parametrize("step", range(8))
def test_labels_go_where_their_image_goes(step: int) -> None:
    labels = ball()
    augmentation = Augmentation(labels.shape[2:], rng(step))
    x, y = augmentation.image(0.2 + 0.6 * labels.float()), augmentation.labels(labels)
    assert y.dtype == labels.dtype and set(y.unique().tolist()) == {0, 1}
    assert float(x.min()) >= 0 and float(x.max()) <= 1
    # The threshold is between two tissues in whatever appearance; what comes from outside (0) is background.
    threshold = (x[y == 1].median() + x[(y == 0) & (x > 0)].median()) / 2
    found = x > threshold
    assert 2 * (found & (y == 1)).sum() / (found.sum() + y.sum()) > 0.95
    overlap = 2 * ((labels == 1) & (y == 1)).sum() / (labels.sum() + y.sum())
    assert overlap < 0.97  # it did move


def test_every_sample_and_step_has_its_own_draw_and_the_same_one_again() -> None:
    volumes = ball().float().repeat(2, 1, 1, 1, 1)  # (2, 1, D, H, W)

    def view(x: Tensor, step: int) -> Tensor:
        return Augmentation(x.shape[2:], rng(step, len(x))).image(x)

    first = view(volumes, 3)
    assert torch.equal(first, view(volumes, 3))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, view(volumes, 4))
    # Whatever its neighbours, up to the rounding of sums of other lengths.
    torch.testing.assert_close(first[:1], view(volumes[:1], 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("task", "cohort"),
    [(SEG, sphere_cohort(8)), (CLS, sphere_cohort(24, edge=12))],
    ids=["volumes", "vectors"],
)
def test_training_is_augmented_and_evaluation_is_not(task: Task, cohort: MemoryCohort) -> None:
    plain, augmented = (
        make_problem(backbone(), task, cohort, "finetune", cfg, CPU)  # type: ignore[arg-type]
        for cfg in (config(), augmenting(config()))
    )
    head = plain.make_head([0, 1]).eval()  # a readout in training remembers what it has seen
    losses = [problem.loss(head, [0, 1], 0, 0).item() for problem in (plain, augmented, augmented)]
    assert losses[0] != losses[1] == losses[2]
    assert losses[1] != augmented.loss(head, [0, 1], 1, 0).item()
    assert torch.equal(plain.predict(head, 0), augmented.predict(head, 0))


def test_augmented_fine_tuning_learns_an_easy_task() -> None:
    assert run(SEG, "finetune", sphere_cohort(8), augmenting(config(80, 0.005))).score > 60


def test_frozen_features_are_not_augmented() -> None:
    assert load_settings("smoke", ["downstream.finetune.augment=true"], []).downstream.finetune.augment
    with pytest.raises(ConfigError, match=r"downstream\.linear.*solved, not trained, and has no augment"):
        load_settings("smoke", ["downstream.linear.augment=true"], [])
