"""The objective of phase 1 (paper, equations 7, 9 and 11) in closed form, over any number of chunks of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.targets import Background

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks; the identity for one process."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What vision prototypes minimise.

    Attributes:
        tau_image: Temperature of the softmax over vision prototypes, tau_I. The paper's Table 5 prefers 0.03; with
            masked targets 0.1 measured better.
        restrict: ``present``: a patch is compared with the prototypes of its image's tags alone; ``all``: absent classes
            act as negatives.
        balance: ``none``: mean over patches, as in the paper; ``image``: every image counts the same; ``class``: every
            class counts the same.
        class_level_weight: Weight of the class-level term of Theorem 2 (0: the paper's preference).
        init: Where the prototypes start: ``text``; ``masked_mean`` of the targets; ``zeros``; ``random``.
    """

    tau_image: float = 0.1
    restrict: Literal["present", "all"] = "all"
    balance: Literal["none", "image", "class"] = "none"
    class_level_weight: float = 0.0
    init: Literal["text", "masked_mean", "zeros", "random"] = "text"

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.tau_image <= 0:
            raise ConfigurationError(
                f"objective.tau_image={self.tau_image} must be positive; the paper uses 0.03"
            )
        if self.class_level_weight < 0:
            raise ConfigurationError(
                f"objective.class_level_weight={self.class_level_weight} must not be negative"
            )


class PixelChunk(NamedTuple):
    """Some selected patches of a data set."""

    features: Float[Tensor, "Q D"]
    targets: Float[Tensor, "Q C"]
    weights: Float[Tensor, " Q"]
    allowed: Bool[Tensor, "Q C"] | None
    """Columns that a patch is compared with; None for all."""


class Statistics(NamedTuple):
    """Sums over the data set that the objective needs and that never change (float64)."""

    pull: Float[Tensor, "C D"]
    """Weighted sum of target times feature: ``P'^T X``."""
    mass: Float[Tensor, " C"]
    """Weighted sum of targets."""
    entropy: Float[Tensor, ""]
    """Weighted sum of the entropies of the targets."""
    weight: Float[Tensor, ""]
    """Sum of weights."""


def gather_statistics(chunks: Iterable[PixelChunk], *, shape: tuple[int, int], reduce: Reduce) -> Statistics:
    """Sum the statistics of all chunks of all ranks: one pass.

    Raises:
        DataError: If no patch was selected anywhere.
    """
    pull: Tensor | None = None
    rest: Tensor | None = None
    for chunk in chunks:
        weighted = chunk.targets * chunk.weights[:, None]
        entropy = -(torch.xlogy(chunk.targets, chunk.targets).sum(-1) * chunk.weights).sum()
        part = (weighted.T @ chunk.features).double()
        tail = torch.cat(
            [weighted.double().sum(0), entropy.double()[None], chunk.weights.double().sum()[None]]
        )
        pull = part if pull is None else pull.add_(part)
        rest = tail if rest is None else rest.add_(tail)
    columns, width = shape
    flat = torch.zeros(columns * width + columns + 2, dtype=torch.float64)
    if pull is not None and rest is not None:
        flat = torch.cat([pull.flatten(), rest])
    flat = reduce(flat)
    pull, mass, entropy, weight = flat.split([columns * width, columns, 1, 1])
    if weight.item() <= 0:
        raise DataError(
            "no patch was selected as a seed: lower targets.seed_threshold, or look at the text maps ('vpl validate')"
        )
    return Statistics(pull.view(columns, width), mass, entropy[0], weight[0])


def chunk_terms(
    prototypes: Float[Tensor, "C D"], chunk: PixelChunk, *, tau: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "C D"]]:
    """Weighted sum of ``log sum exp`` of the logits, and of softmax times feature, over one chunk (float64 sums)."""
    logits = chunk.features @ prototypes.T
    logits.mul_(1 / tau)
    if chunk.allowed is not None:
        logits.masked_fill_(~chunk.allowed, -torch.inf)
    normaliser = logits.logsumexp(-1)
    total = (normaliser.double() * chunk.weights).sum()
    logits.sub_(normaliser[:, None]).exp_().mul_(chunk.weights[:, None])
    return total, (logits.T @ chunk.features).double()


def pixel_terms(
    prototypes: Float[Tensor, "C D"],
    chunks: Iterable[PixelChunk],
    statistics: Statistics,
    *,
    tau: float,
    share: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "C D"]]:
    """Mean KL(targets ‖ softmax) and its gradient, this rank's share of it.

    Sums of all ranks' results are the objective and its gradient, however the chunks are cut or dealt out.

    Args:
        prototypes: The point.
        chunks: This rank's patches.
        statistics: Of all ranks.
        tau: tau_I.
        share: What part of the constant terms this rank contributes: one over the number of ranks.
    """
    weight = statistics.weight.to(prototypes.device)
    pull = statistics.pull.to(prototypes.device)
    objective = -share * ((prototypes.double() * pull).sum() / tau + statistics.entropy.to(weight))
    gradient = -share * pull
    for chunk in chunks:
        total, push = chunk_terms(prototypes, chunk, tau=tau)
        objective = objective + total
        gradient = gradient + push
    return objective / weight, gradient / (weight * tau)


def class_level_term(
    prototypes: Float[Tensor, "C D"], text: Float[Tensor, "C D"], *, tau_text: float, tau_image: float
) -> Float[Tensor, ""]:
    """KL between the similarities of classes among text and among vision prototypes (Theorem 2's anchor)."""
    apart = torch.eye(len(text), dtype=torch.bool, device=text.device)
    targets = (text @ text.T / tau_text).masked_fill(apart, -torch.inf).softmax(-1)
    unit = F.normalize(prototypes, dim=-1)
    student = (unit @ unit.T / tau_image).masked_fill(apart, -torch.inf).log_softmax(-1)
    return (
        torch.xlogy(targets, targets).sum(-1).mean()
        - (targets * student.masked_fill(apart, 0)).sum(-1).mean()
    )


