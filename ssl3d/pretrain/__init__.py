"""Pretraining: the method contract, the one loop, checkpoints and monitors."""
