"""Random permutations within many overlapping boxes, for all samples of a batch at once.

Each box reads the undamaged volume, and where boxes overlap the last one wins. The voxels of a box are numbered by
*rank*, row by row. Rank r of box k has number ``ranks before box k + r`` of one draw of ``rng``; sorting by that number
permutes the ranks of a box. So the three forms below, each for other boxes or another device, give the same permutations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssl3d.rng import BatchRng


def _bits(most: int) -> tuple[int, int]:
    """Return how many bits of a sorting key are random, and how many hold the rank below ``most``.

    Together 32 where that leaves 16 random ones. With b of them two ranks keep their order with probability
    1/2 + 2^-(b + 1), because the rank decides where they are equal.
    """
    ranks = max(1, (most - 1).bit_length())
    return max(16, min(24, 32 - ranks)), ranks


def source_voxels(
    size: Sequence[int],
    starts: Tensor,
    edges: Tensor,
    largest: Sequence[int],
    rng: BatchRng,
    alike: bool = False,
) -> Tensor:
    """Return the flat index of the voxel that each voxel takes its value from: (B, D*H*W) int64.

    Args:
        size: (D, H, W) of the volumes.
        starts, edges: first voxel and edges of each box (B, n, 3).
        largest: edges (d, h, w) that no box exceeds.
        rng: one draw is taken.
        alike: whether all boxes have the largest edges.
    """
    if rng.device.type != "cpu":
        return boxes_padded(size, starts, edges, largest, rng)
    if sum(_bits(math.prod(largest))) > 32 or not alike:
        return boxes_packed(size, starts, edges, largest, rng)
    return boxes_alike(size, starts, edges, largest, rng)


def boxes_alike(
    size: Sequence[int], starts: Tensor, edges: Tensor, largest: Sequence[int], rng: BatchRng
) -> Tensor:
    """:func:`source_voxels` where all boxes have the largest edges, on a CPU.

    numpy sorts rows of 32 bits forty times faster than torch finds their order.
    """
    most = math.prod(largest)
    random, ranks = _bits(most)
    numbers = rng.uniform(shape=(starts.shape[1], most)).numpy()  # (B, n, V)
    keys = (numbers * np.float32(2**random)).astype(np.uint32) << np.uint32(ranks)
    keys |= np.arange(most, dtype=np.uint32)
    keys.sort(axis=2)
    permuted = torch.from_numpy((keys & np.uint32((1 << ranks) - 1)).astype(np.int64))  # ranks (B, n, V)
    offsets = _flat(torch.cartesian_prod(*(torch.arange(e) for e in largest)), size)  # of the ranks (V,)
    first = _flat(starts, size)[..., None]  # (B, n, 1)
    return _last_wins(size, (first + offsets).flatten(1), (first + offsets[permuted]).flatten(1))


def boxes_packed(
    size: Sequence[int], starts: Tensor, edges: Tensor, largest: Sequence[int], rng: BatchRng
) -> Tensor:
    """:func:`source_voxels` with the entries of all boxes one after the other, on a CPU."""
    random, ranks = _bits(math.prod(largest))
    volumes = edges.prod(2)  # (B, n)
    totals = volumes.sum(1).tolist()
    numbers = rng.uniform(shape=(max(totals),))  # (B, most entries of a sample)
    found = []
    for sample, total in enumerate(totals):
        before = volumes[sample].cumsum(0) - volumes[sample]  # (n,)
        box = torch.from_numpy(np.repeat(np.arange(len(before)), volumes[sample].numpy()))  # (entries,)
        first = before.index_select(0, box)
        rank = torch.arange(total) - first
        keys = (box << random | (numbers[sample, :total] * 2**random).long()) << ranks | rank
        permuted = torch.from_numpy(np.sort(keys.numpy())) & (1 << ranks) - 1  # ranks, box by box
        facts = [fact.index_select(0, box) for fact in _facts(starts[sample], edges[sample], size)]
        voxel = _place(rank, facts, size)
        found.append(_last_wins(size, voxel[None], voxel.index_select(0, first + permuted)[None]))
    return torch.cat(found)


def boxes_padded(
    size: Sequence[int], starts: Tensor, edges: Tensor, largest: Sequence[int], rng: BatchRng
) -> Tensor:
    """:func:`source_voxels` with a row as long as the largest box for each: nothing is read back from a device."""
    most = math.prod(largest)
    random, ranks = _bits(most)
    volumes = edges.prod(2)  # (B, n)
    rank = torch.arange(most, device=rng.device)
    valid = rank < volumes[..., None]  # (B, n, V)
    numbers = rng.uniform(shape=(volumes.shape[1] * most,))  # of which those that are valid are used
    place = (volumes.cumsum(1) - volumes)[..., None] + rank  # (B, n, V)
    chosen = numbers.gather(1, place.flatten(1)).view_as(place)
    keys = torch.where(valid, (chosen * 2**random).long() << ranks | rank, 1 << random + ranks)
    permuted = keys.sort(dim=2).values & (1 << ranks) - 1  # valid ranks come first
    facts = [fact[..., None] for fact in _facts(starts, edges, size)]  # (B, n, 1) each
    voxel, source = (_place(torch.where(valid, r, 0), facts, size) for r in (rank, permuted))
    return _last_wins(size, voxel.flatten(1), source.flatten(1), valid.flatten(1))


def _flat(places: Tensor, size: Sequence[int]) -> Tensor:
    """Return flat indices (...) of voxels (..., 3)."""
    d, h, w = places.unbind(-1)
    return (d * size[1] + h) * size[2] + w


def _facts(starts: Tensor, edges: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return first flat index, edge along h and edge along w of boxes (..., 3)."""
    return _flat(starts, size), edges[..., 1], edges[..., 2]


def _place(rank: Tensor, facts: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Return the flat index (...) of the voxel of ``rank`` in boxes with the given :func:`_facts`."""
    first, edge_h, edge_w = facts
    row = rank // edge_w  # rows of boxes before it, slice after slice
    slices = row // edge_h
    # slices * H * W + (row - slices * edge_h) * W + (rank - row * edge_w)
    return first + rank + row * (size[2] - edge_w) + slices * ((size[1] - edge_h) * size[2])


def _last_wins(size: Sequence[int], voxel: Tensor, source: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the source of each voxel: that of its last entry, or itself (B, D*H*W).

    Args:
        size: (D, H, W).
        voxel, source: flat indices of the entries (B, entries).
        valid: which entries count (B, entries); None: all.
    """
    total = math.prod(size)
    itself = torch.arange(total, device=voxel.device)
    if voxel.device.type == "cpu" and valid is None:
        found = itself.repeat(len(voxel), 1)
        for row, to, value in zip(found.numpy(), voxel.numpy(), source.numpy(), strict=True):
            row[to] = value  # of equal indices the last is assigned
        return found
    order = torch.arange(voxel.shape[1], device=voxel.device).expand_as(voxel)
    order = order if valid is None else torch.where(valid, order, -1)
    last = torch.full((len(voxel), total), -1, device=voxel.device)
    last.scatter_reduce_(1, voxel, order, "amax")
    return torch.where(last >= 0, source.gather(1, last.clamp(min=0)), itself)
