"""The interface of every generator of class activation maps, ours or a stranger's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vpl_lightning.clip import ClassSet, CLIPEncoder, class_set
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.structures import ClassCAMs, EncodedImages, ImageArray

UNIT_TOLERANCE = 1e-2
"""How far the length of a prototype may be from one before it is refused (half precision rounds to 1e-3)."""


@dataclass(frozen=True, kw_only=True)
class BaselineInfo:
    """Provenance of a generator, as ``vpl baselines`` prints it."""

    paper: str
    origin: str
    licence: str


class CAMGenerator(nn.Module, ABC):
    """Makes localisation maps for the classes that an image is tagged with, by comparing it with prototypes.

    A generator implements :meth:`localise` alone. Text and vision prototypes are the same thing to it: rows
    of :attr:`prototypes`, the ``N`` foreground classes first, then the ``M`` background words.

    One that learns from the whole data set before use sets :attr:`needs_fit` and implements :meth:`observe`,
    :meth:`bank_state` and :meth:`fit`: phase 1 then passes once over the training images, each process over
    its share, fits with what all of them noted, and keeps that beside the prototypes. Without it,
    :meth:`localise` must still work.

    Args:
        encoder: The frozen CLIP.
        classes: ``"voc"``, ``"coco"``, another shipped name, the path of a YAML file, or a :class:`ClassSet`.
    """

    info: BaselineInfo = BaselineInfo(paper="", origin="", licence="")
    needs_fit: ClassVar[bool] = False
    """Whether a pass over the training images comes before use."""

    def __init__(self, encoder: CLIPEncoder, classes: ClassSet | str) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = class_set(classes)
        text = encoder.encode_classes(self.classes)
        self.scale = encoder.logit_scale
        """Factor of the cosines in the softmax over prototypes; CLIP's own (100) for text."""
        self.text_prototypes: Float[Tensor, "C D"]
        self._prototypes: Float[Tensor, "C D"]
        self.register_buffer("text_prototypes", text, persistent=False)
        self.register_buffer("_prototypes", text.clone(), persistent=False)

    @property
    def prototypes(self) -> Float[Tensor, "C D"]:
        """Unit rows, foreground then background, float32: text at first."""
        return self._prototypes

    @prototypes.setter
    def prototypes(self, value: Float[Tensor, "C D"]) -> None:
        if value.shape != self._prototypes.shape:
            raise ConfigurationError(
                f"prototypes must have shape {tuple(self._prototypes.shape)} (foreground, then background "
                f"rows, times the joint width), got {tuple(value.shape)}"
            )
        value = value.detach().to(self._prototypes)
        lengths = value.norm(dim=-1)
        if not bool(((lengths - 1).abs() < UNIT_TOLERANCE).all()):
            raise ConfigurationError(
                f"prototypes must be unit rows; lengths run from {lengths.min():.4g} to {lengths.max():.4g}: "
                "normalise them first"
            )
        self._prototypes = F.normalize(value, dim=-1)

    @abstractmethod
    def localise(
        self, images: Sequence[ImageArray], encoded: EncodedImages, labels: Sequence[Tensor]
    ) -> list[ClassCAMs]:
        """Make the maps of images that share a patch grid.

        Args:
            images: The images as decoded, each of its own size.
            encoded: What the frozen CLIP made of them, in the same order.
            labels: For each image its ``(K,)`` int64 foreground ids, in the order in which the maps must
                come; never empty, never twice the same.

        Returns:
            One :class:`ClassCAMs` an image. Maps lie in [0, 1], are finite, carry no gradient and depend on
            nothing but the arguments and the prototypes (and what :meth:`fit` learnt): not on the other
            images of the batch. ``vpl_lightning.testing`` checks a generator against this.
        """

    def observe(
        self,
        keys: Sequence[str],
        images: Sequence[ImageArray],
        encoded: EncodedImages,
        labels: Sequence[Tensor],
    ) -> None:
        """Note what :meth:`fit` needs of images that share a patch grid; does nothing unless overridden.

        Args:
            keys: Image ids. What is noted must not depend on the order in which images come.
            images: As :meth:`localise` takes them; ``encoded`` and ``labels`` likewise.
            encoded: What the frozen CLIP made of the images.
            labels: Foreground ids of each.
        """

    def bank_state(self) -> dict[str, Tensor]:
        """Return all that was noted, as tensors that safetensors can hold; empty unless overridden."""
        return {}

    def fit(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over what processes noted (the :meth:`bank_state` of each) and get ready for use.

        Afterwards :meth:`bank_state` returns all of it, so that fitting with that alone does the same.
        """

    def generate(self, image: ImageArray | Image.Image, labels: Sequence[int]) -> ClassCAMs:
        """Make the maps of one image.

        Args:
            image: RGB, uint8 ``(H, W, 3)`` or a PIL image.
            labels: 0-based foreground ids.
        """
        return self.generate_batch([image], [labels])[0]

    def generate_batch(
        self, images: Sequence[ImageArray | Image.Image], labels: Sequence[Sequence[int]]
    ) -> list[ClassCAMs]:
        """Make the maps of many images, those of equal grid together; equal to one :meth:`generate` an image.

        Raises:
            DataError: If an image is not uint8 RGB, or its labels are empty, repeated or unknown.
        """
        maps: dict[int, ClassCAMs] = {}
        for members, _, found in self.stream(images, labels):
            maps.update(zip(members, found, strict=True))
        return [maps[index] for index in range(len(images))]

    def stream(
        self,
        images: Sequence[ImageArray | Image.Image],
        labels: Sequence[Sequence[int]],
        *,
        resized: Sequence[ImageArray] | None = None,
        batch_size: int | None = None,
    ) -> Iterator[tuple[list[int], EncodedImages, list[ClassCAMs]]]:
        """Encode images of equal grid together and localise them, a batch at a time.

        Args:
            images: As decoded.
            labels: Foreground ids of each.
            resized: The images on a patch multiple, where a loader has done :meth:`CLIPEncoder.resize`.
            batch_size: At most so many images at once; all of a grid if None.

        Yields:
            Positions in ``images``, what the encoder made of those images, and their maps.

        Raises:
            DataError: If an image is not uint8 RGB, or its labels are empty, repeated or unknown.
        """
        for members, arrays, encoded, ids in self._encoded_groups(images, labels, resized, batch_size):
            yield members, encoded, self.localise(arrays, encoded, ids)

    def observe_images(
        self,
        keys: Sequence[str],
        images: Sequence[ImageArray | Image.Image],
        labels: Sequence[Sequence[int]],
        *,
        resized: Sequence[ImageArray] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Encode images of equal grid together and :meth:`observe` them.

        Args:
            keys: Image ids.
            images: As :meth:`stream` takes them, like all other arguments.
            labels: Foreground ids of each.
            resized: The images on a patch multiple, if at hand.
            batch_size: At most so many images at once.
        """
        for members, arrays, encoded, ids in self._encoded_groups(images, labels, resized, batch_size):
            self.observe([keys[i] for i in members], arrays, encoded, ids)

    def _encoded_groups(
        self,
        images: Sequence[ImageArray | Image.Image],
        labels: Sequence[Sequence[int]],
        resized: Sequence[ImageArray] | None,
        batch_size: int | None,
    ) -> Iterator[tuple[list[int], list[ImageArray], EncodedImages, list[Tensor]]]:
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images but {len(labels)} label lists")
        arrays = [as_rgb(image) for image in images]
        ids = [self.check_labels(one) for one in labels]
        pixels = [self.encoder.resize(array) for array in arrays] if resized is None else resized
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, array in enumerate(pixels):
            groups.setdefault(array.shape, []).append(index)
        for group in groups.values():
            for start in range(0, len(group), batch_size or len(group)):
                members = group[start : start + (batch_size or len(group))]
                encoded = self.encoder.encode(np.stack([pixels[i] for i in members]))
                yield members, [arrays[i] for i in members], encoded, [ids[i] for i in members]

    def check_labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        """Return labels as ``(K,)`` int64 on the generator's device.

        Raises:
            DataError: If there are none, one is repeated, or one is outside the class set.
        """
        ids = [int(label) for label in labels]
        known = len(self.classes.foreground)
        if not ids:
            raise DataError("an image without labels has no maps: leave it out, or tag it")
        if len(set(ids)) != len(ids):
            raise DataError(f"labels {ids} repeat a class")
        if min(ids) < 0 or max(ids) >= known:
            raise DataError(f"labels {ids} leave the {known} classes 0..{known - 1} of '{self.classes.name}'")
        return torch.tensor(ids, dtype=torch.int64, device=self._prototypes.device)


def as_rgb(image: ImageArray | Image.Image) -> ImageArray:
    """Return an image as uint8 ``(H, W, 3)``.

    Raises:
        DataError: If an array has another type or shape.
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise DataError(f"an image must be uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}")
    return image
