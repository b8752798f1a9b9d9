"""The objective of phase 1, how far the prototypes' softmax is from the targets, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.statistics import AllReduce, Statistics
from vpl_lightning.functional.sweep import PixelChunk, Sweep

Init = Literal["text", "masked_mean", "zeros", "random"]

SAMPLES_WORTH_A_PRODUCT = 32
"""Mean samples an image from which on one product an image costs little more than one product a chunk."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What phase 1 minimises.

    Attributes:
        tau_image: The student's temperature, the paper's tau_I. The paper uses 0.03; 0.1 measured better.
        student_restrict: Whether the student's softmax ranges over all classes (absent ones are negatives) or
            over the image's own and the background.
        class_level_weight: Weight of the class-level term of the paper's remark on its equation 8.
        tau_text: Temperature of that term's target, over the text prototypes.
        init: Where the prototypes start: at text, at the mean feature of each target class, at zero (the
            span of the features is then never left), or at random unit rows.
    """

    tau_image: float = 0.1
    student_restrict: Literal["all", "present"] = "all"
    class_level_weight: float = 0.0
    tau_text: float = 0.01
    init: Init = "text"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for key in ("tau_image", "tau_text"):
            if not getattr(self, key) > 0:
                raise ConfigurationError(f"objective.{key}={getattr(self, key)} must be positive")
        if self.class_level_weight < 0:
            raise ConfigurationError(
                f"objective.class_level_weight={self.class_level_weight} must not be negative"
            )
        for key, known in {
            "student_restrict": ("all", "present"),
            "init": ("text", "masked_mean", "zeros", "random"),
        }.items():
            if getattr(self, key) not in known:
                raise ConfigurationError(
                    f"objective.{key}={getattr(self, key)!r}: choose one of {', '.join(known)}"
                )


class Evaluation(NamedTuple):
    """One pass over the data."""

    value: float
    """Mean KL divergence, in nats."""
    gradient: Float[Tensor, "R D"]
    """Float64."""


class PrototypeObjective:
    """Mean KL(targets || softmax(cosines / tau_image)) over the samples (the paper's equations 7 and 9).

    A pass costs two thin products in float32. On a CPU the sums over an image are float32, those over images
    float64, so that how the images are cut into chunks, files or ranks does not matter. (Accelerators, and
    images of a handful of samples, sum whole chunks: there the cut changes the rounding.) The products of
    targets and features never change and come in as :class:`Statistics`.

    Called with a tensor, it returns a loss for ``backward()`` whose gradient is the closed form. Across
    ``world_size`` ranks the loss has the value over all ranks and ``world_size`` times the gradient of this
    rank's samples, since DDP averages gradients: the average is exact, and its sum of one ``(R, D)`` matrix
    (and of one number here) is all that ranks exchange.

    Args:
        chunks: Gives this rank's samples anew on each call.
        statistics: Of this rank's samples.
        columns: The rows of prototypes.
        text: Text prototypes of those rows (:meth:`Columns.reduce`), unit rows.
        config: The settings.
        all_reduce: Sums over ranks; None for a single process.
        world_size: Number of ranks.

    Raises:
        DataError: If no rank has a sample.
    """

    def __init__(
        self,
        chunks: Callable[[], Iterable[PixelChunk]],
        statistics: Statistics,
        columns: Columns,
        text: Float[Tensor, "R D"],
        config: ObjectiveConfig,
        *,
        all_reduce: AllReduce | None = None,
        world_size: int = 1,
    ) -> None:
        self.config = config
        self.columns = columns
        self.statistics = statistics.all_reduce(all_reduce) if all_reduce else statistics
        """Of all ranks."""
        self.passes = 0
        """Passes over the data so far."""
        self._chunks = chunks
        self._local = statistics
        self._all_reduce = all_reduce or (lambda tensor: tensor)
        self._world_size = world_size
        self.text = text.double()
        """Text prototypes of the rows."""
        self._sweep = Sweep()
        self._by_image = bool(
            self.statistics.region_counts.sum() >= SAMPLES_WORTH_A_PRODUCT * self.statistics.images
        )
        if not self.statistics.weight > 0:
            raise DataError(
                "phase 1 found no pixel to learn from: no map reaches targets.seed_threshold and none stays "
                "below targets.background_threshold; lower the first or raise the second"
            )

    def initial(self, *, seed: int = 0) -> Float[Tensor, "R D"]:
        """Return the prototypes to start from, float64, as the settings ask."""
        text = self.text.cpu()
        if self.config.init == "text":
            rows = text
        elif self.config.init == "masked_mean":
            means = F.normalize(self.statistics.products.cpu(), dim=-1)
            rows = torch.where(means.norm(dim=-1, keepdim=True) > 0, means, text)
        elif self.config.init == "zeros":
            rows = torch.zeros_like(text)
        else:
            generator = torch.Generator().manual_seed(seed)
            rows = F.normalize(torch.randn(text.shape, dtype=text.dtype, generator=generator), dim=-1)
        return torch.where(self.columns.learnt[:, None], rows, text)

    def evaluate(self, prototypes: Float[Tensor, "R D"]) -> Evaluation:
        """Return the objective and its gradient over all ranks: one pass, one message."""
        value, gradient = self._local_pass(prototypes)
        packed = self._all_reduce(torch.cat([value.reshape(1), gradient.flatten()]))
        return Evaluation(float(packed[0]), packed[1:].reshape(gradient.shape))

    def __call__(self, prototypes: Float[Tensor, "R D"]) -> Float[Tensor, ""]:
        """Return the objective as a loss, see the class."""
        loss: Tensor = _Loss.apply(prototypes, self)
        return loss

    def _local_pass(self, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the value and of the gradient."""
        self.passes += 1
        prototypes = prototypes.detach()
        exact = prototypes.double()
        tau, weight = self.config.tau_image, self.statistics.weight.to(exact.device)
        local = Statistics(*(part.to(exact.device) for part in self._local.tensors().values()))
        offsets = self.columns.offsets.to(exact.device)
        sums, log_sums = self._sweep(
            self._chunks(),
            prototypes.float() / tau,
            offsets,
            restrict=self.config.student_restrict == "present",
            by_image=self._by_image and exact.device.type == "cpu",
        )
        linear = (local.products * exact).sum() / tau + (local.mass * offsets.double()).sum()
        value = (log_sums - linear - local.entropy) / weight
        gradient = (sums - local.products) / (tau * weight)
        if self.config.class_level_weight:
            text = self.text.to(exact.device)
            share = self.config.class_level_weight * float(local.weight / weight)
            class_value, class_gradient = class_level_term(exact, text, self.config)
            value, gradient = value + share * class_value, gradient + share * class_gradient
        gradient[~self.columns.learnt.to(exact.device)] = 0
        return value, gradient

    def _loss_and_gradient(self, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self._local_pass(prototypes)
        return self._all_reduce(value), gradient * self._world_size


class _Loss(torch.autograd.Function):
    """Gives ``backward()`` the gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, prototypes: Tensor, objective: PrototypeObjective) -> Tensor:
        value, gradient = objective._loss_and_gradient(prototypes)
        ctx.save_for_backward(gradient.to(prototypes.dtype))
        return value.to(prototypes.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None


def class_level_term(
    prototypes: Float[Tensor, "R D"], text: Float[Tensor, "R D"], config: ObjectiveConfig
) -> tuple[Float[Tensor, ""], Float[Tensor, "R D"]]:
    """Return the class-level divergence and its gradient.

    The softmax over prototypes is taken at each prototype instead of at each pixel: mean over rows of
    KL(softmax(text @ text_n / tau_text) || softmax(prototypes @ prototype_n / tau_image)).
    """
    target = (text @ text.T / config.tau_text).log_softmax(-1)
    student = (prototypes @ prototypes.T / config.tau_image).log_softmax(-1)
    value = (target.exp() * (target - student)).sum() / len(text)
    slope = (student.exp() - target.exp()) / (config.tau_image * len(text))
    return value, (slope + slope.T) @ prototypes
