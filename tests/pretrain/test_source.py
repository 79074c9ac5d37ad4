"""Which crops belong to which step."""

import re
import time
import tracemalloc

import numpy as np
import pytest
import torch
from cohorts import MemoryCase, MemoryCohort, noise_cohort

from ssl3d.data.prepared.arrays import Where
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


def test_volumes_smaller_than_the_crop_are_padded_with_air_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every crop of a thin volume holds all of it along its thin axis; the offset goes through all places."""
    thin = 1 + np.arange(9 * 5 * 10, dtype=np.float32).reshape(9, 5, 10)  # no voxel is zero
    cohort = MemoryCohort([np.ones((9, 9, 9), np.float32), thin])
    with caplog.at_level("WARNING"):
        source = CropSource(cohort, (8, 8, 8), 2, 2, seed=0)
    for part in (
        "1 of 2 prepared",
        "case1: (9, 5, 10)",
        "zeros (air)",
        "data.spacing_mm=1.2)",
        "pretrain.crop",
    ):
        assert part in caplog.text
    assert "case0" not in caplog.text and source.padded == ["case1"]
    places = set()
    for step in range(60):
        batch = source.batch(step)
        for item, first in zip(batch.x, batch.volumes, strict=True):
            x = item[0 if first == 1 else 1, 0].numpy()  # the crop of the thin volume
            inside = np.argwhere(x > 0)
            low, high = inside.min(0), inside.max(0) + 1
            assert tuple(high - low) == (8, 5, 8), "the whole of the thin axis, and nothing but air around it"
            d, h, w = (int(i) for i in np.unravel_index(int(x[tuple(low)]) - 1, thin.shape))
            assert h == 0 and np.array_equal(x[:, low[1] : high[1]], thin[d : d + 8, :, w : w + 8])
            places.add(int(low[1]))
    assert places == {0, 1, 2, 3}


@pytest.mark.parametrize("edge", [1, 2, 7])
def test_the_spacing_that_spares_padding_is_positive_and_does(
    edge: int, caplog: pytest.LogCaptureFixture
) -> None:
    CropSource(MemoryCohort([np.ones((edge, 128, 128), np.float32)]), (128, 128, 128), 1, 1, seed=0)
    advice = float(re.search(r"data\.spacing_mm=([\d.]+)", caplog.text)[1])  # type: ignore[index]
    assert advice > 0 and edge * 2.0 / advice >= 128


def test_a_batch_costs_the_same_whatever_the_number_of_volumes() -> None:
    """Nothing of the length of the cohort is made: a million volumes cost what a thousand do."""

    class Many(MemoryCohort):
        cases = [MemoryCase("one", "one", None, None, (8, 8, 8))] * 1_000_000  # type: ignore[assignment]

        def __len__(self) -> int:
            return 1_000_000

        def image(self, i: int, where: Where = ...) -> np.ndarray:
            return np.full((8, 8, 8), i, np.float32)

    source = CropSource(Many([]), (8, 8, 8), 2, 2, seed=0)
    source.batch(0)
    tracemalloc.start()
    began = time.perf_counter()
    batches = [source.batch(step) for step in range(1, 11)]
    assert time.perf_counter() - began < 1.0, "0.2 s a batch with a shuffled list"
    assert tracemalloc.get_traced_memory()[1] < 1_000_000, "8 MB with one list of all volumes"
    tracemalloc.stop()
    chosen = [int(v) for batch in batches for v in batch.x[:, :, 0, 0, 0, 0].flatten()]
    assert len(set(chosen)) == 40 and max(chosen) > 900_000 and min(chosen) < 100_000


def test_one_volume_is_not_enough_for_pairs() -> None:
    with pytest.raises(DataError, match="at least 2 volumes, but memory has 1"):
        CropSource(noise_cohort(1), (8, 8, 8), 1, 2, seed=0)
