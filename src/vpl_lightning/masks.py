"""One pseudo-mask: settings, and the way from the maps of an image to its labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.crf import CRFConfig, check_densecrf, crf_config, dense_crf
from vpl_lightning.functional.labels import check_background, label_map, normalised, with_background
from vpl_lightning.functional.resize import resize_bilinear

VERSION = 1
"""Version of this stage's code, part of every mask's fingerprint; raised when masks come out differently."""
CONFIDENCE = 0.95
"""Probability below which CLIP-ES's `eval_cam_with_crf.py` gives a pixel up."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How maps become a pseudo-mask. The defaults are CLIP-ES's.

    Attributes:
        refiner: ``densecrf``, ``pamr`` where no dense CRF can be built, or ``none``.
        crf: Constants of the dense CRF, or the name of a preset.
        power: Exponent of the background score ``(1 - max) ** power``.
        threshold: Constant background score in place of it.
        confidence: Pixels whose best class has a lower probability become 255. None: 0.95 behind a dense CRF
            and 0 (none of them) otherwise, since only a dense CRF's probabilities are as sharp as that.
    """

    refiner: Literal["densecrf", "pamr", "none"] = "densecrf"
    crf: str | CRFConfig = "clip_es"
    power: float = 1.0
    threshold: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.refiner not in ("densecrf", "pamr", "none"):
            raise ConfigurationError(f"refiner={self.refiner!r} must be 'densecrf', 'pamr' or 'none'")
        crf_config(self.crf)
        check_background(power=self.power, threshold=self.threshold)
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ConfigurationError(
                f"confidence={self.confidence} is a probability: 0 keeps all, 0.95 is CLIP-ES's"
            )

    @property
    def least_confidence(self) -> float:
        """``confidence``, or what None stands for."""
        if self.confidence is not None:
            return self.confidence
        return CONFIDENCE if self.refiner == "densecrf" else 0.0

    def check_refiner(self) -> None:
        """Refuse a refiner that is not installed.

        Raises:
            ConfigurationError: Naming the package and the way around it.
        """
        if self.refiner == "densecrf":
            check_densecrf()

    def settings(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that a mask depends on, for its manifest and fingerprint.

        Args:
            inputs: What the maps depend on: weights, prototypes, generator, data.
        """
        own: dict[str, Any] = {
            "version": VERSION,
            "refiner": self.refiner,
            "power": self.power,
            "threshold": self.threshold,
            "confidence": self.least_confidence,
        }
        if self.refiner == "densecrf":
            own["crf"] = asdict(crf_config(self.crf))
        return {**inputs, "masks": own}


def make_mask(
    image: UInt8[np.ndarray, "H W 3"],
    maps: Float[np.ndarray, "K r s"],
    classes: Integer[np.ndarray, " K"],
    config: MaskConfig,
    *,
    device: str = "cpu",
) -> UInt8[np.ndarray, "H W"]:
    """Make the pseudo-mask of one image from its refined maps.

    Args:
        image: As decoded.
        maps: In [0, 1], on any grid.
        classes: 0-based ids of the maps.
        config: The settings.
        device: Where PAMR computes.

    Raises:
        DataError: If maps and classes do not fit together.
    """
    height, width = image.shape[:2]
    scores = with_background(
        resize_bilinear(maps, (height, width)), power=config.power, threshold=config.threshold
    )
    return label_map(_refine(image, scores, config, device), classes, confidence=config.least_confidence)


def _refine(
    image: UInt8[np.ndarray, "H W 3"], scores: Float32[np.ndarray, "K+1 H W"], config: MaskConfig, device: str
) -> Float32[np.ndarray, "K+1 H W"]:
    if config.refiner == "densecrf":
        return dense_crf(image, scores, config.crf)
    shares = normalised(scores)
    if config.refiner == "none":
        return shares
    import torch

    from vpl_lightning.functional.pamr import pamr

    refined = pamr(torch.tensor(image, device=device), torch.from_numpy(shares).to(device))
    return refined.cpu().numpy()
