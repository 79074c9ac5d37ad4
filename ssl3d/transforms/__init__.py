"""Batched transforms, on the device of the volumes; randomness from :class:`ssl3d.rng.BatchRng`."""

from ssl3d.transforms.appearance import BezierIntensity as BezierIntensity
from ssl3d.transforms.appearance import BrightnessContrast as BrightnessContrast
from ssl3d.transforms.appearance import Gamma as Gamma
from ssl3d.transforms.appearance import GaussianBlur as GaussianBlur
from ssl3d.transforms.appearance import GaussianNoise as GaussianNoise
from ssl3d.transforms.appearance import InPainting as InPainting
from ssl3d.transforms.appearance import LocalShuffle as LocalShuffle
from ssl3d.transforms.appearance import OutPainting as OutPainting
from ssl3d.transforms.contrastive import RandomViews as RandomViews
from ssl3d.transforms.spatial import Flip as Flip
from ssl3d.transforms.spatial import RandomResizedCrop as RandomResizedCrop
from ssl3d.transforms.spatial import RandomSpatial as RandomSpatial
from ssl3d.transforms.spatial import SpatialParameters as SpatialParameters

__all__ = [
    "BezierIntensity",
    "BrightnessContrast",
    "Flip",
    "Gamma",
    "GaussianBlur",
    "GaussianNoise",
    "InPainting",
    "LocalShuffle",
    "OutPainting",
    "RandomResizedCrop",
    "RandomSpatial",
    "RandomViews",
    "SpatialParameters",
]
