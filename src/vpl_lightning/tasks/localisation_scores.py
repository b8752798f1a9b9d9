"""How well prototypes localise: mIoU of raw maps, refined maps and pseudo-masks, and the gap to the true regions."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from vpl_lightning.functional.gap import gap_centroid, gap_cos, region_sums
from vpl_lightning.functional.labels import label_map, with_background
from vpl_lightning.masks import MaskConfig, make_mask
from vpl_lightning.metrics import SegmentationConfusion
from vpl_lightning.structures import ClassCAMs, ImageArray

MAPS = ("raw", "refined", "mask")
"""Class activation maps, maps after affinity, pseudo-masks without void."""


class RegionSums(Metric):
    """Sums of patch features over the true regions of each foreground class, over a data set and all ranks.

    Args:
        num_labels: N.
        width: D.
    """

    full_state_update = False
    sums: Float[Tensor, "N D"]
    counts: Float[Tensor, " N"]

    def __init__(self, num_labels: int, width: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(num_labels, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_labels, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """True: a rank that got no image of a small data set has nothing to warn of."""
        return True

    def update(
        self, features: Float[Tensor, "P D"], mask: Int64[Tensor, "H W"], grid: tuple[int, int]
    ) -> None:
        """Add one image; a patch belongs to the label at its centre."""
        labels = F.interpolate(mask[None, None].float(), grid, mode="nearest-exact").flatten().long()
        regions = labels == torch.arange(1, len(self.counts) + 1, device=labels.device)[:, None]
        sums, counts = region_sums(features, regions)
        self.sums += sums
        self.counts += counts

    def compute(self) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
        """Return the sums and how many patches each class has."""
        return self.sums, self.counts


class LocalisationScores(nn.Module):
    """Confusion matrices of one set of prototypes.

    Args:
        num_classes: N + 1.
        masks: How pseudo-masks are made; scored at their arg max, without void. Not scored if None.
        power: Exponent of the background score of the maps; fixed in advance, never tuned on the truth.
    """

    def __init__(self, num_classes: int, *, masks: MaskConfig | None, power: float = 1.0) -> None:
        super().__init__()
        self.masks = masks
        self.power = power
        kinds = MAPS if masks is not None else MAPS[:2]
        self.confusions = nn.ModuleDict({kind: SegmentationConfusion(num_classes) for kind in kinds})

    def update(self, image: ImageArray, maps: ClassCAMs, mask: Int64[Tensor, "H W"]) -> None:
        """Score the maps of one image."""
        found = maps.cpu()
        classes = found.classes.numpy()
        raw = ClassCAMs(found.classes, found.cams, found.cams, found.size).refined
        predictions = {
            "raw": label_map(with_background(raw.numpy(), power=self.power), classes),
            "refined": label_map(with_background(found.refined.numpy(), power=self.power), classes),
        }
        if self.masks is not None:
            predictions["mask"] = make_mask(image, found.affinity.numpy(), classes, self.masks)
        for kind, prediction in predictions.items():
            cast(SegmentationConfusion, self.confusions[kind]).update(
                torch.from_numpy(prediction).to(mask.device), mask
            )

    def compute(self) -> dict[str, float]:
        """Return the mIoU of each kind of map, in [0, 1]."""
        return {kind: cast(SegmentationConfusion, one).miou() for kind, one in self.confusions.items()}

    def reset(self) -> None:
        """Start anew."""
        for one in self.confusions.values():
            cast(SegmentationConfusion, one).reset()


class PrototypeComparison(nn.Module):
    """Text against vision prototypes on images with truth: scores of their maps, and gaps to the true regions.

    Args:
        num_labels: N.
        width: D.
        masks: How pseudo-masks are made, or None to leave them out.
    """

    def __init__(self, num_labels: int, width: int, *, masks: MaskConfig | None) -> None:
        super().__init__()
        self.text = LocalisationScores(num_labels + 1, masks=masks)
        self.vision = LocalisationScores(num_labels + 1, masks=masks)
        self.regions = RegionSums(num_labels, width)

    def table(self, text: Float[Tensor, "C D"], vision: Float[Tensor, "C D"]) -> dict[str, dict[str, float]]:
        """Return mIoU of each kind of map and the gap in both readings, and start anew.

        Every rank must call this, whether it had images or not.
        """
        sums, counts = self.regions.compute()
        table: dict[str, dict[str, float]] = {}
        for kind, scores, prototypes in (("text", self.text, text), ("vision", self.vision, vision)):
            foreground = prototypes[: len(counts)]
            table[kind] = {
                **scores.compute(),
                "gap": gap_centroid(foreground, sums, counts),
                "gap_cos": gap_cos(foreground, sums, counts),
            }
            scores.reset()
        self.regions.reset()
        return table
