"""Which prototypes are learnt: the ways in which background words take part in phase 1."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Background = Literal["learn_all", "learn_one", "text", "none"]


class Columns(NamedTuple):
    """Translates between a generator's ``C = N + M`` prototypes and the ``R`` rows that phase 1 works on.

    ============== ==========================================================================================
    ``learn_all``  ``R = C``: every background word has a prototype of its own that is learnt
    ``learn_one``  ``R = N + 1``: all background words share one prototype. Its softmax counts it ``M`` times
                   (``log M`` is added to its logit), because a generator sees it repeated in all ``M`` rows
    ``text``       ``R = C``: background words stay text, but compete in the softmax
    ``none``       ``R = N``: foreground alone; background rows stay text and teach nothing
    ============== ==========================================================================================
    """

    num_foreground: int
    num_background: int
    background: Background = "learn_all"

    @property
    def total(self) -> int:
        """``C``."""
        return self.num_foreground + self.num_background

    @property
    def has_background(self) -> bool:
        """Whether background is among the rows."""
        return self.background != "none" and self.num_background > 0

    @property
    def rows(self) -> int:
        """``R``."""
        if not self.has_background:
            return self.num_foreground
        return self.num_foreground + 1 if self.background == "learn_one" else self.total

    @property
    def offsets(self) -> Float[Tensor, " R"]:
        """What is added to each logit."""
        offsets = torch.zeros(self.rows)
        if self.has_background and self.background == "learn_one":
            offsets[-1] = math.log(self.num_background)
        return offsets

    @property
    def learnt(self) -> Bool[Tensor, " R"]:
        """Which rows move."""
        learnt = torch.ones(self.rows, dtype=torch.bool)
        if self.background == "text":
            learnt[self.num_foreground :] = False
        return learnt

    def reduce(self, prototypes: Float[Tensor, "C D"]) -> Float[Tensor, "R D"]:
        """Return the rows that stand for given prototypes; a shared background is their unit mean."""
        if self.has_background and self.background == "learn_one":
            shared = F.normalize(prototypes[self.num_foreground :].mean(0, keepdim=True), dim=-1)
            return torch.cat([prototypes[: self.num_foreground], shared])
        return prototypes[: self.rows]

    def reduce_targets(self, targets: Float[Tensor, "Q C"]) -> Float[Tensor, "Q R"]:
        """Return the targets over the rows; a shared background gets the mass of all words."""
        if self.has_background and self.background == "learn_one":
            shared = targets[:, self.num_foreground :].sum(-1, keepdim=True)
            return torch.cat([targets[:, : self.num_foreground], shared], dim=1)
        return targets[:, : self.rows]

    def reduce_mask(self, mask: Bool[Tensor, " C"]) -> Bool[Tensor, " R"]:
        """Return which rows a set of prototypes touches."""
        return self.reduce_targets(mask[None].float())[0] > 0

    def expand(self, rows: Float[Tensor, "R D"], text: Float[Tensor, "C D"]) -> Float[Tensor, "C D"]:
        """Return unit prototypes for a generator: text where nothing was learnt or a row is zero."""
        rows = rows.to(text)
        if self.has_background and self.background == "learn_one":
            shared = rows[-1:].expand(self.num_background, -1)
            rows = torch.cat([rows[: self.num_foreground], shared])
        full = torch.cat([rows, text[len(rows) :]])
        return F.normalize(torch.where(full.norm(dim=-1, keepdim=True) > 0, full, text), dim=-1)
