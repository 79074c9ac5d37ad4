"""No pretraining: the baseline that every table is compared with."""

from ssl3d import Method


class Scratch(Method):
    """Random weights, no pretraining."""

    name = "scratch"
    title = "Scratch"
    trains = "none"
