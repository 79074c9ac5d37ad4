"""What must not happen beside: global generators that move, tensors that share memory, states that change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl3d.rng import derive_seed
from ssl3d.testing.checks import demand


@contextmanager
def disturbed(number: int) -> Iterator[None]:
    """Put every global generator into another state, and back afterwards."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.manual_seed(derive_seed(number, "disturbance"))
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        random.setstate(state[2])


def _generators() -> dict[str, object]:
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return {
        "torch's": torch.get_rng_state().numpy().tobytes(),
        "numpy's": (str(numpy[0]), np.asarray(numpy[1]).tobytes(), *numpy[2:]),
        "Python's": random.getstate(),
    }


@contextmanager
def generators_left_alone(function: str, hint: str) -> Iterator[None]:
    """Demand that nothing is drawn from a global generator, and that none is seeded, while ``function`` is called."""
    with disturbed(3):  # whoever seeds with 0 each time would leave the state as it was
        before = _generators()
        yield
        moved = [name for name, state in _generators().items() if state != before[name]]
    demand(
        not moved, f"{function} draws from or seeds {' and '.join(moved)} global generator", function, hint
    )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element of memory in common; views of one storage need not."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    first, second = _bytes(a), _bytes(b)
    return bool(torch.isin(first, second).any())


def _bytes(x: Tensor) -> Tensor:
    """Return where in its storage each element of ``x`` begins, in bytes."""
    places = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        places = places[..., None] + torch.arange(size) * stride
    return (places.flatten() + x.storage_offset()) * x.element_size()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers, those that are not saved included."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Return the names of parameters and buffers that differ from ``before``, or were not there."""
    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [
        name for name in after
        if name not in before or not same(after[name].detach(), before[name])
    ]  # fmt: skip


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
