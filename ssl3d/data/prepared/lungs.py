"""Lungs by the network of the package lungmask, where it is installed and its weights are on the disk.

Hofmanninger et al., European Radiology Experimental 4:50, 2020 (github.com/JoHof/lungmask). Unlike air
found by a threshold, its lungs include consolidation, effusion and tumours. The package would fetch
weights that it misses; here they are always a file that the user names, so nothing is fetched.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data.checks.intensity import HU_OFFSET
from ssl3d.errors import ConfigError

_lock = threading.Lock()  # one volume at a time on the device, and one loading
_loaded: dict[Path, Any] = {}


def weights_digest(weights: Path) -> str:
    """Return the SHA-256 of a file of weights.

    Raises:
        ConfigError: no such file.
    """
    try:
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        raise ConfigError(
            f"lungmask: {weights} is no file that can be read. Give the weights of lungmask, for example "
            "unet_r231-d5d2fc3d.pth from its releases (nothing is downloaded), or leave the option out: lungs "
            "are then found as air inside the body."
        ) from None


def load_lungmask(weights: Path) -> Any:
    """Return lungmask's ``LMInferer`` with these weights; loaded once.

    Raises:
        ConfigError: lungmask is not installed, or the file does not hold weights of its network.
    """
    with _lock:
        if weights not in _loaded:
            weights_digest(weights)  # the file is there
            try:
                with warnings.catch_warnings():  # it silences all warnings of the process when imported
                    from lungmask import LMInferer
            except ImportError as error:
                raise ConfigError(
                    f'lungmask cannot be imported ({error}). Install it: pip install "ssl3d[lungs]"; or leave '
                    "the option lungmask out: lungs are then found as air inside the body."
                ) from error
            logging.getLogger("lungmask").setLevel(logging.WARNING)
            try:
                _loaded[weights] = LMInferer(modelpath=str(weights), tqdm_disable=True)
            except (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError,
                    pickle.UnpicklingError) as error:  # fmt: skip
                reason = str(error).partition("\n")[0]
                raise ConfigError(
                    f"lungmask: {weights} does not hold weights of its network: {reason}. Give a file of its releases."
                ) from error
        return _loaded[weights]


def lungs_by_network(data: np.ndarray, weights: Path) -> np.ndarray:
    """Return the lungs of a CT: (D, H, W) bool.

    On the first GPU where there is one, as lungmask chooses.

    Args:
        data: (D, H, W) along R, A, S; values after the offset (air near 0, water near 1000).
        weights: a file of lungmask's releases.

    Raises:
        ConfigError: as :func:`load_lungmask`.
    """
    inferer = load_lungmask(weights)
    hu = data[::-1, ::-1].transpose(2, 1, 0) - HU_OFFSET  # (D, H, W) -> (W, H, D): slices, rows, columns; LPS
    with _lock:
        found = inferer.apply(hu)  # (W, H, D), 0 outside
    return (found > 0).transpose(2, 1, 0)[::-1, ::-1]  # -> (D, H, W)
