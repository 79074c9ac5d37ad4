"""Kinds of tasks: head, loss and metric of each."""
