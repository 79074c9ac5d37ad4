"""Stateless randomness: every draw is a pure function of (seed, keys).

Nothing here keeps a state between steps, so a checkpoint stores a step number instead of
generator states, and a run that was killed and resumed draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

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


class BatchRng:
    """Random numbers for a batch, one independent generator a sample.

    Sample ``i`` of the batch draws from a generator seeded by ``(seed, step, index[i])``, so its
    views depend neither on its neighbours, nor on the batch size, nor on the device: numbers are
    drawn on the CPU and then moved.

    Args:
        seed: the run's seed.
        step: the optimizer step (0, 1, ...).
        indices: one integer per sample, unique within the step (B,).
        device: where the draws are put.
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
        self._generators = [torch_rng(seed, *self.keys, step, int(i)) for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def fork(self, key: Key) -> BatchRng:
        """Return an independent stream named ``key``; forking twice gives the same stream."""
        return BatchRng(self.seed, self.step, self.indices, self.device, (*self.keys, key), self.volumes)

    def _stack(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(g) for g in self._generators]).to(self.device)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: Sequence[int] = ()) -> Tensor:
        """Draw from U[low, high): (B, *shape) float32."""
        return self._stack(lambda g: torch.rand(tuple(shape), generator=g)) * (high - low) + low

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """Draw from N(0, 1): (B, *shape) float32."""
        return self._stack(lambda g: torch.randn(tuple(shape), generator=g))

    def integers(self, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Draw integers from {low, ..., high - 1}: (B, *shape) int64."""
        return self._stack(lambda g: torch.randint(low, high, tuple(shape), generator=g))

    def bernoulli(self, p: float, shape: Sequence[int] = ()) -> Tensor:
        """Draw True with probability ``p``: (B, *shape) bool."""
        return self.uniform(shape=shape) < p

    def permutation(self, n: int) -> Tensor:
        """Draw one permutation of range(n) per sample: (B, n) int64."""
        return self._stack(lambda g: torch.randperm(n, generator=g))
