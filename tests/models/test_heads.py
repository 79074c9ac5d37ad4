"""The readout of pooled features: any batch, statistics in buffers, and why it is there."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.models.heads import PooledLinear, PooledNorm, pool


def draw(n: int, channels: int = 5, seed: int = 0) -> Tensor:
    """Features (n, channels) of which nearly all energy is common, as in a mean-pooled f^g."""
    rng = torch.Generator().manual_seed(seed)
    common = 1 + torch.rand(channels, generator=rng)
    return common + 0.05 * torch.randn(n, channels, generator=rng)


def test_pool_is_the_mean_over_voxels_of_the_deepest_stage() -> None:
    deepest = torch.rand(2, 3, 2, 4, 5)
    by_hand = [[float(deepest[b, c].numpy().mean()) for c in range(3)] for b in range(2)]
    pooled = pool([torch.rand(2, 1, 4, 8, 10), deepest.bfloat16()])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.tensor(by_hand), atol=0.01, rtol=0)


def test_the_first_batch_and_large_ones_are_normalised_as_in_batch_norm() -> None:
    x = draw(8)
    batch_norm = nn.BatchNorm1d(5, affine=False, eps=1e-6)
    torch.testing.assert_close(PooledNorm(5)(x), batch_norm(x))
    norm = PooledNorm(5, memory=0)
    norm(draw(8, seed=1))
    torch.testing.assert_close(norm(x), batch_norm(x))


def test_the_past_counts_as_memory_samples() -> None:
    """Against the weighted mean and variance of all samples, by NumPy."""
    norm, memory = PooledNorm(5, memory=3), 3
    past, past_weights = np.zeros((0, 5)), np.zeros(0)
    for step, n in enumerate((1, 2, 1, 4, 1)):
        x = draw(n, seed=step)
        share = n / (min(sum((1, 2, 1, 4, 1)[:step]), memory) + n)
        samples = np.concatenate([past, x.numpy()])
        weights = np.concatenate([past_weights * (1 - share), np.full(n, share / n)])
        mean = np.average(samples, axis=0, weights=weights)
        variance = np.average((samples - mean) ** 2, axis=0, weights=weights)
        expected = (x.numpy() - mean) / np.sqrt(variance + 1e-6)
        np.testing.assert_allclose(norm(x).numpy(), expected, atol=1e-3)
        past, past_weights = samples, weights


def test_the_gradient_passes_the_batch_s_share_of_the_statistics() -> None:
    norm = PooledNorm(3).double()
    norm(draw(6, 3).double())
    x = draw(2, 3, seed=1).double().requires_grad_()

    def fresh(x: Tensor) -> Tensor:
        return copy.deepcopy(norm)(x)

    assert torch.autograd.gradcheck(fresh, (x,))
    # Batch norm has no gradient along what all samples share; the memory leaves a part of it.
    weight = torch.tensor([1.0, -2.0, 0.5]).double()
    (fresh(x) @ weight).sum().backward()
    assert x.grad is not None
    shared = x.grad.sum(0)
    with torch.no_grad():
        scale = weight / norm.variance.sqrt() * 2
    assert (shared.abs() < scale.abs()).all()


def test_at_evaluation_a_sample_depends_on_itself_alone_and_nothing_moves() -> None:
    norm = PooledNorm(5)
    norm.calibrate(draw(40))
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    x = draw(7, seed=3)
    together = norm(x)
    torch.testing.assert_close(together, torch.cat([norm(one[None]) for one in x]))
    by_hand = (x - draw(40).mean(0)) / draw(40).std(0, correction=0)
    torch.testing.assert_close(together, by_hand, atol=1e-2, rtol=1e-2)
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def test_its_state_is_in_buffers() -> None:
    norm = PooledNorm(5)
    for step in range(3):
        norm(draw(2, seed=step))
    other = PooledNorm(5)
    other.load_state_dict(norm.state_dict())
    assert torch.equal(norm(draw(1, seed=9)), other(draw(1, seed=9)))
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in other.state_dict().items())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_readout_learns_from_features_that_are_nearly_one_vector(batch: int) -> None:
    """Two classes that differ by a twentieth of the features' size, in batches of one and two."""
    torch.manual_seed(0)
    x, y = draw(64, 32), torch.arange(64) % 2
    x = x + 0.05 * y[:, None] * torch.randn(32)

    def fit(head: nn.Module) -> float:
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
        for step in range(120):
            chosen = torch.arange(step * batch, (step + 1) * batch) * 7 % 64
            optimizer.zero_grad()
            F.cross_entropy(head(x[chosen]), y[chosen]).backward()
            optimizer.step()
        head.eval()
        return F.cross_entropy(head(x), y).item()

    readout = PooledLinear(32, 2)
    readout.calibrate(x)
    assert fit(readout) < 0.45
    assert fit(nn.Linear(32, 2)) > 0.6  # chance is 0.69
