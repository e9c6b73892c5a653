"""Send only the signs of the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flpriv.defense import Defense, Local
from flpriv.state import State


@dataclass(frozen=True, kw_only=True)
class SignSGD(Defense):
    """Replace each entry of the update by its sign times the mean absolute value of its tensor; zeros stay zero.

    The scale keeps the averages of ordinary strategies sane: a tensor without zeros moves as far in the 1-norm as it would have.
    It tells one number per tensor besides the signs; the paper sends none and lets the sites vote.
    """

    name: ClassVar[str] = "sign-sgd"
    acts_on: ClassVar[Literal["update"]] = "update"
    paper: ClassVar[str] = "Bernstein et al., signSGD: Compressed Optimisation, ICML 2018 (arXiv 1802.04434)"

    def protect(self, update: State, *, local: Local) -> State:
        """The signs, scaled."""
        return {key: value.sign() * value.abs().mean() if value.numel() else value for key, value in update.items()}
