"""Limits of memory and of file sizes: what did not fit, how large it was, and which option makes it smaller."""

from __future__ import annotations

import resource
from pathlib import Path

import nibabel
import numpy as np
import pytest

from faults.commands import command, files_of, memory_of
from faults.damage import FULL
from faults.world import words

pytestmark = pytest.mark.timeout(1200 if FULL else 300)

#: Where nothing of the size of a volume can be written.
LITTLE = 300
SIZES: dict[str, int] = {
    "pretrain TINY --method denoising --data WORLD/volumes --out OUT/run --cache WORLD/cache": 20_000,
    "pretrain TINY --method denoising --data WORLD/volumes --out OUT/run --cache OUT/cache": LITTLE,
    "bench TINY CELL --store OUT/store --cache WORLD/cache": LITTLE,
    "bench TINY CELL --store OUT/store --cache OUT/cache": LITTLE,
    "data prepare WORLD/volumes --spacing 6.4 --cache OUT/cache": LITTLE,
    "data verify WORLD/volumes --out OUT/verified": LITTLE,
    "finetune TINY --checkpoint WORLD/run --task ccc --mode linear --out OUT/p --cache WORLD/cache": LITTLE,
    "export --checkpoint WORLD/run --to torch --out OUT/export": 5_000,
    "report --store WORLD/store --out OUT/report.html": 5_000,
    "store merge OUT/store WORLD/store": LITTLE,
}  # fmt: skip
SOME_SIZES = list(SIZES) if FULL else list(SIZES)[4:8:3]


@pytest.mark.parametrize("text", SOME_SIZES, ids=lambda text: text.split(" --")[0])
def test_a_limit_of_file_sizes_is_named_with_the_file(world: Path, tmp_path: Path, text: str) -> None:
    outcome = command(*words(text, world, tmp_path), before=files_of(SIZES[text]))
    outcome.named("/", "ulimit -f", "Fix: ")
    again = command(*words(text, world, tmp_path))
    assert again.status == 0, again


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes of 400 x 400 x 400 voxels, 1 mm each, which compress to little."""
    folder = tmp_path_factory.mktemp("large")
    data = np.zeros((400, 400, 400), np.int16)
    data[100:300, 100:300, 100:300] = np.arange(200)
    for number in range(2):
        data[150, 150, number] = 7
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), folder / f"large{number}.nii.gz")
    return folder


#: (command, MiB beyond what this process has, what is said)
MEMORY: dict[str, tuple[int, tuple[str, ...]]] = {
    "data verify LARGE": (150, (".nii.gz does not fit into memory", "Fix: ")),
    "data prepare LARGE --spacing 1 --cache OUT/cache": (150, (".nii.gz does not fit into memory", "Fix: ")),
    "data prepare LARGE --spacing 0.2 --cache OUT/cache": (4000, ("limit 4 GiB", "--spacing")),
    "predict --checkpoint WORLD/predictor --input LARGE --out OUT/o --device cpu --offset 1024": (150, ("large0.nii.gz",
    "Fix: ")),
    "pretrain TINY --method denoising --data WORLD/volumes --out OUT/run --cache WORLD/cache --set pretrain.crop=320": (
        400, ("320 x 320 x 320", "pretrain.crop", "pretrain.accumulate"),
    ),
    "bench TINY --methods denoising --tasks ccc --modes linear --seeds 0 --store OUT/store --cache WORLD/cache "
    "--set pretrain.crop=320": (400, ("320 x 320 x 320", "pretrain.crop", "pretrain.accumulate")),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("text", MEMORY, ids=lambda text: text.split(" --")[0])
def test_what_does_not_fit_into_memory_is_named_with_its_size(
    world: Path, large: Path, tmp_path: Path, text: str
) -> None:
    more, said = MEMORY[text]
    arguments = words(text.replace("LARGE", str(large)), world, tmp_path)
    outcome = command(*arguments, before=memory_of(more * 2**20))
    assert outcome.status in (1, 2), outcome
    assert "Traceback" not in outcome.output and "fault of ssl3d" not in outcome.output, outcome
    assert not [word for word in said if word not in outcome.output], outcome


def test_the_limit_of_this_process_is_known() -> None:
    """Threads that prepare share what ``ulimit -v`` leaves them, too."""
    from faults.runs import forked
    from ssl3d.memory import available

    def child() -> None:
        memory_of(50 * 2**20)()
        found = available()
        assert found is not None and found <= 50 * 2**20, found
        resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1:] * 2)

    assert forked(child) == 0
