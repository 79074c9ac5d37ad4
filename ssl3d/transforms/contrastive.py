"""The random views that every contrastive and clustering method sees."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator
from torch import Tensor

from ssl3d.config import Model
from ssl3d.rng import BatchRng
from ssl3d.transforms.appearance import BrightnessContrast, Gamma, GaussianBlur, GaussianNoise
from ssl3d.transforms.spatial import Flip, RandomResizedCrop


class RandomViews(Model):
    """Random views of crops: box, flips, then intensity; the same for every method that compares views.

    So a difference between SimCLR, BYOL, SimSiam and DeepCluster is no difference of augmentations:
    equal settings, seed and step give equal views.

    Two boxes of at least half an edge share some of the anatomy, which the views of a volume need: with
    nothing in common but its intensities, a network learns those alone. The intensity transforms
    take even that away.
    """

    edge: float = Field(0.5, gt=0, le=1)
    """Edge of a view as a fraction of the crop's. A step has the same voxels whatever it is: at 0.5, eight views
    for each crop. Methods that compare samples need that many, and learn nothing from two."""
    box: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest edge of the random box, as a fraction of the crop's edge; resampled to the view."""
    flip_p: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring, for each axis."""
    contrast_p: float = Field(0.8, ge=0, le=1)
    """Probability of changing brightness and contrast."""
    brightness: float = Field(0.2, ge=0, le=1)
    """Largest |shift| on the [0, 1] scale."""
    contrast: tuple[float, float] = (0.75, 1.25)
    """Smallest and largest factor about the mean."""
    gamma_p: float = Field(0.5, ge=0, le=1)
    """Probability of a gamma curve."""
    gamma: tuple[float, float] = (0.7, 1.5)
    """Smallest and largest exponent."""
    blur_p: float = Field(0.5, ge=0, le=1)
    """Probability of Gaussian blur."""
    blur: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest standard deviation of the blur in voxels."""
    noise_p: float = Field(0.5, ge=0, le=1)
    """Probability of Gaussian noise."""
    noise: float = Field(0.05, ge=0, le=1)
    """Largest standard deviation of the noise on the [0, 1] scale."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> RandomViews:
        for key in ("box", "contrast", "gamma", "blur"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise ValueError(f"{key}={low, high}: use 0 < smallest <= largest")
        if self.box[1] > 1:
            raise ValueError(f"box={self.box}: a box has at most the edge of the crop, 1")
        return self

    def shape(self, crop: Sequence[int]) -> tuple[int, int, int]:
        """Return the edges (D, H, W) of a view of a crop with these edges, in voxels."""
        d, h, w = (max(1, round(self.edge * n)) for n in crop)
        return d, h, w

    def view(self, x: Tensor, rng: BatchRng) -> Tensor:
        """Return one random view of each crop (B, 1, D, H, W), with the edges of :meth:`shape`; in [0, 1]."""
        x = RandomResizedCrop(self.shape(x.shape[2:]), self.box)(x, rng.fork("box"))
        x = Flip(self.flip_p)(x, rng.fork("flip"))
        contrast = BrightnessContrast(self.contrast_p, (-self.brightness, self.brightness), self.contrast)
        x = contrast(x, rng.fork("contrast"))
        x = Gamma(self.gamma_p, self.gamma)(x, rng.fork("gamma"))
        x = GaussianBlur(self.blur_p, self.blur)(x, rng.fork("blur"))
        return GaussianNoise(self.noise_p, (0.0, self.noise))(
            x, rng.fork("noise")
        )  # last: blur would remove it

    def pair(self, x: Tensor, rng: BatchRng) -> tuple[Tensor, Tensor]:
        """Return two independent views of each crop; see :meth:`view`."""
        return self.view(x, rng.fork("first")), self.view(x, rng.fork("second"))
