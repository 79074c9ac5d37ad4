"""A process of the bench has imported, when it comes to its data, what it has used until then, and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from timm.optim import list_optimizers

from ssl3d.optim import USUAL

LATER = (
    "sklearn", "monai", "pandas", "scipy", "statsmodels", "skimage", "matplotlib", "tensorboard",  # where they are used
    "timm", "torchvision", "huggingface_hub", "torch._dynamo", "torch._inductor", "triton", "sympy",  # with the first step
    "SimpleITK", "nibabel", "blosc2", "ssl3d.data.phantoms",  # with the first volume
)  # fmt: skip
UP_TO_DATA = """
import json, sys
from ssl3d.cli import main
import ssl3d.bench.plan as plan_module

def stop(plan, options):
    print(json.dumps(sorted(sys.modules)))
    sys.exit(0)

plan_module._prepared = stop
main(sys.argv[1:])
"""


@pytest.mark.parametrize("preset", ["demo", "study"])
def test_a_bench_imports_nothing_before_it_uses_it(preset: str, tmp_path: Path) -> None:
    arguments = (
        "bench", "--preset", preset, "--methods", "all", "--tasks", "shc,sac,ccc,sbm", "--modes", "linear,finetune,knn",
        "--jobs", "1", "--store", tmp_path / "store", "--cache", tmp_path / "cache",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", UP_TO_DATA, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "torch" in imported and "ssl3d.pretrain.loop" in imported, "it went as far as that"
    assert not [name for name in LATER if name in imported]


def test_the_optimizers_known_without_timm_are_timm_s() -> None:
    assert set(USUAL) <= set(list_optimizers())
