"""Stateless randomness."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import ssl3d.rng
from ssl3d.rng import BatchRng, derive_seed, fractions, normals, numpy_rng, permuted, philox

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# --- Philox against published vectors and other implementations ---------------------------------------

PUBLISHED = [  # kat_vectors of Random123, "philox4x32 10": counter, key, expected
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_philox_gives_the_published_vectors(counter: str, key: str, expected: str, device: str) -> None:
    found = philox(words(counter).to(device), words(key).to(device))
    assert found.tolist() == words(expected).tolist()


def plain_philox(counter: list[int], key: list[int], bits: int) -> list[int]:
    """Philox 4 x ``bits`` with 10 rounds in Python's integers, as the paper defines it."""
    mask = 2**bits - 1
    (m0, m1), (w0, w1) = {
        32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
        64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
    }[bits]
    for round_ in range(10):
        k0, k1 = (key[0] + round_ * w0) & mask, (key[1] + round_ * w1) & mask
        high0, low0 = divmod(m0 * counter[0], 2**bits)
        high1, low1 = divmod(m1 * counter[2], 2**bits)
        counter = [high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0]
    return counter


def test_the_plain_form_is_numpys_at_64_bits_and_ours_at_32() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        counter, key = rng.integers(0, 2**63, 4).tolist(), rng.integers(0, 2**63, 2).tolist()
        numpys = np.random.Philox(counter=counter, key=key).random_raw(4).tolist()
        assert plain_philox([counter[0] + 1, *counter[1:]], key, 64) == numpys, "NumPy counts up first"
    counters, keys = rng.integers(0, 2**32, (200, 4)), rng.integers(0, 2**32, (200, 2))
    ours = philox(torch.from_numpy(counters), torch.from_numpy(keys)).tolist()
    assert ours == [plain_philox(c, k, 32) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)]


@pytest.mark.parametrize("device", DEVICES)
def test_fractions_are_the_words_at_their_counters_on_every_device_and_way(device: str) -> None:
    keys, draw, count = [3, 2**63 - 1], 5, 4 * ssl3d.rng._CHUNK + 3
    found = fractions(keys, draw, count, torch.device(device)).cpu()
    assert found.dtype == torch.float32
    for way in (ssl3d.rng._by_integers, *([ssl3d.rng._natively] if ssl3d.rng._has_philox(CPU) else [])):
        assert torch.equal(way(keys, draw, count, CPU), found)
    for row, key in enumerate(keys):
        for number in (0, 1, 2, 3, 4, 70, count - 1):
            block, lane = divmod(number, 4)
            word = plain_philox([block, draw, 0, 0], [key % 2**32, key >> 32], 32)[lane]
            assert float(found[row, number]) * 2**24 == word % 2**24


@pytest.mark.parametrize("device", DEVICES)
def test_every_draw_is_the_same_on_every_device_and_way(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(where: str) -> list[torch.Tensor]:
        rng = BatchRng(1, 2, [5, 6], where)
        return [rng.uniform(-1, 2, (70, 3)), rng.normal((40_000,)), rng.integers(-3, 9, (99,)),
                rng.bernoulli(0.3, (50,)), rng.permutation(33), rng.fork("x").normal((2, 2)), rng.uniform()]  # fmt: skip

    expected = draws(device)
    monkeypatch.setattr(ssl3d.rng, "_has_philox", lambda device: False)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(expected, draws("cpu"), strict=True))


# --- Distributions ------------------------------------------------------------------------------------


def test_uniform_numbers_are_uniform() -> None:
    u = BatchRng(0, 0, range(4)).uniform(shape=(250_000,)).double().flatten().numpy()
    assert u.min() >= 0 and u.max() < 1
    for k in range(1, 5):  # moments, four standard errors
        error = math.sqrt((1 / (2 * k + 1) - 1 / (k + 1) ** 2) / u.size)
        assert abs((u**k).mean() - 1 / (k + 1)) < 4 * error
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    bits = (u * 2**24).astype(np.int64)
    for shift in (0, 8, 16):  # the low bits are as good as the high ones
        assert stats.chisquare(np.bincount(bits >> shift & 255, minlength=256)).pvalue > 1e-3


