"""VOC 2012 and SBD: finding them, deriving ``train_aug``, and its masks from SBD's MATLAB files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vpl_lightning.archives.lists import read_ids
from vpl_lightning.artifacts import read_mask, write_mask
from vpl_lightning.errors import ConfigurationError, DataError

LISTS = Path("ImageSets/Segmentation")
AUGMENTED = "SegmentationClassAug"
"""Folder of VOC's masks together with SBD's, under the name that other code bases use."""
OWN = "SegmentationClass"
"""Folder of VOC's own masks."""
VOC_CLASSES = 21


@dataclass(frozen=True)
class MaskJob:
    """Where the mask of one image comes from and goes to.

    Attributes:
        source: VOC's PNG or SBD's ``.mat``.
        target: Palette PNG.
    """

    source: Path
    target: Path


def voc_root(root: str | Path) -> Path:
    """Find the folder with ``JPEGImages``.

    Raises:
        ConfigurationError: If it is neither ``root`` nor below it; says where it looked.
    """
    places = [Path(root), Path(root) / "VOC2012", Path(root) / "VOCdevkit" / "VOC2012"]
    for place in places:
        if (place / "JPEGImages").is_dir():
            return place
    raise ConfigurationError(
        f"root='{root}' is no VOC 2012: no folder JPEGImages in {', '.join(map(str, places))}; give the path "
        "of VOC2012 or VOCdevkit"
    )


def sbd_root(sbd: str | Path) -> Path:
    """Find the folder with ``cls``, ``train.txt`` and ``val.txt`` of the unpacked ``benchmark.tgz``.

    Raises:
        ConfigurationError: If it is neither ``sbd`` nor below it; says where it looked.
    """
    places = [Path(sbd), Path(sbd) / "dataset", Path(sbd) / "benchmark_RELEASE" / "dataset"]
    for place in places:
        if (place / "cls").is_dir() and all((place / f"{name}.txt").is_file() for name in ("train", "val")):
            return place
    raise ConfigurationError(
        f"sbd='{sbd}' is no SBD: no folder cls with train.txt and val.txt in {', '.join(map(str, places))}; "
        "give the path of benchmark_RELEASE"
    )


def derive_train_aug(train: Sequence[str], val: Sequence[str], sbd: Path) -> list[str]:
    """Return SBD's train and val images and VOC's train images, without VOC's val images, sorted by id."""
    annotated = {*read_ids(sbd / "train.txt"), *read_ids(sbd / "val.txt")}
    return sorted((annotated | set(train)) - set(val))


def mask_jobs(ids: Sequence[str], root: Path, output: Path, sbd: Path | None) -> list[MaskJob]:
    """Plan the masks that ``output`` lacks and that have a source.

    VOC's own masks, which have void borders, go before SBD's.

    Args:
        ids: Images that need a mask.
        root: Folder of VOC.
        output: Folder that gets ``SegmentationClassAug``.
        sbd: Folder of SBD, if any.
    """
    jobs = []
    for name in ids:
        target = output / AUGMENTED / f"{name}.png"
        sources = [root / AUGMENTED / f"{name}.png", root / OWN / f"{name}.png"]
        if sbd:
            sources.append(sbd / "cls" / f"{name}.mat")
        source = next((path for path in sources if path.is_file()), None)
        if source is not None and not target.is_file():
            jobs.append(MaskJob(source, target))
    return jobs


def make_mask(job: MaskJob) -> str | None:
    """Write one mask as palette PNG; return what is wrong with its source, if anything."""
    try:
        mat = job.source.suffix == ".mat"
        mask = read_sbd_mask(job.source) if mat else read_mask(job.source, num_classes=VOC_CLASSES)
    except DataError as error:
        return str(error)
    write_mask(job.target, mask)
    return None


def read_sbd_mask(path: Path) -> UInt8[np.ndarray, "H W"]:
    """Read the label map of SBD's ``GTcls`` structure: 0 to 20, no void.

    Raises:
        DataError: If the file is not SBD's, or holds other values; names it.
    """
    from scipy.io import loadmat

    try:
        labels: Any = loadmat(path)["GTcls"]["Segmentation"][0, 0]
    except (OSError, ValueError, LookupError, RuntimeError, TypeError) as error:
        raise DataError(f"{path} is not SBD's (GTcls.Segmentation): {error}; unpack it again") from error
    mask = np.asarray(labels)
    if (
        mask.dtype.kind not in "ui"
        or mask.ndim != 2
        or not mask.size
        or mask.min() < 0
        or mask.max() >= VOC_CLASSES
    ):
        raise DataError(
            f"{path}: GTcls.Segmentation must be a matrix of labels 0 to {VOC_CLASSES - 1}; unpack it again"
        )
    return mask.astype(np.uint8)
