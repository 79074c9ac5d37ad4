"""Losses: each has a slow, obvious second form in the tests."""

from ssl3d.losses.contrastive import alignment as alignment
from ssl3d.losses.contrastive import cosine_distance as cosine_distance
from ssl3d.losses.contrastive import matching_error as matching_error
from ssl3d.losses.contrastive import negative_cosine as negative_cosine
from ssl3d.losses.contrastive import nt_xent as nt_xent
from ssl3d.losses.contrastive import uniformity as uniformity
from ssl3d.losses.dice import segmentation_loss as segmentation_loss
from ssl3d.losses.dice import soft_dice_loss as soft_dice_loss
from ssl3d.losses.ncc import ncc_loss as ncc_loss
from ssl3d.losses.smoothness import smoothness_loss as smoothness_loss

__all__ = [
    "alignment",
    "cosine_distance",
    "matching_error",
    "ncc_loss",
    "negative_cosine",
    "nt_xent",
    "segmentation_loss",
    "smoothness_loss",
    "soft_dice_loss",
    "uniformity",
]
