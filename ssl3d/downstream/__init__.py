"""Downstream evaluation: tasks, the one harness, inference and metrics."""
