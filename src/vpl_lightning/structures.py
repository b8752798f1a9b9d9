"""The values that travel between the parts, and the letters that their shapes are written in.

Legend, used in every signature and docstring of the library:

===== =====================================================================================
``B`` images in a batch
``K`` foreground classes present in one image
``N`` foreground classes of the class set; ``M`` background words; ``C = N + M`` prototypes
``D`` width of CLIP's joint image-text space
``V`` width of CLIP's vision transformer
``P`` patches of an image, ``P = h * w``; ``T = 1 + P`` tokens, class token first
``H W`` height and width in pixels; ``h w`` the same in patches
``Q`` selected patches ("pixels" in the paper) of a data set or of a chunk of it
===== =====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

ImageArray = UInt8[np.ndarray, "H W 3"]
"""An RGB image as decoded."""


class EncodedImages(NamedTuple):
    """Images of one patch grid after every block of the vision transformer but the last."""

    tokens: Float[Tensor, "B T V"]
    """Residual stream that enters the last block, class token first."""
    attention: Float[Tensor, "B T T"]
    """Sum of the head-averaged attention maps of the ``attention_blocks - 1`` blocks before the last."""
    attention_blocks: int
    """How many blocks, the last one included, the affinity averages over."""
    grid: tuple[int, int]
    """``(h, w)`` in patches."""


@dataclass(frozen=True)
class ClassCAMs:
    """Localisation maps of the classes of one image."""

    classes: Int[Tensor, " K"]
    """0-based foreground ids, in the order in which the labels were given."""
    cams: Float[Tensor, "K h w"]
    """Class activation maps on the patch grid, each scaled to [0, 1]."""
    affinity: Float[Tensor, "K r s"]
    """Maps after class-aware attention affinity, in [0, 1], on whatever grid the generator works on."""
    size: tuple[int, int]
    """``(H, W)`` of the image."""

    @cached_property
    def refined(self) -> Float[Tensor, "K H W"]:
        """``affinity`` at image size (bilinear, half-pixel centres, as ``cv2.resize``)."""
        if self.affinity.shape[0] == 0:
            return self.affinity.new_zeros(0, *self.size)
        return F.interpolate(self.affinity[None], self.size, mode="bilinear", align_corners=False)[0]

    def cpu(self) -> ClassCAMs:
        """Return the same maps in host memory."""
        return ClassCAMs(self.classes.cpu(), self.cams.cpu(), self.affinity.cpu(), self.size)
