"""Which pixels teach the prototypes, and what they teach: seeds from localisation maps, targets from text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.columns import Background, Columns
from vpl_lightning.functional.sampling import keep_smallest, pixel_priorities

TargetMode = Literal["soft", "hardened", "seed_hard", "seeded_soft", "prod", "avg"]
Unit = Literal["pixel", "region", "image"]
Balance = Literal["none", "image", "class"]

SEEDLESS: tuple[TargetMode, ...] = ("soft", "hardened")
"""Modes that take every pixel, whatever the maps say."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """How a pixel is chosen for phase 1 and what it should be told.

    A pixel is a seed of every present class whose map reaches ``seed_threshold`` there, of the background if
    all maps stay below ``background_threshold``, and unused otherwise. Its target over the prototypes is,
    with ``text`` the softmax of its cosines with the text prototypes at ``tau_text``:

    ================ =================================================================================
    ``soft``         ``text``, for every pixel (the paper's equation 7 taken literally)
    ``hardened``     ``text``, one-hot where it exceeds ``harden_above`` (InMaP), for every pixel
    ``seed_hard``    one-hot of the class with the highest map (the paper's equation 3)
    ``seeded_soft``  one-hot where one class alone is a seed, ``text`` where several are
    ``prod``         ``text`` times the 0/1 seed mask, renormalised
    ``avg``          half ``text``, half one-hot of the class with the highest map
    ================ =================================================================================

    Background seeds get ``text`` over the background words alone, except in ``soft``, ``hardened`` (``text``
    over everything), ``seed_hard`` (the best word) and the text half of ``avg``.

    Attributes:
        mode: See above.
        seed_threshold: The paper's Phi, on maps in [0, 1].
        background_threshold: The same for the background; 0.15 is what our measurements used.
        harden_above: Probability above which ``hardened`` decides; InMaP's alpha.
        restrict: Whether ``text`` ranges over the image's own classes and the background, or over all.
        tau_text: The paper's tau_T; CLIP's own temperature is 0.01.
        background: How the background words take part, see :class:`Columns`.
        unit: What counts as one sample: a pixel, the mean feature of each class's seeds and of the background
            in an image, or of all foreground seeds of an image (of the whole image in modes without seeds).
        balance: Weight of a sample: equal, or equal in sum over each image, or inverse to how many images
            have its class.
        max_pixels_per_image: A seeded random choice of at most so many samples an image; all if None.
        sinkhorn_rounds: Rounds of InMaP's balancing of the targets over the whole data set; 0 is off.
        sinkhorn_gamma: Class marginals of that balancing are proportional to mass ** gamma; 0 is uniform.
    """

    mode: TargetMode = "prod"
    seed_threshold: float = 0.4
    background_threshold: float = 0.15
    harden_above: float = 0.6
    restrict: Literal["present", "all"] = "present"
    tau_text: float = 0.01
    background: Background = "learn_all"
    unit: Unit = "pixel"
    balance: Balance = "none"
    max_pixels_per_image: int | None = None
    sinkhorn_rounds: int = 0
    sinkhorn_gamma: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        choices = {
            "mode": get_args(TargetMode),
            "restrict": ("present", "all"),
            "background": get_args(Background),
            "unit": get_args(Unit),
            "balance": get_args(Balance),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ConfigurationError(
                    f"targets.{key}={getattr(self, key)!r}: choose one of {', '.join(known)}"
                )
        for key in ("seed_threshold", "background_threshold", "harden_above"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigurationError(f"targets.{key}={getattr(self, key)} must lie in [0, 1]")
        if self.background_threshold > self.seed_threshold:
            raise ConfigurationError(
                f"targets.background_threshold={self.background_threshold} must not exceed "
                f"targets.seed_threshold={self.seed_threshold}: a pixel would be seed and background at once"
            )
        if not self.tau_text > 0:
            raise ConfigurationError(f"targets.tau_text={self.tau_text} must be positive; CLIP's is 0.01")
        if self.max_pixels_per_image is not None and self.max_pixels_per_image < 1:
            raise ConfigurationError(
                f"targets.max_pixels_per_image={self.max_pixels_per_image} must be at least 1, or null"
            )
        if self.sinkhorn_rounds < 0:
            raise ConfigurationError(f"targets.sinkhorn_rounds={self.sinkhorn_rounds} must not be negative")


class Selected(NamedTuple):
    """Samples of one image for phase 1."""

    features: Float[Tensor, "Q D"]
    """Float16; everything that is computed from them uses the rounded values."""
    targets: Float[Tensor, "Q R"]
    """Rows sum to one; ``R`` rows of prototypes that the background mode learns (:class:`Columns`)."""
    weights: Float[Tensor, " Q"]
    allowed: Bool[Tensor, " R"]
    """Prototypes of the image's own classes and of the background."""
    priorities: Int[Tensor, " Q"]
    """Random numbers from the seed and the image's key; the smallest are kept where not all can be."""


class _Seeds(NamedTuple):
    """What the maps say of each sample."""

    classes: Bool[Tensor, "U K"]
    background: Bool[Tensor, " U"]
    best: Int[Tensor, " U"]
    """Position of the highest map among the image's classes."""


def select_pixels(
    cams: Float[Tensor, "K h w"],
    features: Float[Tensor, "P D"],
    text: Float[Tensor, "C D"],
    classes: Int[Tensor, " K"],
    *,
    num_foreground: int,
    config: TargetConfig,
    key: str = "",
    seed: int = 0,
    class_weights: Float[Tensor, " R"] | None = None,
) -> Selected:
    """Choose the samples of one image and make their targets.

    Args:
        cams: Maps of the present classes in [0, 1] on the patch grid, raw or refined.
        features: Dense patch features in the joint space, unit rows, in row-major order of the grid.
        text: Text prototypes, unit rows, foreground first.
        classes: 0-based foreground id of each map.
        num_foreground: ``N``.
        config: How.
        key: Identifies the image; with ``seed`` it alone decides the random choice, not the order of images.
        seed: Of the random choice.
        class_weights: For ``balance="class"``, see :func:`inverse_class_frequency`.

    Raises:
        DataError: If the maps do not fit the features or the classes.
    """
    if not 0 < cams.shape[0] == classes.shape[0] or cams.shape[1:].numel() != features.shape[0]:
        raise DataError(
            f"image {key!r}: maps of shape {tuple(cams.shape)} do not fit {classes.shape[0]} classes and "
            f"{features.shape[0]} patches; pass one map a class on the patch grid"
        )
    columns = Columns(num_foreground, text.shape[0] - num_foreground, config.background)
    features = features.to(torch.float16)
    rounded = features.float()
    text, classes = text.to(rounded), classes.to(rounded.device)
    seeds, used = _find_seeds(cams.to(rounded).flatten(1).T, config, learns=columns.has_background)
    if config.unit == "pixel":
        chosen = used.nonzero()[:, 0]
        seeds = _Seeds(*(part[chosen] for part in seeds))
        features, rounded = features[chosen], rounded[chosen]
    else:
        rounded, seeds = _pool(rounded, seeds, used, config)
        features = rounded.to(torch.float16)
        rounded = features.float()
    targets = columns.reduce_targets(_targets(rounded, text, classes, seeds, num_foreground, config))
    priorities = pixel_priorities(key, len(features), seed=seed).to(features.device)
    if config.max_pixels_per_image is not None and len(features) > config.max_pixels_per_image:
        kept = keep_smallest(priorities, config.max_pixels_per_image)
        features, targets, priorities = features[kept], targets[kept], priorities[kept]
    weights = _weights(targets, config, class_weights)
    allowed = columns.reduce_mask(_support(classes, text.shape[0], num_foreground))
    return Selected(features, targets, weights, allowed, priorities)


def inverse_class_frequency(
    image_counts: Int[Tensor, " N"], *, num_images: int, columns: Columns
) -> Float[Tensor, " R"]:
    """Return the weights of ``balance="class"``: a class's samples weigh the mean count over its own.

    Args:
        image_counts: Images tagged with each foreground class.
        num_images: Images in all; each of them has background.
        columns: The rows of prototypes.
    """
    counts = torch.full((columns.rows,), float(num_images), dtype=torch.float32)
    counts[: columns.num_foreground] = image_counts.float().clamp(min=1)
    return counts.mean() / counts


def _support(classes: Tensor, total: int, num_foreground: int) -> Tensor:
    support = torch.zeros(total, dtype=torch.bool, device=classes.device)
    support[classes] = True
    support[num_foreground:] = True
    return support


def _find_seeds(maps: Float[Tensor, "P K"], config: TargetConfig, *, learns: bool) -> tuple[_Seeds, Tensor]:
    """Threshold the maps; also return which pixels are used."""
    highest, best = maps.max(-1)
    background = (highest < config.background_threshold) & learns
    seeds = _Seeds(maps >= config.seed_threshold, background, best)
    if config.mode in SEEDLESS:
        return seeds, torch.ones_like(background)
    return seeds, background | (highest >= config.seed_threshold)


def _pool(features: Tensor, seeds: _Seeds, used: Tensor, config: TargetConfig) -> tuple[Tensor, _Seeds]:
    """Replace pixels by the unit mean feature of each region, or of the image."""
    count = seeds.classes.shape[1]
    foreground = seeds.classes.any(-1)
    if config.unit == "region":
        owners = F.one_hot(seeds.best, count).bool() & foreground[:, None]
        members = torch.cat([owners, seeds.background[:, None]], dim=1)
        masks = torch.eye(count + 1, dtype=torch.bool, device=features.device)
    else:
        members = (used if config.mode in SEEDLESS else foreground)[:, None]
        masks = torch.ones(1, count + 1, dtype=torch.bool, device=features.device)
        masks[:, -1] = False
    present = members.any(0)
    means = F.normalize(members.to(features).T @ features, dim=-1)[present]
    masks = masks[present]
    # One class alone decides itself; for an image of several the highest text probability does.
    best = torch.where(masks[:, :count].sum(-1) > 1, -1, masks[:, :count].int().argmax(-1))
    return means, _Seeds(masks[:, :count], masks[:, count], best)


def _targets(
    features: Tensor, text: Tensor, classes: Tensor, seeds: _Seeds, num_foreground: int, config: TargetConfig
) -> Float[Tensor, "U C"]:
    total = text.shape[0]
    logits = features @ text.T / config.tau_text
    support = _support(classes, total, num_foreground)
    if config.background == "none":
        support[num_foreground:] = False
    if config.restrict == "all":
        support[:num_foreground] = True
    probabilities = _masked_softmax(logits, support)
    if config.mode == "soft":
        return probabilities
    if config.mode == "hardened":
        highest, winner = probabilities.max(-1, keepdim=True)
        return torch.where(highest > config.harden_above, _one_hot(winner[:, 0], total), probabilities)
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[:, classes] = seeds.classes
    mask[:, num_foreground:] = seeds.background[:, None]
    masked = _masked_softmax(logits, mask)
    if config.mode == "prod":
        return masked
    decided = _decided(masked, seeds, classes)
    if config.mode == "seed_hard":
        return torch.where(seeds.background[:, None], _one_hot(masked.argmax(-1), total), decided)
    hard = torch.where(seeds.background[:, None], masked, decided)
    if config.mode == "avg":
        return (probabilities + hard) / 2
    undecided = (seeds.classes.sum(-1) > 1) & ~seeds.background
    return torch.where(undecided[:, None], probabilities, hard)


def _decided(masked: Tensor, seeds: _Seeds, classes: Tensor) -> Tensor:
    """One-hot of the highest map; where the maps do not say, of the highest text probability."""
    by_map = classes[seeds.best.clamp(min=0)]
    return _one_hot(torch.where(seeds.best < 0, masked.argmax(-1), by_map), masked.shape[1])


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


def _one_hot(index: Tensor, total: int) -> Tensor:
    return F.one_hot(index, total).float()


def _weights(targets: Tensor, config: TargetConfig, class_weights: Tensor | None) -> Tensor:
    if config.balance == "class":
        if class_weights is None:
            raise ConfigurationError(
                "targets.balance='class' needs class_weights: how many images have each class"
            )
        return class_weights.to(targets)[targets.argmax(-1)]
    weight = 1 / max(len(targets), 1) if config.balance == "image" else 1.0
    return torch.full((len(targets),), weight, dtype=torch.float32, device=targets.device)
