"""Dense CRF over the classes of one image (Krähenbühl and Koltun, 2011), through pydensecrf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, UInt8

from vpl_lightning.errors import ConfigurationError, DataError

UNARY_FLOOR = 1e-5
"""Smallest probability whose logarithm is taken (CLIP-ES, and pydensecrf's own ``unary_from_softmax``)."""
LEGACY_MEAN_BGR = (104.008, 116.669, 122.675)
"""Grey levels that deeplab-pytorch and CLIP-ES subtract before they cast to eight bits."""


@dataclass(frozen=True, kw_only=True)
class CRFConfig:
    """Constants of the dense CRF. The defaults are CLIP-ES's `eval_cam_with_crf.py`, on the plain RGB image.

    Attributes:
        iterations: Mean-field updates.
        smooth_weight: Weight of the kernel over positions alone.
        smooth_sigma_px: Its width in pixels.
        bilateral_weight: Weight of the kernel over positions and colours.
        bilateral_sigma_px: Its width in pixels.
        bilateral_sigma_rgb: Its width in grey levels.
        image: What the bilateral kernel sees: the image, or what :func:`legacy_wrapped_bgr` makes of it.
    """

    iterations: int = 10
    smooth_weight: float = 3.0
    smooth_sigma_px: float = 1.0
    bilateral_weight: float = 4.0
    bilateral_sigma_px: float = 67.0
    bilateral_sigma_rgb: float = 3.0
    image: Literal["rgb", "legacy_wrapped_bgr"] = "rgb"

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.iterations < 1:
            raise ConfigurationError(f"crf.iterations={self.iterations} must be at least 1")
        for key in ("smooth_sigma_px", "bilateral_sigma_px", "bilateral_sigma_rgb"):
            if not getattr(self, key) > 0:
                raise ConfigurationError(f"crf.{key}={getattr(self, key)} must be positive")
        for key in ("smooth_weight", "bilateral_weight"):
            if not getattr(self, key) >= 0:
                raise ConfigurationError(f"crf.{key}={getattr(self, key)} must be 0 (no such kernel) or more")
        if self.image not in ("rgb", "legacy_wrapped_bgr"):
            raise ConfigurationError(f"crf.image={self.image!r} must be 'rgb' or 'legacy_wrapped_bgr'")


CRF_PRESETS: dict[str, CRFConfig] = {
    "clip_es": CRFConfig(image="legacy_wrapped_bgr"),
    "clip_es_rgb": CRFConfig(),
    "deeplab": CRFConfig(image="legacy_wrapped_bgr"),
    "weclip": CRFConfig(smooth_sigma_px=3.0, bilateral_sigma_px=64.0, bilateral_sigma_rgb=5.0),
    "afa": CRFConfig(smooth_sigma_px=3.0, bilateral_sigma_px=64.0, bilateral_sigma_rgb=5.0),
    "toco": CRFConfig(smooth_weight=1.0, bilateral_sigma_px=121.0, bilateral_sigma_rgb=5.0),
}
"""Constants as published code has them.

``clip_es``: `eval_cam_with_crf.py`, the image as its cast leaves it; ``clip_es_rgb``: the same on the image
itself; ``deeplab``: deeplab-pytorch, whence CLIP-ES has both; ``weclip``: its test script, commented out
there; ``afa``: `test_msc_flip.py`; ``toco``: `infer_seg_voc.py`.
"""


def crf_config(crf: CRFConfig | str) -> CRFConfig:
    """Return the preset of a name, or the configuration itself.

    Raises:
        ConfigurationError: If nobody defined the name; lists those that exist.
    """
    if isinstance(crf, CRFConfig):
        return crf
    if crf not in CRF_PRESETS:
        raise ConfigurationError(f"crf={crf!r} is no preset; there are: {', '.join(CRF_PRESETS)}")
    return CRF_PRESETS[crf]


def dense_crf(
    image: UInt8[np.ndarray, "H W 3"], probabilities: Float[np.ndarray, "K+1 H W"], config: CRFConfig | str
) -> Float32[np.ndarray, "K+1 H W"]:
    """Refine the scores of the classes that are present with the mean field of a fully connected CRF.

    The unary energy is ``-log(clip(probability, 1e-5, 1))``; like CLIP-ES we do not first scale the scores of
    a pixel to the sum one, which only shifts its energies unless the clip acts. Potts model, symmetric
    normalisation.

    Args:
        image: As decoded.
        probabilities: Background first; only the classes that are present, which is what makes it fast.
        config: Constants, or the name of a preset.

    Returns:
        Marginals that sum to one in every pixel.

    Raises:
        DataError: If image and probabilities differ in size.
        ConfigurationError: If pydensecrf is missing or the preset unknown.
    """
    config = crf_config(config)
    labels, height, width = probabilities.shape
    if image.shape[:2] != (height, width):
        raise DataError(f"the image is {image.shape[:2]} pixels but its scores {(height, width)}")
    if labels == 1:
        return np.ones((1, height, width), np.float32)
    field = _densecrf().DenseCRF2D(width, height, labels)
    # The binding takes C-ordered, writable float32 and uint8 buffers only, and otherwise fails or misreads.
    energy = -np.log(np.clip(np.asarray(probabilities, np.float32), UNARY_FLOOR, 1))
    field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(labels, -1)))
    if config.smooth_weight > 0:
        field.addPairwiseGaussian(sxy=config.smooth_sigma_px, compat=config.smooth_weight)
    if config.bilateral_weight > 0:
        legacy = config.image == "legacy_wrapped_bgr"
        field.addPairwiseBilateral(
            sxy=config.bilateral_sigma_px,
            srgb=config.bilateral_sigma_rgb,
            rgbim=legacy_wrapped_bgr(image) if legacy else np.array(image, order="C"),
            compat=config.bilateral_weight,
        )
    return np.array(field.inference(config.iterations), np.float32).reshape(labels, height, width)


def legacy_wrapped_bgr(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image as CLIP-ES's CRF sees it: BGR minus the mean, truncated, negative values wrapped.

    Its script casts negative floats to eight bits, so that -94 becomes 162: the darker part of each channel
    ends up above the brighter one. C leaves that cast undefined; this is what x86 does, in integers and the
    same anywhere.
    """
    centred = image[..., ::-1].astype(np.float32) - np.array(LEGACY_MEAN_BGR, np.float32)
    return np.ascontiguousarray((np.trunc(centred).astype(np.int64) & 255).astype(np.uint8))


def check_densecrf() -> None:
    """Refuse to go on without pydensecrf.

    Raises:
        ConfigurationError: Naming the package and the way around it.
    """
    _densecrf()


def _densecrf() -> Any:
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise ConfigurationError(
            f"refiner='densecrf' needs the package pydensecrf2 ({error}): install it, or set refiner='pamr'"
        ) from error
    return densecrf
