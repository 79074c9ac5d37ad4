"""Weights in and out: checkpoints, export, import, hub."""
