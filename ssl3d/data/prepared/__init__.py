"""Prepared volumes: how they are made, stored and found again."""
