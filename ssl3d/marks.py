"""A mark for functions and classes that change no number."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def without_effect(marked: T) -> T:
    """Mark a function or class that changes no number, such as one that logs."""
    return marked
