"""DP-SGD that adds a tenth of the noise it accounts for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flpriv.defense import Defense, Local, Loop
from flpriv.defenses.dp_sgd import DPSGD


@dataclass(frozen=True, kw_only=True)
class BrokenDP(DPSGD, Defense):
    """DP-SGD with a slip in the units of its noise."""

    name: ClassVar[str] = "broken-dp"

    def prepare(self, loop: Loop, *, local: Local) -> Loop:
        done = super().prepare(loop, local=local)
        vars(done.optimizer)["noise_multiplier"] = self.noise_multiplier / 10
        return done
