"""From localisation maps to labels: a background score, the arg max, pixels too uncertain to learn from."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8

from vpl_lightning.errors import ConfigurationError, DataError

VOID = 255
"""Label of pixels that nobody trains or scores on, as in VOC."""


def with_background(
    maps: Float[np.ndarray, "K H W"], *, power: float = 1.0, threshold: float | None = None
) -> Float32[np.ndarray, "K+1 H W"]:
    """Put a score for background in front of the maps.

    ``(1 - max over the classes) ** power``, which CLIP-ES's `eval_cam_with_crf.py` uses with power 1 before
    its CRF and `eval_cam.py` with powers 1 to 10; or a constant, as in the CAM literature before it. CLIP-ES
    computes it in half precision, we in single.

    Args:
        maps: In [0, 1].
        power: Above 1 the background shrinks.
        threshold: Constant score in place of the power.
    """
    maps = np.asarray(maps, np.float32)
    scores = np.empty((len(maps) + 1, *maps.shape[1:]), np.float32)
    scores[1:] = maps
    if threshold is not None:
        scores[0] = threshold
    else:
        scores[0] = (1 - maps.max(0, initial=0)) ** np.float32(power)
    return scores


def normalised(scores: Float[np.ndarray, "K+1 H W"]) -> Float32[np.ndarray, "K+1 H W"]:
    """Divide the scores of each pixel by their sum; a pixel without any score becomes background."""
    scores = np.asarray(scores, np.float32)
    total = scores.sum(0)
    shares = scores / np.where(total > 0, total, 1)
    shares[0] += total <= 0
    return shares


def label_map(
    scores: Float[np.ndarray, "K+1 H W"],
    classes: Integer[np.ndarray, " K"],
    *,
    confidence: float = 0.0,
) -> UInt8[np.ndarray, "H W"]:
    """Give each pixel the label of its highest score: 0 for the first, class id + 1 for the others.

    CLIP-ES's "confidence-guided loss" is no more than the ``confidence`` here: `eval_cam_with_crf.py` writes
    255 where the CRF's highest probability is below 0.95, and cross-entropy ignores 255.

    Args:
        scores: Background first.
        classes: 0-based ids of the others, in order.
        confidence: Pixels whose highest score is below become 255.

    Raises:
        DataError: If there are not as many classes as scores behind the background, or an id has no label.
    """
    classes = np.asarray(classes, np.int64)
    if len(scores) != len(classes) + 1:
        raise DataError(f"{len(scores)} scores go with {len(scores) - 1} classes, got {len(classes)}")
    if ((classes < 0) | (classes >= VOID - 1)).any():
        raise DataError(f"class ids must lie in 0..{VOID - 2} to fit into 8 bits, got {classes.tolist()}")
    labels: UInt8[np.ndarray, " K+1"] = np.concatenate([[0], classes + 1]).astype(np.uint8)
    winners: UInt8[np.ndarray, "H W"] = labels[np.argmax(scores, axis=0)]
    if confidence > 0:
        winners[scores.max(0) < confidence] = VOID
    return winners


def check_background(*, power: float, threshold: float | None) -> None:
    """Refuse settings of the background score that mean nothing.

    Raises:
        ConfigurationError: Naming the key and the value.
    """
    if not power > 0:
        raise ConfigurationError(f"power={power} of the background score must be positive; CLIP-ES uses 1")
    if threshold is not None and not 0 < threshold < 1:
        raise ConfigurationError(f"threshold={threshold} of the background must lie between 0 and 1")
