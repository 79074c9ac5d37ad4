"""SimCLR, BYOL and SimSiam: views, norms on small batches, targets, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cohorts import MemoryCohort, noise_cohort, sphere_cohort
from ssl3d_methods.byol import BYOL, momentum
from torch import Tensor, nn

from ssl3d.config import Settings
from ssl3d.errors import ConfigError, DataError
from ssl3d.models.factory import seeded
from ssl3d.models.heads import MLP
from ssl3d.pretrain.loop import check_run, measure, pretrain
from ssl3d.pretrain.method import Method, Progress
from ssl3d.pretrain.source import CropSource
from ssl3d.pretrain.spec import resolve_method
from ssl3d.rng import BatchRng
from ssl3d.testing.suite import Suite
from ssl3d.transforms import RandomViews

CONTRASTIVE = ("simsiam", "byol", "simclr")


def method(name: str, **options: Any) -> Method:
    return Suite(resolve_method(name, {name: options})).method()


def crops(batch: int = 2, edge: int = 16) -> Tensor:
    return torch.rand(batch, 1, edge, edge, edge, generator=torch.Generator().manual_seed(0))


def rng(batch: int = 2, step: int = 0, volumes: list[int] | None = None) -> BatchRng:
    return BatchRng(0, step, range(batch), keys=("views",), volumes=volumes)


def settings(**options: Any) -> Settings:
    base = {
        "steps": 3,
        "batch_size": 2,
        "crop": 8,
        "lr": 1e-3,
        "monitor_every": 2,
        "log_every": 1,
        "workers": 0,
    }
    return Settings.model_validate({"backbone": {"channels": [8, 16]}, "pretrain": {**base, **options}})


# Views ----------------------------------------------------------------------------------------


def test_all_contrastive_methods_see_the_same_views() -> None:
    first, *others = [method(name).views(crops(), rng()) for name in CONTRASTIVE]
    for views in others:
        assert torch.equal(views["first"], first["first"]) and torch.equal(views["second"], first["second"])
    assert not torch.equal(first["first"], first["second"])


def test_a_view_does_not_depend_on_its_neighbours_and_stays_in_range() -> None:
    x = crops(3)
    together = RandomViews().view(x, rng(3))
    alone = RandomViews().view(x[1:2], BatchRng(0, 0, [1], keys=("views",)))
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=0)
    assert together.shape == (3, 1, 8, 8, 8), "half the edge"
    assert RandomViews(edge=1).view(x, rng(3)).shape == x.shape
    assert RandomViews(edge=0.3).shape((16, 12, 1)) == (5, 4, 1)
    assert float(together.min()) >= 0 and float(together.max()) <= 1


def test_without_transforms_a_view_is_a_box_of_the_crop() -> None:
    off = RandomViews(flip_p=0, contrast_p=0, gamma_p=0, blur_p=0, noise_p=0, box=(1, 1), edge=1)
    torch.testing.assert_close(off.view(crops(), rng()), crops(), atol=1e-6, rtol=0)
    half = off.model_copy(update={"box": (0.5, 0.5)})
    ramp = torch.linspace(0, 1, 16).view(1, 1, 16, 1, 1).expand(1, 1, 16, 16, 16)
    view = half.view(ramp, rng(1))
    assert float(view.amax() - view.amin()) == pytest.approx(0.5 * 16 / 15 - 0.5 / 15, abs=0.02)
    flipped = off.model_copy(update={"flip_p": 1.0}).view(crops(), rng())
    torch.testing.assert_close(flipped, crops().flip(2, 3, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_ranges_of_the_views_are_checked(name: str) -> None:
    for options, message in (
        ({"box": [0.5, 1.2]}, "at most the edge of the crop"),
        ({"gamma": [0, 1]}, "0 < smallest <= largest"),
        ({"flip": 0.1}, 'unknown key "views.flip"'),
        ({"noise": 2}, "views.noise"),
    ):
        with pytest.raises(ConfigError, match=message):
            method(name, views=options)


# Norms ----------------------------------------------------------------------------------------


def test_batch_norm_over_two_samples_leaves_nothing_to_learn() -> None:
    """Why the methods normalise both views of all crops together."""
    with seeded(0, "projector"):
        projector = MLP((6, 8, 5), "batch", last="batch")
    steepest = []
    for samples in (2, 4):
        x = 10 * torch.randn(samples, 6, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        z = projector(x)
        assert torch.allclose(z[0], -z[1], atol=1e-3) is (samples == 2)
        (gradient,) = torch.autograd.grad(z[0].dot(torch.arange(5.0)), x)
        steepest.append(float(gradient.abs().max()))
    assert steepest[0] < 1e-3 * steepest[1]


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_embeddings_of_a_batch_of_two_are_not_each_others_negative(name: str, norm: str) -> None:
    m = method(name, norm=norm)
    seen: list[Tensor] = []
    m.projector.register_forward_hook(lambda module, args, output: seen.append(output))
    sum(m.training_step(m.views(crops(), rng())).values()).backward()  # type: ignore[union-attr]
    z = torch.cat([F.normalize(part, dim=1) for part in seen]).detach()  # (2B, C), both views
    assert len(z) == 4
    for i in range(4):
        for j in range(i):
            assert float(z[i] @ z[j]) > -0.999
    gradient = m.backbone.encoder[0][0].weight.grad
    assert gradient is not None and float(gradient.abs().max()) > 0


def test_projectors_are_built_as_in_the_papers() -> None:
    kinds = [type(layer).__name__ for layer in method("simsiam").projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"], (
        "three layers, norm at the end"
    )
    assert not method("simsiam").projector[-1].affine
    assert not list(method("simsiam", norm="layer").projector[-1].parameters())
    predictor = method("simsiam", embedding=64, bottleneck=16).predictor
    assert [type(layer).__name__ for layer in predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [(m.in_features, m.out_features) for m in predictor if isinstance(m, nn.Linear)] == [
        (64, 16),
        (16, 64),
    ]
    assert [type(m).__name__ for m in method("simclr").projector] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
        "Scale",
    ], "the output is normalised, with a factor and without offset"


def test_a_batch_of_one_is_refused_before_any_data_are_read_where_it_cannot_work() -> None:
    whole: dict[str, Any] = {"views": {"edge": 1}}
    with pytest.raises(
        ConfigError, match=r"simclr needs 2 items a step, .* 2 views of 8x8x8 .* of at least 4"
    ):
        check_run(resolve_method("simclr", {"simclr": whole}), settings(batch_size=2), 0)
    check_run(resolve_method("simclr", {"simclr": whole}), settings(batch_size=4), 0)
    for name in ("byol", "simsiam"):
        with pytest.raises(
            ConfigError, match=rf"{name}.norm=batch needs at least 2 .*, not 1.*{name}.norm=layer"
        ):
            check_run(resolve_method(name, {name: whole}), settings(batch_size=2), 0)
        check_run(resolve_method(name, {name: {**whole, "norm": "layer"}}), settings(batch_size=2), 0)


@pytest.mark.parametrize("name", (*CONTRASTIVE, "deepcluster"))
def test_samples_are_compared_with_enough_others_at_the_voxels_of_every_method(name: str) -> None:
    m = method(name)
    items = m.items_per_step((32, 32, 32), 2)
    views = m.views_per_item * items
    assert views == 16 and views * 16**3 == 2 * 32**3
    assert m.voxels_per_item((32, 32, 32)) * items == 2 * 32**3


# SimCLR ---------------------------------------------------------------------------------------


def test_simclr_does_not_push_two_crops_of_one_volume_apart() -> None:
    m = method("simclr")
    views = m.views(crops(3), rng(3, volumes=[5, 2, 5]))
    assert views["volume"].tolist() == [5, 2, 5]
    x = torch.cat([views["first"], views["second"]])
    with torch.no_grad():
        z = F.normalize(m.projector(m.backbone.encode(x)[-1].mean((2, 3, 4))), dim=1).double()
        loss = float(m.training_step(views)["nt_xent"])
    shown, total = [5, 2, 5] * 2, 0.0
    for i in range(6):
        others = [k for k in range(6) if shown[k] != shown[i]]
        positive = math.exp(float(z[i] @ z[(i + 3) % 6]) / 0.5)
        total -= math.log(positive / (positive + sum(math.exp(float(z[i] @ z[k]) / 0.5) for k in others)))
    assert loss == pytest.approx(total / 6, rel=1e-4)


def test_the_loop_tells_simclr_which_volumes_a_batch_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssl3d_methods.simclr import SimCLR

    seen = []
    original = SimCLR.training_step
    monkeypatch.setattr(
        SimCLR,
        "training_step",
        lambda m, views: (seen.append(views["volume"].tolist()), original(m, views))[1],
    )
    cohort = noise_cohort(3)
    pretrain(resolve_method("simclr", {}), cohort, settings(), 0, tmp_path / "r", torch.device("cpu"))
    source = CropSource(cohort, (8, 8, 8), 8, 1, 0)
    # Eight held-back batches before training, then two steps until these are scored again.
    assert seen[8:10] == [source.batch(step).volumes for step in range(2)]


def test_simclr_needs_two_volumes() -> None:
    one = CropSource(MemoryCohort(noise_cohort(1).images), (8, 8, 8), 2, 1, 0)
    with pytest.raises(DataError, match="at least 2 volumes"):
        method("simclr").setup(one)


# BYOL -----------------------------------------------------------------------------------------


def test_the_momentum_goes_from_its_base_to_one() -> None:
    assert momentum(0, 1000, 0.996) == 0.996
    assert momentum(1000, 1000, 0.996) == 1.0
    assert momentum(500, 1000, 0.996) == pytest.approx(0.998)
    values = [momentum(k, 1000, 0.9) for k in range(1001)]
    assert values == sorted(values)


def test_the_target_follows_with_the_momentum_of_the_step() -> None:
    for step, tau in ((1, 0.99), (5, 1 - 0.01 * (math.cos(math.pi * 4 / 10) + 1) / 2)):
        m = method("byol", base_momentum=0.99)
        with torch.no_grad():
            for parameter in m.backbone.encoder.parameters():
                parameter += 1
        before = {k: v.clone() for k, v in m.target.named_parameters()}
        m.on_step_end(Progress(step, 10))
        for name, value in m.target.named_parameters():
            torch.testing.assert_close(value, tau * before[name] + (1 - tau) * m.backbone.get_parameter(name))


def test_the_target_is_a_copy_without_gradient_with_the_online_buffers_and_no_decoder() -> None:
    m = method("byol")
    assert isinstance(m, BYOL)
    online = dict(m.backbone.encoder.named_parameters())
    assert online and all(torch.equal(v, online[k]) for k, v in m.target.encoder.named_parameters())
    assert all(
        torch.equal(v, m.projector.state_dict()[k]) for k, v in m.target_projector.state_dict().items()
    )
    assert not any(p.requires_grad for p in (*m.target.parameters(), *m.target_projector.parameters()))
    assert not list(m.target.decoder.parameters())
    for step in range(2):
        losses = m.training_step(m.views(crops(), rng(step=step)))
        sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in (*m.target.parameters(), *m.target_projector.parameters()))
    with torch.no_grad():
        m.projector[1].running_mean += 3
    m.on_step_end(Progress(1, 10))
    assert torch.equal(m.target_projector[1].running_mean, m.projector[1].running_mean)


def test_byols_loss_is_symmetric_and_crosses_the_views() -> None:
    m = method("byol", norm="layer")
    views = m.views(crops(), rng())
    del views["volume"]
    with torch.no_grad():
        f = {k: m.backbone.encode(v)[-1].mean((2, 3, 4)) for k, v in views.items()}
        q = {k: F.normalize(m.predictor(m.projector(v)), dim=1) for k, v in f.items()}
        z = {
            k: F.normalize(m.target_projector(v), dim=1) for k, v in f.items()
        }  # the target starts as a copy
        losses = m.training_step(views)
        swapped = m.training_step({"first": views["second"], "second": views["first"]})
    torch.testing.assert_close(losses["first"], (q["first"] - z["second"]).square().sum(1).mean())
    torch.testing.assert_close(losses["second"], (q["second"] - z["first"]).square().sum(1).mean())
    torch.testing.assert_close(sum(losses.values()), sum(swapped.values()))


# SimSiam --------------------------------------------------------------------------------------


def test_simsiams_gradient_is_that_of_constant_targets() -> None:
    """Algorithm 1: L = D(p1, z2) / 2 + D(p2, z1) / 2 with z held constant."""
    m = method("simsiam", norm="layer")
    views = m.views(crops(), rng())
    weight = m.projector[0].weight
    (ours,) = torch.autograd.grad(sum(m.training_step(views).values()), weight)  # type: ignore[arg-type]
    f = [m.backbone.encode(views[k])[-1].mean((2, 3, 4)) for k in ("first", "second")]
    z = [m.projector(v) for v in f]
    p = [m.predictor(v) for v in z]
    fixed = [torch.tensor(v.detach().numpy()) for v in z]
    loss = -(F.cosine_similarity(p[0], fixed[1]).mean() + F.cosine_similarity(p[1], fixed[0]).mean()) / 2
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    torch.testing.assert_close(ours, expected)
    leaky = -(F.cosine_similarity(p[0], z[1]).mean() + F.cosine_similarity(p[1], z[0]).mean()) / 2
    (other,) = torch.autograd.grad(leaky, weight)
    assert not torch.allclose(ours, other)


# Monitoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_alignment_uniformity_and_collapse_of_the_embedding_are_measured(name: str) -> None:
    m = method(name)
    source = CropSource(sphere_cohort(6), (12, 12, 12), 2, 1, 0)
    probe = torch.stack([source.fixed_crop(v) for v in range(6)])
    state = {k: v.clone() for k, v in m.state_dict().items()}
    measures = measure(m, probe, 0)
    assert measures == measure(m, probe, 0), "the same views each time"
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items()), "measuring changes nothing"
    assert set(measures) == {"feature_std", "effective_rank", "alignment", "uniformity", "embedding_std"}
    assert measures["alignment"] > 0 > measures["uniformity"] and measures["embedding_std"] > 0.1
    with torch.no_grad():
        for layer in m.projector:
            if isinstance(layer, nn.Linear):
                layer.weight.zero_()  # every embedding is the same
    assert measure(m, probe, 0)["embedding_std"] < 1e-3
