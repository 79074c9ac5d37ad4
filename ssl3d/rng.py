"""Stateless randomness: every draw is a pure function of (seed, keys).

Nothing here keeps a state between steps, so a checkpoint stores a step number instead of
generator states, and a run that was killed and resumed draws what it would have drawn.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl3d.device import constant

Key = int | str


def derive_seed(seed: int, *keys: Key) -> int:
    """Derive a 63-bit seed from ``seed`` and ``keys`` (BLAKE2b; the same on every machine).

    >>> derive_seed(0, "views", 7) == derive_seed(0, "views", 7)
    True
    >>> derive_seed(0, "views", 7) == derive_seed(0, "views", 8)
    False
    """
    text = "\x1f".join(f"{type(k).__name__}:{k}" for k in (int(seed), *keys))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_rng(seed: int, *keys: Key) -> np.random.Generator:
    """Return a NumPy generator that depends on ``seed`` and ``keys`` only."""
    return np.random.default_rng(derive_seed(seed, *keys))


def torch_rng(seed: int, *keys: Key) -> torch.Generator:
    """Return a CPU generator that depends on ``seed`` and ``keys`` only."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


_MASK64 = 2**64 - 1
_ROUNDS = 8


def permuted(place: int, length: int, seed: int, *keys: Key) -> int:
    """Return what stands at ``place`` of a permutation of range(length) that depends on seed and keys only.

    Its cost does not depend on ``length``: nothing is shuffled. A Feistel network over the next power of four is
    walked until it comes back into the range (Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002).

    >>> sorted(permuted(i, 5, 0, "order", 1) for i in range(5))
    [0, 1, 2, 3, 4]

    Raises:
        IndexError: ``place`` is not in range(length).
    """
    if not 0 <= place < length:
        raise IndexError(f"place {place} of a permutation of {length}")
    half = max(1, ((length - 1).bit_length() + 1) // 2)  # bits of each half
    low, key = (1 << half) - 1, derive_seed(seed, *keys)
    while True:
        left, right = place >> half, place & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + (number << 32) + right) & low)
        place = left << half | right
        if place < length:
            return place


def _mix(value: int) -> int:
    """Return 64 well mixed bits of ``value`` (SplitMix64: Steele et al., OOPSLA 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


# --- Philox 4x32-10 ------------------------------------------------------------------------------

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 2**32 - 1
_BITS = 24
"""Bits of a fraction: as many as a float32 holds."""
_CHUNK = 2**14
"""Numbers, or blocks of them, that are computed at a time on a CPU, so that they stay in its cache."""


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Return Philox 4x32-10 of ``counter`` under ``key`` (Salmon et al., Parallel random numbers, SC 2011).

    A bijection of the counters whose values pass BigCrush, in integer operations that are exact on every device.

    Args:
        counter: (..., 4) int64, each in [0, 2^32).
        key: (..., 2) int64, each in [0, 2^32), broadcast against the counters.

    Returns:
        (..., 4) int64, each in [0, 2^32).
    """
    (c0, c1, c2, c3), (k0, k1) = counter.unbind(-1), key.unbind(-1)
    for _ in range(10):
        # Products of 64 bits; that int64 wraps them leaves their bits as they are.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)


def fractions(keys: Sequence[int], draw: int, count: int, device: torch.device) -> Tensor:
    """Return ``count`` multiples of 2^-24 in [0, 1) for each key, the same bits on every device.

    Number i of a key is the low 24 bits of word i mod 4 of Philox 4x32-10 at counter (i // 4, draw, 0, 0).

    Args:
        keys: of 63 bits (B,).
        draw: which of the key's draws, below 2^31.
        count: at most 2^34.
        device: where they are computed.

    Returns:
        (B, count) float32.
    """
    return (_natively if _has_philox(device) else _by_integers)(keys, draw, count, device)


