"""Contrastive losses against slow forms written from the papers, in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ssl3d import ranks
from ssl3d.errors import ConfigError
from ssl3d.losses import alignment, cosine_distance, negative_cosine, nt_xent, uniformity


def vectors(n: int, c: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, c, generator=g, dtype=torch.float64).unbind(0)


def cosine(u: Tensor, v: Tensor) -> float:
    dot = sum(float(a * b) for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(float(a) ** 2 for a in u)) / math.sqrt(sum(float(b) ** 2 for b in v))


def slow_nt_xent(a: Tensor, b: Tensor, temperature: float, identity: list[int] | None = None) -> float:
    """Chen et al. 2020, eq. 1 and algorithm 1: views 2k - 1 and 2k of sample k follow each other."""
    z = [view for pair in zip(a, b, strict=True) for view in pair]
    shown = [i for k in range(len(a)) for i in [identity[k] if identity else k] * 2]
    total = 0.0
    for i in range(len(z)):
        positive = i + 1 if i % 2 == 0 else i - 1
        denominator = 0.0
        for k in range(len(z)):
            if k == positive or shown[k] != shown[i]:
                denominator += math.exp(cosine(z[i], z[k]) / temperature)
        total += -math.log(math.exp(cosine(z[i], z[positive]) / temperature) / denominator)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("n", [2, 5])
def test_nt_xent_equals_the_paper(n: int, temperature: float) -> None:
    a, b = vectors(n)
    assert float(nt_xent(a, 3 * b, temperature)) == pytest.approx(slow_nt_xent(a, b, temperature), rel=1e-12)
    assert float(nt_xent(a.float(), b.float(), temperature)) == pytest.approx(
        slow_nt_xent(a, b, temperature), rel=1e-5
    )


def test_nt_xent_leaves_crops_of_the_same_volume_out() -> None:
    a, b = vectors(4)
    identity = [7, 3, 7, 7]
    masked = float(nt_xent(a, b, 0.5, torch.tensor(identity)))
    assert masked == pytest.approx(slow_nt_xent(a, b, 0.5, identity), rel=1e-12)
    assert masked < float(nt_xent(a, b, 0.5)), "fewer negatives"
    a.requires_grad_()
    alone = nt_xent(a, b, 0.5, torch.tensor([7, 7, 7, 7]))
    alone.backward()
    assert float(alone.detach()) == 0 and float(a.grad.abs().max()) == 0, "no negatives, nothing to learn"


def test_nt_xent_of_one_sample_is_refused() -> None:
    a, b = vectors(1)
    with pytest.raises(ConfigError, match="a batch of at least 2"):
        nt_xent(a, b, 0.5)


def test_nt_xent_gradient() -> None:
    a, b = vectors(3)
    a.requires_grad_()
    b.requires_grad_()
    shown = torch.tensor([0, 1, 0])
    assert torch.autograd.gradcheck(lambda u, v: nt_xent(u, v, 0.3, shown), (a, b))


def test_losses_stay_in_full_precision_under_autocast() -> None:
    a, b = (v.float() for v in vectors(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (nt_xent, lambda u, v, t: cosine_distance(u, v)):
            assert loss(a, b, 0.1).dtype == torch.float32
            torch.testing.assert_close(loss(a, b, 0.1), loss(a.double(), b.double(), 0.1).float())


IDENTITY = [4, 9, 4, 2, 7]


def _one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = ranks.own(5)  # three and two
    a, b = (v[own].clone().requires_grad_() for v in vectors(5))
    with ranks.together(5):
        loss = ranks.share() * nt_xent(a, b, 0.2, torch.tensor(IDENTITY)[own])
        loss.backward()
    torch.save((loss.detach(), a.grad, b.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(_one_process, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    a, b = (v.clone().requires_grad_() for v in vectors(5))
    loss = nt_xent(a, b, 0.2, torch.tensor(IDENTITY))
    loss.backward()
    torch.testing.assert_close(results[0][0] + results[1][0], loss.detach())
    for place, whole in ((1, a.grad), (2, b.grad)):
        torch.testing.assert_close(torch.cat([r[place] for r in results]), whole)


def test_cosine_losses_equal_the_papers() -> None:
    p, z = vectors(5)
    # Grill et al., eq. 2: the squared distance of the normalised vectors.
    expected = sum(
        float(sum((a / u.norm() - b / v.norm()) ** 2 for a, b in zip(u, v, strict=True)))
        for u, v in zip(p, z, strict=True)
    ) / 5  # fmt: skip
    assert float(cosine_distance(p, z)) == pytest.approx(expected, rel=1e-12)
    # Chen & He, eq. 1.
    expected = -sum(cosine(u, v) for u, v in zip(p, z, strict=True)) / 5
    assert float(negative_cosine(p, z)) == pytest.approx(expected, rel=1e-12)
    assert float(cosine_distance(p, 2 * p)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_distance(p, -p)) == pytest.approx(4)
    p.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: cosine_distance(u, z), p)


def test_alignment_and_uniformity_equal_the_paper() -> None:
    a, b = vectors(7)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    assert float(alignment(a, b)) == pytest.approx(
        sum(2 - 2 * cosine(u, v) for u, v in zip(a, b, strict=True)) / 7, rel=1e-12
    )
    expected = math.log(sum(math.exp(-2 * (2 - 2 * cosine(a[i], a[j]))) for i, j in pairs) / len(pairs))
    assert float(uniformity(a)) == pytest.approx(expected, rel=1e-12)
    assert float(uniformity(torch.ones(4, 3))) == pytest.approx(0, abs=1e-6)
    assert float(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-8)
    assert float(alignment(a, 5 * a)) == pytest.approx(0, abs=1e-12)
