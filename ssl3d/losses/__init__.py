"""Losses: each has a slow, obvious second form in the tests."""

from ssl3d.losses.ncc import ncc_loss as ncc_loss
from ssl3d.losses.smoothness import smoothness_loss as smoothness_loss