def _by_integers(keys: Sequence[int], draw: int, count: int, device: torch.device) -> Tensor:
    """:func:`fractions` in integer operations."""
    blocks = -(-count // 4)
    words = constant([[key & _WORD, key >> 32] for key in keys], device)[:, None]  # (B, 1, 2)
    found = torch.empty(len(keys), blocks, 4, device=device)
    size = _CHUNK if device.type == "cpu" else max(1, blocks)
    for start in range(0, blocks, size):
        counter = torch.zeros(min(size, blocks - start), 4, dtype=torch.int64, device=device)
        counter[:, 0], counter[:, 1] = torch.arange(start, start + len(counter), device=device), draw
        found[:, start : start + size] = philox(counter, words) & (1 << _BITS) - 1
    return found.mul_(2.0**-_BITS).flatten(1)[:, :count]


def _natively(keys: Sequence[int], draw: int, count: int, device: torch.device) -> Tensor:
    """:func:`fractions` by torch's own operation, one pass over the memory."""
    key = constant([[key, draw << 32] for key in keys], device).view(torch.uint64)  # (B, 2): key, counter
    found = torch.empty(len(keys), count, device=device)
    filled: Tensor = torch.ops.aten._philox_uniform_(found, key[:, None])
    return filled


@cache
def _has_philox(device: torch.device) -> bool:
    """Whether torch has the generator (2.14 has; it is no public interface) and it gives our bits on ``device``."""
    if not hasattr(torch.ops.aten, "_philox_uniform_"):
        return False
    keys = [derive_seed(0, "philox", number) for number in range(3)]
    try:
        return all(
            torch.equal(
                _natively(keys, draw, count, device).cpu(),
                _by_integers(keys, draw, count, torch.device("cpu")),
            )
            for draw, count in ((0, 1), (3, 7), (2**31 - 1, 4099))
        )
    except (RuntimeError, TypeError):  # another signature, or no such operation for the device
        return False


@cache
def _normal_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return intercepts and slopes of -Q(p), Q the lower tail's quantile: linear in each cell of p in [2^-25, 1/2).

    A cell is numbered by the leading 16 bits of p as a float32, 128 to an octave; those of smaller p stay empty.
    """
    quantile, first = NormalDist().inv_cdf, (127 - 25) * 128
    edges = [(1 + cell % 128 / 128) * 2.0 ** (cell // 128 - 25) for cell in range(24 * 128 + 1)]
    heights = torch.tensor([-quantile(p) for p in edges], dtype=torch.float64)
    table = torch.zeros(2, first + len(edges) - 1)
    table[0, first:], table[1, first:] = heights[:-1], heights.diff() / 2**16
    intercepts, slopes = table.to(device)
    return intercepts, slopes


def normals(uniform: Tensor) -> Tensor:
    """Return the standard normal quantiles of multiples of 2^-24 in [0, 1), the same bits on every device.

    Each stands for the middle of its interval, so the values are symmetric; the largest is 5.42. No logarithm
    and no cosine, which are not the same on every device: a table, and straight lines between (error below 1e-5).

    Args:
        uniform: float32, any shape, contiguous; overwritten.
    """
    intercepts, slopes = _normal_table(uniform.device)
    flat = uniform.view(-1)
    for part in flat.split(_CHUNK) if uniform.device.type == "cpu" else (flat,):
        centred = part - (0.5 - 2.0**-25)  # exact, as is the next
        bits = (0.5 - centred.abs()).view(torch.int32)
        cell = bits >> 16
        height = slopes.index_select(0, cell).mul_(bits & 0xFFFF).add_(intercepts.index_select(0, cell))
        torch.copysign(height, centred, out=part)
    return uniform


class BatchRng:
    """Random numbers for a batch, one independent stream a sample.

    Sample ``i`` of the batch draws from Philox 4x32-10 under a key made of ``(seed, keys, step, index[i])``, so its
    views depend neither on its neighbours, nor on the batch size, nor on the device: numbers are drawn on ``device``,
    and are the same bits on each. A draw's numbers depend on how many draws the stream made before, not on their sizes.

    Args:
        seed: the run's seed.
        step: the optimizer step (0, 1, ...).
        indices: one integer per sample, unique within the step (B,).
        device: where the numbers are drawn.
        keys: further keys, for example the name of a stream.
        volumes: which volume of the cohort each sample shows (B,); default: all different. Two
            samples of one volume are no negatives of each other, whatever their index.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        indices: Sequence[int],
        device: torch.device | str = "cpu",
        keys: Sequence[Key] = (),
        volumes: Sequence[int] | None = None,
    ) -> None:
        self.seed, self.step, self.indices, self.keys = seed, step, list(indices), tuple(keys)
        self.volumes = list(self.indices if volumes is None else volumes)
        self.device = torch.device(device)
        self._keys = [derive_seed(seed, *self.keys, step, int(i)) for i in self.indices]
        self._draws = 0

    def __len__(self) -> int:
        return len(self.indices)

    def fork(self, key: Key) -> BatchRng:
        """Return an independent stream named ``key``; forking twice gives the same stream."""
        return BatchRng(self.seed, self.step, self.indices, self.device, (*self.keys, key), self.volumes)

    def on_host(self) -> BatchRng:
        """Return this stream drawn on the CPU, for what Python decides by: the same bits, and no device is waited for.

        It goes on behind the draws made so far; its own do not count here.
        """
        host = copy.copy(self)
        host.device = torch.device("cpu")
        return host

    def constant(self, values: Sequence[Any]) -> Tensor:
        """Return numbers as a tensor on the device, without waiting for what the device does."""
        return constant(values, self.device)

    def _fractions(self, shape: Sequence[int]) -> Tensor:
        """Draw multiples of 2^-24 in [0, 1): (B, *shape) float32."""
        found = fractions(self._keys, self._draws, math.prod(shape), self.device)
        self._draws += 1
        return found.reshape(len(self), *shape)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: Sequence[int] = ()) -> Tensor:
        """Draw from U[low, high): (B, *shape) float32."""
        found = self._fractions(shape)
        return found if (low, high) == (0, 1) else found.mul_(high - low).add_(low)

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """Draw from N(0, 1): (B, *shape) float32, at most 5.42 from 0."""
        return normals(self._fractions(shape))

    def integers(self, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Draw integers from {low, ..., high - 1}: (B, *shape) int64.

        No integer is likelier than another by more than (high - low) / 2^48.

        Raises:
            ValueError: the range is empty, or larger than 2^48.
        """
        if not 0 < high - low <= 2 ** (2 * _BITS):
            raise ValueError(f"integers from {low} to {high - 1}: use a range of 1 to 2^{2 * _BITS} numbers")
        first, second = (self._fractions((2, *shape)) * 2**_BITS).long().unbind(1)  # (B, *shape) each
        return (first << _BITS | second) % (high - low) + low

    def bernoulli(self, p: float, shape: Sequence[int] = ()) -> Tensor:
        """Draw True with probability ``p``: (B, *shape) bool."""
        return self._fractions(shape) < p

    def permutation(self, n: int) -> Tensor:
        """Draw one permutation of range(n) per sample: (B, n) int64."""
        return self.integers(0, 2**48, (n,)).argsort(dim=1, stable=True)
