"""The augmentation of supervised training, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ssl3d.rng import BatchRng
from ssl3d.transforms.appearance import BrightnessContrast, Gamma, GaussianBlur, GaussianNoise
from ssl3d.transforms.spatial import RandomSpatial

# No flips: structures have a side.
_SPATIAL = RandomSpatial(rotation=0.26, scale=(0.85, 1.15), translation=0.05, shear=0.0, alpha=(0.0, 256.0))
_APPEARANCE: dict[str, Callable[[Tensor, BatchRng], Tensor]] = {
    "contrast": BrightnessContrast(p=0.5, brightness=(-0.1, 0.1), contrast=(0.75, 1.25)),
    "gamma": Gamma(p=0.3, gamma=(0.7, 1.5)),
    "blur": GaussianBlur(p=0.2, sigma=(0.5, 1.0)),
    "noise": GaussianNoise(p=0.2, sigma=(0.0, 0.05)),  # last: blur would remove it
}


class Augmentation:
    """One random deformation of volumes and their labels, the volumes in another appearance.

    Rotation by up to 15 degrees about each axis, scale 0.85 to 1.15, shift by up to 5 % of the edge, elastic
    deformation; what comes from outside is 0, background. Then, each with its probability, brightness and
    contrast, gamma, blur and noise: the kinds that nnU-Net uses (Isensee et al., Nature Methods 2021, supplement).

    Args:
        size: (D, H, W) of the volumes.
        rng: one sample a volume; decides everything.
    """

    def __init__(self, size: Sequence[int], rng: BatchRng) -> None:
        self._rng = rng
        self._deformation = _SPATIAL.sample(size, rng.fork("spatial"))

    def image(self, x: Tensor) -> Tensor:
        """Return volumes (B, 1, D, H, W) in [0, 1] deformed and in another appearance."""
        x = _SPATIAL.apply(x, self._deformation)
        for name, transform in _APPEARANCE.items():
            x = transform(x, self._rng.fork(name))
        return x

    def labels(self, y: Tensor) -> Tensor:
        """Return labels (B, 1, D, H, W), integers, under the same deformation."""
        return _SPATIAL.apply(y.float(), self._deformation, "nearest").to(y.dtype)