def test_normal_numbers_are_normal() -> None:
    z = BatchRng(0, 0, range(4)).normal((250_000,)).double().flatten().numpy()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        variance = {1: 1, 2: 2, 3: 15, 4: 96, 6: 10170}[power]
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(variance / z.size)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs((np.abs(z) > 4).sum() - 2 * z.size * stats.norm.sf(4)) < 4 * math.sqrt(
        2 * z.size * stats.norm.sf(4)
    )


def test_normals_are_the_quantiles_of_their_fractions() -> None:
    ends = torch.tensor([0, 1, 2**22, 2**23 - 1, 2**23, 2**24 - 2, 2**24 - 1])
    k = torch.cat([ends, torch.arange(0, 2**24, 991)])
    z = normals(k.float() / 2**24).double().numpy()
    exact = stats.norm.ppf((k.double().numpy() + 0.5) / 2**24)
    np.testing.assert_allclose(z, exact, atol=1e-5)
    assert (z == -normals((2**24 - 1 - k).float() / 2**24).double().numpy()).all(), "symmetric"


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000, 2**20 + 1])
def test_integers_are_equally_likely(n: int) -> None:
    k = BatchRng(0, 0, range(8)).integers(-1, n - 1, (20_000,)).flatten().numpy()
    assert k.min() >= -1 and k.max() < n - 1
    bins = min(n, 50)
    counts = np.bincount((k + 1) * bins // n, minlength=bins)
    sizes = np.bincount(np.arange(n) * bins // n, minlength=bins)
    assert n == 1 or stats.chisquare(counts, k.size * sizes / n).pvalue > 1e-3


def test_an_empty_or_too_large_range_is_refused() -> None:
    for low, high in ((3, 3), (0, 2**48 + 1)):
        with pytest.raises(ValueError, match="use a range of 1 to"):
            BatchRng(0, 0, [0]).integers(low, high)


def test_permutations_are_equally_likely() -> None:
    orders = BatchRng(0, 0, range(6000)).permutation(4)
    counts = np.unique((orders * torch.tensor([64, 16, 4, 1])).sum(1).numpy(), return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_streams_are_independent_of_each_other_and_of_themselves_later() -> None:
    """No correlation between neighbours in step, sample, stream, draw or place, nor at greater distances."""
    n = 20_000
    base = BatchRng(0, 3, [1, 2, 3])
    rows = [*base.normal((n,)), *base.normal((n,)), *base.fork("x").normal((n,)), *base.fork("y").normal((n,)),
            *BatchRng(0, 4, [1, 2, 3]).normal((n,)), *BatchRng(1, 3, [1, 2, 3]).normal((n,)),
            *BatchRng(0, 3, [1, 2, 3], keys=("views",)).normal((n,))]  # fmt: skip
    correlations = np.corrcoef(torch.stack(rows).numpy())[np.triu_indices(len(rows), 1)] * math.sqrt(n)
    assert stats.kstest(correlations, "norm").pvalue > 1e-3 and abs(correlations).max() < 5
    z = rows[0].double().numpy()
    serial = [(z[:-lag] * z[lag:]).mean() * math.sqrt(n) for lag in (1, 2, 3, 4, 5, 8, 64, 1024)]
    assert max(map(abs, serial)) < 4
    above = np.stack([row.numpy() > 0 for row in rows[:8]])  # all patterns of signs at a place
    patterns = np.bincount((above.T @ (1 << np.arange(8))), minlength=256)
    assert stats.chisquare(patterns).pvalue > 1e-3


# --- Streams ------------------------------------------------------------------------------------------


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