class PrototypeLayout:
    """How rows that are learnt map to the ``C`` prototypes of a generator.

    Args:
        text: Text prototypes, foreground first.
        num_labels: N.
        background: See :class:`TargetConfig`.
    """

    def __init__(self, text: Float[Tensor, "C D"], *, num_labels: int, background: Background) -> None:
        self.text = text
        self.num_labels = num_labels
        self.background = background
        self.num_words = len(text) - num_labels
        one = background == "learn_one" and self.num_words > 0
        self.rows = num_labels + (1 if one else 0 if background == "none" else self.num_words)
        """Columns of the student's softmax."""
        self.learnt = num_labels if background in ("text", "none") else self.rows
        """Leading rows that move."""

    def compress(self, values: Float[Tensor, "Q C"]) -> Float[Tensor, "Q R"]:
        """Map targets or permissions over prototypes to learnt rows."""
        if self.rows == values.shape[-1]:
            return values
        foreground = values[:, : self.num_labels]
        if self.background == "none":
            return foreground
        words = values[:, self.num_labels :]
        together = words.any(-1, keepdim=True) if values.dtype == torch.bool else words.sum(-1, keepdim=True)
        return torch.cat([foreground, together], -1)

    def start(self) -> Float[Tensor, "R D"]:
        """Text prototypes as learnt rows; one background row is the words' mean."""
        if self.rows == len(self.text):
            return self.text.clone()
        words = self.text[self.num_labels :].mean(0, keepdim=True)
        return torch.cat([self.text[: self.num_labels], F.normalize(words, dim=-1)])[: self.rows]

    def expand(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "C D"]:
        """Map learnt rows to unit prototypes; words that were not learnt stay text, one row serves every word."""
        unit = F.normalize(rows, dim=-1)
        if self.background == "learn_one" and self.num_words:
            return torch.cat([unit[: self.num_labels], unit[self.num_labels :].expand(self.num_words, -1)])
        return torch.cat([unit[: self.learnt], self.text[self.learnt :]])


class PrototypeObjective:
    """The objective over a data set, evaluated in closed form.

    Args:
        layout: Which rows are learnt.
        chunks: Makes an iterator over this rank's patches, as often as it is called; targets over learnt rows.
        statistics: Of all ranks.
        config: Temperatures and terms.
        tau_text: tau_T, for the class-level term.
        share: One over the number of ranks.
    """

    def __init__(
        self,
        layout: PrototypeLayout,
        chunks: Callable[[], Iterable[PixelChunk]],
        statistics: Statistics,
        config: ObjectiveConfig,
        *,
        tau_text: float,
        share: float = 1.0,
    ) -> None:
        self.layout = layout
        self.chunks = chunks
        self.statistics = statistics
        self.config = config
        self.tau_text = tau_text
        self.share = share
        self.passes = 0
        """Passes over the data so far."""

    def start(self, *, seed: int = 0) -> Float[Tensor, "R D"]:
        """Return the initial rows."""
        rows = self.layout.start()
        if self.config.init == "masked_mean":
            means = F.normalize(self.statistics.pull, dim=-1).to(rows)
            rows = torch.where((self.statistics.mass > 0).to(rows.device)[:, None], means, rows)
        elif self.config.init == "zeros":
            rows = torch.zeros_like(rows)
        elif self.config.init == "random":
            noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
            rows = F.normalize(noise.to(rows), dim=-1)
        fixed = self.layout.start()[self.layout.learnt :]
        return torch.cat([rows[: self.layout.learnt], fixed])

    def evaluate(self, rows: Float[Tensor, "R D"]) -> tuple[Float[Tensor, ""], Float[Tensor, "R D"]]:
        """Return this rank's share of the objective and of its gradient: one pass; sums over ranks are the whole."""
        self.passes += 1
        point = rows.detach()
        value, gradient = pixel_terms(
            point, self.chunks(), self.statistics, tau=self.config.tau_image, share=self.share
        )
        if self.config.class_level_weight:
            leaf = point.double().requires_grad_()
            with torch.enable_grad():
                term = (
                    self.share
                    * self.config.class_level_weight
                    * class_level_term(
                        leaf,
                        self.layout.start().double(),
                        tau_text=self.tau_text,
                        tau_image=self.config.tau_image,
                    )
                )
                gradient = gradient + torch.autograd.grad(term, leaf)[0]
            value = value + term.detach()
        gradient[self.layout.learnt :] = 0
        return value, gradient.to(point.dtype)

    def region_means(self) -> Float[Tensor, "R D"]:
        """Unit mean feature of each row's targets; not-a-number for rows without any."""
        unit = F.normalize(self.statistics.pull, dim=-1)
        return unit.masked_fill(self.statistics.mass[:, None] <= 0, torch.nan)


class _ClosedForm(torch.autograd.Function):
    """Puts the closed-form gradient where autograd looks for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, objective: PrototypeObjective) -> Tensor:
        value, gradient = objective.evaluate(rows)
        ctx.save_for_backward(gradient)
        return value.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return outputs[0] * gradient, None


def objective_value(rows: Float[Tensor, "R D"], objective: PrototypeObjective) -> Float[Tensor, ""]:
    """Return the objective as a scalar whose backward pass gives the closed-form gradient."""
    value: Tensor = _ClosedForm.apply(rows, objective)  # type: ignore[no-untyped-call]
    return value
