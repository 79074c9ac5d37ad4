"""Which crops belong to which step."""

import numpy as np
import pytest
import torch
from cohorts import MemoryCohort, noise_cohort

from ssl3d.errors import DataError
from ssl3d.pretrain.source import CropSource


def test_a_batch_is_a_function_of_seed_and_step_and_not_of_workers() -> None:
    cohort = noise_cohort(5)
    source = CropSource(cohort, (8, 8, 8), 2, 1, seed=3)
    plain = [source.batch(s) for s in range(9)]
    for workers in (0, 1, 3):
        read = list(CropSource(cohort, (8, 8, 8), 2, 1, seed=3).batches(4, 9, workers))
        assert all(torch.equal(a.x, b.x) and a.items == b.items for a, b in zip(plain[4:], read, strict=True))
    assert not torch.equal(plain[0].x, CropSource(cohort, (8, 8, 8), 2, 1, seed=4).batch(0).x)


def test_every_epoch_sees_every_volume_once_in_another_order() -> None:
    source = CropSource(noise_cohort(6), (8, 8, 8), 2, 1, seed=0)
    epochs = [[v for s in range(3 * e, 3 * e + 3) for v in source.batch(s).volumes] for e in range(4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [s for s in range(12) if source.starts_epoch(s)] == [0, 3, 6, 9]


def test_crops_are_boxes_of_their_volume_and_reach_every_border() -> None:
    image = np.arange(10 * 11 * 12, dtype=np.float32).reshape(10, 11, 12)
    source = CropSource(MemoryCohort([image]), (8, 8, 8), 1, 1, seed=0)
    starts = set()
    for step in range(300):
        x = source.batch(step).x[0, 0].numpy()
        at = tuple(int(i) for i in np.unravel_index(int(x[0, 0, 0]), image.shape))
        assert np.array_equal(x, image[tuple(slice(a, a + 8) for a in at)])
        starts.add(at)
    assert {a for a, _, _ in starts} == {0, 1, 2} and {c for _, _, c in starts} == {0, 1, 2, 3, 4}


def test_pairs_are_two_different_volumes_at_one_relative_position() -> None:
    cohort = MemoryCohort(
        [
            np.broadcast_to(np.linspace(0, 1, n, dtype=np.float32)[:, None, None], (n, 10, 10))
            for n in (16, 24, 32)
        ]
    )
    source = CropSource(cohort, (8, 8, 8), 2, 2, seed=0)
    partners = set()
    for step in range(60):
        x = source.batch(step).x
        assert x.shape == (2, 2, 1, 8, 8, 8)
        for item in x:
            a, b = (v[0, 4, 0, 0] for v in item)
            assert abs(a - b) < 0.2, "the same part of the body"
            partners.add(tuple(round(float(v[0, 1, 0, 0] - v[0, 0, 0, 0]), 4) for v in item))
    assert all(a != b for a, b in partners) and len(partners) == 6, "every ordered pair of different volumes"


def test_volumes_smaller_than_the_crop_are_all_named() -> None:
    cohort = MemoryCohort([np.zeros((n, 9, 9), np.float32) for n in (9, 7, 5)])
    with pytest.raises(DataError) as error:
        CropSource(cohort, (8, 8, 8), 1, 1, seed=0)
    for part in (
        "case1: (7, 9, 9)",
        "case2: (5, 9, 9)",
        "data.spacing_mm=1.25 fits all",
        "smaller pretrain.crop",
    ):
        assert part in str(error.value)
    assert "case0" not in str(error.value)


def test_one_volume_is_not_enough_for_pairs() -> None:
    with pytest.raises(DataError, match="at least 2 volumes, but memory has 1"):
        CropSource(noise_cohort(1), (8, 8, 8), 1, 2, seed=0)
