"""Which values the options of ``clip_cpal`` may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from vpl_lightning.clip import DenseKind
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.context import Fusion, Shift

Seeds = Literal["refined", "raw"]

CHOICES = {"features": DenseKind, "seeds": Seeds, "shift": Shift, "fusion": Fusion}
FRACTIONS = ("box_threshold", "seed_threshold")
COUNTS = ("capacity", "clusters", "neighbours")


def check_settings(values: Mapping[str, Any]) -> None:
    """Check every option.

    Raises:
        ConfigurationError: Naming the first wrong one, its value and what it may be.
    """
    for key, choices in CHOICES.items():
        if values[key] not in get_args(choices):
            raise ConfigurationError(f"{key}={values[key]!r} is none of {', '.join(get_args(choices))}")
    for key in FRACTIONS:
        if not 0 <= values[key] < 1:
            raise ConfigurationError(f"{key}={values[key]} must lie in [0, 1)")
    for key in COUNTS:
        if values[key] < 1:
            raise ConfigurationError(f"{key}={values[key]} must be at least 1")
    if values["temperature"] <= 0:
        raise ConfigurationError(f"temperature={values['temperature']} must be positive")
