"""Stateless randomness."""

import numpy as np
import pytest
import torch

from ssl3d.rng import BatchRng, derive_seed, numpy_rng, permuted


def test_keys_are_told_apart() -> None:
    seeds = [
        derive_seed(0, "a", 1),
        derive_seed(0, "a1"),
        derive_seed(0, "a", "1"),
        derive_seed(1, "a", 1),
        derive_seed(0, 1, "a"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(0, "views", 7) == 4725013280395107191, (
        "the derivation must never change: it would change every run"
    )


def test_a_sample_draws_the_same_whatever_batch_it_is_in() -> None:
    together, alone = BatchRng(0, 3, [10, 11, 12]), BatchRng(0, 3, [11])
    assert torch.equal(together.uniform(shape=(4,))[1], alone.uniform(shape=(4,))[0])
    assert torch.equal(together.normal((2, 3))[1], alone.normal((2, 3))[0])
    assert torch.equal(together.permutation(9)[1], alone.permutation(9)[0])


def test_steps_samples_and_forks_are_independent() -> None:
    base = BatchRng(0, 3, [1, 2])
    draws = [
        base.uniform(shape=(8,)),
        BatchRng(0, 4, [1, 2]).uniform(shape=(8,)),
        base.fork("x").uniform(shape=(8,)),
    ]
    flat = torch.cat(draws)
    assert len(torch.unique(flat)) == flat.numel()
    assert torch.equal(base.fork("x").uniform(shape=(8,)), draws[2]), "forking is stateless"


def test_ranges() -> None:
    rng = BatchRng(0, 0, range(64))
    u, k = rng.uniform(-2, 3, (50,)), rng.integers(2, 5, (50,))
    assert u.min() >= -2 and u.max() < 3 and abs(float(u.mean()) - 0.5) < 0.1
    assert set(k.unique().tolist()) == {2, 3, 4}
    assert abs(float(rng.bernoulli(0.3, (100,)).float().mean()) - 0.3) < 0.03
    assert (rng.permutation(7).sort(dim=1).values == torch.arange(7)).all()
    assert numpy_rng(0, "a").random() == numpy_rng(0, "a").random()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 64, 1000])
def test_a_permutation_by_place_is_one(length: int) -> None:
    for key in range(5):
        assert sorted(permuted(i, length, 0, "order", key) for i in range(length)) == list(range(length))
    with pytest.raises(IndexError):
        permuted(length, length, 0)


@pytest.mark.parametrize("length", [2, 3, 5, 7, 40])
def test_permutations_by_place_are_as_good_as_shuffled(length: int) -> None:
    """Every volume comes at every place, and after every other one, equally often (chi-squared tests)."""
    draws = 50 * length if length > 10 else 200 * length
    orders = np.array([[permuted(i, length, 0, "order", k) for i in range(length)] for k in range(draws)])
    at = np.array([np.bincount(column, minlength=length) for column in orders.T])
    pairs = np.bincount((orders[:, 0] * length + orders[:, 1]), minlength=length**2).reshape(length, length)
    expected = draws / length / (length - 1)
    for counts, wanted, freedom in (
        (at.ravel(), draws / length, (length - 1) ** 2),
        (pairs[~np.eye(length, dtype=bool)], expected, length * (length - 1) - 1),
    ):
        chi = float(((counts - wanted) ** 2 / wanted).sum())
        assert chi < freedom + 5 * (2 * freedom) ** 0.5, (chi, freedom)
