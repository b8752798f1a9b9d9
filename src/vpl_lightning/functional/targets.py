"""What a patch should answer: soft labels from text similarity and from seeds (paper, equations 3, 7 and 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError

TargetMode = Literal["soft", "hardened", "seed_hard", "seeded_soft", "prod", "avg"]
Background = Literal["learn_all", "learn_one", "text", "none"]


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """How the targets of phase 1 are made. The paper leaves this open; the choices are those that we measured.

    Attributes:
        mode: ``soft``: softmax over text, the literal P'. ``hardened``: the same, rows above ``harden_above``
            one-hot (InMaP). ``seed_hard``: seeds alone, one-hot. ``seeded_soft``: seeds alone, one-hot where one class
            claims a patch, softmax among the claimants otherwise. ``prod``: softmax over text times the 0/1 seed mask.
            ``avg``: half softmax over text, half seed mask.
        seed_threshold: Phi of the paper's Table 6: a patch whose map reaches it is a seed of the class.
        background_threshold: A patch whose highest map is below it is a seed of the background.
        harden_above: Probability above which ``hardened`` takes the arg max (InMaP: 0.6).
        restrict: ``present``: classes that the image is not tagged with have no share of the text softmax.
        tau_text: Temperature of the text softmax, tau_T.
        background: ``learn_all``: a prototype for each background word; ``learn_one``: one for all; ``text``: the
            words stay text; ``none``: the foreground alone.
        unit: ``pixel``: patches; ``region``: one mean feature an image and class; ``image``: one an image.
        max_pixels_per_image: Seeded random cap on the patches that an image contributes; None takes all.
    """

    mode: TargetMode = "prod"
    seed_threshold: float = 0.4
    background_threshold: float = 0.15
    harden_above: float = 0.6
    restrict: Literal["present", "all"] = "present"
    tau_text: float = 0.01
    background: Background = "learn_all"
    unit: Literal["pixel", "region", "image"] = "pixel"
    max_pixels_per_image: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for key in ("seed_threshold", "background_threshold", "harden_above"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigurationError(f"targets.{key}={getattr(self, key)} must lie between 0 and 1")
        if self.tau_text <= 0:
            raise ConfigurationError(
                f"targets.tau_text={self.tau_text} must be positive; the paper uses 0.01"
            )
        if self.max_pixels_per_image is not None and self.max_pixels_per_image < 1:
            raise ConfigurationError(
                f"targets.max_pixels_per_image={self.max_pixels_per_image} must be at least 1"
            )


class Selected(NamedTuple):
    """What one image contributes to phase 1."""

    features: Float[Tensor, "Q D"]
    """Unit rows."""
    targets: Float[Tensor, "Q C"]
    """Rows sum to one."""
    allowed: Bool[Tensor, " C"]
    """Prototypes of the image's tags, and the background."""


def text_softmax(
    features: Float[Tensor, "P D"], text: Float[Tensor, "C D"], allowed: Bool[Tensor, " C"], *, tau: float
) -> Float[Tensor, "P C"]:
    """P' of equation 7: softmax of cosines to the text prototypes, over the allowed ones."""
    return (features @ text.T / tau).masked_fill(~allowed, -torch.inf).softmax(-1)


def seed_mask(
    cams: Float[Tensor, "K P"],
    classes: Int[Tensor, " K"],
    *,
    num_labels: int,
    num_prototypes: int,
    config: TargetConfig,
) -> Float[Tensor, "P C"]:
    """0/1 seed mask m: which prototypes may claim a patch, all background words together."""
    mask = cams.new_zeros(cams.shape[1], num_prototypes)
    mask[:, classes] = (cams >= config.seed_threshold).T.to(mask)
    mask[:, num_labels:] = (cams.amax(0) < config.background_threshold).to(mask)[:, None]
    return mask


def select_pixels(
    features: Float[Tensor, "P D"],
    cams: Float[Tensor, "K P"],
    classes: Int[Tensor, " K"],
    text: Float[Tensor, "C D"],
    *,
    num_labels: int,
    config: TargetConfig,
    seed: int = 0,
) -> Selected:
    """Choose the patches of one image that phase 1 learns from, and their targets.

    Args:
        features: Unit rows in the joint space.
        cams: Maps in [0, 1] of the tags, flattened patches.
        classes: Foreground ids of the maps.
        text: Text prototypes, foreground first.
        num_labels: N.
        config: The settings.
        seed: Decides which patches the cap keeps.
    """
    allowed = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    allowed[classes] = True
    allowed[num_labels:] = config.background != "none"
    if config.restrict == "all":
        reachable = torch.ones_like(allowed)
        reachable[num_labels:] = allowed[num_labels:]
    else:
        reachable = allowed
    soft = text_softmax(features, text, reachable, tau=config.tau_text)
    mask = (
        seed_mask(cams, classes, num_labels=num_labels, num_prototypes=len(text), config=config) * reachable
    )
    targets = _targets(soft, mask, config, num_labels=num_labels)
    kept = (targets.sum(-1) > 0).nonzero().squeeze(-1)
    cap = config.max_pixels_per_image
    if cap is not None and len(kept) > cap:
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:cap].sort().values
        kept = kept[order.to(kept.device)]
    targets = F.normalize(targets[kept], p=1, dim=-1)
    if config.background == "none":
        targets[:, num_labels:] = 0
    chosen = Selected(features[kept], targets, allowed)
    return chosen if config.unit == "pixel" else _pooled(chosen, config)


def _targets(
    soft: Float[Tensor, "P C"], mask: Float[Tensor, "P C"], config: TargetConfig, *, num_labels: int
) -> Float[Tensor, "P C"]:
    """Combine text softmax and seed mask; rows without mass are not used."""
    claimed = mask.sum(-1, keepdim=True) > 0
    # Among background words the text decides, whatever the mode: the seeds cannot tell them apart.
    share = F.normalize(soft * mask, p=1, dim=-1)
    if config.mode == "soft":
        return soft
    if config.mode == "hardened":
        sure = soft.amax(-1, keepdim=True) > config.harden_above
        return torch.where(sure, _one_hot(soft), soft)
    if config.mode == "prod":
        return share
    foreground = F.normalize(mask[:, :num_labels], p=1, dim=-1)
    words = F.normalize(share[:, num_labels:], p=1, dim=-1) * claimed
    words = words * (mask[:, :num_labels].sum(-1, keepdim=True) == 0)
    spread = torch.cat([foreground, words], -1)
    if config.mode == "avg":
        return (0.5 * soft + 0.5 * spread) * claimed
    if config.mode == "seed_hard":
        return _one_hot(share) * claimed
    alone = mask[:, :num_labels].sum(-1, keepdim=True) == 1
    return torch.where(alone, spread, share) * claimed


def _one_hot(scores: Float[Tensor, "P C"]) -> Float[Tensor, "P C"]:
    return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)


def _pooled(chosen: Selected, config: TargetConfig) -> Selected:
    """Replace patches by the mean feature of each region, or of the image."""
    features, targets, allowed = chosen
    if config.unit == "image":
        return Selected(
            F.normalize(features.mean(0, keepdim=True), dim=-1)[: len(features)],
            targets.mean(0, keepdim=True)[: len(features)],
            allowed,
        )
    present = (targets.sum(0) > 0).nonzero().squeeze(-1)
    means = F.normalize(targets[:, present].T @ features, dim=-1)
    return Selected(means, F.one_hot(present, targets.shape[-1]).to(targets), allowed)
